"""Content by digest: `blobs/sha256/HEX`. Verified as it comes in and again as it is read."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from unionimage.digest import MAX_JSON, Digest, VerifyingReader
from unionimage.errors import BadContent, NotFound
from unionimage.store.database import Database


class BlobReader(VerifyingReader):
    """An open blob; a context manager. Reading to the end verifies digest and size."""

    def __init__(self, file: BinaryIO, digest: Digest, size: int) -> None:
        super().__init__(file, digest, size, f"blob {digest} in the store")
        self._file = file

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


class Blobs:
    """The blobs of a store; they are added under a lease (`Lease.add_blob`)."""

    def __init__(self, root: Path, database: Database) -> None:
        self._directory = root / "blobs/sha256"
        self._database = database

    def has(self, digest: Digest) -> bool:
        return self._database.row("SELECT 1 FROM blobs WHERE digest = ?", (digest,)) is not None

    def size(self, digest: Digest) -> int:
        """Its bytes. Raises NotFound."""
        row = self._database.row("SELECT size FROM blobs WHERE digest = ?", (digest,))
        if row is None:
            raise NotFound(f"there is no blob {digest} in the store")
        return int(row[0])

    def path(self, digest: Digest) -> Path:
        """Where it lies, whether it is there or not. What is read there is not verified."""
        return self._directory / digest.hex

    def open(self, digest: Digest) -> BlobReader:
        """Open it for reading.

        Raises:
            NotFound: it is not in the store.
            BadContent: its file is gone or has another size (`unionfuse check` tells more); `read`
                raises it for wrong content.
        """
        size = self.size(digest)
        try:
            file = open(self.path(digest), "rb", buffering=0)  # noqa: SIM115 (closed by the reader)
        except FileNotFoundError:
            raise BadContent(f"blob {digest} is missing; run 'unionfuse check'") from None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            raise BadContent(f"blob {digest} is damaged; run 'unionfuse check'")
        return BlobReader(file, digest, size)

    def read(self, digest: Digest) -> bytes:
        """All of a small blob (config, manifest), verified."""
        with self.open(digest) as blob:
            data = blob.read(MAX_JSON + 1)
            if len(data) > MAX_JSON:
                raise BadContent(f"blob {digest} is too large for a config or manifest")
            blob.drain()
        return data
