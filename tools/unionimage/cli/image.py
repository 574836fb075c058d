"""`unionfuse image`: docker's grouped forms of the verbs for images."""

from __future__ import annotations

import argparse

from unionimage.cli.parser import add_grouped

EXAMPLE = """unionfuse image ls
unionfuse image prune -f"""


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_grouped(verbs, "image")


def run(args: argparse.Namespace) -> int:
    """The dispatch takes every form before it comes to this."""
    from unionimage.cli import main

    return main(["image", args.action])
