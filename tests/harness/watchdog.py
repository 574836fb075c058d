"""The process that ends hung mounts, and that cleans up when the test run itself died.

A thread cannot do it: who touches a mount whose daemon hangs may sleep in the kernel holding the
interpreter's lock (a page fault in a mapping), and no signal wakes it. Aborting the FUSE
connection does.

The test run starts ``python watchdog.py DIRECTORY`` and writes lines to its standard input:
``arm SECONDS`` before a test, ``disarm`` after it. End of file means that the run is over: what is
still mounted below DIRECTORY is unmounted, and processes whose command line names it are killed.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import linux


def abort_connections(directory: str | Path) -> list[str]:
    """End every FUSE mount below `directory` and kill its daemons; return the mount points."""
    ended = []
    for point, device, kind in linux.mounts_below(directory):
        if not kind.startswith("fuse"):
            continue
        ended.append(point)
        with contextlib.suppress(OSError), _control_directory(directory) as control:
            (control / device.split(":")[1] / "abort").write_text("1")
    kill_processes(directory)
    return ended


def kill_processes(directory: str | Path) -> None:
    for pid in linux.processes_naming(str(directory)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def unmount_everything(directory: str | Path) -> None:
    for point, _, _ in linux.mounts_below(directory):
        with contextlib.suppress(OSError):
            linux.umount(point, linux.MNT_DETACH)


@contextlib.contextmanager
def _control_directory(directory: str | Path):
    """Yield a directory where fusectl is mounted."""
    usual = Path("/sys/fs/fuse/connections")
    if os.path.ismount(usual):
        yield usual
        return
    own = Path(directory) / ".fusectl"
    own.mkdir(exist_ok=True)
    linux.mount("fusectl", own, "fusectl")
    try:
        yield own
    finally:
        linux.umount(own, linux.MNT_DETACH)


class Watchdog:
    """The test run's end of the pipe."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, directory],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal must not end it before the run
        )

    def arm(self, seconds: float) -> None:
        self._say(f"arm {seconds}")

    def disarm(self) -> None:
        self._say("disarm")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()


def main(directory: str) -> None:
    deadline: float | None = None
    while True:
        rest = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([sys.stdin], [], [], rest)[0]:
            deadline = None
            for point in abort_connections(directory):
                print(f"\nwatchdog: {point} took too long and was aborted", file=sys.stderr)
            continue
        # one line a read: os.read, since a buffered reader would hide a second line from select
        words = _read_line().split()
        if not words:
            break
        deadline = time.monotonic() + float(words[1]) if words[0] == "arm" else None
    kill_processes(directory)
    unmount_everything(directory)


def _read_line() -> str:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return ""
        line += byte
    return line.decode()


if __name__ == "__main__":
    main(sys.argv[1])
