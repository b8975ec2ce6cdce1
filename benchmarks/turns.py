"""The side of a training loop that takes its steps in turns, when a process of `loops.py` tells it to."""

import ctypes
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIVEN = 4  # first steps, taken at once, with images and noise that are the same for all


class Turns:
    """The side of a loop: called before each step, it returns when that step may be taken; the process ends when no more are wanted.

    Args:
        address: Of `Loop`.
        weights: The averaged weights, by name; every rank asks for them, the first needs them.
        settled: Returns when all that was begun is done, before clocks are read.
    """

    def __init__(self, address: str, weights: Callable[[], dict[str, Any]], settled: Callable[[], object] = lambda: None) -> None:
        self.weights, self.settled, self.folder = weights, settled, Path(address).parent
        self.memory, self.began, self.first = resident(), time.perf_counter(), 0.0
        self.losses: list[float] = []
        self.left, self.begun = GIVEN, False
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address)
        self.file = self.socket.makefile("rw")
        self.clocks = 0.0, 0.0

    def __call__(self) -> None:
        if self.left == 0:
            self.settled()
            self._tell(*(now - before for now, before in zip((time.perf_counter(), time.process_time()), self.clocks, strict=True)))
            self.left = int(self.file.readline() or 0)
            if self.left == 0:
                os._exit(0)
            self.clocks = time.perf_counter(), time.process_time()
        self.left -= 1

    def saw(self, loss: Callable[[], float]) -> None:
        """After a step: its loss, nats per image."""
        if len(self.losses) < GIVEN:
            self.losses.append(loss())
            self.first = self.first or time.perf_counter() - self.began

    def _tell(self, wall: float, cpu: float) -> None:
        told: dict[str, Any] = {"wall": wall, "cpu": cpu, "peak": resident("VmHWM") - self.memory}
        if not self.begun:
            told, self.begun = {"losses": self.losses, "first": self.first}, True
            if weights := self.weights():
                import torch  # not before: what trains may have something to settle before it is loaded

                torch.save({name: value.clone() for name, value in weights.items()}, self.folder / "weights")
            forget_peak()
        self.file.write(json.dumps(told) + "\n")
        self.file.flush()


def resident(which: str = "VmRSS") -> int:
    """Bytes of this process in memory: now, or at most (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """What compiling and the first steps took, and gave back, is no part of the peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
