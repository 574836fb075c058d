"""Mounting without starting an interpreter for it: the mount program in a fork of this process, or
of one that has imported everything already, the spawner.

Starting an interpreter and importing takes longer than mounting; forked daemons also share the
memory of what was imported. The spawner is only ever a short cut: `mount` tells when there is none,
or one that must not be used (another version of the files, another mount namespace, another user),
and the caller forks by itself. A spawner that nobody asks for five minutes, or whose socket is
gone, ends; the daemons that it forked do not depend on it.

A request is one message: JSON with the words of the command line, the working directory and the
mount namespace, and the descriptor that becomes standard error. The answer is the exit code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

IDLE = 300.0  # seconds
LONGEST_REQUEST = 1 << 18
NICE = 10  # for its own start: nobody waits for that


def socket_of(directory: Path) -> Path:
    """Where the spawner of these very files listens, below a directory that is the user's own."""
    return directory / f"spawner-{_version():x}"


def forked(words: Sequence[str]) -> tuple[int, str]:
    """Run `unionfuse WORDS` in a fork of this process; its exit code and what it said on stderr.

    Only for a process without other threads: the fork would not have them, but their locks.
    """
    with open(os.memfd_create("messages", os.MFD_CLOEXEC), "r+b") as messages:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                nowhere = os.open(os.devnull, os.O_RDWR)
                for source, stream in ((nowhere, 0), (nowhere, 1), (messages.fileno(), 2)):
                    os.dup2(source, stream)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # locks of the caller's among them
                # The caller may have had other streams in their place, as tests do.
                streams = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
                sys.stdout = sys.stderr = streams
                code = _run(words)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        messages.seek(0)
        return code, messages.read().decode(errors="replace")


def _run(words: Sequence[str]) -> int:
    """The mount program itself; in a child of the process that was asked."""
    from unionfuse.__main__ import main

    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("unionfuse")
    code = main(list(words))
    sys.stderr.flush()
    return code


def _version() -> int:
    """Changes when a file of this package does, or the interpreter."""
    here = Path(__file__).parent
    files = [
        entry
        for place in (here, here / "express", here / "survival")
        for entry in os.scandir(place)
        if entry.name.endswith((".py", ".so"))
    ]
    newest = max(entry.stat().st_mtime_ns for entry in files)
    return newest ^ zlib.crc32(sys.prefix.encode()) << 64


def mount(directory: Path, words: Sequence[str], stderr: int) -> int | None:
    """Have `unionfuse WORDS` run by the spawner; its exit code, or None when there is none.

    Args:
        directory: where its socket is.
        stderr: a descriptor for messages.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with client:
        try:
            client.connect(_short(socket_of(directory)))
            if _user_of(client) != os.geteuid():
                return None
            request = {"words": list(words), "cwd": os.getcwd(), "namespace": _namespace()}
            socket.send_fds(client, [json.dumps(request).encode()], [stderr])
            answer = client.recv(1)
        except OSError:
            return None
    return answer[0] if answer and answer[0] != REFUSED else None


REFUSED = 255


def start(directory: Path) -> None:
    """Start a spawner in the background; it is of use to the next caller."""
    if os.fork() != 0:
        return
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.nice(NICE)
        os.chdir("/")
        os.execv(sys.executable, [sys.executable, "-m", "unionfuse.spawner", str(directory)])
    finally:
        os._exit(1)


def serve(path: Path) -> None:
    """Listen at `path` and fork; returns when it is not needed any more."""
    staged = path.with_name(f".{path.name}-{os.getpid()}")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    server.bind(_short(staged))
    staged.chmod(0o600)
    server.listen(64)
    Path("/proc/self/comm").write_text("unionfuse-spawn")
    prepare()
    gc.collect()
    gc.freeze()
    staged.rename(path)  # whoever finds it finds a spawner that is ready
    mine = path.stat().st_ino
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    server.settimeout(1.0)
    last = time.monotonic()
    while time.monotonic() - last < IDLE and _still_ours(path, mine):
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        last = time.monotonic()
        with connection:
            if os.fork() == 0:
                server.close()
                _answer(connection)
    if _still_ours(path, mine):
        path.unlink()


def _answer(connection: socket.socket) -> None:
    """In the child: run the command line, tell its exit code, end."""
    code = REFUSED
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.settimeout(None)
        data, descriptors, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 1)
        request = json.loads(data)
        if request["namespace"] == _namespace():
            os.dup2(descriptors[0], 2)
            os.chdir(request["cwd"])
            code = _run(request["words"])
        with contextlib.suppress(OSError):
            connection.send(bytes([code]))
    finally:
        os._exit(0)


def prepare() -> None:
    """Import what a mount needs, so that the forks that follow have it and share it."""
    for name in ("__main__", "daemon"):
        importlib.import_module(f"unionfuse.{name}")
    gc.freeze()


def _user_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _still_ours(path: Path, inode: int) -> bool:
    try:
        return path.stat().st_ino == inode
    except OSError:
        return False


def _namespace() -> list[int]:
    status = os.stat("/proc/self/ns/mnt")
    return [status.st_dev, status.st_ino]


def _short(path: Path) -> str:
    """The path by a descriptor of its directory: it may be longer than sun_path."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    return f"/proc/self/fd/{descriptor}/{path.name}"


if __name__ == "__main__":
    serve(socket_of(Path(sys.argv[1])))
