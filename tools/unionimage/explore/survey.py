"""What an image is made of, as plain data: every entry of every layer, and what it hides.

The layers are read from the base up; beside each entry stands what the layers below made of that
name, so that it is known as added, changed or deleted, and how many bytes of it no one sees any
more. Contents are not read, only directories and attributes.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from unionfuse.tree import view
from unionimage.tuples import NamedTuple

DIRECTORY, FILE, LINK, HARD_LINK = "d", "f", "l", "h"
_KINDS = {
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFREG: FILE,
    stat.S_IFLNK: LINK,
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
}
ADDED, CHANGED, DELETED, PASSED = "A", "C", "D", "="

_DIRECTORY_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Entry(NamedTuple):
    """One name in one layer, parents before children.

    Attributes:
        depth: 1 for names in the root directory.
        kind: a letter as `ls -l` shows it, `f` for files, `h` for a further link to a file.
        change: ADDED, CHANGED, DELETED; PASSED for a directory that is only on the way.
        size: bytes of a file (0 for a hard link), of what was deleted for DELETED.
        hides: bytes of the layers below that nobody sees any more because of it.
        owner: `UID:GID`.
        target: where a symbolic link leads.
    """

    depth: int
    name: bytes
    kind: str
    change: str
    size: int
    hides: int
    mode: int
    owner: tuple[int, int]
    target: bytes = b""


class Entries:
    """Entries in a row, held by column: 30 bytes each beside the name, where tuples take 250.

    Attributes:
        names: each with a `/` after it, which no name has.
        owners: each different one; `owner` has the numbers of these.
        hides, targets: by the number of the entry, for those that have such.
        size: bytes of all files.
    """

    def __init__(self) -> None:
        self.names = bytearray()
        self.depth = array("I")
        self.kind = bytearray()
        self.change = bytearray()
        self.bytes = array("Q")
        self.mode = array("H")
        self.owner = array("I")
        self.owners: dict[tuple[int, int], int] = {}
        self.hides: dict[int, int] = {}
        self.targets: dict[int, bytes] = {}
        self.size = 0

    def append(self, entry: Entry) -> None:
        number = len(self.depth)
        self.names += entry.name
        self.names += b"/"
        self.depth.append(entry.depth)
        self.kind.append(ord(entry.kind))
        self.change.append(ord(entry.change))
        self.bytes.append(entry.size)
        self.mode.append(entry.mode)
        self.owner.append(self.owners.setdefault(entry.owner, len(self.owners)))
        if entry.hides:
            self.hides[number] = entry.hides
        if entry.target:
            self.targets[number] = entry.target
        if entry.change != DELETED:
            self.size += entry.size

    def __len__(self) -> int:
        return len(self.depth)

    def __iter__(self) -> Iterator[Entry]:
        owners = list(self.owners)
        names = self.names.split(b"/")
        for number in range(len(self)):
            yield Entry(
                self.depth[number],
                bytes(names[number]),
                chr(self.kind[number]),
                chr(self.change[number]),
                self.bytes[number],
                self.hides.get(number, 0),
                self.mode[number],
                owners[self.owner[number]],
                self.targets.get(number, b""),
            )


class Known(Protocol):
    """What of a stored layer is needed."""

    @property
    def diff_id(self) -> str: ...
    @property
    def directory(self) -> Path: ...


class LayerSurvey:
    """A layer: its entries in preorder, and the wasted bytes it causes by path."""

    def __init__(self, diff_id: str, entries: Entries) -> None:
        self.diff_id = diff_id
        self.entries = entries

    @property
    def size(self) -> int:
        return self.entries.size


class Wasted:
    """A path that lies in several layers.

    Attributes:
        layers: the numbers of those layers, base first, with the one that deleted it.
        total: bytes of the hidden versions and the visible one, if there is one.
        hidden: bytes of the versions that nobody sees.
    """

    __slots__ = ("hidden", "layers", "total")

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.total = 0
        self.hidden = 0


class Survey:
    """A whole image. `wasted` names paths with hidden bytes."""

    def __init__(self, layers: list[LayerSurvey], wasted: dict[bytes, Wasted]) -> None:
        self.layers = layers
        self.wasted = wasted

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    @property
    def hidden(self) -> int:
        return sum(one.hidden for one in self.wasted.values())


class _Look(NamedTuple):
    """What most names have in common with others."""

    kind: str
    mode: int
    owner: tuple[int, int]


class _Node:
    """A name as the layers so far have made it; `layers` are those that hold a version of it."""

    __slots__ = ("children", "layers", "look", "size")

    def __init__(self, look: _Look, size: int, layers: tuple[int, ...]) -> None:
        self.look, self.size, self.layers = look, size, layers
        self.children: dict[bytes, _Node] | None = {} if look.kind == DIRECTORY else None

    @property
    def is_directory(self) -> bool:
        return self.children is not None


def survey(layers: Sequence[Known]) -> Survey:
    """Survey a stack of layers, base first.

    Raises:
        OSError: a layer directory cannot be read.
    """
    merged = _Node(_Look(DIRECTORY, 0o755, (0, 0)), 0, ())
    result = Survey([], {})
    shared = _Shared()
    for number, layer in enumerate(layers):
        root = os.open(layer.directory, _DIRECTORY_FLAGS)
        try:
            reading = _Reading(number, result.wasted, shared)
            reading.directory(root, b"", merged, 1)
        finally:
            os.close(root)
        result.layers.append(LayerSurvey(layer.diff_id, reading.entries))
    for path, one in result.wasted.items():
        one.total = one.hidden + _visible_size(merged, path)
    return result


def _visible_size(node: _Node, path: bytes) -> int:
    """Bytes of the file that is at `path` in the end; 0 if there is none."""
    for name in path.split(b"/"):
        below = (node.children or {}).get(name)
        if below is None:
            return 0
        node = below
    return node.size


class _Shared:
    """Values that many nodes have, each held once."""

    def __init__(self) -> None:
        self._looks: dict[_Look, _Look] = {}
        self._layers: dict[tuple[int, ...], tuple[int, ...]] = {}

    def look(self, kind: str, mode: int, owner: tuple[int, int]) -> _Look:
        made = _Look(kind, mode, owner)
        return self._looks.setdefault(made, made)

    def layers(self, *numbers: int) -> tuple[int, ...]:
        return self._layers.setdefault(numbers, numbers)


class _Reading:
    """The walk through one layer; `merged` nodes are brought up to date on the way."""

    def __init__(self, number: int, wasted: dict[bytes, Wasted], shared: _Shared) -> None:
        self.number = number
        self.wasted = wasted
        self.shared = shared
        self.entries = Entries()
        self._links: set[tuple[int, int]] = set()

    def directory(
        self, descriptor: int, path: bytes, merged: _Node, depth: int, closed: bool = False
    ) -> None:
        """Read one directory and what is below it.

        Args:
            descriptor: of the directory; stays the caller's.
            merged: what the layers below have there.
            closed: nothing of that shows through, as if it were opaque.
        """
        scan = view.scan(descriptor)
        below = merged.children
        assert below is not None
        closed = closed or scan.marks.opaque
        gone = (below.keys() if closed else scan.whiteouts & below.keys()) - scan.kinds.keys()
        for name in sorted(scan.kinds.keys() | gone):
            here = path + b"/" + name if path else name
            if name in scan.kinds:
                replaces = closed or name in scan.whiteouts
                self._present(descriptor, name, here, below, depth, replaces)
            else:
                self._deleted(name, here, below.pop(name), depth)

    def _present(
        self,
        descriptor: int,
        name: bytes,
        path: bytes,
        below: dict[bytes, _Node],
        depth: int,
        replaces: bool,
    ) -> None:
        """A name that this layer has.

        Args:
            replaces: a directory of this name below does not show through.
        """
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        kind, size = self._kind(status)
        mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
        target = os.readlink(name, dir_fd=descriptor) if kind == LINK else b""
        look = self.shared.look(kind, mode, owner)
        node = _Node(look, size, self.shared.layers(self.number))
        old = below.get(name)
        hides = 0
        change = ADDED if old is None else CHANGED
        if old is not None:
            if node.is_directory and old.is_directory:
                node.children = old.children
                change = PASSED if old.look == look else CHANGED
            elif not node.is_directory and not old.is_directory:
                hides = old.size
                node.layers = self.shared.layers(*old.layers, self.number)
                self._waste(path, node, hides)
            else:
                hides = self._hide(path, old)
        below[name] = node
        self.entries.append(Entry(depth, name, kind, change, size, hides, mode, owner, target))
        if node.is_directory:
            child = os.open(name, _DIRECTORY_FLAGS, dir_fd=descriptor)
            try:
                self.directory(child, path, node, depth + 1, replaces)
            finally:
                os.close(child)

    def _deleted(self, name: bytes, path: bytes, old: _Node, depth: int) -> None:
        """A name that this layer takes away, with everything below it."""
        kind, mode, owner = old.look
        hides = 0 if old.is_directory else old.size
        self.entries.append(Entry(depth, name, kind, DELETED, old.size, hides, mode, owner))
        for child, node in sorted((old.children or {}).items()):
            self._deleted(child, path + b"/" + child, node, depth + 1)
        if not old.is_directory:
            old.layers = self.shared.layers(*old.layers, self.number)
            self._waste(path, old, hides)

    def _hide(self, path: bytes, old: _Node) -> int:
        """Count everything at `path` as hidden; returns the bytes."""
        if not old.is_directory:
            old.layers = self.shared.layers(*old.layers, self.number)
            self._waste(path, old, old.size)
            return old.size
        return sum(
            self._hide(path + b"/" + name, node) for name, node in (old.children or {}).items()
        )

    def _waste(self, path: bytes, node: _Node, hidden: int) -> None:
        if not hidden:
            return
        entry = self.wasted.setdefault(path, Wasted())
        entry.layers = self.shared.layers(*sorted({*entry.layers, *node.layers}))
        entry.hidden += hidden

    def _kind(self, status: os.stat_result) -> tuple[str, int]:
        """The letter of a file type, and the bytes it takes in this layer."""
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "?")
        if kind != FILE:
            return kind, 0
        if status.st_nlink > 1:
            identity = status.st_dev, status.st_ino
            if identity in self._links:
                return HARD_LINK, 0
            self._links.add(identity)
        return FILE, status.st_size


def readable(name: bytes) -> str:
    """A name for people: what is not UTF-8 or not printable is shown as `\\xNN`."""
    text = name.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(_escaped(text))


def _escaped(text: str) -> Iterator[str]:
    for character in text:
        if character.isprintable():
            yield character
        else:
            yield "".join(f"\\x{byte:02x}" for byte in character.encode())
