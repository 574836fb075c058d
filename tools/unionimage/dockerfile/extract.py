"""ADD of a local archive: its members are put below the destination as if that were `/`.

Every member's parent and every hard link's target is resolved by openat2 with RESOLVE_IN_ROOT on
the open destination, so `..`, absolute names and links in the archive stay inside. Whiteout names
mean nothing here. Source: Dockerfile reference, "ADD" (identity, gzip, bzip2, xz and zstd
archives).
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from unionfuse import syscalls
from unionimage.dockerfile.parser import DockerfileError
from unionimage.dockerfile.place import Style, Target, changed_mode
from unionimage.dockerfile.select import CONFINED

_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_CHUNK = 1 << 20


def compression(head: bytes) -> str:
    """`gz`, `bz2`, `xz`, `zst` or empty by the first bytes of a file."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


@contextlib.contextmanager
def open_archive(file: IO[bytes]) -> Iterator[tarfile.TarFile | None]:
    """The file as a tar, read as a stream; None where it is none. The file must be seekable."""
    kind = compression(file.read(512))
    file.seek(0)
    with contextlib.ExitStack() as stack:
        stream: Any = file
        mode: Any = f"r|{kind}"
        if kind == "zst":
            import zstandard

            stream = stack.enter_context(zstandard.ZstdDecompressor().stream_reader(file))
            mode = "r|"
        try:
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode=mode))
        except (tarfile.TarError, EOFError, OSError, ValueError):
            file.seek(0)
            yield None
            return
        yield archive


def is_archive(file: IO[bytes]) -> bool:
    """Whether ADD extracts this file; leaves it at its beginning."""
    with open_archive(file) as archive:
        found = archive is not None
    file.seek(0)
    return found


def extract(archive: tarfile.TarFile, directory: int, style: Style) -> None:
    """Extract all members below an open directory.

    Raises:
        DockerfileError: the archive is damaged, or a member cannot be put where it wants to be.
    """
    target = Extraction(directory, style)
    try:
        for member in archive:
            target.add(archive, member)
    except (tarfile.TarError, EOFError) as error:
        raise DockerfileError(f"the archive is damaged: {error}") from None
    target.finish()


class Extraction(Target):
    """Members of one archive on their way into a directory."""

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Put one member into its place."""
        path = _clean(member.name)
        if not path:
            return  # the archive's root: the destination stays as it is
        try:
            self.make_directories(path.rpartition(b"/")[0])
            if member.isdir():
                self._directory(member, path)
            else:
                with self._place(path) as (directory, name):
                    self._other(archive, member, directory, name)
        except OSError as error:
            shown = member.name.encode("utf-8", "backslashreplace").decode()
            raise DockerfileError(f"cannot extract {shown!r}: {error.strerror}") from None

    def _directory(self, member: tarfile.TarInfo, path: bytes) -> None:
        self.make_directories(path)
        with self._opened(path) as directory:
            self._finish(member, directory, b"", stat.S_IFDIR)
        self._times.append((path, self._time(member)))

    def _other(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, directory: int, name: bytes
    ) -> None:
        if member.isreg():
            descriptor = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory
            )
            with os.fdopen(descriptor, "wb") as file:
                source = archive.extractfile(member)
                assert source is not None
                while data := source.read(_CHUNK):
                    file.write(data)
            self._finish(member, directory, name, stat.S_IFREG)
        elif member.islnk():
            source_fd = syscalls.openat2(
                self.root, _clean(member.linkname), os.O_PATH | os.O_NOFOLLOW, CONFINED
            )
            try:
                os.link(f"/proc/self/fd/{source_fd}", name, dst_dir_fd=directory)
            finally:
                os.close(source_fd)
        elif member.issym():
            os.symlink(os.fsencode(member.linkname), name, dir_fd=directory)
            self._finish(member, directory, name, stat.S_IFLNK)
        else:
            kinds = {
                tarfile.CHRTYPE: stat.S_IFCHR,
                tarfile.BLKTYPE: stat.S_IFBLK,
                tarfile.FIFOTYPE: stat.S_IFIFO,
            }
            kind = kinds.get(member.type)
            if kind is None:
                raise DockerfileError(f"{member.name!r} has a type that is not known here")
            device = os.makedev(member.devmajor, member.devminor)
            os.mknod(name, kind | 0o600, device, dir_fd=directory)
            self._finish(member, directory, name, kind)

    def _finish(self, member: tarfile.TarInfo, directory: int, name: bytes, kind: int) -> None:
        owner = self.style.owner or (member.uid, member.gid)
        mode = changed_mode(self.style.mode, kind | stat.S_IMODE(member.mode))
        if not name:
            os.fchown(directory, *owner)
            os.fchmod(directory, mode)
            return
        os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
        self._attributes(member, directory, name)
        if kind != stat.S_IFLNK:
            os.chmod(name, mode, dir_fd=directory)
        os.utime(name, ns=(self._time(member),) * 2, dir_fd=directory, follow_symlinks=False)

    def _attributes(self, member: tarfile.TarInfo, directory: int, name: bytes) -> None:
        prefix = "SCHILY.xattr."
        for key, value in member.pax_headers.items():
            attribute = key.removeprefix(prefix)
            if attribute == key or not attribute.startswith(("security.capability", "user.")):
                continue
            with contextlib.suppress(OSError):  # the file system has no such attributes
                os.setxattr(
                    syscalls.proc_path(directory, name),
                    attribute,
                    value.encode("utf-8", "surrogateescape"),
                    follow_symlinks=False,
                )

    def _time(self, member: tarfile.TarInfo) -> int:
        return round(member.mtime * 10**9) if self.style.time is None else self.style.time


def _clean(name: str) -> bytes:
    parts: list[bytes] = []
    for part in os.fsencode(name).split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def extract_context(file: IO[bytes], directory: int) -> bool:
    """Extract a build context that came as a tar into an open, empty directory; False: no tar."""
    with open_archive(file) as archive:
        if archive is None:
            return False
        extract(archive, directory, Style())
    return True
