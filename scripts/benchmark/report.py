"""From samples to medians, intervals and ratios; as a table, as JSON, as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

FUSE_PEERS = ("fuse-overlayfs", "unionfs-fuse", "mergerfs")


@dataclass
class Cell:
    """All samples of one workload on one peer."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true median lies with a confidence of 95 %, by order statistics alone.

        With fewer than six samples there is no such interval: the extremes are given.
        """
        ordered = sorted(self.samples)
        count = len(ordered)
        rank = 0
        probability = 0.0
        while rank < count // 2:
            probability += math.comb(count, rank) / 2**count
            if probability > 0.025:
                break
            rank += 1
        rank = max(rank - 1, 0)
        return ordered[rank], ordered[-1 - rank]


@dataclass(frozen=True, order=True)
class Row:
    """A workload under fixed circumstances."""

    layers: int
    pinned: bool
    workload: str

    def __str__(self) -> str:
        return f"{self.workload}"


class Results:
    """Samples by row and peer, in the order in which they first came."""

    def __init__(self) -> None:
        self.cells: dict[Row, dict[str, Cell]] = {}
        self.memory: dict[tuple[int, str], dict[str, int]] = {}  # KiB, by layers and peer
        self.requests: dict[tuple[int, str, str], dict[str, int]] = {}  # layers, session, peer

    def add(self, row: Row, peer: str, value: float) -> None:
        self.cells.setdefault(row, {}).setdefault(peer, Cell()).samples.append(value)

    def add_memory(self, layers: int, peer: str, memory: Mapping[str, int]) -> None:
        kept = self.memory.setdefault((layers, peer), {})
        for name, value in memory.items():
            kept[name] = max(value, kept.get(name, 0))

    def as_json(self) -> dict[str, object]:
        rows = []
        for row, peers in self.cells.items():
            for peer, cell in peers.items():
                low, high = cell.interval
                rows.append(
                    {
                        "workload": row.workload,
                        "layers": row.layers,
                        "pinned": row.pinned,
                        "peer": peer,
                        "median": cell.median,
                        "low": low,
                        "high": high,
                        "samples": cell.samples,
                    }
                )
        memory = [
            {"layers": layers, "peer": peer, **values}
            for (layers, peer), values in self.memory.items()
        ]
        requests = [
            {"layers": layers, "session": session, "peer": peer, "requests": counts}
            for (layers, session, peer), counts in self.requests.items()
        ]
        return {"rows": rows, "memory_kib": memory, "requests": requests}


def tables(results: Results, ours: str = "unionfuse") -> str:
    """One table for each number of layers and each way of using the CPUs."""
    groups: dict[tuple[int, bool], list[Row]] = {}
    for row in results.cells:
        groups.setdefault((row.layers, row.pinned), []).append(row)
    text = []
    for (layers, pinned), rows in sorted(groups.items()):
        peers = list(dict.fromkeys(peer for row in rows for peer in results.cells[row]))
        head = ["workload", *peers, "best FUSE peer / " + ours, ours + " / overlayfs"]
        body = [[str(row), *_line(results.cells[row], peers, ours)] for row in rows]
        how = "daemon and client on one CPU" if pinned else "not pinned"
        text.append(f"{layers} layers, {how} (medians; lookups in µs each, others in seconds)\n")
        text.append(markdown(head, body) + "\n")
    if results.requests:
        text.append("Requests of one mount by opcode, which depend on no machine\n")
        text.append(_requests(results) + "\n")
    if results.memory:
        rows_of_memory = [
            [str(layers), peer, *(f"{values.get(n, 0) / 1024:.0f}" for n in ("VmHWM", "RssAnon"))]
            for (layers, peer), values in sorted(results.memory.items())
        ]
        text.append("Memory of the daemon, MiB\n")
        text.append(markdown(["layers", "peer", "peak", "anonymous"], rows_of_memory) + "\n")
    return "\n".join(text)


def _requests(results: Results) -> str:
    """For each session how many requests of each kind the kernel sent, the most frequent first."""
    body = []
    for (layers, session, peer), counts in results.requests.items():
        most = sorted(counts.items(), key=lambda count: -count[1])
        told = " ".join(f"{name}={number}" for name, number in most if number)
        body.append([f"{session}, {layers} layers", peer, told])
    return markdown(["session", "peer", "requests"], body)


def verdict(results: Results, ours: str) -> str:
    """The geometric mean of the lookups against the best peer in each, and every row behind one."""
    text = []
    for pinned in sorted({row.pinned for row in results.cells}):
        ratios = [
            ratio
            for row, peers in results.cells.items()
            if row.pinned == pinned and "lookup" in row.workload
            if (ratio := _ahead(peers, ours)) is not None
        ]
        if ratios:
            how = "pinned" if pinned else "not pinned"
            mean = statistics.geometric_mean(ratios)
            text.append(f"Lookups, {how}: {mean:.2f} times the best FUSE peer (geometric mean)")
    losing = behind(results, ours)
    text.append(f"{ours} is behind a FUSE peer in: " + ("; ".join(losing) or "nothing"))
    return "\n\n".join(text)


def behind(results: Results, ours: str) -> list[str]:
    """The rows in which a FUSE peer is ahead of us, with the ratio.

    "~" is said where the intervals of the two medians overlap: the samples do not decide.
    """
    found = []
    for row, peers in results.cells.items():
        ratio = _ahead(peers, ours)
        if ratio is not None and ratio < 1.0:
            best = _best(peers)
            sure = peers[best].interval[1] < peers[ours].interval[0]
            pinned = ", pinned" if row.pinned else ""
            about = "" if sure else "~"
            found.append(
                f"{row.workload} ({row.layers} layers{pinned}): {about}{ratio:.2f} of {best}"
            )
    return found


def _best(peers: Mapping[str, Cell]) -> str:
    return min((name for name in peers if name in FUSE_PEERS), key=lambda name: peers[name].median)


def _ahead(peers: Mapping[str, Cell], ours: str) -> float | None:
    """How many times faster than the best FUSE peer we are; None without any."""
    if ours not in peers or not any(name in FUSE_PEERS for name in peers):
        return None
    return peers[_best(peers)].median / peers[ours].median


def _line(peers: Mapping[str, Cell], names: Sequence[str], ours: str) -> list[str]:
    line = [_number(peers[name].median) if name in peers else "-" for name in names]
    ratio = _ahead(peers, ours)
    line.append("-" if ratio is None else f"{ratio:.2f}")
    kernel = peers.get("overlayfs")
    line.append(f"{peers[ours].median / kernel.median:.2f}" if kernel and ours in peers else "-")
    return line


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; the first column is words, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if position == 0 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


# --- the plot: cost of one lookup against the number of layers ------------------------------

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 400, 60, 50, 40, 170
_COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#525252", "#be123c", "#a16207")


def plot(results: Results, workload: str) -> str:
    """An SVG picture, both axes logarithmic; the CPUs pinned where that was measured."""
    pinned = any(row.pinned for row in results.cells)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row, peers in sorted(results.cells.items()):
        if row.workload == workload and row.pinned == pinned:
            for peer, cell in peers.items():
                lines.setdefault(peer, []).append((row.layers, cell.median))
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    across = _Scale([x for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    upward = _Scale([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    how = "daemon and client on one CPU" if pinned else "CPUs not pinned"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(workload)}: µs each ({how})</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}">number of layers</text>',
    ]
    for layers in sorted({x for x, _ in points}):
        x, y = across(layers), float(_HEIGHT - _BOTTOM)
        parts.append(f'<line x1="{x:.0f}" y1="{_TOP}" x2="{x:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{layers:g}</text>')
    for tick in upward.ticks():
        y = upward(tick)
        end = _WIDTH - _RIGHT
        parts.append(f'<line x1="{_LEFT}" y1="{y:.0f}" x2="{end}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{tick:g}</text>')
    ends = sorted(lines, key=lambda peer: -lines[peer][-1][1])
    label = float(_TOP)
    for number, line in enumerate(lines.values()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{across(x):.1f},{upward(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{upward(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in line
        ]
    for peer in ends:
        colour = _COLOURS[list(lines).index(peer) % len(_COLOURS)]
        label = max(label + 16, upward(lines[peer][-1][1]) + 4)
        x = _WIDTH - _RIGHT + 12
        parts.append(f'<text x="{x}" y="{label:.0f}" fill="{colour}">{escape(peer)}</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Scale:
    """Values to positions, logarithmic."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.low, self.high = self.low / 2, self.high * 2
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2, 5, 10, 20 … inside the range."""
        first = math.floor(math.log10(self.low))
        candidates = [m * 10.0**e for e in range(first, first + 8) for m in (1, 2, 5)]
        return [tick for tick in candidates if self.low <= tick <= self.high]
