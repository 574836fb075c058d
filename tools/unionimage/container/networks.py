"""Networks: none, host, another container's, or bridges made by netavark.

This module keeps the definitions and hands out addresses; an address belongs to a container while
it runs. The work in the kernel is had done by `netavark`.

    STORE/networks/NAME.json   the definition, in docker's words where docker has them
    RUN/KEY/ID/network.json    what a running container has got
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unionimage.container.state import (
    NAME,
    Container,
    new_id,
    now,
    replace_file,
)
from unionimage.errors import Conflict, NotFound, UserError

if TYPE_CHECKING:
    import ipaddress

Network = dict[str, Any]

DEFAULT = "bridge"
SPECIAL = ("none", "host", "bridge")
# Where new networks take their /24 from; the default bridge is the first.
POOL = "10.90.0.0/16"


class Networks:
    """The networks of one store. Cheap to make; holds nothing open."""

    def __init__(self, store_root: Path) -> None:
        self.directory = Path(os.path.realpath(store_root)) / "networks"

    def all(self) -> list[Network]:
        """Every network, the special ones first."""
        found = [self.find(name) for name in SPECIAL]
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.listdir(self.directory)):
                name = entry.removesuffix(".json")
                if entry.endswith(".json") and name not in SPECIAL:
                    with contextlib.suppress(NotFound):
                        found.append(self.find(name))
        return found

    def find(self, text: str) -> Network:
        """By name, id or unique id prefix. Raises NotFound."""
        if text in ("none", "host"):
            return _special(text)
        if NAME.fullmatch(text):
            with contextlib.suppress(FileNotFoundError):
                value: Network = json.loads((self.directory / f"{text}.json").read_bytes())
                return value
        if text == DEFAULT:
            return self.create(DEFAULT, default=True)
        matches = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(self.directory):
                if entry.endswith(".json") and not entry.startswith("."):
                    value = json.loads((self.directory / entry).read_bytes())
                    if str(value["Id"]).startswith(text):
                        matches.append(value)
        if len(matches) == 1:
            return dict(matches[0])
        if matches:
            raise UserError(f"network {text} is ambiguous: {len(matches)} networks start so")
        raise NotFound(
            f"network {text} not found: 'unionfuse network ls' shows those that are here"
        )

    def create(
        self,
        name: str,
        *,
        subnet: str | None = None,
        gateway: str | None = None,
        internal: bool = False,
        labels: Mapping[str, str] | None = None,
        default: bool = False,
    ) -> Network:
        """A new bridge network. Raises Conflict or UserError."""
        import ipaddress

        if not NAME.fullmatch(name) or name in ("none", "host", "container", "default"):
            raise UserError(
                f"invalid network name {name!r}: only [a-zA-Z0-9][a-zA-Z0-9_.-] fit, two of them at"
                " least, and not none, host, container or default"
            )
        with self._locked():
            path = self.directory / f"{name}.json"
            if path.exists():
                if default:
                    return dict(json.loads(path.read_bytes()))
                raise Conflict(f"network with name {name} already exists")
            network = self._subnet(subnet)
            first = ipaddress.ip_address(gateway) if gateway else network.network_address + 1
            if first not in network:
                raise UserError(f"--gateway {gateway} is not in {network}")
            identity = new_id()
            value: Network = {
                "Name": name,
                "Id": identity,
                "Created": now(),
                "Driver": "bridge",
                "Scope": "local",
                "Internal": internal,
                "EnableIPv6": False,
                "IPAM": {"Config": [{"Subnet": str(network), "Gateway": str(first)}]},
                "Interface": "unionfuse0" if default else f"uf-{identity[:10]}",
                "DNS": not default,
                "Labels": dict(labels or {}),
            }
            if default and os.path.exists("/sys/class/net/unionfuse0"):
                value["Interface"] = f"uf-{identity[:10]}"  # another store has that one
            replace_file(path, json.dumps(value))
        return value

    def remove(self, text: str, containers: Iterable[Container]) -> str:
        """Remove a network that no container has; its name is returned."""
        network = self.find(text)
        name = str(network["Name"])
        if name in SPECIAL:
            raise UserError(f"{name} is a pre-defined network and cannot be removed")
        with self._locked():
            if holders := users_of(name, containers):
                raise Conflict(f"network {name} is in use by {', '.join(holders)}: remove it first")
            (self.directory / f"{name}.json").unlink(missing_ok=True)
        return name

    def take_address(
        self, network: Network, containers: Iterable[Container], wanted: str | None
    ) -> str:
        """An address that no running container has: hold `locked()` until it is in `live_file`.

        Raises UserError when `wanted` is taken or outside, or when there is none left.
        """
        import ipaddress

        subnet = ipaddress.ip_network(network["IPAM"]["Config"][0]["Subnet"])
        gateway = network["IPAM"]["Config"][0]["Gateway"]
        taken = {gateway}
        for container in containers:
            entry = live(container)["Networks"].get(network["Name"]) or {}
            taken.add(entry.get("IPAddress") or "")
        if wanted:
            try:
                inside = ipaddress.ip_address(wanted) in subnet
            except ValueError:
                inside = False
            if not inside:
                raise UserError(f"--ip {wanted} is not in {subnet} of network {network['Name']}")
            if wanted in taken:
                raise UserError(f"--ip {wanted}: address already in use")
            return wanted
        for host in subnet.hosts():
            if str(host) not in taken:
                return str(host)
        raise UserError(f"network {network['Name']} has no address left in {subnet}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other commands that hand out addresses."""
        with self._locked("addresses"):
            yield

    @contextlib.contextmanager
    def _locked(self, name: str = "lock") -> Iterator[None]:
        self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        path = self.directory / f".{name}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _subnet(self, wanted: str | None) -> ipaddress.IPv4Network:
        import ipaddress

        taken = _routes()
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(self.directory):
                if entry.endswith(".json"):
                    config = json.loads((self.directory / entry).read_bytes())["IPAM"]["Config"]
                    taken += [ipaddress.IPv4Network(one["Subnet"]) for one in config]
        if wanted:
            try:
                subnet = ipaddress.IPv4Network(wanted)
            except ValueError as error:
                raise UserError(f"--subnet: {error}") from None
            if clash := next((one for one in taken if one.overlaps(subnet)), None):
                raise UserError(f"--subnet {wanted} overlaps with {clash}, which is in use")
            return subnet
        for candidate in ipaddress.IPv4Network(POOL).subnets(new_prefix=24):
            if not any(one.overlaps(candidate) for one in taken):
                return candidate
        raise UserError(f"no free subnet left in {POOL}: choose one by --subnet")


def live(container: Container) -> dict[str, Any]:
    """What a running container has got: `Networks` with addresses, `PortMappings`."""
    try:
        value: dict[str, Any] = json.loads((container.run / "network.json").read_bytes())
    except FileNotFoundError:
        value = {"Networks": {}, "PortMappings": []}
    return value


def set_live(container: Container, value: Mapping[str, Any]) -> None:
    replace_file(container.run / "network.json", json.dumps(value))


def forget_live(container: Container) -> None:
    """Give the addresses back."""
    (container.run / "network.json").unlink(missing_ok=True)


def endpoint_id(container: Container, name: str) -> str:
    """A number of its own for a container on a network, as docker shows one."""
    import hashlib

    return hashlib.sha256(f"{container.id} {name}".encode()).hexdigest()


def prefix_length(network: Network) -> int:
    """24 for 10.1.2.0/24."""
    return int(network["IPAM"]["Config"][0]["Subnet"].partition("/")[2])


def users_of(name: str, containers: Iterable[Container]) -> list[str]:
    """The short ids of the containers that are on a network."""
    return [one.id[:12] for one in containers if name in (one.record.get("Networks") or {})]


def _special(name: str) -> Network:
    return {
        "Name": name,
        "Id": {"none": "0", "host": "1"}[name] * 64,
        "Created": "",
        "Driver": "null" if name == "none" else "host",
        "Scope": "local",
        "Internal": False,
        "EnableIPv6": False,
        "IPAM": {"Config": []},
        "Labels": {},
    }


def _routes() -> list[ipaddress.IPv4Network]:
    """The subnets that this host already has routes to, except the default route."""
    import ipaddress

    found = []
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[7] != "00000000":
            address, mask = (_little_endian(fields[at]) for at in (1, 7))
            found.append(ipaddress.IPv4Network(f"{address}/{mask}", strict=False))
    return found


def _little_endian(text: str) -> ipaddress.IPv4Address:
    import ipaddress

    return ipaddress.IPv4Address(int.from_bytes(bytes.fromhex(text), "little"))
