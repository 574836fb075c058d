"""`unionfuse diff`: what was added (A), changed (C) and deleted (D)."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from unionimage.chain import Chain
from unionimage.cli.common import human_size, open_store
from unionimage.cli.format import add_format_options, show
from unionimage.compare import compare
from unionimage.digest import Digest
from unionimage.errors import NotFound, UserError
from unionimage.store import Store

EXAMPLE = """
unionfuse diff web                    # a container and its image
unionfuse diff app                    # an image's top layer and the layers below it
unionfuse diff --size app:1 app:2
"""

Side = tuple[list[Path], set[bytes]]
"""Directories, top first, and paths in them that do not count."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--size", action="store_true", help="show sizes as well")
    add_format_options(parser)
    parser.add_argument(
        "a", metavar="CONTAINER|IMAGE|LAYER", help="a container, an image, or a layer (its diffID)"
    )
    parser.add_argument("b", nargs="?", metavar="IMAGE|LAYER", help="compare with this")


def run(args: argparse.Namespace) -> int:
    with open_store(args) as store, ExitStack() as stack:
        (old, _), (new, ignored) = _sides(store, args)
        before, after = (stack.enter_context(Chain(side)) for side in (old, new))
        rows: list[dict[str, Any]] = [
            {
                "Kind": change.kind,
                "Path": os.fsdecode(change.path),
                "Size": change.size,
                "Delta": change.delta,
            }
            for change in compare(before, after, ignored)
        ]
    if args.format is not None:
        show(rows, {"Kind": "KIND", "Path": "PATH", "Size": "SIZE"}, args.format)
        return 0
    for row in rows:
        size = f"{human_size(row['Size']):>8} " if args.size else ""
        path = row["Path"].encode(errors="surrogateescape").decode(errors="backslashreplace")
        print(f"{row['Kind']} {size}{path}")
    if args.size:
        delta = sum(row["Delta"] for row in rows)
        print(f"in all {'-' if delta < 0 else '+'}{human_size(abs(delta))}")
    return 0


def _sides(store: Store, args: argparse.Namespace) -> tuple[Side, Side]:
    if args.b is not None:
        return _side(store, args, args.a), _side(store, args, args.b)
    directories, ignored = _side(store, args, args.a)
    if not directories:
        raise UserError(f"image {args.a} has no layers")
    return (directories[1:], set()), (directories, ignored)


def _side(store: Store, args: argparse.Namespace, name: str) -> Side:
    from unionimage.cli.engine import open_engine

    try:
        container = open_engine(args).find(name)
    except NotFound:
        image = store.find(name)
        if image is not None:
            return store.chain_directories(image.diff_ids), set()
        return store.chain_directories([_layer(store, name)]), set()
    from unionimage.container import describe

    image = store.image(container.record["Image"])
    ignored = {
        b"/" + os.fsencode(path).lstrip(b"/") for path in describe.created_for_mounts(container)
    }
    return [container.upper, *store.chain_directories(image.diff_ids)], ignored


def _layer(store: Store, name: str) -> Digest:
    digits = name.removeprefix("sha256:")
    found = [layer.diff_id for layer in store.layers() if layer.diff_id.hex.startswith(digits)]
    if len(found) != 1 or len(digits) < 4:
        raise NotFound(f"no such container, image or layer: {name}")
    return found[0]
