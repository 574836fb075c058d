"""`unionfuse stop`: the stop signal, and SIGKILL for those that take too long."""

from __future__ import annotations

import argparse

EXAMPLE = "unionfuse stop -t 30 web"


def configure(parser: argparse.ArgumentParser) -> None:
    add_stop_options(parser)
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def add_stop_options(parser: argparse.ArgumentParser) -> None:
    """How `stop` and `restart` stop."""
    parser.add_argument(
        "-t",
        "--time",
        "--timeout",
        type=int,
        metavar="SECONDS",
        help="wait so long before killing (default: 10)",
    )
    parser.add_argument(
        "-s", "--signal", metavar="SIGNAL", help="this signal instead of its stop signal"
    )


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import for_each, open_engine
    from unionimage.container.processes import signal_number

    engine = open_engine(args)
    number = signal_number(args.signal) if args.signal else None
    return for_each(engine, args.container, lambda one: engine.stop(one, args.time, number))
