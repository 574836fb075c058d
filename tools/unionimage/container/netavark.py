"""The engine of networks: bridge, veth pair, addresses, NAT, published ports and names.

netavark and aardvark-dns (podman's, Debian packages) do that in the kernel. Half of their work is
about the network as a whole, and they take it away with the last interface on the bridge. So a
bridge gets one more, behind which nobody is (`_keep`): the next container finds bridge and rules
there. `put_away` takes them away: with the network, when somebody prunes, and when the spawner that
waits for the next container ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unionimage.container import networks
from unionimage.container.places import run_directory
from unionimage.container.state import Container, replace_file
from unionimage.errors import UserError

if TYPE_CHECKING:
    from unionimage.container.networks import Network, Networks

ENGINE = ("netavark", "/usr/lib/podman/netavark", "/usr/libexec/podman/netavark")
NAMES = ("aardvark-dns", "/usr/lib/podman/aardvark-dns", "/usr/libexec/podman/aardvark-dns")
# One at a time on this host, whichever the store: the engine looks for chains that all share, makes
# them and takes them away in steps.
LOCK = "/run/unionfuse-network.lock"
KEPT = Path("/run/unionfuse-bridges")  # BRIDGE.json: what the engine has to know to take it away
LOWEST_ADDRESS = "02:00:00:00:00:01"  # a bridge has the lowest of its interfaces: it never changes

Begun = tuple["subprocess.Popen[str]", int]
Data = Mapping[str, Any]


def program() -> str:
    """The netavark program. Raises UserError when there is none."""
    import shutil

    for candidate in ENGINE:
        if found := shutil.which(candidate):
            return found
    raise UserError(
        "networks need netavark (Debian: netavark, aardvark-dns, iptables): install it, or run"
        " with --network none or host",
        exit_code=125,
    )


def names_program() -> str | None:
    """The aardvark-dns program."""
    import shutil

    return next((found for one in NAMES if (found := shutil.which(one))), None)


# ---- one container


def input_for(container: Container, known: Networks, only: str | None = None) -> dict[str, Any]:
    """What netavark reads: the container's networks, addresses and ports; or those on one."""
    now_has = networks.live(container)
    options: dict[str, Any] = {}
    information: dict[str, Any] = {}
    for number, (name, entry) in enumerate(now_has["Networks"].items()):
        if only not in (None, name):
            continue
        aliases = [container.id[:12], *(entry.get("Aliases") or [])]
        options[name] = {
            "interface_name": entry.get("Interface") or f"eth{number}",
            "static_ips": [entry["IPAddress"]],
            "aliases": list(dict.fromkeys(aliases)),
        }
        if entry.get("MacAddress"):
            options[name]["static_mac"] = entry["MacAddress"]
        information[name] = _network(known.find(name))
    return {
        "container_id": container.id,
        "container_name": container.name,
        "networks": options,
        "network_info": information,
        "port_mappings": now_has["PortMappings"],
    }


def _network(network: Network) -> dict[str, Any]:
    return {
        "name": network["Name"],
        "id": network["Id"],
        "driver": "bridge",
        "network_interface": network["Interface"],
        "subnets": [
            {"subnet": one["Subnet"], "gateway": one["Gateway"]}
            for one in network["IPAM"]["Config"]
        ],
        "ipv6_enabled": False,
        "internal": network["Internal"],
        "dns_enabled": bool(network.get("DNS")) and names_program() is not None,
        "ipam_options": {"driver": "host-local"},
    }


def connect(container: Container, namespace: str, data: Data) -> None:
    """Give a network namespace the interfaces of a container; `data` is `input_for`."""
    begin_to_connect(container, namespace, data)()


def begin_to_connect(container: Container, namespace: str, data: Data) -> Callable[[], None]:
    """`connect` as a process; what is returned waits for its end, and raises UserError."""
    begun = _begin("setup", namespace, data)

    def connected() -> None:
        told = _end(begun, "setup", data["network_info"].values())
        now_has = networks.live(container)
        for name, entry in now_has["Networks"].items():
            for interface in (told.get(name) or {}).get("interfaces", {}).values():
                entry["MacAddress"] = interface.get("mac_address")
        networks.set_live(container, now_has)

    return connected


def disconnect(namespace: str, data: Data) -> None:
    """Take interfaces, published ports and names away again; `data` is `input_for`."""
    _end(_begin("teardown", namespace, data), "teardown")


# ---- a network as a whole


def _keep(network: Data) -> None:
    """Let the bridge and its rules outlive their last container. That it cannot be is no harm."""
    bridge = network["network_interface"]
    ours, peer = _keeping(bridge)
    if os.path.exists(f"/sys/class/net/{ours}"):
        return
    KEPT.mkdir(mode=0o700, exist_ok=True)
    replace_file(KEPT / f"{bridge}.json", json.dumps({"owner": _owner(), "network": network}))
    _ip(
        f"link add {ours} address {LOWEST_ADDRESS} type veth peer name {peer}",
        f"link set dev {ours} master {bridge} up",
    )


def put_away(bridge: str | None = None, patience: float = 0.5) -> None:
    """Take away a bridge that nobody is on, with its rules; None: all that were kept from here.

    Args:
        patience: seconds to wait for interfaces of containers that have ended: they go in a moment.
    """
    for note in sorted(KEPT.glob("*.json")):
        with contextlib.suppress(OSError, ValueError), _locked() as lock:
            kept = json.loads(note.read_bytes())
            if bridge is None:
                wanted = kept["owner"] == _owner() or not os.path.isdir(kept["owner"].split()[0])
            else:
                wanted = note.stem == bridge
            if wanted and not _in_use(note.stem, patience):
                _take_away(kept["network"], os.dup(lock))
                note.unlink()
    if bridge is not None and os.path.exists(f"/sys/class/net/{bridge}") and not _in_use(bridge):
        _ip(f"link delete {bridge}")


def _take_away(network: Data, lock: int) -> None:
    """As if the last container went; the lock is closed."""
    name, bridge = network["name"], network["network_interface"]
    _ip(f"link delete {_keeping(bridge)[0]}")
    address = network["subnets"][0]["gateway"]  # the engine wants one, and no rule is about it
    data = {
        "container_id": "0" * 64,
        "container_name": "",
        "networks": {name: {"interface_name": "eth0", "static_ips": [address], "aliases": []}},
        "network_info": {name: {**network, "dns_enabled": False}},
        "port_mappings": [],
    }
    with contextlib.suppress(UserError), empty_namespace(["eth0"]) as namespace:
        _end(_begin("teardown", namespace, data, lock=lock, directory=KEPT), "teardown")
    if os.path.exists(f"/sys/class/net/{bridge}"):
        _ip(f"link delete {bridge}")


def _in_use(bridge: str, patience: float = 0.0) -> bool:
    """Whether anything but what keeps it is on a bridge, and stays there so many seconds."""
    deadline = time.monotonic() + patience
    with contextlib.suppress(FileNotFoundError):
        while set(os.listdir(f"/sys/class/net/{bridge}/brif")) - {_keeping(bridge)[0]}:
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.02)
    return False


def _keeping(bridge: str) -> tuple[str, str]:
    """The interface that keeps a bridge, and its peer; names have 15 bytes."""
    return f"{bridge[:13]}-k", f"{bridge[:13]}-p"


def _owner() -> str:
    """Who puts it away: a place for what ends with a boot, in one network namespace."""
    return f"{run_directory()} {os.stat('/proc/self/ns/net').st_ino}"


def _ip(*lines: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True,
                       capture_output=True, env=_environment())  # fmt: skip


@contextlib.contextmanager
def empty_namespace(interfaces: Iterable[str]) -> Iterator[str]:
    """The path of a network namespace whose interfaces lead nowhere; it is gone afterwards.

    It stands in for a container's: the engine gives up where an interface is not there.
    """
    made = "".join(f"ip link add {name} type bridge; " for name in interfaces)
    script = f"{made}echo; exec cat"  # it ends with the pipe, that is with us, however we end
    keeper = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    )
    try:
        assert keeper.stdout is not None
        keeper.stdout.readline()
        yield f"/proc/{keeper.pid}/ns/net"
    finally:
        keeper.kill()
        keeper.communicate()


# ---- the program


def _begin(
    verb: str,
    namespace: str,
    data: Data,
    *,
    lock: int | None = None,
    directory: Path | None = None,
) -> Begun:
    """Start netavark; what it reads and says fits into pipes. Also a lock, held until `_end`."""
    directory = directory or run_directory() / "names"
    directory.mkdir(parents=True, exist_ok=True)
    command = [program(), "--config", str(directory)]
    if names := names_program():
        command += ["--aardvark-binary", names]
    lock = _lock() if lock is None else lock
    process = subprocess.Popen(
        [*command, verb, namespace],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps(data))
    process.stdin = None
    return process, lock


def _end(begun: Begun, verb: str, kept: Iterable[Data] = ()) -> Mapping[str, Any]:
    """What netavark answers. Raises UserError when it failed; else these networks are kept."""
    process, lock = begun
    out, said = process.communicate()
    try:
        if process.returncode == 0:
            for network in kept:
                _keep(network)
            return dict(json.loads(out)) if out.strip() else {}
    finally:
        os.close(lock)
    reason = out.strip() or said.strip()
    with contextlib.suppress(ValueError, KeyError):
        reason = json.loads(out)["error"]
    raise UserError(f"network {verb} failed: {reason}", exit_code=125)


def _environment() -> dict[str, str]:
    """With the directories of system programs first: netavark looks for iptables forty times."""
    return os.environ | {"PATH": "/usr/sbin:/sbin:" + os.environ.get("PATH", "/usr/bin:/bin")}


def _lock() -> int:
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@contextlib.contextmanager
def _locked() -> Iterator[int]:
    lock = _lock()
    try:
        yield lock
    finally:
        os.close(lock)
