"""Progress: docker's lines when piped, bars on a terminal."""

import io
import os
import pty
import threading
from contextlib import suppress

import pytest
from unionimage.cli.progress import Lines, Terminal, reporter


def test_piped_progress_is_a_line_for_each_change() -> None:
    stream = io.StringIO()
    with reporter(stream=stream) as report:
        report.line("1: Pulling from x")
        task = report.task("abc", "Pulling fs layer", 100)
        task.status("Downloading")
        task.advance(50)
        task.status("Downloading")
        task.done("Pull complete")
    assert stream.getvalue().splitlines() == [
        "1: Pulling from x",
        "abc: Pulling fs layer",
        "abc: Downloading",
        "abc: Pull complete",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter(quiet=True) as report:
        report.line("x")
        report.task("a", "b").done("c")
    assert capsys.readouterr() == ("", "")


def test_lines_of_several_threads_do_not_mix() -> None:
    stream = io.StringIO()
    with Lines(stream) as report:

        def work(name: str) -> None:
            task = report.task(name, "begun")
            for step in range(50):
                task.status(f"step {step}")

        threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 * 51
    assert all(": " in line and line.count("t") >= 1 for line in lines)


def read_all(terminal: int) -> str:
    """What was written to the other side of a terminal, which is closed by now."""
    parts = []
    with suppress(OSError):  # EIO: that was all
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_a_terminal_gets_bars_that_stay_when_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    main, side = pty.openpty()
    with os.fdopen(side, "w") as stream:
        bars = reporter(stream=stream)
        assert isinstance(bars, Terminal)
        with bars as report:
            report.line("1: Pulling from [x]")
            task = report.task("abc[bold]", "Downloading", 1000)
            task.advance(500)
            task.status("Extracting", 10)
            task.advance(10)
            task.done("Pull complete")
            report.line("Status: done")
    shown = read_all(main)
    assert "1: Pulling from [x]\r\n" in shown
    assert "abc[bold]: Pull complete" in shown
    assert shown.index("Pull complete") < shown.index("Status: done")
    assert "━" in shown
