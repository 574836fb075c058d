"""Resource limits: what was asked for, whether this host can enforce it, the OCI object for it.

A limit that the host cannot enforce is a UserError that says so; nothing is left out in silence.
`Host` is what was found out about cgroups, v1 and v2. Sizes are bytes, times microseconds.

Sources: OCI runtime-spec config-linux.md; kernel admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unionimage.errors import UserError

MINIMUM_MEMORY = 6 << 20  # docker's
CPU_PERIOD = 100_000
MOST_PIDS = 1 << 22  # the kernel's own: where a limit is to be lifted
UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


class Host(NamedTuple):
    """The cgroup layout: version 1, 2 or 0 (none), its controllers and where they are mounted."""

    version: int
    controllers: Mapping[str, Path]

    def require(self, controller: str, option: str) -> Path:
        """Where a controller is. Raises UserError when `option` cannot be enforced."""
        where = self.controllers.get(controller)
        if where is None:
            raise UserError(
                f"{option} cannot be enforced: this host has no {controller} cgroup controller"
            )
        return where


@functools.cache
def host() -> Host:
    """Look at the mounted cgroup trees; v1 controllers go first, as in the runtimes."""
    legacy: dict[str, Path] = {}
    unified: Path | None = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ")
        where = Path(fields.split(" ")[4])
        if kind == "cgroup":
            for option in options.split(","):
                # `name=systemd` controls nothing, and runtimes make a cgroup there all the same.
                named = option.startswith("name=") or "=" not in option
                if option not in ("rw", "ro") and named and _writable(where):
                    legacy.setdefault(option, where)
        elif kind == "cgroup2":
            unified = where
    if "memory" in legacy or "pids" in legacy or "cpu" in legacy:
        return Host(1, legacy)
    if unified is not None and _writable(unified):
        names = (unified / "cgroup.controllers").read_text().split()
        return Host(2, dict.fromkeys(names, unified))
    return Host(0, {})


def _writable(where: Path) -> bool:
    """Whether we may make cgroups there; without root it has to be delegated to us."""
    return os.access(where, os.W_OK)


def parse_size(text: str, option: str) -> int:
    """`512m`, `1g`, `100` in bytes; docker's units are powers of 1024. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([bkmgtp]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise UserError(f"{option}: {text!r} is not a size: write for example 512m or 1g")
    return int(float(match.group(1)) * UNITS[match.group(2)])


def parse_cpus(text: str) -> int:
    """`1.5` as NanoCpus. Raises UserError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise UserError(f"--cpus: {text!r} is not a number of CPUs: write for example 1.5")
    return round(value * 1e9)


def parse_cpu_set(text: str, option: str) -> set[int]:
    """`0-2,4` as numbers. Raises UserError."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or len(part) > 16:
            raise UserError(f"{option}: {text!r} is not a list such as 0-2,4")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if last < first or last > 1 << 16:
            raise UserError(f"{option}: {text!r} is not a list such as 0-2,4")
        numbers.update(range(first, last + 1))
    return numbers


def resources(config: Mapping[str, Any], found: Host | None = None) -> dict[str, Any]:
    """The OCI `linux.resources` object (without devices) for docker's HostConfig keys.

    Raises UserError for what cannot be enforced here or contradicts itself.
    """
    found = found or host()
    result: dict[str, Any] = {}
    if memory := _memory(config, found):
        result["memory"] = memory
    if cpu := _cpu(config, found):
        result["cpu"] = cpu
    limit = config.get("PidsLimit") or 0
    if limit > 0:  # crun writes what stands for no limit into pids.max, which refuses it
        found.require("pids", "--pids-limit")
        result["pids"] = {"limit": limit}
    if block := _block_io(config, found):
        result["blockIO"] = block
    return result


def _memory(config: Mapping[str, Any], found: Host) -> dict[str, Any]:
    limit, swap = config.get("Memory") or 0, config.get("MemorySwap") or 0
    reservation = config.get("MemoryReservation") or 0
    swappiness = config.get("MemorySwappiness")
    memory: dict[str, Any] = {}
    if limit:
        found.require("memory", "--memory")
        if limit < MINIMUM_MEMORY:
            raise UserError("--memory: the minimum is 6m")
        memory["limit"] = limit
        memory["swap"] = swap or 2 * limit
    if swap and not limit:
        raise UserError("--memory-swap needs --memory as well")
    if swap > 0 and swap < limit:
        raise UserError("--memory-swap is memory and swap together: it cannot be below --memory")
    if limit and not _swap_accounting(found):
        if swap > 0:
            raise UserError("--memory-swap cannot be enforced: the kernel does not account swap")
        del memory["swap"]
    if reservation:
        found.require("memory", "--memory-reservation")
        if limit and reservation > limit:
            raise UserError("--memory-reservation cannot be above --memory")
        memory["reservation"] = reservation
    if swappiness is not None and swappiness != -1:
        if not 0 <= swappiness <= 100:
            raise UserError("--memory-swappiness is a number from 0 to 100")
        if found.version != 1:
            raise UserError("--memory-swappiness cannot be enforced: cgroup v2 has no swappiness")
        memory["swappiness"] = swappiness
    if config.get("OomKillDisable"):
        if found.version != 1:
            raise UserError("--oom-kill-disable cannot be enforced on cgroup v2")
        found.require("memory", "--oom-kill-disable")
        memory["disableOOMKiller"] = True
    return memory


def _swap_accounting(found: Host) -> bool:
    where = found.controllers["memory"]
    if found.version == 1:
        return (where / "memory.memsw.limit_in_bytes").exists()
    return any(where.glob("*/memory.swap.max"))


def _cpu(config: Mapping[str, Any], found: Host) -> dict[str, Any]:
    cpu: dict[str, Any] = {}
    shares, nano = config.get("CpuShares") or 0, config.get("NanoCpus") or 0
    period, quota = config.get("CpuPeriod") or 0, config.get("CpuQuota") or 0
    if shares:
        found.require("cpu", "--cpu-shares")
        if not 2 <= shares <= 262144:
            raise UserError("--cpu-shares is a number from 2 to 262144")
        cpu["shares"] = shares
    if nano:
        if period or quota:
            raise UserError("--cpus cannot go together with --cpu-period or --cpu-quota")
        online = os.cpu_count() or 1
        if not 10_000_000 <= nano <= online * 1_000_000_000:
            raise UserError(f"--cpus is a number from 0.01 to {online}: this host has {online}")
        period, quota = CPU_PERIOD, nano * CPU_PERIOD // 1_000_000_000
    if period or quota:
        where = found.require("cpu", "--cpus, --cpu-period and --cpu-quota")
        if found.version == 1 and not (where / "cpu.cfs_quota_us").exists():
            raise UserError("--cpus cannot be enforced: the kernel has no CFS bandwidth control")
        if period and not 1000 <= period <= 1_000_000:
            raise UserError("--cpu-period is a number of microseconds from 1000 to 1000000")
        if quota and quota != -1 and quota < 1000:
            raise UserError("--cpu-quota is a number of microseconds from 1000")
        cpu |= {"period": period} if period else {}
        cpu |= {"quota": quota} if quota else {}
    for key, name, option in (
        ("CpusetCpus", "cpus", "--cpuset-cpus"),
        ("CpusetMems", "mems", "--cpuset-mems"),
    ):
        if wanted := config.get(key):
            _check_cpu_set(wanted, name, option, found)
            cpu[name] = wanted
    return cpu


def _check_cpu_set(wanted: str, name: str, option: str, found: Host) -> None:
    where = found.require("cpuset", option)
    suffix = "" if found.version == 1 else ".effective"
    there = (where / f"cpuset.{name}{suffix}").read_text().strip()
    if missing := parse_cpu_set(wanted, option) - parse_cpu_set(there, option):
        names = ",".join(str(number) for number in sorted(missing)[:8])
        raise UserError(f"{option}: {names} is not available, only {there}")


def _block_io(config: Mapping[str, Any], found: Host) -> dict[str, Any]:
    block: dict[str, Any] = {}
    controller = "blkio" if found.version == 1 else "io"
    if weight := config.get("BlkioWeight"):
        found.require(controller, "--blkio-weight")
        _check_weight(weight, "--blkio-weight")
        block["weight"] = weight
    if disks := config.get("BlkioWeightDevice"):
        found.require(controller, option := "--blkio-weight-device")
        for disk in disks:
            _check_weight(disk["Weight"], option)
        block["weightDevice"] = [_of_disk(disk, "Weight", option) for disk in disks]
    for key, name, option in (
        ("BlkioDeviceReadBps", "throttleReadBpsDevice", "--device-read-bps"),
        ("BlkioDeviceWriteBps", "throttleWriteBpsDevice", "--device-write-bps"),
        ("BlkioDeviceReadIOps", "throttleReadIOPSDevice", "--device-read-iops"),
        ("BlkioDeviceWriteIOps", "throttleWriteIOPSDevice", "--device-write-iops"),
    ):
        if entries := config.get(key):
            found.require(controller, option)
            block[name] = [_of_disk(entry, "Rate", option) for entry in entries]
    return block


def _check_weight(weight: int, option: str) -> None:
    if not 10 <= weight <= 1000:
        raise UserError(f"{option} is a number from 10 to 1000")
    if not _bfq_in_use():
        raise UserError(
            f"{option} cannot be enforced: no disk of this host uses the bfq scheduler"
            " (echo bfq > /sys/block/DISK/queue/scheduler)"
        )


def _of_disk(entry: Mapping[str, Any], number: str, option: str) -> dict[str, int]:
    try:
        device = os.stat(entry["Path"]).st_rdev
    except OSError as error:
        raise UserError(f"{option}: {entry['Path']}: {error.strerror}") from None
    return {"major": os.major(device), "minor": os.minor(device), number.lower(): entry[number]}


def _bfq_in_use() -> bool:
    for scheduler in Path("/sys/block").glob("*/queue/scheduler"):
        try:
            if "[bfq]" in scheduler.read_text():
                return True
        except OSError:
            continue
    return False


def cgroup_of(pid: int, controller: str, found: Host | None = None) -> Path | None:
    """The directory of the cgroup that a process is in, for one controller."""
    found = found or host()
    where = found.controllers.get(controller)
    if where is None:
        return None
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, names, path = line.split(":", 2)
        if names == "" if found.version == 2 else controller in names.split(","):
            return where / path.lstrip("/")
    return None


def ran_out_of_memory(cgroup: Path | None) -> bool:
    """Whether the kernel killed something in a memory cgroup because its limit was reached."""
    if cgroup is None:
        return False
    for name in ("memory.oom_control", "memory.events"):
        try:
            lines = (cgroup / name).read_text().splitlines()
        except OSError:
            continue
        if any(line.startswith("oom_kill ") and int(line.split()[1]) for line in lines):
            return True
    return False


def processes(pid: int) -> list[int]:
    """All processes in the cgroup of a process and below it, by their pids on this host."""
    found = host()
    for controller in ("pids", "memory", "cpu", *found.controllers):
        where = cgroup_of(pid, controller, found)
        if where is not None:
            numbers: set[int] = set()
            for file in (where / "cgroup.procs", *where.glob("**/cgroup.procs")):
                try:
                    numbers.update(int(line) for line in file.read_text().split())
                except OSError:
                    continue
            return sorted(numbers)
    return [pid]
