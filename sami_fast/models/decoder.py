"""A decoder z -> image: the way up of the denoiser's U-Net, for the baseline that needs one. SAMI has none."""

from torch import Tensor, nn

from .layers import AttentionBlock, ResBlock, Upsample, check_sizes, checked_sides, conv, norm_act


class Decoder(nn.Module):
    """Latents to images.

    Args:
        image_channels: C of the images.
        image_size: H = W, at least 2^(len(channels) - 1).
        latent_size: Z.
        channels, blocks, attention, groups, style: As of the denoiser whose middle and way up this is.
    Shapes:
        z [B, Z] -> image [B, C, H, W], meant for [-1, 1] but without a bound.
    Raises:
        ValueError: as the denoiser.
    Differentiable: twice.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        latent_size: int,
        channels: list[int],
        blocks: int = 1,
        attention: list[int] | None = None,
        groups: int = 4,
        style: str = "group_norm_silu",
    ) -> None:
        super().__init__()
        check_sizes(channels, blocks, image_channels=image_channels, image_size=image_size, latent_size=latent_size, groups=groups)
        attention = attention or []
        sides = checked_sides("decoder", style, image_size, range(len(channels)), attention)
        width, side = channels[-1], sides[-1]
        self.stem = nn.Linear(latent_size, width * side * side)
        self.start = (width, side, side)
        layers: list[nn.Module] = [ResBlock(width, width, groups, style)]
        for new_width, side in reversed(list(zip(channels[:-1], sides, strict=False))):
            layers.append(Upsample(width, new_width, style, side % 2 == 1))
            for _ in range(blocks):
                layers.append(ResBlock(new_width, new_width, groups, style))
                if side in attention:
                    layers.append(AttentionBlock(new_width, groups, style))
            width = new_width
        self.body = nn.Sequential(*layers, norm_act(width, groups, style), conv(width, image_channels, 3, style))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.stem(z).unflatten(1, self.start))
