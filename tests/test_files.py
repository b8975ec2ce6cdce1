"""Files that appear whole or not at all, and files that a stranger may have made."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest

from sami_fast import files
from sami_fast.engine import monitors
from sami_fast.engine.run_folder import RunFolder
from sami_fast.errors import UserError, printable
from sami_fast.files import append_text, open_lock, open_regular, parse_json, read_json, remove_partial, write_text_whole, write_whole


def _write_often(path, letter):
    os.getpid = lambda: 7  # as in two containers, each of which counts its processes from 1
    for _ in range(40):
        write_text_whole(path, letter * 200_000)


def test_processes_of_one_number_write_one_file(tmp_path):
    """On a share, the number of a process names it no longer. Every read is one whole text, and nothing is left."""
    path = tmp_path / "index.json"
    writers = [multiprocessing.get_context("fork").Process(target=_write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_text() in ("a" * 200_000, "b" * 200_000)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["index.json"]


def test_nothing_is_written_through_a_planted_link(tmp_path, monkeypatch):
    """Even where a stranger has guessed the name; and a lock is no way to empty somebody's file."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 16)
    (tmp_path / f"{files.PARTIAL}{'0' * 16}").symlink_to(victim)
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files._begun(files.partial_of(tmp_path / "file"))
    write_text_whole(tmp_path / "file", "new")
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(tmp_path / "lock")
    with files.locked(tmp_path):  # goes on without
        pass
    assert victim.read_text() == "precious"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "old"}


def test_the_next_write_removes_what_a_kill_left(tmp_path):
    """And nothing else: not what is being written, and not what only looks alike."""
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from sami_fast.files import write_whole
        def write(stream):
            stream.write(b"half"); stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write_whole(Path({str(tmp_path / "file")!r}), write)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert [file.name.startswith(files.PARTIAL) for file in tmp_path.iterdir()] == [True]
    (tmp_path / ".partial-thesis").write_text("mine")
    with files._begun(files.partial_of(tmp_path / "x")) as busy:
        write_text_whole(tmp_path / "other", "whole")
        assert {file.name for file in tmp_path.iterdir()} == {"other", ".partial-thesis", os.path.basename(busy.name)}
    remove_partial(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"other", ".partial-thesis"}


def test_leftovers_go_where_only_writers_may_lock(tmp_path, monkeypatch):
    """As on NFS, which has no other locks."""
    lock = files.fcntl.flock

    def nfs(file, operation):
        if files.fcntl.fcntl(file, files.fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", nfs)
    files.partial_of(tmp_path / "file").write_text("half")
    with files._begun(files.partial_of(tmp_path / "x")) as busy:
        remove_partial(tmp_path)
        assert [str(file) for file in tmp_path.iterdir()] == [busy.name]


def test_a_file_is_added_to_only_where_it_is_one(tmp_path):
    """No link is followed, no pipe waited for."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name, message in (("link", "symbolic links"), ("pipe", "not a regular file"), ("none/log", "No such file")):
        with pytest.raises(OSError, match=message):
            append_text(tmp_path / name, "more")
    os.close(reader)
    with pytest.raises(OSError, match="No such device"):  # nobody reads it
        append_text(tmp_path / "pipe", "more")
    for text in ("é\n", "b\n"):
        append_text(tmp_path / "log", text)
    assert (tmp_path / "log").read_text("utf-8") == "é\nb\n"
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_pipe_a_device_and_a_folder_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


@pytest.mark.parametrize("levels", [32, 33, 100_000])
def test_json_is_as_deep_as_code_can_walk(levels, tmp_path):
    text = "[" * levels + "]" * levels
    (tmp_path / "file").write_text(text)
    if levels == 32:
        assert read_json(tmp_path / "file") == json.loads(text)
    else:
        with pytest.raises(ValueError, match="nested deeper than 32 levels"):
            read_json(tmp_path / "file")
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json('{"a": ' * 40 + "1" + "}" * 40)


def test_a_message_cannot_steer_the_terminal():
    assert printable("a \x1b[31mred\n\u202ename\ud800 ü π") == r"a \x1b[31mred\n\u202ename\ud800 ü π"


def test_what_is_planted_in_a_run_folder_is_left_alone(tmp_path):
    """Its log and tables are files of its own; a name that NFS gives to what was removed is nobody's."""
    run, victim = RunFolder(tmp_path / "run"), tmp_path / "victim"
    victim.write_text("precious")
    run.claim(resume=False, overwrite=False)
    run.write("environment.json", "{}")
    (run.path / ".nfs00000000012a4b").write_text("removed")
    for name in ("metrics.jsonl", "config.yaml"):
        (run.path / name).symlink_to(victim)
    run.write("config.yaml", "name: run")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write .*symbolic links"):
        run.append({"step": 1})
    (run.path / "metrics.jsonl").unlink()
    os.mkfifo(run.path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write"):
        run.append({"step": 1})
    with pytest.raises(OSError, match="not a regular file"):
        run.cut_log(1)
    (run.path / "csv").mkdir()
    (run.path / "csv/loss.csv").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        monitors._append(run.path / "csv/loss.csv", "loss", 1, 0.5)
    assert victim.read_text() == "precious"
    run.claim(resume=True, overwrite=False)
    run.claim(resume=False, overwrite=True)
    assert sorted(file.name for file in run.path.iterdir()) == [".lock", ".nfs00000000012a4b", "checkpoints"]
