"""A container's output: JSON lines with rotation (docker's json-file format), written and read.

The writer belongs to the monitor. Readers need no monitor: they follow the files, also over a
rotation. A line is `{"log": "text\\n", "stream": "stdout", "time": "…Z"}`; what has no newline yet
is held back up to 16 KiB.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unionimage.container import limits
from unionimage.container.state import timestamp

LONGEST = 16 << 10
DEFAULT_SIZE = 20 << 20
DEFAULT_FILES = 3
POLL = 0.1
_escape = json.JSONEncoder(ensure_ascii=False).encode


class Writer:
    """Appends to `path`; above `max_size` bytes it becomes `path.1`, that `path.2` and so on.

    `max_size` 0 keeps one file for ever. `max_files` counts the current one.
    """

    def __init__(self, path: Path, max_size: int, max_files: int) -> None:
        self._path, self._max_size, self._max_files = path, max_size, max(1, max_files)
        self._partial = {"stdout": b"", "stderr": b""}
        self._open()

    def write(self, stream: str, data: bytes) -> None:
        """Take output as it comes and write its whole lines."""
        pending = self._partial[stream] + data
        *lines, rest = pending.split(b"\n")
        entries = [self._entry(stream, line + b"\n") for line in lines]
        while len(rest) >= LONGEST:
            entries.append(self._entry(stream, rest[:LONGEST]))
            rest = rest[LONGEST:]
        self._partial[stream] = rest
        if entries:
            self._append(entries)

    @property
    def unwritten(self) -> dict[str, str]:
        """What has no newline yet, for another writer of the same log."""
        return {stream: rest.decode("latin-1") for stream, rest in self._partial.items()}

    @unwritten.setter
    def unwritten(self, rests: dict[str, str]) -> None:
        self._partial = {stream: rest.encode("latin-1") for stream, rest in rests.items()}

    def flush(self) -> None:
        """Write what has no newline: nothing more will come."""
        for stream, rest in self._partial.items():
            if rest:
                self._append([self._entry(stream, rest)])
                self._partial[stream] = b""

    def close(self) -> None:
        try:
            self.flush()
        finally:
            os.close(self._descriptor)

    def _entry(self, stream: str, line: bytes) -> bytes:
        text = _escape(line.decode(errors="replace"))
        when = timestamp(time.time_ns())
        return f'{{"log":{text},"stream":"{stream}","time":"{when}"}}\n'.encode()

    def _append(self, entries: list[bytes]) -> None:
        for start in range(0, len(entries), 64):
            data = b"".join(entries[start : start + 64])
            if self._max_size and self._size and self._size + len(data) > self._max_size:
                self._rotate()
            while data:  # a full disk raises OSError: the monitor goes on without the log
                written = os.write(self._descriptor, data)
                self._size += written
                data = data[written:]

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o640)
        self._size = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        os.close(self._descriptor)
        for number in range(self._max_files - 1, 0, -1):
            older = self._path if number == 1 else Path(f"{self._path}.{number - 1}")
            if older.exists():
                older.rename(f"{self._path}.{number}")
        if self._max_files == 1:
            self._path.unlink(missing_ok=True)
        self._open()


def writer_of(path: Path, host_config: Mapping[str, Any]) -> Writer | None:
    """The writer that a container asks for; None: no log."""
    log = host_config.get("LogConfig") or {}
    if log.get("Type") == "none":
        return None
    options = log.get("Config") or {}
    size = options.get("max-size")
    return Writer(
        path,
        limits.parse_size(size, "--log-opt max-size") if size else DEFAULT_SIZE,
        int(options.get("max-file") or DEFAULT_FILES),
    )


class Line(NamedTuple):
    """One entry: text with its newline if it had one, `stdout` or `stderr`, docker's time."""

    text: str
    stream: str
    time: str


def read(
    path: Path,
    *,
    tail: int | None = None,
    since: str = "",
    until: str = "",
    follow: Callable[[], bool] | None = None,
) -> Iterator[Line]:
    """The entries of a log, oldest first.

    Args:
        tail: only the last so many of what is there now.
        since, until: times as docker writes them; compared as text.
        follow: go on with what is written later while this returns True.
    """
    reader = _Reader(path)
    lines: Iterator[Line] = reader.lines()
    if tail is not None:
        import collections

        lines = iter(collections.deque(lines, maxlen=tail))
    yield from _between(lines, since, until)
    while follow is not None:
        going_on = follow()
        fresh = list(_between(reader.lines(), since, until))
        yield from fresh
        if not going_on:
            return
        if not fresh:
            time.sleep(POLL)


def _between(lines: Iterator[Line], since: str, until: str) -> Iterator[Line]:
    for line in lines:
        if until and line.time > until:
            return
        if not since or line.time >= since:
            yield line


class _Reader:
    """Reads on where it stopped, through rotated files too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0

    def lines(self) -> Iterator[Line]:
        for path in self._files():
            yield from self._rest_of(path)

    def _files(self) -> list[Path]:
        """The files that hold something unread, oldest first."""
        existing = [self._path] if self._path.exists() else []
        number = 1
        while (older := Path(f"{self._path}.{number}")).exists():
            existing.insert(0, older)
            number += 1
        for position, path in enumerate(existing):
            if path.stat().st_ino == self._inode:
                return existing[position:]
        return existing

    def _rest_of(self, path: Path) -> Iterator[Line]:
        try:
            file = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            for data in file:
                if not data.endswith(b"\n"):
                    return
                self._offset += len(data)
                try:
                    entry = json.loads(data)
                    line = Line(entry["log"], entry["stream"], entry["time"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a full disk cut off
                yield line
