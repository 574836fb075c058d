"""After a kill at the wrong moment, a full stop of the host, a rush: `ps` tells the truth and
nothing is left."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.containers import COMMAND, Box, leftovers, monitor_of, nothing_left
from harness.waiting import wait_until
from unionimage.container import prepare
from unionimage.container.state import Containers
from unionimage.store import Store


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_monitor(box: Box) -> None:
    identity = box.start("kept", "-m", "64m")
    pid = box.state("kept")["Pid"]
    os.kill(monitor_of(box, "kept"), signal.SIGKILL)
    assert "Exited (137)" in wait_until(lambda: box.out("ps", "-a", "--filter", "status=exited"))
    assert box.names() == []
    assert not alive(pid)
    assert nothing_left(box, (identity,))
    box("start", "kept")
    assert box.names() == ["kept"]
    box("rm", "-f", "kept")


def test_a_killed_monitor_with_a_network_and_rm(box: Box) -> None:
    box("network", "create", "crash")
    box.start("netted", "--rm", "--network", "crash", "-p", "127.0.0.1:18999:80", "-v", "/anon")
    address = box.inspect("netted")["NetworkSettings"]["Networks"]["crash"]["IPAddress"]
    os.kill(monitor_of(box, "netted"), signal.SIGKILL)
    wait_until(lambda: box.names("-a") == [])
    rules = subprocess.check_output(["iptables-save"], text=True)
    assert f"{address}:80" not in rules
    assert box.out("volume", "ls", "-q") == ""
    box.start("heir", "--network", "crash", "-p", "127.0.0.1:18999:80")
    assert box.inspect("heir")["NetworkSettings"]["Networks"]["crash"]["IPAddress"] == address


def test_monitor_and_process_killed_with_a_network(box: Box) -> None:
    box("network", "create", "gone")
    shown = json.loads(box.out("network", "inspect", "gone"))[0]
    identity = box.start("netted", "--network", "gone", "-p", "127.0.0.1:18998:80")
    for pid in (monitor_of(box, "netted"), box.state("netted")["Pid"]):
        os.kill(pid, signal.SIGKILL)
    assert "Exited (137)" in wait_until(lambda: box.out("ps", "-a", "--filter", "status=exited"))
    assert "18998" not in subprocess.check_output(["iptables-save"], text=True)
    box("rm", "netted")
    box("network", "rm", "gone")
    assert not Path("/sys/class/net", shown["Interface"]).exists()
    rules = subprocess.check_output(["iptables-save"], text=True)
    assert shown["IPAM"]["Config"][0]["Subnet"] not in rules
    assert nothing_left(box, (identity,))


@pytest.mark.parametrize("delay", [0.03, 0.08, 0.13, 0.18])
def test_a_start_that_is_killed_with_its_monitor(box: Box, delay: float) -> None:
    """Whatever the runtime and the network's engine had made by then goes with `rm`."""
    port = "18997"
    words = ("run", "-d", "-p", f"127.0.0.1:{port}:80", "busybox", "sleep", "1000")
    command = subprocess.Popen([COMMAND, *words], env=box.environment, stdout=subprocess.DEVNULL)
    time.sleep(delay)
    for process in leftovers(box)["processes"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.split()[0]), signal.SIGKILL)
    command.wait(30)
    identities = box.out("ps", "-aq", "--no-trunc").split()
    if identities:
        box("rm", "-f", *identities)
    assert nothing_left(box, tuple(identities))
    assert port not in subprocess.check_output(["iptables-save"], text=True)
    box("run", "--rm", "-p", f"127.0.0.1:{port}:80", "busybox", "true")


def test_monitor_and_process_both_killed(box: Box) -> None:
    identity = box.start("both")
    for pid in (monitor_of(box, "both"), box.state("both")["Pid"]):
        os.kill(pid, signal.SIGKILL)
    box("rm", "-f", "both")
    assert nothing_left(box, (identity,))


def test_after_a_reboot_nothing_runs(box: Box, tmp_path: Path) -> None:
    """A changed boot id: recorded pids belong to others now and are left alone."""
    identity = box.start("early", "--restart", "always")
    box.start("stopped", "--restart", "unless-stopped")
    box("stop", "-t", "0", "stopped")
    modest = box.start("modest", "--restart", "no")
    stranger = subprocess.Popen(["sleep", "1000"])
    for name in ("early", "modest"):
        os.kill(monitor_of(box, name), signal.SIGKILL)
        os.kill(box.state(name)["Pid"], signal.SIGKILL)
    wait_until(lambda: not (alive(box.state("early")["Pid"])))
    state = box.directory("early") / "state.json"
    state.write_text(
        state.read_text().replace(f'"Pid": {box.state("early")["Pid"]}', f'"Pid": {stranger.pid}')
    )
    file = tmp_path / "boot_id"
    file.write_text("another-boot\n")
    box.environment["UNIONFUSE_BOOT_ID"] = str(file)
    try:
        assert box.names() == []
        assert "Exited (255)" in box.out("ps", "-a", "--filter", "name=early")
        assert stranger.poll() is None
        assert box.out("container", "autostart") == "early\n"
        assert box.names() == ["early"]
        box("rm", "-f", "early")
    finally:
        del box.environment["UNIONFUSE_BOOT_ID"]
        stranger.kill()
        stranger.wait()
    box.remove_all()
    for left in (identity, modest):  # a reboot takes cgroups along
        subprocess.run(
            ["find", "/sys/fs/cgroup", "-depth", "-name", left, "-exec", "rmdir", "{}", ";"],
            stderr=subprocess.DEVNULL,
        )
    assert nothing_left(box, (identity, modest))


@pytest.mark.parametrize("verb", ["run", "delete", "state"])
def test_a_runtime_that_dies(box: Box, tmp_path: Path, verb: str) -> None:
    program = tmp_path / "crun"
    program.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do if [ "$word" = {verb} ] && [ -e {tmp_path}/deadly ]; then'
        " kill -9 $$; fi; done\n"
        'exec /usr/bin/crun "$@"\n'
    )
    program.chmod(0o755)
    box.sh("true", "--runtime", str(program))
    (tmp_path / "deadly").touch()
    code = 125 if verb == "run" else 0
    box(
        "run",
        "--name",
        "unlucky",
        "--network",
        "none",
        "--runtime",
        str(program),
        "busybox",
        "true",
        code=code,
    )
    identity = box.inspect("unlucky")["Id"]
    (tmp_path / "deadly").unlink()
    box("rm", "-f", "unlucky")
    assert nothing_left(box, (identity,))


def test_a_runtime_that_says_it_started_what_it_did_not(box: Box, tmp_path: Path) -> None:
    """crun does where the process is killed that it has forked for its work."""
    program = tmp_path / "crun"
    program.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do [ "$word" = run ] && [ -e {tmp_path}/lying ] && exit 0; done\n'
        'exec /usr/bin/crun "$@"\n'
    )
    program.chmod(0o755)
    identity = box.start("deceived", "--runtime", str(program))
    box("stop", "-t", "0", "deceived")
    (tmp_path / "lying").touch()
    said = box("start", "deceived", code=1).stderr
    assert "ended without starting the process" in said
    assert box.state("deceived")["Status"] == "exited"
    assert nothing_left(box, (identity,))
    (tmp_path / "lying").unlink()
    box("start", "deceived")
    box("rm", "-f", "deceived")


def test_commands_killed_at_odd_moments(box: Box) -> None:
    chance = random.Random(5)
    for number in range(12):
        process = subprocess.Popen(
            [
                COMMAND,
                "run",
                "-d",
                "--name",
                f"odd-{number}",
                "--network",
                "none",
                "-v",
                "odd:/v",
                "busybox",
                "sleep",
                "1000",
            ],
            env=box.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(0.02, 0.35))
        process.kill()
        process.wait()
    time.sleep(1)
    for name in box.names("-a"):
        assert box.state(name)["Status"] in ("created", "running", "exited")
        box("rm", "-f", name)
    box("container", "prune", "-f")
    assert not list((box.root / "containers").glob(".new-*"))
    assert nothing_left(box)
    box("run", "--rm", "--name", "odd-0", "--network", "none", "busybox", "true")


def test_a_start_that_was_killed_with_the_mount_made(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box("create", "--network", "none", "--name", "half", "busybox", "true")
    for name, value in box.environment.items():
        if name.startswith("UNIONFUSE_"):
            monkeypatch.setenv(name, value)
    container = Containers(box.root, box.run_root).find("half")
    container.merged.mkdir(parents=True)
    with Store.open(box.root) as store:
        prepare.mount_root(container, store)
    assert container.mounted()
    box("start", "-a", "half")
    box("rm", "half")
    assert nothing_left(box)


def test_several_commands_on_one_container(box: Box) -> None:
    box("create", "--name", "contended", "--network", "none", "busybox", "sleep", "1000")
    words = [
        ("start", "contended"),
        ("stop", "-t", "0", "contended"),
        ("start", "contended"),
        ("restart", "-t", "0", "contended"),
        ("kill", "contended"),
        ("ps", "-a"),
    ] * 2
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda one: box(*one, code=None), words))
    assert not [one.stderr for one in done if "internal error" in one.stderr]
    assert box.state("contended")["Status"] in ("running", "exited")
    box("rm", "-f", "contended")
    with ThreadPoolExecutor(4) as pool:
        made = list(
            pool.map(lambda _: box("create", "--name", "one-name", "busybox", code=None), range(4))
        )
    assert sorted(one.returncode for one in made) == [0, 125, 125, 125]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_stops_the_log_and_not_the_container(box: Box, small_disk: Path) -> None:
    command = "seq 1 20000; echo done > /finished; sleep 1000"
    words = ("create", "--name", "writer", "--network", "none", "busybox", "sh", "-c", command)
    identity = box.out(*words).strip()
    log = box.directory("writer") / "log.json"
    log.touch()
    (small_disk / "log").touch()
    subprocess.run(["mount", "--bind", str(small_disk / "log"), str(log)], check=True)
    box("start", "writer")
    wait_until(lambda: (box.directory("writer") / "upper/finished").exists())
    assert box.names() == ["writer"]
    assert "No space left" in box.state("writer")["LogError"]
    assert 0 < (small_disk / "log").stat().st_size <= 64 << 10
    box("rm", "-f", "writer")
    assert nothing_left(box, (identity,))  # the log's mount, too


@pytest.mark.parametrize("what", ["container", "volume"])
def test_what_others_mounted_below_is_not_deleted(box: Box, tmp_path: Path, what: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    box("create", "--name", "covered", "--network", "none", "-v", "vol:/v", "busybox", "true")
    below = box.root / "volumes/vol/_data"
    if what == "container":
        below = box.directory("covered") / "upper/deep"
        below.mkdir()
    subprocess.run(["mount", "--bind", str(precious), str(below)], check=True)
    box("rm", "covered")
    box("volume", "rm", "vol")
    assert (precious / "file").read_text() == "mine"
    assert nothing_left(box)
