"""What people hand to a model, made into what its networks take: images of any common kind, in the dtype of the weights."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..pictures import as_seen, luma

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike: TypeAlias = "Tensor | np.ndarray | Image | Sequence[Any]"
"""Images as `as_images` takes them."""

SLACK = 0.01  # above 1, for what a filter may add to an image
MOST_NOISY = 16.0  # beyond any noisy image: noise has standard deviation 1 at most, and pixels of 255 lie far above


def as_images(
    images: ImageLike,
    image_shape: Sequence[int] | None,
    *,
    name: str = "images",
    least: torch.dtype = torch.float32,
    noisy: bool = False,
) -> Tensor:  # [N, C, H, W]
    """Images as a batch in [-1, 1]. A floating-point batch that needs nothing comes back as it is, with the graph behind it.

    Args:
        images: A tensor or a NumPy array, [N, C, H, W] or [N, H, W, C]; without N one image, and without C grey ones. Or a Pillow image,
            which becomes grey or colour as the model needs it, its colour profile applied, 16 bits scaled to 8, what is
            transparent black. Or a list of these. Whole numbers are uint8, 0 to 255; floating-point numbers lie in [-1, 1].
        image_shape: (C, H, W). None where it is not known, and then only [N, C, H, W] will do.
        name: What messages call them.
        least: The result has this dtype, or the images' own if that is wider.
        noisy: Images may be noisy, and then their values go beyond 1.
    Raises:
        ValueError: another shape, or values out of range; images are not resized.
        TypeError: nothing that images are kept in, or whole numbers other than uint8.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise ValueError(f"{name}: expected images, found an empty list")
        places = enumerate(images)
        return torch.cat([as_images(each, image_shape, name=f"{name}[{place}]", least=least, noisy=noisy) for place, each in places])
    x = _as_batch(_as_tensor(images, image_shape, name), image_shape, name)
    if x.dtype == torch.uint8:
        return x.to(least) / 127.5 - 1
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected floating-point numbers in [-1, 1] or uint8, found {x.dtype}")
    x = x.to(torch.promote_types(x.dtype, least))
    if x.numel() and may_be_read(x):
        largest = x.detach().abs().amax().item()
        if not largest <= (MOST_NOISY if noisy else 1 + SLACK):
            kind = "values of at most 1 (a few more where they are noisy)" if noisy else "values in [-1, 1]"
            raise ValueError(f"{name}: expected {kind}, found {largest:.4g}; of pixels in 0 to 255 give uint8, or x / 127.5 - 1")
    return x


def _as_tensor(images: Any, image_shape: Sequence[int] | None, name: str) -> Tensor:
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray):
        if images.dtype.kind == "f":
            kept = images.dtype.newbyteorder("=") if images.dtype.itemsize <= 8 else np.float64
        elif images.dtype == np.uint8:
            kept = images.dtype
        else:
            raise TypeError(f"{name}: expected floating-point numbers in [-1, 1] or uint8, found {images.dtype}")
        images = np.ascontiguousarray(images, dtype=kept).reshape(images.shape)
        return torch.from_numpy(images if images.flags.writeable else images.copy())
    if type(images).__module__.partition(".")[0] == "PIL":
        return _pixels(images, image_shape, name)
    raise TypeError(f"{name}: expected images as a tensor, a NumPy array, Pillow images or a list of these, found {type(images).__name__}")


def _pixels(image: Any, image_shape: Sequence[int] | None, name: str) -> Tensor:
    """A Pillow image in the colours of the model, as training sees a file of it. [C, H, W] uint8."""
    channels = None if image_shape is None else image_shape[0]
    if channels not in (1, 3, 4):
        raise ValueError(f"{name}: expected an array or a tensor for a model of {channels or 'unknown'} channels, found a Pillow image")
    try:
        pixels = torch.from_numpy(as_seen(image, transparent=channels == 4)).movedim(-1, 0)
    except ValueError as error:
        raise ValueError(f"{name}: a Pillow image of mode {image.mode} cannot be used ({error})") from None
    return luma(pixels[None])[0] if channels == 1 else pixels


def _as_batch(x: Tensor, image_shape: Sequence[int] | None, name: str) -> Tensor:
    """A view [N, C, H, W]."""
    if image_shape is None:
        if x.dim() != 4:
            raise ValueError(f"{name}: expected [N, C, H, W], found {list(x.shape)}")
        return x
    channels, height, width = shape = tuple(image_shape)
    batch = x
    if channels == 1 and x.dim() in (2, 3) and x.shape[-2:] == (height, width):
        batch = batch.unsqueeze(-3)
    elif x.shape[-3:] != shape and x.shape[-3:] == (height, width, channels):
        batch = batch.movedim(-1, -3)
    batch = batch[None] if batch.dim() == 3 else batch
    if batch.dim() != 4 or batch.shape[1:] != shape:
        raise ValueError(f"{name}: expected [N, {channels}, {height}, {width}], found {list(x.shape)}; images are not resized")
    return batch


def may_be_read(x: Tensor) -> bool:
    """Whether a number can be taken out of a tensor here: not where a graph is made of what runs, nor without any numbers."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (transformed or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def dtype_of(network: Any) -> torch.dtype | None:
    """The dtype of a network's weights; None where it has none."""
    if not isinstance(network, nn.Module):
        return None
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), None)


def fitted(network: Callable[..., Any], x: Tensor, weights_of: Any = None) -> Callable[..., Any]:
    """The network for inputs of the dtype of x: where its weights have another, its first input is cast to theirs and its results back.

    So what is computed between networks of 16 bits, noise, log q, sums over noise levels, stays in 32.

    Args:
        network: Any module or function of images.
        x: Images, whose dtype counts.
        weights_of: The module whose weights these are; the network itself when None.
    """
    dtype = dtype_of(network if weights_of is None else weights_of)
    if dtype is None or dtype == x.dtype:
        return network

    def call(first: Tensor, *others: Any, **named: Any) -> Any:
        return tree_map_only(Tensor, lambda y: y.to(first.dtype), network(first.to(dtype), *others, **named))

    call.told_level = getattr(network, "told_level", False)  # `score.at_level` asks  # pyrefly: ignore[missing-attribute]
    return call
