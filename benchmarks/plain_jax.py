"""The loop of `plain.py` in JAX: one jitted step of gradients of a gradient, clipping, Adam and averaged weights, its buffers donated.

Layers are read off the torch networks of `plain.py`, so that both have the same ones. Images are [B, H, W, C], kernels [H, W, C_in, C_out],
which XLA's convolutions want; all else is as there.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"  # read when JAX is imported

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

from sami_fast.config import Config

from .plain import AttentionBlock, NormSiLU, PlainLoop, PlainSami, ResBlock, Upsample, averaging, learning_rate

Array = jax.Array
Weights = dict[str, Array]


def to_jax(value: Tensor) -> Array:
    """An image or a kernel with its channels last, anything else as it is."""
    value = value.detach()
    return jnp.asarray((value.permute(2, 3, 1, 0) if value.dim() == 4 else value).numpy())


def to_torch(value: Array) -> Tensor:
    tensor = torch.tensor(jax.device_get(value))
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.dim() == 4 else tensor


def apply(module: nn.Module, w: Weights, name: str, x: Array, embedding: Array | None = None) -> Array:
    """A layer of `plain.py`, its weights those whose names begin with `name`."""

    def sub(child: str, h: Array) -> Array:
        return apply(getattr(module, child), w, f"{name}.{child}", h)

    match module:
        case nn.Conv2d():
            size, stride = module.kernel_size[0], module.stride[0]
            edges = [(size // 2, size // 2)] * 2
            out = jax.lax.conv_general_dilated(x, w[f"{name}.weight"], (stride, stride), edges, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return out + w[f"{name}.bias"]
        case nn.Linear():
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        case nn.SiLU():
            return jax.nn.silu(x)
        case nn.Identity():
            return x
        case NormSiLU():
            grouped = x.reshape(*x.shape[:3], module.num_groups, -1)
            mean, var = grouped.mean((1, 2, 4), keepdims=True), grouped.var((1, 2, 4), keepdims=True)
            normed = ((grouped - mean) * jax.lax.rsqrt(var + module.eps)).reshape(x.shape)
            h = normed * w[f"{name}.weight"] + w[f"{name}.bias"]
            return jax.nn.silu(h) if module.silu else h
        case ResBlock():
            h = sub("conv_1", sub("norm_1", x))
            if module.embed is not None:
                assert embedding is not None
                h = h + sub("embed", embedding)[:, None, None, :]
            return sub("skip", x) + sub("conv_2", sub("norm_2", h))
        case AttentionBlock():
            batch, height, width, channels = x.shape
            h = sub("qkv", sub("norm", x)).reshape(batch, height * width, 3, module.heads, -1)
            q, k, v = h[:, :, 0], h[:, :, 1], h[:, :, 2]
            weights = jax.nn.softmax(jnp.einsum("bsnd,btnd->bnst", q, k) * q.shape[-1] ** -0.5, -1)
            return x + sub("out", jnp.einsum("bnst,btnd->bsnd", weights, v).reshape(batch, height, width, channels))
        case Upsample():
            return sub("conv", x.repeat(2, 1).repeat(2, 2))
        case nn.Sequential() | nn.ModuleList():
            for place, layer in module.named_children():
                x = apply(layer, w, f"{name}.{place}", x, embedding)
            return x
    raise TypeError(f"{name}: no such layer in JAX: {type(module).__name__}")


def encode(sami: PlainSami, w: Weights, x: Array) -> tuple[Array, Array]:
    encoder = sami.encoder
    h = apply(encoder.body, w, "encoder.body", x).transpose(0, 3, 1, 2).reshape(len(x), -1)  # in torch's order
    mu, raw = apply(encoder.mu, w, "encoder.mu", h), apply(encoder.raw_var, w, "encoder.raw_var", h)
    return mu, jax.nn.softplus(raw) ** 2 + 1e-4


def denoise(sami: PlainSami, w: Weights, x_t: Array, t: Array) -> Array:
    net = sami.denoiser

    def sub(child: str, h: Array, embedding: Array | None = None) -> Array:
        return apply(net.get_submodule(child), w, f"denoiser.{child}", h, embedding)

    angle = t[:, None] * jnp.asarray(net.frequency.numpy())
    embedding = sub("embed", jnp.concatenate((jnp.sin(angle), jnp.cos(angle)), 1))
    h, skips = sub("stem", x_t), []
    for place in range(len(net.down)):
        h = sub(f"down.{place}", h, embedding)
        if place < len(net.shrink):
            skips.append(h)
            h = sub(f"shrink.{place}", h)
    h = sub("middle", h, embedding)
    for place in range(len(net.up)):
        h = sub(f"up.{place}", jnp.concatenate((sub(f"grow.{place}", h), skips.pop()), 3), embedding)
    return sub("out", sub("out_norm", h))


def loss_of(sami: PlainSami, w: Weights, x_0: Array, t: Array, eps: Array, eps_z: Array, beta: float) -> Array:
    """As `PlainSami.forward`."""
    mu, var = encode(sami, w, x_0)
    z = mu + jnp.sqrt(var) * eps_z
    logsnr = sami.highest - (sami.highest - sami.lowest) * t
    alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(sign * logsnr))[:, None, None, None] for sign in (1, -1))
    x_t = alpha * x_0 + sigma * eps

    def log_q(x: Array) -> Array:
        mu, var = encode(sami, w, x)
        return -0.5 * ((z - mu) ** 2 / var + jnp.log(var)).sum()

    error = eps - denoise(sami, w, x_t, t)
    guided = error + sigma * jax.grad(log_q)(x_t)
    squares = (guided**2).sum((1, 2, 3)) + sami.unconditional * (error**2).sum((1, 2, 3))
    kl = 0.5 * (mu**2 + var - 1 - jnp.log(var))
    return 0.5 * (sami.highest - sami.lowest) * squares.mean() + beta * kl.mean(0).sum()


class JaxLoop(PlainLoop):
    """Images, and in the first steps the noise, are those of the loop in torch; everything else is JAX."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, torch.contiguous_format)
        weights = {name: to_jax(p) for name, p in self.sami.named_parameters()}
        zeros = {name: jnp.zeros_like(value) for name, value in weights.items()}
        self.state: tuple[Weights, ...] = weights, zeros, jax.tree.map(jnp.copy, zeros), jax.tree.map(jnp.copy, weights)
        self.key = jax.random.key(config.seed)
        self.drawn, self.take = jax.jit(self._drawn, static_argnums=1), jax.jit(self._step, donate_argnums=0)
        self.parameters, self.averaged = [], []

    def _drawn(self, key: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
        """Noise of a step: t, stratified, eps and eps_z."""
        of_order, of_t, of_eps, of_z = jax.random.split(key, 4)
        t = (jax.random.permutation(of_order, shape[0]) + jax.random.uniform(of_t, shape[:1])) / shape[0]
        return t, jax.random.normal(of_eps, shape), jax.random.normal(of_z, (shape[0], self.config.encoder.latent_size))

    def _step(self, state: tuple[Weights, ...], x_0: Array, noise: Any, rate: float, decay: float, count: float) -> Any:
        """From (weights, both moments, averaged weights) to those after the step, and its loss."""
        settings, (weights, first, second, averaged) = self.config.optimizer, state
        beta = self.config.kl_weight.start
        loss, gradients = jax.value_and_grad(partial(loss_of, self.sami))(weights, x_0, *noise, beta)
        gradients = jax.tree.map(lambda g: g / x_0[0].size, gradients)
        if settings.clip:
            norm = jnp.sqrt(sum((g**2).sum() for g in gradients.values()))
            gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, settings.clip / (norm + 1e-6)), gradients)
        b1, b2 = settings.betas
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, gradients)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, second, gradients)

        def update(p: Array, m: Array, v: Array) -> Array:
            return p - rate * (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + settings.eps)

        weights = jax.tree.map(update, weights, first, second)
        averaged = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), averaged, weights) if settings.ema_decay else averaged
        return (weights, first, second, averaged), loss

    def __call__(self, step: int) -> Tensor:
        x_0, place = self.feed.micro_batch(step, 0)
        images = jnp.asarray(x_0.permute(0, 2, 3, 1).contiguous().numpy())
        if given := self.our_noise(step, x_0, place):
            t, eps, eps_z = given
            noise = tuple(jnp.asarray(n.numpy()) for n in (t, eps.permute(0, 2, 3, 1).contiguous(), eps_z))
        else:
            noise = self.drawn(jax.random.fold_in(self.key, step), images.shape)
        rates = learning_rate(self.config, step), averaging(self.config, step), step + 1.0
        self.state, loss = self.take(self.state, images, noise, *rates)
        return self.logged(step, loss)

    def settled(self) -> None:
        jax.block_until_ready(self.state)  # JAX returns before its results are there

    def weights(self) -> dict[str, Tensor]:
        weights, _, _, averaged = self.state
        return {name: to_torch(value) for name, value in (averaged if self.config.optimizer.ema_decay else weights).items()}
