"""The keeper of a mount: how it replaces daemons, gives up, and is itself replaced by another."""

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.linux import MNT_DETACH, children, mount, umount
from harness.mounts import Daemon, Mounted, Workshop, is_mounted, unionfuse_command

pytestmark = [
    pytest.mark.on("unionfuse"),
    # A keeper needs the express lane on its classic transport.
    pytest.mark.through("unionfuse", "unionfuse-indexed"),
    pytest.mark.timeout(300),
]


def test_upgrade_while_a_file_is_open(workshop: Workshop) -> None:
    tree = workshop({"f": "1"}, options={"keeper": "on"})
    assert tree.daemon is not None
    before = tree.daemon.pid
    with open(tree / "f", "a") as opened:
        said = subprocess.run(
            [Path(sys.executable).with_name("unionfuse"), "upgrade", tree.root],
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        assert str(before) in said.stdout and str(tree.daemon.pid) in said.stdout
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
        pid = tree.daemon.serving
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


@pytest.mark.parametrize("keeper", ["on", "off"])
def test_a_signal_takes_no_mount_away_but_its_own(workshop: Workshop, keeper: str) -> None:
    """Nor after a kill: the next daemon knows its mount from the first."""
    tree = workshop({"f": "1"}, options={"keeper": keeper})
    assert tree.daemon is not None
    inside = os.open(tree.root, os.O_PATH)
    mount("tmpfs", tree.root, "tmpfs")
    try:
        (tree / "mine").touch()
        if keeper == "on":
            tree.kill_daemon()
            os.stat("f", dir_fd=inside)
        tree.daemon.process.terminate()
        while "something else is mounted over the union" not in tree.daemon.messages():
            assert tree.daemon.process.poll() is None
            time.sleep(0.01)
        tree.daemon.process.terminate()
        assert tree.daemon.process.wait(10) == 0
        assert (tree / "mine").exists()
    finally:
        tree.daemon = None
        os.close(inside)
        for _ in range(2):
            umount(tree.root, MNT_DETACH)


def test_in_the_background_and_with_a_log(workshop: Workshop) -> None:
    """The usual way to mount: the command returns, the keeper stays; SIGTERM to it unmounts."""
    plain = workshop({"f": "1"})
    stack = type(plain.stack).around(plain.stack.base.with_name("second"), plain.stack.lowers)
    log = stack.base / "log"
    options = f"lowerdir={stack.lowers[0]},upperdir={stack.upper},workdir={stack.work}"
    command = unionfuse_command("-o", f"{options},keeper=on,log={log}", stack.mountpoint)
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""
    pids = subprocess.run(
        ["pgrep", "-f", f"unionfuse-keeper.*{stack.mountpoint}$"], capture_output=True, text=True
    ).stdout.split()
    keeper = int(pids[0])
    try:
        os.kill(children(keeper)[0], signal.SIGKILL)
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
                watched = os.pidfd_open(children(process.pid)[0])
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
from unionfuse.wire import protocol
whole = protocol.parse_init
def without(body):
    found = whole(body)
    return found._replace(flags=found.flags & ~protocol.InitFlag.HAS_RESEND)
protocol.parse_init = without
from unionfuse.daemon.command import main
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
