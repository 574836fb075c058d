"""Replacing the daemon of a mount by the installed version, from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from unionfuse import mounting

_PATIENCE = 15.0  # seconds


def upgrade(path: bytes) -> tuple[int, int]:
    """Have another daemon take over a mount; returns the old one's process id and the new one's.

    Raises:
        MountError: it is no union, has no keeper, is not ours, or nothing happened in time.
    """
    keeper, daemon, mount = keeper_of(path)
    try:
        os.kill(keeper, signal.SIGHUP)
    except PermissionError:
        raise mounting.MountError(path, "it is not yours", "run it as its owner") from None
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        now = mounting.server_of(mount)
        if now is not None and now[0] == keeper and now[1] not in (keeper, daemon):
            os.stat(path)  # answered by the new one
            return daemon, now[1]
        time.sleep(0.01)
    raise mounting.MountError(path, "nothing has replaced its daemon", "see the mount's log")


def keeper_of(path: bytes) -> tuple[int, int, mounting.Mount]:
    """The process ids of a mount's keeper and daemon, and the mount.

    Raises:
        MountError: it is no union, or has no keeper that can be found.
    """
    mount = mounting.mount_at(os.path.realpath(path))
    if mount is None or mount.kind != mounting.FILE_SYSTEM_TYPE:
        raise mounting.MountError(path, "no union is mounted there", "see findmnt")
    with contextlib.suppress(OSError):
        os.statvfs(path)  # until a daemon answers: where one has just died there is none to find
    found = mounting.server_of(mount)
    if found is None:
        remedy = "send SIGHUP to the keeper (Linux 6.17 and later tell which process it is)"
        raise mounting.MountError(path, "its keeper cannot be found", remedy)
    keeper, daemon = found
    if keeper == daemon:
        raise mounting.MountError(
            path, "it has no keeper", "mount it without keeper=off (Linux 6.9 and later)"
        )
    return keeper, daemon, mount
