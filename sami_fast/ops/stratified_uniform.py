"""Where the noise levels of a batch lie: nested stratified uniforms, the same on every backend."""

from torch import Tensor

from .. import reference
from .define import define
from .launchers import Launcher, Launchers
from .random import check_count, check_draw, check_index


class StratifiedUniformLaunchers(Launchers):
    op = "stratified_uniform"
    draw = Launcher(reference.stratified_uniform, file="random")  # Triton's lies with the other draws


def stratified_uniform(
    index: Tensor,  # [B]
    levels: int,
    global_batch: int,
    *,
    seed: int,
    step: int,
    backend: str | None = None,
) -> Tensor:  # [B, K]
    """K uniforms per image: one image covers all K strata, the whole batch covers all global_batch * K of them.

        u = (k + (rank(b) + v_bk) / global_batch) / K

    with rank a random order of the global batch and v uniform. A level picked at random among the K of an image is uniform on [0, 1];
    level k alone is confined to its stratum.

    Args:
        index: Place of each local image in the global batch. [B] int64, 0 <= index < global_batch.
        levels: K, noise levels per image.
        global_batch: Images of one step over all ranks and micro-batches.
        seed, step: See `random_normal`.
        backend: See `sami_fast.use_backend`.
    Returns:
        [B, K] float32 in [0, 1], bit for bit the same on every backend. An index outside the global batch raises on a CPU (IndexError on
        the reference, where a negative one counts from the end, RuntimeError on the compiled core) and gives NaN on a GPU.
    Raises:
        ValueError: index is not [B], seed or step is out of range, or levels or global_batch is negative.
        TypeError: index is not int64.
        BackendError: the backend cannot run this call.
    Differentiable: no; there is nothing to differentiate.
    Runs on: C++, Triton, CUDA, reference.
    """
    check_index(index)
    check_draw(seed, step)
    check_count("levels", levels)
    check_count("global_batch", global_batch)
    backend = StratifiedUniformLaunchers.choose(backend, index)
    if backend == "reference":
        return reference.stratified_uniform(index, levels, global_batch, seed=seed, step=step)
    return _stratified_uniform(index, levels, global_batch, seed, step, backend)


def _draw(index: Tensor, levels: int, global_batch: int, seed: int, step: int, backend: str) -> Tensor:
    return StratifiedUniformLaunchers(backend).draw(index, levels, global_batch, seed=seed, step=step)


_stratified_uniform = define("stratified_uniform", _draw)
