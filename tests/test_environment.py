"""What a machine can say of itself, also where it cannot."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from sami_fast.data.cache import base_dir
from sami_fast.engine import threads
from sami_fast.engine.run_folder import RunFolder
from sami_fast.engine.threads import WORTH, multiplications, set_threads
from sami_fast.environment import WAITING, cache_home, cores, cores_of_rank, speaks, whole_number
from sami_fast.errors import UserError

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("start", "given", "seen"),
    [
        ("import sami_fast.train", {}, "10000 None"),
        ("import sami_fast, torch", {}, "10000 None"),
        ("sys.argv[1:] = ['--version']; runpy.run_path(TRAIN, run_name='__main__')", {}, "10000 None"),
        ("sys.argv[1:] = ['env']; runpy.run_module('sami_fast.cli', run_name='__main__')", {}, "10000 None"),
        ("import torch, sami_fast", {}, "None None"),
        ("import sami_fast, torch", {"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
        ("import sami_fast, torch", {"GOMP_SPINCOUNT": "7"}, "7 None"),
    ],
)
def test_how_threads_wait_is_said_before_torch_is_there(start, given, seen):
    """What the environment says when torch begins to load; what a user has said stays."""
    code = f"""
import os, runpy, sys
TRAIN = {str(Path(__file__).resolve().parents[1] / "sami_fast/train.py")!r}
class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Look())
{start}
"""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == seen


@pytest.mark.parametrize(
    ("asked", "work", "taken"), [(3, 1.0, 3), (0, 0.9 * WORTH, 1), (0, 2.5 * WORTH, 2), (0, 99 * WORTH, 4), (0, None, 4)]
)
def test_threads_are_as_many_as_the_work_is_worth(asked, work, taken, monkeypatch):
    monkeypatch.setattr(threads, "cores_of_rank", lambda: 4)
    set_threads(asked, work)
    assert torch.get_num_threads() == taken


def test_multiplications_are_those_of_the_layers():
    """A convolution of 4 to 6 channels on 5x5 numbers and a layer of 6 to 3, called twice for each image."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 3)

        def forward(self, x_0, draw, kl_weight, phase):
            return self.head(self.conv(torch.cat((x_0, x_0))).mean((2, 3)))

    assert multiplications(Step(), (4, 5, 5), "both", torch.device("cpu")) == 2 * (25 * 6 * 4 * 9 + 6 * 3)


def test_cores_where_the_system_does_not_tell_which_may_be_used(monkeypatch):
    """As on macOS, which cannot be had here: the function is taken away."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system gives processes no cores of their own")
def test_cores_are_those_that_this_process_may_use():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "2"}, 1),  # of another launcher around this one
        ({"RANK": ""}, 1),
        ({"RANK": "0", "WORLD_SIZE": "4"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": ""}, 4),  # what $SLURM_NTASKS_PER_NODE is where nobody asked for it
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "2"}, 2),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "0"}, 1),
    ],
)
def test_the_cores_are_shared_among_the_ranks_of_the_machine(variables, ranks, no_launcher, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cores_of_rank() == max(1, cores() // ranks)


def test_numbers_of_the_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "")
    assert whole_number("LOCAL_RANK", 3) == 3
    for text in ("x", "-1", "1.5", "²"):
        monkeypatch.setenv("LOCAL_RANK", text)
        with pytest.raises(UserError, match=f"LOCAL_RANK: expected a whole number, found '{text}'"):
            whole_number("LOCAL_RANK", 3)


def test_one_process_of_a_machine_speaks(no_launcher, monkeypatch):
    assert speaks()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not speaks()
    monkeypatch.setenv("LOCAL_RANK", "")
    assert speaks()


def test_a_place_for_caches(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_home() == Path("/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_home() == Path.home() / ".cache"
    assert base_dir("") == cache_home() / "sami-fast"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody whom the system does not know")
def test_somebody_without_a_home_has_a_place_for_caches():
    """As in a container that runs under any number of a user."""
    script = "import os; from sami_fast.environment import cache_home; os.setuid(54321); print(cache_home())"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")} | {"TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", script], env=kept, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (f"{folder}/sami-fast-54321\n", "")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_trains_and_says_so(number, tmp_path, monkeypatch, capsys):
    """As Lustre without its flock option, which cannot be had here: the call is replaced."""

    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = RunFolder(tmp_path / "run")
    folder.claim(resume=False, overwrite=False)
    assert "this file system has no locks; see to it that nothing else trains there" in capsys.readouterr().out
    folder.release()


def test_another_error_of_a_lock_is_one(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="input/output error"):
        RunFolder(tmp_path / "run").lock()
