"""How a build shows itself: BuildKit's plain lines, a live picture on a terminal, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from unionimage.dockerfile.execute import StepView, View


def view(progress: str, stream: TextIO) -> View:
    """The view that `--progress` names: auto, plain, tty or quiet."""
    if progress == "quiet":
        return Silent()
    if progress == "tty" or (progress == "auto" and stream.isatty()):
        return Live(stream)
    return Plain(stream)


class Silent:
    """Shows nothing."""

    def cached(self, label: str) -> None:
        pass

    def begin(self, label: str) -> StepView:
        return _SilentStep()

    def close(self) -> None:
        pass


class _SilentStep:
    def output(self, data: bytes) -> None:
        pass

    def done(self) -> None:
        pass

    def failed(self) -> None:
        pass


class Plain:
    """Lines that begin with the number of their step, so that steps side by side stay readable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._count = 0

    def cached(self, label: str) -> None:
        self.write([f"#{self.number()} {label}", "CACHED"])

    def begin(self, label: str) -> StepView:
        number = self.number()
        self.write([f"#{number} {label}"])
        return _PlainStep(self, number)

    def close(self) -> None:
        pass

    def number(self) -> int:
        with self._lock:
            self._count += 1
            return self._count

    def write(self, lines: list[str]) -> None:
        """Write a header line and lines that belong to it, in one piece."""
        first = lines[0].partition(" ")[0]
        text = lines[0] + "".join(f"\n{first} {line}" for line in lines[1:]) + "\n"
        with self._lock:
            self._stream.write(text)
            self._stream.flush()


class _PlainStep:
    def __init__(self, plain: Plain, number: int) -> None:
        self._plain = plain
        self._number = number
        self._began = time.monotonic()
        self._rest = b""

    def output(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self._say(*(self._stamped(line) for line in lines))

    def done(self) -> None:
        self._flush()
        self._say(f"DONE {self._seconds:.1f}s")

    def failed(self) -> None:
        self._flush()
        self._say(f"ERROR after {self._seconds:.1f}s")

    def _flush(self) -> None:
        if self._rest:
            self._say(self._stamped(self._rest))
            self._rest = b""

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _stamped(self, line: bytes) -> str:
        return f"{self._seconds:.3f} {readable(line)}"

    def _say(self, *lines: str) -> None:
        first, *others = lines
        self._plain.write([f"#{self._number} {first}", *others])


class Live:
    """Running steps with their time and last lines; what is finished scrolls up.

    The picture begins with the first step that is carried out: a cached build is done before the
    library that draws it were loaded.
    """

    SHOWN = 5

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # of `_steps`; never held while the picture is called
        self._starting = threading.Lock()
        self._steps: list[_LiveStep] = []
        self._picture: Any = None

    def cached(self, label: str) -> None:
        self._say(f"=> CACHED {label}", 0.0)

    def begin(self, label: str) -> StepView:
        step = _LiveStep(self, label)
        with self._lock:
            self._steps.append(step)
        with self._starting:
            if self._picture is None:
                self._start()
        return step

    def close(self) -> None:
        picture, self._picture = self._picture, None
        if picture is not None:
            picture.stop()

    def end(self, step: _LiveStep, failed: bool) -> None:
        """Let a step scroll up."""
        with self._lock:
            self._steps.remove(step)
        picture = self._picture
        if picture is not None:
            picture.refresh()
        self._say(f"=> {'ERROR ' if failed else ''}{step.label}", step.seconds)

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live as Picture

        console = Console(file=self._stream, highlight=False)
        picture = Picture(
            get_renderable=self._drawn, console=console, transient=True, refresh_per_second=8
        )
        picture.start()
        self._picture = picture

    def _say(self, text: str, seconds: float) -> None:
        """Print the line of a step that is over."""
        line = _timed(text, seconds, _columns())
        picture = self._picture
        if picture is not None:
            picture.console.print(line, markup=False, no_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _drawn(self) -> Any:
        from rich.text import Text

        width = _columns()
        with self._lock:
            lines: list[str] = []
            for step in self._steps:
                lines.append(_timed(f"=> {step.label}", step.seconds, width))
                lines += [f" => # {line}"[: width - 1] for line in step.last]
        return Text("\n".join(lines), no_wrap=True)


def _columns() -> int:
    import shutil

    return max(30, shutil.get_terminal_size().columns)


def _timed(text: str, seconds: float, width: int) -> str:
    room = width - 9
    if len(text) > room:
        text = text[: room - 1] + "…"
    return f"{text:<{room}} {seconds:6.1f}s"


class _LiveStep:
    def __init__(self, live: Live, label: str) -> None:
        self.label = label
        self.last: deque[str] = deque(maxlen=Live.SHOWN)
        self._live = live
        self._began = time.monotonic()
        self._rest = b""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def output(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.last.extend(readable(line) for line in lines)

    def done(self) -> None:
        self._live.end(self, failed=False)

    def failed(self) -> None:
        self._live.end(self, failed=True)


def readable(line: bytes) -> str:
    """A line of a process as text that cannot steer the terminal."""
    text = line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]
    return "".join(char if char.isprintable() or char == "\t" else "" for char in _plain(text))


def _plain(text: str) -> str:
    """Without the colours and cursor movements of terminals."""
    import re

    return re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|.)", "", text)


def excerpt(text: str, first: int, last: int, around: int = 2) -> str:
    """Some lines of a Dockerfile, those from `first` to `last` marked, as BuildKit shows them."""
    lines = text.splitlines()
    shown = []
    for number in range(max(1, first - around), min(len(lines), last + around) + 1):
        mark = ">>>" if first <= number <= last else "   "
        shown.append(f"{number:4} | {mark} {lines[number - 1]}")
    rule = "-" * 20
    return "\n".join([f"Dockerfile:{first}", rule, *shown, rule])


def standard_error() -> TextIO:
    """The stream that progress goes to; standard output is for the image id."""
    return sys.stderr
