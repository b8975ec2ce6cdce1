"""Four pairs of networks as other people write them: what `accelerate` is measured on, and what a config names by `encoder.class`.

    port          a SAMI of one's own in plain torch: norms that cast, heads for mean and log variance
    autoencoder   as in diffusion autoencoders: residual blocks scaled and shifted by the time, attention written by hand
    lucidrains    the U-Net of denoising-diffusion-pytorch, and a ResNet of timm
    diffusers     diffusers' UNet2DModel, and a vision transformer of timm

The last two need `pip install 'sami-fast[foreign]'`. Each encoder and denoiser keeps to the conventions of its kind, which PAIRS states.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEPS = 1000


class GroupNorm32(nn.GroupNorm):
    """Computes in float32 where features are of half precision."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(torch.promote_types(input.dtype, torch.float32))).to(input.dtype)


def sinusoidal(position: Tensor, size: int) -> Tensor:
    """[B] -> [B, size]."""
    angles = position[:, None] * torch.exp(-math.log(10000.0) * torch.arange(size // 2, device=position.device) / (size // 2))
    return torch.cat((angles.cos(), angles.sin()), 1).to(position.dtype)


# The port


class PortBlock(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, H, W], with an embedding added between its convolutions where there is one."""

    def __init__(self, before: int, after: int, groups: int = 8, embedding: int = 0) -> None:
        super().__init__()
        self.before = nn.Sequential(GroupNorm32(groups, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(embedding, after)) if embedding else None
        self.after = nn.Sequential(GroupNorm32(groups, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.before(x)
        if self.embed is not None:
            h = h + self.embed(embedding)[..., None, None]
        return self.skip(x) + self.after(h)


class PortEncoder(nn.Module):
    """x [B, C, H, W] -> mu and the log variance, [B, Z] each."""

    def __init__(self, channels: int = 3, size: int = 32, latents: int = 8, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for before, after in ((width, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [PortBlock(before, after), nn.Conv2d(after, after, 3, stride=2, padding=1)]
        self.body = nn.Sequential(*layers, GroupNorm32(8, 2 * width), nn.SiLU())
        features = 2 * width * (size // 8) ** 2
        self.mu, self.logvar = nn.Linear(features, latents), nn.Linear(features, latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).flatten(1)
        return self.mu(h), self.logvar(h).clamp(-10, 10)


class PortDenoiser(nn.Module):
    """(x_t [B, C, H, W], t [B] in [0, 1]) -> the noise in x_t: a U-Net of three resolutions."""

    def __init__(self, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.width, wide, embedding = width, 2 * width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList([PortBlock(width, width, embedding=embedding), PortBlock(width, wide, embedding=embedding)])
        self.shrink = nn.ModuleList([nn.Conv2d(width, width, 3, stride=2, padding=1), nn.Conv2d(wide, wide, 3, stride=2, padding=1)])
        self.middle = PortBlock(wide, wide, embedding=embedding)
        self.up = nn.ModuleList([PortBlock(2 * wide, width, embedding=embedding), PortBlock(2 * width, width, embedding=embedding)])
        self.last = nn.Sequential(GroupNorm32(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        embedding, h, skips = self.time(sinusoidal(1000 * t, self.width)), self.first(x_t), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, embedding)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h, embedding)
        for block in self.up:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = block(torch.cat((h, skips.pop()), 1), embedding)
        return self.last(h)


# The diffusion autoencoder


class ScaleShiftBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by an embedding, where there is one."""

    def __init__(self, before: int, after: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(8, before), nn.Conv2d(before, after, 3, padding=1)
        self.norm_2, self.conv_2 = nn.GroupNorm(8, after), nn.Conv2d(after, after, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * after) if embedding else None
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.norm_2(self.conv_1(F.silu(self.norm_1(x))))
        if self.embed is not None and embedding is not None:
            scale, shift = self.embed(F.silu(embedding))[:, :, None, None].chunk(2, 1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv_2(F.silu(h))


class HandWrittenAttention(nn.Module):
    """Attention among the positions of [B, C, H, W], one head, its weights formed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(8, channels), nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(*x.shape[:2], -1)
        q, k, v = self.qkv(self.norm(h)).chunk(3, 1)
        weights = torch.softmax(torch.einsum("bcs,bct->bst", q, k) / math.sqrt(q.shape[1]), -1)
        return x + self.out(torch.einsum("bst,bct->bcs", weights, v)).reshape(x.shape)


class SemanticEncoder(nn.Module):
    """x [B, C, H, W] -> mu and the standard deviation, [B, Z] each: half a U-Net, then the mean over positions."""

    def __init__(self, channels: int = 3, latents: int = 8, width: int = 32) -> None:
        super().__init__()
        self.first, wide = nn.Conv2d(channels, width, 3, padding=1), 2 * width
        self.blocks = nn.ModuleList([ScaleShiftBlock(width, width), ScaleShiftBlock(width, wide), ScaleShiftBlock(wide, wide)])
        self.attention, self.norm = HandWrittenAttention(wide), nn.GroupNorm(8, wide)
        self.heads = nn.Linear(wide, 2 * latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        for block in self.blocks:
            h = F.avg_pool2d(block(h), 2)
        h = F.silu(self.norm(self.attention(h))).mean((2, 3))
        mu, raw = self.heads(h).chunk(2, 1)
        return mu, F.softplus(raw) + 1e-3


class AutoencoderDenoiser(nn.Module):
    """(x_t [B, C, H, W], integer timestep [B]) -> v."""

    def __init__(self, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.width, wide, embedding = width, 2 * width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down_1, self.down_2 = ScaleShiftBlock(width, width, embedding), ScaleShiftBlock(width, wide, embedding)
        self.middle, self.attention = ScaleShiftBlock(wide, wide, embedding), HandWrittenAttention(wide)
        self.up_2, self.up_1 = ScaleShiftBlock(2 * wide, width, embedding), ScaleShiftBlock(2 * width, width, embedding)
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        embedding = self.time(sinusoidal(timesteps.to(self.first.weight.dtype), self.width))
        fine = self.down_1(self.first(x_t), embedding)
        coarse = self.down_2(F.avg_pool2d(fine, 2), embedding)
        h = self.attention(self.middle(F.avg_pool2d(coarse, 2), embedding))
        h = self.up_2(torch.cat((F.interpolate(h, scale_factor=2), coarse), 1), embedding)
        h = self.up_1(torch.cat((F.interpolate(h, scale_factor=2), fine), 1), embedding)
        return self.last(F.silu(self.norm(h)))


# Encoders of timm


class TimmResNet(nn.Module):
    """x [B, C, H, W] -> mu and the log variance in one tensor, [B, 2 Z]; `settings` are those of timm.create_model."""

    def __init__(self, name: str = "resnet10t", channels: int = 3, latents: int = 8, **settings: Any) -> None:
        super().__init__()
        import timm

        # Batch norm would let the images of a batch see one another; and the score's own gradient wants a network without kinks.
        smooth = {"norm_layer": "groupnorm", "act_layer": "silu", "stem_type": "deep", "replace_stem_pool": True}
        settings = smooth | settings
        self.network = timm.create_model(name, in_chans=channels, num_classes=2 * latents, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class TimmViT(nn.Module):
    """x [B, C, H, W] -> a distribution of z [B, Z]; `settings` are those of timm's VisionTransformer."""

    def __init__(self, channels: int = 3, size: int = 32, latents: int = 8, **settings: Any) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        settings = {"patch_size": 4, "embed_dim": 96, "depth": 3, "num_heads": 3} | settings
        self.network = VisionTransformer(img_size=size, in_chans=channels, num_classes=2 * latents, **settings)

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        mu, raw = self.network(x).chunk(2, 1)
        return torch.distributions.Independent(torch.distributions.Normal(mu, F.softplus(raw) + 1e-3), 1)


# The four pairs


def _lucidrains(**settings: Any) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(**{"dim": 32, "dim_mults": (1, 2, 2)} | settings)


def _diffusers(**settings: Any) -> nn.Module:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64, 64)}
    sizes = {"sample_size": 32, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 32}
    return UNet2DModel(**blocks | sizes | settings)


@dataclass(frozen=True)
class Pair:
    """An encoder and a denoiser that go together, with their conventions as a config would state them.

    Attributes:
        encoder, denoiser: Build them, at their default sizes: 3 channels of 32x32, 8 latents.
        returns: What the encoder's result is: mu_var, mu_logvar or mu_std; of one tensor or a Distribution it is found.
        time: What the denoiser is told: unit, in [0, 1], or timestep, an integer below TIMESTEPS.
        predicts: eps or v.
        needs: Packages that have to be installed.
    """

    encoder: Callable[..., nn.Module]
    denoiser: Callable[..., nn.Module]
    returns: str
    time: str
    predicts: str
    needs: tuple[str, ...] = ()


PAIRS = {
    "port": Pair(PortEncoder, PortDenoiser, "mu_logvar", "unit", "eps"),
    "autoencoder": Pair(SemanticEncoder, AutoencoderDenoiser, "mu_std", "timestep", "v"),
    "lucidrains": Pair(TimmResNet, _lucidrains, "mu_logvar", "timestep", "eps", ("timm", "denoising_diffusion_pytorch")),
    "diffusers": Pair(TimmViT, _diffusers, "mu_std", "timestep", "eps", ("timm", "diffusers")),
}
