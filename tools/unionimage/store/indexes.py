"""The lookup index of a chain, beside its list of layers: `layers/CHAINID.index`.

Made when a chain is first mounted by unionfuse. That of a longer chain is made by extending the
nearest one below it, which costs as much as the layers in between.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage.digest import Digest, chain_ids

if TYPE_CHECKING:
    from unionimage.store.contents import Contents


def index_path(store: Contents, chain_id: Digest) -> Path:
    """Where the index of a chain is, whether it is there or not."""
    path = store.chain_path(chain_id)
    return path.with_name(path.name + ".index")


def chain_index(store: Contents, diff_ids: Sequence[Digest]) -> Path | None:
    """The index of a chain, made if it is not there or outdated.

    Args:
        diff_ids: base first.

    Returns:
        None where there can be none: for no layers, in a store that is not writable, or with more
        in it than one index holds. A mount works without one.
    """
    chain = chain_ids(diff_ids)
    if not chain:
        return None
    path = index_path(store, chain[-1])
    if _fits(store, path, diff_ids):
        return path
    from unionfuse.index.lookup import LookupIndexError
    from unionfuse.layers.layer import LayerError

    try:
        _make(store, diff_ids, chain, path)
    except (LookupIndexError, LayerError, OSError):
        return None
    return path


def _fits(store: Contents, path: Path, diff_ids: Sequence[Digest]) -> bool:
    """It is there and was made of these directories as they are."""
    if not path.exists():
        return False
    from unionfuse.index.lookup import LookupIndex, LookupIndexError

    try:
        index = LookupIndex.open(os.fspath(path))
    except (LookupIndexError, OSError):
        return False
    try:
        index.check([os.stat(one) for one in store.chain_directories(diff_ids)])
    except (LookupIndexError, OSError):
        return False
    finally:
        index.close()
    return True


def _make(store: Contents, diff_ids: Sequence[Digest], chain: Sequence[Digest], path: Path) -> None:
    from unionfuse.index.builder import build, extend
    from unionfuse.index.lookup import LookupIndex
    from unionfuse.layers.layer import LayerStack

    directories = store.chain_directories(diff_ids)
    labels = [diff_id.encode() for diff_id in reversed(diff_ids)]
    stack = LayerStack.open([os.fsencode(one) for one in directories])
    try:
        for count in range(len(chain) - 1, 0, -1):
            below = index_path(store, chain[count - 1])
            if _fits(store, below, diff_ids[:count]):
                index = LookupIndex.open(os.fspath(below))
                try:
                    builder = extend(index, stack.layers, labels)
                finally:
                    index.close()
                break
        else:
            builder = build(stack.layers, labels)
        builder.write(os.fspath(path))
    finally:
        stack.close()
