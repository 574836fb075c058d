"""Docker's object of a container, whole: templates may ask for whatever docker's has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unionimage.container import bundle, networks
from unionimage.container.describe import ports
from unionimage.container.state import NEVER, Container, Record

# What a container's record leaves out, as docker shows it where nothing was asked for.
HOST_CONFIG: Mapping[str, Any] = {
    "Binds": None,
    "ContainerIDFile": "",
    "VolumeDriver": "",
    "Cgroup": "",
    "Links": None,
    "Runtime": "",
    "ConsoleSize": [0, 0],
    "Isolation": "",
    "CpuShares": 0,
    "Memory": 0,
    "NanoCpus": 0,
    "CgroupParent": "",
    "BlkioWeight": 0,
    "BlkioWeightDevice": [],
    "BlkioDeviceReadBps": [],
    "BlkioDeviceWriteBps": [],
    "BlkioDeviceReadIOps": [],
    "BlkioDeviceWriteIOps": [],
    "CpuPeriod": 0,
    "CpuQuota": 0,
    "CpuRealtimePeriod": 0,
    "CpuRealtimeRuntime": 0,
    "CpusetCpus": "",
    "CpusetMems": "",
    "DeviceRequests": None,
    "KernelMemory": 0,
    "KernelMemoryTCP": 0,
    "MemoryReservation": 0,
    "MemorySwap": 0,
    "MemorySwappiness": None,
    "OomKillDisable": False,
    "PidsLimit": None,
    "CpuCount": 0,
    "CpuPercent": 0,
    "IOMaximumIOps": 0,
    "IOMaximumBandwidth": 0,
    "MaskedPaths": bundle.MASKED,
    "ReadonlyPaths": bundle.READ_ONLY,
}
# Empty lists that docker shows as null.
NULL_IF_EMPTY = ("CapAdd", "CapDrop", "DeviceCgroupRules", "ExtraHosts", "GroupAdd", "SecurityOpt")
ADDRESSES: Mapping[str, Any] = {
    "Gateway": "",
    "IPAddress": "",
    "IPPrefixLen": 0,
    "IPv6Gateway": "",
    "GlobalIPv6Address": "",
    "GlobalIPv6PrefixLen": 0,
    "MacAddress": "",
}


def inspect(container: Container, known: networks.Networks, driver: str) -> dict[str, Any]:
    """Docker's object of a container.

    Args:
        driver: what mounts the root file system where the container's record does not say.
    """
    record, state = container.record, container.state()
    config = record["Config"]
    words = [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]
    shown = _state(state)
    driver = record.get("MountDriver") or driver
    directory = container.directory
    return {
        "Id": container.id,
        "Created": record["Created"],
        "Path": words[0] if words else "",
        "Args": words[1:],
        "State": shown,
        "Image": record["Image"],
        "ResolvConfPath": str(directory / "resolv.conf"),
        "HostnamePath": str(directory / "hostname"),
        "HostsPath": str(directory / "hosts"),
        "LogPath": str(container.log_path),
        "Name": f"/{container.name}",
        "RestartCount": state.get("RestartCount", 0),
        "Driver": driver,
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": None,
        "HostConfig": _host_config(record),
        "GraphDriver": {
            "Name": driver,
            "Data": {
                "MergedDir": str(container.merged) if shown["Running"] else "",
                "UpperDir": str(container.upper),
                "WorkDir": str(container.work),
            },
        },
        "Mounts": record["Mounts"],
        "Config": {"OnBuild": None} | config,
        "NetworkSettings": network_settings(container, known),
    }


def _state(state: Record) -> dict[str, Any]:
    status = state["Status"]
    shown: dict[str, Any] = {
        "Status": status,
        "Running": status in ("running", "paused", "restarting"),
        "Paused": status == "paused",
        "Restarting": status == "restarting",
        "OOMKilled": bool(state.get("OOMKilled")),
        "Dead": False,
        "Pid": state.get("Pid", 0),
        "ExitCode": state.get("ExitCode", 0),
        "Error": state.get("Error", ""),
        "StartedAt": state.get("StartedAt", NEVER),
        "FinishedAt": state.get("FinishedAt", NEVER),
    }
    return shown | ({"Health": state["Health"]} if state.get("Health") else {})


def _host_config(record: Record) -> dict[str, Any]:
    given = record["HostConfig"]
    shown = {**HOST_CONFIG, "Runtime": record.get("Runtime") or "", **given}
    shown |= {name: shown.get(name) or None for name in NULL_IF_EMPTY}
    if shown["Memory"] and not shown["MemorySwap"]:
        shown["MemorySwap"] = 2 * shown["Memory"]
    options = given.get("SecurityOpt") or []
    if given.get("Privileged") or "systempaths=unconfined" in options:
        shown |= {"MaskedPaths": None, "ReadonlyPaths": None}
    return shown


def network_settings(container: Container, known: networks.Networks) -> dict[str, Any]:
    """Docker's NetworkSettings: addresses while it runs, empty ones else."""
    live = networks.live(container)["Networks"]
    table = {
        name: _endpoint(container, name, asked, live.get(name) or {}, known)
        for name, asked in (container.record.get("Networks") or {}).items()
    }
    mode = str(container.record["NetworkMode"])
    if mode in ("none", "host"):
        table[mode] = _endpoint(container, mode, {}, {}, known)
    default = table.get(networks.DEFAULT) or ADDRESSES
    return {
        "Bridge": "",
        "SandboxID": container.id if live else "",
        "SandboxKey": "",
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        "Ports": ports(container),
        "EndpointID": default.get("EndpointID", ""),
        **{name: default[name] for name in ADDRESSES},
        "Networks": table,
    }


def _endpoint(
    container: Container,
    name: str,
    asked: Mapping[str, Any],
    entry: Mapping[str, Any],
    known: networks.Networks,
) -> dict[str, Any]:
    wanted = asked.get("WantedIP")
    shown: dict[str, Any] = {
        "IPAMConfig": {"IPv4Address": wanted} if wanted else None,
        "Links": None,
        "Aliases": asked.get("Aliases") or None,
        "DriverOpts": None,
        "NetworkID": entry.get("NetworkID", ""),
        "EndpointID": networks.endpoint_id(container, name) if entry else "",
        **ADDRESSES,
    }
    if entry:
        shown["Gateway"], shown["IPAddress"] = entry["Gateway"], entry["IPAddress"]
        shown["IPPrefixLen"] = networks.prefix_length(known.find(name))
        shown["MacAddress"] = entry.get("MacAddress") or ""
    return shown
