"""`-o sleep=SECONDS`: the daemon of an idle mount ends, and there is one again when asked."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.linux import children
from harness.mounts import Mounted, Workshop, is_mounted
from harness.waiting import wait_until

pytestmark = [
    pytest.mark.on("unionfuse"),
    pytest.mark.through("unionfuse", "unionfuse-indexed"),
    pytest.mark.timeout(120),
]


def asleep(tree: Mounted) -> int:
    """The keeper's process id, once the daemon has ended."""
    assert tree.daemon is not None
    keeper = tree.daemon.process.pid
    wait_until(lambda: not children(keeper), 20, "the daemon to end")
    return keeper


def sleepy(workshop: Workshop, seconds: str = "0.05") -> Mounted:
    return workshop({"f": "low", "d/g": "1"}, options={"keeper": "on", "sleep": seconds})


def test_what_is_open_goes_on(workshop: Workshop) -> None:
    tree = sleepy(workshop)
    with (
        open(tree / "f") as reader,
        open(tree / "new", "a", buffering=1) as writer,
        open(tree / "gone", "w+", buffering=1) as deleted,
        os.scandir(tree.root) as listing,
    ):
        next(listing)
        writer.write("one\n")
        deleted.write("still there")
        os.unlink(tree / "gone")
        inode = os.stat(tree / "f").st_ino
        for number in range(3):
            keeper = asleep(tree)
            status = Path(f"/proc/{keeper}/status").read_text()
            (held,) = (int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)
            assert held < 500, "kB of anonymous memory in the keeper"
            writer.write(f"{number}\n")
        assert reader.read() == "low"
        deleted.seek(0)
        assert deleted.read() == "still there"
        assert {entry.name for entry in listing} <= {"f", "d", "new", "gone"}
    assert (tree / "new").read_text() == "one\n0\n1\n2\n"
    assert os.stat(tree / "f").st_ino == inode
    assert (tree / "d/g").read_text() == "1"
    assert tree.daemon is not None and tree.daemon.messages() == ""


def test_nothing_is_lost_that_is_asked_while_it_falls_asleep(workshop: Workshop) -> None:
    tree = sleepy(workshop, "0.002")
    chance = random.Random(1)
    for number in range(150):
        os.mkdir(tree / f"d/{number}")
        with open(tree / "log", "a") as log:
            log.write(f"{number}\n")
        time.sleep(chance.choice((0, 0.001, 0.003, 0.005, 0.008)))
        os.rename(tree / f"d/{number}", tree / f"d/m{number}")
        if number % 10 == 0:
            asleep(tree)
    assert (tree / "log").read_text().split() == [str(number) for number in range(150)]
    assert {f"m{number}" for number in range(150)} | {"g"} == set(os.listdir(tree / "d"))
    assert tree.daemon is not None and tree.daemon.messages() == ""


def test_a_daemon_that_is_killed_when_it_has_woken(workshop: Workshop) -> None:
    tree = sleepy(workshop)
    for number in range(3):
        asleep(tree)
        os.mkdir(tree / f"made{number}")
        tree.kill_daemon()
        assert (tree / f"made{number}").is_dir()


def test_it_sleeps_until_it_is_asked(workshop: Workshop) -> None:
    """Nothing that the end of a daemon leaves behind wakes the keeper."""
    tree = sleepy(workshop, "0.3")
    assert tree.daemon is not None
    for number in range(3):
        keeper = asleep(tree)
        (tree / f"new{number}").touch()
        daemon = tree.daemon.pid
        while serving := children(keeper):
            assert serving == [daemon]
            time.sleep(0.01)


def test_signals_and_an_upgrade_in_its_sleep(workshop: Workshop) -> None:
    tree = sleepy(workshop)
    os.kill(asleep(tree), signal.SIGUSR1)
    assert tree.daemon is not None
    wait_until(lambda: "nodes=" in tree.daemon.messages(), 20)
    keeper = asleep(tree)
    upgrade = [Path(sys.executable).with_name("unionfuse"), "upgrade", tree.root]
    said = subprocess.run(upgrade, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert asleep(tree) == keeper
    os.kill(keeper, signal.SIGTERM)
    assert tree.daemon.process.wait(20) == 0
    assert not is_mounted(tree.root)
    tree.daemon = None


def test_the_mount_ends_in_its_sleep(workshop: Workshop) -> None:
    tree = sleepy(workshop)
    (tree / "new").write_text("new")
    asleep(tree)
    subprocess.run(["umount", tree.root], check=True)
    assert tree.daemon is not None and tree.daemon.process.wait(20) == 0
    assert (tree.upper / "new").read_text() == "new"
    assert list((tree.stack.work / "work").iterdir()) == []
    tree.daemon = None
