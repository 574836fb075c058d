"""Copies that are staged before they are asked for: `chmod -R` of what layers have."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from harness.layers import File, HardLink, Symlink
from harness.mounts import Workshop, staging_files
from harness.waiting import wait_until

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.through("unionfuse", "unionfuse-indexed")]

MANY = 60
MTIME_NS = 1_600_000_000_123_456_789
LAYER = {
    f"d/{number:02}": File(data=f"{number}" * 300, mode=0o640, uid=3, mtime_ns=MTIME_NS - number)
    for number in range(MANY)
} | {
    "d/linked": "two names",
    "d/linked2": HardLink("d/linked"),
    "d/link": Symlink("00"),
    "d/big": File(data=b"b" * 300_000),
    "d/marked": File(data="marked", xattrs={"user.x": b"y"}),
    "d/sub/e": "e",
    "d/old": File(data="old", mtime_ns=-1_500_000_000),
}


def change(tree: Path) -> None:
    subprocess.run(["chmod", "-R", "u+x,g+w", tree], check=True)


def seen(tree: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(tree.rglob("*")):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        owner, mtime = (info.st_uid, info.st_gid), info.st_mtime_ns
        mtime = 0 if path.is_dir() else mtime
        found[str(path.relative_to(tree))] = (
            info.st_mode, *owner, info.st_ino, mtime, content, os.listxattr(path)
        )  # fmt: skip
    return found


def expected(before: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    def changed(mode: object) -> int:
        assert isinstance(mode, int)
        return mode if stat.S_ISLNK(mode) else mode | 0o120

    return {name: (changed(mode), *rest) for name, (mode, *rest) in before.items()}


def test_a_tree_is_changed_as_if_file_by_file(workshop: Workshop) -> None:
    tree = workshop(LAYER)
    before = seen(tree / "d")
    change(tree / "d")
    assert seen(tree / "d") == expected(before)
    wait_until(lambda: not staging_files(tree.work), 20, "what nobody fetched is gone")
    tree.remount()
    assert seen(tree / "d") == expected(before)


def test_an_unmount_in_between_leaves_nothing(workshop: Workshop) -> None:
    tree = workshop(LAYER)
    for name in sorted(os.listdir(tree / "d"))[:20]:
        if name.isdigit():
            os.chmod(tree / f"d/{name}", 0o600)
    tree.unmount()
    assert not staging_files(tree.work)


def test_what_is_deleted_or_replaced_in_between_stays_so(workshop: Workshop) -> None:
    tree = workshop(LAYER)
    names = [name for name in os.listdir(tree / "d") if name.isdigit()]
    for name in names[:6]:
        os.chmod(tree / f"d/{name}", 0o600)
    os.unlink(tree / f"d/{names[7]}")
    (tree / f"d/{names[8]}").write_bytes(b"new")
    os.replace(tree / f"d/{names[8]}", tree / f"d/{names[9]}")
    os.rename(tree / f"d/{names[10]}", tree / "elsewhere")
    (tree / f"d/{names[10]}").write_bytes(b"another")
    for name in set(names) - {names[7], names[8]}:
        os.chmod(tree / f"d/{name}", 0o604)
    assert not (tree / f"d/{names[7]}").exists()
    assert (tree / f"d/{names[9]}").read_bytes() == b"new"
    assert (tree / f"d/{names[10]}").read_bytes() == b"another"
    assert (tree / "elsewhere").read_text() == f"{int(names[10])}" * 300


def test_a_new_daemon_goes_on(workshop: Workshop) -> None:
    tree = workshop(LAYER)
    before = seen(tree / "d")
    names = sorted(before)
    for position, name in enumerate(names):
        if position in (8, 31):
            tree.kill_daemon()
        if not (tree / f"d/{name}").is_symlink():
            os.chmod(tree / f"d/{name}", stat.S_IMODE(int(str(before[name][0]))) | 0o120)
    assert seen(tree / "d") == expected(before)
    wait_until(lambda: not staging_files(tree.work), 20, "what nobody fetched is gone")
