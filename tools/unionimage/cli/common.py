"""What several verbs need: the store they were told to use, and docker's way to write things."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from typing import TYPE_CHECKING, BinaryIO

from unionimage.changeset.limits import Limits
from unionimage.config import DEDUPE
from unionimage.errors import UserError
from unionimage.store import Store

if TYPE_CHECKING:
    from unionimage.reference import Reference
    from unionimage.store import Image

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def open_store(args: argparse.Namespace) -> Store:
    """The store of `--root`, UNIONFUSE_ROOT, the configuration or the default."""
    return Store.open(args.root)


def named(store: Store, text: str, image: Image) -> Reference | None:
    """The name of an image that a user meant; None where it was an id or a digest."""
    try:
        reference = store.reference(text).with_default_tag()
    except UserError:
        return None
    if reference in image.names:
        return reference
    local = f"localhost/{reference.familiar}"
    return next((one for one in image.names if one.familiar == local), None)


def human_size(size: float) -> str:
    """Docker's decimal sizes with three digits: `187.8MB` is `188MB`, `1.24kB`."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{size:.3g}{_UNITS[unit]}" if size < 999.5 else f"{size:.0f}{_UNITS[unit]}"


def human_duration(seconds: float) -> str:
    """Docker's `units.HumanDuration`: `About an hour`, `2 weeks`."""
    seconds = int(seconds)
    minutes, hours = seconds // 60, round(seconds / 3600)
    if seconds < 1:
        return "Less than a second"
    if seconds == 1:
        return "1 second"
    if seconds < 60:
        return f"{seconds} seconds"
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{hours // 24 // 365} years"


def human_ago(when: float | None) -> str:
    """`2 weeks ago`; `N/A` where the time is not known."""
    return "N/A" if when is None else human_duration(max(0.0, time.time() - when)) + " ago"


def local_time(when: float | None) -> str:
    """`2026-01-31 12:00:00 +0000 UTC`, docker's CreatedAt; `N/A` where the time is not known."""
    if when is None:
        return "N/A"
    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(when))


def parse_time(text: str) -> float | None:
    """RFC 3339 (up to nanoseconds) → seconds since the epoch; None where it is empty or bad."""
    from datetime import datetime

    text = text.replace("Z", "+00:00")
    head, dot, rest = text.partition(".")
    if dot:
        digits = len(rest) - len(rest.lstrip("0123456789"))
        text = f"{head}.{rest[: min(digits, 6)].ljust(6, '0')}{rest[digits:]}"
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def format_time(seconds: float) -> str:
    """Seconds since the epoch → RFC 3339 in UTC, as image configs have it."""
    whole, rest = divmod(int(seconds * 1e6), 10**6)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{rest:06}Z"


def source_date_epoch() -> int | None:
    """SOURCE_DATE_EPOCH in seconds; None where it is not set. Raises UserError."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    if not text.isdigit():
        raise UserError(f"SOURCE_DATE_EPOCH={text!r} is not a number of seconds")
    return int(text)


def binary_output(path: str | None) -> BinaryIO:
    """The file of `-o`, or standard output unless that is a terminal."""
    if path is not None and path != "-":
        return open(path, "wb")
    if sys.stdout.isatty():
        raise UserError("refusing to write an archive to a terminal; use -o FILE or a pipe")
    sys.stdout.flush()
    return os.fdopen(os.dup(1), "wb")


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about layers that come in: what one may cost, and sharing of files."""
    parser.add_argument(
        "--max-layer-size",
        type=parse_size,
        metavar="SIZE",
        help="refuse layers that unpack to more",
    )
    parser.add_argument(
        "--max-layer-entries", type=int, metavar="N", help="refuse layers of more files"
    )
    parser.add_argument(
        "--dedupe",
        choices=DEDUPE,
        help="store files that other layers have once (default: reflink, where that can be)",
    )


def take_layer_options(args: argparse.Namespace, store: Store) -> None:
    """Let the options of `add_layer_options` overrule the configuration."""
    known = store.limits
    store.limits = Limits(
        args.max_layer_size or known.size, args.max_layer_entries or known.entries
    )
    store.dedupe = args.dedupe or store.dedupe


def parse_size(text: str) -> int:
    """`500m`, `2GB`, `1.5g`, `4096` → bytes, in powers of 1024 as docker's -m."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)(?:i?b)?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (500m, 2g)")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
