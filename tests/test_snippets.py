"""Every Python and shell block of README.md and docs/*.md runs as it is printed.

The blocks of a page run in order, in one folder and, if Python, in one namespace: what an earlier block made, a later one finds. The folder
is a copy of the tree by links; beside it lies what the pages take for granted: photos, videos, arrays, denoisers (`belongings`). What a
comment above a block says is not seen by readers of the page:

    <!-- given: images = torch.zeros(4, 3, 8, 8) -->   what a reader's own program or machine has already; it runs before the block
    <!-- not run: it needs a GPU -->                   the block is left out, for the reason given
    <!-- unchecked: ... -->                            neither this test nor test_docs.py looks at it

Commands that take minutes are shortened, by `SHORTER` alone.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import forks
import numpy as np
import pytest
import torch
from pages import ROOT, SMALL, TRAINING, Block, shorter_training, split
from PIL import Image
from safetensors.torch import load_file, save_file

from sami_fast.config import load_config
from sami_fast.train import train

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
SHELL = ("", "bash", "sh", "console")
FIRST_OF_GENERATED = re.compile(
    r"(plan|performance|recovery|methods|pretrained|claims) "
)  # tables that commands write between such comments

PHOTOS = 160

SHORTER = [
    (TRAINING, shorter_training),
    (r"^make train\b", 'make train ARGS="' + " ".join(f"{key}={value}" for key, value in SMALL.items()) + ' --no-report"'),
    # One seed is as good as three.
    (r"for seed in 0 1 2;", "for seed in 0;"),
    # What is installed already stays as it is.
    (r"^pip install ", "pip install --no-index --no-deps --dry-run "),
    # What takes minutes however small it is made: its arguments are understood, and the tests that it would run are found.
    (r"^(make (?:test|bench)\b)", r"\1 --dry-run"),
    (r"^(pytest [^#\n]*?)(?= *(?:#|$))", r"\1 --collect-only -q"),
    (r"^(python (?:-m benchmarks\.(?:compare|budgets|tables)|tests/kill_campaign\.py) [^#\n]*?)(?= *(?:#|$))", r"\1 --help"),
]


def runnable() -> list[Block]:
    found = []
    for page in PAGES:
        for block in split(page)[1]:
            left_out = [block.said(why) for why in ("not run", "unchecked")]
            assert "" not in left_out, f"{block}: say why it is left out"
            if block.language in ("python", *SHELL) and left_out == [None, None] and not FIRST_OF_GENERATED.match(block.comment):
                found.append(block)
    return found


BLOCKS = runnable()


def test_blocks_are_found():
    assert sum(block.language == "python" for block in BLOCKS) >= 7
    assert sum(block.language != "python" for block in BLOCKS) >= 10
    assert {"README.md", "docs/own-images.md", "docs/data.md"} <= {block.page for block in BLOCKS}


# What the pages take for granted


def photo(seed: int, size: int = 24) -> np.ndarray:
    """A bright disk on a dark ground."""
    place = np.random.default_rng(seed)
    (x, y), ground = place.uniform(6, 18, 2), place.integers(0, 120)
    down, across = np.mgrid[:size, :size]
    disk = (across - x) ** 2 + (down - y) ** 2 < 25
    return np.where(disk[..., None], np.uint8(230), np.uint8(ground)).repeat(3, 2)


def video(file: Path, seed: int) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(photo(seed + frame, 32), format="rgb24")))
        container.mux(stream.encode())


def celeba(folder: Path, images: int = 12) -> None:
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, images + 1)]
    for number, name in enumerate(names):
        Image.fromarray(photo(number, 218)[:, :178]).save(folder / "img_align_celeba" / name)
    rows = [f"{name} " + " ".join("1" if (number + k) % 2 else "-1" for k in range(40)) for number, name in enumerate(names)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(images), " ".join(f"Attribute_{k}" for k in range(40)), *rows]) + "\n")
    splits = [f"{name} {0 if number < images - 6 else 1 + number % 2}" for number, name in enumerate(names)]
    (folder / "list_eval_partition.txt").write_text("\n".join(splits) + "\n")


def diffusers_denoiser(folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    unet.save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder)


@pytest.fixture(scope="session")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that a reader has before the first command of a page."""
    home = tmp_path_factory.mktemp("belongings")
    for name, count in (("photos", PHOTOS), ("more_photos", 3), ("faces", 12)):
        for number in range(count):
            (home / name / f"person_{number % 4}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(number)).save(home / name / f"person_{number % 4}" / f"{number}.png")
    table = ["file,person,age", *(f"person_{number % 4}/{number}.png,person_{number % 4},{20 + number % 50}" for number in range(PHOTOS))]
    (home / "labels.csv").write_text("\n".join(table) + "\n")
    (home / "clips").mkdir()
    for number in range(4):
        video(home / f"clips/{number}.mp4", 50 * number)
    np.savez(home / "mine.npz", images=np.stack([photo(number, 16) for number in range(24)]))
    celeba(home / "celeba")
    diffusers_denoiser(home / "my_ddpm")
    for name in ("rows.jsonl", "a.jsonl", "b.jsonl"):
        shutil.copy(ROOT / "benchmarks/results/cpu.jsonl", home / name)
    trained(home)
    return home


def trained(home: Path) -> None:
    """`runs/trained`: a run on `photos` three of whose latents tell images apart, as if it had gone on for longer than two steps. These are
    what they began as, times a number."""
    overrides = [*map("=".join, SMALL.items()), f"data.path={home / 'photos'}", f"runs_dir={home / 'runs'}"]
    run = train(load_config("photos_small", [*overrides, "name=trained"]))
    weights = load_file(run / "model/model.safetensors")
    weights["encoder.mu.weight"][:3] *= 30
    save_file(weights, run / "model/model.safetensors")


class Page:
    """A page's folder and namespace, and how far it has come."""

    def __init__(self, page: str, folder: Path, belongings: Path, commands: Path) -> None:
        self.folder, self.blocks, self.done = folder, [block for block in BLOCKS if block.page == page], 0
        self.namespace: dict[str, Any] = {"__name__": page}
        for name in (
            "sami_fast",
            "kernels",
            "configs",
            "csrc",
            "tests",
            "benchmarks",
            "examples",
            "Makefile",
            "pyproject.toml",
            "setup.py",
        ):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(belongings, folder, dirs_exist_ok=True)
        programs = folder / ".venv/bin"  # as if `make install` had just been here
        programs.mkdir(parents=True)
        (programs / "deepspeed").symlink_to(commands / "deepspeed")
        (programs / "activate").write_text(f'PATH="{commands}:$PATH"\n')
        (programs / ".installed").touch()
        self.path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run_to(self, block: Block) -> None:
        """All blocks that were not run yet, this one included; where an earlier one fails, it is that one's own test that says so."""
        while self.done <= self.blocks.index(block):
            now, self.done = self.blocks[self.done], self.done + 1
            try:
                self.run(now)
            except BaseException:
                if now is block:
                    raise

    def run(self, block: Block) -> None:
        given = block.said("given") or ""
        if block.language == "python":
            before = self.namespace | {"torch": torch}
            exec(compile(given, f"{block}, given", "exec"), before)
            self.namespace |= {name: value for name, value in before.items() if not isinstance(value, ModuleType)}
            exec(compile("\n" * block.line + block.text, block.page, "exec"), self.namespace)
            return
        text = f"{given}\n{block.text}"
        for long, short in SHORTER:
            text = re.sub(long, short, text, flags=re.MULTILINE)
        variables = {
            "PATH": self.path,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text],
            cwd=self.folder,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}: exit status {done.returncode}\n{text}\n{done.stdout}\n{done.stderr}"


_pages: dict[str, Page] = {}


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """A folder of commands that start in milliseconds."""
    with tempfile.TemporaryDirectory() as folder, forks.programs(Path(folder)):
        yield Path(folder)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block, belongings, commands, tmp_path_factory, monkeypatch):
    if block.page not in _pages:
        _pages[block.page] = Page(block.page, tmp_path_factory.mktemp("page"), belongings, commands)
    page = _pages[block.page]
    monkeypatch.chdir(page.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(page.folder / "cache"))
    page.run_to(block)
