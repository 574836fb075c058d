"""What is done in a mount, and how many seconds each part took.

A session is one mount: its first part finds it cold, later parts warm. All of them run for every
peer, in the same order. What a peer cannot do (copy-up where there is none) is left out.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmark import trees
from benchmark.peers import Mounted, Peer, compiled

Timed = tuple[str, float]
Session = Callable[[Mounted, Peer, "Tools"], Iterator[Timed]]

_RANDOM_READS = 20_000
_RANDOM_SIZE = 4096
_SMALL_FILES = 10_000


class Tools:
    """The compiled loops, and the numbers that --quick makes smaller."""

    def __init__(self, cache: Path, quick: bool) -> None:
        self.archive = trees.source_archive(cache)
        self.packages = trees.packages(cache)
        self.random_reads = _RANDOM_READS // (5 if quick else 1)
        self.small_files = _SMALL_FILES // (5 if quick else 1)
        self.written = (64 if quick else 512) << 20  # bytes
        self.probe = compiled("probe.c", cache)

    def loop(self, mount: Mounted, *words: object) -> float:
        """Seconds that a loop of the probe took, by its own clock."""
        command = mount.pin([str(self.probe), *map(str, words)])
        result = subprocess.run(command, cwd=mount.path, check=True, capture_output=True)
        return float(result.stdout)


def run(mount: Mounted, *words: object) -> float:
    """Seconds that a whole program took in the mount, its output thrown away."""
    command = mount.pin([str(word) for word in words])
    start = time.perf_counter()
    result = subprocess.run(
        command, cwd=mount.path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{command} in {mount.path}: {result.stderr.decode(errors='replace')}")
    return time.perf_counter() - start


def lookups(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    """Microseconds for one name."""
    each = 1e6 / mount.tree.files
    for state in ("cold", "warm") if peer.answers else ("cold",):
        yield f"lookup miss, {state}", tools.loop(mount, "stat", mount.tree.misses) * each
        if peer.answers:
            yield f"lookup hit, {state}", tools.loop(mount, "stat", mount.tree.hits) * each


def walks(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    yield "find, cold", run(mount, "find", ".", "-name", "nothing")
    yield "ls -lR after find", run(mount, "ls", "-lR")
    yield "ls -lR, warm", run(mount, "ls", "-lR")


def listings(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    yield "ls -lR, cold", run(mount, "ls", "-lR")


def disk_cold(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    """The same with the disk's cache dropped: what a first use after boot costs."""
    _drop_caches()
    yield "find, disk cold", run(mount, "find", ".", "-name", "nothing")
    _drop_caches()
    yield "ls -lR, disk cold", run(mount, "ls", "-lR")


def reads(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    yield "cat of all files", tools.loop(mount, "cat", mount.tree.hits)
    yield "cat of all, again", tools.loop(mount, "cat", mount.tree.hits)
    yield "sequential read", run(mount, "dd", "if=big", "of=/dev/null", "bs=1M", "status=none")
    random_reads = ("pread", "big", tools.random_reads, _RANDOM_SIZE)
    yield "random read", tools.loop(mount, *random_reads)
    yield "git status", run(mount, "git", "-c", "safe.directory=*", "-C", "repository", "status")


def writes(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    """New files only: what every peer and the plain directory can do."""
    place = mount.path / "written"
    place.mkdir()
    blocks = tools.written >> 20
    yield "create files", tools.loop(mount, "create", "written", tools.small_files)
    yield "unlink files", tools.loop(mount, "unlink", "written", tools.small_files)
    target = f"of={place}/big"
    yield (
        "sequential write",
        run(mount, "dd", "if=/dev/zero", target, "bs=1M", f"count={blocks}", "status=none"),
    )
    yield (
        "random write",
        tools.loop(mount, "pwrite", place / "big", tools.random_reads, _RANDOM_SIZE),
    )
    yield "untar", run(mount, "tar", "-xf", tools.archive, "-C", place)
    yield "rm -rf of new files", run(mount, "rm", "-rf", place)


def changes(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    """Files of the layers: copied up, and deleted by whiteouts."""
    start = time.perf_counter()
    with open(mount.path / "big", "ab") as file:
        file.write(b"x")
    yield "copy-up of the big file", time.perf_counter() - start
    yield "chmod -R", run(mount, "chmod", "-R", "g+w", "repository")
    yield "rm -rf of lower files", run(mount, "rm", "-rf", "repository")


def installing(mount: Mounted, peer: Peer, tools: Tools) -> Iterator[Timed]:
    """Packages into a Debian system: many small files, renames, fsyncs, files of the layers."""
    system = mount.path
    (system / "archives").mkdir()
    for archive in tools.packages:
        shutil.copy(archive, system / "archives")
    names = [f"/archives/{archive.name}" for archive in tools.packages]
    words = ("apt-get", "install", "-y", *names)
    yield (
        "apt-get install",
        run(mount, "chroot", system, "env", "DEBIAN_FRONTEND=noninteractive", *words),
    )


def _drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


READING: tuple[Session, ...] = (lookups, walks, listings, reads)
CHANGING: tuple[Session, ...] = (changes, installing)  # files of the layers
WRITING: tuple[Session, ...] = (writes, *CHANGING)
SESSIONS: tuple[Session, ...] = (*READING, *WRITING)
