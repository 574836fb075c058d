"""`unionfuse wait`: until containers end; their exit codes are printed."""

from __future__ import annotations

import argparse
import sys

from unionimage.errors import UserError

EXAMPLE = "unionfuse wait job"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine, code = open_engine(args), 0
    for name in args.container:
        try:
            print(engine.wait(engine.find(name)), flush=True)
        except UserError as error:
            print(f"unionfuse wait: {error.message}", file=sys.stderr)
            code = 1
    return code
