"""`unionfuse prune`: remove images that nothing names, and data that nothing uses."""

from __future__ import annotations

import argparse
import sys
import time

from unionimage.cli.common import human_size, open_store, parse_time
from unionimage.cli.format import filters
from unionimage.errors import Conflict, UserError
from unionimage.labels import has_labels
from unionimage.mounts import forget_dead
from unionimage.store import Image, Store, platforms

EXAMPLE = """
unionfuse prune -f
unionfuse prune -a --filter until=24h
"""

_UNITS = {"s": 1, "m": 60, "h": 3600}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-a", "--all", action="store_true", help="also named images, and the build cache"
    )
    parser.add_argument("-f", "--force", action="store_true", help="do not ask")
    parser.add_argument(
        "--filter", action="append", metavar="KEY=VALUE", help="until=24h|TIME, label=KEY[=VALUE]"
    )


def run(args: argparse.Namespace) -> int:
    from unionimage.dockerfile.records import give_up, records

    chosen = filters(args.filter, ("until", "label"))
    what = "all images that nothing uses" if args.all else "all images without a name"
    if not args.force and not _confirmed(f"This will remove {what}."):
        return 0
    with open_store(args) as store, store.lease("prune"):  # see rmi
        forget_dead(store)
        deleted = prune_images(store, all=args.all, chosen=chosen)
        if args.all:
            give_up(store, records(store))
        freed = store.collect()
    if deleted:
        print("Deleted Images:")
        for image in deleted:
            for name in image.names:
                print(f"untagged: {name.familiar}")
            print(f"deleted: {image.id}")
        print()
    print(f"Total reclaimed space: {human_size(freed.size)}")
    return 0


def prune_images(store: Store, *, all: bool, chosen: dict[str, list[str]]) -> list[Image]:
    """Delete images without a name (all: those nothing uses) and return them."""
    deleted: list[Image] = []
    while True:
        candidates = [
            image for image in store.images(all=True) if _wanted(store, image, all, chosen)
        ]
        if not candidates:
            return deleted
        for image in candidates:
            try:
                store.delete_image(image)
            except Conflict:
                continue  # a container began to use it just now
            deleted.append(image)


def _wanted(store: Store, image: Image, all: bool, chosen: dict[str, list[str]]) -> bool:
    if store.users(image) or (image.names and not all):
        return False
    if not all and (store.children(image) or platforms.names(store, image)):
        return False  # a step that a named image was built on, or its sister for another platform
    for value in chosen.get("until", []):
        if (parse_time(image.created) or image.added) > _moment(value):
            return False
    labels = chosen.get("label")
    return not labels or has_labels(image.config.run.labels, labels)


def _moment(text: str) -> float:
    """`24h`, `1h30m`, or a date → seconds since the epoch."""
    import re

    if re.fullmatch(r"(\d+[smh])+", text):
        ago = sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+)([smh])", text))
        return time.time() - ago
    moment = parse_time(text)
    if moment is None:
        raise UserError(f"bad filter until={text!r}: give a duration (24h) or a date")
    return moment


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"{question} Say so with --force")
    return input(f"WARNING! {question}\nAre you sure you want to continue? [y/N] ").lower() == "y"
