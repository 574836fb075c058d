"""`unionfuse start`: stopped containers again, with their own layer as they left it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from unionimage.errors import UserError

if TYPE_CHECKING:
    from unionimage.container.state import Container

EXAMPLE = """unionfuse start web
unionfuse start -ai shell"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--attach", action="store_true", help="attach, pass signals on")
    parser.add_argument("-i", "--interactive", action="store_true", help="attach standard input")
    parser.add_argument("--detach-keys", metavar="KEYS", help="default: ctrl-p,ctrl-q")
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import for_each, open_engine

    engine = open_engine(args)
    if not (args.attach or args.interactive):
        from unionimage.container.state import ALIVE

        def start(container: Container) -> None:
            if container.state()["Status"] not in ALIVE:  # docker: starting it again is fine
                engine.start(container)

        return for_each(engine, args.container, start)

    from unionimage.container import terminal

    if len(args.container) > 1:
        raise UserError("you cannot start and attach multiple containers at once")
    container = engine.find(args.container[0])
    has_tty = bool(container.config["Tty"])
    stdin = args.interactive and bool(container.config["OpenStdin"])
    terminal.require_terminal(stdin, has_tty)
    connection = engine.start(
        container,
        attach=terminal.request(stdin=stdin),
        console_size=terminal.terminal_size() if has_tty else None,
    )
    assert connection is not None
    attachment = terminal.Attachment(
        connection,
        has_tty=has_tty,
        stdin=stdin,
        detach_keys=args.detach_keys,
        sig_proxy=not has_tty,
    )
    code = attachment.run()
    return 0 if code is None else code
