"""Deleting: whiteouts for what lies below, opaque marks for what is made anew over it."""

import errno
import os
import stat
import time

import pytest
from harness.layers import OPAQUE_DIALECTS, WHITEOUT_DIALECTS, Dir, File, Symlink, Whiteout
from harness.mounts import Mounted, Workshop
from harness.snapshot import assert_equal

STACK = (
    {"d/top": "top", "d/both": "top", "full/x": "", "only-top/x": ""},
    {"d/base": "base", "d/both": "base", "full/y": "", "empty": Dir(), "s": Symlink("d"),
     "deep/er/est/file": "x"},
)  # fmt: skip


def names(path: os.PathLike[str]) -> list[str]:
    return sorted(os.listdir(path))


@pytest.mark.parametrize("name", ["d/top", "d/both", "d/base", "s"])
def test_what_is_deleted_is_gone(workshop: Workshop, name: str) -> None:
    tree = workshop(*STACK)
    before = tree.snapshot()
    os.unlink(tree / name)
    expected = {path: record for path, record in before.items() if path != name.encode()}
    assert_equal(tree.snapshot(), expected)
    with pytest.raises(FileNotFoundError):
        os.lstat(tree / name)
    with pytest.raises(FileNotFoundError):
        os.unlink(tree / name)
    tree.remount()
    assert_equal(tree.snapshot(), expected)


@pytest.mark.on("overlay", "unionfuse")
def test_whiteouts_are_the_kernels(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    os.unlink(tree / "d/base")
    (tree / "d/new").write_text("")
    os.unlink(tree / "d/new")
    info = os.lstat(tree.upper / "d/base")
    assert stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
    assert names(tree.upper / "d") == ["base"], "a name that was only in upper leaves no whiteout"


@pytest.mark.on("overlay", "unionfuse")
def test_whiteouts_share_an_inode(workshop: Workshop) -> None:
    tree = workshop({"d/a": "1", "d/b": "2", "d/c": "3", "d/e": Dir(), "f": "4"})
    (tree / "d/b").write_text("in upper")
    for name in ("d/a", "d/b", "d/c", "f"):
        os.unlink(tree / name)
    os.rmdir(tree / "d/e")
    found = [os.lstat(tree.upper / name) for name in ("d/a", "d/b", "d/c", "d/e", "f")]
    assert len({status.st_ino for status in found}) == 1
    (tree / "d/a").write_text("again")
    os.rename(tree / "d/a", tree / "d/c")
    expected = tree.snapshot()
    tree.remount("overlay")
    assert_equal(tree.snapshot(), expected)


def test_rmdir_of_merged_directories(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    with pytest.raises(OSError) as caught:
        os.rmdir(tree / "full")
    assert caught.value.errno == errno.ENOTEMPTY
    os.unlink(tree / "full/x")
    with pytest.raises(OSError) as caught:
        os.rmdir(tree / "full")
    assert caught.value.errno == errno.ENOTEMPTY
    os.unlink(tree / "full/y")
    os.rmdir(tree / "full")
    os.rmdir(tree / "empty")
    assert names(tree.root) == ["d", "deep", "only-top", "s"]
    tree.remount()
    assert names(tree.root) == ["d", "deep", "only-top", "s"]


@pytest.mark.doors
def test_a_new_directory_does_not_show_what_was_deleted(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    os.unlink(tree / "full/x")
    os.unlink(tree / "full/y")
    os.rmdir(tree / "full")
    os.mkdir(tree / "full", 0o700)
    assert names(tree / "full") == []
    (tree / "full/y").write_text("new")
    assert names(tree / "full") == ["y"]
    tree.remount()
    assert names(tree / "full") == ["y"]
    assert stat.S_IMODE(os.stat(tree / "full").st_mode) == 0o700
    assert os.listxattr(tree / "full") == []


def test_files_and_directories_take_the_names_of_deleted_ones(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    os.unlink(tree / "d/base")
    os.mkdir(tree / "d/base")
    (tree / "d/base/inner").write_text("x")
    os.unlink(tree / "deep/er/est/file")
    os.rmdir(tree / "deep/er/est")
    os.symlink("target", tree / "deep/er/est")
    os.unlink(tree / "s")
    (tree / "s").write_text("file")
    os.unlink(tree / "d/both")
    os.mkfifo(tree / "d/both")

    def check() -> None:
        assert names(tree / "d/base") == ["inner"]
        assert os.readlink(tree / "deep/er/est") == "target"
        assert (tree / "s").read_text() == "file"
        assert stat.S_ISFIFO(os.stat(tree / "d/both").st_mode)

    check()
    tree.remount()
    check()


def test_deleting_and_making_again_and_again(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    for number in range(5):
        os.unlink(tree / "d/base")
        (tree / "d/base").write_text(str(number))
        os.unlink(tree / "full/x") if number == 0 else None
        for name in names(tree / "full"):
            os.unlink(tree / "full" / name)
        os.rmdir(tree / "full")
        os.mkdir(tree / "full")
        (tree / "full" / f"{number}").write_text("")
    assert (tree / "d/base").read_text() == "4"
    assert names(tree / "full") == ["4"]


def test_rmdir_and_unlink_of_the_wrong_kind(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    for path, call, code in (
        ("d", os.unlink, errno.EISDIR),
        ("d/base", os.rmdir, errno.ENOTDIR),
        ("s", os.rmdir, errno.ENOTDIR),
        ("d/missing", os.unlink, errno.ENOENT),
        ("d/missing", os.rmdir, errno.ENOENT),
        ("d/base/x", os.unlink, errno.ENOTDIR),
    ):
        with pytest.raises(OSError) as caught:
            call(tree / path)
        assert caught.value.errno == code, path


def test_an_open_directory_that_is_removed(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    directory = os.open(tree / "empty", os.O_RDONLY)
    try:
        os.rmdir(tree / "empty")
        assert os.listdir(directory) == []
        with pytest.raises(FileNotFoundError):
            os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    finally:
        os.close(directory)


def test_a_tree_is_removed_and_made_anew(workshop: Workshop) -> None:
    import shutil

    tree = workshop(*STACK)
    shutil.rmtree(tree / "deep")
    shutil.rmtree(tree / "d")
    (tree / "d/er").mkdir(parents=True)
    (tree / "deep/er/est").mkdir(parents=True)
    wanted = {b".", b"d", b"d/er", b"deep", b"deep/er", b"deep/er/est", b"empty", b"full",
              b"full/x", b"full/y", b"only-top", b"only-top/x", b"s"}  # fmt: skip
    assert set(tree.snapshot()) == wanted
    tree.remount()
    assert set(tree.snapshot()) == wanted


# --- every dialect on disk -----------------------------------------------------------------------


def visible(tree: Mounted) -> list[str]:
    return sorted(os.fsdecode(path) for path in tree.snapshot())


@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("dialect", WHITEOUT_DIALECTS)
def test_whiteouts_of_every_dialect_are_read(workshop: Workshop, dialect: str) -> None:
    gone = Whiteout(dialect)
    options = {"userxattr": None} if dialect == "userxattr" else None
    tree = workshop(
        {"d/file": gone, "d/dir": gone, "d/nothing-below": gone, "d/new": "new"},
        {"d/file": "x", "d/dir/x": "", "d/kept": ""},
        options=options,
    )
    assert visible(tree) == [".", "d", "d/kept", "d/new"]
    assert os.listxattr(tree / "d") == []
    with pytest.raises(FileNotFoundError):
        os.lstat(tree / "d/file")
    (tree / "d/file").write_text("again")
    (tree / "d/dir").mkdir()
    assert visible(tree) == [".", "d", "d/dir", "d/file", "d/kept", "d/new"]
    os.unlink(tree / "d/file")
    os.unlink(tree / "d/kept")
    tree.remount()
    assert visible(tree) == [".", "d", "d/dir", "d/new"]


@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("dialect", WHITEOUT_DIALECTS)
def test_whiteouts_in_upper_are_read(workshop: Workshop, dialect: str) -> None:
    from harness.layers import build

    options = {"userxattr": None} if dialect == "userxattr" else None
    tree = workshop({"d/file": "x", "d/kept": ""}, options=options)
    tree.unmount()
    build(tree.upper, {"d/file": Whiteout(dialect), "d/none": Whiteout(dialect)})
    tree.mount()
    assert visible(tree) == [".", "d", "d/kept"]
    (tree / "d/file").write_text("again")
    (tree / "d/none").write_text("new")
    assert visible(tree) == [".", "d", "d/file", "d/kept", "d/none"]
    tree.remount()
    assert (tree / "d/file").read_text() == "again"
    for name in ("file", "none", "kept"):
        os.unlink(tree / "d" / name)
    os.rmdir(tree / "d")
    assert visible(tree) == ["."]
    tree.remount()
    assert visible(tree) == ["."]


@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("dialect", OPAQUE_DIALECTS)
def test_opaque_marks_of_every_dialect_are_read(workshop: Workshop, dialect: str) -> None:
    options = {"userxattr": None} if dialect == "userxattr" else None
    tree = workshop(
        {"d": Dir(opaque=dialect), "d/new": "new", "d/sub/n": ""},
        {"d/old": "x", "d/sub/o": "", "e": ""},
        options=options,
    )
    assert visible(tree) == [".", "d", "d/new", "d/sub", "d/sub/n", "e"]
    assert os.listxattr(tree / "d") == []
    os.unlink(tree / "d/new")
    os.unlink(tree / "d/sub/n")
    os.rmdir(tree / "d/sub")
    os.rmdir(tree / "d")
    os.mkdir(tree / "d")
    assert visible(tree) == [".", "d", "e"]
    tree.remount()
    assert visible(tree) == [".", "d", "e"]


@pytest.mark.on("unionfuse")
def test_an_opaque_mark_of_a_middle_layer(workshop: Workshop) -> None:
    tree = workshop(
        {"d/top": ""}, {"d": Dir(opaque="kernel"), "d/middle": ""}, {"d/base": ""}
    )  # fmt: skip
    assert visible(tree) == [".", "d", "d/middle", "d/top"]


@pytest.mark.on("overlay", "unionfuse")
def test_a_whiteout_in_the_base_hides_nothing_and_is_not_seen(workshop: Workshop) -> None:
    tree = workshop({"d/x": ""}, {"d/w": None, "w": None})
    assert visible(tree) == [".", "d", "d/x"]
    os.unlink(tree / "d/x")
    os.rmdir(tree / "d")
    assert visible(tree) == ["."]


@pytest.mark.on("unionfuse")
def test_marks_without_privilege_are_user_xattrs(workshop: Workshop) -> None:
    tree = workshop({"d/x": "", "e/y": ""}, options={"userxattr": None})
    os.unlink(tree / "d/x")
    os.rmdir(tree / "d")
    os.mkdir(tree / "d")
    os.unlink(tree / "e/y")
    assert os.getxattr(tree.upper / "d", "user.overlay.opaque") == b"y"
    assert not any(name.startswith("trusted") for name in os.listxattr(tree.upper / "d"))
    tree.remount("overlay", {"userxattr": None})
    assert visible(tree) == [".", "d", "e"]
    tree.remount("unionfuse")
    assert visible(tree) == [".", "d", "e"]


@pytest.mark.on("overlay", "unionfuse")
def test_the_overlays_own_xattrs_are_not_seen(workshop: Workshop) -> None:
    tree = workshop(
        {"d": Dir(opaque="kernel", xattrs={"trusted.overlay.impure": b"y", "user.mine": b"1"})},
        {"d/x": "", "f": File(data="f", xattrs={"trusted.other": b"2"})},
    )
    assert os.listxattr(tree / "d") == ["user.mine"]
    with pytest.raises(OSError) as caught:
        os.getxattr(tree / "d", "trusted.overlay.opaque")
    assert caught.value.errno in (errno.ENODATA, errno.EOPNOTSUPP)
    os.chmod(tree / "f", 0o600)
    assert os.listxattr(tree / "f") == ["trusted.other"]


@pytest.mark.on("overlay", "unionfuse")
def test_overlay_xattrs_set_through_the_mount_are_escaped(workshop: Workshop) -> None:
    tree = workshop({"d/x": "", "f": ""})
    os.setxattr(tree / "d", "trusted.overlay.opaque", b"y")
    os.setxattr(tree / "f", "trusted.overlay.overlay.deeper", b"z")
    assert os.listdir(tree / "d") == ["x"], "it is data here, no mark"
    assert os.getxattr(tree / "d", "trusted.overlay.opaque") == b"y"
    assert os.listxattr(tree / "d") == ["trusted.overlay.opaque"]
    assert os.getxattr(tree.upper / "d", "trusted.overlay.overlay.opaque") == b"y"
    assert os.getxattr(tree.upper / "f", "trusted.overlay.overlay.overlay.deeper") == b"z"
    assert os.getxattr(tree / "f", "trusted.overlay.overlay.deeper") == b"z"
    tree.remount("overlay" if tree.is_unionfuse else "unionfuse")
    assert os.getxattr(tree / "d", "trusted.overlay.opaque") == b"y"
    os.removexattr(tree / "d", "trusted.overlay.opaque")
    assert os.listxattr(tree / "d") == []
    assert os.listdir(tree / "d") == ["x"]


@pytest.mark.on("overlay", "unionfuse")
def test_unions_nest(workshop: Workshop) -> None:
    from harness.mounts import Stack

    outer = workshop({"below/d/x": "x", "below/d/y": "y", "below/f": "f"})
    for name in ("upper", "work", "merged"):
        (outer / name).mkdir()
    inner_stack = Stack(
        outer.stack.base / "inner", [outer / "below"], outer / "merged", outer / "upper",
        outer / "work",
    )  # fmt: skip
    inner_stack.base.mkdir()
    # kernel overlayfs takes no overlayfs as upper: unionfuse inside of either
    inner = workshop.mount(inner_stack, kind="unionfuse", watch="nothing")
    os.unlink(inner / "d/x")
    (inner / "f").write_text("changed")
    os.rename(inner / "d", inner / "e")
    os.mkdir(inner / "d")
    inner.remount()
    assert visible(inner) == [".", "d", "e", "e/y", "f"]
    assert (inner / "f").read_text() == "changed"
    inner.unmount()
    outer.remount()
    assert (outer / "below/f").read_text() == "f"
    inner.mount()
    assert visible(inner) == [".", "d", "e", "e/y", "f"]
    inner.unmount()


@pytest.mark.on("plain", "unionfuse")  # overlayfs refuses: ENOTDIR, for a directory of lower
@pytest.mark.doors
@pytest.mark.parametrize("name", ["new", "empty"])
def test_a_deleted_directory_that_somebody_is_in_can_be_changed(
    workshop: Workshop, name: str
) -> None:
    tree = workshop(*STACK)
    os.makedirs(tree / name, exist_ok=True)
    inside = os.open(tree / name, os.O_RDONLY)
    try:
        os.rmdir(tree / name)
        os.fchmod(inside, 0o2700)
        os.fchown(inside, 3, 4)
        os.utime(inside, ns=(5, 6))
        info = os.fstat(inside)
        assert (info.st_mode, info.st_uid, info.st_gid) == (stat.S_IFDIR | 0o2700, 3, 4)
        assert (info.st_atime_ns, info.st_mtime_ns, info.st_nlink) == (5, 6, 0)
        before = time.time_ns()
        os.utime(inside)
        assert abs(os.fstat(inside).st_mtime_ns - before) < 5_000_000_000
    finally:
        os.close(inside)
