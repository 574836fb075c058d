"""unionfuse explore: an image as a page of pictures."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from unionimage.cli.common import open_store

EXAMPLE = """\
unionfuse explore debian:12
unionfuse explore -o app.html app:1.0
unionfuse explore --serve app:1.0"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the image to look into")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-o", "--output", metavar="FILE", help="where to write the page, - for standard output"
    )
    where.add_argument(
        "--serve",
        action="store_true",
        help="show it at a port of 127.0.0.1 until Ctrl-C instead of writing a file",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="N",
        help="the port to serve at (default: a free one)",
    )


def run(args: argparse.Namespace) -> int:
    from unionimage.explore.page import page
    from unionimage.explore.survey import survey

    with open_store(args) as store, store.lease(f"explore {args.image}") as lease:
        image = store.image(args.image)
        for diff_id in image.diff_ids:
            lease.use_layer(diff_id)
        data = page(image, survey(image.layers), image.title)
        title = image.title
    if args.serve:
        return _serve(data, args.port)
    if args.output == "-" or (args.output is None and not sys.stdout.isatty()):
        sys.stdout.buffer.write(data)
        return 0
    path = args.output or title.replace("/", "-").replace(":", "-") + ".html"
    _write(path, data)
    print(path)
    return 0


def _serve(data: bytes, port: int) -> int:
    from unionimage.errors import UserError
    from unionimage.explore.serve import PageServer

    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: a port is a number below 65536")
    try:
        server = PageServer(data, port)
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}; give another, or none") from error
    with server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _write(path: str, data: bytes) -> None:
    """Write a file in one step."""
    from unionimage.errors import UserError
    from unionimage.store.files import new_id

    staged = Path(path).with_name(f".explore-{new_id()}")
    try:
        staged.write_bytes(data)
        os.replace(staged, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    finally:
        staged.unlink(missing_ok=True)
