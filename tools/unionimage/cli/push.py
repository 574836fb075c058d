"""unionfuse push: upload an image to a registry."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unionimage.cli.common import open_store

if TYPE_CHECKING:
    from unionimage.store import Image

EXAMPLE = """\
unionfuse tag app localhost:5000/team/app:1.0
unionfuse push localhost:5000/team/app:1.0
unionfuse push -a localhost:5000/team/app"""

MANIFEST_TYPES = ("oci", "docker")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="IMAGE[:TAG]", help="the image; :latest if no tag is given")
    parser.add_argument(
        "-a", "--all-tags", action="store_true", help="push every local tag of the repository"
    )
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="push this image alone of a name that has several (default: all, with their index)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print the image's name only")
    parser.add_argument(
        "--insecure", action="store_true", help="allow plain HTTP and unverified certificates"
    )
    parser.add_argument(
        "--format",
        choices=MANIFEST_TYPES,
        help="write a new manifest of this kind (default: the image's own, else oci)",
    )
    parser.add_argument(
        "--compression",
        choices=("gzip", "zstd", "none"),
        help="compress all layers anew (default: as they came, those made here with gzip)",
    )


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.progress import reporter
    from unionimage.errors import NotFound, UserError
    from unionimage.registry.outgoing import Wanted
    from unionimage.registry.push import push, push_platforms, tags_to_push
    from unionimage.registry.session import Session
    from unionimage.spec import DOCKER_MANIFEST, OCI_MANIFEST
    from unionimage.store import platforms

    manifest_type = {"oci": OCI_MANIFEST, "docker": DOCKER_MANIFEST, None: None}[args.format]
    wanted = Wanted(manifest_type, args.compression)
    with (
        open_store(args) as store,
        Session(store.config, insecure=args.insecure) as session,
        reporter(args.quiet) as report,
    ):
        reference = store.reference(args.name)
        if reference.digest is not None:
            raise UserError(f"{args.name}: cannot push a digest reference; give a tag")
        if args.all_tags and reference.tag is not None:
            raise UserError("tag can't be used with --all-tags/-a")
        report.line(f"The push refers to repository [{reference.repository}]")
        if args.all_tags:
            names = (name for image in store.images(all=True) for name in image.names)
            references = tags_to_push(names, reference)
        else:
            if reference.tag is None:
                report.line("Using default tag: latest")
            references = [reference.with_default_tag()]
        if not references:
            raise NotFound(
                "An image does not exist locally with the tag: " + reference.familiar_repository
            )
        for one in references:
            image = store.find(str(one))
            if image is None or one not in image.names:
                raise NotFound(f"An image does not exist locally with the tag: {one.familiar}")
            named = platforms.of(store, one)
            if args.platform is not None:
                chosen = _for_platform(named.images if named else (image,), args.platform)
                done = push(store, session, chosen, one, report, wanted)
            elif named is not None:
                done = push_platforms(store, session, named, one, report, wanted)
            else:
                done = push(store, session, image, one, report, wanted)
            report.line(f"{one.tag}: digest: {done.digest} size: {done.size}")
    if args.quiet:
        print(references[0].repository if args.all_tags else references[0])
    return 0


def _for_platform(images: Sequence[Image], text: str) -> Image:
    from unionimage.errors import NotFound
    from unionimage.spec import Platform

    wanted = Platform.parse(text)
    for image in images:
        if image.config.platform.satisfies(wanted):
            return image
    there = ", ".join(str(image.config.platform) for image in images)
    raise NotFound(f"no image for platform {wanted} is here; there are: {there}")
