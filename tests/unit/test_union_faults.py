"""Errors from the file system below, at each changing system call in turn, without a mount.

The caller gets the errno; the tree is as before or as after, live and reopened; work is clean; the
union goes on working.
"""

import errno
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from harness.direct import Direct, changing_calls, fail_at
from harness.mounts import Stack, fingerprint, remove_tree, staging_files
from harness.scenarios import LAYERS, OPERATIONS, PREPARATIONS
from harness.snapshot import Tree, difference

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOMEM, errno.EROFS)


@pytest.fixture
def directory(tmp_path: Path, scratch: Path) -> Iterator[Path]:
    made = scratch / tmp_path.name
    made.mkdir()
    yield made
    fail_at(0, 0)
    remove_tree(made)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_at_any_step(directory: Path, name: str) -> None:
    _fail_at_every_step(directory, name)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "copy up" in name])
def test_an_error_at_any_step_with_metacopy(directory: Path, name: str) -> None:
    _fail_at_every_step(directory, name, metacopy=True)


def _reopened(stack: Stack, options: Any) -> Tree:
    union = Direct(stack, **options)
    try:
        return union.snapshot()
    finally:
        union.close()


def _fail_at_every_step(directory: Path, name: str, **options: Any) -> None:
    prepare = PREPARATIONS.get(name, lambda union: None)
    operation = OPERATIONS[name]

    stack = Stack.make(directory / "whole", LAYERS)
    union = Direct(stack, **options)
    prepare(union)
    before = union.snapshot()
    fail_at(0, 0)
    operation(union)
    steps, after = changing_calls(), union.snapshot()
    union.close()
    assert steps > 0

    for number, code in zip(range(1, steps + 1), cycle(ERRORS), strict=False):
        stack = Stack.make(directory / f"step{number}", LAYERS)
        layers = [fingerprint(layer) for layer in stack.lowers]
        union = Direct(stack, **options)
        prepare(union)
        fail_at(number, code)
        error = None
        try:
            operation(union)
        except OSError as caught:
            error = caught.errno
        fail_at(0, 0)
        where = f"{errno.errorcode[code]} at change {number} of {steps}"
        assert error in (None, code), f"{where}: the caller got {errno.errorcode[error or 0]}"
        now = union.snapshot()
        allowed = [after] if error is None else [before, after]
        assert now in allowed, (
            f"{where}, error {error}; the live tree is not the old one:\n"
            + "\n".join(difference(before, now))
        )
        if now != after:
            operation(union)  # nothing is left that would hinder it
            assert union.snapshot() == after, f"{where}: the second try\n" + "\n".join(
                difference(after, union.snapshot(), ("wanted", "seen"))
            )
        union.close()
        reopened = _reopened(stack, options)
        assert reopened == after, f"{where}: reopened\n" + "\n".join(
            difference(after, reopened, ("wanted", "seen"))
        )
        assert stack.work is not None and staging_files(stack.work) == [], where
        assert [fingerprint(layer) for layer in stack.lowers] == layers
        remove_tree(stack.base)
