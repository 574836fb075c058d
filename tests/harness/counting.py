"""What a mount with `-o stats` was asked for."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from harness.mounts import Mounted


def status_line(tree: Mounted) -> dict[str, int]:
    """What SIGUSR1 logs: nodes, open files, and requests by opcode."""
    assert tree.daemon is not None
    before = len(tree.daemon.messages())
    tree.daemon.process.send_signal(signal.SIGUSR1)
    while True:
        assert tree.daemon.process.poll() is None
        time.sleep(0.01)
        lines = tree.daemon.messages()[before:].splitlines(keepends=True)
        if lines and lines[0].endswith("\n"):
            words = [word.split("=") for word in lines[0].split() if "=" in word]
            return {key: int(value) for key, value in words if value.isdigit()}


@contextmanager
def asked(tree: Mounted) -> Iterator[dict[str, int]]:
    """The requests of a block, by opcode, once it has ended."""
    found: dict[str, int] = {}
    before = status_line(tree)
    yield found
    after = status_line(tree)
    found.update({name: n - before.get(name, 0) for name, n in after.items() if name.isupper()})
