"""A daemon killed under its mount, and a new mount. (Every step: unit/test_union_crash.py.)"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.layers import Dir, File, HardLink
from harness.mounts import Workshop, staging_files
from harness.snapshot import difference

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.timeout(240)]

LAYERS = (
    {"d/top": "top", "full/x": "x"},
    {
        "d/f": File(data=b"lower" * 3000, mode=0o4750, uid=3, xattrs={"user.x": b"1"}),
        "one": "linked",
        "d/two": HardLink("one"),
        "full/y": "y",
        "empty": Dir(mode=0o1777),
    },
)


def _replace_a_tree(root: Path) -> None:
    os.unlink(root / "full/x")
    os.unlink(root / "full/y")
    os.rmdir(root / "full")
    os.mkdir(root / "full", 0o700)


CHANGES: dict[str, Callable[[Path], None]] = {
    "copy up": lambda root: os.chmod(root / "d/f", 0o600),
    "whiteout": lambda root: os.unlink(root / "d/f"),
    "rename": lambda root: os.rename(root / "d", root / "empty"),
    "hard link": lambda root: os.chmod(root / "d/two", 0o600),
    "opaque": _replace_a_tree,
}


@pytest.mark.parametrize("name", CHANGES)
def test_old_or_new_after_the_daemon_was_killed(workshop: Workshop, name: str) -> None:
    """Two kills: in the middle of the changing calls, and before the last."""
    whole = workshop(*LAYERS)
    states = [whole.snapshot()]
    if name == "opaque":
        steps = [lambda r: os.unlink(r / "full/x"), lambda r: os.unlink(r / "full/y"),
                 lambda r: os.rmdir(r / "full"), lambda r: os.mkdir(r / "full", 0o700)]  # fmt: skip
    else:
        steps = [CHANGES[name]]
    for step in steps:
        step(whole.root)
        states.append(whole.snapshot())
    calls = _count_changing_calls(workshop, name)
    for number in sorted({max(1, calls // 2), calls}):
        armed = workshop.directory / f"armed{number}"
        tree = workshop(
            *LAYERS,
            options={"keeper": "off"},
            environment={
                "UNIONFUSE_TEST_KILL_AT": str(number),
                "UNIONFUSE_TEST_ARMED_BY": str(armed),
            },
        )
        armed.touch()
        with contextlib.suppress(OSError):
            CHANGES[name](tree.root)
        assert tree.daemon is not None
        assert tree.daemon.process.wait(20) == -9, f"not killed at change {number} of {calls}"
        tree.kill()
        tree.mount()
        seen = tree.snapshot()
        assert seen in states, f"killed at change {number} of {calls}:\n" + "\n".join(
            difference(states[0], seen, ("before", "now"))
        )
        assert staging_files(tree.work) == []
        CHANGES[name](tree.root) if seen == states[0] else None
        tree.remount("overlay", {})
        assert tree.snapshot() in states


def _count_changing_calls(workshop: Workshop, name: str) -> int:
    armed, trace = workshop.directory / "armed", workshop.directory / "trace"
    tree = workshop(
        *LAYERS,
        environment={
            "UNIONFUSE_TEST_TRACE": str(trace),
            "UNIONFUSE_TEST_ARMED_BY": str(armed),
        },
    )
    armed.touch()
    CHANGES[name](tree.root)
    armed.unlink()
    tree.unmount()
    return len(trace.read_text().splitlines())


def test_a_killed_daemon_gives_the_upper_free_at_once(workshop: Workshop) -> None:
    tree = workshop(*LAYERS, options={"keeper": "off"})
    (tree / "d/f").write_text("written")
    tree.kill()
    tree.mount()
    assert (tree / "d/f").read_text() == "written"
