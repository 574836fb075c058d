"""`unionfuse import`: an image of one layer from the tar of a root file system."""

from __future__ import annotations

import argparse
import os
import sys

from unionimage.cli.common import (
    add_layer_options,
    open_store,
    source_date_epoch,
    take_layer_options,
)
from unionimage.errors import BadContent, UserError
from unionimage.reference import Reference

EXAMPLE = """
unionfuse import rootfs.tar.gz debian:12
mmdebstrap bookworm | unionfuse import -c 'CMD ["bash"]' - debian:12
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--change", action="append", default=[], metavar="INSTRUCTION", help="ENV, CMD, …"
    )
    parser.add_argument("-m", "--message", help="a comment for the history")
    parser.add_argument("--platform", help="OS/ARCH[/VARIANT] (default: this machine's)")
    add_layer_options(parser)
    parser.add_argument("file", metavar="FILE|-", help="a tar, compressed or not; - for stdin")
    parser.add_argument("name", nargs="?", metavar="NAME[:TAG]", help="the image's name")


def run(args: argparse.Namespace) -> int:
    from unionimage.commit import format_time, with_changes
    from unionimage.image_config import History, ImageConfig, RunConfig
    from unionimage.spec import Platform

    if args.file.startswith(("http://", "https://")):
        raise UserError(
            f"{args.file}: download it first, or pipe it in: curl URL | unionfuse import -"
        )
    if args.file == "-" and sys.stdin.isatty():
        raise UserError("nothing to import: name a file, or pipe a tar in")
    if os.path.isdir(args.file):
        raise UserError(
            f"{args.file} is a directory; pack it: tar -C {args.file} -c . | unionfuse import -"
        )
    names = [Reference.parse(args.name)] if args.name else []
    platform = Platform.parse(args.platform) if args.platform else Platform.host()
    created = format_time(source_date_epoch())
    message = args.message if args.message is not None else f"Imported from {args.file}"
    config = ImageConfig(platform, run=with_changes(RunConfig(), args.change), comment=message)
    with open_store(args) as store, store.lease("import") as lease:
        take_layer_options(args, store)
        with open(0 if args.file == "-" else args.file, "rb", closefd=args.file != "-") as file:
            try:
                layer = lease.add_layer(file)
            except BadContent as error:
                raise BadContent(f"{args.file}: {error.message}") from None
        if not layer.entries:
            raise UserError(f"{args.file}: the tar is empty")
        step = History(created, comment=message)
        config = config.with_step(step, layer.diff_id)
        print(lease.add_image(config._replace(created=created), names=names).id)
    return 0
