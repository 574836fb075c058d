"""unionfuse copy: send an image to another machine over ssh."""

from __future__ import annotations

import argparse
import os
import sys

from unionimage.cli.common import open_store

EXAMPLE = """\
unionfuse copy debian:12 ssh://jo@build.example.com
unionfuse copy --remote-command 'sudo unionfuse' app:1.0 ssh://build.example.com:2222"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="the image to send")
    parser.add_argument(
        "target", nargs="?", metavar="ssh://[USER@]HOST[:PORT]", help="the machine to send it to"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print the image id only")
    parser.add_argument(
        "--ssh",
        metavar="COMMAND",
        default=os.environ.get("UNIONFUSE_SSH", "ssh"),
        help="the ssh command and its options (also UNIONFUSE_SSH)",
    )
    parser.add_argument(
        "--remote-command",
        metavar="COMMAND",
        default="unionfuse",
        help="what unionfuse is called there, with --root if need be",
    )
    parser.add_argument(
        "--receive", action="store_true", help="be the other side: take an image from stdin"
    )


def run(args: argparse.Namespace) -> int:
    from unionimage.errors import UserError
    from unionimage.registry.ssh import Target, copy, receive

    if args.receive:
        if args.image or args.target:
            raise UserError("--receive takes no arguments")
        with open_store(args) as store:
            return receive(store, sys.stdin.buffer, sys.stdout.buffer)
    if not args.image or not args.target:
        raise UserError("give an image and where to send it: copy IMAGE ssh://[USER@]HOST")
    from unionimage.cli.progress import reporter
    from unionimage.reference import Reference

    target = Target.parse(args.target)
    with open_store(args) as store, reporter(args.quiet) as report:
        image = store.image(args.image)
        named = [name for name in image.names if name.tag]
        by_name = [name for name in named if _is(name, args.image)]
        done = copy(
            store,
            image,
            by_name or named,
            target,
            report,
            ssh=args.ssh,
            remote=args.remote_command,
        )
        shown = Reference.parse(args.image).familiar if by_name else image.id.short
        report.line(f"Copied {shown} to {target}: {done.layers} layers, {done.bytes} bytes")
    print(done.image_id) if args.quiet else None
    return 0


def _is(name: object, text: str) -> bool:
    from unionimage.errors import UserError
    from unionimage.reference import Reference

    try:
        return name == Reference.parse(text).with_default_tag()
    except UserError:
        return False
