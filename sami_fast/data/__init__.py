"""Where images come from: one class per source, and the feed that batches them."""

from ..config import DataConfig
from .array import ArrayImages
from .disks import Disks
from .torch_feed import Dataset, TorchFeed

__all__ = ["ArrayImages", "Dataset", "Disks", "TorchFeed", "open_dataset"]


def open_dataset(config: DataConfig, seed: int, split: int = 0) -> Dataset:
    """The dataset of a config; split 0 is for training, 1 for evaluation."""
    if config.kind == "array":
        return ArrayImages(config.path, config.array_key, config.holdout, split)
    disks = config.disks
    ranges = {name: tuple(getattr(disks, name)) for name in Disks.factor_order}
    return Disks(config.image_size, config.channels, ranges, disks.edge_slope, seed, split)
