"""Writes lookup indexes: scans a layer and lays it over the index of the layers below it.

A `Builder` holds the sections of an index in memory. Laying a layer over it touches the directories
that the layer has, and no others: their names are written anew behind what is there, everything
else stays byte for byte where it was. So an image of a million files is extended by a small layer
in the time that copying its index takes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator, Sequence

import xxhash

from unionfuse import syscalls, view, whiteout
from unionfuse.index import (
    BYTE_ORDER,
    CHECKSUM,
    DELETED,
    DIRECTORY,
    DIRENT,
    ENTRY,
    FIRST_NAME,
    FREE,
    HAS_LINKS,
    HAS_XATTRS,
    HEAD,
    HEADER_SIZE,
    INHERITED,
    LAYER,
    LINK,
    MAGIC,
    METACOPY,
    NODE,
    PAGE,
    PLACE,
    PLACES,
    RECORD_SIZE,
    ROOT,
    SECTION,
    SECTIONS,
    SLOT,
    SYMLINK,
    VERSION,
    LayerIdentity,
    LookupIndex,
    LookupIndexError,
    decode_places,
    encode_device,
    inode_number,
    padded,
)
from unionfuse.layer import Layer

FOREVER = 1 << 30  # seconds for which the kernel may keep an entry
_LARGEST = (1 << 32) - 2  # records are numbered in units of 8 bytes

_hash = xxhash.xxh3_64_intdigest

# layer from the base, path in it; None: the directory's own name in its parent's place
_Places = list[tuple[int, bytes | None]]


def build(layers: Sequence[Layer], labels: Sequence[bytes] = ()) -> Builder:
    """An index of layers, topmost first as in a LayerStack.

    Arguments:
        labels: for each layer a text that names it, such as its diffID.

    Raises:
        LookupIndexError: there is too much for one index.
        OSError: a layer cannot be read.
    """
    builder = Builder()
    for position in reversed(range(len(layers))):
        builder.lay_over(layers[position], labels[position] if labels else b"")
    return builder


def extend(below: LookupIndex, layers: Sequence[Layer], labels: Sequence[bytes] = ()) -> Builder:
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
    builder = Builder(below)
    builder.know_devices([status.st_dev for status in statuses[new:]])
    for position in reversed(range(new)):
        builder.lay_over(layers[position], labels[position] if labels else b"")
    return builder


class _Name:
    """One name of a directory while it is rewritten: what goes into its record."""

    __slots__ = ("entry", "kind", "node")

    def __init__(self, node: int, entry: bytes, kind: int) -> None:
        self.node, self.entry, self.kind = node, entry, kind


_Names = dict[bytes, _Name]


class Builder:
    """The sections of an index, in memory.

    Attributes:
        count: node ids given so far, the dead ones included.
    """

    def __init__(self, below: LookupIndex | None = None) -> None:
        self.count = ROOT
        self.layers: list[LayerIdentity] = []
        self._nodes = bytearray(2 * NODE.size)
        self._records = bytearray(padded(RECORD_SIZE))
        self._targets = bytearray()
        self._places = bytearray()
        self._links: dict[int, dict[tuple[int, bytes], int]] = {}
        self._slots: bytearray | None = None  # made at the end where nothing was there to extend
        self._free = 0  # slots that may still be used before the table must grow
        self._devices: dict[int, int] = {}  # st_dev -> position, counted from the base
        if below is not None:
            self._load(below)

    def _load(self, below: LookupIndex) -> None:
        def section(name: str) -> bytearray:
            place = below.sections[name]
            return bytearray(below.map[place.offset : place.offset + place.length])

        self.count = below.count
        self.layers = list(below.layers[::-1])
        self._nodes, self._records = section("nodes"), section("records")
        self._targets, self._places = section("targets"), section("places")
        self._slots = section("slots")
        self._free = len(self._slots) // SLOT.size // 2 - self.count
        for node, parent, record in LINK.iter_unpack(section("links")):
            self._links.setdefault(node, {})[parent, self._name_at(record)] = record

    def know_devices(self, devices: Sequence[int]) -> None:
        """The st_dev of the layers that are in the index already, topmost first."""
        for device in reversed(devices):
            self._devices.setdefault(device, len(self._devices))

    # --- laying a layer over what is there ----------------------------------------------------

    def lay_over(self, layer: Layer, label: bytes = b"") -> None:
        """Add one layer on top. Raises as `build`."""
        status = os.stat(layer.descriptor)
        device = self._devices.setdefault(status.st_dev, len(self._devices))
        if len(self.layers) >= INHERITED:
            raise LookupIndexError(layer.path, "there are too many layers for one index")
        number = len(self.layers)
        self.layers.append(LayerIdentity.of(status, device, label))
        _Overlay(self, layer, number, device).run()
        if len(self._records) // 8 > _LARGEST:
            raise LookupIndexError(layer.path, "there are too many files for one index")

    def add_node(self, parent: int, layer: int, flags: int) -> int:
        self.count += 1
        self._nodes += NODE.pack(0, parent, layer, flags, 0, 0, 0)
        return self.count

    def node(self, node: int) -> tuple[int, int, int, int, int, int, int]:
        """(record, parent, layer, flags, extent length, extent offset, places)."""
        found: tuple[int, int, int, int, int, int, int] = NODE.unpack_from(
            self._nodes, node * NODE.size
        )
        return found

    def set_node(self, node: int, **fields: int) -> None:
        names = ("record", "parent", "layer", "flags", "length", "offset", "places")
        now = dict(zip(names, self.node(node), strict=True)) | fields
        NODE.pack_into(self._nodes, node * NODE.size, *now.values())

    def flags(self, node: int) -> int:
        return self.node(node)[3]

    def set_root(self, entry: bytes, inode: int) -> None:
        record = entry + DIRENT.pack(inode, 0, 0, stat.S_IFDIR >> 12)
        self._records[: len(record)] = record

    def set_target(self, node: int, target: bytes) -> None:
        self.set_node(node, length=len(target), offset=len(self._targets))
        self._targets += target

    def places(self, node: int) -> _Places:
        offset = self.node(node)[6]
        return list(decode_places(self._places, offset)) if self._places else []

    def full_places(self, node: int) -> _Places:
        """`places` with every path spelt out."""
        return [(layer, self._path(node, layer, path)) for layer, path in self.places(node)]

    def _path(self, node: int, layer: int, path: bytes | None) -> bytes:
        components: list[bytes] = []
        while path is None:
            record, node, *_ = self.node(node)
            components.append(self._name_at(record * 8))
            path = dict(self.places(node))[layer]
        return b"/".join([path, *reversed(components)] if path else reversed(components))

    def set_places(self, node: int, places: _Places) -> None:
        self.set_node(node, places=len(self._places))
        self._places += PLACES.pack(len(places))
        for layer, path in places:
            self._places += PLACE.pack(layer, INHERITED if path is None else len(path))
            self._places += path or b""

    def names(self, directory: int) -> _Names:
        """What a directory holds, in the order of its listing."""
        *_, length, offset, _ = self.node(directory)
        found: _Names = {}
        for at in self._walk(offset, length):
            entry = bytes(self._records[at : at + ENTRY.size])
            _, cookie, size, kind = DIRENT.unpack_from(self._records, at + ENTRY.size)
            if cookie >= FIRST_NAME:
                name = bytes(self._records[at + RECORD_SIZE : at + RECORD_SIZE + size])
                found[name] = _Name(struct.unpack_from("=Q", entry)[0], entry, kind << 12)
        return found

    def _walk(self, offset: int, length: int) -> Iterator[int]:
        at = offset
        while at < offset + length:
            yield at
            at += padded(RECORD_SIZE + self._name_length(at))

    def _name_length(self, record: int) -> int:
        length: int = struct.unpack_from("=I", self._records, record + ENTRY.size + 16)[0]
        return length

    def _name_at(self, record: int) -> bytes:
        start = record + RECORD_SIZE
        return bytes(self._records[start : start + self._name_length(record)])

    def write_names(self, directory: int, inode: int, parent_inode: int, names: _Names) -> None:
        """Give a directory its names, behind all records that are there."""
        self._remove_slots(directory)
        start = len(self._records)
        self._append(b"\0" * ENTRY.size, inode, 1, stat.S_IFDIR, b".")
        self._append(b"\0" * ENTRY.size, parent_inode, 2, stat.S_IFDIR, b"..")
        for cookie, (name, item) in enumerate(names.items(), FIRST_NAME):
            inode = ENTRY.unpack_from(item.entry)[6]
            record = self._append(item.entry, inode, cookie, item.kind, name)
            if (directory, name) in self._links.get(item.node, ()):
                self._links[item.node][directory, name] = record
            self.set_node(item.node, record=record // 8, parent=directory)
            self._add_slot(directory, name, record)
        self.set_node(directory, length=len(self._records) - start, offset=start)

    def _append(self, entry: bytes, inode: int, cookie: int, mode: int, name: bytes) -> int:
        record = len(self._records)
        self._records += entry
        self._records += DIRENT.pack(inode, cookie, len(name), stat.S_IFMT(mode) >> 12)
        self._records += name.ljust(padded(RECORD_SIZE + len(name)) - RECORD_SIZE, b"\0")
        return record

    # --- files with several names -------------------------------------------------------------

    def note_link(self, node: int, parent: int, name: bytes) -> None:
        """Note a name of a file that may have several; writing the directory fills in its place."""
        self._links.setdefault(node, {})[parent, name] = 0

    def has_links(self, node: int) -> bool:
        return node in self._links

    def drop_name(self, node: int, parent: int, name: bytes) -> None:
        """Note that a name is gone, and all that is below it."""
        todo = [(node, parent, name)]
        while todo:
            node, parent, name = todo.pop()
            if self.flags(node) & DIRECTORY:
                todo += [(item.node, node, below) for below, item in self.names(node).items()]
                self._remove_slots(node)
                self.set_node(node, length=0)
            links = self._links.get(node)
            if links is not None:
                links.pop((parent, name), None)
                if links:
                    (other, _), record = next(iter(links.items()))
                    self.set_node(node, record=record // 8, parent=other)

    # --- the hash table -----------------------------------------------------------------------

    def _add_slot(self, parent: int, name: bytes, record: int) -> None:
        if self._slots is None:
            return
        if self._free <= 0:
            self._slots = None  # made anew, larger, when the index is written
            return
        self._free -= 1
        _insert(self._slots, parent, name, record)

    def _remove_slots(self, directory: int) -> None:
        if self._slots is None:
            return
        *_, length, offset, _ = self.node(directory)
        mask = len(self._slots) // SLOT.size - 1
        for at in self._walk(offset, length):
            key = _hash(self._name_at(at), directory)
            slot = key & mask
            while True:
                tag, record = SLOT.unpack_from(self._slots, slot * SLOT.size)
                if record == FREE:  # "." and ".." are in no slot
                    break
                if record == at // 8:
                    SLOT.pack_into(self._slots, slot * SLOT.size, tag, DELETED)
                    break
                slot = slot + 1 & mask

    def _make_slots(self) -> bytearray:
        size = 64
        while size < self.count * 5 // 2:
            size *= 2
        slots = bytearray(size * SLOT.size)
        todo = [ROOT]
        while todo:
            directory = todo.pop()
            *_, length, offset, _ = self.node(directory)
            for at in self._walk(offset, length):
                node, *_ = ENTRY.unpack_from(self._records, at)
                if not node:
                    continue
                _insert(slots, directory, self._name_at(at), at)
                if self.flags(node) & DIRECTORY:
                    todo.append(node)
        return slots

    # --- writing ------------------------------------------------------------------------------

    def encode(self) -> bytearray:
        """The whole file."""
        links = self._encode_links()
        sections = {
            "slots": self._slots if self._slots is not None else self._make_slots(),
            "nodes": self._nodes,
            "records": self._records,
            "links": links,
            "targets": self._targets,
            "places": self._places,
            "layers": self._encode_layers(),
        }
        out, table = bytearray(PAGE), []
        for name in SECTIONS:
            data = sections[name]
            table.append(SECTION.pack(len(out), len(data), _hash(bytes(data))))
            out += data
            out += bytes(-len(out) % PAGE)
        slots = len(sections["slots"]) // SLOT.size
        numbers = (BYTE_ORDER, VERSION, len(out), self.count, slots, len(self.layers), 0)
        header = (HEAD.pack(MAGIC, *numbers) + b"".join(table)).ljust(
            HEADER_SIZE - CHECKSUM.size, b"\0"
        )
        out[:HEADER_SIZE] = header + CHECKSUM.pack(_hash(header))
        return out

    def write(self, path: bytes | str) -> None:
        """Publish the index under a name: staged beside it, then renamed.

        Raises:
            OSError: it cannot be written; nothing is left behind.
        """
        path = os.fsencode(path)
        stage = b"%b.%d.new" % (path, os.getpid())
        try:
            with open(stage, "wb") as file:
                file.write(self.encode())
                file.flush()
                os.fsync(file.fileno())
            os.rename(stage, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(stage)
            raise

    def _encode_links(self) -> bytearray:
        out = bytearray()
        for node in sorted(self._links):
            names = self._links[node]
            flags = self.flags(node) & ~HAS_LINKS
            self.set_node(node, flags=flags | HAS_LINKS if len(names) > 1 else flags)
            for (parent, _), record in names.items():
                out += LINK.pack(node, parent, record)
        return out

    def _encode_layers(self) -> bytearray:
        out = bytearray()
        for layer in self.layers:
            owner = (layer.mode, layer.uid, layer.gid)
            out += LAYER.pack(layer.inode, layer.mtime_ns, *owner, layer.device, len(layer.label))
            out += layer.label
        return out


def _insert(slots: bytearray, parent: int, name: bytes, record: int) -> None:
    mask = len(slots) // SLOT.size - 1
    key = _hash(name, parent)
    slot = key & mask
    while SLOT.unpack_from(slots, slot * SLOT.size)[1] not in (FREE, DELETED):
        slot = slot + 1 & mask
    SLOT.pack_into(slots, slot * SLOT.size, key >> 32, record // 8)


class _Overlay:
    """One layer being laid over a builder's tree.

    Redirects name directories as they were before this layer, so what the layer changes is written
    only at the end.
    """

    def __init__(self, builder: Builder, layer: Layer, number: int, device: int) -> None:
        self.builder, self.layer, self.number, self.device = builder, layer, number, device
        self.linked: dict[int, int] = {}  # st_ino of files with several names -> node
        self.changed: dict[int, _Names] = {}
        self.inodes: dict[int, int] = {ROOT: 0}  # of changed directories
        self.parents: dict[int, int] = {ROOT: ROOT}
        self.dropped: list[tuple[int, int, bytes]] = []
        self.todo: list[tuple[int, bytes, int]] = [(ROOT, b"", ROOT)]
        self.entries: list[tuple[_Name, os.stat_result]] = []  # of the layer's directories

    def run(self) -> None:
        builder = self.builder
        status = os.stat(self.layer.descriptor)
        flags = DIRECTORY | _xattr_flags(self.layer.descriptor, b"")
        builder.set_node(ROOT, parent=ROOT, layer=self.number, flags=flags)
        builder.set_places(ROOT, [(self.number, b""), *builder.places(ROOT)])
        self.inodes[ROOT] = self._inode(status)
        while self.todo:
            self._directory(*self.todo.pop())
        builder.set_root(self._directory_entry(ROOT, status), self._inode(status))
        for item, status in self.entries:
            item.entry = self._directory_entry(item.node, status)
        for node, parent, name in self.dropped:
            builder.drop_name(node, parent, name)
        for directory, names in self.changed.items():
            above = self.inodes[self.parents[directory]]
            builder.write_names(directory, self.inodes[directory], above, names)

    def _directory_entry(self, node: int, status: os.stat_result) -> bytes:
        """A directory that merges several layers shows one link, as on overlayfs."""
        merged = len(self.builder.places(node)) > 1
        return _entry(node, status, self._inode(status), links=1 if merged else None)

    def _inode(self, status: os.stat_result) -> int:
        return inode_number(status.st_ino, self.device)

    def _directory(self, node: int, path: bytes, below: int) -> None:
        """Lay one directory of the layer over a node; `below` is what it merges with, or 0."""
        builder = self.builder
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
                places: _Places = [(self.number, None)]
                places += builder.full_places(below)
                builder.set_places(node, places)
                self.changed[node] = self._clone_names(below, node)
        names = self.changed.get(node)
        if names is None:
            names = builder.names(node) if below else {}
        for name in found.whiteouts:
            self._drop(node, names, name)
        for name, kind in found.kinds.items():
            self._lay_name(node, names, name, kind, path)
        self.changed[node] = names

    def _hide_below(self, node: int, below: int) -> None:
        for name, item in self.builder.names(below).items():
            self.dropped.append((item.node, node, name))
        self.builder.set_places(node, self.builder.places(node)[:1])

    def _drop(self, parent: int, names: _Names, name: bytes) -> None:
        item = names.pop(name, None)
        if item is not None:
            self.dropped.append((item.node, parent, name))

    def _lay_name(self, parent: int, names: _Names, name: bytes, kind: int, path: bytes) -> None:
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
        names[name] = _Name(node, entry, stat.S_IFMT(status.st_mode))

    def _lay_directory(
        self,
        parent: int,
        names: _Names,
        name: bytes,
        status: os.stat_result,
        flags: int,
        inside: bytes,
    ) -> _Name:
        builder = self.builder
        known = names.get(name)
        if known is not None and known.kind == stat.S_IFDIR:
            node = known.node
            builder.set_node(node, layer=self.number, flags=flags | DIRECTORY)
            builder.set_places(node, [(self.number, None), *builder.places(node)])
            below = node
        else:
            self._drop(parent, names, name)
            node = builder.add_node(parent, self.number, flags | DIRECTORY)
            builder.set_places(node, [(self.number, None)])
            below = 0
        self.inodes[node], self.parents[node] = self._inode(status), parent
        self.todo.append((node, inside, below))
        item = _Name(node, b"", stat.S_IFDIR)
        self.entries.append((item, status))
        return item

    def _lay_file(
        self, parent: int, name: bytes, status: os.stat_result, flags: int, directory: int
    ) -> int:
        builder = self.builder
        node = self.linked.get(status.st_ino, 0) if status.st_nlink > 1 else 0
        if not node:
            if stat.S_ISLNK(status.st_mode):
                flags |= SYMLINK
            node = builder.add_node(parent, self.number, flags)
            if flags & SYMLINK:
                builder.set_target(node, os.fsencode(os.readlink(name, dir_fd=directory)))
        if status.st_nlink > 1:
            self.linked[status.st_ino] = node
            builder.note_link(node, parent, name)
        return node

    # --- redirected directories ---------------------------------------------------------------

    def _find(self, path: bytes) -> int:
        """The directory that the layers below have at a path; 0 for none."""
        node = ROOT
        for name in path.split(b"/"):
            if name:
                item = self.builder.names(node).get(name)
                if item is None or item.kind != stat.S_IFDIR:
                    return 0
                node = item.node
        return node

    def _clone_names(self, below: int, parent: int) -> _Names:
        """What a directory holds, for a second place in the tree; directories get new nodes."""
        builder = self.builder
        top = builder.names(below)
        todo = [(parent, top)]
        while todo:
            parent, names = todo.pop()
            for name, item in names.items():
                if item.kind != stat.S_IFDIR:
                    if builder.has_links(item.node):
                        builder.note_link(item.node, parent, name)
                    continue
                _, _, layer, flags, *_ = builder.node(item.node)
                node = builder.add_node(parent, layer, flags)
                builder.set_places(node, builder.places(item.node))
                self.inodes[node] = ENTRY.unpack_from(item.entry)[6]
                self.parents[node] = parent
                self.changed[node] = builder.names(item.node)
                todo.append((node, self.changed[node]))
                names[name] = _Name(node, struct.pack("=Q", node) + item.entry[8:], stat.S_IFDIR)
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
