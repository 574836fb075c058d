"""`unionfuse rmi`: take names away from images, and images away with their last name."""

from __future__ import annotations

import argparse

from unionimage.cli.common import named, open_store
from unionimage.errors import Conflict, UserError
from unionimage.mounts import forget_dead
from unionimage.store import Image, Store, platforms

EXAMPLE = """
unionfuse rmi debian:12
unionfuse rmi -f 1b19f5a8e3aa
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--force", action="store_true", help="also with several names, or if it is not there"
    )
    parser.add_argument("--no-prune", action="store_true", help="keep untagged parents")
    parser.add_argument("image", nargs="+", metavar="IMAGE", help="names or ids")


def run(args: argparse.Namespace) -> int:
    failed = 0
    lines: list[str] = []
    # Under a lease: where this is killed, the next command collects what is left.
    with open_store(args) as store, store.lease("rmi"):
        forget_dead(store)
        for name in args.image:
            try:
                lines += remove(store, name, force=args.force, prune=not args.no_prune)
            except UserError as error:
                if not (args.force and store.find(name) is None):
                    import sys

                    print(f"unionfuse rmi: {error}", file=sys.stderr)
                    failed = 1
        lines += [f"Deleted layer: {diff_id}" for diff_id in store.collect().layers]
    for line in lines:
        print(line)
    return failed


def remove(store: Store, name: str, *, force: bool = False, prune: bool = True) -> list[str]:
    """Take a name away, or delete the image if it was the last or `name` is an id.

    Returns:
        docker's lines about it.

    Raises:
        NotFound: there is no such image.
        Conflict: it has names in several repositories, or something uses it.
    """
    image = store.image(name)
    others = _other_platforms(store, image)
    lines = _remove(store, name, image, force=force, prune=prune)
    for other in others:
        if not platforms.names(store, other) and not store.users(other):
            store.delete_image(other)
            lines.append(f"Deleted: {other.id}")
    return lines


def _other_platforms(store: Store, image: Image) -> list[Image]:
    """The images without a name that are here because a name of this one stands for them, too."""
    found: dict[str, Image] = {}
    for name in image.names:
        if (known := platforms.of(store, name)) is not None:
            found |= {one.id: one for one in known.images if not one.names}
    return list(found.values())


def _remove(store: Store, name: str, image: Image, *, force: bool, prune: bool) -> list[str]:
    meant = named(store, name, image)
    if meant is not None and len(image.names) > 1:
        store.untag(meant)
        return [f"Untagged: {meant.familiar}"]
    if meant is None and len({one.repository for one in image.names}) > 1 and not force:
        raise Conflict(
            f"image {image.id.short} has names in several repositories; remove them one by one,"
            " or all with --force"
        )
    if store.children(image) and meant is not None and not force:
        store.untag(meant)  # what was built on it still shows its steps
        return [f"Untagged: {meant.familiar}"]
    store.delete_image(image)
    lines = [f"Untagged: {one.familiar}" for one in (*image.names, *image.digests)]
    lines.append(f"Deleted: {image.id}")
    return lines + (_prune_parents(store, image) if prune else [])


def _prune_parents(store: Store, image: Image) -> list[str]:
    """Delete the untagged steps it was built on, up to one that something else needs."""
    lines: list[str] = []
    parent = image.parent
    while parent is not None:
        above = store.find(parent)
        if above is None or above.names or store.children(above) or store.users(above):
            break
        store.delete_image(above)
        lines.append(f"Deleted: {above.id}")
        parent = above.parent
    return lines
