"""The command line of the benchmark: see `scripts/bench --help`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmark import report, trees, workloads
from benchmark.peers import PEERS, Peer, lookup_index, mounted
from benchmark.report import Results, Row

_URING = Path("/sys/module/fuse/parameters/enable_uring")


def main() -> int:
    if "--containers" in sys.argv:
        from benchmark import containers

        return containers.main()
    args = _arguments()
    cache = Path(args.cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    peers = [PEERS[name] for name in args.peers.split(",")]
    for peer in [peer for peer in peers if not peer.installed]:
        print(f"{peer.name} is not installed: left out", file=sys.stderr)
        peers.remove(peer)
    results = Results()
    with _uring(any("uring" in peer.name for peer in peers)):
        measure(args, cache, peers, results)
        times = mount_times(cache, args.mount_times, peers, args.rounds) if args.mount_times else {}
    write(args, results, times)
    return 0


def measure(args: argparse.Namespace, cache: Path, peers: list[Peer], results: Results) -> None:
    """Every round asks every peer in turn, so that a busy minute of the machine hits all alike."""
    tools = workloads.Tools(cache, trees.source_archive(cache), args.quick)
    big = (64 if args.quick else 1024) << 20
    scratch = cache / "mounts"
    for layers in args.layers:
        tree = trees.make(cache, layers, args.files, big)
        if any(peer.indexed for peer in peers):
            lookup_index(tree)
        trees.protect(tree)
        sessions = list(workloads.READING)
        if layers == args.layers[min(1, len(args.layers) - 1)]:
            sessions += workloads.WRITING
            if args.disk_cold:
                sessions.append(workloads.disk_cold)
        if args.only:
            sessions = [s for s in sessions if s.__name__ in args.only.split(",")]
        for pinned in args.pinned:
            for round_number in range(args.rounds):
                print(f"{layers} layers, pinned {pinned}, round {round_number + 1}", flush=True)
                for session in sessions:
                    for peer in peers:
                        one(results, session, peer, tree, scratch, pinned, tools)


def one(
    results: Results,
    session: workloads.Session,
    peer: Peer,
    tree: trees.Tree,
    scratch: Path,
    pinned: bool,
    tools: workloads.Tools,
) -> None:
    """One session of one peer. The plain directory is only read."""
    if peer.command is None and session in workloads.WRITING:
        return
    subprocess.run(["sync"], check=True)
    with mounted(peer, tree, scratch, pinned) as mount:
        for name, value in session(mount, peer, tools):
            results.add(Row(tree.layers, pinned, name), peer.name, value)
    results.add_memory(tree.layers, peer.name, mount.memory)
    if mount.requests:
        results.requests[tree.layers, session.__name__, peer.name] = mount.requests


def mount_times(
    cache: Path, counts: list[int], peers: list[Peer], rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds from the command to a mount that has answered, for an indexed layer of N files."""
    times: dict[str, dict[str, float]] = {}
    for count in counts:
        layer = trees.many_files(cache, count)
        index = cache / f"many-{count}.index"
        command = [sys.executable, "-c", "import sys; from unionimage.cli import main; main()"]
        if not index.exists():
            subprocess.run([*command, "index", "build", "-o", str(index), str(layer)], check=True)
        samples = []
        mountpoint = cache / "mounts" / "mnt"
        mountpoint.mkdir(parents=True, exist_ok=True)
        program = str(Path(sys.executable).with_name("unionfuse"))
        for _ in range(max(rounds, 3)):
            line = f"lowerdir={layer},lookup_index={index}"
            start = time.perf_counter()
            subprocess.run([program, "-o", line, mountpoint], check=True)
            os.stat(mountpoint)
            samples.append(time.perf_counter() - start)
            subprocess.run([program, "umount", mountpoint], check=True)
        times[f"mount of {count} files, indexed"] = {"unionfuse": statistics.median(samples)}
    return times


def write(args: argparse.Namespace, results: Results, times: dict[str, dict[str, float]]) -> None:
    measured = {peer for cells in results.cells.values() for peer in cells}
    ours = "unionfuse+index" if "unionfuse+index" in measured else "unionfuse"
    text = report.tables(results, ours)
    for name, values in times.items():
        text += f"\n{name}: " + ", ".join(f"{k} {v:.3f} s" for k, v in values.items()) + "\n"
    losing = report.behind(results, ours)
    text += f"\n{ours} is behind a FUSE peer in: " + ("; ".join(losing) or "nothing") + "\n"
    print("\n" + text)
    machine = {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": "scripts/bench " + " ".join(sys.argv[1:]),
    }
    document = {"machine": machine, **results.as_json(), "mount_times": times}
    Path(args.json).write_text(json.dumps(document, indent=1) + "\n")
    picture = report.plot(results, "lookup miss, cold")
    if picture and len(args.layers) > 1:
        Path(args.plot).write_text(picture)
    print(f"{args.json} has every sample")


@contextmanager
def _uring(wanted: bool) -> Iterator[None]:
    """Let the kernel offer io_uring for the time of the run; put the setting back."""
    if not wanted or not _URING.exists():
        yield
        return
    before = _URING.read_text().strip()
    _URING.write_text("Y")
    try:
        yield
    finally:
        _URING.write_text(before)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    usual = [name for name in PEERS if name not in ("unionfuse+uring", "unionfuse-pyfuse3")]
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer and smaller")
    parser.add_argument("--layers", type=_numbers, help="default: 1,10,40,100; quick: 1,10")
    parser.add_argument("--files", type=int, help="in each tree; default: 50000; quick: 5000")
    parser.add_argument("--rounds", type=int, help="default: 10; quick: 3")
    parser.add_argument("--pinned", choices=("yes", "no", "both"), default="both")
    parser.add_argument(
        "--peers",
        default=",".join(usual),
        help="out of "
        + ", ".join(PEERS)
        + "\n(default: all but unionfuse+uring and unionfuse-pyfuse3)",
    )
    parser.add_argument(
        "--only", help="sessions out of lookups,walks,listings,reads,writes,changes"
    )
    parser.add_argument("--disk-cold", action="store_true", help="also with the disk cache dropped")
    parser.add_argument(
        "--mount-times", type=_numbers, help="also mount an index of N files, e.g. 100,1000000"
    )
    parser.add_argument("--cache", default=".cache/bench", help="where the trees are kept")
    parser.add_argument("--json", default="bench-results.json")
    parser.add_argument("--plot", default="docs/lookup-cost.svg")
    args = parser.parse_args()
    args.layers = args.layers or ([1, 10] if args.quick else [1, 10, 40, 100])
    args.files = args.files or (5_000 if args.quick else 50_000)
    args.rounds = args.rounds or (3 if args.quick else 10)
    args.pinned = {"yes": [True], "no": [False], "both": [True, False]}[args.pinned]
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
