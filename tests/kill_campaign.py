"""Kills training again and again, goes on each time, and holds the end against a run that nobody disturbed: every weight equal to the bit.

python tests/kill_campaign.py --kills 200

A round is one staged run with a report, on a folder of images whose cache is empty at first: a kill while the cache is written, kills in
both stages while steps are taken and while a checkpoint is written, one while the report is written; then it is let through. Rounds take
turns between one process and two ranks of the launcher, kills between the three signals, and at two ranks between all of them, the launcher
and one rank alone.

With `--forks` every process is a fork of one that has loaded the libraries already, which takes a fraction of the time. What is killed is
then never a process that still loads them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from forks import Forked, load_libraries
from helpers import TINY, assert_same_weights, rows
from PIL import Image

from sami_fast.engine import checkpoints

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
TARGETS = {1: ("the process",), 2: ("all", "rank 1", "launcher", "rank 0")}
MOMENTS = ("cache", "step", "checkpoint", "step", "checkpoint", "step", "report")
STEPS = 24  # of each of the two stages
SETTINGS = (
    *("data.kind=image_folder", "train.mode=staged", f"train.steps={STEPS}", f"train.denoiser_steps={STEPS}", "train.bank_steps=3"),
    *("kl_weight.kind=auto", "kl_weight.search=0.2", "checkpoint.every=5", "encoder.channels=[32,32]", "engine.patience=60"),
    "data.decoder=torch",
)
PATIENCE = 600.0  # seconds in which a moment must come, and a killed run must end


@dataclass
class Run:
    """One run, in a folder of its own, as often as it is started."""

    folder: Path
    images: Path
    ranks: int
    popen: type[subprocess.Popen] = subprocess.Popen

    def start(self) -> subprocess.Popen:
        script = [ROOT / "sami_fast/train.py", "--config", TINY, "--resume"]
        settings = [*SETTINGS, f"data.path={self.images}", f"data.cache_dir={self.cache}", f"runs_dir={self.folder}"]
        port = str(random.randint(20000, 30000))
        launcher = [Path(sys.executable).with_name("deepspeed"), "-q", "--num_accelerators", "2", "--master_port", port]
        command = [sys.executable, "-u", *(launcher if self.ranks > 1 else ()), *script, *settings]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.output, "w") as output:
            return self.popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    @property
    def result(self) -> Path:
        return self.folder / "tiny"

    def steps_logged(self) -> int:
        return sum(log.read_text().count('"loss_nats"') for log in self.folder.rglob("metrics.jsonl"))

    def steps_kept(self) -> int:
        """Of both stages."""
        newest = (
            next((c for c in checkpoints.list_checkpoints(f) if not checkpoints.damage(c)), None) for f in self.folder.rglob("checkpoints")
        )
        return sum(int(c.name.removeprefix("step_")) for c in newest if c)

    def is_writing_checkpoint(self) -> bool:
        return any(self.folder.rglob("checkpoints/.partial-*"))


def moment(run: Run, name: str, chance: random.Random) -> Callable[[], bool]:
    """Whether it has come, for a run that is about to be started."""
    logged, further = run.steps_logged(), chance.randint(1, 5)
    return {
        "cache": lambda: any(file.is_file() for file in run.cache.rglob("*")),
        "step": lambda: run.steps_logged() >= logged + further,
        "checkpoint": run.is_writing_checkpoint,
        "report": lambda: "writing the report" in run.output.read_text(),
    }[name]


def strike(process: subprocess.Popen, number: int, target: str) -> None:
    """Send the signal to whom it is meant for."""
    if target == "all":
        os.killpg(process.pid, number)
        return
    victim = process.pid
    for child in psutil.Process(process.pid).children(recursive=True) if target != "the process" else []:
        words = " ".join(child.cmdline())
        if (target == "launcher" and "deepspeed.launcher.launch" in words) or f"--local_rank={target[-1]} " in words:
            victim = child.pid
    os.kill(victim, number)


def kill(run: Run, name: str, number: int, target: str, chance: random.Random) -> bool:
    """Start the run, kill it at the moment, and see that nothing is lost and nobody is left; False if it ended before the moment came."""
    kept, come = run.steps_kept(), moment(run, name, chance)
    process, deadline = run.start(), time.monotonic() + PATIENCE
    while not come():
        if process.poll() is not None:
            assert process.returncode == 0, run.output.read_text()
            return False
        assert time.monotonic() < deadline, f"{name} never came: {run.output.read_text()}"
        time.sleep(0.002 if name in ("cache", "checkpoint") else 0.02)  # they pass; and looking takes time from the run
    logged, everyone = run.steps_logged(), [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    try:
        strike(process, number, target)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    process.wait(PATIENCE)
    _, left = psutil.wait_procs(everyone, PATIENCE)
    told = run.output.read_text()
    assert not left, f"{left} go on after {target} was killed: {told}"
    assert run.steps_kept() >= kept, f"{run.steps_kept()} steps are left of {kept}: {told}"
    if number != signal.SIGKILL and name == "step":  # whoever is asked to stop keeps the step that he is at
        assert run.steps_kept() >= logged, f"{run.steps_kept()} steps are kept of {logged}: {told}"
    if number != signal.SIGKILL and target == "the process":
        assert process.returncode in (0, 128 + number), (process.returncode, told)
        assert "Traceback" not in told, told
    return True


def finish(run: Run) -> None:
    """Let it through."""
    assert run.start().wait(PATIENCE) == 0, run.output.read_text()


def assert_equal(run: Run, undisturbed: Run) -> None:
    """Weights to the bit, losses of every step, and nothing half-written."""
    assert_same_weights(run.result, undisturbed.result)
    assert [row["loss_nats"] for row in rows(run.result)] == [row["loss_nats"] for row in rows(undisturbed.result)]
    reports = [json.loads((r.result / "report/metrics.json").read_text())["elbo_nats"] for r in (run, undisturbed)]
    assert reports[0] == reports[1]
    assert not list(run.folder.rglob(".partial-*"))


def campaign(
    folder: Path, kills: int, ranks: Sequence[int], seed: int, popen: type[subprocess.Popen] = subprocess.Popen
) -> Counter[tuple[int, str, str, str]]:
    """Kill so often. Returns how often at which number of ranks, at which moment, with which signal, whom."""
    chance, done, number = random.Random(seed), Counter(), 0
    images = folder / "images"
    images.mkdir(parents=True)
    for place, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 12, 12), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / f"{place}.png")
    undisturbed = {}
    while done.total() < kills:
        count = ranks[number % len(ranks)]
        if count not in undisturbed:
            undisturbed[count] = Run(folder / f"undisturbed{count}", images, count, popen)
            finish(undisturbed[count])
        run = Run(folder / f"round{number}", images, count, popen)
        # A last round of few kills has moments from the whole of a run.
        for name in MOMENTS if (left := kills - done.total()) >= len(MOMENTS) else sorted(chance.sample(MOMENTS, left), key=MOMENTS.index):
            made = done.total() + number  # the rounds shift it, so that signals, targets and moments meet in all ways
            sent, target = SIGNALS[made % len(SIGNALS)], TARGETS[count][made % len(TARGETS[count])]
            if kill(run, name, sent, target, chance):
                done[count, name, sent.name, target] += 1
                print(f"{done.total()}: {sent.name} to {target} of {count}, {name}; {run.steps_kept()} steps kept", flush=True)
        finish(run)
        assert_equal(run, undisturbed[count])
        shutil.rmtree(run.folder)
        number += 1
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--forks", action="store_true", help="load libraries once for all processes")
    arguments = parser.parse_args()
    # A shell lets what it puts into the background ignore Ctrl-C, and all that this starts would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.forks:
        os.environ["DS_ACCELERATOR"] = "cpu"
        load_libraries()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = campaign(Path(folder), arguments.kills, arguments.ranks, arguments.seed, Forked if arguments.forks else subprocess.Popen)
    for (count, name, sent, target), times in sorted(done.items()):
        print(f"{times:4} x {sent} to {target}, {count} rank(s), {name}")
    minutes = (time.monotonic() - began) / 60
    print(f"{done.total()} kills in {minutes:.0f} min: nothing lost beyond the last checkpoint, every run equal to the bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
