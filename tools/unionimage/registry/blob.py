"""A blob on its way in, over as many connections as it takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from unionimage.digest import CHUNK, Digest
from unionimage.errors import BadContent
from unionimage.registry.errors import RegistryError, RegistryStatusError
from unionimage.registry.http import HttpError, Response
from unionimage.registry.transport import Pace, Transport, finish
from unionimage.spec import Descriptor

Progress = Callable[[int], None]
"""Is told how many bytes more have moved."""


class Origin(Protocol):
    """Where blobs come from: a repository, whose name `str` gives."""

    @property
    def transport(self) -> Transport: ...

    def open_range(self, digest: Digest, start: int, /) -> Response: ...


class BlobReader:
    """A blob as a stream; reconnects with a range where the connection broke. It does *not* verify
    the digest.

    Raises (from `read`):
        BadContent: the blob is longer or shorter than promised.
        RegistryError: cut or stalled too often with nothing gained.
    """

    def __init__(
        self, origin: Origin, descriptor: Descriptor, progress: Progress, offset: int
    ) -> None:
        self._origin = origin
        self._descriptor = descriptor
        self._progress = progress
        self._response: Response | None = None
        self._failures = 0
        self._pace = Pace(origin.transport.limits.stall)
        self._finished = False
        self.position = offset

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connection; harmless when all was read."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, at most `size` (all that is left if negative)."""
        if size < 0:
            return b"".join(iter(lambda: self.read(CHUNK), b""))
        if size == 0 or self._finished:
            return b""
        while True:
            try:
                data = self._some(size)
                break
            except (HttpError, OSError) as error:
                self._failed(self._origin.transport.explain(error, self._url), error)
            except RegistryStatusError as error:
                if error.status != 429 and error.status < 500:
                    raise
                self._failed(error, error)
        if data:
            self._failures = 0
            self.position += len(data)
            self._progress(len(data))
            return data
        self._finished = True
        if self._response is not None:
            finish(self._response)
            self._response = None
        return b""

    @property
    def _url(self) -> str:
        return self._origin.transport.base

    def _some(self, size: int) -> bytes:
        """Some bytes from the connection, which is opened where there is none."""
        left = self._descriptor.size - self.position
        if self._response is None:
            if left <= 0 and self.position:
                return b""
            self._response = self._open()
            self._pace.restart()
        if left == 0:
            if self._response.read1(1):
                raise self._bad(f"is longer than the {self._descriptor.size} bytes promised")
            return b""
        data = self._response.read1(min(size, left))
        if not data:
            declared = "Content-Length" in self._response.headers
            self.close()
            if declared:
                raise self._bad(f"ends after {self.position} of {self._descriptor.size} bytes")
            raise ConnectionResetError("the answer ended early")
        self._pace.count(len(data))
        return data

    def _open(self) -> Response:
        """Ask for the rest of the blob; skip what is there already if the registry sends it all."""
        response = self._origin.open_range(self._descriptor.digest, self.position)
        start = 0
        if response.status == 206:
            match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            start = int(match.group(1)) if match else -1
        if not 0 <= start <= self.position:
            response.close()
            raise self._bad("comes from the wrong place")
        skip = self.position - start
        while skip:
            data = response.read1(min(CHUNK, skip))
            if not data:
                response.close()
                raise ConnectionResetError("the answer ended early")
            skip -= len(data)
        return response

    def _failed(self, problem: RegistryError, cause: Exception) -> None:
        """Note a cut; wait before the next attempt, or give up after too many in a row."""
        self.close()
        self._failures += 1
        transport = self._origin.transport
        if transport.aborted or self._failures >= transport.limits.attempts:
            raise problem from cause
        transport.pause(self._failures)

    def _bad(self, reason: str) -> BadContent:
        self.close()
        return BadContent(f"{self._origin}: blob {self._descriptor.digest} {reason}")
