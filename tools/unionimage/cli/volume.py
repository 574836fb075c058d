"""`unionfuse volume`: data that outlives containers."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from unionimage.errors import UserError
from unionimage.labels import LabelText, has_labels

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine

EXAMPLE = """unionfuse volume create data
unionfuse volume ls
unionfuse volume prune -f"""

COLUMNS = {"Driver": "DRIVER", "Name": "VOLUME NAME"}
FILTERS = ("dangling", "driver", "label", "name")


def configure(parser: argparse.ArgumentParser) -> None:
    from unionimage.cli.format import add_filter_option, add_format_options
    from unionimage.cli.parser import VerbParser

    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, help: str) -> VerbParser:
        made = verbs.add_parser(name, help=help, description=help)
        assert isinstance(made, VerbParser)
        return made

    create = add("create", "make a volume")
    create.add_argument("-d", "--driver", choices=("local",), default="local")
    create.add_argument(
        "--label", action="append", default=[], metavar="NAME=VALUE", help="note something about it"
    )
    create.add_argument("--name", dest="named", metavar="NAME", help="the same as NAME at the end")
    create.refused["-o"] = create.refused["--opt"] = (
        "a volume is a directory of the store; mount the device on the host and use -v"
    )
    create.add_argument("name", metavar="NAME", nargs="?")
    for name in ("ls", "list"):
        listing = add(name, "list volumes")
        listing.add_argument("-q", "--quiet", action="store_true", help="names only")
        add_filter_option(listing, FILTERS, "-f")
        add_format_options(listing)
    inspect = add("inspect", "show everything known about volumes")
    inspect.add_argument("-f", "--format", metavar="TEMPLATE")
    inspect.add_argument("name", metavar="VOLUME", nargs="+")
    for name in ("rm", "remove"):
        remove = add(name, "remove volumes that no container has")
        remove.add_argument("-f", "--force", action="store_true", help="missing ones are fine")
        remove.add_argument("name", metavar="VOLUME", nargs="+")
    prune = add("prune", "remove anonymous volumes that no container has")
    prune.add_argument("-a", "--all", action="store_true", help="named ones too")
    prune.add_argument("-f", "--force", action="store_true", help="do not ask")
    add_filter_option(prune, ("label",))


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine = open_engine(args)
    match args.action:
        case "create":
            from unionimage.container.create import labels_of

            if args.name and args.named:
                raise UserError("conflicting options: --name and NAME", exit_code=125)
            volume, _ = engine.volumes.create(args.name or args.named, labels_of(args.label))
            print(volume["Name"])
        case "ls" | "list":
            _list(engine, args)
        case "inspect":
            from unionimage.cli.format import inspect_each

            return inspect_each("volume inspect", args.name, engine.volumes.find, args.format)
        case "rm" | "remove":
            return _remove(engine, args)
        case "prune":
            return _prune(engine, args)
    return 0


def _list(engine: Engine, args: argparse.Namespace) -> None:
    from unionimage.cli.format import filters, show
    from unionimage.container import volumes

    wanted = filters(args.filter, FILTERS)
    containers = engine.containers.all()
    rows: list[dict[str, Any]] = []
    for volume in engine.volumes.all():
        used = bool(volumes.users_of(volume["Name"], containers))
        dangling = wanted.get("dangling", ["either"])[0]
        if (dangling in ("true", "1") and used) or (dangling in ("false", "0") and not used):
            continue
        if not has_labels(volume["Labels"], wanted.get("label", ())):
            continue
        if wanted.get("name") and not any(one in volume["Name"] for one in wanted["name"]):
            continue
        if wanted.get("driver") and volume["Driver"] not in wanted["driver"]:
            continue
        rows.append(volume | {"Labels": LabelText(volume["Labels"]), "Links": "N/A", "Size": "N/A"})
    if args.quiet and args.format is None:
        print("".join(f"{row['Name']}\n" for row in rows), end="")
    else:
        show(rows, COLUMNS, args.format)


def _remove(engine: Engine, args: argparse.Namespace) -> int:
    from unionimage.errors import NotFound

    code = 0
    for name in args.name:
        try:
            engine.volumes.remove(name, engine.containers.all())
        except NotFound as error:
            if args.force:
                print(name)
            else:
                print(f"unionfuse: {error.message}", file=sys.stderr)
                code = 1
        except UserError as error:
            print(f"unionfuse: {error.message}", file=sys.stderr)
            code = 1
        else:
            print(name)
    return code


def _prune(engine: Engine, args: argparse.Namespace) -> int:
    from unionimage.cli.common import human_size
    from unionimage.cli.engine import confirm
    from unionimage.cli.format import filters

    wanted = filters(args.filter, ("label",))
    kind = "all" if args.all else "anonymous"
    if not args.force and not confirm(f"This removes {kind} volumes that no container has."):
        return 1
    removed, freed = engine.prune_volumes(wanted.get("label", ()), named=args.all)
    if removed:
        print("Deleted Volumes:")
        print("\n".join(removed) + "\n")
    print(f"Total reclaimed space: {human_size(freed)}")
    return 0
