"""`unionfuse which`: the layer and the step that a file of an image comes from."""

from __future__ import annotations

import argparse
import os
import stat
from typing import Any

from unionimage.chain import Chain
from unionimage.cli.common import human_size, open_store
from unionimage.cli.format import add_format_options, show
from unionimage.errors import NotFound, UserError
from unionimage.image_config import History
from unionimage.store import Image, Layer

EXAMPLE = "unionfuse which debian:12 /etc/passwd"


def configure(parser: argparse.ArgumentParser) -> None:
    add_format_options(parser)
    parser.add_argument("--no-trunc", action="store_true", help="whole ids and commands")
    parser.add_argument("image", metavar="IMAGE", help="a name or id")
    parser.add_argument("path", metavar="PATH", help="a file in it; links on the way are followed")


def run(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        image = store.image(args.image)
        with Chain(store.chain_directories(image.diff_ids)) as chain:
            path = chain.resolve(os.fsencode(args.path))
            if not path:
                raise UserError("the root directory is of all layers; name a path below it")
            rows = _rows(image, chain, path, args.no_trunc)
    if not rows:
        raise NotFound(f"{image.title} has no {args.path}, in none of its layers")
    columns = {
        "State": "STATE",
        "Layer": "LAYER",
        "Step": "STEP",
        "Size": "SIZE",
        "CreatedBy": "CREATED BY",
    }
    show(rows, columns, args.format)
    return 0


def _rows(image: Image, chain: Chain, path: bytes, whole: bool) -> list[dict[str, Any]]:
    """What has the path, the topmost first: one is seen (or merged), others are hidden by it."""
    found = chain.find(path)
    seen = {place.layer for place in found.places} if found else set()
    steps = [
        (number, step, layer) for number, (step, layer) in enumerate(image.steps(), 1) if layer
    ][::-1]
    places = {place.layer: place for place in chain.versions(path)}
    rows = []
    for layer in range(len(steps)):
        if layer in places:
            status = chain.status(places[layer])
            size = None if stat.S_ISDIR(status.st_mode) else status.st_size
            rows.append(_row("seen" if layer in seen else "hidden", steps[layer], size, whole))
        elif _deletes(chain, path, layer):
            rows.append(_row("deleted", steps[layer], None, whole))
    return rows if places else []


def _deletes(chain: Chain, path: bytes, layer: int) -> bool:
    """This layer takes away what the layers below it have: by a whiteout or an opaque mark."""
    return chain.find(path, below=layer) is not None and (chain.find(path, below=layer - 1) is None)


def _row(
    state: str, step: tuple[int, History, Layer], size: int | None, whole: bool
) -> dict[str, Any]:
    number, history, layer = step
    text = history.created_by or history.comment
    if not whole and len(text) > 60:
        text = text[:59] + "…"
    return {
        "State": state,
        "Layer": layer.diff_id if whole else layer.diff_id.short,
        "Step": str(number),
        "Size": "" if size is None else human_size(size),
        "CreatedBy": text,
        "Directory": str(layer.directory),
    }
