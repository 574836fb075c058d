"""Small changes of a tree as data, so that the same can be done to several trees and compared.

An `Action` is a tuple: the name of a method of `Actor`, and its arguments (strings and numbers).
`Actor.do` returns what a caller of the system would see: a value, or the name of the errno.
"""

import contextlib
import errno
import os
import random
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import linux
from harness.layers import Dir, File, HardLink, Layer, Spec, Special, Symlink, Whiteout

Action = tuple[Any, ...]

NAMES = ("a", "b", "c", "d")
XATTRS = ("user.x", "user.y", "trusted.z", "trusted.overlay.opaque")

# what lies below in every test: names of NAMES, three deep, in every relation of two layers
BASE: dict[str, Spec] = {
    "a/a": "base a/a",
    "a/b/a": "base a/b/a",
    "a/b/b/c": "base a/b/b/c",
    "a/c": Symlink("b"),
    "b": File(data="base b", mode=0o4755, xattrs={"user.x": b"base"}),
    "c/a": HardLink("a/a"),
    "c/b": File(data=b"0123456789" * 1000),
    "c/d/a": "base c/d/a",
    "d/a/b": "base d/a/b",
    "d/b": "base d/b",
    "d/c/a/b": "deep",
    "d/d": Special(),
}
TOP: dict[str, Spec] = {
    "a": Dir(mode=0o1777),
    "a/b/d": "top a/b/d",
    "a/d": HardLink("a/b/d"),
    "c": Dir(xattrs={"user.y": b"top"}),
    "c/d": Dir(opaque="kernel"),
    "c/d/b": "top c/d/b",
    "d/b": Whiteout(),
    "d/c/a": "a file over a directory",
}


def in_arenas(layer: Layer, count: int) -> dict[str, Spec]:
    """The layer in each of so many directories, `arena0` and so on."""
    found: dict[str, Spec] = {}
    for number in range(count):
        for path, spec in layer.items():
            if isinstance(spec, HardLink):
                spec = HardLink(f"arena{number}/{spec.to}")
            found[f"arena{number}/{path}"] = spec
    return found


class Actor:
    """Does actions below `root`, a directory, with up to three files open at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[int, int] = {}

    def close_all(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def do(self, action: Action) -> Any:
        name, *arguments = action
        call: Callable[..., Any] = getattr(self, name)
        try:
            return call(*arguments)
        except OSError as error:
            assert error.errno is not None
            return errno.errorcode[error.errno]

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def read(self, path: str) -> bytes:
        descriptor = os.open(self._at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(descriptor, 1 << 20)
        finally:
            os.close(descriptor)

    def stat(self, path: str) -> tuple[Any, ...]:
        info = os.lstat(self._at(path))
        directory = stat.S_ISDIR(info.st_mode)
        size, links = (0, 0) if directory else (info.st_size, info.st_nlink)
        return info.st_mode, info.st_uid, info.st_gid, size, links

    def names(self, path: str) -> list[str]:
        return sorted(os.listdir(self._at(path)))

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def write(self, path: str, offset: int, data: bytes) -> None:
        descriptor = os.open(self._at(path), os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.pwrite(descriptor, data, offset)
        finally:
            os.close(descriptor)

    def append(self, path: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        descriptor = os.open(self._at(path), flags, 0o644)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def replace(self, path: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_NONBLOCK
        descriptor = os.open(self._at(path), flags, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def create(self, path: str, mode: int) -> None:
        os.close(os.open(self._at(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self._at(path), size)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def remove_all(self, path: str) -> None:
        """rm -rf, which stops at the first error."""
        where = self._at(path)
        if stat.S_ISDIR(os.lstat(where).st_mode):
            for name in sorted(os.listdir(where)):
                self.remove_all(f"{path}/{name}")
            os.rmdir(where)
        else:
            os.unlink(where)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self._at(path))

    def mkfifo(self, path: str) -> None:
        os.mkfifo(self._at(path))

    def link(self, old: str, new: str) -> None:
        os.link(self._at(old), self._at(new), follow_symlinks=False)

    def rename(self, old: str, new: str, flags: int) -> None:
        linux.renameat2(self._at(old), self._at(new), flags)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(self._at(path), uid, gid)

    def utime(self, path: str, when: int) -> None:
        os.utime(self._at(path), ns=(when, when), follow_symlinks=False)

    def set_xattr(self, path: str, name: str, value: bytes) -> None:
        os.setxattr(self._at(path), name, value, follow_symlinks=False)

    def remove_xattr(self, path: str, name: str) -> None:
        os.removexattr(self._at(path), name, follow_symlinks=False)

    def list_xattrs(self, path: str) -> list[str]:
        return sorted(os.listxattr(self._at(path), follow_symlinks=False))

    def open(self, slot: int, path: str) -> None:
        """Open for reading and writing, without creating; the slot's file before is closed."""
        if slot in self._open:
            os.close(self._open.pop(slot))
        self._open[slot] = os.open(self._at(path), os.O_RDWR | os.O_NONBLOCK)

    def open_write(self, slot: int, data: bytes) -> int | None:
        return os.write(self._open[slot], data) if slot in self._open else None

    def open_read(self, slot: int) -> bytes | None:
        if slot not in self._open or not self._is_regular(slot):
            return None
        return os.pread(self._open[slot], 1 << 20, 0)

    def open_truncate(self, slot: int, size: int) -> None:
        if slot in self._open:
            os.ftruncate(self._open[slot], size)

    def open_chmod(self, slot: int, mode: int) -> None:
        if slot in self._open:
            os.fchmod(self._open[slot], mode)

    def open_stat(self, slot: int) -> tuple[int, ...] | None:
        if slot not in self._open:
            return None
        info = os.fstat(self._open[slot])
        return info.st_mode, info.st_uid, info.st_size, info.st_nlink

    def open_close(self, slot: int) -> None:
        if slot in self._open:
            with contextlib.suppress(OSError):
                os.close(self._open.pop(slot))

    def _is_regular(self, slot: int) -> bool:
        return stat.S_ISREG(os.fstat(self._open[slot]).st_mode)


class Chooser:
    """Draws actions: `pick(sequence)` is the only source of chance, so hypothesis can be it too."""

    def __init__(self, pick: Callable[[Any], Any]) -> None:
        self._pick = pick

    def path(self) -> str:
        depth = self._pick((1, 1, 2, 2, 2, 3, 3, 4))
        return "/".join(self._pick(NAMES) for _ in range(depth))

    def data(self) -> bytes:
        return self._pick((b"", b"x", b"some data", b"y" * 5000))

    def mode(self) -> int:
        return self._pick((0o644, 0o600, 0o755, 0o4755, 0o2750, 0o1777, 0o000))

    def action(self) -> Action:
        pick, path, slot = self._pick, self.path, self._pick((0, 1, 2))
        kind = pick(_KINDS)
        match kind:
            case "read" | "stat" | "names" | "readlink" | "list_xattrs":
                return kind, path()
            case "unlink" | "rmdir" | "remove_all" | "mkfifo":
                return kind, path()
            case "write":
                return kind, path(), pick((0, 3, 4095, 9_000)), self.data()
            case "append" | "replace":
                return kind, path(), self.data()
            case "create" | "mkdir" | "chmod":
                return kind, path(), self.mode()
            case "truncate":
                return kind, path(), pick((0, 1, 5, 4096, 70_000))
            case "symlink":
                return kind, pick(NAMES), path()
            case "link":
                return kind, path(), path()
            case "rename":
                return kind, path(), path(), pick((0, 0, 0, 0, 1, 2))
            case "chown":
                return kind, path(), pick((0, 7, 4000)), pick((0, 8, 4000))
            case "utime":
                return kind, path(), pick((0, 1, 1_600_000_000_123_456_789))
            case "set_xattr":
                return kind, path(), pick(XATTRS), self.data()
            case "remove_xattr":
                return kind, path(), pick(XATTRS)
            case "open":
                return kind, slot, path()
            case "open_write":
                return kind, slot, self.data()
            case "open_truncate":
                return kind, slot, pick((0, 2, 6000))
            case "open_chmod":
                return kind, slot, self.mode()
            case _:
                return kind, slot


_KINDS = (
    *("rename",) * 8,
    *("unlink", "mkdir", "remove_all", "link", "append") * 3,
    *("create", "rmdir", "replace", "write", "open", "stat", "names", "chmod") * 2,
    *("read", "readlink", "truncate", "symlink", "mkfifo", "chown", "utime"),
    *("set_xattr", "remove_xattr", "list_xattrs"),
    *("open_write", "open_read", "open_truncate", "open_chmod", "open_stat", "open_close"),
)  # fmt: skip


def random_layers(chance: random.Random, count: int) -> list[Layer]:
    """`count` layers, top first, of names out of NAMES with whiteouts and opaque directories.

    Whiteouts lie only in directories that are merged: in others kernel overlayfs, which never makes
    one there, lists them.
    """
    layers: list[Layer] = []
    directories: set[str] = set()  # as the layers made so far show them
    for _ in range(count):
        layer = _random_layer(chance, directories)
        for path, spec in layer.items():
            if not isinstance(spec, Dir) or spec.opaque:
                directories = {d for d in directories if d != path and not d.startswith(path + "/")}
            if isinstance(spec, Dir):
                directories.add(path)
        layers.insert(0, layer)
    return layers


def _random_layer(chance: random.Random, below: set[str]) -> Layer:
    layer: dict[str, Spec] = {}
    files: list[str] = []

    def fill(directory: str, depth: int, merged: bool) -> None:
        for name in NAMES:
            path, kind = f"{directory}/{name}".lstrip("/"), chance.random()
            if kind < 0.3 or (kind < 0.6 and depth == 3):
                continue
            if kind < 0.6:
                opaque = bool(below) and chance.random() < 0.25
                mode = chance.choice((0o755, 0o700, 0o1777, 0o2755))
                layer[path] = Dir(mode=mode, opaque="kernel" if opaque else None)
                fill(path, depth + 1, merged and not opaque and path in below)
            elif kind < 0.7 and merged:
                layer[path] = Whiteout()
            elif kind < 0.75:
                layer[path] = Symlink(chance.choice(NAMES))
            elif kind < 0.8:
                layer[path] = Special()
            elif kind < 0.87 and files:
                layer[path] = HardLink(chance.choice(files))
            else:
                mode = chance.choice((0o644, 0o600, 0o4755))
                layer[path] = File(data=f"{path} in a layer", mode=mode)
                files.append(path)

    fill("", 1, bool(below))
    return layer


def main() -> None:
    """`python -m harness.actions DIR SEED COUNT`: so many in DIR, whatever becomes of each."""
    actor = Actor(Path(sys.argv[1]))
    chooser = Chooser(random.Random(int(sys.argv[2])).choice)
    for _ in range(int(sys.argv[3])):
        actor.do(chooser.action())
    actor.close_all()


if __name__ == "__main__":
    main()
