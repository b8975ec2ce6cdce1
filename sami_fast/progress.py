"""How far a command has come: bars on a terminal, with the time that is left; nothing anywhere else.

A library is silent: only inside `shown()`, which commands enter, are there bars at all.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

PATIENCE = 2.0  # seconds before a bar appears: what ends sooner needs none
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}, {eta} left"

_wanted: ContextVar[bool] = ContextVar("progress", default=False)


@contextmanager
def shown() -> Iterator[None]:
    """Inside, bars appear where stderr is a terminal."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def hms(seconds: float) -> str:
    """A time as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Bar(tqdm):
    """A bar whose `disable` says that nobody sees it. It goes away when it is closed."""

    monitor_interval = 0  # no thread of tqdm's beside it, which would outlive it: `miniters` of 1 needs none

    @property
    def format_dict(self) -> dict[str, Any]:
        found = super().format_dict
        done, elapsed = found["n"], found["elapsed"]
        rate = found["rate"] or (done / elapsed if elapsed else 0)
        return {**found, "eta": hms((found["total"] - done) / rate) if rate else "?"}


def bar(total: int, what: str, unit: str) -> Bar:
    """A bar, to be closed, or used as a context; `update(n)` moves it on.

    Args:
        total: How much there is to do.
        what: What is done.
        unit: What is counted, in the plural.
    """
    seen = _wanted.get() and sys.stderr.isatty()
    return Bar(
        total=total, desc=what, unit=unit, bar_format=FORMAT, delay=PATIENCE, leave=False, dynamic_ncols=True, miniters=1, disable=not seen
    )
