"""Commands that are forks end as started programs do."""

import os
import subprocess
from pathlib import Path

import forks
import pytest

PROGRAM = """
import atexit, os, sys, tempfile, threading, time
print("begun in", os.path.basename(os.getcwd()), "with", *sys.argv[1:], flush=True)
atexit.register(print, "at exit", end="")
kept = tempfile.TemporaryDirectory(dir=".")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
what = sys.argv[1]
if what == "status":
    sys.exit(3)
if what == "text":
    sys.exit("a sentence")
if what == "raise":
    raise ValueError("an error")
if what == "killed":
    os.kill(os.getpid(), 9)
"""
STATUS = {"nothing": 0, "status": 3, "text": 1, "raise": 1, "killed": 137}


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """A folder of commands that are forks, beside a program."""
    folder = tmp_path_factory.mktemp("forks")
    (folder / "program.py").write_text(PROGRAM)
    with forks.programs(folder):
        yield folder


def ran(commands: Path, folder: Path, text: str) -> tuple[int, str, list[str]]:
    """Exit status, output and the last line of errors of a shell that finds its commands in one folder and runs in another."""
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize("what", STATUS)
def test_a_fork_ends_as_a_started_program(forked, tmp_path, what):
    text = f"python {forked / 'program.py'} {what} 'two words'; echo \"; status $?\"; exit 5"
    mine, theirs = ran(forked, tmp_path, text), ran(forks.BIN, tmp_path, text)
    assert mine[:2] == theirs[:2]
    assert mine[1].endswith(f"; status {STATUS[what]}\n")
    if what != "killed":  # of which the shell tells, with a number of the process; and which leaves what it has made
        assert mine[2] == theirs[2]
        assert list(tmp_path.iterdir()) == []


def test_a_command_that_gives_up_stops_no_other(forked, tmp_path):
    program = forked / "program.py"
    assert ran(forked, tmp_path, f"timeout 0.2 python {program} nothing")[0] == 124
    assert ran(forked, tmp_path, f"sleep 0.5; python {program} status; exit $?")[0] == 3


def test_what_is_no_script_is_pythons_own(forked, tmp_path):
    assert ran(forked, tmp_path, "python -c 'print(6 * 7)'; echo 'print(1)' | python -")[1] == "42\n1\n"
