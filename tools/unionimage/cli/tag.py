"""`unionfuse tag`: one more name for an image."""

from __future__ import annotations

import argparse

from unionimage.cli.common import named, open_store
from unionimage.reference import Reference

EXAMPLE = "unionfuse tag debian:12 registry.lan/base:stable"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IMAGE[:TAG]", help="a name or id")
    parser.add_argument("target", metavar="NAME[:TAG]", help="the name it gets")


def run(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        image, target = store.image(args.source), Reference.parse(args.target).with_default_tag()
        store.tag(image, target)
        if (source := named(store, args.source, image)) is not None:
            from unionimage.store import platforms

            platforms.copy(store, source, target)
    return 0
