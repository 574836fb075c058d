"""The union without a mount against a model that is a dict, by a hypothesis state machine.

Cases that the kernel settles before it asks a file system (a directory into itself, a file over a
directory, one link over another of the same file) are not asked here; tests/mount asks them.
"""

import dataclasses
import errno
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from harness.direct import Direct
from harness.layers import Dir, File, HardLink, Spec, Symlink
from harness.linux import RENAME_EXCHANGE, RENAME_NOREPLACE
from harness.mounts import Stack, staging_files
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

NAMES = ("a", "b", "c")
LAYERS: tuple[dict[str, Spec], ...] = (
    {"a/top": "top", "b": None, "c/a": "hides a directory", "d": Dir(opaque="kernel"), "d/x": "x"},
    {
        "a/a/b": "deep",
        "a/b": File(data="file", mode=0o640, xattrs={"user.x": b"1"}),
        "a/c": HardLink("a/b"),
        "b/a": "was deleted",
        "c/a/b": "hidden",
        "c/b": Symlink("a"),
        "c/c": HardLink("a/b"),
        "d/hidden": "",
    },
)


@dataclasses.dataclass(eq=False)
class Inode:
    """One file of the model; several paths may share it."""

    kind: str
    data: bytes = b""  # or the target of a symlink
    mode: int = 0o644
    xattrs: dict[str, bytes] = dataclasses.field(default_factory=dict)


def initial_model() -> dict[str, Inode]:
    linked = Inode("file", b"file", 0o640, {"user.x": b"1"})
    tree = {path: Inode("directory", mode=0o755) for path in ("", "a", "a/a", "c", "d")}
    tree |= {"a/top": Inode("file", b"top"), "a/a/b": Inode("file", b"deep")}
    tree |= {"a/b": linked, "a/c": linked, "c/c": linked}
    tree |= {"c/a": Inode("file", b"hides a directory"), "c/b": Inode("symlink", b"a", 0o777)}
    tree |= {"d/x": Inode("file", b"x")}
    return tree


class UnionAsDict(RuleBasedStateMachine):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="unionfuse-test-"))
        self.stack = Stack.make(self.base / "stack", LAYERS)
        self.union = Direct(self.stack, **self.options)
        self.tree = initial_model()

    def teardown(self) -> None:
        self.union.close()
        assert self.stack.work is not None
        assert staging_files(self.stack.work) == []
        shutil.rmtree(self.base)

    # --- drawing what is there ---

    def _pick(self, data: st.DataObject, *kinds: str) -> str | None:
        found = sorted(path for path, inode in self.tree.items() if path and inode.kind in kinds)
        return data.draw(st.sampled_from(found)) if found else None

    def _place(self, data: st.DataObject) -> str:
        directories = sorted(p for p, inode in self.tree.items() if inode.kind == "directory")
        parent = data.draw(st.sampled_from(directories))
        return f"{parent}/{data.draw(st.sampled_from(NAMES))}".lstrip("/")

    def _children(self, path: str) -> list[str]:
        return [other for other in self.tree if other.startswith(path + "/")]

    def _expect(self, wanted: int | None, call: Callable[..., None], *arguments: Any) -> bool:
        """Make the call; it must fail with errno `wanted` (None: succeed). Say if it succeeded."""
        try:
            call(*arguments)
        except OSError as error:
            assert error.errno == wanted, f"{error} instead of {wanted and errno.errorcode[wanted]}"
            return False
        assert wanted is None, f"succeeded instead of {errno.errorcode[wanted]}"
        return True

    # --- the rules ---

    @rule(data=st.data(), content=st.binary(max_size=9))
    def create(self, data: st.DataObject, content: bytes) -> None:
        path = self._place(data)
        wanted = errno.EEXIST if path in self.tree else None
        if self._expect(wanted, self.union.create, path, content, 0o600):
            self.tree[path] = Inode("file", content, 0o600)

    @rule(data=st.data())
    def mkdir(self, data: st.DataObject) -> None:
        path = self._place(data)
        wanted = errno.EEXIST if path in self.tree else None
        if self._expect(wanted, self.union.mkdir, path, 0o750):
            self.tree[path] = Inode("directory", mode=0o750)

    @rule(data=st.data())
    def symlink(self, data: st.DataObject) -> None:
        path = self._place(data)
        wanted = errno.EEXIST if path in self.tree else None
        if self._expect(wanted, self.union.symlink, "target", path):
            self.tree[path] = Inode("symlink", b"target", 0o777)

    @rule(data=st.data(), content=st.binary(min_size=1, max_size=9), offset=st.integers(0, 12))
    def write(self, data: st.DataObject, content: bytes, offset: int) -> None:
        if path := self._pick(data, "file"):
            self.union.write(path, content, offset)
            old = self.tree[path].data.ljust(offset, b"\0")
            self.tree[path].data = old[:offset] + content + old[offset + len(content) :]

    @rule(data=st.data(), size=st.integers(0, 20))
    def truncate(self, data: st.DataObject, size: int) -> None:
        if path := self._pick(data, "file"):
            self.union.change(path, size=size)
            self.tree[path].data = self.tree[path].data[:size].ljust(size, b"\0")

    @rule(data=st.data(), mode=st.sampled_from((0o600, 0o755, 0o1777)))
    def chmod(self, data: st.DataObject, mode: int) -> None:
        if path := self._pick(data, "file", "directory"):
            self.union.change(path, mode=mode)
            self.tree[path].mode = mode

    @rule(data=st.data(), name=st.sampled_from(("user.x", "user.y")), value=st.binary(max_size=5))
    def set_xattr(self, data: st.DataObject, name: str, value: bytes) -> None:
        if path := self._pick(data, "file", "directory"):
            self.union.set_xattr(path, name, value)
            self.tree[path].xattrs[name] = value

    @rule(data=st.data())
    def link(self, data: st.DataObject) -> None:
        old, new = self._pick(data, "file", "symlink"), self._place(data)
        if old and self._expect(
            errno.EEXIST if new in self.tree else None, self.union.link, old, new
        ):
            self.tree[new] = self.tree[old]

    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        if (path := self._pick(data, "file", "symlink", "directory")) and self._expect(
            errno.EISDIR if self.tree[path].kind == "directory" else None, self.union.unlink, path
        ):
            del self.tree[path]

    @rule(data=st.data())
    def rmdir(self, data: st.DataObject) -> None:
        if path := self._pick(data, "directory", "file"):
            wanted = errno.ENOTEMPTY if self._children(path) else None
            if self.tree[path].kind == "file":
                wanted = errno.ENOTDIR
            if self._expect(wanted, self.union.rmdir, path):
                del self.tree[path]

    @rule(data=st.data())
    def remove_all(self, data: st.DataObject) -> None:
        if path := self._pick(data, "directory"):
            for child in sorted([*self._children(path), path], reverse=True):
                directory = self.tree.pop(child).kind == "directory"
                (self.union.rmdir if directory else self.union.unlink)(child)

    @rule(data=st.data(), flags=st.sampled_from((0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE)))
    def rename(self, data: st.DataObject, flags: int) -> None:
        old, new = self._pick(data, "file", "directory", "symlink"), self._place(data)
        if old is None or old == new or self._settled_by_the_kernel(old, new, flags):
            return
        wanted = None
        if flags == RENAME_EXCHANGE and new not in self.tree:
            wanted = errno.ENOENT
        elif flags == RENAME_NOREPLACE and new in self.tree:
            wanted = errno.EEXIST
        elif flags == 0 and new in self.tree and self._children(new):
            wanted = errno.ENOTEMPTY
        if self._expect(wanted, self.union.rename, old, new, flags):
            self._move(old, new, exchange=flags == RENAME_EXCHANGE)

    def _settled_by_the_kernel(self, old: str, new: str, flags: int) -> bool:
        if f"{new}/".startswith(f"{old}/") or f"{old}/".startswith(f"{new}/"):
            return True
        target = self.tree.get(new)
        if target is None or flags == RENAME_NOREPLACE:
            return False
        kinds = {self.tree[old].kind == "directory", target.kind == "directory"}
        return target is self.tree[old] or (flags == 0 and len(kinds) == 2)

    def _move(self, old: str, new: str, *, exchange: bool) -> None:
        moved = {path: self.tree.pop(path) for path in [old, *self._children(old)]}
        back = {}
        if new in self.tree:
            back = {path: self.tree.pop(path) for path in [new, *self._children(new)]}
        self.tree |= {new + path[len(old) :]: inode for path, inode in moved.items()}
        if exchange:
            self.tree |= {old + path[len(new) :]: inode for path, inode in back.items()}

    @rule()
    def reopen(self) -> None:
        self.union.close()
        self.union = Direct(self.stack, **self.options)

    # --- the comparison ---

    @invariant()
    def the_union_shows_the_model(self) -> None:
        seen = {}
        pending = [""]
        while pending:
            path = pending.pop()
            entry = self.union.stat(path)
            inode = self.tree.get(path)
            assert inode is not None, f"{path} should be gone"
            if inode.kind == "directory":
                names = self.union.names(path)
                assert len(names) == len(set(names))
                pending += [f"{path}/{name}".lstrip("/") for name in names]
                content = b""
            elif inode.kind == "symlink":
                content = self.union.readlink(path)
            else:
                content = self.union.read(path)
            seen[path] = (content, entry.attributes.mode & 0o7777, self.union.xattrs(path))
            if inode.kind != "directory":
                links = sum(other is inode for other in self.tree.values())
                assert entry.attributes.nlink == links, f"{path}: {entry.attributes.nlink} links"
        assert seen == {
            path: (inode.data, inode.mode, inode.xattrs) for path, inode in self.tree.items()
        }
        owners: dict[int, Inode] = {}
        for path, inode in self.tree.items():
            number = self.union.stat(path).attributes.ino
            assert owners.setdefault(number, inode) is inode, f"{path} has another's number"


class UnionWithoutRedirects(UnionAsDict):
    options: ClassVar = {"redirect_dir": "off"}


class UnionWithMetacopy(UnionAsDict):
    options: ClassVar = {"metacopy": True}


class UnionWithLookupIndex(UnionAsDict):
    options: ClassVar = {"indexed": True}


MACHINES = (UnionAsDict, UnionWithoutRedirects, UnionWithMetacopy, UnionWithLookupIndex)


def _run(machine: type[UnionAsDict], examples: int) -> None:

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=examples < 100,
            # a failure prints the steps; a short one is worth minutes only in a long run
            phases=set(Phase) if examples >= 100 else {Phase.generate},
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_union_is_a_dict(machine: type[UnionAsDict]) -> None:
    _run(machine, 12)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_union_is_a_dict_for_long(machine: type[UnionAsDict]) -> None:
    _run(machine, 800)
