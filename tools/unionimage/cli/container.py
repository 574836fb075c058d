"""`unionfuse container`: what is about all containers; the other forms are docker's aliases."""

from __future__ import annotations

import argparse
import sys

from unionimage.cli.format import add_filter_option
from unionimage.cli.parser import add_grouped
from unionimage.errors import UserError

EXAMPLE = """unionfuse container prune -f
unionfuse container ls -a"""


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "remove all containers that do not run"
    prune = verbs.add_parser("prune", help=what, description=what)
    prune.add_argument("-f", "--force", action="store_true", help="do not ask")
    add_filter_option(prune, ("label",))
    what = "start those with --restart always or unless-stopped (after a boot)"
    verbs.add_parser("autostart", help=what, description=what)
    what = "stop all that run (before a shutdown); autostart starts them again"
    verbs.add_parser("stop-all", help=what, description=what)
    add_grouped(verbs, "container")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.common import human_size
    from unionimage.cli.engine import confirm, open_engine
    from unionimage.cli.format import filters

    engine = open_engine(args)
    if args.action == "autostart":
        code = 0
        for container in engine.to_autostart():
            try:
                engine.start(container)
                print(container.name)
            except UserError as error:
                print(f"unionfuse: {container.name}: {error.message}", file=sys.stderr)
                code = 1
        return code
    if args.action == "stop-all":
        engine.shut_down()
        return 0
    wanted = filters(args.filter, ("label",))
    if not args.force and not confirm("This removes all containers that do not run."):
        return 1
    removed, freed = engine.prune_containers(wanted.get("label", ()))
    if removed:
        print("Deleted Containers:")
        print("\n".join(removed) + "\n")
    print(f"Total reclaimed space: {human_size(freed)}")
    return 0
