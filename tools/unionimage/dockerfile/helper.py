"""The helper process of a build: it mounts quickly, and it cleans up should the build be killed.

`python -m unionimage.dockerfile.helper STAGING` is a spawner (see `unionfuse.daemon.spawner`) in
the mount namespace of the build, which also knows what runs. It reads requests from standard
input, a JSON list a line, and answers mounts on standard output:

    ["prepare"]                       mounts will follow
    ["mount", WORDS]              → [exit code, what was said on stderr]
    ["begin", CONTAINER, RUNTIME]   a container runs now, by this runtime (its fields)
    ["end", CONTAINER]              it has ended

When the input ends while a container runs, the build was killed: the containers are deleted, and
what is mounted below STAGING is detached, so that the daemons of these mounts end.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unionfuse import mounting, syscalls
from unionfuse.daemon import spawner
from unionimage.mounts import start_program

if TYPE_CHECKING:
    from unionimage.container.runtime import Runtime


class Helper:
    """The build's side; used from several threads."""

    def __init__(self, staging: str) -> None:
        """Start the process; `staging` is the directory that all mounts of the build lie in."""
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, staging],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def prepare(self) -> None:
        """Mounts will follow soon."""
        self._send(["prepare"])

    def mount(self, words: Sequence[str]) -> tuple[int, str]:
        """Run the mount program with these words; its exit code, and what it said on stderr."""
        answer = self._send(["mount", list(words)], answer=True)
        if not answer:  # it has ended: do without it
            return start_program(words)
        code, said = json.loads(answer)
        return int(code), str(said)

    def begin(self, container: str, runtime: Runtime) -> None:
        """A container is about to run."""
        self._send(["begin", container, runtime._asdict()])

    def end(self, container: str) -> None:
        """A container has ended."""
        self._send(["end", container])

    def close(self) -> None:
        """All went well, or was cleaned up: the helper has nothing left to do, and ends."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.close()
            self._process.stdout.close()

    def _send(self, request: list[Any], *, answer: bool = False) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline() if answer else ""
        return ""


# ---- the helper process


def main(staging: str) -> int:
    """Serve until the input ends."""
    running: dict[str, dict[str, Any]] = {}
    for line in sys.stdin:
        match json.loads(line):
            case ["prepare"]:
                spawner.prepare()
            case ["mount", words]:
                print(json.dumps(spawner.forked(words)), flush=True)
            case ["begin", container, runtime]:
                running[container] = runtime
            case ["end", container]:
                running.pop(container, None)
    if running:
        _clean_up(running, os.fsencode(staging))
    return 0


def _clean_up(running: dict[str, dict[str, Any]], staging: bytes) -> None:
    from unionimage.container.runtime import Runtime

    for container, fields in running.items():
        Runtime(**fields).delete(container, force=True)
    for mount in reversed(list(mounting.mounts())):
        if mount.path.startswith(staging + b"/"):
            with contextlib.suppress(OSError):
                syscalls.umount(mount.path, syscalls.MNT_DETACH)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
