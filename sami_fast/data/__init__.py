"""Where images come from: one class per source, and the feed that batches them."""

from ..config import DataConfig
from .array import ArrayImages
from .avatars import Avatars
from .cars3d import Cars3D
from .dataset import Dataset, EightBit
from .disks import Disks
from .feed import Feed
from .grids import MPI3D, DSprites, Shapes3D
from .image_folder import CelebA, ImageFolder
from .rooms import Rooms
from .smallnorb import SmallNORB
from .sprites import Sprites
from .video_folder import VideoFolder

__all__ = [
    "ArrayImages",
    "Avatars",
    "CelebA",
    "Dataset",
    "Disks",
    "EightBit",
    "Feed",
    "ImageFolder",
    "Rooms",
    "Sprites",
    "VideoFolder",
    "open_dataset",
]

SOURCES: dict[str, type[Dataset]] = {  # by `DataConfig.kind`
    "disks": Disks,
    "sprites": Sprites,
    "rooms": Rooms,
    "avatars": Avatars,
    "image_folder": ImageFolder,
    "video_folder": VideoFolder,
    "celeba": CelebA,
    "dsprites": DSprites,
    "shapes3d": Shapes3D,
    "mpi3d": MPI3D,
    "cars3d": Cars3D,
    "smallnorb": SmallNORB,
    "array": ArrayImages,
}


def open_dataset(config: DataConfig, seed: int, split: int = 0) -> Dataset:
    """The dataset of a config; split 0 is for training, 1 for evaluation.

    Raises:
        UserError: the data are not there, cannot be read, or are not what the config says.
    """
    return SOURCES[config.kind].from_config(config, seed, split)
