"""Python programs as forks of a process that has loaded their libraries already: a start costs milliseconds, not seconds of imports.

Everything else is as of programs that are started: processes of their own, with their arguments, environments, signals and parents.
"""

import atexit
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(environment)
        _show(words)
        subprocess.Popen = Forked
        status = _run(words[2:])
    finally:
        os._exit(status)


def _run(words: Sequence[str]) -> int:
    """Run a script or a module to its end. Returns its exit status."""
    status, module = 0, words[0] == "-m"
    sys.argv = [*words[module:]]
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException as error:
        traceback.print_exc()
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()
    return int(status)


def _show(words: Sequence[str]) -> None:
    """As the arguments that others see. They may run on into where the environment lay when the process was started."""
    start, end, _, last = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:49])
    text = " ".join(words).encode().ljust(end - start)[: last - start - 1]
    ctypes.memset(start, 0, last - start)
    ctypes.memmove(start, text, len(text))
