"""What the spawner does for commands (see `unionfuse.daemon.spawner`), and asking it.

`python -m unionimage.spawn PATH LOCK` is the spawner itself. The everyday verbs of root are done by
it as a whole: in the command nothing is imported for them, it only passes signals on. What types
into a container is not among them: that has to be of the terminal's own session.
"""

from __future__ import annotations

import os
import sys
import time

from unionfuse.daemon import errand
from unionimage.container.places import run_path

TYPE_CHECKING = False  # see unionfuse.daemon.errand
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

PACKAGES = (
    *("", "/archive", "/changeset", "/cli", "/container", "/dockerfile", "/registry", "/store"),
)
VERBS = (
    *("build", "commit", "create", "exec", "history", "images", "kill", "load", "mount", "pause"),
    *("port", "ps", "pull", "push", "rename", "restart", "rm", "rmi", "run", "save", "start"),
    *("stop", "tag", "unpause", "wait"),
)
# What these import late. Never the parser of Dockerfiles: it runs threads, which no fork has.
IMPORTS = (
    "archive.load",
    "archive.save",
    "cli.engine",
    "cli.image_for_run",
    "cli.parser",
    "cli.progress",
    "commit",
    "container.create",
    "container.execute",
    "container.inventory",
    "container.lifecycle",
    "container.starting",
    "container.terminal",
    "dockerfile.build",
    "image_config",
    "mounts",
    "registry.pull",
    "registry.push",
    "store",
    "store.holds",
    "store.lease",
    "store.platforms",
)
TYPING_VERBS = ("exec", "run", "start")
TYPING_FLAGS = ("--a", "--d", "--i", "--t")  # the long ones begin so
TYPING_LETTERS = frozenset("ait")
KILLED = 125

_served_at = ""  # the socket of the spawner that forked this process


def ask(task: str, argument: Any, descriptors: Sequence[int]) -> Any:
    """Have the spawner do a task; its answer, or None: do it by yourself."""
    try:
        return errand.run(_socket(), task, argument, descriptors)
    except EOFError:
        return None


def command(words: Sequence[str]) -> int | None:
    """Have the spawner do a verb as a whole; its exit code, or None: do it by yourself."""
    verb = words[2:3] if words[:1] == ["--root"] else words[:1]
    if not verb or verb[0] not in VERBS or os.geteuid() != 0 or not _may_be_there():
        return None
    if verb[0] in TYPING_VERBS and _may_type(words):
        return None
    try:
        code = errand.run(_socket(), "command", list(words), [2, 1, 0], pass_signals=True)
    except EOFError:
        print(f"unionfuse {verb[0]}: it was killed before it was done", file=sys.stderr)
        return KILLED
    return None if code is None else int(code)


def _may_type(words: Sequence[str]) -> bool:
    """Whether this may be about a terminal: one is there, and a word looks like -a, -i or -t."""
    if not (os.isatty(0) or os.isatty(1)):
        return False
    return any(
        word.startswith(TYPING_FLAGS)
        or (word[:1] == "-" != word[1:2] and not TYPING_LETTERS.isdisjoint(word))
        for word in words
    )


def is_fork() -> bool:
    """Whether this is a process that the spawner has forked: all is imported here."""
    return bool(_served_at)


def start() -> None:
    """Have a spawner for the next command. That there can be none is no harm."""
    import contextlib
    from pathlib import Path

    from unionfuse.daemon import spawner

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
    if _served_at:
        return _served_at
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
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False, buffering=1)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    """Be the spawner until nobody needs it."""
    global _served_at
    import importlib
    from pathlib import Path

    from unionfuse.daemon import spawner
    from unionimage import cli

    for name in IMPORTS:
        importlib.import_module(f"unionimage.{name}")
    for verb in VERBS:
        cli.parser_of(verb, cli.load_verb(verb))
    starting = importlib.import_module("unionimage.container.starting")
    tasks = {"mount": spawner.mount, "start": starting.serve, "command": _command}
    path, lock = sys.argv[1:]
    os.set_inheritable(int(lock), False)
    _served_at = path
    spawner.serve(Path(path), int(lock), tasks)
    netavark = importlib.import_module("unionimage.container.netavark")
    netavark.put_away(patience=5.0)  # what was kept for the next container


if __name__ == "__main__":
    from unionimage import spawn  # the module that others import, too

    spawn.main()
