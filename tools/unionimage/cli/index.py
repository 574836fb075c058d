"""`unionfuse index`: make, check and look at lookup indexes of layer directories."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from unionimage.errors import BadContent, UserError

if TYPE_CHECKING:
    from unionfuse.index.lookup import LookupIndex
    from unionfuse.layers.layer import LayerStack

EXAMPLE = """
unionfuse index build -o debian.index layers/top layers/base
unionfuse index verify debian.index layers/top layers/base
unionfuse index show debian.index /usr/bin
unionfuse -o lowerdir=layers/top:layers/base,lookup_index=debian.index /mnt/debian
"""

_SHOWN = 20  # differences; of the others only the number is printed


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="build|verify|show")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help)

    build = add("build", "write the index of a chain of layers")
    build.add_argument("-o", "--output", required=True, metavar="FILE", help="where it goes")
    build.add_argument(
        "--below", metavar="FILE", help="the index of the lowest of these layers, to be extended"
    )
    build.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="TEXT",
        help="a name for a layer, such as its diffID; give one for each layer that is scanned",
    )
    build.add_argument("layer", nargs="+", metavar="LAYER", help="directories, topmost first")
    verify = add("verify", "check an index, and whether its layers have changed")
    verify.add_argument("index", metavar="FILE")
    verify.add_argument("layer", nargs="*", metavar="LAYER", help="directories, topmost first")
    show = add("show", "print what an index says")
    show.add_argument("index", metavar="FILE")
    show.add_argument("path", nargs="*", metavar="PATH", help="paths in the merged tree")


def run(args: argparse.Namespace) -> int:
    from unionfuse.index.lookup import LookupIndexError
    from unionfuse.layers.layer import LayerError

    try:
        if args.verb == "build":
            return _build(args)
        return _verify(args) if args.verb == "verify" else _show(args)
    except LookupIndexError as error:
        raise BadContent(f"lookup index {error}") from None
    except LayerError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename or 'lookup index'}: {error.strerror or error}") from None


@contextmanager
def _layers(paths: Sequence[str]) -> Iterator[LayerStack]:
    from unionfuse.layers.layer import LayerStack

    stack = LayerStack.open([os.fsencode(path) for path in paths])
    try:
        yield stack
    finally:
        stack.close()


def _build(args: argparse.Namespace) -> int:
    from unionfuse.index.builder import build, extend
    from unionfuse.index.lookup import LookupIndex

    began = time.monotonic()
    with _layers(args.layer) as stack:
        below = LookupIndex.open(args.below) if args.below else None
        scanned = len(stack.layers) - (len(below.layers) if below else 0)
        if args.label and len(args.label) != scanned:
            raise UserError(f"there are {len(args.label)} labels for {scanned} layers")
        labels = [os.fsencode(label) for label in args.label]
        if below is not None:
            builder = extend(below, stack.layers, labels)
        else:
            builder = build(stack.layers, labels)
        builder.write(args.output)
    size = os.stat(args.output).st_size
    took = time.monotonic() - began
    print(f"{args.output}: {builder.count} files in {size} bytes, {took:.2f} s")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from unionfuse.index.check import damage, differences
    from unionfuse.index.lookup import LookupIndex

    index = LookupIndex.open(args.index)
    faults = list(damage(index))
    if not faults and args.layer:
        with _layers(args.layer) as stack:
            faults = list(differences(index, stack.layers))
    for fault in faults[:_SHOWN]:
        print(f"{args.index}: {fault}")
    if len(faults) > _SHOWN:
        print(f"{args.index}: and {len(faults) - _SHOWN} more")
    if faults:
        raise BadContent(f"{args.index} cannot be trusted; build it anew")
    compared = "; it agrees with its layers" if args.layer else ""
    print(f"{args.index}: {index.count} files, {len(index.layers)} layers: whole{compared}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from unionfuse.index.lookup import LookupIndex

    index = LookupIndex.open(args.index)
    if not args.path:
        return _summary(index)
    for path in args.path:
        _show_path(index, path)
    return 0


def _summary(index: LookupIndex) -> int:
    print(f"files   {index.count}")
    for name, section in index.sections.items():
        print(f"{name:8}{section.length} bytes")
    for number, layer in enumerate(index.layers):
        label = f" {os.fsdecode(layer.label)}" if layer.label else ""
        print(f"layer {number} (from the top): inode {layer.inode}{label}")
    return 0


def _show_path(index: LookupIndex, path: str) -> None:
    import stat

    from unionfuse.index.lookup import DIRECTORY, ROOT

    node = ROOT
    for name in os.fsencode(path).split(b"/"):
        if name:
            node = index.lookup(node, name) if index.info(node).flags & DIRECTORY else 0
            if not node:
                raise UserError(f"{path}: the index has no such file")
    shown = [(path, node)]
    if index.info(node).flags & DIRECTORY:
        shown = [(os.fsdecode(name), child) for name, child, _ in index.entries(node)]
    for text, child in shown:
        status, info = index.status(child), index.info(child)
        line = f"{stat.filemode(status.st_mode)} {status.st_nlink:3} {status.st_uid:5}"
        line += f" {status.st_gid:5} {status.st_size:10} layer {info.layer:<3} {text}"
        if stat.S_ISLNK(status.st_mode):
            line += f" -> {os.fsdecode(index.readlink(child))}"
        print(line)
