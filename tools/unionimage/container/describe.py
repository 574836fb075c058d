"""A container as people and scripts see it: its ports, its size, the filters of `ps`."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence

from unionimage.container import networks
from unionimage.container.state import NEVER, Container, Containers
from unionimage.labels import has_labels

FILTERS = (
    "ancestor",
    "before",
    "exited",
    "health",
    "id",
    "label",
    "name",
    "network",
    "publish",
    "since",
    "status",
    "volume",
)


def ports(container: Container) -> dict[str, list[dict[str, str]] | None]:
    """Docker's table of ports: exposed ones, and where they are published now."""
    exposed = sorted(container.config.get("ExposedPorts") or {})
    table: dict[str, list[dict[str, str]] | None] = dict.fromkeys(exposed)
    for mapping in networks.live(container)["PortMappings"]:
        port = f"{mapping['container_port']}/{mapping['protocol']}"
        entry = {
            "HostIp": mapping["host_ip"] or "0.0.0.0",
            "HostPort": str(mapping["host_port"]),
        }
        table[port] = [*(table.get(port) or []), entry]
    return table


def ports_text(container: Container) -> str:
    """`0.0.0.0:8080->80/tcp, 443/tcp` as in `ps`."""
    if container.state()["Status"] not in ("running", "paused"):
        return ""
    published, exposed = [], []
    for port, places in ports(container).items():
        for place in places or []:
            published.append(f"{place['HostIp']}:{place['HostPort']}->{port}")
        if not places:
            exposed.append(port)
    return ", ".join(published + exposed)


def writable_size(container: Container) -> int:
    """Bytes in the container's own layer."""
    total = 0
    for directory, _, names in os.walk(container.upper):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError:
                continue
    return total


def created_for_mounts(container: Container) -> set[str]:
    """Paths in the upper, relative to it, that are there only to be mounted over.

    Files that were written to since, and directories that hold anything else, do not count.
    """
    try:
        noted = set((container.directory / "mount-points").read_text().split("\0"))
    except FileNotFoundError:
        return set()
    found: set[str] = set()
    for path in sorted(noted, key=len, reverse=True):  # children before their parents
        place = container.upper / path
        try:
            status = place.lstat()
            if stat.S_ISDIR(status.st_mode):
                inside = {f"{path}/{name}" for name in os.listdir(place)}
                empty = inside <= found
            else:
                empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
        except OSError:
            continue
        if empty:
            found.add(path)
    return found


def select(
    found: Iterable[Container], filters: Mapping[str, Sequence[str]], containers: Containers
) -> list[Container]:
    """The containers that pass; several values of one key are alternatives (labels: all)."""
    result = list(found)
    for key, newer in (("before", False), ("since", True)):
        for text in filters.get(key, ()):
            moment = containers.find(text).record["Created"]
            result = [
                one
                for one in result
                if (one.record["Created"] > moment if newer else one.record["Created"] < moment)
            ]
    return [one for one in result if _passes(one, filters)]


def _passes(container: Container, filters: Mapping[str, Sequence[str]]) -> bool:
    for key, values in filters.items():
        if key in ("before", "since"):
            continue
        if key == "label":
            if not has_labels(container.config.get("Labels") or {}, values):
                return False
        elif not any(_matches(container, key, value) for value in values):
            return False
    return True


def _matches(container: Container, key: str, value: str) -> bool:
    state = container.state()
    match key:
        case "id":
            return container.id.startswith(value)
        case "name":
            try:
                return re.search(value, f"/{container.name}") is not None
            except re.error:
                return value in container.name
        case "status":
            return bool(state["Status"] == value)
        case "exited":
            return state["Status"] == "exited" and str(state["ExitCode"]) == value
        case "health":
            return ((state.get("Health") or {}).get("Status") or "none") == value
        case "ancestor":
            image = str(container.record["Image"])
            name = str(container.config["Image"])
            return (
                value in (name, image, name.removesuffix(":latest"))
                or f"{name}:latest" == value
                or image.removeprefix("sha256:").startswith(value.removeprefix("sha256:"))
            )
        case "network":
            entries = container.record.get("Networks") or {}
            return value in entries or container.record["NetworkMode"] == value
        case "volume":
            return any(
                value in (point.get("Name"), point["Destination"])
                for point in container.record["Mounts"]
            )
        case "publish":
            number, _, protocol = value.partition("/")
            return any(
                fnmatch.fnmatch(str(mapping["host_port"]), number)
                and mapping["protocol"] == (protocol or "tcp")
                for mapping in networks.live(container)["PortMappings"]
            )
    return False


def seconds_since(text: str) -> float:
    """Seconds from a time as docker writes it until now; 0 for never."""
    import calendar
    import time

    if text == NEVER:
        return 0.0
    whole, _, fraction = text.rstrip("Z").partition(".")
    moment = calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S"))
    return max(0.0, time.time() - moment - float(f"0.{fraction or 0}"))
