"""unionfuse tags: list what a registry has under a name."""

from __future__ import annotations

import argparse
import json

from unionimage.cli.common import open_store

EXAMPLE = """\
unionfuse tags debian
unionfuse tags --filter '1.*' localhost:5000/team/app
unionfuse tags --digests --json localhost:5000/team/app"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the repository, without a tag")
    parser.add_argument(
        "-f", "--filter", metavar="PATTERN", help="only tags that match, such as '12.*'"
    )
    parser.add_argument("-n", "--limit", type=int, metavar="N", help="at most N tags")
    parser.add_argument(
        "--digests", action="store_true", help="show what each tag points at (a request a tag)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--insecure", action="store_true", help="allow plain HTTP and unverified certificates"
    )


def run(args: argparse.Namespace) -> int:
    import fnmatch
    import itertools

    from unionimage.errors import UserError
    from unionimage.registry.session import Session

    with open_store(args) as store:
        reference, config = store.reference(args.name), store.config
    if reference.tag or reference.digest:
        raise UserError(f"{args.name}: give the name without a tag")
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit must be at least 1")
    with Session(config, insecure=args.insecure) as session:
        repository = session.repository(reference)
        found = (
            tag
            for tag in repository.tags()
            if not args.filter or fnmatch.fnmatchcase(tag, args.filter)
        )
        tags = list(itertools.islice(found, args.limit))
        digests: list[str | None] = []
        if args.digests:
            digests = [*session.side_by_side(repository.manifest_digest, tags)]
    if args.json:
        rows: list[object] = [*tags]
        if args.digests:
            pairs = zip(tags, digests, strict=True)
            rows = [{"tag": tag, "digest": digest} for tag, digest in pairs]
        print(json.dumps({"name": reference.repository, "tags": rows}, indent=2))
    elif args.digests:
        width = max(map(len, tags), default=0)
        for tag, digest in zip(tags, digests, strict=True):
            print(f"{tag:<{width}}  {digest or '-'}")
    else:
        print("".join(f"{tag}\n" for tag in tags), end="")
    return 0
