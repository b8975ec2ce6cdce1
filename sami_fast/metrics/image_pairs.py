"""How close images are to others, pair by pair: mean squared error, PSNR, SSIM, LPIPS.

Images come in [-1, 1] and are compared in [0, 1], LPIPS excepted, which is defined on [-1, 1]. With reconstructions state whether their
x_T was random or inverted: the one scores what z knows, the other what z and x_T know together.
"""

from pathlib import Path

import torch
from torch import Tensor

SSIM_WINDOW = 11
LPIPS_SIDE = 31  # AlexNet's layers leave nothing of a smaller image


def as_images(name: str, images: Tensor) -> Tensor:
    """Images in [-1, 1], [N, C, H, W] with C 1 or 3, unchanged.

    Raises:
        ValueError: another shape (channels last, say), no images, no real numbers, or values outside [-1, 1].
    """
    if images.is_complex():
        raise ValueError(f"{name}: expected real numbers, found {images.dtype}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name}: expected [N, C, H, W] with 1 or 3 channels, found {list(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"{name}: expected values in [-1, 1], found {low:.4g} to {high:.4g}")
    return images


def _as_pairs(x: Tensor, y: Tensor, smallest_side: int = 1) -> tuple[Tensor, Tensor]:
    as_images("x", x), as_images("y", y)
    if x.shape != y.shape:
        raise ValueError(f"y: expected {list(x.shape)}, as x has, found {list(y.shape)}")
    if min(x.shape[2:]) < smallest_side:
        raise ValueError(f"x: expected images of at least {smallest_side} x {smallest_side} pixels, found {x.shape[2]} x {x.shape[3]}")
    return x, y.to(x.device)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of [0, 1] images, over channels and pixels: a quarter of that in [-1, 1].

    Args:
        x, y: [N, C, H, W] in [-1, 1], C 1 or 3.
    Returns:
        [N] float64.
    Raises:
        ValueError: shapes differ or are no images, or values outside [-1, 1].
    """
    x, y = _as_pairs(x, y)
    return ((x.double() - y.double()) / 2).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal to noise ratio, -10 log10 of `mse`, in dB; inf for equal images. Arguments and errors as `mse`. [N] float64."""
    return -10 * torch.log10(mse(x, y))


@torch.no_grad()
def ssim(x: Tensor, y: Tensor, batch_size: int = 64) -> Tensor:
    """Structural similarity: windows of 11 x 11 pixels with Gaussian weights of standard deviation 1.5, where they fit into the image.

    Args:
        x, y: [N, C, H, W] in [-1, 1], C 1 or 3, H and W at least 11.
        batch_size: Pairs at a time; bounds the memory.
    Returns:
        [N] float64, at most 1; mean over channels and pixels.
    Raises:
        ValueError: as `mse`; or images too small for a window.
    Source: Wang et al., IEEE Transactions on Image Processing 13 (2004), with its constants .01 and .03.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = _as_pairs(x, y, SSIM_WINDOW)
    border, values = SSIM_WINDOW // 2, []
    for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True):
        a, b = ((part.double() + 1) / 2 for part in (a, b))
        _, everywhere = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
        # Beyond the border it mirrors the image, which the definition does not.
        values.append(everywhere[:, :, border:-border, border:-border].flatten(1).mean(1))
    return torch.cat(values)


@torch.no_grad()
def lpips(x: Tensor, y: Tensor, batch_size: int = 64) -> Tensor:
    """Learned perceptual similarity, AlexNet, version 0.1; grey images as colour ones.

    Args:
        x, y: [N, C, H, W] in [-1, 1], C 1 or 3, H and W at least 31.
        batch_size: Pairs at a time; bounds the memory.
    Returns:
        [N] float64; 0 for equal images.
    Raises:
        ValueError: as `mse`; or torchvision or AlexNet's weights are not there. Nothing is downloaded.
    Source: Zhang et al., arXiv:1801.03924.
    """
    x, y = _as_pairs(x, y, LPIPS_SIDE)
    try:
        from torchvision.models import AlexNet_Weights  # pyrefly: ignore[missing-import] (optional)
    except ImportError:
        raise ValueError("lpips: expected torchvision, found none; pip install torchvision") from None
    url = AlexNet_Weights.DEFAULT.url
    weights = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not weights.is_file():
        raise ValueError(f"lpips: expected the weights of {url} at {weights}, found no such file")
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    a, b = (images.float().clamp(-1, 1).expand(-1, 3, -1, -1).split(batch_size) for images in (x, y))
    parts = [learned_perceptual_image_patch_similarity(*pair, "alex", "none").view(-1) for pair in zip(a, b, strict=True)]
    return torch.cat(parts).double()
