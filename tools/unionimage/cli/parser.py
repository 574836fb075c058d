"""The argument parser of a verb: argparse with docker's manners."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from unionimage.cli.verbs import ALIASES, VERBS
from unionimage.errors import UserError

# The words that docker's flags take, and whether they switch on.
_SWITCHED = dict.fromkeys(("1", "t", "T", "true", "True", "TRUE"), True)
_SWITCHED |= dict.fromkeys(("0", "f", "F", "false", "False", "FALSE"), False)


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
        self.refused: dict[str, str] = {}  # docker's options that are not here, and why
        self.add_argument("--help", action="help", help="show this and exit")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._in_our_form(words), namespace)

    def _in_our_form(self, words: Sequence[str]) -> list[str]:
        """Switches as docker takes them, in the form of argparse.

        `--rm=true` and `--rm=false`; and what may have a value has it behind `=` alone: `-H app` is
        not the value `app`. What follows the name of an image or container is not ours.
        """
        rest_is_taken = any(one.nargs == argparse.PARSER for one in self._get_positional_actions())
        formed: list[str] = []
        left = list(words)
        while left:
            word = left.pop(0)
            if word == "--" or (rest_is_taken and (word == "-" or not word.startswith("-"))):
                return [*formed, word, *left]
            name, equals, value = word.partition("=")
            if name in self.refused:
                raise UserError(f"{name} is not supported: {self.refused[name]}", exit_code=125)
            action = self._option_string_actions.get(name)
            if isinstance(action, argparse._StoreTrueAction) and equals:
                if value not in _SWITCHED:
                    self.error(f"argument {name}: {value!r} is neither true nor false")
                formed = [one for one in formed if one != name]
                formed += [name] * _SWITCHED[value]
            elif action is not None and action.nargs == argparse.OPTIONAL and not equals:
                formed.append(f"{name}={action.const}")
            else:
                formed.append(word)
                if left and not equals and self._wants_a_value(word):
                    formed.append(left.pop(0))
        return formed

    def _wants_a_value(self, word: str) -> bool:
        """Whether the next word belongs to this one: `--name`, `-n`, `-itn`."""
        if word in self._option_string_actions:
            return self._option_string_actions[word].nargs is None
        if word[:1] != "-" or word[:2] == "--":
            return False
        for end, letter in enumerate(word[1:], 2):
            action = self._option_string_actions.get("-" + letter)
            if action is None or action.nargs != 0:
                return action is not None and action.nargs is None and end == len(word)
        return False

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'", exit_code=125)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()
        raise SystemExit(status)
