"""Killing a function at its Nth step, for every N: what it leaves must be right each time."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Whatever changes something outside of the process.
STEPS = {"rename", "mkdir", "open", "unlink", "rmdir", "link", "symlink", "mknod", "write"} | {
    "execute", "executemany", "utime", "fchmod", "flock", "truncate", "setxattr", "close",
}  # fmt: skip


def kill_at_every_step(action: Callable[[], object], most: int) -> Iterator[int]:
    """Run an action in a child process again and again, killed at another of its steps each time.

    Yields after each kill; the last yield is after a run that came to its end. At most `most` steps
    are tried, spread evenly over all of them.
    """
    total = _steps_of(action)
    stride = max(1, total // most)
    for step in range(1, total, stride):
        _in_child(action, step)
        yield step
    assert _in_child(action, sys.maxsize) == 0
    yield total


def _steps_of(action: Callable[[], object]) -> int:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = _watch(sys.maxsize)
        try:
            action()
        finally:
            sys.setprofile(None)
            os.write(writing, b"%d" % count[0])
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text)


def _in_child(action: Callable[[], object], step: int) -> int:
    child = os.fork()
    if child == 0:
        _watch(step)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status


def _watch(step: int) -> list[int]:
    count = [0]

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument.__name__ in STEPS:
            count[0] += 1
            if count[0] >= step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    return count
