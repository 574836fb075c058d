"""Upper on a disk that is full, or at its quota: an error for the caller, and nothing else.

Real file systems of a few megabytes. What is refused has not happened; what was done before is
there; with room again the same call goes through; and kernel overlayfs can mount what is left.
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.disks import Disk
from harness.layers import File, Layer, build
from harness.mounts import Mounted, Stack, Workshop, staging_files
from harness.snapshot import Tree, assert_equal

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.timeout(120)]

DATA = b"lower" * 600_000
LOWER: Layer = {
    "big": File(data=DATA, mode=0o4755, xattrs={"user.x": b"1"}),
    "d/f": "small",
    "d/g": "small",
}
# Each needs room for a copy of `big`.
COPIES: dict[str, Callable[[Path], object]] = {
    "chmod": lambda root: os.chmod(root / "big", 0o600),
    "open for writing": lambda root: os.close(os.open(root / "big", os.O_WRONLY)),
    "setxattr": lambda root: os.setxattr(root / "big", "user.y", b"2"),
    "truncate": lambda root: os.truncate(root / "big", len(DATA) - 1),
    "link": lambda root: os.link(root / "big", root / "d/linked"),
    "rename": lambda root: os.rename(root / "big", root / "d/renamed"),
}


class Room:
    """A directory with little room: of a small disk, or of one with a quota."""

    def __init__(self, directory: Path, kind: str, quota: bool) -> None:
        self._disk = Disk(directory, kind, _MEBIBYTES[kind])
        self.root = self._disk.root / "room"
        self.error = errno.EDQUOT if quota else errno.ENOSPC
        self._quota = quota
        if quota:
            self._btrfs("quota", "enable", self._disk.root)
            self._btrfs("subvolume", "create", self.root)
            self._btrfs("qgroup", "limit", "10M", self.root)
        else:
            self.root.mkdir()

    def _btrfs(self, *words: str | Path) -> None:
        subprocess.run(["btrfs", *words], check=True, stdout=subprocess.DEVNULL)

    def use_up(self, file: Path) -> int:
        """Write until there is no room; the number of bytes that were taken."""
        written = 0
        for piece in (1 << 18, 1 << 12):
            with open(file, "ab", buffering=0) as out, pytest.raises(OSError) as caught:
                while True:
                    written += out.write(b"filler" * (piece // 6))
            assert caught.value.errno == self.error, caught.value
        os.sync()
        return written

    def give(self, file: Path) -> None:
        """Make room again; `file` is what used it up."""
        if self._quota:  # btrfs refuses to truncate what is over its quota
            self._btrfs("qgroup", "limit", "none", self.root)
        file.unlink()
        os.sync()

    def close(self) -> None:
        self._disk.unmount()


_MEBIBYTES = {"ext4": 16, "ext4 with few inodes": 16, "btrfs": 128}


@pytest.fixture(params=["ext4", "btrfs", "btrfs quota"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path, request.param.removesuffix(" quota"), request.param.endswith("quota"))
    yield made
    made.close()


def union_on(room: Room, workshop: Workshop) -> Mounted:
    layer = build(workshop.directory / "lower", LOWER)
    return workshop.mount(Stack.around(room.root / "tree", [layer]))


def refused(action: Callable[[Path], object], root: Path, error: int) -> None:
    with pytest.raises(OSError) as caught:
        action(root)
    assert caught.value.errno == error, caught.value


def seen(tree: Mounted) -> Tree:
    return tree.snapshot(times=("mtime_ns",))


def assert_kernel_agrees(tree: Mounted) -> None:
    ours = tree.snapshot()
    tree.remount("overlay", {})
    assert_equal(ours, tree.snapshot(), ("unionfuse", "kernel overlayfs"))


def test_copies_that_have_no_room(room: Room, workshop: Workshop) -> None:
    tree = union_on(room, workshop)
    room.use_up(room.root / "filler")
    with open(tree / "big", "rb") as reader:
        before = seen(tree)
        for action in COPIES.values():
            refused(action, tree.root, room.error)
            assert staging_files(tree.work) == [] == os.listdir(tree.upper)
        assert_equal(before, seen(tree), ("before", "after they were refused"))
        room.give(room.root / "filler")
        for action in COPIES.values():
            action(tree.root)
        assert reader.read() == DATA[:-1]
    assert_kernel_agrees(tree)


def test_what_was_written_before_is_there(room: Room, workshop: Workshop) -> None:
    tree = union_on(room, workshop)
    assert tree.daemon is not None
    daemon = tree.daemon.pid
    with open(tree / "d/f", "a") as small:
        small.write("+")
    written = room.use_up(tree / "filler")
    data = (tree / "filler").read_bytes()
    assert len(data) >= written > len(DATA) and not data.strip(b"filler")
    made = 0
    for number in range(2000):  # names need room as well
        try:
            (tree / f"d/{'n' * 200}{number}").mkdir()
        except OSError as error:
            assert error.errno == room.error
            break
        made += 1
    assert (tree / "d/f").read_text() == "small+"
    assert len(os.listdir(tree / "d")) == made + 2
    room.give(tree / "filler")
    (tree / "d/g").unlink()
    assert not (tree / "d/g").exists() and tree.daemon.pid == daemon
    assert_kernel_agrees(tree)


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path, "ext4 with few inodes", quota=False)
    yield made
    made.close()


def test_no_inodes_are_left(few_inodes: Room, workshop: Workshop) -> None:
    tree = union_on(few_inodes, workshop)
    made = []
    with pytest.raises(OSError) as caught:
        for number in range(200):
            (tree / f"new{number}").touch()
            made.append(f"new{number}")
    assert caught.value.errno == errno.ENOSPC
    before = seen(tree)
    for action in (
        lambda root: os.chmod(root / "d/f", 0o600),
        lambda root: os.symlink("x", root / "s"),
        lambda root: os.rename(root / "d/f", root / "d/h"),
    ):
        refused(action, tree.root, errno.ENOSPC)
    assert_equal(before, seen(tree), ("before", "after they were refused"))
    assert staging_files(tree.work) == []
    for name in made[:20]:
        (tree / name).unlink()
    os.rename(tree / "d/f", tree / "d/h")
    assert sorted(os.listdir(tree / "d")) == ["g", "h"]
    assert_kernel_agrees(tree)
