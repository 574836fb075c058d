"""`unionfuse layers`: list or change the layers of a mount, while it is in use."""

from __future__ import annotations

import argparse
import json
import os

from unionimage.errors import UserError

EXAMPLE = """
unionfuse -o lowerdir=/layers/base,upperdir=/u,workdir=/w /mnt
unionfuse layers add /mnt /layers/tools
unionfuse layers ls /mnt
unionfuse layers remove /mnt /layers/tools
"""


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|add|remove")

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help, description=help)
        made.add_argument("mountpoint", metavar="MOUNTPOINT", help="where it is mounted")
        return made

    ls = verb("ls", "print the layers, topmost first")
    ls.add_argument("--json", action="store_true", help="a line of JSON a layer")
    add = verb("add", "put a directory on top of the layers (below the upper directory)")
    add.add_argument("directory", metavar="DIR", help="the new layer")
    add.add_argument("--below", metavar="LAYER", help="put it right below this layer")
    remove = verb("remove", "take a layer out")
    remove.add_argument("directory", metavar="DIR", help="the layer")
    remove.add_argument(
        "--force",
        action="store_true",
        help="also when files of it are open; these can be read until they are closed",
    )


def run(args: argparse.Namespace) -> int:
    """What programs have open stays open; names show the new stack when this returns."""
    from unionfuse.mounting import MountError
    from unionfuse.survival import layers

    mountpoint = os.fsencode(args.mountpoint)
    try:
        present = layers.layers(mountpoint)
        if args.verb == "ls":
            for path in present:
                print(json.dumps({"Layer": path}) if args.json else path)
        elif args.verb == "add":
            layers.change(mountpoint, _with(present, args))
        else:
            layers.change(mountpoint, _without(present, args.directory), args.force)
    except MountError as error:
        raise UserError(str(error)) from None
    return 0


def _with(present: list[str], args: argparse.Namespace) -> list[str]:
    directory = os.path.abspath(args.directory)
    try:
        inside = os.stat(directory).st_dev == os.stat(args.mountpoint).st_dev
    except OSError as error:
        remedy = "create it or correct the path"
        raise UserError(f"{args.directory}: {error.strerror}; {remedy}") from None
    if inside:
        raise UserError(f"{args.directory}: it lies in the mount itself; name another directory")
    if directory in present:
        raise UserError(f"{args.directory}: it is a layer already; see unionfuse layers ls")
    at = 0 if args.below is None else _position(present, args.below) + 1
    return [*present[:at], directory, *present[at:]]


def _without(present: list[str], directory: str) -> list[str]:
    at = _position(present, directory)
    if len(present) == 1:
        raise UserError(f"{directory}: it is the only layer; unmount instead")
    return [*present[:at], *present[at + 1 :]]


def _position(present: list[str], layer: str) -> int:
    try:
        return present.index(os.path.abspath(layer))
    except ValueError:
        raise UserError(f"{layer}: no layer of this mount; see unionfuse layers ls") from None
