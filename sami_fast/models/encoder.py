"""The encoder q(z|x): half a U-Net and two heads. It has no time input: one network reads clean and noisy images alike."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import STYLES, AttentionBlock, ResBlock, check_attention, check_image_size, conv, norm_act


class Encoder(nn.Module):
    """Images to a diagonal Gaussian over latents.

        var = softplus(raw_var)^2 + min_var

    Args:
        image_channels: C of the images, values in [-1, 1].
        image_size: H = W of the images, divisible by 2^len(channels).
        latent_size: Z.
        channels: Width of each level; a level halves the resolution, then refines it.
        blocks: Residual blocks per level.
        attention: Resolutions (side lengths) that get self-attention.
        groups: Groups of the norms (fewer where the width does not divide).
        style: "group_norm_silu" or "bias_free_relu" (no norms, no biases; the paper's).
        init_std: Posterior standard deviation at the start, and the scale of the variance head's first weights is 0.1 of the default.
    Shapes:
        x [B, C, H, W] -> mu, var, both [B, Z] float32 (float64 for a float64 model).
    Raises:
        ValueError: unknown style, an image size that cannot be halved that often, attention at a resolution that does not exist.
    Differentiable: twice.
    Source: SAMI, arXiv:2512.17127, encoder; var in float32 under autocast.
    """

    min_var = 1e-4

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        latent_size: int,
        channels: list[int],
        blocks: int = 0,
        attention: list[int] | None = None,
        groups: int = 4,
        style: str = "group_norm_silu",
        init_std: float = 0.97,
    ) -> None:
        super().__init__()
        if style not in STYLES:
            raise ValueError(f"style: expected one of {', '.join(STYLES)}, found {style!r}")
        check_image_size(image_size, len(channels), "encoder")
        attention = attention or []
        check_attention(attention, [image_size >> level for level in range(1, len(channels) + 1)], "encoder")
        self.image_shape = (image_channels, image_size, image_size)
        self.latent_size = latent_size
        layers: list[nn.Module] = []
        width, side = image_channels, image_size
        for level_width in channels:
            layers += [conv(width, level_width, 3, style, stride=2), norm_act(level_width, groups, style)]
            width, side = level_width, side // 2
            for _ in range(blocks):
                layers.append(ResBlock(width, width, groups, style))
            if side in attention:
                layers.append(AttentionBlock(width, groups, style))
        # The middle: a plain convolution that ends every path, residual or not, in a norm and an activation.
        layers += [conv(width, width, 3, style), norm_act(width, groups, style)]
        self.body = nn.Sequential(*layers)
        self.mu = nn.Linear(width * side * side, latent_size, bias=style != "bias_free_relu")
        self.raw_var = nn.Linear(width * side * side, latent_size)
        with torch.no_grad():
            self.raw_var.weight.mul_(0.1)
            self.raw_var.bias.fill_(math.log(math.expm1(init_std)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).flatten(1)
        with torch.autocast(h.device.type, enabled=False):  # heads stay in full precision
            h = h.to(self.mu.weight.dtype)
            return self.mu(h), F.softplus(self.raw_var(h)).square() + self.min_var
