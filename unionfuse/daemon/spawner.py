"""Doing things without starting an interpreter for it: in a fork of this process, or of one that
has imported everything already, the spawner.

Starting an interpreter and importing takes longer than mounting; forked processes also share the
memory of what was imported. The spawner is only ever a short cut: `errand.run` tells when there is
none, and the caller does it by itself. There is one for each version of the files and for each kind
of surroundings (user, namespaces, cgroup, limits, capabilities …), so that what it forks is as if
the caller had forked it; one fork is always made ahead. A spawner that nobody asks for five
minutes, or whose socket is gone, ends; what it forked does not depend on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import marshal
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unionfuse.daemon.errand import LONGEST_MESSAGE

IDLE = 300.0  # seconds
MOST_DESCRIPTORS = 4

Task = Callable[[Any, list[int]], Any]
"""Gets the argument of a request and its descriptors; what it returns is answered."""


@functools.cache
def start(path: Path, module: str) -> None:
    """Start a spawner in the background, of use to the next caller: `python -m MODULE PATH LOCK`.

    Of those that begin at the same time one goes on.
    """
    if os.fork() != 0:
        return
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        lock = os.open(path.parent / "spawner.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.set_inheritable(lock, True)
        os.chdir("/")
        os.execv(sys.executable, [sys.executable, "-P", "-m", module, str(path), str(lock)])
    finally:
        os._exit(1)


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
                code = mount(words)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        messages.seek(0)
        return code, messages.read().decode(errors="replace")


def mount(words: Sequence[str], _: Sequence[int] = ()) -> int:
    """The mount program itself, in a process that was forked for it; returns its exit code."""
    from unionfuse.daemon.command import main

    _call_it_unionfuse()
    code = main(list(words))
    sys.stderr.flush()
    return code


# --- the spawner ------------------------------------------------------------------------------


def serve(path: Path, lock: int, tasks: Mapping[str, Task]) -> None:
    """Listen at `path` and fork; returns when it is not needed any more.

    Import what the tasks need before. `lock` is closed when there is a spawner at `path`.
    """
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
    os.close(lock)
    mine = path.stat().st_ino
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    server.setblocking(False)
    last = time.monotonic()
    while time.monotonic() - last < IDLE and _still_ours(path, mine):
        line, childs = socket.socketpair()
        if os.fork() == 0:
            line.close()
            _answer(_await_caller(server, childs), tasks)
        childs.close()
        line.settimeout(1.0)
        while time.monotonic() - last < IDLE and _still_ours(path, mine):
            with contextlib.suppress(TimeoutError):
                if line.recv(1):
                    last = time.monotonic()
                else:  # it was killed before anybody asked for it
                    time.sleep(0.1)
                break
        line.close()
    if _still_ours(path, mine):
        path.unlink()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _await_caller(server: socket.socket, line: socket.socket) -> socket.socket:
    """In the child that is forked ahead, so that no caller waits for it: the next connection.

    It tells on `line` that it has one; that line ends with the spawner, and the child with both.
    """
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.register(line, select.POLLIN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        if line.fileno() in dict(poll.poll()):
            os._exit(0)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = server.accept()
            with contextlib.suppress(ConnectionError), line:
                line.send(b"!")
            server.close()
            _call_it_unionfuse()
            return connection


def _answer(connection: socket.socket, tasks: Mapping[str, Task]) -> None:
    """In the child: do it, answer, end."""
    try:
        connection.settimeout(None)
        data, descriptors, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, MOST_DESCRIPTORS)
        task, argument, directory, environment, with_signals = marshal.loads(data)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        os.dup2(descriptors[0], 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        connection.send(b"begun")
        if with_signals:
            _take_signals(connection)
        answer = tasks[task](argument, descriptors)
        with contextlib.suppress(OSError):
            connection.send(marshal.dumps(answer))
    finally:
        os._exit(0)


def _take_signals(connection: socket.socket) -> None:
    """Get the signals that the caller passes on, and be told to exit when it is gone.

    SIGIO tells of them. SIGURG would be more harmless, but the parser of Dockerfiles is in Go,
    whose runtime takes that for itself when a build loads it.
    """

    def take(*_: object) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := connection.recv(1, socket.MSG_DONTWAIT):
                os.kill(os.getpid(), data[0])
            raise SystemExit(128 + signal.SIGHUP)

    signal.signal(signal.SIGIO, take)
    descriptor = connection.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGIO)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    take()  # what came before


def prepare() -> None:
    """Import what a mount needs, so that the forks that follow have it and share it."""
    for name in ("daemon.command", "daemon.daemon", "survival.survivor"):
        importlib.import_module(f"unionfuse.{name}")
    gc.freeze()


def _call_it_unionfuse() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("unionfuse")


def _still_ours(path: Path, inode: int) -> bool:
    try:
        return path.stat().st_ino == inode
    except OSError:
        return False


def _short(path: Path) -> str:
    """The path by a descriptor of its directory: it may be longer than sun_path."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    return f"/proc/self/fd/{descriptor}/{path.name}"
