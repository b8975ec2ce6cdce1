"""Every setting of a run: type, unit, default and check in one place; also the DeepSpeed dict that follows from them.

A run is a YAML file that holds only what differs from here, plus `key=value` overrides with dotted keys.
"""

import copy
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from functools import reduce
from importlib.util import find_spec
from operator import getitem
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeGuard, get_args, get_origin

import yaml

from .adapters import BETAS, PREDICTS, RETURNS, TAKES, TIMES
from .capabilities import CAPABILITIES, Capabilities
from .errors import UserError
from .files import absent, expanded
from .models.layers import STYLES
from .named import absolute
from .schedule import KINDS as SCHEDULE_KINDS
from .schedule import WEIGHTINGS
from .score import SCORE_METHODS

Check = tuple[str, Callable[[Any], bool]]


def one_of(*choices: str) -> Check:
    return "one of " + ", ".join(choices), lambda value: value in choices


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> Check:
    """A number, or a list of numbers, in [low, high] or (low, high]."""

    def inside(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return all(abs(v) < 1e308 and (low < v if open_low else low <= v) and v <= high for v in values)

    bound = f"above {low:g}" if open_low else f"at least {low:g}"
    if math.isinf(low):
        return "finite", inside
    return (bound if math.isinf(high) else f"{bound} and at most {high:g}"), inside


def interval(low: float, high: float) -> Check:
    """A [low, high] pair inside bounds."""
    return f"two numbers [low, high] with {low:g} <= low <= high <= {high:g}", lambda v: len(v) == 2 and low <= v[0] <= v[1] <= high


SHARES: Check = ("numbers above 0 and below 1", lambda v: all(0 < share < 1 for share in v))
PAIR_OF_DECAYS: Check = ("two numbers of at least 0 and below 1", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
ANYTHING: Check = ("anything", lambda value: True)
NAMED: Check = ("package.module:Name or path/to/file.py:Name", lambda v: not v or re.fullmatch(r".+:[^\W\d][\w.]*", v) is not None)
STAGE: Check = ("0, 1, 2 or 3", lambda value: value in (0, 1, 2, 3))
COMPILE = ("none", "denoiser", "step")
MODES = ("joint", "denoiser", "frozen", "finetune", "staged")
NO_SKIP = -30.0  # of denoiser.skip_logsnr: its U-Net says the noise itself at all levels
AUTO = "auto"  # how a setting that is None for now is written


def setting(default: Any, help: str, check: Check = ANYTHING, unit: str = "") -> Any:
    """A dataclass field with its meaning, unit and check."""
    metadata = {"help": help, "check": check, "unit": unit}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Checks every field on construction; a failure names the dotted key, what was expected and what came."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            if "check" not in item.metadata:
                continue
            value = getattr(self, item.name)
            expected, passes = item.metadata["check"]
            if value is not None and not passes(value):
                raise UserError(f"{self.key(item.name)}: expected {expected}, found {value!r}")

    def key(self, name: str) -> str:
        return f"{self.section}.{spelled(name)}" if self.section else spelled(name)


def spelled(field_name: str) -> str:
    """The name of a setting: that of its field, which has an underscore after it where Python keeps the word for itself, `class`."""
    return field_name.removesuffix("_")


@dataclass(frozen=True)
class DisksConfig(Section):
    section = "data.disks"
    x: list[float] = setting([0.23, 0.77], "range of the centre's x", interval(0, 1), "image sides")
    y: list[float] = setting([0.40, 0.60], "range of the centre's y", interval(0, 1), "image sides")
    background: list[float] = setting([0.0, 0.5], "range of the background's intensity", interval(0, 1))
    radius: list[float] = setting([0.25, 0.25], "range of the radius", interval(0.01, 0.5), "image sides")
    brightness: list[float] = setting([1.0, 1.0], "range of the disk's intensity", interval(0, 1))
    edge_slope: float = setting(1.5, "steepness of the antialiased edge", number(0, open_low=True), "per pixel")


@dataclass(frozen=True)
class SpritesConfig(Section):
    section = "data.sprites"
    shapes: list[str] = setting(
        ["square", "ellipse", "heart"],
        "shapes that occur",
        ("some of square, ellipse and heart, each once", lambda v: v and set(v) <= {"square", "ellipse", "heart"} and len({*v}) == len(v)),
    )
    scale: list[float] = setting([0.5, 1.0], "range of the size; at 1 the circle around it is 0.4 image sides wide", interval(0.05, 2))
    rotation: list[float] = setting([0.0, 1.0], "range of the angle, clockwise", interval(-1, 1), "turns")
    x: list[float] = setting([0.2, 0.8], "range of the centre's x", interval(0, 1), "image sides")
    y: list[float] = setting([0.2, 0.8], "range of the centre's y", interval(0, 1), "image sides")


ROOM_RANGES = ("floor_hue", "wall_hue", "object_hue", "size", "x", "y", "yaw")


@dataclass(frozen=True)
class RoomsConfig(Section):
    section = "data.rooms"
    images: int = setting(20_000, "images, of training and evaluation together", number(2))
    clips: int = setting(256, "clips of data.video.clip_length frames; no image of training or evaluation is one of them", number(1))
    seed: int = setting(0, "key of the factors; not the run's, so that runs of any seed see the same images", number(0, 2**63 - 1))
    shapes: list[str] = setting(
        ["box", "ball", "cylinder", "cone"],
        "shapes that occur",
        ("some of box, ball, cylinder and cone, each once", lambda v: v and len({*v} & {"box", "ball", "cylinder", "cone"}) == len(v)),
    )
    floor_hue: list[float] = setting([0.0, 1.0], "range of the floor's hue", interval(0, 1), "turns")
    wall_hue: list[float] = setting([0.0, 1.0], "range of the walls' hue", interval(0, 1), "turns")
    object_hue: list[float] = setting([0.0, 1.0], "range of the object's hue", interval(0, 1), "turns")
    size: list[float] = setting([0.5, 1.0], "range of the object's width", interval(0.1, 1), "halves of the floor's width")
    x: list[float] = setting([-0.5, 0.5], "range of the object's place, to the right", interval(-0.5, 0.5), "halves of the floor's width")
    y: list[float] = setting([-0.5, 0.5], "range of the object's place, to the back", interval(-0.5, 0.5), "halves of the floor's width")
    yaw: list[float] = setting([0.0, 1.0], "range of the object's angle, counterclockwise from above", interval(-1, 1), "turns")
    moving: list[str] = setting(
        ["size", "x", "y", "yaw"],
        "factors that change in a clip, at constant velocity; the others stay",
        ("some of the ranges here, each once", lambda v: v and len({*v} & {*ROOM_RANGES}) == len(v)),
    )


@dataclass(frozen=True)
class AvatarsConfig(Section):
    section = "data.avatars"
    images: int = setting(10_000, "images, of training and evaluation together", number(2))
    seed: int = setting(0, "key of what they show; not the run's, so that runs of any seed see the same images", number(0, 2**63 - 1))


@dataclass(frozen=True)
class VideoConfig(Section):
    section = "data.video"
    stride: int = setting(1, "frames from one used frame to the next, in training and in clips", number(1), "frames")
    stills: int = setting(0, "frames of each video that an epoch of training shows; 0 is every one", number(0))
    positions: str = setting(
        "random",
        "where these stills lie: one at random in each of as many equal parts, anew each epoch, or evenly",
        one_of("random", "uniform"),
    )
    pool: int = setting(4096, "frames decoded ahead and shuffled together; whole groups of pictures are decoded once", number(1), "frames")
    clip_length: int = setting(16, "frames of an ordered clip for evaluation", number(1), "frames")


@dataclass(frozen=True)
class CelebAConfig(Section):
    section = "data.celeba"
    crop: str = setting(
        "center",
        "part that is resized: the central 178x178, the central two thirds of that, or rows 57-185 and columns 25-153",
        one_of("center", "tight", "face"),
    )
    evaluation: str = setting("valid", "part of the official partition that evaluation sees", one_of("valid", "test"))


KINDS = (
    *("disks", "sprites", "rooms", "avatars", "image_folder", "video_folder", "webdataset", "parquet", "celeba"),
    *("dsprites", "shapes3d", "mpi3d", "cars3d", "smallnorb", "array", "class", "given"),
)
OWN = ("class", "given")  # kinds that are classes or objects of the user's
WITHOUT_FILES = ("disks", "sprites", "rooms", "avatars")  # kinds that are drawn or rendered
SHARDS = ("webdataset", "parquet")  # kinds whose files hold many images each, with their labels
LABELLED = ("image_folder", "video_folder", *SHARDS)  # kinds that take data.labels and data.holdout_by
DECODED = (*LABELLED, "celeba")  # kinds whose images are decoded
USED_BY: dict[str, tuple[str, ...]] = {  # kinds that have a use for a setting or section of `data`; what is not here is for all
    "path": tuple(kind for kind in KINDS if kind not in (*WITHOUT_FILES, *OWN)),
    **dict.fromkeys(("class", "kwargs"), ("class",)),
    "array_key": ("array",),
    "range": ("array", *OWN),
    **dict.fromkeys(("labels", "holdout_by"), LABELLED),
    "holdout": tuple(kind for kind in KINDS if kind not in ("disks", "sprites", "celeba")),
    **dict.fromkeys(("max_bad", "decoder"), DECODED),
    **dict.fromkeys(("workers", "cache_gib"), (*DECODED, *OWN)),
    "cache_dir": tuple(kind for kind in KINDS if kind not in ("disks", "sprites", *OWN)),
    **{kind: (kind,) for kind in (*WITHOUT_FILES, "celeba")},
    "video": ("video_folder",),
    "video.clip_length": ("video_folder", "sprites", "rooms"),
}
GREY_OR_COLOUR = (*DECODED, "rooms", "avatars")  # kinds whose images can have 1 channel or 3


@dataclass(frozen=True)
class DataConfig(Section):
    section = "data"
    kind: str = setting(
        "disks",
        "where images come from; class: from data.class, which implies it; given: from a dataset that `sami_fast.train` was given",
        one_of(*KINDS),
    )
    class_: str = setting(
        "", "a dataset of your own, package.module:Name or path/to/file.py:Name: a torch Dataset, or one of sami_fast.data", NAMED
    )
    kwargs: dict[str, Any] = setting({}, "class: the arguments that it is made with; also one by one, data.kwargs.<name>=<value>")
    path: str = setting("", "the file or folder of the other kinds but disks, sprites, rooms and avatars: see docs/data.md")
    array_key: str = setting("", "array: which entry of an .npz holds the images; the only one, or 'images', when empty")
    range: str = setting(
        "auto",
        "floats of an array or a class: unit, [0, 1], or signed, [-1, 1]; auto is signed, with a warning where no value is below 0",
        one_of("auto", "unit", "signed"),
    )
    labels: str = setting(
        "",
        "folders: .csv or .parquet with a row for each file, whose columns are scored as factors and attributes; shards: which of their "
        "labels are, with commas between them, or all",
    )
    holdout_by: str = setting(
        "",
        "folders, shards: hold out whole groups: a column of data.labels or a label, such as a person's name, or folder, the folder a file "
        "is in",
    )
    holdout: float = setting(
        0.1, "share of the images, videos or groups kept for evaluation; disks, sprites, celeba have their own", number(0, 0.9)
    )
    image_size: int = setting(
        0,
        "height and width that images are cropped and resized to; 0: 16 for disks, 64 for folders and what else is drawn, or as they are",
        ("0, or 4 to 4096", lambda v: v == 0 or 4 <= v <= 4096),
        "pixels",
    )
    channels: int = setting(0, "3 for colour, 1 for grey; 0: 3 for rooms, avatars and folders, else as they are", number(0, 64))
    flip: bool = setting(False, "mirror training images left to right at random")
    max_bad: float = setting(0.01, "largest share of unreadable files that is skipped; more is an error", number(0, 1))
    decoder: str = setting("auto", "folders: DALI, or Pillow and PyAV; auto is DALI where it is installed", one_of("auto", "dali", "torch"))
    workers: int = setting(
        0,
        "folders: batches decoded at a time on each rank, 0: as many as there are CPU cores per rank; class: threads that read, 0: none",
        number(0, 256),
    )
    cache_dir: str = setting("", "where indices and pixels are kept; $XDG_CACHE_HOME/sami-fast or ~/.cache/sami-fast when empty")
    cache_gib: float = setting(
        4.0,
        "decoded images are kept on the disk if all need no more than this, 0 is never; class: most memory for an iterable's images",
        number(0),
        "GiB",
    )
    disks: DisksConfig = field(default_factory=DisksConfig)
    sprites: SpritesConfig = field(default_factory=SpritesConfig)
    rooms: RoomsConfig = field(default_factory=RoomsConfig)
    avatars: AvatarsConfig = field(default_factory=AvatarsConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    celeba: CelebAConfig = field(default_factory=CelebAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, unset in (("labels", ""), ("holdout_by", ""), ("range", "auto"), ("class_", ""), ("kwargs", {})):
            kinds = USED_BY[spelled(key)]
            if getattr(self, key) != unset and self.kind not in kinds:
                raise UserError(f"{self.key(key)}: has no effect with data.kind {self.kind}; it is for {', '.join(kinds)}")
        if self.kind == "class" and not self.class_:
            raise UserError("data.class: data.kind class needs it, package.module:Name or path/to/file.py:Name")
        if self.kind in GREY_OR_COLOUR and self.channels not in (0, 1, 3):
            raise UserError(f"data.channels: expected 3 or 1 with data.kind {self.kind}, found {self.channels}")
        if self.holdout_by not in ("", "folder") and not self.labels and self.kind not in SHARDS:
            raise UserError(f"data.holdout_by: expected folder, or a column of data.labels, which is empty; found {self.holdout_by}")


@dataclass(frozen=True)
class EncoderConfig(Section):
    section = "encoder"
    latent_size: int = setting(8, "Z, latent dimensions", number(1, 4096))
    channels: list[int] = setting([64, 64, 64], "width of each level; each halves the resolution", number(1, 8192))
    blocks: int = setting(0, "residual blocks per level", number(0, 16))
    attention: list[int] = setting([], "resolutions with self-attention", number(1), "pixels")
    groups: int = setting(4, "groups of the norms", number(1, 1024))
    style: str = setting(STYLES[0], "norms and activations; silu and bias_free_relu have no norms", one_of(*STYLES))
    init_std: float = setting(0.97, "posterior standard deviation at the start", number(0, 10, open_low=True))
    smooth: float = setting(0.0, "share of the kernels' variance at the start that is a blur, which sees through noise", number(0, 1))
    start: str = setting(
        "fresh",
        "denoiser: the way down and the middle of denoiser.pretrained with new heads, whatever else stands here but latent_size, init_std",
        one_of("fresh", "denoiser"),
    )
    class_: str = setting(
        "", "a network of your own in place of this package's, package.module:Name or path/to/file.py:Name: see docs/extending.md", NAMED
    )
    kwargs: dict[str, Any] = setting(
        {}, "class: its arguments; image_shape and latent_size are added where it has parameters of these names"
    )
    returns: str = setting(
        "mu_var", "class: what it returns, as two tensors or as one of both; a torch Distribution says it itself", one_of(*RETURNS)
    )
    takes: str = setting("x", "class: x, images alone, or x_t: images and their noise level t in [0, 1], 0 of clean ones", one_of(*TAKES))
    accelerate: bool = setting(False, "class: sami_fast.accelerate its layers")


@dataclass(frozen=True)
class DenoiserConfig(Section):
    """Also the shape of a beta-VAE's decoder, which is the denoiser's way up."""

    section = "denoiser"
    pretrained: str = setting(
        "", "use this one, whatever else stands here: a run folder, a saved model, a diffusers UNet2DModel with its scheduler, or a hub id"
    )
    channels: list[int] = setting([16, 32, 32, 32], "width of each resolution, full resolution first", number(1, 8192))
    blocks: int = setting(1, "residual blocks per resolution", number(1, 16))
    attention: list[int] = setting([], "resolutions with self-attention", number(1), "pixels")
    groups: int = setting(4, "groups of the norms", number(1, 1024))
    style: str = setting(STYLES[0], "norms and activations", one_of(*STYLES))
    embedding_size: int = setting(64, "width of the noise-level embedding, even", number(2, 8192))
    skip_logsnr: float = setting(
        NO_SKIP,
        "at levels noisier than this ln(alpha^2 / sigma^2) the noisy image itself is most of the estimated noise, and the network need not "
        f"reproduce it; {NO_SKIP:g}: at none",
        number(NO_SKIP, 30),
    )
    class_: str = setting(
        "", "a network of your own in place of this package's, package.module:Name or path/to/file.py:Name: see docs/extending.md", NAMED
    )
    kwargs: dict[str, Any] = setting({}, "class: its arguments; image_shape is added where it has a parameter of this name")
    time: str = setting(
        "unit",
        "class: what it is told of the noise level: t in [0, 1], a whole timestep, sigma_t, ln(alpha^2 / sigma^2), or, edm, "
        "sigma_t / alpha_t beside the image x_t / alpha_t",
        one_of(*TIMES),
    )
    predicts: str = setting("eps", "class: what it predicts: the noise, v = alpha eps - sigma x_0, or the clean image", one_of(*PREDICTS))
    timesteps: int = setting(1000, "class with time timestep: how many there are; 0 is the cleanest", number(2, 100_000))
    betas: str = setting("linear", "class with time timestep: which noise level each of them is", one_of(*BETAS))
    accelerate: bool = setting(False, "class: sami_fast.accelerate its layers")


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """`logsnr_min` is None, written `auto`, until the data have been seen (data/spectrum.py)."""

    section = "schedule"
    kind: str = setting(
        "uniform_logsnr", "noise levels over t; discrete: a pretrained denoiser's timesteps, none between", one_of(*SCHEDULE_KINDS)
    )
    logsnr_min: float | None = setting(
        -7.0, "noisiest level, ln(alpha^2 / sigma^2); auto: where the data's strongest component drowns in the noise", number(-30, 30)
    )
    logsnr_max: float = setting(5.0, "cleanest level, ln(alpha^2 / sigma^2)", number(-30, 30))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logsnr_min is not None and not self.logsnr_min < self.logsnr_max:
            raise UserError(f"schedule.logsnr_min: expected less than logsnr_max = {self.logsnr_max:g}, found {self.logsnr_min:g}")


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    section = "objective"
    weighting: str = setting("elbo", "weight of a noise level", one_of(*WEIGHTINGS))
    noise_levels: int = setting(1, "K, noisy copies of each image per step", number(1, 1024))
    time_power: float = setting(1.0, "a of the density a t^(a-1) of noise levels; above 1 favours high noise", number(0.1, 100))
    unconditional_weight: float = setting(0.0, "u, weight of the denoiser's own error without guidance", number(0))
    free_bits: float = setting(0.0, "KL per latent dimension that costs nothing", number(0), "nats")


@dataclass(frozen=True)
class KLWeightConfig(Section):
    section = "kl_weight"
    kind: str = setting("exponential", "course of beta", one_of("constant", "linear", "exponential", "controller", "auto"))
    start: float = setting(0.25, "beta at the first joint step; 1 is the bound", number(0))
    end: float = setting(0.08, "linear, exponential: beta at the end of its course; auto: beta of the validation loss", number(0))
    fraction: float = setting(0.8, "share of the joint steps that the course takes", number(0, 1, open_low=True))
    target: float = setting(0.0, "controller: KL to hold", number(0), "nats per image")
    gain: float = setting(0.002, "controller: change of ln beta per step at 100 % error", number(0, 1))
    low: float = setting(1e-3, "controller, auto: smallest beta, at most kl_weight.start", number(0, open_low=True))
    high: float = setting(1.0, "controller, auto: largest beta", number(0, open_low=True))
    search: float = setting(
        0.08,
        "auto: share of the joint steps in which beta halves, until a latent comes alive, and again where all have died",
        number(0, 1, open_low=True),
    )
    rebound: float = setting(2.0, "auto: beta right after the first latent came alive, over beta when it did", number(0.1, 100))
    fall: float = setting(0.25, "auto: share of the joint steps in which beta halves from then on", number(0, 1, open_low=True))
    patience: float = setting(
        0.0, "auto: how much of that fall is left out while the information grows fast enough to get there; 0: none", number(0, 1)
    )
    sharpest: float = setting(
        4.0, "auto: information of the most informative latent at which beta falls no further, and is held", number(0.1, 4.5), "nats"
    )
    settle: float = setting(0.0, "auto: share of the joint steps at the end over which beta falls no further", number(0, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "exponential" and not (self.start > 0 and self.end > 0):
            raise UserError("kl_weight.kind: exponential needs kl_weight.start and kl_weight.end above 0; use linear to reach 0")
        if self.kind == "controller" and not self.target > 0:
            raise UserError("kl_weight.target: expected above 0 nats with kl_weight.kind controller, found 0")
        if self.kind in ("controller", "auto") and not self.low <= self.start <= self.high:
            raise UserError(f"kl_weight.start: expected between kl_weight.low and kl_weight.high, found {self.start:g}")


@dataclass(frozen=True)
class OptimizerConfig(Section):
    section = "optimizer"
    kind: str = setting("adam", "update rule", one_of("adam", "adamw"))
    implementation: str = setting(
        "torch", "who computes it: torch (fused), DeepSpeed's fused kernel, or NVIDIA apex", one_of("torch", "deepspeed", "apex")
    )
    lr: float = setting(1e-3, "peak learning rate", number(0, open_low=True))
    encoder_lr: float = setting(0.0, "peak learning rate of the encoder; 0 means lr", number(0))
    betas: list[float] = setting([0.9, 0.99], "decay of the two moments", PAIR_OF_DECAYS)
    eps: float = setting(1e-8, "added to the second moment's root", number(0, open_low=True))
    weight_decay: float = setting(0.0, "decoupled for adamw, L2 for adam", number(0))
    warmup_steps: int = setting(100, "linear warm-up; the encoder's starts with its own training", number(0), "steps")
    final_fraction: float = setting(0.02, "learning rate at the end of the cosine, as a share of the peak", number(0, 1))
    clip: float = setting(12.0, "largest gradient norm of loss / dimensions over all parameters; 0 is off", number(0))
    ema_decay: float = setting(0.0, "decay per step of the averaged weights that are kept for use; 0 is off", number(0, 0.999999))


@dataclass(frozen=True)
class TrainConfig(Section):
    section = "train"
    steps: int = setting(3000, "optimiser steps; staged: those in which the encoder learns", number(1))
    minutes: float = setting(
        0.0, "time to train for: the steps of each stage are laid out for this machine's speed; 0: train.steps counts", number(0), "minutes"
    )
    batch_size: int = setting(64, "images per optimiser step over all ranks", number(1))
    mode: str = setting(
        "joint",
        "joint trains both networks, denoiser that one alone, frozen the encoder alone beside denoiser.pretrained, finetune that encoder "
        "and then both; staged: denoiser, then finetune beside it, in one command (of other methods joint)",
        one_of(*MODES),
    )
    denoiser_steps: int = setting(
        1500, "staged: steps of the denoiser alone, before; a finished one is used again by runs that need the same", number(1)
    )
    on_collapse: str = setting(
        "go_on",
        "what to do where a fifth of the encoder's steps have given no latent information: go on with a warning, stop, or restart the "
        "stage with a third of beta, three times at most",
        one_of("go_on", "stop", "restart"),
    )
    denoiser_warmup: float = setting(1 / 6, "joint: share of steps in which the denoiser learns alone, unguided", number(0, 0.99))
    bank_steps: int = setting(
        0,
        "frozen, finetune, staged: steps of the encoder alone whose noisy images are shown again and again, so that the denoiser sees them "
        "once; 2 bytes of memory per value; 0: all steps show new ones",
        number(0),
    )
    encoder_warmup: float = setting(0.5, "finetune, staged: share of steps in which the encoder learns alone; 1 is all", number(0, 1))
    turn: list[float] = setting(
        [],
        "shares of the encoder's steps after which the axes of its latents are turned to where pixels tell them apart; [] never",
        SHARES,
    )


@dataclass(frozen=True)
class EngineConfig(Section):
    section = "engine"
    kind: str = setting(
        "auto",
        "who carries out the steps: direct, one process by itself, or deepspeed; auto: direct where one process, zero_stage 0 and "
        "optimizer.implementation torch are all that is asked for",
        one_of("auto", "direct", "deepspeed"),
    )
    zero_stage: int = setting(0, "DeepSpeed ZeRO stage; 3 gives each network an engine of its own", STAGE)
    encoder_zero_stage: int = setting(2, "zero_stage 3: the encoder's own; 3 takes engine.score dual", STAGE)
    offload: str = setting(
        "none",
        "what lies in host memory: optimizer (zero_stage 1 to 3), or parameters too (3)",
        one_of("none", "optimizer", "parameters"),
    )
    checkpoint_activations: bool = setting(False, "compute the denoiser's forward again in backward instead of keeping its activations")
    compile: str = setting("none", "torch.compile: the denoiser, or the step around both networks with score dual", one_of(*COMPILE))
    capture: str = setting(
        "auto", "write a step's operators down and replay them, same results; auto: on CPUs and for cuda_graphs", one_of("auto", "off")
    )
    cuda_graphs: bool = setting(False, "replay the captured step, or what is compiled, as CUDA graphs; on a GPU")
    precision: str = setting("fp32", "of convolutions and matmuls; weights stay float32", one_of("fp32", "bf16"))
    tf32: bool = setting(False, "float32 convolutions and matmuls in TF32, 10 bits of mantissa for 23; on NVIDIA GPUs from A100 on")
    deterministic: bool = setting(True, "the same convolution algorithms every time; false takes the fastest of each; on a GPU")
    gradient_accumulation: int = setting(1, "micro-batches per optimiser step and rank", number(1))
    score: str = setting("auto", "how the encoder's score is differentiated; all give the same gradients", one_of(*SCORE_METHODS))
    store_eps: bool = setting(True, "keep the noise from noising to loss; false draws it twice: 4 bytes per noisy pixel less")
    threads: int = setting(0, "CPU threads per rank; 0: its share of the machine's cores, or fewer for small steps", number(0, 1024))
    patience: float = setting(180.0, "how long ranks wait for one that does not come, or gives no sign of life", number(1.0), "s")


@dataclass(frozen=True)
class LogConfig(Section):
    section = "log"
    every: int = setting(50, "steps between two lines of metrics.jsonl", number(1))
    tensorboard: bool = setting(True, "write tensorboard/")
    csv: bool = setting(False, "write csv/")
    wandb: bool = setting(False, "send to Weights & Biases (installed and logged in)")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    section = "checkpoint"
    every: int = setting(500, "steps between two checkpoints", number(1))
    keep_last: int = setting(2, "newest checkpoints to keep", number(1))
    keep_best: bool = setting(True, "also keep the checkpoint with the lowest validation loss; model/ is always the last")
    validation_images: int = setting(256, "held-out images of the validation loss", number(1))


@dataclass(frozen=True)
class ReportConfig(Section):
    section = "report"
    images: int = setting(6000, "fresh or held-out images that scores are computed from", number(16))
    sample_steps: int = setting(50, "denoising steps of the report's pictures", number(1, 10000))


@dataclass(frozen=True)
class BetaVAEConfig(Section):
    section = "beta_vae"
    decoder_std: float = setting(1.0, "standard deviation of the decoder's Gaussian, on images in [-1, 1]", number(0, open_low=True))


@dataclass(frozen=True)
class SamiConfig(Section):
    """`logsnr_max` is None, written `auto`, until the data have been seen (data/spectrum.py)."""

    section = "sami"
    logsnr_max: float | None = setting(
        30.0,
        "cleanest level at which latents guide, and learn; auto: where as many of the data's strongest components as there are latents "
        "stand out from the noise",
        number(-30, 30),
    )


@dataclass(frozen=True)
class DiffAEConfig(Section):
    section = "diffae"
    stochastic: bool = setting(False, "draw z from q(z|x) and charge its KL; otherwise z is the encoder's mean")


@dataclass(frozen=True)
class Config(Section):
    name: str = setting(
        "run", "the run's folder is <runs_dir>/<name>", ("a plain folder name", lambda v: bool(re.fullmatch(r"[\w][\w.-]*", v)))
    )
    runs_dir: str = setting("runs", "where run folders lie")
    seed: int = setting(0, "key of every random number", number(0, 2**63 - 1))
    method: str = setting("sami", "what is trained; beta_vae and diffae are baselines of the same networks", one_of(*CAPABILITIES))
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    kl_weight: KLWeightConfig = field(default_factory=KLWeightConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sami: SamiConfig = field(default_factory=SamiConfig)
    beta_vae: BetaVAEConfig = field(default_factory=BetaVAEConfig)
    diffae: DiffAEConfig = field(default_factory=DiffAEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_networks()
        self._check_engine()
        if self.data.kind in USED_BY["path"] and not self.data.path:
            what = {
                "array": "of an .npy or .npz file",
                "image_folder": "of a folder of images",
                "video_folder": "of a folder of videos",
                "webdataset": "of a folder of .tar shards, or a pattern",
                "parquet": "of a folder of .parquet files, or a pattern",
            }
            raise UserError(f"data.path: data.kind {self.data.kind} needs the path {what.get(self.data.kind, 'of the published data')}")
        if self.denoiser.embedding_size % 2:
            raise UserError(f"denoiser.embedding_size: expected an even number, found {self.denoiser.embedding_size}")
        for owner in (self.encoder, self.denoiser):
            if not owner.channels:
                raise UserError(f"{owner.key('channels')}: expected at least one level, found none")
        if self.log.wandb and find_spec("wandb") is None:
            raise UserError("log.wandb: asked for, but wandb is not installed; `pip install wandb`, or leave it off")

    def _check_networks(self) -> None:
        mode, pretrained = self.mode, self.denoiser.pretrained
        if mode not in self.capabilities.modes:
            raise UserError(f"train.mode: expected joint with method {self.method}, found {mode}")
        if (mode in ("frozen", "finetune")) != bool(pretrained):
            raise UserError(f"denoiser.pretrained: train.mode frozen and finetune need it, and train.mode {mode} has no use for it")
        guided, noisiest = self.sami.logsnr_max, self.schedule.logsnr_min
        if guided is not None and noisiest is not None and not guided > noisiest:
            raise UserError(f"sami.logsnr_max: expected more than schedule.logsnr_min = {noisiest:g}, found {guided:g}")
        if self.encoder.start == "denoiser" and not pretrained and mode != "staged":
            raise UserError("encoder.start: denoiser needs denoiser.pretrained, or train.mode staged")
        if self.schedule.kind == "discrete" and not pretrained and not (self.denoiser.class_ and self.denoiser.time == "timestep"):
            raise UserError("schedule.kind: discrete needs denoiser.pretrained, or a denoiser.class with denoiser.time timestep")
        if not self.own_encoder and self.engine.score not in ("auto", "reverse"):
            other = "encoder.class" if self.encoder.class_ else "encoder.start denoiser"
            raise UserError(f"engine.score: expected auto or reverse with {other}, found {self.engine.score}")
        for owner in (self.encoder, self.denoiser):
            if owner.class_ and self.method != "sami":
                raise UserError(f"{owner.key('class')}: expected method sami, found {self.method}, whose networks are this package's")
            if owner.class_ and self.encoder.start == "denoiser":
                raise UserError(f"encoder.start: expected fresh with {owner.key('class')}, found denoiser")

    def _check_engine(self) -> None:
        engine, can = self.engine, self.capabilities
        if engine.kind == "direct" and self.splits:
            raise UserError(f"engine.kind: direct needs engine.zero_stage 0 and optimizer.implementation torch, found {self.splits}")
        if engine.zero_stage > can.max_zero_stage:
            raise UserError(
                f"engine.zero_stage: expected at most {can.max_zero_stage} with method {self.method}, found {engine.zero_stage}"
            )
        if engine.tf32 and engine.precision == "bf16":
            raise UserError("engine.tf32: true is for engine.precision fp32, found bf16, whose convolutions and matmuls are 16 bits wide")
        dual = engine.score in ("auto", "dual") and self.own_encoder  # can be the way to differentiate the score
        if engine.zero_stage == engine.encoder_zero_stage == 3 and not dual:
            raise UserError("engine.encoder_zero_stage: 3 needs engine.score auto or dual, encoder.start fresh and no encoder.class")
        if engine.checkpoint_activations and not can.recompute:
            raise UserError(f"engine.checkpoint_activations: expected false with method {self.method}, which has no denoiser")
        if engine.checkpoint_activations and self.denoiser.class_:
            raise UserError("engine.checkpoint_activations: expected false with denoiser.class, which has to recompute its own")
        lowest = {"none": 0, "optimizer": 1, "parameters": 3}[engine.offload]
        if engine.zero_stage < lowest:
            raise UserError(f"engine.offload: {engine.offload} needs engine.zero_stage of at least {lowest}, found {engine.zero_stage}")
        if engine.compile != "none" and not can.compile:
            raise UserError(f"engine.compile: expected none with method {self.method}, found {engine.compile}")
        if engine.compile != "none" and (engine.zero_stage == 3 or engine.checkpoint_activations):
            other = "zero_stage 3" if engine.zero_stage == 3 else "checkpoint_activations"
            raise UserError(f"engine.compile: expected none with engine.{other}, found {engine.compile}")
        if engine.compile == "step" and self.train.bank_steps:
            raise UserError("engine.compile: step computes the denoiser anew, expected none or denoiser with train.bank_steps")
        if engine.compile == "step":
            if not (dual and engine.store_eps):
                raise UserError("engine.compile: step needs engine.score auto or dual, store_eps, encoder.start fresh and no encoder.class")
        elif engine.cuda_graphs and engine.compile == "none":
            if engine.capture == "off":
                raise UserError("engine.cuda_graphs: needs engine.capture auto, or engine.compile denoiser or step")
            if engine.zero_stage == 3 or engine.checkpoint_activations:
                other = "zero_stage 3" if engine.zero_stage == 3 else "checkpoint_activations"
                raise UserError(f"engine.cuda_graphs: expected false with engine.{other}")

    @property
    def own_encoder(self) -> bool:
        """Whether the encoder is one of `models.Encoder`, whose layers know ways of their own to differentiate the score."""
        return self.encoder.start == "fresh" and not self.encoder.class_

    @property
    def splits(self) -> str:
        """What of this config only DeepSpeed can do, in words; empty where there is nothing."""
        if self.engine.zero_stage:
            return f"zero_stage {self.engine.zero_stage}"
        return "" if self.optimizer.implementation == "torch" else f"implementation {self.optimizer.implementation}"

    def direct(self, world_size: int) -> bool:
        """Whether a process carries out the steps by itself, without DeepSpeed.

        Raises:
            UserError: it is asked to, beside others.
        """
        if self.engine.kind == "direct" and world_size > 1:
            raise UserError(f"engine.kind: direct is for one process, found {world_size}; use auto")
        return self.engine.kind != "deepspeed" and world_size == 1 and not self.splits

    @property
    def capabilities(self) -> Capabilities:
        """What the config's method can be combined with."""
        return CAPABILITIES[self.method]

    @property
    def mode(self) -> str:
        """train.mode, but for methods without a stage of their own for the denoiser, which take staged configs jointly."""
        return "joint" if self.train.mode == "staged" and "staged" not in self.capabilities.modes else self.train.mode

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def first_joint_step(self) -> int:
        """The step from which the encoder learns: from the first, unless the denoiser has to learn to denoise before it.

        The number of steps where it never does. A staged run counts its steps from the first in which the encoder learns."""
        if self.mode == "denoiser":
            return self.train.steps
        if not self.capabilities.warmup or self.mode != "joint":
            return 0
        return min(round(self.train.denoiser_warmup * self.train.steps), self.train.steps - 1)

    @property
    def first_denoiser_step(self) -> int:
        """The step from which the network beside the encoder learns; the number of steps where it never does."""
        return round(self.encoder_share * self.train.steps)

    @property
    def encoder_share(self) -> float:
        """Share of the steps in which the encoder learns alone."""
        warmup = self.train.encoder_warmup
        return {"frozen": 1.0, "finetune": warmup, "staged": warmup}.get(self.mode, 0.0)

    @property
    def first_network(self) -> str:
        """The network that learns from the first step on."""
        return "denoiser" if self.phase(0) == "denoiser" or self.mode == "joint" else "encoder"

    def shown(self, step: int) -> int:
        """The step whose images and noise a step shows: its own, or while outputs of a frozen denoiser are at hand an earlier one's."""
        return step % self.train.bank_steps if self.train.bank_steps and self.phase(step) == "encoder" else step

    def phase(self, step: int) -> str:
        """Who learns in a step: "denoiser", "encoder" or "both". The network beside a baseline's encoder counts as a denoiser."""
        if step < self.first_joint_step:
            return "denoiser"
        return "encoder" if step < self.first_denoiser_step else "both"


RENAMED = {"train.denoiser_from": "denoiser.pretrained"}  # in files that earlier versions wrote
PATHS = {"runs_dir", "data.path", "data.labels", "data.cache_dir", "denoiser.pretrained"}  # `~` at the beginning is the home folder


def builtin_configs() -> Path:
    """The folder of the configs that come with the package."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def _find(path: str) -> Path:
    """The file as given, else the config of that name that comes with the package."""
    given = Path(path)
    if given.is_file():
        return given
    builtin = builtin_configs() / f"{given.stem}.yaml"
    if builtin.is_file() and given.suffix in ("", ".yaml") and len(given.parts) <= 2 and not given.is_absolute():
        return builtin
    names = ", ".join(sorted(p.stem for p in builtin_configs().glob("*.yaml")))
    raise UserError(f"--config: {absent(given, 'file')}; configs that come with sami-fast: {names}")


def setting_keys(cls: type[Section] = Config, prefix: str = "") -> dict[str, Field[Any]]:
    """Every dotted key with its dataclass field, in order."""
    keys: dict[str, Field[Any]] = {}
    for item in fields(cls):
        if _is_section(item.type):
            keys |= setting_keys(item.type, f"{prefix}{item.name}.")
        else:
            keys[prefix + spelled(item.name)] = item
    return keys


def _is_free(item: Field[Any]) -> bool:
    """Whether a setting is a mapping of any names, each of which is a setting of its own: `encoder.kwargs.width`."""
    return get_origin(item.type) is dict


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def load_config(path: str | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides.

    Text settings are taken as they are written, in the file and after "="; other values are numbers, truth values and lists in brackets.
    Nothing is interpolated. A leading `~` in a path is the home folder.

    A file may hold settings that its method or kind of data has no use for: methods are compared by one file, and that of a run holds
    every setting. An override may not: it asks for something, and would be ignored.

    Args:
        path: A YAML file, or the name of a config that comes with the package; None for the defaults alone.
        overrides: Strings like "train.steps=50", or settings by dotted key or by section: {"train.steps": 50, "data": {"flip": True}}.
    Raises:
        UserError: unknown key, wrong type, value out of range, impossible combination, unreadable file.
    """
    settings = {} if path is None else _read(_find(expanded(path)))
    asked = _checked(_as_text(overrides), "settings") if isinstance(overrides, Mapping) else {}
    for override in () if isinstance(overrides, Mapping) else overrides:
        asked |= _override(override)
    for some in (settings, asked):
        if some.get("data.class") and "data.kind" not in some:
            some["data.kind"] = "class"
    settings |= asked
    for key in PATHS & settings.keys():
        settings[key] = expanded(settings[key])
    for key in ("data.path", "data.labels", "denoiser.pretrained"):  # a saved config must mean the same from any folder
        if settings.get(key) and Path(settings[key]).exists():
            settings[key] = str(Path(settings[key]).resolve())
    for key in ("data.class", "encoder.class", "denoiser.class"):
        if settings.get(key):
            settings[key] = absolute(settings[key])
    config = _build(Config, settings)
    _refuse_unused(config, asked)
    return config


def steps_beside_minutes(path: str | None) -> str:
    """A sentence for who wrote a config that asks for minutes and for steps, of which the steps do not count; empty of others."""
    settings = {} if path is None else _read(_find(expanded(path)))
    named = [key for key in ("train.steps", "train.denoiser_steps") if key in settings]
    everything = setting_keys().keys() - _free_keys() <= settings.keys()  # in a run's own config
    if not named or not settings.get("train.minutes") or everything:
        return ""
    verb = "has" if len(named) == 1 else "have"
    return f"{path}: train.minutes is {settings['train.minutes']:g}, so {' and '.join(named)} beside it {verb} no effect"


def _build(cls: type[Section], settings: Mapping[str, Any], prefix: str = "") -> Any:
    values = {}
    for item in fields(cls):
        key = prefix + spelled(item.name)
        if _is_section(item.type):
            values[item.name] = _build(item.type, settings, f"{key}.")
        elif _is_free(item):
            values[item.name] = {name.removeprefix(f"{key}."): value for name, value in settings.items() if name.startswith(f"{key}.")}
        elif key in settings:
            values[item.name] = settings[key]
    return cls(**values)


class _Quoted(str):
    """Text that stood in quotes: it is text even where it looks like a number."""


class _Loader(yaml.SafeLoader):
    """Every scalar stays the text it is in the file; what it means depends on the setting. A tag and a key that stands twice are errors."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"found duplicate key {key.value}", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return (_Quoted if node.style else str)(self.construct_scalar(node))


_Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # of all that YAML reads in text, the merge key <<
_Loader.yaml_constructors = {
    kind: yaml.SafeLoader.yaml_constructors[kind] for kind in (*(f"tag:yaml.org,2002:{name}" for name in ("seq", "map")), None)
} | {"tag:yaml.org,2002:str": _Loader.construct_text}


def _parsed(text: str) -> Any:
    """The text, list or mapping that YAML text holds; text where it holds nothing.

    Raises:
        ValueError: it is no YAML; says where and why.
    """
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else problem) from None
    except RecursionError:
        raise ValueError("too many brackets within brackets") from None
    return "" if found is None else found


def _read(file: Path) -> dict[str, Any]:
    try:
        values = _parsed(file.read_text("utf-8-sig")) or {}
    except OSError as error:
        raise UserError(f"--config: cannot read {file}: {error.strerror}") from None
    except ValueError as error:  # also of a file that is not UTF-8
        raise UserError(f"--config: {file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config: {file} should hold `key: value` lines, found {_shown(values)}")
    return _checked(values, str(file))


def _as_text(value: Any, nothing: str = AUTO) -> Any:
    """Values of Python as the text that files hold."""
    if isinstance(value, Mapping):
        return {str(name): _as_text(inner, "null" if "kwargs" in str(name) else nothing) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(inner, nothing) for inner in value]
    if value is None or isinstance(value, bool):
        return {None: nothing, True: "true", False: "false"}[value]
    return _Quoted(value) if isinstance(value, str | os.PathLike) else str(value)


def _override(override: str) -> dict[str, Any]:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override}: expected key=value, for example train.steps=50")
    item = setting_keys().get(key)
    values: Any = value
    if item is None or item.type is not str:
        try:
            values = _parsed(value)
        except ValueError as error:
            hint = "; a list with spaces needs quotes around it in a shell" if value.startswith("[") else ""
            raise UserError(f"{key}: {_shown(value)} is not a value that YAML can read ({error}){hint}") from None
    return _checked({key: values}, "command line")


def _checked(values: Mapping[str, Any], origin: str, prefix: str = "") -> dict[str, Any]:
    """Nested values as {dotted key: value in the type of its setting}."""
    keys = setting_keys()
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = RENAMED.get(f"{prefix}{name}", f"{prefix}{name}")
        free = key if key in keys and _is_free(keys[key]) else next((owner for owner in _free_keys() if key.startswith(f"{owner}.")), "")
        if free:
            new = _free_values({key.removeprefix(f"{free}."): value} if key != free else value, free, origin)
        elif key in keys:
            new = {key: _typed(keys[key].type, value, key, origin)}
        elif not any(known.startswith(f"{key}.") for known in keys):
            raise _unknown(key, origin)
        elif isinstance(value, Mapping):
            new = _checked(value, origin, f"{key}.")
        else:
            raise UserError(f"{key}: expected settings below it, like {key}.<setting>, found {_shown(value)} ({origin})")
        both = found.keys() & new.keys()  # once in its section and once by its dotted key, or by the name it once had
        if twice := {one for one in both if one not in RENAMED.values() or found[one] != new[one]}:
            raise UserError(f"{min(twice)}: expected once, found twice ({origin})")
        found |= new
    return found


def _free_keys() -> list[str]:
    return [key for key, item in setting_keys().items() if _is_free(item)]


def _free_values(values: Any, key: str, origin: str) -> dict[str, Any]:
    """The arguments of somebody else's class as {key.name: value}."""
    if not isinstance(values, Mapping):
        raise UserError(f"{key}: expected arguments by name, such as {key}.width=64, found {_shown(values)} ({origin})")
    for name in values:
        if not (isinstance(name, str) and name.isidentifier()):
            raise UserError(f"{key}: expected names of arguments, found {str(name)[:60]!r} ({origin})")
    return {f"{key}.{name}": _free_value(value) for name, value in values.items()}


WORDS = {"true": True, "false": False, "null": None}


def _free_value(value: Any) -> Any:
    """A value whose type no setting says: numbers, true, false and null as in JSON, other text as it is, in lists and mappings too."""
    if isinstance(value, Mapping):
        return {str(name): _free_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_free_value(inner) for inner in value]
    if isinstance(value, _Quoted) or not isinstance(value, str):
        return str(value)
    if value in WORDS:
        return WORDS[value]
    if re.fullmatch(r"[+-]?(0|[1-9]\d*)", value):
        return int(value)
    return (
        float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value) and not re.match(r"[+-]?0\d", value) else str(value)
    )


# Settings of our own networks, and of a network that is a class by name.
OWN_ENCODER = ("channels", "blocks", "attention", "groups", "style", "smooth")
OWN_DENOISER = ("channels", "blocks", "attention", "groups", "style", "embedding_size", "skip_logsnr")
NAMED_ENCODER = ("kwargs", "returns", "takes", "accelerate")
NAMED_DENOISER = ("kwargs", "time", "predicts", "timesteps", "betas", "accelerate")

# What an override needs to have a use: keys, the need in words, and whether a config has it.
NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Config], bool]], ...] = (
    (("train.steps", "train.denoiser_steps"), "train.minutes=0: steps are laid out for the minutes", lambda c: not c.train.minutes),
    (("train.denoiser_steps",), "train.mode staged", lambda c: c.mode == "staged"),
    (("train.denoiser_warmup",), "train.mode joint with method sami", lambda c: c.mode == "joint" and c.capabilities.warmup),
    (
        ("train.bank_steps", "train.encoder_warmup"),
        "train.mode frozen, finetune or staged",
        lambda c: c.mode in ("frozen", "finetune", "staged"),
    ),
    (
        ("engine.score", "objective.unconditional_weight", "objective.free_bits", "sami.logsnr_max"),
        "method sami",
        lambda c: c.method == "sami",
    ),
    (("train.turn",), "method sami and an encoder of this package", lambda c: c.method == "sami" and not c.encoder.class_),
    (("train.turn",), "a mode in which an encoder learns", lambda c: c.mode != "denoiser"),
    (
        (
            "objective.weighting",
            "objective.noise_levels",
            "objective.time_power",
            "engine.store_eps",
            "denoiser.embedding_size",
            "denoiser.skip_logsnr",
        ),
        "a method with noise, sami or diffae",
        lambda c: c.method != "beta_vae",
    ),
    (("beta_vae.decoder_std",), "method beta_vae", lambda c: c.method == "beta_vae"),
    (("diffae.stochastic",), "method diffae", lambda c: c.method == "diffae"),
    (("kl_weight",), "a mode in which an encoder learns", lambda c: c.mode != "denoiser"),
    (("kl_weight",), "diffae.stochastic=true", lambda c: c.method != "diffae" or c.diffae.stochastic),
    (("kl_weight.end",), "kl_weight.kind linear, exponential or auto", lambda c: c.kl_weight.kind in ("linear", "exponential", "auto")),
    (("kl_weight.fraction",), "kl_weight.kind linear or exponential", lambda c: c.kl_weight.kind in ("linear", "exponential")),
    (("kl_weight.target", "kl_weight.gain"), "kl_weight.kind controller", lambda c: c.kl_weight.kind == "controller"),
    (("kl_weight.low", "kl_weight.high"), "kl_weight.kind controller or auto", lambda c: c.kl_weight.kind in ("controller", "auto")),
    (
        ("kl_weight.search", "kl_weight.rebound", "kl_weight.fall", "kl_weight.patience", "kl_weight.sharpest", "kl_weight.settle"),
        "kl_weight.kind auto",
        lambda c: c.kl_weight.kind == "auto",
    ),
    (
        tuple(f"denoiser.{name}" for name in (*OWN_DENOISER, *NAMED_DENOISER)),
        "an empty denoiser.pretrained, which has its own",
        lambda c: not c.denoiser.pretrained,
    ),
    (
        tuple(f"encoder.{name}" for name in OWN_ENCODER),
        "encoder.start fresh",
        lambda c: c.encoder.start == "fresh",
    ),
    (
        tuple(f"encoder.{name}" for name in (*OWN_ENCODER, "init_std")),
        "an empty encoder.class, whose network takes encoder.kwargs",
        lambda c: not c.encoder.class_,
    ),
    (
        tuple(f"denoiser.{name}" for name in OWN_DENOISER),
        "an empty denoiser.class, whose network takes denoiser.kwargs",
        lambda c: not c.denoiser.class_,
    ),
    (tuple(f"encoder.{name}" for name in NAMED_ENCODER), "encoder.class", lambda c: bool(c.encoder.class_)),
    (tuple(f"denoiser.{name}" for name in NAMED_DENOISER), "denoiser.class", lambda c: bool(c.denoiser.class_)),
    (("denoiser.timesteps", "denoiser.betas"), "denoiser.time timestep", lambda c: c.denoiser.time == "timestep"),
    (("engine.encoder_zero_stage",), "engine.zero_stage 3", lambda c: c.engine.zero_stage == 3),
)


def _refuse_unused(config: Config, asked: Mapping[str, Any]) -> None:
    free = _free_keys()
    asked_for = dict.fromkeys(next((owner for owner in free if key.startswith(f"{owner}.")), key) for key in asked)
    now: Any = settings_of(config)
    unset: Any = settings_of(Config())
    for key in asked_for:
        if reduce(getitem, key.split("."), now) == reduce(getitem, key.split("."), unset):
            continue
        inside = key.removeprefix("data.")
        kinds = next((USED_BY[place] for place in (inside, inside.partition(".")[0]) if inside != key and place in USED_BY), KINDS)
        if config.data.kind not in kinds:
            raise UserError(f"{key}: has no effect with data.kind {config.data.kind}; it is for {', '.join(kinds)}")
        for keys, need, has in NEEDS:
            if (key in keys or key.partition(".")[0] in keys) and not has(config):
                raise UserError(f"{key}: has no effect here, it needs {need}")


def _unknown(key: str, origin: str) -> UserError:
    """What to say of a key that is none, with the settings that may have been meant: of the same name in other sections, else similar."""
    keys, name = setting_keys(), key.rpartition(".")[2]
    meant = [known for known in keys if known.rpartition(".")[2] == name]
    meant = difflib.get_close_matches(key, meant, 4, 0.0) or difflib.get_close_matches(
        key, [*keys, *(item.name for item in fields(Config))], 1, 0.5
    )
    return UserError(f"{key}: no such setting ({origin})" + (f"; did you mean {' or '.join(meant)}?" if meant else ""))


TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _text(text: str) -> str:
    if "\0" in text:  # which no file name can hold
        raise ValueError
    return str(text)


# By the type of a setting: how its text is read, and what is expected. 010 is refused: it is ten to some and eight to others.
READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: TRUTH[text.lower()], "true or false"),
    int: (lambda text: int(text, 0), "a whole number"),
    float: (float, "a number"),
    str: (_text, "text"),
}


def _typed(kind: Any, value: Any, key: str, origin: str) -> Any:
    """A value in the type of its setting: bool, int, float, str, a list of one of them, or None for `auto` where the setting has that."""
    if isinstance(kind, UnionType):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
        if value == AUTO:
            return None
    if inner := get_args(kind):
        if not isinstance(value, list):
            example = "[a,b]" if inner[0] is str else "[1,2]"
            raise UserError(f"{key}: expected a list in brackets, such as {example}, found {_shown(value)} ({origin})")
        return [_typed(inner[0], one, f"{key}[{place}]", origin) for place, one in enumerate(value)]
    read, expected = READERS[kind]
    if isinstance(value, str):
        with suppress(ValueError, KeyError):
            return read(value)
    raise UserError(f"{key}: expected {expected}, found {_shown(value)} ({origin})")


def _shown(value: Any) -> str:
    """A value in a message; one that refers to itself, or is very long, has to stay short."""
    if not isinstance(value, str):
        return "a list" if isinstance(value, list) else "settings below it"
    return repr(value if len(value) <= 60 else f"{value[:57]}...")


def to_yaml(config: Config) -> str:
    """The whole resolved config as YAML, which `load_config` reads back."""
    return yaml.dump(_with_auto(settings_of(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes text that could be read as something else in quotes."""


_Dumper.add_representer(_Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"'))


def _with_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _in_quotes(value) if key == "kwargs" else _with_auto(value) if isinstance(value, dict) else AUTO if value is None else value
        for key, value in settings.items()
    }


def _in_quotes(value: Any) -> Any:
    """A free value such that `_free_value` reads it back."""
    if isinstance(value, dict):
        return {name: _in_quotes(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_in_quotes(inner) for inner in value]
    return _Quoted(value) if isinstance(value, str) else value


def settings_of(config: Section) -> dict[str, Any]:
    """A section, or the whole config, as nested plain values under the names that files give them."""
    return {
        spelled(item.name): settings_of(value) if isinstance(value := getattr(config, item.name), Section) else copy.deepcopy(value)
        for item in fields(config)
    }


def settings_table() -> str:
    """Every setting with default, meaning and unit, one per line."""
    lines = []
    for key, item in setting_keys().items():
        default = item.default_factory() if callable(item.default_factory) else AUTO if item.default is None else item.default
        expected = "" if item.metadata["check"] is ANYTHING else f" ({item.metadata['check'][0]})"
        unit = f", in {item.metadata['unit']}" if item.metadata["unit"] else ""
        lines.append(f"{key}={default}\n    {item.metadata['help']}{unit}{expected}")
    return "\n".join(lines)


def deepspeed_dicts(config: Config, world_size: int) -> dict[str, dict[str, Any]]:
    """What DeepSpeed is given for each engine: one around both networks, or at ZeRO stage 3 one around each.

    Precision is autocast inside the step, so the engines themselves hold float32 weights.

    Raises:
        UserError: as `micro_batch`.
    """
    engine = config.engine
    shared = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": engine.gradient_accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    if engine.zero_stage < 3:
        return {"both": shared | {"zero_optimization": _zero(engine, engine.zero_stage)}}
    return {
        "encoder": shared | {"zero_optimization": _zero(engine, engine.encoder_zero_stage)},
        "denoiser": shared | {"zero_optimization": _zero(engine, 3)},
    }


def micro_batch(config: Config, world_size: int) -> int:
    """Images of one micro-batch on one rank.

    Raises:
        UserError: the batch does not split evenly over ranks and micro-batches.
    """
    pieces = world_size * config.engine.gradient_accumulation
    if config.train.batch_size % pieces:
        raise UserError(
            f"train.batch_size: expected a multiple of {pieces} ({world_size} ranks x engine.gradient_accumulation "
            f"{config.engine.gradient_accumulation}), found {config.train.batch_size}"
        )
    return config.train.batch_size // pieces


def bucket_elements(trained: int) -> int:
    """Elements of the buffer in which DeepSpeed reduces gradients: all of them, to an even number, and at most its own default."""
    return min(500_000_000, trained + trained % 2)


def _zero(engine: EngineConfig, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if engine.offload != "none" and stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "parameters" and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    return zero
