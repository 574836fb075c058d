"""`unionfuse port`: where the ports of a container are published."""

from __future__ import annotations

import argparse

from unionimage.errors import UserError

EXAMPLE = "unionfuse port web 80"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("port", metavar="PORT[/PROTOCOL]", nargs="?")
    parser.add_argument("--json", action="store_true", help="a line of JSON an address")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.container import describe

    container = open_engine(args).find(args.container)
    table = describe.ports(container)
    if args.port is not None:
        wanted = args.port if "/" in args.port else f"{args.port}/tcp"
        if not table.get(wanted):
            raise UserError(f"no public port {wanted} published for {container.name}")
        table = {wanted: table[wanted]}
    for port, places in table.items():
        for place in places or []:
            address = f"{place['HostIp']}:{place['HostPort']}"
            if args.json:
                from unionimage.json_object import json_line

                print(json_line({"Port": port, **place}))
            else:
                print(address if args.port is not None else f"{port} -> {address}")
    return 0
