"""`unionfuse network`: bridges between containers, with names resolved on them."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING, Any

from unionimage.errors import UserError
from unionimage.labels import LabelText, has_labels

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine

EXAMPLE = """unionfuse network create backend
unionfuse run -d --network backend --name db postgres
unionfuse network ls"""

COLUMNS = {"ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE"}
# Docker's flags of `create` that are refused, and why.
REFUSED = {
    "--ipv6": "networks have IPv4 addresses only",
    "--ip-range": "addresses are taken from the whole subnet; --ip asks for a certain one",
    "--aux-address": "addresses are taken from the whole subnet; --ip asks for a certain one",
    "--ipam-driver": "addresses are given out by unionfuse itself",
    "--ipam-opt": "addresses are given out by unionfuse itself",
    "--opt": "a bridge has no options of its own",
    "-o": "a bridge has no options of its own",
    "--scope": "there are no swarms",
    "--ingress": "there are no swarms",
    "--config-from": "there are no swarms",
    "--config-only": "there are no swarms",
}
FILTERS = ("driver", "id", "label", "name")


def configure(parser: argparse.ArgumentParser) -> None:
    from unionimage.cli.format import add_filter_option, add_format_options
    from unionimage.cli.parser import VerbParser

    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, help: str) -> VerbParser:
        made = verbs.add_parser(name, help=help, description=help)
        assert isinstance(made, VerbParser)
        return made

    create = add("create", "make a network")
    create.add_argument("-d", "--driver", choices=("bridge",), default="bridge")
    create.add_argument(
        "--subnet", metavar="10.1.2.0/24", help="its addresses (default: a free /24)"
    )
    create.add_argument("--gateway", metavar="10.1.2.1", help="the bridge's own address")
    create.add_argument("--internal", action="store_true", help="no way out")
    create.add_argument(
        "--label", action="append", default=[], metavar="NAME=VALUE", help="note something about it"
    )
    create.add_argument(
        "--attachable", action="store_true", help="for docker's swarms; here each network is"
    )
    create.refused |= REFUSED
    create.add_argument("name", metavar="NAME")
    for name in ("ls", "list"):
        listing = add(name, "list networks")
        listing.add_argument("-q", "--quiet", action="store_true", help="ids only")
        add_filter_option(listing, FILTERS, "-f")
        listing.add_argument("--no-trunc", action="store_true", help="ids in full")
        add_format_options(listing)
    inspect = add("inspect", "show everything known about networks")
    inspect.add_argument("-f", "--format", metavar="TEMPLATE")
    inspect.add_argument("name", metavar="NETWORK", nargs="+")
    for name in ("rm", "remove"):
        remove = add(name, "remove networks that no container has")
        remove.add_argument("-f", "--force", action="store_true", help="missing ones are fine")
        remove.add_argument("name", metavar="NETWORK", nargs="+")
    prune = add("prune", "remove networks that no container has")
    prune.add_argument("-f", "--force", action="store_true", help="do not ask")
    add_filter_option(prune, ("label",))
    connect = add("connect", "put a container on one more network")
    connect.add_argument("--ip", metavar="ADDRESS", help="this address there")
    connect.add_argument(
        "--alias", action="append", default=[], metavar="NAME", help="one more name there"
    )
    disconnect = add("disconnect", "take a container off a network")
    disconnect.add_argument(
        "-f", "--force", action="store_true", help="a container that is gone is fine"
    )
    for one in (connect, disconnect):
        one.add_argument("name", metavar="NETWORK")
        one.add_argument("container", metavar="CONTAINER")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine = open_engine(args)
    match args.action:
        case "create":
            from unionimage.container.create import labels_of

            network = engine.networks.create(
                args.name,
                subnet=args.subnet,
                gateway=args.gateway,
                internal=args.internal,
                labels=labels_of(args.label),
            )
            print(network["Id"])
        case "ls" | "list":
            _list(engine, args)
        case "inspect":
            from unionimage.cli.format import inspect_each

            find = functools.partial(_object, engine)
            return inspect_each("network inspect", args.name, find, args.format)
        case "rm" | "remove":
            return _remove(engine, args)
        case "prune":
            return _prune(engine, args)
        case "connect":
            engine.connect(engine.find(args.container), args.name, args.ip, args.alias)
        case "disconnect":
            _disconnect(engine, args)
    return 0


def _prune(engine: Engine, args: argparse.Namespace) -> int:
    from unionimage.cli.engine import confirm
    from unionimage.cli.format import filters

    wanted = filters(args.filter, ("label",))
    if not args.force and not confirm("This removes networks that no container has."):
        return 1
    if removed := engine.prune_networks(wanted.get("label", ())):
        print("Deleted Networks:\n" + "\n".join(removed))
    return 0


def _disconnect(engine: Engine, args: argparse.Namespace) -> None:
    from unionimage.errors import NotFound

    try:
        container = engine.find(args.container)
    except NotFound:
        if args.force:
            return
        raise
    engine.disconnect(container, args.name)


def _list(engine: Engine, args: argparse.Namespace) -> None:
    from unionimage.cli.format import filters, show

    wanted = filters(args.filter, FILTERS)
    rows: list[dict[str, Any]] = []
    for network in engine.networks.all():
        if not has_labels(network["Labels"], wanted.get("label", ())):
            continue
        if wanted.get("name") and not any(one in network["Name"] for one in wanted["name"]):
            continue
        if wanted.get("id") and not any(network["Id"].startswith(one) for one in wanted["id"]):
            continue
        if wanted.get("driver") and network["Driver"] not in wanted["driver"]:
            continue
        identity = network["Id"] if args.no_trunc else network["Id"][:12]
        rows.append(network | {"ID": identity, "Labels": LabelText(network["Labels"])})
    if args.quiet and args.format is None:
        print("".join(f"{row['ID']}\n" for row in rows), end="")
    else:
        show(rows, COLUMNS, args.format)


def _object(engine: Engine, name: str) -> dict[str, Any]:
    from unionimage.container import networks

    network = engine.networks.find(name)
    members: dict[str, Any] = {}
    for container in engine.all():
        entry = networks.live(container)["Networks"].get(network["Name"])
        if entry:
            members[container.id] = {
                "Name": container.name,
                "EndpointID": networks.endpoint_id(container, network["Name"]),
                "MacAddress": entry.get("MacAddress") or "",
                "IPv4Address": f"{entry['IPAddress']}/{networks.prefix_length(network)}",
                "IPv6Address": "",
            }
    return network | {"Containers": members}


def _remove(engine: Engine, args: argparse.Namespace) -> int:
    from unionimage.errors import NotFound

    code = 0
    for name in args.name:
        try:
            print(engine.remove_network(name, engine.containers.all()))
        except UserError as error:
            if not (args.force and isinstance(error, NotFound)):
                print(f"unionfuse: {error.message}", file=sys.stderr)
                code = 1
    return code
