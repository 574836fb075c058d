"""How a mount grows with its image: time from command to answer, and the daemon's own memory.

Memory is RssAnon: pages of the mapped index are page cache, which the kernel takes back.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import trees
from benchmark.peers import PROGRAM, index_of
from benchmark.report import markdown
from unionfuse import mounting


@dataclass(frozen=True)
class Size:
    """What an image of `files` files costs; seconds, and KiB of anonymous memory."""

    files: int
    mount: float
    mounted: int
    walked: int
    forgotten: int


def measure(cache: Path, files: int, rounds: int) -> Size:
    """Mount an indexed layer of `files` files some times; at the last time walk it as well."""
    layer = trees.many_files(cache, files)
    index = index_of(cache / f"many-{files}.index", [layer])
    scratch = cache / "mounts"
    shutil.rmtree(scratch, ignore_errors=True)
    mountpoint = scratch / "mnt"
    for place in (mountpoint, scratch / "upper", scratch / "work"):
        place.mkdir(parents=True)
    line = f"lowerdir={layer},upperdir={scratch}/upper,workdir={scratch}/work,lookup_index={index}"
    seconds: list[float] = []
    for number in range(rounds):
        start = time.perf_counter()
        subprocess.run([PROGRAM, "-o", line, mountpoint], check=True)
        os.stat(mountpoint)
        seconds.append(time.perf_counter() - start)
        if number < rounds - 1:
            subprocess.run([PROGRAM, "umount", mountpoint], check=True)
    mount = mounting.mount_at(os.fsencode(mountpoint))
    processes = set(mounting.server_of(mount) or ()) if mount else set()
    time.sleep(1)
    mounted = _anonymous(processes)
    subprocess.run(["ls", "-lR", mountpoint], check=True, stdout=subprocess.DEVNULL)
    walked = _anonymous(processes)
    Path("/proc/sys/vm/drop_caches").write_text("2\n")
    time.sleep(1)
    forgotten = _anonymous(processes)
    subprocess.run([PROGRAM, "umount", mountpoint], check=True)
    return Size(files, statistics.median(seconds), mounted, walked, forgotten)


def table(sizes: Sequence[Size]) -> str:
    head = ["files", "mount (s)", "memory, mounted", "after ls -lR", "after FORGET (MiB)"]
    body = [
        [f"{size.files:,}", f"{size.mount:.3f}"]
        + [f"{kib / 1024:.1f}" for kib in (size.mounted, size.walked, size.forgotten)]
        for size in sizes
    ]
    return markdown(head, body)


def _anonymous(pids: Iterable[int]) -> int:
    """KiB in anonymous pages of all these processes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1])
    return total
