"""`unionfuse wait`: until containers end; their exit codes are printed."""

from __future__ import annotations

import argparse

EXAMPLE = "unionfuse wait job"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine = open_engine(args)
    for container in [engine.find(name) for name in args.container]:
        print(engine.wait(container), flush=True)
    return 0
