"""Layer directories from a compact description.

A layer is a dict from path to what lies there::

    build(directory, {
        "etc/passwd": "root:x:0:0",           # str or bytes: a file with this content
        "gone": None,                         # None: a whiteout, as kernel overlayfs makes it
        "run": Symlink("var/run"),
        "var": Dir(mode=0o1777, opaque="kernel"),
        "bin/sh": HardLink("bin/dash"),
    })

Parents are made as needed (0755). The order of the dict does not matter, apart from hard links,
which come after their target. `flatten` does the same to a plain directory, layer after layer, the
way a union would show it.
"""

import os
import shutil
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

OPAQUE_XATTRS = {
    "kernel": "trusted.overlay.opaque",
    "userxattr": "user.overlay.opaque",
    "fuse-overlayfs": "user.fuseoverlayfs.opaque",
}
WHITEOUT_DIALECTS = ("device", "aufs", "xattr", "userxattr")
OPAQUE_DIALECTS = (*OPAQUE_XATTRS, "aufs")

# 2021-03-04 05:06:07.123456789: nanoseconds that a float does not hold
MTIME_NS = 1614834367_123456789


@dataclass(frozen=True)
class Node:
    """What every kind of file has. None leaves what the system gives."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = MTIME_NS
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class File(Node):
    """A regular file: `data`, then `parts` at their offsets, then cut or grown to `size`."""

    data: bytes | str = b""
    parts: Mapping[int, bytes] = field(default_factory=dict)
    size: int | None = None


@dataclass(frozen=True)
class Dir(Node):
    """A directory. `opaque` is None or one of OPAQUE_DIALECTS."""

    opaque: str | None = None


@dataclass(frozen=True)
class Symlink(Node):
    target: str | bytes = ""

    def __init__(self, target: str | bytes, **common: object) -> None:
        object.__setattr__(self, "target", target)
        for name, value in vars(Node(**common)).items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Special(Node):
    """A FIFO, socket or device: `kind` is its stat.S_IF… value."""

    kind: int = stat.S_IFIFO
    device: int = 0


@dataclass(frozen=True)
class HardLink:
    """Another name of the file at `to`, a path in the same layer."""

    to: str


@dataclass(frozen=True)
class Whiteout:
    """What hides a name in the layers below; `dialect` is one of WHITEOUT_DIALECTS."""

    dialect: str = "device"


Spec = Node | HardLink | Whiteout | str | bytes | None
Layer = Mapping[str, Spec]


def normalised(spec: Spec) -> Node | HardLink | Whiteout:
    if spec is None:
        return Whiteout()
    if isinstance(spec, str | bytes):
        return File(data=spec)
    return spec


def build(directory: Path, layer: Layer) -> Path:
    """Make `layer` in `directory`, which is made too, and return it. Key "." is the directory."""
    umask = os.umask(0o022)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, spec in layer.items():
            _place(directory, path, normalised(spec))
        _date(directory, layer)
    finally:
        os.umask(umask)
    return directory


def flatten(directory: Path, layers: list[Layer]) -> None:
    """Make in `directory` the tree that a union of `layers` (top first) shows."""
    directory.mkdir(parents=True, exist_ok=True)
    for layer in reversed(layers):
        for path, raw in layer.items():
            spec, target = normalised(raw), directory / path
            if isinstance(spec, Whiteout):
                _remove(target)
                continue
            _clear_way(directory, path, keeps_directory=isinstance(spec, Dir))
            if isinstance(spec, Dir):
                if spec.opaque and target.is_dir():
                    for name in os.listdir(target):
                        _remove(target / name)
                spec = replace(spec, opaque=None)
            _place(directory, path, spec)
        _date(directory, layer)


def _clear_way(root: Path, path: str, *, keeps_directory: bool) -> None:
    target, parent = root / path, root
    for part in Path(path).parts[:-1]:
        parent = parent / part
        if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir()):
            parent.unlink()
    is_directory = target.is_dir() and not target.is_symlink()
    if os.path.lexists(target) and not (keeps_directory and is_directory):
        _remove(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _place(root: Path, path: str, spec: Node | HardLink | Whiteout) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    match spec:
        case HardLink(to):
            os.link(root / to, target, follow_symlinks=False)
            return
        case Whiteout(dialect):
            _whiteout(target, dialect)
            return
        case Dir():
            target.mkdir(exist_ok=True)
        case Symlink():
            os.symlink(
                spec.target, os.fsencode(target) if isinstance(spec.target, bytes) else target
            )
        case File():
            _write(target, spec)
        case Special(kind=stat.S_IFSOCK):
            _bind(target)
        case Special(kind=kind, device=device):
            os.mknod(target, kind | 0o644, device)
    if spec.uid is not None or spec.gid is not None:
        os.chown(
            target,
            -1 if spec.uid is None else spec.uid,
            -1 if spec.gid is None else spec.gid,
            follow_symlinks=False,
        )
    if spec.mode is not None and not isinstance(spec, Symlink):
        os.chmod(target, spec.mode)
    for name, value in spec.xattrs.items():
        os.setxattr(target, name, value, follow_symlinks=False)
    if isinstance(spec, Dir) and spec.opaque:
        make_opaque(target, spec.opaque)


def _write(target: Path, spec: File) -> None:
    data = spec.data.encode() if isinstance(spec.data, str) else spec.data
    with open(target, "xb") as file:
        file.write(data)
        for offset, part in spec.parts.items():
            file.seek(offset)
            file.write(part)
        if spec.size is not None:
            file.truncate(spec.size)


def _bind(target: Path) -> None:
    # by a descriptor of its directory: a socket's path is limited to 108 bytes
    parent = os.open(target.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{parent}/{target.name}")
    finally:
        os.close(parent)


def make_opaque(directory: Path, dialect: str) -> None:
    if dialect == "aufs":
        (directory / ".wh..wh..opq").touch()
    else:
        os.setxattr(directory, OPAQUE_XATTRS[dialect], b"y")


def _whiteout(target: Path, dialect: str) -> None:
    match dialect:
        case "device":
            os.mknod(target, stat.S_IFCHR, 0)
        case "aufs":
            (target.parent / f".wh.{target.name}").touch()
        case "xattr" | "userxattr":  # Linux 6.7, fs/overlayfs: the directory says "x"
            prefix = "trusted" if dialect == "xattr" else "user"
            target.touch()
            os.setxattr(target, f"{prefix}.overlay.whiteout", b"y")
            if target.parent.exists() and f"{prefix}.overlay.opaque" not in os.listxattr(
                target.parent
            ):
                os.setxattr(target.parent, f"{prefix}.overlay.opaque", b"x")
        case _:
            raise ValueError(dialect)


def _date(root: Path, layer: Layer) -> None:
    """Set the times last: making a name changes those of its directory."""
    for path, raw in layer.items():
        spec = normalised(raw)
        if isinstance(spec, Node) and spec.mtime_ns is not None:
            os.utime(root / path, ns=(spec.mtime_ns, spec.mtime_ns), follow_symlinks=False)
