"""A layer's uncompressed tar: from its recipe and its directory, or from its blob."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from unionimage.changeset import compression as compressions
from unionimage.changeset import recipe as recipes
from unionimage.changeset.paths import PieceStream
from unionimage.digest import Readable, VerifyingReader
from unionimage.errors import BadContent
from unionimage.store.model import Layer

if TYPE_CHECKING:
    from unionimage.store.contents import Contents


@contextmanager
def open_layer_tar(store: Contents, layer: Layer) -> Iterator[Readable]:
    """Open it for one reading, verified at its end.

    Raises:
        BadContent: the store is damaged.
    """
    what = f"layer {layer.diff_id.short} in the store"
    with ExitStack() as stack:
        if layer.recipe:
            try:
                directory = os.open(layer.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                recipe = stack.enter_context(open(store.recipe_path(layer.diff_id), "rb"))
            except FileNotFoundError as error:
                raise BadContent(f"{what} lost {error.filename}; run 'unionfuse check'") from None
            stream: Readable = PieceStream(recipes.archive(recipe, directory))
        else:
            stream = stack.enter_context(_from_blob(store, layer))
        yield VerifyingReader(stream, layer.diff_id, layer.tar_size, what)


@contextmanager
def _from_blob(store: Contents, layer: Layer) -> Iterator[Readable]:
    blobs = store.layer_blobs(layer.diff_id)
    if not blobs:
        raise BadContent(f"layer {layer.diff_id.short} has neither recipe nor blob")
    compression, (digest, _) = next(iter(blobs.items()))
    with store.blobs.open(digest) as blob:
        yield compressions.decompress(blob, compression)
