"""When copies are staged ahead, and when they are not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.direct import Direct, fail_at
from harness.layers import File, Layer
from harness.mounts import Stack, remove_tree, staging_files
from harness.waiting import wait_until

from unionfuse import syscalls
from unionfuse.changes import ahead

NAMES = [f"{number:02}" for number in range(30)]
LAYERS: list[Layer] = [{f"d/{name}": File(data=name * 100) for name in NAMES} | {"e/f": "f"}]


@pytest.fixture
def stack(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    fail_at(0, 0)
    monkeypatch.setattr(syscalls, "counts_changes", lambda: False)
    made = scratch / tmp_path.name
    yield Stack.make(made, LAYERS)
    remove_tree(made)


def waiting(stack: Stack) -> Direct:
    """A union that believes that its copies wait long for the device."""
    union = Direct(stack)
    staging = union.union._copy._staging
    assert staging is not None
    staging.wait = 10.0
    return union


def staged(stack: Stack) -> int:
    assert stack.work is not None
    return len(staging_files(stack.work))


def test_neighbours_are_staged_once_some_were_copied(stack: Stack) -> None:
    union = waiting(stack)
    order = union.names("d")
    for name in order[:2]:
        union.change(f"d/{name}", mode=0o600)
    assert staged(stack) == 0
    for name in order[2:4]:
        union.change(f"d/{name}", mode=0o600)
    wait_until(lambda: staged(stack) > 2, 20, "the next ones are staged")
    for name in order[4:]:
        union.change(f"d/{name}", mode=0o600)
        assert union.read(f"d/{name}") == name.encode() * 100
    assert staged(stack) == 0
    union.close()


def test_what_nobody_fetches_goes(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_IDLE", 0.1)
    union = waiting(stack)
    for name in union.names("d")[:4]:
        union.change(f"d/{name}", mode=0o600)
    wait_until(lambda: staged(stack) > 2, 20, "the next ones are staged")
    wait_until(lambda: staged(stack) == 0, 20, "they are thrown away")
    union.close()


def test_nothing_is_left_behind(stack: Stack) -> None:
    union = waiting(stack)
    for name in union.names("d")[:4]:
        union.change(f"d/{name}", mode=0o600)
    union.close()
    assert staged(stack) == 0


@pytest.mark.parametrize(
    ("changes", "least"), [({"size": 1}, 0.0), ({"mode": 0o600}, 100.0)], ids=["data", "quick"]
)
def test_nothing_is_staged_without_need(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], least: float
) -> None:
    monkeypatch.setattr(ahead, "_WORTH_IT", least)
    union = waiting(stack)
    for name in union.names("d")[:20]:
        union.change(f"d/{name}", **changes)
        assert staged(stack) == 0
    union.close()
