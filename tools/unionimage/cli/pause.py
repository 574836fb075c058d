"""`unionfuse pause`: the cgroup freezer."""

from __future__ import annotations

import argparse

EXAMPLE = "unionfuse pause web"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import for_each, open_engine

    engine = open_engine(args)
    return for_each(engine, args.container, lambda one: engine.ask(one, op="pause"))
