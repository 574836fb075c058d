"""Directories that are merged in compiled code: as the union does it, or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import layers as shapes
from harness.layers import Dir, build
from harness.listing import records
from hypothesis import given, settings
from hypothesis import strategies as st

from unionfuse.express._lane import Loop
from unionfuse.layers.layer import LayerStack, Place
from unionfuse.options import parse
from unionfuse.survival.journal import SharedJournal
from unionfuse.survival.memory import SharedMemory
from unionfuse.tree._tables import Tables
from unionfuse.tree.journal import Journal
from unionfuse.tree.view import merge
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode

REGULAR, DIRECTORY = stat.S_IFREG, stat.S_IFDIR
FIRST = 1 << 62
NO_INODES = (0, 0)

few_names = st.sampled_from(
    [*"abcdefgh", "n" * 255, "ä", ".dot", ".wh.a", ".wh..wh..opq", "pipe", *map(str, range(90))]
)
layers_of_one_directory = st.lists(
    st.dictionaries(few_names, st.sampled_from(["file", "directory", "link"]), max_size=60),
    min_size=1,
    max_size=5,
)


@given(layers_of_one_directory)
@settings(deadline=None, max_examples=60)
def test_a_directory_is_merged_as_the_union_merges_it(layers: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        for number, content in enumerate(layers):
            fill(Path(base, str(number), "top"), content)
        stack = LayerStack.open([os.fsencode(f"{base}/{n}") for n in range(len(layers))])
        tables = Tables([layer.descriptor for layer in stack.layers])
        places = [(number, b"", os.stat(base).st_dev, 5 << 53) for number in range(len(layers))]
        having = tuple(range(len(layers)))
        tables.add(1, FIRST, (7, 7), places, [(b"top", DIRECTORY, having)])
        tables.open(1, False)
        told: list[tuple[int, list[tuple[bytes, int]]]] = []

        def ids(number: int, kinds: list[tuple[bytes, int]]) -> int:
            told.append((number, kinds))
            return FIRST + 1000

        merged = merge([Place(layer, b"top") for layer in stack.layers], lambda *_: ())
        special = any(name.startswith(".wh.") for content in layers for name in content)
        special = special or any(content.get("pipe") == "file" for content in layers)
        before = len(os.listdir("/proc/self/fd"))
        assert tables.merge(FIRST, ids) == (not special)
        if special:
            assert len(os.listdir("/proc/self/fd")) == before
        else:
            expected = [(name, stub.kind) for name, stub in merged.stubs().items()]
            assert told == ([(FIRST, expected)] if expected else [])
            assert tables.names(FIRST, 0, 1000) == [name for name, _ in expected]
            assert tables.places(FIRST) == [(number, b"top") for number in having]
            for position, (name, stub) in enumerate(merged.stubs().items()):
                found = (stub.kind, stub.positions, FIRST + 1000 + position)
                assert tables.get(FIRST, name) == found
            assert not tables.merge(FIRST, ids)  # it is here already
            compare(merged_without_asking(stack, places), tables)
        stack.close()


def merged_without_asking(stack: LayerStack, places: list[tuple[int, bytes, int, int]]) -> Tables:
    """The same as the tables of the test before, by a listing alone."""
    tables = Tables([layer.descriptor for layer in stack.layers])
    having = tuple(range(len(places)))
    tables.add(1, FIRST, (7, 7), places, [(b"top", DIRECTORY, having)])
    tables.open(1, False)
    tables.give_ids(FIRST + 1000, 1000)
    loop = Loop(-1, lambda *_: None)
    loop.use_tables(tables, True)
    assert loop.list_from_tables(FIRST, 0, 1 << 17) is not None
    return tables


def compare(one: Tables, other: Tables) -> None:
    listed = one.names(FIRST, 0, 1000)
    assert listed == other.names(FIRST, 0, 1000)
    assert one.places(FIRST) == other.places(FIRST)
    for name in listed:
        assert one.get(FIRST, name) == other.get(FIRST, name)


def fill(directory: Path, content: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    for name, kind in content.items():
        if name == "pipe" and kind == "file":
            os.mkfifo(directory / name)
        elif kind == "file":
            (directory / name).touch()
        elif kind == "link":
            (directory / name).symlink_to("x")
        else:
            (directory / name).mkdir()


def test_a_directory_with_marks_is_for_the_union_to_merge(tmp_path: Path) -> None:
    layer = build(tmp_path / "layer", {"plain/x": "", "opaque": Dir(opaque="kernel"), "file": ""})
    root = os.open(layer, os.O_PATH)
    tables = Tables([root])
    place = (0, b"", os.stat(layer).st_dev, 0)
    listed = [(b"plain", DIRECTORY, (0,)), (b"opaque", DIRECTORY, (0,)), (b"file", REGULAR, (0,))]
    tables.add(1, FIRST, NO_INODES, [place], [*listed, (b"gone", DIRECTORY, (0,))])
    assert not tables.merge(FIRST, lambda *_: FIRST + 10)  # not open yet
    tables.open(1, False)
    for number in (FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 4, 1, 0):
        assert not tables.merge(number, lambda *_: FIRST + 10)
    assert not tables.merge(FIRST, lambda *_: 0)  # the journal has other ids
    with pytest.raises(ZeroDivisionError):
        tables.merge(FIRST, lambda *_: 1 // 0)
    assert tables.merge(FIRST, lambda *_: FIRST + 10)
    assert tables.get(FIRST, b"x") == (REGULAR, (0,), FIRST + 10)
    tables.take(FIRST)
    tables.release(FIRST)
    assert not tables.merge(FIRST, lambda *_: FIRST + 20)  # the union's now
    os.close(root)


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Place]]:
    """What the union merges by itself, not by a table."""
    merged = list[Sequence[Place]]()
    monkeypatch.setattr(
        "unionfuse.tree.merging.merge",
        lambda places, _: (merged.append(places), merge(places, _))[1],
    )
    return merged


def union_of(
    base: Path, *contents: shapes.Layer, upper: shapes.Layer, journal: Journal | None = None
) -> Union:
    layers = [build(base / str(number), content) for number, content in enumerate(contents)]
    build(base / "upper", upper)
    (base / "work").mkdir()
    lowers = ":".join(map(str, layers))
    option = f"lowerdir={lowers},upperdir={base}/upper,workdir={base}/work"
    options = parse(["-o", option, "/mnt"]).options
    return Union(LayerStack.open(options.lowerdir), options, journal=journal)


def test_a_listing_by_the_union_merges_nothing_for_a_link_count(
    tmp_path: Path, merged: list[Sequence[Place]]
) -> None:
    opaque: shapes.Layer = {"opaque": Dir(opaque="aufs"), "marked": Dir(opaque="kernel")}
    union = union_of(
        tmp_path,
        {"plain/x": "", "alone/x/y": "", **opaque},
        {"plain/sub/y": "", "opaque/y": "", "marked/y": ""},
        upper={"new": ""},
    )
    with union.lock:
        listed = {name: entry.attributes.nlink for name, _, entry in union.listing(1, 0)}
    assert listed == {b"plain": 1, b"opaque": 2, b"marked": 2, b"alone": 3, b"new": 1}
    assert sorted(places[0].path for places in merged) == [b"", b"marked", b"opaque"]
    union.close()


def test_a_walk_has_the_root_merged_by_the_union_and_nothing_else(
    tmp_path: Path, merged: list[Sequence[Place]]
) -> None:
    content: shapes.Layer = {f"d{n}/sub/x": "" for n in range(5)}
    union = union_of(tmp_path, content, content, upper={})
    loop = Loop(-1, lambda *_: None)
    loop.use_tables(union.tree.tables, True)
    waiting, walked = [1], 0
    while waiting:
        number = waiting.pop()
        with union.lock:
            union.tree.load_for_listing(number)
            answer = loop.list_from_tables(number, 0, 4096)
        assert answer is not None
        found = [(name, node) for name, node, _ in records(answer) if name[:1] != b"."]
        waiting += [node for name, node in found if name != b"x"]
        walked += len(found)
    assert walked == 5 * 3
    assert len(merged) == 1 and list(union.tree.nodes) == [1]
    union.close()


class Asking:
    """A loop that answers from the tables of a union, and counts what it does not answer."""

    def __init__(self, union: Union) -> None:
        self._union = union
        self._loop = Loop(-1, lambda *_: None)
        self._loop.use_tables(union.tree.tables, True)
        self.unanswered = 0
        with union.lock:
            union.tree.load_for_listing(1)

    def ask(self, opcode: Opcode, node: int, body: bytes) -> bytes | None:
        header = protocol.IN_HEADER.pack(40 + len(body), opcode, 1, node, 0, 0, 0, 0, 0)
        answer = self._loop.answer_request(header + body)
        if answer is None:
            self.unanswered += 1
            return None
        assert answer and answer[0] == 0
        return answer[1]

    def listed(self, node: int) -> dict[bytes, int]:
        """Name -> node id of all that is in a directory; without `.` and `..`."""
        answer = self.ask(Opcode.READDIRPLUS, node, protocol.READ_IN.pack(0, 0, 65536, 0, 0, 0, 0))
        found = records(answer or b"")
        return {name: number for name, number, _ in found if name not in (b".", b"..")}

    def found(self, node: int, name: bytes) -> int:
        answer = self.ask(Opcode.LOOKUP, node, name + b"\0")
        return int.from_bytes(answer[:8], "little") if answer else 0

    def walked(self) -> dict[bytes, int]:
        """Path -> node id of all that there is."""
        found, waiting = dict[bytes, int](), [(b"", 1)]
        while waiting:
            path, number = waiting.pop()
            for name, node in self.listed(number).items():
                found[path + name] = node
                if not name.startswith(b"f"):
                    waiting.append((path + name + b"/", node))
        return found


TREE: shapes.Layer = {f"d{n}/sub/f{n}": "" for n in range(5)}
PATHS = {os.fsencode(path) for n in range(5) for path in (f"d{n}", f"d{n}/sub", f"d{n}/sub/f{n}")}


def test_a_walk_and_lookups_ask_the_union_for_nothing_but_the_root(tmp_path: Path) -> None:
    union = union_of(tmp_path, TREE, TREE, upper={})
    asking = Asking(union)
    directory = asking.found(1, b"d0")
    assert asking.found(asking.found(directory, b"sub"), b"f0")
    assert asking.found(asking.found(1, b"d1"), b"absent") == 0
    assert asking.walked().keys() == PATHS
    assert not asking.unanswered and list(union.tree.nodes) == [1]
    union.close()


def test_while_the_union_merges_nobody_else_does(tmp_path: Path) -> None:
    union = union_of(tmp_path, TREE, TREE, upper={})
    asking = Asking(union)
    number = asking.found(1, b"d0")
    with union.tree.tables, union.tree.tables:
        assert asking.listed(number) == {} and asking.unanswered == 1
    assert asking.listed(number).keys() == {b"sub"} and asking.unanswered == 1
    union.close()


def test_what_is_taken_or_closed_is_for_the_union_to_merge(tmp_path: Path) -> None:
    union = union_of(tmp_path, TREE, TREE, upper={})
    asking = Asking(union)
    first, second = asking.found(1, b"d0"), asking.found(1, b"d1")
    union.tree.tables.take(first)
    assert asking.listed(first) == {}
    union.tree.tables.stop()
    assert asking.listed(second) == {}
    assert asking.unanswered == 2
    union.close()


def test_with_too_few_ids_the_union_merges_and_gives_more(tmp_path: Path) -> None:
    content: shapes.Layer = {f"d/f{n}": "" for n in range(30)}
    union = union_of(tmp_path, content, {"d/g": "", "e/f": ""}, upper={})
    asking, tables = Asking(union), union.tree.tables
    assert not tables.wants_ids()
    tables.give_ids(FIRST + 5000, 30)
    number, other = asking.found(1, b"d"), asking.found(1, b"e")
    assert asking.listed(number) == {} and asking.unanswered == 1
    assert tables.wants_ids()
    assert asking.listed(other) == {b"f": FIRST + 5000}  # for a smaller one there are enough
    with union.lock:
        union.tree.load_for_listing(number)
    assert len(asking.listed(number)) == 31 and not tables.wants_ids()
    union.close()


class Keeper:
    def keep(self, name: str, descriptor: int) -> None: ...

    def let_go(self, name: str) -> None: ...


def test_another_daemon_finds_the_names_of_what_was_merged(tmp_path: Path) -> None:
    memory = SharedMemory.create()
    journal = SharedJournal(memory, Keeper())
    union = union_of(tmp_path, TREE, TREE, upper={}, journal=journal)
    asking = Asking(union)
    walked = asking.walked()
    assert walked.keys() == PATHS and not asking.unanswered

    def expect(known: dict[bytes, int]) -> None:
        found = SharedJournal(memory, Keeper())
        for path, number in known.items():
            above, _, name = path.rpartition(b"/")
            assert found.place(number) == (walked[above] if above else 1, name)

    expect(walked)
    journal._compact()  # it hears of what was merged, and takes it along
    expect(walked)
    journal._compact()
    for path in sorted(walked, reverse=True):  # the kernel forgets all but d0
        if not path.startswith(b"d0"):
            union.forget(walked[path], 1)
    journal._compact()
    expect({path: number for path, number in walked.items() if path.startswith(b"d0")})
    assert SharedJournal(memory, Keeper()).place(walked[b"d1/sub"]) is None
    again = asking.listed(walked[b"d1"])
    assert again and not again.keys() - {b"sub"} and again[b"sub"] > max(walked.values())
    expect({b"d1/sub": again[b"sub"]})
    union.close()


def test_after_another_daemon_the_union_merges(tmp_path: Path) -> None:
    memory = SharedMemory.create()
    union = union_of(
        tmp_path / "one", TREE, TREE, upper={}, journal=SharedJournal(memory, Keeper())
    )
    walked = Asking(union).walked()
    union.close()
    journal = SharedJournal(memory, Keeper())
    union = union_of(tmp_path / "other", TREE, TREE, upper={}, journal=journal)
    asking = Asking(union)
    assert asking.listed(1)
    assert asking.listed(walked[b"d0"]) == {} and asking.unanswered == 1
    with union.lock:
        union.tree.load_for_listing(walked[b"d0"])
    assert asking.listed(walked[b"d0"]) == {b"sub": walked[b"d0/sub"]}
    union.close()
