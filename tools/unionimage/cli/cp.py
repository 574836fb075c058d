"""`unionfuse cp`: files between a container and the host."""

from __future__ import annotations

import argparse
import sys

from unionimage.errors import UserError

EXAMPLE = """unionfuse cp web:/etc/nginx/nginx.conf .
unionfuse cp site/. web:/srv
unionfuse cp web:/srv - | tar t"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--archive", action="store_true", help="keep owners")
    parser.add_argument("-L", "--follow-link", action="store_true", help="follow links in SRC")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing (it never does)")
    parser.add_argument("source", metavar="[CONTAINER:]SRC|-")
    parser.add_argument("target", metavar="[CONTAINER:]DEST|-")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.common import binary_output
    from unionimage.cli.engine import open_engine
    from unionimage.container import copying

    outside, source = _split(args.source)
    inside, target = _split(args.target)
    if outside and inside:
        raise UserError("copying between containers is not supported: go through the host")
    if not outside and not inside:
        raise UserError("one of the two must be in a container: CONTAINER:PATH")
    engine = open_engine(args)
    container = engine.find(outside or inside)
    with engine.root_of(container) as root:
        if outside and target == "-":
            with binary_output(None) as stream:
                copying.out_stream(root, source, stream, follow=args.follow_link)
        elif outside:
            copying.out(root, source, target, archive=args.archive, follow=args.follow_link)
        elif source == "-":
            copying.into_from_stream(root, sys.stdin.buffer, target)
        else:
            copying.into(root, source, target, archive=args.archive, follow=args.follow_link)
    return 0


def _split(text: str) -> tuple[str, str]:
    """Container and path; a path that begins with / or . has no container (docker's rule)."""
    if text.startswith(("/", ".")) or ":" not in text:
        return "", text
    name, _, path = text.partition(":")
    return name, path or "/"
