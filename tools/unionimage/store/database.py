"""The connection to the store's database: one for a process, used by all its threads in turn."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

from unionimage.store import schema

_WAIT = 60.0  # seconds that a writer waits for another process
_open: WeakSet[Database] = WeakSet()


def before_fork() -> None:
    """Close all databases of this process until they are next used.

    SQLite keeps notes of each open file in the process, locks among them, also for connections that
    are made later: a fork whose child opens the database again may have none ("How To Corrupt An
    SQLite Database File", 2.6). Not inside a transaction.
    """
    for database in list(_open):
        database.pause()


class Database:
    """SQLite in WAL mode. A transaction is the point at which anything in the store comes to be.

    A write transaction excludes all others, in this process and elsewhere. Files are renamed into
    their places inside of one, so "there is a row" and "there is a file" cannot be seen apart by
    another writer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = self._connect()
        _open.add(self)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_WAIT, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = NORMAL")
            (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            if mode != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            schema.migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connected(self) -> sqlite3.Connection:
        """The connection, made again where it was given up; the lock is held."""
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def pause(self) -> None:
        """Give up the connection; whoever uses the database next makes one again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def close(self) -> None:
        with self._lock:
            _open.discard(self)
            if self._connection is not None:
                self._connection.close()

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connected().execute(query, parameters).fetchall()

    def row(self, query: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        with self._lock:
            found: tuple[Any, ...] | None = self._connected().execute(query, parameters).fetchone()
            return found

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A write transaction; committed at the end, rolled back for an exception. Nests."""
        with self._lock:
            connection = self._connected()
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
