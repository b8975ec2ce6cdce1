"""What the benchmarks compare: one entry per op with its inputs, shapes, modes, FLOPs, implementations, and when one is right.

To add an op, write an `Op` and put it in `OPS`; to add a backend or a rival, write one line in an op's `implementations` (third parties:
`rivals.py`). Shape letters are the project's: B batch, K noise levels, S samples (B K) or tokens (H W), C channels, H W image, N heads,
D head size, Z latent size, G groups, O output channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sami_fast import ops, reference
from sami_fast.ops.backend import refusal

from . import rivals
from .measure import FLOOR, Contestant, Incorrect, check_close, relative_error

MODES = ("fwd", "bwd", "bwd_bwd")
Shape = dict[str, int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, keyword


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        call: Takes the arguments of the reference.
        modes: Those it has; a fused op without a second derivative leaves out bwd_bwd.
        own_noise: It draws other random numbers than the reference, so its values are judged by their moments.
        dtypes: Those it takes; None for all.
        devices: Where it runs.
        compiled: The mode as a whole, derivatives by torch.func included, goes through torch.compile; at the last shape alone.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    modes: Sequence[str] = MODES
    own_noise: bool = False
    dtypes: Sequence[torch.dtype] | None = None
    devices: Sequence[str] = ("cpu", "cuda")
    compiled: bool = False

    def takes(self, mode: str, dtype: torch.dtype, device: str) -> bool:
        return mode in self.modes and device in self.devices and (self.dtypes is None or dtype in self.dtypes)


def ours(op: Callable[..., Any]) -> dict[str, Implementation]:
    """A public op on each of its backends that can run here, reference apart."""
    found = {}
    for backend, device in (("cpp", "cpu"), ("triton", "cuda"), ("cuda", "cuda")):
        dtypes = [d for d in (torch.float32, torch.bfloat16) if refusal(backend, device, d) is None]
        if backend in ops.backend.OPS.get(op.__name__, ()) and dtypes:
            found[backend] = Implementation(partial(op, backend=backend), dtypes=dtypes, devices=(device,))
    return found


def compiled(call: Callable[..., Any], **settings: Any) -> dict[str, Implementation]:
    return {"torch.compile": Implementation(call, compiled=True, **settings)}


def foreign(found: dict[str, rivals.Rival]) -> dict[str, Implementation]:
    return {name: Implementation(call, modes, dtypes=dtypes, devices=("cuda",)) for name, (call, modes, dtypes) in found.items()}


@dataclass(frozen=True)
class Op:
    """One op under measurement.

    Attributes:
        name: The stem its reference, kernels and tests share.
        shapes: Sizes to measure, by device; "tiny" for rehearsals.
        dtypes: Of every floating input.
        inputs: Arguments of the reference for a shape, from a seeded generator; its tensors are cast to the dtype afterwards.
        wrt: Places of the positional arguments that derivatives are taken in; empty if only fwd is measured.
        implementations: By name, `reference` among them.
        baseline: The implementation that ratios divide by: the obvious plain torch.
        modes: Those to measure.
        flops: Per mode, shape -> multiplications and additions of the matrix products that must be done when none is done twice: the same
            count for everybody. Empty where memory decides.
        verify: Further demands on outputs of fwd, given (implementation, args, outputs, float64 reference outputs).
        targets: Per mode, the ratio that our choice aims at on a CPU.
    """

    name: str
    shapes: dict[str, Sequence[Shape]]
    dtypes: Sequence[torch.dtype]
    inputs: Callable[[Shape, torch.Generator], Arguments]
    wrt: Sequence[int]
    implementations: dict[str, Implementation]
    baseline: str
    modes: Sequence[str] = MODES
    flops: dict[str, Callable[[Shape], int]] = field(default_factory=dict)
    verify: Callable[[Implementation, tuple[Any, ...], Sequence[Tensor], Sequence[Tensor]], None] | None = None
    targets: dict[str, float] = field(default_factory=dict)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _randn(like: Sequence[Tensor], dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Drawn in float64 and rounded, so that every implementation and the float64 truth see the same numbers."""
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, dtype) for t in like]


@dataclass(frozen=True)
class Problem:
    """One op at one shape, dtype and mode, with inputs and cotangents fixed."""

    op: Op
    mode: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cotangents: list[Tensor]  # of the outputs that can be differentiated
    cotangents_2: list[Tensor]  # of the first gradients

    @classmethod
    def make(cls, op: Op, shape: Shape, dtype: torch.dtype, mode: str, device: str = "cpu") -> Self:
        generator = torch.Generator().manual_seed(0)
        args, kwargs = op.inputs(shape, generator)
        args = tuple(a.to(device, dtype if a.is_floating_point() else None) if isinstance(a, Tensor) else a for a in args)
        problem = cls(op, mode, args, kwargs, [], [])
        if mode == "fwd":
            return problem
        leaves, outputs = problem._graph(op.implementations["reference"].call)
        return replace(problem, cotangents=_randn(outputs, dtype, generator), cotangents_2=_randn(leaves, dtype, generator))

    def double(self) -> Self:
        """The same numbers in float64."""
        args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.args)
        cotangents, cotangents_2 = ([c.double() for c in group] for group in (self.cotangents, self.cotangents_2))
        return replace(self, args=args, cotangents=cotangents, cotangents_2=cotangents_2)

    def _graph(self, call: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves, and the outputs that can be differentiated."""
        args = [a.detach().requires_grad_() if place in self.op.wrt else a for place, a in enumerate(self.args)]
        outputs = _tuple(call(*args, **self.kwargs))
        return [args[place] for place in self.op.wrt], [o for o in outputs if o.requires_grad]

    def runner(self, implementation: Implementation) -> Callable[[], Sequence[Tensor]]:
        """What the clock sees, from the inputs to the last gradient, so that work which is moved between the orders is counted once.

        fwd:     the outputs, no graph.
        bwd:     the outputs, and the first gradients.
        bwd_bwd: these, and the gradients of the first gradients in the inputs and the cotangents.
        """
        if implementation.compiled:
            return self._compiled(implementation.call)
        call = implementation.call

        def fwd() -> Sequence[Tensor]:
            with torch.no_grad():
                return _tuple(call(*self.args, **self.kwargs))

        def bwd() -> Sequence[Tensor]:
            leaves, outputs = self._graph(call)
            return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, self.cotangents)

        def bwd_bwd() -> Sequence[Tensor]:
            leaves, outputs = self._graph(call)
            cotangents = [c.detach().requires_grad_() for c in self.cotangents]
            first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
            second = torch.autograd.grad(first, [*leaves, *cotangents], self.cotangents_2)
            return *(t.detach() for t in (*outputs, *first)), *second

        return {"fwd": fwd, "bwd": bwd, "bwd_bwd": bwd_bwd}[self.mode]

    def _compiled(self, call: Callable[..., Any]) -> Callable[[], Sequence[Tensor]]:
        """The same in one compiled graph: torch refuses to differentiate a compiled function twice, but compiles what torch.func does."""
        torch._dynamo.reset()
        wrt, num_outputs = self.op.wrt, len(self.cotangents)  # those that can be differentiated come first

        def forward(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            args = list(self.args)
            for place, leaf in zip(wrt, leaves, strict=True):
                args[place] = leaf
            return _tuple(call(*args, **self.kwargs))

        def selected(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return forward(leaves)[:num_outputs]

        def gradients(leaves: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            outputs, pull = torch.func.vjp(selected, leaves)
            return pull(cotangents)[0], outputs

        def first(leaves: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            in_leaves, outputs = gradients(leaves, cotangents)
            return *outputs, *in_leaves

        def second(leaves: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], cotangents_2: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            once, pull, outputs = torch.func.vjp(gradients, leaves, cotangents, has_aux=True)
            in_leaves, in_cotangents = pull(cotangents_2)
            return *outputs, *once, *in_leaves, *in_cotangents

        leaves, *cotangents = (tuple(group) for group in ([self.args[place] for place in wrt], self.cotangents, self.cotangents_2))
        orders = {"fwd": (forward, 0), "bwd": (first, 1), "bwd_bwd": (second, 2)}
        function, order = orders[self.mode]
        run = torch.compile(function, fullgraph=True, dynamic=False)
        return lambda: run(leaves, *cotangents[:order])

    @cached_property
    def truth(self) -> Sequence[Tensor]:
        return self.double().runner(self.op.implementations["reference"])()

    @cached_property
    def yardstick(self) -> Sequence[Tensor]:
        """What the reference finds in the same dtype."""
        return self.runner(self.op.implementations["reference"])()

    def bytes(self) -> int:
        """What a single perfect kernel would move: every input and cotangent read once, every result written once."""
        given = [a for a in self.args if isinstance(a, Tensor)]
        return sum(t.numel() * t.element_size() for t in (*given, *self.cotangents, *self.cotangents_2, *self.yardstick))

    def contestant(self, name: str) -> Contestant:
        """The implementation, found to do what the reference does in this mode at these sizes.

        Raises:
            Incorrect: it does something else.
        """
        implementation = self.op.implementations[name]

        def check(found: Sequence[Tensor]) -> None:
            if not implementation.own_noise:
                check_close(f"{self.op.name} {self.mode}: {name}", self.mode, found, self.truth, self.yardstick)
            if self.op.verify is not None:
                self.op.verify(implementation, self.args, found, self.truth)

        return Contestant.ready(name, partial(self.runner, implementation), check, self.yardstick[0].device.type)


# --- noise_sample, random_normal, stratified_uniform --------------------------------------------------------------------------------


def _noise_sample_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    x_0 = torch.rand(s["B"], s["C"], s["H"], s["W"], generator=generator) * 2 - 1
    angle = torch.rand(s["B"], s["K"], generator=generator) * (math.pi / 2)
    return (x_0, angle.cos(), angle.sin(), torch.arange(s["B"])), {"seed": 1, "step": 2}


def _noise_sample_torch(x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, index: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    # Sequential generator: the noise depends on what was drawn before, and `index`, `seed` and `step` have no part in it.
    shape = (*alpha_t.shape, 1, 1, 1)
    eps = torch.randn(*alpha_t.shape, *x_0.shape[1:], dtype=x_0.dtype, device=x_0.device)
    x_t = alpha_t.view(shape) * x_0[:, None] + sigma_t.view(shape) * eps
    return x_t.flatten(0, 1), eps.flatten(0, 1)


def _verify_normals(name: str, implementation: Implementation, eps: Tensor, truth: Tensor) -> None:
    """Standard normal to five standard errors, and shared noise bit for bit."""
    if not implementation.own_noise and not torch.equal(eps.double(), truth):
        raise Incorrect(f"{name}: eps differs from the reference's random bits")
    flat = eps.double().flatten()
    for moment, value, expected, variance in (
        ("mean", flat.mean(), 0.0, 1.0),
        ("variance", flat.square().mean(), 1.0, 2.0),
        ("skewness", flat.pow(3).mean(), 0.0, 15.0),
        ("fourth moment", flat.pow(4).mean(), 3.0, 96.0),
        ("correlation of neighbours", (flat[1:] * flat[:-1]).mean(), 0.0, 1.0),
    ):
        if not abs(value.item() - expected) <= 5.0 * math.sqrt(variance / flat.numel()):
            raise Incorrect(f"{name}: {moment} of eps is {value.item():.4f}, expected {expected}")


def _verify_noise(implementation: Implementation, args: tuple[Any, ...], found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Normals, and x_t is made of them."""
    x_0, alpha_t, sigma_t, _ = args
    if [(t.shape, t.dtype) for t in found] != [(t.shape, x_0.dtype) for t in truth]:
        raise Incorrect("noise_sample: expected x_t and eps of [B*K, C, H, W] in the dtype of x_0")
    x_t, eps = (output.double() for output in found)
    _verify_normals("noise_sample", implementation, eps, truth[1])
    levels = alpha_t.shape[1]
    alpha, sigma = (amplitude.double().flatten().view(-1, 1, 1, 1) for amplitude in (alpha_t, sigma_t))
    if not relative_error(x_t, alpha * x_0.double().repeat_interleave(levels, 0) + sigma * eps) <= FLOOR * torch.finfo(x_0.dtype).eps:
        raise Incorrect("noise_sample: x_t is not alpha_t x_0 + sigma_t eps")


NOISE_SAMPLE = Op(
    name="noise_sample",
    shapes={
        "cpu": ({"B": 64, "K": 1, "C": 1, "H": 32, "W": 32}, {"B": 16, "K": 4, "C": 3, "H": 64, "W": 64}),
        "cuda": ({"B": 64, "K": 4, "C": 3, "H": 64, "W": 64}, {"B": 512, "K": 1, "C": 3, "H": 256, "W": 256}),
        "tiny": ({"B": 16, "K": 2, "C": 3, "H": 8, "W": 8},),
    },
    dtypes=(torch.float32,),
    inputs=_noise_sample_inputs,
    wrt=(),  # images are data: training asks for no gradient here
    modes=("fwd",),
    implementations={
        "reference": Implementation(reference.noise_sample),
        "torch.randn": Implementation(_noise_sample_torch, own_noise=True),
        **compiled(_noise_sample_torch, own_noise=True),
        **ours(ops.noise_sample),
    },
    baseline="torch.randn",
    verify=_verify_noise,
)


def _random_normal_torch(seed: int, step: int, stream: int, index: Tensor, size: int) -> Tensor:
    return torch.randn(index.numel(), size, device=index.device)


RANDOM_NORMAL = Op(
    name="random_normal",
    shapes={
        "cpu": ({"B": 64, "Z": 32}, {"B": 64, "Z": 3072}),
        "cuda": ({"B": 512, "Z": 12288},),
        "tiny": ({"B": 16, "Z": 64},),
    },
    dtypes=(torch.float32,),
    inputs=lambda s, generator: ((1, 2, ops.Stream.EPS_Z, torch.arange(s["B"]), s["Z"]), {}),
    wrt=(),
    modes=("fwd",),
    implementations={
        "reference": Implementation(reference.random_normal),
        "torch.randn": Implementation(_random_normal_torch, own_noise=True),
        **ours(ops.random_normal),
    },
    baseline="torch.randn",
    verify=lambda implementation, args, found, truth: _verify_normals("random_normal", implementation, found[0], truth[0].double()),
)


def _stratified_uniform_torch(index: Tensor, levels: int, global_batch: int, *, seed: int, step: int) -> Tensor:
    rank = torch.randperm(global_batch, device=index.device)[index]
    v = torch.rand(len(index), levels, device=index.device)
    return (torch.arange(levels, device=index.device) + (rank[:, None] + v) / global_batch) / levels


def _verify_strata(implementation: Implementation, args: tuple[Any, ...], found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    _, levels, batch = args
    strata = (found[0].double() * levels * batch).floor().flatten().sort().values
    # Bounds may round up to the next stratum, so neighbours count.
    if not (strata - torch.arange(batch * levels, device=strata.device)).abs().max() <= 1:
        raise Incorrect("stratified_uniform: a stratum without a number")


STRATIFIED_UNIFORM = Op(
    name="stratified_uniform",
    shapes={"cpu": ({"B": 64, "K": 4},), "cuda": ({"B": 512, "K": 4},), "tiny": ({"B": 8, "K": 2},)},
    dtypes=(torch.float32,),
    inputs=lambda s, generator: ((torch.arange(s["B"]), s["K"], s["B"]), {"seed": 1, "step": 2}),
    wrt=(),
    modes=("fwd",),
    implementations={
        "reference": Implementation(reference.stratified_uniform),
        "torch.randperm": Implementation(_stratified_uniform_torch, own_noise=True),
        **ours(ops.stratified_uniform),
    },
    baseline="torch.randperm",
    verify=_verify_strata,
)


# --- guided_loss, and all of a step that is not a network -----------------------------------------------------------------------------


def _guided_loss_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    images = (torch.randn(s["S"], s["C"], s["H"], s["W"], generator=generator) for _ in range(3))
    return (*images, *(torch.rand(s["S"], generator=generator) + 0.1 for _ in range(3))), {}


def _guided_loss_torch(
    eps: Tensor, eps_pred: Tensor, grad_log_q: Tensor, sigma_t: Tensor, weight: Tensor, unconditional_weight: Tensor
) -> tuple[Tensor, Tensor]:
    eps_hat = eps_pred - sigma_t.view(-1, 1, 1, 1) * grad_log_q
    guided = F.mse_loss(eps_hat, eps, reduction="none").sum((1, 2, 3))
    unguided = F.mse_loss(eps_pred, eps, reduction="none").sum((1, 2, 3))
    return weight * guided + unconditional_weight * unguided, unguided.detach()


GUIDED_LOSS = Op(
    name="guided_loss",
    shapes={
        "cpu": ({"S": 64, "C": 1, "H": 32, "W": 32}, {"S": 32, "C": 3, "H": 64, "W": 64}),
        "cuda": ({"S": 256, "C": 3, "H": 64, "W": 64}, {"S": 512, "C": 3, "H": 256, "W": 256}),
        "tiny": ({"S": 4, "C": 3, "H": 8, "W": 8},),
    },
    dtypes=(torch.float32,),
    inputs=_guided_loss_inputs,
    wrt=(1, 2),  # eps_pred and grad_log_q, where the two networks meet the loss
    implementations={
        "reference": Implementation(reference.guided_loss),
        "torch.mse_loss": Implementation(_guided_loss_torch),
        **compiled(_guided_loss_torch),
        **ours(ops.guided_loss),
    },
    baseline="torch.mse_loss",
)


def _noise_and_loss_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    (x_0, alpha_t, sigma_t, index), _ = _noise_sample_inputs(s, generator)
    eps_pred, grad_log_q = (torch.randn(s["B"] * s["K"], s["C"], s["H"], s["W"], generator=generator) for _ in range(2))
    weight = torch.rand(s["B"] * s["K"], generator=generator) + 0.1
    return (eps_pred, grad_log_q, x_0, alpha_t, sigma_t, index, weight), {"seed": 1, "step": 2}


def _noise_and_loss(noising: Callable[..., Any], guided_loss: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The networks' outputs are given; x_t, which they would see, is an output that nothing is differentiated in."""

    def both(
        eps_pred: Tensor, grad_log_q: Tensor, x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, index: Tensor, weight: Tensor, **key: int
    ) -> tuple[Tensor, Tensor]:
        x_t, eps = noising(x_0, alpha_t, sigma_t, index, **key)
        return guided_loss(eps, eps_pred, grad_log_q, sigma_t.flatten(), weight, torch.zeros_like(weight))[0], x_t

    return both


def _noise_and_loss_ours() -> dict[str, Implementation]:
    return {
        name: replace(noising, call=_noise_and_loss(noising.call, GUIDED_LOSS.implementations[name].call), dtypes=(torch.float32,))
        for name, noising in ours(ops.noise_sample).items()
    }


NOISE_AND_LOSS = Op(
    name="noise_sample + guided_loss",
    shapes={
        "cpu": (
            {"B": 64, "K": 1, "C": 1, "H": 32, "W": 32},
            {"B": 16, "K": 4, "C": 3, "H": 32, "W": 32},
            {"B": 32, "K": 1, "C": 3, "H": 64, "W": 64},
        ),
        "cuda": ({"B": 512, "K": 1, "C": 3, "H": 64, "W": 64},),
        "tiny": ({"B": 4, "K": 2, "C": 3, "H": 8, "W": 8},),
    },
    dtypes=(torch.float32,),
    inputs=_noise_and_loss_inputs,
    wrt=(0, 1),
    modes=("bwd",),
    implementations={
        "reference": Implementation(_noise_and_loss(reference.noise_sample, reference.guided_loss)),
        "torch.randn": Implementation(_noise_and_loss(_noise_sample_torch, _guided_loss_torch), own_noise=True),
        **compiled(_noise_and_loss(_noise_sample_torch, _guided_loss_torch), own_noise=True),
        **_noise_and_loss_ours(),
    },
    baseline="reference",  # eager torch that draws the same numbers
    targets={"bwd": 4.0},
)


# --- attention ----------------------------------------------------------------------------------------------------------------------


def _attention_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    return tuple(torch.randn(s["B"], s["S"], s["N"], s["D"], generator=generator) for _ in range(3)), {}


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attention


def fused_attention(name: str, backend: SDPBackend, dtype: torch.dtype | None, device: str) -> dict[str, Implementation]:
    return {name: Implementation(_sdpa(backend), ("fwd", "bwd"), dtypes=None if dtype is None else (dtype,), devices=(device,))}


def _attention_product(s: Shape) -> int:
    """One S x S x D product in every head."""
    return 2 * s["B"] * s["N"] * s["S"] ** 2 * s["D"]


ATTENTION = Op(
    name="attention",
    shapes={
        "cpu": ({"B": 8, "S": 64, "N": 2, "D": 32}, {"B": 2, "S": 1024, "N": 2, "D": 32}, {"B": 1, "S": 1024, "N": 4, "D": 64}),
        "cuda": ({"B": 64, "S": 64, "N": 4, "D": 64}, {"B": 64, "S": 256, "N": 4, "D": 64}, {"B": 8, "S": 1024, "N": 8, "D": 64}),
        "tiny": ({"B": 1, "S": 32, "N": 2, "D": 16},),
    },
    dtypes=(torch.float32, torch.bfloat16),
    inputs=_attention_inputs,
    wrt=(0, 1, 2),
    flops={
        # q k^T, P v
        "fwd": lambda s: 2 * _attention_product(s),
        # and grad_out v^T, P^T grad_out, dS k, dS^T q
        "bwd": lambda s: 6 * _attention_product(s),
        # and with dots for cotangents and bars for results: T = q' k^T + q k'^T (2), Y = grad_out v'^T (1), the cotangent of
        # grad_out P' v + P v' (2), q-bar (2), k-bar (2), v-bar (1)
        "bwd_bwd": lambda s: 16 * _attention_product(s),
    },
    implementations={
        "reference": Implementation(reference.attention),
        "torch.sdpa_math": Implementation(_sdpa(SDPBackend.MATH)),
        # torch's fused ones have no second derivative; on a GPU they take what their hardware does.
        **fused_attention("torch.sdpa_flash", SDPBackend.FLASH_ATTENTION, torch.float32, "cpu"),
        **(
            fused_attention("torch.sdpa_flash", SDPBackend.FLASH_ATTENTION, torch.bfloat16, "cuda")
            | fused_attention("torch.sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION, None, "cuda")
            | fused_attention("torch.sdpa_cudnn", SDPBackend.CUDNN_ATTENTION, torch.bfloat16, "cuda")
            if torch.cuda.is_available()
            else {}
        ),
        **compiled(reference.attention),
        **foreign(rivals.attention()),
        **ours(ops.attention),
    },
    baseline="torch.sdpa_math",
    targets={"bwd_bwd": 2.0},
)


# --- group_norm_silu ----------------------------------------------------------------------------------------------------------------


def _group_norm_silu_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    x = torch.randn(s["B"], s["C"], s["H"], s["W"], generator=generator) + 0.5
    weight, bias = (torch.randn(s["C"], generator=generator) for _ in range(2))
    return (x, s["G"], weight, bias), {}


def _group_norm_silu_torch(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias))


GROUP_NORM_SILU = Op(
    name="group_norm_silu",
    shapes={
        "cpu": ({"B": 32, "C": 64, "H": 16, "W": 16, "G": 4}, {"B": 32, "C": 32, "H": 64, "W": 64, "G": 4}),
        "cuda": ({"B": 64, "C": 256, "H": 16, "W": 16, "G": 32}, {"B": 64, "C": 128, "H": 64, "W": 64, "G": 32}),
        "tiny": ({"B": 2, "C": 8, "H": 4, "W": 4, "G": 2},),
    },
    dtypes=(torch.float32, torch.bfloat16),
    inputs=_group_norm_silu_inputs,
    wrt=(0, 2, 3),
    implementations={
        # In float32 the arithmetic of the baseline behind argument checks: their ratio there is the noise of the run.
        "reference": Implementation(reference.group_norm_silu),
        "torch.group_norm": Implementation(_group_norm_silu_torch),
        **compiled(_group_norm_silu_torch),
        **foreign(rivals.group_norm_silu()),
        **ours(ops.group_norm_silu),
    },
    baseline="torch.group_norm",
    targets={"bwd_bwd": 3.0},
)


# --- conv2d -------------------------------------------------------------------------------------------------------------------------


def _conv2d_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    x = torch.randn(s["B"], s["C"], s["H"], s["W"], generator=generator)
    return (x, torch.randn(s["O"], s["C"], 3, 3, generator=generator), torch.randn(s["O"], generator=generator)), {"padding": 1}


def _in_channels_last(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return F.conv2d(*(t.contiguous(memory_format=torch.channels_last) for t in (x, weight)), bias, padding=padding)


def _convolution(s: Shape) -> int:
    """One direct 3x3 convolution; Winograd's algorithm does less, and may exceed the bound that follows."""
    return 2 * 9 * s["B"] * s["C"] * s["O"] * s["H"] * s["W"]


CONV2D = Op(
    name="conv2d",
    shapes={
        "cpu": ({"B": 32, "C": 32, "H": 16, "W": 16, "O": 32}, {"B": 8, "C": 64, "H": 32, "W": 32, "O": 64}),
        "cuda": (),  # torch's own there
        "tiny": ({"B": 2, "C": 4, "H": 8, "W": 8, "O": 4},),
    },
    dtypes=(torch.float32,),
    inputs=_conv2d_inputs,
    wrt=(0, 1),  # a bias has no second derivative
    flops={
        "fwd": _convolution,
        # and the gradients in x and in weight
        "bwd": lambda s: 3 * _convolution(s),
        # and with dots for cotangents: x' * weight + x * weight', the gradient in x from weight', that in weight from x'
        "bwd_bwd": lambda s: 7 * _convolution(s),
    },
    implementations={
        "reference": Implementation(partial(ops.conv2d, backend="reference")),
        "torch.conv2d": Implementation(F.conv2d),
        "torch.channels_last": Implementation(_in_channels_last),
        **ours(ops.conv2d),
    },
    baseline="torch.conv2d",
)


# --- gaussian_log_prob --------------------------------------------------------------------------------------------------------------


def _gaussian_log_prob_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    z, mu = (torch.randn(s["B"], s["Z"], generator=generator) for _ in range(2))
    return (z, mu, torch.rand(s["B"], s["Z"], generator=generator) + 0.1), {}


def _gaussian_log_prob_torch(z: Tensor, mu: Tensor, var: Tensor) -> Tensor:
    return torch.distributions.Normal(mu, var.sqrt(), validate_args=False).log_prob(z).sum(-1)


GAUSSIAN_LOG_PROB = Op(
    name="gaussian_log_prob",
    shapes={
        "cpu": ({"B": 64, "Z": 8}, {"B": 1024, "Z": 256}),
        "cuda": ({"B": 512, "Z": 32}, {"B": 4096, "Z": 256}),
        "tiny": ({"B": 4, "Z": 8},),
    },
    dtypes=(torch.float32,),
    inputs=_gaussian_log_prob_inputs,
    wrt=(0, 1, 2),
    implementations={
        "reference": Implementation(reference.gaussian_log_prob),
        "torch.distributions": Implementation(_gaussian_log_prob_torch),
        **compiled(reference.gaussian_log_prob),
        **ours(ops.gaussian_log_prob),
    },
    baseline="torch.distributions",
)

OPS = (NOISE_SAMPLE, RANDOM_NORMAL, STRATIFIED_UNIFORM, GUIDED_LOSS, NOISE_AND_LOSS, ATTENTION, GROUP_NORM_SILU, CONV2D, GAUSSIAN_LOG_PROB)
