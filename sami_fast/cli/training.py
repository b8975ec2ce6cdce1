"""The training command: the arguments that `sami-fast train` and sami_fast/train.py share."""

import argparse

from .options import AddCommand, add_device, at_least

EXAMPLE = "train --config disks train.steps=50 name=short"
SEVERAL = "deepspeed -q --num_accelerators {ranks} --module sami_fast.train"  # the command for several processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="a YAML file, or the name of a config that comes with the package (disks)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ, dotted keys: train.steps=50")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace the run folder")
    parser.add_argument("--no-report", action="store_true", help="end with the model; `sami-fast report` writes the report later")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would do, take and write, and stop")
    parser.add_argument("--verbose", action="store_true", help="with --dry-run: also every setting, and those of DeepSpeed, if any")
    parser.add_argument("--settings", action="store_true", help="print every setting with its meaning, unit and default, and stop")
    parser.add_argument("--threads", dest="cpu_threads", type=at_least(1, 1024), metavar="N", help="CPU threads: engine.threads=N")
    add_device(parser)
    parser.add_argument(
        "--num_accelerators", "--num_gpus", dest="ranks", type=at_least(1), metavar="N", help="several processes: says the command for them"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it


def run_train(arguments: argparse.Namespace) -> int:
    from ..train import run

    return run(arguments)


def add_commands(command: AddCommand) -> None:
    add_arguments(
        command(
            "train",
            run_train,
            "train a run and write its folder: config, log, checkpoints, model, report. In one process; in several: "
            f"{SEVERAL.format(ranks=2)} and the same arguments",
            EXAMPLE,
        )
    )
