"""Budgets of what can be counted, and is the same on every machine: FLOPs, operator calls, bytes and launches, of the ops, the encoder's
score and a training step; and of the step of whole configs as a GPU would run it: kernels, bytes, FLOPs, layouts ("gpu").

python -m benchmarks.budgets            # every budget of benchmarks/budgets/counted.csv beside today's figure; no GPU needed
python -m benchmarks.budgets --write    # today's figures become the budgets

Exit status 1 when a figure exceeds its budget, or has none; 2 when the file cannot be read.

A line of the file names a computation and a backend, holds what was counted, and says with which version of torch: with another one most
figures differ without our doing. An empty cell: not counted.
"""

import argparse
import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available() or __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its launchers then take CPU tensors

from torch import Tensor

from sami_fast import ops, plan, score
from sami_fast.config import load_config
from sami_fast.data import open_dataset
from sami_fast.gpu_step import trace
from sami_fast.models import Encoder
from sami_fast.ops.backend import refusal

from .counting import Counts, GPUCounts, count
from .steps import SCORE_METHODS, Step
from .table import lines

FILE = Path(__file__).with_name("budgets") / "counted.csv"
BACKENDS = ("cpp", "triton", "reference")
VERSION = "torch " + ".".join(torch.__version__.split(".")[:2])
KINDS = tuple(field.name for counts in (Counts, GPUCounts) for field in fields(counts))
EXACT = ("convolution_flops", "launches", "matmul_flops", "channels_outside")  # that no version of torch changes
COLUMNS = ["what", "backend", *KINDS, "made_with"]

Work = Callable[[Callable[[], None]], object]  # a computation as `counting.count` takes it


# ---- the file


class BudgetError(Exception):
    """A file of budgets that cannot be used, in one sentence."""


@dataclass(frozen=True)
class Row:
    """One computation, counted; figures by KINDS, those that were not counted are absent."""

    what: str
    backend: str
    figures: dict[str, int]
    version: str = VERSION

    @property
    def name(self) -> tuple[str, str]:
        return self.what, self.backend

    def __str__(self) -> str:
        return ", ".join(self.name)

    @property
    def cells(self) -> list[str]:
        return [*self.name, *(str(self.figures.get(kind, "")) for kind in KINDS), self.version]


@dataclass
class Verdict:
    """What a comparison found, in sentences: what is wrong, and what is only worth knowing."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        BudgetError: there is none, or it is no such table.
    """
    try:
        lines = list(csv.reader(StringIO(path.read_text(encoding="utf-8")), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BudgetError(f"{path}: no table of budgets can be read from it ({error}); where there is no file, --write makes one") from None
    if not lines or lines[0] != COLUMNS:
        raise BudgetError(f"{path}: expected the columns {','.join(COLUMNS)}, found {','.join(lines[0]) if lines else 'none'}")
    rows: dict[tuple[str, str], Row] = {}
    for place, cells in enumerate(lines[1:], 2):
        if len(cells) != len(COLUMNS):
            raise BudgetError(f"{path}, line {place}: expected {len(COLUMNS)} cells, found {len(cells)}")
        what, backend, *counted, version = cells
        for kind, cell in zip(KINDS, counted, strict=True):
            if not re.fullmatch(r"[0-9]*", cell):
                raise BudgetError(f"{path}, line {place}: {kind}: expected a whole number or nothing, found {cell!r}")
        figures = {kind: int(cell) for kind, cell in zip(KINDS, counted, strict=True) if cell}
        row = Row(what, backend, figures, version)
        if row.name in rows:
            raise BudgetError(f"{path}, line {place}: a second line for {row}")
        rows[row.name] = row
    return list(rows.values())


def write(path: Path, rows: Iterable[Row]) -> None:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *(row.cells for row in sorted(rows, key=lambda row: row.name))])
    path.write_text(text.getvalue(), encoding="utf-8")


def table(rows: Iterable[Row], budgets: Iterable[Row] = ()) -> str:
    """For a terminal: a line per row; a figure that differs from its budget as "budget -> figure"."""
    before, found = {row.name: row.cells for row in budgets}, []
    for row in rows:
        pairs = zip(before.get(row.name, row.cells), row.cells, strict=True)
        found.append([[f"{old} -> {new}" if old != new else new for old, new in pairs]])
    return "\n".join(lines(COLUMNS, found, text_columns=2))


def compare(budgets: Iterable[Row], found: Iterable[Row], command: str) -> Verdict:
    """Today's figures against their budgets.

    Args:
        budgets: Of what was counted now: those of other computations are left out.
        found: Today's.
        command: The one that writes the file, for messages.
    """
    verdict, lower, versions = Verdict(), [], Counter[tuple[str, str]]()
    before = {row.name: row for row in budgets}
    for row in found:
        budget = before.pop(row.name, None)
        if budget is None:
            verdict.faults.append(f"{row}: has no budget; `{command}` writes it")
            continue
        same = budget.version == row.version
        if not same:
            versions[budget.version, row.version] += 1
        for kind in KINDS if same else EXACT:
            old, new = budget.figures.get(kind), row.figures.get(kind)
            change = f"{row}: {kind} {'none' if old is None else old} -> {'none' if new is None else new}"
            if old != new and (old is None or new is None or new > old):
                verdict.faults.append(change)
            elif old != new:
                lower.append(change)
    verdict.faults += [f"{row}: has a budget and is not there any more; `{command}` takes it out" for row in before.values()]
    for (old, new), number in versions.items():
        verdict.notes.append(f"{number} budgets were made with {old}, and here is {new}: nothing but {', '.join(EXACT)} is compared")
    if lower:
        verdict.notes.append(f"figures below their budget: {len(lower)}, such as {lower[0]}; `{command}` tightens them")
    return verdict


# ---- what is counted


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


def disks_step() -> Step:
    """A batch of the built-in disks run, and its networks."""
    config = load_config("disks")
    return Step.of(config, open_dataset(config.data, config.seed).images(torch.arange(config.train.batch_size)))


def step_gradients(step: Step, method: str, keep: Callable[[], None]) -> object:
    """The loss, and the gradients of both networks' parameters."""
    loss, _terms = step.loss(method)  # the terms stay until the end, as in training
    keep()
    return torch.autograd.grad(loss, list(step.sami.parameters()))


@dataclass(frozen=True)
class OpCase:
    """An op with its arguments, and how often a training step differentiates it in those that need a gradient."""

    call: Callable[..., Any]
    tensors: Sequence[Tensor]
    order: int

    def work(self, order: int) -> Work:
        """The forward and so many derivatives, of half the square of everything before; kept bytes are those at the end."""
        wrt = [t for t in self.tensors if t.requires_grad]

        def work(keep: Callable[[], None]) -> object:
            results = [self._tuple(self.call(*self.tensors))]
            for done in range(order):
                loss = sum(t.square().sum() / 2 for t in results[-1] if t.requires_grad)
                results.append(torch.autograd.grad(loss, wrt, create_graph=done + 1 < self.order))
            keep()
            return results

        return work

    @staticmethod
    def _tuple(out: Any) -> tuple[Tensor, ...]:
        return out if isinstance(out, tuple) else (out,)


def op_cases() -> dict[str, OpCase]:
    """[B, S, N, D] = [4, 64, 4, 32] for attention, [4, 64, 16, 16] for features, [64, 8] for latents, [64, 1, 16, 16] for images."""

    def leaves(number: int, *shape: int) -> list[Tensor]:
        return [normal(*shape).requires_grad_() for _ in range(number)]

    features, images, amplitude = (4, 64, 16, 16), (64, 1, 16, 16), torch.full((64,), 0.5)
    parameters = leaves(2, 64)
    z, mu, raw_var = leaves(3, 64, 8)
    var = (raw_var.detach().square() + 0.1).requires_grad_()

    def noise(x_0: Tensor, amplitude: Tensor, index: Tensor) -> Any:
        return ops.noise_sample(x_0, amplitude, amplitude, index, seed=1, step=2)

    return {
        "attention": OpCase(ops.attention, leaves(3, 4, 64, 4, 32), 2),
        "attention_dual": OpCase(ops.attention_dual, leaves(6, 4, 64, 4, 32), 1),
        "conv2d": OpCase(partial(ops.conv2d, padding=1), [*leaves(1, *features), *leaves(1, 64, 64, 3, 3), parameters[0]], 2),
        "gaussian_log_prob": OpCase(ops.gaussian_log_prob, [z, mu, var], 2),
        "group_norm_silu": OpCase(lambda x, *w: ops.group_norm_silu(x, 4, *w), [*leaves(1, *features), *parameters], 2),
        "group_norm_silu_dual": OpCase(lambda x, tx, *w: ops.group_norm_silu_dual(x, tx, 4, *w), [*leaves(2, *features), *parameters], 1),
        "guided_loss": OpCase(ops.guided_loss, [normal(*images), *leaves(2, *images), amplitude, amplitude, amplitude], 2),
        "noise_sample": OpCase(noise, [normal(*images), amplitude[:, None], torch.arange(64)], 0),
    }


ORDERS = ("forward", "first derivatives", "second derivatives")


def cases() -> Iterator[tuple[str, Work]]:
    for name, op in op_cases().items():
        for order in range(op.order + 1):
            yield f"{name}, {ORDERS[order]}", op.work(order)
    of_score, step = Score(), disks_step()
    yield "encoder, forward", of_score.forward
    for method in SCORE_METHODS:
        yield f"score, {method}", of_score.by(method)
        yield f"step, {method}", partial(step_gradients, step, method)


GPU_CASES = (  # a config, images of one GPU, how the score is differentiated, whether weights lie as they do without DeepSpeed
    ("disks", 64, "reverse", True),
    ("disks", 64, "sweeps", True),
    ("disks", 64, "dual", True),
    ("sprites", 64, "sweeps", True),
    ("celeba64", 64, "sweeps", True),
    ("celeba64", 64, "sweeps", False),
)


def gpu_step_row(name: str, images: int, method: str, laid_out: bool) -> Row:
    """The step of a config that comes with the package."""
    config = load_config(name, ["data.path=celeba"] if name == "celeba64" else [])
    shape = plan.image_shape_of(config)
    step = trace(config, plan.networks_of(config, shape), shape, images, method, laid_out)
    what = f"step of {name}, {images} images, {method}" + ("" if laid_out else ", weights from DeepSpeed")
    return Row(what, "gpu", asdict(GPUCounts.of(step)))


def row(what: str, backend: str, work: Work) -> Row:
    return Row(what, backend, {kind: value for kind, value in asdict(count(work, backend)).items() if value is not None})


def refusals() -> dict[str, str]:
    """Why a backend cannot be counted here, for those that cannot."""
    missing = {name: reason for name in BACKENDS if (reason := refusal(name, "cpu", torch.float32)) is not None}
    return missing | ({"gpu": missing["triton"]} if "triton" in missing else {})


def measure() -> list[Row]:
    """Today's figures, of the backends that are there."""
    missing = refusals()
    found = [row(what, name, work) for what, work in cases() for name in BACKENDS if name not in missing]
    return found + [gpu_step_row(*case) for case in GPU_CASES if "gpu" not in missing]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=Path, metavar="FILE", default=FILE, help="fail where a figure is above its budget there")
    usage = "write the figures there instead; those of what is not counted now stay"
    parser.add_argument("--write", type=Path, metavar="FILE", nargs="?", const=FILE, help=usage)
    arguments = parser.parse_args(argv)
    file = arguments.write or arguments.budgets
    try:
        if arguments.write is not None and not file.absolute().parent.is_dir():
            raise BudgetError(f"--write: no folder {file.absolute().parent}")
        known = read(file) if arguments.write is None or file.exists() else []
    except BudgetError as error:
        print(error, file=sys.stderr)
        return 2
    missing = refusals()
    for name, reason in missing.items():
        print(f"{name} is not counted here: {reason}")
    found = measure()
    others = [row for row in known if row.backend in missing]
    budgets = [row for row in known if row not in others]
    print(table(found, budgets))
    verdict = Verdict()
    if arguments.write is None:
        verdict = compare(budgets, found, f"python -m benchmarks.budgets --write {file}")
    else:
        write(file, [*others, *found])
    print("".join(f"{note}\n" for note in verdict.notes), end="")
    print("".join(f"{fault}\n" for fault in verdict.faults), end="", file=sys.stderr)
    print(f"{len(found)} computations counted with {VERSION}, {len(verdict.faults)} faults")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
