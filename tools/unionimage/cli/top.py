"""`unionfuse top`: the processes of a container, as the host's ps shows them."""

from __future__ import annotations

import argparse

from unionimage.cli.parser import add_name_and_command
from unionimage.errors import Conflict, UserError

EXAMPLE = """unionfuse top web aux
unionfuse top --json web"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_name_and_command(parser, "container", "options", "the container, and options of ps")
    parser.add_argument("--json", action="store_true", help="a line of JSON a process")


def run(args: argparse.Namespace) -> int:
    import subprocess

    from unionimage.cli.engine import open_engine
    from unionimage.container import limits

    container = open_engine(args).find(args.container)
    if container.state()["Status"] not in ("running", "paused"):
        raise Conflict(f"container {container.name} is not running")
    pids = set(map(str, limits.processes(container.state()["Pid"])))
    try:
        done = subprocess.run(["ps", *(args.options or ["-ef"])], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("top needs the program ps (Debian: procps)") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["ps failed"])[0]
        raise UserError(f"ps: {reason}")
    heading, *lines = done.stdout.splitlines()
    columns = heading.split()
    if "PID" not in columns:
        raise UserError("the ps options must show the column PID")
    at = columns.index("PID")
    ours = [line for line in lines if _field(line, at) in pids]
    if args.json:
        import json

        for line in ours:
            print(json.dumps(dict(zip(columns, line.split(None, len(columns) - 1), strict=False))))
    else:
        print("\n".join([heading, *ours]))
    return 0


def _field(line: str, at: int) -> str:
    return "".join(line.split()[at : at + 1])
