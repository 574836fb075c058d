"""`unionfuse rename`: another name for a container."""

from __future__ import annotations

import argparse

EXAMPLE = "unionfuse rename web old-web"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("name", metavar="NEW_NAME")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine = open_engine(args)
    container = engine.find(args.container)
    engine.containers.rename(container, args.name)
    engine.events.container(container, "rename")
    return 0
