"""`unionfuse restart`: stop and start."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from unionimage.cli.stop import add_stop_options

if TYPE_CHECKING:
    from unionimage.container.state import Container

EXAMPLE = "unionfuse restart web"


def configure(parser: argparse.ArgumentParser) -> None:
    add_stop_options(parser)
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import for_each, open_engine
    from unionimage.container.processes import signal_number

    engine = open_engine(args)
    number = signal_number(args.signal) if args.signal else None

    def again(container: Container) -> None:
        engine.stop(container, args.time, number)
        engine.start(container)
        engine.events.container(container, "restart")

    return for_each(engine, args.container, again)
