"""What the spawner does for commands (see `unionfuse.spawner`), and asking it.

`python -m unionimage.spawn PATH LOCK` is the spawner itself.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unionfuse import spawner
from unionimage.container.places import run_directory

IMPORTS = ("mounts", "store", "container.inventory")  # what a start imports late
PACKAGES = ("", "container", "store", "changeset")


def ask(task: str, argument: Any, descriptors: Sequence[int]) -> Any:
    """Have the spawner do a task; its answer, or None when there is no spawner yet."""
    return spawner.ask(_socket(), task, argument, descriptors)


def start() -> None:
    """Have a spawner for the next command. That there can be none is no harm."""
    with contextlib.suppress(OSError):
        path = _socket()
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        spawner.start(path, __name__)


def _socket() -> Path:
    here = Path(__file__).parent
    return spawner.socket_of(run_directory(), [here / name for name in PACKAGES])


def main() -> None:
    from unionimage.container import starting

    for name in IMPORTS:
        importlib.import_module(f"unionimage.{name}")

    path, lock = sys.argv[1:]
    os.set_inheritable(int(lock), False)
    tasks: dict[str, spawner.Task] = {"mount": spawner.mount, "start": starting.serve}
    spawner.serve(Path(path), int(lock), tasks)


if __name__ == "__main__":
    main()
