"""`unionfuse inspect`: everything known about containers or images, as docker shows it."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from unionimage.cli.common import format_time, open_store
from unionimage.cli.format import add_json_option, inspect_each
from unionimage.errors import NotFound, UserError
from unionimage.store import Image, Store

EXAMPLE = """
unionfuse inspect debian:12
unionfuse inspect --format '{{.Config.Env}}' web
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", metavar="TEMPLATE", help="json or a template: '{{.Id}}'")
    add_json_option(parser)
    parser.add_argument("--type", choices=("container", "image"), help="only this kind")
    parser.add_argument("-s", "--size", action="store_true", help="sizes of containers as well")
    parser.add_argument("name", nargs="+", metavar="CONTAINER|IMAGE")


def run(args: argparse.Namespace) -> int:
    return inspect_each("inspect", args.name, functools.partial(_inspect, args), args.format)


def _inspect(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Containers come first, then images."""
    if args.type != "image":
        from unionimage.cli.engine import open_engine

        engine = open_engine(args)
        try:
            container = engine.find(name)
        except NotFound:
            if args.type == "container":
                raise
        else:
            from unionimage import config
            from unionimage.container import describe, inspection

            shown = inspection.inspect(container, engine.networks, config.load().driver)
            if args.size:
                shown["SizeRw"] = own = describe.writable_size(container)
                with engine.open_store() as store:
                    below = store.image(str(container.record["Image"]))
                    shown["SizeRootFs"] = own + below.size
            return shown
    with open_store(args) as store:
        image = store.find(name)
        if image is None:
            what = "image" if args.type == "image" else "container or image"
            raise NotFound(f"no such {what}: {name}")
        if args.size and args.type == "image":
            raise UserError("--size is for containers", exit_code=125)
        return object_of(store, image)


def object_of(store: Store, image: Image) -> dict[str, Any]:
    """Docker's object of an image (Engine API, ImageInspect), and our chain and directories."""
    config = image.config
    directories = [str(path) for path in store.chain_directories(image.diff_ids)]
    return {
        "Id": image.id,
        "RepoTags": [name.familiar for name in image.names],
        "RepoDigests": [name.familiar for name in image.digests],
        "Parent": image.parent or "",
        "Comment": config.comment or (config.history[-1].comment if config.history else ""),
        "Created": config.created,
        "Author": config.author,
        "Config": _docker_config(config.run.to_object()),
        "Architecture": config.platform.architecture,
        "Variant": config.platform.variant,
        "Os": config.platform.os,
        "Size": image.size,
        "VirtualSize": image.size,
        "GraphDriver": {
            "Name": "unionfuse",
            "Data": {"LowerDir": ":".join(directories), "ChainID": image.chain_id or ""},
        },
        "RootFS": {"Type": "layers", "Layers": list(image.diff_ids)},
        "Metadata": {
            "LastTagTime": format_time(image.added),
            "LastUsedTime": format_time(image.used),
        },
        "ManifestDigest": image.manifest_digest or "",
    }


def _docker_config(config: dict[str, Any]) -> dict[str, Any]:
    """All members that templates ask for, also those that the image leaves out."""
    empty: dict[str, Any] = {
        "User": "",
        "ExposedPorts": None,
        "Env": None,
        "Entrypoint": None,
        "Cmd": None,
        "Volumes": None,
        "WorkingDir": "",
        "Labels": None,
        "OnBuild": None,
        "StopSignal": "",
        "Healthcheck": None,
        "Shell": None,
    }
    return empty | config
