"""The command that trains: train, the same as the script sami_fast/train.py."""

import argparse

from .options import SEVERAL, AddCommand, add_training_arguments

EXAMPLE = "train --config disks train.steps=50 name=short"


def run_train(arguments: argparse.Namespace) -> int:
    from ..train import run

    return run(arguments)


def add_commands(command: AddCommand) -> None:
    add_training_arguments(
        command(
            "train",
            run_train,
            "train a run and write its folder: config, log, checkpoints, model, report. In one process; in several: "
            f"{SEVERAL.format(ranks=2)} and the same arguments",
            EXAMPLE,
        )
    )
