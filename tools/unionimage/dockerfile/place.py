"""Writing files into a root file system that may be hostile.

Every path is resolved by openat2 with RESOLVE_IN_ROOT on the open root, one component after the
other where directories are made; the last component is never followed. A `Target` is any directory:
a mount of the stack so far, or a plain directory that becomes a layer (`--link`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator

from unionfuse import syscalls
from unionimage.dockerfile.parser import DockerfileError
from unionimage.dockerfile.select import (
    CONFINED,
    Entry,
    Found,
    Tree,
    attributes,
    open_file,
    open_in,
    read_link,
)
from unionimage.tuples import NamedTuple

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


class Owner(NamedTuple):
    uid: int
    gid: int


class Style(NamedTuple):
    """How copied files look.

    Attributes:
        owner: of everything (`--chown`); None: root, or as in the source if that keeps owners.
        mode: `--chmod` as it was written; empty: as in the source.
        time: modification time in ns of everything written; None: as in the source.
    """

    owner: Owner | None = None
    mode: str = ""
    time: int | None = None


class Target:
    """A root file system that files are put into."""

    def __init__(self, root: int, style: Style) -> None:
        self.root = root
        self.style = style
        self._links: dict[tuple[int, int], bytes] = {}
        self._times: list[tuple[bytes, int]] = []

    # ---- paths

    def is_directory(self, path: bytes) -> bool:
        """Whether a path, links followed, is a directory."""
        try:
            os.close(open_in(self.root, path, os.O_PATH | os.O_DIRECTORY))
        except OSError:
            return False
        return True

    def make_directories(self, path: bytes) -> None:
        """Make a directory and those above it: 0755, owned by the style's owner or root.

        Directories that are there stay as they are. Raises DockerfileError where something else is
        in the way.
        """
        made = b""
        for part in path.strip(b"/").split(b"/"):
            if not part:
                continue
            parent, made = made, b"/".join((made, part)) if made else part
            if self.is_directory(made):
                continue
            with self._opened(parent) as directory:
                try:
                    os.mkdir(part, 0o755, dir_fd=directory)
                except FileExistsError:
                    shown = os.fsdecode(made)
                    raise DockerfileError(f"/{shown} is in the way: not a directory") from None
                self._own(directory, part, self.style.owner or Owner(0, 0))
                os.chmod(part, 0o755, dir_fd=directory)
                if self.style.time is not None:
                    self._times.append((made, self.style.time))

    @contextlib.contextmanager
    def _opened(self, path: bytes) -> Iterator[int]:
        directory = open_in(self.root, path, _DIRECTORY)
        try:
            yield directory
        finally:
            os.close(directory)

    # ---- copying

    def copy(self, tree: Tree, found: Found, destination: bytes) -> None:
        """Put what a source named to its destination (a `/` at its end: a directory)."""
        is_directory = destination.endswith(b"/")
        path = destination.strip(b"/")
        if not found.is_directory and (is_directory or self.is_directory(path)):
            path = b"/".join(part for part in (path, found.name) if part)
        self.make_directories(path if found.is_directory else path.rpartition(b"/")[0])
        for entry in found.entries:
            if found.is_directory and entry.place == b"":
                continue  # its contents are copied, not the directory itself
            at = b"/".join(part for part in (path, entry.place) if part)
            self._copy_entry(tree, entry, at)

    def finish(self) -> None:
        """Set the times of directories, now that nothing more is put into them."""
        for path, time in reversed(self._times):
            with self._opened(path) as directory:
                os.utime(directory, ns=(time, time))
        self._times.clear()

    def write_document(self, path: bytes, content: bytes) -> None:
        """Write an inline document as a file, 0644 unless the style says otherwise."""
        with self._place(path) as (directory, name):
            descriptor = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=directory
            )
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                os.fchown(descriptor, *(self.style.owner or Owner(0, 0)))
                mode = changed_mode(self.style.mode, stat.S_IFREG | 0o644)
                os.fchmod(descriptor, mode)
            if self.style.time is not None:
                os.utime(name, ns=(self.style.time,) * 2, dir_fd=directory)

    @contextlib.contextmanager
    def _place(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """The open parent of a path and its last name, where nothing but directories may be."""
        parent, _, name = path.rpartition(b"/")
        with self._opened(parent) as directory:
            self._clear(directory, name, os.fsdecode(path))
            yield directory, name

    @staticmethod
    def _clear(directory: int, name: bytes, shown: str) -> None:
        """Remove what is not a directory; a copied file replaces it."""
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            raise DockerfileError(f"cannot copy a file over the directory /{shown}") from None

    def _copy_entry(self, tree: Tree, entry: Entry, at: bytes) -> None:
        kind = stat.S_IFMT(entry.status.st_mode)
        if kind == stat.S_IFDIR:
            self._copy_directory(tree, entry, at)
            return
        with self._place(at) as (directory, name):
            if kind == stat.S_IFREG:
                self._copy_file(tree, entry, directory, name, at)
            elif kind == stat.S_IFLNK:
                os.symlink(read_link(tree.root, entry.path), name, dir_fd=directory)
                self._dress(tree, entry, directory, name, at)
            else:
                os.mknod(name, entry.status.st_mode, entry.status.st_rdev, dir_fd=directory)
                self._dress(tree, entry, directory, name, at)

    def _copy_directory(self, tree: Tree, entry: Entry, at: bytes) -> None:
        parent, _, name = at.rpartition(b"/")
        with self._opened(parent) as directory:
            try:
                os.mkdir(name, 0o700, dir_fd=directory)
            except FileExistsError:
                if not self.is_directory(at):
                    raise DockerfileError(
                        f"cannot copy a directory over the file /{os.fsdecode(at)}"
                    ) from None
        with self._opened(at) as directory:
            self._dress(tree, entry, directory, b"", at)

    def _copy_file(self, tree: Tree, entry: Entry, directory: int, name: bytes, at: bytes) -> None:
        status = entry.status
        if status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), at)
            if first != at:
                source = syscalls.openat2(self.root, first, os.O_PATH | os.O_NOFOLLOW, CONFINED)
                try:
                    os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=directory)
                finally:
                    os.close(source)
                return
        with open_file(tree.root, entry) as source_file:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            target = os.open(name, flags, 0o600, dir_fd=directory)
            try:
                copy_data(source_file.fileno(), target)
                os.fchown(target, *self._owner(tree, status))
                for attribute, value in attributes(source_file.fileno()):
                    with contextlib.suppress(OSError):  # the file system has no such attributes
                        os.setxattr(target, attribute, value)
                os.fchmod(target, changed_mode(self.style.mode, status.st_mode))
                time = status.st_mtime_ns if self.style.time is None else self.style.time
                os.utime(target, ns=(time, time))
            finally:
                os.close(target)

    def _owner(self, tree: Tree, status: os.stat_result) -> Owner:
        if self.style.owner is not None:
            return self.style.owner
        return Owner(status.st_uid, status.st_gid) if tree.keeps_owners else Owner(0, 0)

    @staticmethod
    def _own(directory: int, name: bytes, owner: tuple[int, int]) -> None:
        if name:
            os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
        else:
            os.fchown(directory, *owner)

    def _dress(self, tree: Tree, entry: Entry, directory: int, name: bytes, at: bytes) -> None:
        """Give a name (empty: the open directory itself) its owner, mode and time."""
        status = entry.status
        self._own(directory, name, self._owner(tree, status))
        time = status.st_mtime_ns if self.style.time is None else self.style.time
        if not name:
            os.fchmod(directory, changed_mode(self.style.mode, status.st_mode))
            self._times.append((at, time))
            return
        if not stat.S_ISLNK(status.st_mode):
            mode = changed_mode(self.style.mode, status.st_mode)
            os.chmod(name, mode, dir_fd=directory)
        os.utime(name, ns=(time, time), dir_fd=directory, follow_symlinks=False)


def copy_data(source: int, target: int) -> None:
    """Copy a whole file, in the kernel where it can; holes are not kept."""
    try:
        while os.copy_file_range(source, target, 1 << 30):
            pass
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    os.lseek(source, 0, os.SEEK_SET)
    os.lseek(target, 0, os.SEEK_SET)
    while data := os.read(source, 1 << 20):
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]


_SYMBOLIC = re.compile(r"([ugoa]*)([-+=])([rwxXst]*)")
_SHIFTS = {"u": 6, "g": 3, "o": 0}


def changed_mode(text: str, mode: int) -> int:
    """The permissions after `--chmod=text`: `0755`, or `u=rwX,go=rX` as chmod(1) takes it."""
    old = stat.S_IMODE(mode)
    if not text:
        return old
    if re.fullmatch("[0-7]+", text) and int(text, 8) <= 0o7777:
        return int(text, 8)
    for clause in text.split(","):
        found = _SYMBOLIC.fullmatch(clause)
        if found is None:
            raise DockerfileError(
                f"--chmod={text}: it is octal up to 7777, or symbolic like u=rwX,go=rX"
            )
        old = _clause(old, found, stat.S_ISDIR(mode))
    return old


def _clause(mode: int, found: re.Match[str], is_directory: bool) -> int:
    who, sign, letters = found.groups()
    who = "ugo" if not who or "a" in who else who
    bits = mask = 0
    execute = "x" in letters or ("X" in letters and (is_directory or bool(mode & 0o111)))
    for each in who:
        shift = _SHIFTS[each]
        mask |= 0o7 << shift
        bits |= (4 * ("r" in letters) + 2 * ("w" in letters) + execute) << shift
    if "s" in letters:
        bits |= 0o4000 * ("u" in who) | 0o2000 * ("g" in who)
    if "t" in letters:
        bits |= 0o1000
    if sign == "+":
        return mode | bits
    return mode & ~bits if sign == "-" else mode & ~mask | bits
