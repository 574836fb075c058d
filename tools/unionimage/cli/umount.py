"""`unionfuse umount`: end a union mount, and wait until its daemon has put everything away."""

from __future__ import annotations

import argparse
import os

from unionfuse import mounting
from unionimage.errors import UserError

EXAMPLE = """
unionfuse umount /mnt/debian
unionfuse umount --lazy /mnt/busy
"""

_PATIENCE = 30.0  # seconds; a daemon that still writes back a large mapped file takes a few


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", nargs="+", metavar="MOUNTPOINT", help="where it is mounted")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, end when the last user is gone"
    )


def run(args: argparse.Namespace) -> int:
    """Unmount each mount point. When it returns, upper has everything and work is empty.

    With --lazy, and where /proc does not name the daemon (before Linux 6.17), it does not wait.
    """
    for mountpoint in args.mountpoint:
        try:
            _unmount(os.fsencode(mountpoint), args.lazy)
        except mounting.MountError as error:
            raise UserError(str(error)) from None
    return 0


def _unmount(path: bytes, lazy: bool) -> None:
    where = os.path.realpath(path)
    mount = mounting.mount_at(where)
    if mount is None or mount.kind != mounting.FILE_SYSTEM_TYPE:
        remedy = "see findmnt -t fuse.unionfuse"
        raise mounting.MountError(path, "no union is mounted there", remedy)
    daemon = mounting.daemon_of(mount)
    mounting.detach(where, lazy)
    if daemon is None or lazy:
        return
    if not mounting.wait_for_end(daemon, _PATIENCE):
        remedy = "its upper directory must not be used before it has ended"
        raise mounting.MountError(path, "unmounted, but the daemon is still at work", remedy)
