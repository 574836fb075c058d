"""Tars to unpack, made by the standard library: the code under test reads layers by itself."""

import io
import os
import tarfile
from pathlib import Path

from unionimage.changeset import tar
from unionimage.changeset.unpack import Unpacked, unpack


def member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=form) as made:
        for info, data in members:
            made.addfile(info, io.BytesIO(data))
    return output.getvalue()


def unpack_to(directory: Path, data: bytes, **options: object) -> Unpacked:
    directory.mkdir(exist_ok=True)
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return unpack(io.BytesIO(data), opened, **options)
    finally:
        os.close(opened)


def entries(data: bytes) -> list[tar.Entry]:
    return list(tar.Reader(io.BytesIO(data)))


def tree(directory: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a tree that a layer keeps: for comparing two of them."""
    found: dict[str, tuple[object, ...]] = {}
    groups: dict[tuple[int, int], str] = {}
    for above, directories, files in os.walk(directory):
        for name in sorted(directories + files):
            path = Path(above, name)
            status = path.lstat()
            content: object = None
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            elif path.is_char_device() or path.is_block_device():
                content = status.st_rdev
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            shown = str(path.relative_to(directory))
            first = groups.setdefault((status.st_dev, status.st_ino), shown)
            times = None if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
            found[shown] = (
                status.st_mode, status.st_uid, status.st_gid, times, content, xattrs,
                first if status.st_nlink > 1 and not path.is_dir() else None,
            )  # fmt: skip
    return found
