"""Open descriptors: after unlink, rename and copy-up; mappings, locks, flags."""

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import stat
import subprocess
import sys
import threading
import time

import pytest
from harness.layers import File, HardLink
from harness.linux import children
from harness.mounts import LANES, Workshop

STACK = {"f": File(data="from below", mode=0o640), "d/g": "g", "one": "1", "two": HardLink("one")}


@pytest.mark.doors
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_an_unlinked_file_lives_on_while_it_is_open(workshop: Workshop, flags: int) -> None:
    tree = workshop(STACK)
    descriptor = os.open(tree / "f", flags)
    try:
        os.unlink(tree / "f")
        info = os.fstat(descriptor)
        # kernel overlayfs goes on showing the lower file's count if nothing was copied up
        lower = tree.kind == "overlay" and flags == os.O_RDONLY
        assert (info.st_nlink, info.st_size) == (1 if lower else 0, 10)
        assert os.read(descriptor, 100) == b"from below"
        if lower:  # … and refuses to change it (EEXIST out of its index)
            return
        os.fchmod(descriptor, 0o600)
        os.fchown(descriptor, 5, 6)
        os.utime(descriptor, ns=(1, 2))
        os.setxattr(descriptor, "user.x", b"y")
        info = os.fstat(descriptor)
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_mtime_ns) == (0o600, 5, 2)
        assert os.getxattr(descriptor, "user.x") == b"y"
        if flags == os.O_RDWR:
            os.pwrite(descriptor, b"WRITTEN", 0)
            os.ftruncate(descriptor, 9)
            assert os.pread(descriptor, 100, 0) == b"WRITTENlo"
            assert os.fstat(descriptor).st_size == 9
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    assert not (tree / "f").exists()
    tree.remount()
    assert not (tree / "f").exists()


@pytest.mark.doors
def test_a_new_file_with_the_name_of_an_unlinked_open_one(workshop: Workshop) -> None:
    tree = workshop(STACK)
    with open(tree / "f", "r+") as old:
        os.unlink(tree / "f")
        (tree / "f").write_text("new")
        old.write("OLD")
        old.flush()
        assert os.fstat(old.fileno()).st_ino != os.stat(tree / "f").st_ino
        assert (tree / "f").read_text() == "new"
        old.seek(0)
        assert old.read() == "OLDm below"
        assert os.fstat(old.fileno()).st_nlink == 0


def test_one_of_two_links_is_unlinked_while_open(workshop: Workshop) -> None:
    tree = workshop(STACK)
    with open(tree / "one", "r+") as file:
        os.unlink(tree / "one")
        assert os.fstat(file.fileno()).st_nlink == 1
        file.write("changed")
    assert (tree / "two").read_text() == "changed"


def test_a_file_replaced_by_rename_lives_on_while_it_is_open(workshop: Workshop) -> None:
    tree = workshop(STACK)
    with open(tree / "f", "r+") as old:
        os.rename(tree / "d/g", tree / "f")
        assert os.fstat(old.fileno()).st_nlink == 0
        old.seek(0, os.SEEK_END)
        old.write("+")
        old.seek(0)
        assert old.read() == "from below+"
    assert (tree / "f").read_text() == "g"


def test_renamed_chmodded_and_linked_files_work_through_the_descriptor(workshop: Workshop) -> None:
    tree = workshop(STACK)
    with open(tree / "f", "r+") as file:
        os.rename(tree / "f", tree / "d/renamed")
        os.chmod(tree / "d/renamed", 0o400)
        os.link(tree / "d/renamed", tree / "link")
        file.write("FROM")
        file.flush()
        os.ftruncate(file.fileno(), 7)
        info = os.fstat(file.fileno())
        assert (info.st_nlink, info.st_size, stat.S_IMODE(info.st_mode)) == (2, 7, 0o400)
        assert os.path.samestat(info, os.stat(tree / "link"))
    assert (tree / "link").read_text() == "FROM be"


def test_a_reader_stays_with_the_name_it_opened(workshop: Workshop) -> None:
    tree = workshop(STACK)
    reader = os.open(tree / "f", os.O_RDONLY)
    os.chmod(tree / "f", 0)
    os.rename(tree / "f", tree / "g")
    assert os.read(reader, 100) == b"from below"
    os.close(reader)


@pytest.mark.doors
def test_append_goes_to_the_end_whoever_wrote_before(workshop: Workshop) -> None:
    tree = workshop(STACK)
    one = os.open(tree / "f", os.O_WRONLY | os.O_APPEND)
    two = os.open(tree / "f", os.O_WRONLY | os.O_APPEND)
    for number in range(5):
        os.write(one, b"a%d" % number)
        os.write(two, b"b%d" % number)
    os.close(one)
    os.close(two)
    assert (tree / "f").read_text() == "from belowa0b0a1b1a2b2a3b3a4b4"


def test_appending_processes_lose_nothing(workshop: Workshop) -> None:
    tree = workshop(STACK)
    program = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for n in range(200): os.write(fd, b'%s%03d\\n' % (sys.argv[2].encode(), n))\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-S", "-c", program, tree / "d/g", name])
        for name in "xyz"
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = (tree / "d/g").read_text()[1:].split()
    assert sorted(lines) == sorted(f"{name}{n:03}" for name in "xyz" for n in range(200))


def test_flags_of_open(workshop: Workshop) -> None:
    tree = workshop(STACK)
    for flags, code in (
        (os.O_CREAT | os.O_EXCL | os.O_WRONLY, errno.EEXIST),
        (os.O_RDONLY | os.O_DIRECTORY, errno.ENOTDIR),
    ):
        with pytest.raises(OSError) as caught:
            os.open(tree / "f", flags)
        assert caught.value.errno == code
    with pytest.raises(IsADirectoryError):
        os.open(tree / "d", os.O_WRONLY)
    descriptor = os.open(tree / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444)
    os.write(descriptor, b"a file that is not writable by mode was made for writing")
    os.close(descriptor)
    os.close(os.open(tree / "f", os.O_WRONLY | os.O_TRUNC | os.O_SYNC))
    assert (tree / "f").stat().st_size == 0
    os.close(os.open(tree / "d", os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME))


def test_direct_io(workshop: Workshop) -> None:
    tree = workshop({"f": File(data=b"x" * 16384)})
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT):
        descriptor = os.open(tree / "f", flags | os.O_DIRECT)
        buffer = mmap.mmap(-1, 4096)
        assert os.preadv(descriptor, [buffer], 4096) == 4096
        assert buffer[:] == b"x" * 4096
        buffer[:] = b"d" * 4096
        assert os.pwritev(descriptor, [buffer], 8192) == 4096
        os.close(descriptor)
    data = (tree / "f").read_bytes()
    assert data == b"x" * 8192 + b"d" * 4096 + b"x" * 4096


@pytest.mark.doors
def test_shared_mappings_reach_the_file(workshop: Workshop) -> None:
    tree = workshop({"f": File(data=b"a" * 10_000), "g": ""})
    with open(tree / "f", "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[5000:5004] = b"MMAP"
        shared.flush()
        file.seek(5000)
        assert file.read(4) == b"MMAP"
    assert (tree / "f").read_bytes()[4999:5005] == b"aMMAPa"
    tree.remount()
    assert (tree / "f").read_bytes()[4999:5005] == b"aMMAPa"


def test_a_mapping_outlives_its_descriptor_and_its_name(workshop: Workshop) -> None:
    tree = workshop({"f": File(data=b"a" * 10_000)})
    descriptor = os.open(tree / "f", os.O_RDWR)
    shared = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    shared[0:5] = b"later"
    shared.flush()
    assert (tree / "f").read_bytes()[:5] == b"later"
    os.unlink(tree / "f")
    shared[0:5] = b"never"
    shared.flush()
    assert shared[0:6] == b"nevera"
    shared.close()


def test_private_mappings_do_not(workshop: Workshop) -> None:
    tree = workshop({"f": File(data=b"a" * 10_000)})
    with open(tree / "f", "rb") as file:
        private = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    private[0:4] = b"mine"
    assert (tree / "f").read_bytes()[:4] == b"aaaa"
    assert private[0:5] == b"minea"
    private.close()
    if tree.kind != "plain":
        assert os.listdir(tree.upper) == []


def test_mtime_follows_a_shared_mapping(workshop: Workshop) -> None:
    tree = workshop({"f": File(data=b"a" * 4096)})
    descriptor = os.open(tree / "f", os.O_RDWR)
    before = os.stat(tree / "f").st_mtime_ns
    shared = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    shared[0] = 1
    shared.flush()
    shared.close()
    limit = time.monotonic() + 5
    while os.stat(tree / "f").st_mtime_ns == before and time.monotonic() < limit:
        time.sleep(0.1)
    assert os.stat(tree / "f").st_mtime_ns > before


def test_a_program_in_the_mount_can_be_run(workshop: Workshop) -> None:
    import shutil

    tree = workshop({"bin/x": ""})
    (tree / "bin/x").unlink()
    shutil.copy("/bin/true", tree / "bin/true")
    (tree / "bin/script").write_text("#!/bin/sh\necho it runs\n")
    os.chmod(tree / "bin/script", 0o755)
    assert subprocess.run([tree / "bin/true"]).returncode == 0
    said = subprocess.run([tree / "bin/script"], stdout=subprocess.PIPE, check=True).stdout
    assert said == b"it runs\n"


def _tries_to_lock(path: str, call: str) -> bool:
    program = (
        f"import fcntl, sys\nf = open(sys.argv[1], 'r+')\n"
        f"try: fcntl.{call}(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        f"except BlockingIOError: sys.exit(7)\n"
    )
    code = subprocess.run([sys.executable, "-S", "-c", program, path]).returncode
    assert code in (0, 7)
    return code == 0


@pytest.mark.doors
@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_locks_are_seen_by_other_processes(workshop: Workshop, call: str) -> None:
    tree = workshop(STACK)
    path = str(tree / "f")
    with open(path, "r+") as file:
        getattr(fcntl, call)(file, fcntl.LOCK_EX)
        assert not _tries_to_lock(path, call)
        getattr(fcntl, call)(file, fcntl.LOCK_UN)
        assert _tries_to_lock(path, call)
        getattr(fcntl, call)(file, fcntl.LOCK_EX)
    assert _tries_to_lock(path, call)


def test_a_waiting_lock_can_be_interrupted(workshop: Workshop) -> None:
    tree = workshop(STACK)
    program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX)"
    with open(tree / "f", "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        waiting = subprocess.Popen([sys.executable, "-S", "-c", program, tree / "f"])
        time.sleep(0.3)
        assert waiting.poll() is None
        waiting.terminate()
        assert waiting.wait(5) == -15


def test_sparse_files_are_written_and_read(workshop: Workshop) -> None:
    tree = workshop({"d/x": ""})
    with open(tree / "d/sparse", "wb") as file:
        file.seek(100 << 20)
        file.write(b"end")
    info = os.stat(tree / "d/sparse")
    assert info.st_size == (100 << 20) + 3
    assert info.st_blocks * 512 < 1 << 20
    with open(tree / "d/sparse", "rb") as file:
        file.seek(50 << 20)
        assert file.read(10) == bytes(10)


@pytest.mark.on("plain", "overlay", "unionfuse")
def test_fsync_of_files_and_directories(workshop: Workshop) -> None:
    tree = workshop(STACK)
    for path, flags in (("f", os.O_RDWR), ("d/g", os.O_RDONLY), ("d", os.O_RDONLY)):
        descriptor = os.open(tree / path, flags)
        os.fsync(descriptor)
        os.fdatasync(descriptor)
        os.close(descriptor)
    os.sync()


def test_big_writes_and_reads(workshop: Workshop) -> None:
    tree = workshop({"f": ""})
    data = os.urandom(5_000_001)
    (tree / "f").write_bytes(data)
    assert (tree / "f").read_bytes() == data
    with open(tree / "f", "rb") as file:
        for offset in (0, 1, 4095, 4096, 131_072, 1_048_575, 4_999_999):
            file.seek(offset)
            assert file.read(70_000) == data[offset : offset + 70_000]
    with open(tree / "f", "r+b") as file:
        file.seek(1_000_003)
        file.write(b"z" * 300_000)
    tree.remount()
    assert (tree / "f").read_bytes() == data[:1_000_003] + b"z" * 300_000 + data[1_300_003:]


def test_readers_and_writers_at_once(workshop: Workshop) -> None:
    tree = workshop({"f": File(data=b"\0" * 65536)})
    stop, errors = threading.Event(), []

    def read() -> None:
        with open(tree / "f", "rb", buffering=0) as file:
            while not stop.is_set():
                file.seek(0)
                block = file.read(4096)
                if len(set(block)) > 2:  # one page is written at once
                    errors.append(set(block))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    with open(tree / "f", "r+b", buffering=0) as file:
        for number in range(200):
            file.seek(0)
            file.write(bytes([number]) * 65536)
    stop.set()
    for reader in readers:
        reader.join()
    assert errors == []


def test_statfs_is_that_of_the_upper(workshop: Workshop) -> None:
    tree = workshop(STACK)
    shown = os.statvfs(tree.root)
    below = os.statvfs(tree.root if tree.kind == "plain" else tree.upper)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(shown, field) == getattr(below, field), field
    assert abs(shown.f_bavail - below.f_bavail) * below.f_frsize < 1 << 30


def test_sockets_and_fifos_work(workshop: Workshop) -> None:
    import socket

    tree = workshop({"d/x": ""})
    os.mkfifo(tree / "d/fifo")
    reader = os.open(tree / "d/fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tree / "d/fifo", os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 10) == b"through"
    os.close(reader)
    os.close(writer)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tree / "d/socket"))
        server.listen()
        client.connect(str(tree / "d/socket"))


@pytest.mark.on("overlay", "unionfuse")
def test_atime_of_lower_files_never_changes(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", mtime_ns=1_000_000_000), "d/g": ""})
    lower = tree.stack.lowers[0]

    def atimes() -> list[int]:
        return [os.lstat(lower / name).st_atime_ns for name in ("", "f", "d", "d/g")]

    before = atimes()
    (tree / "f").read_text()
    (tree / "d/g").read_text()
    os.listdir(tree / "d")
    with open(tree / "f", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[0] == ord("x")
    os.chmod(tree / "f", 0o600)
    assert atimes() == before


@pytest.mark.on("plain", "overlay", "unionfuse")
def test_atime_of_an_upper_file_follows_relatime(workshop: Workshop) -> None:
    tree = workshop({"d/x": ""})
    (tree / "f").write_text("x")
    os.utime(tree / "f", ns=(1_000_000_000, 2_000_000_000))
    (tree / "f").read_text()
    if tree.kind != "plain":
        tree.remount()
    assert os.stat(tree / "f").st_atime_ns > 2_000_000_000


@pytest.mark.on("overlay", "unionfuse")
def test_unlinked_open_files_leave_nothing_in_work(workshop: Workshop) -> None:
    tree = workshop(STACK)
    with open(tree / "f", "r+") as first, open(tree / "d/g", "r+") as second:
        for name, file in (("f", first), ("d/g", second)):
            os.unlink(tree / name)
            file.write("x")
    tree.unmount()  # which looks into work
    assert {path.name for path in tree.upper.rglob("*")} == {"f", "d", "g"}


@pytest.mark.doors
@pytest.mark.on("unionfuse")
def test_more_open_files_than_the_daemon_may_have_descriptors(workshop: Workshop) -> None:
    open_many_files(workshop, {})


@pytest.mark.doors
@pytest.mark.on("unionfuse")
@pytest.mark.through(*LANES)
@pytest.mark.parametrize("options", [{"passthrough": "off"}, {"keeper": "on"}], ids=str)
def test_more_open_files_than_descriptors_by_parts_of_the_lane(
    workshop: Workshop, options: dict[str, str | None]
) -> None:
    open_many_files(workshop, options)


def open_many_files(workshop: Workshop, options: dict[str, str | None]) -> None:
    lower = {f"low{number}": f"lower {number}" for number in range(100)}
    tree = workshop({**lower, "one": "the one"}, options=options)
    assert tree.daemon is not None
    first = tree.daemon.process.pid
    for process in (first, *children(first)):  # a keeper has its daemon for a child
        resource.prlimit(process, resource.RLIMIT_NOFILE, (300, 300))
    os.mkdir(tree / "d")
    with contextlib.ExitStack() as opened:
        readers = [opened.enter_context(open(tree / name)) for name in lower]
        again = [opened.enter_context(open(tree / "one")) for _ in range(200)]
        writers = [opened.enter_context(open(tree / f"d/{n}", "w+")) for n in range(400)]
        for number, file in enumerate(writers):
            file.write(f"upper {number}")
            file.flush()
        for number in range(0, 40, 2):
            os.unlink(tree / f"d/{number}")
            os.chmod(tree / f"d/{number + 1}", 0)
        os.rename(tree / "d", tree / "e")
        (tree / "low1").write_text("copied up")
        os.unlink(tree / "low2")
        for number, file in enumerate(writers):
            os.pwrite(file.fileno(), b"UPPER", 0)
            os.fsync(file.fileno()) if number % 50 == 0 else None
            assert os.pread(file.fileno(), 100, 0) == b"UPPER %d" % number
            assert os.fstat(file.fileno()).st_size == len(f"upper {number}")
        os.ftruncate(writers[0].fileno(), 5)
        os.ftruncate(writers[300].fileno(), 5)
        assert os.pread(writers[0].fileno(), 100, 0) == b"UPPER"
        assert (tree / "e/300").read_text() == "UPPER"
        for number, file in enumerate(readers):
            expected = "copied up" if number == 1 else f"lower {number}"
            assert os.pread(file.fileno(), 100, 0) == expected.encode()
        assert {os.pread(file.fileno(), 100, 0) for file in again} == {b"the one"}
