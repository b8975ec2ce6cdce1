"""What a source of images must have and may have. To add one, derive from `Dataset`, or from `EightBit` where pixels are bytes.

    class Noise(Dataset):
        image_shape, size = (3, 32, 32), None

        def images(self, index: Tensor) -> Tensor:
            return torch.rand(len(index), *self.image_shape) * 2 - 1

`sami_fast.train(dataset=Noise())` trains on it, and so does a config that says `data.class: path/to/file.py:Noise`, with the arguments
`data.kwargs`. A kind of its own needs `from_config`, a line of `SOURCES` in `data/__init__.py` and one of `KINDS` in `config.py`.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .. import ops
from ..config import DataConfig
from .pixels import to_unit


class Dataset:
    """Images by index. A subclass must give `image_shape`, `size` and `images`; everything else has a default, which is stated with it.

    An image must depend on its index alone: a restart, another number of ranks or of threads then shows the same ones.
    """

    image_shape: tuple[int, int, int]  # C, H, W
    size: int | None  # number of images; None: endless

    factor_names: tuple[str, ...] = ()  # what is known of each image; (): nothing
    attribute_names: frozenset[str] = frozenset()  # those of them that an image has or has not, 1 or 0, and that are scored as such
    periods: ClassVar[dict[str, float]] = {}  # of factors that come round again, such as angles, in the unit of `factors`; {}: none do
    held_out: bool = True  # whether split 1 shows images that split 0 does not
    complete: bool = True  # whether all images can be read, so that `read` never finds one missing
    workers: int = 0  # threads in which the feed prepares batches; 0: each is made when it is asked for, on the device
    ahead: int = 0  # images that the feed asks for before they are needed, beside what keeps its workers busy
    clip_length: int = 0  # T, frames of a clip; 0: there are no clips

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1].

        Raises:
            AbsentError: one of them cannot be read.
        """
        raise NotImplementedError

    def read(self, index: Tensor) -> tuple[Tensor, dict[int, str]]:
        """As `images`, where some may be missing: which of [n] cannot be read, and why; by default none. They are shown grey."""
        return self.images(index), {}

    def training_images(self, index: Tensor) -> Tensor:
        """As `images`, but another image stands for one that cannot be read: for all that asks for many images and for none by name."""
        return self.images(index)

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, F] float32, columns in the order of `factor_names`; by default zeros."""
        return torch.zeros(len(index), len(self.factor_names))

    def clips(self, index: Tensor) -> Tensor:
        """Ordered frames: [n] int64, below `num_clips` -> [n, T, C, H, W] float32 in [-1, 1]. Asked for where `clip_length` is not 0."""
        raise NotImplementedError

    @property
    def num_clips(self) -> int | None:
        """Number of clips; None, the default: endless."""
        return None

    @property
    def epoch_size(self) -> int | None:
        """Images that an epoch shows; by default all of them."""
        return self.size

    def order(self, epoch: int, seed: int, batch_size: int) -> Tensor:
        """Indices in the order in which an epoch shows them, [epoch_size] int64; by default a new permutation each time.

        Only asked for where `epoch_size` is not None: an endless source shows image n as its n-th.
        """
        if self.epoch_size is None:
            raise ValueError("order: an endless dataset has no epochs")
        return ops.random_permutation(seed, epoch, ops.Stream.SHUFFLE, self.epoch_size)

    @property
    def fingerprint(self) -> str:
        """Changes with the images, and not with their place, so that a run is not resumed on others; by default "", which any have."""
        return ""

    def in_order(self) -> Tensor:
        """All indices in the order in which a person counts the images, [size] int64; by default theirs."""
        if self.size is None:
            raise ValueError("in_order: an endless dataset has no last image")
        return torch.arange(self.size)

    def unreadable(self) -> dict[str, str]:
        """Files, as `sources` names them, that no index stands for since they could not be read at all, and why; by default none."""
        return {}

    def sources(self, index: Tensor) -> dict[str, list[Any]]:
        """Where images come from, as lists of n entries that `sami-fast encode` writes beside the latents; by default none."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What `sami-fast data` shows beside sizes and factors, by name; by default nothing."""
        return {}

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        """The dataset that a config describes; split 0 is for training, 1 for evaluation.

        A class without it that `data.class` names is made with `data.kwargs`, and `data.holdout` of its images are evaluation's.
        """
        raise NotImplementedError


def image_names(dataset: Dataset, index: Tensor) -> list[str]:
    """What images are called: their files, with the number of the frame in a video, or the numbers by which a person counts them.

    Args:
        index: [n] int64.
    Returns:
        n names; those of files may hold whatever bytes a file system allows.
    """
    sources = dataset.sources(index)
    if "files" not in sources:
        numbers = index if dataset.size is None else torch.argsort(dataset.in_order())[index]
        return [f"#{number}" for number in numbers.tolist()]
    if "frames" not in sources:
        return [str(name) for name in sources["files"]]
    return [f"{name} #{frame}" for name, frame in zip(sources["files"], sources["frames"], strict=True)]


class EightBit(Dataset):
    """A dataset whose images are bytes. It gives `pixels` in place of `images`, and the feed moves a quarter of the memory."""

    def pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8."""
        raise NotImplementedError

    def training_pixels(self, index: Tensor) -> Tensor:
        """As `pixels`, with stand-ins as in `training_images`."""
        return self.pixels(index)

    def training_images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        return to_unit(self.training_pixels(index))

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        return to_unit(self.pixels(index))
