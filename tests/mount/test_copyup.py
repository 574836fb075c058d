"""A lower file that changes is copied up: whole, once, and so that nobody notices."""

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from harness.layers import MTIME_NS, Dir, File, HardLink, Special, Symlink
from harness.mounts import Workshop
from harness.snapshot import assert_equal

# cap_net_raw=ep as the kernel stores it (include/uapi/linux/capability.h, revision 2)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")[:20]
# user::rw- user:33:r-- group::r-- mask::r-- other::--- (include/uapi/linux/posix_acl_xattr.h)
ACL = bytes.fromhex(
    "02000000" "01000600ffffffff" "0200040021000000" "04000400ffffffff" "10000400ffffffff"
    "20000000ffffffff"
)  # fmt: skip
CONTENT = b"from below\n"


def rich_file() -> File:
    return File(
        data=CONTENT,
        mode=0o6750,
        uid=11,
        gid=12,
        xattrs={
            "user.plain": b"value",
            "user.empty": b"",
            "security.capability": CAPABILITY,
            "trusted.mine": b"\x00\xff",
            "system.posix_acl_access": ACL,
        },
    )


CHANGES: dict[str, Callable[[str], None]] = {
    "append": lambda path: _open_write(path, os.O_WRONLY | os.O_APPEND),
    "open for writing": lambda path: os.close(os.open(path, os.O_WRONLY)),
    "open for both": lambda path: os.close(os.open(path, os.O_RDWR)),
    "truncate": lambda path: os.truncate(path, 3),
    "grow": lambda path: os.truncate(path, 100),
    "O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "chmod": lambda path: os.chmod(path, 0o604),
    "chown": lambda path: os.chown(path, 21, 22),
    "utimens": lambda path: os.utime(path, ns=(1, 999_999_999)),
    "setxattr": lambda path: os.setxattr(path, "user.new", b"new"),
    "removexattr": lambda path: os.removexattr(path, "user.plain"),
    "link": lambda path: os.link(path, path + ".link"),
    "rename": lambda path: os.rename(path, path + ".renamed"),
}


def _open_write(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    os.write(descriptor, b"more")
    os.close(descriptor)


@pytest.mark.doors
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.on("overlay", "unionfuse")
def test_each_change_does_to_a_lower_file_what_it_does_to_a_plain_one(
    workshop: Workshop, change: str
) -> None:
    # three trees in one test: the plain directory is the oracle
    stack = {"d/e/file": rich_file(), "d/e/other": "other"}
    tree, plain = workshop(stack), workshop(stack, kind="plain")
    for root in (tree.root, plain.root):
        CHANGES[change](f"{root}/d/e/file")
    seen, wanted = tree.snapshot(), plain.snapshot()
    assert_equal(seen, wanted)
    times = [
        {path: os.lstat(os.fsencode(root) + b"/" + path).st_mtime_ns for path in seen
         if b"file" in path}
        for root in (tree.root, plain.root)
    ]  # fmt: skip
    if change in ("chmod", "chown", "utimens", "setxattr", "removexattr", "link", "rename"):
        assert times[0] == times[1]
    tree.remount()
    assert_equal(tree.snapshot(), wanted)


def test_reading_copies_nothing_up(workshop: Workshop) -> None:
    tree = workshop({"f": CONTENT.decode()})
    assert (tree / "f").read_bytes() == CONTENT
    for flags in (os.O_RDONLY, os.O_PATH, os.O_RDONLY | os.O_NOFOLLOW):
        os.close(os.open(tree / "f", flags))
    if tree.kind != "plain":
        assert os.listdir(tree.upper) == []


@pytest.mark.on("overlay", "unionfuse")
def test_parents_are_copied_up_with_their_attributes(workshop: Workshop) -> None:
    tree = workshop(
        {"a/b/c/file": "x"},
        {
            "a": Dir(mode=0o2775, uid=1, gid=2),
            "a/b": Dir(mode=0o1777, xattrs={"user.x": b"1"}),
            "a/b/c/other": "y",
        },
    )
    before = tree.snapshot(times=["mtime_ns"])
    os.chmod(tree / "a/b/c/file", 0o600)
    after = tree.snapshot(times=["mtime_ns"])
    assert {path for path in before if before[path] != after[path]} == {b"a/b/c/file"}
    assert sorted(os.listdir(tree.upper / "a/b/c")) == ["file"]


@pytest.mark.on("overlay", "unionfuse")
@pytest.mark.parametrize(
    "name, spec",
    {
        "symlink": Symlink("nowhere", uid=5, gid=6),
        "fifo": Special(mode=0o640, uid=5),
        "socket": Special(kind=stat.S_IFSOCK, mode=0o600),
        "character device": Special(kind=stat.S_IFCHR, device=os.makedev(1, 3), mode=0o666),
        "block device": Special(kind=stat.S_IFBLK, device=os.makedev(7, 200), mode=0o600),
        "directory": Dir(mode=0o700, xattrs={"user.a": b"b"}),
        "empty file": File(mode=0),
    }.items(),
)
def test_every_kind_is_copied_up(workshop: Workshop, name: str, spec: object) -> None:
    stack = {"x": spec, "d/y": ""}
    tree, plain = workshop(stack), workshop(stack, kind="plain")
    for root in (tree.root, plain.root):
        os.chown(root / "x", 77, 78, follow_symlinks=False)
        os.utime(root / "x", ns=(5, 6), follow_symlinks=False)
    assert tree.snapshot(times=["mtime_ns"])[b"x"] == plain.snapshot(times=["mtime_ns"])[b"x"]
    tree.remount()
    assert tree.snapshot(times=["mtime_ns"])[b"x"] == plain.snapshot(times=["mtime_ns"])[b"x"]


@pytest.mark.on("overlay", "unionfuse")
def test_holes_stay_holes(workshop: Workshop) -> None:
    size = 1 << 30
    tree = workshop({"sparse": File(parts={0: b"a", 512 << 20: b"b" * 5000}, size=size)})
    with open(tree / "sparse", "r+b") as file:
        file.seek(600 << 20)
        file.write(b"c")
    copy = os.stat(tree.upper / "sparse")
    assert copy.st_size == size
    assert copy.st_blocks * 512 < 16 << 20
    with open(tree / "sparse", "rb") as file:
        for offset, byte in ((0, b"a"), (512 << 20, b"b"), (600 << 20, b"c"), (700 << 20, b"\0")):
            file.seek(offset)
            assert file.read(1) == byte


@pytest.mark.on("overlay", "unionfuse")
def test_truncation_on_open_copies_no_data(workshop: Workshop) -> None:
    tree = workshop({"big": File(size=1 << 40, mode=0o640)})  # more than the disk holds
    with open(tree / "big", "wb") as file:
        file.write(b"small")
    assert (tree / "big").read_bytes() == b"small"
    assert stat.S_IMODE((tree / "big").stat().st_mode) == 0o640


def test_times_are_kept_to_the_nanosecond(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", mtime_ns=MTIME_NS)})
    os.chmod(tree / "f", 0o600)
    info = (tree / "f").stat()
    assert (info.st_atime_ns, info.st_mtime_ns) == (MTIME_NS, MTIME_NS)


def test_a_reader_that_was_there_before_sees_the_old_or_the_new_file_whole(
    workshop: Workshop,
) -> None:
    tree = workshop({"f": "old" * 1000})
    with open(tree / "f", "rb") as reader:
        assert reader.read(3) == b"old"
        (tree / "f").write_bytes(b"new" * 1000)
        reader.seek(0)
        # kernel overlayfs leaves the reader with the lower file; a plain directory does not
        assert reader.read() in (b"old" * 1000, b"new" * 1000)
    assert (tree / "f").read_bytes() == b"new" * 1000


@pytest.mark.doors
@pytest.mark.on("overlay", "unionfuse")
def test_racing_writers_cause_one_copy(workshop: Workshop) -> None:
    tree = workshop({"f": File(data=b"x" * (4 << 20)), "d/g": ""})
    writer = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY)\n"
        "os.pwrite(fd, sys.argv[2].encode(), int(sys.argv[2]))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", writer, tree / "f", str(number)])
        for number in range(8)
    ]
    assert [process.wait() for process in processes] == [0] * 8
    data = (tree / "f").read_bytes()
    assert data[:8] == b"01234567" and len(data) == 4 << 20 and set(data[8:]) == {ord("x")}


@pytest.mark.on("overlay", "unionfuse")
def test_racing_threads_in_every_operation(workshop: Workshop) -> None:
    tree = workshop({f"d{n}/file": "x" * 100_000 for n in range(20)})
    errors: list[BaseException] = []

    def change(what: Callable[[str], None]) -> None:
        try:
            for number in range(20):
                what(str(tree / f"d{number}/file"))
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=change, args=(what,))
        for what in (
            lambda path: os.chmod(path, 0o600),
            lambda path: _open_write(path, os.O_WRONLY | os.O_APPEND),
            lambda path: os.setxattr(path, "user.x", b"y"),
            lambda path: os.link(path, path + ".2"),
            lambda path: os.utime(path, ns=(1, 2)),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(20):
        path = tree / f"d{number}/file"
        assert path.read_bytes() == b"x" * 100_000 + b"more"
        assert os.path.samefile(path, str(path) + ".2")
        assert path.stat().st_nlink == 2
        assert os.getxattr(path, "user.x") == b"y"


@pytest.mark.doors
@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("call", ["clone_file", "fsync"])
def test_a_slow_copy_or_fsync_does_not_hold_up_others(workshop: Workshop, call: str) -> None:
    """The call does not end before the others have been answered."""
    armed, trace = workshop.directory / "armed", workshop.directory / "trace"
    environment = {
        "UNIONFUSE_TEST_HOLD": call,
        "UNIONFUSE_TEST_ARMED_BY": str(armed),
        "UNIONFUSE_TEST_TRACE": str(trace),
    }
    stack = {"big": File(data=os.urandom(300_000)), "d/x": "x"}
    tree = workshop(stack, environment=environment)
    with open(tree / "written", "w") as file:
        armed.touch()
        if call == "fsync":
            slow = threading.Thread(target=os.fsync, args=(file.fileno(),))
        else:
            slow = threading.Thread(target=os.chmod, args=(tree / "big", 0o600))
        slow.start()
        try:
            while not trace.exists() or f" {call} " not in trace.read_text():
                time.sleep(0.01)
            assert os.listdir(tree / "d") == ["x"]
            assert (tree / "d/x").read_text() == "x"
            assert not (tree / "missing").exists()
            (tree / "d/new").write_text("new")
            os.mkdir(tree / "d/directory")
            assert slow.is_alive()
        finally:
            armed.unlink()
            slow.join()
    assert os.stat(tree / "written").st_size == 0


@pytest.mark.on("overlay", "unionfuse")
def test_metacopy_copies_no_data_for_attributes(workshop: Workshop) -> None:
    size = 1 << 40  # more than the disk holds: copying the data would fail
    tree = workshop(
        {"big": File(size=size), "small": "x" * 10_000, "links/a": "y" * 9_000,
         "links/b": HardLink("links/a")},
        options={"metacopy": "on"},
    )  # fmt: skip
    os.chmod(tree / "big", 0o640)
    os.chown(tree / "big", 5, 6)
    os.setxattr(tree / "big", "user.x", b"y")
    os.utime(tree / "big", ns=(7, 8))
    os.rename(tree / "big", tree / "moved")
    os.chmod(tree / "small", 0o600)
    os.chmod(tree / "links/a", 0o601)

    def check() -> None:
        info = os.stat(tree / "moved")
        assert (info.st_size, info.st_mtime_ns, stat.S_IMODE(info.st_mode)) == (size, 8, 0o640)
        assert (info.st_uid, info.st_gid) == (5, 6)
        assert os.getxattr(tree / "moved", "user.x") == b"y"
        assert os.listxattr(tree / "moved") == ["user.x"]
        with open(tree / "moved", "rb") as file:
            assert file.read(4096) == bytes(4096)
        assert (tree / "small").read_bytes() == b"x" * 10_000
        assert (tree / "links/b").read_bytes() == b"y" * 9_000
        assert stat.S_IMODE(os.stat(tree / "links/b").st_mode) == 0o601

    check()
    assert os.stat(tree.upper / "small").st_blocks * 512 < 10_000
    assert "trusted.overlay.metacopy" in os.listxattr(tree.upper / "small")
    other = {"overlay": "unionfuse"}.get(tree.kind, "overlay")
    for kind in (tree.kind, other, tree.kind):
        tree.remount(kind)
        check()
    with open(tree / "small", "ab") as file:
        file.write(b"!")
    assert (tree / "small").read_bytes() == b"x" * 10_000 + b"!"
    assert "trusted.overlay.metacopy" not in os.listxattr(tree.upper / "small")


@pytest.mark.doors
@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("size", [1000, 300_000])
def test_a_metacopy_that_gets_its_data_stays_as_it_was(workshop: Workshop, size: int) -> None:
    file = File(data=os.urandom(size), xattrs={"security.capability": CAPABILITY})
    tree = workshop({"file": file}, options={"metacopy": "on"})
    os.chmod(tree / "file", 0o4711)
    before = tree.snapshot(times=["mtime_ns"])
    os.close(os.open(tree / "file", os.O_RDWR))
    assert "trusted.overlay.metacopy" not in os.listxattr(tree.upper / "file")
    assert_equal(tree.snapshot(times=["mtime_ns"]), before)


@pytest.mark.doors
@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("change", ["O_TRUNC", "truncate", "utimens"])
def test_a_change_counts_that_comes_while_a_metacopy_gets_its_data(
    workshop: Workshop, change: str
) -> None:
    armed, trace = workshop.directory / "armed", workshop.directory / "trace"
    environment = {
        "UNIONFUSE_TEST_HOLD": "clone_file",
        "UNIONFUSE_TEST_ARMED_BY": str(armed),
        "UNIONFUSE_TEST_TRACE": str(trace),
    }
    options = {"metacopy": "on"}
    tree = workshop({"f": File(data=b"x" * 300_000)}, options=options, environment=environment)
    changes: dict[str, Callable[[str], None]] = {
        "O_TRUNC": lambda path: _open_write(path, os.O_WRONLY | os.O_TRUNC),
        "truncate": lambda path: os.truncate(path, 0),
        "utimens": lambda path: os.utime(path, ns=(1, 2)),
    }
    os.chmod(tree / "f", 0o600)
    armed.touch()
    filling = threading.Thread(target=lambda: os.close(os.open(tree / "f", os.O_RDWR)))
    changing = threading.Thread(target=changes[change], args=(str(tree / "f"),))
    filling.start()
    try:
        while not trace.exists() or " clone_file " not in trace.read_text():
            time.sleep(0.01)
        changing.start()
        changing.join(0.5)  # until it waits, or has been done too early
    finally:
        armed.unlink()
        filling.join()
        changing.join()
    for _ in range(2):
        if change == "utimens":
            assert os.stat(tree / "f").st_mtime_ns == 2
        else:
            wanted = b"more" if change == "O_TRUNC" else b""
            assert (tree / "f").read_bytes() == wanted
        tree.remount()


@pytest.mark.on("overlay", "unionfuse")
def test_a_full_disk_leaves_the_tree_as_it_was(workshop: Workshop) -> None:
    from harness import linux
    from harness.mounts import Stack

    base = workshop.directory / "small"
    base.mkdir()
    disk = base / "disk"
    disk.mkdir()
    linux.mount("tmpfs", disk, "tmpfs", data="size=2m")
    stack = Stack.make(base / "stack", [{"big": File(data=b"x" * (8 << 20)), "d/f": "f"}])
    stack.upper, stack.work = disk / "upper", disk / "work"
    stack.upper.mkdir()
    stack.work.mkdir()
    tree = workshop.mount(stack, options={} if workshop.kind == "unionfuse" else {"index": "off"})
    before = tree.snapshot()
    for change in (
        lambda: os.chmod(tree / "big", 0o600),
        lambda: os.open(tree / "big", os.O_RDWR),
        lambda: os.rename(tree / "big", tree / "d/moved"),
        lambda: os.link(tree / "big", tree / "d/linked"),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.ENOSPC
        assert_equal(tree.snapshot(), before)
    (tree / "d/f").write_text("still works")
    tree.unmount()
    linux.umount(disk)
