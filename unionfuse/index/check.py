"""Looks a lookup index over: its bytes, its structure, and whether its layers are still like it.

Reads everything, so it costs what reading the file (and, for the layers, scanning them) costs; a
mount does not do it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

import xxhash

from unionfuse.index.builder import build
from unionfuse.index.lookup import DIRECTORY, ROOT, SYMLINK, LookupIndex, LookupIndexError
from unionfuse.layers.layer import Layer

_CHUNK = 1 << 20


def damage(index: LookupIndex) -> Iterator[str]:
    """What is wrong with the bytes of an index, as lines for a user; nothing if it is whole."""
    sound = True
    for name, section in index.sections.items():
        hasher = xxhash.xxh3_64()
        for at in range(section.offset, section.offset + section.length, _CHUNK):
            hasher.update(index.map[at : min(at + _CHUNK, section.offset + section.length)])
        if hasher.intdigest() != section.checksum:
            sound = False
            yield f"section {name}: the checksum is wrong"
    if not sound:
        return
    try:
        yield from _broken_links(index)
    except (OSError, struct.error) as error:
        yield f"structure: {error}"


def _broken_links(index: LookupIndex) -> Iterator[str]:
    """Names that cannot be found again, and nodes that do not fit together."""
    todo = [(ROOT, b"")]
    seen = {ROOT}
    while todo:
        directory, path = todo.pop()
        index.places(directory)
        for name, node, _ in index.entries(directory):
            inside = path + b"/" + name
            if index.lookup(directory, name) != node:
                yield f"{os.fsdecode(inside)}: is listed, but a lookup does not find it"
            flags = index.info(node).flags
            if (directory, name) not in index.names(node):
                yield f"{os.fsdecode(inside)}: is not among the names of its node"
            if flags & SYMLINK:
                index.readlink(node)
            if flags & DIRECTORY:
                if node in seen:
                    yield f"{os.fsdecode(inside)}: is a directory with two names"
                    continue
                seen.add(node)
                todo.append((node, inside))


def differences(index: LookupIndex, layers: Sequence[Layer]) -> Iterator[str]:
    """Where an index and its layers disagree, as lines for a user.

    Raises:
        LookupIndexError: the index was made of other layers.
        OSError: a layer cannot be read.
    """
    try:
        index.check([os.stat(layer.descriptor) for layer in layers])
    except LookupIndexError as error:
        if len(layers) != len(index.layers):
            raise
        yield error.reason
    yield from _compare(index, LookupIndex.read("the new index", bytes(build(layers).encode())))


def _compare(old: LookupIndex, new: LookupIndex) -> Iterator[str]:
    todo = [(ROOT, ROOT, b"")]
    while todo:
        before, after, path = todo.pop()
        shown = os.fsdecode(path or b"/")
        kinds = old.info(before).flags & DIRECTORY, new.info(after).flags & DIRECTORY
        changed = _changed_fields(old, new, before, after)
        if changed:
            yield f"{shown}: {', '.join(changed)}"
        if not all(kinds):
            continue
        left = {name: node for name, node, _ in old.entries(before)}
        right = {name: node for name, node, _ in new.entries(after)}
        for name in left.keys() - right.keys():
            yield f"{os.fsdecode(path + b'/' + name)}: is gone"
        for name in right.keys() - left.keys():
            yield f"{os.fsdecode(path + b'/' + name)}: is new"
        for name in left.keys() & right.keys():
            todo.append((left[name], right[name], path + b"/" + name))


def _changed_fields(old: LookupIndex, new: LookupIndex, before: int, after: int) -> list[str]:
    was, now = old.status(before), new.status(after)
    # Reading a file may change its atime, which a union over read-only layers never shows anew.
    fields = [
        field.removeprefix("st_")
        for field in was._fields
        if field != "st_atime_ns" and getattr(was, field) != getattr(now, field)
    ]
    flags = old.info(before).flags, new.info(after).flags
    if flags[0] != flags[1] and not fields:
        fields.append("extended attributes or names")
    if flags[0] & flags[1] & SYMLINK and old.readlink(before) != new.readlink(after):
        fields.append("target")
    if old.info(before).layer != new.info(after).layer:
        fields.append("layer")
    return fields
