"""A mount that outlives its daemon (keeper=on): killed daemons that nobody notices.

docs/survival.md promises it; here is how it is kept.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import torture
from harness.layers import Layer
from harness.mounts import Mounted, Workshop
from harness.snapshot import assert_equal

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.timeout(300)]

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
    "fio": 1,
    "sqlite": 6,
    "git": 5,
    "tar": 3,
    "mapped": 6,
    "names": 12,
    "listing": 8,
    "lower": 80,
}


def test_nobody_notices_that_the_daemon_is_killed(workshop: Workshop) -> None:
    kills = survive(workshop, SHORT, 1.0, 3.0)
    assert kills >= 2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nobody_notices_for_minutes(workshop: Workshop) -> None:
    kills = survive(workshop, {name: count * 12 for name, count in SHORT.items()}, 1.0, 3.0)
    print(f"{kills} kills survived")
    assert kills >= 30
