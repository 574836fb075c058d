"""`unionfuse events`: what happens to containers, as it happens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from unionimage.cli.format import add_filter_option, add_json_option

EXAMPLE = """unionfuse events
unionfuse events --since 10m --until 0s --filter event=die"""

FILTERS = ("container", "event", "image", "label", "type")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", metavar="TIME", help="show earlier ones too")
    parser.add_argument("--until", metavar="TIME", help="end then")
    add_filter_option(parser, FILTERS, "-f")
    parser.add_argument("--format", metavar="TEMPLATE", help="json, or a template")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.cli.format import filters, unescape
    from unionimage.cli.moments import nanoseconds

    wanted = filters(args.filter, FILTERS)
    since = nanoseconds(args.since, "--since") if args.since else None
    until = nanoseconds(args.until, "--until") if args.until else None
    template = None
    if args.format and args.format != "json":
        from unionimage.cli.template import Template

        template = Template(unescape(args.format))
    engine = open_engine(args)
    for event in engine.events.read(since, until):
        if not _passes(event, wanted):
            continue
        if template is not None:
            print(template.render(_fields(event)))
        else:
            print(_line(event) if args.format is None else _json(event))
        sys.stdout.flush()
    return 0


def _passes(event: dict[str, Any], wanted: dict[str, list[str]]) -> bool:
    from unionimage.labels import has_labels

    actor = event["Actor"]
    attributes = actor["Attributes"]
    for key, values in wanted.items():
        match key:
            case "container":
                good = any(
                    value == attributes.get("name") or actor["ID"].startswith(value)
                    for value in values
                )
            case "event":
                good = any(event["Action"].partition(":")[0] == value for value in values)
            case "label":
                good = has_labels(attributes, values)
            case "type":
                good = event["Type"] in values
            case _:
                good = attributes.get(key) in values
        if not good:
            return False
    return True


def _fields(event: dict[str, Any]) -> dict[str, Any]:
    actor = event["Actor"]
    old = {"ID": actor["ID"], "Status": event["Action"], "From": actor["Attributes"].get("image")}
    return event | old | {"Time": event["time"], "TimeNano": event["timeNano"]}


def _json(event: dict[str, Any]) -> str:
    from unionimage.json_object import json_line

    return json_line(event)


def _line(event: dict[str, Any]) -> str:
    from unionimage.container.state import timestamp

    actor = event["Actor"]
    shown = ", ".join(f"{key}={value}" for key, value in sorted(actor["Attributes"].items()))
    when = timestamp(event["timeNano"])
    return f"{when} {event['Type']} {event['Action']} {actor['ID']} ({shown})"
