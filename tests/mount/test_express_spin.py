"""Readers that look for a request before they sleep (spin=): idle, under load, and at the end."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.mounts import Mounted, Workshop
from harness.waiting import wait_until

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.through("unionfuse")]

LAYER = {f"d{number}/f{name}": "x" for number in range(20) for name in range(20)}
ASK = """
import os, sys
number = 0
while True:
    number += 1
    try:
        os.stat(f"{sys.argv[1]}/d{number % 20}/absent-{sys.argv[2]}-{number}")
    except FileNotFoundError:
        pass
    except OSError:
        sys.exit(0)
"""


@contextmanager
def asked_by(count: int, root: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Programs that ask for names as fast as they can, until the mount is gone."""
    command = [sys.executable, "-c", ASK, str(root)]
    programs = [subprocess.Popen([*command, str(number)]) for number in range(count)]
    try:
        yield programs
    finally:
        for program in programs:
            program.kill()
            program.wait()


def spent(tree: Mounted) -> list[str]:
    """What each thread of the daemon has run and waited for a processor, and how often."""
    assert tree.daemon is not None
    tasks = sorted(Path(f"/proc/{tree.daemon.serving or tree.daemon.pid}/task").iterdir())
    return [(task / "schedstat").read_text() for task in tasks]


@pytest.mark.parametrize("spin", ["auto", "on"])
def test_an_idle_mount_takes_no_processor_time(workshop: Workshop, spin: str) -> None:
    tree = workshop(LAYER, options={"spin": spin})
    with asked_by(2, tree.root):
        subprocess.run(["ls", "-lR", tree.root], check=True, stdout=subprocess.DEVNULL)

    def idle() -> bool:
        before = spent(tree)
        return threading.Event().wait(0.3) or spent(tree) == before

    wait_until(idle, what="an idle mount")


def test_a_mount_ends_while_it_is_asked(workshop: Workshop) -> None:
    for count in (1, 4):
        tree = workshop(LAYER, options={"spin": "on"})
        with asked_by(count, tree.root):
            for number in range(20):
                (tree / f"new{number}").mkdir()  # by Python, while others are served
            subprocess.run(["umount", "-l", tree.root], check=True)
            assert tree.daemon is not None
            assert tree.daemon.process.wait(20) == 0


def test_many_ask_and_change_at_once(workshop: Workshop) -> None:
    tree = workshop(LAYER, options={"spin": "on"})
    with asked_by(3, tree.root):
        for number in range(100):
            (tree / f"d1/new{number}").write_text("new")
        for number in range(0, 100, 2):
            (tree / f"d1/new{number}").unlink()
    names = {f"f{name}" for name in range(20)} | {f"new{name}" for name in range(1, 100, 2)}
    assert set(os.listdir(tree / "d1")) == names
