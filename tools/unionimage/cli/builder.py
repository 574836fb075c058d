"""`unionfuse builder`: the build cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unionimage.cli.common import human_size, open_store, parse_size, parse_time
from unionimage.cli.format import add_filter_option, filters
from unionimage.cli.parser import add_grouped

if TYPE_CHECKING:
    from unionimage.dockerfile.records import Record

EXAMPLE = """unionfuse builder prune -f
unionfuse builder prune -a -f --keep-storage 2g"""

FILTERS = ("id", "shared", "type", "until")


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "give up cached steps that no image has, and cache mounts"
    prune = verbs.add_parser("prune", help=what, description=what)
    prune.add_argument("-a", "--all", action="store_true", help="also steps that images have")
    prune.add_argument("-f", "--force", action="store_true", help="do not ask")
    prune.add_argument(
        "--keep-storage",
        type=parse_size,
        default=0,
        metavar="SIZE",
        help="keep the newest of this size together (500m, 2g)",
    )
    add_filter_option(prune, FILTERS)
    add_grouped(verbs, "builder")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import confirm
    from unionimage.cli.moments import nanoseconds
    from unionimage.dockerfile.records import give_up, records

    chosen = filters(args.filter, FILTERS)
    until = [nanoseconds(value, "until=") for value in chosen.pop("until", [])]
    what = "all of the build cache" if args.all else "cached steps that no image has"
    if not args.force and not confirm(f"This removes {what}."):
        return 1
    with open_store(args) as store, store.lease("prune"):
        wanted = [
            record
            for record in _beyond(records(store), args.keep_storage)
            if (args.all or not record.shared) and _matches(record, chosen, until)
        ]
        give_up(store, wanted)
        # The layers of steps are in the store; cache mounts are not, and gone already.
        freed = store.collect().size
    freed += sum(record.size for record in wanted if record.type != "regular")
    if wanted:
        print("Deleted build cache objects:")
        print("\n".join(record.id for record in wanted) + "\n")
    print(f"Total reclaimed space: {human_size(freed)}")
    return 0


def _beyond(oldest_first: Sequence[Record], keep: int) -> list[Record]:
    """Those that do not fit into `keep` bytes, filled from the newest on."""
    kept = size = 0
    for record in reversed(oldest_first):
        size += 0 if record.shared else record.size
        if not keep or size > keep:
            break
        kept += 1
    return list(oldest_first[: len(oldest_first) - kept])


def _matches(record: Record, chosen: dict[str, list[str]], until: Sequence[int]) -> bool:
    said = {"id": record.id, "type": record.type, "shared": str(record.shared).lower()}
    made = (parse_time(record.created) or 0) * 1_000_000_000
    return all(made <= moment for moment in until) and all(
        any(said[key].startswith(value) for value in values) for key, values in chosen.items()
    )
