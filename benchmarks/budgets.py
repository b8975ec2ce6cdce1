"""Budgets for what noise cannot blur: FLOPs, operator calls, bytes and launches of the ops, the encoder's score and a training step.

python benchmarks/budgets.py            # every budget of benchmarks/budgets/counted.csv beside today's figure; no GPU needed
python benchmarks/budgets.py --write    # today's figures become the budgets

Exit status 1 when a figure exceeds its budget, or has none; 2 when the file cannot be read. Registers, spills and shared memory of the
kernels have budgets too, which `python -m sami_fast.kernels.aot` and `python csrc/check_cuda.py` compare as they compile.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available() or __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its launchers then take CPU tensors

from counting import Counts, count
from sami_fast.kernels.budgets import BudgetError, Budgets, Row, Table
from torch import Tensor

from sami_fast import ops, score
from sami_fast.config import load_config
from sami_fast.data import open_dataset
from sami_fast.methods.build import build_model
from sami_fast.models import Encoder
from sami_fast.ops.backend import refusal
from sami_fast.step import Draw, Objective, training_step

FILE = Path(__file__).with_name("budgets") / "counted.csv"
TABLE = Table(("what", "backend"), tuple(field.name for field in fields(Counts)), exact=frozenset({"convolution_flops", "launches"}))
BACKENDS = ("cpp", "triton", "reference")
METHODS = ("reverse", "sweeps", "dual")
VERSION = "torch " + ".".join(torch.__version__.split(".")[:2])

Work = Callable[[Callable[[], None]], object]  # a computation as `counting.count` takes it


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Score:
    """The score of an encoder with every kind of layer, for 8 images."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder = Encoder(1, 16, 4, [16, 24], blocks=1, attention=[8])
        self.x, self.z = normal(8, 1, 16, 16), normal(8, 4).requires_grad_()

    def forward(self, keep: Callable[[], None]) -> object:
        """What F is."""
        with torch.no_grad():
            return self.encoder(self.x)

    def by(self, method: str) -> Work:
        """The score, and the gradients of half its square in z and the encoder's parameters."""
        encoder, x, z = self.encoder, self.x, self.z

        def work(keep: Callable[[], None]) -> object:
            g = score.grad_log_q(encoder, x, z, method)
            loss = (score.directional(encoder, x, z, g) if method == "dual" else g.square() / 2).sum()
            keep()
            return torch.autograd.grad(loss, [z, *encoder.parameters()])

        return work


class Step:
    """The built-in disks run: a batch, and its networks."""

    def __init__(self) -> None:
        config = load_config("disks")
        dataset = open_dataset(config.data, config.seed)
        self.sami = build_model(config, dataset.image_shape)
        index = torch.arange(config.train.batch_size)
        self.x_0 = dataset.images(index)
        self.draw = Draw(seed=1, step=2, index=index, global_batch=len(index))
        self.objective = Objective(**asdict(config.objective))
        self.kl_weight = config.kl_weight.start

    def by(self, method: str) -> Work:
        """The loss, and the gradients of both networks' parameters."""
        sami = self.sami
        parameters = list(sami.parameters())

        def work(keep: Callable[[], None]) -> object:
            networks = sami.encoder, sami.denoiser, sami.schedule
            loss, _ = training_step(*networks, self.x_0, self.draw, self.objective, self.kl_weight, score_method=method)
            keep()
            return torch.autograd.grad(loss, parameters)

        return work


@dataclass(frozen=True)
class Op:
    """An op with its arguments, and how often a training step differentiates it in those that need a gradient."""

    call: Callable[..., Any]
    tensors: Sequence[Tensor]
    order: int

    def work(self, order: int) -> Work:
        """The forward and so many derivatives, of half the square of everything before; kept bytes are those at the end."""
        wrt = [t for t in self.tensors if t.requires_grad]

        def work(keep: Callable[[], None]) -> object:
            results = [self._tuple(self.call(*self.tensors))]
            for level in range(order):
                loss = sum(t.square().sum() / 2 for t in results[-1] if t.requires_grad)
                results.append(torch.autograd.grad(loss, wrt, create_graph=level + 1 < self.order))
            keep()
            return results

        return work

    @staticmethod
    def _tuple(out: Any) -> tuple[Tensor, ...]:
        return out if isinstance(out, tuple) else (out,)


def op_cases() -> dict[str, Op]:
    """[B, S, N, D] = [4, 64, 4, 32] for attention, [4, 64, 16, 16] for features, [64, 8] for latents, [64, 1, 16, 16] for images."""

    def leaves(number: int, *shape: int) -> list[Tensor]:
        return [normal(*shape).requires_grad_() for _ in range(number)]

    features, images, amplitude = (4, 64, 16, 16), (64, 1, 16, 16), torch.full((64,), 0.5)
    parameters = leaves(2, 64)
    z, mu, raw_var = leaves(3, 64, 8)
    var = (raw_var.detach().square() + 0.1).requires_grad_()

    def noise(x_0: Tensor, level: Tensor, index: Tensor) -> Any:
        return ops.noise_sample(x_0, level, level, index, seed=1, step=2)

    return {
        "attention": Op(ops.attention, leaves(3, 4, 64, 4, 32), 2),
        "attention_dual": Op(ops.attention_dual, leaves(6, 4, 64, 4, 32), 1),
        "conv2d": Op(partial(ops.conv2d, padding=1), [*leaves(1, *features), *leaves(1, 64, 64, 3, 3), parameters[0]], 2),
        "gaussian_log_prob": Op(ops.gaussian_log_prob, [z, mu, var], 2),
        "group_norm_silu": Op(partial(ops.group_norm_silu, num_groups=4), [*leaves(1, *features), *parameters], 2),
        "group_norm_silu_dual": Op(partial(ops.group_norm_silu_dual, num_groups=4), [*leaves(2, *features), *parameters], 1),
        "guided_loss": Op(ops.guided_loss, [normal(*images), *leaves(2, *images), amplitude, amplitude, amplitude], 2),
        "noise_sample": Op(noise, [normal(*images), amplitude[:, None], torch.arange(64)], 0),
    }


ORDERS = ("forward", "first derivatives", "second derivatives")


def cases() -> Iterator[tuple[str, Work]]:
    for name, op in op_cases().items():
        for order in range(op.order + 1):
            yield f"{name}, {ORDERS[order]}", op.work(order)
    of_score, step = Score(), Step()
    yield "encoder, forward", of_score.forward
    for method in METHODS:
        yield f"score, {method}", of_score.by(method)
        yield f"step, {method}", step.by(method)


def row(what: str, backend: str, work: Work) -> Row:
    counts = {kind: value for kind, value in asdict(count(work, backend)).items() if value is not None}
    return Row((what, backend), counts, VERSION)


def refusals() -> dict[str, str]:
    """Why a backend cannot be counted here, for those that cannot."""
    return {name: reason for name in BACKENDS if (reason := refusal(name, "cpu", torch.float32)) is not None}


def measure() -> list[Row]:
    """Today's figures, of the backends that are there."""
    missing = refusals()
    return [row(what, name, work) for what, work in cases() for name in BACKENDS if name not in missing]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Budgets.add_options(parser, FILE)
    arguments = parser.parse_args(argv)
    try:
        budgets = Budgets(TABLE, arguments, "python benchmarks/budgets.py")
    except BudgetError as error:
        print(error, file=sys.stderr)
        return 2
    missing = refusals()
    for name, reason in missing.items():
        print(f"{name} is not counted here: {reason}")
    found = measure()
    faults = budgets.settle(found, lambda row: row.name[-1] not in missing)
    print(f"{len(found)} computations counted with {VERSION}, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
