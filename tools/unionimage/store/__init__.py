"""The content store: images, layers and blobs, by digest and by name.

On disk, below the root:

    store.db                 SQLite: what there is (schema.py). What has no row does not exist
    blobs/sha256/HEX         configs, manifests, compressed layers as they came
    diff/HEX/                a layer's files, by diffID: what mounts use as lower directories
    recipes/HEX              what its tar has beside them, so that it comes back byte for byte
    layers/HEX               by chainID: the layers (names in diff/) of that chain, topmost first
    staging/LEASE/           what a running command has not published yet
    partial/HEX              compressed layers that are coming in, by digest
    locks/                   flock(2) files of running commands

The map of the package, arrows downwards:

    check      damage and repair; mend: layers that are kept as files alone
    store      opened and cleaned up          lease      adding
    cleanup    garbage                        contents   reading, names, holds
    platforms  names for several platforms
    layer_tar, blobs, model, ahead, streams, holds
    database → schema;  files, locks
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unionimage.store.lease import Lease
    from unionimage.store.model import Image, Layer
    from unionimage.store.store import Store

__all__ = ["Image", "Layer", "Lease", "Store"]


_PLACES = {"Image": "model", "Layer": "model", "Lease": "lease", "Store": "store"}


def __getattr__(name: str) -> Any:
    """Each is imported when it is asked for: verbs that need less of the store start faster."""
    if name not in _PLACES:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
