"""The journal: what another daemon finds in it, whenever the first one died."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unionfuse.survival import journal as module
from unionfuse.survival.journal import SharedJournal
from unionfuse.survival.memory import SharedMemory, TakeOverError, Word
from unionfuse.tree.node import Directory, Node


class Keeper:
    """Descriptors by name, as the keeper would have them."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def keep(self, name: str, descriptor: int) -> None:
        self.kept[name] = descriptor

    def let_go(self, name: str) -> None:
        self.kept.pop(name, None)


def named(number: int, parent: Directory, name: bytes, ino: int = 0) -> Node:
    node = Node(0o100000)
    node.id, node.ino, node.names = number, ino or number, [(parent, name)]
    return node


def root() -> Directory:
    directory = Directory()
    directory.id = 1
    return directory


def again(memory: SharedMemory) -> SharedJournal:
    """The journal as the next daemon reads it."""
    return SharedJournal(memory, Keeper())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["name", "count", "drop", "going", "gone", "open", "close", "compact"]),
        st.integers(2, 9),
        st.binary(min_size=1, max_size=255),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS)
def test_another_daemon_finds_what_was_written(actions: list[tuple[str, int, bytes]]) -> None:
    """After every single step: the records, and what a model says that they are."""
    memory = SharedMemory.create()
    try:
        written, top = SharedJournal(memory, Keeper()), root()
        nodes: dict[int, Node] = {}
        names: dict[int, bytes] = {}
        left: set[int] = set()
        handles: dict[int, int] = {}
        for action, number, name in actions:
            if action == "name" and number not in left:
                node = nodes.setdefault(number, named(number, top, name))
                node.names = [(top, name)]
                written.name(node)
                names[number] = name
            elif action == "count" and number in names:
                nodes[number].lookups += len(name)
                written.count(nodes[number])
            elif action == "drop":
                written.drop(number)
                nodes.pop(number, None)
                names.pop(number, None)
                left.discard(number)
            elif action in ("going", "gone") and number in names:
                written.going(nodes[number], lambda node: b"farewell %d" % node.id)
                if action == "gone":
                    written.gone(nodes[number])
                    del names[number]
                    left.add(number)
            elif action == "open":
                handle = written.fresh_handle()
                written.opened(handle, number, len(name))
                handles[handle] = number
            elif action == "close" and handles:
                handle = min(handles)
                assert written.released(handle) == handles.pop(handle)
            elif action == "compact":
                written._compact()
            found = again(memory)
            assert {n: found.place(n) for n in range(2, 10)} == {
                n: (1, names[n]) if n in names else None for n in range(2, 10)
            }
            assert {n for n in range(2, 10) if found.has(n)} == set(nodes)
            for n in left:
                assert found.farewell(n) == b"farewell %d" % n
            assert {h.number: h.node for h in found.handles()} == handles
            for n, node in nodes.items():
                anew = named(0, top, names.get(n, b"?"), node.ino)
                found.found(n, anew)
                assert (anew.lookups, anew.ino) == (node.lookups, node.ino)
    finally:
        del written
        memory.close()


def test_a_record_that_was_not_committed_does_not_count() -> None:
    memory = SharedMemory.create()
    journal, top = SharedJournal(memory, Keeper()), root()
    journal.name(named(5, top, b"old"))
    end = memory.words[Word.END]
    journal.name(named(5, top, b"new"))
    assert again(memory).place(5) == (1, b"new")
    # The process died after the record was written and before the end was moved; then after that,
    # but before the old record was marked dead.
    old = end - (module._RECORD.size + 8)
    memory.words[old // 8] |= 1 << 32
    assert again(memory).place(5) == (1, b"new")
    memory.words[Word.END] = end
    memory.words[old // 8] |= 1 << 32
    assert again(memory).place(5) == (1, b"old")
    memory.close()


def test_a_new_node_claims_the_id_of_its_name_only_if_it_is_the_same_file() -> None:
    memory = SharedMemory.create()
    SharedJournal(memory, Keeper()).name(named(1 << 62, root(), b"file", ino=77))
    found = again(memory)
    assert found.claim(named(0, root(), b"other", ino=77)) == 0
    assert found.claim(named(0, root(), b"file", ino=78)) == 0
    assert found.claim(named(0, root(), b"file", ino=77)) == 1 << 62
    assert found.claim(named(0, root(), b"file", ino=77)) == 0  # it has been given
    memory.close()


def test_a_hard_link_claims_the_id_that_another_name_of_it_has() -> None:
    memory = SharedMemory.create()
    SharedJournal(memory, Keeper()).name(named(50, root(), b"first", ino=77))
    node = named(0, root(), b"second", ino=77)
    node.upper_key = 77
    assert again(memory).claim(node) == 50
    memory.close()


def test_handles_and_made_up_ids_are_never_given_twice() -> None:
    memory = SharedMemory.create()
    given: list[tuple[int, int]] = []
    for _ in range(3):
        journal = again(memory)
        given += [(journal.fresh_id(), journal.fresh_handle()) for _ in range(3)]
    assert len({number for number, _ in given}) == len({handle for _, handle in given}) == 9
    memory.close()


def test_a_full_journal_says_so_and_nobody_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "HALF", module._SCRATCH + (1 << 16))
    memory = SharedMemory.create()
    journal, top = SharedJournal(memory, Keeper()), root()
    for number in range(2, 2000):
        journal.name(named(number, top, b"x" * 100))
    assert "a crash would end this mount" in caplog.text
    with pytest.raises(TakeOverError, match="full"):
        SharedMemory.take_over(os.dup(memory.descriptor))
    memory.close()


@pytest.mark.parametrize("damage", [1 << 20, 3, 0])
def test_a_damaged_journal_is_refused(damage: int) -> None:
    memory = SharedMemory.create()
    SharedJournal(memory, Keeper()).name(named(5, root(), b"name"))
    at = module.JOURNAL_AT // 8
    memory.words[at] = memory.words[at] & ~0xFFFFFFFF | damage
    with pytest.raises(TakeOverError, match="damaged"):
        again(memory)
    memory.close()


def test_memory_of_another_version_is_refused() -> None:
    memory = SharedMemory.create()
    memory.words[Word.MAGIC] += 1
    with pytest.raises(TakeOverError, match="another version"):
        SharedMemory.take_over(os.dup(memory.descriptor))
    memory.close()


NAMES = [(b"file", 0o100000), (b"directory", 0o040000), (b"x" * 255, 0o100000), (b"link", 0o120000)]


def test_another_daemon_finds_the_names_of_tables() -> None:
    memory = SharedMemory.create()
    written, top = SharedJournal(memory, Keeper()), root()
    first, known = written.table_ids(1, NAMES)
    inside, _ = written.table_ids(first + 1, NAMES[:2])
    assert not known and inside == first + 4
    assert written.table_ids(1, NAMES) == (first, False)  # the same as before
    moved = named(inside, top, b"moved")
    written.name(moved)
    written._compact()
    found = again(memory)
    assert [found.place(first + n) for n in range(4)] == [(1, name) for name, _ in NAMES]
    assert found.place(inside) == (1, b"moved") and found.place(inside + 1) == (
        first + 1,
        b"directory",
    )
    assert found.place(inside + 2) is None and found.place(first - 1) is None
    assert not found.has(first)
    assert found.table_ids(1, NAMES) == (first, True)
    # Where it merges to something else, names get ids when they are asked for.
    assert found.table_ids(first + 1, NAMES) == (0, False)
    found.drop_table(1)
    assert found.place(first) is None and again(memory).place(first) is None
    third, _ = found.table_ids(77, NAMES)
    assert third >= first + 6
    found.drop_all_tables()
    last = again(memory)
    assert last.place(third) is None and last.place(inside) == (1, b"moved")
    # The kernel has another id for one of the names in it.
    assert last.table_ids(1, NAMES) == (0, False) and last.table_ids(77, NAMES)[0] > third
    del written, found, last
    memory.close()
