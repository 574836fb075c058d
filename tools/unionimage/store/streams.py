"""What a layer passes through on its way in and out: kept, counted, read to its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from unionimage.digest import CHUNK, Digest, Readable
from unionimage.errors import UserError

Progress = Callable[[int], None]
"""Is told how many bytes more of a layer's stream were read."""


def chained(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    """One piece, and the others behind it."""
    yield first
    yield from rest


class Both:
    """The uncompressed stream, and at its end whatever the compressed one still has."""

    def __init__(self, plain: Readable, packed: Readable) -> None:
        self._plain = plain
        self._packed = packed

    def read(self, size: int = -1, /) -> bytes:
        data = self._plain.read(size)
        if not data:
            while self._packed.read(CHUNK):
                pass
        return data


class CountingWriter:
    """Writes to a file and knows digest and size of what it wrote."""

    def __init__(self) -> None:
        import hashlib

        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, output: BinaryIO, data: bytes) -> None:
        output.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def digest(self) -> Digest:
        return Digest.from_hex(self._hash.hexdigest())


class Tee:
    """Reads a stream and keeps what it reads in a file, which another run can go on from.

    With `keep = False` it keeps nothing more, and what it kept is removed by `finish`.
    """

    def __init__(
        self, stream: Readable, path: Path, offset: int, progress: Progress | None
    ) -> None:
        self._stream = stream
        self._path = path
        self._progress = progress
        self._old: BinaryIO | None = None
        self._new: BinaryIO | None = None
        self.keep = True
        if offset:
            self._old = open(path, "rb")  # noqa: SIM115 (closed below)
            if os.fstat(self._old.fileno()).st_size < offset:
                self._old.close()
                raise UserError("a partial download vanished; try again")
            os.truncate(path, offset)

    def __enter__(self) -> Tee:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._old, self._new):
            if file is not None:
                file.close()

    def read(self, size: int = -1, /) -> bytes:
        if self._old is not None:
            if data := self._old.read(CHUNK if size < 0 else size):
                return data
            self._old.close()
            self._old = None
            self._new = open(self._path, "ab")  # noqa: SIM115
        data = self._stream.read(CHUNK if size < 0 else size)
        if self._progress and data:
            self._progress(len(data))
        if not self.keep:
            return data
        if self._new is None:
            self._new = open(self._path, "wb")  # noqa: SIM115
        self._new.write(data)
        return data

    def finish(self) -> None:
        """Everything was read and is right."""
        if self._new is not None:
            self._new.flush()
        if not self.keep:
            self._path.unlink(missing_ok=True)

    def discard(self) -> None:
        """What was kept is wrong and must not be gone on from."""
        with suppress(FileNotFoundError):
            self._path.unlink()
