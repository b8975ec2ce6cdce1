"""The denoiser eps_theta(x_t, t): an ordinary U-Net. SAMI's is unconditional and never sees z; a diffusion autoencoder's does."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.conv2d import for_convolutions
from ..schedule import Schedule, alpha_sigma
from .layers import AttentionBlock, Conv2d, ResBlock, Upsample, check_size, check_sizes, checked_sides, conv, norm_act


def time_embedding(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of t in [0, 1] at frequencies from 1/2 to 500 cycles. [B] -> [B, size], dtype of t."""
    frequency = math.pi * torch.logspace(0, 3, size // 2, dtype=t.dtype, device=t.device)
    angle = t[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def _two_layers(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs), nn.SiLU())


class FirstHalf(Protocol):
    """Layers of the first half of a U-Net: a denoiser has them, and the copy that an encoder is made of."""

    stem: Conv2d
    down: nn.ModuleList
    shrink: nn.ModuleList
    middle: ResBlock


def way_down(net: FirstHalf, x: Tensor, embedding: Tensor, recompute: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The first half of a U-Net: features after the middle, and what each resolution left for the way up.

    Args:
        net: Its layers.
        x: [B, C, H, W].
        embedding: Of the noise level. [B, E].
        recompute: As in `Denoiser`.
    """
    h = net.stem(for_convolutions(x))
    skips = []
    for stage, shrink in zip(net.down, [*net.shrink, None], strict=True):
        h = _run(stage, h, embedding, recompute)
        if shrink is not None:
            skips.append(h)
            h = shrink(h)
    return net.middle(h, embedding=embedding), skips


def _run(stage: nn.Module, h: Tensor, embedding: Tensor, recompute: bool) -> Tensor:
    for layer in stage.children():
        if recompute and torch.is_grad_enabled():
            # use_reentrant=False would check that every tensor saved has its size of the forward pass again. Under ZeRO-3 weights do not:
            # they have size 0 whenever they are not in use.
            h = checkpoint(_block, layer, h, embedding, use_reentrant=True, preserve_rng_state=False)
        else:
            h = _block(layer, h, embedding)
    return h


def _block(layer: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    return layer(h, embedding=embedding) if isinstance(layer, ResBlock) else layer(h)


class Denoiser(nn.Module):
    """U-Net that estimates the noise in x_t.

        eps_pred = sigma' x_t + alpha' U-Net(x_t, t),   alpha'^2 = sigmoid(logsnr - skip_logsnr) = 1 - sigma'^2

    Where the image drowns in noise, x_t is nearly eps already, and what is left to say is as small as what is left of the image. A U-Net
    that has to reproduce x_t there errs by more than that: by 4 % after a thousand steps, at every level alike. At levels much cleaner
    than `skip_logsnr` the U-Net says eps itself. With `skip_logsnr` 0 it would say v = alpha eps - sigma x_0 (Salimans & Ho,
    arXiv:2202.00512), which took longer to learn.

    Args:
        image_channels: C of the images.
        image_size: H = W, at least 2^(len(channels) - 1). An odd side is rounded up where it is halved.
        channels: Width of each resolution, full resolution first.
        blocks: Residual blocks per resolution, down and up alike.
        attention: Resolutions (side lengths) that get self-attention.
        groups: Groups of the norms (fewer where the width does not divide).
        style: "group_norm_silu", "silu" or "bias_free_relu".
        embedding_size: Width of the noise-level embedding, even.
        latent_size: Z of a conditional denoiser, whose embedding of z is added to that of the noise level; 0 for an unconditional one.
        skip_logsnr: ln(alpha_t^2 / sigma_t^2) of the level from which on, to noisier ones, x_t is most of the estimate; -inf: at none, so
            that eps_pred is what the U-Net says (in a config that is -30).
        schedule: What t means, which only a `skip_logsnr` needs to know; models that hold the denoiser tell it (`use`).
    Shapes:
        x_t [B, C, H, W], t [B] in [0, 1], z [B, Z] if conditional -> eps_pred [B, C, H, W].
    Raises:
        ValueError: unknown style, an image too small to be halved that often, attention at a resolution that does not exist, a
            `skip_logsnr` that is no number; called with a `skip_logsnr` and no schedule.
    Called with `recompute`, backward computes the residual and attention blocks again instead of keeping what is inside them.
    Differentiable: twice, though training needs it once; with `recompute` by `backward()` alone and once.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        channels: list[int],
        blocks: int = 1,
        attention: list[int] | None = None,
        groups: int = 4,
        style: str = "group_norm_silu",
        embedding_size: int = 64,
        latent_size: int = 0,
        skip_logsnr: float = -math.inf,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        check_sizes(channels, blocks, image_channels=image_channels, image_size=image_size, embedding_size=embedding_size, groups=groups)
        attention = attention or []
        sides = checked_sides("denoiser", style, image_size, range(len(channels)), attention)
        self.image_shape = (image_channels, image_size, image_size)
        if not isinstance(skip_logsnr, int | float) or isinstance(skip_logsnr, bool) or not skip_logsnr < math.inf:
            raise ValueError(f"skip_logsnr: expected a number or -inf, found {skip_logsnr!r}")
        self.embedding_size, self.skip_logsnr, self.schedule = embedding_size, skip_logsnr, schedule
        self.embed = _two_layers(embedding_size, embedding_size)
        self.stem = conv(image_channels, channels[0], 3, style)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        def stage(in_width: int, out_width: int, side: int) -> nn.ModuleList:
            layers: list[nn.Module] = []
            for block in range(blocks):
                layers.append(ResBlock(out_width if block else in_width, out_width, groups, style, embedding_size))
                if side in attention:
                    layers.append(AttentionBlock(out_width, groups, style))
            return nn.ModuleList(layers)

        width = channels[0]
        for new_width, side in zip(channels, sides, strict=True):
            self.down.append(stage(width, new_width, side))
            width = new_width
        self.shrink = nn.ModuleList(conv(w, w, 3, style, stride=2) for w in channels[:-1])
        self.middle = ResBlock(width, width, groups, style, embedding_size)
        self.grow = nn.ModuleList()
        for new_width, side in reversed(list(zip(channels[:-1], sides, strict=False))):
            self.grow.append(Upsample(width, new_width, style, side % 2 == 1))
            self.up.append(stage(2 * new_width, new_width, side))
            width = new_width
        self.out_norm = norm_act(width, groups, style)
        self.out = conv(width, image_channels, 3, style)
        nn.init.zeros_(self.out.weight)
        if self.out.bias is not None:
            nn.init.zeros_(self.out.bias)
        if latent_size:
            check_size("latent_size", latent_size)
            self.embed_z = _two_layers(latent_size, embedding_size)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor | None = None, *, recompute: bool = False) -> Tensor:
        embedding = self.embed(time_embedding(t, self.embedding_size).to(self.stem.weight.dtype))
        if z is not None:
            embedding = embedding + self.embed_z(z.to(embedding.dtype))
        h, skips = way_down(self, x_t, embedding, recompute)
        for grow, stage in zip(self.grow, self.up, strict=True):
            h = _run(stage, torch.cat((grow(h), skips.pop()), 1), embedding, recompute)
        out = self.out(self.out_norm(h))
        return out if self.skip_logsnr == -math.inf else self._beside(x_t, t, out)

    def use(self, schedule: Schedule) -> None:
        """Take t for what this schedule means by it.

        Raises:
            ValueError: with a `skip_logsnr`, the denoiser knows another schedule already.
        """
        if self.skip_logsnr > -math.inf and self.schedule is not None and self.schedule.settings != schedule.settings:
            raise ValueError(f"schedule: the denoiser was made for {self.schedule.settings}, found {schedule.settings}")
        self.schedule = schedule

    def _beside(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The estimate, of x_t and what the U-Net says."""
        if self.schedule is None:
            raise ValueError("skip_logsnr: needs to know what t means: Denoiser(..., schedule=...) or `use`")
        alpha, sigma = (v.to(x_t.dtype).view(-1, 1, 1, 1) for v in alpha_sigma(self.schedule.logsnr(t) - self.skip_logsnr))
        return torch.addcmul(alpha * out, sigma, x_t)
