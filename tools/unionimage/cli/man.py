"""`unionfuse man`: manual pages, made from the same parsers as `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from unionimage.cli.verbs import VERBS
from unionimage.errors import UserError

EXAMPLE = """
unionfuse man build | man -l -
unionfuse man --directory /usr/local/share/man/man1
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", metavar="DIR", help="write a page for every verb there")
    parser.add_argument("verb", nargs="?", metavar="VERB", help="default: the page of unionfuse")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli import load_verb, parser_of, resolve

    if args.directory is not None:
        directory = Path(args.directory)
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory")
        (directory / "unionfuse.1").write_text(overview())
        for verb in VERBS:
            text = page(verb, parser_of(verb, load_verb(verb)))
            (directory / f"unionfuse-{verb}.1").write_text(text)
        return 0
    if args.verb is None:
        print(overview(), end="")
    else:
        verb, _ = resolve([args.verb])
        print(page(verb, parser_of(verb, load_verb(verb))), end="")
    return 0


def overview() -> str:
    """The page unionfuse(1)."""

    lines = [
        *_head("unionfuse", "images and containers on a union file system"),
        ".B unionfuse\n[\\fB\\-\\-root\\fR \\fIDIR\\fR] \\fIVERB\\fR [\\fIARGUMENT\\fR ...]",
        ".br\n.B unionfuse\n\\fB\\-o\\fR lowerdir=...[,upperdir=...,workdir=...] \\fIDIR\\fR",
        ".SH VERBS",
    ]
    for verb, (_, text) in VERBS.items():
        lines += [".TP", f".BR unionfuse\\-{_escaped(verb)} (1)", _escaped(text)]
    lines += [".SH ENVIRONMENT", ".TP", "UNIONFUSE_ROOT", "The store, as \\fB\\-\\-root\\fR."]
    lines += [".TP", "UNIONFUSE_CONFIG", "The configuration file that is read instead of others."]
    return "\n".join(lines) + "\n"


def page(verb: str, parser: argparse.ArgumentParser) -> str:
    """The page unionfuse-VERB(1)."""

    usage = parser.format_usage().removeprefix("usage: ").split()
    lines = [*_head(f"unionfuse-{verb}", VERBS[verb][1]), _escaped(" ".join(usage))]
    lines += [".SH OPTIONS", *_options(parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                lines += [f".SS {_escaped(verb)} {_escaped(name)}", _sentence(below.description)]
                lines += _options(below)
    example = getattr(parser, "example", "").strip()
    if example:
        lines += [".SH EXAMPLES", ".nf", _escaped(example), ".fi"]
    lines += [".SH SEE ALSO", ".BR unionfuse (1)"]
    return "\n".join(lines) + "\n"


def _sentence(text: str | None) -> str:
    return _escaped(text[0].upper() + text[1:] + ".") if text else ""


def _head(name: str, text: str) -> list[str]:
    from unionfuse import __version__

    return [
        f'.TH {_escaped(name.upper())} 1 "" "unionfuse {__version__}"',
        ".SH NAME",
        f"{_escaped(name)} \\- {_escaped(text[0].lower() + text[1:])}",
        ".SH SYNOPSIS",
    ]


def _options(parser: argparse.ArgumentParser) -> list[str]:
    lines: list[str] = []
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        names = formatter._format_action_invocation(action)
        text = formatter._expand_help(action) if action.help else ""
        lines += [".TP", f"\\fB{_escaped(names)}\\fR", _escaped(text)]
    return lines


def _escaped(text: str) -> str:
    lines = text.replace("\\", "\\e").replace("-", "\\-").splitlines()
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in lines)
