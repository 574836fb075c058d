"""A mount that outlives its daemon (keeper=on): killed daemons that no program notices.

docs/survival.md promises it; here is how it is kept, as it is in test_survival_open.py (for what is
open, and what is answered without the daemon) and in test_keeper.py.
"""

import errno
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from harness import torture
from harness.layers import File, HardLink, Layer
from harness.linux import RENAME_EXCHANGE, renameat2
from harness.mounts import Mounted, Workshop
from harness.snapshot import assert_equal

pytestmark = [
    pytest.mark.on("unionfuse"),
    # A keeper needs the express lane on its classic transport.
    pytest.mark.through("unionfuse", "unionfuse-indexed"),
    pytest.mark.timeout(300),
]

GIVEN: Layer = {f"lower/given/d{n}/f{k}": f"d{n}/f{k}\n" for n in range(20) for k in range(4)}


class Killer(threading.Thread):
    """Kills the daemon of a mount every now and then, until it is told to stop."""

    def __init__(self, tree: Mounted, least: float, most: float) -> None:
        super().__init__()
        assert tree.daemon is not None
        self._daemon, self._least, self._most = tree.daemon, least, most
        self._stop_it = threading.Event()
        self._draw = random.Random(3)
        self.kills = 0

    def run(self) -> None:
        while not self._stop_it.wait(self._draw.uniform(self._least, self._most)):
            pid = self._daemon.serving
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                self.kills += 1

    def stop(self) -> None:
        self._stop_it.set()
        self.join()


def run_programs(root: Path, rounds: dict[str, int]) -> None:
    """Run each program of torture.py in `root`; fail with what those that failed said."""
    running = {}
    for name, count in rounds.items():
        command = [sys.executable, torture.__file__, name, str(root), str(count)]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    failures = []
    for name, process in running.items():
        output, _ = process.communicate()
        if process.returncode:
            failures.append(f"{name}: {output.decode(errors='replace')[-3000:]}")
    assert not failures, "\n".join(failures)


def survive(
    workshop: Workshop, rounds: dict[str, int], least: float, most: float, **options: str
) -> int:
    """Torture a mount and kernel overlayfs alike; the first one's daemon is killed on and on."""
    tree = workshop(GIVEN, options={"keeper": "on", **options})
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


def test_nobody_notices_while_a_reader_always_looks(workshop: Workshop) -> None:
    rounds = {"names": 100, "listing": 40, "lower": 400}
    assert survive(workshop, rounds, 0.2, 0.8, spin="on") >= 2


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
    renameat2(root / "moved/top", root / "full/x", RENAME_EXCHANGE)
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
    assert tree.daemon is not None and has_rings(tree)
    processors = sorted(os.sched_getaffinity(0))
    with open(tree / "new", "w+") as held:
        for number in range(6):
            os.sched_setaffinity(0, {processors[number % len(processors)]})
            try:
                pid = tree.daemon.pid
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
