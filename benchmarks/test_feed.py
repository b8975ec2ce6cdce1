"""The feed of images and videos against torch's DataLoader with Pillow and PyAV on the same files; then what a step waits for data.

The files are encoded here from photographs that scikit-learn ships: crops of them, and clips of a window that wanders over one.
Clocks start when WARM batches have arrived, so that neither the start of processes nor of pipelines counts; nothing is read from
kept pixels unless a row says so.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as MapDataset

from sami_fast.config import DataConfig, load_config
from sami_fast.data import Dataset, Feed, ImageFolder, VideoFolder, open_dataset
from sami_fast.data.pack import Packing, pack
from sami_fast.engine.threads import set_threads
from sami_fast.methods.build import build_model
from sami_fast.step import Draw
from sami_fast.train import TrainingModule

from .measure import Contestant

pytest.importorskip("nvidia.dali", reason="needs DALI: pip install 'sami-fast[feed]'")
av = pytest.importorskip("av", reason="needs PyAV: pip install 'sami-fast[feed]'")

CPU = torch.device("cpu")
SIZE, BATCH, WORKERS = 64, 64, 2
IMAGES = {"JPEG": {"quality": 90}, "PNG": {}}
KNOWN_TO_DALI = ("vp9", "mjpeg")  # on a CPU
CODECS = ("vp9", "h264")
NUM_IMAGES, WARM, BATCHES = 512, 4, 8  # BATCHES are timed in a round
CLIPS, FRAMES, HEIGHT, WIDTH = 4, 240, 240, 320  # of each codec
TARGETS = {"images": 2.0, "dali": 2.0, "pyav": 1.0}  # by who can decode it


@cache
def photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return [np.asarray(image) for image in load_sample_images().images]  # 427 x 640 x 3


@pytest.fixture(scope="module", params=IMAGES)
def image_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Crops of 178 x 218 pixels, the size of CelebA's aligned images."""
    folder, random = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    for n in range(NUM_IMAGES):
        photograph = photographs()[n % 2]
        top, left = random.integers(0, photograph.shape[0] - 218), random.integers(0, photograph.shape[1] - 178)
        crop = Image.fromarray(photograph[top : top + 218, left : left + 178])
        crop.save(folder / f"{n:04d}.{request.param.lower()}", **IMAGES[request.param])
    return request.param, folder


@pytest.fixture(scope="module", params=CODECS)
def video_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    from .write_video import available_codecs

    if request.param not in available_codecs():
        pytest.skip(f"this PyAV has no encoder for {request.param}")
    folder, random = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    room = np.array(photographs()[0].shape[:2]) - (HEIGHT, WIDTH)
    for n in range(CLIPS):
        write_wandering(folder / f"{n}.mkv", request.param, random.uniform(0, 1, (2, 2)) * room)
    return request.param, folder


def write_wandering(file: Path, codec: str, ends: Any) -> None:
    """A clip of a window that wanders over a photograph between two corners."""
    from .write_video import write_video

    corners = np.linspace(*ends, FRAMES).astype(int)
    frames = np.stack([photographs()[0][top : top + HEIGHT, left : left + WIDTH] for top, left in corners])
    write_video(file, frames, codec=codec, keyframe_interval=60)


# Rivals


def centre(height: int, width: int) -> tuple[int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


class PillowImages(MapDataset):
    """What a folder of images is usually read with."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files) * 100

    def __getitem__(self, n: int) -> Tensor:
        with Image.open(self.files[n % len(self.files)]) as image:
            top, left, side = centre(image.height, image.width)
            small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


class PyAVFrames(IterableDataset):
    """Every frame of the videos in turn, decoded in order: the fast way, without a random access for each frame."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        while True:
            for file in self.files[worker.id :: worker.num_workers]:
                with av.open(str(file)) as container:
                    for frame in container.decode(video=0):
                        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                        top, left, side = centre(frame.height, frame.width)
                        square = pixels[top : top + side, left : left + side].permute(2, 0, 1)[None]
                        yield interpolate(square, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0].float() / 127.5 - 1


class PyAVRandomFrames(MapDataset):
    """A random frame at a time, each by a seek and the decoding from the key frame before it: shuffled as training wants it."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files) * FRAMES * 100

    def __getitem__(self, n: int) -> Tensor:
        file, number = self.files[n // FRAMES % len(self.files)], n % FRAMES
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            container.seek(int(number / float(stream.average_rate * stream.time_base)), stream=stream)
            for frame in container.decode(stream):
                if round(float(frame.pts * stream.time_base * stream.average_rate)) >= number:
                    break
            small = frame.to_image().resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


# Both sides, ready: WARM batches have come. A call takes as many more as it is told.


def loading(dataset: Any, batches: int = BATCHES, warm: int = WARM) -> Callable[[], Callable[[], None]]:
    def start() -> Callable[[], None]:
        shuffled = not isinstance(dataset, IterableDataset)
        batches_of = iter(DataLoader(dataset, BATCH, shuffle=shuffled, num_workers=WORKERS))
        for _ in range(warm):
            next(batches_of)

        def run() -> None:
            for _ in range(batches):
                next(batches_of)

        return run

    return start


def feeding(make: Callable[[], Any], batches: int = BATCHES) -> Callable[[], Callable[[], None]]:
    def start() -> Callable[[], None]:
        feed = Feed(make(), BATCH, 1, 0, 1, 0, CPU)  # a new dataset: no frame is left from the round before
        for step in range(WARM):
            feed.micro_batch(step, 0)

        def run() -> None:
            for step in range(WARM, WARM + batches):
                feed.micro_batch(step, 0)
            feed.close()

        return run

    return start


def contestant(name: str, start: Callable[[], Callable[[], None]]) -> Contestant:
    return Contestant(name, start, fresh=True)


def described(what: str, batches: int = BATCHES) -> dict[str, Any]:
    shape = {"B": BATCH, "C": 3, "H": SIZE, "W": SIZE}
    return {
        "op": what,
        "shape": shape,
        "dtype": "uint8",
        "mode": "feed",
        "images": BATCH * batches,
        "bytes": 4 * math.prod(shape.values()) * batches,
        "bound": None,
    }


def check(ours: Tensor, rival: Tensor, bound: float) -> None:
    """Both read the same images, in [-1, 1]: the mean difference is below `bound` levels of 255."""
    difference = (ours - rival).abs().mean().item() * 127.5
    assert difference < bound, f"images differ by {difference:.2f} levels of 255"


def test_images(image_folder: tuple[str, Path], compete: Callable[..., None], tmp_path: Path) -> None:
    form, folder = image_folder

    def make(decoder: str, kept: bool = False) -> ImageFolder:
        settings = {"holdout": 0.0, "cache_dir": str(tmp_path / str(kept)), "cache_gib": 1.0 if kept else 0.0, "workers": WORKERS}
        return ImageFolder(str(folder), decoder=decoder, **settings)

    rival, some = PillowImages(folder), torch.arange(0, NUM_IMAGES, 17)
    expected = torch.stack([rival[n] for n in some.tolist()])
    ready = [contestant("DataLoader + Pillow", loading(rival))]
    for name, decoder, kept in (("Pillow", "torch", False), ("DALI", "dali", False), ("kept pixels", "dali", True)):
        dataset = make(decoder, kept)
        check(dataset.images(some), expected, 1.0)
        dataset.images(torch.arange(NUM_IMAGES))  # fills the kept pixels, if they are kept
        ready.append(contestant(f"sami-fast, {name}", feeding(partial(make, decoder, kept))))
    compete(described(f"feed {form} 178x218"), ready, "DataLoader + Pillow", peak=False, targets={"sami-fast, DALI": TARGETS["images"]})


@pytest.mark.parametrize(("name", "decoder"), [("Pillow", "torch"), ("DALI", "dali")], ids=["Pillow", "DALI"])
def test_shards(name: str, decoder: str, image_folder: tuple[str, Path], compete: Callable[..., None], tmp_path: Path) -> None:
    """The same image files, one by one in a folder and many to a shard."""
    form, folder = image_folder

    def make(kind: str) -> Dataset:
        path = folder if kind == "image_folder" else tmp_path / kind
        settings = {"image_size": SIZE, "holdout": 0.0, "cache_dir": str(tmp_path / "cache"), "cache_gib": 0.0, "workers": WORKERS}
        return open_dataset(DataConfig(kind=kind, path=str(path), decoder=decoder, **settings), 0)

    for kind in ("webdataset", "parquet"):
        packing = Packing(DataConfig(kind="image_folder", path=str(folder)), form=kind, samples=100)
        pack(packing, tmp_path / kind, workers=1, overwrite=False, progress=lambda done, count: None)
    expected = make("image_folder").images(torch.arange(NUM_IMAGES))
    ready = []
    for kind in ("image_folder", "webdataset", "parquet"):
        assert torch.equal(make(kind).images(torch.arange(NUM_IMAGES)), expected)
        ready.append(contestant(f"sami-fast, {kind}", feeding(partial(make, kind))))
    targets = {f"sami-fast, {kind}": 1.0 for kind in ("webdataset", "parquet")}
    compete(described(f"feed {form} 178x218 by {name}"), ready, "sami-fast, image_folder", peak=False, targets=targets)


def test_videos(video_folder: tuple[str, Path], compete: Callable[..., None], tmp_path: Path) -> None:
    codec, folder = video_folder
    by_dali = codec in KNOWN_TO_DALI
    settings = {"holdout": 0.0, "pool": 4 * BATCH, "cache_dir": str(tmp_path), "cache_gib": 0.0, "workers": WORKERS}

    def make(decoder: str) -> VideoFolder:
        return VideoFolder(str(folder), decoder=decoder, **settings)

    rival = PyAVFrames(folder)
    ready = [contestant("DataLoader + PyAV in order", loading(rival))]
    for decoder in ("dali", "auto") if by_dali else ("auto",):
        ours = make(decoder)
        (name,) = {ours.decoder_of(v)[0] for v in range(CLIPS)}
        assert decoder == "auto" or name == "DALI"
        check(ours.clips(torch.tensor([0]))[0], next(iter(DataLoader(rival, ours.clip_length, num_workers=1))), 2.0)
        ready.append(contestant(f"sami-fast, {name}", feeding(partial(make, decoder))))
    targets = {ready[-1].name: TARGETS["dali" if by_dali else "pyav"]}
    compete(described(f"feed {codec} 320x240"), ready, "DataLoader + PyAV in order", peak=False, targets=targets)


def test_shuffled_frames(tmp_path: Path, compete: Callable[..., None]) -> None:
    """Against a random access for every frame, which is how shuffled frames are usually read."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for n in range(CLIPS):
        write_wandering(folder / f"{n}.mkv", "vp9", ((0, n * 20), (150, 300 - n * 20)))

    def make() -> VideoFolder:
        return VideoFolder(str(folder), holdout=0.0, pool=4 * BATCH, cache_dir=str(tmp_path), cache_gib=0.0, workers=WORKERS)

    rival, batches = "DataLoader + PyAV, a seek per frame", 2
    ready = [contestant(rival, loading(PyAVRandomFrames(folder), batches, 2)), contestant("sami-fast, PyAV", feeding(make, batches))]
    compete(described("feed vp9 320x240, shuffled", batches), ready, rival, peak=False, targets={"sami-fast, PyAV": TARGETS["dali"]})


# What a step waits


@pytest.mark.parametrize("kind", ["disks", "images 64x64"])
def test_a_step_hardly_waits(kind, tmp_path, capsys):
    """Share of a training step's time in which the networks wait for images: below 2 %, while both take the same cores."""
    if kind == "disks":
        config = load_config("disks")
    else:
        folder = tmp_path / "images"
        folder.mkdir()
        for n in range(NUM_IMAGES):
            Image.fromarray(photographs()[n % 2][n : n + 128, 2 * n : 2 * n + 128]).resize((178, 218)).save(folder / f"{n}.jpg")
        config = load_config("images", [f"data.path={folder}", f"data.cache_dir={tmp_path}", "data.cache_gib=0", "train.batch_size=32"])
    set_threads(config.engine.threads)
    dataset = open_dataset(config.data, config.seed)
    sami = build_model(config, dataset.image_shape)
    module = TrainingModule(sami, config)
    feed = Feed(dataset, config.train.batch_size, 1, 0, 1, config.seed, CPU, config.data.flip)
    steps = 60 if kind == "disks" else 12
    feed.micro_batch(0, 0)
    waited, begin = feed.waited, time.perf_counter()
    for step in range(1, steps + 1):
        x_0, place = feed.micro_batch(step, 0)
        loss, _ = module(x_0, Draw(config.seed, step, place, config.train.batch_size), 0.1, "both")
        loss.backward()
        module.zero_grad()
    share = (feed.waited - waited) / (time.perf_counter() - begin)
    feed.close()
    with capsys.disabled():
        print(f"\n{kind}: {share:.2%} of a step is waiting for data")
    assert share < 0.02
