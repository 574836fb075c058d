"""The argument parser of a verb: argparse with docker's manners."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from unionimage.cli.verbs import ALIASES, VERBS
from unionimage.errors import UserError


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Knows the width of the terminal; argparse would import all of shutil to find it out."""
    try:
        width = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (OSError, ValueError):
        width = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=max(width, 40) - 2)


def add_grouped(verbs: argparse._SubParsersAction[argparse.ArgumentParser], group: str) -> None:
    """Name docker's grouped forms among the actions of `unionfuse GROUP`, for help and completion.

    Nothing is parsed by these: the dispatch takes such a form before.
    """
    for form, target in ALIASES.items():
        if len(form) == 2 and form[0] == group:
            what = VERBS[target[0]][1]
            what = f"{what[0].lower()}{what[1:]} ('unionfuse {' '.join(target)}')"
            verbs.add_parser(form[1], help=what, description=what)


def add_name_and_command(
    parser: argparse.ArgumentParser, name: str, command: str, help: str
) -> None:
    """Add an argument, and all that follows it as it is written: options, and `--`.

    Args:
        name, command: the attributes for the argument and for the list of what follows.
    """

    class Split(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: str | Sequence[Any] | None,
            option_string: str | None = None,
        ) -> None:
            words = list(values or ())
            if words[0] == "--":  # the end of our own options
                words.pop(0)
            setattr(namespace, name, words[0])
            setattr(namespace, command, words[1:])

    parser.add_argument(name, metavar=name.upper(), nargs=argparse.PARSER, action=Split, help=help)


class VerbParser(argparse.ArgumentParser):
    """Never exits by itself for an error: raises UserError with docker's exit code 125.

    Args:
        prog: `unionfuse VERB`.
        description: one sentence.
        example: command lines, one a line; shown at the end of the help.
    """

    def __init__(self, prog: str, description: str, example: str = "", **options: Any) -> None:
        lines = "\n".join("  " + line for line in example.strip().splitlines())
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"Example:\n{lines}" if lines else None,
            formatter_class=_formatter,
            allow_abbrev=False,
            add_help=False,
            **options,
        )
        self.example = example
        self.add_argument("--help", action="help", help="show this and exit")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'", exit_code=125)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()
        raise SystemExit(status)
