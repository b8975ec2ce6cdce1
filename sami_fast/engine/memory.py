"""Too little memory, in a user's words."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import UserError

# Beside MemoryError and torch's own kind: what torch's allocator on the CPU, oneDNN and cuDNN say, which are RuntimeErrors.
PHRASES = ("can't allocate memory", "out of memory", "could not create a memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


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
        short = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(phrase in str(error) for phrase in PHRASES)
        if not short:
            raise
        raise UserError(f"{what}: not enough memory; {advice}") from None
