"""Compression of layers: streams in, streams out, nothing held in memory.

gzip goes through ISA-L (several times faster than zlib, which it falls back to where there is no
wheel for it), zstd through the `zstandard` package. Both are imported when first used.
"""

from __future__ import annotations

from typing import Any, BinaryIO, Protocol, cast

from unionimage.digest import CHUNK, Readable
from unionimage.errors import BadContent

GZIP_LEVEL = 2
ZSTD_LEVEL = 3

_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))
_UNSUPPORTED = ((b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x04\x22\x4d\x18", "lz4"))


def sniff(start: bytes) -> str:
    """`gzip`, `zstd` or `none`, from the first bytes (six are enough).

    Raises:
        BadContent: another compression, which is named.
    """
    for magic, name in _UNSUPPORTED:
        if start.startswith(magic):
            raise BadContent(f"compression {name} is not supported; unpack it first")
    return next((name for magic, name in _MAGIC if start.startswith(magic)), "none")


class Peekable:
    """A stream whose start can be looked at before it is read."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._start = b""

    def peek(self, size: int) -> bytes:
        """Up to `size` first bytes; fewer only where the stream is shorter."""
        while len(self._start) < size and (more := self._stream.read(size - len(self._start))):
            self._start += more
        return self._start[:size]

    def read(self, size: int = -1, /) -> bytes:
        if not self._start:
            return self._stream.read(size)
        if size < 0:
            data, self._start = self._start, b""
            return data + self._stream.read()
        data, self._start = self._start[:size], self._start[size:]
        return data


def decompress(stream: Readable, compression: str, what: str = "layer") -> Readable:
    """The uncompressed stream. `read` raises BadContent for corrupt or truncated data."""
    if compression == "none":
        return stream
    if compression == "gzip":
        return _Gzip(stream, what)
    if compression == "zstd":
        return _Zstd(stream, what)
    raise BadContent(f"compression {compression!r} of {what} is not supported")


def _zlib() -> Any:
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return zlib
    return isal_zlib


class _Gzip:
    """One or several gzip members after each other (RFC 1952, section 2.2)."""

    def __init__(self, stream: Readable, what: str) -> None:
        self._stream = stream
        self._what = what
        self._zlib = _zlib()
        self._member = self._zlib.decompressobj(31)
        self._input = b""
        self._begun = False

    def read(self, size: int = -1, /) -> bytes:
        limit = CHUNK if size < 0 else size
        while True:
            if self._member.eof:
                self._input = self._member.unused_data
                self._member = self._zlib.decompressobj(31)
                self._begun = False
            if not self._input and not (data := self._stream.read(CHUNK)):
                if self._begun:
                    raise BadContent(f"{self._what} is truncated (gzip)")
                return b""
            elif not self._input:
                self._input = data
            if not self._begun and not self._input.strip(b"\0"):
                self._input = b""  # padding after the last member
                continue
            self._begun = True
            try:
                output: bytes = self._member.decompress(self._input, limit)
            except self._zlib.error as error:
                raise BadContent(f"{self._what} is corrupt (gzip): {error}") from None
            self._input = self._member.unconsumed_tail
            if output:
                return output


class _Zstd:
    def __init__(self, stream: Readable, what: str) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._what = what
        self._ended = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        self._reader = self._ended.stream_reader(
            cast(BinaryIO, stream), read_size=CHUNK, read_across_frames=True
        )

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._reader.read(CHUNK if size < 0 else size)
        except self._error as error:
            raise BadContent(f"{self._what} is corrupt (zstd): {error}") from None


class Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


def compressor(compression: str) -> Compressor:
    """An object that compresses what it is fed; its output does not depend on clock or name."""
    if compression == "gzip":
        made: Compressor = _zlib().compressobj(GZIP_LEVEL, 8, 31)
        return made
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(ZSTD_LEVEL, write_checksum=True).compressobj()
    raise BadContent(f"compression {compression!r} is not supported (gzip, zstd)")
