"""ADD of a local archive: its entries are put below the destination as if that were `/`.

Every entry's parent and every hard link's target is resolved by openat2 with RESOLVE_IN_ROOT on the
open destination, so `..`, absolute names and links in the archive stay inside. Whiteout names mean
nothing here. Source: Dockerfile reference, "ADD" (identity, gzip, bzip2, xz and zstd archives).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import stat
from typing import IO

from unionfuse import syscalls
from unionimage.changeset import compression, tar
from unionimage.digest import Readable
from unionimage.dockerfile.parser import DockerfileError
from unionimage.dockerfile.place import Style, Target, changed_mode
from unionimage.dockerfile.select import CONFINED, KEPT_ATTRIBUTES
from unionimage.errors import BadContent

_KINDS = {
    tar.FILE: stat.S_IFREG,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHAR: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}
_OTHERS = ((b"BZh", "bz2", "BZ2File"), (b"\xfd7zXZ\0", "lzma", "LZMAFile"))
_KEPT = tuple(map(str.encode, KEPT_ATTRIBUTES))


def open_archive(file: IO[bytes]) -> tar.Reader | None:
    """A reader of the entries where a file is an archive, else None; the file must be seekable."""
    probe = _reader(file)
    try:
        found = next(iter(probe), None) is not None
    except (BadContent, OSError, EOFError, ValueError):
        found = False
    file.seek(0)
    return _reader(file) if found else None


def _reader(file: IO[bytes]) -> tar.Reader:
    head = file.read(6)
    file.seek(0)
    stream: Readable = file
    for magic, module, opener in _OTHERS:
        if head.startswith(magic):
            stream = getattr(importlib.import_module(module), opener)(file)
            break
    else:
        stream = compression.decompress(file, compression.sniff(head), "the archive")
    return tar.Reader(stream, what="the archive")


def extract(archive: tar.Reader, directory: int, style: Style) -> None:
    """Extract all entries below an open directory.

    Raises:
        DockerfileError: the archive is damaged, or an entry cannot be put where it wants to be.
    """
    target = Extraction(directory, style)
    try:
        for entry in archive:
            target.add(archive, entry)
    except (BadContent, EOFError, ValueError) as error:
        raise DockerfileError(f"the archive is damaged: {error}") from None
    target.finish()


class Extraction(Target):
    """Entries of one archive on their way into a directory."""

    def add(self, archive: tar.Reader, entry: tar.Entry) -> None:
        """Put one entry into its place."""
        path = clean(entry.name)
        if not path:
            return  # the archive's root: the destination stays as it is
        try:
            self.make_directories(path.rpartition(b"/")[0])
            if entry.kind == tar.DIRECTORY:
                self.make_directories(path)
                with self._opened(path) as directory:
                    self._look(entry, directory, b"")
                self._times.append((path, self._time(entry)))
            else:
                with self._place(path) as (directory, name):
                    self._make(archive, entry, directory, name)
        except OSError as error:
            shown = entry.name.decode("utf-8", "backslashreplace")
            raise DockerfileError(f"cannot extract {shown!r}: {error.strerror}") from None

    def _make(self, archive: tar.Reader, entry: tar.Entry, directory: int, name: bytes) -> None:
        if entry.kind == tar.LINK:
            flags = os.O_PATH | os.O_NOFOLLOW
            source = syscalls.openat2(self.root, clean(entry.link) or b".", flags, CONFINED)
            try:
                os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=directory)
            finally:
                os.close(source)
            return
        if entry.kind == tar.FILE:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(name, flags, 0o600, dir_fd=directory)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                _write(file, archive, entry)
        elif entry.kind == tar.SYMLINK:
            os.symlink(entry.link, name, dir_fd=directory)
        else:
            device = os.makedev(entry.major, entry.minor)
            os.mknod(name, _KINDS[entry.kind] | 0o600, device, dir_fd=directory)
        self._look(entry, directory, name)
        time = self._time(entry)
        os.utime(name, ns=(time, time), dir_fd=directory, follow_symlinks=False)

    def _look(self, entry: tar.Entry, directory: int, name: bytes) -> None:
        """Give a name (empty: the open directory itself) its owner, attributes and mode."""
        self._own(directory, name, self.style.owner or (entry.uid, entry.gid))
        for attribute, value in entry.xattrs.items():
            if attribute.startswith(_KEPT):
                with contextlib.suppress(OSError):  # the file system has no such attributes
                    path = syscalls.proc_path(directory, name)
                    os.setxattr(path, attribute, value, follow_symlinks=not name)
        kind = _KINDS[entry.kind]
        mode = changed_mode(self.style.mode, kind | entry.mode)
        if not name:
            os.fchmod(directory, mode)
        elif kind != stat.S_IFLNK:
            os.chmod(name, mode, dir_fd=directory)

    def _time(self, entry: tar.Entry) -> int:
        return entry.mtime_ns if self.style.time is None else self.style.time


def _write(file: IO[bytes], archive: tar.Reader, entry: tar.Entry) -> None:
    """Write a file's content; what a sparse one leaves out stays a hole."""
    if entry.sparse is None:
        for piece in archive.payload():
            file.write(piece)
        return
    ranges = iter(entry.sparse)
    left = 0
    for whole in archive.payload():
        piece = whole
        while piece:
            while left == 0:
                offset, left = next(ranges)
                file.seek(offset)
            part = piece[:left]
            file.write(part)
            left -= len(part)
            piece = piece[len(part) :]
    file.truncate(entry.real_size)


def clean(name: bytes) -> bytes:
    """A name without `.`, `..`, doubled slashes and a leading slash."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)
