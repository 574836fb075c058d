"""`unionfuse stats`: what containers use of CPU, memory, network and disks."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine
    from unionimage.container.state import Container
    from unionimage.container.usage import Sample

EXAMPLE = "unionfuse stats --no-stream"

COLUMNS = {
    "ID": "CONTAINER ID",
    "Name": "NAME",
    "CPUPerc": "CPU %",
    "MemUsage": "MEM USAGE / LIMIT",
    "MemPerc": "MEM %",
    "NetIO": "NET I/O",
    "BlockIO": "BLOCK I/O",
    "PIDs": "PIDS",
}
PERIOD = 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    from unionimage.cli.format import add_format_options

    parser.add_argument("-a", "--all", action="store_true", help="those that do not run too")
    parser.add_argument("--no-stream", action="store_true", help="once")
    parser.add_argument("--no-trunc", action="store_true", help="ids in full")
    add_format_options(parser)
    parser.add_argument("container", metavar="CONTAINER", nargs="*")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.cli.format import show
    from unionimage.container import usage

    engine = open_engine(args)
    before: dict[str, Sample] = {}
    while True:
        found = _wanted(engine, args)
        if not before:
            before = {one.id: now for one in found if (now := usage.sample(one)) is not None}
            time.sleep(PERIOD / 4 if args.no_stream else PERIOD)
        after = {one.id: now for one in found if (now := usage.sample(one)) is not None}
        rows = [_row(one, before.get(one.id), after.get(one.id), args) for one in found]
        if not args.no_stream and args.format is None and sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        show(rows, COLUMNS, args.format)
        sys.stdout.flush()
        if args.no_stream:
            return 0
        before = after
        time.sleep(PERIOD)


def _wanted(engine: Engine, args: argparse.Namespace) -> list[Container]:
    if args.container:
        return [engine.find(name) for name in args.container]
    return [one for one in engine.all() if args.all or one.state()["Status"] == "running"]


def _row(
    container: Container, before: Sample | None, after: Sample | None, args: argparse.Namespace
) -> dict[str, Any]:
    from unionimage.cli.common import human_size
    from unionimage.container import usage

    row: dict[str, Any] = {
        "ID": container.id if args.no_trunc else container.id[:12],
        "Container": container.id[:12],
        "Name": container.name,
    }
    if after is None:
        nothing = {"CPUPerc": "0.00%", "MemUsage": "0B / 0B", "MemPerc": "0.00%"}
        return row | nothing | {"NetIO": "0B / 0B", "BlockIO": "0B / 0B", "PIDs": "0"}
    percent = usage.cpu_percent(before, after) if before else 0.0
    share = 100.0 * after.memory / after.memory_limit if after.memory_limit else 0.0
    return row | {
        "CPUPerc": f"{percent:.2f}%",
        "MemUsage": f"{_binary(after.memory)} / {_binary(after.memory_limit)}",
        "MemPerc": f"{share:.2f}%",
        "NetIO": f"{human_size(after.received)} / {human_size(after.sent)}",
        "BlockIO": f"{human_size(after.read)} / {human_size(after.written)}",
        "PIDs": str(after.pids),
    }


def _binary(size: float) -> str:
    """Docker's sizes of memory, in powers of 1024 and four digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size:.4g}{unit}"
        size /= 1024
    return f"{size:.4g}PiB"
