"""The build cache: what a step made, by what went into it.

A key is a digest over the parent's chain, the instruction as it is carried out and the content of
what it copies: no times, no names of images, no secrets. Values are a layer's diffID, or nothing
for a step that made none. A layer that was collected since is no hit. One SQLite file beside the
store.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from unionimage.digest import Digest
from unionimage.tuples import NamedTuple

VERSION = 1
"""Part of every key: raised when what a step does to files changes."""

FILE = "build-cache.sqlite"
MOUNTS = "build-mounts"  # the directory of what RUN --mount=type=cache keeps
HOLD = "build-cache"  # who holds the layers of cached steps in the store

_SCHEMA = """
CREATE TABLE IF NOT EXISTS step (key TEXT PRIMARY KEY, diff_id TEXT, created TEXT NOT NULL)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS content (key TEXT PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
"""


class Cached(NamedTuple):
    """What a step made: a layer or None, and when (RFC 3339)."""

    diff_id: Digest | None
    created: str


class BuildCache:
    """Cached steps and remembered content digests; used from any thread."""

    def __init__(self, directory: Path) -> None:
        self._lock = threading.Lock()
        path = directory / FILE
        try:
            self._database = _open(path)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise
            for suffix in ("", "-wal", "-shm"):  # nothing is lost but time
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            self._database = _open(path)

    def close(self) -> None:
        self._database.close()

    def step(self, key: str) -> Cached | None:
        """What the step with this key made, if it was built before."""
        row = self._row("SELECT diff_id, created FROM step WHERE key = ?", key)
        return None if row is None else Cached(Digest(row[0]) if row[0] else None, row[1])

    def remember(self, key: str, made: Cached) -> None:
        """Keep what a step made; replaces what was known."""
        self._write("INSERT OR REPLACE INTO step VALUES (?, ?, ?)", (key, *made))

    def steps(self) -> list[tuple[str, Cached]]:
        """All steps that are known, with their keys."""
        with self._lock:
            rows = self._database.execute("SELECT key, diff_id, created FROM step").fetchall()
        return [
            (key, Cached(Digest(made) if made else None, created)) for key, made, created in rows
        ]

    def forget(self, keys: Iterable[str]) -> None:
        """Forget steps; what is not known is no error."""
        with self._lock:
            self._database.executemany("DELETE FROM step WHERE key = ?", [(key,) for key in keys])

    def content(self, key: str) -> str | None:
        """The remembered digest of files selected from something that never changes."""
        row = self._row("SELECT digest FROM content WHERE key = ?", key)
        return None if row is None else str(row[0])

    def remember_content(self, key: str, digest: str) -> None:
        self._write("INSERT OR REPLACE INTO content VALUES (?, ?)", (key, digest))

    def _row(self, query: str, key: str) -> tuple[str, ...] | None:
        with self._lock:
            row: tuple[str, ...] | None = self._database.execute(query, (key,)).fetchone()
        return row

    def _write(self, query: str, values: Iterable[str | None]) -> None:
        with self._lock:
            self._database.execute(query, tuple(values))


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA synchronous=OFF")  # after a power cut it may be damaged, see above
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        database.execute("PRAGMA journal_mode=WAL")
        database.executescript(f"{_SCHEMA} DELETE FROM step; PRAGMA user_version={VERSION};")
    return database


def key_of(*parts: object) -> str:
    """A key out of strings, numbers, None and (nested) tuples of them."""
    text = json.dumps([VERSION, *parts], separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
