"""The writable layer on disk: upper, its work directory, and the index of hard links.

The layout is kernel overlayfs's, so that either can go on where the other stopped:
- `work/` in the work directory holds what is being staged; all of it may be thrown away.
- `index/HEX` beside it is one more link to a file that was copied up from a lower file with
  several links; HEX is the origin (see `whiteout.encode_origin`), so the other names find it.
- `incompat/volatile` in `work/` says that a volatile mount did not end cleanly.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat

from unionfuse import syscalls
from unionfuse.layers import ordering
from unionfuse.layers.layer import LayerError, open_directory
from unionfuse.layers.whiteout import TRUSTED, USER, Marker, decode_origin
from unionfuse.options import MountOptions

_OWN_ENTRIES = {b"work", b"index"}
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class UpperDirectory:
    """Upper and work, opened.

    Attributes:
        path: as the user wrote it.
        descriptor: the upper directory.
        work: the staging directory, in the same file system.
        index: the directory of copied-up hard links; -1 until the first is made.
        index_names: what is in it.
        marker: writes whiteouts and xattrs in the dialect that is allowed here.
        privileged: marks are `trusted.`, which nobody else can write, so redirects are safe.
        device: st_dev of both.
        sync: data is to be on disk before it becomes visible.
        keeps_order: written data survives wherever a change of names after it does.
    """

    def __init__(self, options: MountOptions, taken_over: bool = False) -> None:
        """Open, check and clean. That nobody else uses them is the caller's to see to (flock).

        Arguments:
            taken_over: a daemon of this very mount was here before, and ended without cleaning up.

        Raises:
            LayerError: upper or work cannot be used; nothing was changed.
        """
        assert options.upperdir is not None
        if options.workdir is None:
            raise LayerError(options.upperdir, "upperdir needs a workdir", "add workdir=DIR")
        self.path = os.path.abspath(options.upperdir)
        self._work_path = os.path.abspath(options.workdir)
        self._names = itertools.count(1)
        self.sync = options.fsync and not options.volatile
        self._volatile = options.volatile
        self._taken_over = taken_over
        self._descriptors: list[int] = []
        self.index = -1
        self.index_names: set[bytes] = set()
        try:
            self._open(options)
        except BaseException:
            self._close_all()
            raise

    def _open(self, options: MountOptions) -> None:
        self.descriptor = self._keep(open_directory(self.path, "the upper directory"))
        workdir = self._keep(open_directory(self._work_path, "the work directory"))
        self._check_places(workdir, options)
        self._check_strangers(workdir)
        self._workdir = workdir
        self.work = self._prepare_staging(workdir)
        self.marker = Marker(self._dialect(options), (self.work, self.staging_name()))
        self.privileged = self.marker.prefix == TRUSTED
        self._open_index()
        self.device = os.stat(self.descriptor).st_dev
        self.keeps_order = self.sync and ordering.keeps_order(self.descriptor)
        if self._volatile:
            self._leave_volatile_mark()

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    # --- checks: nothing is changed before all have passed ---

    def _check_places(self, workdir: int, options: MountOptions) -> None:
        upper, work = os.stat(self.descriptor), os.stat(workdir)
        if upper.st_dev != work.st_dev or _mount_id(self.descriptor) != _mount_id(workdir):
            reason = f"work and upper ({os.fsdecode(self.path)}) are on different file systems"
            raise LayerError(self._work_path, reason, "put both on one")
        if _is_inside(self._work_path, self.path) or _is_inside(self.path, self._work_path):
            raise LayerError(
                self._work_path, "upper and work lie inside each other", "put them side by side"
            )
        if not self._taken_over:  # then no path is followed: it might lead into the mount
            for layer in options.lowerdir:
                if os.path.samestat(os.stat(layer), upper):
                    reason = "the upper directory is a lower layer as well"
                    raise LayerError(self.path, reason, "name another upper")
        for path in (self.path, self._work_path):
            if not os.access(path, os.W_OK | os.X_OK):
                reason = "the directory cannot be written"
                raise LayerError(path, reason, "give yourself the permission to write it")

    def _check_strangers(self, workdir: int) -> None:
        readable = os.open(b".", _READ, dir_fd=workdir)
        try:
            strangers = sorted(set(map(os.fsencode, os.listdir(readable))) - _OWN_ENTRIES)
        finally:
            os.close(readable)
        if strangers:
            reason = f"the work directory holds something else: {os.fsdecode(strangers[0])}"
            raise LayerError(self._work_path, reason, "name an empty directory")
        try:
            if self._taken_over:
                return
            os.stat(b"work/incompat", dir_fd=workdir, follow_symlinks=False)
        except FileNotFoundError:
            return
        reason = "the last volatile mount did not end cleanly, so upper may have lost data"
        remedy = "start with a new upper, or remove work/incompat in it at your own risk"
        raise LayerError(self._work_path, reason, remedy)

    # --- work ---

    def _prepare_staging(self, workdir: int) -> int:
        try:
            os.mkdir(b"work", 0o700, dir_fd=workdir)
        except FileExistsError:
            pass
        work = os.open(b"work", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=workdir)
        self._keep(work)
        for name in _names(work):
            remove_tree(work, name)
        return work

    def _dialect(self, options: MountOptions) -> bytes:
        """`trusted.overlay.` where the caller may set it, else `user.overlay.`."""
        for prefix in (USER,) if options.userxattr else (TRUSTED, USER):
            try:
                syscalls.setxattr(self.work, b"", prefix + b"probe", b"y")
                syscalls.removexattr(self.work, b"", prefix + b"probe")
                return prefix
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
        reason = "the file system keeps no extended attributes, so nothing could be marked"
        raise LayerError(self.path, reason, "put upper and work on one that does")

    def staging_name(self) -> bytes:
        """A free name in `work`."""
        return b"#%x" % next(self._names)

    def discard(self, name: bytes) -> None:
        """Throw away something staged, whatever it is; not being there is fine.

        What cannot be removed now is removed at the end: the change that it was staged for has
        been made, or has failed, already.
        """
        with contextlib.suppress(OSError):
            remove_tree(self.work, name)

    def _leave_volatile_mark(self) -> None:
        os.mkdir(b"incompat", 0o700, dir_fd=self.work)
        os.mkdir(b"incompat/volatile", 0o700, dir_fd=self.work)

    # --- the index of copied-up hard links ---

    def _open_index(self) -> None:
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self.index = self._keep(os.open(b"index", flags, dir_fd=self._workdir))
        except FileNotFoundError:
            return
        for name in _names(self.index):
            self._check_index_entry(name)

    def _check_index_entry(self, name: bytes) -> None:
        """Take a link into account; anything else that lies here is not ours."""
        status = os.stat(name, dir_fd=self.index, follow_symlinks=False)
        try:
            origin = decode_origin(bytes.fromhex(name.decode("ascii")))
        except ValueError:
            origin = None
        if origin is not None and not stat.S_ISDIR(status.st_mode):
            self.index_names.add(name)

    def open_index(self) -> int:
        """The index directory, made when it is first needed."""
        if self.index < 0:
            syscalls.mkdir(self._workdir, b"index", 0o700)
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self.index = self._keep(os.open(b"index", flags, dir_fd=self._workdir))
        return self.index

    def begin_to_settle(self, descriptor: int) -> None:
        """Have the device write, so that `settle` finds less to wait for."""
        if self.keeps_order:
            syscalls.write_back(descriptor, wait=False)

    def settle(self, descriptor: int) -> None:
        """See to it that a file's data survives wherever a change of names after it does."""
        if not self.sync:
            return
        if self.keeps_order:
            syscalls.write_back(descriptor)
        else:
            syscalls.fsync(descriptor, True)

    def sync_all(self) -> None:
        """Bring the whole file system that upper is on to disk."""
        readable = os.open(b".", _READ, dir_fd=self.descriptor)
        try:
            syscalls.syncfs(readable)
        finally:
            os.close(readable)

    # --- the end ---

    def close(self) -> None:
        """Empty the staging directory, take the volatile mark away, and let go of everything."""
        try:
            for name in _names(self.work):
                remove_tree(self.work, name)
        finally:
            self._close_all()

    def _close_all(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def remove_tree(directory: int, name: bytes) -> None:
    """Remove whatever `name` is, with all that it holds; not being there is fine."""
    try:
        syscalls.unlink(directory, name)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        pass
    import shutil

    shutil.rmtree(name, dir_fd=directory)


def _names(directory: int) -> list[bytes]:
    readable = os.open(b".", _READ, dir_fd=directory)
    try:
        return [os.fsencode(name) for name in os.listdir(readable)]
    finally:
        os.close(readable)


def _mount_id(descriptor: int) -> bytes:
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as info:
        for line in info:
            if line.startswith(b"mnt_id:"):
                return line.split()[1]
    return b""


def _is_inside(path: bytes, other: bytes) -> bool:
    path, other = os.path.realpath(path), os.path.realpath(other)
    return path == other or path.startswith(other + b"/")
