"""`unionfuse update`: other limits or another restart policy, also while containers run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from unionimage.cli.container_options import add_limits
from unionimage.errors import Conflict, UserError

if TYPE_CHECKING:
    from unionimage.container.state import Container

EXAMPLE = "unionfuse update --memory 512m --cpus 1.5 web"


def configure(parser: argparse.ArgumentParser) -> None:
    add_limits(parser)
    parser.add_argument(
        "--restart",
        metavar="no|always|unless-stopped|on-failure[:N]",
        help="when to start it again after it ended",
    )
    parser.add_argument("container", metavar="CONTAINER", nargs="+")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import for_each, open_engine
    from unionimage.container import create, limits, runtime
    from unionimage.container.state import ALIVE

    changes = create.limits_of(args)
    if args.restart is not None:
        changes["RestartPolicy"] = create.restart_policy(args.restart)
    if not changes:
        raise UserError("you must provide one or more flags when using this command")
    engine = open_engine(args)

    def change(container: Container) -> None:
        with container.locked():
            container.reload()
            host_config = container.host_config | changes
            if host_config.get("AutoRemove") and args.restart not in (None, "no"):
                raise UserError("a container that was run with --rm cannot have a restart policy")
            wanted = limits.resources(host_config)
            if changes.get("PidsLimit", 1) <= 0:
                wanted["pids"] = {"limit": limits.MOST_PIDS}
            if container.state()["Status"] in ALIVE and create.limits_of(args):
                chosen = runtime.find(container.record.get("Runtime"))
                chosen.update(container.id, wanted)
            container.record["HostConfig"] = host_config
            container.save()
        if container.state()["Status"] in ALIVE:
            try:
                engine.ask(container, op="reload")
            except Conflict:
                pass  # it ended meanwhile: the record holds for its next start
        engine.events.container(container, "update")

    return for_each(engine, args.container, change)
