"""Ctrl-C, SIGTERM and SIGUSR1, by which batch systems announce an end: while steps are taken they wait for the end of a step, which is then
kept; elsewhere they end the program at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..environment import is_first_rank
from ..errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

_asked = 0  # the signal that came first
_presses = 0  # of Ctrl-C
_waiting = False  # whether a signal has to wait
_answer = ""  # to one that has to


@contextmanager
def handled() -> Iterator[None]:
    """Inside, these signals do what this module says, if this is the main thread: no other can ask for signals."""
    global _asked, _presses
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell lets commands in the background ignore Ctrl-C, which is meant for others.
    before = {number: signal.signal(number, _arrived) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        _asked = _presses = 0


def _arrived(number: int, frame: FrameType | None) -> None:
    global _asked, _presses
    first, _asked = not _asked, _asked or number
    _presses += number == signal.SIGINT  # a launcher passes Ctrl-C on as SIGTERM as well, which is no second one
    if _presses > 1:
        os._exit(128 + signal.SIGINT)
    if not first:
        return
    if not _waiting:
        raise Interrupted(number)
    if _answer and is_first_rank():
        with suppress(BrokenPipeError):
            os.write(2, f"{_answer}\n".encode())  # print may be what the signal has interrupted


def asked() -> int:
    """The signal that asked this process to stop; 0 if none did."""
    return _asked


@contextmanager
def held_back(answer: str = "", then_raised: bool = True) -> Iterator[None]:
    """Inside, a signal only shows in `asked`.

    Args:
        answer: What a user is told at once.
        then_raised: Whether a signal that nobody has asked for is raised at the end.
    Raises:
        Interrupted: there was one.
    """
    global _answer, _waiting
    before, _waiting, _answer = _waiting, True, answer
    try:
        yield
    finally:
        _waiting, _answer = before, ""
    if then_raised and _asked and not _waiting:
        raise Interrupted(_asked)
