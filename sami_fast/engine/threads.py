"""CPU threads of a rank: as many as its work keeps busy."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..environment import cores_of_rank
from ..step import Draw

WORTH = 8e9  # multiplications, in the forward passes of a micro-batch, that are worth a thread: with less, waking it takes what it gives


def set_threads(threads: int, work: float | None = None) -> None:
    """Set the CPU threads of this rank.

    Args:
        threads: 0 gives every rank of the machine an equal share of the cores it may use, but no thread more than its work is worth. That
            follows from settings and machine alone, and not from a clock: with other threads torch's sums differ in their last bits.
        work: Of a micro-batch, as `multiplications` counts it, times its images; None where it is not known yet.
    """
    share = cores_of_rank()
    torch.set_num_threads(threads or (share if work is None else max(1, min(share, int(work / WORTH)))))


@torch.no_grad()
def multiplications(module: nn.Module, image_shape: tuple[int, int, int], phase: str, device: torch.device) -> float:
    """Of the layers with matrices, convolutions and linear ones, in the forward passes of one image.

    Args:
        module: Called as training calls it, (x_0, draw, kl_weight, phase).
    """
    found, count = 0, 2

    def add(layer: nn.Module, inputs: object, output: object) -> None:
        nonlocal found
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and isinstance(output, Tensor):
            found += weight.numel() * output.numel() // len(weight)  # every number of the output takes one filter

    hook = register_module_forward_hook(add)
    try:
        place = torch.arange(count, device=device)
        module(torch.zeros(count, *image_shape, device=device), Draw(0, 0, place, count), 1.0, phase)
    finally:
        hook.remove()
    return found / count
