"""Digests: the names of content.

Source: OCI image-spec v1.1, descriptor.md (digests) and config.md (chainID).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from unionimage.errors import BadContent

_FORM = re.compile(r"sha256:[0-9a-f]{64}\Z")

CHUNK = 1 << 19
"""Bytes read at once wherever content streams through."""

MAX_JSON = 4 << 20
"""Bytes of a manifest, index or config that are read at most; registries have the same limit."""


class Readable(Protocol):
    """A binary stream that can only be read forward; `read` may return less than asked for."""

    def read(self, size: int = -1, /) -> bytes: ...


class Digest(str):
    """`sha256:` and 64 hexadecimal digits; a `str`, so it goes into JSON and SQLite as it is.

    Raises:
        BadContent: the text has another form, or names another algorithm.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Digest:
        if type(text) is cls:
            return text
        if not isinstance(text, str) or not _FORM.match(text):
            raise BadContent(
                f"{text!r} is not a sha256 digest (sha256: and 64 lower-case hex digits)"
            )
        return super().__new__(cls, text)

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """The digest of these bytes."""
        import hashlib  # with all of OpenSSL behind it; listings do without

        return cls.from_hex(hashlib.sha256(data).hexdigest())

    @classmethod
    def from_hex(cls, digits: str) -> Digest:
        return cls("sha256:" + digits)

    @property
    def hex(self) -> str:
        """The 64 digits without the algorithm; names files in the store."""
        return self[7:]

    @property
    def short(self) -> str:
        """Docker's short id: the first 12 digits."""
        return self[7:19]


def chain_ids(diff_ids: Iterable[str]) -> list[Digest]:
    """The chainID after each layer, base first: element N names the layers 0 to N together."""
    chain: list[Digest] = []
    for diff_id in diff_ids:
        text = f"{chain[-1]} {diff_id}" if chain else diff_id
        chain.append(Digest.of(text.encode()) if chain else Digest(diff_id))
    return chain


class VerifyingReader:
    """Reads a stream through and refuses it at its end unless digest and size are as promised.

    Args:
        stream: what is read.
        digest: what its bytes must hash to, or None to only find it out.
        size: how many bytes it must have, or None.
        what: how messages name it.

    Raises (from `read`):
        BadContent: as soon as there are more bytes than `size`, or at the end of the stream.
    """

    def __init__(
        self,
        stream: Readable,
        digest: Digest | None = None,
        size: int | None = None,
        what: str = "content",
    ) -> None:
        import hashlib

        self._stream = stream
        self._hash = hashlib.sha256()
        self._expected = digest
        self._size = size
        self._what = what
        self._finished = False
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        if not data:
            if size != 0:
                self._verify()
            return data
        self._hash.update(data)
        self.count += len(data)
        if self._size is not None and self.count > self._size:
            raise BadContent(f"{self._what} is longer than the {self._size} bytes it should have")
        return data

    def drain(self) -> None:
        """Read what is left, so that the whole stream is verified."""
        while not self._finished:
            self.read(CHUNK)

    @property
    def digest(self) -> Digest:
        """The digest of what was read so far."""
        return Digest.from_hex(self._hash.hexdigest())

    def _verify(self) -> None:
        self._finished = True
        if self._size is not None and self.count != self._size:
            raise BadContent(
                f"{self._what} ends after {self.count} bytes; it should have {self._size}"
            )
        if self._expected is not None and self.digest != self._expected:
            raise BadContent(f"{self._what} has digest {self.digest}, not {self._expected}")
