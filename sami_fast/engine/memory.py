"""Memory of a run: too little of it, in a user's words, and what was freed, kept for the next step."""

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import UserError

# Beside MemoryError and torch's own kind: what torch's allocator on the CPU, oneDNN and cuDNN say, which are RuntimeErrors.
PHRASES = ("can't allocate memory", "out of memory", "could not create a memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
# What the compiled core says when torch gives it no memory: its interface passes the reason on to nobody.
FROM_CORE = re.compile(r"(aten::|aten_)(empty|empty_like|new_empty|new_zeros|contiguous)\b.*API call failed", re.DOTALL)

# glibc's numbers of two settings, and the variables by which a user may have made them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: the next step asks for the same, and the system would have to clear every page of it again.

    Nothing happens with another libc, or where the environment already says what glibc should do.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in ALLOCATOR):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not mallopt(M_MMAP_THRESHOLD, 2**30):
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions take


def give_back_memory() -> None:
    """Give freed memory back to the system after something that needed much of it once."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Around something that may need more memory than there is.

    Args:
        what: It, and the setting that it depends on.
        advice: What to lower.
    Raises:
        UserError: there was not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not FROM_CORE.search(str(error)) and not any(phrase in str(error) for phrase in PHRASES):
            raise
        raise UserError(f"{what}: not enough memory; {advice}") from None
