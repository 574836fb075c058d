"""Mounts with a lookup index: the same tree, fewer requests, and never a stale or wrong answer."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness.layers import Dir, File, HardLink, Symlink, Whiteout
from harness.mounts import Mounted, Stack, Workshop
from harness.snapshot import assert_equal

from unionfuse.index.builder import build
from unionfuse.layers.layer import LayerStack

pytestmark = pytest.mark.on("unionfuse")

TOP = {
    "d/new": "n",
    "d/gone": None,
    "opaque": Dir(opaque="kernel"),
    "opaque/mine": "m",
    "a": Whiteout("aufs"),
}
BASE = {
    "a": "a",
    "d/gone": "g",
    "d/old": File(data="old", mode=0o640, uid=3, gid=4, xattrs={"user.x": b"1"}),
    "d/deep/er/file": "deep",
    "links/one": "1",
    "links/two": HardLink("links/one"),
    "elsewhere/three": HardLink("links/one"),
    "opaque/hidden": "h",
    "symlink": Symlink("d/old"),
    **{f"many/{number:03}": "x" * number for number in range(300)},
}


def write_index(stack: Stack) -> Path:
    path = stack.base / "lookup.index"
    layers = LayerStack.open([os.fsencode(lower) for lower in stack.lowers])
    build(layers.layers).write(str(path))
    layers.close()
    return path


def indexed(
    workshop: Workshop, *layers: object, watch: str = "content", **options: str | None
) -> Mounted:
    number = len(list(workshop.directory.iterdir()))
    stack = Stack.make(workshop.directory / f"indexed{number}", layers)
    index = write_index(stack)
    found = {"stats": None, "lookup_index": str(index), **options}
    return workshop.mount(stack, options=found, watch=watch)


def list_all(tree: Mounted) -> None:
    subprocess.run(["ls", "-lR", tree.root], check=True, stdout=subprocess.DEVNULL)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


def test_the_tree_is_the_one_without_an_index(workshop: Workshop) -> None:
    tree = indexed(workshop, TOP, BASE)
    plain = workshop.mount(Stack.around(tree.stack.base / "again", tree.stack.lowers))
    with_ino = {"ino": True} if "ino" in type(tree).snapshot.__code__.co_varnames else {}
    assert_equal(tree.snapshot(**with_ino), plain.snapshot(**with_ino))
    for path in ("d", "d/old", "links/one", "opaque/mine", "symlink", "many/007"):
        one, two = os.lstat(tree / path), os.lstat(plain / path)
        assert (one.st_ino, one.st_nlink, one.st_ctime_ns) == (
            two.st_ino,
            two.st_nlink,
            two.st_ctime_ns,
        )


def test_a_listing_asks_for_directories_and_for_nothing_else(workshop: Workshop) -> None:
    tree = indexed(workshop, TOP, BASE)
    directories = sum(1 for _ in os.walk(tree.stack.lowers[1])) + 1
    drop_caches()
    with tree.asked() as first:
        list_all(tree)
    assert first.get("LOOKUP", 0) <= 12  # in small directories that were listed without their files
    assert first.get("GETATTR", 0) <= 2
    assert first["READDIRPLUS"] <= 2 * directories + 1
    assert first.get("OPENDIR", 0) <= 1  # it said ENOSYS
    with tree.asked() as second:
        list_all(tree)
    # where something may be written, the kernel doubts a directory's atime after reading it
    assert second.get("GETATTR", 0) <= directories
    assert second.get("READDIRPLUS", 0) <= directories  # those that were: as a whole now
    for name in ("LOOKUP", "OPENDIR", "READLINK"):
        assert second.get(name, 0) == 0


def test_what_is_missing_is_asked_for_once(workshop: Workshop) -> None:
    tree = indexed(workshop, TOP, BASE)
    with tree.asked() as requests:
        for _ in range(50):
            assert not os.path.exists(tree / "d/nothing")
            assert not os.path.exists(tree / "many/nothing")
    assert requests.get("LOOKUP", 0) <= 4
    (tree / "many/nothing").write_text("now")
    assert (tree / "many/nothing").read_text() == "now"


def test_reading_a_file_costs_no_flush_and_no_second_read(workshop: Workshop) -> None:
    tree = indexed(workshop, TOP, BASE)
    (tree / "many/200").read_bytes()
    with tree.asked() as requests:
        for _ in range(10):
            (tree / "many/200").read_bytes()
    assert requests.get("FLUSH", 0) == requests.get("READ", 0) == requests.get("LOOKUP", 0) == 0


def test_the_layers_are_not_touched_by_find_and_stat(workshop: Workshop) -> None:
    tree = indexed(workshop, TOP, BASE, watch="nothing")
    base = tree.stack.lowers[1]
    os.rename(base / "many", base / "moved away")
    try:
        assert len(os.listdir(tree / "many")) == 300
        assert os.stat(tree / "many/299").st_size == 299
    finally:
        os.rename(base / "moved away", base / "many")


def test_changes_show_at_once_and_after_the_caches_are_dropped(workshop: Workshop) -> None:
    """Trap 3: a record of the index must not come back over a file that has changed."""
    tree = indexed(workshop, TOP, BASE)
    list_all(tree)
    with open(tree / "many/005", "r+b", buffering=0) as file:
        file.write(b"0123456789")
        os.listdir(tree / "many")
        assert os.stat(tree / "many/005").st_size == 10
        assert os.lseek(file.fileno(), 0, os.SEEK_END) == 10
    os.chmod(tree / "d/deep", 0o700)
    os.unlink(tree / "many/006")
    os.rename(tree / "d", tree / "e")
    (tree / "links/one").write_text("changed through one name")
    for _ in range(2):
        assert os.stat(tree / "many/005").st_size == 10
        assert os.stat(tree / "e/deep").st_mode & 0o777 == 0o700
        assert not os.path.exists(tree / "d")
        assert (tree / "e/deep/er/file").read_text() == "deep"
        assert len(os.listdir(tree / "many")) == 299
        for name in ("links/two", "elsewhere/three"):
            assert (tree / name).read_text() == "changed through one name"
            assert os.stat(tree / name).st_size == 24
        drop_caches()
    before = tree.snapshot()
    tree.remount()
    assert_equal(tree.snapshot(), before)


def test_positions_in_a_listing_outlive_the_change_of_the_directory(workshop: Workshop) -> None:
    """Trap 4: a directory that moves from the index into memory keeps its cookies."""
    tree = indexed(workshop, TOP, BASE)
    drop_caches()
    with os.scandir(tree / "many") as entries:
        seen = [next(entries).name for _ in range(20)]
        (tree / "many/zzz").write_text("new")
        os.unlink(tree / "many" / seen[3])
        os.chmod(tree / "many" / seen[4], 0o600)
        seen += [entry.name for entry in entries]
    names = {f"{number:03}" for number in range(300)}
    assert len(seen) == len(set(seen)) and names <= set(seen) | {"zzz"}


def test_nodes_go_when_the_kernel_forgets_them(workshop: Workshop) -> None:
    """Trap 9: every entry that READDIRPLUS emitted counts one lookup, the dots none."""
    tree = workshop(TOP, BASE)  # no index: every node is counted
    list_all(tree)
    assert tree.status()["nodes"] > 300
    limit = time.monotonic() + 10
    while tree.status()["nodes"] > 1 and time.monotonic() < limit:
        drop_caches()
        time.sleep(0.1)
    assert tree.status()["nodes"] == 1
    assert (tree / "d/deep/er/file").read_text() == "deep"


@pytest.mark.parametrize("fault", ["damaged", "cut short", "outdated", "missing"])
def test_an_index_that_is_no_good_is_refused_and_the_layers_are_read(
    workshop: Workshop, fault: str
) -> None:
    stack = Stack.make(workshop.directory / "bad", [TOP, BASE])
    index = write_index(stack)
    match fault:
        case "damaged":
            data = bytearray(index.read_bytes())
            data[60] ^= 1
            index.write_bytes(data)
        case "cut short":
            index.write_bytes(index.read_bytes()[:-1000])
        case "outdated":
            (stack.lowers[0] / "later").write_text("x")
        case "missing":
            index.unlink()
    tree = workshop.mount(stack, options={"lookup_index": str(index)})
    assert tree.daemon is not None
    reason = {"damaged": "damaged", "cut short": "bytes long", "outdated": "outdated"}
    said = tree.daemon.messages()
    assert "lookup.index" in said and reason.get(fault, "No such file") in said
    assert (tree / "d/deep/er/file").read_text() == "deep"


def test_layers_are_write_protected_by_the_kernel(workshop: Workshop) -> None:
    """Trap 2: not even the daemon's own descriptors could write to a layer."""
    tree = indexed(workshop, TOP, BASE)
    assert tree.daemon is not None
    (tree / "many/010").read_bytes()
    descriptors = Path(f"/proc/{tree.daemon.pid}/fd")
    mine = [
        link
        for link in descriptors.iterdir()
        if stat_or_none(link) == stat_or_none(tree.stack.lowers[1])
    ]
    assert mine
    with pytest.raises(OSError, match="Read-only"):
        os.open(f"{mine[0]}/written", os.O_WRONLY | os.O_CREAT)


def stat_or_none(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def test_both_doors_go_on_under_load_from_both_sides(workshop: Workshop) -> None:
    """fsync goes to pyfuse3, stat to the lane: neither waits for the other."""
    tree = indexed(workshop, TOP, BASE)
    file = os.open(tree / "written", os.O_RDWR | os.O_CREAT)
    done = {"fsync": 0, "stat": 0, "write": 0}
    end = time.monotonic() + 2

    def loop(name: str, step: object) -> None:
        while time.monotonic() < end:
            step()
            done[name] += 1

    steps = {
        "fsync": lambda: os.fsync(file),
        "stat": lambda: os.path.exists(tree / f"many/none{done['stat']}"),
        "write": lambda: (tree / "many/010").write_text(str(done["write"])),
    }
    threads = [threading.Thread(target=loop, args=item) for item in steps.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    os.close(file)
    assert min(done.values()) >= 5, done


def test_io_uring_gives_the_same_tree_and_takes_all_changes(
    workshop: Workshop, uring: None
) -> None:
    tree = indexed(workshop, TOP, BASE, uring="on")
    assert tree.daemon is not None
    threads = Path(f"/proc/{tree.daemon.pid}/task")
    names = {(task / "comm").read_text().strip() for task in threads.iterdir()}
    assert len(names) >= 1
    plain = workshop.mount(
        Stack.around(tree.stack.base / "again", tree.stack.lowers), options={"uring": "off"}
    )
    assert_equal(tree.snapshot(), plain.snapshot())
    data = os.urandom(5 << 20)
    for root in (tree, plain):
        (root / "big").write_bytes(data)
        os.truncate(root / "big", 3 << 20)
        (root / "many/100").write_bytes(data)
        os.rename(root / "links", root / "renamed")
        with open(root / "many/100", "rb") as file:
            os.fsync(file.fileno())
    assert (tree / "big").read_bytes() == data[: 3 << 20]
    drop_caches()
    assert_equal(tree.snapshot(), plain.snapshot())


def test_long_names_are_found_over_io_uring(workshop: Workshop, uring: None) -> None:
    """The name lies where the reply goes; what the loop cannot answer after all finds it whole."""
    merged, linked = "m" * 60, "l" * 60
    tree = workshop(
        {f"{merged}/a": "a"},
        {f"{merged}/b": "b", linked: "x", "other": HardLink(linked), "near": ""},
        options={"uring": "on"},
    )
    assert (tree / "near").read_text() == ""  # the loop has a table of the root from here on
    assert (tree / linked).stat().st_nlink == 2
    assert sorted(os.listdir(tree / merged)) == ["a", "b"]


def test_io_uring_costs_little_memory_when_idle(workshop: Workshop, uring: None) -> None:
    def anonymous(mode: str) -> int:
        tree = indexed(workshop, BASE, uring=mode)
        os.listdir(tree.root)
        assert tree.daemon is not None
        status = Path(f"/proc/{tree.daemon.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)

    assert anonymous("on") - anonymous("off") < 20_000  # KiB


def test_uring_on_says_how_to_enable_it(workshop: Workshop, no_uring: None) -> None:
    tree = workshop({"f": "x"}, options={"uring": "on"})
    assert tree.daemon is not None and "enable_uring" in tree.daemon.messages()
    assert (tree / "f").read_text() == "x"
