"""The network of a rootless container: slirp4netns, a TCP/IP stack in a process of its own.

It gives one interface with a fixed address and forwards published ports. It ends when the pipe that
the monitor holds is closed. Source: slirp4netns(1).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unionimage.errors import UserError

ADDRESS, GATEWAY, NAME_SERVER = "10.0.2.100", "10.0.2.2", "10.0.2.3"
PATIENCE = 5.0  # seconds


def program() -> str:
    """The slirp4netns program. Raises UserError when there is none, or no /dev/net/tun."""
    import shutil

    found = shutil.which("slirp4netns")
    if found is None:
        raise UserError(
            "networks without root need slirp4netns (Debian: slirp4netns): install it, or run"
            " with --network none or host"
        )
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise UserError(
            "networks without root need /dev/net/tun: let the administrator make it readable"
            " and writable, or run with --network none or host"
        )
    return found


class Connection:
    """One running slirp4netns."""

    def __init__(self, pid: int, leave: int) -> None:
        self.pid = pid  # a child of this process
        self.leave = leave  # the pipe

    @classmethod
    def start(cls, pid: int, directory: Path, ports: Sequence[Mapping[str, Any]]) -> Connection:
        """Connect the network namespace of a process. Raises UserError."""
        api = directory / "slirp"
        api.unlink(missing_ok=True)
        ready, tell_ready = os.pipe()
        stay, leave = os.pipe()
        os.set_inheritable(tell_ready, True)
        os.set_inheritable(stay, True)
        command = [program(), "--configure", "--mtu=65520", "--disable-host-loopback"]
        command += ["--api-socket", str(api), "--ready-fd", str(tell_ready)]
        command += ["--exit-fd", str(stay), str(pid), "eth0"]
        with open(directory / "slirp.log", "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(tell_ready, stay),
            )
        os.close(tell_ready)
        os.close(stay)
        answered = os.read(ready, 1)
        os.close(ready)
        process.returncode = 0  # the connection waits for it
        connection = cls(process.pid, leave)
        try:
            if not answered:
                said = (directory / "slirp.log").read_text().strip().splitlines() or ["no reason"]
                raise UserError(f"slirp4netns: {said[-1]}", exit_code=125)
            for port in ports:
                _publish(api, port)
        except BaseException:
            connection.stop()
            raise
        return connection

    def stop(self) -> None:
        os.close(self.leave)
        with contextlib.suppress(ChildProcessError):  # the monitor reaps whatever ends
            deadline = time.monotonic() + PATIENCE
            while not os.waitpid(self.pid, os.WNOHANG)[0]:
                if time.monotonic() > deadline:
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.005)


def _publish(api: Path, port: Mapping[str, Any]) -> None:
    request = {
        "execute": "add_hostfwd",
        "arguments": {
            "proto": port["protocol"],
            "host_addr": port["host_ip"] or "0.0.0.0",
            "host_port": port["host_port"],
            "guest_addr": ADDRESS,
            "guest_port": port["container_port"],
        },
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(api))
        client.sendall(json.dumps(request).encode())
        client.shutdown(socket.SHUT_WR)
        answer = json.loads(client.makefile().read())
    if "error" in answer:
        reason = answer["error"].get("desc", "refused")
        raise UserError(f"bind for port {port['host_port']} failed: {reason}", exit_code=125)
