"""Do the latents recover the factors, seed by seed? Trains a config over many seeds and writes a table, losers included.

python benchmarks/recovery.py                          # eight seeds of disks, docs/results.md
python benchmarks/recovery.py --seeds 0 1 --output try.md optimizer.ema_decay=0
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIN_R2, MIN_MCC = 0.95, 0.9


def run_seed(arguments: argparse.Namespace, seed: int) -> dict:
    """Train one seed with one thread; returns its report/metrics.json."""
    name = f"{arguments.config}_seed{seed}"
    command = [sys.executable, str(ROOT / "sami_fast/train.py"), "--config", arguments.config, "--overwrite"]
    command += [f"seed={seed}", f"name={name}", f"runs_dir={arguments.runs}", "engine.threads=1", *arguments.overrides]
    arguments.runs.mkdir(parents=True, exist_ok=True)
    with open(arguments.runs / f"{name}.log", "w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    return json.loads((arguments.runs / name / "report/metrics.json").read_text())


def passes(scores: dict) -> bool:
    """R2 of every factor and the mean MCC from sampled z, and exactly as many live dimensions as factors."""
    r2 = scores["linear_r2"]
    return min(r2.values()) >= MIN_R2 and scores["mcc"] >= MIN_MCC and scores["active_dims"] == len(r2)


def table(results: dict[int, dict]) -> str:
    """Markdown: a row per seed, and the untrained encoder of the same seed below it."""
    factors = list(next(iter(results.values()))["linear_r2"])
    header = [
        "seed",
        *(f"R2 {f}" for f in factors),
        *(f"MCC {f}" for f in factors),
        "MCC",
        "MIG",
        "live dims",
        "KL, nats",
        "passes",
        "minutes",
    ]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    for seed, scores in sorted(results.items()):
        for label, row in ((f"{seed}", scores), (f"{seed}, untrained", scores["untrained"])):
            trained = row is scores
            cells = [label]
            cells += [f"{row['linear_r2'][f]:.3f}" for f in factors]
            cells += [f"{row['mcc_per_factor'][f]:.3f}" for f in factors]
            cells += [f"{row['mcc']:.3f}", f"{row['mig']:.2f}", f"{row['active_dims']}", f"{row['kl_nats']:.1f}"]
            cells += [("yes" if passes(scores) else "**no**") if trained else "", f"{row['wall_seconds'] / 60:.1f}" if trained else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python benchmarks/recovery.py --seeds 0 1")
    parser.add_argument("--config", default="disks", help="name of a config that comes with the package")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="seeds trained side by side, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/recovery", help="where the run folders go")
    parser.add_argument("--output", type=Path, help="markdown file whose generated part is replaced; docs/results.md by default")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    output = arguments.output or ROOT / "docs/results.md"

    def one(seed: int) -> dict:
        start = time.monotonic()
        scores = run_seed(arguments, seed)
        print(f"seed {seed}: {'passes' if passes(scores) else 'fails'}, {time.monotonic() - start:.0f} s", flush=True)
        return scores

    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(arguments.seeds, pool.map(one, arguments.seeds), strict=True))
    environment = json.loads((arguments.runs / f"{arguments.config}_seed{arguments.seeds[0]}/environment.json").read_text())
    passed = sum(map(passes, results.values()))
    command = " ".join(
        ["python benchmarks/recovery.py", *(["--config", arguments.config] if arguments.config != "disks" else []), *arguments.overrides]
    )
    generated = "\n".join(
        [
            f"`{command}`, {date.today()}, torch {environment['packages']['torch']}, CPU, one thread per run, "
            f"commit {environment['commit']}.",
            "",
            f"**{passed} of {len(results)} seeds pass**: linear R2 >= {MIN_R2} for every factor, MCC >= {MIN_MCC}, "
            "exactly as many live dimensions (KL > 0.05 nats) as factors. Scores are from sampled z, on images training never saw.",
            "",
            table(results),
        ]
    )
    write_generated(output, f"recovery {arguments.config}", generated)
    print(generated)


def write_generated(path: Path, name: str, generated: str) -> None:
    """Replace what stands between the markers of this name, or append it."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = path.read_text() if path.exists() else "# Results\n"
    block = f"{start}\n{generated}\n{end}"
    if start in text:
        head, _, rest = text.partition(start)
        text = head + block + rest.partition(end)[2]
    else:
        text = text.rstrip() + "\n\n" + block + "\n"
    path.write_text(text)


if __name__ == "__main__":
    main()
