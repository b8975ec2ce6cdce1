"""Outputs of a frozen denoiser, kept so that many steps of the encoder share one evaluation."""

from collections.abc import Callable

import torch
from torch import Tensor


class Bank:
    """A frozen denoiser that remembers: the step that shows the noisy images of an earlier one again gets what it said of them then.

    Kept in half precision, from the first time on, so that a run that was interrupted and fills it anew sees the same numbers. It takes
    2 bytes per value: steps * batch * noise levels * image.

    Args:
        denoiser: (x_t, t) -> eps_pred.
    """

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        self.denoiser = denoiser
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._place = 0, 0

    def turn_to(self, step: int, micro: int) -> None:
        """Say which step's images come next; they are always the same ones for the same step and micro-batch."""
        self._place = step, micro

    def known(self) -> Tensor | None:
        """The outputs for these images as they are kept, in half precision; None before they have been asked for."""
        return self._kept.get(self._place)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # whoever differentiates it wants the denoiser itself
            return self.denoiser(x_t, t)
        kept = self.known()
        if kept is None:
            kept = self._kept[self._place] = self.denoiser(x_t, t).half()
        return kept.to(x_t.dtype)
