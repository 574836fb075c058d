"""A stack of layer directories read as one tree, without a mount: for export, diff, which, commit.

Everything is read when it is asked for and nothing is kept: this serves walks and single questions.
Mounts are served by `unionfuse.union`; its reading of marks (`unionfuse.tree.view.scan`) is used
here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from unionfuse import syscalls
from unionfuse.layers import whiteout
from unionfuse.tree import view
from unionimage.tuples import NamedTuple

_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_MAX_LINKS = 40  # as the kernel
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Place(NamedTuple):
    """A path in one layer; layers are counted from the top."""

    layer: int
    path: bytes


class Found(NamedTuple):
    """A name in the merged tree.

    Attributes:
        path: in the merged tree, without a leading slash.
        kind: S_IFMT bits.
        places: where it lies, the topmost first: one for a file, several for a merged directory.
    """

    path: bytes
    kind: int
    places: tuple[Place, ...]


class Chain:
    """Layer directories, top first, as one tree. A context manager; holds descriptors.

    Attributes:
        directories: as given; a place's layer counts in them.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = tuple(directories)
        self._roots: list[int] = []
        try:
            for directory in directories:
                self._roots.append(os.open(directory, _DIRECTORY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._roots:
            os.close(self._roots.pop())

    @property
    def root(self) -> Found:
        return Found(b"", stat.S_IFDIR, tuple(Place(n, b"") for n in range(len(self._roots))))

    def find(self, path: bytes, below: int = -1) -> Found | None:
        """What is at a path; links are not followed.

        Args:
            below: only layers under this one count.
        """
        found = self.root
        found = found._replace(places=tuple(p for p in found.places if p.layer > below))
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            if found.kind != stat.S_IFDIR:
                return None
            below_it = self.children(found).get(name)
            if below_it is None:
                return None
            found = below_it
        return found

    def resolve(self, path: bytes) -> bytes:
        """A path without links in it but the last, as a process in this tree would go.

        Raises:
            OSError: ELOOP for links without end.
        """
        done, rest, links = b"", [part for part in path.split(b"/") if part not in (b"", b".")], 0
        while rest:
            name = rest.pop(0)
            if name == b"..":
                done = done.rpartition(b"/")[0]
                continue
            here = done + b"/" + name if done else name
            found = self.find(here) if rest else None
            if found is None or found.kind != stat.S_IFLNK:
                done = here
                continue
            if (links := links + 1) > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = self.readlink(found.places[0])
            done = b"" if target.startswith(b"/") else done
            rest = [part for part in target.split(b"/") if part not in (b"", b".")] + rest
        return done

    def readlink(self, place: Place) -> bytes:
        with ExitStack() as stack:
            parent, name = self.parent(place, stack)
            return os.readlink(name, dir_fd=parent)

    def children(self, directory: Found) -> dict[bytes, Found]:
        """The merged names of a directory, sorted."""
        names: dict[bytes, tuple[int, list[Place]]] = {}
        closed: set[bytes] = set()  # names that nothing further down shows through
        for place, scan in self._scans(directory):
            for name, kind in scan.kinds.items():
                if name in closed:
                    continue
                known = names.get(name)
                here = Place(place.layer, place.path + b"/" + name if place.path else name)
                if known is None:
                    names[name] = (kind, [here])
                elif kind == stat.S_IFDIR:
                    known[1].append(here)
                if kind != stat.S_IFDIR:
                    closed.add(name)
            closed |= scan.whiteouts
        prefix = directory.path + b"/" if directory.path else b""
        return {
            name: Found(prefix + name, kind, tuple(places))
            for name, (kind, places) in sorted(names.items())
        }

    def walk(self, directory: Found | None = None) -> Iterator[Found]:
        """Everything below a directory (the root), parents first, names in byte order."""
        stack = [iter(self.children(directory or self.root).values())]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
                continue
            yield found
            if found.kind == stat.S_IFDIR:
                stack.append(iter(self.children(found).values()))

    def versions(self, path: bytes) -> list[Place]:
        """Every layer that has something at a path, hidden or not, the topmost first."""
        places = []
        for layer, root in enumerate(self._roots):
            parent, _, name = path.rpartition(b"/")
            try:
                at = syscalls.open_beneath(root, parent, _DIRECTORY)
            except OSError as error:
                if error.errno in (*_ABSENT, errno.EXDEV):
                    continue
                raise
            try:
                if name in view.scan(at).kinds:
                    places.append(Place(layer, path))
            finally:
                os.close(at)
        return places

    def status(self, place: Place) -> os.stat_result:
        with ExitStack() as stack:
            parent, name = self.parent(place, stack)
            return os.stat(name or b".", dir_fd=parent, follow_symlinks=False)

    def parent(self, place: Place, stack: ExitStack) -> tuple[int, bytes]:
        """A descriptor of the directory that holds it, closed with the stack, and its name."""
        above, _, name = place.path.rpartition(b"/")
        if not above:
            return self._roots[place.layer], name
        opened = syscalls.open_beneath(self._roots[place.layer], above, _DIRECTORY)
        stack.callback(os.close, opened)
        return opened, name

    def open_data(self, place: Place) -> int:
        """A descriptor for reading a regular file's bytes, which a metacopy has further down.

        Raises:
            OSError: ENOENT where they are nowhere.
        """
        while True:
            with ExitStack() as stack:
                parent, name = self.parent(place, stack)
                marks = whiteout.read_marks(parent, name)
                if not marks.metacopy:
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                    return os.open(name, flags, dir_fd=parent)
            lower = self.find(self._below(place), below=place.layer)
            if lower is None or lower.kind != stat.S_IFREG:
                raise FileNotFoundError(errno.ENOENT, "its data is in no lower layer", place.path)
            place = lower.places[0]

    def _scans(self, directory: Found) -> Iterator[tuple[Place, view.Scan]]:
        """The directories that are merged, topmost first, as far as opaque marks let them."""
        places = list(directory.places)
        while places:
            place = places.pop(0)
            opened = syscalls.open_beneath(self._roots[place.layer], place.path, _DIRECTORY)
            try:
                scan = view.scan(opened)
            finally:
                os.close(opened)
            yield place, scan
            if scan.marks.opaque:
                return
            if scan.marks.redirect is not None:
                lower = self.find(self._below(place), below=place.layer)
                merged = lower is not None and lower.kind == stat.S_IFDIR
                places = list(lower.places) if lower is not None and merged else []

    def _below(self, place: Place) -> bytes:
        """Where to look for it in the layers below, by its own redirect and its parents'.

        A relative redirect names a sibling in what the parent stands for below.
        """
        above, _, name = place.path.rpartition(b"/")
        if not place.path:
            return b""
        with ExitStack() as stack:
            redirect = whiteout.read_marks(*self.parent(place, stack)).redirect
        if redirect is not None and redirect.startswith(b"/"):
            return redirect.strip(b"/")
        parent = self._below(Place(place.layer, above))
        name = name if redirect is None else redirect
        return parent + b"/" + name if parent else name
