"""`unionfuse save`: images into an archive."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from unionimage.archive.save import FORMATS, Wanted, save
from unionimage.cli.common import binary_output, open_store
from unionimage.errors import UserError
from unionimage.store import Store

EXAMPLE = """
unionfuse save -o debian.tar debian:12
unionfuse save debian:12 app | ssh host docker load
unionfuse save --format oci-dir -o debian.oci debian:12
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="write here (default: stdout)")
    parser.add_argument(
        "--format", choices=FORMATS, default="docker-archive", help="default: docker-archive"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("image", nargs="+", metavar="IMAGE", help="names or ids")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.progress import reporter

    with open_store(args) as store, store.lease("save") as lease:
        wanted = _wanted(store, args.image)
        for one in wanted:
            for diff_id in one.image.diff_ids:
                lease.use_layer(diff_id)
        with reporter(quiet=args.quiet or args.output is None, stream=sys.stderr) as report:
            if args.format == "oci-dir":
                if args.output in (None, "-"):
                    raise UserError("an oci-dir is a directory: name it with -o")
                save(store, wanted, args.format, Path(args.output), report)
            elif args.output in (None, "-") or not _regular(args.output):
                with binary_output(args.output) as output:
                    save(store, wanted, args.format, output, report)
            else:
                staged = f"{args.output}.part-{os.getpid()}"
                try:
                    with open(staged, "wb", buffering=1 << 20) as file:
                        save(store, wanted, args.format, file, report)
                    os.rename(staged, args.output)
                except BaseException:
                    Path(staged).unlink(missing_ok=True)
                    raise
    return 0


def _regular(path: str) -> bool:
    return os.path.isfile(path) or not os.path.exists(path)


def _wanted(store: Store, given: list[str]) -> list[Wanted]:
    """Each image once, with all the names by which it was asked for."""
    names: dict[str, Wanted] = {}
    for text in given:
        image = store.image(text)
        by_id = image.id.removeprefix("sha256:").startswith(text.removeprefix("sha256:"))
        known = names.get(image.id, Wanted(image, ()))
        if not by_id:
            reference = store.reference(text).with_default_tag()
            if reference.digest is None:
                if reference not in image.names:  # found as localhost/NAME
                    reference = next(n for n in image.names if n.path == reference.path[8:])
                if reference not in known.names:
                    known = Wanted(image, (*known.names, reference))
        names[image.id] = known
    return list(names.values())
