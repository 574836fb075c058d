"""Having a spawner do something (see `unionfuse.spawner`), by a caller that has imported nothing.

A request is one message: the name of a task, its argument, the caller's working directory and
environment, and the descriptors that the task needs. The answer is one message; that there is none
says that the task was not done. Both are in the form of `marshal`, which is compiled into Python:
one interpreter is at both ends.
"""

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
# What a child inherits, by the names that /proc/PID/status has for it.
INHERITED = ("Umask", "Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp", "Cpus_allowed")


def socket_of(directory: str, packages: "Iterable[str]" = ()) -> str:
    """Where a spawner of these very files listens that may be used from here.

    Args:
        directory: the user's own.
        packages: directories of Python files that it has imported, besides those of this package.
    """
    here = os.path.dirname(__file__)
    version = _version((here, f"{here}/express", f"{here}/survival", *packages))
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


def run(path: str, task: str, argument: "Any", descriptors: "Sequence[int]") -> "Any":
    """Have the spawner that listens at `path` do something; its answer, None when there is none.

    Args:
        argument: plain values, lists and dicts of them.
        descriptors: one to four of them, for the task; the first becomes its standard error.

    Raises:
        KeyboardInterrupt: when the task has ended, which is interrupted too where it may be; the
            next one is not waited for.
    """
    rights = b"".join(number.to_bytes(4, sys.byteorder) for number in descriptors)
    try:
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        # By a descriptor: the path may be longer than an address.
        client.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        peer = client.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        if int.from_bytes(peer[4:8], sys.byteorder) != os.geteuid():
            return None
        request = marshal.dumps((task, argument, os.getcwd(), dict(os.environ)))
        client.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        try:
            answer = client.recv(LONGEST_MESSAGE)
        except KeyboardInterrupt:
            client.shutdown(_socket.SHUT_WR)
            client.recv(LONGEST_MESSAGE)
            raise
    except OSError:
        return None
    finally:
        client.close()
        os.close(directory)
    return marshal.loads(answer) if answer else None
