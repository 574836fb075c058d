"""`unionfuse mounts`: the images that are mounted."""

from __future__ import annotations

import argparse

from unionimage.cli.common import human_ago, open_store
from unionimage.cli.format import add_format_options, show
from unionimage.mounts import Mount, mounts
from unionimage.store import Store

EXAMPLE = "unionfuse mounts"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="directories only")
    add_format_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        rows = [_row(store, mount) for mount in mounts(store)]
    if args.quiet:
        for row in rows:
            print(row["Directory"])
        return 0
    columns = {
        "Directory": "DIRECTORY",
        "Image": "IMAGE",
        "Step": "STEP",
        "Driver": "DRIVER",
        "Upper": "UPPER",
        "CreatedSince": "MOUNTED",
    }
    show(rows, columns, args.format)
    return 0


def _row(store: Store, mount: Mount) -> dict[str, str]:
    image = store.find(mount.image) if mount.image else None
    return {
        "Directory": str(mount.target),
        "Image": image.title if image else "<none>",
        "Step": str(mount.step or ""),
        "Driver": mount.driver,
        "Upper": str(mount.upper or ""),
        "CreatedSince": human_ago(mount.created),
    }
