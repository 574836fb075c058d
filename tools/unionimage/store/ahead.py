"""Reads a stream in a thread of its own, so that unpacking and decompressing run side by side."""

from __future__ import annotations

import threading
from queue import Queue

from unionimage.digest import CHUNK, Readable

_DEPTH = 4  # chunks that are read ahead: what this costs in memory


class Ahead:
    """A context manager; leaving it ends the thread.

    What the stream raises is raised by `read`.
    """

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._queue: Queue[bytes | BaseException] = Queue(_DEPTH)
        self._rest = b""
        self._ended: BaseException | bool = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._abandoned = True
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get()
            self._thread.join(0.01)

    def read(self, size: int = -1, /) -> bytes:
        if not self._rest:
            if self._ended:
                if isinstance(self._ended, BaseException):
                    raise self._ended
                return b""
            item = self._queue.get()
            if isinstance(item, BaseException):
                self._ended = item
                raise item
            self._ended = not item
            self._rest = item
        if size < 0 or size >= len(self._rest):
            data, self._rest = self._rest, b""
        else:
            data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _run(self) -> None:
        try:
            while not self._abandoned:
                data = self._stream.read(CHUNK)
                self._queue.put(data)
                if not data:
                    return
        except BaseException as error:
            self._queue.put(error)
