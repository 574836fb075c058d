"""From flags and an image to a container's record, in docker's words. Everything is checked here.

Nothing is started or mounted. `args` is what `cli.container_options` parsed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unionimage.container import capabilities, limits, networks, volumes
from unionimage.container.processes import signal_number
from unionimage.container.state import NAME, Containers, Record, new_id, now
from unionimage.errors import UserError

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
DURATION_UNITS = {
    "ns": 1, "us": 1000, "µs": 1000, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9,
}  # fmt: skip
ATTACHABLE = ("stdin", "stdout", "stderr")


def record(
    args: argparse.Namespace,
    image_config: Mapping[str, Any],
    image_id: str,
    containers: Containers,
    *,
    detach: bool,
) -> Record:
    """The record of a new container. Raises UserError for whatever cannot be."""
    identity = new_id()
    config = _config(args, image_config, identity, detach)
    host_config = _host_config(args)
    points = _mount_points(args, image_config, containers)
    result: Record = {
        "Id": identity,
        "Created": now(),
        "Name": args.name or "",
        "Image": image_id,
        "Config": config,
        "HostConfig": host_config,
        "Mounts": points,
        "Runtime": args.runtime,
        "MountDriver": args.driver,
        "CgroupParent": _cgroup_parent(args.cgroup_parent or "/unionfuse"),
        "IdMappings": [],
    }
    _networking(args, result)
    if result["NetworkMode"] == "host" and not args.hostname:
        config["Hostname"] = os.uname().nodename
    _namespaces(args, result, containers)
    _check(result)
    return result


def _config(
    args: argparse.Namespace, image: Mapping[str, Any], identity: str, detach: bool
) -> dict[str, Any]:
    entrypoint, command = image.get("Entrypoint"), image.get("Cmd")
    if args.entrypoint is not None:
        entrypoint, command = ([args.entrypoint] if args.entrypoint else []), []
    words = args.command
    if words:
        command = list(words)
    if not [*(entrypoint or []), *(command or [])]:
        raise UserError(f"no command specified: {args.image} names none, write one after it")
    attached = [] if detach else (args.attach or ["stdout", "stderr"])
    for stream in attached:
        if stream.lower() not in ATTACHABLE:
            raise UserError(f"--attach {stream}: one of stdin, stdout, stderr")
    if args.interactive and not detach:
        attached = [*attached, "stdin"]
    attached = [stream.lower() for stream in attached]
    config = {
        "Hostname": _hostname(args.hostname or identity[:12]),
        "Domainname": args.domainname or "",
        "User": args.user if args.user is not None else image.get("User") or "",
        "AttachStdin": "stdin" in attached,
        "AttachStdout": "stdout" in attached,
        "AttachStderr": "stderr" in attached,
        "Tty": args.tty,
        "OpenStdin": args.interactive,
        "StdinOnce": args.interactive and not detach,
        "Env": _environment(args, image.get("Env") or []),
        "Cmd": command,
        "Image": args.image,
        "Volumes": image.get("Volumes"),
        "WorkingDir": args.workdir or image.get("WorkingDir") or "",
        "Entrypoint": entrypoint,
        "Labels": dict(image.get("Labels") or {}) | labels_of(args.label, args.label_file),
    }
    if not (config["WorkingDir"] or "/").startswith("/"):
        raise UserError(f"--workdir {config['WorkingDir']}: it must be absolute")
    exposed = dict(image.get("ExposedPorts") or {})
    for text in args.expose:
        exposed |= {port: {} for port in _expand_ports(text, "--expose")}
    if exposed:
        config["ExposedPorts"] = exposed
    stop = args.stop_signal or image.get("StopSignal")
    signal_number(stop)
    if stop:
        config["StopSignal"] = stop
    timeout = args.stop_timeout if args.stop_timeout is not None else image.get("StopTimeout")
    if timeout is not None:
        config["StopTimeout"] = timeout
    if check := _healthcheck(args, image.get("Healthcheck") or {}):
        config["Healthcheck"] = check
    return config


def _hostname(text: str) -> str:
    if len(os.fsencode(text)) > 64:  # sethostname(2)
        raise UserError(f"--hostname {text}: it may have 64 bytes")
    return text


def _cgroup_parent(text: str) -> str:
    if ".." in text.split("/"):
        raise UserError(f"--cgroup-parent {text}: '..' would lead out of the cgroups")
    return text


def _environment(args: argparse.Namespace, image: Sequence[str]) -> list[str]:
    """The image's variables, those of files, then those of -e; a later one replaces an earlier."""
    given: list[str] = []
    for path in args.env_file:
        given += lines_of(path, "--env-file")
    given += args.env
    table: dict[str, str | None] = {}
    for entry in (*image, *given):
        name, equals, value = entry.partition("=")
        if not name or any(character in name for character in " \t\0"):
            raise UserError(f"invalid environment variable {entry!r}: write NAME=VALUE")
        table[name] = value if equals else os.environ.get(name)
    return [f"{name}={value}" for name, value in table.items() if value is not None]


def lines_of(path: str, option: str) -> list[str]:
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{option} {path}: not UTF-8") from None
    lines = [line.lstrip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def labels_of(given: Iterable[str], files: Iterable[str] = ()) -> dict[str, str]:
    """`NAME=VALUE` words and files of them as a table."""
    lines = [line for path in files for line in lines_of(path, "--label-file")]
    table = {}
    for entry in (*lines, *given):
        name, _, value = entry.partition("=")
        if not name:
            raise UserError(f"invalid label {entry!r}: write NAME=VALUE")
        table[name] = value
    return table


def _healthcheck(args: argparse.Namespace, image: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        "Interval": args.health_interval,
        "Timeout": args.health_timeout,
        "StartPeriod": args.health_start_period,
        "StartInterval": args.health_start_interval,
    }
    asked = args.health_cmd or args.health_retries or any(numbers.values())
    if args.no_healthcheck:
        if asked:
            raise UserError("--no-healthcheck conflicts with --health-* options")
        return {"Test": ["NONE"]}
    check = dict(image)
    if args.health_cmd:
        check["Test"] = ["CMD-SHELL", args.health_cmd]
    for key, text in numbers.items():
        if text is not None:
            check[key] = duration(text, f"--health-{key.lower()}")
    if args.health_retries is not None:
        if args.health_retries < 0:
            raise UserError("--health-retries cannot be negative")
        check["Retries"] = args.health_retries
    return check


def duration(text: str, option: str) -> int:
    """`1m30s` in nanoseconds. Raises UserError."""
    position, total = 0, 0.0
    while match := DURATION.match(text, position):
        total += float(match.group(1)) * DURATION_UNITS[match.group(2)]
        position = match.end()
    if not text or position != len(text):
        raise UserError(f"{option}: {text!r} is not a duration: write for example 30s or 1m30s")
    return int(total)


def _host_config(args: argparse.Namespace) -> dict[str, Any]:
    config: dict[str, Any] = limits_of(args)
    if args.rm and args.restart != "no":
        raise UserError("conflicting options: cannot specify both --restart and --rm")
    config |= {
        "AutoRemove": args.rm,
        "Privileged": args.privileged,
        "ReadonlyRootfs": args.read_only,
        "CapAdd": args.cap_add,
        "CapDrop": args.cap_drop,
        "GroupAdd": args.group_add,
        "SecurityOpt": [_security_option(text) for text in args.security_opt],
        "Devices": [_device(text) for text in args.device],
        "DeviceCgroupRules": args.device_cgroup_rule,
        "Ulimits": [_ulimit(text) for text in args.ulimit],
        "Sysctls": dict(_pair(text, "--sysctl") for text in args.sysctl),
        "OomScoreAdj": args.oom_score_adj or 0,
        "ShmSize": limits.parse_size(args.shm_size, "--shm-size") if args.shm_size else 64 << 20,
        "RestartPolicy": restart_policy(args.restart),
        "LogConfig": _log_config(args),
        "Init": args.init,
        "ExtraHosts": [_extra_host(text) for text in args.add_host],
        "Dns": [_address(text, "--dns") for text in args.dns],
        "DnsSearch": args.dns_search,
        "DnsOptions": args.dns_option,
        "PublishAllPorts": args.publish_all,
        "PortBindings": _port_bindings(args.publish),
        "Annotations": labels_of(args.annotation),
        "VolumesFrom": args.volumes_from or None,
        "Binds": [_bind(text) for text in args.volume if ":" in text] or None,
        "ContainerIDFile": args.cidfile or "",
    }
    return config


def _bind(text: str) -> str:
    """`-v` as docker notes it: a directory of the host by its absolute path."""
    point, options = volumes.parse_volume(text), text.split(":")[2:]
    return ":".join((point.get("Name") or point["Source"], point["Destination"], *options))


def limits_of(args: argparse.Namespace) -> dict[str, Any]:
    """The limits that were asked for, as HostConfig keys; nothing else."""
    config: dict[str, Any] = {}
    for key, text, option in (
        ("Memory", args.memory, "--memory"),
        ("MemoryReservation", args.memory_reservation, "--memory-reservation"),
    ):
        if text is not None:
            config[key] = limits.parse_size(text, option)
    if args.memory_swap is not None:
        swap = args.memory_swap
        config["MemorySwap"] = -1 if swap == "-1" else limits.parse_size(swap, "--memory-swap")
    if args.cpus is not None:
        config["NanoCpus"] = limits.parse_cpus(args.cpus)
    for key, value in (
        ("CpuShares", args.cpu_shares),
        ("CpuPeriod", args.cpu_period),
        ("CpuQuota", args.cpu_quota),
        ("CpusetCpus", args.cpuset_cpus),
        ("CpusetMems", args.cpuset_mems),
        ("MemorySwappiness", args.memory_swappiness),
        ("PidsLimit", args.pids_limit),
        ("BlkioWeight", args.blkio_weight),
        ("OomKillDisable", args.oom_kill_disable or None),
    ):
        if value is not None:
            config[key] = value
    for key, entries in (
        ("BlkioWeightDevice", args.blkio_weight_device),
        ("BlkioDeviceReadBps", args.device_read_bps),
        ("BlkioDeviceWriteBps", args.device_write_bps),
        ("BlkioDeviceReadIOps", args.device_read_iops),
        ("BlkioDeviceWriteIOps", args.device_write_iops),
    ):
        if entries:
            number = "Weight" if key == "BlkioWeightDevice" else "Rate"
            config[key] = [_of_disk(text, number) for text in entries]
    return config


def _of_disk(text: str, number: str) -> dict[str, Any]:
    path, colon, value = text.rpartition(":")
    if not colon or not path.startswith("/dev/"):
        raise UserError(f"{text!r}: write /dev/DISK:{number.upper()}")
    return {"Path": path, number: limits.parse_size(value, text)}


def restart_policy(text: str) -> dict[str, Any]:
    """`on-failure:3` in docker's form. Raises UserError."""
    name, colon, count = text.partition(":")
    if name not in ("no", "always", "unless-stopped", "on-failure"):
        raise UserError(f"--restart {text!r}: no, always, unless-stopped or on-failure[:N]")
    if colon and (name != "on-failure" or not count.isdigit()):
        raise UserError(f"--restart {text!r}: a number fits on-failure only, as on-failure:3")
    return {"Name": name, "MaximumRetryCount": int(count or 0)}


def _log_config(args: argparse.Namespace) -> dict[str, Any]:
    driver = args.log_driver or "json-file"
    if driver not in ("json-file", "none"):
        raise UserError(f"--log-driver {driver!r} is not there: json-file or none")
    options = dict(_pair(text, "--log-opt") for text in args.log_opt)
    for name, value in options.items():
        if name not in ("max-size", "max-file"):
            raise UserError(f"--log-opt {name!r} is not supported: max-size or max-file")
        if name == "max-size" and value != "-1":
            limits.parse_size(value, "--log-opt max-size")
        if name == "max-file" and not (value.isdigit() and int(value) > 0):
            raise UserError(f"--log-opt max-file={value}: a number from 1")
    if options.get("max-size") == "-1":
        options["max-size"] = "0"
    if driver == "none" and options:
        raise UserError("--log-opt needs --log-driver json-file")
    return {"Type": driver, "Config": options}


def _security_option(text: str) -> str:
    """Checked; a seccomp profile is read now, as docker's client does."""
    name, *rest = re.split("[=:]", text, maxsplit=1)
    value = "".join(rest)
    if name == "no-new-privileges" and value in ("", "true", "false"):
        return "no-new-privileges" if value != "false" else "no-new-privileges=false"
    if name == "systempaths" and value == "unconfined":
        return "systempaths=unconfined"
    if name == "seccomp" and rest:
        if value in ("unconfined", "builtin"):
            return f"seccomp={value}"
        try:
            profile = json.loads(Path(value).read_text())
        except OSError as error:
            raise UserError(f"--security-opt seccomp={value}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"--security-opt seccomp={value}: not JSON: {error}") from None
        return f"seccomp={json.dumps(profile)}"
    if name in ("apparmor", "label") and value in ("unconfined", "disable"):
        return f"{name}={value}"  # nothing confines by either here
    raise UserError(f"--security-opt {text!r} is not supported")


def _device(text: str) -> dict[str, str]:
    parts = text.split(":")
    host, inside, access = parts[0], parts[0], "rwm"
    if len(parts) == 2 and set(parts[1]) <= set("rwm") and parts[1]:
        access = parts[1]
    elif len(parts) > 1:
        inside = parts[1] or host
    if len(parts) == 3:
        access = parts[2]
    if len(parts) > 3 or not set(access) <= set("rwm") or not access:
        raise UserError(f"--device {text!r}: write /dev/NAME[:/dev/NAME[:rwm]]")
    if not host.startswith("/") or not inside.startswith("/"):
        raise UserError(f"--device {text!r}: the paths must be absolute")
    if not os.path.exists(host):
        raise UserError(f"--device {host}: no such file or directory")
    return {"PathOnHost": host, "PathInContainer": inside, "CgroupPermissions": access}


def _ulimit(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    soft, _, hard = value.partition(":")
    hard = hard or soft
    if not equals or not re.fullmatch(r"-1|\d+", soft) or not re.fullmatch(r"-1|\d+", hard):
        raise UserError(f"--ulimit {text!r}: write NAME=SOFT[:HARD], -1 for no limit")
    if int(hard) != -1 and (int(soft) == -1 or int(soft) > int(hard)):
        raise UserError(f"--ulimit {text!r}: the soft limit is above the hard one")
    return {"Name": name, "Soft": int(soft), "Hard": int(hard)}


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UserError(f"{option} {text!r}: write NAME=VALUE")
    return name, value


def _extra_host(text: str) -> str:
    name, *rest = re.split("[:=]", text, maxsplit=1)
    if not name or not rest:
        raise UserError(f"--add-host {text!r}: write NAME:IP")
    address = rest[0].strip("[]")
    if address != "host-gateway":
        _address(address, "--add-host")
    return f"{name}:{address}"


def _address(text: str, option: str) -> str:
    import ipaddress

    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise UserError(f"{option} {text!r}: not an IP address") from None


# ---- ports


def _expand_ports(text: str, option: str) -> list[str]:
    """`8000-8002/udp` as single ports with their protocol."""
    numbers, _, protocol = text.partition("/")
    first, dash, last = numbers.partition("-")
    protocol = protocol or "tcp"
    if protocol not in ("tcp", "udp", "sctp"):
        raise UserError(f"{option} {text!r}: the protocol is tcp, udp or sctp")
    try:
        low, high = int(first), int(last if dash else first)
    except ValueError:
        raise UserError(f"{option} {text!r}: not a port") from None
    if not 0 < low <= high < 65536:
        raise UserError(f"{option} {text!r}: a port is a number from 1 to 65535")
    return [f"{port}/{protocol}" for port in range(low, high + 1)]


def _port_bindings(given: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    bindings: dict[str, list[dict[str, str]]] = {}
    for text in given:
        match = re.fullmatch(
            r"(?:(?:(?P<ip>\[[^\]]+\]|[\d.]+):)?(?P<host>[\d-]*):)?(?P<inside>[\d-]+(?:/\w+)?)",
            text,
        )
        if match is None:
            raise UserError(f"--publish {text!r}: write [IP:][HOST:]CONTAINER[/udp]")
        address = (match["ip"] or "").strip("[]")
        if address:
            address = _address(address, "--publish")
        inside = _expand_ports(match["inside"], "--publish")
        outside = [""] * len(inside)
        if match["host"]:
            protocol = inside[0].partition("/")[2]
            host = _expand_ports(f"{match['host']}/{protocol}", "--publish")
            outside = [port.partition("/")[0] for port in host]
            if len(outside) != len(inside):
                raise UserError(f"--publish {text!r}: the ranges are not equally long")
        for port, number in zip(inside, outside, strict=True):
            bindings.setdefault(port, []).append({"HostIp": address, "HostPort": number})
    return bindings


# ---- mounts, networks, namespaces


def _mount_points(
    args: argparse.Namespace, image: Mapping[str, Any], containers: Containers
) -> list[dict[str, Any]]:
    """What is mounted where: flags go before --volumes-from, that before the image's VOLUME."""
    given = [volumes.parse_volume(text) for text in args.volume]
    given += [volumes.parse_mount(text) for text in args.mount]
    given += [volumes.parse_tmpfs(text) for text in args.tmpfs]
    seen = [point["Destination"] for point in given]
    if twice := {where for where in seen if seen.count(where) > 1}:
        raise UserError(f"duplicate mount point: {sorted(twice)[0]}")
    points = {point["Destination"]: point for point in given}
    for text in args.volumes_from:
        name, _, mode = text.partition(":")
        if mode not in ("", "ro", "rw"):
            raise UserError(f"--volumes-from {text!r}: write CONTAINER[:ro]")
        for point in containers.find(name).record.get("Mounts") or []:
            if point["Type"] != "tmpfs":
                shared = dict(point) | ({"RW": False} if mode == "ro" else {})
                points.setdefault(point["Destination"], shared)
    for destination in image.get("Volumes") or {}:
        point = volumes.parse_volume(destination)
        points.setdefault(point["Destination"], point)
    return sorted(points.values(), key=lambda point: str(point["Destination"]))


def _networking(args: argparse.Namespace, result: Record) -> None:
    """NetworkMode, the networks with what was asked of them, the ports."""
    wanted = [_network(text) for text in args.network or [networks.DEFAULT]]
    names = [name for name, _ in wanted]
    first, asked = wanted[0]
    asked["Aliases"] += args.network_alias
    asked["WantedIP"] = asked["WantedIP"] or (args.ip and _address(args.ip, "--ip"))
    asked["MacAddress"] = asked["MacAddress"] or args.mac_address
    host_config = result["HostConfig"]
    host_config["NetworkMode"] = first
    exclusive = first in ("none", "host") or first.startswith("container:")
    if len(names) > 1 and (exclusive or any(name in ("none", "host") for name in names)):
        raise UserError("--network: none, host and container: stand alone")
    if len(set(names)) != len(names):
        raise UserError(f"--network {names[-1]} is given twice")
    if exclusive:
        for option, value in (
            ("--publish", args.publish and first != "host"),
            ("--ip", asked["WantedIP"]),
            ("--network-alias", asked["Aliases"]),
            ("--mac-address", asked["MacAddress"]),
        ):
            if value:
                raise UserError(f"{option} cannot go together with --network {first}")
        if first.startswith("container:") and args.hostname:
            raise UserError("--hostname cannot go together with --network container:")
        result["NetworkMode"] = first
        result["Networks"] = {}
        return
    for name, asked in wanted:
        if asked["WantedIP"] and name == networks.DEFAULT:
            raise UserError("--ip needs a network of its own: --network NAME")
        if asked["Aliases"] and name == networks.DEFAULT:
            raise UserError("--network-alias needs a network of its own: --network NAME")
        for alias in asked["Aliases"]:
            if not NAME.fullmatch(alias):
                raise UserError(f"--network-alias {alias!r}: not a name")
    result["NetworkMode"] = "engine"
    result["Networks"] = dict(wanted)


def _network(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME` or `name=NAME,alias=OTHER,ip=ADDRESS,mac-address=ADDRESS`, and what it asks for."""
    name, aliases = text, []
    given = {"ip": "", "mac-address": ""}
    if "=" in text:
        name = ""
        for field in text.split(","):
            key, _, value = field.partition("=")
            if key == "name":
                name = value
            elif key == "alias":
                aliases.append(value)
            elif key in given:
                given[key] = value
            else:
                raise UserError(f"--network {text!r}: {key!r} is not one of name, alias, ip,"
                                " mac-address")  # fmt: skip
    if not name:
        raise UserError(f"--network {text!r}: it has no name")
    asked = {
        "Aliases": aliases,
        "WantedIP": given["ip"] and _address(given["ip"], "--ip"),
        "MacAddress": given["mac-address"],
    }
    return networks.DEFAULT if name == "default" else name, asked


def _namespaces(args: argparse.Namespace, result: Record, containers: Containers) -> None:
    host_config = result["HostConfig"]
    for key, value, fixed in (
        ("PidMode", args.pid, ("host",)),
        ("IpcMode", args.ipc or "private", ("private", "shareable", "host", "none")),
        ("UTSMode", args.uts, ("host",)),
        ("CgroupnsMode", args.cgroupns or "private", ("private", "host")),
        ("UsernsMode", args.userns, ("host", "auto")),
    ):
        text = value or ""
        joined = text.startswith("container:") and key in ("PidMode", "IpcMode")
        if text and text not in fixed and not joined:
            option = "--" + key.removesuffix("Mode").lower()
            raise UserError(f"{option} {text!r}: one of {', '.join(fixed)}")
        if joined:
            other = containers.find(text.partition(":")[2])
            text = f"container:{other.id}"
        host_config[key] = text
    mode = str(host_config["NetworkMode"])
    if mode.startswith("container:"):
        other = containers.find(mode.partition(":")[2])
        host_config["NetworkMode"] = result["NetworkMode"] = f"container:{other.id}"
    if host_config["UsernsMode"] == "auto":
        _user_namespace(args, result)
    if host_config["UTSMode"] == "host" and args.hostname:
        raise UserError("--hostname cannot go together with --uts host")


def _user_namespace(args: argparse.Namespace, result: Record) -> None:
    if args.driver == "overlay":
        raise UserError("--userns auto needs the driver fuse, which translates owners")
    if args.privileged:
        raise UserError("--userns auto cannot go together with --privileged")
    for option, mode in (("--network", result["NetworkMode"]), ("--pid", args.pid)):
        if mode and (mode == "host" or mode.startswith("container:")):
            raise UserError(f"--userns auto cannot go together with {option} {mode}")
    result["MountDriver"] = "fuse"
    result["IdMappings"] = [[0, *_subordinate_ids()]]


def _subordinate_ids() -> tuple[int, int]:
    """The first of the host's ids for containers, and how many there are (subuid(5))."""
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    ranges = {line.split(":")[0]: line.split(":")[1:] for line in lines if line.count(":") == 2}
    for name in ("containers", "unionfuse", "root"):
        if name in ranges:
            return int(ranges[name][0]), int(ranges[name][1])
    return 100_000, 65_536


def _check(result: Record) -> None:
    """What the host has to be able to do: refused now rather than at the start."""
    host_config = result["HostConfig"]
    limits.resources(host_config)
    capabilities.chosen(
        host_config["CapAdd"], host_config["CapDrop"], privileged=host_config["Privileged"]
    )


def command_line(result: Mapping[str, Any]) -> str:
    """Entrypoint and command as `ps` shows them."""
    import shlex

    config = result["Config"]
    words = [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]
    return " ".join(word if re.fullmatch(r"\S+", word) else shlex.quote(word) for word in words)
