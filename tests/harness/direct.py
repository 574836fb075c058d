"""The union without a mount: its calls by path, for tests of what lies behind the doors.

Alone in the harness this imports unionfuse, with its hooks for faults in place (see
unionfuse.syscalls): `kill_at` sets them off.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator

from harness.mounts import Stack
from harness.snapshot import KINDS, Record, Tree

# a number that no count reaches: the hooks are put in place, and daemons do not inherit it
os.environ["UNIONFUSE_TEST_KILL_AT"] = "-1"
from unionfuse import syscalls
from unionfuse.express._lane import Loop
from unionfuse.index.builder import build as build_index
from unionfuse.index.lookup import LookupIndex
from unionfuse.layers.layer import LayerStack
from unionfuse.options import MountOptions
from unionfuse.tree.node import Caller, Changes, Entry
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire._attributes import Attributes
from unionfuse.wire.protocol import Opcode

del os.environ["UNIONFUSE_TEST_KILL_AT"]

_ENTRY_SIZE = protocol.ENTRY_OUT.size + protocol.ATTR.size
ROOT_CALLER = Caller(0, 0, os.getpid(), 0o022)


class Direct:
    """One union, its files named by paths relative to the root (str, "" for the root).

    `options` are fields of MountOptions; `indexed` gives it a lookup index of the layers.

    Whatever is looked up or listed is first asked of the compiled loop, which answers from the
    union's tables or not at all: an answer must be the union's.
    """

    def __init__(self, stack: Stack, *, indexed: bool = False, **options: object) -> None:
        parsed = MountOptions(
            lowerdir=tuple(os.fsencode(lower) for lower in stack.lowers),
            upperdir=stack.upper and os.fsencode(stack.upper),
            workdir=stack.work and os.fsencode(stack.work),
            **options,
        )
        layers = LayerStack.open(parsed.lowerdir)
        index = None
        if indexed:
            path = stack.base / "lookup.index"
            if not path.exists():
                build_index(layers.layers).write(os.fsencode(path))
            index = LookupIndex.open(os.fsencode(path))
        self.union = Union(layers, parsed, index)
        self._loop = Loop(-1, lambda *_: None)
        self._loop.use_tables(self.union.tree.tables, True)

    def _ask_loop(self, opcode: Opcode, node: int, body: bytes) -> bytes | None:
        header = protocol.IN_HEADER.pack(40 + len(body), opcode, 1, node, 0, 0, 0, 0, 0)
        answer = self._loop.answer_request(header + body)
        assert answer is None or (answer and answer[0] == 0), answer
        return answer[1] if answer else None

    def _look_up(self, parent: int, name: bytes) -> Entry:
        said = self._ask_loop(Opcode.LOOKUP, parent, name + b"\0")
        number = None if said is None else protocol.ENTRY_OUT.unpack_from(said)[0]
        try:
            entry = self.union.lookup(parent, name)
        except OSError:
            assert not number, f"the loop finds {name!r}"
            raise
        if said is not None:
            assert number == entry.node, f"{name!r}: {number}, not {entry.node}"
            assert said[protocol.ENTRY_OUT.size :] == _in_wire_format(entry.attributes), name
            self.union.forget(entry.node, 1)  # what the loop has counted
        return entry

    def _listed_by_loop(self, directory: int) -> list[bytes] | None:
        """The names that the loop lists in a directory; None where it does not."""
        found, cookie = list[bytes](), 0
        while True:
            body = protocol.READ_IN.pack(0, cookie, 4096, 0, 0, 0, 0)
            data = self._ask_loop(Opcode.READDIRPLUS, directory, body)
            if not data:
                return None if data is None else found
            while data:
                entry, record = data[: protocol.ENTRY_OUT.size], data[_ENTRY_SIZE:]
                _, cookie, length, _ = protocol.DIRENT.unpack_from(record)
                name = record[protocol.DIRENT.size :][:length]
                data = data[(_ENTRY_SIZE + protocol.DIRENT.size + length + 7) & ~7 :]
                if number := protocol.ENTRY_OUT.unpack(entry)[0]:
                    self.union.forget(number, 1)
                if cookie > 2:
                    found.append(name)

    def close(self) -> None:
        self.union.close()

    @contextlib.contextmanager
    def at(self, path: str) -> Iterator[Entry]:
        """The entry of `path`, looked up from the root and forgotten at the end."""
        looked_up, node = [], 1
        entry = Entry(1, self.union.getattr(1), 0.0)
        try:
            for part in path.split("/") if path else ():
                entry = self._look_up(node, os.fsencode(part))
                node = entry.node
                looked_up.append(node)
            yield entry
        finally:
            for node in reversed(looked_up):
                self.union.forget(node, 1)

    @contextlib.contextmanager
    def parent_of(self, path: str) -> Iterator[tuple[int, bytes]]:
        head, _, tail = path.rpartition("/")
        with self.at(head) as entry:
            yield entry.node, os.fsencode(tail)

    def stat(self, path: str) -> Entry:
        with self.at(path) as entry:
            return entry

    def read(self, path: str) -> bytes:
        with self.at(path) as entry:
            handle = self.union.open(entry.node, os.O_RDONLY)
            try:
                return self.union.read(handle, 0, entry.attributes.size)
            finally:
                self.union.release(handle)

    def names(self, path: str) -> list[str]:
        found = []
        with self.at(path) as entry, self.union.lock:
            said = self._listed_by_loop(entry.node)
            for name, _, child in list(self.union.listing(entry.node, 0)):
                found.append(os.fsdecode(name))
                self.union.forget(child.node, 1)
        assert said is None or list(map(os.fsdecode, said)) == found
        return found

    def write(self, path: str, data: bytes, offset: int = 0) -> None:
        with self.at(path) as entry:
            handle = self.union.open(entry.node, os.O_RDWR)
            try:
                self.union.write(handle, offset, data)
            finally:
                self.union.release(handle)

    def create(self, path: str, data: bytes = b"", mode: int = 0o644) -> None:
        with self.parent_of(path) as (node, name):
            entry, handle = self.union.create(
                node, name, stat.S_IFREG | mode, os.O_RDWR, ROOT_CALLER
            )
            if data:
                self.union.write(handle, 0, data)
            self.union.release(handle)
            self.union.forget(entry.node, 1)

    def _made(self, entry: Entry) -> None:
        self.union.forget(entry.node, 1)

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        with self.parent_of(path) as (node, name):
            self._made(self.union.mkdir(node, name, stat.S_IFDIR | mode, ROOT_CALLER))

    def symlink(self, target: str, path: str) -> None:
        with self.parent_of(path) as (node, name):
            self._made(self.union.symlink(node, name, os.fsencode(target), ROOT_CALLER))

    def mkfifo(self, path: str) -> None:
        with self.parent_of(path) as (node, name):
            self._made(self.union.mknod(node, name, stat.S_IFIFO | 0o644, 0, ROOT_CALLER))

    def link(self, old: str, new: str) -> None:
        with self.at(old) as entry, self.parent_of(new) as (node, name):
            self._made(self.union.link(entry.node, node, name))

    def unlink(self, path: str) -> None:
        with self.parent_of(path) as (node, name):
            self.union.unlink(node, name)

    def rmdir(self, path: str) -> None:
        with self.parent_of(path) as (node, name):
            self.union.rmdir(node, name)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        with self.parent_of(old) as source, self.parent_of(new) as target:
            self.union.rename(*source, *target, flags)

    def change(self, path: str, **changes: int) -> None:
        with self.at(path) as entry:
            self.union.setattr(entry.node, Changes(**changes))

    def readlink(self, path: str) -> bytes:
        with self.at(path) as entry:
            return self.union.readlink(entry.node)

    def set_xattr(self, path: str, name: str, value: bytes) -> None:
        with self.at(path) as entry:
            self.union.setxattr(entry.node, name.encode(), value)

    def xattrs(self, path: str) -> dict[str, bytes]:
        with self.at(path) as entry:
            names = self.union.listxattr(entry.node, os.getpid())
            return {name.decode(): self.union.getxattr(entry.node, name) for name in names}

    def snapshot(self) -> Tree:
        """As harness.snapshot.snapshot; contents are hashed in another way, so do not mix them."""
        tree: Tree = {}
        pending = [""]
        while pending:
            path = pending.pop()
            tree[os.fsencode(path or ".")] = record = self._record(path)
            if record.kind == "directory":
                pending += [f"{path}/{name}".lstrip("/") for name in self.names(path)]
        return tree

    def _record(self, path: str) -> Record:
        found = self.stat(path).attributes
        kind = KINDS[stat.S_IFMT(found.mode)]
        device = (os.major(found.rdev), os.minor(found.rdev))
        content = hashlib.blake2b(self.read(path)).hexdigest() if kind == "file" else None
        return Record(
            kind=kind,
            mode=f"{stat.S_IMODE(found.mode):04o}",
            uid=found.uid,
            gid=found.gid,
            size=found.size if kind in ("file", "symlink") else None,
            content=content,
            nlink=None if kind == "directory" else found.nlink,
            xattrs=tuple((n, v.hex()) for n, v in sorted(self.xattrs(path).items())),
            rdev=device if kind.endswith("device") else None,
            target=self.readlink(path) if kind == "symlink" else None,
        )


def _in_wire_format(shown: Attributes) -> bytes:
    times = [divmod(ns, 10**9) for ns in (shown.atime_ns, shown.mtime_ns, shown.ctime_ns)]
    seconds, nanoseconds = zip(*times, strict=True)
    owner = (shown.mode, shown.nlink, shown.uid, shown.gid)
    sizes = shown.ino, shown.size, shown.blocks
    return protocol.ATTR.pack(*sizes, *seconds, *nanoseconds, *owner, shown.rdev, shown.blksize, 0)


def kill_at(number: int) -> None:
    """Have this process killed before the changing system call `number`, counted from now."""
    syscalls._faults.count = 0
    syscalls._faults.kill_at = number


def fail_at(number: int, code: int) -> None:
    """Have the changing system call `number`, counted from now, fail with the errno `code`.

    0 ends it.
    """
    syscalls._faults.count = 0
    syscalls._faults.fail_at = number
    syscalls._faults.fail_errno = code


def changing_calls() -> int:
    """The number of changing system calls since the last `kill_at` or `fail_at`."""
    return syscalls._faults.count
