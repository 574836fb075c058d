"""The image that `run` and `create` start from: here already, or pulled as --pull says."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from unionimage.errors import NotFound, UserError

if TYPE_CHECKING:
    from unionimage.store import Image, Store


def image_for(args: argparse.Namespace, store: Store) -> Image:
    """The image named by `args.image`. Raises UserError with exit code 125 when there is none."""
    if args.pull != "always":
        image = _here(args, store)
        if image is not None:
            return image
        what = f"{args.image} for {args.platform}" if args.platform else args.image
        if args.pull == "never":
            raise NotFound(
                f"no such image: {what}: --pull never forbids to look for it", exit_code=125
            )
        print(f"Unable to find image '{what}' locally", file=sys.stderr)
    _pull(args)
    return store.image(args.image)


def _here(args: argparse.Namespace, store: Store) -> Image | None:
    """The image of that name in the store; with --platform, the one that is for it."""
    try:
        image = store.image(args.image)
    except NotFound:
        return None
    if not args.platform:
        return image
    from unionimage.cli.common import named
    from unionimage.spec import Platform
    from unionimage.store import platforms

    wanted = Platform.parse(args.platform)
    name = named(store, args.image, image)
    known = platforms.of(store, name) if name else None
    candidates = [image, *(known.images if known else ())]
    return next((one for one in candidates if one.config.platform.satisfies(wanted)), None)


def _pull(args: argparse.Namespace) -> None:
    import contextlib

    from unionimage.cli import load_verb, parser_of

    words = [args.image]
    words += ["--platform", args.platform] if args.platform else []
    words += ["--quiet"] if args.quiet else []
    module = load_verb("pull")
    parsed = parser_of("pull", module).parse_args(words)
    parsed.root = args.root
    try:
        with contextlib.redirect_stdout(sys.stderr):
            code = module.run(parsed)
    except UserError as error:
        raise UserError(f"cannot pull {args.image}: {error.message}", exit_code=125) from None
    if code:
        raise UserError(f"cannot pull {args.image}", exit_code=125)
