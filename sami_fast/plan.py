"""What a run will cost, before anything runs: parameters, FLOPs, memory of a GPU, bytes sent between GPUs, time.

Parameters, FLOPs and the bytes kept for the backward pass are counted, by running the networks on tensors that have a shape and no data;
so are the kernels of a step, with what each reads, writes and multiplies (gpu_step.py).
All else is estimated from these counts and from what DeepSpeed 0.19 does at each ZeRO stage. No GPU is used, and the times have not been
compared with a real one. Without the compiled core attention is counted as plain torch computes it: that keeps more than a GPU's kernels.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache, partial, reduce
from importlib.util import find_spec
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import gpu_step, score
from .config import GREY_OR_COLOUR, Config, bucket_elements
from .data import open_dataset
from .errors import UserError
from .methods.build import build_model, with_images_of_denoiser
from .methods.latent_model import LatentModel
from .methods.registry import METHODS

FLOAT = 4  # bytes of a float32; weights, gradients, moments and averages are kept in no other type
STAGES = (0, 1, 2, 3)  # of ZeRO
PEAK_SHARE = 0.45  # assumed share of the GPU's peak that a convolution or matrix product reaches
BANDWIDTH_SHARE = 0.8  # assumed share of its memory's bandwidth that a kernel reaches
KERNEL = 2.5e-6  # seconds that a kernel takes at least
HOST = (8e-6, 12e-6)  # seconds of the host for each kernel that it starts, from a fast processor to a slow one
MFU = 0.25  # assumed where kernels cannot be counted: FLOPs of a step / (its seconds * the GPU's peak)
LINK_SHARE = 0.7  # assumed share of a link's bandwidth that collectives reach
USABLE = 0.9  # share of a GPU's memory that tensors may take; driver, libraries and gaps between tensors take the rest


@dataclass(frozen=True)
class GPU:
    """A vendor's published figures for one GPU: dense arithmetic, and links in one direction (vendors advertise both added up)."""

    memory: float  # GB
    bandwidth: float  # TB/s of that memory
    bf16: float  # TFLOP/s of the tensor cores
    tf32: float  # TFLOP/s of the tensor cores, for float32 with engine.tf32
    fp32: float  # TFLOP/s outside the tensor cores
    nvlink: float  # GB/s
    network: float  # GB/s of the adapter beside each GPU
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s that convolutions and matrix products can reach. `precision`: "bf16", "tf32" or "fp32"."""
        return 1e12 * getattr(self, precision)

    def link(self, ranks: int) -> float:
        """Bytes per second of a ring: NVLink's or, between machines, those of all adapters of a machine together, if that is less."""
        return LINK_SHARE * 1e9 * (self.nvlink if ranks <= PER_MACHINE else min(self.nvlink, PER_MACHINE * self.network))


COLLECTIVES = {"nccl": 1, "gloo": 2}  # (ranks - 1) / ranks times this each rank sends of what is added up where it keeps a part of the sum
PER_MACHINE = 8  # GPUs of one machine, joined by NVLink, one network adapter beside each
GPUS = {
    "a100-80": GPU(80, 2.039, 312, 156, 19.5, 300, 25, "NVIDIA A100 80GB SXM data sheet; DGX A100: 200 Gb/s per GPU"),
    "h100-sxm": GPU(80, 3.35, 989, 494, 67, 450, 50, "NVIDIA H100 SXM data sheet; DGX H100: 400 Gb/s per GPU"),
    "h200": GPU(141, 4.8, 989, 494, 67, 450, 50, "NVIDIA H200 SXM data sheet; DGX H200: 400 Gb/s per GPU"),
    "b200": GPU(180, 8, 2250, 1100, 80, 900, 50, "NVIDIA Blackwell architecture brief, HGX B200; DGX B200: 180 GB and 400 Gb/s per GPU"),
}


# ---- what a network costs, counted


class _WithoutMemory(TorchFunctionMode):
    """Inside, `torch.empty` gives tensors of the device "meta", which hold no data: weights of any size take neither memory nor time."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


class _Meter(TorchDispatchMode):
    """Counts the FLOPs of what runs inside, and the bytes of the tensors made there that are still alive.

    Attributes:
        flops: FLOPs by torch's formulas, without attention.
        attention: FLOPs of the products of attention that torch has formulas for.
        held, peak: Bytes alive now, and the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.attention = self.held = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            count = formula(*args, **(kwargs or {}), out_val=out)
            if any(name in str(func) for name in ("bmm", "scaled_dot_product")):
                self.attention += count
            else:
                self.flops += count
        elif func is torch.ops.sami_fast.attention.default:
            q, k = args[:2]
            self.attention += 4 * q.numel() * k.shape[1]  # two products of 2 S_q S_k D for every head
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


@dataclass(frozen=True)
class Network:
    """What one image costs in one network: FLOPs of each pass over its layers, and bytes.

    Attributes:
        parameters, trained: How many numbers the parameters hold, and how many of these are trained.
        sizes: Of each trained parameter.
        forward: FLOPs of the forward pass; F in what follows.
        inputs, weights: FLOPs of the gradients of all layers' inputs and of all weights in a backward pass, about 1F each.
        spared: The part of `inputs` that goes into the gradient of the image itself, which a training step has no use for.
        attention: FLOPs of the two matrix products in attention's forward; all others are without attention.
        again: FLOPs that the backward pass spends on recomputing activations.
        kept: Bytes alive between forward and backward.
        peak: The most bytes alive at any moment of forward and backward.
        passing: The most bytes alive in a forward pass without gradients.
    """

    parameters: int
    trained: int
    sizes: tuple[int, ...]
    forward: int
    inputs: int
    weights: int
    spared: int
    attention: int
    again: int
    kept: int
    peak: int
    passing: int


def count(
    network: nn.Module, arguments: Sequence[Tensor], differentiable: Sequence[bool], learns: bool, recompute: bool = False
) -> Network:
    """Count a network.

    Args:
        network: Called with zeros in the shapes of the arguments; all its parameters get a gradient here, whether or not it `learns`.
        arguments: Of one image, all of batch 1.
        differentiable: Which of them a training step asks a gradient of.
        learns: Whether its parameters are trained.
        recompute: Whether its backward computes activations again; FLOPs are counted without that.
    """
    parameters = list(network.parameters())

    @cache
    def run(batch: int, of_weights: bool, of_arguments: tuple[bool, ...], again: bool) -> tuple[_Meter, _Meter, int]:
        """The meters of forward (which runs on through the backward) and of backward alone; the bytes alive between the two."""
        for parameter in parameters:
            parameter.requires_grad_(of_weights)
        given = [
            torch.zeros(batch, *a.shape[1:], dtype=a.dtype).requires_grad_(asked) for a, asked in zip(arguments, of_arguments, strict=True)
        ]
        forward, backward = _Meter(), _Meter()
        with forward:
            out = network(*given, **({"recompute": True} if again else {}))
            kept = forward.held
            total = torch.stack([part.sum() for part in tree_leaves(out)]).sum()
            if total.requires_grad:
                with backward:
                    total.backward()
        for parameter in parameters:
            parameter.grad = None
        return forward, backward, kept

    every, learned = tuple(a.is_floating_point() for a in arguments), tuple(differentiable)
    with torch.no_grad():
        plain, _, _ = run(1, False, (False,) * len(every), False)
    learning, both, to_inputs = (run(1, *asked, False)[1] for asked in ((True, learned), (True, every), (False, every)))
    (one, once_more, kept), (two, _, kept_of_two) = (run(batch, True, learned, recompute) for batch in (1, 2))
    sizes = tuple(p.numel() for p in parameters) if learns else ()
    return Network(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(sizes),
        sizes=sizes,
        forward=plain.flops,
        inputs=to_inputs.flops,
        weights=both.flops - to_inputs.flops,
        spared=both.flops - learning.flops,
        attention=plain.attention,
        again=once_more.flops + once_more.attention - learning.flops - learning.attention,
        kept=kept_of_two - kept,  # of one more image, since what does not grow with the batch is counted elsewhere
        peak=two.peak - one.peak,
        passing=plain.peak,
    )


def networks_of(config: Config, image_shape: tuple[int, int, int]) -> LatentModel:
    """The networks that training would build. Fresh ones take no memory for their weights; a pretrained one has to be loaded, and one that
    is somebody else's class has to be made.

    Raises:
        UserError: as `build_model`.
    """
    real = config.denoiser.pretrained or config.encoder.class_ or config.denoiser.class_
    with nullcontext() if real else _WithoutMemory():
        return build_model(config, image_shape)


def count_networks(config: Config, model: LatentModel, image_shape: tuple[int, int, int]) -> tuple[Network, Network]:
    """The encoder, and the network beside it. The model's weights are replaced by tensors without data, unless it has networks of somebody
    else's, which may look at their numbers."""
    real = bool(config.encoder.class_ or config.denoiser.class_)
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        for module in () if real else model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
        image, t, z = torch.empty(1, *image_shape), torch.empty(1), torch.empty(1, model.latent_size)
        # z reaches the other network as an input, with a gradient for the encoder, unless the encoder guides it from outside.
        arguments = (*((image, t) if model.noisy else ()), *(() if model.guides else (z,)))
        differentiable = [argument is z for argument in arguments]
        learns, recompute = config.mode != "frozen", config.engine.checkpoint_activations
        return (
            count(model.networks["encoder"], (image,), (False,), True),
            count(model.networks[model.partner], arguments, differentiable, learns, recompute),
        )


# ---- FLOPs of a step


@dataclass(frozen=True)
class Passes:
    """How often a way of using a network makes each of the passes that `Network` counts."""

    forward: int
    inputs: int
    weights: int
    spared: int  # how many of the `inputs` passes leave out the gradient of the image
    attention: int  # matrix products of attention: a forward pass has two, docs/kernels.md counts the others

    def flops(self, network: Network) -> float:
        """Of one image."""
        convolutions = self.forward * network.forward + self.inputs * network.inputs + self.weights * network.weights
        return convolutions - self.spared * network.spared + self.attention / 2 * network.attention


PASSES = {
    "forward": Passes(1, 0, 0, 0, 2),  # 1F: no gradients
    "trained": Passes(1, 1, 1, 1, 9),  # 3F: forward, then the gradients of inputs and of weights
    # The other three are ways to take the score and its gradients (score.py).
    # 6F: forward (1 forward); adjoint (1 inputs); tangent (costs a forward); joint (1 inputs, and the weights twice)
    "sweeps": Passes(2, 2, 2, 1, 33),
    # 6F: forward; gradient (1 inputs); the gradient's own backward (costs a forward, and weights); the forward's (inputs and weights)
    "reverse": Passes(2, 2, 2, 0, 34),
    # 8F: forward and gradient (1 inputs) for the value; forward (2) and backward (2 inputs, 2 weights) of value and tangent for the rest
    "dual": Passes(3, 3, 2, 2, 42),
}
# At its fullest the score holds about so many times `Network.kept`, by each method: for the image, for the adjoint or the tangent, and for
# what is being made of them. Found on the compiled core (tests/test_plan.py): 2.7 to 3.
KEPT_BY_SCORE = 3


def step_flops(config: Config, encoder: Network, partner: Network, method: str) -> dict[str, float]:
    """FLOPs of one optimiser step in which both networks learn, over all ranks, by part.

    Args:
        method: How the score is differentiated, sweeps, reverse or dual.
    """
    kind, images = METHODS[config.method], config.train.batch_size
    copies = images * noisy_copies(config)
    flops = {"encoder": images * PASSES["trained"].flops(encoder)}  # of the clean images, for z and its KL
    if kind.guides:
        flops["score"] = copies * PASSES[method].flops(encoder)
    of_one = PASSES["trained"].flops(partner) + partner.again if partner.trained else PASSES["forward"].flops(partner)
    return flops | {kind.partner: copies * of_one}


def noisy_copies(config: Config) -> int:
    """How often the network beside the encoder runs for each image: once per noise level, or once where there are none."""
    return config.objective.noise_levels if METHODS[config.method].noisy else 1


# ---- memory of one GPU, and what it sends


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the fullest moment of a step; `host`: bytes in the machine's memory instead."""

    weights: float
    gathered: float  # ZeRO stage 3: weights put together from the parts of all ranks while they are used
    gradients: float
    optimizer: float
    averaged: float
    buckets: float
    activations: float
    host: float = 0.0

    @property
    def on_gpu(self) -> tuple[float, ...]:
        """All but `host`, in order."""
        return tuple(getattr(self, kind.name) for kind in fields(self))[:-1]

    @property
    def gpu(self) -> float:
        return sum(self.on_gpu)

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(*(mine + others for mine, others in zip((*self.on_gpu, self.host), (*other.on_gpu, other.host), strict=True)))


def part(elements: int, ranks: int) -> int:
    """The elements of one rank, all ranks having equally many, which is an even number."""
    return 2 * math.ceil(elements / (2 * ranks))


def touched(sizes: Sequence[int], ranks: int) -> int:
    """Elements of all parameters that overlap with a rank's part, of the rank where that is most.

    ZeRO lays the parameters in a row and cuts it into equal parts, so that a cut may go through a parameter.
    """
    step, ends = part(sum(sizes), ranks), list(accumulate(sizes))
    held: Counter[int] = Counter()
    for size, end in zip(sizes, ends, strict=True):
        for rank in range((end - size) // step, (end - 1) // step + 1):
            held[rank] += size
    return max(held.values(), default=0)


def state(networks: Sequence[Network], config: Config, stage: int, ranks: int) -> Memory:
    """Bytes of one DeepSpeed engine that do not grow with the batch.

    Args:
        networks: All that the engine holds. Each one that is trained is a parameter group, which ZeRO splits by itself.
        stage: Its ZeRO stage.
    """
    trained = [network for network in networks if network.trained]
    everything, learning = sum(n.parameters for n in networks), sum(n.trained for n in trained)
    mine = sum(part(n.trained, ranks) for n in trained)
    weights = everything if stage < 3 else math.ceil(everything / ranks)
    # Stage 3: DeepSpeed frees gathered weights after use, unless they are needed again within the next `REUSE` elements.
    gathered = 0 if stage < 3 else min(everything, REUSE)
    # Stage 1 keeps whole gradients until the last micro-batch. Stage 2 keeps those of each parameter that overlaps with the rank's part.
    gradients = {0: learning, 1: learning, 2: sum(touched(n.sizes, ranks) for n in trained), 3: mine}[stage]
    # Adam's two moments; at stages 1 and 2 also a copy of the rank's part of the weights, which is what they update.
    moments = {0: 2 * learning, 1: 3 * mine, 2: 3 * mine, 3: 2 * mine}[stage]
    # Averaged weights: a copy of all on every rank, at stage 3 of the rank's part.
    averaged = 0 if not config.optimizer.ema_decay else mine if stage == 3 else learning
    # Where gradients are gathered to be added up over the ranks: at stage 0 a temporary copy, otherwise a bucket that is always there.
    buckets = min(learning, 500_000_000) if stage == 0 else bucket_elements(learning)
    host = 0
    if config.engine.offload != "none" and stage:  # from stage 2 on DeepSpeed moves gradients along with the moments
        host, moments = moments, 0
        if stage >= 2:
            host, gradients = host + gradients, 0
        if config.engine.offload == "parameters" and stage == 3:
            host, weights, averaged = host + weights + averaged, 0, 0
    return Memory(*(FLOAT * elements for elements in (weights, gathered, gradients, moments, averaged, buckets, 0, host)))


REUSE = 1_000_000_000  # elements; DeepSpeed's stage3_max_reuse_distance
T = TypeVar("T")


def engines(encoder: T, partner: T, config: Config, stage: int) -> list[tuple[list[T], int]]:
    """What each DeepSpeed engine holds, and its own ZeRO stage: at stage 3 each network has one, the encoder's at a stage of its own."""
    return [([encoder, partner], stage)] if stage < 3 else [([encoder], config.engine.encoder_zero_stage), ([partner], 3)]


def held(model: LatentModel, config: Config, ranks: int) -> Memory:
    """`state` of all engines, of networks that are there and at the config's ZeRO stage."""

    def weights(network: nn.Module) -> Network:
        sizes = tuple(p.numel() for p in network.parameters() if p.requires_grad)
        return Network(sum(p.numel() for p in network.parameters()), sum(sizes), sizes, 0, 0, 0, 0, 0, 0, 0, 0, 0)

    networks = model.networks
    parts = engines(weights(networks["encoder"]), weights(networks[model.partner]), config, config.engine.zero_stage)
    return reduce(add, (state(inside, config, stage, ranks) for inside, stage in parts))


def activations(config: Config, encoder: Network, partner: Network, images: int) -> float:
    """Bytes of one micro-batch on one rank when the most is alive. A diffusers network keeps more in bf16: its norms stay float32.

    Args:
        images: Of the micro-batch on this rank.
    """
    # The score is taken after the denoiser's forward, when all that its backward needs is kept, and is done with before that backward.
    guided = KEPT_BY_SCORE * encoder.kept if METHODS[config.method].guides else 0
    noisy = max(partner.kept + guided, partner.peak) if partner.trained else max(partner.passing, guided)
    per_image = encoder.kept + noisy_copies(config) * noisy
    if config.engine.precision == "fp32":
        return images * per_image
    # Under autocast activations are bfloat16, half as large, and there are bfloat16 copies of the weights.
    return images * per_image / 2 + 2 * (encoder.parameters + partner.parameters)


def wire(networks: Sequence[Network], config: Config, stage: int, ranks: int, collectives: str = "nccl") -> float:
    """Bytes that one rank sends in one optimiser step; it receives as many.

    In a ring each rank sends (ranks - 1) / ranks of the data to gather them, or to add them up with each rank keeping its part; twice as
    much if all ranks get the whole sum. Gloo, which CPUs use, gives all of them the whole sum either way.
    """
    around = (ranks - 1) / ranks
    weights, gradients = (FLOAT * sum(getattr(n, kind) for n in networks) for kind in ("parameters", "trained"))
    micro_batches = config.engine.gradient_accumulation
    if stage == 3:
        # In every micro-batch: weights are gathered, once more for the backward if they were freed in between, and gradients added up.
        gathers = 2 if gradients and weights > FLOAT * REUSE / 2 else 1
        return around * micro_batches * (gathers * weights + COLLECTIVES[collectives] * gradients)
    # DeepSpeed 0.19 sends the whole sum to all ranks even if each keeps only its part: once a step, at stage 2 in every micro-batch.
    reduced = 2 * around * gradients * (micro_batches if stage == 2 else 1)
    # At stages 1 and 2 each rank updates its part of the weights and sends that to the others.
    return reduced + (around * gradients if stage else 0)


# ---- time of one GPU, and the host's


@dataclass(frozen=True)
class Busy:
    """A step on one GPU without compiled parts, and what starts its kernels.

    Attributes:
        kernels: Of the step, all micro-batches and the update.
        bytes: That they read and write, each kernel once.
        matmul, memory, starts: Seconds of the kernels that the arithmetic, the memory, or nothing but their number bounds.
        host: Seconds that a fast and a slow processor need to start them all; 0 where CUDA graphs replay them.
    """

    kernels: int
    bytes: float
    matmul: float
    memory: float
    starts: float
    host: tuple[float, float]

    @property
    def gpu(self) -> float:
        return self.matmul + self.memory + self.starts


def busy(step: gpu_step.Step, config: Config, gpu: GPU, images: int) -> Busy:
    """From the kernels of a step of `gpu_step.PRIME` images, for another number of them in each micro-batch."""
    precision = "bf16" if config.engine.precision == "bf16" else "tf32" if config.engine.tf32 else "fp32"
    multiplied, moved = PEAK_SHARE * gpu.peak(precision), BANDWIDTH_SHARE * 1e12 * gpu.bandwidth
    seconds, total, count = {"matmul": 0.0, "memory": 0.0, "kernels": 0.0}, 0.0, 0
    for part, times, scale in ((step.micro, config.engine.gradient_accumulation, images / gpu_step.PRIME), (step.update, 1, 1.0)):
        count += times * len(part.kernels)
        for kernel in part.kernels:
            size = kernel.fixed + scale * (kernel.bytes - kernel.fixed)
            taken = {"matmul": scale * kernel.flops / multiplied, "memory": size / moved, "kernels": KERNEL}
            bound = max(taken, key=lambda name: taken[name])
            seconds[bound] += times * taken[bound]
            total += times * size
    low, high = (0.0 if config.engine.cuda_graphs and config.engine.compile != "denoiser" else count * each for each in HOST)
    return Busy(count, total, seconds["matmul"], seconds["memory"], seconds["kernels"], (low, high))


BOUNDS = {  # what a step takes its time for, and what to do about it
    "matmul": "the GPU multiplies most of the time: more GPUs, or one with a higher peak",
    "memory": "the GPU moves data most of the time: engine.precision bf16 halves that, where it is not set yet",
    "kernels": "the GPU's kernels are too small to fill it: more images a GPU",
    "host": "the GPU waits for the program that starts its kernels: engine.cuda_graphs replays them without it; or more images a GPU",
    "links": "the GPUs wait for each other's gradients: fewer GPUs, or more images on each",
}


# ---- the plan


@dataclass(frozen=True)
class Row:
    """One number of GPUs at one ZeRO stage.

    Attributes:
        images: Of one micro-batch on one GPU.
        memory, fits: Of one GPU, and whether it has that much; an estimate, as all that follows.
        sent: Bytes that a GPU sends in a step.
        compute, transfer: Seconds of a step for either. They may overlap, so that a step takes from the larger of them to their sum.
        busy: Where `compute` comes from; None where it follows from FLOPs and `Plan.mfu`.
    """

    gpus: int
    stage: int
    images: int
    memory: Memory
    fits: bool
    sent: float
    compute: float
    transfer: float
    busy: Busy | None = None

    @property
    def step(self) -> tuple[float, float]:
        """Seconds, at best and at worst."""
        low, high = self.busy.host if self.busy else (0.0, 0.0)
        return max(self.compute, low, self.transfer), max(self.compute, high) + self.transfer

    @property
    def bound(self) -> str:
        """What decides that, a name in `BOUNDS`; empty where it is not known."""
        if self.busy is None:
            return ""
        if sum(self.busy.host) / 2 > max(self.compute, self.transfer):
            return "host"
        if self.transfer > self.compute:
            return "links"
        seconds = {"matmul": self.busy.matmul, "memory": self.busy.memory, "kernels": self.busy.starts}
        return max(seconds, key=lambda name: seconds[name])


@dataclass(frozen=True)
class Plan:
    """What `plan` finds out.

    Attributes:
        networks: Encoder and partner by name.
        method: How the score is differentiated.
        flops: Of one step over all GPUs, by part of the step.
        unsplit: Numbers of GPUs that the batch cannot be split over.
        mfu: Assumed share of the peak; None where kernels were counted instead.
        collectives: Who carries what is sent.
    """

    config: Config
    image_shape: tuple[int, int, int]
    gpu: str
    mfu: float | None
    networks: dict[str, Network]
    method: str
    flops: dict[str, float]
    rows: tuple[Row, ...]
    unsplit: tuple[int, ...]
    collectives: str = "nccl"


def image_shape_of(config: Config) -> tuple[int, int, int]:
    """(C, H, W) of the images of a config, from its settings if these decide, else from the data.

    Raises:
        UserError: neither says it.
    """
    data = config.data
    if data.kind in GREY_OR_COLOUR:  # the settings decide: nothing is read or rendered
        return (data.channels or 3, data.image_size or 64, data.image_size or 64)
    if data.kind in ("disks", "sprites") or Path(data.path).exists():
        return open_dataset(data, config.seed).image_shape
    if not (data.image_size and data.channels):
        raise UserError(f"data.path: no file {data.path}, and without it a plan needs data.image_size and data.channels")
    return (data.channels, data.image_size, data.image_size)


def plan(config: Config, counts: Sequence[int], gpu: str = "h100-sxm", mfu: float | None = None, collectives: str = "nccl") -> Plan:
    """What a run of this config costs.

    Args:
        counts: Numbers of GPUs; each is planned at every ZeRO stage that the method can run at.
        gpu: A name in `GPUS`.
        mfu: Assumed share of the GPU's peak, for times from FLOPs alone; None for times from the kernels of a step, where they can be
            counted: that takes Triton, and networks of ours or diffusers'.
        collectives: Who carries the bytes that ranks send: nccl, or gloo, as between CPUs.
    Raises:
        UserError: unknown GPU or collectives; as `image_shape_of` and `build_model`.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: expected one of {', '.join(GPUS)}, found {gpu!r}")
    if collectives not in COLLECTIVES:
        raise UserError(f"--collectives: expected one of {', '.join(COLLECTIVES)}, found {collectives!r}")
    config = with_images_of_denoiser(config)
    image_shape = image_shape_of(config)
    model = networks_of(config, image_shape)
    encoder, partner = count_networks(config, model, image_shape)
    try:
        method = "dual" if config.engine.compile == "step" else score.pick(model.encoder, config.engine.score)
    except TypeError as error:
        raise UserError(f"engine.{error}") from None
    if mfu is None and not can_trace(config):
        mfu = MFU
    traced = cache(partial(gpu_step.trace, config, model, image_shape, gpu_step.PRIME))

    def taken(method: str, images: int, alone: bool) -> Busy | None:
        return None if mfu is not None else busy(traced(method, alone), config, GPUS[gpu], images)

    rows, unsplit = [], []
    for ranks in counts:
        pieces = ranks * config.engine.gradient_accumulation
        if config.train.batch_size % pieces:
            unsplit.append(ranks)
            continue
        images = config.train.batch_size // pieces
        for stage in STAGES[: config.capabilities.max_zero_stage + 1]:
            rows.append(_row(config, encoder, partner, method, GPUS[gpu], mfu, taken, ranks, stage, images, collectives))
    flops = step_flops(config, encoder, partner, method)
    networks = {"encoder": encoder, model.partner: partner}
    return Plan(config, image_shape, gpu, mfu, networks, method, flops, tuple(rows), tuple(unsplit), collectives)


def can_trace(config: Config) -> bool:
    """Whether the kernels of a step can be counted here."""
    own = config.encoder.class_ or config.denoiser.class_
    return not own and find_spec("triton") is not None


def _row(
    config: Config,
    encoder: Network,
    partner: Network,
    method: str,
    gpu: GPU,
    mfu: float | None,
    taken: Callable[[str, int, bool], Busy | None],
    ranks: int,
    stage: int,
    images: int,
    collectives: str,
) -> Row:
    # Where the encoder is split over the ranks too, its score has to be taken by dual.
    if stage == 3 and config.engine.encoder_zero_stage == 3:
        method = "dual"
    # DeepSpeed, which several ranks and ZeRO need, lays weights out as it finds them in a file.
    if (kernels := taken(method, images, ranks == 1 and stage == 0)) is not None:
        compute = kernels.gpu
    else:
        flops = sum(step_flops(config, encoder, partner, method).values())
        compute = flops / ranks / ((mfu or MFU) * gpu.peak(config.engine.precision))
    alive = Memory(0, 0, 0, 0, 0, 0, activations(config, encoder, partner, images))
    sent = 0.0
    for networks, own_stage in engines(encoder, partner, config, stage):
        alive += state(networks, config, own_stage, ranks)
        sent += wire(networks, config, own_stage, ranks, collectives)
    return Row(
        gpus=ranks,
        stage=stage,
        images=images,
        memory=alive,
        fits=alive.gpu <= USABLE * 1e9 * gpu.memory,
        sent=sent,
        compute=compute,
        transfer=sent / gpu.link(ranks),
        busy=kernels,
    )


def facts(found: Plan) -> dict[str, Any]:
    """The plan as plain values, for JSON. Bytes, seconds, FLOPs."""
    networks = {name: {key: value for key, value in asdict(n).items() if key != "sizes"} for name, n in found.networks.items()}
    rows = [asdict(row) | {"memory": asdict(row.memory) | {"gpu": row.memory.gpu}, "bound": row.bound} for row in found.rows]
    shares = {"peak_share": PEAK_SHARE, "bandwidth_share": BANDWIDTH_SHARE, "kernel_seconds": KERNEL, "host_seconds": list(HOST)}
    assumed = shares if found.mfu is None else {"mfu": found.mfu}
    return {
        "config": found.config.name,
        "image_shape": list(found.image_shape),
        "batch_size": found.config.train.batch_size,
        "score": found.method,
        "counted": {"networks": networks, "flops_per_step": found.flops},
        "assumed": {
            "gpu": found.gpu,
            **asdict(GPUS[found.gpu]),
            **assumed,
            "link_share": LINK_SHARE,
            "usable_memory": USABLE,
            "collectives": found.collectives,
        },
        "estimated": rows,
        "batch_does_not_split_over": list(found.unsplit),
    }
