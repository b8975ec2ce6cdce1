"""One training step as a GPU runs it, counted without a GPU: kernels, bytes, FLOPs, and what is copied only to lie otherwise in memory.

The step runs on tensors that have shapes and strides and no data, with the launches of our Triton kernels recorded in place of being made.
What torch computes itself is one kernel an operator, with these exceptions: views and allocations are none; a convolution with a bias is
two; its derivative is one for each gradient; operators on lists of tensors are one for every `LIST` of them. A convolution takes and makes
its images in the layout that cuDNN would choose, and copies what lies otherwise. Nothing of this has been compared with a real GPU.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import ops
from .config import Config
from .methods.latent_model import LatentModel
from .models.layers import lay_out_weights
from .step import Draw, Objective

aten = torch.ops.aten
LIST = 36  # tensors that one of torch's kernels on lists takes, when four lists go in as for Adam; it takes more of fewer
PRIME = 61  # images of a step to scale by: sizes that it divides come from the batch
PRODUCTS = {  # matrix products in each kernel of attention (docs/kernels.md)
    "_attention_fwd_kernel": 2,
    "_attention_bwd_q_kernel": 3,
    "_attention_bwd_kv_kernel": 4,
    "_attention_tan_kernel": 6,
    "_attention_bwd_bwd_q_kernel": 7,
    "_attention_bwd_bwd_kv_kernel": 8,
}
OUT_BAR = {"_attention_bwd_bwd_q_kernel": (11, 1), "_attention_bwd_bwd_kv_kernel": (9, 2)}  # its place, and how many products it adds
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
COPIES = ("clone", "contiguous", "copy_", "to", "_to_copy")
WRITES = (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default)  # their first argument is not read
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass(frozen=True)
class Kernel:
    """What one kernel does.

    Attributes:
        flops: Of matrix products.
        bytes: That it has to read and write once.
        fixed: The part of them that is the same for any number of images; exact where that number is `PRIME`.
    """

    name: str
    flops: int
    bytes: int
    fixed: int


class EachOperator(TorchDispatchMode):
    """Shows `called` every operator of torch that runs inside, those within our own operators among them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sami_fast":  # down to what it calls
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func.namespace == "prim":  # a question to a tensor
            return func(*args, **kwargs)
        return self.called(func, args, kwargs)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operator gives for these arguments."""
        raise NotImplementedError


class Trace(EachOperator):
    """Counts what a GPU would do for what runs inside, on fake tensors and with the backend "triton".

    Args:
        images: Of the batch.
    Attributes:
        kernels: In order.
        views: Calls of operators that start no kernel: views and allocations.
        channels_outside: Convolutions that run with an image's channels outermost in memory: on tensor cores they would be copied.
        relaid: What was copied because it lay in another order of axes than its reader wants, or was given to: a word for each.
        packed: Of the operands of convolutions, what was copied because it is a slice of a larger tensor.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.kernels: list[Kernel] = []
        self.views = self.channels_outside = 0
        self.relaid: list[str] = []
        self.packed: list[str] = []

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    @contextmanager
    def recording(self) -> Iterator[None]:
        from .kernels._common import recording  # pyrefly: ignore[missing-import]  # setup.py maps kernels/ to this name

        with ops.use_backend("triton"), recording(self._launched), self:
            yield

    def _launched(self, launch: Any) -> None:
        name = launch.kernel.fn.__name__
        self._add(name, (a for a in launch.args if isinstance(a, Tensor)), _attention_flops(name, launch) if name in PRODUCTS else 0)

    def _add(self, name: str, tensors: Iterable[Tensor], flops: int = 0) -> None:
        tensors = list(tensors)
        fixed = sum(_bytes(tensor) for tensor in tensors if tensor.numel() % self.images)
        self.kernels.append(Kernel(name, flops, sum(map(_bytes, tensors)), fixed))

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func in CONVOLUTIONS:
            return self._convolution(func, args, out)
        name, given = func.overloadpacket.__name__, [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        made = [a for a in tree_leaves(out) if isinstance(a, Tensor)]
        inside = {a.untyped_storage()._cdata for a in given}
        writes = func._schema.is_mutable
        if not writes and (name in ALLOCATIONS or all(a.untyped_storage()._cdata in inside for a in made)):
            self.views += 1
            return out
        lists = [len(a) for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        if lists and name.startswith(("_foreach", "_fused")):
            for _ in range(math.ceil(max(lists) / LIST) - 1):
                self._add(name, ())
            made = made or list(args[0])
        if name in COPIES and _order(args[0] if name != "copy_" else args[1]) != _order(out):
            self.relaid.append(name)
        formula = flop_registry.get(func.overloadpacket)
        self._add(name, [*given[func in WRITES :], *made], formula(*args, **kwargs, out_val=out) if formula else 0)
        return out

    def _convolution(self, func: Any, args: tuple[Any, ...], out: Any) -> Any:
        """One of torch's convolutions, results in the layout that cuDNN would give them."""
        backward = func is aten.convolution_backward.default
        x, weight = args[1:3] if backward else args[:2]
        last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
        layout = torch.channels_last if last else torch.contiguous_format
        self.channels_outside += not last

        def read(**operands: Tensor) -> list[Tensor]:
            for name, tensor in operands.items():
                if not tensor.is_contiguous(memory_format=layout):
                    dense = tensor.numel() == 0 or torch.ops.aten.is_non_overlapping_and_dense(tensor)
                    (self.relaid if dense else self.packed).append(f"convolution's {name}")
                    self._add("copy", (tensor, tensor))
            return list(operands.values())

        def laid(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout)

        if not backward:
            out = laid(out)
            flops = 2 * (x if args[6] else out).numel() * weight[0].numel()
            self._add("convolution", [*read(x=x, weight=weight), out], flops)
            if args[2] is not None:
                self._add("add_", (out, args[2], out))
            return out
        grad_y, mask = args[0], args[10]
        flops = 2 * (x if args[7] else grad_y).numel() * weight[0].numel()
        grad_x, grad_weight = (laid(grad) if asked else None for grad, asked in zip(out, mask[:2], strict=False))
        if grad_x is not None:
            self._add("convolution, to x", [*read(grad_y=grad_y, weight=weight), grad_x], flops)
        if grad_weight is not None:
            operands = read(x=x) if grad_x is not None else read(grad_y=grad_y, x=x)  # grad_y was packed already
            self._add("convolution, to weight", [grad_y, *operands, grad_weight], flops)
        if mask[2]:
            self._add("sum", (grad_y, out[2]))
        return grad_x, grad_weight, out[2]


def _bytes(tensor: Tensor) -> int:
    """Of the elements that lie in memory: an expanded axis counts once."""
    return tensor.element_size() * math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _order(x: Tensor) -> tuple[int, ...]:
    """Axes of images from the outermost in memory to the innermost; empty for other tensors, and where axes of one element hide it."""
    if x.dim() != 4 or 1 in x.shape[1:]:
        return ()
    return tuple(sorted(range(4), key=lambda axis: -x.stride(axis)))


def _attention_flops(name: str, launch: Any) -> int:
    queries, keys = launch.args[-3:-1]
    blocks = -(-keys // launch.constants["BLOCK_K"]) if "_kv_" in name else -(-queries // launch.constants["BLOCK_Q"])
    place, more = OUT_BAR.get(name, (0, 0))
    products = PRODUCTS[name] + (more if launch.args[place] is not None else 0)
    return products * 2 * launch.grid[0] // blocks * queries * keys * launch.constants["HEAD_SIZE"]


@dataclass(frozen=True)
class Step:
    """A step of one rank: one micro-batch, forward and backward; and the update of all weights after the last of them."""

    micro: Trace
    update: Trace


def trace(config: Config, model: LatentModel, image_shape: tuple[int, int, int], images: int, method: str, laid_out: bool = True) -> Step:
    """The step of a config in which both networks learn, or the encoder alone where the denoiser is frozen.

    Args:
        config: The run's.
        model: Its networks; their weights become tensors without data.
        image_shape: (C, H, W).
        images: Of a micro-batch on this rank.
        method: How the score is differentiated.
        laid_out: Whether weights lie channels-last, as `LatentModel.placed` puts them; DeepSpeed puts them back.
    """
    engine, settings = config.engine, config.optimizer
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
        if laid_out:
            lay_out_weights(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        partner = getattr(model, model.partner)
        parts = model.parts(
            denoiser=partial(partner, recompute=True) if engine.checkpoint_activations else partner,
            objective=Objective(**asdict(config.objective)),
            score_method=method,
            store_eps=engine.store_eps,
        )
        micro, update = Trace(images), Trace(images)
        draw = Draw(seed=1, step=2, index=torch.arange(images), global_batch=config.train.batch_size)
        x_0 = torch.empty(images, *image_shape)
        with micro.recording():
            with torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "bf16"):
                loss, *_ = model.training_loss(x_0, draw, 0.5, parts, *(["encoder"] if config.mode == "frozen" else []))
            loss.backward()
        optimizer = torch.optim.Adam(trained, fused=True)
        optimizer.step()  # makes its moments
        weights: list[Tensor] = [p.detach() for p in trained]
        averaged = [torch.empty_like(p) for p in weights]
        with torch.no_grad(), update.recording():
            if settings.clip > 0:
                nn.utils.clip_grad_norm_(trained, settings.clip, foreach=True)
            optimizer.step()
            if settings.ema_decay:
                torch._foreach_lerp_(averaged, weights, 0.1)
    return Step(micro, update)
