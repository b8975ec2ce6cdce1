"""Training on a folder that mixes codecs, through the real launcher: a kill, a resume, two ranks; and an epoch of 100,000 images."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.write_video import available_codecs, write_video
from sami_fast.data import Feed, ImageFolder, Sprites, VideoFolder
from sami_fast.train import main

pytest.importorskip("av", reason="needs PyAV: pip install 'sami-fast[feed]'")

ROOT = Path(__file__).resolve().parents[1]
FRAMES, CODECS = 12, {"vp9": "webm", "vp8": "webm", "mjpeg": "avi", "h264": "mp4", "h265": "mkv", "av1": "mkv", "mpeg4": "mp4"}
SETTINGS = (
    *("data.image_size=16", "data.holdout=0.2", "data.video.pool=40", "data.flip=true", "train.batch_size=8", "train.steps=24"),
    *("encoder.channels=[8,8]", "encoder.latent_size=4", "denoiser.channels=[4,8]", "denoiser.embedding_size=16", "encoder.groups=2"),
    *("denoiser.groups=2", "engine.threads=1", "log.every=1", "log.tensorboard=false", "checkpoint.every=4", "report.images=16"),
    *("checkpoint.validation_images=8", "report.sample_steps=2", "optimizer.eps=1e-3", "optimizer.warmup_steps=2"),
    *("train.mode=joint", "kl_weight.kind=exponential"),  # one stage, whose steps are those of the feed
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Moving sprites, two clips of every codec that can be written here, and a file that is no video."""
    place = tmp_path_factory.mktemp("clips")
    ranges = {"scale": (0.5, 1.0), "rotation": (0.0, 1.0), "x": (0.2, 0.8), "y": (0.2, 0.8)}
    sprites = Sprites(32, 3, ("square", "ellipse", "heart"), ranges, seed=1, clip_length=FRAMES)
    for n, codec in enumerate(c for c in CODECS if c in available_codecs()):
        for k in range(2):
            clip = sprites.clips(torch.tensor([2 * n + k]))[0].permute(0, 2, 3, 1)
            write_video(
                place / f"{codec}_{k}.{CODECS[codec]}", ((clip + 1) * 127.5).round().byte().numpy(), codec=codec, keyframe_interval=6
            )
    (place / "broken.mp4").write_bytes(b"no video")
    return place


def training(folder: Path, runs: Path, *overrides: str) -> list[str]:
    """Arguments of the training command."""
    places = [f"data.path={folder}", f"data.cache_dir={runs}/cache", f"runs_dir={runs}"]
    return ["--config", "video", "--resume", *places, "data.max_bad=0.1", *SETTINGS, *overrides]


def command(records: Path, folder: Path, runs: Path, ranks: int = 1) -> list[str]:
    launcher = Path(sys.executable).parent / "deepspeed"
    place = ["--num_accelerators", str(ranks), "--master_port", str(29700 + os.getpid() % 200), str(ROOT / "tests/feed_worker.py")]
    return [str(launcher), *place, str(records), *training(folder, runs)]


def run(*arguments, **options) -> str:
    done = subprocess.run(command(*arguments, **options), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def shown(records: Path, ranks: int = 1) -> dict[int, dict[int, tuple[int, int, int]]]:
    """Step -> place in the batch -> index, epoch and pixels of the image there, over all ranks."""
    steps: dict[int, dict[int, tuple[int, int, int]]] = {}
    for rank in range(ranks):
        for row in map(json.loads, Path(f"{records}_{rank}.jsonl").read_text().splitlines()):
            step = steps.setdefault(row["step"], {})
            found = dict(zip(row["place"], zip(row["index"], row["epoch"], row["pixels"], strict=True), strict=True))
            assert all(step.get(place, image) == image for place, image in found.items()), "the same step with other images"
            step |= found
    return steps


def losses(run_folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss_nats"] for row in rows if "loss_nats" in row]


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("uninterrupted")
    output = run(place / "shown", folder, place)
    assert "skipped 1 of" in output
    assert "broken.mp4" in output
    return place


def test_it_trains_on_every_codec(uninterrupted, folder):
    videos = VideoFolder(str(folder), image_size=16, holdout=0.2, max_bad=0.1, cache_dir=str(uninterrupted / "cache"))
    steps = shown(uninterrupted / "shown")
    assert sorted(steps) == list(range(24))
    seen = {index for step in steps.values() for index, epoch, _ in step.values() if epoch == 0}
    assert seen == set(range(len(videos.places)))
    codecs = {videos.videos[v].codec for v in videos.chosen}
    assert codecs >= {"vp9", "mjpeg", "mpeg4"} & {{"h265": "hevc"}.get(c, c) for c in available_codecs()}
    assert (uninterrupted / "video/report/index.html").is_file()


def test_a_killed_run_goes_on_at_the_exact_sample(uninterrupted, folder, tmp_path):
    """Killed twice with SIGKILL, launcher and all; the images of every step, the losses and the weights are those of the whole run."""
    records = tmp_path / "shown"
    for at in (6, 15):
        process = subprocess.Popen(
            command(records, folder, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        log, deadline = Path(f"{records}_0.jsonl"), time.monotonic() + 120
        while not (log.exists() and f'"step": {at}' in log.read_text()):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "training does not get on"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # The launcher puts the trainer into a group of its own.
        subprocess.run(["pkill", "-9", "-f", str(records)], check=False)
        time.sleep(0.2)
        assert not (tmp_path / "video/model").exists()
    assert "resumed from" in run(records, folder, tmp_path)
    assert shown(records) == shown(uninterrupted / "shown")
    assert losses(tmp_path / "video") == losses(uninterrupted / "video")
    first, second = (load_file(place / "video/model/model.safetensors") for place in (tmp_path, uninterrupted))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_two_ranks_see_disjoint_parts_that_cover_everything_once(uninterrupted, folder, tmp_path):
    run(tmp_path / "shown", folder, tmp_path, ranks=2)
    each = [shown(tmp_path / "shown", 1), {}]
    both = shown(tmp_path / "shown", 2)
    places = [{place for step in each[0].values() for place in step}]
    assert places[0] == set(range(4))  # rank 0 has its own half of every batch
    assert both == shown(uninterrupted / "shown")  # and together they see what one process sees
    epoch = [index for step in both.values() for index, number, _ in step.values() if number == 0]
    assert sorted(epoch) == list(range(len(epoch)))
    np.testing.assert_allclose(losses(tmp_path / "video"), losses(uninterrupted / "video"), rtol=5e-5)


def test_other_files_stop_a_resume(folder, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    for file in folder.glob("mjpeg*"):
        (clips / file.name).write_bytes(file.read_bytes())
    arguments = training(clips, tmp_path, "train.steps=4", "data.holdout=0")
    assert main(arguments) == 0
    (clips / "mjpeg_1.avi").rename(clips / "other.avi")
    assert main(arguments) == 2
    assert "belongs to a run with other settings: data.files" in capsys.readouterr().err


def test_an_array_is_known_by_its_content(tmp_path, capsys):
    """Moved, a run goes on with it; replaced, even where it lies, it does not."""

    def arguments(path: Path, steps: int) -> list[str]:
        places = ["data.kind=array", f"data.path={path}", f"data.cache_dir={tmp_path}/cache", f"runs_dir={tmp_path}"]
        settings = (setting for setting in SETTINGS if not setting.startswith("data.video"))
        return ["--config", "array", "--resume", "--no-report", *places, *settings, "data.flip=false", f"train.steps={steps}"]

    first, moved = tmp_path / "images.npy", tmp_path / "moved.npy"
    np.save(first, np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8))
    assert main(arguments(first, 4)) == 0
    first.rename(moved)
    os.utime(moved, (5, 5))
    assert main(arguments(moved, 4)) == 0
    assert "resumed from" in capsys.readouterr().out
    np.save(moved, np.random.default_rng(1).integers(0, 256, (40, 16, 16), dtype=np.uint8))
    assert main(arguments(moved, 4)) == 2
    assert "belongs to a run with other settings: data.files" in capsys.readouterr().err


# Size


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.timeout(300)
def test_memory_stays_flat_over_an_epoch_of_100000_images(tmp_path, monkeypatch):
    """A hundred thousand file names over 500 different images; a second start looks into none of them."""
    random, folder = np.random.default_rng(0), tmp_path / "images"
    for part in range(100):
        (folder / f"{part:02d}").mkdir(parents=True)
    for n in range(500):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"00/{n:06d}.jpg", quality=80)
    for n in range(500, 100_000):
        os.link(folder / f"00/{n % 500:06d}.jpg", folder / f"{n % 100:02d}/{n:06d}.jpg")
    settings = {"image_size": 8, "holdout": 0.0, "cache_dir": str(tmp_path / "cache"), "cache_gib": 0.0, "workers": 2}
    assert ImageFolder(str(folder), **settings).size == 100_000
    with monkeypatch.context() as patched:
        patched.setattr("sami_fast.data.image_folder._facts", lambda path: pytest.fail(f"{path} was looked into again"))
        images = ImageFolder(str(folder), **settings)
    feed, batch = Feed(images, 200, 1, 0, 1, 0, torch.device("cpu")), 200
    seen, held = np.zeros(images.size, np.int64), {}
    for step in range(images.size // batch):
        feed.micro_batch(step, 0)
        seen[feed.indices(step, 0)[0].numpy()] += 1
        held[step] = resident()
    feed.close()
    assert (seen == 1).all()
    growth = held[499] - held[100]
    assert growth < 24 << 20, f"{growth / 2**20:.1f} MiB more after the last batch than after the hundredth"
