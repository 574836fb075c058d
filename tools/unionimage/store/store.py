"""The store: opened, added to under leases, and cleaned up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage import config as configuration
from unionimage.digest import Digest, Readable
from unionimage.errors import UserError
from unionimage.store import cleanup
from unionimage.store.contents import Contents
from unionimage.store.files import new_id
from unionimage.store.locks import FileLock

if TYPE_CHECKING:
    from unionimage.store.lease import Lease


class Store(Contents):
    """An open store; a context manager."""

    def __init__(self, root: Path, config: configuration.Config) -> None:
        super().__init__(root, config)
        try:
            cleanup.after_dead_processes(self)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, root: str | os.PathLike[str] | None = None) -> Store:
        """Open the store, make it if there is none, and clean up after processes that died.

        Args:
            root: its directory; None: what the configuration says, else the default.

        Raises:
            UserError: it cannot be made, or is of a newer version.
        """
        config = configuration.load()
        path = Path(root or config.root or configuration.default_root())
        try:
            return cls(path.absolute(), config)
        except OSError as error:
            raise UserError(f"cannot open the store {path}: {error.strerror}") from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def layer_tar(self, diff_id: Digest) -> Iterator[Readable]:
        """The uncompressed tar of a layer, byte for byte, verified at its end."""
        from unionimage.store.layer_tar import open_layer_tar

        with open_layer_tar(self, self.layer(diff_id)) as stream:
            yield stream

    def lease(self, purpose: str) -> Lease:
        """A `Lease`, under which content is added; a context manager.

        Args:
            purpose: the command, for people who look into the store.
        """
        from unionimage.store.lease import Lease

        lock = None
        while lock is None:  # someone who cleans up may hold a new file for a moment
            identity = new_id()
            lock = FileLock.try_take(self.root / "locks" / f"{identity}.lease")
        with self.database.write() as database:
            database.execute(
                "INSERT INTO leases VALUES (?, ?, ?)", (identity, purpose, time.time())
            )
        return Lease(self, identity, lock)

    def collect(self) -> cleanup.Freed:
        """Remove what no image, hold, lease or mount uses. Returns what was freed."""
        return cleanup.collect(self)
