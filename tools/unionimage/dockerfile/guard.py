"""Cleans up after a build that was killed: its containers, and the daemons of its mounts.

`python -m unionimage.dockerfile.guard RUNTIME-JSON` reads the names of containers from standard
input: `+NAME` one that runs now, `-NAME` one that has ended. When the input ends and some are left,
the build was killed: they are deleted, and what it had mounted is detached, so that the daemons
end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

from unionfuse import mounting, syscalls
from unionimage.container.runtime import Runtime


class Guard:
    """The build's side: tells the guard process what runs."""

    def __init__(self, runtime: Runtime, staging: str) -> None:
        """Start a guard; `staging` is the directory that all mounts of the build lie in."""
        facts = [runtime.name, runtime.path, runtime.state, runtime.hidden, staging]
        command = [sys.executable, "-m", __name__, json.dumps(facts)]
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def note(self, sign: str, name: str) -> None:
        """A container begins (`+`) or has ended (`-`)."""
        pipe = self._process.stdin
        assert pipe is not None
        with self._lock:
            try:
                pipe.write(f"{sign}{name}\n".encode())
                pipe.flush()
            except BrokenPipeError:
                pass  # without its guard a build works all the same

    def close(self) -> None:
        """All went well, or was cleaned up: the guard has nothing to do."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.close()
        self._process.wait()


def main(facts: str) -> int:
    """The guard process."""
    name, path, state, hidden, staging = json.loads(facts)
    runtime = Runtime(name, path, state, hidden)
    running: set[str] = set()
    for line in sys.stdin:
        sign, container = line[0], line[1:].strip()
        (running.add if sign == "+" else running.discard)(container)
    if running:
        for container in running:
            runtime.delete(container, force=True)
        for mount in reversed(list(mounting.mounts())):
            if mount.path.startswith(os.fsencode(staging) + b"/"):
                try:
                    syscalls.umount(mount.path, syscalls.MNT_DETACH)
                except OSError:
                    continue
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
