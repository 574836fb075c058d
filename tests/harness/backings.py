"""The files that the kernel holds to read and write them by itself (FUSE passthrough)."""

import ctypes
import errno
import fcntl
import os
import struct
import tempfile
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438  # the same number on every architecture
# linux/fuse.h: _IOW(229, 1, struct fuse_backing_map) and _IOW(229, 2, uint32_t)
_BACKING_OPEN, _BACKING_CLOSE = 0x4010E501, 0x4004E502


def backing_ids(daemon: int, beside: Path) -> int:
    """How many ids of backing files the kernel has of a mount; it closes them to count them.

    Arguments:
        daemon: its process id.
        beside: a directory for a file of our own.
    """
    channel = next(
        int(entry.name)
        for entry in os.scandir(f"/proc/{daemon}/fd")
        if os.readlink(entry.path) == "/dev/fuse"
    )
    pidfd = os.pidfd_open(daemon)
    fuse = _libc.syscall(_PIDFD_GETFD, pidfd, channel, 0)
    os.close(pidfd)
    assert fuse >= 0, os.strerror(ctypes.get_errno())
    found = 0
    with tempfile.TemporaryFile(dir=beside) as file:
        request = bytearray(struct.pack("=iIQ", file.fileno(), 0, 0))
        newest = fcntl.ioctl(fuse, _BACKING_OPEN, request)  # they count up
    fcntl.ioctl(fuse, _BACKING_CLOSE, struct.pack("=I", newest))
    for number in range(1, newest):
        try:
            fcntl.ioctl(fuse, _BACKING_CLOSE, struct.pack("=I", number))
            found += 1
        except OSError as error:
            assert error.errno == errno.ENOENT
    os.close(fuse)
    return found
