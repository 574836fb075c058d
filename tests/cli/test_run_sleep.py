"""What keeps an idle container sleeps, and wakes up for whatever comes: nobody notices."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containers import COMMAND, Box, monitor_of, nothing_left
from harness.waiting import wait_until


@pytest.fixture(autouse=True)
def _soon(box: Box) -> Iterator[None]:
    """Soon asleep; a monitor has the environment of who started its container."""
    box.environment["UNIONFUSE_SLEEP_AFTER"] = "0.2"
    yield
    del box.environment["UNIONFUSE_SLEEP_AFTER"]


def asleep(box: Box, name: str) -> int:
    """The monitor's process id, once it sleeps."""
    monitor = monitor_of(box, name)
    name_of_it = Path(f"/proc/{monitor}/comm")
    wait_until(lambda: name_of_it.read_text().startswith("unionfuse-waite"), 20, "its sleep")
    return monitor


def test_output_and_clients_wake_it(box: Box) -> None:
    identity = box.start(
        "one", command="mkfifo /go; printf be; read -r _ < /go; echo gun; echo bad >&2; sleep 1000"
    )
    monitor = asleep(box, "one")
    status = Path(f"/proc/{monitor}/status").read_text()
    (held,) = (int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)
    assert held < 500, "kB of anonymous memory of one that sleeps"
    box("exec", "one", "sh", "-c", "echo > /go")
    assert wait_until(lambda: box.out("logs", "one"), 20) == "begun\n"
    assert "bad" in box("logs", "one").stderr
    assert asleep(box, "one") == monitor
    box("exec", "-d", "one", "sh", "-c", "echo > /made")
    wait_until(lambda: box.out("exec", "one", "ls", "/made"), 20)
    asleep(box, "one")
    box("pause", "one")
    asleep(box, "one")
    box("unpause", "one")
    asleep(box, "one")
    box("kill", "-s", "KILL", "one")
    assert box.out("wait", "one") == "137\n"
    assert "Exited (137)" in box.out("ps", "-a")
    box("rm", "one")
    assert nothing_left(box, (identity,))


def test_the_end_of_the_process_and_a_restart(box: Box) -> None:
    script = "test -e /tried && exit 3; echo > /tried; exec sleep 1000"
    box("create", "--network", "none", "--name", "again", "--restart", "on-failure:1",
        "busybox", "sh", "-c", script)  # fmt: skip
    box("start", "again")
    asleep(box, "again")
    os.kill(box.state("again")["Pid"], signal.SIGKILL)
    wait_until(lambda: "Exited (3)" in box.out("ps", "-a"), 20)
    assert box.inspect("again")["RestartCount"] == 1
    box("rm", "again")
    assert nothing_left(box)


def test_input_that_is_kept_open(box: Box) -> None:
    box("create", "-i", "--network", "none", "--name", "fed", "busybox", "cat")
    box("start", "fed")
    asleep(box, "fed")
    assert box.out("attach", "fed", input="to the cat\n") == "to the cat\n"
    wait_until(lambda: "Exited (0)" in box.out("ps", "-a"), 20)
    assert box.out("logs", "fed") == "to the cat\n"
    box("rm", "fed")


def test_a_network_that_was_connected_before(box: Box) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    box.start("served", "--network", "bridge", "-p", f"127.0.0.1:{port}:80")
    address = box.inspect("served")["NetworkSettings"]["IPAddress"]
    asleep(box, "served")
    assert address in box.out("exec", "served", "ip", "addr")
    box("stop", "-t", "0", "served")
    assert f"{address}" not in subprocess.check_output(["iptables-save"], text=True)
    box("start", "served")
    asleep(box, "served")
    box("rm", "-f", "served")
    assert nothing_left(box)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_sleeping_monitor(box: Box, number: int) -> None:
    """A shutdown asks it to end, and somebody kills it: the same as awake."""
    identity = box.start("hit", command="trap 'exit 9' TERM; while :; do sleep 0.1; done")
    os.kill(asleep(box, "hit"), number)
    code = 9 if number == signal.SIGTERM else 137
    wait_until(lambda: f"Exited ({code})" in box.out("ps", "-a"), 20)
    assert nothing_left(box, (identity,))
    box("rm", "hit")


def test_it_stays_awake_for_whoever_is_attached(box: Box) -> None:
    words = [COMMAND, "run", "--rm", "--network", "none", "--name", "seen", "busybox"]
    script = "sleep 1; echo later; sleep 1"
    with subprocess.Popen([*words, "sh", "-c", script], env=box.environment,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read() == b"later\n"
    assert process.returncode == 0
    assert nothing_left(box)


def test_woken_again_and_again(box: Box) -> None:
    """Whatever comes in the very moment in which it falls asleep is not lost."""
    box.environment["UNIONFUSE_SLEEP_AFTER"] = "0.01"
    box.start("many", command="for i in $(seq 1 60); do echo $i; sleep 0.0$((i % 7)); done; exit 4")
    wait_until(lambda: "Exited (4)" in box.out("ps", "-a"), 60)
    assert box.out("logs", "many").split() == [str(i) for i in range(1, 61)]
    box("rm", "many")
