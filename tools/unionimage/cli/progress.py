"""Progress for people: bars on a terminal, one line for each event when piped.

The events and their words are docker's. What is drawn goes to one stream, by default standard
output, as docker's does.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from unionimage.progress import Reporter, Silent, Task

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def reporter(quiet: bool = False, stream: TextIO | None = None) -> Terminal | Lines | Quiet:
    """The reporter that fits `stream`; a context manager.

    Args:
        quiet: report nothing.
        stream: where to; standard output if None. Give `sys.stderr` where standard output is data.
    """
    stream = stream or sys.stdout
    if quiet:
        return Quiet()
    drawable = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Terminal(stream) if drawable else Lines(stream)


class Quiet(Silent):
    """`Silent` as a context manager."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Lines:
    """One line for each change of status; no counting."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.flush()

    def line(self, text: str) -> None:
        self._stream.write(text + "\n")  # one write, so that threads do not mix their lines
        self._stream.flush()

    def task(self, name: str, status: str, total: int | None = None) -> Task:
        return _LineTask(self, name, status)


class _LineTask:
    def __init__(self, lines: Lines, name: str, status: str) -> None:
        self._lines, self._name, self._last = lines, name, ""
        self.status(status)

    def advance(self, count: int) -> None:
        pass

    def status(self, text: str, total: int | None = None) -> None:
        if text != self._last:
            self._last = text
            self._lines.line(f"{self._name}: {text}")

    def done(self, text: str) -> None:
        self.status(text)


class Terminal:
    """Bars, one a task, below the lines that stay."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: RichProgress | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._settle()

    def line(self, text: str) -> None:
        # Lines come before the bars or after them, never between: so bars that are done stay put.
        with self._lock:
            self._settle()
            self._stream.write(text + "\n")
            self._stream.flush()

    def task(self, name: str, status: str, total: int | None = None) -> Task:
        with self._lock:
            if self._bars is None:
                self._bars = _new_bars(self._stream)
                self._bars.start()
            return _Bar(self._bars, self._bars.add_task(status, total=total, name=name))

    def _settle(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, count: int) -> None:
        self._bars.advance(self._task, count)

    def status(self, text: str, total: int | None = None) -> None:
        if total is None:
            self._bars.update(self._task, description=text)
        else:
            self._bars.update(self._task, description=text, total=total, completed=0)

    def done(self, text: str) -> None:
        total = self._bars.tasks[self._task].total
        completed = None if total is None else total
        self._bars.update(self._task, description=text, completed=completed, visible=True)
        self._bars.stop_task(self._task)


def _new_bars(stream: TextIO) -> RichProgress:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Task as RichTask
    from rich.text import Text

    class WhileMoving(ProgressColumn):
        """A column that is empty once its task has ended."""

        def __init__(self, column: ProgressColumn) -> None:
            super().__init__()
            self._column = column

        def render(self, task: RichTask) -> Text:
            if task.finished or task.stop_time is not None or task.total is None:
                return Text()
            drawn = self._column(task)
            return drawn if isinstance(drawn, Text) else Text(escape(str(drawn)))

    return Progress(
        TextColumn("{task.fields[name]}:", markup=False),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        WhileMoving(DownloadColumn()),
        WhileMoving(TransferSpeedColumn()),
        console=Console(file=stream, force_terminal=True),
        refresh_per_second=10,
    )
