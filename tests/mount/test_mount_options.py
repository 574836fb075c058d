"""What each option of the mount changes."""

import contextlib
import errno
import os
import stat
import subprocess
import time

import pytest
from harness.layers import Dir, File, HardLink, Special, Symlink
from harness.mounts import MountFailed, Workshop
from harness.snapshot import assert_equal
from harness.users import as_user

pytestmark = pytest.mark.on("unionfuse")

OWNED = {
    "root": File(data="r", mode=0o600),
    "user": File(data="u", mode=0o600, uid=1000, gid=1000),
    "dir": Dir(mode=0o755, uid=1001, gid=1002),
    "out": File(data="o", uid=99_999, gid=99_999),
    "link": Symlink("user", uid=1000, gid=1000),
}


def owner(path: os.PathLike[str]) -> tuple[int, int]:
    info = os.lstat(path)
    return info.st_uid, info.st_gid


def test_owners_are_mapped_both_ways(workshop: Workshop) -> None:
    tree = workshop(
        OWNED, options={"uidmapping": "0:5000:1:1000:6000:100", "gidmapping": "0:7000:2000"}
    )
    # as fuse-overlayfs: on disk `0`, in the mount `5000`; what has no mapping is the overflow id
    assert owner(tree / "root") == (5000, 7000)
    assert owner(tree / "user") == (6000, 8000)
    assert owner(tree / "dir") == (6001, 8002)
    assert owner(tree / "link") == (6000, 8000)
    assert owner(tree / "out") == (65534, 65534)
    os.chown(tree / "root", 6005, 7006)
    assert owner(tree / "root") == (6005, 7006)
    assert owner(tree.upper / "root") == (1005, 6)
    os.chmod(tree / "user", 0o640)
    assert owner(tree.upper / "user") == (1000, 1000)
    as_user(6001, os.mkdir, str(tree / "dir/made"), gid=7003)
    assert owner(tree.upper / "dir/made") == (1001, 3)
    tree.remount()
    assert owner(tree / "root") == (6005, 7006)
    with pytest.raises(OSError) as caught:
        os.chown(tree / "root", 1, 1)  # which has no place on disk
    assert caught.value.errno == errno.EINVAL or owner(tree / "root") != (0, 0)


@pytest.mark.parametrize(
    "options, shown",
    [
        ({"squash_to_root": None}, (0, 0)),
        ({"squash_to_uid": "7", "squash_to_gid": "8"}, (7, 8)),
    ],
)
def test_owners_are_squashed(
    workshop: Workshop, options: dict[str, str | None], shown: tuple[int, int]
) -> None:
    tree = workshop(OWNED, options=options)
    for name in ("root", "user", "dir", "link", "out"):
        assert owner(tree / name) == shown
    (tree / "dir/new").write_text("x")
    os.chmod(tree / "user", 0o640)
    assert owner(tree / "dir/new") == shown
    assert owner(tree / "user") == shown
    assert owner(tree.upper / "user") == (1000, 1000), "a copy keeps the owner on disk"


@pytest.mark.parametrize("value", ["1", "2"])
def test_permissions_in_an_xattr(workshop: Workshop, value: str) -> None:
    # for uppers on file systems that hold no owners: fuse-overlayfs's user.containers.override_stat
    tree = workshop({"below": "b"}, options={"xattr_permissions": value})
    (tree / "file").write_text("x")
    os.chown(tree / "file", 1234, 2345)
    os.chmod(tree / "file", 0o4711)
    os.mkdir(tree / "dir", 0o700)
    os.chown(tree / "below", 3456, 4567)
    info = os.stat(tree / "file")
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1234, 2345, 0o4711)
    assert owner(tree / "below") == (3456, 4567)
    assert owner(tree.upper / "file") == (0, 0)
    names = os.listxattr(tree.upper / "file")
    assert any(name.endswith("override_stat") for name in names), names
    assert os.listxattr(tree / "file") == []
    wanted = tree.snapshot()
    tree.remount()
    assert_equal(tree.snapshot(), wanted)


def test_static_nlink_shows_one_link_for_directories(workshop: Workshop) -> None:
    tree = workshop(
        {"d/a/x": "", "d/b/x": "", "one": "1", "two": HardLink("one")},
        options={"static_nlink": None},
    )
    assert os.stat(tree / "d").st_nlink == 1
    assert os.stat(tree.root).st_nlink == 1


def test_noacl(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", mode=0o640)}, options={"noacl": None})
    tree.unmount()
    subprocess.run(["setfacl", "-m", "u:4001:r,g:4002:---", tree.stack.lowers[0] / "f"], check=True)
    workshop.forget_layer(tree.stack.lowers[0])
    tree.mount()
    assert subprocess.run(["setfacl", "-m", "u:1:r", tree / "f"], stderr=-3).returncode != 0
    # nobody gets in through a mask that is taken for the group's bits
    assert stat.S_IMODE(os.stat(tree / "f").st_mode) & 0o020 == 0
    with pytest.raises(PermissionError):
        as_user(4003, os.open, str(tree / "f"), os.O_RDONLY)


def test_noxattrs(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", xattrs={"user.a": b"1"})}, options={"noxattrs": None})
    with contextlib.suppress(OSError):
        assert os.listxattr(tree / "f") == []
    for call in (
        lambda: os.getxattr(tree / "f", "user.a"),
        lambda: os.setxattr(tree / "f", "user.b", b""),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("timeout", ["0", "0.1"])
def test_timeout_is_how_long_the_kernel_may_remember(workshop: Workshop, timeout: str) -> None:
    tree = workshop({"f": "before"}, options={"timeout": timeout})
    (tree / "mine").write_text("1")
    assert os.stat(tree / "mine").st_size == 1
    (tree.upper / "mine").write_text("changed below: not allowed, but seen soon")
    time.sleep(0.3)
    assert os.stat(tree / "mine").st_size == 41


def test_volatile_leaves_a_mark_until_a_clean_end(workshop: Workshop) -> None:
    tree = workshop({"f": "x"}, options={"volatile": None})
    mark = tree.work / "work/incompat/volatile"
    assert mark.exists()
    with open(tree / "f", "r+") as file:
        file.write("y")
        os.fsync(file.fileno())
    tree.unmount()
    assert not mark.exists(), "a clean unmount takes the mark away"
    tree.mount()
    tree.kill()
    assert mark.exists()
    with pytest.raises(MountFailed, match="volatile"):
        tree.mount()
    subprocess.run(["rm", "-r", tree.work / "work/incompat"], check=True)
    tree.mount()
    assert (tree / "f").read_text() == "y"


def test_the_kernels_volatile_mark_is_respected(workshop: Workshop) -> None:
    tree = workshop({"f": "x"}, kind="overlay", options={"volatile": None, "index": "off"})
    tree.discard()
    tree.kind, tree.options = "unionfuse", {}
    with pytest.raises(MountFailed, match="volatile"):
        tree.mount()


def test_ro_with_an_upper(workshop: Workshop) -> None:
    tree = workshop({"f": "x"}, options={"ro": None})
    for call in (
        lambda: (tree / "f").write_text(""),
        lambda: (tree / "new").write_text(""),
        lambda: os.unlink(tree / "f"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EROFS
    tree.remount(options={"rw": None})
    (tree / "f").write_text("y")
    tree.remount(options={"ro": None})
    assert (tree / "f").read_text() == "y"


def test_nodev_nosuid_noexec(workshop: Workshop) -> None:
    tree = workshop(
        {
            "null": Special(kind=stat.S_IFCHR, device=os.makedev(1, 3)),
            "run": File(data="#!/bin/sh\n", mode=0o755),
        },
        options={"nodev": None, "nosuid": None, "noexec": None},
    )
    with pytest.raises(PermissionError):
        os.close(os.open(tree / "null", os.O_RDONLY))
    with pytest.raises(PermissionError):
        subprocess.run([tree / "run"], check=False)
    assert os.statvfs(tree.root).f_flag & os.ST_NOSUID
    tree.remount(options={"dev": None, "suid": None, "exec": None})
    os.close(os.open(tree / "null", os.O_RDONLY))
    assert subprocess.run([tree / "run"], check=False).returncode == 0


@pytest.mark.parametrize(
    "option",
    ["max_idle_threads=3", "threaded=1", "clone_fd", "plugins=x", "index=on", "nfs_export=off",
     "x-anything=1", "_netdev", "fsync=0", "noatime", "", "xino=off"],
)  # fmt: skip
def test_options_of_others_are_accepted(workshop: Workshop, option: str) -> None:
    tree = workshop({"f": "x"}, options={option: None, "": None})
    (tree / "f").write_text("y")
    assert (tree / "f").read_text() == "y"


def test_an_upper_on_another_file_system_than_the_layers(workshop: Workshop) -> None:
    from harness import linux
    from harness.mounts import Stack

    base = workshop.directory / "tmpfs"
    stack = Stack.make(base, [{"d/f": "f", "one": "1", "two": HardLink("one"), "e/x": "x"}])
    disk = base / "disk"
    disk.mkdir()
    linux.mount("tmpfs", disk, "tmpfs")
    stack.upper, stack.work = disk / "upper", disk / "work"
    stack.upper.mkdir()
    stack.work.mkdir()
    tree = workshop.mount(stack)
    before = tree.snapshot(inodes=True)
    os.chmod(tree / "d/f", 0o600)
    (tree / "one").write_text("changed")
    os.rename(tree / "e", tree / "d/e")
    os.unlink(tree / "d/e/x")
    assert (tree / "two").read_text() == "changed"
    assert os.stat(tree / "d/f").st_ino == before[b"d/f"].ino
    wanted = tree.snapshot(inodes=True)
    assert len({record.ino for record in wanted.values()}) == len(wanted) - 1
    tree.remount()
    assert_equal(tree.snapshot(inodes=True), wanted, ("remounted", "before"))
    tree.unmount()
    linux.umount(disk)
