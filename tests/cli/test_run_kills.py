"""kill -9 of whatever keeps a container, at any moment of any verb: the host is as it was after."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness.containers import COMMAND, Box, nothing_left

KINDS = {
    "command": r"unionfuse(-spawn)?$",
    "daemon": r"unionfuse-keepe|unionfuse-daemo",
    "runtime": r"crun|runc",
    "engine": r"netavark|iptables.*|ip$",
}
RANDOM = 5  # of the moments; another number tries others


def processes_of(box: Box) -> list[tuple[int, str]]:
    """Everything that works for a box, with its name; containers' own processes are not."""
    mark = f"UNIONFUSE_RUNROOT={box.run_root}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((int(entry.name), (entry / "comm").read_text().strip()))
    return found


def kill_one(box: Box, chance: random.Random, kind: str) -> str:
    """Kill one process of a kind; its name, empty where there was none."""
    fitting = [one for one in processes_of(box) if re.match(KINDS[kind], one[1])]
    if not fitting:
        return ""
    pid, name = chance.choice(fitting)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return name
    return ""


def host_state(subnet: str) -> dict[str, list[str]]:
    """What containers of this network could leave in the kernel."""
    said = {
        "rules": subprocess.check_output(["iptables-save"], text=True),
        "addresses": subprocess.check_output(["ip", "-o", "address"], text=True),
    }
    return {
        kind: [line for line in text.splitlines() if subnet in line] for kind, text in said.items()
    }


VERBS = (
    ("run", "-d", "--name", "{name}", "--network", "kills", "-p", "127.0.0.1::80", "-v", "/v",
     "-m", "64m", "busybox", "sleep", "1000"),
    ("run", "--rm", "--name", "{name}", "--network", "kills", "busybox", "true"),
    ("run", "-d", "--name", "{name}", "--network", "none", "-v", "kills:/v", "busybox", "sleep",
     "1000"),
    ("start", "{old}"),
    ("stop", "-t", "0", "{old}"),
    ("restart", "-t", "0", "{old}"),
    ("rm", "-f", "-v", "{old}"),
)  # fmt: skip


@pytest.mark.parametrize("count", [24, pytest.param(240, marks=pytest.mark.long)])
def test_kills_at_odd_moments(box: Box, count: int) -> None:
    chance = random.Random(RANDOM)
    box("network", "create", "--subnet", "10.213.77.0/24", "kills")
    before = host_state("10.213.77.")
    killed, number, seen = 0, 0, set[str]()
    while killed < count:
        number += 1
        assert number < count * 4, f"only {killed} kills"
        known = box.names("-a", "--no-trunc") or ["none-yet"]
        verb = chance.choice(VERBS)
        words = [word.format(name=f"n{number}", old=chance.choice(known)) for word in verb]
        null = subprocess.DEVNULL
        command = subprocess.Popen([COMMAND, *words], env=box.environment, stdout=null, stderr=null)
        time.sleep(chance.uniform(0.0, 0.4))
        victim = kill_one(box, chance, chance.choice(list(KINDS)))
        killed += bool(victim)
        print(number, *words[:1], words[-1], victim)  # for who looks into a failure
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(chance.uniform(0.0, 0.4))
        if command.poll() is None and chance.random() < 0.5:
            command.kill()
        command.wait(30)
        seen.update(box.out("ps", "-aq", "--no-trunc").split())
        if number % 8 == 0:
            _check_truth(box)
            if names := box.names("-a"):
                box("rm", "-f", *names)
            box("container", "prune", "-f")
            assert nothing_left(box, tuple(seen))
            assert not [one.name for one in (box.root / "containers").glob(".[nd]e*")]
            box("run", "--rm", "--network", "kills", "busybox", "true")
            seen.clear()
    if names := box.names("-a"):
        box("rm", "-f", *names)
    box("system", "prune", "-f")
    box("volume", "prune", "-af")
    assert nothing_left(box, tuple(seen))
    assert host_state("10.213.77.") == before


def _check_truth(box: Box) -> None:
    """What `ps` says runs does run, what it says does not run has no process."""
    for name in box.names("-a"):
        state = box.state(name)
        lives = bool(state["Pid"]) and Path(f"/proc/{state['Pid']}").exists()
        assert lives == (state["Status"] in ("running", "paused")), (name, state)
