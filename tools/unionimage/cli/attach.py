"""`unionfuse attach`: this terminal becomes that of a running container."""

from __future__ import annotations

import argparse

from unionimage.errors import Conflict

EXAMPLE = "unionfuse attach shell   # Ctrl-P Ctrl-Q leaves it running"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detach-keys", metavar="KEYS", help="default: ctrl-p,ctrl-q")
    parser.add_argument("--no-stdin", action="store_true", help="only watch")
    parser.add_argument(
        "--sig-proxy",
        metavar="true|false",
        default="true",
        help="pass signals on to the process (default)",
    )
    parser.add_argument("container", metavar="CONTAINER")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.container import terminal, wire

    engine = open_engine(args)
    container = engine.find(args.container)
    status = container.state()["Status"]
    if status != "running":
        hint = "unpause it first" if status == "paused" else "start it first"
        raise Conflict(f"you cannot attach to a container that is {status}: {hint}")
    config = container.config
    stdin = not args.no_stdin and bool(config["OpenStdin"])
    terminal.require_terminal(stdin, bool(config["Tty"]))
    connection = wire.connect(container.control)
    connection.sendall(terminal.request(stdin=stdin))
    attachment = terminal.Attachment(
        connection,
        has_tty=bool(config["Tty"]),
        stdin=stdin,
        detach_keys=args.detach_keys,
        sig_proxy=args.sig_proxy.lower() not in ("false", "0") and not config["Tty"],
    )
    code = attachment.run()
    return 0 if code is None else code
