"""The encoder q(z|x): half a U-Net and two heads. It has no time input: one network reads clean and noisy images alike."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv2d import for_convolutions
from ..sweeps import Chain, Layer, Linear, Pointwise, Tape, chain_adjoint, chain_forward, chain_joint, chain_tangent
from .layers import AttentionBlock, ResBlock, check_size, check_sizes, checked_sides, conv, norm_act

MIN_VAR = 1e-4
SCALED_ON = 64  # images


class Variance(Pointwise):
    """var = softplus(raw_var)^2 + min_var."""

    def __init__(self, min_var: float) -> None:
        super().__init__()
        self.min_var = min_var

    def function(self, x: Tensor) -> Tensor:
        return F.softplus(x).square() + self.min_var

    def slope(self, x: Tensor) -> Tensor:
        return 2 * F.softplus(x) * torch.sigmoid(x)

    def curvature(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return 2 * s * (s + F.softplus(x) * (1 - s))


def gaussian_heads(features: int, latent_size: int, init_std: float, bias: bool = True) -> tuple[Linear, Linear, Variance]:
    """Heads for mu and the variance over [B, features]: mu(h) and var(raw_var(h)), with standard deviation init_std at the start.

    Raises:
        ValueError: init_std is no number above 0 and at most 100, or the number of latents is out of bounds.
    """
    check_size("latent_size", latent_size)
    if not (isinstance(init_std, int | float) and 0 < init_std <= 100):
        raise ValueError(f"init_std: expected a number above 0 and at most 100, found {init_std!r}")
    mu, raw_var = Linear(features, latent_size, bias=bias), Linear(features, latent_size)
    with torch.no_grad():
        raw_var.weight.mul_(0.1)
        raw_var.bias.fill_(math.log(math.expm1(init_std)))
    return mu, raw_var, Variance(MIN_VAR)


@torch.no_grad()
def smooth_kernels(module: nn.Module, share: float) -> None:
    """Make new 3x3 kernels partly smooth: this share of their variance becomes a blur, [1, 2, 1] along both sides, of mixed channels.

    Under strong noise only what is averaged over many pixels can be seen, and kernels of independent weights average nothing: the first
    latents to live then teach them to, each for itself alone, and whatever else the image holds stays unseen. Smooth kernels see all of
    its coarse content from the first step on, and so do their gradients, which are the guidance.
    """
    blur = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0]))
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
            weight = part.weight
            mixed = torch.randn(weight.shape[:2], device=weight.device) * weight.square().mean().sqrt() * 3 / blur.norm()
            weight.mul_(math.sqrt(1 - share)).add_(math.sqrt(share) * mixed[:, :, None, None] * blur.to(weight.device))


@torch.no_grad()
def scale_kernels(body: nn.Module, shape: tuple[int, int, int]) -> None:
    """Scale new convolutions, one after the other, so that each gives every channel mean 0 and variance 1 on images of equal parts of noise
    and of a single colour, of variance 1 together.

    Without norms, torch's own start makes activations smaller from layer to layer. Noisy images keep their variance at all noise levels, so
    what fits these fits the images of a run. The norms that are missing would take an image's brightness and contrast out of its features,
    by another factor at each noise level.
    Source: layer-sequential unit variance, Mishkin and Matas, arXiv:1511.06422.
    """
    device = next(body.parameters()).device
    if device.type == "meta":  # weights without numbers
        return
    images = torch.randn(SCALED_ON, *shape, device=device) + torch.randn(SCALED_ON, shape[0], 1, 1, device=device)
    hooks = []

    def scale(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv2d)
        mean, std = output.mean((0, 2, 3)), output.std((0, 2, 3)).clamp_min(1e-6)
        conv.weight.div_(std[:, None, None, None])
        if conv.bias is not None:
            conv.bias.sub_(mean).div_(std)
        return (output - mean[:, None, None]) / std[:, None, None]

    for part in body.modules():
        if isinstance(part, nn.Conv2d):
            hooks.append(part.register_forward_hook(scale))
    body(for_convolutions(images / math.sqrt(2)))
    for hook in hooks:
        hook.remove()


class Encoder(Layer[tuple[Tensor, Tensor]]):
    """Images to a diagonal Gaussian over latents.

        var = softplus(raw_var)^2 + min_var

    Args:
        image_channels: C of the images, values in [-1, 1].
        image_size: H = W of the images, at least 2^len(channels). An odd side is rounded up where it is halved.
        latent_size: Z.
        channels: Width of each stage; a stage halves the resolution, then refines it.
        blocks: Residual blocks per stage.
        attention: Resolutions (side lengths) that get self-attention.
        groups: Groups of the norms (fewer where the width does not divide).
        style: "group_norm_silu", "silu" (no norms; scaled at the start, see `scale_kernels`) or "bias_free_relu" (no norms, no biases; the
            paper's).
        init_std: Posterior standard deviation at the start, and the scale of the variance head's first weights is 0.1 of the default.
        smooth: Share of the kernels' variance at the start that is a blur, 0 to 1; see `smooth_kernels`.
    Shapes:
        x [B, C, H, W] -> mu, var, both [B, Z] float32 (float64 for a float64 model).
    Raises:
        ValueError: unknown style, an image too small to be halved that often, attention at a resolution that does not exist.
    Differentiable: twice by autograd; also swept (sweeps.py): adjoint of (grad_mu, grad_var), tangent (tmu, tvar).
    Source: SAMI, arXiv:2512.17127, encoder; var in float32 under autocast.
    """

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
        smooth: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(channels, blocks, image_channels=image_channels, image_size=image_size, latent_size=latent_size, groups=groups)
        attention = attention or []
        sides = checked_sides("encoder", style, image_size, range(1, len(channels) + 1), attention)
        self.image_shape = (image_channels, image_size, image_size)
        self.latent_size = latent_size
        layers: list[Layer[Tensor]] = []
        width = image_channels
        for new_width, side in zip(channels, sides, strict=True):
            layers += [conv(width, new_width, 3, style, stride=2), norm_act(new_width, groups, style)]
            width = new_width
            for _ in range(blocks):
                layers.append(ResBlock(width, width, groups, style))
            if side in attention:
                layers.append(AttentionBlock(width, groups, style))
        # The middle: a plain convolution that ends every path, residual or not, in a norm and an activation.
        layers += [conv(width, width, 3, style), norm_act(width, groups, style)]
        self.body: Layer[Tensor] = Chain(*layers)
        if smooth:
            smooth_kernels(self.body, smooth)
        if style == "silu":
            scale_kernels(self.body, self.image_shape)
        self.mu, self.raw_var, self.var = gaussian_heads(width * side * side, latent_size, init_std, style != "bias_free_relu")

    def forward(self, x: Tensor, tx: Tensor | None = None) -> tuple[Tensor, Tensor] | tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(mu, var), or ((mu, var), (tmu, tvar)) with their tangents along tx."""
        h = self.body(for_convolutions(x), tx if tx is None else for_convolutions(tx))
        with torch.autocast(x.device.type, enabled=False):  # heads stay in full precision
            if tx is None:
                h = self._flat(h)
                return self.mu(h), self.var(self.raw_var(h))
            h = tuple(map(self._flat, h))
            (mu, tmu), (var, tvar) = self.mu(*h), self.var(*self.raw_var(*h))
            return (mu, var), (tmu, tvar)

    def _flat(self, h: Tensor) -> Tensor:
        return h.flatten(1).to(self.mu.weight.dtype)

    def sweep_forward(self, x: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        h = self.body.sweep_forward(for_convolutions(x), tape)
        tape.note(self, features=h)
        flat = self._flat(h)
        return self.mu.sweep_forward(flat, tape), chain_forward((self.raw_var, self.var), flat, tape)

    def sweep_adjoint(self, grad_y: tuple[Tensor, Tensor], tape: Tape) -> Tensor:
        features = tape.note(self).features
        grad_mu, grad_var = grad_y
        flat = self.mu.sweep_adjoint(grad_mu, tape) + chain_adjoint((self.raw_var, self.var), grad_var, tape)
        return self.body.sweep_adjoint(flat.view_as(features).to(features.dtype), tape)

    def sweep_tangent(self, tx: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        flat = self._flat(self.body.sweep_tangent(tx, tape))
        return self.mu.sweep_tangent(flat, tape), chain_tangent((self.raw_var, self.var), flat, tape)

    def sweep_joint(self, y_bar: tuple[Tensor, Tensor], tape: Tape, need_input: bool = True) -> Tensor | None:
        features = tape.take(self).features
        mu_bar, var_bar = y_bar
        # pyrefly: ignore[unsupported-operation]  # neither is None, for need_input is True
        flat = self.mu.sweep_joint(mu_bar, tape) + chain_joint((self.raw_var, self.var), var_bar, tape)
        return self.body.sweep_joint(flat.view_as(features).to(features.dtype), tape, need_input)
