"""Whole training loops, each in a process of its own, that take steps in turn: ours, the same by hand in torch, and in JAX.

A step holds all that training does for one: images, noise, loss, gradients, optimiser, averaged weights, log. Ours is the command that
trains, held up before each step until it is its turn. All begin with the same weights, and show the same images with the same noise in
their first steps; the losses of these and the weights after them have to agree before anything is timed.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sami_fast.config import load_config
from sami_fast.train import parse

from .machine import keep_memory
from .measure import Incorrect
from .plain import PlainLoop
from .rows import ROOT
from .steps import CONFIGS, FACES
from .turns import Turns

OURS, LAST, NCHW, COMPILED, JAX = "sami-fast", "torch, channels-last", "torch", "torch.compile", "jax"
STEPS = 1_000_000  # of a run that ends when nobody wants its steps any more
# The joint step from the first one on, beta constant, without the checkpoints that the others do not write.
JOINT = ["train.mode=joint", "train.denoiser_warmup=0", "train.bank_steps=0", "kl_weight.kind=constant", "kl_weight.start=0.25"]
JOINT += [f"train.steps={STEPS}", f"checkpoint.every={STEPS}"]
RUNS: dict[str, tuple[str, list[str]]] = {  # a config by name, and settings that differ
    "disks16": ("disks", []),
    "disks32": ("disks", CONFIGS["disks"][1]),
    "sprites32": ("sprites", []),
    "faces64": ("", FACES),
    "tiny": ("disks", ["train.batch_size=8", "encoder.channels=[16,16]", "denoiser.channels=[8,16]"]),
}
LOSS_ERROR, WEIGHTS_ERROR = 1e-5, 1e-3  # relative; of the weights, to the way that they have come; seen: 1e-7 and 1e-5


@dataclass(frozen=True)
class Case:
    """A run, as it is or changed.

    Attributes:
        run: One of RUNS.
        batch, size: Images a step, and their side; 0: the run's own.
        threads: Of each process; 0: what each takes by default.
        ranks: Processes that share a batch, through the real launcher.
    """

    run: str
    batch: int = 0
    size: int = 0
    threads: int = 1
    ranks: int = 1

    @property
    def arguments(self) -> list[str]:
        """Of train.py."""
        file, overrides = RUNS[self.run]
        changed = {"train.batch_size": self.batch, "data.image_size": self.size, "engine.threads": self.threads}
        return [*(["--config", file] if file else []), *overrides, *JOINT, *(f"{key}={value}" for key, value in changed.items() if value)]

    def __str__(self) -> str:
        threads = "" if self.threads == 1 else f", {self.threads or 'default'} threads"
        name = self.run.rstrip("0123456789") + str(self.size) if self.size else self.run
        return name + threads + (f", {self.ranks} ranks" if self.ranks > 1 else "")


# Who gives out the turns


class Loop:
    """A training loop in processes of its own: its first steps are taken at once, more when it is told to.

    Args:
        who: OURS or another.
        case: What it trains.
        environment: Variables beside those that are set here, of which those that settle a library's threads are left out.
    Attributes:
        losses: Of the first steps, nats per image.
        weights: After them, averaged where the run averages, by name.
        first: Seconds until the first of them was done, from where Python had loaded its modules.
        peak: The most memory until now, above that of the loaded modules, of all processes; bytes.
    """

    def __init__(self, who: str, case: Case, **environment: str) -> None:
        self.who, self.ranks, self.peak, self.folder = who, case.ranks, 0, Path(tempfile.mkdtemp(prefix="loop"))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_", "GOMP_"))}
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))  # `compare` has another package before this tree
        self.connections: list[Any] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.folder / "turns"))
        self.listener.listen()
        self.listener.settimeout(1.0)
        module, told = ("benchmarks.our_loop", []) if who == OURS else (__name__, [who])
        told += [str(self.folder / "turns"), *case.arguments, f"runs_dir={self.folder}", "name=run"]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [*_python(module, case.ranks), *told],
                env={**inherited, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def begin(self) -> "Loop":
        """Wait until the first steps are done. RuntimeError: it ended before, and its last words."""
        while len(self.connections) < self.ranks:
            try:
                connection = self.listener.accept()[0]
            except TimeoutError:
                self._require_alive()
            else:
                connection.settimeout(None)
                self.connections.append(connection.makefile("rw"))
        said = self._heard()
        self.losses = [sum(losses) / len(said) for losses in zip(*(each["losses"] for each in said), strict=True)]
        self.weights, self.first = torch.load(self.folder / "weights"), said[0]["first"]
        return self

    def _require_alive(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.who} ended with {self.process.returncode}: {(self.folder / 'log').read_text()[-1000:]}")

    def _heard(self) -> list[dict[str, Any]]:
        """A message of each rank."""
        lines = [connection.readline() for connection in self.connections]
        if "" in lines:
            self.process.wait()
            self._require_alive()
        return [json.loads(line) for line in lines]

    def turn(self, steps: int) -> tuple[float, float]:
        """Take some steps. Returns seconds per step: on the wall, and of all processors together."""
        for connection in self.connections:
            connection.write(f"{steps}\n")
            connection.flush()
        said = self._heard()
        self.peak = sum(each["peak"] for each in said)
        return max(each["wall"] for each in said) / steps, sum(each["cpu"] for each in said) / steps

    def close(self) -> None:
        self.listener.close()
        for connection in self.connections:
            connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum((one[name] - other[name]).double().square().sum().item() for name in other) ** 0.5


def check_same(loop: Loop, ours: Loop, start: dict[str, Tensor]) -> None:
    """Raise Incorrect unless a loop has had our losses and come to our weights; `start`: the weights before."""
    for step, (found, expected) in enumerate(zip(loop.losses, ours.losses, strict=True)):
        if not abs(found - expected) <= LOSS_ERROR * abs(expected):
            raise Incorrect(f"{loop.who}: a loss of {found:.6g} in step {step}, ours was {expected:.6g}")
    apart = distance(loop.weights, ours.weights) / distance(ours.weights, start)
    if not apart <= WEIGHTS_ERROR:
        raise Incorrect(f"{loop.who}: its weights are {apart:.1e} of their way apart from ours")


def _python(module: str, ranks: int) -> list[str]:
    """What runs a module."""
    if ranks == 1:
        return [sys.executable, "-m", module]
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_accelerators", str(ranks), "--master_port", str(port)]
    return [*launcher, "--no_local_rank", "--module", module]


# A loop by hand


def plain_loop(who: str, address: str, arguments: list[str]) -> None:
    """A loop by hand, in turns."""
    parsed = parse(arguments)
    config = load_config(parsed.config, parsed.overrides)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    keep_memory()  # the only one of the settings of a process that these loops were seen to gain by, 5 %
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    if who == JAX:
        from .plain_jax import JaxLoop as make
    else:
        layout = torch.contiguous_format if who == NCHW else torch.channels_last
        make = partial(PlainLoop, layout=layout, compiled=who == COMPILED, rank=rank, ranks=ranks)
    turns = Turns(address, lambda: loop.weights(), lambda: loop.settled())
    loop = make(config)
    for step in range(config.train.steps):
        turns()
        loss = loop(step)
        turns.saw(loss.item)


if __name__ == "__main__":
    plain_loop(*sys.argv[1:3], sys.argv[3:])
