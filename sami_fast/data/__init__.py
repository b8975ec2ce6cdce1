"""Where images come from: one class per source, and the feed that batches them."""

from ..config import OWN, DataConfig
from ..errors import UserError
from .array import ArrayImages
from .avatars import Avatars
from .cars3d import Cars3D
from .dataset import Dataset, EightBit
from .disks import Disks
from .feed import Feed
from .grids import MPI3D, DSprites, Shapes3D
from .image_folder import CelebA, ImageFolder
from .own import open_own
from .parquet import Parquet
from .rooms import Rooms
from .smallnorb import SmallNORB
from .sprites import Sprites
from .video_folder import VideoFolder
from .webdataset import WebDataset

__all__ = [
    "ArrayImages",
    "Avatars",
    "CelebA",
    "Dataset",
    "Disks",
    "EightBit",
    "Feed",
    "ImageFolder",
    "Parquet",
    "Rooms",
    "Sprites",
    "VideoFolder",
    "WebDataset",
    "open_dataset",
]

SOURCES: dict[str, type[Dataset]] = {  # by `DataConfig.kind`
    "disks": Disks,
    "sprites": Sprites,
    "rooms": Rooms,
    "avatars": Avatars,
    "image_folder": ImageFolder,
    "video_folder": VideoFolder,
    "webdataset": WebDataset,
    "parquet": Parquet,
    "celeba": CelebA,
    "dsprites": DSprites,
    "shapes3d": Shapes3D,
    "mpi3d": MPI3D,
    "cars3d": Cars3D,
    "smallnorb": SmallNORB,
    "array": ArrayImages,
}


def open_dataset(config: DataConfig, seed: int, split: int = 0, *, trust_remote_code: bool = True) -> Dataset:
    """The dataset of a config; split 0 is for training, 1 for evaluation.

    Args:
        config: The section `data`.
        seed: The run's.
        split: Which images.
        trust_remote_code: Whether a class that it names may be imported, which runs code. False where others may have written the config.
    Raises:
        UserError: the data are not there, cannot be read, or are not what the config says.
    """
    if config.kind in OWN:
        if config.kind == "class" and not trust_remote_code:
            raise UserError(
                f"data.class: {config.class_}, whose code would be imported and run; if you trust it, add --trust (in Python, "
                "trust_remote_code=True)"
            )
        return open_own(config, seed, split)
    return SOURCES[config.kind].from_config(config, seed, split)
