"""The OCI bundle: `config.json` out of docker's Config and HostConfig, or for one build step.

It decides and writes; it starts nothing and mounts nothing. What it is given is already checked
(`create.py` refuses unknown values), what the host cannot do is refused here and in `limits.py`.

Sources: OCI runtime-spec config.md and config-linux.md; docker's documented defaults
("Runtime privilege and Linux capabilities", "Security").
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unionimage.container import capabilities, limits, rootless, seccomp, users
from unionimage.errors import UserError

Spec = dict[str, Any]

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OCI_VERSION = "1.0.2"
SHM_SIZE = 64 << 20

MASKED = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

# Sysctls that a namespace of the container's own holds; others would change the host.
IPC_SYSCTLS = {
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
}

# Characters devices that every container may use: major, minor, as in OCI's default devices.
DEVICES = ((1, 3), (1, 8), (1, 7), (5, 0), (1, 5), (1, 9), (5, 1), (136, None), (5, 2))


class Mount(NamedTuple):
    """One entry of `mounts`: `type` is bind, tmpfs or another file system's."""

    type: str
    source: str
    destination: str
    options: Sequence[str] = ()

    def to_object(self) -> Spec:
        return {
            "destination": self.destination,
            "type": self.type,
            "source": self.source,
            "options": list(self.options),
        }


class Namespaces(NamedTuple):
    """Where each namespace comes from: "" a new one, "host", or the path of one to join."""

    pid: str = ""
    network: str = ""
    ipc: str = ""
    uts: str = ""
    cgroup: str = ""
    user: str = "host"

    def to_object(self) -> list[Spec]:
        spaces: list[Spec] = [{"type": "mount"}]
        for kind in ("pid", "network", "ipc", "uts", "cgroup", "user"):
            where = getattr(self, kind)
            if where == "host":
                continue
            spaces.append({"type": kind, "path": where} if where else {"type": kind})
        return spaces


class Surroundings(NamedTuple):
    """What a container gets that is not in its configuration: made afresh at every start."""

    root: Path
    cgroup: str
    hostname: str
    namespaces: Namespaces = Namespaces()
    mounts: Sequence[Mount] = ()
    id_mappings: Sequence[tuple[int, int, int]] = ()  # container, host, size; uid and gid alike
    init: str | None = None  # the host's program for --init


def write(directory: str | Path, spec: Mapping[str, Any]) -> None:
    """Write `config.json` into a bundle directory."""
    Path(directory, "config.json").write_text(json.dumps(spec))


def set_network(directory: str | Path, path: str) -> None:
    """Have a bundle's process join a network namespace instead of getting a new one."""
    spec = json.loads(Path(directory, "config.json").read_bytes())
    for namespace in spec["linux"]["namespaces"]:
        if namespace["type"] == "network":
            namespace["path"] = path
    write(directory, spec)


def container(
    config: Mapping[str, Any], host_config: Mapping[str, Any], here: Surroundings
) -> Spec:
    """The spec of a container. Raises UserError for what cannot be had on this host."""
    privileged = bool(host_config.get("Privileged"))
    granted = granted_capabilities(host_config)
    user = users.find(here.root, config.get("User") or "", host_config.get("GroupAdd") or ())
    arguments = [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]
    mounts = _system_mounts(host_config, here, privileged)
    if here.init:
        arguments = [INIT_INSIDE, "--", *arguments]
        mounts.append(Mount("bind", here.init, INIT_INSIDE, ("bind", "ro")))
    environment = environment_of(config, user, here.hostname)
    spec: Spec = {
        "ociVersion": OCI_VERSION,
        "hostname": here.hostname,
        "process": process(config, host_config, user, arguments, environment, granted),
        "root": {"path": str(here.root), "readonly": bool(host_config.get("ReadonlyRootfs"))},
        "mounts": [mount.to_object() for mount in (*mounts, *here.mounts)],
        "linux": {
            "namespaces": here.namespaces.to_object(),
            "cgroupsPath": here.cgroup,
            "resources": limits.resources(host_config) | {"devices": _device_rules(host_config)},
            "devices": _devices(host_config),
            "sysctl": _sysctls(host_config, here.namespaces),
        },
    }
    if not limits.host().controllers:
        del spec["linux"]["cgroupsPath"]  # none can be made: the process stays in the caller's
    if here.namespaces.uts == "host":
        del spec["hostname"]
    if propagation := _propagation(here.mounts):
        spec["linux"]["rootfsPropagation"] = propagation
    if domain := config.get("Domainname"):
        spec["linux"]["sysctl"]["kernel.domainname"] = domain
    if annotations := host_config.get("Annotations"):
        spec["annotations"] = annotations
    _protect(spec["linux"], host_config, granted, privileged)
    if here.id_mappings:
        table = [
            {"containerID": inside, "hostID": outside, "size": size}
            for inside, outside, size in here.id_mappings
        ]
        spec["linux"] |= {"uidMappings": table, "gidMappings": table}
    return spec


def build_step(
    rootfs: str | Path,
    args: Sequence[str],
    env: Sequence[str],
    cwd: str = "/",
    user: str = "",
    *,
    network: str = "host",
    mounts: Sequence[Mount] = (),
    hostname: str | None = None,
    name: str = "build",
    privileged: bool = False,
) -> Spec:
    """The spec of one RUN step: docker's default isolation, the step's own mounts, no terminal.

    Args:
        network: `host`, the path of a namespace, or empty for a new one.
        name: names the cgroup, `unionfuse/NAME`.
    """
    config = {"User": user, "Env": list(env), "WorkingDir": cwd, "Cmd": list(args)}
    here = Surroundings(
        root=Path(rootfs),
        cgroup=f"/unionfuse/{name}",
        hostname=hostname or name[:12],
        namespaces=Namespaces(network=network),
        mounts=mounts,
    )
    return container(config, {"Privileged": privileged}, here)


def granted_capabilities(host_config: Mapping[str, Any]) -> list[str]:
    """The capabilities that this HostConfig gives."""
    return capabilities.chosen(
        host_config.get("CapAdd") or (),
        host_config.get("CapDrop") or (),
        privileged=bool(host_config.get("Privileged")),
    )


def process(
    config: Mapping[str, Any],
    host_config: Mapping[str, Any],
    user: users.User,
    arguments: Sequence[str],
    environment: Sequence[str],
    granted: Sequence[str],
) -> Spec:
    """The OCI process object, for the first process and for `exec` alike."""
    # With its own group, as docker does: who leaves that one by set-gid is still denied what a mode
    # denies to it.
    groups = list(dict.fromkeys((user.gid, *user.groups)))
    result: Spec = {
        "terminal": bool(config.get("Tty")),
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": groups},
        "args": list(arguments),
        "env": list(environment),
        "cwd": config.get("WorkingDir") or "/",
        "noNewPrivileges": no_new_privileges(host_config),
        "rlimits": _rlimits(host_config),
        "capabilities": {
            "bounding": list(granted),
            "effective": list(granted) if user.uid == 0 else [],
            "permitted": list(granted) if user.uid == 0 else [],
        },
    }
    adjustment = host_config.get("OomScoreAdj") or 0
    if adjustment:
        _check_oom_score(adjustment)
        result["oomScoreAdj"] = adjustment
    return result


def environment_of(config: Mapping[str, Any], user: users.User, hostname: str) -> list[str]:
    """The variables of a process: docker's own first, then the image's and the user's."""
    given = list(config.get("Env") or [])
    names = {entry.partition("=")[0] for entry in given}
    first = [] if "PATH" in names else [PATH]
    if "HOSTNAME" not in names:
        first.append(f"HOSTNAME={hostname}")
    if config.get("Tty") and "TERM" not in names:
        first.append("TERM=xterm")
    if "HOME" not in names:
        given.append(f"HOME={user.home}")
    return first + given


TTY_GROUP = 5
INIT_INSIDE = "/sbin/docker-init"


def _system_mounts(
    host_config: Mapping[str, Any], here: Surroundings, privileged: bool
) -> list[Mount]:
    """/proc, /dev, /sys and what belongs into them, unless the user mounts something else there."""
    shm = str(host_config.get("ShmSize") or SHM_SIZE)
    quiet = ("nosuid", "noexec", "nodev")
    sys_options = (*quiet, "rw" if privileged else "ro")
    pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    if _maps(here.id_mappings or rootless.group_map(), TTY_GROUP):
        pts.append("gid=5")
    mounts = [
        Mount("proc", "proc", "/proc", quiet),
        Mount("tmpfs", "tmpfs", "/dev", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        Mount("devpts", "devpts", "/dev/pts", pts),
    ]
    own_user = here.namespaces.user != "host" or rootless.active()
    if own_user and here.namespaces.network == "host":
        mounts.append(Mount("none", "/sys", "/sys", ("rbind", *sys_options)))
    else:
        mounts.append(Mount("sysfs", "sysfs", "/sys", sys_options))
        if limits.host().controllers:
            mounts.append(Mount("cgroup", "cgroup", "/sys/fs/cgroup", (*sys_options, "relatime")))
    mounts.append(Mount("mqueue", "mqueue", "/dev/mqueue", quiet))
    if here.namespaces.ipc in ("", "private", "shareable"):
        mounts.append(Mount("tmpfs", "shm", "/dev/shm", (*quiet, "mode=1777", f"size={shm}")))
    taken = {mount.destination for mount in here.mounts}
    return [mount for mount in mounts if mount.destination not in taken]


def _propagation(mounts: Sequence[Mount]) -> str:
    """What the root's own mount has to be for the mounts in it to send or receive."""
    options = {option for mount in mounts for option in mount.options}
    if options & {"shared", "rshared"}:
        return "shared"
    return "rslave" if options & {"slave", "rslave"} else ""


def _maps(mappings: Sequence[tuple[int, int, int]], number: int) -> bool:
    return any(inside <= number < inside + size for inside, _, size in mappings)


def _protect(
    linux: Spec, host_config: Mapping[str, Any], granted: Sequence[str], privileged: bool
) -> None:
    """Masked and read-only paths, and the seccomp filter."""
    options = host_config.get("SecurityOpt") or []
    if not privileged and "systempaths=unconfined" not in options:
        linux["maskedPaths"] = MASKED + _thermal_paths()
        linux["readonlyPaths"] = READ_ONLY
    profile = next((o.partition("=")[2] for o in options if o.startswith("seccomp=")), None)
    if profile == "unconfined" or (privileged and profile is None):
        return
    if profile is None or profile == "builtin":
        linux["seccomp"] = seccomp.default_profile(granted)
    else:
        linux["seccomp"] = seccomp.from_docker(json.loads(profile), granted)


def _thermal_paths() -> list[str]:
    cpus = Path("/sys/devices/system/cpu")
    return [str(path) for path in cpus.glob("cpu[0-9]*/thermal_throttle")]


def no_new_privileges(host_config: Mapping[str, Any]) -> bool:
    options = host_config.get("SecurityOpt") or []
    return any(
        option in ("no-new-privileges", "no-new-privileges=true", "no-new-privileges:true")
        for option in options
    )


def _rlimits(host_config: Mapping[str, Any]) -> list[Spec]:
    import resource

    result = []
    for limit in host_config.get("Ulimits") or []:
        name = f"RLIMIT_{limit['Name'].upper()}"
        number = getattr(resource, name, None)
        if number is None:
            raise UserError(f"--ulimit: unknown limit {limit['Name']!r}")
        _, have = resource.getrlimit(number)
        infinite = resource.RLIM_INFINITY
        hard = infinite if limit["Hard"] == -1 else limit["Hard"]
        may_raise = "CAP_SYS_RESOURCE" in capabilities.available()
        if have != infinite and (hard == infinite or hard > have) and not may_raise:
            raise UserError(
                f"--ulimit {limit['Name']}: this process may have {have} at most"
                " and lacks CAP_SYS_RESOURCE to raise it"
            )
        unlimited = (1 << 64) - 1
        soft = unlimited if limit["Soft"] == -1 else limit["Soft"]
        top = unlimited if hard == infinite else hard
        result.append({"type": name, "soft": soft, "hard": top})
    return result


def _check_oom_score(adjustment: int) -> None:
    if not -1000 <= adjustment <= 1000:
        raise UserError("--oom-score-adj is a number from -1000 to 1000")
    current = int(Path("/proc/self/oom_score_adj").read_text())
    if adjustment < current and "CAP_SYS_RESOURCE" not in capabilities.available():
        raise UserError(
            f"--oom-score-adj {adjustment}: lowering it below {current} needs CAP_SYS_RESOURCE,"
            " which this process lacks"
        )


def _sysctls(host_config: Mapping[str, Any], spaces: Namespaces) -> dict[str, str]:
    given = dict(host_config.get("Sysctls") or {})
    for name in given:
        if name.startswith("net."):
            if spaces.network == "host":
                raise UserError(f"--sysctl {name}: not with the host's network")
        elif name in IPC_SYSCTLS or name.startswith("fs.mqueue."):
            if spaces.ipc == "host":
                raise UserError(f"--sysctl {name}: not with the host's ipc namespace")
        else:
            raise UserError(
                f"--sysctl {name}: it belongs to no namespace and would change the host"
            )
    own_network = spaces.network != "host" and spaces.user == "host"
    if own_network and not host_config.get("Privileged"):
        given.setdefault("net.ipv4.ip_unprivileged_port_start", "0")
        if not rootless.active():  # not all group ids of that range exist there
            given.setdefault("net.ipv4.ping_group_range", "0 2147483647")
    return given


def _device_rules(host_config: Mapping[str, Any]) -> list[Spec]:
    if host_config.get("Privileged"):
        return [{"allow": True, "access": "rwm"}]
    rules: list[Spec] = [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "b", "access": "m"},
    ]
    for major, minor in DEVICES:
        rule: Spec = {"allow": True, "type": "c", "major": major, "access": "rwm"}
        rules.append(rule if minor is None else rule | {"minor": minor})
    for given in host_config.get("Devices") or []:
        for device in _expand(given["PathOnHost"], given["PathInContainer"]):
            rules.append(
                {
                    "allow": True,
                    "type": device["type"],
                    "major": device["major"],
                    "minor": device["minor"],
                    "access": given.get("CgroupPermissions") or "rwm",
                }
            )
    rules += [_device_cgroup_rule(text) for text in host_config.get("DeviceCgroupRules") or []]
    return rules


def _device_cgroup_rule(text: str) -> Spec:
    """`c 13:* rwm` as docker writes it. Raises UserError."""
    try:
        kind, numbers, access = text.split()
        major, minor = numbers.split(":")
        if kind not in ("a", "b", "c") or not set(access) <= set("rwm") or not access:
            raise ValueError
        rule: Spec = {"allow": True, "type": kind, "access": access}
        rule |= {} if major == "*" else {"major": int(major)}
        return rule | ({} if minor == "*" else {"minor": int(minor)})
    except ValueError:
        raise UserError(f"--device-cgroup-rule: {text!r} is not such as 'c 13:* rwm'") from None


def _devices(host_config: Mapping[str, Any]) -> list[Spec]:
    if host_config.get("Privileged"):
        return [device for device in _expand("/dev", "/dev") if not _made_by_runtime(device)]
    result: list[Spec] = []
    for given in host_config.get("Devices") or []:
        result += _expand(given["PathOnHost"], given["PathInContainer"])
    return result


def _made_by_runtime(device: Spec) -> bool:
    path = device["path"]
    return path in ("/dev/console", "/dev/ptmx") or path.startswith(("/dev/pts", "/dev/shm"))


def _expand(host_path: str, inside: str) -> list[Spec]:
    """A device, or every device below a directory. Raises UserError when there is none."""
    try:
        status = os.stat(host_path)
    except OSError as error:
        raise UserError(f"--device {host_path}: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        found: list[Spec] = []
        for entry in sorted(os.scandir(host_path), key=lambda entry: entry.name):
            if entry.is_symlink() or entry.name in ("pts", "shm", "fd", "mqueue"):
                continue
            kind = entry.stat().st_mode
            if stat.S_ISDIR(kind) or stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
                found += _expand(entry.path, f"{inside.rstrip('/')}/{entry.name}")
        return found
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise UserError(f"--device {host_path}: not a device")
    return [
        {
            "path": inside,
            "type": "c" if stat.S_ISCHR(status.st_mode) else "b",
            "major": os.major(status.st_rdev),
            "minor": os.minor(status.st_rdev),
            "fileMode": stat.S_IMODE(status.st_mode),
            "uid": status.st_uid,
            "gid": status.st_gid,
        }
    ]
