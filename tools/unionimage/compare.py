"""What differs between two trees of layers; and where a path comes from."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator

from unionimage.chain import Chain, Found
from unionimage.tuples import NamedTuple


class Change(NamedTuple):
    """One difference.

    Attributes:
        kind: docker's letter: A added, C changed, D deleted.
        path: with a leading slash.
        size: bytes of the file there now (A, C), or before (D; of a directory, all in it).
        delta: bytes that it adds to the tree.
    """

    kind: str
    path: bytes
    size: int
    delta: int


def compare(before: Chain, after: Chain, left_out: Container[bytes] = ()) -> Iterator[Change]:
    """Every path that differs, parents first. What both have from the same layer is not entered.

    A directory in which something differs counts as changed, as docker has it; of a directory that
    is gone only itself is told.

    Args:
        left_out: paths, with a leading slash, that are no difference if `after` alone has them.
    """
    yield from _directories(before, before.root, after, after.root, left_out)


def _directories(
    before: Chain, old: Found, after: Chain, new: Found, left_out: Container[bytes]
) -> Iterator[Change]:
    old_names, new_names = before.children(old), after.children(new)
    for name in sorted(old_names.keys() | new_names.keys()):
        was, now = old_names.get(name), new_names.get(name)
        if now is None:
            assert was is not None
            size = _total(before, was)
            yield Change("D", b"/" + was.path, size, -size)
        elif was is None:
            if b"/" + now.path not in left_out:
                yield from _added(after, now)
        elif _same_place(before, was, after, now):
            continue
        elif was.kind == now.kind == stat.S_IFDIR:
            inside = list(_directories(before, was, after, now, left_out))
            if inside or _differ(before, was, after, now):
                yield Change("C", b"/" + now.path, 0, 0)
            yield from inside
        elif was.kind != now.kind:
            size = _total(before, was)
            if stat.S_IFDIR in (was.kind, now.kind):
                yield Change("D", b"/" + was.path, size, -size)
                yield from _added(after, now)
            else:
                new_size = _size(after, now)
                yield Change("C", b"/" + now.path, new_size, new_size - size)
        elif _differ(before, was, after, now):
            new_size = _size(after, now)
            yield Change("C", b"/" + now.path, new_size, new_size - _size(before, was))


def _added(chain: Chain, found: Found) -> Iterator[Change]:
    size = _size(chain, found)
    yield Change("A", b"/" + found.path, size, size)
    if found.kind == stat.S_IFDIR:
        for below in chain.walk(found):
            size = _size(chain, below)
            yield Change("A", b"/" + below.path, size, size)


def _same_place(before: Chain, was: Found, after: Chain, now: Found) -> bool:
    def places(chain: Chain, found: Found) -> list[tuple[os.PathLike[str], bytes]]:
        return [(chain.directories[place.layer], place.path) for place in found.places]

    return places(before, was) == places(after, now)


def _size(chain: Chain, found: Found) -> int:
    return chain.status(found.places[0]).st_size if found.kind == stat.S_IFREG else 0


def _total(chain: Chain, found: Found) -> int:
    if found.kind != stat.S_IFDIR:
        return _size(chain, found)
    return sum(_size(chain, below) for below in chain.walk(found))


def _differ(before: Chain, was: Found, after: Chain, now: Found) -> bool:
    old, new = before.status(was.places[0]), after.status(now.places[0])
    if (old.st_mode, old.st_uid, old.st_gid, old.st_rdev, old.st_mtime_ns) != (
        new.st_mode,
        new.st_uid,
        new.st_gid,
        new.st_rdev,
        new.st_mtime_ns,
    ):
        return True
    if now.kind == stat.S_IFLNK:
        return before.readlink(was.places[0]) != after.readlink(now.places[0])
    return now.kind == stat.S_IFREG and old.st_size != new.st_size
