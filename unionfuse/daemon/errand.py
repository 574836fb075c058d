"""Having a spawner (see `unionfuse.daemon.spawner`) do something, by a caller with few imports.

A request is one message: the name of a task, its argument, the caller's working directory and
environment, whether signals are passed on, and the descriptors that the task needs. The answers are
two: that it is begun, and what came of it. Meanwhile a signal that is passed on is a message with
its number, and the end of the connection says that the caller is gone. All but these numbers are in
the form of `marshal`, which is compiled into Python: one interpreter is at both ends.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import binascii
import marshal
import os
import sys

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all of these
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

LONGEST_MESSAGE = 1 << 18
# Not passed on: what cannot be caught, and what is about one process or its terminal.
OWN_SIGNALS = frozenset(
    (
        *(_signal.SIGKILL, _signal.SIGSTOP, _signal.SIGCONT, _signal.SIGTSTP, _signal.SIGTTIN),
        *(_signal.SIGTTOU, _signal.SIGCHLD, _signal.SIGPIPE, _signal.SIGURG, _signal.SIGWINCH),
        *(_signal.SIGSEGV, _signal.SIGBUS, _signal.SIGFPE, _signal.SIGILL, _signal.SIGABRT),
        *(_signal.SIGSYS, _signal.SIGTRAP, _signal.SIGIO),  # SIGIO: see spawner.py
    )
)
# What a child inherits, by the names that /proc/PID/status has for it.
INHERITED = ("Umask", "Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp", "Cpus_allowed",
             "SigIgn")  # fmt: skip


def socket_of(directory: str, packages: "Iterable[str]" = ()) -> str:
    """Where a spawner of these very files listens that may be used from here.

    Args:
        directory: the user's own.
        packages: directories of Python files that it has imported, besides those of unionfuse.
    """
    here = os.path.dirname(os.path.dirname(__file__))
    rooms = [entry.path for entry in os.scandir(here) if entry.is_dir()]
    version = _version((here, *rooms, *packages))
    return f"{directory}/spawner-{version:x}-{_surroundings():08x}"


def _version(packages: "Iterable[str]") -> int:
    """Changes when a file of the packages does, or the interpreter."""
    newest = max(
        entry.stat().st_mtime_ns
        for package in packages
        for entry in os.scandir(package)
        if entry.name.endswith((".py", ".so"))
    )
    return newest ^ binascii.crc32(sys.prefix.encode()) << 64


def _surroundings() -> int:
    """Changes with all that a child inherits, save environment and working directory."""
    spaces = "/proc/self/ns"
    told = [b"%s %d" % (os.fsencode(name), os.stat(f"{spaces}/{name}").st_ino)
            for name in os.listdir(spaces)]  # fmt: skip
    told.append(b"%d" % os.getpriority(os.PRIO_PROCESS, 0))
    told += [_contents(name) for name in ("cgroup", "limits", "oom_score_adj", "attr/current")]
    names = tuple(name.encode() for name in INHERITED)
    told += [line for line in _contents("status").splitlines() if line.startswith(names)]
    return binascii.crc32(b"\n".join(told))


def _contents(name: str) -> bytes:
    try:
        descriptor = os.open(f"/proc/self/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # there is a file, and nothing that would fill it
        return b""
    finally:
        os.close(descriptor)


def run(
    path: str, task: str, argument: "Any", descriptors: "Sequence[int]", pass_signals: bool = False
) -> "Any":
    """Have the spawner that listens at `path` do something; its answer, None when there is none.

    Args:
        argument: plain values, lists and dicts of them.
        descriptors: one to four of them, for the task; the first becomes its standard error.
        pass_signals: from when it is begun until this process ends, signals go to who does it, and
            what kills that one kills this process too; that one exits when this one is gone.

    Raises:
        EOFError: it was begun, and who did it ended before it was done.
    """
    rights = b"".join(number.to_bytes(4, sys.byteorder) for number in descriptors)
    try:
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    answer, passed, begun = b"", [], False
    try:
        # By a descriptor: the path may be longer than an address.
        client.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        peer = client.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        if int.from_bytes(peer[4:8], sys.byteorder) != os.geteuid():
            return None
        request = marshal.dumps((task, argument, os.getcwd(), dict(os.environ), pass_signals))
        client.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        if not client.recv(LONGEST_MESSAGE):
            return None
        begun = True
        passed = _pass_signals(client) if pass_signals else []
        answer = client.recv(LONGEST_MESSAGE)
    except OSError:
        if not begun:
            return None
    finally:
        client.close()
        os.close(directory)
    if answer:
        return marshal.loads(answer)
    if passed:
        _signal.signal(passed[-1], _signal.SIG_DFL)
        os.kill(os.getpid(), passed[-1])
    raise EOFError(task)


def _pass_signals(client: "_socket.socket") -> "list[int]":
    """Send the number of each signal that comes; the list is of those that came."""
    passed: list[int] = []

    def send(number: int, _: object) -> None:
        passed.append(number)
        client.send(bytes([number]))

    for number in range(1, 32):
        if number not in OWN_SIGNALS and _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, send)
    return passed
