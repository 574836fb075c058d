"""What the spawner does for commands (see `unionfuse.spawner`), and asking it.

`python -m unionimage.spawn PATH LOCK` is the spawner itself. Short verbs of root are done by it as
a whole: in the command nothing is imported for them.
"""

from __future__ import annotations

import os
import sys
import time

from unionfuse import errand
from unionimage.container.places import run_path

TYPE_CHECKING = False  # see unionfuse.errand
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

PACKAGES = (
    *("", "/archive", "/changeset", "/cli", "/container", "/dockerfile", "/registry", "/store"),
)
VERBS = (
    *("build", "commit", "history", "images", "load", "mount", "ps", "pull", "push", "rm", "rmi"),
    *("save", "start", "tag"),
)
# What these import late. Never the parser of Dockerfiles: it runs threads, which no fork has.
IMPORTS = (
    "archive.load",
    "archive.save",
    "cli.engine",
    "cli.parser",
    "cli.progress",
    "commit",
    "container.inventory",
    "container.lifecycle",
    "container.starting",
    "dockerfile.build",
    "image_config",
    "mounts",
    "registry.pull",
    "registry.push",
    "store",
    "store.holds",
    "store.lease",
    "store.platforms",
    *(f"cli.{verb}" for verb in VERBS),
)
ATTACHING = ("-a", "-i", "--a", "--i", "--d")  # begin the flags of `start` that want a terminal

_forked = False


def ask(task: str, argument: Any, descriptors: Sequence[int]) -> Any:
    """Have the spawner do a task; its answer, or None when there is no spawner yet."""
    return errand.run(_socket(), task, argument, descriptors)


def command(words: Sequence[str]) -> int | None:
    """Have the spawner do a verb as a whole; its exit code, or None: do it by yourself."""
    verb = words[2:3] if words[:1] == ["--root"] else words[:1]
    if not verb or verb[0] not in VERBS or os.geteuid() != 0 or not _may_be_there():
        return None
    if verb[0] == "start" and any(word.startswith(ATTACHING) for word in words):
        return None
    code = ask("command", list(words), [2, 1, 0])
    return None if code is None else int(code)


def is_fork() -> bool:
    """Whether this is a process that the spawner has forked: all is imported here."""
    return _forked


def start() -> None:
    """Have a spawner for the next command. That there can be none is no harm."""
    import contextlib
    from pathlib import Path

    from unionfuse import spawner

    with contextlib.suppress(OSError):
        path = Path(_socket())
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        spawner.start(path, __name__)


def _may_be_there() -> bool:
    """Whether there is a spawner of whatever kind; to find one's own takes longer."""
    try:
        return any(name.startswith("spawner-") for name in os.listdir(run_path()))
    except OSError:
        return False


def _socket() -> str:
    here = os.path.dirname(__file__)
    return errand.socket_of(run_path(), [here + name for name in PACKAGES])


# --- the spawner ------------------------------------------------------------------------------


def _command(words: list[str], descriptors: list[int]) -> int:
    """The command line, in a process that was forked for it; returns its exit code."""
    from unionimage.cli import main

    for number in (0, 1):
        os.dup2(descriptors[2 - number], number)
    time.tzset()  # that of the caller's environment
    sys.stdin = os.fdopen(0, errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    """Be the spawner until nobody needs it."""
    global _forked
    import importlib
    from pathlib import Path

    from unionfuse import spawner

    for name in IMPORTS:
        importlib.import_module(f"unionimage.{name}")
    starting = importlib.import_module("unionimage.container.starting")
    tasks = {"mount": spawner.mount, "start": starting.serve, "command": _command}
    path, lock = sys.argv[1:]
    os.set_inheritable(int(lock), False)
    _forked = True
    spawner.serve(Path(path), int(lock), tasks, interrupted=("command",))


if __name__ == "__main__":
    from unionimage import spawn  # the module that others import, too

    spawn.main()
