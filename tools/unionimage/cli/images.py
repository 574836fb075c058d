"""`unionfuse images`: what is in the store, as a list or as a tree of layers."""

from __future__ import annotations

import argparse
import fnmatch
from typing import Any

from unionimage.cli.common import human_ago, human_size, local_time, open_store, parse_time
from unionimage.cli.format import add_filter_option, add_format_options, filters, show
from unionimage.errors import UserError
from unionimage.labels import has_labels
from unionimage.reference import Reference
from unionimage.store import Image, Store

EXAMPLE = """
unionfuse images
unionfuse images --tree
unionfuse images --filter dangling=true -q
unionfuse images --format '{{.Repository}}:{{.Tag}} {{.Size}}' debian
"""

_FILTERS = ("dangling", "label", "before", "since", "reference")
_NONE = "<none>"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="also the steps of builds")
    parser.add_argument("-q", "--quiet", action="store_true", help="ids only")
    parser.add_argument("--digests", action="store_true", help="show the digests of manifests")
    parser.add_argument("--no-trunc", action="store_true", help="whole ids")
    add_filter_option(parser, _FILTERS, "-f")
    parser.add_argument("--tree", action="store_true", help="layers from base to top, each once")
    add_format_options(parser)
    parser.add_argument(
        "name", nargs="?", metavar="IMAGE[:TAG]", help="only this repository or name"
    )


def run(args: argparse.Namespace) -> int:
    chosen = filters(args.filter, _FILTERS)
    with open_store(args) as store:
        images = _filtered(store, store.images(all=args.all), chosen)
        if args.tree:
            from unionimage.cli.tree import show_tree

            show_tree(images, args.format)
            return 0
        pattern = args.name
        rows = [
            row
            for image in images
            for row in rows_of(image, args.no_trunc, args.digests, pattern, chosen)
        ]
    if args.quiet:
        for identity in dict.fromkeys(row["ID"] for row in rows):
            print(identity)
        return 0
    columns = {"Repository": "REPOSITORY", "Tag": "TAG"}
    if args.digests:
        columns["Digest"] = "DIGEST"
    columns |= {"ID": "IMAGE ID", "CreatedSince": "CREATED", "Size": "SIZE"}
    show(rows, columns, args.format)
    return 0


def rows_of(
    image: Image,
    whole: bool,
    digests: bool,
    pattern: str | None,
    chosen: dict[str, list[str]],
) -> list[dict[str, Any]]:
    """A row for each name of an image, docker's fields."""
    created = parse_time(image.created)
    common = {
        "ID": image.id if whole else image.id.short,
        "CreatedSince": human_ago(created),
        "CreatedAt": local_time(created),
        "Size": human_size(image.size),
        "VirtualSize": human_size(image.size),
        "SharedSize": "N/A",
        "UniqueSize": "N/A",
        "Containers": "N/A",
    }
    wanted = [one for one in image.names if _matches(one, pattern, chosen.get("reference", []))]
    by_repository = {one.repository: one.digest for one in image.digests}
    rows: list[dict[str, Any]] = [
        {"Repository": one.familiar_repository, "Tag": one.tag or _NONE}
        | {"Digest": by_repository.get(one.repository) or _NONE}
        | common
        for one in wanted
    ]
    if not image.names and pattern is None and "reference" not in chosen:
        repository = image.digests[0].familiar_repository if image.digests else _NONE
        digest = image.digests[0].digest if image.digests else _NONE
        rows = [{"Repository": repository, "Tag": _NONE, "Digest": digest} | common]
    return rows


def _matches(name: Reference, pattern: str | None, references: list[str]) -> bool:
    if pattern is not None:
        wanted = Reference.parse(pattern) if "*" not in pattern else None
        if wanted is not None:
            same_tag = wanted.tag is None or wanted.tag == name.tag
            if wanted.repository != name.repository or not same_tag:
                return False
        elif not _fits(name, pattern):
            return False
    return not references or any(_fits(name, one) for one in references)


def _fits(name: Reference, pattern: str) -> bool:
    return any(
        fnmatch.fnmatchcase(text, pattern) for text in (name.familiar, name.familiar_repository)
    )


def _filtered(store: Store, images: list[Image], chosen: dict[str, list[str]]) -> list[Image]:
    for value in chosen.get("dangling", []):
        if value.lower() not in ("true", "1", "false", "0"):
            raise UserError(f"invalid filter 'dangling={value}': give true or false")
        wanted = value.lower() in ("true", "1")
        images = [image for image in images if (not image.names) == wanted]
    if labels := chosen.get("label"):  # only then are the configs read
        images = [image for image in images if has_labels(image.config.run.labels, labels)]
    for key, sign in (("before", 1), ("since", -1)):
        for value in chosen.get(key, []):
            limit = parse_time(store.image(value).created) or 0.0
            images = [
                image for image in images if sign * ((parse_time(image.created) or 0.0) - limit) < 0
            ]
    return images
