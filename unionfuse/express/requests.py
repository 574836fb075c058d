"""What the lane asks the union: one method for each request that the index cannot answer.

A method takes a request's parts and returns the body of the reply as bytes, or None where the reply
comes later (or never); it raises OSError for an errno. It translates between the wire and the
union, and decides nothing about the merged tree. Nothing here waits: what may take long (a big
copy-up, an fsync) is given to `Lane.later` or `Lane.relay`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from unionfuse import syscalls
from unionfuse.capabilities import FSETID, has_capability
from unionfuse.express import messages
from unionfuse.express._lane import NODE_HANDLE
from unionfuse.express.messages import Call, Method
from unionfuse.tree.node import Changes, Entry
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire._attributes import Attributes
from unionfuse.wire.protocol import Opcode, OpenFlag, SetattrValid

if TYPE_CHECKING:
    from unionfuse.express.lane import Lane

_COPY_NOW = 1 << 20  # bytes; COPY_FILE_RANGE of more than this leaves the lane's thread
_COPY_MOST = 1 << 30  # bytes that one COPY_FILE_RANGE copies at most


class Requests:
    """The methods, by opcode, for one mount."""

    def __init__(self, lane: Lane, union: Union) -> None:
        self._lane = lane
        self._union = union
        self._timeout = union.options.timeout
        self._negative = messages.entry_header(0, self._timeout, 0.0) + bytes(protocol.ATTR.size)
        self.methods: dict[int, Method] = {
            opcode: getattr(self, f"_{opcode.name.lower()}")
            for opcode in Opcode
            if hasattr(self, f"_{opcode.name.lower()}")
        }

    # --- looking ------------------------------------------------------------------------------

    def _lookup(self, call: Call) -> bytes:
        (name,) = call.names(0, 1)
        with self._union.lock:
            tabled = self._lane.looked_up(call.node, name)
        if tabled is not None:
            return tabled
        try:
            return self._entry(self._union.lookup(call.node, name))
        except FileNotFoundError:
            return self._negative

    def _forget(self, call: Call) -> None:
        self._lane.forgotten(call.node)
        self._union.forget(call.node, *protocol.FORGET_IN.unpack_from(call.body))

    def _batch_forget(self, call: Call) -> None:
        count, _ = protocol.BATCH_FORGET_IN.unpack_from(call.body)
        end = protocol.BATCH_FORGET_IN.size + count * protocol.FORGET_ONE.size
        body = call.body[protocol.BATCH_FORGET_IN.size : end]
        body = body[: len(body) // protocol.FORGET_ONE.size * protocol.FORGET_ONE.size]
        for node, lookups in protocol.FORGET_ONE.iter_unpack(body):
            self._lane.forgotten(node)
            self._union.forget(node, lookups)

    def _getattr(self, call: Call) -> bytes:
        found = self._union.getattr(call.node)
        if stat.S_ISDIR(found.mode):
            self._lane.asked_for(call.node)
        return self._attributes(call.node, found)

    def _statx(self, call: Call) -> bytes:
        protocol.STATX_IN.unpack_from(call.body)
        found = self._union.getattr(call.node)
        return messages.statx_out(found, self._union.attr_valid(call.node))

    def _readlink(self, call: Call) -> bytes:
        return self._union.readlink(call.node)

    def _statfs(self, call: Call) -> bytes:
        found = self._union.statfs()
        answer = protocol.STATFS_OUT.pack(
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            found.f_bsize,
            found.f_namemax,
            found.f_frsize,
            0,
        )
        self._lane.keep_statfs(answer)
        return answer

    # --- attributes ---------------------------------------------------------------------------

    def _setattr(self, call: Call) -> bytes | None:
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = (
            protocol.SETATTR_IN.unpack_from(call.body)
        )
        fields = valid & (1 << 12) - 1
        # Without any field it means: somebody has written, drop capabilities, and set-uid as well
        # unless the writer may keep it. Who it was is told by pid alone (FUSE_ALLOW_IDMAP).
        nothing = not fields & ~(SetattrValid.FH | SetattrValid.LOCKOWNER)
        changes = Changes(
            mode=mode if fields & SetattrValid.MODE else None,
            uid=uid if fields & SetattrValid.UID else None,
            gid=gid if fields & SetattrValid.GID else None,
            size=size if fields & SetattrValid.SIZE else None,
            atime_ns=messages.moment(
                fields, SetattrValid.ATIME, SetattrValid.ATIME_NOW, atime, atime_ns
            ),
            mtime_ns=messages.moment(
                fields, SetattrValid.MTIME, SetattrValid.MTIME_NOW, mtime, mtime_ns
            ),
            kill_privileges=bool(fields & SetattrValid.KILL_SUIDGID)
            or (nothing and not has_capability(call.pid, FSETID)),
            kill_capabilities=nothing,
        )
        if changes.size != 0 and self._copied_up_later(call, call.node, changes.size is not None):
            return None
        opened = handle if fields & SetattrValid.FH else None
        return self._attributes(call.node, self._union.setattr(call.node, changes, opened))

    def _copied_up_later(self, call: Call, node: int, data: bool = True) -> bool:
        """Have a big file copied up by a thread that may wait, and the request served after it."""
        if not self._union.copy_up_size(node, data):
            return False

        def copy_up_and_serve() -> bytes | None:
            self._union.copy_up(node, data)
            return self.methods[call.opcode](call)

        self._lane.later(call.unique, copy_up_and_serve)
        return True

    # --- names --------------------------------------------------------------------------------

    def _symlink(self, call: Call) -> bytes:
        name, target = call.names(0, 2)
        return self._entry(self._union.symlink(call.node, name, target, call.caller()))

    def _mknod(self, call: Call) -> bytes:
        mode, rdev, umask, _ = protocol.MKNOD_IN.unpack_from(call.body)
        (name,) = call.names(protocol.MKNOD_IN.size, 1)
        device = os.makedev(rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00)
        return self._entry(self._union.mknod(call.node, name, mode, device, call.caller(umask)))

    def _mkdir(self, call: Call) -> bytes:
        mode, umask = protocol.MKDIR_IN.unpack_from(call.body)
        (name,) = call.names(protocol.MKDIR_IN.size, 1)
        return self._entry(self._union.mkdir(call.node, name, mode, call.caller(umask)))

    def _unlink(self, call: Call) -> bytes | None:
        (name,) = call.names(0, 1)
        if self._linked_up_later(call, call.node, name):
            return None
        self._union.unlink(call.node, name)
        return b""

    def _linked_up_later(self, call: Call, parent: int, name: bytes) -> bool:
        """A lower file with several names is copied up before one of them goes."""
        linked = self._union.linked(parent, name)
        return bool(linked) and self._copied_up_later(call, linked)

    def _rmdir(self, call: Call) -> bytes:
        self._union.rmdir(call.node, *call.names(0, 1))
        return b""

    def _rename(self, call: Call) -> bytes | None:
        (new_parent,) = protocol.RENAME_IN.unpack_from(call.body)
        return self._rename_to(call, new_parent, 0, protocol.RENAME_IN.size)

    def _rename2(self, call: Call) -> bytes | None:
        new_parent, flags, _ = protocol.RENAME2_IN.unpack_from(call.body)
        return self._rename_to(call, new_parent, flags, protocol.RENAME2_IN.size)

    def _rename_to(self, call: Call, new_parent: int, flags: int, offset: int) -> bytes | None:
        old, new = call.names(offset, 2)
        moved = self._union.lookup(call.node, old).node
        try:
            if self._copied_up_later(call, moved):
                return None
        finally:
            self._union.forget(moved, 1)
        if self._linked_up_later(call, new_parent, new):
            return None
        self._union.rename(call.node, old, new_parent, new, flags)
        return b""

    def _link(self, call: Call) -> bytes | None:
        (node,) = protocol.LINK_IN.unpack_from(call.body)
        (name,) = call.names(protocol.LINK_IN.size, 1)
        if self._copied_up_later(call, node):
            return None
        return self._entry(self._union.link(node, call.node, name))

    # --- open files ---------------------------------------------------------------------------

    def _open(self, call: Call) -> bytes | None:
        flags, open_flags = protocol.OPEN_IN.unpack_from(call.body)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and not flags & os.O_TRUNC and self._copied_up_later(call, call.node):
            return None
        kill = bool(open_flags & protocol.OPEN_KILL_SUIDGID)
        return self._opened(call.node, self._union.open(call.node, flags, kill))

    def _create(self, call: Call) -> bytes:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(call.body)
        (name,) = call.names(protocol.CREATE_IN.size, 1)
        caller = call.caller(umask)
        entry, handle = self._union.create(call.node, name, mode, flags, caller)
        self._lane.has_no_capabilities(entry.node, True)
        made = entry.attributes if flags & os.O_ACCMODE == os.O_WRONLY else None
        return self._entry(entry) + self._opened(entry.node, handle, made)

    def _tmpfile(self, call: Call) -> bytes:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(call.body)
        entry, handle = self._union.tmpfile(call.node, mode, flags, call.caller(umask))
        return self._entry(entry) + self._opened(entry.node, handle)

    def _opened(self, node: int, handle: int, made: Attributes | None = None) -> bytes:
        flags, backing = self._lane.opened(node, handle, made)
        return protocol.OPEN_OUT.pack(handle, flags | OpenFlag.NOFLUSH, backing)

    def _read(self, call: Call) -> bytes:
        handle, offset, size, *_ = protocol.READ_IN.unpack_from(call.body)
        if handle & NODE_HANDLE:
            return self._union.read(self._lane.union_handle(handle), offset, min(size, 1 << 20))
        with self._union.lock:  # a copy-up in between would leave the loop with the old descriptor
            self._lane.read_directly(call.node, handle, self._union.files.pin(handle))
        return self._union.read(handle, offset, min(size, 1 << 20))

    def _write(self, call: Call) -> bytes:
        handle, offset, size, flags, *_ = protocol.WRITE_IN.unpack_from(call.body)
        data = call.body[protocol.WRITE_IN.size :]
        if len(data) != size:
            raise OSError(errno.EINVAL, "malformed write")
        kill = bool(flags & protocol.WRITE_KILL_SUIDGID)
        return protocol.WRITE_OUT.pack(self._union.write(handle, offset, data, kill), 0)

    def _release(self, call: Call) -> bytes:
        handle, *_ = protocol.RELEASE_IN.unpack_from(call.body)
        if handle & NODE_HANDLE:
            self._lane.released_here(handle)
            return b""
        self._lane.released(call.node, handle)
        self._union.release(handle)
        return b""

    def _fsync(self, call: Call) -> None:
        handle, flags, _ = protocol.FSYNC_IN.unpack_from(call.body)
        handle = self._lane.union_handle(handle)

        def sync() -> bytes:
            self._union.fsync(handle, bool(flags & protocol.FSYNC_FDATASYNC))
            return b""

        self._lane.later(call.unique, sync)

    def _fsyncdir(self, call: Call) -> None:
        handle, flags, _ = protocol.FSYNC_IN.unpack_from(call.body)
        del handle  # OPENDIR is never asked: there is none

        def sync() -> bytes:
            opened = self._union.opendir(call.node)
            try:
                self._union.fsyncdir(opened, bool(flags & protocol.FSYNC_FDATASYNC))
            finally:
                self._union.release(opened)
            return b""

        self._lane.later(call.unique, sync)

    def _syncfs(self, call: Call) -> None:
        def sync() -> bytes:
            self._union.sync()
            return b""

        self._lane.later(call.unique, sync)

    def _fallocate(self, call: Call) -> bytes:
        handle, offset, length, mode, _ = protocol.FALLOCATE_IN.unpack_from(call.body)
        with self._union.files.using(handle) as descriptor:
            syscalls.fallocate(descriptor, mode, offset, length)
        return b""

    def _lseek(self, call: Call) -> bytes:
        handle, offset, whence, _ = protocol.LSEEK_IN.unpack_from(call.body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with self._union.files.using(self._lane.union_handle(handle)) as descriptor:
            found = os.lseek(descriptor, offset, whence)
        return protocol.LSEEK_OUT.pack(found)

    def _copy_file_range(self, call: Call) -> bytes | None:
        return self._copy(call, protocol.WRITE_OUT.size)

    def _copy_file_range_64(self, call: Call) -> bytes | None:
        return self._copy(call, protocol.COPY_FILE_RANGE_OUT.size)

    def _copy(self, call: Call, answer_size: int) -> bytes | None:
        source, offset_in, other, target, offset_out, length, flags = (
            protocol.COPY_FILE_RANGE_IN.unpack_from(call.body)
        )
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        length = min(length, _COPY_MOST)
        with self._union.lock:
            self._union.tree.young.adopt(other)
        source = self._lane.union_handle(source)

        def copy() -> bytes:
            files = self._union.files
            with files.using(source) as reader, files.using(target) as writer:
                done = syscalls.copy_range(reader, writer, length, offset_in, offset_out)
            return done.to_bytes(answer_size, "little")

        if length <= _COPY_NOW:
            return copy()
        self._lane.later(call.unique, copy)
        return None

    def _ioctl(self, call: Call) -> bytes | None:
        _, _, command, _, given, room = protocol.IOCTL_IN.unpack_from(call.body)
        argument = call.body[protocol.IOCTL_IN.size :]
        if command in syscalls.WRITE_INODE_FLAGS:
            if len(argument) != given:
                raise OSError(errno.EINVAL, "malformed ioctl")
            if self._copied_up_later(call, call.node):
                return None
            self._union.write_inode_flags(call.node, command, argument)
            return protocol.IOCTL_OUT.pack(0, 0, 0, 0)
        if command not in syscalls.READ_INODE_FLAGS:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        answer = self._union.read_inode_flags(call.node, command)
        return protocol.IOCTL_OUT.pack(0, 0, 0, 0) + answer[:room]

    # --- directories --------------------------------------------------------------------------

    def _readdirplus(self, call: Call) -> bytes:
        return self._list(call, plus=True)

    def _readdir(self, call: Call) -> bytes:
        return self._list(call, plus=False)

    def _list(self, call: Call, plus: bool) -> bytes:
        _, cookie, size, *_ = protocol.READ_IN.unpack_from(call.body)
        out = bytearray()
        with self._union.lock:
            if plus and (tabled := self._lane.listed(call, cookie, size)) is not None:
                return tabled
            for dot in self._dots(call.node, cookie, plus):
                if len(out) + len(dot) <= size:
                    out += dot
            for name, next_cookie, entry in self._union.listing(call.node, cookie):
                record = messages.dirent(name, next_cookie, entry, self._timeout, plus)
                full = len(out) + len(record) > size
                if not full:
                    out += record
                if entry.node and (full or not plus):
                    self._union.unlist(entry.node)  # only what READDIRPLUS emits is a lookup
                if full:
                    break
        return bytes(out)

    def _dots(self, node: int, cookie: int, plus: bool) -> Iterator[bytes]:
        """The records of "." and "..": they carry no node, or the kernel would count a lookup."""
        entry = bytes(messages.ENTRY_SIZE) if plus else b""
        for position, name in enumerate((b".", b".."), start=1):
            if cookie < position:
                shown = node if name == b"." else self._union.parent(node)
                inode = self._union.getattr(shown).ino
                dirent = protocol.DIRENT.pack(inode, position, len(name), stat.S_IFDIR >> 12)
                yield entry + dirent + name.ljust(8, b"\0")

    # --- extended attributes ------------------------------------------------------------------

    def _getxattr(self, call: Call) -> bytes:
        size, _ = protocol.GETXATTR_IN.unpack_from(call.body)
        (name,) = call.names(protocol.GETXATTR_IN.size, 1)
        return messages.sized(self._union.getxattr(call.node, name), size)

    def _listxattr(self, call: Call) -> bytes:
        size, _ = protocol.GETXATTR_IN.unpack_from(call.body)
        names = self._union.listxattr(call.node, call.pid)
        return messages.sized(b"".join(name + b"\0" for name in names), size)

    def _setxattr(self, call: Call) -> bytes | None:
        size, flags, extra, _ = protocol.SETXATTR_EXT_IN.unpack_from(call.body)
        name, end, value = call.body[protocol.SETXATTR_EXT_IN.size :].partition(b"\0")
        if not name or not end or len(value) != size:
            raise OSError(errno.EINVAL, "malformed setxattr")
        if self._copied_up_later(call, call.node, data=False):
            return None
        self._lane.has_no_capabilities(call.node, False)
        self._union.setxattr(call.node, name, value, flags)
        self._lane.hide(call.node)  # it may hand down an ACL now
        if extra & protocol.SETXATTR_ACL_KILL_SGID:
            mode = self._union.getattr(call.node).mode & 0o5777
            self._union.setattr(call.node, Changes(mode=mode))
        return b""

    def _removexattr(self, call: Call) -> bytes | None:
        (name,) = call.names(0, 1)
        if self._copied_up_later(call, call.node, data=False):
            return None
        self._union.removexattr(call.node, name)
        return b""

    def _poll(self, call: Call) -> bytes:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # and the kernel never asks again

    # --- what never changes anything ----------------------------------------------------------

    def _destroy(self, call: Call) -> bytes:
        return b""

    # --- translation --------------------------------------------------------------------------

    def _entry(self, entry: Entry) -> bytes:
        return messages.entry_out(entry, self._timeout)

    def _attributes(self, node: int, found: Attributes) -> bytes:
        return messages.attr_out(found, self._union.attr_valid(node))
