"""`unionfuse kill`: a signal to the first process of containers."""

from __future__ import annotations

import argparse

EXAMPLE = "unionfuse kill -s HUP web"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-s", "--signal", metavar="SIGNAL", default="KILL", help="the signal (default: KILL)"
    )
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import for_each, open_engine
    from unionimage.container.processes import signal_number

    engine = open_engine(args)
    number = signal_number(args.signal)
    return for_each(engine, args.container, lambda one: engine.ask(one, op="kill", signal=number))
