"""The command line of the benchmark: see `scripts/bench --help`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmark import report, scale, trees, workloads
from benchmark.peers import PEERS, CannotMount, Peer, lookup_index, mounted
from benchmark.report import Results, Row

_UNUSUAL = ("unionfuse+uring", "unionfuse-pyfuse3", "C floor")
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
        sizes = [scale.measure(cache, count, args.rounds) for count in args.scale]
    write(args, results, sizes)
    return 0


def measure(args: argparse.Namespace, cache: Path, peers: list[Peer], results: Results) -> None:
    """Every round asks every peer in turn, so that a busy minute of the machine hits all alike."""
    tools = workloads.Tools(cache, args.quick)
    big = (64 if args.quick else 1024) << 20
    scratch = cache / "mounts"
    for layers in args.layers:
        able = list(peers)
        tree = trees.make(cache, layers, args.files, big)
        sessions = chosen_sessions(args, layers)
        places = dict.fromkeys(sessions, tree)
        if workloads.installing in sessions:
            places[workloads.installing] = trees.debian(cache, layers)
        for place in set(places.values()):
            if any(peer.indexed for peer in peers):
                lookup_index(place)
            trees.protect(place)
        for pinned in args.pinned:
            for round_number in range(args.rounds):
                print(f"{layers} layers, pinned {pinned}, round {round_number + 1}", flush=True)
                for session, place in places.items():
                    for peer in list(able):
                        try:
                            one(results, session, peer, place, scratch, pinned, tools)
                        except CannotMount as failure:
                            able.remove(peer)
                            _leave_out(peer, layers, failure)


def _leave_out(peer: Peer, layers: int, failure: CannotMount) -> None:
    if peer.name.startswith("unionfuse"):
        raise failure
    print(f"{peer.name} cannot mount {layers} layers: left out ({failure})", file=sys.stderr)


def chosen_sessions(args: argparse.Namespace, layers: int) -> list[workloads.Session]:
    """What is measured at this number of layers: changes only at one, since they take longest."""
    sessions = list(workloads.READING)
    if layers == args.layers[min(1, len(args.layers) - 1)]:
        sessions += workloads.WRITING
        if args.disk_cold:
            sessions.append(workloads.disk_cold)
    if args.only:
        sessions = [session for session in sessions if session.__name__ in args.only.split(",")]
    return sessions


def one(
    results: Results,
    session: workloads.Session,
    peer: Peer,
    tree: trees.Tree,
    scratch: Path,
    pinned: bool,
    tools: workloads.Tools,
) -> None:
    """One session of one peer, unless it cannot do that; the plain directory is only read."""
    if peer.command is None and session in workloads.WRITING:
        return
    if not peer.answers and session is not workloads.lookups:
        return
    if not peer.copies_up and session in workloads.CHANGING:
        return
    subprocess.run(["sync"], check=True)
    with mounted(peer, tree, scratch, pinned) as mount:
        for name, value in session(mount, peer, tools):
            results.add(Row(tree.layers, pinned, name), peer.name, value)
    results.add_memory(tree.layers, peer.name, mount.memory)
    if mount.requests:
        results.requests[tree.layers, session.__name__, peer.name] = mount.requests


def write(args: argparse.Namespace, results: Results, sizes: list[scale.Size]) -> None:
    measured = {peer for cells in results.cells.values() for peer in cells}
    ours = "unionfuse+index" if "unionfuse+index" in measured else "unionfuse"
    text = report.tables(results, ours)
    if sizes:
        text += "\n" + scale.table(sizes) + "\n"
    if results.cells:
        text += "\n" + report.verdict(results, ours) + "\n"
    print("\n" + text)
    machine = {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": "scripts/bench " + " ".join(sys.argv[1:]),
    }
    document = {"machine": machine, **results.as_json(), "sizes": [vars(size) for size in sizes]}
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
    usual = [name for name in PEERS if name not in _UNUSUAL]
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer and smaller")
    parser.add_argument("--layers", type=_numbers, help="default: 1,10,40,100; quick: 1,10")
    parser.add_argument("--files", type=int, help="in each tree; default: 50000; quick: 5000")
    parser.add_argument("--rounds", type=int, help="default: 10; quick: 3")
    parser.add_argument("--pinned", choices=("yes", "no", "both"), default="both")
    parser.add_argument(
        "--peers",
        default=",".join(usual),
        help="out of " + ", ".join(PEERS) + f"\n(default: all but {', '.join(_UNUSUAL)})",
    )
    sessions = ",".join(session.__name__ for session in workloads.SESSIONS)
    parser.add_argument("--only", metavar="SESSION,…", help=f"out of {sessions}")
    parser.add_argument("--disk-cold", action="store_true", help="also with the disk cache dropped")
    parser.add_argument(
        "--scale",
        type=_numbers,
        default=[],
        metavar="N,…",
        help="also mount an index of N files: the time, and the daemon's memory",
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
