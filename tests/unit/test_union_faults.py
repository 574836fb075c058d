"""Errors from the file system below, at each changing system call in turn, without a mount.

The caller gets the errno; the tree is as before or as after, live and reopened; work is clean, no
descriptor stays open, and the union goes on working.
"""

import errno
import os
import resource
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
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
        descriptors = os.listdir("/proc/self/fd")
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
        assert os.listdir("/proc/self/fd") == descriptors, f"{where}: a descriptor stays open"
        reopened = _reopened(stack, options)
        assert reopened == after, f"{where}: reopened\n" + "\n".join(
            difference(after, reopened, ("wanted", "seen"))
        )
        assert stack.work is not None and staging_files(stack.work) == [], where
        assert [fingerprint(layer) for layer in stack.lowers] == layers
        remove_tree(stack.base)


def test_too_few_descriptors_for_the_readers_of_a_copy(directory: Path) -> None:
    """A copy that is visible has been made, and who answers from the index has been told."""
    union = Direct(Stack.make(directory / "few", LAYERS), indexed=True)
    told = list[int]()
    union.union.watcher = SimpleNamespace(changed=told.append)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with union.at("d/f") as entry:
        handles = [union.union.open(entry.node, os.O_RDONLY) for _ in range(30)]
        used, error = set(os.listdir("/proc/self/fd")), errno.EMFILE
        free = [number for number in range(1000) if str(number) not in used]
        for few in range(1, 25):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[few], limits[1]))
            try:
                union.union.copy_up(entry.node)
                error = 0
            except OSError as caught:
                assert caught.errno == error
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            in_upper = union.union.tree.nodes[entry.node].in_upper
            assert in_upper == (entry.node in told) == (not error)
            if not error:
                break
        assert not error
        assert {union.union.read(handle, 0, 1 << 20) for handle in handles} == {union.read("d/f")}
        for handle in handles:
            union.union.release(handle)
    union.close()
