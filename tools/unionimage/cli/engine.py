"""What the verbs about containers share: the engine of the store, and one line per container."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from unionimage.errors import UserError

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine
    from unionimage.container.state import Container
    from unionimage.store import Store


def open_engine(args: argparse.Namespace) -> Engine:
    """The containers of the store that was asked for. Opens nothing yet."""
    from pathlib import Path

    from unionimage import config
    from unionimage.container.lifecycle import Engine

    root = Path(args.root or config.load().root or config.default_root()).absolute()

    if os.geteuid() != 0:
        from unionimage.container import rootless

        rootless.enter(root)

    def open_store() -> Store:
        from unionimage.store import Store

        return Store.open(root)

    return Engine(root, open_store)


def for_each(engine: Engine, names: Iterable[str], action: Callable[[Container], object]) -> int:
    """Do it to each, print its name as it was given; errors are said and the others go on."""
    code = 0
    for name in names:
        try:
            action(engine.find(name))
        except UserError as error:
            print(f"unionfuse: {error.message}", file=sys.stderr)
            code = 1
        else:
            print(name)
    return code


def confirm(warning: str) -> bool:
    """Ask before something is removed; without a terminal to ask on, the answer is no."""
    if not sys.stdin.isatty():
        print(f"unionfuse: {warning} Say so with --force", file=sys.stderr)
        return False
    print(f"WARNING! {warning}")
    return input("Are you sure you want to continue? [y/N] ").strip().lower() in ("y", "yes")
