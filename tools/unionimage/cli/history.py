"""`unionfuse history`: the steps that made an image."""

from __future__ import annotations

import argparse

from unionimage.cli.common import human_ago, human_size, open_store, parse_time
from unionimage.cli.format import add_format_options, show

EXAMPLE = """
unionfuse history debian:12
unionfuse history --steps --no-trunc app
"""

_WIDTH = 45  # docker's, for CREATED BY


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-trunc", action="store_true", help="whole ids and commands")
    parser.add_argument("-q", "--quiet", action="store_true", help="ids only")
    parser.add_argument(
        "--steps",
        action="store_true",
        help="number them, 1 the oldest: 'mount IMAGE@STEP' takes it",
    )
    parser.add_argument(
        "-H",
        "--human",
        nargs="?",
        const="true",
        default="true",
        choices=("true", "false"),
        help="sizes and dates for people (the default); --human=false for machines",
    )
    add_format_options(parser)
    parser.add_argument("image", metavar="IMAGE", help="a name or id")


def run(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        image = store.image(args.image)
        steps = list(enumerate(image.steps(), 1))
    human = args.human == "true"
    rows = []
    for number, (step, layer) in reversed(steps):
        created = parse_time(step.created)
        text = step.created_by.replace("\t", " ").replace("\n", " ")
        if not args.no_trunc and len(text) > _WIDTH:
            text = text[: _WIDTH - 1] + "…"
        identity = image.id if args.no_trunc else image.id.short
        size = layer.size if layer else 0
        rows.append(
            {
                "Step": str(number),
                "ID": identity if number == len(steps) else "<missing>",
                "CreatedSince": human_ago(created) if human else step.created or "N/A",
                "CreatedAt": step.created or "N/A",
                "CreatedBy": text,
                "Size": human_size(size) if human else str(size),
                "Comment": step.comment,
                "Layer": layer.diff_id if layer else "",
            }
        )
    if args.quiet:
        for row in rows:
            print(row["ID"])
        return 0
    columns = {"Step": "STEP"} if args.steps else {}
    columns |= {
        "ID": "IMAGE",
        "CreatedSince": "CREATED" if human else "CREATED AT",
        "CreatedBy": "CREATED BY",
        "Size": "SIZE",
        "Comment": "COMMENT",
    }
    show(rows, columns, args.format)
    return 0
