"""What a stack of layers shows before anybody changes it."""

import os
import stat

import pytest
from harness import linux
from harness.layers import Dir, File, Special, Symlink
from harness.mounts import Stack, Workshop

LAYERS = (
    {"dir/a": "top", "dir/only-top": "", "file-over-dir": "file", "dir-over-file/x": "x"},
    {"dir/a": "middle", "dir/b": "middle", "dir/sub/m": "m"},
    {"dir/b": "base", "dir/sub/n": "n", "file-over-dir/hidden": "", "dir-over-file": "file"},
)


def names(path: os.PathLike[str]) -> list[str]:
    return sorted(os.listdir(path))


@pytest.mark.doors
def test_the_highest_layer_wins_and_directories_merge(workshop: Workshop) -> None:
    tree = workshop(*LAYERS)
    assert names(tree / "dir") == ["a", "b", "only-top", "sub"]
    assert (tree / "dir/a").read_text() == "top"
    assert (tree / "dir/b").read_text() == "middle"
    assert names(tree / "dir/sub") == ["m", "n"]


def test_a_file_hides_a_directory_and_the_other_way_round(workshop: Workshop) -> None:
    tree = workshop(*LAYERS)
    assert (tree / "file-over-dir").read_text() == "file"
    with pytest.raises(NotADirectoryError):
        (tree / "file-over-dir/hidden").stat()
    assert names(tree / "dir-over-file") == ["x"]


def test_a_directory_below_a_file_below_a_directory_stays_hidden(workshop: Workshop) -> None:
    tree = workshop({"d/top": ""}, {"d": "a file in between"}, {"d/deep": ""})
    assert names(tree / "d") == ["top"]


def test_a_symlink_hides_a_directory(workshop: Workshop) -> None:
    tree = workshop({"d": Symlink("elsewhere")}, {"d/x": "", "elsewhere/y": ""})
    assert os.readlink(tree / "d") == "elsewhere"
    assert names(tree / "d") == ["y"]


def test_attributes_of_a_merged_directory_are_those_of_its_highest(workshop: Workshop) -> None:
    tree = workshop(
        {"d": Dir(mode=0o2750, uid=3, gid=4, xattrs={"user.from": b"top"})},
        {"d": Dir(mode=0o700, uid=1, gid=2, xattrs={"user.from": b"base"}), "d/x": ""},
    )
    info = (tree / "d").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o2750, 3, 4)
    assert os.getxattr(tree / "d", "user.from") == b"top"


def test_the_root_is_a_directory_like_others(workshop: Workshop) -> None:
    tree = workshop({".": Dir(mode=0o751, uid=7), "x": ""}, {"y": ""})
    info, highest = os.stat(tree.root), tree.root if tree.kind == "plain" else tree.upper
    assert (info.st_mode, info.st_uid) == (highest.stat().st_mode, highest.stat().st_uid)
    os.chmod(tree.root, 0o710)
    tree.remount()
    assert stat.S_IMODE(os.stat(tree.root).st_mode) == 0o710
    assert names(tree.root) == ["x", "y"]


def test_dot_and_dot_dot(workshop: Workshop) -> None:
    tree = workshop({"d/e/x": ""}, {"d/e/y": ""})
    entries = dict(_entries(tree / "d/e"))
    assert b"." in entries and b".." in entries
    assert (tree / "d/e/..").stat().st_ino == (tree / "d").stat().st_ino
    assert (tree / "d/e/.").stat().st_ino == (tree / "d/e").stat().st_ino
    assert entries[b"."] == (tree / "d/e").stat().st_ino
    assert entries[b".."] == (tree / "d").stat().st_ino


def _entries(path: os.PathLike[str]) -> list[tuple[bytes, int]]:
    stream, found = linux.opendir(os.fspath(path)), []
    try:
        while (entry := linux.readdir_entry(stream)) is not None:
            found.append(entry[:2])
    finally:
        linux.closedir(stream)
    return found


def test_names_are_listed_once_with_their_type_and_inode(workshop: Workshop) -> None:
    tree = workshop(
        {"d/dir": Dir(), "d/file": "x"},
        {"d/link": Symlink("x"), "d/fifo": Special(), "d/file": "y", "d/dir/z": ""},
    )
    stream, seen = linux.opendir(tree / "d"), {}
    while (entry := linux.readdir_entry(stream)) is not None:
        name, ino, kind = entry
        assert name not in seen
        seen[name] = (ino, kind)
    linux.closedir(stream)
    assert seen.keys() - {b".", b".."} == {b"dir", b"file", b"link", b"fifo"}
    for name in (b"dir", b"file", b"link", b"fifo"):
        info = os.lstat(os.fsencode(tree / "d") + b"/" + name)
        assert seen[name] == (info.st_ino, stat.S_IFMT(info.st_mode) >> 12)


def test_all_of_a_mount_is_one_device(workshop: Workshop) -> None:
    tree = workshop({"a": "", "d/b": "", "l": Symlink("a")}, {"d/c": "", "e/f": ""})
    (tree / "d/new").write_text("new")
    (tree / "e/f").chmod(0o600)
    devices = {os.lstat(tree / name).st_dev for name in ("", "a", "d", "d/b", "d/c", "d/new")}
    devices |= {os.lstat(tree / name).st_dev for name in ("l", "e", "e/f")}
    assert len(devices) == 1


@pytest.mark.on("overlay", "unionfuse")
def test_five_hundred_layers(workshop: Workshop) -> None:
    layers = [{f"only-{n}": str(n), "all": str(n), f"d/{n % 7}": str(n)} for n in range(500)]
    tree = workshop(*layers)
    assert len(names(tree.root)) == 502
    assert (tree / "all").read_text() == "0"
    assert (tree / "only-499").read_text() == "499"
    assert [(tree / f"d/{n}").read_text() for n in range(7)] == [str(n) for n in range(7)]
    (tree / "only-499").write_text("changed")
    (tree / "d/6").unlink()
    tree.remount()
    assert (tree / "only-499").read_text() == "changed"
    assert names(tree / "d") == [str(n) for n in range(6)]


@pytest.mark.on("overlay", "unionfuse")
def test_separators_in_the_paths_of_layers(workshop: Workshop) -> None:
    base = workshop.directory / "odd"
    stack = Stack.make(base, [{"a": "1"}, {"b": "2"}])
    for number, name in enumerate(("with:colon", "with,comma")):
        stack.lowers[number] = stack.lowers[number].rename(base / name)
    if workshop.kind == "overlay":  # lowerdir+ takes a path as it is
        tree = workshop.mount(stack)
    else:
        stack.upper = stack.upper and stack.upper.rename(base / "back\\slash, and: more")
        tree = workshop.mount(stack)
    assert names(tree.root) == ["a", "b"]
    (tree / "c").write_text("3")
    assert (tree.upper / "c").read_text() == "3"


@pytest.mark.on("unionfuse")
def test_a_layer_may_contain_the_mount_point(workshop: Workshop) -> None:
    base = workshop.directory / "around"
    stack = Stack.make(base, [{"inside": "1"}])
    stack.mountpoint = stack.lowers[0] / "mountpoint"
    stack.mountpoint.mkdir()
    tree = workshop.mount(stack)
    # the daemon never enters its own mount: what it shows there is what lies below the mount
    assert names(tree.root) == ["inside", "mountpoint"]
    assert names(tree / "mountpoint") == []
    (tree / "mountpoint/new").write_text("x")
    assert (tree.upper / "mountpoint/new").read_text() == "x"
    tree.unmount()
    assert names(stack.mountpoint) == []


@pytest.mark.on("unionfuse")
def test_equal_inode_numbers_on_two_devices_are_two_files(workshop: Workshop) -> None:
    base = workshop.directory / "devices"
    lowers = []
    for number in (1, 2):
        lower = base / f"tmpfs{number}"
        lower.mkdir(parents=True)
        linux.mount("tmpfs", lower, "tmpfs")
        (lower / f"file{number}").write_text(str(number))
        (lower / f"other{number}").write_text(str(number))
        lowers.append(lower)
    infos = [os.stat(lower / f"file{number}") for number, lower in enumerate(lowers, 1)]
    assert infos[0].st_ino == infos[1].st_ino, "the test needs equal numbers"
    tree = workshop.mount(Stack.around(base, lowers))
    one, two = (tree / "file1").stat(), (tree / "file2").stat()
    assert (one.st_ino, one.st_dev) != (two.st_ino, two.st_dev)
    assert (tree / "file1").read_text() == "1"
    assert (tree / "file2").read_text() == "2"
    (tree / "file1").write_text("changed")
    assert (tree / "file2").read_text() == "2"
    assert (one.st_nlink, two.st_nlink) == (1, 1)


def test_an_unchanged_tree_costs_upper_nothing(workshop: Workshop) -> None:
    tree = workshop({"a/b/c": "x", "s": Symlink("a")}, {"a/d": File(data="y", mode=0o4755)})
    tree.snapshot()
    (tree / "a/b/c").read_bytes()
    os.access(tree / "a/d", os.W_OK)
    with open(tree / "a/b/c", "rb") as file:
        os.fsync(file)
    os.statvfs(tree.root)
    if tree.kind != "plain":
        tree.unmount()
        assert os.listdir(tree.upper) == []
