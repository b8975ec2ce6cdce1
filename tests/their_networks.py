"""Networks as other people write them, right and wrong, which tests name by this file."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Laplace, Normal


class Encoder(nn.Module):
    """x [B, C, H, W] -> mu and a spread, which `kind` names."""

    def __init__(self, image_shape, latent_size=4, width=6, kind="mu_logvar"):
        super().__init__()
        channels, height, side = image_shape
        self.kind = kind
        self.first, self.second = nn.Conv2d(channels, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.heads = nn.Linear(width * (height // 4) * (side // 4), 2 * latent_size)
        self.register_buffer("offset", 0.1 * torch.randn(latent_size))  # of chance, and saved

    def features(self, x):
        return F.silu(self.second(F.silu(self.first(x)))).flatten(1)

    def forward(self, x):
        mu, raw = self.heads(self.features(x)).chunk(2, 1)
        mu = mu + self.offset
        if self.kind == "mu_logvar":
            return mu, raw
        if self.kind == "one":
            return torch.cat((mu, raw), 1)
        std = F.softplus(raw) + 0.1
        return {
            "mu_std": lambda: (mu, std),
            "mu_var": lambda: [mu, std**2],
            "normal": lambda: Normal(mu, std),
            "independent": lambda: Independent(Normal(mu, std), 1),
            "laplace": lambda: Independent(Laplace(mu, std), 1),
            "three": lambda: (mu, mu, std),
            "unlike": lambda: (mu, std[:, :1]),
            "images": lambda: x,
            "nan": lambda: (mu * float("nan"), std),
            "detached": lambda: (mu.detach() * 0 + self.heads.bias.sum(), std.detach() + self.heads.bias.sum()),
            "chance": lambda: (mu + torch.randn_like(mu), std),
            "batch": lambda: (mu - mu.mean(0), std),
            "flat": lambda: (mu, 0 * std),
            "huge": lambda: (mu, 1000 + raw),
        }[self.kind]()


class TimedEncoder(Encoder):
    """Told the noise level."""

    def __init__(self, image_shape, latent_size=4, width=6):
        super().__init__(image_shape, latent_size, width)
        self.level = nn.Linear(1, 2 * latent_size)

    def forward(self, x, t):
        mu, raw = (self.heads(self.features(x)) + self.level(t[:, None])).chunk(2, 1)
        return mu, raw


class LookingEncoder(Encoder):
    """What it does depends on the numbers in the image."""

    def features(self, x):
        return super().features(-x if x.mean().item() > 1 else x)


class AttentiveEncoder(Encoder):
    """With torch's fused attention, which has no second derivative."""

    def features(self, x):
        h = super().features(x).view(len(x), 1, -1, 4)
        return F.scaled_dot_product_attention(h, h, h).flatten(1)


class HoldingEncoder(Encoder):
    """With a mask that does not lie in a row, and a number beside its state that is no tensor."""

    def __init__(self, image_shape):
        super().__init__(image_shape)
        self.register_buffer("mask", torch.full((3, 4), -torch.inf).triu(1).T)

    def get_extra_state(self):
        return {"number": 3}

    def set_extra_state(self, state):
        assert state == {"number": 3}


class IdleEncoder(Encoder):
    """With a weight that nothing depends on, one that is tied, and a norm over the batch."""

    def __init__(self, image_shape, tied=False):
        super().__init__(image_shape)
        self.idle, self.norm, self.dropout = nn.Linear(3, 2), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.twice = self.heads if tied else None

    def features(self, x):
        return F.silu(self.second(self.dropout(F.silu(self.norm(self.first(x)))))).flatten(1)


class Output:
    def __init__(self, **values):
        self.__dict__.update(values)


class Denoiser(nn.Module):
    """(x_t, time) -> a prediction, as a tensor or in the way that `gives` names."""

    def __init__(self, image_shape, width=6, gives="tensor"):
        super().__init__()
        self.first, self.last = nn.Conv2d(image_shape[0], width, 3, 1, 1), nn.Conv2d(width, image_shape[0], 3, 1, 1)
        self.level, self.gives = nn.Linear(1, width), gives

    def embed(self, time):
        return self.level(time[:, None])

    def forward(self, x, time):
        prediction = self.last(F.silu(self.first(x) + self.embed(time)[:, :, None, None]))
        return {
            "tensor": lambda: prediction,
            "sample": lambda: Output(sample=prediction),
            "pred": lambda: Output(pred=prediction),
            "tuple": lambda: (prediction,),
            "variance": lambda: torch.cat((prediction, prediction), 1),
            "small": lambda: prediction[..., 1:],
            "text": lambda: "noise",
            "nan": lambda: prediction / 0,
        }[self.gives]()


class SteppedDenoiser(Denoiser):
    """Told whole timesteps, which it looks up."""

    def __init__(self, image_shape, steps=1000):
        super().__init__(image_shape)
        self.table = nn.Embedding(steps, 6)

    def embed(self, time):
        return self.table(time) + 0 * self.level.weight[:, 0] + 0 * self.level.bias


def make_encoder(image_shape: tuple[int, int, int]) -> nn.Module:
    return Encoder(image_shape)


def make_nothing() -> Tensor:
    return torch.zeros(1)
