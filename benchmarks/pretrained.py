"""How soon do latents arrive on a denoiser that is trained already? Against the joint run, seed by seed, losers included.

python -m benchmarks.pretrained                        # results/pretrained.jsonl and docs/results.md
python -m benchmarks.pretrained --seeds 0 --denoiser-steps 500 --output try.md          # try.md and try.jsonl

Trains a diffusers UNet2DModel with diffusers' own scheduler and pipeline, then encoders beside it, frozen. Beside the time of each frozen
run stand the whole joint run of the same seed, how far that had come by then, and when it got its worst factor as far. Runs take turns, one
thread each.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from sami_fast.config import Config, load_config
from sami_fast.data import open_dataset
from sami_fast.environment import describe
from sami_fast.latents.sampling import encode
from sami_fast.metrics.identifiability import linear_r2
from sami_fast.train import Trainer

from .rows import ROOT, Row, address, committed
from .table import Columns, page_table
from .tables import publish

MIN_R2, MAX_SHARE = 0.9, 1 / 3
# What differs from configs/disks_joint.yaml: short, a beta for the little that a strong denoiser leaves to gain, and a clip that holds what
# the first steps found while the learning rate rises.
FROZEN = ["train.mode=frozen", "train.steps=600", "train.bank_steps=120", "encoder.start=denoiser", "objective.time_power=2"]
FROZEN += ["kl_weight.start=0.05", "kl_weight.end=0.02", "optimizer.encoder_lr=0.002", "optimizer.warmup_steps=20"]
FROZEN += ["optimizer.clip=0.5", "optimizer.ema_decay=0.95"]
IMAGES = 4000
KEY = ("settings", "seed")  # two rows that agree in these are the same


@dataclass(frozen=True)
class Reached:
    """How far a run had come."""

    step: int
    seconds: float  # of training alone
    r2: dict[str, float]  # of each factor, from sampled latents


def train_denoiser(folder: Path, steps: int) -> float:
    """diffusers' own UNet, noise and loss on generated disks; returns the last loss, a mean square per pixel."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    images = open_dataset(load_config("disks").data, seed=0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.Adam(unet.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    average = 1.0
    for step in range(steps):
        x_0 = images.images(torch.arange(step * 64, (step + 1) * 64))
        eps, timestep = torch.randn_like(x_0), torch.randint(0, 1000, (64,))
        loss = (unet(scheduler.add_noise(x_0, eps, timestep), timestep).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        average = 0.99 * average + 0.01 * loss.item()
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return average


def run(config: Config, every: int) -> Iterator[Reached]:
    """Train, and look at the latents every so many steps."""
    trainer = Trainer(config, resume=False, overwrite=True)
    index = torch.arange(IMAGES)
    images, factors = trainer.validation.images(index), trainer.validation.factors(index).numpy()
    seconds = 0.0
    try:
        while trainer.step < config.train.steps:
            start = time.process_time()
            trainer.update()
            trainer.step += 1
            seconds += time.process_time() - start
            if trainer.step % every == 0 or trainer.step == config.train.steps:
                with trainer.engine.averaged_weights():
                    codes = encode(trainer.model, images).draw(index, config.seed).numpy()
                names = trainer.validation.factor_names
                yield Reached(trainer.step, seconds, dict(zip(names, linear_r2(codes, factors).tolist(), strict=True)))
    finally:
        trainer.feed.close()
        trainer.run_folder.release()


def settings(arguments: argparse.Namespace, name: str, seed: int, overrides: Sequence[str]) -> Config:
    own = [f"name={name}_seed{seed}", f"seed={seed}", f"runs_dir={arguments.runs}", "engine.threads=1"]
    return load_config("disks_joint", [*own, *overrides])


def compare(arguments: argparse.Namespace, seed: int) -> tuple[Reached, list[Reached]]:
    """The frozen run at its end; the joint run on its way."""
    frozen_settings = [*FROZEN, f"denoiser.pretrained={arguments.runs / 'ddpm'}", *arguments.overrides]
    frozen = list(run(settings(arguments, "frozen", seed, frozen_settings), every=10**9))[-1]
    return frozen, list(run(settings(arguments, "joint", seed, []), every=50))


def row_of(seed: int, frozen: Reached, joint: Sequence[Reached]) -> Row:
    """What a seed gave; `share` is of the time of the whole joint run."""
    by_then = [reached for reached in joint if reached.seconds <= frozen.seconds] or joint[:1]
    as_far = next((reached for reached in joint if min(reached.r2.values()) >= min(frozen.r2.values())), None)
    share = frozen.seconds / joint[-1].seconds
    return {
        "seed": seed,
        "r2": frozen.r2,
        "frozen_seconds": frozen.seconds,
        "joint_seconds": joint[-1].seconds,
        "joint_r2": joint[-1].r2,
        "joint_r2_by_then": by_then[-1].r2,
        "joint_seconds_to_same": as_far and as_far.seconds,
        "share": share,
        "passes": min(frozen.r2.values()) >= MIN_R2 and share < MAX_SHARE,
    }


def generated(data: str) -> str:
    """The table of docs/results.md, by what follows `pretrained` in its name: `disks`."""
    return table(committed("pretrained.jsonl", data=data, settings=""))


def table(rows: list[Row]) -> str:
    """Markdown: a row per seed."""
    first, unet = rows[0], rows[0]["denoiser"]
    columns: Columns = {
        "seed": ("seed", ""),
        **{f"R2 {factor}": (f"r2.{factor}", ".3f") for factor in first["r2"]},
        "frozen, s": ("frozen_seconds", ".0f"),
        "joint, s": ("joint_seconds", ".0f"),
        "share": ("share", ".2f"),
        "joint by then, least R2": (lambda row: max(0.0, min(row["joint_r2_by_then"].values())), ".2f"),
        "joint as far, s": (lambda row: f"{row['joint_seconds_to_same']:.0f}" if row["joint_seconds_to_same"] else "never", ""),
        "passes": (lambda row: "yes" if row["passes"] else "**no**", ""),
    }
    lines = [
        f"`{first['command']}`, {max(row['date'] for row in rows)}, torch {first['torch']}, {first['device']}, one thread, "
        f"commit {', '.join(sorted({row['commit'] for row in rows}))}.",
        "",
        f"The denoiser: a diffusers `UNet2DModel` with `DDPMScheduler`, {unet['steps']} steps of 64 disks in {unet['seconds']:.0f} s, "
        f"mean squared error {unet['loss']:.4f} per pixel.",
        "",
        f"**{sum(row['passes'] for row in rows)} of {len(rows)} seeds pass**: linear R2 >= {MIN_R2} for every factor at the end of the "
        "frozen run, in less than a third of the time of the run of `configs/disks_joint.yaml`. Beside that, how far the joint run had "
        "come in the time of the frozen one, and when its worst factor was as good. Scores are from sampled z; seconds are processor time "
        "of training alone.",
        "",
    ]
    return "\n".join([*lines, page_table(sorted(rows, key=lambda row: row["seed"]), columns)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.pretrained --seeds 0 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--denoiser-steps", type=int, default=2500, help="steps of the UNet; one that is there is taken as it is")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/pretrained", help="where the UNet and the run folders go")
    parser.add_argument("--output", type=Path, help="markdown file for the tables, with rows beside it; docs/results.md by default")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the frozen runs that differ")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    facts = arguments.runs / "ddpm.json"
    if not facts.exists():
        start = time.process_time()
        loss = train_denoiser(arguments.runs / "ddpm", arguments.denoiser_steps)
        facts.write_text(json.dumps({"steps": arguments.denoiser_steps, "loss": loss, "seconds": time.process_time() - start}))
    unet = json.loads(facts.read_text())
    settings = " ".join(arguments.overrides)
    where = address(describe(), f"python -m benchmarks.pretrained {settings}".strip(), str(datetime.now(UTC).date()))
    rows = []
    for seed in arguments.seeds:
        rows.append({"data": "disks", "settings": settings, **row_of(seed, *compare(arguments, seed)), "denoiser": unet, **where})
        print(json.dumps(rows[-1]), flush=True)
    publish(rows, KEY, "pretrained", arguments.output, {"pretrained disks": table(rows)})
    return 0 if all(row["passes"] for row in rows) else 1


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        raise SystemExit(main())
