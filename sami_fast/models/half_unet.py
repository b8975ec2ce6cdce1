"""An encoder q(z|x) that starts as half of a trained denoiser: its way down and its middle, and two new heads."""

import copy

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, time_embedding, way_down
from .encoder import gaussian_heads
from .layers import GroupNormSiLU


class DenoiserTrunk(nn.Module):
    """x [B, C, H, W] -> features [B, C', H', W'] of this package's denoiser at its cleanest noise level; a copy of its layers."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.stem, self.down = copy.deepcopy(denoiser.stem), copy.deepcopy(denoiser.down)
        self.shrink, self.middle = copy.deepcopy(denoiser.shrink), copy.deepcopy(denoiser.middle)
        weight = denoiser.stem.weight
        with torch.no_grad():
            clean = denoiser.embed(time_embedding(weight.new_zeros(1), denoiser.embedding_size))
        self.embedding = nn.Parameter(clean)
        self.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return way_down(self, x, self.embedding.expand(x.shape[0], -1))[0]  # not len(x), which exporting would take for a constant


class HalfUNet(nn.Module):
    """Images to a diagonal Gaussian over latents, by the first half of a denoiser. It has no time input.

    Args:
        trunk: x [B, C, H, W] -> features [B, C', H', W']; twice differentiable.
        image_shape: (C, H, W).
        latent_size: Z.
        groups: Groups of the norm before the heads.
        init_std: Posterior standard deviation at the start.
    Shapes:
        x [B, C, H, W] -> mu, var, both [B, Z] in the dtype of the heads.
    Differentiable: twice by autograd; it cannot be swept, so its score method is `reverse`.
    """

    def __init__(self, trunk: nn.Module, image_shape: tuple[int, int, int], latent_size: int, groups: int, init_std: float = 0.97) -> None:
        super().__init__()
        self.image_shape, self.latent_size = image_shape, latent_size
        weight = next(trunk.parameters())
        with torch.no_grad():
            _, width, *sides = trunk(weight.new_zeros(1, *image_shape)).shape
        self.trunk, self.norm = trunk, GroupNormSiLU(width, groups)
        self.mu, self.raw_var, self.var = gaussian_heads(width * sides[0] * sides[1], latent_size, init_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.trunk(x))
        with torch.autocast(x.device.type, enabled=False):
            h = h.flatten(1).to(self.mu.weight.dtype)
            return self.mu(h), self.var(self.raw_var(h))
