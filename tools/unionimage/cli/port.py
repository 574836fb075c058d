"""`unionfuse port`: where the ports of a container are published."""

from __future__ import annotations

import argparse

from unionimage.errors import UserError

EXAMPLE = "unionfuse port web 80"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("port", metavar="PORT[/PROTOCOL]", nargs="?")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.container import describe

    container = open_engine(args).find(args.container)
    table = describe.ports(container)
    if args.port is None:
        for port, places in table.items():
            for place in places or []:
                print(f"{port} -> {place['HostIp']}:{place['HostPort']}")
        return 0
    wanted = args.port if "/" in args.port else f"{args.port}/tcp"
    places = table.get(wanted)
    if not places:
        raise UserError(f"no public port {wanted} published for {container.name}")
    for place in places:
        print(f"{place['HostIp']}:{place['HostPort']}")
    return 0
