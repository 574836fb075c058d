"""The tests are tested: a harness that sees nothing proves nothing."""

import os

import pytest
from harness.layers import Dir, File, HardLink, Symlink, Whiteout
from harness.mounts import Workshop
from harness.snapshot import difference, snapshot


def test_the_kinds_show_the_same_tree(workshop: Workshop) -> None:
    tree = workshop(
        {"d/new": "top", "d/gone": None, "e": Dir(opaque="kernel"), "e/only": "1", "f": "file"},
        {
            "d/gone": "x",
            "d/kept": File(data="kept", mode=0o640, uid=5, gid=6, xattrs={"user.a": b"1"}),
            "e/hidden": "x",
            "f/inside": "x",
            "link": Symlink("d/kept"),
            "one": "1",
            "two": HardLink("one"),
        },
    )
    seen = tree.snapshot()
    assert sorted(seen) == [
        b".", b"d", b"d/kept", b"d/new", b"e", b"e/only", b"f", b"link", b"one", b"two",
    ]  # fmt: skip
    kept = seen[b"d/kept"]
    assert (kept.mode, kept.uid, kept.gid, kept.size) == ("0640", 5, 6, 4)
    assert kept.xattrs == (("user.a", b"1".hex()),)
    assert seen[b"one"].nlink == 2


@pytest.mark.on("plain")
def test_snapshots_notice_everything(workshop: Workshop) -> None:
    tree = workshop({"a": "1", "d/b": "2"})
    before = tree.snapshot(times=("mtime_ns",))
    changes = [
        lambda: (tree / "a").write_text("2"),
        lambda: os.chmod(tree / "a", 0o600),
        lambda: os.chown(tree / "a", 1, 2),
        lambda: os.setxattr(tree / "a", "user.x", b""),
        lambda: os.link(tree / "a", tree / "c"),
        lambda: os.utime(tree / "d/b", ns=(0, 1)),
        lambda: (tree / "d/b").unlink(),
    ]
    for change in changes:
        change()
        now = tree.snapshot(times=("mtime_ns",))
        assert difference(before, now) != []
        assert difference(now, now) == []
        before = now


@pytest.mark.on("overlay")
def test_a_changed_layer_is_noticed(workshop: Workshop) -> None:
    tree = workshop({"a": "1"})
    (tree.stack.lowers[0] / "a").write_text("2")
    with pytest.raises(AssertionError, match="a: content is"):
        workshop.finish(failed=False)
    workshop.forget_layer(tree.stack.lowers[0])


@pytest.mark.on("overlay")
def test_whiteouts_are_made_in_every_dialect(workshop: Workshop) -> None:
    for dialect in ("device", "xattr"):
        tree = workshop({"d/x": Whiteout(dialect)}, {"d/x": "", "d/y": ""})
        assert sorted(snapshot(tree.root)) == [b".", b"d", b"d/y"]
