"""`unionfuse umount`: end a union mount, and wait until its daemon has put everything away."""

from __future__ import annotations

import argparse
from pathlib import Path

from unionimage.cli.common import open_store
from unionimage.mounts import unmount

EXAMPLE = """
unionfuse umount /mnt/debian
unionfuse umount --lazy /mnt/busy
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", nargs="+", metavar="MOUNTPOINT", help="where it is mounted")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, end when the last user is gone"
    )


def run(args: argparse.Namespace) -> int:
    """Unmount each mount point. When it returns, upper has everything and work is empty.

    With --lazy, and where /proc does not name the daemon (before Linux 6.17), it does not wait.
    """
    with open_store(args) as store:
        for mountpoint in args.mountpoint:
            unmount(store, Path(mountpoint), lazy=args.lazy)
    return 0
