"""How many requests the kernel sends for changes: what need not be asked is not asked."""

import errno
import os
import subprocess
from pathlib import Path
from threading import Thread

import pytest
from harness.layers import File
from harness.mounts import Workshop

pytestmark = pytest.mark.on("unionfuse")

NUMBER = 20


def _drop_forgets(counts: dict[str, int]) -> None:
    """When the kernel lets go of what came before is its own affair."""
    counts.pop("FORGET", 0)
    counts.pop("BATCH_FORGET", 0)


def test_creating_files_asks_for_the_directory_alone(workshop: Workshop) -> None:
    """Each new name makes the kernel ask for the directory's attributes, and for nothing else."""
    tree = workshop({"d/old": ""}, options={"stats": None})
    (tree / "d/first").write_bytes(b"")
    with tree.asked() as counts:
        for number in range(NUMBER):
            os.close(os.open(tree / f"d/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    assert counts.pop("CREATE") == NUMBER
    assert abs(counts.pop("RELEASE") - NUMBER) <= 1  # nobody waits for it: one may be late
    assert counts.pop("LOOKUP") == NUMBER
    assert counts.pop("GETATTR") <= NUMBER + 1
    _drop_forgets(counts)
    assert not any(counts.values()), counts


def test_unlinking_asks_for_the_directory_alone(workshop: Workshop) -> None:
    tree = workshop({"d/old": ""}, options={"stats": None})
    for number in range(NUMBER):
        (tree / f"d/{number}").write_bytes(b"")
    with tree.asked() as counts:
        for number in range(NUMBER):
            os.unlink(tree / f"d/{number}")
    counts.pop("RELEASE", 0)  # the last one may be late
    _drop_forgets(counts)
    assert counts.pop("UNLINK") == NUMBER
    assert counts.pop("GETATTR") <= NUMBER + 1
    assert not any(counts.values()), counts


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_change_of_attributes_is_one_request(workshop: Workshop, where: str) -> None:
    files = {f"d/{number}": File(data="x") for number in range(NUMBER)}
    tree = workshop(files if where == "lower" else {"d/old": ""}, options={"stats": None})
    if where == "upper":
        for name in files:
            (tree / name).write_bytes(b"x")
    for name in files:
        os.stat(tree / name)
    with tree.asked() as counts:
        for name in files:
            os.chmod(tree / name, 0o640)
            os.utime(tree / name, ns=(1, 2))
            found = os.stat(tree / name)
            assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o640, 2)
    assert {name: n for name, n in counts.items() if n} == {"SETATTR": 2 * NUMBER}


def test_a_file_that_was_written_is_asked_for_once(workshop: Workshop) -> None:
    """Who writes without reading has no shared map: attributes hold when the descriptor is gone."""
    tree = workshop({"d/old": ""}, options={"stats": None})
    path = tree / "d/new"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    with tree.asked() as counts:
        assert os.fstat(descriptor).st_size == 0
        os.write(descriptor, b"more")
        for _ in range(3):
            assert os.fstat(descriptor).st_size == 4
        os.close(descriptor)
        assert os.stat(path).st_size == 4
    assert counts.pop("GETATTR") <= 2  # one of them of the directory
    assert os.stat(path).st_mtime_ns == os.stat(tree.upper / "d/new").st_mtime_ns


def test_a_small_file_of_a_layer_comes_with_its_open(workshop: Workshop) -> None:
    """Its data is in the page cache when open(2) returns: nobody sends a READ."""
    content = {f"d/{number}": b"%d" % number * (number * 350) for number in range(NUMBER)}
    tree = workshop(content, options={"stats": None})
    names = os.listdir(tree / "d")
    assert len(names) == NUMBER
    for repeated in range(2):
        with tree.asked() as counts:
            for name in content:
                assert (tree / name).read_bytes() == content[name]
        assert counts.get("READ", 0) == counts.get("GETATTR", 0) == 0, counts
        assert counts["OPEN"] == NUMBER, repeated


@pytest.mark.doors
def test_a_file_that_was_read_is_written_and_read(workshop: Workshop) -> None:
    """Pages that came with an open are not what shows once the file is another one."""
    content = {f"d/{number}": b"old %d" % number * 200 for number in range(NUMBER)}
    tree = workshop(content)

    def read_on(path: Path) -> None:
        while (found := path.read_bytes()) and not found.endswith(b"end"):
            assert found.startswith((b"old", b"new"))

    for name, old in content.items():
        path = tree / name
        held = os.open(path, os.O_RDONLY)
        readers = [Thread(target=read_on, args=(path,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        with open(path, "r+b") as file:
            file.write(b"new")
        assert path.read_bytes() == b"new" + old[3:]
        os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(held, 10000, 0) == b"new" + old[3:]
        with open(path, "ab") as file:
            file.write(b"end")
        for reader in readers:
            reader.join(timeout=30)
            assert not reader.is_alive()
        os.unlink(path)
        assert os.pread(held, 10000, 0) == b"new" + old[3:] + b"end"
        os.close(held)


@pytest.mark.doors
def test_a_file_that_is_read_is_deleted_behind_the_reader(workshop: Workshop) -> None:
    """Also one whose pages have gone from the cache."""
    content = {"small": b"small" * 99, "large": bytes(range(256)) * 1000}
    tree = workshop(content)
    held = {name: os.open(tree / name, os.O_RDONLY) for name in content}
    for name, data in content.items():
        assert os.pread(held[name], 10, 0) == data[:10]
        os.unlink(tree / name)
    (tree / "small").write_bytes(b"another")
    for name, data in content.items():
        os.posix_fadvise(held[name], 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(held[name], len(data) + 1, 0) == data
        os.close(held[name])
    assert (tree / "small").read_bytes() == b"another"


def test_listing_again_asks_for_no_extended_attribute(workshop: Workshop) -> None:
    """`ls -l` wants the label and the ACL of each file: the kernel keeps ACLs alone."""
    names = [f"d/{number}" for number in range(NUMBER)]
    tree = workshop(dict.fromkeys(names, "x"), options={"stats": None})
    (tree / "d/new").write_bytes(b"")
    subprocess.run(["ls", "-lR", tree.root], check=True, capture_output=True)
    with tree.asked() as counts:
        subprocess.run(["ls", "-lR", tree.root], check=True, capture_output=True)
    assert counts.get("GETXATTR", 0) < 5, counts


@pytest.mark.doors
def test_a_label_is_kept_though_most_files_have_none(workshop: Workshop) -> None:
    """What an absent one is answered depends on the machine; a host with SELinux wants ENODATA."""
    label = {"security.selinux": b"a:b:c"}
    tree = workshop({"d/with": File(data="x", xattrs=label), "d/without": ""})
    absent = errno.ENODATA if os.path.exists("/sys/fs/selinux") else errno.EOPNOTSUPP
    (tree / "d/new").write_bytes(b"")
    for _ in range(2):
        assert os.getxattr(tree / "d/with", "security.selinux") == b"a:b:c"
        for name in ("d/without", "d/new", "d"):
            with pytest.raises(OSError) as caught:
                os.getxattr(tree / name, "security.selinux")
            assert caught.value.errno == absent
            with pytest.raises(OSError) as caught:
                os.getxattr(tree / name, "security.other")
            assert caught.value.errno == errno.ENODATA
    for name in ("d/without", "d/new", "d"):
        os.setxattr(tree / name, "security.selinux", b"new")
        assert os.getxattr(tree / name, "security.selinux") == b"new"


def seen(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    times = found.st_mtime_ns, found.st_ctime_ns
    return found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_blocks, *times


@pytest.mark.doors
@pytest.mark.parametrize("where", ["merged", "new", "."])
def test_a_directory_that_changes_again_and_again_shows_what_it_is(
    workshop: Workshop, where: str
) -> None:
    """The loop answers for such a directory by itself."""
    tree = workshop({"merged/low": "", "merged/sub/x": ""})
    place, upper = tree / where, tree.upper / where
    if where == "new":
        place.mkdir()
    inode = os.stat(place).st_ino
    for number in range(5):
        assert not (place / f"f{number}").exists()
        (place / f"f{number}").write_bytes(b"")
        assert seen(place) == seen(upper)
        (place / f"d{number}").mkdir()
        assert seen(place) == seen(upper)
        os.chmod(place, 0o700 + number)
        assert seen(place) == seen(upper)
        assert os.stat(place).st_nlink == (3 + number if where == "new" else 1)
        assert os.stat(place).st_ino == inode
    assert (place / "low").exists() == (where == "merged")
    for number in range(5):
        os.unlink(place / f"f{number}")
        assert seen(place) == seen(upper)
        assert not (place / f"f{number}").exists()
    (upper / "behind").touch()  # what is there is not said to be absent
    names = {f"d{number}" for number in range(5)}
    assert names <= set(os.listdir(place))


@pytest.mark.doors
def test_a_directory_that_changed_is_renamed_deleted_and_made_again(workshop: Workshop) -> None:
    tree = workshop({"old": ""})
    first = tree / "first"
    first.mkdir()
    for number in range(3):
        (first / f"f{number}").write_bytes(b"")
        os.stat(first)
        os.unlink(first / f"f{number}")
    os.rename(first, tree / "second")
    (tree / "second/more").write_bytes(b"")
    assert seen(tree / "second") == seen(tree.upper / "second")
    assert not first.exists()
    os.unlink(tree / "second/more")
    held = os.open(tree / "second", os.O_PATH)
    os.rmdir(tree / "second")
    for _ in range(3):
        assert os.fstat(held).st_nlink == 0
    for _ in range(20):  # an inode number, and so an id, may come again
        first.mkdir()
        (first / "f").write_bytes(b"")
        assert seen(first) == seen(tree.upper / "first")
        assert os.stat(first).st_nlink == 2
        os.unlink(first / "f")
        os.rmdir(first)
    os.close(held)


@pytest.mark.doors
def test_a_new_file_gets_capabilities_and_loses_them_by_a_write(workshop: Workshop) -> None:
    """The loop knows that a new file has none, and has to learn of the first."""
    tree = workshop({"d/old": ""})
    path, attribute = tree / "d/new", "security.capability"
    # cap_net_raw=ep as the kernel stores it (include/uapi/linux/capability.h, revision 2)
    capability = bytes.fromhex("0100000200200000") + bytes(12)
    path.write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            os.getxattr(path, attribute)
        os.setxattr(path, attribute, capability)
        os.link(path, tree / "d/linked")
        assert os.getxattr(path, attribute) == os.getxattr(tree / "d/linked", attribute)
        assert os.getxattr(tree.upper / "d/new", attribute) == capability
        with open(tree / "d/linked", "ab") as file:
            file.write(b"y")
        assert attribute not in os.listxattr(tree.upper / "d/new")
        os.unlink(tree / "d/linked")
