"""Writes lookup indexes: scans a layer and lays it over the index of the layers below it.

That touches the directories that the layer has, and no others.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Sequence

from unionfuse import syscalls
from unionfuse.index.lookup import (
    DIRECTORY,
    ENTRY,
    HAS_XATTRS,
    METACOPY,
    ROOT,
    SYMLINK,
    LookupIndex,
    LookupIndexError,
    encode_device,
    inode_number,
)
from unionfuse.index.sections import Name, Names, Places, Sections
from unionfuse.layers import whiteout
from unionfuse.layers.layer import Layer
from unionfuse.tree import view

FOREVER = 1 << 30  # seconds for which the kernel may keep an entry


def build(layers: Sequence[Layer], labels: Sequence[bytes] = ()) -> Sections:
    """An index of layers, topmost first as in a LayerStack.

    Arguments:
        labels: for each layer a text that names it, such as its diffID.

    Raises:
        LookupIndexError: there is too much for one index.
        OSError: a layer cannot be read.
    """
    sections = Sections()
    for position in reversed(range(len(layers))):
        _lay_over(sections, layers[position], labels[position] if labels else b"")
    return sections


def extend(below: LookupIndex, layers: Sequence[Layer], labels: Sequence[bytes] = ()) -> Sections:
    """An index of `layers`, topmost first, where `below` is one of the lowest of them.

    Raises:
        LookupIndexError: `below` is outdated, or was made of other layers.
        OSError: a layer cannot be read.
    """
    new = len(layers) - len(below.layers)
    if new < 0:
        raise LookupIndexError(below.path, f"was made of more layers than {len(layers)}")
    statuses = [os.stat(layer.descriptor) for layer in layers]
    below.check(statuses[new:])
    sections = Sections(below)
    sections.know_devices([status.st_dev for status in statuses[new:]])
    for position in reversed(range(new)):
        _lay_over(sections, layers[position], labels[position] if labels else b"")
    return sections


def _lay_over(sections: Sections, layer: Layer, label: bytes = b"") -> None:
    """Add one layer on top. Raises as `build`."""
    number, device = sections.add_layer(layer, label)
    _Overlay(sections, layer, number, device).run()
    if sections.is_too_large():
        raise LookupIndexError(layer.path, "there are too many files for one index")


class _Overlay:
    """One layer being laid over the tree of an index.

    Redirects name directories as they were before this layer, so what the layer changes is written
    only at the end.
    """

    def __init__(self, sections: Sections, layer: Layer, number: int, device: int) -> None:
        self.sections, self.layer, self.number, self.device = sections, layer, number, device
        self.linked: dict[int, int] = {}  # st_ino of files with several names -> node
        self.changed: dict[int, Names] = {}
        self.inodes: dict[int, int] = {ROOT: 0}  # of changed directories
        self.parents: dict[int, int] = {ROOT: ROOT}
        self.dropped: list[tuple[int, int, bytes]] = []
        self.todo: list[tuple[int, bytes, int]] = [(ROOT, b"", ROOT)]
        self.entries: list[tuple[Name, os.stat_result]] = []  # of the layer's directories

    def run(self) -> None:
        sections = self.sections
        status = os.stat(self.layer.descriptor)
        flags = DIRECTORY | _xattr_flags(self.layer.descriptor, b"")
        sections.set_node(ROOT, parent=ROOT, layer=self.number, flags=flags)
        sections.set_places(ROOT, [(self.number, b""), *sections.places(ROOT)])
        self.inodes[ROOT] = self._inode(status)
        while self.todo:
            self._directory(*self.todo.pop())
        sections.set_root(self._directory_entry(ROOT, status), self._inode(status))
        for item, status in self.entries:
            item.entry = self._directory_entry(item.node, status)
        for node, parent, name in self.dropped:
            sections.drop_name(node, parent, name)
        for directory, names in self.changed.items():
            above = self.inodes[self.parents[directory]]
            sections.write_names(directory, self.inodes[directory], above, names)

    def _directory_entry(self, node: int, status: os.stat_result) -> bytes:
        """A directory that merges several layers shows one link, as on overlayfs."""
        merged = len(self.sections.places(node)) > 1
        return _entry(node, status, self._inode(status), links=1 if merged else None)

    def _inode(self, status: os.stat_result) -> int:
        return inode_number(status.st_ino, self.device)

    def _directory(self, node: int, path: bytes, below: int) -> None:
        """Lay one directory of the layer over a node; `below` is what it merges with, or 0."""
        sections = self.sections
        descriptor = self.layer.directory(path)
        found = view.scan(descriptor)
        if below and found.marks.opaque:
            self._hide_below(node, below)
            below = 0
        elif found.marks.redirect is not None and node != ROOT:
            if below:
                self._hide_below(node, below)
            below = self._find(view.path_below(self.layer, path))
            if below:
                places: Places = [(self.number, None)]
                places += sections.full_places(below)
                sections.set_places(node, places)
                self.changed[node] = self._clone_names(below, node)
        names = self.changed.get(node)
        if names is None:
            names = sections.names(node) if below else {}
        for name in found.whiteouts:
            self._drop(node, names, name)
        for name, kind in found.kinds.items():
            self._lay_name(node, names, name, kind, path)
        self.changed[node] = names

    def _hide_below(self, node: int, below: int) -> None:
        for name, item in self.sections.names(below).items():
            self.dropped.append((item.node, node, name))
        self.sections.set_places(node, self.sections.places(node)[:1])

    def _drop(self, parent: int, names: Names, name: bytes) -> None:
        item = names.pop(name, None)
        if item is not None:
            self.dropped.append((item.node, parent, name))

    def _lay_name(self, parent: int, names: Names, name: bytes, kind: int, path: bytes) -> None:
        directory = self.layer.directory(path)
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        flags = _xattr_flags(directory, name)
        below = names.get(name)
        if kind == stat.S_IFDIR:
            inside = path + b"/" + name if path else name
            names[name] = self._lay_directory(parent, names, name, status, flags, inside)
            return
        blocks = status.st_blocks
        if below is not None:
            if flags & METACOPY and below.kind == stat.S_IFREG:
                blocks = ENTRY.unpack_from(below.entry)[8]
            self._drop(parent, names, name)
        node = self._lay_file(parent, name, status, flags, directory)
        entry = _entry(node, status, self._inode(status), blocks=blocks)
        names[name] = Name(node, entry, stat.S_IFMT(status.st_mode))

    def _lay_directory(
        self,
        parent: int,
        names: Names,
        name: bytes,
        status: os.stat_result,
        flags: int,
        inside: bytes,
    ) -> Name:
        sections = self.sections
        known = names.get(name)
        if known is not None and known.kind == stat.S_IFDIR:
            node = known.node
            sections.set_node(node, layer=self.number, flags=flags | DIRECTORY)
            sections.set_places(node, [(self.number, None), *sections.places(node)])
            below = node
        else:
            self._drop(parent, names, name)
            node = sections.add_node(parent, self.number, flags | DIRECTORY)
            sections.set_places(node, [(self.number, None)])
            below = 0
        self.inodes[node], self.parents[node] = self._inode(status), parent
        self.todo.append((node, inside, below))
        item = Name(node, b"", stat.S_IFDIR)
        self.entries.append((item, status))
        return item

    def _lay_file(
        self, parent: int, name: bytes, status: os.stat_result, flags: int, directory: int
    ) -> int:
        sections = self.sections
        node = self.linked.get(status.st_ino, 0) if status.st_nlink > 1 else 0
        if not node:
            if stat.S_ISLNK(status.st_mode):
                flags |= SYMLINK
            node = sections.add_node(parent, self.number, flags)
            if flags & SYMLINK:
                sections.set_target(node, os.fsencode(os.readlink(name, dir_fd=directory)))
        if status.st_nlink > 1:
            self.linked[status.st_ino] = node
            sections.note_link(node, parent, name)
        return node

    # --- redirected directories ---------------------------------------------------------------

    def _find(self, path: bytes) -> int:
        """The directory that the layers below have at a path; 0 for none."""
        node = ROOT
        for name in path.split(b"/"):
            if name:
                item = self.sections.names(node).get(name)
                if item is None or item.kind != stat.S_IFDIR:
                    return 0
                node = item.node
        return node

    def _clone_names(self, below: int, parent: int) -> Names:
        """What a directory holds, for a second place in the tree; directories get new nodes."""
        sections = self.sections
        top = sections.names(below)
        todo = [(parent, top)]
        while todo:
            parent, names = todo.pop()
            for name, item in names.items():
                if item.kind != stat.S_IFDIR:
                    if sections.has_links(item.node):
                        sections.note_link(item.node, parent, name)
                    continue
                _, _, layer, flags, *_ = sections.node(item.node)
                node = sections.add_node(parent, layer, flags)
                sections.set_places(node, sections.places(item.node))
                self.inodes[node] = ENTRY.unpack_from(item.entry)[6]
                self.parents[node] = parent
                self.changed[node] = sections.names(item.node)
                todo.append((node, self.changed[node]))
                names[name] = Name(node, struct.pack("=Q", node) + item.entry[8:], stat.S_IFDIR)
        return top


def _entry(
    node: int,
    status: os.stat_result,
    inode: int,
    links: int | None = None,
    blocks: int | None = None,
) -> bytes:
    """The fuse_entry_out of a node: it and its attributes hold for ever."""
    times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
    return ENTRY.pack(
        node, 0, FOREVER, FOREVER, 0, 0,
        inode,
        status.st_size,
        status.st_blocks if blocks is None else blocks,
        *(time // 10**9 & (1 << 64) - 1 for time in times),
        *(time % 10**9 for time in times),
        status.st_mode,
        status.st_nlink if links is None else links,
        status.st_uid,
        status.st_gid,
        encode_device(status.st_rdev),
        status.st_blksize,
        0,
    )  # fmt: skip


def _xattr_flags(directory: int, name: bytes) -> int:
    """HAS_XATTRS and METACOPY, as a file's extended attributes say."""
    try:
        attributes = syscalls.listxattr(directory, name)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTSUP):
            return 0
        raise
    flags = 0
    for attribute in attributes:
        if whiteout.unescape_attribute(attribute) is not None:
            flags |= HAS_XATTRS
        elif attribute.startswith(whiteout.DIALECTS) and attribute.endswith(b"overlay.metacopy"):
            flags |= METACOPY
    return flags
