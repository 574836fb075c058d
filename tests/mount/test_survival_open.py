"""What was open, or answered without Python, goes on when the daemon was killed (keeper=on)."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.backings import backing_ids
from harness.layers import HardLink, Layer
from harness.mounts import Mounted, Workshop
from harness.snapshot import assert_equal
from harness.waiting import wait_until

pytestmark = [
    pytest.mark.on("unionfuse"),
    # A keeper needs the express lane on its classic transport.
    pytest.mark.through("unionfuse", "unionfuse-indexed"),
    pytest.mark.timeout(300),
]


def test_open_and_deleted_files_go_on(workshop: Workshop) -> None:
    tree = workshop({"low": "below", "gone": "deleted", "d/x": "x"}, options={"keeper": "on"})
    reader = os.open(tree / "low", os.O_RDONLY)
    lower = os.open(tree / "gone", os.O_RDONLY)
    upper = os.open(tree / "new", os.O_RDWR | os.O_CREAT)
    secret = os.open(tree / "only-mine", os.O_WRONLY | os.O_CREAT, 0)
    nameless = os.open(tree.root, os.O_TMPFILE | os.O_RDWR, 0o600)
    inside = os.open(tree / "d", os.O_RDONLY | os.O_DIRECTORY)
    os.write(upper, b"1")
    os.write(nameless, b"a")
    for name in ("gone", "new", "d/x"):
        (tree / name).unlink()
    (tree / "d").rmdir()
    inodes = [os.fstat(descriptor).st_ino for descriptor in (reader, lower, upper, nameless)]
    for _ in range(2):
        tree.kill_daemon()
        assert os.pread(reader, 9, 0) == b"below"
        assert os.pread(lower, 9, 0) == b"deleted"
        for descriptor in (upper, secret, nameless):
            os.write(descriptor, b"2")
        assert os.fstat(upper).st_nlink == 0
        assert os.listdir(inside) == []
        found = [os.fstat(descriptor).st_ino for descriptor in (reader, lower, upper, nameless)]
        assert found == inodes
    assert os.pread(upper, 9, 0) == b"122"
    assert os.pread(nameless, 9, 0) == b"a22"
    # With a descriptor given Python says AT_SYMLINK_FOLLOW.
    os.link(f"/proc/self/fd/{nameless}", tree / "named", src_dir_fd=inside, follow_symlinks=True)
    for descriptor in (reader, lower, upper, secret, nameless, inside):
        os.close(descriptor)
    tree.kill_daemon()
    assert (tree / "named").read_bytes() == b"a22"
    assert (tree / "only-mine").read_bytes() == b"22"
    assert (tree / "only-mine").stat().st_mode & 0o777 == 0
    assert sorted(os.listdir(tree.root)) == ["low", "named", "only-mine"]


def test_the_last_of_several_daemons_leaves_nothing_in_work(workshop: Workshop) -> None:
    tree = workshop({"f": "x", "g": "y"}, options={"keeper": "on", "volatile": None})
    tree.kill_daemon()
    (tree / "f").unlink()
    tree.remount()  # it ended cleanly: volatile does not say otherwise
    assert os.listdir(tree.root) == ["g"]


def test_a_lower_hard_link_is_one_file_after_a_kill(workshop: Workshop) -> None:
    tree = workshop({"a": "data", "b": HardLink("a"), "c": HardLink("a")}, options={"keeper": "on"})
    with open(tree / "a", "a") as opened:
        (tree / "a").unlink()
        tree.kill_daemon()
        opened.write("+")
    assert [(tree / name).read_text() for name in "bc"] == ["data+"] * 2
    assert (tree / "b").stat().st_nlink == 2


def test_every_name_of_a_hard_link_is_known_after_a_kill(workshop: Workshop) -> None:
    """The kernel has the other name, and asks for the node by its id: it is not deleted yet."""
    tree = workshop({"low": "low", "lowlink": HardLink("low")}, options={"keeper": "on"})
    (tree / "first").write_text("data")
    os.link(tree / "first", tree / "second")
    os.link(tree / "first", tree / "third")
    for name in ("first", "second", "third", "low", "lowlink"):
        (tree / name).stat()
    tree.kill_daemon()
    (tree / "first").unlink()
    (tree / "low").unlink()
    assert (tree / "second").read_text() == "data"
    assert (tree / "lowlink").read_text() == "low"
    assert (tree / "second").stat().st_nlink == 2
    os.rename(tree / "second", tree / "renamed")
    tree.kill_daemon()
    (tree / "third").unlink()
    assert (tree / "renamed").read_text() == "data"
    assert (tree / "renamed").stat().st_nlink == 1


# --- what the kernel and the compiled loop do by themselves -----------------------------------


def test_files_that_are_passed_through_go_on(workshop: Workshop) -> None:
    """The kernel keeps backing ids beyond the daemon; a second id for an open file gives EIO."""
    tree = workshop({"low": "low"}, options={"stats": None})
    with open(tree / "new", "wb+", buffering=0) as first, ExitStack() as opened:
        first.write(b"1")
        for number in range(3):
            tree.kill_daemon()
            second = opened.enter_context(open(tree / "new", "ab", buffering=0))
            second.write(b"%d" % number)
            assert os.pread(first.fileno(), 9, 0) == b"1012"[: number + 2]
    tree.kill_daemon()
    assert (tree / "new").read_bytes() == b"1012"
    assert tree.status().get("WRITE", 0) == 0
    fresh = tree / "fresh"
    fresh.write_bytes(b"x")
    assert fresh.read_bytes() == b"x"
    assert tree.status().get("READ", 0) == 0


def test_what_one_daemon_opened_the_next_one_opens_again(workshop: Workshop) -> None:
    tree = workshop({"f": "low"}, options={"keeper": "on"})
    for number in range(2):
        tree.kill_daemon()
        path = tree / f"new{number}"
        with open(path, "wb+", buffering=0) as writer:  # the first file that this daemon opens
            writer.write(b"one")
            tree.kill_daemon()
            assert path.read_text() == "one"  # EIO where it is taken for one that was given back
            writer.write(b" two")
            assert path.read_text() == "one two"
    assert tree.daemon is not None
    wait_until(lambda: tree.status()["open"] == 0, 20, "the last RELEASE")
    assert backing_ids(tree.daemon.pid, tree.upper) == 0


def test_opens_that_the_compiled_loop_answered_go_on(workshop: Workshop) -> None:
    contents = {f"f{number}": f"{number}" * 3000 for number in range(8)}
    tree = indexed_again(workshop, contents)
    readers = [os.open(tree / name, os.O_RDONLY) for name in contents]
    drop_pages(readers)
    assert os.pread(readers[0], 9000, 0) == contents["f0"].encode()
    (tree / "f1").unlink()
    (tree / "f2").write_text("changed")
    os.rename(tree / "f3", tree / "renamed")
    for _ in range(2):
        tree.kill_daemon()
        (tree / "f4").unlink(missing_ok=True)
        (tree / "f5").write_text("changed")
        drop_pages(readers)
        found = [os.pread(reader, 9000, 0).decode() for reader in readers]
        expected = list(contents.values())
        expected[2] = expected[5] = "changed"
        assert found == expected
    for reader in readers:
        os.close(reader)
    tree.kill_daemon()
    assert (tree / "f0").read_text() == contents["f0"]


def test_descriptors_end_where_they_began(workshop: Workshop) -> None:
    """After the last close the daemon holds as many descriptors as one that was never killed."""
    tree = indexed_again(workshop, {f"f{number}": f"{number}" for number in range(30)})
    assert tree.daemon is not None
    before = len(os.listdir(f"/proc/{tree.daemon.pid}/fd"))
    readers = [os.open(tree / f"f{number}", os.O_RDONLY) for number in range(30)]
    writers = [os.open(tree / f"new{number}", os.O_RDWR | os.O_CREAT) for number in range(30)]
    drop_pages(readers)
    for descriptor in (*readers, *writers):
        os.read(descriptor, 10)
    (tree / "f3").unlink()
    tree.kill_daemon()
    for descriptor in (*readers, *writers):
        os.close(descriptor)
    os.sync()
    limit = time.monotonic() + 10
    while len(os.listdir(f"/proc/{tree.daemon.pid}/fd")) > before + 4:
        assert time.monotonic() < limit, os.listdir(f"/proc/{tree.daemon.pid}/fd")
        time.sleep(0.05)


def test_the_index_knows_after_a_kill_what_has_changed(workshop: Workshop) -> None:
    """What differs from the lookup index is remembered: the compiled loop would answer from it."""
    layer = {f"d{n}/f{k}": f"{n}{k}" for n in range(3) for k in range(3)}
    plain = workshop(layer)
    lower = plain.stack.lowers[0]
    index = plain.stack.base / "index"
    program = Path(sys.executable).with_name("unionfuse")
    subprocess.run([program, "index", "build", lower, "-o", index], check=True)
    tree = workshop.mount(
        type(plain.stack).around(plain.stack.base.with_name("second"), [lower]),
        options={"keeper": "on", "lookup_index": str(index)},
    )
    subprocess.run(["find", tree.root, "-ls"], check=True, stdout=subprocess.DEVNULL)
    with open(tree / "d0/f0") as held:
        (tree / "d0/f1").chmod(0o600)
        (tree / "d1/f0").unlink()
        (tree / "d1/new").write_text("new")
        os.rename(tree / "d2", tree / "moved")
        os.rename(tree / "d0/f2", tree / "d0/renamed")
        expected = tree.snapshot(inodes=True)
        for _ in range(2):
            tree.kill_daemon()
            Path("/proc/sys/vm/drop_caches").write_text("2")
            assert_equal(expected, tree.snapshot(inodes=True), ("before", "after the kill"))
            assert held.read() in ("00", "")


def drop_pages(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def indexed_again(workshop: Workshop, layer: Layer) -> Mounted:
    """A mount of the usual options with a lookup index."""
    return workshop(layer, kind="unionfuse-indexed")
