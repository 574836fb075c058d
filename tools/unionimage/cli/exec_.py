"""`unionfuse exec`: one more process in a running container."""

from __future__ import annotations

import argparse
import os

from unionimage.cli.parser import add_name_and_command
from unionimage.errors import Conflict

EXAMPLE = """unionfuse exec web nginx -s reload
unionfuse exec -it web sh"""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", "--detach", action="store_true", help="in the background")
    add("-i", "--interactive", action="store_true", help="with this standard input")
    add("-t", "--tty", action="store_true", help="with a terminal")
    add("-e", "--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable")
    add(
        "--env-file",
        action="append",
        default=[],
        metavar="FILE",
        help="set the variables of a file",
    )
    add("-w", "--workdir", metavar="DIR", help="the directory that the command starts in")
    add("-u", "--user", metavar="USER[:GROUP]", help="who runs the command")
    add("--privileged", action="store_true", help="with all capabilities")
    add("--detach-keys", metavar="KEYS", help="default: ctrl-p,ctrl-q")
    add_name_and_command(parser, "container", "command", "the container, and the command")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.container import execute, runtime, terminal
    from unionimage.errors import UserError

    if not args.command:
        raise UserError("no command: write it after the container's name")
    engine = open_engine(args)
    container = engine.find(args.container)
    status = container.state()["Status"]
    if status != "running":
        hint = "unpause it first" if status == "paused" else "start it first"
        raise Conflict(f"container {container.name} is {status}: {hint}")
    if not args.detach:
        terminal.require_terminal(args.interactive, args.tty)
    entries = _lines(args.env_file) + args.env
    given = [entry if "=" in entry else _inherited(entry) for entry in entries]
    request = execute.Request(
        command=args.command,
        environment=[entry for entry in given if entry],
        user=args.user,
        workdir=args.workdir,
        tty=args.tty,
        interactive=args.interactive,
        privileged=args.privileged,
        detach_keys=args.detach_keys,
    )
    if args.detach:
        execute.run_detached(container, request)
        return 0
    return execute.run(container, request, runtime.find(container.record.get("Runtime")))


def _lines(files: list[str]) -> list[str]:
    if not files:
        return []
    from unionimage.container.create import lines_of

    return [line for path in files for line in lines_of(path, "--env-file")]


def _inherited(name: str) -> str:
    return f"{name}={os.environ[name]}" if name in os.environ else ""
