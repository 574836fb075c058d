"""Garbage collection, and cleaning up after processes that died."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage.digest import Digest, chain_ids
from unionimage.store.files import hide, new_id, remove
from unionimage.store.locks import FileLock

if TYPE_CHECKING:
    from unionimage.store.contents import Contents

_PARTIAL_DAYS = 7
_FORM_DAYS = 180


class Freed:
    """What a collection removed.

    Attributes:
        layers: their diffIDs.
        size: bytes of their files and of blobs.
    """

    def __init__(self) -> None:
        self.layers: list[Digest] = []
        self.blobs = 0
        self.size = 0


# What is used: by images, by holds on images and on layers (leases and mounts have such).
_USED_LAYERS = """
    SELECT diff_id FROM image_layers UNION
    SELECT key FROM holds WHERE kind = 'layer'
"""
_USED_BLOBS = """
    SELECT id FROM images UNION
    SELECT manifest FROM images WHERE manifest IS NOT NULL UNION
    SELECT digest FROM layer_blobs UNION
    SELECT digest FROM indexes UNION
    SELECT key FROM holds WHERE kind = 'blob'
"""


def collect(store: Contents) -> Freed:
    """Remove what nothing uses: rows first, in one transaction, then files."""
    end_dead_leases(store)
    freed = Freed()
    with store.database.write() as database:
        for diff_id, size in database.execute(
            f"SELECT diff_id, size FROM layers WHERE diff_id NOT IN ({_USED_LAYERS})"
        ).fetchall():
            freed.layers.append(Digest(diff_id))
            freed.size += size
        database.executemany(
            "DELETE FROM layers WHERE diff_id = ?", [(diff_id,) for diff_id in freed.layers]
        )
        blobs = database.execute(
            f"SELECT digest, size FROM blobs WHERE digest NOT IN ({_USED_BLOBS})"
        ).fetchall()
        database.executemany(
            "DELETE FROM blobs WHERE digest = ?", [(digest,) for digest, _ in blobs]
        )
        database.execute(
            "DELETE FROM forms WHERE seen < ? AND diff_id NOT IN (SELECT diff_id FROM layers)",
            (time.time() - _FORM_DAYS * 86400,),
        )
        freed.blobs = len(blobs)
        freed.size += sum(size for _, size in blobs)
    sweep(store)
    return freed


def after_dead_processes(store: Contents) -> None:
    """Clean up if a lease's process ended without ending it; costs one query if none did."""
    if store.database.row("SELECT 1 FROM leases") is not None and end_dead_leases(store):
        collect(store)


def end_dead_leases(store: Contents) -> int:
    """End the leases of processes that are gone; how many there were."""
    dead = 0
    for (identity,) in store.database.rows("SELECT id FROM leases"):
        path = store.root / "locks" / f"{identity}.lease"
        lock = FileLock.try_take(path)
        if lock is not None:
            store.end_lease(identity, lock)
            dead += 1
    return dead


def sweep(store: Contents) -> None:
    """Remove files that no row speaks of: leftovers of processes that were killed."""
    trash = store.root / "staging" / f"trash-{new_id()}"
    with store.database.write() as database:
        for path in orphans(store, database):
            hide(path, trash)
        _remove_stale_locks(store, {row[0] for row in database.execute("SELECT id FROM leases")})
    remove(trash)


def _remove_stale_locks(store: Contents, leases: set[str]) -> None:
    """Lock files of leases and mounts whose process was killed before it could remove them."""
    for entry in os.scandir(store.root / "locks"):
        identity, _, kind = entry.name.rpartition(".")
        if kind == "mount" or (kind == "lease" and identity not in leases):
            lock = FileLock.try_take(Path(entry.path), create=False)
            if lock is not None:
                lock.release()


def orphans(store: Contents, database: sqlite3.Connection) -> list[Path]:
    """Files and directories of the store that no row speaks of."""

    def names(query: str) -> set[str]:
        return {Digest(row[0]).hex for row in database.execute(query)}

    layers = names("SELECT diff_id FROM layers")
    known = {
        "diff": layers,
        "recipes": names("SELECT diff_id FROM layers WHERE recipe"),
        "blobs/sha256": names("SELECT digest FROM blobs"),
        "layers": _chains(database),
    }
    orphans = [
        store.root / place / name
        for place, wanted in known.items()
        for name in os.listdir(store.root / place)
        if name.partition(".")[0] not in wanted
    ]
    leases = {row[0] for row in database.execute("SELECT id FROM leases")}
    for name in os.listdir(store.root / "staging"):
        if name not in leases and not name.startswith("trash-"):
            orphans.append(store.root / "staging" / name)
    return orphans + _old_trash(store) + _old_partials(store)


def _chains(database: sqlite3.Connection) -> set[str]:
    images: dict[str, list[str]] = {}
    for image, diff_id in database.execute(
        "SELECT image, diff_id FROM image_layers ORDER BY image, position"
    ):
        images.setdefault(image, []).append(diff_id)
    return {chain_id.hex for diff_ids in images.values() for chain_id in chain_ids(diff_ids)}


def _old_trash(store: Contents) -> list[Path]:
    """What another process was removing an hour ago, and most likely is not any more."""
    return _older(store.root / "staging", 3600, "trash-")


def _old_partials(store: Contents) -> list[Path]:
    return _older(store.root / "partial", _PARTIAL_DAYS * 86400, "")


def _older(directory: Path, seconds: float, prefix: str) -> list[Path]:
    limit = time.time() - seconds
    found = []
    for entry in os.scandir(directory):
        try:
            if entry.name.startswith(prefix) and entry.stat(follow_symlinks=False).st_mtime < limit:
                found.append(Path(entry.path))
        except FileNotFoundError:
            continue
    return found
