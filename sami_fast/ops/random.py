"""Random numbers of `reference/random.py`, bit for bit the same on every backend. Nothing here is differentiable."""

import torch
from torch import Tensor

from .. import reference
from ..reference.random import NUM_STREAMS
from .backend import choose
from .define import define
from .launchers import Launcher, Launchers


class RandomLaunchers(Launchers):
    op = "random_normal"  # and random_uniform, of which the same holds
    normal = Launcher(reference.random_normal)
    uniform = Launcher(reference.random_uniform)


def random_normal(seed: int, step: int, stream: int, index: Tensor, size: int, *, backend: str | None = None) -> Tensor:
    """Standard normals.

    Args:
        seed: Key, 0 <= seed < 2**63.
        step: Optimiser step or any counter, 0 <= step < 2**59.
        stream: One of `Stream`.
        index: Global sample indices. [S] int64, >= 0; each sample's numbers depend on its own index alone.
        size: Elements per sample.
        backend: See `sami_fast.use_backend`.
    Returns:
        [S, size] float32, on the device of `index`.
    Raises:
        ValueError: there is no such stream, seed or step is out of range, index is not [S], or size is negative.
        TypeError: index is not int64.
        BackendError: the backend cannot run this call.
    Runs on: C++, Triton, CUDA, reference.
    Source: Salmon et al., SC 2011 (Philox4x32-10); Box & Muller, 1958.
    """
    return _draw("random_normal", seed, step, stream, index, size, backend)


def random_uniform(seed: int, step: int, stream: int, index: Tensor, size: int, *, backend: str | None = None) -> Tensor:
    """Uniforms in [0, 1). [S, size] float32; arguments, errors and source as in `random_normal`."""
    return _draw("random_uniform", seed, step, stream, index, size, backend)


def _draw(name: str, seed: int, step: int, stream: int, index: Tensor, size: int, backend: str | None) -> Tensor:
    check_index(index)
    check_draw(seed, step, stream)
    check_count("size", size)
    backend = choose(name, backend, index)
    if backend == "reference":
        return getattr(reference, name)(seed, step, stream, index, size)
    return _OPS[name](seed, step, int(stream), index, size, backend)


def check_index(index: Tensor) -> None:
    """ValueError or TypeError unless index is [S] int64."""
    if index.dim() != 1:
        raise ValueError(f"index: expected [S], found {list(index.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index: expected torch.int64, found {index.dtype}")


def check_count(name: str, count: int) -> None:
    """ValueError unless there can be so many."""
    if not 0 <= count < 1 << 62:
        raise ValueError(f"{name}: expected 0 to 2**62 - 1, found {count}")


def check_draw(seed: int, step: int, stream: int = 0) -> None:
    """ValueError unless these number a draw."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, found {seed}")
    if not 0 <= step < 1 << 59:
        raise ValueError(f"step: expected 0 to 2**59 - 1, found {step}")
    if not 0 <= int(stream) < NUM_STREAMS:  # int: torch 2.10 compiles no comparison of an enum
        raise ValueError(f"stream: expected 0 to {NUM_STREAMS - 1}, found {stream}")


_OPS = {
    "random_normal": define("random_normal", RandomLaunchers.normal),
    "random_uniform": define("random_uniform", RandomLaunchers.uniform),
}
