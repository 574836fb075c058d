"""`unionfuse load`: images from an archive."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from unionimage.cli.common import add_layer_options, open_store, take_layer_options
from unionimage.errors import BadContent, UserError

EXAMPLE = """
unionfuse load -i debian.tar
docker save debian:12 | unionfuse load
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", "--input", metavar="FILE", help="an archive or OCI layout directory (default: stdin)"
    )
    parser.add_argument(
        "--platform", choices=("all",), help="all images of an index (default: this machine's)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    add_layer_options(parser)


def run(args: argparse.Namespace) -> int:
    from unionimage.archive.load import load
    from unionimage.cli.progress import reporter

    path = None if args.input in (None, "-") else Path(args.input)
    if path is None and sys.stdin.isatty():
        raise UserError("nothing to load: give a file with -i, or pipe an archive in")
    if path is not None and not path.exists():
        raise UserError(f"{path} does not exist")
    with open_store(args) as store, store.lease("load") as lease:
        take_layer_options(args, store)
        with reporter(quiet=args.quiet, stream=sys.stderr) as report:
            stream = None if path else os.fdopen(os.dup(0), "rb")
            try:
                images = load(lease, path, stream, report, every_platform=args.platform == "all")
            except BadContent as error:
                raise BadContent(f"{path or 'the input'}: {error.message}") from None
        for image in images:
            if image.names:
                for name in image.names:
                    print(f"Loaded image: {name.familiar}")
            else:
                print(f"Loaded image ID: {image.id}")
    return 0
