"""Python programs as forks of a process that has loaded their libraries already: a start costs milliseconds, not seconds of imports.

They are processes of their own, with their arguments, folders, streams, environments, ends and exit statuses. What a library reads of the
environment while it is imported was read before, and an import that a program forgot may have been made. `Forked` forks this process;
`programs` makes commands of a shell that are forks of a process of its own, which signals to the command do not reach.
"""

import atexit
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
# What the package's programs load; what is not installed here is left out.
LIBRARIES = ("deepspeed.launcher.runner", "sami_fast.train", "sami_fast.cli", "sami_fast.report", "sami_fast.evaluation")
LIBRARIES += ("sami_fast.engine.deepspeed", "torch._dynamo", "nvidia.dali.fn", "matplotlib.backends.backend_agg")
LIBRARIES += ("PIL.PngImagePlugin", "PIL.JpegImagePlugin", "pillow_heif")
SOCKET = socket.AF_UNIX, socket.SOCK_SEQPACKET
ANSWER = 0.02  # seconds after which a program that has ended is seen to have


def load_libraries() -> None:
    """Once, before the first fork."""
    for library in LIBRARIES:
        with suppress(ImportError, OSError):
            import_module(library)


class Forked(subprocess.Popen):
    """A `Popen` for `[sys.executable, "-u", script, ...]` and `[sys.executable, "-u", "-m", module, ...]`; other programs are executed.

    It is for a process of one thread.
    """

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any, env: Any, *more: Any):
        if isinstance(args, str) or [os.fspath(word) for word in args[:2]] != [sys.executable, "-u"]:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
        assert threading.active_count() == 1
        _, _, _, _, _, _, output, _, errors, _, _, _, _, _, new_session, _ = more
        self.pid = os.fork()
        if self.pid == 0:
            _become([os.fspath(word) for word in args], os.environ.copy() if env is None else env, {1: output, 2: errors}, new_session)
        self._child_created = True


def _become(words: Sequence[str], environment: Mapping[str, str], streams: Mapping[int, int], new_session: bool) -> None:
    """Be a process that begins; it ends here."""
    status = 1
    try:
        if new_session:
            os.setsid()
        for number, opened in streams.items():
            if opened >= 0:
                os.dup2(opened, number)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        atexit._clear()  # what the process that was forked has to do at its end
        weakref.finalize._registry.clear()
        weakref.finalize._registered_with_atexit = False
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(environment)
        _show(words)
        subprocess.Popen = Forked
        status = _run(words[2:])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(words: Sequence[str]) -> int:
    """Run a script or a module to its end. Returns its exit status."""
    status, module = 0, words[0] == "-m"
    sys.argv = [*words[module:]]
    try:
        if module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
        if status is True:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # waits for threads, as a process does at its end
    atexit._run_exitfuncs()
    return int(status)


def _show(words: Sequence[str]) -> None:
    """As the arguments that others see. They may run on into where the environment lay when the process was started."""
    start, end, _, last = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:49])
    text = " ".join(words).encode().ljust(end - start)[: last - start - 1]
    ctypes.memset(start, 0, last - start)
    ctypes.memmove(start, text, len(text))


# Commands of a shell


@contextmanager
def programs(folder: Path) -> Iterator[None]:
    """Put `python`, `deepspeed`, `sami-fast` and `pytest` into a folder for a PATH. Scripts and modules are forks of one process, which
    ends with the context; what else python is asked for, it does itself."""
    address = folder / "forks"
    for name in ("python", "deepspeed", "sami-fast", "pytest"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {address} {BIN / name} "$@"\n')
        (folder / name).chmod(0o755)
    with socket.socket(*SOCKET) as listening:
        listening.bind(str(address))
        listening.listen()
        serving = [sys.executable, __file__, str(listening.fileno())]
        # Imports that ask CUDA itself whether it is there would end its use in forks.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        server = subprocess.Popen(serving, pass_fds=[listening.fileno()], env=environment, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # and what still runs
        server.wait()


def _serve(listening: socket.socket) -> None:
    """Fork once for each connection that asks for a program, and answer with its exit status."""
    load_libraries()
    running: dict[int, socket.socket] = {}
    while True:
        if select.select([listening], [], [], ANSWER if running else None)[0]:
            connection, _ = listening.accept()
            asked, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
            if not asked:  # the command has ended before it could ask
                connection.close()
                continue
            words, folder, environment = json.loads(asked)
            if not (child := os.fork()):
                listening.close()
                os.chdir(folder)
                _become(words, environment, dict(enumerate(streams)), new_session=False)
            for stream in streams:
                os.close(stream)
            running[child] = connection
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] in running:
                with running.pop(ended[0]) as connection, suppress(OSError):  # the command may be gone
                    connection.send(str(os.waitstatus_to_exitcode(ended[1])).encode())


def _ask(address: str, program: str, *arguments: str) -> int:
    """Have a program run with the streams, folder and environment of this process. Returns its exit status."""
    words = [program, *arguments] if Path(program).name != "python" else list(arguments)
    if not words or (words[0] != "-m" and not words[0].endswith(".py") and words[0] != program):
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(*SOCKET) as connection:
        connection.connect(address)
        message = json.dumps([[sys.executable, "-u", *words], os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [message], [0, 1, 2])
        status = int(connection.recv(16) or 1)
    if status < 0:  # it was killed, and so is this
        with suppress(OSError):  # SIGKILL has no other action
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    if len(sys.argv) == 2:
        del sys.path[0]  # this folder
        _serve(socket.socket(*SOCKET, fileno=int(sys.argv[1])))
    sys.exit(_ask(*sys.argv[1:]))
