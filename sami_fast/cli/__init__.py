"""The `sami-fast` command: train, and use what was trained.

Exit status: 0 done, 2 something the user gave cannot work (one sentence on stderr), 130 interrupted; of `train` also those of
`sami_fast.train.run`.
Torch is imported only once a command needs it. Each module of commands has an `add_commands`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from ..errors import UserError, printable
from ..progress import shown
from . import completion, evaluation, explore, facts, options, pack, plan, sampling, training


class _Command(argparse.ArgumentParser):
    """Takes options before, between and after its other arguments, as training does."""

    _mixes = False

    def parse_known_args(self, args=None, namespace=None):  # pyrefly: ignore[bad-override]  # argparse's overloads
        if self._mixes:  # argparse mixes by this very method
            return super().parse_known_args(args, namespace)
        self._mixes = True
        try:
            return self.parse_known_intermixed_args(self._sorted(sys.argv[1:] if args is None else args), namespace)
        finally:
            self._mixes = False

    def _sorted(self, words: Sequence[str]) -> list[str]:
        """The words, such that an option that takes numbers takes no others: `--gpus 1 8 disks` is `disks --gpus 1 8`."""
        found, at = [], 0
        while at < len(words):
            action = self._option_string_actions.get(words[at])
            if not (action and action.nargs == "+" and callable(action.type)):
                found.append(words[at])
                at += 1
                continue
            values = at + 1
            while values < len(words) and _fits(action.type, words[values]):
                values += 1
            others = values
            while values > at + 1 and others < len(words) and not words[others].startswith("-"):
                others += 1
            found += [*words[values:others], *words[at:values]]
            at = others
        return found


def _fits(kind: Callable[[str], object], word: str) -> bool:
    try:
        kind(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """Every command with its options; `run_command` of the parsed arguments does the work."""
    parser = argparse.ArgumentParser(
        prog="sami-fast",
        description="Train SAMI, and use what was trained.",
        epilog="example: sami-fast train --config disks; each command's --help has its own",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Command)

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, example: str, *parents: Any
    ) -> argparse.ArgumentParser:
        brief = re.split("[;:]", help)[0]
        added = commands.add_parser(name, parents=parents, help=brief, description=help, epilog=f"example: sami-fast {example}")
        added.set_defaults(run_command=run)
        return added

    training.add_commands(command)
    facts.add_commands(command)
    pack.add_commands(command)
    sampling.add_commands(command)
    evaluation.add_commands(command)
    plan.add_commands(command)
    explore.add_commands(command)
    completion.add_commands(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status; wrong usage exits with status 2 from here."""
    arguments = parser().parse_args(argv)
    try:
        with shown(), options.threads(arguments):
            return arguments.run_command(arguments) or 0
    except (UserError, OSError) as error:  # OSError: a name too long, no permission; the system's own words
        print(printable(f"sami-fast: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sami-fast: interrupted", file=sys.stderr)
        return 130
