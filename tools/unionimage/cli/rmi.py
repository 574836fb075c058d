"""`unionfuse rmi`: take names away from images, and images away with their last name."""

from __future__ import annotations

import argparse

from unionimage.cli.common import open_store
from unionimage.errors import Conflict, UserError
from unionimage.mounts import forget_dead
from unionimage.store import Image, Store

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
    with open_store(args) as store:
        forget_dead(store)
        for name in args.image:
            try:
                for line in remove(store, name, force=args.force, prune=not args.no_prune):
                    print(line)
            except UserError as error:
                if not (args.force and store.find(name) is None):
                    import sys

                    print(f"unionfuse rmi: {error}", file=sys.stderr)
                    failed = 1
        for diff_id in store.collect().layers:
            print(f"Deleted layer: {diff_id}")
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
    named = [one for one in image.names if one == _reference(store, name, image)]
    if named and len(image.names) > 1:
        store.untag(named[0])
        return [f"Untagged: {named[0].familiar}"]
    if not named and len({one.repository for one in image.names}) > 1 and not force:
        raise Conflict(
            f"image {image.id.short} has names in several repositories; remove them one by one,"
            " or all with --force"
        )
    if store.children(image) and named and not force:
        store.untag(named[0])  # what was built on it still shows its steps
        return [f"Untagged: {named[0].familiar}"]
    store.delete_image(image)
    lines = [f"Untagged: {one.familiar}" for one in (*image.names, *image.digests)]
    lines.append(f"Deleted: {image.id}")
    return lines + (_prune_parents(store, image) if prune else [])


def _reference(store: Store, name: str, image: Image) -> object:
    """The name that was meant, if it was a name and not an id."""
    try:
        reference = store.reference(name).with_default_tag()
    except UserError:
        return None
    if reference in image.names:
        return reference
    local = [one for one in image.names if one.familiar == f"localhost/{reference.familiar}"]
    return local[0] if local else None


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
