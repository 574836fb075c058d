"""How long work tells what it is doing, without knowing who listens.

`cli.progress` draws bars or prints lines; `Silent` does neither.
"""

from __future__ import annotations

from typing import Protocol


class Task(Protocol):
    """One thing that moves along, such as a layer that is fetched; used from any thread."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done (fewer, if negative)."""

    def status(self, text: str, total: int | None = None) -> None:
        """What happens to it now: `Extracting`; with `total` it counts from 0 to that anew."""

    def done(self, text: str) -> None:
        """It has ended: `Pull complete`."""


class Reporter(Protocol):
    """Where a verb reports to; used from any thread."""

    def line(self, text: str) -> None:
        """Print a line that stays."""

    def task(self, name: str, status: str, total: int | None = None) -> Task:
        """Begin a task of `total` bytes (None: not known)."""


class Silent:
    """Reports nothing: a Reporter and a Task."""

    def line(self, text: str) -> None:
        pass

    def task(self, name: str, status: str, total: int | None = None) -> Task:
        return self

    def advance(self, count: int) -> None:
        pass

    def status(self, text: str, total: int | None = None) -> None:
        pass

    def done(self, text: str) -> None:
        pass
