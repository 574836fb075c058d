"""The lookup index: the merged tree of a chain of layers in one file, in FUSE's wire format.

A mount that has an index answers LOOKUP, GETATTR, READDIRPLUS and READLINK with slices of this
file and does not touch the layers for them. The file is mapped, never loaded: opening it costs the
same for ten files as for a million. `index_builder` writes it, this module reads it, and the
compiled loop of the express lane reads the same bytes without Python.

Layout: a header of 512 bytes, then the sections, each on a page boundary. Numbers are in the byte
order of the machine that wrote the file (the header says which).

- slots: an open-addressing hash table, a power of two of (tag u32, record u32). The hash is
  xxh3_64(name, seed=parent): its low bits choose the slot, its high half is the tag; `record` is
  the place of the name's record, in units of 8 bytes. 0 is a free slot, 0xFFFFFFFF a deleted one.
- nodes: 32 bytes each, by node id (0 is not used, 1 is the root); see `NODE`.
- records: ready-made READDIRPLUS records. A directory is one extent of them, "." and ".." first;
  its cookies are positions: 1 after ".", 2 after "..", i + 3 after the i-th name. The first 128
  bytes of a record are the reply to LOOKUP. The root's own record stands at 0.
- links: (node u32, parent u32, record u64), sorted, one for each name of a file that has several.
- targets: what the symbolic links say.
- places: for a directory, which layers it merges: count u16, then topmost first (layer u16, length
  u16, path); length 0xFFFF: the same name in the parent's directory of the same layer.
- layers: base first, what identifies each layer directory; see `LayerIdentity`.

A name that is deleted by a higher layer leaves dead bytes and dead nodes behind when an index is
extended by a layer; nothing points at them.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

from unionfuse.layers.layer import Layer, Place
from unionfuse.tree.view import Stub

MAGIC = b"UFSINDEX"
VERSION = 1
BYTE_ORDER = 0x01020304
HEADER_SIZE = 512
PAGE = 4096

SECTIONS = ("slots", "nodes", "records", "links", "targets", "places", "layers")
HEAD = struct.Struct("=8sIIQQQII")  # magic byte_order version size nodes slots layers reserved
SECTION = struct.Struct("=QQQ")  # offset length xxh3_64
CHECKSUM = struct.Struct("=Q")  # of the header before it, in its last 8 bytes
SLOT = struct.Struct("=II")  # tag record
NODE = struct.Struct("=IIHHIQQ")  # record parent layer flags extent_length extent_offset places
LINK = struct.Struct("=IIQ")  # node parent record
ENTRY = struct.Struct("=QQQQII" + "QQQQQQIIIIIIIIII")  # fuse_entry_out
DIRENT = struct.Struct("=QQII")  # ino off namelen type, behind the fuse_entry_out
RECORD_SIZE = ENTRY.size + DIRENT.size  # without the name
PLACES = struct.Struct("=H")
PLACE = struct.Struct("=HH")  # layer, length of the path
INHERITED = 0xFFFF
LAYER = struct.Struct("=QqIIIII")  # inode mtime_ns mode uid gid device length of the label

INODE_BITS = 53  # higher bits of st_ino say which file system, where there are several

FREE, DELETED = 0, 0xFFFFFFFF
ROOT = 1
FIRST_NAME = 3  # the cookie behind a directory's first name

HAS_XATTRS = 1  # some extended attribute shows in the mount: an ACL, a capability, ...
HAS_LINKS = 2  # more names than one: see `links`
METACOPY = 4  # a regular file whose data lies in a lower layer than its attributes
DIRECTORY = 8
SYMLINK = 16

_hash = xxhash.xxh3_64_intdigest


class LookupIndexError(Exception):
    """An index file cannot be used: which, and why."""

    def __init__(self, path: bytes | str, reason: str) -> None:
        super().__init__(f"{os.fsdecode(path)}: {reason}")
        self.path, self.reason = path, reason


class NodeStatus(NamedTuple):
    """What the index says of a node; field by field an os.stat_result."""

    st_ino: int
    st_size: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_blksize: int


class NodeInfo(NamedTuple):
    """Where a node belongs. `layer` counts from the topmost lower layer (0)."""

    parent: int
    name: bytes
    layer: int
    flags: int


class LayerIdentity(NamedTuple):
    """What tells a layer directory from another one, or from the same one with other names in it.

    It does not change when the directory is moved or renamed. It does not see a change deeper in
    the layer: `verify` does. `device` counts the file systems that the layers lie on, from the base
    up (0 is that of the base): inode numbers depend on it.
    """

    inode: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int
    device: int
    label: bytes = b""

    @classmethod
    def of(cls, status: os.stat_result, device: int, label: bytes = b"") -> LayerIdentity:
        owner = (status.st_mode, status.st_uid, status.st_gid)
        return cls(status.st_ino, status.st_mtime_ns, *owner, device, label)

    def difference(self, other: LayerIdentity) -> str:
        """What differs, in words; empty for nothing (labels do not count)."""
        if self.inode != other.inode:
            return "another directory stands in its place"
        if self.mtime_ns != other.mtime_ns:
            return "names were added to it or removed from it"
        if (self.mode, self.uid, self.gid) != (other.mode, other.uid, other.gid):
            return "its mode or owner was changed"
        if self.device != other.device:
            return "the layers lie on other file systems than they did"
        return ""


class Section(NamedTuple):
    offset: int
    length: int
    checksum: int


def encode_device(device: int) -> int:
    """st_rdev in the 32 bits that FUSE has for it (new_encode_dev)."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12 & 0xFFFFFFFF


def decode_device(device: int) -> int:
    return os.makedev(device >> 8 & 0xFFF, device & 0xFF | device >> 12 & 0xFFF00)


def _signed(seconds: int) -> int:
    """A time before 1970 travels as two's complement."""
    return seconds - (1 << 64) if seconds >> 63 else seconds


def inode_number(inode: int, device: int) -> int:
    """The st_ino that the mount shows of a file on the device-th file system of its layers."""
    return device << INODE_BITS ^ inode


def padded(length: int) -> int:
    """A length rounded up to 8 bytes."""
    return length + 7 & ~7


class LookupIndex:
    """An index file, mapped. Reading a damaged one raises OSError(EIO), never anything else.

    Attributes:
        path: where it was opened.
        count: node ids are 1 to `count`; a union's own begin above.
        layers: identities, topmost first.
        map: the mapped file, for the compiled loop.
        sections: where the sections lie in it, by name.
    """

    def __init__(self, path: bytes | str, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.map = data
        head = HEAD.unpack_from(data)
        self.count: int = head[4]
        self._mask: int = head[5] - 1
        self.sections = {
            name: Section(*SECTION.unpack_from(data, HEAD.size + i * SECTION.size))
            for i, name in enumerate(SECTIONS)
        }
        self._slots, self._nodes, self._records, self._links, self._targets, self._places, _ = (
            self.sections[name] for name in SECTIONS
        )
        self.layers = tuple(self._read_layers(head[6]))

    @classmethod
    def open(cls, path: bytes | str) -> LookupIndex:
        """Map an index file. The header is checked; the sections only for their bounds.

        Raises:
            LookupIndexError: it is missing, damaged, cut short, of another version or byte order.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LookupIndexError(path, f"cannot be opened: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise LookupIndexError(path, "is not a regular file")
            if os.fstat(descriptor).st_size < HEADER_SIZE:
                raise LookupIndexError(path, "is too short for a lookup index")
            data = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
        return cls.read(path, data)

    @classmethod
    def read(cls, path: bytes | str, data: mmap.mmap | bytes) -> LookupIndex:
        """Check the header of mapped bytes and make an index of them; see `open`."""
        reason = _header_fault(data)
        if reason:
            raise LookupIndexError(path, reason)
        try:
            return cls(path, data)
        except (struct.error, ValueError):
            raise LookupIndexError(path, "is damaged: its list of layers") from None

    def close(self) -> None:
        if isinstance(self.map, mmap.mmap):
            self.map.close()

    def _read_layers(self, count: int) -> list[LayerIdentity]:
        section = self.sections["layers"]
        at, end = section.offset, section.offset + section.length
        found = []
        for _ in range(count):
            *fields, length = LAYER.unpack_from(self.map, at)
            at += LAYER.size + length
            if at > end:
                raise ValueError
            label = bytes(self.map[at - length : at])
            inode, mtime_ns, mode, uid, gid, device = fields
            found.append(LayerIdentity(inode, mtime_ns, mode, uid, gid, device, label))
        return found[::-1]

    def check(self, layers: Sequence[os.stat_result]) -> None:
        """Refuse layers that this index was not made of.

        Arguments:
            layers: stat results of the layer directories, topmost first.

        Raises:
            LookupIndexError: it is another number of layers, or one of them has changed.
        """
        if len(layers) != len(self.layers):
            reason = f"was made of {len(self.layers)} layers, not of {len(layers)}"
            raise LookupIndexError(self.path, reason)
        devices: dict[int, int] = {}
        for status in reversed(layers):
            devices.setdefault(status.st_dev, len(devices))
        for number, (identity, status) in enumerate(zip(self.layers, layers, strict=True)):
            found = LayerIdentity.of(status, devices[status.st_dev])
            difference = identity.difference(found)
            if difference:
                reason = f"is outdated: layer {number} (from the top): {difference}"
                raise LookupIndexError(self.path, reason)

    # --- one node ---------------------------------------------------------------------------

    def _node(self, node: int) -> tuple[int, int, int, int, int, int, int]:
        if not 0 < node <= self.count:
            raise OSError(errno.EIO, f"the lookup index has no node {node}")
        found: tuple[int, int, int, int, int, int, int] = NODE.unpack_from(
            self.map, self._nodes.offset + node * NODE.size
        )
        return found

    def _record(self, record: int) -> tuple[int, int]:
        """(offset in the file, length of the name) of a record, by its offset in the section."""
        if record + RECORD_SIZE > self._records.length:
            raise self._damaged()
        at = self._records.offset + record
        (length,) = struct.unpack_from("=I", self.map, at + ENTRY.size + 16)
        if record + RECORD_SIZE + length > self._records.length:
            raise self._damaged()
        return at, length

    def _damaged(self) -> OSError:
        return OSError(errno.EIO, f"{os.fsdecode(self.path)}: the lookup index is damaged")

    def _name(self, record: int) -> bytes:
        at, length = self._record(record)
        return bytes(self.map[at + RECORD_SIZE : at + RECORD_SIZE + length])

    def status(self, node: int) -> NodeStatus:
        """Attributes of a node, as lstat shows them in the mount."""
        at, _ = self._record(self._node(node)[0] * 8)
        fields: tuple[int, ...] = ENTRY.unpack_from(self.map, at)[6:]
        inode, size, blocks, atime, mtime, ctime, *fields_32 = fields
        atime_ns, mtime_ns, ctime_ns, mode, links, uid, gid, device, blksize, _ = fields_32
        return NodeStatus(
            inode,
            size,
            blocks,
            _signed(atime) * 10**9 + atime_ns,
            _signed(mtime) * 10**9 + mtime_ns,
            _signed(ctime) * 10**9 + ctime_ns,
            mode,
            links,
            uid,
            gid,
            decode_device(device),
            blksize,
        )

    def info(self, node: int) -> NodeInfo:
        """The (first) name of a node, and its layer."""
        record, parent, layer, flags, *_ = self._node(node)
        return NodeInfo(parent, self._name(record * 8), len(self.layers) - 1 - layer, flags)

    def names(self, node: int) -> list[tuple[int, bytes]]:
        """All names of a node: (parent, name)."""
        record, parent, _, flags, *_ = self._node(node)
        if not flags & HAS_LINKS:
            return [(parent, self._name(record * 8))]
        low, high = 0, self._links.length // LINK.size
        while low < high:
            middle = (low + high) // 2
            if LINK.unpack_from(self.map, self._links.offset + middle * LINK.size)[0] < node:
                low = middle + 1
            else:
                high = middle
        found = []
        for i in range(low, self._links.length // LINK.size):
            owner, parent, record = LINK.unpack_from(self.map, self._links.offset + i * LINK.size)
            if owner != node:
                break
            found.append((parent, self._name(record)))
        return found

    def records_with_inodes(self, inodes: set[int]) -> list[int]:
        """The nodes with several names whose st_ino is one of these. Reads all such nodes."""
        nodes = {
            LINK.unpack_from(self.map, at)[0]
            for at in range(self._links.offset, self._links.offset + self._links.length, LINK.size)
        }
        return sorted(node for node in nodes if self.status(node).st_ino in inodes)

    def readlink(self, node: int) -> bytes:
        """What a symbolic link says."""
        _, _, _, flags, length, offset, _ = self._node(node)
        if not flags & SYMLINK:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if offset + length > self._targets.length:
            raise self._damaged()
        return bytes(self.map[self._targets.offset + offset :][:length])

    # --- directories ------------------------------------------------------------------------

    def _extent(self, node: int) -> tuple[int, int]:
        _, _, _, flags, length, offset, _ = self._node(node)
        if not flags & DIRECTORY:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if offset + length > self._records.length:
            raise self._damaged()
        return offset, offset + length

    def lookup(self, parent: int, name: bytes) -> int:
        """The node that a directory has under a name; 0 for none."""
        start, end = self._extent(parent)
        key = _hash(name, parent)
        tag, slot = key >> 32, key & self._mask
        for _ in range(self._mask + 1):
            found, record = SLOT.unpack_from(self.map, self._slots.offset + slot * SLOT.size)
            if record == FREE:
                return 0
            if found == tag and record != DELETED and start <= record * 8 < end:
                at, length = self._record(record * 8)
                if bytes(self.map[at + RECORD_SIZE : at + RECORD_SIZE + length]) == name:
                    return self._known(struct.unpack_from("=Q", self.map, at)[0])
            slot = slot + 1 & self._mask
        raise self._damaged()

    def _known(self, node: int) -> int:
        if not 0 < node <= self.count:
            raise self._damaged()
        return node

    def entries(self, directory: int) -> Iterator[tuple[bytes, int, int]]:
        """(name, node, the cookie behind it) of all names, in the order of the listing."""
        at, end = self._extent(directory)
        while at < end:
            where, length = self._record(at)
            node, cookie = self.map[where : where + 8], self.map[where + 136 : where + 144]
            if int.from_bytes(cookie, sys.byteorder) >= FIRST_NAME:
                name = bytes(self.map[where + RECORD_SIZE : where + RECORD_SIZE + length])
                yield (
                    name,
                    self._known(int.from_bytes(node, sys.byteorder)),
                    int.from_bytes(cookie, sys.byteorder),
                )
            at += padded(RECORD_SIZE + length)

    def places(self, directory: int) -> list[tuple[int, bytes]]:
        """The directories that were merged, topmost first: (layer from the top, path in it)."""
        top = len(self.layers) - 1
        stored = self.raw_places(directory)
        return [(top - layer, self._path(directory, layer, path)) for layer, path in stored]

    def _path(self, directory: int, layer: int, path: bytes | None) -> bytes:
        components: list[bytes] = []
        while path is None:
            record, directory, *_ = self._node(directory)
            components.append(self._name(record * 8))
            if len(components) > PAGE:  # no path is deeper: a ring in a damaged file
                raise self._damaged()
            above = dict(self.raw_places(directory))
            if layer not in above:
                raise self._damaged()
            path = above[layer]
        return b"/".join([path, *reversed(components)] if path else reversed(components))

    def raw_places(self, directory: int) -> list[tuple[int, bytes | None]]:
        """`places` as stored: layers count from the base, None for a path that is inherited."""
        at = self._node(directory)[6]
        if at > self._places.length:
            raise self._damaged()
        try:
            return list(decode_places(self.map, self._places.offset + at))
        except struct.error:
            raise self._damaged() from None

    def view(self, directory: int, layers: Sequence[Layer]) -> IndexView:
        """The directory as the union wants it; `layers` are those of the stack, topmost first."""
        return IndexView(self, directory, layers)


class IndexView:
    """The merged content of a directory, by the index (see `view.View`)."""

    __slots__ = ("_directory", "_index", "_layers", "_places")

    def __init__(self, index: LookupIndex, directory: int, layers: Sequence[Layer]) -> None:
        self._index, self._directory, self._layers = index, directory, layers
        self._places: tuple[Place, ...] | None = None

    def get(self, name: bytes) -> Stub | None:
        node = self._index.lookup(self._directory, name)
        if not node:
            return None
        kind = stat.S_IFMT(self._index.status(node).st_mode)
        here = {place.layer.number: i for i, place in enumerate(self.places())}
        if kind == stat.S_IFDIR:
            # A redirected directory merges others as well: those are found when it is opened.
            inherited = [layer for layer, path in self._index.raw_places(node) if path is None]
            numbers = [len(self._layers) - 1 - layer for layer in inherited]
        else:
            numbers = [self._index.info(node).layer]
        try:
            return Stub(kind, tuple(here[number] for number in numbers), node)
        except KeyError:
            raise OSError(errno.EIO, "the lookup index is damaged") from None

    def after(self, cookie: int) -> Iterator[tuple[bytes, int]]:
        for name, _, own in self._index.entries(self._directory):
            if own > cookie:
                yield name, own

    def places(self) -> tuple[Place, ...]:
        if self._places is None:
            found = self._index.places(self._directory)
            self._places = tuple(Place(self._layers[number], path) for number, path in found)
        return self._places


def decode_places(
    data: mmap.mmap | bytes | bytearray, at: int
) -> Iterator[tuple[int, bytes | None]]:
    """The stored places of a directory; see `LookupIndex.raw_places`."""
    (count,) = PLACES.unpack_from(data, at)
    at += PLACES.size
    for _ in range(count):
        layer, length = PLACE.unpack_from(data, at)
        at += PLACE.size
        if length == INHERITED:
            yield layer, None
        else:
            yield layer, bytes(data[at : at + length])
            at += length


def _header_fault(data: mmap.mmap | bytes) -> str:
    """Why mapped bytes are no usable index; empty for nothing. Costs the same for any size."""
    if len(data) < HEADER_SIZE or data[:8] != MAGIC:
        return "is not a lookup index"
    _, order, version, size, nodes, slots, _, _ = HEAD.unpack_from(data)
    if order != BYTE_ORDER:
        return "was written on a machine of another byte order"
    if version != VERSION:
        return f"has format version {version}; this is unionfuse with version {VERSION}"
    (checksum,) = CHECKSUM.unpack_from(data, HEADER_SIZE - CHECKSUM.size)
    if checksum != _hash(data[: HEADER_SIZE - CHECKSUM.size]):
        return "is damaged: the checksum of its header is wrong"
    if size != len(data):
        return f"is {len(data)} bytes long where its header says {size}"
    sections = [
        Section(*SECTION.unpack_from(data, HEAD.size + i * SECTION.size))
        for i in range(len(SECTIONS))
    ]
    if any(section.offset + section.length > size for section in sections):
        return "is damaged: a section lies outside of it"
    if not nodes or sections[1].length != (nodes + 1) * NODE.size:
        return "is damaged: the number of its nodes"
    if not slots or slots & slots - 1 or sections[0].length != slots * SLOT.size:
        return "is damaged: the size of its hash table"
    return ""
