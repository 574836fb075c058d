"""`unionfuse upgrade`: replace the daemon of a mount by the installed version."""

from __future__ import annotations

import argparse
import os

from unionimage.errors import UserError

EXAMPLE = """
unionfuse -o lowerdir=/a,upperdir=/u,workdir=/w /mnt && unionfuse upgrade /mnt
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", nargs="+", metavar="MOUNTPOINT", help="where it is mounted")


def run(args: argparse.Namespace) -> int:
    """Programs that use the mount notice nothing but a short pause; open files stay open."""
    from unionfuse.mounting import MountError
    from unionfuse.survival.upgrade import upgrade

    for mountpoint in args.mountpoint:
        try:
            old, new = upgrade(os.fsencode(mountpoint))
        except MountError as error:
            raise UserError(str(error)) from None
        print(f"{mountpoint}: process {new} has taken over from {old}")
    return 0
