"""The command that says what a run would cost."""

import argparse
import json
from typing import TYPE_CHECKING

from .options import AddCommand, at_least, path

if TYPE_CHECKING:
    from ..plan import Plan

COUNTS = [1, 8, 64, 512]


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, found {text!r}")
    return value


def run_plan(arguments: argparse.Namespace) -> None:
    from .. import plan
    from ..config import load_config

    found = plan.plan(
        load_config(arguments.config, arguments.overrides), arguments.gpus, arguments.gpu, arguments.mfu, arguments.collectives
    )
    print(json.dumps(plan.facts(found), indent=2) if arguments.json else "\n".join(_lines(found)))


def _lines(found: "Plan") -> list[str]:
    from ..plan import BANDWIDTH_SHARE, BOUNDS, GPUS, HOST, KERNEL, LINK_SHARE, PEAK_SHARE, PER_MACHINE, USABLE

    config, gpu = found.config, GPUS[found.gpu]
    channels, height, width = found.image_shape
    lines = [
        f"{config.name}: {width}x{height} pixels, {channels} channel(s), batches of {config.train.batch_size} images, "
        f"{config.objective.noise_levels} noise level(s) each, {config.engine.precision}, train.mode {config.mode}",
        "",
        "Counted, for one image and one forward pass",
    ]
    for name, network in found.networks.items():
        kept = f"keeps {network.kept / 2**20:.1f} MiB for its backward in float32" if network.trained else "frozen"
        work = (network.forward + network.attention) / 1e9
        lines.append(f"  {name:<9} {network.parameters / 1e6:>8.2f} M parameters, {work:.3g} GFLOP, {kept}")
    parts = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in found.flops.items())
    guided = f", with score {found.method}" if "score" in found.flops else ""
    recomputed = ", the denoiser's blocks computed twice" if config.engine.checkpoint_activations else ""
    precision = "tf32" if config.engine.precision == "fp32" and config.engine.tf32 and found.mfu is None else config.engine.precision
    peak = f"{gpu.peak(precision) / 1e12:g} TFLOP/s in {precision}"
    if found.mfu is None:
        low, high = (1e6 * seconds for seconds in HOST)
        memory = f"{BANDWIDTH_SHARE:.0%} of {gpu.bandwidth:g} TB/s of its memory"
        assumed = f"{PEAK_SHARE:.0%} of {peak}; {memory}; at least {1e6 * KERNEL:g} us a kernel, and {low:g} to {high:g} us of the host"
    else:
        assumed = f"{found.mfu:.0%} of {peak}"
    lines += [
        "",
        f"One step over all GPUs{guided}{recomputed}: {sum(found.flops.values()) / 1e12:.3g} TFLOP ({parts})",
        "",
        f"Estimated, nothing of it measured, for {found.gpu} ({gpu.source})",
        f"  assumed: {assumed}",
        f"  links: {LINK_SHARE:.0%} of {gpu.nvlink:g} GB/s inside a machine of {PER_MACHINE} GPUs "
        f"and of {gpu.network:g} GB/s per GPU between machines{', bytes sent as by gloo' if found.collectives == 'gloo' else ''}",
        "  step: from transfer hidden behind compute to one after the other; without latency, data and disk",
        f"  a GPU's {gpu.memory:g} GB hold a run that needs at most {USABLE:.0%} of them",
        "",
        *_table(found),
    ]
    lines += [f"  {name}: {cure}" for name, cure in BOUNDS.items() if name in {row.bound for row in found.rows}]
    if found.unsplit:
        counts = ", ".join(map(str, found.unsplit))
        lines.append(f"  {config.train.batch_size} images do not split over {counts} GPUs: set train.batch_size")
    return lines


HEADS = (
    *("GPUs", "ZeRO", "images"),
    *("weights", "gathered", "grads", "optim", "averages", "buckets", "activ", "GPU", "host"),
    *("sent", "kernels", "compute", "host", "transfer", "step", "bound by", ""),
)


def _table(found: "Plan") -> list[str]:
    unit, size = ("GB", 1e9) if max((row.memory.gpu for row in found.rows), default=0) >= 1e9 else ("MB", 1e6)
    rows: list[tuple[str, ...]] = [HEADS, ("", "", "a GPU", *[unit] * 10, "", *["ms"] * 4, "", "")]
    for row in found.rows:
        (low, high), host = row.step, row.busy.host if row.busy else ()
        rows.append(
            (
                *(str(n) for n in (row.gpus, row.stage, row.images)),
                *(f"{held / size:.2f}" for held in (*row.memory.on_gpu, row.memory.gpu, row.memory.host, row.sent)),
                str(row.busy.kernels) if row.busy else "",
                f"{1e3 * row.compute:.3g}",
                "-".join(f"{1e3 * seconds:.3g}" for seconds in host),
                f"{1e3 * row.transfer:.3g}",
                f"{1e3 * low:.3g}-{1e3 * high:.3g}",
                row.bound,
                "" if row.fits else "does not fit",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def add_commands(command: AddCommand) -> None:
    added = command(
        "plan",
        run_plan,
        "say what a run would cost: parameters, FLOPs, memory of a GPU and bytes on the wire at every ZeRO stage, an estimate of the time; "
        "needs neither the data nor a GPU",
        "plan disks train.batch_size=512 --gpus 1 8 64 --mfu 0.4",
    )
    added.add_argument("config", type=path, help="a YAML file, or the name of a config that comes with the package")
    added.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ: train.batch_size=4096")
    added.add_argument("--gpus", nargs="+", type=at_least(1, 10**5), default=COUNTS, metavar="N", help="numbers of GPUs (1 8 64 512)")
    added.add_argument("--gpu", default="h100-sxm", metavar="NAME", help="a100-80, h100-sxm, h200 or b200 (%(default)s)")
    added.add_argument("--mfu", type=share, metavar="SHARE", help="times from FLOPs and this share of the GPU's peak")
    added.add_argument(
        "--collectives", default="nccl", metavar="NAME", help="count the bytes that nccl sends (%(default)s), or gloo, which CPUs use"
    )
    added.add_argument("--json", action="store_true", help="print JSON")
