"""Recipes: what an archive has beside the contents of its files, so that a layer directory and
its recipe give the archive back byte for byte. (The idea is tar-split's.)

A recipe is `MAGIC`, then a zlib stream of segments: kind and length as `<BI`, then that many bytes.
RAW: bytes of the archive. FILE: 8 bytes of size, then the path of a file whose content comes here.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from unionfuse import syscalls
from unionimage.changeset.paths import RESOLVE_IN_ROOT
from unionimage.digest import CHUNK, Readable
from unionimage.errors import BadContent

MAGIC = b"unionfuse recipe 1\n"
RAW, FILE = 0, 1
_SEGMENT = struct.Struct("<BI")
_SIZE = struct.Struct("<Q")
_FLUSH = 1 << 16
Place = tuple[str, bytes]
"""A layer's directory, and the path of a file in it."""

Instead = Mapping[bytes, Place]
"""Path of a file in a layer -> the file of another layer to take its content from."""

_NOTHING: Instead = {}


class RecipeWriter:
    """Writes a recipe; a `tar.Recorder`.

    `files` counts the FILE segments so far: a file that a later entry of the same archive replaces
    is told by what it was then (see `Displaced`).
    """

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._pending: list[bytes] = []
        self._size = 0
        self._zlib = zlib.compressobj(1)
        self.files = 0
        output.write(MAGIC)

    def raw(self, data: bytes | memoryview) -> None:
        self._pending.append(bytes(data))
        self._size += len(data)
        if self._size >= _FLUSH:
            self._flush()

    def file(self, path: bytes, size: int) -> None:
        self._flush()
        self._segment(FILE, _SIZE.pack(size) + path)
        self.files += 1

    def finish(self) -> None:
        """Write what is pending; does not close the output."""
        self._flush()
        self._output.write(self._zlib.flush())

    def _flush(self) -> None:
        if self._pending:
            self._segment(RAW, b"".join(self._pending))
            self._pending.clear()
            self._size = 0

    def _segment(self, kind: int, data: bytes) -> None:
        self._output.write(self._zlib.compress(_SEGMENT.pack(kind, len(data)) + data))


def segments(recipe: Readable) -> Iterator[tuple[int, bytes]]:
    """Kind and bytes of each segment. Raises BadContent if it is damaged."""
    if recipe.read(len(MAGIC)) != MAGIC:
        raise BadContent("a layer's recipe is damaged")
    unpacker = zlib.decompressobj()
    data, wanted = b"", _SEGMENT.size
    kind = -1
    while True:
        while len(data) < wanted:
            packed = unpacker.unconsumed_tail or recipe.read(_FLUSH)
            try:
                more = unpacker.decompress(packed, _FLUSH) if packed else b""
            except zlib.error:
                more = b""
            if not more and (not packed or unpacker.eof):
                if data or kind >= 0 or not unpacker.eof:
                    raise BadContent("a layer's recipe is damaged")
                return
            data += more
        if kind < 0:
            kind, size = _SEGMENT.unpack_from(data)
            data, wanted = data[_SEGMENT.size :], size
        else:
            yield kind, data[:wanted]
            data, wanted, kind = data[wanted:], _SEGMENT.size, -1


def files(recipe: Readable) -> Iterator[tuple[bytes, int]]:
    """Path and size of each file whose content is in the layer directory. Raises BadContent."""
    for kind, data in segments(recipe):
        if kind == FILE:
            yield data[_SIZE.size :], _SIZE.unpack_from(data)[0]


def archive(recipe: Readable, directory: int, instead: Instead = _NOTHING) -> Iterator[bytes]:
    """The archive again, in pieces, from its recipe and its layer directory.

    Args:
        directory: descriptor of the layer directory.
        instead: what to take from elsewhere.

    Raises:
        BadContent: a file is missing or has another size.
    """
    for kind, data in segments(recipe):
        if kind == RAW:
            yield data
        else:
            (size,) = _SIZE.unpack_from(data)
            path = data[_SIZE.size :]
            if path in instead:
                yield from _content_elsewhere(instead[path], size)
            else:
                yield from _content(directory, path, size)


def _content_elsewhere(place: Place, size: int) -> Iterator[bytes]:
    directory = os.open(place[0], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from _content(directory, place[1], size)
    finally:
        os.close(directory)


def _content(directory: int, path: bytes, size: int) -> Iterator[bytes]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # nobody writes to a FIFO in its place
    try:
        file = syscalls.openat2(directory, path, flags, RESOLVE_IN_ROOT)
    except OSError as error:
        name = os.fsdecode(path)
        raise BadContent(f"a layer lost its file {name!r}: {error.strerror}") from None
    try:
        left = size
        while left and (data := os.read(file, min(left, CHUNK))):
            left -= len(data)
            yield data
        if left or os.read(file, 1):
            raise BadContent(f"a layer's file {os.fsdecode(path)!r} has changed its size")
    finally:
        os.close(file)


def inline(recipe: Readable, output: BinaryIO, replaced: dict[int, int], directory: int) -> None:
    """Write a recipe anew with the contents of some files in it.

    Args:
        replaced: number of a FILE segment -> name (a number) of the file in `directory`.
    """
    writer = RecipeWriter(output)
    number = 0
    for kind, data in segments(recipe):
        if kind == RAW:
            writer.raw(data)
            continue
        if number in replaced:
            (size,) = _SIZE.unpack_from(data)
            for piece in _content(directory, b"%d" % replaced[number], size):
                writer.raw(piece)
        else:
            (size,) = _SIZE.unpack_from(data)
            writer.file(data[_SIZE.size :], size)
        number += 1
    writer.finish()
