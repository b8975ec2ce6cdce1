"""What runs on many GPUs would cost, as `sami-fast plan` derives it: writes results/plan.jsonl and the plans of docs/scaling.md.

python -m benchmarks.scaling
python -m benchmarks.scaling --configs celeba64

No GPU is asked and nothing is measured. The plan of celebahq256 needs its denoiser: a UNet of the published architecture with fresh weights
is made for it, since a plan depends on shapes alone.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import Any

from sami_fast import plan
from sami_fast.cli.plan import _lines
from sami_fast.config import Config, load_config
from sami_fast.environment import describe

from .rows import RESULTS, ROOT, Row, address, committed, write_rows
from .tables import rewrite

GPUS, GPU = (8, 64, 512), "h100-sxm"
CONFIGS = {"celeba64": "data.path=celeba", "celebahq256": "data.path=faces", "imagenet64": "data.path=imagenet"}
# config.json of google/ddpm-celebahq-256, where it differs from diffusers' defaults
PUBLISHED = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


@contextmanager
def config_of(name: str) -> Iterator[Config]:
    """A config as its plan needs it; a published denoiser stands in a folder meanwhile."""
    config = load_config(name, [CONFIGS[name]])
    if not config.denoiser.pretrained:
        yield config
        return
    from diffusers import DDPMScheduler, UNet2DModel

    with TemporaryDirectory() as folder:
        UNet2DModel(**PUBLISHED).save_pretrained(folder)
        DDPMScheduler().save_pretrained(folder)
        yield load_config(name, [CONFIGS[name], f"denoiser.pretrained={folder}"])


def row_of(name: str) -> Row:
    """The plan of a config as a row: `sami-fast plan --json`, and its address."""
    with config_of(name) as config:
        found = plan.facts(plan.plan(config, list(GPUS), GPU))
    command = f"sami-fast plan {name} {CONFIGS[name]} --gpus {' '.join(map(str, GPUS))}"
    return found | address(describe(), command, str(datetime.now(UTC).date()))


def generated(name: str) -> str:
    """A block of docs/scaling.md, by what follows `plan` in its name: a config. What the command prints, indented."""
    (row,) = committed("plan.jsonl", config=name)
    return "\n".join(f"    {line}".rstrip() for line in _lines(plan_of(row)))


def plan_of(row: Row) -> plan.Plan:
    """The plan that a row was written from, less the sizes of single parameters."""
    networks = {name: plan.Network(**network, sizes=()) for name, network in row["counted"]["networks"].items()}
    rows = [_estimate(**estimate) for estimate in row["estimated"]]
    return plan.Plan(
        config=load_config(row["config"], [CONFIGS[row["config"]]]),
        image_shape=tuple(row["image_shape"]),
        gpu=row["assumed"]["gpu"],
        mfu=row["assumed"].get("mfu"),
        networks=networks,
        method=row["score"],
        flops=row["counted"]["flops_per_step"],
        rows=tuple(rows),
        unsplit=tuple(row["batch_does_not_split_over"]),
    )


def _estimate(memory: Row, busy: Row | None, bound: str, **others: Any) -> plan.Row:
    """What follows from other figures of a row, the memory's total and the bound, is left out."""
    held = plan.Memory(**{key: value for key, value in memory.items() if key != "gpu"})
    return plan.Row(memory=held, busy=busy and plan.Busy(**busy | {"host": tuple(busy["host"])}), **others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.scaling --configs celeba64")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    write_rows(RESULTS / "plan.jsonl", map(row_of, parser.parse_args().configs), ("config",))
    rewrite(ROOT / "docs/scaling.md", "plan")


if __name__ == "__main__":
    main()
