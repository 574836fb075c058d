"""The process killed before each of its changing system calls, without a mount.

After it each file is wholly old or wholly new, nothing that was deleted is back, work is clean, and
kernel overlayfs sees the same. (The same through a mount, with daemons killed: tests/mount.)
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.direct import Direct, kill_at
from harness.layers import Dir, File, HardLink, Symlink
from harness.linux import RENAME_EXCHANGE
from harness.mounts import Mounted, Stack, fingerprint, remove_tree, staging_files
from harness.snapshot import Tree, difference

LAYERS = (
    {"d/top": "top", "full/x": "x", "w": None, "up/only": "o"},
    {
        "d/f": File(data=b"lower" * 3000, mode=0o4750, uid=3, gid=4, xattrs={"user.x": b"1"}),
        "d/sub/g": "g",
        "one": "linked",
        "d/two": HardLink("one"),
        "full/y": "y",
        "empty": Dir(mode=0o1777, xattrs={"user.dir": b"2"}),
        "s": Symlink("d"),
        "w/old": "old",
    },
)

OPERATIONS: dict[str, Callable[[Direct], None]] = {
    "copy up by chmod": lambda u: u.change("d/f", mode=0o600),
    "copy up by chown": lambda u: u.change("d/sub/g", uid=7, gid=8),
    "copy up by times": lambda u: u.change("d/f", atime_ns=1, mtime_ns=2),
    "copy up by xattr": lambda u: u.set_xattr("d/f", "user.new", b"n"),
    "copy up by write": lambda u: u.write("d/f", b"LOWER"),
    "copy up of a directory": lambda u: u.change("empty", mode=0o700),
    "copy up of a symlink": lambda u: u.change("s", uid=5, gid=5),
    "truncate": lambda u: u.change("d/f", size=7),
    "copy up of a hard link": lambda u: u.change("d/two", mode=0o600),
    "link of a lower file": lambda u: u.link("d/f", "d/sub/linked"),
    "link of a hard link": lambda u: u.link("one", "three"),
    "create": lambda u: u.create("d/sub/new"),
    "create over a whiteout": lambda u: u.create("w"),
    "mkdir": lambda u: u.mkdir("d/sub/new", 0o1770),
    "mkdir over a whiteout": lambda u: u.mkdir("w"),
    "symlink over a whiteout": lambda u: u.symlink("t", "w"),
    "mkfifo": lambda u: u.mkfifo("d/fifo"),
    "unlink a lower file": lambda u: u.unlink("d/f"),
    "unlink an upper file": lambda u: u.unlink("d/top"),
    "unlink a hard link": lambda u: u.unlink("one"),
    "rmdir a lower directory": lambda u: u.rmdir("empty"),
    "rename a lower file": lambda u: u.rename("d/f", "moved"),
    "rename over a file": lambda u: u.rename("d/f", "full/y"),
    "rename over a whiteout": lambda u: u.rename("d/sub/g", "w"),
    "rename a hard link": lambda u: u.rename("one", "d/one"),
    "rename a lower directory": lambda u: u.rename("d/sub", "sub"),
    "rename a merged directory": lambda u: u.rename("d", "full/d"),
    "rename a directory over an empty one": lambda u: u.rename("d", "empty"),
    "exchange files": lambda u: u.rename("d/f", "full/x", RENAME_EXCHANGE),
    "exchange a directory and a file": lambda u: u.rename("d", "one", RENAME_EXCHANGE),
}

# first these, unharmed; then the operation
PREPARATIONS: dict[str, Callable[[Direct], None]] = {
    "mkdir over what was deleted": lambda u: (u.unlink("d/sub/g"), u.rmdir("d/sub")),
    "rmdir of a directory full of whiteouts": lambda u: (u.unlink("full/x"), u.unlink("full/y")),
    "rename over a directory full of whiteouts": lambda u: (
        u.unlink("full/x"),
        u.unlink("full/y"),
    ),
    "unlink the last name of a link": lambda u: u.unlink("one"),
    "write through one name": lambda u: u.change("one", mode=0o640),
    "rename what was renamed": lambda u: u.rename("d", "e"),
}  # type: ignore[dict-item]
OPERATIONS |= {
    "mkdir over what was deleted": lambda u: u.mkdir("d/sub"),
    "rmdir of a directory full of whiteouts": lambda u: u.rmdir("full"),
    "rename over a directory full of whiteouts": lambda u: u.rename("d", "full"),
    "unlink the last name of a link": lambda u: u.unlink("d/two"),
    "write through one name": lambda u: u.unlink("d/two"),
    "rename what was renamed": lambda u: u.rename("e", "d"),
}


@pytest.fixture
def directory(tmp_path: Path, scratch: Path) -> Iterator[Path]:
    made = scratch / tmp_path.name
    made.mkdir()
    yield made
    remove_tree(made)


def killed_at(number: int, stack: Stack, prepare: Any, operation: Any, **options: Any) -> bool:
    """Do it in a process that is killed before its changing call `number`; say whether it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            union = Direct(stack, **options)
            prepare(union)
            kill_at(number)
            operation(union)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == -signal.SIGKILL


def seen(stack: Stack, **options: Any) -> tuple[Tree, Tree]:
    """The tree as the union shows it, and as kernel overlayfs does after it."""
    direct = Direct(stack, **options)
    ours = direct.snapshot()
    direct.close()
    assert stack.work is not None and staging_files(stack.work) == []
    mounted = Mounted("overlay", stack, {"metacopy": "on"} if options.get("metacopy") else {})
    mounted.mount()
    try:
        return ours, mounted.snapshot()
    finally:
        mounted.discard()


@pytest.mark.parametrize("name", OPERATIONS)
def test_old_or_new_and_nothing_in_between(directory: Path, name: str) -> None:
    _kill_at_every_step(directory, name)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "copy up" in name])
def test_old_or_new_with_metacopy(directory: Path, name: str) -> None:
    _kill_at_every_step(directory, name, metacopy=True)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "rename" in name])
def test_old_or_new_without_redirects(directory: Path, name: str) -> None:
    if "director" in name and ("merged" in name or "full" in name):
        pytest.skip("a full copy of a merged directory is many steps; see docs on userxattr")
    _kill_at_every_step(directory, name, redirect_dir="off")


def _kill_at_every_step(directory: Path, name: str, **options: Any) -> None:
    prepare = PREPARATIONS.get(name, lambda union: None)
    operation = OPERATIONS[name]

    def undisturbed(where: str, *steps: Callable[[Direct], None]) -> tuple[Tree, Tree]:
        stack = Stack.make(directory / where, LAYERS)
        direct = Direct(stack, **options)
        for step in steps:
            step(direct)
        direct.close()
        return seen(stack, **options)

    before = undisturbed("before", prepare)
    after = undisturbed("after", prepare, operation)
    number, killed = 0, True
    outcomes = set()
    while killed:
        number += 1
        assert number < 200
        stack = Stack.make(directory / f"kill{number}", LAYERS)
        layers = [fingerprint(layer) for layer in stack.lowers]
        killed = killed_at(number, stack, prepare, operation, **options)
        now = seen(stack, **options)
        which = [state for state in (before, after) if state == now]
        assert which, (
            f"killed before change {number}, neither the old tree:\n"
            + "\n".join(difference(before[0], now[0]) + difference(before[1], now[1]))
            + "\nnor the new one:\n"
            + "\n".join(difference(after[0], now[0]) + difference(after[1], now[1]))
        )
        outcomes.add(which[0] is after)
        assert [fingerprint(layer) for layer in stack.lowers] == layers
        remove_tree(stack.base)
    assert number > 1, "nothing was killed"
    assert now == after
