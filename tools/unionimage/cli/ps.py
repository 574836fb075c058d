"""`unionfuse ps`: the containers, and what became of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from unionimage.cli.format import add_filter_option, add_format_options
from unionimage.labels import LabelText

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine
    from unionimage.container.state import Container

EXAMPLE = """unionfuse ps -a
unionfuse ps -q --filter status=exited
unionfuse ps --format '{{.Names}}: {{.Status}}'"""

COLUMNS = {
    "ID": "CONTAINER ID",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "RunningFor": "CREATED",
    "Status": "STATUS",
    "Ports": "PORTS",
    "Names": "NAMES",
}
STATUSES = ("created", "restarting", "running", "removing", "paused", "exited", "dead")


def configure(parser: argparse.ArgumentParser) -> None:
    from unionimage.container import describe

    add = parser.add_argument
    add("-a", "--all", action="store_true", help="those that do not run too")
    add("-q", "--quiet", action="store_true", help="ids only")
    add_filter_option(parser, describe.FILTERS, "-f")
    add("-n", "--last", type=int, metavar="N", help="the N youngest, running or not")
    add("-l", "--latest", action="store_true", help="the youngest, running or not")
    add("-s", "--size", action="store_true", help="the size of their own layer")
    add("--no-trunc", action="store_true", help="ids and commands in full")
    add_format_options(parser)


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.cli.format import filters, show
    from unionimage.container import describe
    from unionimage.errors import UserError

    engine = open_engine(args)
    wanted = filters(args.filter, describe.FILTERS)
    for status in wanted.get("status", ()):
        if status not in STATUSES:
            raise UserError(f"invalid filter status={status}; there are: {', '.join(STATUSES)}")
    found = describe.select(engine.all(), wanted, engine.containers)
    limit = 1 if args.latest else args.last
    if limit is not None:
        found = found[:limit]
    elif not args.all and "status" not in wanted and "exited" not in wanted:
        found = [one for one in found if one.state()["Status"] in RUNNING]
    if args.quiet and args.format is None:
        for container in found:
            print(container.id if args.no_trunc else container.id[:12])
        return 0
    asked = args.size or any(word in (args.format or "") for word in (".Size", "json"))
    sizes = iter(_sizes(engine, found) if asked else [])
    rows = [row_of(container, args.no_trunc, next(sizes, None)) for container in found]
    columns = COLUMNS | ({"Size": "SIZE"} if args.size else {})
    show(rows, columns, args.format)
    return 0


RUNNING = ("running", "paused", "restarting")


def _sizes(engine: Engine, found: list[Container]) -> list[str]:
    """`2B (virtual 1.98MB)`: what each has written, and that with its image."""
    from unionimage.cli.common import human_size
    from unionimage.container import describe

    own = [describe.writable_size(container) for container in found]
    with engine.open_store() as store:
        images = {str(one.record["Image"]) for one in found}
        below = {image: store.image(image).size for image in images}
    return [
        f"{human_size(size)} (virtual {human_size(size + below[str(one.record['Image'])])})"
        for one, size in zip(found, own, strict=True)
    ]


def row_of(container: Container, full: bool, size: str | None) -> dict[str, Any]:
    """One line, with docker's field names."""
    from unionimage.cli.common import human_duration, local_time, parse_time
    from unionimage.container import create, describe

    command = create.command_line(container.record)
    image = str(container.config["Image"])
    age = human_duration(describe.seconds_since(str(container.record["Created"])))
    points = container.record["Mounts"]
    places = [str(point.get("Name") or point["Source"]) for point in points]  # a tmpfs has none
    row = {
        "ID": container.id if full else container.id[:12],
        "Image": image,
        "Command": f'"{_shortened(command, full, 20)}"',
        "CreatedAt": local_time(parse_time(str(container.record["Created"]))),
        "RunningFor": f"{age} ago",
        "Status": status_text(container),
        "State": container.state()["Status"],
        "Ports": describe.ports_text(container),
        "Names": container.name,
        "Labels": LabelText(container.config.get("Labels")),
        "Mounts": ",".join(_shortened(name, full) for name in places if name),
        "Networks": ",".join(container.record["Networks"]) or str(container.record["NetworkMode"]),
        "LocalVolumes": str(sum(point["Type"] == "volume" for point in points)),
    }
    return row if size is None else row | {"Size": size}


def _shortened(text: str, full: bool, width: int = 15) -> str:
    return text if full or len(text) <= width else text[: width - 1] + "…"


def status_text(container: Container) -> str:
    """`Up 3 minutes (healthy)`, `Exited (0) 2 hours ago`."""
    from unionimage.cli.common import human_duration
    from unionimage.container.describe import seconds_since

    state = container.state()
    status = str(state["Status"])
    if status in ("running", "paused"):
        text = f"Up {human_duration(seconds_since(state['StartedAt']))}"
        if status == "paused":
            return f"{text} (Paused)"
        health = (state.get("Health") or {}).get("Status")
        shown = "health: starting" if health == "starting" else health
        return f"{text} ({shown})" if shown else text
    if status in ("exited", "restarting"):
        ago = human_duration(seconds_since(state["FinishedAt"]))
        return f"{status.capitalize()} ({state['ExitCode']}) {ago} ago"
    return {"created": "Created", "removing": "Removal In Progress"}.get(status, status)
