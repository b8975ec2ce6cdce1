"""The blocks that encoder and denoiser share. All of them can be differentiated twice by autograd, and swept (sweeps.py)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import ops
from ..ops.conv2d import channels_last
from ..sweeps import Conv2d, Identity, Layer, ReLU, Residual, SiLU, Tape

MOST, MOST_BLOCKS, MOST_LEVELS = 2**16, 64, 16  # of a size or a width; of blocks per resolution; of resolutions

STYLES = ("group_norm_silu", "silu", "bias_free_relu")


class GroupNormSiLU(Layer[Tensor]):
    """Group norm and SiLU over [B, C, ...]; G = the largest divisor of C up to `groups`. Parameters as in nn.GroupNorm."""

    norm_eps = 1e-5

    def __init__(self, channels: int, groups: int, silu: bool = True) -> None:
        super().__init__()
        self.num_groups = max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, tx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        settings = self.num_groups, self.weight, self.bias, self.norm_eps
        if tx is None:
            return ops.group_norm_silu(x, *settings, silu=self.silu)
        return ops.group_norm_silu_dual(x, tx, *settings, silu=self.silu)

    def sweep_forward(self, x: Tensor, tape: Tape) -> Tensor:
        launchers = ops.GroupNormSiLULaunchers.in_force(x)
        y, mean, rstd = launchers.fwd(x, self.weight, self.bias, self.num_groups, self.norm_eps, self.silu)
        tape.note(self, launchers=launchers, saved=(x, self.weight, self.bias, mean, rstd, self.num_groups, self.silu))
        return y

    def sweep_adjoint(self, grad_y: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self, grad_y=grad_y)
        return note.launchers.bwd(grad_y, *note.saved)[0]

    def sweep_tangent(self, tx: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self, tx=tx)
        return note.launchers.tan(tx, *note.saved)

    def sweep_joint(self, y_bar: Tensor, tape: Tape, need_input: bool = True) -> Tensor:
        note = tape.take(self)
        _, x_bar, weight_bar, bias_bar = note.launchers.bwd_bwd(
            note.tx, None, None, note.grad_y, *note.saved, y_bar=y_bar, need_tangent=False
        )
        tape.add(self.weight, weight_bar)
        tape.add(self.bias, bias_bar)
        return x_bar


def norm_act(channels: int, groups: int, style: str) -> Layer[Tensor]:
    """What stands between two convolutions: GroupNorm + SiLU, SiLU alone, or ReLU alone (the paper's bias-free networks)."""
    if style == "group_norm_silu":
        return GroupNormSiLU(channels, groups)
    return SiLU() if style == "silu" else ReLU()


def conv(in_channels: int, out_channels: int, size: int, style: str, stride: int = 1) -> Conv2d:
    """A padded convolution; without bias in the bias-free style."""
    return Conv2d(in_channels, out_channels, size, stride, size // 2, bias=style != "bias_free_relu")


@torch.no_grad()
def lay_out_weights(network: nn.Module) -> None:
    """Put the weights of our convolutions into channels-last memory, as a GPU wants them (`ops.conv2d`); each stays the same parameter."""
    for layer in network.modules():
        if isinstance(layer, Conv2d) and layer.weight.stride(1) != 1:
            layer.weight.data = channels_last(layer.weight.data)


class ResBlock(Residual):
    """[B, C_in, H, W] -> [B, C_out, H, W]: norm, conv, (+ noise-level embedding), norm, conv, plus a skip."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, style: str, embedding_size: int = 0) -> None:
        super().__init__()
        self.norm_1 = norm_act(in_channels, groups, style)
        self.conv_1 = conv(in_channels, out_channels, 3, style)
        self.embed = nn.Linear(embedding_size, out_channels) if embedding_size else None
        self.norm_2 = norm_act(out_channels, groups, style)
        self.conv_2 = conv(out_channels, out_channels, 3, style)
        self.skip = conv(in_channels, out_channels, 1, style) if in_channels != out_channels else Identity()

    @property
    def branch(self) -> tuple[Layer[Tensor], ...]:
        return self.norm_1, self.conv_1, self.norm_2, self.conv_2

    def forward(self, x: Tensor, tx: Tensor | None = None, *, embedding: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.embed is None:
            return super().forward(x, tx)
        h = self.conv_1(self.norm_1(x))
        h = h + self.embed(embedding)[:, :, None, None]
        return self.skip(x) + self.conv_2(self.norm_2(h))


class SelfAttention(Layer[Tensor]):
    """[B, 3C, H, W] -> [B, C, H, W]: attention among the H*W positions, without parameters; q, k and v lie in the channels."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[B, 3C, H, W] -> three views of [B, S, N, D]."""
        # Split last, so that their gradients are joined in the memory order of the image.
        return rearrange(qkv, "B (three N D) H W -> B (H W) three N D", three=3, N=self.num_heads).unbind(2)

    def _tokens(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> a view of [B, S, N, D]."""
        return rearrange(x, "B (N D) H W -> B (H W) N D", N=self.num_heads)

    def _image(self, tokens: Tensor, like: Tensor) -> Tensor:
        """[B, S, N, D] -> [B, C, H, W]."""
        return rearrange(tokens, "B (H W) N D -> B (N D) H W", H=like.shape[2], W=like.shape[3])

    def _channels(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The inverse of `_split`. [B, 3C, H, W]"""
        return torch.cat([self._image(part, like) for part in parts], 1)

    def forward(self, x: Tensor, tx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if tx is None:
            return self._image(ops.attention(*self._split(x)), x)
        out, tout = ops.attention_dual(*self._split(x), *self._split(tx))
        return self._image(out, x), self._image(tout, x)

    def sweep_forward(self, x: Tensor, tape: Tape) -> Tensor:
        q, k, v = self._split(x)
        launchers, settings = ops.AttentionLaunchers.in_force(q), (q.shape[-1] ** -0.5, False)  # scale, causal
        out, lse = launchers.fwd(q, k, v, *settings)
        tape.note(self, launchers=launchers, settings=settings, saved=(q, k, v, out, lse))
        return self._image(out, x)

    def sweep_adjoint(self, grad_y: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self, grad_out=self._tokens(grad_y))
        return self._channels(note.launchers.bwd(note.grad_out, *note.saved, *note.settings), grad_y)

    def sweep_tangent(self, tx: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self, tangents=self._split(tx))
        note.tout, note.tau = note.launchers.tan(*note.tangents, *note.saved, *note.settings)
        return self._image(note.tout, tx)

    def sweep_joint(self, y_bar: Tensor, tape: Tape, need_input: bool = True) -> Tensor | None:
        note = tape.take(self)
        if not need_input:
            return None
        bars = note.launchers.bwd_bwd(*note.tangents, note.grad_out, *note.saved, note.tout, note.tau, *note.settings, self._tokens(y_bar))
        return self._channels(bars, y_bar)


class AttentionBlock(Residual):
    """Self-attention over the H*W tokens of [B, C, H, W], plus a skip; heads of at most 64 channels."""

    def __init__(self, channels: int, groups: int, style: str) -> None:
        super().__init__()
        num_heads = next(n for n in range(-(-channels // 64), channels + 1) if channels % n == 0)
        self.norm = GroupNormSiLU(channels, groups, silu=False) if style == "group_norm_silu" else Identity()
        self.qkv = conv(channels, 3 * channels, 1, style)
        self.attention = SelfAttention(num_heads)
        self.out = conv(channels, channels, 1, style)
        self.skip = Identity()

    @property
    def branch(self) -> tuple[Layer[Tensor], ...]:
        return self.norm, self.qkv, self.attention, self.out


class Upsample(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, 2H, 2W], or one row and one column less if `odd`: nearest neighbour, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int, style: str, odd: bool = False) -> None:
        super().__init__()
        self.conv, self.odd = conv(in_channels, out_channels, 3, style), odd

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x[:, :, :-1, :-1] if self.odd else x)


def check_size(name: str, value: int, low: int = 1, high: int = MOST) -> None:
    """Raises ValueError where a size is no whole number within its bounds: an architecture may come from anybody's file."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: expected a whole number from {low} to {high}, found {str(value)[:60]}")


def check_sizes(channels: Sequence[int], blocks: int, **sizes: int) -> None:
    """`check_size` of the widths of every resolution, of the blocks of each, and of other sizes by their names."""
    if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= MOST_LEVELS:
        raise ValueError(f"channels: expected a list of 1 to {MOST_LEVELS} widths, found {str(channels)[:60]}")
    for width in channels:
        check_size("channels", width)
    check_size("blocks", blocks, 0, MOST_BLOCKS)
    for name, size in sizes.items():
        check_size(name, size)


def checked_sides(owner: str, style: str, image_size: int, halvings: range, attention: list[int]) -> list[int]:
    """Side lengths of an image that was halved so many times, each rounded up, as a convolution of stride 2 does.

    Raises:
        ValueError: unknown style, an image too small to be halved that often, attention at a resolution that is not among them.
    """
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, found {style!r}")
    most = halvings[-1]
    if image_size < 2**most:
        raise ValueError(f"image size {image_size} is below {2**most}, which the {owner}'s {most} halvings need")
    sides = [-(-image_size // 2**times) for times in halvings]
    for side in attention:
        if side not in sides:
            raise ValueError(f"attention {side}: the {owner} has no such resolution, its own are {', '.join(map(str, sides))}")
    return sides
