"""What the benchmarks compare: one entry per op with its inputs, shapes, modes, work formulas, implementations, and when one is right.

To add an op, write an `Op` and put it in `OPS`; to add a backend or a rival, write one line in an op's `implementations`.
Shape letters are the project's: B batch, K noise levels, S samples (B K) or tokens (H W), C channels, H W image, N heads, D head size,
Z latent size, G groups.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sami_fast import ops, reference
from sami_fast.ops.backend import refusal

MODES = ("fwd", "bwd", "bwd_bwd")
Shape = dict[str, int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, keyword

# Errors are root mean squares relative to the float64 reference, in units of the dtype's rounding step. The reference in the same
# dtype sets the scale; FLOOR forgives a lucky reference, CAP catches a broken one. Largest errors seen of the reference (x86, AVX512):
# ops 3.3 units in float32 and 1.1 in bfloat16, step 332 (the sines of the time embedding, whose angles reach 1600 radians).
ERROR_FACTOR = {"fwd": 2.0, "bwd": 3.0, "bwd_bwd": 3.0, "step": 3.0}
FLOOR = 4.0
CAP = {"fwd": 16.0, "bwd": 16.0, "bwd_bwd": 16.0, "step": 1024.0}


class Incorrect(AssertionError):
    """An implementation computes something else than its op: it gets no row."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        call: Takes the arguments of the reference.
        modes: Those it has; a fused op without a second derivative leaves out bwd_bwd.
        own_noise: It draws other random numbers than the reference, so its values are judged by their moments.
        dtypes: Those it takes; None for all.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    modes: Sequence[str] = MODES
    own_noise: bool = False
    dtypes: Sequence[torch.dtype] | None = None


def _core(op: Callable[..., Any]) -> dict[str, Implementation]:
    """The compiled core's row, where it was built."""
    if refusal("cpp", "cpu", torch.float32) is not None:
        return {}
    return {"cpp": Implementation(partial(op, backend="cpp"), dtypes=(torch.float32,))}


@dataclass(frozen=True)
class Op:
    """One op under measurement.

    Attributes:
        name: The stem its reference, kernels and tests share.
        shapes: Sizes to measure.
        dtypes: Of every floating input.
        inputs: Arguments of the reference for a shape, from a seeded generator; its tensors are cast to the dtype afterwards.
        wrt: Places of the positional arguments that derivatives are taken in; empty if only fwd is measured.
        bytes_moved: Per mode, (shape, bytes per element) -> bytes of the tensors that must be read and written once.
        flops: Per mode, shape -> multiplications and additions of the matrix products that must be done; empty where memory decides.
        implementations: By name.
        baseline: The implementation that ratios divide by: the obvious plain torch.
        verify: Further demands on outputs of fwd, given (implementation, args, outputs, float64 reference outputs).
    """

    name: str
    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype]
    inputs: Callable[[Shape, torch.Generator], Arguments]
    wrt: Sequence[int]
    bytes_moved: dict[str, Callable[[Shape, int], int]]
    implementations: dict[str, Implementation]
    baseline: str
    flops: dict[str, Callable[[Shape], int]] = field(default_factory=dict)
    verify: Callable[[Implementation, tuple[Any, ...], Sequence[Tensor], Sequence[Tensor]], None] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.wrt else ("fwd",)


def shape_label(shape: Shape) -> str:
    return " ".join(f"{letter}{size}" for letter, size in shape.items())


def dtype_label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _randn(like: Sequence[Tensor], dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Drawn in float64 and rounded, so that every implementation and the float64 truth see the same numbers."""
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in like]


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
    def make(cls, op: Op, shape: Shape, dtype: torch.dtype, mode: str) -> Self:
        generator = torch.Generator().manual_seed(0)
        args, kwargs = op.inputs(shape, generator)
        args = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        problem = cls(op, mode, args, kwargs, [], [])
        if mode == "fwd":
            return problem
        leaves, outputs = problem._graph(op.implementations["reference"].call)
        return cls(op, mode, args, kwargs, _randn(outputs, dtype, generator), _randn(leaves, dtype, generator))

    def double(self) -> Self:
        """The same numbers in float64."""
        args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.args)
        cotangents, cotangents_2 = ([c.double() for c in group] for group in (self.cotangents, self.cotangents_2))
        return type(self)(self.op, self.mode, args, self.kwargs, cotangents, cotangents_2)

    def _graph(self, call: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
        args = [a.detach().requires_grad_() if place in self.op.wrt else a for place, a in enumerate(self.args)]
        outputs = _tuple(call(*args, **self.kwargs))
        return [args[place] for place in self.op.wrt], [o for o in outputs if o.requires_grad]

    def timed(self, call: Callable[..., Any]) -> Callable[[], Sequence[Tensor]]:
        """What the clock sees: everything that comes before it in a training step is done here.

        fwd:     the forward, no graph.
        bwd:     the first gradients, the forward's graph being there.
        bwd_bwd: the first gradients kept differentiable, and the gradients of those in the inputs and the cotangents: work that
                 an implementation moves from one sweep to the other is counted once and nowhere lost.
        """
        if self.mode == "fwd":

            def fwd() -> Sequence[Tensor]:
                with torch.no_grad():
                    return _tuple(call(*self.args, **self.kwargs))

            return fwd

        leaves, outputs = self._graph(call)
        if self.mode == "bwd":
            return lambda: torch.autograd.grad(outputs, leaves, self.cotangents, retain_graph=True)

        cotangents = [c.detach().requires_grad_() for c in self.cotangents]

        def bwd_bwd() -> Sequence[Tensor]:
            first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
            return torch.autograd.grad(first, [*leaves, *cotangents], self.cotangents_2, retain_graph=True)

        return bwd_bwd

    def whole(self, call: Callable[..., Any]) -> None:
        """Forward included: what peak memory is taken over."""
        self.timed(call)()


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held during a call, over what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max(initial=0))


def relative_error(found: Tensor, truth: Tensor) -> float:
    scale = truth.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return ((found.double() - truth.double()).square().mean().sqrt() / scale).item()


def compare(what: str, mode: str, found: Sequence[Tensor], truth: Sequence[Tensor], same_dtype: Sequence[Tensor]) -> None:
    """Raise Incorrect unless every tensor is as close to the float64 truth as the reference in the same dtype, by ERROR_FACTOR."""
    forms, expected = ([(list(t.shape), dtype_label(t.dtype)) for t in tensors] for tensors in (found, same_dtype))
    if forms != expected:
        raise Incorrect(f"{what}: expected {expected}, found {forms}")
    for place, (value, exact, yardstick) in enumerate(zip(found, truth, same_dtype, strict=True)):
        unit = torch.finfo(value.dtype).eps
        allowed = unit * min(ERROR_FACTOR[mode] * relative_error(yardstick, exact) / unit + FLOOR, CAP[mode])
        error = relative_error(value, exact)
        if not error <= allowed:  # also true for NaN
            raise Incorrect(f"{what}, tensor {place}: relative error {error:.2e}, allowed {allowed:.2e}")


def check(problem: Problem, name: str) -> None:
    """Raise Incorrect unless the implementation does what the reference does, in the mode and at the sizes about to be measured."""
    op, implementation = problem.op, problem.op.implementations[name]
    reference_call = op.implementations["reference"].call
    truth = problem.double().timed(reference_call)()
    found = problem.timed(implementation.call)()
    what = f"{op.name} {problem.mode}: {name}"
    if not implementation.own_noise:
        compare(what, problem.mode, found, truth, problem.timed(reference_call)())
    if op.verify is not None:
        op.verify(implementation, problem.args, found, truth)


# --- noise_sample -------------------------------------------------------------------------------------------------------------------


def _noise_sample_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    x_0 = torch.rand(s["B"], s["C"], s["H"], s["W"], generator=generator) * 2 - 1
    angle = torch.rand(s["B"], s["K"], generator=generator) * (math.pi / 2)
    return (x_0, angle.cos(), angle.sin(), torch.arange(s["B"])), {"seed": 1, "step": 2}


def _noise_sample_torch_randn(
    x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, index: Tensor, *, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    # Sequential generator: the noise depends on what was drawn before, and `index`, `seed` and `step` have no part in it.
    shape = (*alpha_t.shape, 1, 1, 1)
    eps = torch.randn(*alpha_t.shape, *x_0.shape[1:], dtype=x_0.dtype)
    x_t = alpha_t.view(shape) * x_0[:, None] + sigma_t.view(shape) * eps
    return x_t.flatten(0, 1), eps.flatten(0, 1)


def _verify_noise(implementation: Implementation, args: tuple[Any, ...], found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """eps is standard normal to five standard errors, x_t is made of it, and shared noise agrees bit for bit."""
    x_0, alpha_t, sigma_t, _ = args
    if [(t.shape, t.dtype) for t in found] != [(t.shape, x_0.dtype) for t in truth]:
        raise Incorrect("noise_sample: expected x_t and eps of [B*K, C, H, W] in the dtype of x_0")
    x_t, eps = (output.double() for output in found)
    if not implementation.own_noise and not torch.equal(eps, truth[1]):
        raise Incorrect("noise_sample: eps differs from the reference's random bits")
    count = eps.numel()
    flat = eps.flatten()
    for moment, value, expected, variance in (
        ("mean", flat.mean(), 0.0, 1.0),
        ("variance", flat.square().mean(), 1.0, 2.0),
        ("skewness", flat.pow(3).mean(), 0.0, 15.0),
        ("fourth moment", flat.pow(4).mean(), 3.0, 96.0),
        ("correlation of neighbours", (flat[1:] * flat[:-1]).mean(), 0.0, 1.0),
    ):
        if not abs(value.item() - expected) <= 5.0 * math.sqrt(variance / count):
            raise Incorrect(f"noise_sample: {moment} of eps is {value.item():.4f}, expected {expected}")
    levels = alpha_t.shape[1]
    alpha, sigma = (amplitude.double().flatten().view(-1, 1, 1, 1) for amplitude in (alpha_t, sigma_t))
    if not relative_error(x_t, alpha * x_0.double().repeat_interleave(levels, 0) + sigma * eps) <= FLOOR * torch.finfo(x_0.dtype).eps:
        raise Incorrect("noise_sample: x_t is not alpha_t x_0 + sigma_t eps")


NOISE_SAMPLE = Op(
    name="noise_sample",
    shapes=({"B": 64, "K": 1, "C": 1, "H": 16, "W": 16}, {"B": 16, "K": 4, "C": 3, "H": 32, "W": 32}),
    dtypes=(torch.float32,),
    inputs=_noise_sample_inputs,
    wrt=(),  # images are data: training asks for no gradient here
    # read x_0 once; write x_t and eps for each of K levels
    bytes_moved={"fwd": lambda s, size: size * s["B"] * s["C"] * s["H"] * s["W"] * (1 + 2 * s["K"])},
    implementations={
        "reference": Implementation(reference.noise_sample),
        **_core(ops.noise_sample),
        "torch.randn": Implementation(_noise_sample_torch_randn, own_noise=True),
    },
    baseline="torch.randn",
    verify=_verify_noise,
)


# --- guided_loss --------------------------------------------------------------------------------------------------------------------


def _guided_loss_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    images = (torch.randn(s["S"], s["C"], s["H"], s["W"], generator=generator) for _ in range(3))
    return (*images, *(torch.rand(s["S"], generator=generator) + 0.1 for _ in range(3))), {}


def _guided_loss_mse(
    eps: Tensor, eps_pred: Tensor, grad_log_q: Tensor, sigma_t: Tensor, weight: Tensor, unconditional_weight: Tensor
) -> tuple[Tensor, Tensor]:
    eps_hat = eps_pred - sigma_t.view(-1, 1, 1, 1) * grad_log_q
    guided = F.mse_loss(eps_hat, eps, reduction="none").sum((1, 2, 3))
    unguided = F.mse_loss(eps_pred, eps, reduction="none").sum((1, 2, 3))
    return weight * guided + unconditional_weight * unguided, unguided.detach()


def _image_elements(s: Shape) -> int:
    return s["S"] * s["C"] * s["H"] * s["W"]


GUIDED_LOSS = Op(
    name="guided_loss",
    shapes=({"S": 64, "C": 1, "H": 16, "W": 16}, {"S": 32, "C": 3, "H": 64, "W": 64}),
    dtypes=(torch.float32,),
    inputs=_guided_loss_inputs,
    wrt=(1, 2),  # eps_pred and grad_log_q, where the two networks meet the loss
    bytes_moved={
        # read eps, eps_pred, grad_log_q; the [S] vectors are too small to count
        "fwd": lambda s, size: size * _image_elements(s) * 3,
        # read the same three; write the two gradients
        "bwd": lambda s, size: size * _image_elements(s) * 5,
        # bwd (5), then read the same three and two cotangents, write two gradients (7)
        "bwd_bwd": lambda s, size: size * _image_elements(s) * 12,
    },
    implementations={
        "reference": Implementation(reference.guided_loss),
        **_core(ops.guided_loss),
        "torch.mse_loss": Implementation(_guided_loss_mse),
    },
    baseline="torch.mse_loss",
)


# --- attention ----------------------------------------------------------------------------------------------------------------------


def _attention_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    return tuple(torch.randn(s["B"], s["S"], s["N"], s["D"], generator=generator) for _ in range(3)), {}


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attention


def _attention_elements(s: Shape) -> int:
    return s["B"] * s["S"] * s["N"] * s["D"]


def _attention_product(s: Shape) -> int:
    """One S x S x D product in every head."""
    return 2 * s["B"] * s["N"] * s["S"] ** 2 * s["D"]


ATTENTION = Op(
    name="attention",
    shapes=({"B": 8, "S": 64, "N": 2, "D": 32}, {"B": 2, "S": 256, "N": 2, "D": 64}),
    dtypes=(torch.float32, torch.bfloat16),
    inputs=_attention_inputs,
    wrt=(0, 1, 2),
    bytes_moved={
        # read q, k, v; write out
        "fwd": lambda s, size: size * _attention_elements(s) * 4,
        # read q, k, v, out, grad_out; write three gradients
        "bwd": lambda s, size: size * _attention_elements(s) * 8,
        # bwd (8), then read q, k, v, grad_out and three cotangents, write four gradients (11)
        "bwd_bwd": lambda s, size: size * _attention_elements(s) * 19,
    },
    # Products that must be formed when nothing is formed twice: the same count for everybody, so recomputing lowers the figure.
    flops={
        # q k^T, P v
        "fwd": lambda s: 2 * _attention_product(s),
        # grad_out v^T, P^T grad_out, dS k, dS^T q
        "bwd": lambda s: 4 * _attention_product(s),
        # bwd (4), then with dots for cotangents and bars for results: T = q' k^T + q k'^T (2), Y = grad_out v'^T (1),
        # the cotangent of grad_out P' v + P v' (2), q-bar (2), k-bar (2), v-bar (1)
        "bwd_bwd": lambda s: 14 * _attention_product(s),
    },
    implementations={
        "reference": Implementation(reference.attention),
        **_core(ops.attention),
        "torch.sdpa_math": Implementation(_sdpa(SDPBackend.MATH)),
        "torch.sdpa_flash": Implementation(_sdpa(SDPBackend.FLASH_ATTENTION), modes=("fwd", "bwd")),  # has no second derivative
    },
    baseline="torch.sdpa_math",
)


# --- group_norm_silu ----------------------------------------------------------------------------------------------------------------


def _group_norm_silu_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    x = torch.randn(s["B"], s["C"], s["H"], s["W"], generator=generator) + 0.5
    weight, bias = (torch.randn(s["C"], generator=generator) for _ in range(2))
    return (x, weight, bias, s["G"]), {}


def _group_norm_silu_torch(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias))


def _feature_elements(s: Shape) -> int:
    return s["B"] * s["C"] * s["H"] * s["W"]


GROUP_NORM_SILU = Op(
    name="group_norm_silu",
    shapes=({"B": 64, "C": 32, "H": 16, "W": 16, "G": 4}, {"B": 8, "C": 64, "H": 32, "W": 32, "G": 4}),
    dtypes=(torch.float32, torch.bfloat16),
    inputs=_group_norm_silu_inputs,
    wrt=(0, 1, 2),
    bytes_moved={
        # read x, write y; the [C] vectors are too small to count
        "fwd": lambda s, size: size * _feature_elements(s) * 2,
        # read x and grad_y; write grad_x
        "bwd": lambda s, size: size * _feature_elements(s) * 3,
        # bwd (3), then read x, grad_y and the cotangent, write the gradients in x and in grad_y (5)
        "bwd_bwd": lambda s, size: size * _feature_elements(s) * 8,
    },
    implementations={
        "reference": Implementation(reference.group_norm_silu),
        **_core(ops.group_norm_silu),
        # In float32 the arithmetic of the reference without its argument checks: their ratio there is the noise of the run.
        "torch.group_norm": Implementation(_group_norm_silu_torch),
    },
    baseline="torch.group_norm",
)


# --- gaussian_log_prob --------------------------------------------------------------------------------------------------------------


def _gaussian_log_prob_inputs(s: Shape, generator: torch.Generator) -> Arguments:
    z, mu = (torch.randn(s["B"], s["Z"], generator=generator) for _ in range(2))
    return (z, mu, torch.rand(s["B"], s["Z"], generator=generator) + 0.1), {}


def _gaussian_log_prob_distributions(z: Tensor, mu: Tensor, var: Tensor) -> Tensor:
    return torch.distributions.Normal(mu, var.sqrt(), validate_args=False).log_prob(z).sum(-1)


def _latent_elements(s: Shape) -> int:
    return s["B"] * s["Z"]


GAUSSIAN_LOG_PROB = Op(
    name="gaussian_log_prob",
    shapes=({"B": 64, "Z": 8}, {"B": 1024, "Z": 256}),
    dtypes=(torch.float32,),
    inputs=_gaussian_log_prob_inputs,
    wrt=(0, 1, 2),
    bytes_moved={
        # read z, mu, var; write [B]
        "fwd": lambda s, size: size * (_latent_elements(s) * 3 + s["B"]),
        # read z, mu, var and [B]; write three gradients
        "bwd": lambda s, size: size * (_latent_elements(s) * 6 + s["B"]),
        # bwd, then read z, mu, var, three cotangents and [B], write three gradients and [B]
        "bwd_bwd": lambda s, size: size * (_latent_elements(s) * 15 + s["B"] * 3),
    },
    implementations={
        "reference": Implementation(reference.gaussian_log_prob),
        **_core(ops.gaussian_log_prob),
        "torch.distributions": Implementation(_gaussian_log_prob_distributions),
    },
    baseline="torch.distributions",
)

OPS = (NOISE_SAMPLE, GUIDED_LOSS, ATTENTION, GROUP_NORM_SILU, GAUSSIAN_LOG_PROB)
