"""`unionfuse mount`: an image, or what it was after a step, as a directory."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from unionimage.cli.common import open_store
from unionimage.config import DRIVERS
from unionimage.errors import UserError
from unionimage.mounts import mount_chain
from unionimage.store import Image, Store

EXAMPLE = """
unionfuse mount debian:12 /mnt
unionfuse mount app@3 /mnt              # what it was after step 3 of 'history --steps'
unionfuse mount -w app /mnt             # writable; changes go to /mnt.upper
"""

_STEP = re.compile(r"(.+)@([0-9]+)\Z")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-w", "--writable", action="store_true", help="changes go to a directory beside DIR"
    )
    parser.add_argument("--upper", metavar="DIR", help="changes go to this directory")
    parser.add_argument("--driver", choices=DRIVERS, help="what mounts (default: as configured)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS", help="for the driver"
    )
    parser.add_argument("image", metavar="IMAGE[@STEP]", help="a name or id; a step counts from 1")
    parser.add_argument("directory", metavar="DIR", help="where")


def run(args: argparse.Namespace) -> int:
    target = Path(args.directory)
    with open_store(args) as store:
        image, step = find_step(store, args.image)
        diff_ids = image.diff_ids
        if step is not None:
            diff_ids = tuple(layer.diff_id for _, layer in image.steps()[:step] if layer)
        upper = Path(args.upper) if args.upper else None
        if upper is None and args.writable:
            upper = target.absolute().with_name(target.absolute().name + ".upper")
        if upper is not None and target.is_dir():
            upper.mkdir(parents=True, exist_ok=True)
        options = [word for option in args.options for word in option.split(",")]
        mount_chain(
            store,
            diff_ids,
            target,
            upper=upper,
            driver=args.driver,
            image=image,
            step=step,
            options=options,
        )
        store.touch(image)
    return 0


def find_step(store: Store, name: str) -> tuple[Image, int | None]:
    """`IMAGE@STEP` → the image and the number; `@sha256:…` stays a digest."""
    match = _STEP.match(name)
    if match is None:
        return store.image(name), None
    image, step = store.image(match[1]), int(match[2])
    count = len(image.steps())
    if not 1 <= step <= count:
        raise UserError(f"{match[1]} has steps 1 to {count}; see 'unionfuse history --steps'")
    return image, step
