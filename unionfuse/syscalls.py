"""The only raw system calls: what the `os` module lacks, and everything that changes a file system.

Every call that changes something on disk goes through this module, so that a test can kill the
process, fail a call, have it wait or record the order in front of each of them (the variables
`UNIONFUSE_TEST_…`, see `_Faults`). Without these the calls are plain and cost nothing extra.

Names are single path components relative to a directory descriptor; nothing here follows a
symbolic link.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# linux/mount.h
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOATIME = 0x10
MNT_DETACH = 2
CLONE_NEWNS = 0x20000
CLONE_NEWNET = 0x40000000

# linux/fs.h
_FICLONE = 0x40049409
_FS_IOC_GETFSUUID = 0x80111500
_WRITE, _WAIT_WRITE_WAIT = 2, 7  # SYNC_FILE_RANGE_WRITE, _WAIT_BEFORE | _WRITE | _WAIT_AFTER

NOW = 1 << 100  # no time that fits in 64 bits of seconds is as late
"""For `utimens`: the current time."""
_CLOCK_REALTIME_COARSE = 5
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2

_SYS = {"name_to_handle_at": 303, "open_by_handle_at": 304, "openat2": 437, "open_tree": 428}
_SYS |= {"mount_setattr": 442, "renameat2": 316, "fallocate": 285}
_ARM64 = {"name_to_handle_at": 264, "open_by_handle_at": 265, "renameat2": 276, "fallocate": 47}
if os.uname().machine in ("aarch64", "riscv64"):
    _SYS |= _ARM64

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _call(name: str, *args: Any) -> int:
    result: int = _syscall(ctypes.c_long(_SYS[name]), *args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# --- entering directories ---------------------------------------------------------------------

_OPEN_HOW = struct.Struct("=QQQ")


def openat2(directory: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """Open `path` below `directory` with the RESOLVE_* rules of openat2(2); returns a descriptor.

    Raises:
        OSError: as openat2(2); ELOOP or EXDEV where a component breaks a rule.
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, resolve)
    return _call("openat2", directory, path, how, ctypes.c_size_t(len(how)))


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Open a directory by a path of any length below `root`, crossing no link and no mount.

    A path longer than PATH_MAX is walked piece by piece.
    """
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
    if len(path) < 4000:
        return openat2(root, path or b".", flags, resolve)
    at, owned = root, False
    components = path.split(b"/")
    while components:
        piece = [components.pop(0)]
        size = len(piece[0])
        while components and size + 1 + len(components[0]) < 4000:
            size += 1 + len(components[0])
            piece.append(components.pop(0))
        step = flags if not components else os.O_PATH | os.O_DIRECTORY
        try:
            below = openat2(at, b"/".join(piece), step, resolve)
        finally:
            if owned:
                os.close(at)
        at, owned = below, True
    return at


def clone_tree(path: bytes | int) -> int:
    """A detached, read-only, no-atime clone of the mount at a directory: an O_PATH descriptor.

    Nothing that is mounted below shows in the clone, and no write through it reaches the disk.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.12.
    """
    if isinstance(path, int):
        flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH
        tree = _call("open_tree", path, b"", ctypes.c_uint(flags))
    else:
        tree = _call(
            "open_tree", AT_FDCWD, path, ctypes.c_uint(OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
        )
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOATIME, 0x70, 0, 0)
    try:
        _call("mount_setattr", tree, b"", AT_EMPTY_PATH, attributes, ctypes.c_size_t(32))
    except OSError:
        os.close(tree)
        raise
    return tree


def proc_path(descriptor: int, name: bytes = b"") -> bytes:
    """The path by which path-only calls reach a descriptor, or a name in a directory descriptor."""
    return b"/proc/self/fd/%d/%b" % (descriptor, name) if name else b"/proc/self/fd/%d" % descriptor


# --- reading ----------------------------------------------------------------------------------


def getxattr(directory: int, name: bytes, attribute: bytes) -> bytes:
    """An xattr of `name` in a directory (of the descriptor itself where it is empty)."""
    return os.getxattr(proc_path(directory, name), attribute, follow_symlinks=not name)


def listxattr(directory: int, name: bytes) -> list[bytes]:
    """The extended attributes of `name` in a directory, as bytes."""
    names = os.listxattr(proc_path(directory, name), follow_symlinks=not name)
    return [os.fsencode(entry) for entry in names]


def file_handle(directory: int, name: bytes) -> tuple[int, bytes]:
    """The file handle (type, bytes) of `name`, by name_to_handle_at(2).

    Raises:
        OSError: EOPNOTSUPP where the file system has no handles.
    """
    buffer = ctypes.create_string_buffer(8 + 128)
    struct.pack_into("=Ii", buffer, 0, 128, 0)
    mount_id = ctypes.c_int()
    flags = AT_EMPTY_PATH if not name else 0
    _call("name_to_handle_at", directory, name, buffer, ctypes.byref(mount_id), flags)
    size, kind = struct.unpack_from("=Ii", buffer)
    return kind, buffer.raw[8 : 8 + size]


def open_by_handle(mount: int, kind: int, handle: bytes) -> int:
    """An O_PATH descriptor of the file behind a handle; needs CAP_DAC_READ_SEARCH."""
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", len(handle), kind) + handle)
    return _call("open_by_handle_at", mount, buffer, os.O_PATH | os.O_CLOEXEC)


def filesystem_uuid(descriptor: int) -> bytes:
    """The 16 bytes of the file system's UUID; zeros where it has none or does not tell."""
    buffer = bytearray(17)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_GETFSUUID, buffer)
    except OSError:
        return bytes(16)
    return bytes(buffer[1:17]) if buffer[0] == 16 else bytes(16)


# linux/fs.h: the numbers that chattr(1) and lsattr(1) use, and their newer form
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
READ_INODE_FLAGS = (_FS_IOC_GETFLAGS, _FS_IOC_FSGETXATTR)
WRITE_INODE_FLAGS = (_FS_IOC_SETFLAGS, _FS_IOC_FSSETXATTR)
_INODE_FLAGS_SIZE = {_FS_IOC_GETFLAGS: 4, _FS_IOC_FSGETXATTR: 28}


def read_inode_flags(descriptor: int, command: int) -> bytes:
    """What an ioctl of READ_INODE_FLAGS says of an open file: an int, or a struct fsxattr."""
    answer = bytearray(_INODE_FLAGS_SIZE[command])
    fcntl.ioctl(descriptor, command, answer)
    return bytes(answer)


# --- identity of the thread -------------------------------------------------------------------


class FileIdentity:
    """Makes what one thread creates belong to somebody else: `with FileIdentity(uid, gid): ...`.

    It sets fsuid and fsgid of the calling thread only; both are put back at the end. Without the
    right to do so nothing happens: look at the owner of what was created.
    """

    __slots__ = ("gid", "old_gid", "old_uid", "uid")

    def __init__(self, uid: int, gid: int) -> None:
        self.uid, self.gid = uid, gid

    def __enter__(self) -> None:
        self.old_gid = _libc.setfsgid(self.gid)
        self.old_uid = _libc.setfsuid(self.uid)

    def __exit__(self, *_: object) -> None:
        _libc.setfsuid(self.old_uid)
        _libc.setfsgid(self.old_gid)


# --- changing ---------------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])


class _Faults:
    """Counts the changing calls of this process; ends it or fails one, as the environment says."""

    def __init__(self) -> None:
        self.kill_at = int(os.environ.get("UNIONFUSE_TEST_KILL_AT", "0"))
        fail = os.environ.get("UNIONFUSE_TEST_FAIL_AT", "")  # "N:ERRNO"
        number, _, name = fail.partition(":")
        self.fail_at = int(number or 0)
        self.fail_errno = getattr(errno, name or "EIO")
        self.trace = os.environ.get("UNIONFUSE_TEST_TRACE")
        self.hold = os.environ.get("UNIONFUSE_TEST_HOLD")  # such a call waits while it is armed
        self.count = 0
        self.armed_by = os.environ.get("UNIONFUSE_TEST_ARMED_BY")  # counts once this file exists
        self.lock = threading.Lock()

    @property
    def active(self) -> bool:
        return bool(self.kill_at or self.fail_at or self.trace or self.hold)

    def before(self, call: str, args: tuple[Any, ...]) -> None:
        if self.armed_by and not os.path.exists(self.armed_by):
            return
        with self.lock:
            self.count += 1
            if self.trace:
                with open(self.trace, "a") as log:
                    log.write(f"{self.count} {call} {args!r}\n")
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.count == self.fail_at:
                raise OSError(self.fail_errno, os.strerror(self.fail_errno))
        while call == self.hold and self.armed_by and os.path.exists(self.armed_by):
            time.sleep(0.01)


_faults = _Faults()


def counts_changes() -> bool:
    """For tests: whether all changes are counted, so that each is to come in its order."""
    return _faults.active


def dies_young_at() -> int:
    """For tests: before which of its steps the making of files in compiled code ends the process.

    Negative where all changes are to be counted: then nothing is made there.
    """
    return -1 if _faults.active else int(os.environ.get("UNIONFUSE_TEST_KILL_YOUNG_AT", "0"))


def changing(function: F) -> F:
    """Marks a call that changes the disk; see the head of this module."""
    if not _faults.active:
        return function

    def counted(*args: Any, **options: Any) -> Any:
        _faults.before(function.__name__, args)
        return function(*args, **options)

    return cast(F, counted)


@changing
def create(directory: int, name: bytes, flags: int, mode: int) -> int:
    """Create a regular file (O_EXCL); returns its descriptor."""
    flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, mode, dir_fd=directory)


@changing
def create_unnamed(directory: int, mode: int) -> int:
    """Create a regular file without a name (O_TMPFILE) in the file system of a directory."""
    return os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=directory)


@changing
def mkdir(directory: int, name: bytes, mode: int) -> None:
    os.mkdir(name, mode, dir_fd=directory)


@changing
def mknod(directory: int, name: bytes, mode: int, device: int = 0) -> None:
    os.mknod(name, mode, device, dir_fd=directory)


@changing
def symlink(target: bytes, directory: int, name: bytes) -> None:
    os.symlink(target, name, dir_fd=directory)


@changing
def link(source: int, old: bytes, target: int, new: bytes) -> None:
    """Link `old` in one directory to `new` in another; an empty `old` links the descriptor."""
    if old:
        os.link(old, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    else:
        os.link(proc_path(source), new, dst_dir_fd=target, follow_symlinks=True)


@changing
def unlink(directory: int, name: bytes) -> None:
    os.unlink(name, dir_fd=directory)


@changing
def rmdir(directory: int, name: bytes) -> None:
    os.rmdir(name, dir_fd=directory)


@changing
def rename(source: int, old: bytes, target: int, new: bytes, flags: int = 0) -> None:
    """renameat2(2); the one step by which everything staged becomes visible."""
    if flags:
        _call("renameat2", source, old, target, new, ctypes.c_uint(flags))
    else:
        os.rename(old, new, src_dir_fd=source, dst_dir_fd=target)


@changing
def setxattr(directory: int, name: bytes, attribute: bytes, value: bytes, flags: int = 0) -> None:
    path = proc_path(directory, name)
    os.setxattr(path, attribute, value, flags, follow_symlinks=not name)


@changing
def removexattr(directory: int, name: bytes, attribute: bytes) -> None:
    os.removexattr(proc_path(directory, name), attribute, follow_symlinks=not name)


@changing
def chown(directory: int, name: bytes, uid: int, gid: int) -> None:
    """Change the owner (-1: leave as it is) of a name, or of the descriptor where it is empty."""
    if name:
        os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
    else:
        os.chown(proc_path(directory), uid, gid)


@changing
def chmod(directory: int, name: bytes, mode: int) -> None:
    """Change the mode of anything but a symbolic link (whose mode never counts)."""
    if name:
        os.chmod(name, mode, dir_fd=directory)
    else:
        os.chmod(proc_path(directory), mode)


@changing
def utimens(directory: int, name: bytes, times: tuple[int | None, int | None]) -> None:
    """Set access and modification time.

    Arguments:
        times: in nanoseconds; None leaves one as it is. `NOW` is the kernel's word for it: its
            clock is behind ours, and what is made next must not look older than what was touched.
    """
    specs = struct.pack("=4q", *_timespec(times[0]), *_timespec(times[1]))
    path, flags = (name, _AT_SYMLINK_NOFOLLOW) if name else (proc_path(directory), 0)
    if _libc.utimensat(directory, path, specs, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def now_ns() -> int:
    """The time that a file system would give now, in nanoseconds: `NOW` for what is not on one."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def _timespec(time_ns: int | None) -> tuple[int, int]:
    if time_ns is None:
        return 0, _UTIME_OMIT
    return (0, _UTIME_NOW) if time_ns == NOW else divmod(time_ns, 10**9)


@changing
def truncate(directory: int, name: bytes, size: int) -> None:
    os.truncate(proc_path(directory, name), size)


@changing
def ftruncate(descriptor: int, size: int) -> None:
    os.ftruncate(descriptor, size)


@changing
def pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    return os.pwrite(descriptor, data, offset)


@changing
def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with any mode; units are bytes."""
    _call("fallocate", descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


@changing
def clone_file(target: int, source: int) -> None:
    """Share all of `source`'s blocks with `target` (FICLONE)."""
    fcntl.ioctl(target, _FICLONE, source)


@changing
def write_inode_flags(descriptor: int, command: int, flags: bytes) -> None:
    """An ioctl of WRITE_INODE_FLAGS: immutable, append-only and so on."""
    fcntl.ioctl(descriptor, command, flags)


@changing
def copy_range(source: int, target: int, count: int, offset_in: int, offset_out: int) -> int:
    """copy_file_range(2): returns how many bytes were copied, 0 at the end of the source."""
    return os.copy_file_range(source, target, count, offset_in, offset_out)


@changing
def fsync(descriptor: int, data_only: bool = False) -> None:
    if data_only:
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


@changing
def write_back(descriptor: int, wait: bool = True) -> None:
    """Write a file's data to the device (sync_file_range(2)), its inode excepted.

    Arguments:
        wait: until it is written; otherwise the writing is only begun.

    Raises:
        OSError: EIO, ENOSPC and whatever else writing gives.
    """
    everything, flags = ctypes.c_int64(0), _WAIT_WRITE_WAIT if wait else _WRITE
    if _libc.sync_file_range(descriptor, everything, everything, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it has ended (prctl(2))."""
    parent = os.getppid()
    if _libc.prctl(1, signal.SIGKILL, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> None:
    """mount(2)."""
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def umount(target: bytes, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(target, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def unshare(flags: int) -> None:
    """unshare(2): leave namespaces of this process for new ones."""
    if _libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@changing
def syncfs(descriptor: int) -> None:
    """syncfs(2): bring the whole file system below a descriptor to disk."""
    if _libc.syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
