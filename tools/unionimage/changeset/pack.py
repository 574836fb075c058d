"""A directory → layer tar: an overlay's upper directory as a changeset, or a whole tree.

Names come in byte order, parents first, and headers depend on nothing but the files, so the same
tree gives the same bytes everywhere. Whiteouts of all dialects become `.wh.NAME`, opaque marks
`.wh..wh..opq` (OCI image-spec, layer.md). A directory that was renamed (redirect) and a file of
which only attributes were changed (metacopy) are written out whole: that, and nothing else, reads
the layers below. Sockets are left out, as docker does.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator, Set
from contextlib import ExitStack

from unionfuse import syscalls
from unionfuse.layers import whiteout
from unionfuse.tree import view
from unionimage.chain import Chain, Found, Place
from unionimage.changeset import tar
from unionimage.changeset.paths import OVERRIDE_STAT
from unionimage.digest import CHUNK
from unionimage.errors import UserError

_KINDS = {
    stat.S_IFREG: tar.FILE,
    stat.S_IFDIR: tar.DIRECTORY,
    stat.S_IFLNK: tar.SYMLINK,
    stat.S_IFCHR: tar.CHAR,
    stat.S_IFBLK: tar.BLOCK_DEVICE,
    stat.S_IFIFO: tar.FIFO,
}
_KEPT_XATTRS = (b"user.", b"trusted.", b"security.capability", b"system.posix_acl_")
_OVERRIDES = {b"char": tar.CHAR, b"block": tar.BLOCK_DEVICE, b"pipe": tar.FIFO}
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def pack_upper(
    chain: Chain, *, newest_ns: int | None = None, leave_out: Set[bytes] = frozenset()
) -> Iterator[bytes]:
    """The changes in the topmost directory of a chain, as the pieces of a layer tar.

    Args:
        chain: the upper directory, then the layers it lies on, top first.
        newest_ns: later modification times are set to this (SOURCE_DATE_EPOCH).
        leave_out: paths that are no part of the changes, nor what is below them, nor a directory
            above them that is otherwise as it is in the layers below.

    Raises:
        UserError: a file changed while it was read, or what a redirect names is not there.
    """
    packer = _Packer(chain, newest_ns, leave_out)
    yield from packer.upper(b"")
    yield tar.END


def pack_merged(chain: Chain, *, newest_ns: int | None = None) -> Iterator[bytes]:
    """The merged tree, as the pieces of one tar without any whiteouts."""
    packer = _Packer(chain, newest_ns)
    for found in chain.walk():
        yield from packer.merged(found)
    yield tar.END


class _Packer:
    def __init__(
        self, chain: Chain, newest_ns: int | None, leave_out: Set[bytes] = frozenset()
    ) -> None:
        self._chain = chain
        self._leave_out = leave_out
        self._around_left_out = {above for path in leave_out for above in _above(path)}
        self._rootless = os.geteuid() != 0
        self._newest_ns = newest_ns
        self._links: dict[tuple[int, int], bytes] = {}

    def upper(self, path: bytes) -> Iterator[bytes]:
        """What lies below one directory of the upper, whiteouts first."""
        with ExitStack() as stack:
            place = Place(0, path + b"/.")
            directory, _ = self._chain.parent(place, stack)
            scan = view.scan(directory)
            prefix = path + b"/" if path else b""
            if scan.marks.redirect is not None and path:
                yield _mark(prefix + whiteout.OPAQUE_FILE)
                for found in self._chain.walk(_topmost(self._chain, path)):
                    yield from self.merged(found)
                return
            if scan.marks.opaque:
                yield _mark(prefix + whiteout.OPAQUE_FILE)
            for name in sorted(scan.whiteouts):
                yield _mark(prefix + whiteout.WHITEOUT_PREFIX + name)
            for name in sorted(scan.kinds):
                if prefix + name in self._leave_out:
                    continue
                if scan.kinds[name] == stat.S_IFDIR:
                    yield from self._directory(directory, name, prefix + name)
                else:
                    yield from self._entry(directory, name, Place(0, prefix + name), prefix + name)

    def _directory(self, parent: int, name: bytes, path: bytes) -> Iterator[bytes]:
        entry, inside = list(self._entry(parent, name, Place(0, path), path)), self.upper(path)
        if path in self._around_left_out:
            first = next(inside, None)
            if first is None:
                if entry == self._entry_below(path):
                    return
            else:
                inside = itertools.chain((first,), inside)
        yield from entry
        yield from inside

    def _entry_below(self, path: bytes) -> list[bytes]:
        """A directory of the upper as a layer has it if it is as below; [] if it is new."""
        found = self._chain.find(path, below=0)
        return [] if found is None else list(self.merged(found))

    def merged(self, found: Found) -> Iterator[bytes]:
        with ExitStack() as stack:
            directory, name = self._chain.parent(found.places[0], stack)
            yield from self._entry(directory, name, found.places[0], found.path)

    def _entry(self, directory: int, name: bytes, place: Place, path: bytes) -> Iterator[bytes]:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            return
        if name.startswith(whiteout.WHITEOUT_PREFIX):
            raise UserError(f"{os.fsdecode(path)!r} cannot be in a layer: .wh. marks deleted files")
        entry = tar.Entry(
            path + b"/" if kind == tar.DIRECTORY else path,
            kind,
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            mtime_ns=status.st_mtime_ns,
        )
        if self._rootless:  # its one user is root inside, as in podman's containers
            entry.uid = 0 if entry.uid == os.geteuid() else entry.uid
            entry.gid = 0 if entry.gid == os.getegid() else entry.gid
        if self._newest_ns is not None:
            entry.mtime_ns = min(entry.mtime_ns, self._newest_ns)
        if status.st_nlink > 1 and kind != tar.DIRECTORY:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                entry.kind, entry.link = tar.LINK, first
                yield tar.header(entry)
                return
        entry.xattrs = _xattrs(directory, name, entry)
        if kind == tar.SYMLINK:
            entry.link = os.readlink(name, dir_fd=directory)
        elif kind in (tar.CHAR, tar.BLOCK_DEVICE):
            entry.major, entry.minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        if entry.kind == tar.FILE and status.st_size:
            yield from self._file(entry, place, status.st_size)
        else:
            yield tar.header(entry)

    def _file(self, entry: tar.Entry, place: Place, size: int) -> Iterator[bytes]:
        file = self._chain.open_data(place)
        try:
            entry.size = left = size
            yield tar.header(entry)
            while left and (data := os.read(file, min(CHUNK, left))):
                left -= len(data)
                yield data
            if left:
                name = os.fsdecode(entry.name)
                raise UserError(f"{name!r} became shorter while it was read; try again")
        finally:
            os.close(file)
        if size % tar.BLOCK:
            yield tar.padding(size)


def _topmost(chain: Chain, path: bytes) -> Found:
    """The directory of the upper at a path, to be merged with what its redirect names."""
    return Found(path, stat.S_IFDIR, (Place(0, path),))


def _above(path: bytes) -> Iterator[bytes]:
    """The directories above a path, without the root."""
    while path := path.rpartition(b"/")[0]:
        yield path


def _mark(path: bytes) -> bytes:
    return tar.header(tar.Entry(path, tar.FILE, 0o600))


def _xattrs(directory: int, name: bytes, entry: tar.Entry) -> dict[bytes, bytes]:
    """The xattrs that belong into a layer; rootless owner and mode go into the entry instead."""
    kept: dict[bytes, bytes] = {}
    try:
        attributes = syscalls.listxattr(directory, name)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EACCES):
            return kept
        raise
    for attribute in attributes:
        if attribute == OVERRIDE_STAT:
            _overrule(entry, syscalls.getxattr(directory, name, attribute))
        elif attribute.startswith(_KEPT_XATTRS):
            inside = whiteout.unescape_attribute(attribute)
            if inside is not None:
                kept[inside] = syscalls.getxattr(directory, name, attribute)
    return kept


def _overrule(entry: tar.Entry, value: bytes) -> None:
    """Take owner, mode and type from `user.containers.override_stat`; see `unpack._override`."""
    parts = value.split(b":")
    try:
        entry.uid, entry.gid = int(parts[0]), int(parts[1])
        entry.mode = int(parts[2], 8) & 0o7777
        kind, *numbers = parts[3].split(b"-") if len(parts) > 3 else [b""]
        if kind in _OVERRIDES and entry.kind == tar.FILE:
            entry.kind = _OVERRIDES[kind]
            if numbers:
                entry.major, entry.minor = int(numbers[0]), int(numbers[1])
    except (ValueError, IndexError):
        name = os.fsdecode(entry.name)
        raise UserError(f"{name!r} has a bad {OVERRIDE_STAT.decode()} xattr") from None
