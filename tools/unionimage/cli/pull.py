"""unionfuse pull: download an image from a registry."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from unionimage.cli.common import open_store

if TYPE_CHECKING:
    from unionimage.registry.pull import Pulled

EXAMPLE = """\
unionfuse pull debian:12
unionfuse pull --platform linux/arm64 ghcr.io/team/app@sha256:…
unionfuse pull --platform all debian:12
unionfuse pull -a localhost:5000/app"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME[:TAG|@DIGEST]", help="the image; :latest if no tag is given"
    )
    parser.add_argument(
        "-a", "--all-tags", action="store_true", help="pull every tag of the repository"
    )
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="which image of an index, or all (default: this machine's)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print the image's name only")
    parser.add_argument(
        "--insecure", action="store_true", help="allow plain HTTP and unverified certificates"
    )


def run(args: argparse.Namespace) -> int:
    from unionimage.cli.progress import reporter
    from unionimage.errors import UserError
    from unionimage.registry.pull import pull, pull_all, pull_platforms
    from unionimage.registry.session import Session
    from unionimage.spec import Platform

    every = args.platform == "all"
    platform = Platform.parse(args.platform) if args.platform and not every else None
    with (
        open_store(args) as store,
        Session(store.config, insecure=args.insecure) as session,
        reporter(args.quiet) as report,
    ):
        reference = store.reference(args.name)
        if args.all_tags and (reference.tag or reference.digest):
            raise UserError("tag can't be used with --all-tags/-a")
        if args.all_tags and every:
            raise UserError("--platform all takes one tag at a time")
        results: Iterable[Pulled]
        if args.all_tags:
            results = pull_all(store, session, reference, report, platform)
        else:
            if reference.tag is None and reference.digest is None:
                report.line("Using default tag: latest")
            reference = reference.with_default_tag()
            if every:
                results = [pull_platforms(store, session, reference, report)]
            else:
                results = [pull(store, session, reference, report, platform)]
        for result in results:
            report.line(f"Digest: {result.digest}")
            report.line(f"Status: {_status(result)}")
    print(reference.repository if args.all_tags else reference.with_default_tag())
    return 0


def _status(result: Pulled) -> str:
    name = result.reference.familiar
    if result.is_new:
        return f"Downloaded newer image for {name}"
    return f"Image is up to date for {name}"
