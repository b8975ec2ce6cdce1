"""The command that prints a script for the shell, with which Tab completes commands, options and settings."""

import argparse

from .options import AddCommand

SHELLS = ("bash", "zsh", "fish")
BASH = """
# After a setting's "=" comes its value, and no space.
_sami_fast() { _shtab_sami_fast "$@"; [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace; return 0; }
complete -o bashdefault -F _sami_fast sami-fast"""


def run_completion(arguments: argparse.Namespace) -> None:
    import shtab

    from ..config import setting_keys
    from . import parser

    whole = parser()
    commands = next(action for action in whole._actions if isinstance(action, argparse._SubParsersAction)).choices
    keys = [f"{key}=" for key in setting_keys()]
    for command in commands.values():
        for action in command._actions:
            if action.dest == "overrides":
                action.choices = keys
            elif action.metavar == "FILE" or action.dest in ("run", "config"):
                action.complete = shtab.FILE  # pyrefly: ignore[missing-attribute] (which shtab looks for)
    print(shtab.complete(whole, arguments.shell))
    if arguments.shell == "bash":
        print(BASH)


def add_commands(command: AddCommand) -> None:
    added = command(
        "completion",
        run_completion,
        "print a script that completes commands, options, settings and files at Tab; in ~/.bashrc or ~/.zshrc: "
        'eval "$(sami-fast completion bash)"',
        "completion bash",
    )
    added.add_argument("shell", choices=SHELLS, help="whose script")
