"""`unionfuse logs`: what a container has written."""

from __future__ import annotations

import argparse
import sys

from unionimage.errors import UserError

EXAMPLE = "unionfuse logs -f --tail 100 web"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-f", "--follow", action="store_true", help="go on with what is written from now on")
    add("--since", metavar="TIME", help="only from then on: a time, or 10m for ten minutes ago")
    add("--until", metavar="TIME", help="only until then")
    add("-n", "--tail", metavar="N", default="all", help="only the last N lines")
    add("-t", "--timestamps", action="store_true", help="show when each line was written")
    add("--details", action="store_true", help="the log options' labels too (there are none)")
    add("container", metavar="CONTAINER")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.cli.moments import nanoseconds
    from unionimage.container import logs
    from unionimage.container.state import ALIVE, timestamp

    engine = open_engine(args)
    container = engine.find(args.container)
    if (container.host_config.get("LogConfig") or {}).get("Type") == "none":
        raise UserError(f"container {container.name} was run with --log-driver none: no logs")
    tail = None
    if args.tail != "all":
        if not args.tail.lstrip("-").isdigit():
            raise UserError(f"--tail {args.tail!r}: a number or all")
        tail = int(args.tail) if int(args.tail) >= 0 else None

    def going_on() -> bool:
        return container.state()["Status"] in ALIVE and container.monitor_lives()

    for line in logs.read(
        container.log_path,
        tail=tail,
        since=timestamp(nanoseconds(args.since, "--since")) if args.since else "",
        until=timestamp(nanoseconds(args.until, "--until")) if args.until else "",
        follow=going_on if args.follow else None,
    ):
        stream = sys.stdout if line.stream == "stdout" else sys.stderr
        text = f" {line.text}" if args.details else line.text  # docker: the details come before
        text = f"{line.time} {text}" if args.timestamps else text
        stream.buffer.write(text.encode(errors="surrogateescape"))
        if args.follow or stream is sys.stderr:
            stream.flush()
    return 0
