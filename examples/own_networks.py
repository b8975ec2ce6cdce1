"""An encoder and a denoiser of your own. From the root of the repository:

deepspeed -q sami_fast/train.py --config examples/own_networks.yaml
sami-fast traverse runs/own_networks --trust --output traversals.png
"""

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """x [B, C, H, W] -> mu and the log variance of q(z|x), [B, Z] each."""

    def __init__(self, image_shape: tuple[int, int, int], latent_size: int, width: int = 64) -> None:
        super().__init__()
        channels, height, side = image_shape
        layers = [nn.Conv2d(channels, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1), nn.GroupNorm(4, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (height // 4) * (side // 4), 2 * latent_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # [B, 2 Z]: one tensor of both


class Denoiser(nn.Module):
    """(x_t [B, C, H, W], logsnr [B]) -> the noise in x_t."""

    def __init__(self, image_shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(image_shape[0], width, 3, padding=1), nn.Conv2d(2 * width, image_shape[0], 3, padding=1)
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.coarse = nn.Sequential(nn.AvgPool2d(4), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU())
        self.spread = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Upsample(scale_factor=4))

    def forward(self, x_t: Tensor, logsnr: Tensor) -> Tensor:
        h = self.first(x_t) + self.level(logsnr[:, None] / 8)[:, :, None, None]
        return self.last(nn.functional.silu(torch.cat((h, self.spread(self.coarse(h))), 1)))
