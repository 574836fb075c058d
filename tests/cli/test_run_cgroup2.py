"""Containers on a host that has cgroup v2 alone: played by a mount namespace without cgroup v1."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.containers import COMMAND, Box

Command = Callable[..., subprocess.CompletedProcess[str]]

PARENT = f"/unionfuse-test-{os.getpid()}"
RUN = (COMMAND, "run", "--network", "none", "--cgroup-parent", PARENT)
HOST = (
    "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    f" && mkdir -p /sys/fs/cgroup{PARENT} && echo there && exec sleep 600"
)


@pytest.fixture
def inside(box: Box) -> Iterator[Command]:
    """Runs a command line in that mount namespace; without words it ends all containers there."""
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", HOST]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "there\n"
        # which runtime works is another question there
        environment = box.environment | {"UNIONFUSE_RUNROOT": f"{box.run_root}2"}

        def run(*words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
            enter = ["nsenter", "-m", "-t", str(host.pid)]
            done = subprocess.run(
                [*enter, *words], env=environment, capture_output=True, text=True, timeout=60
            )
            assert code is None or done.returncode == code, f"{words}: {done.stdout}\n{done.stderr}"
            return done

        try:
            yield run
            there = run("find", f"/sys/fs/cgroup{PARENT}", "-mindepth", "1", "-type", "d")
            assert there.stdout == ""
        finally:
            run(COMMAND, "container", "stop-all", code=None)
            run(COMMAND, "container", "prune", "-f", code=None)
            run("rmdir", f"/sys/fs/cgroup{PARENT}", code=None)
            host.kill()


# crun sets up v2's device rules only with CAP_SYS_RESOURCE, which not every root has.
@pytest.mark.parametrize(("runtime", "more"), [("runc", ()), ("crun", ("--privileged",))])
def test_a_container_from_birth_to_death(
    inside: Command, runtime: str, more: tuple[str, ...]
) -> None:
    words = (*RUN, "-d", "--name", "unified", "--runtime", runtime, *more, "busybox")
    identity = inside(*words, "sh", "-c", "while :; do sleep 0.1; done").stdout.strip()
    state = json.loads(inside(COMMAND, "inspect", "unified").stdout)[0]["State"]
    membership = Path(f"/proc/{state['Pid']}/cgroup").read_text().splitlines()
    assert f"0::{PARENT}/{identity}" in membership
    cgroup = f"/sys/fs/cgroup{PARENT}/{identity}"
    inside(COMMAND, "pause", "unified")
    assert "frozen 1" in inside("cat", f"{cgroup}/cgroup.events").stdout
    inside(COMMAND, "unpause", "unified")
    assert "frozen 0" in inside("cat", f"{cgroup}/cgroup.events").stdout
    assert inside(COMMAND, "exec", "unified", "cat", "/proc/self/cgroup").stdout.endswith("0::/\n")
    assert "unified" in inside(COMMAND, "stats", "--no-stream").stdout
    assert "sleep 0.1" in inside(COMMAND, "top", "unified").stdout
    inside(COMMAND, "rm", "-f", "unified")


def test_a_killed_monitor(inside: Command) -> None:
    """What its container left in the unified tree is killed and taken away."""
    words = (*RUN, "-d", "--name", "orphan", "--runtime", "runc", "busybox")
    inside(*words, "sh", "-c", "sleep 1000 & sleep 1000")
    state = json.loads(inside(COMMAND, "inspect", "orphan").stdout)[0]["State"]
    monitor = int(Path(f"/proc/{state['Pid']}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(monitor, 9)
    assert "Exited (137)" in inside(COMMAND, "ps", "-a").stdout
    inside(COMMAND, "rm", "orphan")


@pytest.mark.parametrize(
    ("option", "value", "controller", "file", "content"),
    [
        ("--memory", "64m", "memory", "memory.max", "67108864"),
        ("--pids-limit", "7", "pids", "pids.max", "7"),
        ("--cpus", "0.5", "cpu", "cpu.max", "50000 100000"),
        ("--cpuset-cpus", "0", "cpuset", "cpuset.cpus", "0"),
    ],
)
def test_limits_hold_or_are_refused(
    inside: Command, option: str, value: str, controller: str, file: str, content: str
) -> None:
    words = (*RUN, "--rm", "--runtime", "runc", option, value)
    there = inside("cat", "/sys/fs/cgroup/cgroup.controllers").stdout.split()
    if controller in there:
        read = inside(*words, "busybox", "cat", f"/sys/fs/cgroup/{file}").stdout
        assert read.strip() == content
    else:
        said = inside(*words, "busybox", "true", code=125).stderr
        assert f"no {controller} cgroup controller" in said
        assert len(said.splitlines()) == 1


def test_what_v2_does_not_have_is_refused(inside: Command) -> None:
    for option in ("--memory-swappiness=10", "--oom-kill-disable"):
        words = (*RUN, "--rm", "-m", "64m", option, "busybox", "true")
        assert "cannot be enforced" in inside(*words, code=125).stderr


def test_a_start_that_fails_leaves_no_cgroup(inside: Command) -> None:
    """The fixture looks: a runtime that gives up half way leaves one."""
    for runtime in ("crun", "runc"):
        words = (*RUN, "--rm", "--runtime", runtime, "busybox", "/etc/passwd")
        assert inside(*words, code=None).returncode in (125, 126)
