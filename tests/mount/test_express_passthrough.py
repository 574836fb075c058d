"""Open files that the kernel reads and writes by itself, next to those that it does not.

Trap 1 of passthrough: all opens of an inode must agree on the backing file. A naive lane makes a
write land in the lower layer, or fails an open with EIO; `workshop` compares the layers afterwards.
"""

import itertools
import mmap
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.layers import File, Layer
from harness.mounts import Mounted, Stack, Workshop

from unionfuse.index.builder import build
from unionfuse.layers.layer import LayerStack

pytestmark = pytest.mark.on("unionfuse")

LOWER = b"lower".ljust(5000, b".")


def test_files_in_upper_are_read_and_written_by_the_kernel(workshop: Workshop) -> None:
    tree = workshop({"lower": LOWER * 20}, options={"stats": None})
    with open(tree / "new", "wb+", buffering=0) as file:
        for _ in range(20):
            file.write(b"x" * 4096)
        file.seek(0)
        assert file.read() == b"x" * 20 * 4096
        assert os.fstat(file.fileno()).st_size == 20 * 4096
    with open(tree / "new", "ab") as file:
        file.write(b"end")
    assert (tree / "new").read_bytes() == b"x" * 20 * 4096 + b"end"
    asked = tree.status()
    assert asked.get("WRITE", 0) == 0 and asked.get("READ", 0) == 0
    assert (tree / "lower").read_bytes() == LOWER * 20
    assert tree.status()["READ"] >= 1  # it may yet be copied up: not passed through


def test_without_upper_lower_files_are_passed_through(workshop: Workshop) -> None:
    tree = workshop({"f": LOWER}, options={"stats": None}, writable=False)
    assert (tree / "f").read_bytes() == LOWER
    with open(tree / "f", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[:5] == b"lower"
    assert tree.status().get("READ", 0) == 0


def test_a_large_file_is_open_twice(workshop: Workshop) -> None:
    """What is passed through once has to be each time: the loop leaves it to Python, or EIO."""
    tree = workshop({"big": "x" * (2 << 20)}, options={"stats": None}, writable=False)
    for _ in range(2):
        with open(tree / "big", "rb") as one, open(tree / "big", "rb") as other:
            assert one.read() == other.read() == b"x" * (2 << 20)
    assert tree.status().get("READ", 0) == 0


@pytest.mark.parametrize("mode", ["off", "upper"])
def test_modes(workshop: Workshop, mode: str) -> None:
    tree = workshop({"f": LOWER}, options={"stats": None, "passthrough": mode})
    (tree / "new").write_bytes(b"x")
    assert (tree / "new").read_bytes() == b"x"
    assert (tree.status().get("WRITE", 0) == 0) == (mode == "upper")
    tree.remount(options={"stats": None, "passthrough": mode})
    assert (tree / "f").read_bytes() == LOWER


def with_index(workshop: Workshop, layer: Layer) -> Mounted:
    """Mounted with a lookup index: opens for reading are answered without Python."""
    stack = Stack.make(workshop.directory / "indexed", [layer])
    layers = LayerStack.open([os.fsencode(lower) for lower in stack.lowers])
    build(layers.layers).write(str(stack.base / "index"))
    layers.close()
    return workshop.mount(stack, options={"lookup_index": str(stack.base / "index")})


def test_a_reader_of_an_indexed_file_outlives_writer_and_unlink(workshop: Workshop) -> None:
    tree = with_index(workshop, {"f": LOWER, "g": LOWER, "h": LOWER})
    readers = [os.open(tree / name, os.O_RDONLY) for name in "fgh"]  # nothing is read yet
    (tree / "f").write_bytes(b"changed")
    os.unlink(tree / "f")
    os.unlink(tree / "g")
    os.rename(tree / "h", tree / "i")
    assert os.read(readers[0], 100) == b"changed"
    assert os.read(readers[1], 6000) == LOWER
    assert os.read(readers[2], 6000) == LOWER
    assert [os.fstat(reader).st_nlink for reader in readers] == [0, 0, 1]
    for reader in readers:
        os.fsync(reader)
        assert os.lseek(reader, 0, os.SEEK_DATA) == 0
        os.close(reader)
    assert (tree / "i").read_bytes() == LOWER


def test_many_threads_open_read_and_close_indexed_files(workshop: Workshop) -> None:
    contents = {f"{number:02}": bytes([number]) * (20000 + number) for number in range(40)}
    tree = with_index(workshop, contents)
    assert tree.daemon is not None
    descriptors = Path(f"/proc/{tree.daemon.pid}/fd")
    before = len(list(descriptors.iterdir()))

    def read_all(first: int) -> None:
        for step in range(400):
            name = f"{(first * 7 + step * 11) % 40:02}"
            descriptor = os.open(tree / name, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # ask the daemon again
            assert os.read(descriptor, 30000) == contents[name]
            os.close(descriptor)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read_all, range(6)))
    assert len(list(descriptors.iterdir())) <= before + 10


def read_open(tree: Mounted) -> int:
    return os.open(tree / "f", os.O_RDONLY)


def write_open(tree: Mounted) -> int:
    return os.open(tree / "f", os.O_RDWR)


Step = Callable[[Mounted], int | None]
STEPS: dict[str, Step] = {
    "read-open": read_open,
    "write-open": write_open,
    "chmod": lambda tree: os.chmod(tree / "f", 0o600),
    "truncate": lambda tree: os.truncate(tree / "f", 4000),
    "unlink": lambda tree: os.unlink(tree / "f"),
}


@pytest.mark.parametrize("where", ["lower", "upper", "indexed"])
def test_every_order_of_three_steps(workshop: Workshop, where: str) -> None:
    """After each order all descriptors that are open read and write one and the same file."""
    orders = [order for order in itertools.permutations(STEPS, 3) if "unlink" not in order[:-1]]
    layer = {f"{number}/f": LOWER for number in range(len(orders))}
    tree = with_index(workshop, layer) if where == "indexed" else workshop(layer)
    for number, order in enumerate(orders):
        place = tree.root / str(number)
        if where == "upper":
            (place / "f").write_bytes(LOWER)
        here = type("Place", (), {"__truediv__": lambda self, name, place=place: place / name})()
        opened = [STEPS[step](here) for step in order]
        descriptors = [descriptor for descriptor in opened if descriptor is not None]
        check_agreement(descriptors, order)


def check_agreement(descriptors: list[int], order: tuple[str, ...]) -> None:
    for descriptor in descriptors:
        try:
            os.pwrite(descriptor, b"WRITTEN", 100)
        except OSError:
            continue  # a reader
        for other in descriptors:
            assert os.pread(other, 7, 100) == b"WRITTEN", order
            assert os.fstat(other).st_size in (4000, 5000), order
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("index", [False, True])
def test_a_mapped_lower_file_shows_what_a_writer_writes(workshop: Workshop, index: bool) -> None:
    tree = with_index(workshop, {"f": LOWER}) if index else workshop({"f": LOWER})
    with (
        open(tree / "f", "rb") as reader,
        mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as view,
    ):
        assert view[:5] == b"lower"
        with open(tree / "f", "r+b", buffering=0) as writer:
            writer.write(b"UPPER")
            assert view[:5] == b"UPPER" and reader.read(5) == b"UPPER"
    assert (tree.upper / "f").read_bytes()[:5] == b"UPPER"


def test_shared_mappings_of_a_passed_through_file(workshop: Workshop) -> None:
    """Trap 7: the map outlives the descriptor, and times must not be stale for ever."""
    tree = workshop({"f": LOWER})
    (tree / "g").write_bytes(LOWER)
    with open(tree / "g", "r+b") as file:
        view = mmap.mmap(file.fileno(), 0)
    before = os.stat(tree / "g").st_mtime_ns
    view[:4] = b"MAPS"
    view.flush()
    view.close()
    assert (tree / "g").read_bytes()[:4] == b"MAPS"
    os.utime(tree / "f")
    with open(tree / "g", "rb") as file:
        os.fsync(file.fileno())
    time.sleep(1.1)  # the kernel may keep attributes of a file once written to for a second
    assert os.stat(tree / "g").st_mtime_ns >= before
    assert os.stat(tree / "g").st_mtime_ns == os.stat(tree.upper / "g").st_mtime_ns


def test_a_file_mounted_over_a_name_stays_mounted(workshop: Workshop) -> None:
    """Trap 1: a node that changes under a mount point would take the mount away."""
    tree = workshop({"hosts": LOWER, "over": "OVER"}, {"bind": LOWER})
    script = f"""
import os, subprocess
def run(*words): subprocess.run(words, check=True)
run("mount", "--bind", "{tree.root}/over", "{tree.root}/hosts")
run("mount", "--bind", "{tree.root}/bind", "{tree.root}/over2")
reader = os.open("{tree.root}/bind", os.O_RDONLY)
with open("{tree.root}/over2", "r+") as file: file.write("written through the bind mount")
assert os.pread(reader, 7, 0) == b"written"
again = os.open(f"/proc/self/fd/{{reader}}", os.O_RDWR)
os.pwrite(again, b"WRITTEN", 0)
assert os.pread(reader, 7, 0) == b"WRITTEN"
os.rename("{tree.root}/other", "{tree.root}/another")
os.chmod("{tree.root}/over", 0o600)
assert open("{tree.root}/hosts").read() == "OVER"
assert "{tree.root}/hosts" in open("/proc/self/mounts").read()
"""
    (tree / "over2").touch()
    (tree / "other").touch()
    subprocess.run(
        ["unshare", "-m", sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert (tree / "bind").read_bytes().startswith(b"WRITTEN")
    assert (tree / "hosts").read_bytes() == LOWER


def test_backing_files_are_given_back(workshop: Workshop) -> None:
    tree = workshop({"f": LOWER})
    assert tree.daemon is not None
    descriptors = f"/proc/{tree.daemon.pid}/fd"
    before = len(os.listdir(descriptors))
    for number in range(200):
        path = tree / f"new{number % 7}"
        first = os.open(path, os.O_RDWR | os.O_CREAT)
        second = os.open(path, os.O_RDONLY)
        os.write(first, b"x")
        assert os.read(second, 1) == b"x"
        os.close(first)
        third = os.open(path, os.O_RDWR)
        for descriptor in (second, third):
            os.close(descriptor)
        os.unlink(path)
    assert len(os.listdir(descriptors)) < before + 50  # cached directories, the last few files


def test_setuid_goes_when_somebody_else_writes(workshop: Workshop) -> None:
    """Trap 5, in a file that is passed through."""
    tree = workshop({"x": ""})
    (tree / "f").write_bytes(b"program")
    os.chmod(tree / "f", 0o6777)
    script = (
        f"import os; os.setgid(1000); os.setuid(1000); open({str(tree / 'f')!r}, 'r+').write('y')"
    )
    os.chmod(tree.root, 0o755)
    for parent in tree.root.parents:
        os.chmod(parent, os.stat(parent).st_mode | 0o055) if str(parent) != "/" else None
    subprocess.run([sys.executable, "-c", script], check=True)
    assert os.stat(tree / "f").st_mode & 0o7777 == 0o777
    assert os.stat(tree.upper / "f").st_mode & 0o7777 == 0o777


def test_acls_are_enforced(workshop: Workshop) -> None:
    """Trap 6: a group that an ACL denies does not get in by way of the mask."""

    def acl(*entries: tuple[int, int, int]) -> bytes:
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)

    nobody = 0xFFFFFFFF
    denied = acl((1, 6, nobody), (2, 6, 2000), (4, 0, nobody), (16, 6, nobody), (32, 0, nobody))
    name = "system.posix_acl_access"
    tree = workshop({"f": File(data="secret", mode=0o640, gid=1000, xattrs={name: denied})})
    script = (
        f"import os; os.setgroups([]); os.setgid(1000); os.setuid(1000); open({str(tree / 'f')!r})"
    )
    for parent in tree.root.parents:
        os.chmod(parent, os.stat(parent).st_mode | 0o055) if str(parent) != "/" else None
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "PermissionError" in found.stderr
