"""A mount that outlives its daemon (keeper=on): killed daemons that nobody notices.

docs/survival.md promises it; here is how it is kept.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from harness import torture
from harness.layers import File, HardLink, Layer
from harness.linux import MNT_DETACH, RENAME_EXCHANGE, mount, umount
from harness.mounts import Daemon, Mounted, Workshop, is_mounted, unionfuse_command
from harness.snapshot import assert_equal

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def lane(workshop: Workshop) -> None:
    if workshop.kind not in ("unionfuse", "unionfuse-indexed"):
        pytest.skip("a keeper needs the express lane on its classic transport")


GIVEN: Layer = {f"lower/given/d{n}/f{k}": f"d{n}/f{k}\n" for n in range(20) for k in range(4)}


def daemon_of(tree: Mounted) -> int | None:
    """The pid of the daemon that the keeper has at this moment."""
    assert tree.daemon is not None
    pid = tree.daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


class Killer(threading.Thread):
    """Kills the daemon of a mount every now and then, until it is told to stop."""

    def __init__(self, tree: Mounted, least: float, most: float) -> None:
        super().__init__()
        self._tree, self._least, self._most = tree, least, most
        self._stop_it = threading.Event()
        self._draw = random.Random(3)
        self.kills = 0

    def run(self) -> None:
        while not self._stop_it.wait(self._draw.uniform(self._least, self._most)):
            pid = daemon_of(self._tree)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                self.kills += 1

    def stop(self) -> None:
        self._stop_it.set()
        self.join()


def run_programs(root: Path, rounds: dict[str, int], together: bool = True) -> None:
    """Run each program of torture.py in `root`; fail with what the first that failed said."""
    running = {}
    for name, count in rounds.items():
        command = [sys.executable, torture.__file__, name, str(root), str(count)]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if not together:
            running[name].wait()
    failures = []
    for name, process in running.items():
        output, _ = process.communicate()
        if process.returncode:
            failures.append(f"{name}: {output.decode(errors='replace')[-3000:]}")
    assert not failures, "\n".join(failures)


def survive(workshop: Workshop, rounds: dict[str, int], least: float, most: float) -> int:
    """Torture a mount and kernel overlayfs alike; the first one's daemon is killed on and on."""
    tree = workshop(GIVEN, options={"keeper": "on"})
    killer = Killer(tree, least, most)
    killer.start()
    try:
        run_programs(tree.root, rounds)
    finally:
        killer.stop()
    oracle = workshop(GIVEN, kind="overlay")
    run_programs(oracle.root, rounds)
    assert_equal(oracle.snapshot(), tree.snapshot(), ("overlayfs", "after the kills"))
    tree.remount("overlay", {})  # and upper is whole
    assert_equal(oracle.snapshot(), tree.snapshot(), ("overlayfs", "upper after the kills"))
    return killer.kills


SHORT = {
    "fio": 5,
    "sqlite": 30,
    "git": 20,
    "tar": 12,
    "mapped": 40,
    "names": 100,
    "listing": 40,
    "lower": 400,
}


def test_nobody_notices_that_the_daemon_is_killed(workshop: Workshop) -> None:
    kills = survive(workshop, SHORT, 1.0, 3.0)
    assert kills >= 2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nobody_notices_for_minutes(workshop: Workshop) -> None:
    kills = survive(workshop, {name: count * 10 for name, count in SHORT.items()}, 1.0, 3.0)
    print(f"{kills} kills survived")
    assert kills >= 30


# --- one call, killed wherever it can be ------------------------------------------------------

LAYERS: tuple[Layer, Layer] = (
    {"d/top": "top", "full/x": "x", "gone": None},
    {
        "d/f": File(data=b"lower" * 3000, mode=0o4750, uid=3, gid=4, xattrs={"user.x": b"1"}),
        "d/sub/g": "g",
        "one": "linked",
        "d/two": HardLink("one"),
        "gone/old": "old",
        "empty/x": "x",
    },
)


def exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    assert libc.renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE) == 0, ctypes.get_errno()


def do_everything(root: Path) -> None:
    """Each kind of change, of names that layers have and of others; no call may fail."""
    (root / "gone").mkdir(0o750)
    (root / "new").write_text("new")
    (root / "made").mkdir()
    os.mkfifo(root / "made/fifo")
    os.symlink("target", root / "made/link")
    os.link(root / "d/two", root / "made/three")
    (root / "d/f").chmod(0o600)
    os.setxattr(root / "d/top", "user.new", b"1", os.XATTR_CREATE)
    os.removexattr(root / "d/f", "user.x")
    os.rename(root / "d/sub/g", root / "made/g")
    os.rename(root / "d", root / "moved")
    exchange(root / "moved/top", root / "full/x")
    (root / "one").unlink()
    (root / "empty/x").unlink()
    (root / "empty").rmdir()
    os.rename(root / "new", root / "moved/f")
    with open(root / "moved/f", "r+") as opened:
        opened.truncate(2)
        (root / "moved/f").unlink()
        assert opened.read() == "ne"
    os.mkdir(root / "empty")
    os.rename(root / "made", root / "empty")


def killed_in_the_middle(
    workshop: Workshop, oracle: Mounted, number: int, uring: str = "off"
) -> bool:
    """Do everything, the daemon being killed before its changing call `number`; False if it ended
    before that."""
    armed = workshop.directory / f"armed{number}"
    tree = workshop(
        *LAYERS,
        options={"keeper": "on", "uring": uring},
        environment={
            "UNIONFUSE_TEST_KILL_AT": str(number),
            "UNIONFUSE_TEST_ARMED_BY": str(armed),
        },
    )
    armed.touch()
    do_everything(tree.root)
    assert_equal(oracle.snapshot(), tree.snapshot(), ("overlayfs", f"killed at {number}"))
    assert tree.daemon is not None
    killed = "takes over" in tree.daemon.messages()
    tree.remount("overlay", {})
    assert_equal(oracle.snapshot(), tree.snapshot(), ("overlayfs", f"upper, killed at {number}"))
    tree.unmount()
    return killed


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5])
def test_a_call_survives_wherever_its_daemon_dies(
    workshop: Workshop, first: int, request: pytest.FixtureRequest
) -> None:
    oracle = workshop(*LAYERS, kind="overlay")
    do_everything(oracle.root)
    step = 5 if request.config.getoption("--long") else 23
    number, kills = first, 0
    while killed_in_the_middle(workshop, oracle, number):
        kills += 1
        number += step
    assert kills >= 2


# --- over io_uring -----------------------------------------------------------------------------


Answer = TypeVar("Answer")


def has_rings(tree: Mounted) -> bool:
    assert tree.daemon is not None
    descriptors = Path(f"/proc/{tree.daemon.pid}/fd").iterdir()
    return any("io_uring" in os.readlink(path) for path in descriptors)


def test_a_call_over_io_uring_survives_its_daemon(
    workshop: Workshop, uring: None, request: pytest.FixtureRequest
) -> None:
    oracle = workshop(*LAYERS, kind="overlay")
    do_everything(oracle.root)
    number, kills = 2, 0
    while killed_in_the_middle(workshop, oracle, number, uring="on"):
        kills += 1
        number += 3 if request.config.getoption("--long") else 29
    assert kills >= 2


def until_it_is_heard(action: Callable[[], Answer]) -> Answer:
    """Do something that may be cancelled by the kernel before any daemon has seen it."""
    while True:
        try:
            return action()
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise


def test_rings_are_taken_over(workshop: Workshop, uring: None) -> None:
    """What is asked while nobody serves is answered, on whatever processor it was asked."""
    tree = workshop({"low": "low", "d/x": "x"}, options={"keeper": "on", "uring": "on"})
    assert has_rings(tree)
    processors = sorted(os.sched_getaffinity(0))
    with open(tree / "new", "w+") as held:
        for number in range(6):
            os.sched_setaffinity(0, {processors[number % len(processors)]})
            try:
                pid = daemon_of(tree)
                assert pid is not None
                watched = os.pidfd_open(pid)
                os.kill(pid, signal.SIGKILL)
                assert select.select([watched], [], [], 10)[0]
                os.close(watched)
                until_it_is_heard((tree / f"made{number}").mkdir)
                until_it_is_heard(partial(os.write, held.fileno(), b"%d" % number))
                assert until_it_is_heard((tree / "low").read_text) == "low"
                assert len(until_it_is_heard(partial(os.listdir, tree.root))) == number + 4
            finally:
                os.sched_setaffinity(0, processors)
        assert os.pread(held.fileno(), 9, 0) == b"012345"
    assert has_rings(tree)


# --- what is open -----------------------------------------------------------------------------


def kill_daemon(tree: Mounted) -> None:
    pid = daemon_of(tree)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


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
        kill_daemon(tree)
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
    kill_daemon(tree)
    assert (tree / "named").read_bytes() == b"a22"
    assert (tree / "only-mine").read_bytes() == b"22"
    assert (tree / "only-mine").stat().st_mode & 0o777 == 0
    assert sorted(os.listdir(tree.root)) == ["low", "named", "only-mine"]


def test_a_lower_hard_link_is_one_file_after_a_kill(workshop: Workshop) -> None:
    tree = workshop({"a": "data", "b": HardLink("a"), "c": HardLink("a")}, options={"keeper": "on"})
    with open(tree / "a", "a") as opened:
        (tree / "a").unlink()
        kill_daemon(tree)
        opened.write("+")
    assert [(tree / name).read_text() for name in "bc"] == ["data+"] * 2
    assert (tree / "b").stat().st_nlink == 2


def test_upgrade_while_a_file_is_open(workshop: Workshop) -> None:
    tree = workshop({"f": "1"}, options={"keeper": "on"})
    before = daemon_of(tree)
    with open(tree / "f", "a") as opened:
        said = subprocess.run(
            [Path(sys.executable).with_name("unionfuse"), "upgrade", tree.root],
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        assert str(before) in said.stdout and str(daemon_of(tree)) in said.stdout
        opened.write("2")
    assert (tree / "f").read_text() == "12"


def test_upgrade_needs_a_keeper(workshop: Workshop) -> None:
    tree = workshop({"f": "1"}, options={"keeper": "off"})
    program = Path(sys.executable).with_name("unionfuse")
    for place, words in ((tree.root, "no keeper"), (tree.root / "f", "no union")):
        said = subprocess.run([program, "upgrade", place], capture_output=True, text=True)
        assert said.returncode == 1 and words in said.stderr and said.stderr.count("\n") == 1


def kill_until_the_keeper_ends(tree: Mounted) -> None:
    assert tree.daemon is not None
    limit = time.monotonic() + 60
    while tree.daemon.process.poll() is None:
        assert time.monotonic() < limit
        pid = daemon_of(tree)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def test_a_daemon_that_always_dies_ends_the_mount(workshop: Workshop) -> None:
    tree = workshop({"f": "1"}, options={"keeper": "on"})
    assert tree.daemon is not None
    kill_until_the_keeper_ends(tree)
    assert tree.daemon.process.returncode == 1
    assert "died 8 times in a row; the mount ends" in tree.daemon.messages()
    assert not is_mounted(tree.root)
    tree.daemon = None


def test_a_keeper_takes_no_mount_away_but_its_own(workshop: Workshop) -> None:
    tree = workshop({"f": "1"}, options={"keeper": "on"})
    mount("tmpfs", tree.root, "tmpfs")
    try:
        (tree / "mine").touch()
        kill_until_the_keeper_ends(tree)
        assert (tree / "mine").exists()
    finally:
        tree.daemon = None
        for _ in range(2):
            umount(tree.root, MNT_DETACH)


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
            kill_daemon(tree)
            Path("/proc/sys/vm/drop_caches").write_text("2")
            assert_equal(expected, tree.snapshot(inodes=True), ("before", "after the kill"))
            assert held.read() in ("00", "")


def test_in_the_background_and_with_a_log(workshop: Workshop) -> None:
    """The usual way to mount: the command returns, the keeper stays; SIGTERM to it unmounts."""
    plain = workshop({"f": "1"})
    stack = type(plain.stack).around(plain.stack.base.with_name("second"), plain.stack.lowers)
    log = stack.base / "log"
    options = f"lowerdir={stack.lowers[0]},upperdir={stack.upper},workdir={stack.work}"
    command = unionfuse_command("-o", f"{options},keeper=on,log={log}", stack.mountpoint)
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""
    pids = subprocess.run(
        ["pgrep", "-f", f"keeper.py.*{stack.mountpoint}$"], capture_output=True, text=True
    ).stdout.split()
    keeper = int(pids[0])
    try:
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert (stack.mountpoint / "f").read_text() == "1"
        assert "replacement 1 takes over" in log.read_text()
        anonymous = [
            int(line.split()[1])
            for line in Path(f"/proc/{keeper}/status").read_text().splitlines()
            if line.startswith("RssAnon")
        ]
        assert anonymous[0] < 8000, "kB of anonymous memory in the keeper"
    finally:
        pidfd = os.pidfd_open(keeper)
        os.kill(keeper, signal.SIGTERM)
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    assert not is_mounted(stack.mountpoint)


def test_every_name_of_a_hard_link_is_known_after_a_kill(workshop: Workshop) -> None:
    """The kernel has the other name, and asks for the node by its id: it is not deleted yet."""
    tree = workshop({"low": "low", "lowlink": HardLink("low")}, options={"keeper": "on"})
    (tree / "first").write_text("data")
    os.link(tree / "first", tree / "second")
    os.link(tree / "first", tree / "third")
    for name in ("first", "second", "third", "low", "lowlink"):
        (tree / name).stat()
    kill_daemon(tree)
    (tree / "first").unlink()
    (tree / "low").unlink()
    assert (tree / "second").read_text() == "data"
    assert (tree / "lowlink").read_text() == "low"
    assert (tree / "second").stat().st_nlink == 2
    os.rename(tree / "second", tree / "renamed")
    kill_daemon(tree)
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
            kill_daemon(tree)
            second = opened.enter_context(open(tree / "new", "ab", buffering=0))
            second.write(b"%d" % number)
            assert os.pread(first.fileno(), 9, 0) == b"1012"[: number + 2]
    kill_daemon(tree)
    assert (tree / "new").read_bytes() == b"1012"
    assert tree.status().get("WRITE", 0) == 0
    fresh = tree / "fresh"
    fresh.write_bytes(b"x")
    assert fresh.read_bytes() == b"x"
    assert tree.status().get("READ", 0) == 0


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
        kill_daemon(tree)
        (tree / "f4").unlink(missing_ok=True)
        (tree / "f5").write_text("changed")
        drop_pages(readers)
        found = [os.pread(reader, 9000, 0).decode() for reader in readers]
        expected = list(contents.values())
        expected[2] = expected[5] = "changed"
        assert found == expected
    for reader in readers:
        os.close(reader)
    kill_daemon(tree)
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
    kill_daemon(tree)
    for descriptor in (*readers, *writers):
        os.close(descriptor)
    os.sync()
    limit = time.monotonic() + 10
    while len(os.listdir(f"/proc/{tree.daemon.pid}/fd")) > before + 4:
        assert time.monotonic() < limit, os.listdir(f"/proc/{tree.daemon.pid}/fd")
        time.sleep(0.05)


def drop_pages(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def indexed_again(workshop: Workshop, layer: Layer) -> Mounted:
    """A mount of the usual options with a lookup index."""
    return workshop(layer, kind="unionfuse-indexed")


# --- a service manager ------------------------------------------------------------------------

START = """
import os, sys
numbers = [int(number) for number in sys.argv[1].split(",") if number]
for place, number in enumerate(numbers, 3):
    os.dup2(number, place, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(numbers)))
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServiceManager:
    """Does what sd_notify(3) and FileDescriptorStoreMax= of systemd do, for one service."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._path = path
        self.store: dict[str, int] = {}
        self.said: list[str] = []

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start the service with all that is in the store."""
        high = {name: fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for name, fd in self.store.items()}
        names = ":".join(self.store)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", START, ",".join(map(str, high.values())), *command],
                env={**os.environ, "NOTIFY_SOCKET": str(self._path), "LISTEN_FDNAMES": names},
                pass_fds=list(high.values()),
                stderr=output,
            )
        for descriptor in high.values():
            os.close(descriptor)
        self.said.clear()
        return process

    def listen(self, until: str) -> None:
        """Take messages until one has a line that begins like this."""
        self._socket.settimeout(20)
        while not any(line.startswith(until) for line in self.said):
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 8)
            lines = data.decode().splitlines()
            words = dict(line.partition("=")[::2] for line in lines)
            if "FDSTORE" in words:
                self.store[words["FDNAME"]] = descriptors[0]
            elif "FDSTOREREMOVE" in words:
                os.close(self.store.pop(words["FDNAME"]))
            self.said += lines

    def close(self) -> None:
        self._socket.close()
        for descriptor in self.store.values():
            os.close(descriptor)


def test_a_service_manager_holds_what_the_keeper_held(workshop: Workshop) -> None:
    plain = workshop({"low": "low"})
    stack = type(plain.stack).around(plain.stack.base.with_name("second"), plain.stack.lowers)
    manager = ServiceManager(stack.base / "notify")
    line = f"lowerdir={stack.lowers[0]},upperdir={stack.upper},workdir={stack.work}"
    command = unionfuse_command("-f", "-o", line, stack.mountpoint)
    process = manager.start(command, stack.base / "log")
    try:
        manager.listen("READY=1")
        assert f"MAINPID={process.pid}" in manager.said
        assert manager.store.keys() >= {"fuse", "memory", "upper", "work", "layer-0"}
        with open(stack.mountpoint / "new", "wb+", buffering=0) as file:
            for round_ in range(2):
                file.write(b"%d" % round_)
                if round_ == 0:
                    os.unlink(stack.mountpoint / "new")
                    manager.listen("FDNAME=node-")
                pid = process.pid
                daemon = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
                watched = os.pidfd_open(daemon)
                process.kill()
                process.wait()
                assert select.select([watched], [], [], 10)[0], "the daemon outlived its keeper"
                os.close(watched)
                process = manager.start(command, stack.base / "log")
                manager.listen("READY=1")
            assert os.pread(file.fileno(), 9, 0) == b"01"
        assert (stack.mountpoint / "low").read_text() == "low"
        process.terminate()
        manager.listen("STOPPING=1")
        assert process.wait(20) == 0
        manager.listen("FDNAME=fuse")
        assert not is_mounted(stack.mountpoint)
    finally:
        manager.close()
        process.kill()
        process.wait()
        if is_mounted(stack.mountpoint):
            subprocess.run(["umount", "-l", stack.mountpoint], check=True)


OLD_KERNEL = """
import sys
from unionfuse.express import protocol
whole = protocol.parse_init
def without(body):
    found = whole(body)
    return found._replace(flags=found.flags & ~protocol.InitFlag.HAS_RESEND)
protocol.parse_init = without
from unionfuse.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_kernel_that_does_not_send_requests_again(workshop: Workshop) -> None:
    """Linux before 6.9, played: the mount works, the log says what a crash means, and it ends."""
    plain = workshop({"f": "1"})
    stack = type(plain.stack).around(plain.stack.base.with_name("second"), plain.stack.lowers)
    line = f"lowerdir={stack.lowers[0]},upperdir={stack.upper},workdir={stack.work},keeper=on"
    command = [sys.executable, "-c", OLD_KERNEL, "-f", "-o", line, str(stack.mountpoint)]
    daemon = Daemon.start(command, stack.mountpoint, stack.base / "log")
    try:
        assert (stack.mountpoint / "f").read_text() == "1"
        assert "a crash of the daemon will end this mount: this kernel" in daemon.messages()
        os.kill(daemon.pid, signal.SIGKILL)
        assert daemon.process.wait(20) == 1
        assert "cannot be replaced: this kernel does not send requests again" in daemon.messages()
        assert not is_mounted(stack.mountpoint)
    finally:
        daemon.kill()
        if is_mounted(stack.mountpoint):
            subprocess.run(["umount", "-l", stack.mountpoint], check=True)
