"""What a run frees, the next step gets without the system clearing it again."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, core_launchers, tiny

from sami_fast import plan
from sami_fast.engine.memory import ALLOCATOR, enough_memory, give_back_memory
from sami_fast.errors import UserError
from sami_fast.methods.build import build_model
from sami_fast.train import TrainingModule, _rehearse, main

PROGRAM = """
import resource, sys
from sami_fast.engine.memory import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [bytes(b"1" * (24 << 20)) for _ in range(4)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("argument", "environment", "kept"), [("keep", {}, True), ("", {}, False), ("keep", {"MALLOC_TRIM_THRESHOLD_": "1000"}, False)]
)
def test_freed_memory_is_kept(argument, environment, kept):
    """By page faults of allocating the same a second time."""
    given = {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM, argument], env=given, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1000) == kept


# ---- too little of it


@pytest.fixture
def little_memory():
    """1 GiB more than this process holds."""
    give_back_memory()
    before = resource.getrlimit(resource.RLIMIT_AS)
    asked = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (asked + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux holds a process to what it may ask for")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("data.image_size=768", "train.batch_size=16"), "train.batch_size: a step of 16 images at a time"),
        (
            ("data.image_size=480", "train.batch_size=1", "checkpoint.validation_images=64"),
            "checkpoint.validation_images: 64 images at a time",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(settings, said, tmp_path, little_memory, capsys):
    assert main(["--config", TINY, f"runs_dir={tmp_path}/runs", *settings]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"sami-fast: {said}: not enough memory; lower it")
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_rehearsal_asks_for_what_deepspeed_adds(tmp_path, monkeypatch):
    """Which is known by arithmetic: tests/test_plan.py holds that against what ranks keep."""
    config = tiny(tmp_path, "engine.zero_stage=2")
    module = TrainingModule(build_model(config, (3, 8, 8)), config)
    _rehearse(module, config, torch.device("cpu"), ranks=2)
    held = plan.held
    monkeypatch.setattr(plan, "held", lambda *arguments: held(*arguments) + plan.Memory(0, 0, 0, 0, 0, 2**60, 0))
    with pytest.raises(UserError, match=r"^train\.batch_size: a step of 4 images at a time: not enough memory; lower it"):
        _rehearse(module, config, torch.device("cpu"), ranks=2)


def test_the_compiled_core_without_memory_is_understood(little_memory):
    """torch's interface for it drops the reason."""
    x = torch.zeros(8, 64, 512, 512)  # 512 MiB, which leaves too little for a result of the same size
    with pytest.raises(UserError, match="not enough memory"), enough_memory("x", "lower it"):
        core_launchers().conv2d_fwd(x, torch.zeros(64, 64, 3, 3), None, 1, 1)
