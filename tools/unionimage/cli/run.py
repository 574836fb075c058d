"""`unionfuse run`: a new container of an image, started, attached or not."""

from __future__ import annotations

import argparse

from unionimage.cli.container_options import add_container_options
from unionimage.errors import UserError

EXAMPLE = """unionfuse run -it --rm debian bash
unionfuse run -d --name web -p 8080:80 -v data:/srv nginx"""
ERROR_CODE = 125


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--detach", action="store_true", help="run in the background")
    parser.add_argument("--detach-keys", metavar="KEYS", help="default: ctrl-p,ctrl-q")
    parser.add_argument(
        "--sig-proxy",
        metavar="true|false",
        default="true",
        help="pass signals on to the process (default)",
    )
    add_container_options(parser)


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.cli.image_for_run import image_for
    from unionimage.container import terminal

    if args.detach and args.attach:
        raise UserError("conflicting options: --attach and --detach")
    if not args.detach:
        wants_input = args.interactive and (not args.attach or "stdin" in args.attach)
        terminal.require_terminal(wants_input, args.tty)
    if args.detach_keys:
        terminal.parse_detach_keys(args.detach_keys)
    engine = open_engine(args)
    with engine.open_store() as store:
        image = image_for(args, store)
        container = engine.create(args, image, store, detach=args.detach)
    config = container.config
    request = None
    if not args.detach:
        request = terminal.request(
            stdin=config["AttachStdin"],
            stdout=config["AttachStdout"],
            stderr=config["AttachStderr"],
        )
    try:
        size = terminal.terminal_size() if args.tty else None
        connection = engine.start(container, attach=request, console_size=size)
    except BaseException:
        if args.rm:
            engine.remove(container, force=True, anonymous_volumes=True)
        raise
    if connection is None:
        print(container.id)
        return 0
    attachment = terminal.Attachment(
        connection,
        has_tty=args.tty,
        stdin=config["AttachStdin"],
        detach_keys=args.detach_keys,
        sig_proxy=args.sig_proxy.lower() not in ("false", "0") and not args.tty,
    )
    code = attachment.run()
    return 0 if code is None else code
