"""The tar format: a forward-only reader that trusts nothing, and headers that are always the same.

Not the standard library's tarfile, because layers need what it does not give: names as bytes,
times in nanoseconds (it parses them as floats), the raw bytes between the files (for a recipe,
which gives the archive back byte for byte), and refusals instead of guesses. It does *not* touch
the disk.

Sources: POSIX.1-2017 pax (ustar and extended headers); GNU tar manual, "Basic Tar Format" and
"Storing Sparse Files"; archive/tar of Go, which is what docker and podman read and write with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Protocol

from unionimage.changeset.limits import Limits
from unionimage.digest import CHUNK, Readable
from unionimage.errors import BadContent

BLOCK = 512
FILE, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0123456"
_KINDS = frozenset((FILE, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO))
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12s")
_ZEROS = bytes(BLOCK)
_XATTR = b"SCHILY.xattr."
_MAX_EXTENDED = 1 << 20
_MAX_PATH = 4096
_MAX_OWNER = (1 << 32) - 1  # uid_t and gid_t
_MAX_SECONDS = 1 << 63  # time_t
_NO_XATTRS: Mapping[bytes, bytes] = {}


class Entry:
    """One entry. `kind` is one of this module's constants; `size` counts payload bytes."""

    __slots__ = (
        *("name", "kind", "mode", "uid", "gid", "size", "mtime_ns", "link", "major", "minor"),
        *("xattrs", "sparse", "real_size"),
    )

    def __init__(
        self,
        name: bytes,
        kind: int,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        size: int = 0,
        mtime_ns: int = 0,
        link: bytes = b"",
        major: int = 0,
        minor: int = 0,
        xattrs: Mapping[bytes, bytes] = _NO_XATTRS,
    ) -> None:
        self.name, self.kind, self.mode = name, kind, mode
        self.uid, self.gid = uid, gid
        self.size, self.mtime_ns = size, mtime_ns
        self.link = link
        self.major, self.minor = major, minor
        self.xattrs = xattrs
        self.sparse: list[tuple[int, int]] | None = None
        self.real_size = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    def __repr__(self) -> str:
        return f"Entry({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class Recorder(Protocol):
    """Is told every byte of the archive, either as it is or as the content of a file."""

    def raw(self, data: bytes | memoryview) -> None: ...

    def file(self, path: bytes, size: int) -> None: ...


class Reader:
    """Iterates over the entries of an archive; `payload()` gives the current one's bytes.

    Args:
        stream: uncompressed tar, read once from front to end.
        recorder: is told all bytes; see `payload_is_file`.
        limits: what is refused.
        what: how messages name the archive.

    Raises (while iterating):
        BadContent: truncated, corrupt, contradictory or beyond the limits.
    """

    def __init__(
        self,
        stream: Readable,
        recorder: Recorder | None = None,
        limits: Limits | None = None,
        what: str = "layer",
    ) -> None:
        self._stream = stream
        self._recorder = recorder
        self._limits = limits or Limits()
        self._what = what
        self._buffer = b""
        self._position = 0
        self._total = 0
        self._left = 0  # payload bytes of the current entry not yet read
        self._padding = 0
        self._recording = True
        self._begun = False

    def __iter__(self) -> Iterator[Entry]:
        count = 0
        while (entry := self._next()) is not None:
            count += 1
            if count > self._limits.entries:
                raise BadContent(f"{self._what} has more than {self._limits.entries} entries")
            yield entry

    def payload(self) -> Iterator[memoryview]:
        """The current entry's bytes, in pieces that are valid until the next one."""
        while self._left:
            if self._position >= len(self._buffer):
                self._fill()
                if not self._buffer:
                    raise BadContent(f"{self._what} is truncated inside a file")
            end = min(self._position + self._left, len(self._buffer))
            piece = memoryview(self._buffer)[self._position : end]
            self._position = end
            self._left -= len(piece)
            if self._recorder and self._recording:
                self._recorder.raw(piece)
            yield piece

    def payload_is_file(self, path: bytes, size: int) -> None:
        """Record the current payload as the content of that file instead of its bytes."""
        if self._recorder and size:
            self._recorder.file(path, size)
            self._recording = False

    def _skip_payload(self) -> None:
        for _ in self.payload():
            pass
        self._recording = True
        if self._padding:
            self._take(self._padding, "padding")
            self._padding = 0

    def _fill(self) -> None:
        self._buffer = self._stream.read(CHUNK)
        self._position = 0
        self._total += len(self._buffer)
        if self._total > self._limits.size:
            raise BadContent(f"{self._what} unpacks to more than {self._limits.size} bytes")

    def _take(self, size: int, inside: str) -> bytes:
        """Exactly that many bytes; recorded as they are."""
        data = self._buffer[self._position : self._position + size]
        self._position += len(data)
        while len(data) < size:
            self._fill()
            if not self._buffer:
                raise BadContent(f"{self._what} is truncated inside a {inside}")
            more = self._buffer[: size - len(data)]
            self._position = len(more)
            data += more
        if self._recorder:
            self._recorder.raw(data)
        return data

    def _at_end(self) -> bool:
        if self._position >= len(self._buffer):
            self._fill()
        return not self._buffer

    def _next(self) -> Entry | None:
        self._skip_payload()
        pax: dict[bytes, bytes] = {}
        long: dict[int, bytes] = {}
        while True:
            if self._at_end():
                return None
            block = self._take(BLOCK, "header")
            if block == _ZEROS:
                if pax or long:
                    raise BadContent(f"{self._what} ends after an extended header")
                self._finish()
                return None
            entry, kind = self._parse(block)
            if kind in b"xgLK":
                if entry.size > _MAX_EXTENDED:
                    raise BadContent(f"{self._what} has an extended header of {entry.size} bytes")
                data = self._take(entry.size, "extended header")
                self._take(-entry.size % BLOCK, "padding")
                if kind == b"x":
                    pax.update(_records(data, self._what))
                elif kind != b"g":
                    long[kind[0]] = data.split(b"\0", 1)[0]
                continue
            break
        if b"L"[0] in long:
            entry.name = long[b"L"[0]]
        if b"K"[0] in long:
            entry.link = long[b"K"[0]]
        if kind == b"S":
            self._old_sparse(entry, block)
        stored = entry.size
        if pax:
            stored = self._apply(entry, pax)
        if entry.kind == FILE and entry.name.endswith(b"/") and entry.sparse is None:
            entry.kind = DIRECTORY
        if entry.kind != FILE:
            # Links may name the size of what they link to, without having a payload.
            if entry.kind not in (LINK, SYMLINK) and stored:
                raise BadContent(f"{self._what}: {entry.name!r} is no file but has {stored} bytes")
            stored = entry.size = 0
        if b"\0" in entry.name or b"\0" in entry.link or len(entry.name) >= _MAX_PATH:
            raise BadContent(f"{self._what} has an impossible name {entry.name[:60]!r}…")
        if entry.uid > _MAX_OWNER or entry.gid > _MAX_OWNER:
            raise BadContent(f"{self._what}: {entry.name!r} has an impossible owner")
        if not -_MAX_SECONDS <= entry.mtime_ns // 1_000_000_000 < _MAX_SECONDS:
            raise BadContent(f"{self._what}: {entry.name!r} has an impossible time")
        self._left, self._padding = stored, -stored % BLOCK
        if entry.sparse is not None and pax.get(b"GNU.sparse.major") == b"1":
            self._sparse_map(entry)
        return entry

    def _finish(self) -> None:
        """The first end block was read: one more must follow, then whatever pads the archive."""
        if self._at_end():
            return
        if self._take(BLOCK, "end mark") != _ZEROS:
            raise BadContent(f"{self._what} goes on after its end mark")
        while not self._at_end():
            if self._recorder:
                self._recorder.raw(memoryview(self._buffer)[self._position :])
            self._position = len(self._buffer)

    def _parse(self, block: bytes) -> tuple[Entry, bytes]:
        fields = _FIELDS.unpack(block)
        name, mode, uid, gid, size, mtime, checksum, kind, link, magic, version = fields[:11]
        # Old tars summed signed bytes.
        plain = sum(block) - sum(checksum) + 8 * 32
        try:
            promised = self._number(checksum)
        except BadContent:
            promised = -1
        if promised != plain and promised != plain - 256 * sum(
            byte >= 128 for byte in block[:148] + block[156:]
        ):
            if not self._begun:
                raise BadContent(f"{self._what} is no tar archive")
            raise BadContent(f"{self._what} is corrupt: a header's checksum is wrong")
        self._begun = True
        name = name.split(b"\0", 1)[0]
        if magic == b"ustar\0" and version == b"00" and fields[15][0]:
            name = fields[15].split(b"\0", 1)[0] + b"/" + name
        if kind in b"\x007":
            kind = b"0"
        elif kind[0] not in _KINDS and kind not in b"xgLKS":
            raise BadContent(f"{self._what}: {name!r} is an entry of unknown type {kind!r}")
        number = self._number
        entry = Entry(
            name,
            kind[0] if kind != b"S" else FILE,
            number(mode) & 0o7777,
            number(uid),
            number(gid),
            number(size),
            number(mtime, signed=True) * 1_000_000_000,
            link.split(b"\0", 1)[0],
        )
        if kind in b"34":
            entry.major, entry.minor = number(fields[13]), number(fields[14])
        return entry, kind

    def _number(self, text: bytes, signed: bool = False) -> int:
        if text[0] & 0x80:  # base 256, two's complement without the top bit
            value = int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
            if text[0] & 0x40:
                value -= 1 << (8 * len(text) - 1)
            if value >= 0 or signed:
                return value
        else:
            digits = text.split(b"\0", 1)[0].strip(b" ")
            if not digits:
                return 0
            if digits.isdigit():
                try:
                    return int(digits, 8)
                except ValueError:
                    pass
        raise BadContent(f"{self._what} is corrupt: {text!r} in a header is not a number")

    def _apply(self, entry: Entry, pax: dict[bytes, bytes]) -> int:
        """Overrule the entry by its extended header; returns the bytes of its payload."""
        xattrs = {key[len(_XATTR) :]: pax[key] for key in pax if key.startswith(_XATTR)}
        if xattrs:
            entry.xattrs = xattrs
        entry.name = pax.get(b"path", entry.name)
        entry.link = pax.get(b"linkpath", entry.link)
        try:
            entry.uid = _whole(pax, b"uid", entry.uid)
            entry.gid = _whole(pax, b"gid", entry.gid)
            entry.size = _whole(pax, b"size", entry.size)
            if b"mtime" in pax:
                entry.mtime_ns = _nanoseconds(pax[b"mtime"])
            stored = entry.size
            if any(key.startswith(b"GNU.sparse.") for key in pax):
                self._pax_sparse(entry, pax)
        except ValueError:
            raise BadContent(f"{self._what}: bad extended header of {entry.name!r}") from None
        return stored

    def _pax_sparse(self, entry: Entry, pax: dict[bytes, bytes]) -> None:
        entry.name = pax.get(b"GNU.sparse.name", entry.name)
        size = pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size", b""))
        entry.real_size = _whole({b"": size}, b"", 0)
        if b"GNU.sparse.map" in pax:
            numbers = [int(word) for word in pax[b"GNU.sparse.map"].split(b",")]
            entry.sparse = list(zip(numbers[::2], numbers[1::2], strict=True))
            self._check_sparse(entry, entry.size)
        elif pax.get(b"GNU.sparse.major") == b"1":
            entry.sparse = []  # the map comes first in the payload
        else:
            raise BadContent(f"{self._what}: {entry.name!r} is sparse in an unknown format")

    def _sparse_map(self, entry: Entry) -> None:
        """Format 1.0: decimal numbers, one a line, in whole blocks before the data."""
        text, lines, wanted = b"", [b""], 1
        while len(lines) - 1 < wanted:
            if self._left < BLOCK or len(text) > _MAX_EXTENDED:
                raise BadContent(f"{self._what}: {entry.name!r} has a bad map of holes")
            text += self._take(BLOCK, "map of holes")
            self._left -= BLOCK
            lines = text.split(b"\n")
            try:
                wanted = 1 + 2 * int(lines[0]) if len(lines) > 1 else 1
            except ValueError:
                raise BadContent(f"{self._what}: {entry.name!r} has a bad map of holes") from None
        try:
            numbers = [int(line) for line in lines[1:wanted]]
        except ValueError:
            raise BadContent(f"{self._what}: {entry.name!r} has a bad map of holes") from None
        entry.sparse = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._check_sparse(entry, self._left)

    def _old_sparse(self, entry: Entry, block: bytes) -> None:
        """GNU's own format: a few ranges in the header, more in blocks that follow it."""
        table, more, entry.real_size = block[386:482], block[482], self._number(block[483:495])
        ranges: list[tuple[int, int]] = []
        while True:
            for at in range(0, len(table) // 24 * 24, 24):
                if table[at]:
                    offset, length = table[at : at + 12], table[at + 12 : at + 24]
                    ranges.append((self._number(offset), self._number(length)))
            if not more:
                break
            if len(ranges) > _MAX_EXTENDED // 24:
                raise BadContent(f"{self._what}: {entry.name!r} has a bad map of holes")
            following = self._take(BLOCK, "map of holes")
            table, more = following[:504], following[504]
        entry.sparse = ranges
        self._check_sparse(entry, entry.size)

    def _check_sparse(self, entry: Entry, stored: int) -> None:
        position = total = 0
        for offset, length in entry.sparse or ():
            if offset < position or length < 0:
                raise BadContent(f"{self._what}: {entry.name!r} has a bad map of holes")
            position = offset + length
            total += length
        if total != stored or position > entry.real_size or entry.real_size > self._limits.size:
            raise BadContent(f"{self._what}: {entry.name!r} has a bad map of holes")


def _records(data: bytes, what: str) -> Iterator[tuple[bytes, bytes]]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 12)
        digits = data[position:space]
        if space < 0 or not digits.isdigit():
            break
        end = position + int(digits)
        record = data[space + 1 : end - 1]
        key, equals, value = record.partition(b"=")
        if end > len(data) or data[end - 1 : end] != b"\n" or not equals or not key or b"\0" in key:
            break
        yield key, value
        position = end
    if data[position:].strip(b"\0"):
        raise BadContent(f"{what} is corrupt: bad extended header")


def _whole(pax: Mapping[bytes, bytes], key: bytes, default: int) -> int:
    if key not in pax:
        return default
    if not pax[key].isdigit() or len(pax[key]) > 18:
        raise ValueError(key)
    return int(pax[key])


def _nanoseconds(text: bytes) -> int:
    """`-1.5` → -1500000000; digits beyond nanoseconds are cut off."""
    negative = text.startswith(b"-")
    whole, _, part = text.lstrip(b"-").partition(b".")
    if not whole.isdigit() or (part and not part.isdigit()) or len(whole) > 12:
        raise ValueError(text)
    value = int(whole) * 1_000_000_000 + int(part[:9].ljust(9, b"0"))
    return -value if negative else value


def header(entry: Entry) -> bytes:
    """The header blocks of an entry, with an extended header only where ustar cannot say it.

    The same entry always gives the same bytes, on every machine.
    """
    records: list[tuple[bytes, bytes]] = []
    prefix, name = _split(entry.name)
    if name is None:
        records.append((b"path", entry.name))
        prefix, name = b"", entry.name[-100:]
    link = entry.link
    if len(link) > 100:
        records.append((b"linkpath", link))
        link = link[:100]
    numbers = []
    for key, value, width in (
        (b"uid", entry.uid, 7),
        (b"gid", entry.gid, 7),
        (b"size", entry.size, 11),
    ):
        if value >= 8**width:
            records.append((key, b"%d" % value))
            value = 0
        numbers.append(b"%0*o" % (width, value))
    seconds, part = divmod(entry.mtime_ns, 1_000_000_000)
    if part or not 0 <= seconds < 8**11:
        records.append((b"mtime", _decimal(entry.mtime_ns)))
        seconds = min(max(seconds, 0), 8**11 - 1)
    records += [(_XATTR + key, entry.xattrs[key]) for key in sorted(entry.xattrs)]
    block = bytearray(
        _FIELDS.pack(
            name,
            b"%07o" % entry.mode,
            *numbers,
            b"%011o" % seconds,
            b" " * 8,
            bytes((entry.kind,)),
            link,
            b"ustar\0",
            b"00",
            b"",
            b"",
            b"%07o" % entry.major,
            b"%07o" % entry.minor,
            prefix,
            b"",
        )
    )
    block[148:156] = b"%06o\0 " % sum(block)
    return (_extended(records) if records else b"") + bytes(block)


def padding(size: int) -> bytes:
    """What follows a payload of that size."""
    return bytes(-size % BLOCK)


END = bytes(2 * BLOCK)
"""What ends an archive."""


def _split(name: bytes) -> tuple[bytes, bytes | None]:
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101, 156)
    if cut <= 0 or len(name) - cut - 1 == 0:
        return b"", None
    return name[:cut], name[cut + 1 :]


def _decimal(nanoseconds: int) -> bytes:
    whole, part = divmod(abs(nanoseconds), 1_000_000_000)
    text = b"%d" % whole
    if part:
        text += b"." + (b"%09d" % part).rstrip(b"0")
    return b"-" + text if nanoseconds < 0 else text


def _extended(records: list[tuple[bytes, bytes]]) -> bytes:
    data = b"".join(_record(key, value) for key, value in records)
    first = header(Entry(b"PaxHeaders.0/entry", FILE, 0o644, size=len(data)))
    return _with_kind(first, b"x") + data + padding(len(data))


def _with_kind(block: bytes, kind: bytes) -> bytes:
    changed = bytearray(block)
    changed[156:157] = kind
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def _record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3  # space, equals sign, newline
    total = size + len(str(size))
    total = size + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)
