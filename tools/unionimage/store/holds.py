"""Ending what keeps an image or layers, without opening the whole store: `rm` is done sooner."""

from __future__ import annotations

from pathlib import Path

from unionimage.store.database import Database

# Closing the last connection writes SQLite's log back into the database and waits for the disk
# twice. The next command that writes much does that; the log alone is as durable.
_left_open: dict[Path, Database] = {}


def release(root: Path, owner: str) -> None:
    """End all that an owner (`container:ID`) holds in the store at `root`."""
    if root not in _left_open:
        _left_open[root] = Database(root / "store.db")
    release_in(_left_open[root], owner)


def release_in(database: Database, owner: str) -> None:
    """The same for an open database."""
    with database.write() as connection:
        connection.execute("DELETE FROM holds WHERE owner = ?", (owner,))
