"""Where images come from: one class per source, and the feed that batches them."""

from ..config import DataConfig
from .array import ArrayImages
from .cars3d import Cars3D
from .disks import Disks
from .feed import Dataset, Feed
from .grids import MPI3D, DSprites, Shapes3D
from .image_folder import CelebA, ImageFolder
from .smallnorb import SmallNORB
from .sprites import Sprites
from .video_folder import VideoFolder

__all__ = ["ArrayImages", "CelebA", "Dataset", "Disks", "Feed", "ImageFolder", "Sprites", "VideoFolder", "open_dataset"]

PUBLISHED = {"dsprites": DSprites, "shapes3d": Shapes3D, "mpi3d": MPI3D, "cars3d": Cars3D, "smallnorb": SmallNORB}


def open_dataset(config: DataConfig, seed: int, split: int = 0) -> Dataset:
    """The dataset of a config; split 0 is for training, 1 for evaluation.

    Raises:
        UserError: the data are not there, cannot be read, or are not what the config says.
    """
    kind = config.kind
    if kind in ("disks", "sprites"):
        drawn = config.disks if kind == "disks" else config.sprites
        size, channels = config.image_size or (16 if kind == "disks" else 64), config.channels or 1
        names = Disks.factor_order if kind == "disks" else Sprites.factor_order[1:]
        ranges = {name: tuple(getattr(drawn, name)) for name in names}
        if kind == "disks":
            return Disks(size, channels, ranges, config.disks.edge_slope, seed, split)
        return Sprites(size, channels, config.sprites.shapes, ranges, seed, split, config.video.clip_length)
    if kind == "array":
        return ArrayImages(config.path, config.array_key, config.holdout, split, config.cache_dir)
    common = {"image_size": config.image_size, "channels": config.channels, "split": split, "cache_dir": config.cache_dir}
    if kind in PUBLISHED:
        return PUBLISHED[kind](config.path, holdout=config.holdout, **common)
    common |= {key: getattr(config, key) for key in ("decoder", "max_bad", "cache_gib", "workers")}
    if kind == "celeba":
        return CelebA(config.path, crop=config.celeba.crop, evaluation=config.celeba.evaluation, **common)
    if kind == "image_folder":
        return ImageFolder(config.path, holdout=config.holdout, **common)
    video = config.video
    return VideoFolder(
        config.path,
        holdout=config.holdout,
        stride=video.stride,
        stills=video.stills,
        positions=video.positions,
        pool=video.pool,
        clip_length=video.clip_length,
        **common,
    )
