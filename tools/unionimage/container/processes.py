"""Signals by name, and telling a process from another that got its pid."""

from __future__ import annotations

import signal

from unionimage.errors import UserError


def signal_number(text: str | int | None) -> int:
    """`KILL`, `SIGKILL`, `9`, `RTMIN+3`; SIGTERM for nothing. Raises UserError."""
    if not text:
        return signal.SIGTERM
    name = str(text).upper().removeprefix("SIG")
    if name.isdigit() and 0 < int(name) < 65:
        return int(name)
    base, plus, offset = name.partition("+")
    try:
        return int(signal.Signals[f"SIG{base}"]) + (int(offset) if plus else 0)
    except (KeyError, ValueError):
        raise UserError(f"invalid signal: {text}") from None


def started_by(pid: int, start: int | None) -> bool:
    """True if that pid is still the process that had this start time."""
    return bool(pid) and start is not None and start_time(pid) == start


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which a process began; tells a pid from its reuse."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b") ")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
