"""The blocks that encoder and denoiser share. All of them can be differentiated twice."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

STYLES = ("group_norm_silu", "bias_free_relu")


class GroupNormSiLU(nn.Module):
    """Group norm and SiLU over [B, C, ...]; G = the largest divisor of C up to `groups`. Parameters as in nn.GroupNorm."""

    def __init__(self, channels: int, groups: int, silu: bool = True) -> None:
        super().__init__()
        self.num_groups = max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, silu=self.silu)


def norm_act(channels: int, groups: int, style: str) -> nn.Module:
    """What stands between two convolutions: GroupNorm + SiLU, or a ReLU alone (the paper's bias-free networks)."""
    return GroupNormSiLU(channels, groups) if style == "group_norm_silu" else nn.ReLU()


def conv(in_channels: int, out_channels: int, size: int, style: str, stride: int = 1) -> nn.Conv2d:
    """A padded convolution; without bias in the bias-free style."""
    return nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=style != "bias_free_relu")


class ResBlock(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, H, W]: norm, conv, (+ noise-level embedding), norm, conv, plus a skip."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, style: str, embedding_size: int = 0) -> None:
        super().__init__()
        self.norm_1 = norm_act(in_channels, groups, style)
        self.conv_1 = conv(in_channels, out_channels, 3, style)
        self.embed = nn.Linear(embedding_size, out_channels) if embedding_size else None
        self.norm_2 = norm_act(out_channels, groups, style)
        self.conv_2 = conv(out_channels, out_channels, 3, style)
        self.skip = conv(in_channels, out_channels, 1, style) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv_1(self.norm_1(x))
        if self.embed is not None:
            h = h + self.embed(embedding)[:, :, None, None]
        return self.skip(x) + self.conv_2(self.norm_2(h))


class AttentionBlock(nn.Module):
    """Self-attention over the H*W tokens of [B, C, H, W], plus a skip; heads of at most 64 channels."""

    def __init__(self, channels: int, groups: int, style: str) -> None:
        super().__init__()
        self.num_heads = next(n for n in range(-(-channels // 64), channels + 1) if channels % n == 0)
        self.norm = GroupNormSiLU(channels, groups, silu=False) if style == "group_norm_silu" else nn.Identity()
        self.qkv = conv(channels, 3 * channels, 1, style)
        self.out = conv(channels, channels, 1, style)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # [B, 3C, H, W] -> three of [B, S, N, D]
        tokens = self.qkv(self.norm(x)).view(batch, 3, self.num_heads, channels // self.num_heads, height * width)
        q, k, v = tokens.permute(1, 0, 4, 2, 3)
        h = ops.attention(q, k, v).permute(0, 2, 3, 1).reshape(batch, channels, height, width)
        return x + self.out(h)


class Upsample(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, 2H, 2W]: nearest neighbour, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int, style: str) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, 3, style)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def check_attention(attention: list[int], sides: list[int], owner: str) -> None:
    """ValueError unless every resolution that is to have attention exists."""
    for side in attention:
        if side not in sides:
            raise ValueError(f"attention {side}: the {owner} has no such resolution, its own are {', '.join(map(str, sides))}")


def check_image_size(image_size: int, halvings: int, owner: str) -> None:
    """ValueError unless the image can be halved that often."""
    if image_size % 2**halvings:
        raise ValueError(f"image size {image_size} is not divisible by {2**halvings}, which the {owner}'s {halvings} halvings need")
