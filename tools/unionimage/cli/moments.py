"""Times on the command line: `2026-11-23T12:00:00Z`, a Unix time, or `10m` ago."""

from __future__ import annotations

import re
import time

from unionimage.errors import UserError


def nanoseconds(text: str, option: str) -> int:
    """A moment in nanoseconds since the epoch. Raises UserError."""
    from unionimage.cli.common import parse_time
    from unionimage.container.create import duration

    try:
        return int(float(text) * 1_000_000_000)
    except (ValueError, OverflowError):  # "inf" is a float
        pass
    fraction = re.search(r"\.(\d{1,9})\d*", text)  # to the nanosecond, which a float cannot hold
    moment = parse_time(text.replace(fraction.group(0), "") if fraction else text)
    if moment is not None:
        return int(moment) * 1_000_000_000 + int(fraction.group(1).ljust(9, "0") if fraction else 0)
    try:
        return time.time_ns() - duration(text, option)
    except UserError:
        raise UserError(
            f"{option} {text!r}: write a time as 2026-01-31T12:00:00Z, a Unix time or 10m"
        ) from None
