"""`unionfuse rm`: containers and their own layer; volumes stay, except anonymous ones with -v."""

from __future__ import annotations

import argparse
import sys

from unionimage.errors import NotFound, UserError

EXAMPLE = "unionfuse rm -f web"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="kill what runs")
    parser.add_argument("-v", "--volumes", action="store_true", help="anonymous volumes too")
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine = open_engine(args)
    code = 0
    for name in args.container:
        try:
            engine.remove(engine.find(name), force=args.force, anonymous_volumes=args.volumes)
        except NotFound as error:
            print(f"unionfuse: {error.message}", file=sys.stderr)
            code = code if args.force else 1
        except UserError as error:
            print(f"unionfuse: {error.message}", file=sys.stderr)
            code = 1
        else:
            print(name)
    return code
