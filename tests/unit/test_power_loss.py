"""The disk as a power cut may leave it, at every moment of an operation (harness.powerloss).

Copy-up, whiteouts and renames are whole or have not happened; what fsync answered for is there.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.direct import Direct
from harness.mounts import Stack, remove_tree, staging_files
from harness.powerloss import Recorder, disks
from harness.scenarios import LAYERS, OPERATIONS, PREPARATIONS
from harness.snapshot import Tree, difference

ORDERED = pytest.mark.parametrize(
    "ordered",
    [pytest.param(False, id="fsync", marks=pytest.mark.long), pytest.param(True, id="ordered")],
)

Operation = Callable[[Direct], object]


@pytest.fixture
def directory(tmp_path: Path, scratch: Path) -> Iterator[Path]:
    made = scratch / tmp_path.name
    made.mkdir()
    yield made
    remove_tree(made)


@ORDERED
@pytest.mark.parametrize("name", OPERATIONS)
def test_old_or_new(directory: Path, name: str, ordered: bool) -> None:
    prepare = PREPARATIONS.get(name, lambda union: None)
    cuts = 0
    for seen, before, after, _ in power_cuts(directory, prepare, OPERATIONS[name], ordered):
        cuts += 1
        assert seen in (before, after), "neither the old tree:\n" + "\n".join(
            [*difference(before, seen), "nor the new one:", *difference(after, seen)]
        )
    assert cuts > 1


def opened(union: Direct, path: str, action: Callable[[int], object]) -> None:
    with union.at(path) as entry:
        handle = union.union.open(entry.node, os.O_RDWR)
        action(handle)
        union.union.fsync(handle, False)
        union.union.release(handle)


def sync_directory(union: Direct, path: str) -> None:
    with union.at(path) as entry:
        handle = union.union.opendir(entry.node)
        union.union.fsyncdir(handle, False)
        union.union.release(handle)


def _create(union: Direct) -> None:
    union.create("d/sub/new")
    opened(union, "d/sub/new", lambda handle: union.union.write(handle, 0, b"written"))


ACKNOWLEDGED: dict[str, Operation] = {
    "a new file": _create,
    "a lower file": lambda u: opened(u, "d/f", lambda h: u.union.write(h, 3, b"written")),
    "an empty write to a lower file": lambda u: opened(u, "d/sub/g", lambda h: None),
    "a hard link": lambda u: opened(u, "d/two", lambda h: u.union.write(h, 0, b"written")),
    "a renamed file": lambda u: (u.rename("d/f", "moved"), opened(u, "moved", lambda h: None)),
    "a new directory": lambda u: (u.mkdir("d/made"), sync_directory(u, "d")),
    "an unlinked file": lambda u: (u.unlink("d/f"), sync_directory(u, "d")),
    "a renamed directory": lambda u: (u.rename("d", "full/d"), sync_directory(u, "full")),
    "everything": lambda u: (u.mkdir("d/made"), u.create("w", b"w"), u.union.sync()),
}


@ORDERED
@pytest.mark.parametrize("name", ACKNOWLEDGED)
def test_what_fsync_said_is_there(directory: Path, name: str, ordered: bool) -> None:
    lost, kept = 0, 0
    for seen, _, after, answered in power_cuts(
        directory, lambda union: None, ACKNOWLEDGED[name], ordered
    ):
        if answered:
            kept += 1
            assert seen == after, "fsync had returned, and this is missing:\n" + "\n".join(
                difference(after, seen, ("acknowledged", "on disk"))
            )
        lost += seen != after
    assert kept
    assert lost or "empty" in name  # the model does lose what nobody has waited for


def power_cuts(
    directory: Path, prepare: Operation, operation: Operation, ordered: bool
) -> Iterator[tuple[Tree, Tree, Tree, bool]]:
    """(tree after a cut, tree before, tree at the end, everything was done) of each power cut."""
    stack = Stack.make(directory / "whole", LAYERS)
    union = prepared(stack, ordered)
    prepare(union)
    before = union.snapshot()
    union.close()
    first = directory / "first"
    first.mkdir()
    subprocess.run(["cp", "-a", stack.base / "upper", stack.base / "work", first], check=True)
    union = prepared(stack, ordered)
    recorder = Recorder(stack)
    try:
        operation(union)
    finally:
        recorder.stop()
    after = union.snapshot()
    union.close()
    where = directory / "cut"
    where.mkdir()
    last = recorder.moments[-1][1]
    cut = Stack(where, stack.lowers, where / "merged", where / "upper", where / "work")
    for _, _, moment in disks(recorder, first, where):
        union = prepared(cut, ordered)
        try:
            yield union.snapshot(), before, after, moment is last
        finally:
            union.close()
        assert cut.work is not None and staging_files(cut.work) == []


def prepared(stack: Stack, ordered: bool) -> Direct:
    union = Direct(stack)
    upper = union.union.tree.upper
    assert upper is not None
    upper._keeps_order = ordered
    return union
