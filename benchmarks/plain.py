"""SAMI by hand: networks, loss and training loop as somebody writes them who knows torch well and nothing of this package.

Networks of the same layers and the same names of weights as ours, from `torch.nn` alone; the score by autograd, differentiated twice;
channels-last weights and images, fused Adam, `clip_grad_norm_` and averaged weights over all tensors at once. Images come from the same
feed as ours. For one noisy image per image and levels that are uniform in logsnr.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from sami_fast.config import NO_SKIP, Config
from sami_fast.data import Feed, open_dataset
from sami_fast.methods.build import build_model
from sami_fast.step import Draw

from .steps import drawn_noise
from .turns import GIVEN

MIN_VAR = 1e-4


class NormSiLU(nn.GroupNorm):
    """Group norm, then SiLU if wanted."""

    def __init__(self, channels: int, groups: int, silu: bool = True) -> None:
        super().__init__(max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0), channels)
        self.silu = silu

    def forward(self, input: Tensor) -> Tensor:
        h = super().forward(input)
        return F.silu(h) if self.silu else h


def conv(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2)


class ResBlock(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, H, W], an embedding [B, E] added between its convolutions where there is one."""

    def __init__(self, before: int, after: int, groups: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = NormSiLU(before, groups), conv(before, after)
        self.embed = nn.Linear(embedding, after) if embedding else None
        self.norm_2, self.conv_2 = NormSiLU(after, groups), conv(after, after)
        self.skip = conv(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv_1(self.norm_1(x))
        if self.embed is not None:
            h = h + self.embed(embedding)[:, :, None, None]
        return self.skip(x) + self.conv_2(self.norm_2(h))


class AttentionBlock(nn.Module):
    """Self-attention among the positions of [B, C, H, W], heads of at most 64 channels.

    Torch's fused attention has no second derivative: where that is needed (`twice`) the weights are formed.
    """

    def __init__(self, channels: int, groups: int, twice: bool) -> None:
        super().__init__()
        self.heads = next(n for n in range(-(-channels // 64), channels + 1) if channels % n == 0)
        self.norm, self.qkv, self.out = NormSiLU(channels, groups, silu=False), conv(channels, 3 * channels, 1), conv(channels, channels, 1)
        self.twice = twice

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = h.permute(2, 0, 3, 1, 4)  # [B, N, S, D] each
        scale = q.shape[-1] ** -0.5
        out = torch.softmax(q @ k.mT * scale, -1) @ v if self.twice else F.scaled_dot_product_attention(q, k, v)
        return x + self.out(out.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2))


def stage(before: int, after: int, blocks: int, attention: bool, groups: int, embedding: int = 0) -> nn.ModuleList:
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers.append(ResBlock(after if block else before, after, groups, embedding))
        if attention:
            layers.append(AttentionBlock(after, groups, twice=not embedding))
    return nn.ModuleList(layers)


class Encoder(nn.Module):
    """x [B, C, H, W] -> mu and var, [B, Z] each."""

    def __init__(self, image_channels: int, size: int, settings: dict[str, Any]) -> None:
        super().__init__()
        width, groups, layers = image_channels, settings["groups"], []
        for after in settings["channels"]:
            size = -(-size // 2)
            layers += [conv(width, after, stride=2), NormSiLU(after, groups)]
            for _ in range(settings["blocks"]):
                layers.append(ResBlock(after, after, groups))
            if size in settings["attention"]:
                layers.append(AttentionBlock(after, groups, twice=True))
            width = after
        self.body = nn.Sequential(*layers, conv(width, width), NormSiLU(width, groups))
        self.mu, self.raw_var = (nn.Linear(width * size**2, settings["latent_size"]) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).flatten(1)
        return self.mu(h), F.softplus(self.raw_var(h)).square() + MIN_VAR


class Upsample(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, 2H, 2W]."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = conv(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class Denoiser(nn.Module):
    """(x_t [B, C, H, W], t [B]) -> the noise in x_t."""

    def __init__(self, image_channels: int, size: int, settings: dict[str, Any]) -> None:
        super().__init__()
        widths, groups, self.size = settings["channels"], settings["groups"], settings["embedding_size"]
        of_stage = {"blocks": settings["blocks"], "groups": groups, "embedding": self.size}
        self.register_buffer("frequency", math.pi * torch.logspace(0, 3, self.size // 2), persistent=False)
        self.embed = nn.Sequential(nn.Linear(self.size, self.size), nn.SiLU(), nn.Linear(self.size, self.size), nn.SiLU())
        self.stem = conv(image_channels, widths[0])
        sides = [size // 2**level for level in range(len(widths))]
        before = [widths[0], *widths[:-1]]
        attended = [side in settings["attention"] for side in sides]
        self.down = nn.ModuleList(stage(b, w, attention=a, **of_stage) for b, w, a in zip(before, widths, attended, strict=True))
        self.shrink = nn.ModuleList(conv(w, w, stride=2) for w in widths[:-1])
        self.middle = ResBlock(widths[-1], widths[-1], groups, self.size)
        self.grow = nn.ModuleList(Upsample(w, finer) for w, finer in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(stage(2 * w, w, attention=a, **of_stage) for w, a in zip(widths[-2::-1], attended[-2::-1], strict=True))
        self.out_norm, self.out = NormSiLU(widths[0], groups), conv(widths[0], image_channels)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequency
        embedding, h, skips = self.embed(torch.cat((angle.sin(), angle.cos()), 1)), self.stem(x_t), []
        for place, layers in enumerate(self.down):
            for layer in layers:
                h = layer(h, embedding)
            if place < len(self.shrink):
                skips.append(h)
                h = self.shrink[place](h)
        h = self.middle(h, embedding)
        for grow, layers in zip(self.grow, self.up, strict=True):
            h = torch.cat((grow(h), skips.pop()), 1)
            for layer in layers:
                h = layer(h, embedding)
        return self.out(self.out_norm(h))


class PlainSami(nn.Module):
    """Both networks and the loss between them, from our config and with our first weights.

    `functional`: called inside torch.func, as torch.compile needs it, where the score is torch.func's, too.
    """

    functional = False

    def __init__(self, config: Config, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        objective, schedule = config.objective, config.schedule
        assert (objective.noise_levels, objective.free_bits, objective.time_power, objective.weighting) == (1, 0, 1, "elbo")
        assert schedule.kind == "uniform_logsnr"
        assert schedule.logsnr_min is not None
        assert config.encoder.style == config.denoiser.style == "group_norm_silu"
        assert config.denoiser.skip_logsnr == NO_SKIP
        self.lowest, self.highest, self.unconditional = schedule.logsnr_min, schedule.logsnr_max, objective.unconditional_weight
        ours = build_model(config, image_shape)
        self.encoder, self.denoiser = (
            made(*image_shape[:2], vars(settings)) for made, settings in ((Encoder, config.encoder), (Denoiser, config.denoiser))
        )
        self.load_state_dict(dict(ours.named_parameters()))
        self.our_schedule = ours.schedule

    def forward(self, x_0: Tensor, t: Tensor, eps: Tensor, eps_z: Tensor, beta: float) -> Tensor:
        """The loss in nats per image; x_0 and eps [B, C, H, W], t [B], eps_z [B, Z]."""
        mu, var = self.encoder(x_0)
        z = mu + var.sqrt() * eps_z
        logsnr = self.highest - (self.highest - self.lowest) * t
        alpha, sigma = torch.sigmoid(logsnr).sqrt()[:, None, None, None], torch.sigmoid(-logsnr).sqrt()[:, None, None, None]
        x_t = alpha * x_0 + sigma * eps
        error = eps - self.denoiser(x_t, t)
        guided = error + sigma * self.score(x_t, z)
        weight = 0.5 * (self.highest - self.lowest)
        diffusion = guided.square().flatten(1).sum(1)
        if self.unconditional:
            diffusion = diffusion + self.unconditional * error.square().flatten(1).sum(1)
        kl = 0.5 * (mu.square() + var - 1 - var.log())
        return weight * diffusion.mean() + beta * kl.mean(0).sum()

    def log_q(self, x: Tensor, z: Tensor) -> Tensor:
        mu, var = self.encoder(x)
        return -0.5 * ((z - mu).square() / var + var.log()).sum()

    def score(self, x_t: Tensor, z: Tensor) -> Tensor:
        """grad_x log q(z|x), to be differentiated again."""
        if self.functional:
            return torch.func.grad(self.log_q)(x_t, z)
        leaf = x_t.detach().requires_grad_()
        return torch.autograd.grad(self.log_q(leaf, z), leaf, create_graph=True)[0]


class PlainLoop:
    """One step after another, of all steps of a run.

    Args:
        config: The run's, as ours has it.
        layout: Of weights and images.
        compiled: Loss and gradients as one graph of torch.compile.
        rank, ranks: Among processes of DistributedDataParallel.
    """

    def __init__(
        self, config: Config, layout: torch.memory_format = torch.channels_last, compiled: bool = False, rank: int = 0, ranks: int = 1
    ) -> None:
        self.config, self.layout, self.rank, self.ranks = config, layout, rank, ranks
        self.dataset = open_dataset(config.data, config.seed)
        self.feed = Feed(self.dataset, config.train.batch_size, 1, rank, ranks, config.seed, torch.device("cpu"), config.data.flip)
        self.sami = PlainSami(config, self.dataset.image_shape).to(memory_format=layout)
        self.parameters = list(self.sami.parameters())
        self.loss = DistributedDataParallel(self.sami, broadcast_buffers=False, gradient_as_bucket_view=True) if ranks > 1 else self.sami
        self.sami.functional = compiled
        self.compiled = torch.compile(torch.func.grad_and_value(self._functional), fullgraph=True, dynamic=False) if compiled else None
        settings = config.optimizer
        groups = [{"params": list(network.parameters())} for network in (self.sami.encoder, self.sami.denoiser)]
        adam = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
        rates = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay}
        self.optimizer = adam(groups, fused=True, **rates)
        self.averaged = [p.detach().clone() for p in self.parameters] if settings.ema_decay else []

    def _functional(self, parameters: dict[str, Tensor], *given: Tensor) -> Tensor:
        return functional_call(self.sami, parameters, (*given, self.config.kl_weight.start))

    def our_noise(self, step: int, x_0: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """t [B], eps [B, C, H, W] and eps_z [B, Z] as our step draws them, in the first steps."""
        if step >= GIVEN:
            return None
        draw = Draw(self.config.seed, step, place, self.config.train.batch_size)
        t, eps, eps_z = drawn_noise(self.sami.our_schedule, x_0, draw, self.config.encoder.latent_size)
        return t[:, 0], eps[:, 0], eps_z

    def noise(self, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same by torch's generator; t is stratified."""
        count, latents = len(x_0), self.config.encoder.latent_size
        return (torch.randperm(count) + torch.rand(count)) / count, torch.randn_like(x_0), torch.randn(count, latents)

    def gradients(self, step: int) -> Tensor:
        """Gradients of every parameter in its place; returns the loss, nats per image."""
        x_0, place = self.feed.micro_batch(step, 0)
        x_0 = x_0.contiguous(memory_format=self.layout)
        t, eps, eps_z = self.our_noise(step, x_0, place) or self.noise(x_0)
        given = x_0, t, eps.contiguous(memory_format=self.layout), eps_z
        if self.compiled is not None:
            found, loss = self.compiled({name: p.detach() for name, p in self.sami.named_parameters()}, *given)
            for name, p in self.sami.named_parameters():  # fused Adam takes for granted that a gradient is laid out as its weight
                p.grad = torch.empty_like(p).copy_(found[name] / x_0[0].numel())
            return loss
        loss = self.loss(*given, self.config.kl_weight.start)
        (loss / x_0[0].numel()).backward()
        return loss.detach()

    def __call__(self, step: int) -> Tensor:
        """Take the step with this number. Returns its loss."""
        settings = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        loss = self.gradients(step)
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged:
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.parameters, 1 - averaging(self.config, step))
        return self.logged(step, loss)

    def logged(self, step: int, loss: Any) -> Any:
        if step % self.config.log.every == 0 and self.rank == 0:
            print(f"step {step}: loss {loss.item():.2f}", flush=True)
        return loss

    def settled(self) -> None:
        """Wait for what a step may have left running: nothing."""

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, or the weights where none are averaged, by name."""
        values = self.averaged or [p.detach() for p in self.parameters]
        return {name: value for (name, _), value in zip(self.sami.named_parameters(), values, strict=True)}


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, and one cosine over the run."""
    settings = config.optimizer
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.train.steps))
    return settings.lr * warmup * (settings.final_fraction + (1 - settings.final_fraction) * cosine)


def averaging(config: Config, step: int) -> float:
    """Decay of the averaged weights; early averages forget the start quickly."""
    return min(config.optimizer.ema_decay, (1 + step) / (10 + step))
