"""What the commands share: how help is shown, arguments that several have, and the place where models run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


class HelpFormatter(argparse.HelpFormatter):
    """Wraps a description, leaves an epilog as it is written, and names every default."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, "", False, argparse.SUPPRESS) or default == [] or "default" in text:
            return text
        return f"{text}; default %(default)s"


def add_command(
    commands: Commands,
    name: str,
    help: str,
    *,
    run: Callable[[argparse.Namespace], int],
    examples: tuple[str, ...],
    about: str = "",
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
    """Declare a command.

    Args:
        commands: of the main parser.
        name: of the command.
        help: one line for the list of commands.
        run: is called with the arguments; returns the exit code.
        examples: whole command lines.
        about: more than `help`, for the command's own help.
        takes_settings: whether KEY VALUE pairs may follow.
    """
    epilog = "\n  ".join(["examples:", *examples]) + "\n"
    if takes_settings:
        epilog += "\nSettings may follow as KEY VALUE pairs; `air settings` explains them.\n"
    parser = commands.add_parser(
        name, help=help, description=about or help, epilog=epilog, formatter_class=HelpFormatter
    )
    parser.set_defaults(run=run, takes_settings=takes_settings)
    return parser


def add_place(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that loads a model."""
    parser.add_argument("--device", default="", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--offline", action="store_true", help="never use the network; the same as AIR_OFFLINE=1")
