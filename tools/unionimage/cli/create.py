"""`unionfuse create`: a new container of an image, not started."""

from __future__ import annotations

import argparse

from unionimage.cli.container_options import add_container_options

EXAMPLE = "unionfuse create --name web -p 8080:80 nginx"
ERROR_CODE = 125


def configure(parser: argparse.ArgumentParser) -> None:
    add_container_options(parser)


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.engine import open_engine
    from unionimage.cli.image_for_run import image_for

    engine = open_engine(args)
    with engine.open_store() as store:
        container = engine.create(args, image_for(args, store), store, detach=False)
    print(container.id)
    return 0
