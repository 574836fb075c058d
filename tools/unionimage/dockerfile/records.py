"""What the build cache takes, and giving it up: `system df`, `builder prune`, `prune --all`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from unionimage.dockerfile.cache import FILE, HOLD, MOUNTS, BuildCache
from unionimage.errors import NotFound
from unionimage.store import Store
from unionimage.store.files import remove
from unionimage.tuples import NamedTuple


class Record(NamedTuple):
    """A cached step, or a directory that RUN --mount=type=cache keeps."""

    id: str
    type: str  # docker's words: `regular`, `exec.cachemount`
    size: int  # bytes
    created: str  # RFC 3339
    shared: bool  # an image has the layer, too: giving up the step frees nothing


def records(store: Store) -> list[Record]:
    """All that is cached, the oldest first; steps whose layer is gone are left out."""
    found = [_mounted(directory) for directory in _directories(store)]
    if (store.root / FILE).exists():
        in_images = {diff_id for image in store.images(all=True) for diff_id in image.diff_ids}
        with contextlib.closing(BuildCache(store.root)) as cache:
            steps = cache.steps()
        for key, (diff_id, created) in steps:
            with contextlib.suppress(NotFound):
                size = 0 if diff_id is None else store.layer(diff_id).size
                found.append(Record(key, "regular", size, created, diff_id in in_images))
    return sorted(found, key=lambda record: record.created)


def give_up(store: Store, given_up: Iterable[Record]) -> None:
    """Forget records: no build finds them any more, and `store.collect()` frees their layers.

    A step that a build adds meanwhile may lose its layer with them, and is built anew then.
    """
    gone = {record.id for record in given_up}
    for directory in _directories(store):
        if directory.name in gone:
            remove(directory)
    if (store.root / FILE).exists():
        with contextlib.closing(BuildCache(store.root)) as cache:
            cache.forget(gone)
            kept = {made.diff_id for _, made in cache.steps() if made.diff_id is not None}
        store.release(HOLD)
        for diff_id in kept:
            with contextlib.suppress(NotFound):
                store.hold_layers(HOLD, [diff_id])


def _directories(store: Store) -> list[Path]:
    top = store.root / MOUNTS
    return sorted(top.iterdir()) if top.is_dir() else []


def _mounted(directory: Path) -> Record:
    size = sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(directory.stat().st_mtime))
    return Record(directory.name, "exec.cachemount", size, made, False)
