"""`unionfuse du`: what takes the space."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from unionimage.cli.common import human_size, open_store
from unionimage.cli.format import add_format_options, show
from unionimage.digest import Digest
from unionimage.store import Store

EXAMPLE = """
unionfuse du
unionfuse du --layers
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", action="store_true", help="a line a layer")
    add_format_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        rows, columns = _layers(store) if args.layers else _images(store)
        show(rows, columns, args.format)
        if args.format is None:
            print()
            for place, text in _PLACES.items():
                print(f"{human_size(_allocated(store.root / place)):>8}  {text}")
    return 0


_PLACES = {
    "diff": "files of layers (diff/)",
    "blobs": "blobs as they came or were pushed (blobs/)",
    "recipes": "recipes of layers (recipes/)",
    "layers": "lists and lookup indexes (layers/)",
    "partial": "downloads that broke off (partial/)",
}


def _users(store: Store) -> dict[Digest, set[str]]:
    users: dict[Digest, set[str]] = {}
    for image in store.images(all=True):
        for diff_id in image.diff_ids:
            users.setdefault(diff_id, set()).add(image.title)
    return users


def _images(store: Store) -> tuple[list[dict[str, Any]], dict[str, str]]:
    users = _users(store)
    rows = []
    for image in store.images(all=True):
        shared = sum(one.size for one in image.layers if len(users[one.diff_id]) > 1)
        rows.append(
            {
                "Image": image.title,
                "ID": image.id.short,
                "Size": human_size(image.size),
                "SharedSize": human_size(shared),
                "UniqueSize": human_size(image.size - shared),
            }
        )
    columns = {"Image": "IMAGE", "ID": "IMAGE ID", "Size": "SIZE"}
    return rows, columns | {"SharedSize": "SHARED SIZE", "UniqueSize": "UNIQUE SIZE"}


def _layers(store: Store) -> tuple[list[dict[str, Any]], dict[str, str]]:
    users = _users(store)
    rows = []
    for layer in sorted(store.layers(), key=lambda one: one.size, reverse=True):
        blobs = sum(size for _, size in store.layer_blobs(layer.diff_id).values())
        rows.append(
            {
                "Layer": layer.diff_id.short,
                "Size": human_size(layer.size),
                "Blobs": human_size(blobs),
                "Files": str(layer.entries),
                "Images": ", ".join(sorted(users.get(layer.diff_id, ()))) or "<none>",
            }
        )
    columns = {"Layer": "LAYER", "Size": "SIZE", "Blobs": "BLOBS", "Files": "FILES"}
    return rows, columns | {"Images": "IMAGES"}


def _allocated(path: Path) -> int:
    """Bytes on the disk; a file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            status = os.lstat(os.path.join(directory, name))
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total
