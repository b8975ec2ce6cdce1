"""A picture as people see it, in 8-bit colours: the same from a file that is trained on and from an image that a model is handed."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

NEAR_SRGB = 2  # levels of 255 within which colours are sRGB's
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@lru_cache(64)
def _to_srgb(profile: bytes, mode: str) -> Any | None:
    """What turns the colours that an ICC profile tells into sRGB: a transform, or None where they are that, to a level or two of 255.

    As in a viewer, a profile that is broken or of another kind than the image is no profile.

    Args:
        profile: The profile as it stands in the file.
        mode: "RGB", "L" or "CMYK".
    """
    from PIL import Image, ImageCms

    try:
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.arange(256, dtype=np.uint8)[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
        shown = np.asarray(transform.apply(Image.fromarray(grid))).astype(int)
        return transform if np.abs(shown - (grid[..., None] if mode == "L" else grid)).max() > NEAR_SRGB else None
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError):  # ImportError: a Pillow that was built without it
        return None


def profile_of(image: Any) -> Any | None:
    """`_to_srgb` of an image's own profile, if it has one."""
    profile, mode = image.info.get("icc_profile"), {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
    return _to_srgb(profile, mode) if profile and mode in ("RGB", "L", "CMYK") else None


def as_seen(opened: Any, *, transparent: bool = False) -> np.ndarray:
    """A Pillow image as it is meant to be seen: rotated by its EXIF, in sRGB, 16 bits scaled to 8, transparent pixels over black.

    Args:
        opened: The image, as `PIL.Image.open` gives it.
        transparent: Keep what is transparent as a fourth channel instead.
    Returns:
        [H, W, 3] uint8, or [H, W, 4].
    Raises:
        ValueError: floating-point pixels, whose range nobody knows. Pillow's own errors: it is broken.
    """
    from PIL import Image, ImageOps

    to_srgb, image = profile_of(opened), ImageOps.exif_transpose(opened)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels without a known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    if to_srgb is not None:
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = to_srgb.apply(image.convert(to_srgb.input_mode))
        if alpha is not None:
            image.putalpha(alpha)
    if transparent:
        return np.array(image.convert("RGBA"))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("RGB"))


def luma(pixels: Tensor) -> Tensor:
    """Grey from colour. [n, 3, H, W] -> [n, 1, H, W], uint8 from uint8, else float32."""
    weights = torch.tensor(LUMA, device=pixels.device).view(1, 3, 1, 1)
    grey = (pixels.float() * weights).sum(1, keepdim=True)
    return grey.round().to(torch.uint8) if pixels.dtype == torch.uint8 else grey
