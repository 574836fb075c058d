"""Hard links: one file under several names, before and after it is copied up."""

import os
import stat

import pytest
from harness.layers import File, HardLink
from harness.mounts import Mounted, Workshop

LINKED = {
    "a/one": File(data="content", mode=0o644, xattrs={"user.x": b"1"}),
    "a/two": HardLink("a/one"),
    "b/three": HardLink("a/one"),
    "b/alone": "alone",
}


def same(tree: Mounted, *names: str) -> os.stat_result:
    infos = [os.lstat(tree / name) for name in names]
    assert len({(info.st_dev, info.st_ino) for info in infos}) == 1
    assert {info.st_nlink for info in infos} == {infos[0].st_nlink}
    assert len({(info.st_mode, info.st_size, info.st_mtime_ns) for info in infos}) == 1
    return infos[0]


def test_lower_hard_links_are_one_inode(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    assert same(tree, "a/one", "a/two", "b/three").st_nlink == 3


@pytest.mark.doors
def test_a_write_through_one_name_shows_through_all(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    before = same(tree, "a/one", "a/two", "b/three")
    (tree / "a/two").write_text("changed")
    after = same(tree, "a/one", "a/two", "b/three")
    assert after.st_ino == before.st_ino and after.st_nlink == 3
    for name in ("a/one", "a/two", "b/three"):
        assert (tree / name).read_text() == "changed"
    tree.remount()
    again = same(tree, "a/one", "a/two", "b/three")
    assert again.st_nlink == 3
    assert (tree / "b/three").read_text() == "changed"


@pytest.mark.doors
def test_attributes_changed_through_one_name_show_through_all(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    for name in ("a/one", "a/two", "b/three"):
        os.stat(tree / name)  # so that the kernel has something stale to show
    os.chmod(tree / "b/three", 0o4711)
    assert stat.S_IMODE(same(tree, "a/one", "a/two", "b/three").st_mode) == 0o4711
    os.chown(tree / "a/one", 8, 9)
    assert same(tree, "a/one", "a/two", "b/three").st_uid == 8
    os.setxattr(tree / "a/two", "user.new", b"new")
    assert os.getxattr(tree / "b/three", "user.new") == b"new"
    os.removexattr(tree / "b/three", "user.x")
    assert os.listxattr(tree / "a/one") == ["user.new"]
    os.utime(tree / "a/one", ns=(1, 2))
    assert same(tree, "a/one", "a/two", "b/three").st_mtime_ns == 2
    os.truncate(tree / "b/three", 3)
    assert same(tree, "a/one", "a/two", "b/three").st_size == 3


def test_link_counts_follow_unlink_and_link(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    os.unlink(tree / "a/one")
    assert same(tree, "a/two", "b/three").st_nlink == 2
    os.link(tree / "b/three", tree / "b/four")
    os.link(tree / "b/four", tree / "a/five")
    assert same(tree, "a/two", "b/three", "b/four", "a/five").st_nlink == 4
    (tree / "a/two").write_text("x")
    assert same(tree, "a/two", "b/three", "b/four", "a/five").st_nlink == 4
    tree.remount()
    assert same(tree, "a/two", "b/three", "b/four", "a/five").st_nlink == 4
    for name in ("a/two", "b/three", "a/five"):
        os.unlink(tree / name)
    assert same(tree, "b/four").st_nlink == 1
    tree.remount()
    assert same(tree, "b/four").st_nlink == 1
    assert (tree / "b/four").read_text() == "x"


def test_a_link_to_a_lower_file_and_to_a_symlink(workshop: Workshop) -> None:
    from harness.layers import Symlink

    tree = workshop({"f": "f", "s": Symlink("f"), "d/x": ""})
    os.link(tree / "f", tree / "d/g")
    assert same(tree, "f", "d/g").st_nlink == 2
    os.link(tree / "s", tree / "d/t", follow_symlinks=False)
    assert same(tree, "s", "d/t").st_nlink == 2
    assert os.readlink(tree / "d/t") == "f"
    tree.remount()
    assert same(tree, "f", "d/g").st_nlink == 2
    assert same(tree, "s", "d/t").st_nlink == 2


def test_rename_of_one_name_to_another_of_the_same_file_does_nothing(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    os.rename(tree / "a/one", tree / "a/two")  # POSIX: both stay
    assert same(tree, "a/one", "a/two", "b/three").st_nlink == 3
    (tree / "a/one").write_text("up now")
    os.rename(tree / "a/one", tree / "b/three")
    assert same(tree, "a/one", "a/two", "b/three").st_nlink == 3


def test_a_renamed_name_is_still_the_same_file(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    inode = same(tree, "a/one", "a/two").st_ino
    os.rename(tree / "a/one", tree / "b/moved")
    assert same(tree, "b/moved", "a/two", "b/three").st_nlink == 3
    assert os.stat(tree / "b/moved").st_ino == inode
    (tree / "a/two").write_text("later")
    assert (tree / "b/moved").read_text() == "later"
    tree.remount()
    assert same(tree, "b/moved", "a/two", "b/three").st_nlink == 3


def test_links_of_which_some_are_hidden_by_a_higher_layer(workshop: Workshop) -> None:
    tree = workshop({"a/two": "hides", "b/three": None}, LINKED)
    # the count is the lower file's: overlayfs shows the same, nobody searches the layers for names
    (tree / "a/one").write_text("changed")
    assert (tree / "a/two").read_text() == "hides"
    assert not (tree / "b/three").exists()
    assert (tree / "a/one").read_text() == "changed"


def test_an_open_file_follows_a_copy_up_through_another_name(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    with open(tree / "a/one", "r+") as file:
        (tree / "a/two").write_text("through two")
        assert file.read() == "through two"
        file.seek(0)
        file.write("THROUGH")
    assert (tree / "b/three").read_text() == "THROUGH two"


@pytest.mark.on("overlay", "unionfuse")
def test_the_other_file_system_sees_the_same_links(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    (tree / "a/one").write_text("changed")
    os.unlink(tree / "a/two")
    os.link(tree / "b/three", tree / "b/new")
    other = "overlay" if tree.is_unionfuse else "unionfuse"
    for kind in (other, tree.kind, other):
        tree.remount(kind)
        assert same(tree, "a/one", "b/three", "b/new").st_nlink == 3
        assert (tree / "b/three").read_text() == "changed"


@pytest.mark.doors
def test_a_file_stays_one_whose_only_known_name_goes_while_it_is_open(workshop: Workshop) -> None:
    tree = workshop({"lower": "x"})
    (tree / "a").write_text("before")
    os.link(tree / "a", tree / "b")
    if tree.kind != "plain":
        tree.remount()  # nobody has looked for b
    with open(tree / "a", "rb", buffering=0) as opened:
        assert opened.read() == b"before"
        os.unlink(tree / "a")
        assert os.fstat(opened.fileno()).st_nlink == 1
        with open(tree / "b", "wb") as other:
            other.write(b"after!")
        assert os.pread(opened.fileno(), 10, 0) == b"after!"
        assert os.path.samestat(os.fstat(opened.fileno()), os.stat(tree / "b"))
        os.unlink(tree / "b")
        assert os.fstat(opened.fileno()).st_nlink == 0
        assert os.pread(opened.fileno(), 10, 0) == b"after!"


@pytest.mark.doors
@pytest.mark.on("overlay", "unionfuse")
def test_a_noted_link_count_that_cannot_be_is_no_count(workshop: Workshop) -> None:
    tree = workshop(LINKED)
    (tree / "a/one").write_text("changed")
    tree.unmount()
    (copy,) = (tree.work / "index").iterdir()
    os.setxattr(copy, "trusted.overlay.nlink", b"U-9")  # fewer than none
    tree.mount()
    assert os.lstat(tree / "a/one").st_nlink == 2  # the real one's: that name and the index's
    with open(tree / "a/one") as opened:
        os.unlink(tree / "a/one")
        assert opened.read() == "changed"
    assert (tree / "a/two").read_text() == "changed"
    os.unlink(tree / "a/two")
