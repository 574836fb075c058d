"""Attaching a FUSE channel to a directory, and taking it off again.

Privileged callers (root, also the root of a user namespace) use mount(2); everybody else asks
the set-uid helper fusermount3(1). Nothing here speaks the FUSE protocol.
What only the second way needs is imported where it is used: a mount by root starts faster.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from unionfuse import syscalls
from unionfuse.options import MountFlag, MountOptions

FILE_SYSTEM_TYPE = b"fuse.unionfuse"
_UMOUNT_NOFOLLOW = 8
_UMOUNT_LAZY = 2


class MountError(Exception):
    """A mount or unmount that did not happen: where, why, and what to do about it."""

    def __init__(self, path: bytes, reason: str, remedy: str) -> None:
        super().__init__(f"{os.fsdecode(path)}: {reason}; {remedy}")


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    device: bytes  # major:minor, st_dev of everything in it
    path: bytes
    kind: bytes


def mounts() -> Iterator[Mount]:
    """All mounts of this mount namespace, a later one on top of an earlier one."""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            kind = fields[fields.index(b"-", 6) + 1]
            yield Mount(fields[2], _unescape_octal(fields[4]), kind)


def mount_at(path: bytes) -> Mount | None:
    """The mount that one enters at `path` (absolute, without links), if there is one."""
    found = None
    for mount in mounts():
        if mount.path == path:
            found = mount
    return found


def resolve_mountpoint(path: bytes) -> bytes:
    """The absolute path of a directory that can be mounted on.

    Raises MountError where it is missing, no directory, out of reach, or a union already.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _bad_mountpoint(path, error) from None
    try:
        where = os.readlink(b"/proc/self/fd/%d" % descriptor)
    finally:
        os.close(descriptor)
    present = mount_at(where)
    if present and present.kind == FILE_SYSTEM_TYPE:
        raise MountError(path, "a union is mounted there already", f"run {_unmount_command(path)}")
    return where


def attach(mountpoint: bytes, options: MountOptions) -> int:
    """Mount and return the descriptor of the FUSE channel, with INIT waiting in it.

    Raises MountError.
    """
    if os.geteuid() == 0:
        try:
            return _attach_privileged(mountpoint, options)
        except PermissionError as error:
            if error.errno != errno.EPERM:
                raise MountError(
                    mountpoint, f"cannot mount: {error.strerror}", "check it"
                ) from None
    return _attach_with_helper(mountpoint, options)


def detach(mountpoint: bytes, lazy: bool = False) -> None:
    """Take the topmost mount off a directory.

    With `lazy` it disappears at once, and ends when its last user is gone.
    Raises MountError (in use, not permitted, not mounted).
    """
    try:
        syscalls.umount(mountpoint, _UMOUNT_NOFOLLOW | (_UMOUNT_LAZY if lazy else 0))
    except OSError as error:
        if error.errno == errno.EPERM:
            _detach_with_helper(mountpoint, lazy)
        else:
            raise _not_unmounted(mountpoint, error.errno) from None


def attached(mountpoint: bytes) -> Mount:
    """What `attach` has just mounted."""
    return mount_at(mountpoint) or Mount(b"", mountpoint, FILE_SYSTEM_TYPE)


def withdraw(mount: Mount) -> None:
    """Take a mount away at once, unless another one lies over it: that is somebody else's.

    Arguments:
        mount: with an empty `device` where only its path is known.

    Raises MountError as `detach`.
    """
    topmost = mount_at(mount.path)
    if mount.device and topmost is not None and topmost.device != mount.device:
        remedy = f"unmount that, then run {_unmount_command(mount.path)}"
        raise MountError(mount.path, "something else is mounted over the union", remedy)
    detach(mount.path, lazy=True)


_PARENT, _START_TIME = 4, 22


def daemon_of(mount: Mount) -> int | None:
    """A pidfd of the process that serves a FUSE mount; None where /proc does not tell.

    Where the mount has a keeper it is that: it ends after its daemon.
    """
    try:
        found = server_of(mount)
        return None if found is None else os.pidfd_open(found[0])
    except ProcessLookupError:
        return None


def server_of(mount: Mount) -> tuple[int, int] | None:
    """The process ids of a mount's keeper and of its daemon; without a keeper both are one.

    Linux 6.17 and later name the connection in the fdinfo of /dev/fuse; None before that.
    """
    connection = mount.device.partition(b":")[2]
    wanted = re.compile(rb"^fuse_connection:\t%s$" % connection, re.MULTILINE)
    processes = map(int, filter(str.isdigit, os.listdir("/proc")))
    holders = [process for process in processes if _holds(process, wanted)]
    if not holders:
        return None
    # The number is used anew as soon as a mount is gone, while its daemon may still be ending:
    # what serves this mount was started last.
    process = max(holders, key=lambda holder: _stat_field(holder, _START_TIME))
    # The clock of start times is coarse: keeper and daemon may have started in the same tick.
    served_by = next((one for one in holders if _stat_field(one, _PARENT) == process), process)
    parent = _stat_field(served_by, _PARENT)
    return (parent, served_by) if parent in holders else (served_by, served_by)


def _stat_field(process: int, number: int) -> int:
    """A field of /proc/PID/stat behind the name (proc(5): 4 is the parent); 0 if it is gone."""
    try:
        return int(_contents(f"/proc/{process}/stat").rpartition(b")")[2].split()[number - 3])
    except (OSError, IndexError):
        return 0


def _holds(process: int, wanted: re.Pattern[bytes]) -> bool:
    infos = f"/proc/{process}/fdinfo"
    try:
        numbers = os.listdir(infos)
    except OSError:
        return False  # it ended, or is not ours to look into
    return any(_matches(f"{infos}/{number}", wanted) for number in numbers)


def _matches(path: str, wanted: re.Pattern[bytes]) -> bool:
    try:
        return bool(wanted.search(_contents(path)))
    except OSError:
        return False  # closed since it was listed: a daemon that starts opens and closes many


def wait_for_end(pidfd: int, seconds: float) -> bool:
    """Wait until a process has ended; False when the time is over first."""
    import select

    return bool(select.select([pidfd], [], [], seconds)[0])


def _attach_privileged(mountpoint: bytes, options: MountOptions) -> int:
    try:
        channel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _no_device(error) from None
    data = [b"fd=%d" % channel, b"rootmode=40000", b"default_permissions"]
    data += [b"user_id=%d" % os.getuid(), b"group_id=%d" % os.getgid(), b"allow_other"]
    if options.max_read is not None:
        data.append(b"max_read=%d" % options.max_read)
    if options.context and os.path.exists("/sys/fs/selinux/enforce"):
        data += options.context
    flags = int(_effective_flags(options))
    try:
        syscalls.mount(options.fsname, mountpoint, FILE_SYSTEM_TYPE, flags, b",".join(data))
    except PermissionError:
        os.close(channel)
        raise
    except OSError as error:
        os.close(channel)
        remedy = "is the fuse module loaded and the mount point free?"
        raise MountError(mountpoint, f"cannot mount: {error.strerror}", remedy) from None
    return channel


def _effective_flags(options: MountOptions) -> MountFlag:
    """Without an upper the kernel is told: it refuses changes itself and asks for less."""
    return options.mount_flags | (MountFlag.RDONLY if options.read_only else MountFlag.NONE)


_FLAG_NAMES = {MountFlag.NOSUID: "nosuid", MountFlag.NODEV: "nodev", MountFlag.NOEXEC: "noexec"}
_FLAG_NAMES |= {MountFlag.NOATIME: "noatime", MountFlag.SYNCHRONOUS: "sync"}
_FLAG_NAMES |= {MountFlag.DIRSYNC: "dirsync", MountFlag.RDONLY: "ro"}


def _attach_with_helper(mountpoint: bytes, options: MountOptions) -> int:
    """fusermount3 mounts and sends the channel over the socket that _FUSE_COMMFD names."""
    import socket
    import subprocess

    helper = _helper(mountpoint)
    words = [name for flag, name in _FLAG_NAMES.items() if flag in _effective_flags(options)]
    words += ["default_permissions", "subtype=unionfuse"]
    words.append("fsname=" + os.fsdecode(re.sub(rb"([\\,])", rb"\\\1", options.fsname)))
    if options.allow_other:
        words.append("allow_other")
    if options.max_read is not None:
        words.append(f"max_read={options.max_read}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        environment = os.environ | {"_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"}
        result = subprocess.run(
            [helper, "-o", ",".join(words), "--", mountpoint],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        theirs.close()
        if result.returncode == 0:
            received = socket.recv_fds(ours, 1, 1)[1]
            if received:
                os.set_inheritable(received[0], False)
                return received[0]
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise _no_device(error) from None
    said = result.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
    reason = re.sub(r"^\S*fusermount3?: ", "", said[0])
    remedy = "fusermount3 mounts only on directories that you own"
    if "user_allow_other" in reason:
        remedy = "have it set there, or leave allow_other out"
    raise MountError(mountpoint, reason, remedy)


def _detach_with_helper(mountpoint: bytes, lazy: bool) -> None:
    import subprocess

    words: list[str | bytes] = [
        _helper(mountpoint),
        "-u",
        *(["-z"] if lazy else []),
        "--",
        mountpoint,
    ]
    result = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL)
    if result.returncode == 0:
        return
    said = result.stderr.decode(errors="replace").strip()
    number = errno.EBUSY if "busy" in said else errno.EPERM
    raise _not_unmounted(mountpoint, number)


def _helper(mountpoint: bytes) -> str:
    import shutil

    helper = shutil.which("fusermount3")
    if helper is None:
        reason = "only root may mount, and fusermount3 is not installed"
        raise MountError(mountpoint, reason, "install the package fuse3, or run it as root")
    return helper


def _bad_mountpoint(path: bytes, error: OSError) -> MountError:
    if error.errno == errno.ENOENT:
        return MountError(path, "the mount point does not exist", "create the directory first")
    if error.errno == errno.ENOTDIR:
        return MountError(path, "the mount point is not a directory", "name a directory")
    if error.errno == errno.ENOTCONN:
        reason = "the mount point is busy: the daemon of the mount there is gone"
        return MountError(path, reason, f"run {_unmount_command(path)}")
    return MountError(path, f"the mount point cannot be used: {error.strerror}", "check it")


def _no_device(error: OSError) -> MountError:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        reason, remedy = "there is no FUSE here", "run modprobe fuse; a container needs the device"
    else:
        reason, remedy = f"cannot open it: {error.strerror}", "ask for read and write permission"
    return MountError(b"/dev/fuse", reason, remedy)


def _not_unmounted(mountpoint: bytes, number: int | None) -> MountError:
    if number == errno.EBUSY:
        remedy = "end the programs that use it (fuser -vm shows them), or unmount with --lazy"
        return MountError(mountpoint, "the mount is in use", remedy)
    if number in (errno.EINVAL, errno.ENOENT):
        return MountError(mountpoint, "nothing is mounted there", "see findmnt -t fuse.unionfuse")
    return MountError(
        mountpoint, f"cannot unmount: {os.strerror(number or 0)}", "run it as its owner"
    )


def _unmount_command(path: bytes) -> str:
    return f"unionfuse umount {os.fsdecode(path)}"


def _contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _unescape_octal(text: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text)
