"""System calls for the tests that Python's ``os`` lacks. Errors are raised as ``OSError``."""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
MNT_DETACH = 2
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096

_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 429, 430, 431, 432
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 4

StrPath = str | bytes | Path


def _check(result: int, path: StrPath | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), None if path is None else os.fspath(path))
    return result


def renameat2(old: StrPath, new: StrPath, flags: int) -> None:
    _check(
        _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags),
        old,
    )


def umount(path: StrPath, flags: int = 0) -> None:
    _check(_libc.umount2(os.fsencode(path), flags), path)


def mount(source: StrPath, target: StrPath, kind: str, flags: int = 0, data: str = "") -> None:
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode(),
            ctypes.c_ulong(flags),
            data.encode(),
        ),
        target,
    )


def mount_overlay(target: StrPath, options: Sequence[tuple[str, str | None]]) -> None:
    """Mount kernel overlayfs by the fsopen family: no limit on the length of all options together.

    `options` are (key, value) pairs, the value None for a flag; lower layers are ``lowerdir+``.
    """
    context = _check(_libc.syscall(_SYS_FSOPEN, b"overlay", 1))
    try:
        for key, value in options:
            if value is None:
                command, text = _FSCONFIG_SET_FLAG, None
            else:
                command, text = _FSCONFIG_SET_STRING, os.fsencode(value)
            result = _libc.syscall(_SYS_FSCONFIG, context, command, key.encode(), text, 0)
            if result < 0:
                _raise_with_log(context, f"{key}={value}")
        if _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            _raise_with_log(context, "overlay")
        tree = _check(_libc.syscall(_SYS_FSMOUNT, context, 1, 0))
    finally:
        os.close(context)
    try:
        _check(
            _libc.syscall(
                _SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH
            ),
            target,
        )
    finally:
        os.close(tree)


def _raise_with_log(context: int, what: str) -> None:
    code = ctypes.get_errno()
    lines = []
    with contextlib.suppress(OSError):
        while True:
            lines.append(os.read(context, 1024).decode().strip())
    raise OSError(code, f"{os.strerror(code)} ({'; '.join(lines)})", what)


def telldir_listing(path: StrPath) -> Iterator[tuple[bytes, int]]:
    """Yield (name, position after it) of the directory, as readdir(3) and telldir(3) tell them."""
    stream = opendir(path)
    try:
        while (name := readdir(stream)) is not None:
            yield name, telldir(stream)
    finally:
        closedir(stream)


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


_libc.opendir.restype = ctypes.c_void_p
_libc.readdir64.restype = ctypes.POINTER(_Dirent)
_libc.readdir64.argtypes = _libc.closedir.argtypes = [ctypes.c_void_p]
_libc.telldir.argtypes = _libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


def opendir(path: StrPath) -> int:
    stream = _libc.opendir(os.fsencode(path))
    if not stream:
        _check(-1, path)
    return stream


def readdir(stream: int) -> bytes | None:
    entry = readdir_entry(stream)
    return entry and entry[0]


def readdir_entry(stream: int) -> tuple[bytes, int, int] | None:
    """Return (name, d_ino, d_type), or None at the end."""
    ctypes.set_errno(0)
    entry = _libc.readdir64(stream)
    if not entry:
        if ctypes.get_errno():
            _check(-1)
        return None
    return entry.contents.d_name, entry.contents.d_ino, entry.contents.d_type


def telldir(stream: int) -> int:
    return _libc.telldir(stream)


def seekdir(stream: int, position: int) -> None:
    _libc.seekdir(stream, position)


def rewinddir(stream: int) -> None:
    _libc.rewinddir(stream)


def closedir(stream: int) -> None:
    _libc.closedir(stream)


def mkfifo_or_node(path: StrPath, mode: int, device: int = 0) -> None:
    """mknod(2) with exactly `mode`, whatever the umask."""
    before = os.umask(0)
    try:
        os.mknod(path, mode, device)
    finally:
        os.umask(before)


def mounts_below(prefix: StrPath) -> list[tuple[str, str, str]]:
    """Return (mount point, device "major:minor", file system type) of mounts below `prefix`,
    the last mounted first."""
    wanted = os.fsdecode(prefix)
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            fields = left.split(" ")
            point = fields[4].encode("latin-1", "surrogateescape").decode("unicode_escape")
            point = point.encode("latin-1", "surrogateescape").decode("utf-8", "surrogateescape")
            if point == wanted or point.startswith(wanted.rstrip("/") + "/"):
                found.append((point, fields[2], right.split(" ")[0]))
    return found[::-1]


def children(process: int) -> list[int]:
    """Return the ids of the children of a process's first thread."""
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def processes_naming(text: StrPath) -> list[int]:
    """Return the ids of other processes whose command line contains `text`."""
    wanted, found = os.fsencode(text), []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in (os.getpid(), os.getppid()):
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
            if wanted in file.read():
                found.append(int(entry))
    return found


def processes_with_mount(point: StrPath) -> list[str]:
    """The command lines of all processes in whose mount namespace something is mounted there."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            mounts = Path(f"/proc/{process}/mountinfo").read_text(errors="replace").splitlines()
            if any(line.split()[4] == str(point) for line in mounts):
                words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
                found.append(f"{process} {words.replace(chr(0), ' ')[:80]}")
    return found
