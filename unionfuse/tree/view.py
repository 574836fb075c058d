"""What directories hold: one layer's directory as it lies on disk, and several of them merged.

A `View` is the merged content of a directory's lower layers. It never changes once made: what
changes is laid over it (`Directory.changes`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from unionfuse.layers import whiteout
from unionfuse.layers._scan import read_names
from unionfuse.layers.layer import Place

if TYPE_CHECKING:
    from unionfuse.layers.layer import Layer
    from unionfuse.tree._tables import Tables

DOT_COOKIES = 2
"""`.` and `..` have the cookies 1 and 2."""

_AT_ONCE = 256  # names that are taken out of a table at a time


class Stub(NamedTuple):
    """A name in a merged view that nobody asked about yet.

    Attributes:
        kind: S_IFMT bits.
        positions: which of the merged directories have it: one for a file, several for a
            directory, topmost first.
        record: its record in the lookup index; 0 without one.
        number: the node id that a table has for it; 0 for none.
    """

    kind: int
    positions: tuple[int, ...]
    record: int = 0
    number: int = 0


class View(Protocol):
    """The merged content of some lower directories."""

    def get(self, name: bytes) -> Stub | None: ...

    def after(self, cookie: int) -> Iterator[tuple[bytes, int]]:
        """(name, cookie) of the names behind a cookie, in an order that never changes."""
        ...

    def places(self) -> tuple[Place, ...]:
        """The directories that were merged, topmost first: `Stub.positions` counts in these."""
        ...


class Scan(NamedTuple):
    """One directory of one layer, read.

    Attributes:
        kinds: name -> S_IFMT bits; without the union's own files.
        whiteouts: names that are deleted here.
        marks: those of the directory itself.
    """

    kinds: dict[bytes, int]
    whiteouts: set[bytes]
    marks: whiteout.Marks


def scan(directory: int) -> Scan:
    """Read a directory through an O_PATH descriptor.

    Raises:
        OSError: it cannot be read.
    """
    readable = _open_readable(directory)
    try:
        marks = whiteout.read_marks(readable, b"")
        kinds, whiteouts = _read_names(readable)
        if whiteout.OPAQUE_FILE in kinds:
            marks = _opaque(marks)
        _take_dotted_whiteouts(kinds, whiteouts)
        if marks.whiteouts_inside:
            _take_attribute_whiteouts(readable, kinds, whiteouts)
    finally:
        os.close(readable)
    return Scan(kinds, whiteouts, marks)


def _opaque(marks: whiteout.Marks) -> whiteout.Marks:
    if marks is whiteout.NO_MARKS:
        return whiteout.Marks(opaque=True)
    marks.opaque = True
    return marks


def _open_readable(directory: int) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(b".", flags | os.O_NOATIME, dir_fd=directory)
    except PermissionError:
        return os.open(b".", flags, dir_fd=directory)


def _read_names(readable: int) -> tuple[dict[bytes, int], set[bytes]]:
    kinds, others = read_names(readable)
    whiteouts: set[bytes] = set()
    for name in others:
        status = os.stat(name, dir_fd=readable, follow_symlinks=False)
        if whiteout.is_whiteout(status):
            whiteouts.add(name)
        else:
            kinds[name] = stat.S_IFMT(status.st_mode)
    return kinds, whiteouts


def _take_dotted_whiteouts(kinds: dict[bytes, int], whiteouts: set[bytes]) -> None:
    """Turn `.wh.NAME` into a whiteout of NAME; names of AUFS's own (`.wh..wh.…`) just go."""
    dotted = [name for name in kinds if name.startswith(whiteout.WHITEOUT_PREFIX)]
    for name in dotted:
        del kinds[name]
        hidden = name[len(whiteout.WHITEOUT_PREFIX) :]
        # A layer that has both (an odd tar) deletes what lies below and keeps its own.
        if hidden and not hidden.startswith(whiteout.WHITEOUT_PREFIX) and hidden not in kinds:
            whiteouts.add(hidden)


def _take_attribute_whiteouts(
    readable: int, kinds: dict[bytes, int], whiteouts: set[bytes]
) -> None:
    for name in [name for name, kind in kinds.items() if kind == stat.S_IFREG]:
        if whiteout.read_marks(readable, name).whiteout:
            del kinds[name]
            whiteouts.add(name)


class ScannedView:
    """A view made by reading the directories themselves."""

    __slots__ = ("_names", "_places", "_stubs", "get")

    def __init__(self, stubs: dict[bytes, Stub], places: tuple[Place, ...]) -> None:
        self._stubs = stubs
        self.get = stubs.get
        self._places = places
        self._names: tuple[bytes, ...] | None = None

    def after(self, cookie: int) -> Iterator[tuple[bytes, int]]:
        if self._names is None:
            self._names = tuple(self._stubs)
        first = DOT_COOKIES + 1  # a name's cookie is its position, after `.` and `..`
        for position in range(max(0, cookie - first + 1), len(self._names)):
            yield self._names[position], position + first

    def places(self) -> tuple[Place, ...]:
        return self._places

    def stubs(self) -> dict[bytes, Stub]:
        """All of it, in the order of a listing."""
        return self._stubs


class TabledView:
    """A view that a table of merged directories holds."""

    __slots__ = ("_directory", "_places", "_tables")

    def __init__(self, tables: Tables, directory: int, layers: Sequence[Layer]) -> None:
        self._tables = tables
        self._directory = directory
        self._places = tuple(Place(layers[n], path) for n, path in tables.places(directory))

    def get(self, name: bytes) -> Stub | None:
        found = self._tables.get(self._directory, name)
        return None if found is None else Stub(found[0], found[1], number=found[2])

    def after(self, cookie: int) -> Iterator[tuple[bytes, int]]:
        first = DOT_COOKIES + 1
        position = max(0, cookie - first + 1)
        while names := self._tables.names(self._directory, position, _AT_ONCE):
            for name in names:
                yield name, position + first
                position += 1

    def places(self) -> tuple[Place, ...]:
        return self._places


EMPTY_VIEW = ScannedView({}, ())

Resolve = Callable[[bytes, int], Sequence[Place]]
"""(redirect path, number of the first layer to look in) -> the lower directories there."""


def merge(candidates: Sequence[Place], resolve: Resolve) -> ScannedView:
    """Merge lower directories, topmost first, as their opaque marks and redirects say.

    Arguments:
        candidates: the directories of one name; fewer are used where one is opaque.
        resolve: called for a directory that is redirected.

    Raises:
        OSError: a directory cannot be read.
    """
    merged = _Merge()
    queue = list(candidates)
    while queue:
        place = queue.pop(0)
        try:
            found = scan(place.layer.directory(place.path))
        except OSError as error:
            if error.errno == errno.EXDEV and merged.places:
                continue  # a mount point inside a layer: what lies under it cannot be seen
            raise
        merged.lay_below(place, found)
        if found.marks.opaque:
            break
        if found.marks.redirect is not None:
            queue = list(resolve(path_below(place.layer, place.path), place.layer.number + 1))
    return ScannedView(merged.stubs(), tuple(merged.places))


def merges(candidates: Sequence[Place]) -> bool:
    """Whether several lower directories are certainly merged; False: only `merge` tells.

    Raises:
        OSError: one of the first two cannot be entered.
    """
    first, second = candidates[0], candidates[1]
    top = first.layer.directory(first.path)
    if whiteout.read_marks(top, b"") is not whiteout.NO_MARKS or _has(top, whiteout.OPAQUE_FILE):
        return False
    second.layer.directory(second.path)
    return True


def _has(directory: int, name: bytes) -> bool:
    try:
        entry_status(directory, name)
    except FileNotFoundError:
        return False
    return True


def path_below(layer: Layer, path: bytes) -> bytes:
    """Where the layers below have what a layer has at a path, by the redirects on the way to it.

    A relative redirect names a sibling in what the directory above stands for.
    """
    if not path:
        return b""
    above, _, name = path.rpartition(b"/")
    redirect = whiteout.read_marks(layer.directory(above), name).redirect
    if redirect is not None and redirect.startswith(b"/"):
        return redirect.strip(b"/")
    parent, name = path_below(layer, above), redirect or name
    return parent + b"/" + name if parent else name


def redirect_target(redirect: bytes, path: bytes) -> bytes:
    """The path from the root that a redirect xattr on the directory at `path` leads to.

    overlayfs: an absolute path, or the name of a sibling.
    """
    if redirect.startswith(b"/"):
        return redirect.strip(b"/")
    parent, _, _ = path.rpartition(b"/")
    return parent + b"/" + redirect if parent else redirect


def child_places(merged: View, stub: Stub, name: bytes) -> list[Place]:
    """The lower directories behind a name that a view shows as a directory."""
    places = merged.places()
    return [
        Place(place.layer, place.path + b"/" + name if place.path else name)
        for place in (places[position] for position in stub.positions)
    ]


class _Merge:
    """The state of merging directories from the top down."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._open: dict[bytes, list[int]] = {}  # directories that what lies below may add to
        self._closed: dict[bytes, Stub | None] = {}  # None: deleted

    def lay_below(self, place: Place, found: Scan) -> None:
        position = len(self.places)
        self.places.append(place)
        opened, closed = self._open, self._closed
        single = (position,)
        for name, kind in found.kinds.items():
            if name in closed:
                continue
            above = opened.get(name)
            if kind == stat.S_IFDIR:
                if above is None:
                    opened[name] = [position]
                else:
                    above.append(position)
            elif above is None:
                closed[name] = Stub(kind, single)
            else:
                closed[name] = Stub(stat.S_IFDIR, tuple(opened.pop(name)))
        for name in found.whiteouts:
            if name in opened:
                closed[name] = Stub(stat.S_IFDIR, tuple(opened.pop(name)))
            else:
                closed.setdefault(name, None)

    def stubs(self) -> dict[bytes, Stub]:
        stubs = {name: stub for name, stub in self._closed.items() if stub is not None}
        # Equal tuples are one object: there are few of them and many names.
        shared: dict[tuple[int, ...], Stub] = {}
        for name, positions in self._open.items():
            key = tuple(positions)
            stubs[name] = shared.setdefault(key, Stub(stat.S_IFDIR, key))
        return _share(stubs)


def _share(stubs: dict[bytes, Stub]) -> dict[bytes, Stub]:
    shared: dict[Stub, Stub] = {}
    return {name: shared.setdefault(stub, stub) for name, stub in stubs.items()}


def entry_status(directory: int, name: bytes) -> os.stat_result:
    """lstat of a name in a directory."""
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def open_entry(directory: int, name: bytes, flags: int) -> int:
    """Open a name in a directory, never through a link; without touching atime where allowed."""
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    if flags & os.O_ACCMODE == os.O_RDONLY:
        try:
            return os.open(name, flags | os.O_NOATIME, dir_fd=directory)
        except PermissionError:
            pass
    return os.open(name, flags, dir_fd=directory)
