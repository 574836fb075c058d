"""Files that the compiled loop makes and deletes by itself, and all that then happens to them."""

import mmap
import os
import random
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from harness.actions import Action, Actor
from harness.backings import backing_ids
from harness.layers import Layer
from harness.mounts import Mounted, Workshop
from harness.snapshot import assert_equal
from harness.waiting import wait_until

pytestmark = [
    pytest.mark.on("unionfuse"),
    pytest.mark.through("unionfuse", "unionfuse-indexed"),
    pytest.mark.timeout(300),
]

NUMBER = 40
NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY
NAMES = ("a", "b", "c", "d", "e")
PLACES = ("x", "y", "x/z")
BESIDE: Layer = {"new/x/a": "1", "new/x/b": "22", "new/y/c": "3", "new/x/z/d": "4"}


def lend(path: Path) -> Path:
    """A directory, new or of a layer, in which so much has been made that the loop has it."""
    path.mkdir(exist_ok=True)
    for number in range(3):
        os.close(os.open(path / f"first{number}", NEW))
        os.stat(path)
        os.unlink(path / f"first{number}")
        os.stat(path)
    return path


def python(tree: Mounted) -> int:
    """How many requests Python has answered."""
    return tree.status()["python"]


# --- who answers -------------------------------------------------------------------------------


def test_python_hears_nothing_of_files_that_come_and_go(workshop: Workshop) -> None:
    tree = workshop({"low": "x"}, options={"stats": None})
    here = lend(tree / "d")
    before = python(tree)
    for number in range(NUMBER):
        descriptor = os.open(here / f"{number}", NEW, 0o640)
        os.write(descriptor, b"data")
        os.fchown(descriptor, 7, 8)
        os.fchmod(descriptor, 0o600)
        os.utime(descriptor, ns=(1, 2))
        assert os.fstat(descriptor).st_mtime_ns == 2
        os.close(descriptor)
    for number in range(NUMBER):
        os.unlink(here / f"{number}")
    assert python(tree) - before <= 3
    assert os.listdir(here) == [] and os.listdir(tree.upper / "d") == []


def test_python_hears_nothing_of_new_names_beside_those_of_layers(workshop: Workshop) -> None:
    tree = workshop({f"d/{n}": f"{n}" for n in ("old", "gone", "kept")}, options={"stats": None})
    os.unlink(tree / "d/gone")
    for number in range(3):
        os.close(os.open(tree / f"d/first{number}", NEW))
        os.stat(tree / "d")
    before = python(tree)
    for number in range(NUMBER):
        os.close(os.open(tree / f"d/{number}", NEW))
    for number in range(0, NUMBER, 2):
        os.unlink(tree / f"d/{number}")
    assert python(tree) - before <= 3
    (tree / "d/gone").write_text("again")
    with pytest.raises(FileExistsError):
        os.open(tree / "d/old", NEW)
    os.unlink(tree / "d/old")
    os.close(os.open(tree / "d/old", NEW))
    names = {f"first{n}" for n in range(3)} | {f"{n}" for n in range(1, NUMBER, 2)}
    names |= {"old", "kept", "gone"}
    assert set(os.listdir(tree / "d")) == names
    tree.kill_daemon()
    assert set(os.listdir(tree / "d")) == names
    assert (tree / "d/gone").read_text() == "again" and (tree / "d/old").read_text() == ""
    tree.remount()
    assert set(os.listdir(tree / "d")) == names


def test_names_are_listed_and_deleted_without_python_making_nodes(workshop: Workshop) -> None:
    tree = workshop({"low": "x"}, options={"stats": None})
    here = lend(tree / "d")
    for number in range(NUMBER):
        os.close(os.open(here / f"{number}", NEW))
    assert sorted(os.listdir(here), key=int) == [f"{number}" for number in range(NUMBER)]
    before = python(tree)
    for number in range(NUMBER):
        os.unlink(here / f"{number}")
    assert python(tree) - before <= 3
    os.close(os.open(here / "last", NEW))
    assert os.listdir(here) == ["last"]


def test_nothing_is_left_of_files_that_have_gone(workshop: Workshop) -> None:
    tree = workshop({"low": "x"}, options={"stats": None})
    here = lend(tree / "d")
    before = tree.status()["nodes"]
    for number in range(NUMBER):
        os.close(os.open(here / f"{number}", NEW))
        os.listdir(here)
        os.unlink(here / f"{number}")
    wait_until(lambda: tree.status()["nodes"] <= before, 20, "what is forgotten goes")
    assert tree.status()["open"] == 0


@pytest.mark.parametrize("mode", [0o2777, 0o777])
def test_a_file_belongs_to_who_makes_it(workshop: Workshop, mode: int) -> None:
    tree = workshop({"low": "x"}, options={"stats": None})
    here = lend(tree / "d")
    os.chown(here, 5, 6)
    os.chmod(here, mode)
    script = "import os, sys; os.umask(0o27); os.close(os.open(sys.argv[1], os.O_CREAT, 0o6666))"
    for number in range(3):
        command = ["python3", "-c", script, f"{here}/{number}"]
        subprocess.run(command, check=True, user=1234, group=2345, extra_groups=[])
        found = os.stat(here / f"{number}")
        group = 6 if mode & 0o2000 else 2345
        assert (found.st_uid, found.st_gid) == (1234, group)
        assert found.st_mode & 0o1777 == 0o640
        assert os.stat(tree.upper / f"d/{number}").st_mode == found.st_mode


def test_an_acl_that_comes_later_is_handed_down(workshop: Workshop) -> None:
    tree = workshop({"low": "x"})
    here = lend(tree / "d")
    os.close(os.open(here / "before", NEW, 0o666))
    subprocess.run(["setfacl", "-d", "-m", "u:77:rwx", here], check=True)
    os.close(os.open(here / "after", NEW, 0o666))
    acl = "system.posix_acl_access"
    assert acl not in os.listxattr(here / "before")
    assert acl in os.listxattr(here / "after")
    assert acl in os.listxattr(tree.upper / "d/after")


# --- whatever may happen to them ---------------------------------------------------------------


class YoungActor(Actor):
    """Does what the loop leaves to Python to files that it has made, too."""

    def open_new(self, slot: int, path: str, flags: int) -> None:
        self.open_close(slot)
        self._open[slot] = os.open(self._at(path), os.O_CREAT | os.O_EXCL | flags, 0o644)

    def open_nameless(self, slot: int, path: str) -> None:
        self.open_close(slot)
        self._open[slot] = os.open(self._at(path), os.O_TMPFILE | os.O_RDWR, 0o600)

    def open_link(self, slot: int, path: str) -> None:
        if slot in self._open:
            # With a descriptor given Python says AT_SYMLINK_FOLLOW.
            root = os.open(self._root, os.O_RDONLY)
            try:
                source = f"/proc/self/fd/{self._open[slot]}"
                os.link(source, self._at(path), src_dir_fd=root, follow_symlinks=True)
            finally:
                os.close(root)

    def open_path_stat(self, path: str) -> tuple[int, int]:
        """What is seen of a file that was deleted while nobody had it open but by its path."""
        descriptor = os.open(self._at(path), os.O_PATH)
        try:
            os.unlink(self._at(path))
            found = os.fstat(descriptor)
            return found.st_size, found.st_nlink
        finally:
            os.close(descriptor)

    def map_write(self, path: str, data: bytes) -> bytes:
        with open(self._at(path), "r+b") as opened:
            os.ftruncate(opened.fileno(), 100)
            with mmap.mmap(opened.fileno(), 100) as memory:
                memory[: len(data)] = data
                return memory[:]

    def execute(self, path: str) -> bytes:
        with open(self._at(path), "wb") as opened:
            opened.write(b"#!/bin/echo\n")
        os.chmod(self._at(path), 0o755)
        return subprocess.run([self._at(path)], stdout=subprocess.PIPE, check=True).stdout[:0]

    def copy_range(self, slot: int, other: int) -> int | None:
        if slot not in self._open or other not in self._open or slot == other:
            return None
        return os.copy_file_range(self._open[slot], self._open[other], 100, 0, 0)

    def sync(self, slot: int) -> None:
        if slot in self._open:
            os.fsync(self._open[slot])


def young_action(chance: random.Random) -> Action:
    pick = chance.choice

    def path() -> str:
        return f"{pick(PLACES)}/{pick(NAMES)}"

    slot, data = pick((0, 1, 2)), pick((b"", b"x", b"some data", b"y" * 50))
    flags = pick((os.O_WRONLY, os.O_RDWR, os.O_RDONLY, os.O_WRONLY | os.O_APPEND))
    mode = pick((0o644, 0o4755, 0o000))
    actions: list[Any] = [
        *[("create", path(), mode)] * 5,
        *[("unlink", path())] * 6,
        *[("open_new", slot, path(), flags)] * 4,
        *[("open_close", slot)] * 3,
        *[("names", pick(PLACES))] * 2,
        *[("rename", path(), path(), pick((0, 0, 1, 2)))] * 2,
        *[("stat", path()), ("open_stat", slot), ("open_write", slot, data)] * 2,
        ("append", path(), data),
        ("replace", path(), data),
        ("read", path()),
        ("write", path(), 3, data),
        ("truncate", path(), 5),
        ("link", path(), path()),
        ("chmod", path(), mode),
        ("chown", path(), 7, 8),
        ("utime", path(), 1_600_000_000_123_456_789),
        ("set_xattr", path(), "user.x", data),
        ("list_xattrs", path()),
        ("symlink", "a", path()),
        ("mkdir", path(), 0o755),
        ("rmdir", path()),
        ("open", slot, path()),
        ("open_truncate", slot, 6000),
        ("open_chmod", slot, mode),
        ("open_nameless", slot, pick(PLACES)),
        ("open_link", slot, path()),
        ("open_path_stat", path()),
        ("map_write", path(), data),
        ("copy_range", slot, pick((0, 1, 2))),
        ("sync", slot),
        ("rename", "x", "moved", 0),
        ("rename", "moved", "x", 0),
        ("rename", "x", "y", 2),
        ("remove_all", "x/z"),
        ("mkdir", "x/z", 0o755),
    ]
    if chance.random() < 0.03:
        return ("execute", path())
    return pick(actions)  # type: ignore[no-any-return]


def both_lent(tree: Mounted) -> Path:
    root = tree / "new"
    root.mkdir(exist_ok=True)
    for place in PLACES:
        lend(root / place)
    return root


def compare(ours: Mounted, oracle: Mounted, seed: int, steps: int, kills: float = 0.0) -> None:
    chance = random.Random(seed)
    actors = [YoungActor(both_lent(tree)) for tree in (ours, oracle)]
    done: list[Action] = []
    try:
        for _ in range(steps):
            action = young_action(chance)
            done.append(action)
            if chance.random() < kills:
                done.append(("killed",))
                ours.kill_daemon()
            outcomes = [actor.do(action) for actor in actors]
            assert outcomes[0] == outcomes[1], (
                f"{action}: {outcomes[0]!r} instead of {outcomes[1]!r}, after\n"
                + "\n".join(map(repr, done[-60:]))
            )
    finally:
        for actor in actors:
            actor.close_all()


@pytest.mark.parametrize("seed", range(8))
def test_random_actions_have_the_same_outcome(workshop: Workshop, seed: int) -> None:
    options: dict[str, str | None] = {"passthrough": "off"} if seed % 4 == 3 else {}
    layer = BESIDE if seed % 2 else {"low": "x"}
    ours = workshop(layer, options={"stats": None, **options})
    oracle = workshop(layer, kind="overlay")
    compare(ours, oracle, seed, 600)
    assert_equal(ours.snapshot(), oracle.snapshot(), ("unionfuse", "overlayfs"))
    # Nobody waits for a RELEASE: the last may come late.
    wait_until(lambda: ours.status()["open"] == 0, 20, "the last RELEASE")
    ours.remount("overlay", {})
    assert_equal(ours.snapshot(), oracle.snapshot(), ("our upper in overlayfs", "overlayfs"))


@pytest.mark.parametrize("seed", range(100, 104))
def test_random_actions_survive_their_daemon(workshop: Workshop, seed: int) -> None:
    layer = BESIDE if seed % 2 else {"low": "x"}
    ours = workshop(layer, options={"keeper": "on"})
    oracle = workshop(layer, kind="overlay")
    compare(ours, oracle, seed, 150, kills=0.06)
    assert_equal(ours.snapshot(), oracle.snapshot(), ("unionfuse", "overlayfs"))


def test_random_actions_over_io_uring(workshop: Workshop, uring: None) -> None:
    ours = workshop({"low": "x"}, options={"uring": "on"})
    oracle = workshop({"low": "x"}, kind="overlay")
    compare(ours, oracle, 200, 600)
    assert_equal(ours.snapshot(), oracle.snapshot(), ("unionfuse", "overlayfs"))


def test_threads_that_make_and_delete_do_not_meet(workshop: Workshop) -> None:
    tree = workshop({"low": "x"}, options={"stats": None})
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            here = lend(tree / f"d{number}")
            for turn in range(150):
                path = here / f"{turn % 7}"
                path.write_bytes(b"%d" % turn)
                assert path.read_bytes() == b"%d" % turn
                os.close(os.open(here / "other", NEW))
                assert sorted(os.listdir(here)) == [path.name, "other"]
                os.unlink(here / "other")
                os.unlink(path)
            here.rmdir()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(os.listdir(tree.root)) == ["low"]


# --- killed ------------------------------------------------------------------------------------


def do_everything(root: Path) -> list[Any]:
    """What the loop does by itself, and what there is to see meanwhile."""
    here = lend(root / "d")
    seen: list[Any] = []
    kept = os.open(here / "kept", NEW, 0o600)
    for number in range(3):
        descriptor = os.open(here / f"{number}", NEW, 0o640)
        os.write(descriptor, b"%d" % number)
        os.close(descriptor)
    os.unlink(here / "1")
    os.write(kept, b"more")
    gone = os.open(here / "2", os.O_PATH)
    os.unlink(here / "2")
    seen.append(os.fstat(gone).st_nlink)
    os.close(gone)
    seen.append(sorted(os.listdir(here)))
    seen.append((os.fstat(kept).st_size, os.stat(here / "0").st_size))
    os.close(kept)
    os.rename(here / "kept", here / "1")
    return seen


def killed_in_the_middle(workshop: Workshop, number: int, expected: list[Any]) -> bool:
    """Whether a daemon was killed before its step `number` of such a change."""
    environment = {"UNIONFUSE_TEST_KILL_YOUNG_AT": str(number)}
    tree = workshop({"low": "x"}, options={"keeper": "on"}, environment=environment)
    assert do_everything(tree.root) == expected, f"killed at {number}"
    assert sorted(os.listdir(tree / "d")) == ["0", "1"]
    assert (tree / "d/1").read_bytes() == b"more"
    assert tree.daemon is not None
    killed = "takes over" in tree.daemon.messages()
    wait_until(lambda: tree.status()["open"] == 0, 20, "the last RELEASE")
    assert backing_ids(tree.daemon.pid, tree.upper) == 0, f"killed at {number}"
    tree.remount("overlay", {})
    assert sorted(os.listdir(tree / "d")) == ["0", "1"]
    assert (tree / "d/1").stat().st_mode & 0o777 == 0o600
    tree.unmount()
    return killed


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_change_survives_wherever_its_daemon_dies(workshop: Workshop, first: int) -> None:
    expected = do_everything(workshop({"low": "x"}, kind="overlay").root)
    number, kills = first, 0
    while killed_in_the_middle(workshop, number, expected):
        kills += 1
        number += 3
    assert kills >= 8


def test_files_go_on_when_the_daemon_is_killed(workshop: Workshop) -> None:
    tree = workshop({"low": "x"}, options={"keeper": "on", "stats": None})
    here = lend(tree / "d")
    opened = [os.open(here / f"{number}", NEW) for number in range(5)]
    for number in range(5, 10):
        os.close(os.open(here / f"{number}", NEW))
    inodes = [os.stat(here / f"{number}").st_ino for number in range(10)]
    tree.kill_daemon()
    for number, descriptor in enumerate(opened):
        os.write(descriptor, b"%d" % number)
        os.close(descriptor)
        assert (here / f"{number}").read_bytes() == b"%d" % number
    assert [os.stat(here / f"{number}").st_ino for number in range(10)] == inodes
    assert sorted(os.listdir(here)) == [f"{number}" for number in range(10)]
    for number in range(10):
        os.unlink(here / f"{number}")
    here.rmdir()


def test_an_upgrade_goes_on_with_them(workshop: Workshop) -> None:
    tree = workshop({"low": "x"}, options={"keeper": "on"})
    here = lend(tree / "d")
    kept = os.open(here / "kept", NEW)
    os.close(os.open(here / "closed", NEW))
    assert tree.daemon is not None
    os.kill(tree.daemon.pid, signal.SIGHUP)
    os.write(kept, b"x")
    os.close(kept)
    assert sorted(os.listdir(here)) == ["closed", "kept"]
    assert (here / "kept").read_bytes() == b"x"
