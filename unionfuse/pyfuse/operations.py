"""Door one: pyfuse3's handlers, which pass each request on to the union.

It translates: errnos, attributes, who asks. It decides nothing about the merged tree. What has
to wait (a big copy-up, an fsync) is awaited in a worker thread; everything else is answered
without an await, so nothing can come between its steps.

Interleaving: an `await` here may let any other request run. Where a worker copies a file up,
the request goes on only after it, and the union checks again, so it does not matter who was
first.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from unionfuse.tree.node import Caller, Changes, Entry
from unionfuse.union import Union
from unionfuse.wire._attributes import Attributes

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


def answering(handler: Handler) -> Handler:
    """No request ends the daemon: every exception becomes an errno, the odd one a log line."""
    name = handler.__name__
    opcode = name.upper()

    @functools.wraps(handler)
    async def guarded(self: Operations, *args: Any) -> Any:
        self.requests[opcode] += 1
        try:
            result = await handler(self, *args)
        except OSError as error:
            if self.trace:
                log.debug("%s%r: %s", name, args, error.strerror)
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("%s failed; the caller got EIO", name)
            raise FUSEError(errno.EIO) from None
        if self.trace:
            log.debug("%s%r", name, args)
        return result

    return cast(Handler, guarded)


class Operations(pyfuse3.Operations):
    """The handlers of one mount."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(
        self,
        union: Union,
        requests: Counter[str],
        trace: bool,
        started: Callable[[], None],
    ) -> None:
        """
        Arguments:
            requests: where requests are counted, by name.
            trace: log each one.
            started: called when libfuse has shaken hands.
        """
        super().__init__()
        self._union = union
        self._timeout = union.options.timeout
        self.requests = requests
        self.trace = trace
        self._started = started

    def init(self) -> None:
        self._started()

    # --- looking -------------------------------------------------------------------------

    @answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            return self._entry(self._union.lookup(parent_inode, name))
        except FileNotFoundError:
            missing = EntryAttributes()
            missing.st_ino = cast(Any, 0)
            missing.entry_timeout = self._timeout
            return missing

    def _entry(self, entry: Entry) -> EntryAttributes:
        return _entry(entry, self._timeout)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node, count in inode_list:
            try:
                self._union.forget(node, count)
            except Exception:
                log.exception("forget of node %d failed", node)

    @answering
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        attributes = self._union.getattr(inode)
        return _attributes(attributes, self._union.attr_valid(inode))

    @answering
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._union.readlink(inode)

    @answering
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True  # default_permissions: the kernel has checked

    @answering
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        status = self._union.statfs()
        data = pyfuse3.StatvfsData()
        for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(data, f"f_{field}", getattr(status, f"f_{field}"))
        data.f_namemax = status.f_namemax
        return data

    # --- changing ------------------------------------------------------------------------

    async def _copied_up(self, inode: int, data: bool = True) -> None:
        """Have a big file copied up by a thread, so that nothing else waits for it."""
        if self._union.copy_up_size(inode, data):
            await trio.to_thread.run_sync(self._union.copy_up, inode, data)

    @answering
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        changes = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        changes = self._without_privileges(inode, changes, ctx)
        if changes.size != 0:
            await self._copied_up(inode, data=changes.size is not None)
        attributes = self._union.setattr(inode, changes, fh)
        return _attributes(attributes, self._union.attr_valid(inode))

    def _without_privileges(self, inode: int, changes: Changes, ctx: RequestContext) -> Changes:
        """What a setattr means that the kernel sends for a write.

        Without KILLPRIV_V2 it takes set-uid away by a new mode, set-gid too where the group may
        execute; capabilities, and set-gid elsewhere, are ours to drop, asked for by a setattr of
        nothing (fs/fuse/dir.c, fuse_setattr). A plain file loses all of them to a stranger.
        """
        stranger = ctx.uid not in (0, self._union.getattr(inode).uid)
        if changes == Changes():
            return Changes(kill_capabilities=True, kill_privileges=stranger)
        if changes.mode is not None and stranger:  # no chmod: a stranger may not
            return changes._replace(mode=changes.mode & ~stat.S_ISGID)
        if changes.size is not None and stranger:
            return changes._replace(kill_privileges=True)
        return changes

    @answering
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._union.mknod(parent_inode, name, mode, rdev, _caller(ctx)))

    @answering
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._union.mkdir(parent_inode, name, mode, _caller(ctx)))

    @answering
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._union.symlink(parent_inode, name, target, _caller(ctx)))

    @answering
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        await self._copied_up(inode)
        return self._entry(self._union.link(inode, new_parent_inode, new_name))

    @answering
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._copied_up(self._union.linked(parent_inode, name))
        self._union.unlink(parent_inode, name)

    @answering
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._union.rmdir(parent_inode, name)

    @answering
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        moved = self._union.lookup(parent_inode_old, name_old).node
        try:
            await self._copied_up(moved)
        finally:
            self._union.forget(moved, 1)
        await self._copied_up(self._union.linked(parent_inode_new, name_new))
        self._union.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    # --- files ---------------------------------------------------------------------------

    @answering
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY and not flags & os.O_TRUNC:
            await self._copied_up(inode)
        # O_TRUNC comes with the open, so here is where a foreign truncation drops set-uid.
        return _file_info(self._union.open(inode, flags, kill_privileges=ctx.uid != 0))

    @answering
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        entry, handle = self._union.create(parent_inode, name, mode, flags, _caller(ctx))
        return _file_info(handle), self._entry(entry)

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self._union.read(fh, off, size)

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return self._union.write(fh, off, buf)

    @answering
    async def flush(self, fh: int) -> None:
        self._union.flush(fh)

    @answering
    async def release(self, fh: int) -> None:
        self._union.release(fh)

    @answering
    async def fsync(self, fh: int, datasync: bool) -> None:
        await trio.to_thread.run_sync(self._union.fsync, fh, datasync)

    # --- directories ---------------------------------------------------------------------

    @answering
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._union.opendir(inode)

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._union.opened_directory(fh)
        for cookie, dot in ((1, b"."), (2, b"..")):
            if start_id < cookie:
                node = directory if cookie == 1 else self._union.parent(directory)
                answer = _attributes(self._union.getattr(node), 0)
                pyfuse3.readdir_reply(token, cast(Any, dot), answer, cookie)
        with self._union.lock:
            for name, cookie, entry in self._union.listing(directory, start_id):
                taken = pyfuse3.readdir_reply(token, cast(Any, name), self._entry(entry), cookie)
                if not taken:
                    self._union.unlist(entry.node)
                    break

    @answering
    async def releasedir(self, fh: int) -> None:
        self._union.release(fh)

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await trio.to_thread.run_sync(self._union.fsyncdir, fh, datasync)

    # --- extended attributes -------------------------------------------------------------

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return self._union.getxattr(inode, name)

    @answering
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return self._union.listxattr(inode, ctx.pid)

    @answering
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._copied_up(inode, data=False)
        self._union.setxattr(inode, name, value)

    @answering
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._union.removexattr(inode, name)


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)


def _file_info(handle: int) -> FileInfo:
    return FileInfo(fh=cast(Any, handle), keep_cache=True)


def _entry(entry: Entry, timeout: float) -> EntryAttributes:
    answer = _attributes(entry.attributes, entry.attr_valid)
    answer.entry_timeout = timeout
    if entry.node != entry.attributes.ino:
        # pyfuse3 has one field for node id and st_ino: let stat(2) ask for the true one.
        answer.st_ino = cast(Any, entry.node)
        answer.attr_timeout = 0
    return answer


def _attributes(attributes: Attributes, valid: float) -> EntryAttributes:
    answer = EntryAttributes()
    answer.st_ino = cast(Any, attributes.ino)
    answer.generation = 0
    answer.attr_timeout = valid
    answer.st_mode = cast(Any, attributes.mode)
    answer.st_nlink = attributes.nlink
    answer.st_uid = attributes.uid
    answer.st_gid = attributes.gid
    answer.st_rdev = attributes.rdev
    answer.st_size = attributes.size
    answer.st_blksize = attributes.blksize
    answer.st_blocks = attributes.blocks
    answer.st_atime_ns = attributes.atime_ns
    answer.st_mtime_ns = attributes.mtime_ns
    answer.st_ctime_ns = attributes.ctime_ns
    return answer
