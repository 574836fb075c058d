"""The sections of a lookup index in memory, while it is written.

A directory that changes is written anew behind what is there; everything else stays byte for byte
where it was. So an image of a million files is extended by a small layer in the time that copying
its index takes. What a layer changes index_builder.py knows.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator, Sequence

import xxhash

from unionfuse.index.lookup import (
    BYTE_ORDER,
    CHECKSUM,
    DELETED,
    DIRECTORY,
    DIRENT,
    ENTRY,
    FIRST_NAME,
    FREE,
    HAS_LINKS,
    HEAD,
    HEADER_SIZE,
    INHERITED,
    LAYER,
    LINK,
    MAGIC,
    NODE,
    PAGE,
    PLACE,
    PLACES,
    RECORD_SIZE,
    ROOT,
    SECTION,
    SECTIONS,
    SLOT,
    VERSION,
    LayerIdentity,
    LookupIndex,
    LookupIndexError,
    decode_places,
    padded,
)
from unionfuse.layers.layer import Layer

_LARGEST = (1 << 32) - 2  # records are numbered in units of 8 bytes

_hash = xxhash.xxh3_64_intdigest

Places = list[tuple[int, bytes | None]]
"""Layer from the base, path in it; None: the directory's own name in its parent's place."""


class Name:
    """One name of a directory while it is rewritten: what goes into its record."""

    __slots__ = ("entry", "kind", "node")

    def __init__(self, node: int, entry: bytes, kind: int) -> None:
        self.node, self.entry, self.kind = node, entry, kind


Names = dict[bytes, Name]


class Sections:
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

    def add_layer(self, layer: Layer, label: bytes) -> tuple[int, int]:
        """Note one more layer on top: its number and its device's, both counted from the base."""
        if len(self.layers) >= INHERITED:
            raise LookupIndexError(layer.path, "there are too many layers for one index")
        status = os.stat(layer.descriptor)
        device = self._devices.setdefault(status.st_dev, len(self._devices))
        self.layers.append(LayerIdentity.of(status, device, label))
        return len(self.layers) - 1, device

    def is_too_large(self) -> bool:
        """Whether there is more than an index can have."""
        return len(self._records) // 8 > _LARGEST

    # --- nodes ---------------------------------------------------------------------------------

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

    def places(self, node: int) -> Places:
        offset = self.node(node)[6]
        return list(decode_places(self._places, offset)) if self._places else []

    def full_places(self, node: int) -> Places:
        """`places` with every path spelt out."""
        return [(layer, self._path(node, layer, path)) for layer, path in self.places(node)]

    def _path(self, node: int, layer: int, path: bytes | None) -> bytes:
        components: list[bytes] = []
        while path is None:
            record, node, *_ = self.node(node)
            components.append(self._name_at(record * 8))
            path = dict(self.places(node))[layer]
        return b"/".join([path, *reversed(components)] if path else reversed(components))

    def set_places(self, node: int, places: Places) -> None:
        self.set_node(node, places=len(self._places))
        self._places += PLACES.pack(len(places))
        for layer, path in places:
            self._places += PLACE.pack(layer, INHERITED if path is None else len(path))
            self._places += path or b""

    def names(self, directory: int) -> Names:
        """What a directory holds, in the order of its listing."""
        *_, length, offset, _ = self.node(directory)
        found: Names = {}
        for at in self._walk(offset, length):
            entry = bytes(self._records[at : at + ENTRY.size])
            _, cookie, size, kind = DIRENT.unpack_from(self._records, at + ENTRY.size)
            if cookie >= FIRST_NAME:
                name = bytes(self._records[at + RECORD_SIZE : at + RECORD_SIZE + size])
                found[name] = Name(struct.unpack_from("=Q", entry)[0], entry, kind << 12)
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

    def write_names(self, directory: int, inode: int, parent_inode: int, names: Names) -> None:
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
