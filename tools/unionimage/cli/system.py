"""`unionfuse system`: what there is in all, what it takes, and removing what nothing uses."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine

EXAMPLE = """unionfuse system df
unionfuse system prune -f"""

COLUMNS = {
    "Type": "TYPE",
    "TotalCount": "TOTAL",
    "Active": "ACTIVE",
    "Size": "SIZE",
    "Reclaimable": "RECLAIMABLE",
}


def configure(parser: argparse.ArgumentParser) -> None:
    from unionimage.cli.format import add_format_options

    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "show the host, the store and the runtime"
    info = verbs.add_parser("info", help=what, description=what)
    info.add_argument("-f", "--format", metavar="TEMPLATE", help="json, or a template")
    info.add_argument(
        "--json", dest="format", action="store_const", const="json", help="a JSON list"
    )
    what = "show what images, containers and volumes take"
    add_format_options(verbs.add_parser("df", help=what, description=what))
    what = "remove stopped containers, unused networks and unused images"
    prune = verbs.add_parser("prune", help=what, description=what)
    prune.add_argument("-a", "--all", action="store_true", help="images with a name too")
    prune.add_argument("-f", "--force", action="store_true", help="do not ask")
    prune.add_argument("--volumes", action="store_true", help="anonymous volumes too")


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine = open_engine(args)
    match args.action:
        case "info":
            _info(engine, args)
        case "df":
            from unionimage.cli.format import show

            show(_usage(engine), COLUMNS, args.format)
        case "prune":
            return _prune(engine, args)
    return 0


def _info(engine: Engine, args: argparse.Namespace) -> None:
    import os
    import platform

    import unionfuse
    from unionimage.container import limits, networks, runtime
    from unionimage.errors import UserError

    states = [container.state()["Status"] for container in engine.all()]
    with engine.open_store() as store:
        images = len(store.images())
        driver = store.config.driver
    found: list[str] = []
    for name in runtime.CANDIDATES:
        try:
            found.append(runtime.find(name).name)
        except UserError:
            continue
    try:
        network_engine = networks.engine()
    except UserError:
        network_engine = ""
    system = os.uname()
    facts: dict[str, Any] = {
        "Containers": len(states),
        "ContainersRunning": states.count("running"),
        "ContainersPaused": states.count("paused"),
        "ContainersStopped": len(states) - states.count("running") - states.count("paused"),
        "Images": images,
        "ServerVersion": unionfuse.__version__,
        "Driver": driver,
        "DockerRootDir": str(engine.root),
        "LoggingDriver": "json-file",
        "CgroupVersion": str(limits.host().version),
        "CgroupControllers": sorted(limits.host().controllers),
        "Runtimes": found,
        "DefaultRuntime": found[0] if found else "",
        "NetworkEngine": network_engine,
        "SecurityOptions": ["name=seccomp,profile=builtin"],
        "KernelVersion": system.release,
        "OperatingSystem": platform.freedesktop_os_release().get("PRETTY_NAME", "Linux"),
        "Architecture": system.machine,
        "NCPU": os.cpu_count(),
        "MemTotal": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "Name": system.nodename,
    }
    if args.format:
        from unionimage.cli.format import show_objects

        show_objects([facts], args.format)
        return
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name}: {shown}")


def _usage(engine: Engine) -> list[dict[str, Any]]:
    from unionimage.container import describe, volumes

    containers = engine.all()
    running = [one for one in containers if one.state()["Status"] in ("running", "paused")]
    sizes = {one.id: describe.writable_size(one) for one in containers}
    idle = sum(size for key, size in sizes.items() if key not in {one.id for one in running})
    used_images = {one.record["Image"] for one in containers}
    with engine.open_store() as store:
        layers: dict[str, int] = {}
        images = store.images(all=True)
        for image in images:
            layers |= {diff_id: store.layer(diff_id).size for diff_id in image.diff_ids}
        kept = {
            diff_id
            for image in images
            if str(image.id) in used_images
            for diff_id in image.diff_ids
        }
    free = sum(size for diff_id, size in layers.items() if diff_id not in kept)
    known = engine.volumes.all()
    volume_sizes = {one["Name"]: volumes.size(one) for one in known}
    busy = [one for one in known if volumes.users_of(one["Name"], containers)]
    unused = sum(volume_sizes.values()) - sum(volume_sizes[one["Name"]] for one in busy)
    return [
        _line("Images", len(images), len(used_images), sum(layers.values()), free),
        _line("Containers", len(containers), len(running), sum(sizes.values()), idle),
        _line("Local Volumes", len(known), len(busy), sum(volume_sizes.values()), unused),
    ]


def _line(kind: str, total: int, active: int, size: int, free: int) -> dict[str, Any]:
    from unionimage.cli.common import human_size

    share = f" ({100 * free // size}%)" if size else ""
    return {
        "Type": kind,
        "TotalCount": str(total),
        "Active": str(active),
        "Size": human_size(size),
        "Reclaimable": human_size(free) + share,
    }


def _prune(engine: Engine, args: argparse.Namespace) -> int:
    from unionimage.cli import load_verb, parser_of
    from unionimage.cli.common import human_size
    from unionimage.cli.engine import confirm

    if not args.force and not confirm(
        "This removes stopped containers, unused networks and unused images."
    ):
        return 1
    removed, freed = engine.prune_containers()
    if removed:
        print("Deleted Containers:\n" + "\n".join(removed) + "\n")
    if gone := engine.prune_networks():
        print("Deleted Networks:\n" + "\n".join(gone) + "\n")
    if args.volumes:
        names, size = engine.prune_volumes()
        freed += size
        if names:
            print("Deleted Volumes:\n" + "\n".join(names) + "\n")
    print(f"Containers and volumes reclaimed: {human_size(freed)}")
    module = load_verb("prune")
    parsed = parser_of("prune", module).parse_args(["-f", *(["-a"] if args.all else [])])
    parsed.root = args.root
    return int(module.run(parsed))
