"""What a running container uses, from its cgroups (v1 and v2) and its network interfaces."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from unionimage.container import limits
from unionimage.container.state import Container

# Above this a v1 memory limit means none: the kernel rounds its largest number to pages.
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Sample:
    """One look. Times in nanoseconds, sizes in bytes."""

    when: int
    cpu: int
    memory: int
    memory_limit: int
    received: int
    sent: int
    read: int
    written: int
    pids: int


def sample(container: Container) -> Sample | None:
    """What it uses now; None when it does not run."""
    pid = int(container.state().get("Pid") or 0)
    if not pid or not os.path.exists(f"/proc/{pid}"):
        return None
    memory, limit = _memory(pid)
    received, sent = _network(pid)
    read, written = _block_io(pid)
    return Sample(
        time.monotonic_ns(), _cpu(pid), memory, limit, received, sent, read, written, _pids(pid)
    )


def cpu_percent(before: Sample, after: Sample) -> float:
    """Of one CPU: 200 is two of them."""
    span = after.when - before.when
    return 100.0 * (after.cpu - before.cpu) / span if span > 0 else 0.0


def _cpu(pid: int) -> int:
    if limits.host().version == 1:
        return _number(limits.cgroup_of(pid, "cpuacct"), "cpuacct.usage")
    return _table(limits.cgroup_of(pid, "cpu"), "cpu.stat").get("usage_usec", 0) * 1000


def _memory(pid: int) -> tuple[int, int]:
    """Without the page cache that the kernel gives back first, as docker counts."""
    where = limits.cgroup_of(pid, "memory")
    legacy = limits.host().version == 1
    statistics = _table(where, "memory.stat")
    if legacy:
        used = _number(where, "memory.usage_in_bytes")
        cache = statistics.get("total_inactive_file", 0)
        limit = _number(where, "memory.limit_in_bytes")
    else:
        used = _number(where, "memory.current")
        cache = statistics.get("inactive_file", 0)
        limit = _number(where, "memory.max")
    if not 0 < limit < NO_LIMIT:
        limit = _table(Path("/proc"), "meminfo").get("MemTotal:", 0) * 1024
    return max(0, used - cache), limit


def _network(pid: int) -> tuple[int, int]:
    received = sent = 0
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:
        return 0, 0
    for line in lines:
        name, _, rest = line.partition(":")
        fields = rest.split()
        if name.strip() != "lo":
            received += int(fields[0])
            sent += int(fields[8])
    return received, sent


def _block_io(pid: int) -> tuple[int, int]:
    if limits.host().version == 1:
        where, name = limits.cgroup_of(pid, "blkio"), "blkio.throttle.io_service_bytes"
        totals = {"Read": 0, "Write": 0}
        for line in _lines(where, name):
            fields = line.split()
            if len(fields) == 3 and fields[1] in totals:
                totals[fields[1]] += int(fields[2])
        return totals["Read"], totals["Write"]
    read = written = 0
    for line in _lines(limits.cgroup_of(pid, "io"), "io.stat"):
        for field in line.split()[1:]:
            key, _, value = field.partition("=")
            read += int(value) if key == "rbytes" else 0
            written += int(value) if key == "wbytes" else 0
    return read, written


def _pids(pid: int) -> int:
    return _number(limits.cgroup_of(pid, "pids"), "pids.current") or len(limits.processes(pid))


def _lines(where: Path | None, name: str) -> list[str]:
    try:
        return (where / name).read_text().splitlines() if where else []
    except OSError:
        return []


def _number(where: Path | None, name: str) -> int:
    lines = _lines(where, name)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else 0


def _table(where: Path | None, name: str) -> dict[str, int]:
    rows = (line.split() for line in _lines(where, name))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
