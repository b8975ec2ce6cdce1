"""Do the latents recover the factors, seed by seed? Trains a config over many seeds and writes rows and a table, losers included.

python -m benchmarks.recovery                          # ten seeds of disks: results/recovery.jsonl and docs/results.md
python -m benchmarks.recovery --seeds 0 1 --output try.md optimizer.ema_decay=0        # try.md and try.jsonl
python -m benchmarks.recovery --record runs/disks --seconds 264.6      # a run of make train, and how long it took: results/train.jsonl
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import torch

from sami_fast.config import Config, load_config
from sami_fast.data import open_dataset
from sami_fast.data.disks import Disks
from sami_fast.environment import cores

from .rows import RESULTS, ROOT, Row, address, committed, write_rows
from .table import Columns, page_table
from .tables import publish

BOUNDS = {"disks_joint": (0.95, 0.9)}  # of the lowest R2 and of the MCC, by config
MIN_R2, MIN_MCC = 0.97, 0.97  # of others
KEY = ("config", "settings", "seed")  # two runs that agree in these are the same
ENERGY_IMAGES, ENERGY_STEP = 4096, 1e-3


def trained(command: list[str], log: Path) -> float | None:
    """Run a command that trains, with one thread.

    Args:
        command: Of `sami_fast/train.py`.
        log: What it prints.
    Returns:
        CPU seconds of all of it: start, every stage, validation, checkpoints. None if a part was trained before.
    Raises:
        SystemExit: the command failed; with the last line it printed.
    """
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = log.read_text()
    if process.returncode:
        sys.exit(f"{log}: exit status {process.returncode}: {said.splitlines()[-1] if said else 'nothing was said'}")
    before = "done before" in said or {*re.findall(r"steps (\d+) to \d+$", said, re.MULTILINE)} != {"0"}
    return None if before else used.ru_utime + used.ru_stime


def run_seed(arguments: argparse.Namespace, seed: int) -> tuple[Path, float | None]:
    """Train one seed with one thread, and score it; returns its run folder, and `trained`'s CPU seconds."""
    name = f"{arguments.config}_seed{seed}"
    runs = arguments.runs.resolve() / name  # of its own, so that its first stage is trained, and timed, with it
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "sami_fast/train.py"), "--config", arguments.config, "--no-report"]
    command += [f"seed={seed}", f"name={name}", f"runs_dir={runs}", "engine.threads=1", *arguments.overrides]
    seconds = trained(command, runs / "log")
    report = [sys.executable, "-m", "sami_fast.cli", "report", str(runs / name), "--threads", "1"]
    subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return runs / name, seconds


def pixel_energy(config: Config) -> dict[str, float]:
    """How much each factor of the disks moves the pixels: mean squared norm of the image's derivative in it, times its variance."""
    disks = open_dataset(config.data, config.seed)
    assert isinstance(disks, Disks)
    index = torch.arange(ENERGY_IMAGES)
    drawn = disks._draw(index).double()
    energy = {}
    for name in disks.factor_names:
        step = torch.zeros(drawn.shape[1], dtype=torch.float64)
        step[disks.factor_order.index(name)] = ENERGY_STEP
        ends = []
        for factors in (drawn - step, drawn + step):
            disks._draw = lambda _, factors=factors: factors
            ends.append(disks.images(index))
        derivative = (ends[1] - ends[0]) / (2 * ENERGY_STEP)
        low, high = disks.ranges[name]
        energy[name] = float(derivative.square().sum((1, 2, 3)).mean()) * (high - low) ** 2 / 12
    return energy


def row_of(folder: Path, **more: object) -> Row:
    """A finished run as a row: its address, its scores without what is a curve, its KL weights every 400 steps."""
    environment = json.loads((folder / "environment.json").read_text())
    scores = json.loads((folder / "report/metrics.json").read_text())
    config = load_config(str(folder / "config.yaml"))
    log = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    written = datetime.fromtimestamp((folder / "report/metrics.json").stat().st_mtime, UTC).date()
    curves = {key for key, value in scores.items() if isinstance(value, list) and value and isinstance(value[0], list)} | {"axes"}
    return {
        **more,
        "seed": config.seed,
        "passes": passes(scores, str(more.get("config", ""))),
        **{key: value for key, value in scores.items() if key not in curves},
        **({"pixel_energy": pixel_energy(config)} if config.data.kind == "disks" else {}),
        "kl_weight": {str(row["step"]): row["kl_weight"] for row in log if "kl_weight" in row and row["step"] % 400 == 0},
        **address(environment, str(more.get("command", "")), str(written)),
    }


def passes(scores: dict, config: str = "") -> bool:
    """R2 of every factor and the mean MCC from sampled z, and exactly as many live dimensions as factors."""
    r2, (min_r2, min_mcc) = scores["linear_r2"], BOUNDS.get(config, (MIN_R2, MIN_MCC))
    return min(r2.values()) >= min_r2 and scores["mcc"] >= min_mcc and scores["active_dims"] == len(r2)


def generated(what: str) -> str:
    """A table of the pages, by what follows `recovery` in its name: `train`, a config, or a config and `variants`."""
    if what == "train":
        return train_table(committed("train.jsonl"))
    config, _, variants = what.partition(" ")
    if variants:
        return variants_table(committed("recovery.jsonl", config=config))
    return seeds_table(committed("recovery.jsonl", config=config, settings=""))


def _factors(rows: list[Row]) -> dict[str, tuple[str, str]]:
    return {f"R2 {factor}": (f"linear_r2.{factor}", ".3f") for factor in rows[0]["linear_r2"]}


def seeds_table(rows: list[Row]) -> str:
    """Markdown: a row per seed, and the untrained encoder of the same seed below it."""
    first, factors = rows[0], list(rows[0]["linear_r2"])
    both = []
    for row in sorted(rows, key=lambda row: row["seed"]):
        both += [row, row["untrained"] | {"seed": f"{row['seed']}, untrained"}]
    columns: Columns = {
        "seed": ("seed", ""),
        **_factors(rows),
        **{f"MCC {factor}": (f"mcc_per_factor.{factor}", ".3f") for factor in factors},
        **{"MCC": ("mcc", ".3f"), "MIG": ("mig", ".2f"), "live dims": ("active_dims", ""), "KL, nats": ("kl_nats", ".1f")},
        "passes": (lambda row: _yes(row["passes"]), ""),
        "minutes": (lambda row: row["wall_seconds"] / 60, ".1f"),
    }
    if any("cpu_seconds" in row for row in rows):
        columns["CPU minutes, all stages"] = (lambda row: row["cpu_seconds"] / 60, ".1f")
    min_r2, min_mcc = BOUNDS.get(first["config"], (MIN_R2, MIN_MCC))
    rule = "information" if "information_per_dim" in first else "KL"  # rows of before 2026-11-29 count by KL
    lines = [
        f"`{first['command']}`, {max(row['date'] for row in rows)}, torch {first['torch']}, {first['device']}, one thread per run, "
        f"commit {', '.join(sorted({row['commit'] for row in rows}))}.",
        "",
        f"**{sum(row['passes'] for row in rows)} of {len(rows)} seeds pass**: linear R2 >= {min_r2} for every factor, MCC >= {min_mcc}, "
        f"exactly as many live dimensions ({rule} > 0.05 nats) as factors. Scores are from sampled z, on images training never saw.",
    ]
    if "pixel_energy" in first:
        energies = (f"{factor} {mean(row['pixel_energy'][factor] for row in rows):.1f}" for factor in factors)
        lines[-1] += f" Pixel energies: {', '.join(energies)}."
    return "\n".join([*lines, "", page_table(both, columns)])


def variants_table(rows: list[Row]) -> str:
    """Markdown: a row per setting that was tried, and before it the config itself on the same seeds; means where these are several."""
    by_settings: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_settings.setdefault(row["settings"], {})[row["seed"]] = row
    configured = by_settings.pop("")
    groups: dict[tuple[int, ...], list[Row]] = {}
    for settings, found in by_settings.items():
        seeds = tuple(sorted(found))
        group = groups.setdefault(seeds, [{"settings": "as configured", "rows": [configured[seed] for seed in seeds]}])
        group.append({"settings": f"`{settings}`", "rows": list(found.values())})
    for seeds, group in groups.items():
        for line in group:
            line["seeds"] = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"

    def over_seeds(value: Callable[[Row], float]) -> Callable[[Row], float]:
        return lambda line: mean(map(value, line["rows"]))

    columns: Columns = {
        "settings": ("settings", ""),
        "seeds": ("seeds", ""),
        "lowest R2": (over_seeds(lambda row: min(row["linear_r2"].values())), ".3f"),
        "lowest MCC": (over_seeds(lambda row: min(row["mcc_per_factor"].values())), ".3f"),
        "MCC": (over_seeds(lambda row: row["mcc"]), ".3f"),
        "MIG": (over_seeds(lambda row: row["mig"]), ".2f"),
        "KL, nats": (over_seeds(lambda row: row["kl_nats"]), ".1f"),
        "KL weight at step 800": (over_seeds(lambda row: row["kl_weight"]["800"]), ".2f"),
        "passes": (lambda line: f"{sum(row['passes'] for row in line['rows'])} of {len(line['rows'])}", ""),
    }
    return page_table([line for group in groups.values() for line in group], columns)


def train_table(rows: list[Row]) -> str:
    """Markdown: runs of make train."""
    columns: Columns = {
        **{name: (name, "") for name in ("command", "run", "seed", "threads")},
        "minutes": (lambda row: row["make_seconds"] / 60, ".1f"),
        "of these training": (lambda row: row["wall_seconds"] / 60, ".1f"),
        **_factors(rows),
        **{"MCC": ("mcc", ".3f"), "MIG": ("mig", ".2f"), "live dims": ("active_dims", ""), "KL, nats": ("kl_nats", ".1f")},
        "commit": (lambda row: row["commit"][:10], ""),
    }
    return page_table(rows, columns)


def _yes(passed: bool) -> str:
    return "yes" if passed else "**no**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.recovery --seeds 0 1")
    parser.add_argument("--config", default="disks", help="name of a config that comes with the package")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--jobs", type=int, default=cores(), help="seeds trained side by side, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/recovery", help="where the run folders go")
    parser.add_argument("--output", type=Path, help="markdown file for the tables, with rows beside it; docs/results.md by default")
    parser.add_argument("--record", type=Path, help="train nothing: the row of this finished run of make train")
    parser.add_argument("--seconds", type=float, help="with --record, how long make train took, its report included")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.record:
        row = row_of(arguments.record, run=arguments.record.name, command="make train", make_seconds=arguments.seconds)
        write_rows(RESULTS / "train.jsonl", [row], ("run",))
        return
    settings = " ".join(arguments.overrides)
    command = " ".join(["python -m benchmarks.recovery", *(["--config", arguments.config] if arguments.config != "disks" else [])])

    def one(seed: int) -> Row:
        start = time.monotonic()
        folder, seconds = run_seed(arguments, seed)
        where = {"config": arguments.config, "settings": settings, "command": f"{command} {settings}".strip()}
        row = row_of(folder, **where, **({} if seconds is None else {"cpu_seconds": seconds}))
        print(f"seed {seed}: {'passes' if row['passes'] else 'fails'}, {time.monotonic() - start:.0f} s", flush=True)
        return row

    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(one, arguments.seeds))
    publish(rows, KEY, "recovery", arguments.output, {f"recovery {arguments.config}": seeds_table(rows)})


if __name__ == "__main__":
    main()
