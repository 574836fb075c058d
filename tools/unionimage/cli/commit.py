"""`unionfuse commit`: an image of a container's changes, or of an upper directory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unionimage.cli.common import open_store, source_date_epoch
from unionimage.errors import UserError
from unionimage.reference import Reference
from unionimage.store import Image, Store

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine
    from unionimage.container.state import Container

EXAMPLE = """
unionfuse commit -m 'Add nginx' web site:2
unionfuse commit --upper /mnt.upper --parent debian:12 -c 'CMD ["bash"]' mine
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--message", default="", help="a comment for the history")
    parser.add_argument("-a", "--author", default="", help="'Name <mail>'")
    parser.add_argument(
        "-c", "--change", action="append", default=[], metavar="INSTRUCTION", help="ENV, CMD, …"
    )
    parser.add_argument(
        "-p",
        "--pause",
        nargs="?",
        const="true",
        default="true",
        choices=("true", "false"),
        help="stop the container meanwhile (the default)",
    )
    parser.add_argument("--upper", metavar="DIR", help="commit this directory, not a container")
    parser.add_argument(
        "--parent", metavar="IMAGE", help="the image that --upper lies on, or scratch"
    )
    parser.add_argument("names", nargs="*", metavar="[CONTAINER] [NAME[:TAG]]")


def run(args: argparse.Namespace) -> int:
    from unionimage.commit import commit

    newest = source_date_epoch()
    common: dict[str, Any] = {
        "message": args.message,
        "author": args.author,
        "changes": args.change,
    }
    if args.upper is not None:
        if len(args.names) > 1:
            raise UserError("--upper takes a NAME and no CONTAINER", exit_code=125)
        upper = Path(args.upper)
        if not upper.is_dir():
            raise UserError(f"{upper} is not a directory")
        with open_store(args) as store, store.lease("commit") as lease:
            parent = _parent(store, args.parent, upper)
            names = [Reference.parse(name) for name in args.names]
            print(commit(lease, upper, parent, names=names, newest=newest, **common).id)
        return 0
    if args.parent is not None:
        raise UserError("--parent goes with --upper", exit_code=125)
    if not 1 <= len(args.names) <= 2:
        raise UserError("give a CONTAINER and perhaps a NAME; see --help", exit_code=125)
    return _commit_container(args, common, newest)


def _parent(store: Store, name: str | None, upper: Path) -> Image | None:
    if name is None:
        return _mounted_on(store, upper)
    return None if name == "scratch" else store.image(name)


def _mounted_on(store: Store, upper: Path) -> Image | None:
    """The image that is mounted with this upper directory; if none is, the user must say."""
    from unionimage.mounts import mounts

    for mount in mounts(store):
        if mount.upper is not None and mount.upper.samefile(upper) and mount.image is not None:
            if mount.step is not None:
                raise UserError(f"{upper} lies on a step of an image; name a --parent")
            return store.image_by_id(mount.image)
    raise UserError(f"say which image {upper} lies on: --parent IMAGE or --parent scratch")


def _commit_container(args: argparse.Namespace, common: dict[str, Any], newest: int | None) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.commit import commit
    from unionimage.container import describe
    from unionimage.image_config import RunConfig

    engine = open_engine(args)
    container = engine.find(args.names[0])
    names = [Reference.parse(name) for name in args.names[1:]]
    config = container.config
    command = [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]
    with open_store(args) as store, store.lease("commit") as lease:
        parent = store.image(container.record["Image"])
        with _paused(engine, container, args.pause == "true"):
            image = commit(
                lease,
                container.upper,
                parent,
                run=RunConfig.from_object(_for_image(config)),
                created_by=" ".join(command),
                names=names,
                newest=newest,
                leave_out={path.lstrip(b"/") for path in _mount_points(describe, container)},
                **common,
            )
    print(image.id)
    return 0


def _for_image(config: dict[str, Any]) -> dict[str, Any]:
    """A container's config without what belongs to this one container."""
    own = ("Hostname", "Domainname", "Tty", "OpenStdin", "StdinOnce", "Image")
    attached = ("AttachStdin", "AttachStdout", "AttachStderr", "MacAddress", "NetworkDisabled")
    return {key: value for key, value in config.items() if key not in own + attached}


def _mount_points(describe: ModuleType, container: Container) -> set[bytes]:
    return {os.fsencode(path) for path in describe.created_for_mounts(container)}


@contextmanager
def _paused(engine: Engine, container: Container, wanted: bool) -> Iterator[None]:
    """Hold a running container still, so that the upper directory does not change."""
    if not wanted or container.state()["Status"] != "running":
        yield
        return
    engine.ask(container, op="pause")
    try:
        yield
    finally:
        engine.ask(container, op="unpause")
