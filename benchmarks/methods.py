"""SAMI beside a beta-VAE and diffusion autoencoders: same data, networks, seeds and budget; writes rows and the tables of docs/results.md.

The budget is a number of steps for all methods, or minutes of one thread for all that is trained (`train.minutes`), or for each method the
steps that the same minutes come to; a row says how much CPU time the run took.

python -m benchmarks.methods                                    # disks and sprites, three seeds each: results/methods.jsonl
python -m benchmarks.methods --data disks --seeds 0 --output try.md                        # try.md and try.jsonl
python -m benchmarks.methods --data rooms avatars stills --seeds 0 1 2 3 4        # photographs and videos: see sources.py
python -m benchmarks.methods --data disks --methods beta_vae --seeds 0 kl_weight.start=3   # rows of a variant, beside the tables
"""

import argparse
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import numpy as np

from sami_fast.config import Config, load_config
from sami_fast.data import open_dataset
from sami_fast.environment import cores, describe
from sami_fast.evaluation import Evaluated, Latents, Run, encode, evaluate, known_factors, open_run, tables
from sami_fast.evaluation.clips import Represent, representations, straightness_scores
from sami_fast.evaluation.factors import matched_scores
from sami_fast.evaluation.latents import make_baselines
from sami_fast.evaluation.scores import plain
from sami_fast.latents.discovery import discover, independent_axes, principal_axes
from sami_fast.metrics.attributes import tad

from .recovery import pixel_energy, trained
from .rows import ROOT, Row, address, committed
from .sources import imagenet, prepared
from .table import Columns, page_table
from .tables import publish

# beta of the beta-VAE: the best MCC of 0.1, 0.3, 1, 3 on seed 0 of disks (docs/results.md); of the stochastic diffusion autoencoder:
# where SAMI's ends.
TRAINED = {
    "sami": [],
    "beta_vae": ["method=beta_vae", "kl_weight.kind=constant", "kl_weight.start=1"],
    "beta_vae_falling": ["method=beta_vae", "kl_weight.kind=exponential", "kl_weight.start=3", "kl_weight.end=0.1"],
    "diffae": ["method=diffae"],
    "diffae_stochastic": ["method=diffae", "diffae.stochastic=true", "kl_weight.kind=constant", "kl_weight.start=0.08"],
}


@dataclass(frozen=True)
class Data:
    """What methods are compared on."""

    config: str
    settings: list[str]  # that differ from the config
    source: str = ""  # of sources.py
    folder: str = "."  # of the source, that training reads
    special: dict[str, list[str]] = field(default_factory=dict)  # settings of one method alone


EQUAL = ["data.disks.x=[0.25,0.75]", "data.disks.y=[0.25,0.75]", "data.disks.background=[0.0,0.7]"]
CLIPS = ["data.image_size=32", "data.holdout=0.5", "data.video.clip_length=11", "denoiser.channels=[16,32,64,64]"]
# The disks of 16x16 enlarged: their energies are four times as large, so the same is seen at logsnr lower by ln 4.
LARGE = ["data.image_size=32", "data.disks.edge_slope=0.75", "schedule.logsnr_min=-8.4", "schedule.logsnr_max=3.6", "train.steps=2000"]
LARGE += ["encoder.channels=[32,64,64,64]", "denoiser.channels=[8,16,32,64,64]"]
# The table of clips is of joint runs from before there were stages.
JOINT = ["train.mode=joint", "kl_weight.kind=exponential", "kl_weight.start=0.25", "schedule.logsnr_min=-7", "schedule.logsnr_max=5"]
JOINT += ["optimizer.clip=12", "train.steps=1500", "train.batch_size=32", "train.turn=[]", "denoiser.skip_logsnr=-30"]
SMALL = ["data.image_size=32", "encoder.channels=[64,64,64]", "encoder.blocks=0", "denoiser.channels=[16,32,64,64]"]
SMALL += ["optimizer.lr=3e-3", "optimizer.encoder_lr=1e-3"]
# Whatever else the machine does: what `train.minutes: 8` came to with one thread that nothing disturbed, on the slowest machine so far.
# The beta-VAE with falling beta has as many as the other beta-VAE's eight minutes came to: 4100, 4200 and 4300.
STEPS = {"sami": ["train.minutes=0", "train.denoiser_steps=1100", "train.steps=1500"]}
STEPS |= {"beta_vae_falling": ["train.minutes=0", "train.steps=4200"]}
# Of rendered sets, in 8.4 CPU minutes each, with one thread beside another such run. `train.minutes` would ask the machine before each run
# how fast it is, and gave a beta-VAE half of the minutes that SAMI had, since other runs were at work just then.
RENDERED = {name: ["train.steps=3800"] for name in ("beta_vae", "beta_vae_falling")}
RENDERED |= {name: ["train.steps=2000"] for name in ("diffae", "diffae_stochastic")}
RENDERED |= {"sami": ["train.denoiser_steps=1000", "train.bank_steps=1000", "train.steps=1500"]}
DATA = {
    "disks": Data("disks_joint", []),
    "equal": Data("disks_joint", EQUAL),  # pixel energies of x, y and background: 31, 31 and 30
    "disks32": Data("disks_joint", LARGE),
    "sprites": Data("sprites", ["train.steps=2500"]),
    # Every other second of three videos for training, the others for evaluation; 11 frames a clip as Henaff et al. (2019) took.
    # Without free bits SAMI's posterior collapses on the clips in so few steps; the baselines have none.
    "clips": Data("video", [*CLIPS, *JOINT], "clips", special={"sami": ["objective.free_bits=0.5"]}),
    "rooms": Data("rooms", SMALL, special=RENDERED),
    "avatars": Data("avatars", SMALL, special=RENDERED),
    # Two have fixed steps, the others eight minutes.
    "stills": Data("clips_small", ["data.video.clip_length=11", "train.minutes=8"], "videos", "stills", special=STEPS),
    # From here on of SAMI alone.
    "faces": Data("photos_small", ["data.channels=1", "data.holdout_by=folder"], "faces", special=STEPS),  # people that training never saw
    "patches": Data("photos_small", ["data.holdout_by=folder"], "patches", special=STEPS),  # photographs that training never saw
    "wallpapers": Data("photos_small", [], "patches", special=STEPS),  # the same, images held out at random as by default
    "mixed": Data("photos_small", [], "mixed", special=STEPS),
}
KEY = ("data", "method", "settings", "seed")  # two runs that agree in these are the same
CURVES = ("information_nats", "calibration_mean", "calibration_std", "calibration_distance")  # left out of rows
AXES_IMAGES = 256  # that axes are discovered on


def run_name(data: str, method: str, seed: int, settings: str = "") -> str:
    return re.sub(r"[^\w.-]+", "-", f"{data}_{method}_seed{seed} {settings}".strip())


def overrides(data: str, method: str, settings: str) -> list[str]:
    """What a run sets beside its config, its seed and its place."""
    return [*DATA[data].settings, *TRAINED[method], *DATA[data].special.get(method, []), *settings.split()]


def train(runs: Path, data: str, method: str, seed: int, settings: str) -> Path:
    """Train one run with one thread, or go on with it where it was interrupted; a finished one is left as it is, and one with other
    settings ends this command."""
    name, what = run_name(data, method, seed, settings), DATA[data]
    command = [sys.executable, str(ROOT / "sami_fast/train.py"), "--config", what.config, "--resume", "--no-report"]
    command += [f"seed={seed}", f"name={name}", f"runs_dir={runs}", "engine.threads=1"]
    command += [f"data.path={runs / what.source / what.folder}"] if what.source else []
    command += overrides(data, method, settings)
    seconds = trained(command, runs / f"{name}.log")
    if seconds is not None:
        (runs / name / "used.json").write_text(json.dumps({"cpu_seconds": seconds}))
        print(f"{name}: trained in {seconds / 60:.1f} CPU minutes", flush=True)
    return runs / name


def further_scores(evaluated: Evaluated, data: str, images: int, baselines: bool) -> Row:
    """What `sami-fast evaluate` does not say.

    Args:
        evaluated: What it says.
        data: Name of its data.
        images: Evaluation images.
        baselines: Also the straightness of what a run's latents are compared with, an ImageNet classifier among them.
    Returns:
        mcc_mu: MCC of the means of the live latents, where factors are known.
        mcc_axes, tad_axes: Of sampled latents on axes found without labels, see `on_found_axes`.
        pixel_energy: Of disks, see recovery.py.
        straightness_by_source: Of clips of sources that are judged one by one.
        cpu_seconds: Of the training, where that was measured.
    """
    folder = Path(evaluated.folder)
    run = open_run(folder, images)
    latents = encode(run, run.model)
    scores: Row = json.loads((folder / "used.json").read_text()) if (folder / "used.json").is_file() else {}
    others = {"imagenet": imagenet_codes(run)} if baselines and data in ("rooms", "stills") else {}
    if data == "rooms":
        scores["straightness_by_source"] = {"moving rooms": evaluated.straightness | plain(straightness_scores(run, others))}
    elif data == "stills":
        rows = representations(run, latents, make_baselines(run) if baselines else None) | others
        scores["straightness_by_source"] = {name: plain(straightness_scores(clips, rows)) for name, clips in unseen(run).items()}
    factors, names, periods = known_factors(run, attributes=False)
    attributes, *_ = known_factors(run, attributes=True)
    if not (names or attributes.size):
        return scores
    if run.config.data.kind == "disks":
        scores["pixel_energy"] = pixel_energy(run.config)
    found = on_found_axes(run, latents)
    if names:
        scores["mcc_mu"] = matched_scores(latents.mu[:, latents.live], factors, names, periods)["mcc"]
        scores["mcc_axes"] = {method: matched_scores(codes, factors, names, periods)["mcc"] for method, codes in found.items()}
    else:
        scores["tad_axes"] = {method: tad(codes, attributes).score for method, codes in found.items()}
    return scores


def on_found_axes(run: Run, latents: Latents) -> dict[str, np.ndarray]:
    """Sampled latents on axes found without labels, by method: of SAMI all methods of `sami-fast axes`, of others, whose denoisers draw no
    images by themselves, principal axes and independent components. Empty of a single live latent."""
    live, seed = np.sort(latents.live), run.config.seed
    if len(live) < 2:
        return {}
    if run.model.guides:
        axes = discover(run.model, run.images, AXES_IMAGES, encoded=run.count, seed=seed, batch_size=run.batch_size)
        return {each.method: each.axes.coordinates(latents.z) for each in axes}
    mu = latents.mu[:, live].astype(np.float64)
    readouts = {"pca": principal_axes(mu)[1], "ica": independent_axes(mu, seed)[1]}
    return {method: (latents.z[:, live] - mu.mean(0)) @ rows.T for method, rows in readouts.items()}


def unseen(run: Run) -> dict[str, Run]:
    """By source of videos, the run with evaluation clips of that source, none of which training saw."""
    config = run.config.data
    folders = sorted((Path(config.path).parent / "unseen").iterdir())
    return {
        folder.name: replace(run, evaluation=open_dataset(replace(config, path=str(folder), holdout=0.0), run.config.seed, 0))
        for folder in folders
    }


def imagenet_codes(run: Run) -> tuple[Represent, np.ndarray]:
    """How a frame is taken through an ImageNet classifier, and the standard deviation of its features over images."""
    index = run.index()[: -(-AXES_IMAGES // run.batch_size)]
    return imagenet(), np.concatenate([imagenet()(run.images(batch).cpu()) for batch in index]).std(0)


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
        return axes_table([row for row in committed("methods.jsonl", method="sami", settings="") if "pixel_energy" in row])
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


def scored_once(rows: list[Row]) -> list[Row]:
    """Rows of one dataset in the order of seeds and methods. Scores of baselines, which depend on data and seed alone, stay with the first
    row of each seed: where several commands scored runs of one seed, each brings them again."""
    found: list[Row] = []
    seeds: set[int] = set()
    for row in sorted(rows, key=lambda row: (row["seed"], list(TRAINED).index(row["method"]))):
        own = {name: codes for name, codes in row["straightness"].items() if name == "latents"}
        found.append({**row, "baselines": {}, "straightness": own} if row["seed"] in seeds else row)
        seeds |= {row["seed"]} if row["baselines"] else set()
    return found


def table(rows: list[Row]) -> str:
    """Markdown of runs on one dataset."""
    rows = scored_once(rows)
    first = rows[0]
    commits = ", ".join(sorted({(row["commit"] or "none")[:10] for row in rows}))
    head = (
        f"`{first['command']}`, {max(row['date'] for row in rows)}, torch {first['torch']}, {first['device']}, one thread per run, "
        f"trained on commit {commits}, scored on {', '.join(sorted({(row['scored_on'] or 'none')[:10] for row in rows}))}."
    )
    evaluated = [Evaluated(row["command"], config_of(row), row, row["baselines"], row["straightness"]) for row in rows]
    return f"{head}\n\n{tables(evaluated, axes=False)}"


def config_of(row: Row) -> Config:
    """The settings that a run of a row's method has today; a row of an earlier commit may have been trained with others."""
    data, method, seed, settings = (row[key] for key in ("data", "method", "seed", "settings"))
    what = DATA[data]
    own = [f"name={method}", f"seed={seed}", *([f"data.path={what.source}"] if what.source else [])]
    return load_config(what.config, [*own, *overrides(data, method, settings)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.methods --data disks --seeds 0"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=["disks", "sprites"])
    parser.add_argument("--methods", nargs="+", choices=TRAINED, default=["sami", "beta_vae", "diffae"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=cores(), help="runs trained side by side, one thread each")
    parser.add_argument("--images", type=int, default=6000, help="evaluation images")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods", help="where the run folders go")
    parser.add_argument("--output", type=Path, help="markdown file for the tables, with rows beside it; docs/results.md by default")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of a variant")
    arguments = parser.parse_intermixed_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)

    for data in arguments.data:
        if DATA[data].source:
            prepared(DATA[data].source, arguments.runs)
    settings = " ".join(arguments.overrides)
    jobs = [(data, method, seed, settings) for data in arguments.data for seed in arguments.seeds for method in arguments.methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda job: train(arguments.runs, *job), jobs))
    rows = []
    for (data, method, seed, _), folder in zip(jobs, folders, strict=True):
        first = method == arguments.methods[0]  # what depends on data and seed alone is scored once
        evaluated = evaluate(folder, images=arguments.images, jobs=arguments.jobs, baselines=first)
        rows.append(row_of(evaluated, data, method, settings, further_scores(evaluated, data, arguments.images, first)))
        print(f"{run_name(data, method, seed, settings)}: scored", flush=True)
    found = {f"methods {data}": table([row for row in rows if row["data"] == data]) for data in arguments.data}
    publish(rows, KEY, "methods", arguments.output, found)


if __name__ == "__main__":
    main()
