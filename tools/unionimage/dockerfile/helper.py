"""The helper process of a build: it mounts quickly, and it cleans up should the build be killed.

`python -m unionimage.dockerfile.helper STAGING` imports the mount program once; every mount is a
fork of it then, where a program started anew would spend most of its time on imports. It reads
requests from standard input, a JSON list a line, and answers mounts on standard output:

    ["prepare"]                       mounts will follow
    ["mount", WORDS]              → [exit code, what was said on stderr]
    ["begin", CONTAINER, RUNTIME]   a container runs now, by this runtime (its fields)
    ["end", CONTAINER]              it has ended

When the input ends while a container runs, the build was killed: the containers are deleted, and
what is mounted below STAGING is detached, so that the daemons of these mounts end.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unionfuse import mounting, syscalls

if TYPE_CHECKING:
    from unionimage.container.runtime import Runtime


class Helper:
    """The build's side; used from several threads."""

    def __init__(self, staging: str) -> None:
        """Start the process; `staging` is the directory that all mounts of the build lie in."""
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, staging],
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
        if not answer:  # it has ended: the program itself tells why, or does without it
            command = [sys.executable, "-m", "unionfuse", *words]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            return done.returncode, done.stderr
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
                importlib.import_module("unionfuse.daemon")
                importlib.import_module("unionfuse.serving")  # trio and pyfuse3
                gc.freeze()  # the forks share what is loaded
            case ["mount", words]:
                print(json.dumps(_mount(words)), flush=True)
            case ["begin", container, runtime]:
                running[container] = runtime
            case ["end", container]:
                running.pop(container, None)
    if running:
        _clean_up(running, os.fsencode(staging))
    return 0


def _mount(words: list[str]) -> tuple[int, str]:
    """Fork; the child is the mount program."""
    from unionfuse.__main__ import main as mount_program

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor, stream in ((nowhere, 0), (nowhere, 1), (writer, 2)):
                os.dup2(descriptor, stream)
            code = mount_program(words)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


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
