"""`cp`: files into and out of a container, as a tar stream between two processes.

The process on the container's side first makes the container's root its own (chroot), so no link in
there can lead it out. On the host's side only a stream that we wrote ourselves is unpacked. Owners
go to whoever runs the command, or stay with `archive`, as docker does it. Extended attributes that
say something about the file (`security.capability`, `user.*`) go with it.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from unionimage.errors import UserError

Owner = tuple[int, int] | None
StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

XATTR = "SCHILY.xattr."  # how GNU tar and docker spell them in pax headers
BOOKKEEPING = ("user.containers.", "user.overlay.")  # notes of union file systems to themselves


def out(root: Path, source: str, target: str, *, archive: bool, follow: bool) -> None:
    """Copy `source` in the container to `target` on the host (docker cp's rules)."""
    kind = look(root, source, follow)
    if kind == "":
        raise UserError(f"could not find the file {source} in the container")
    base = posixpath.basename(posixpath.normpath(source))
    directory, name = _destination(_kind_here(target), kind, source, base, target)
    owner = None if archive else (os.geteuid(), os.getegid())
    with _sender(root, source, name, follow) as stream:
        _unpack(stream, os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY), owner)


def out_stream(root: Path, source: str, stream: IO[bytes], *, follow: bool) -> None:
    """Write `source` as a tar to a stream."""
    if look(root, source, follow) == "":
        raise UserError(f"could not find the file {source} in the container")
    base = posixpath.basename(posixpath.normpath(source)) or "."
    with _sender(root, source, base, follow) as sent:
        while data := sent.read(1 << 16):
            stream.write(data)
    stream.flush()


def into(root: Path, source: str, target: str, *, archive: bool, follow: bool) -> None:
    """Copy `source` on the host to `target` in the container (docker cp's rules)."""
    kind = _kind_here(source, follow)
    if kind == "":
        raise UserError(f"{source}: no such file or directory")
    base = os.path.basename(os.path.abspath(source))
    directory, name = _destination(look(root, target, True), kind, source, base, target)
    if look(root, directory or "/", True) != "directory":
        raise UserError(f"could not find the directory {directory} in the container")
    owner = None if archive else (0, 0)

    def send(file: IO[bytes]) -> None:
        _pack(os.path.abspath(source), name, follow, file)

    with _Piped(send) as stream:
        _receiver(root, directory or "/", stream, owner)


def into_from_stream(root: Path, stream: IO[bytes], target: str) -> None:
    """Unpack a tar into a directory of the container; owners are those of the tar."""
    if look(root, target, True) != "directory":
        raise UserError(f"could not find the directory {target} in the container")
    _receiver(root, target, stream, None)


def _destination(there: str, kind: str, source: str, base: str, target: str) -> tuple[str, str]:
    """Where to unpack, and the name that the copied thing gets there ("." : its contents)."""
    if there == "directory":
        contents = kind == "directory" and posixpath.basename(source.rstrip("/") or "/") == "."
        return target, "." if contents or base in ("", "/") else base
    if there == "file":
        if kind == "directory":
            raise UserError(f"cannot copy the directory {source} onto the file {target}")
    elif target.endswith("/") and kind != "directory":
        raise UserError(f"the directory {target} does not exist")
    directory, name = posixpath.split(target.rstrip("/"))
    return directory, name


def _kind_here(path: str, follow: bool = True) -> str:
    if not os.path.lexists(path) or (follow and not os.path.exists(path)):
        return ""
    if os.path.isdir(path) and (follow or not os.path.islink(path)):
        return "directory"
    return "file"


def look(root: Path, path: str, follow: bool) -> str:
    """`directory`, `file` (or anything else) or "" for nothing, seen from inside the root."""
    reader, writer = os.pipe2(os.O_CLOEXEC)

    def inside() -> None:
        os.write(writer, _kind_here(posixpath.join("/", path), follow).encode())

    pid = _child(root, inside)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    return answer


class _Piped:
    """Runs a function that writes in a child process; reads what it writes."""

    def __init__(self, send: Callable[[IO[bytes]], None], root: Path | None = None) -> None:
        self._send, self._root = send, root

    def __enter__(self) -> IO[bytes]:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        errors, tell = os.pipe2(os.O_CLOEXEC)

        def act() -> None:
            os.close(reader)
            try:
                with os.fdopen(writer, "wb") as file:
                    self._send(file)
            except BrokenPipeError:
                pass
            except OSError as error:
                os.write(tell, f"{error.filename or ''}: {error.strerror}".encode())

        self._pid = _child(self._root, act)
        os.close(writer)
        os.close(tell)
        self._errors = errors
        self._stream = os.fdopen(reader, "rb")
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.close()
        with os.fdopen(self._errors, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        os.waitpid(self._pid, 0)
        if said and kind is None:
            raise UserError(said)


def _sender(root: Path, source: str, name: str, follow: bool) -> _Piped:
    def send(file: IO[bytes]) -> None:
        _pack(posixpath.join("/", source), name, follow, file)

    return _Piped(send, root)


def _receiver(root: Path, directory: str, stream: IO[bytes], owner: Owner) -> None:
    errors, tell = os.pipe2(os.O_CLOEXEC)

    def act() -> None:
        try:
            _unpack(stream, os.open(directory, os.O_RDONLY | os.O_DIRECTORY), owner)
        except (OSError, tarfile.TarError) as error:
            os.write(tell, str(getattr(error, "strerror", None) or error).encode())

    pid = _child(root, act)
    os.close(tell)
    with os.fdopen(errors, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    os.waitpid(pid, 0)
    if said:
        raise UserError(f"{directory}: {said}")


def _child(root: Path | None, action: Callable[[], None]) -> int:
    """Fork; the child takes `root` for its root directory, acts, and ends."""
    "é".encode("idna")  # codecs are imported now: there is no Python inside the root
    tarfile.open(fileobj=io.BytesIO(), mode="w").close()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if root is not None:
                os.chroot(root)
                os.chdir("/")
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def _pack(path: str, name: str, follow: bool, file: IO[bytes]) -> None:
    if follow:
        path = os.path.realpath(path)

    def with_xattrs(member: tarfile.TarInfo) -> tarfile.TarInfo:
        place = os.path.normpath(path + member.name.removeprefix(name))
        member.pax_headers = {XATTR + key: value for key, value in _xattrs(place)}
        return member

    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        tar.add(path, arcname=name, filter=with_xattrs)


def _xattrs(path: str) -> Iterator[tuple[str, str]]:
    try:
        for key in os.listxattr(path, follow_symlinks=False):
            wanted = key.startswith("user.") and not key.startswith(BOOKKEEPING)
            if wanted or key == "security.capability":
                value = os.getxattr(path, key, follow_symlinks=False)
                yield key, value.decode("utf-8", "surrogateescape")
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENODATA, errno.ENOENT):
            raise


class _Tar(tarfile.TarFile):
    def utime(self, tarinfo: tarfile.TarInfo, targetpath: StrOrBytesPath) -> None:
        """The last attribute that is set: chown, before it, takes file capabilities away."""
        super().utime(tarinfo, targetpath)
        for key, value in tarinfo.pax_headers.items():
            if key.startswith(XATTR):
                data = value.encode("utf-8", "surrogateescape")
                try:
                    os.setxattr(targetpath, key.removeprefix(XATTR), data, follow_symlinks=False)
                except OSError as error:  # what this side cannot keep is left out, as by docker
                    if error.errno not in (errno.ENOTSUP, errno.EPERM):
                        raise


def _unpack(stream: IO[bytes], directory: int, owner: Owner) -> None:
    """Unpack below a directory, replacing what is there but never following it out of its place."""
    os.fchdir(directory)
    os.close(directory)

    def prepared(member: tarfile.TarInfo, _: str) -> tarfile.TarInfo:
        if owner is not None:
            member.uid, member.gid = owner
        member.uname = member.gname = ""  # numbers count: names may mean others on this side
        name = member.name
        if os.path.lexists(name) and not (member.isdir() and os.path.isdir(name)):
            if os.path.isdir(name) and not os.path.islink(name):
                raise IsADirectoryError(21, "is a directory", name)
            os.unlink(name)
        return member

    with _Tar.open(fileobj=stream, mode="r|*") as tar:
        tar.extraction_filter = staticmethod(prepared)
        tar.extractall(".", numeric_owner=True)
