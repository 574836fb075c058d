"""Where the members of an image archive come from.

A file and a directory are entered where something is needed; a pipe is read once from front to end,
so its layers are stored as they pass by, before it is known which image wants them.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Protocol, cast

from unionfuse import syscalls
from unionimage.changeset import compression as compressions
from unionimage.changeset.paths import RESOLVE_BENEATH
from unionimage.digest import CHUNK, MAX_JSON, Digest, Readable
from unionimage.errors import BadContent, UserError
from unionimage.progress import Reporter
from unionimage.store import Layer, Lease

_MAX_MEMBERS = 100_000
_MAX_TEXT = 64 << 20  # bytes of all small members of a pipe together
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})\Z")
_NAMED_BY_DIGEST = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.tar)?\Z")


class Source(Protocol):
    """An image archive."""

    def names(self) -> list[str]:
        """The members, in their order."""

    def text(self, name: str) -> bytes | None:
        """A small member; None if there is none. Raises BadContent if it is too large."""

    def layer(
        self, name: str, diff_id: Digest | None, digest: Digest | None, size: int | None
    ) -> Layer:
        """Store a layer unless it is there; what is not None must be so. Raises BadContent."""


def _add_layer(
    lease: Lease,
    report: Reporter,
    stream: Readable,
    length: int,
    diff_id: Digest | None,
    digest: Digest | None,
    size: int | None,
) -> Layer:
    """A layer of a file or directory; one that is there is not unpacked again."""
    known_as = diff_id or digest
    task = report.task(known_as.short if known_as else "layer", "Loading layer", length)
    layer = None if diff_id is None else lease.use_layer(diff_id)
    if layer is None:
        layer = lease.add_layer(
            stream, diff_id=diff_id, digest=digest, size=size, progress=task.advance
        )
        task.done("Loaded")
    else:
        if digest is not None and digest != diff_id and not lease.use_blob(digest):
            lease.add_layer_blob(stream, layer, digest, size)
        task.done("Already exists")
    return layer


class FileSource:
    """An uncompressed tar that can be read at any place."""

    def __init__(self, file: BinaryIO, lease: Lease, report: Reporter) -> None:
        self._lease = lease
        self._report = report
        try:
            self._tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (file is not ours)
            self._members = {_clean(one.name): one for one in _members(self._tar)}
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise BadContent(f"this is no image archive: {error}") from None

    def names(self) -> list[str]:
        return list(self._members)

    def text(self, name: str) -> bytes | None:
        member = self._resolve(name)
        if member is None:
            return None
        if member.size > MAX_JSON:
            raise BadContent(f"{name} in the archive has {member.size} bytes")
        return self._open(member).read()

    def layer(
        self, name: str, diff_id: Digest | None, digest: Digest | None, size: int | None
    ) -> Layer:
        member = self._resolve(name)
        if member is None:
            raise BadContent(f"the archive lacks {name}")
        file = self._open(member)
        return _add_layer(self._lease, self._report, file, member.size, diff_id, digest, size)

    def _open(self, member: tarfile.TarInfo) -> IO[bytes]:
        file = self._tar.extractfile(member)
        assert file is not None
        return file

    def _resolve(self, name: str) -> tarfile.TarInfo | None:
        """A member that is a file; links between members, as docker writes them, are followed."""
        for _ in range(10):
            member = self._members.get(_clean(name))
            if member is None or member.isreg():
                return member
            if not (member.issym() or member.islnk()):
                return None
            above = os.path.dirname(_clean(name)) if member.issym() else ""
            name = os.path.normpath(os.path.join(above, member.linkname))
        raise BadContent(f"{name} in the archive is a link to itself")


class DirectorySource:
    """An OCI image layout in a directory. Names are never followed out of it."""

    def __init__(self, path: Path, lease: Lease, report: Reporter) -> None:
        self._path = path
        self._lease = lease
        self._report = report

    def names(self) -> list[str]:
        blobs = self._path / "blobs/sha256"
        found = (
            [f"blobs/sha256/{name}" for name in sorted(os.listdir(blobs))] if blobs.is_dir() else []
        )
        return sorted(entry.name for entry in os.scandir(self._path) if entry.is_file()) + found

    def text(self, name: str) -> bytes | None:
        with self._open(name) as file:
            if file is None:
                return None
            data = file.read(MAX_JSON + 1)
            if len(data) > MAX_JSON:
                raise BadContent(f"{self._path / name} is larger than {MAX_JSON} bytes")
            return data

    def layer(
        self, name: str, diff_id: Digest | None, digest: Digest | None, size: int | None
    ) -> Layer:
        with self._open(name) as file:
            if file is None:
                raise BadContent(f"{self._path} lacks {name}")
            length = os.fstat(file.fileno()).st_size
            return _add_layer(self._lease, self._report, file, length, diff_id, digest, size)

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO | None]:
        with ExitStack() as stack:
            root = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, root)
            try:
                file = syscalls.openat2(root, os.fsencode(name), os.O_RDONLY, RESOLVE_BENEATH)
            except FileNotFoundError:
                yield None
                return
            except OSError as error:
                raise UserError(f"{self._path / name}: {error.strerror}") from None
            yield stack.enter_context(open(file, "rb"))


class StreamSource:
    """A pipe: all layers in it are stored at once, small members are kept in memory."""

    def __init__(self, stream: Readable, lease: Lease, report: Reporter) -> None:
        self._lease = lease
        self._report = report
        self._texts: dict[str, bytes] = {}
        self._layers: dict[str, Layer] = {}
        self._links: dict[str, str] = {}
        self._order: list[str] = []
        self._room = _MAX_TEXT
        try:
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", bufsize=CHUNK) as archive:
                for member in _members(archive):
                    self._take(archive, member)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise BadContent(f"this is no image archive: {error}") from None
        while stream.read(CHUNK):
            pass

    def names(self) -> list[str]:
        return self._order

    def text(self, name: str) -> bytes | None:
        return self._texts.get(self._resolve(name))

    def layer(
        self, name: str, diff_id: Digest | None, digest: Digest | None, size: int | None
    ) -> Layer:
        layer = self._layers.get(self._resolve(name))
        if layer is None:
            raise BadContent(f"the archive lacks {name}, or it is no layer")
        if diff_id is not None and layer.diff_id != diff_id:
            raise BadContent(f"{name} is layer {layer.diff_id}, not {diff_id} as the config says")
        return layer

    def _resolve(self, name: str) -> str:
        name = _clean(name)
        for _ in range(10):
            if name not in self._links:
                break
            name = self._links[name]
        return name

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = _clean(member.name)
        self._order.append(name)
        if member.issym() or member.islnk():
            above = os.path.dirname(name) if member.issym() else ""
            self._links[name] = os.path.normpath(os.path.join(above, member.linkname))
        if not member.isreg():
            return
        if (known := self._known(name)) is not None:
            self._layers[name] = known
            return
        file = archive.extractfile(member)
        assert file is not None
        stream = compressions.Peekable(file)
        if _is_layer(name, member.size, stream):
            blob = _BLOB.match(name)
            digest = Digest.from_hex(blob[1]) if blob else None
            self._layers[name] = _add_layer(
                self._lease, self._report, stream, member.size, None, digest, member.size
            )
            return
        if member.size > min(MAX_JSON, self._room):
            raise BadContent(f"{name} in the archive has {member.size} bytes")
        self._room -= member.size
        self._texts[name] = file_bytes(stream)

    def _known(self, name: str) -> Layer | None:
        """A layer that the store has, by the digest in its name."""
        match = _NAMED_BY_DIGEST.match(name)
        if match is None:
            return None
        digest = Digest.from_hex(match[1])
        diff_id = self._lease.store.layer_of_blob(digest) or digest
        return self._lease.use_layer(diff_id)


def file_bytes(stream: Readable) -> bytes:
    """All of a small stream."""
    pieces = []
    while data := stream.read(CHUNK):
        pieces.append(data)
    return b"".join(pieces)


def _is_layer(name: str, size: int, stream: compressions.Peekable) -> bool:
    if name.endswith(".tar"):
        return True
    return _BLOB.match(name) is not None and (
        size > MAX_JSON or stream.peek(1) not in (b"{", b"[", b" ", b"\n", b"\t", b"")
    )


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for count, member in enumerate(archive):
        if count > _MAX_MEMBERS:
            raise BadContent(f"the archive has more than {_MAX_MEMBERS} members")
        yield member


def _clean(name: str) -> str:
    return os.path.normpath(name).lstrip("/")
