"""Staging: a copy of a lower file in the work directory, whole and on disk, that nobody sees yet.

In the order of overlayfs (fs/overlayfs/copy_up.c): data, owner, extended attributes, mode, times.
No lock is held, and none is needed: all that a copy has to know of a file is in its `Original`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from unionfuse import syscalls
from unionfuse.changes import _plain
from unionfuse.layers import whiteout
from unionfuse.layers.upperdir import UpperDirectory

INLINE_SIZE = 128 * 1024
"""Bytes that are copied at once; more is copied without the lock, by a thread that may wait."""

_CHUNK = 8 << 20  # bytes that are copied before their writing is begun

Location = tuple[int, bytes]
"""A directory descriptor and a name in it; the name is empty for what the descriptor is."""


class Original(NamedTuple):
    """What is copied.

    Attributes:
        status: as its layer has it.
        ino: the st_ino shown for it.
        origin: its origin mark; empty where it has none.
        location: whose extended attributes it has.
        source: a regular file's data, open for reading; -1 where none is wanted.
        is_itself: the source is what the other attributes are about, and no metacopy's data.
    """

    status: os.stat_result
    ino: int
    origin: bytes
    location: Location
    source: int = -1
    is_itself: bool = False


class Staging:
    """Makes the copies of one mount.

    Attributes:
        wait: seconds that a small copy waits for the device, on average.
    """

    def __init__(self, upper: UpperDirectory) -> None:
        self._upper = upper
        self._unshared: set[int] = set()  # st_dev of files whose blocks upper cannot share
        self.wait = 0.0

    def regular(self, staged: bytes, original: Original, size: int | None = None) -> None:
        """Make a whole copy of a file.

        Arguments:
            size: copy no more than so many bytes. Without a source it is a hole of that size.
        """
        upper, source = self._upper, original.source
        if size is None and self._is_made_plain(staged, original):
            return
        target = syscalls.create(upper.work, staged, os.O_WRONLY, 0o600)
        try:
            if source >= 0:
                self.copy_data(source, target, size)
                upper.begin_to_settle(target)  # the rest is done while the device writes
            elif size:
                syscalls.ftruncate(target, size)
            self.metadata(staged, original)
            if source >= 0:
                start = time.perf_counter()
                upper.settle(target)
                self._waited(time.perf_counter() - start)
        finally:
            os.close(target)

    def _is_made_plain(self, staged: bytes, original: Original) -> bool:
        """Make the copy of a small file in compiled code, if it is one that has but data."""
        status, upper = original.status, self._upper
        if (
            not original.is_itself
            or status.st_size > INLINE_SIZE
            or os.fstat(original.source).st_dev not in self._unshared
            or syscalls.counts_changes()
        ):
            return False
        how = _plain.NO_WAIT
        if upper.sync:
            how = _plain.WRITE_BACK if upper.keeps_order else _plain.DATA_SYNC
        marks = tuple(self._marks(original))
        took = _plain.copy_plain(original.source, upper.work, staged, status, marks, how)
        if took >= 0:
            self._waited(took)
        return took >= 0

    def _waited(self, seconds: float) -> None:
        self.wait += (seconds - self.wait) / 8

    def special(self, staged: bytes, original: Original) -> None:
        """Make a copy of a link, device, FIFO or socket."""
        status = original.status
        if stat.S_ISLNK(status.st_mode):
            directory, name = original.location
            syscalls.symlink(os.readlink(name, dir_fd=directory), self._upper.work, staged)
        else:
            syscalls.mknod(self._upper.work, staged, status.st_mode, status.st_rdev)
        self.metadata(staged, original)

    def metadata(self, staged: bytes, original: Original) -> None:
        """Give something staged all that its original has but data."""
        work, status = self._upper.work, original.status
        syscalls.chown(work, staged, status.st_uid, status.st_gid)
        _copy_attributes(*original.location, work, staged)
        for attribute, value in self._marks(original):
            try:
                syscalls.setxattr(work, staged, attribute, value)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
        if not stat.S_ISLNK(status.st_mode):
            syscalls.chmod(work, staged, stat.S_IMODE(status.st_mode))
        syscalls.utimens(work, staged, (status.st_atime_ns, status.st_mtime_ns))

    def _marks(self, original: Original) -> Iterator[tuple[bytes, bytes]]:
        """What notes where a copy came from, so that it keeps its st_ino after a new mount.

        The handle of the lower file tells that to who may open it by handle; for others the
        number itself is kept. Both are a convenience: what refuses them goes without.
        """
        prefix = self._upper.marker.prefix
        if original.origin:
            yield prefix + b"origin", original.origin
        if not original.origin or not self._upper.privileged:
            yield prefix + b"unionfuse.inode", b"%d" % original.ino

    # --- data ----------------------------------------------------------------------------

    def copy_data(self, source: int, target: int, size: int | None = None) -> None:
        """Copy a file's data: shared blocks where the file system can, holes kept.

        Arguments:
            size: copy no more than so many bytes.

        Raises:
            OSError: EIO, ENOSPC, EDQUOT and whatever else reading or writing gives.
        """
        status = os.fstat(source)
        end = status.st_size
        if size is not None and size < end:
            end = size
        elif self._share_blocks(source, target, status.st_dev):
            return
        upper = self._upper
        for start, stop in _pieces(source, status, end):
            while start < stop:
                count = _copy_range(source, target, start, min(stop, start + _CHUNK))
                if count == 0:
                    break  # the layer changed under us: what is missing reads as zeros
                start += count
                if start < end:
                    upper.begin_to_settle(target)
        if os.fstat(target).st_size != end:
            syscalls.ftruncate(target, end)

    def _share_blocks(self, source: int, target: int, device: int) -> bool:
        if device in self._unshared:
            return False
        try:
            syscalls.clone_file(target, source)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY):
                self._unshared.add(device)
            return False
        return True


def _pieces(source: int, status: os.stat_result, end: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what is not a hole in a file before `end`."""
    if status.st_blocks * 512 >= status.st_size:
        yield 0, end
        return
    offset = 0
    while offset < end:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
            offset = min(end, os.lseek(source, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole up to the end
        if start < end:
            yield start, offset


_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def _copy_range(source: int, target: int, start: int, stop: int) -> int:
    """Copy bytes to the same place in another file; returns how many, 0 at the source's end."""
    try:
        count = syscalls.copy_range(source, target, stop - start, start, start)
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
        count = 0
    if count:
        return count
    data = memoryview(os.pread(source, min(1 << 20, stop - start), start))
    written = 0
    while written < len(data):
        written += syscalls.pwrite(target, data[written:], start + written)
    return written


def _copy_attributes(source: int, name: bytes, target: int, new: bytes) -> None:
    """Copy xattrs, ACLs and capabilities among them, but not the overlay's own marks.

    Raises:
        OSError: one that matters (an ACL, a security attribute) cannot be set.
    """
    try:
        attributes = syscalls.listxattr(source, name)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for attribute in attributes:
        if whiteout.unescape_attribute(attribute) is None:
            continue
        try:
            value = syscalls.getxattr(source, name, attribute)
            syscalls.setxattr(target, new, attribute, value)
        except OSError as error:
            matters = attribute.startswith((b"system.posix_acl", b"security."))
            gone = error.errno == errno.ENODATA
            refused = error.errno in (errno.EOPNOTSUPP, errno.EPERM)
            if not gone and not (refused and not matters):
                raise
