"""The `sami-fast` command: what one does with a trained model.

Exit status: 0 done, 2 something the user gave cannot work (one sentence on stderr), 130 interrupted.
Torch is imported only once a command needs it. Each module of commands has an `add_commands`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from ..errors import UserError, printable
from . import evaluation, explore, facts, plan, sampling


class _Command(argparse.ArgumentParser):
    """Takes options before, between and after its other arguments, as training does."""

    _mixes = False

    def parse_known_args(self, args=None, namespace=None):  # pyrefly: ignore[bad-override]  # argparse's overloads
        if self._mixes:  # argparse mixes by this very method
            return super().parse_known_args(args, namespace)
        self._mixes = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixes = False


def parser() -> argparse.ArgumentParser:
    """Every command with its options; `run_command` of the parsed arguments does the work."""
    parser = argparse.ArgumentParser(
        prog="sami-fast",
        description="Use a trained SAMI model. Training itself: python sami_fast/train.py --help.",
        epilog="example: sami-fast traverse runs/disks --output traversals.png",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Command)

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str, example: str, *parents: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=parents, help=help, description=help, epilog=f"example: sami-fast {example}")
        added.set_defaults(run_command=run)
        return added

    facts.add_commands(command)
    sampling.add_commands(command)
    evaluation.add_commands(command)
    plan.add_commands(command)
    explore.add_commands(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status; wrong usage exits with status 2 from here."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run_command(arguments)
    except (UserError, OSError) as error:  # OSError: a name too long, no permission; the system's own words
        print(printable(f"sami-fast: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sami-fast: interrupted", file=sys.stderr)
        return 130
    return 0
