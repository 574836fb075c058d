"""What takes minutes to show: that nothing is left of a million operations; how long a pause is."""

import os
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.actions import BASE, TOP, in_arenas
from harness.backings import backing_ids
from harness.mounts import Mounted, Workshop

pytestmark = [pytest.mark.long, pytest.mark.on("unionfuse"), pytest.mark.through("unionfuse")]

TESTS = Path(__file__).parents[1]
PROGRAMS = 4
COUNT = 1_000_000
NODES = 50_000
# kB: what the allocator may keep, and what the journal may hold of nodes that are gone
SLACK = {"RssAnon": 2048, "RssShmem": 5120}


def _work(tree: Mounted, seed: int, count: int) -> None:
    """Do `count` random actions, by several programs at once."""
    running = []
    for number in range(PROGRAMS):
        words = [tree / f"arena{number}", seed + number, count // PROGRAMS]
        command = [sys.executable, "-m", "harness.actions", *map(str, words)]
        running.append(subprocess.Popen(command, cwd=TESTS))
    assert [process.wait() for process in running] == [0] * PROGRAMS


def _held(tree: Mounted) -> dict[str, int]:
    """What the mount's processes hold while nothing is open and the kernel remembers no name."""
    assert tree.daemon is not None
    Path("/proc/sys/vm/drop_caches").write_text("3")
    limit = time.monotonic() + 20  # for RELEASE and FORGET, which nobody waits for
    while (known := _known(tree)) != {"nodes": 1, "open": 0} and time.monotonic() < limit:
        time.sleep(0.2)
    keeper, daemon = tree.daemon.process.pid, tree.daemon.pid
    found = {}
    for name, pid in {"keeper": keeper, "daemon": daemon}.items():
        status = Path(f"/proc/{pid}/status").read_text()
        words = dict(line.split(":", 1) for line in status.splitlines())
        for key in ("RssAnon", "RssShmem"):
            found[f"{name} {key}"] = int(words[key].split()[0])
        found[f"{name} descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    return found | known | {"backing ids": backing_ids(daemon, tree.upper)}


def _known(tree: Mounted) -> dict[str, int]:
    status = tree.status()
    return {key: status[key] for key in ("nodes", "open")}


@pytest.mark.timeout(3600)
def test_a_million_operations_leave_nothing_behind(workshop: Workshop) -> None:
    tree = workshop(in_arenas(TOP, PROGRAMS), in_arenas(BASE, PROGRAMS))
    _work(tree, seed=0, count=COUNT // 10)  # until all that is made once has been made
    before = _held(tree)
    _work(tree, seed=PROGRAMS, count=COUNT)
    after = _held(tree)
    for key, value in before.items():
        print(f"{key}: {value} before, {after[key]} after")
    slack = {key: SLACK.get(key.rpartition(" ")[2], 0) for key in before}
    grown = {k: (before[k], after[k]) for k in before if after[k] > before[k] + slack[k]}
    assert not grown


@pytest.mark.timeout(600)
def test_how_long_the_pause_is(workshop: Workshop) -> None:
    """With 50,000 nodes known to the kernel; the figures are for docs/survival.md."""
    tree = workshop({f"d{n // 100:03}/f{n:05}": "" for n in range(NODES)})
    assert tree.daemon is not None
    pauses = []
    for _ in range(9):
        subprocess.run(["find", tree.root, "-ls"], check=True, stdout=subprocess.DEVNULL)
        daemon = tree.daemon.pid
        watched = os.pidfd_open(daemon)
        before = time.monotonic()
        os.kill(daemon, signal.SIGKILL)
        assert select.select([watched], [], [], 10)[0]  # from here on nobody can answer
        os.statvfs(tree.root)  # which the kernel never answers by itself
        pauses.append(time.monotonic() - before)
        os.close(watched)
    median, worst = statistics.median(pauses), max(pauses)
    load = os.getloadavg()[0]
    print(f"pause: median {median:.3f} s, worst {worst:.3f} s of {len(pauses)}; load {load:.1f}")
