"""`unionfuse system`: what there is in all, what it takes, and removing what nothing uses."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from unionimage.errors import UserError

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine

EXAMPLE = """unionfuse system df
unionfuse system prune -f"""


def configure(parser: argparse.ArgumentParser) -> None:
    from unionimage.cli.format import add_filter_option, add_format_options, add_json_option

    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "show the host, the store and the runtime"
    info = verbs.add_parser("info", help=what, description=what)
    info.add_argument("-f", "--format", metavar="TEMPLATE", help="json, or a template")
    add_json_option(info)
    what = "show what images, containers and volumes take"
    df = verbs.add_parser("df", help=what, description=what)
    df.add_argument("-v", "--verbose", action="store_true", help="one by one")
    add_format_options(df)
    what = "remove stopped containers, unused networks and unused images"
    prune = verbs.add_parser("prune", help=what, description=what)
    prune.add_argument("-a", "--all", action="store_true", help="images with a name too")
    prune.add_argument("-f", "--force", action="store_true", help="do not ask")
    prune.add_argument("--volumes", action="store_true", help="anonymous volumes too")
    add_filter_option(prune, ("label",))


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine

    engine = open_engine(args)
    match args.action:
        case "info":
            _info(engine, args)
        case "df":
            _usage(engine, args)
        case "prune":
            return _prune(engine, args)
    return 0


def _info(engine: Engine, args: argparse.Namespace) -> None:
    import os
    import platform

    import unionfuse
    from unionimage.container import limits, netavark, runtime

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
        network_engine = netavark.program()
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


_TITLES = {"Volumes": "Local Volumes", "BuildCache": "Build cache"}


def _usage(engine: Engine, args: argparse.Namespace) -> None:
    from unionimage.cli import usage
    from unionimage.cli.format import show
    from unionimage.json_object import json_line

    if not args.verbose:
        show(usage.summary(engine), usage.COLUMNS, args.format)
        return
    detail = usage.in_detail(engine)
    if args.format == "json":
        print(json_line({kind: rows for kind, (rows, _) in detail.items()}))
        return
    if args.format not in (None, "table"):
        raise UserError("with --verbose there is json, and no template")
    for kind, (rows, columns) in detail.items():
        print(f"{_TITLES.get(kind, kind)} space usage:\n")
        show(rows, columns, None)
        print()


def _prune(engine: Engine, args: argparse.Namespace) -> int:
    from unionimage.cli import load_verb, parser_of
    from unionimage.cli.common import human_size
    from unionimage.cli.engine import confirm
    from unionimage.cli.format import filters

    labels = filters(args.filter, ("label",)).get("label", [])
    if not args.force and not confirm(
        "This removes stopped containers, unused networks and unused images."
    ):
        return 1
    removed, freed = engine.prune_containers(labels)
    if removed:
        print("Deleted Containers:\n" + "\n".join(removed) + "\n")
    if gone := engine.prune_networks(labels):
        print("Deleted Networks:\n" + "\n".join(gone) + "\n")
    if args.volumes:
        names, size = engine.prune_volumes(labels)
        freed += size
        if names:
            print("Deleted Volumes:\n" + "\n".join(names) + "\n")
    print(f"Containers and volumes reclaimed: {human_size(freed)}")
    module = load_verb("prune")
    words = ["-f", *(["-a"] if args.all else []), *(f"--filter=label={one}" for one in labels)]
    parsed = parser_of("prune", module).parse_args(words)
    parsed.root = args.root
    return int(module.run(parsed))
