"""`unionfuse export`: the whole file system of an image or container as one tar."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from unionimage.chain import Chain
from unionimage.cli.common import binary_output, open_store
from unionimage.errors import NotFound

EXAMPLE = """
unionfuse export -o root.tar debian:12
unionfuse export web | tar tv
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="write here (default: stdout)")
    parser.add_argument(
        "name", metavar="CONTAINER|IMAGE", help="a container's or image's name or id"
    )


def run(args: argparse.Namespace) -> int:
    from unionimage.changeset.pack import pack_merged

    with _tree(args) as chain, binary_output(args.output) as output:
        for piece in pack_merged(chain):
            output.write(piece)
    return 0


@contextmanager
def _tree(args: argparse.Namespace) -> Iterator[Chain]:
    """The tree of a container, without its volumes, or of an image."""
    from unionimage.cli.engine import open_engine

    with ExitStack() as stack:
        store = stack.enter_context(open_store(args))
        lease = stack.enter_context(store.lease("export"))
        directories: list[Path] = []
        try:
            container = open_engine(args).find(args.name)
        except NotFound:
            image = store.image(args.name)
        else:
            image = store.image(container.record["Image"])
            if os.path.isdir(container.upper):
                directories.append(container.upper)
        for diff_id in image.diff_ids:
            lease.use_layer(diff_id)
        directories += store.chain_directories(image.diff_ids)
        yield stack.enter_context(Chain(directories))
