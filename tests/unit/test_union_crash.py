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
from harness.mounts import Mounted, Stack, fingerprint, remove_tree, staging_files
from harness.scenarios import LAYERS, OPERATIONS, PREPARATIONS
from harness.snapshot import Tree, difference


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
    oracle: dict[str, str | None] = {"metacopy": "on"} if options.get("metacopy") else {}
    if options.get("userxattr"):
        oracle["userxattr"] = None
    mounted = Mounted("overlay", stack, oracle)
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


@pytest.mark.parametrize("options", [{"redirect_dir": "off"}, {"userxattr": True}])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if "director" in name])
def test_old_or_new_without_redirects(
    directory: Path, name: str, options: dict[str, object]
) -> None:
    """A merged directory is copied whole before the one rename; until then it is as it was."""
    _kill_at_every_step(directory, name, **options)


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
