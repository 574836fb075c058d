"""Containers beside podman and docker: how long the everyday verbs take, what an idle one holds.

`scripts/bench --containers`. Every round asks every peer in turn; medians in milliseconds. Memory
is what the processes that keep an idle container hold for themselves: anonymous pages, divided
among those that share them (Pss_Anon). The container's own `sleep` is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SETTLE = 75  # seconds: what falls asleep after a minute without work does so, and is asleep
HOLDERS = {
    "unionfuse": ("unionfuse", "unionfuse-keepe", "unionfuse-waite", "unionfuse-spawn"),
    "podman": ("conmon", "fuse-overlayfs"),
    "docker": ("containerd-shim",),
}


class Peer:
    """One engine with a store of its own and the image `busybox`."""

    def __init__(
        self, name: str, directory: Path, command: list[str], environment: dict[str, str]
    ) -> None:
        self.name, self.directory, self.command = name, directory, command
        self.environment = os.environ | environment

    def __call__(self, *words: str) -> str:
        done = subprocess.run(
            [*self.command, *words], env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{self.name} {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def time(self, *words: str) -> float:
        began = time.perf_counter()
        self(*words)
        return (time.perf_counter() - began) * 1000


@contextlib.contextmanager
def unionfuse(scratch: Path, driver: str) -> Iterator[Peer]:
    directory = scratch / f"unionfuse-{driver}"
    directory.mkdir()
    config = directory / "config.toml"
    config.write_text(f'[store]\ndriver = "{driver}"\n')
    variables = {
        "UNIONFUSE_ROOT": str(directory / "store"),
        "UNIONFUSE_RUNROOT": str(directory / "run"),
        "UNIONFUSE_CONFIG": str(config),
    }
    name = "unionfuse" if driver == "fuse" else f"unionfuse ({driver})"
    peer = Peer(name, directory, [str(Path(sys.executable).parent / "unionfuse")], variables)
    yield peer


@contextlib.contextmanager
def podman(scratch: Path) -> Iterator[Peer]:
    directory = scratch / "podman"
    storage = directory / "storage.conf"
    directory.mkdir()
    storage.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/root"\n'
        f'runroot = "{directory}/run"\n[storage.options.overlay]\n'
        'mount_program = "/usr/bin/fuse-overlayfs"\n'
    )
    settings = directory / "containers.conf"
    settings.write_text(  # more than the caller has would be refused
        '[containers]\ndefault_ulimits = ["nofile=256:256", "nproc=256:256"]\n'
    )
    command = ["podman", "--cgroup-manager", "cgroupfs", "--runtime", "runc", "--events-backend",
               "file", "--tmpdir", str(directory / "tmp")]  # fmt: skip
    yield Peer(
        "podman",
        directory,
        command,
        {"CONTAINERS_STORAGE_CONF": str(storage), "CONTAINERS_CONF": str(settings)},
    )


@contextlib.contextmanager
def docker(scratch: Path) -> Iterator[Peer]:
    directory = scratch / "docker"
    directory.mkdir()
    address = f"unix://{directory}/socket"
    with open(directory / "log", "wb") as log:
        daemon = subprocess.Popen(
            ["dockerd", "--data-root", str(directory / "root"), "--exec-root",
             str(directory / "exec"), "--pidfile", str(directory / "pid"), "-H", address],
            stdout=log, stderr=log)  # fmt: skip
    peer = Peer("docker", directory, ["/usr/bin/docker", "-H", address], {})
    try:
        for _ in range(100):
            done = subprocess.run([*peer.command, "info"], capture_output=True)
            if done.returncode == 0:
                break
            time.sleep(0.1)
        yield peer
    finally:
        daemon.terminate()
        daemon.wait()


def rows(peer: Peer, network: bool) -> Iterator[tuple[str, float]]:
    """One round of everything; every container is gone at the end."""
    image = "busybox"
    yield (
        "run --rm --network none true",
        peer.time("run", "--rm", "--network", "none", image, "true"),
    )
    if network:
        yield "run --rm true (bridge)", peer.time("run", "--rm", image, "true")
    peer("run", "-d", "--name", "bench", "--network", "none", image, "sleep", "1000")
    yield "exec true", peer.time("exec", "bench", "true")
    peer("stop", "-t", "0", "bench")
    yield "start", peer.time("start", "bench")
    peer("stop", "-t", "0", "bench")
    yield "rm", peer.time("rm", "bench")


def memory(peer: Peer, count: int, settle: float) -> float:
    """MB of anonymous memory for each of so many idle containers."""
    before = _anonymous(peer)
    for number in range(count):
        peer("run", "-d", "--name", f"idle-{number}", "--network", "none", "busybox", "sleep",
             "1000")  # fmt: skip
    time.sleep(settle)
    after = _anonymous(peer)
    for number in range(count):
        peer("rm", "-f", f"idle-{number}")
    return (after - before) / count / 1000


def _anonymous(peer: Peer) -> int:
    """Kilobytes in the processes that hold a peer's containers, and no one else's."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() not in HOLDERS[peer.name.split()[0]]:
                continue
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if os.fsencode(peer.directory) in told:
                for line in (process / "smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss_Anon:"):
                        total += int(line.split()[1])
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench --containers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--idle", type=int, default=5, help="containers to measure memory with")
    parser.add_argument(
        "--settle", type=float, default=SETTLE, help="seconds that they idle before it is measured"
    )
    parser.add_argument("--no-network", action="store_true", help="leave the bridge out")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program is compiled
    args = parser.parse_args([word for word in sys.argv[1:] if word != "--containers"])
    makers: list[Callable[[Path], contextlib.AbstractContextManager[Peer]]] = [
        lambda scratch: unionfuse(scratch, "fuse"),
        lambda scratch: unionfuse(scratch, "overlay"),
    ]
    makers += [podman] if shutil.which("podman") else []
    makers += [docker] if shutil.which("dockerd") else []
    scratch = Path(tempfile.mkdtemp(prefix="uf-"))
    times: dict[str, dict[str, list[float]]] = {}
    try:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(make(scratch)) for make in makers]
            image = _image(scratch)
            for peer in peers:
                peer("import", str(image), "busybox")
                peer("run", "--rm", "--network", "none", "busybox", "true")
            time.sleep(3)  # what a first run prepares for the next ones is ready then
            for number in range(args.rounds):
                print(f"round {number + 1}", file=sys.stderr, flush=True)
                for peer in peers:
                    for row, value in rows(peer, not args.no_network):
                        times.setdefault(row, {}).setdefault(peer.name, []).append(value)
            for peer in peers:
                value = memory(peer, args.idle, args.settle)
                times.setdefault("MB per idle container", {})[peer.name] = [value]
            names = [peer.name for peer in peers]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    medians = {
        row: {name: statistics.median(values) for name, values in of.items()}
        for row, of in times.items()
    }
    print(f"| ms, median of {args.rounds} | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for row, values in medians.items():
        cells = (f"{values[name]:.1f}" if name in values else "–" for name in names)
        print(f"| {row} | " + " | ".join(cells) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(medians, indent=1))
    return 0


def _image(scratch: Path) -> Path:
    """A tar with busybox and nothing else."""
    root = scratch / "image"
    for name in ("bin", "proc", "sys", "dev", "etc", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin")
    for name in ("true", "sleep", "sh"):
        (root / "bin" / name).symlink_to("busybox")
    file = scratch / "image.tar"
    subprocess.run(["tar", "-C", str(root), "--numeric-owner", "-cf", str(file), "."], check=True)
    return file


if __name__ == "__main__":
    sys.exit(main())
