"""Tables of merged directories: against a dictionary, against the disk, and from threads."""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.layers import HardLink, Symlink, build
from harness.listing import records
from hypothesis import given, settings
from hypothesis import strategies as st

from unionfuse.express._lane import Loop
from unionfuse.tree._tables import Tables
from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode

REGULAR, DIRECTORY = stat.S_IFREG, stat.S_IFDIR
FIRST = 1 << 62
NO_INODES = (0, 0)

names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"\0" not in name and b"/" not in name
)


@given(
    st.dictionaries(names, st.sampled_from([REGULAR, DIRECTORY, stat.S_IFLNK]), max_size=80),
    st.lists(names, max_size=20),
    st.integers(1, 1 << 60),
)
@settings(deadline=None)
def test_it_finds_what_a_dictionary_finds(
    held: dict[bytes, int], others: list[bytes], directory: int
) -> None:
    places = [(0, b"", 0, 0)] * 3
    tables = Tables([-1])
    listed = [(name, kind, (len(name) % 3,)) for name, kind in held.items()]
    tables.add(directory, FIRST, NO_INODES, places, listed)
    for position, (name, kind, having) in enumerate(listed):
        assert tables.get(directory, name) == (kind, having, FIRST + position)
        assert tables.place_of(FIRST + position) == (directory, name)
    for name in set(others) - set(held):
        assert tables.get(directory, name) is None
    assert tables.names(directory, 0, 1000) == list(held)
    assert tables.names(directory, 7, 5) == list(held)[7:12]
    assert tables.place_of(FIRST + len(held)) is None and tables.place_of(FIRST - 1) is None


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=150))
@settings(deadline=None)
def test_directories_come_and_go(steps: list[tuple[int, bool]]) -> None:
    tables, model, first = Tables([]), dict[int, int](), FIRST
    for directory, comes in steps:
        if comes:
            tables.add(directory, first, NO_INODES, [], [])
            tables.add(directory, first, NO_INODES, [], [])  # it is here: nothing changes
            model[directory] = first
        else:
            tables.release(directory)
            model.pop(directory, None)
        assert tables.size()[0] == len(model)
        assert {number for number in range(1, 41) if tables.hold(number)} == set(model)


@given(
    st.lists(
        st.tuples(st.sampled_from(["count", "forget", "take", "give back"]), st.integers(0, 4)),
        max_size=60,
    )
)
@settings(deadline=None)
def test_lookups_are_counted_exactly(steps: list[tuple[str, int]]) -> None:
    tables = Tables([-1])
    listed = [(b"%d" % n, REGULAR, (0,)) for n in range(5)]
    tables.add(7, FIRST, NO_INODES, [(0, b"", 0, 0)], listed)
    tables.release(7)
    assert tables.size()[0] == 0
    tables.add(7, FIRST, NO_INODES, [(0, b"", 0, 0)], listed)
    counts, taken = [0] * 5, set[int]()
    for step, n in steps:
        if step == "count" and n not in taken:
            tables.count(FIRST + n)
            counts[n] += 1
        elif step == "forget":
            forgotten = tables.forgotten(FIRST + n, 2)
            assert forgotten == (n not in taken)
            if forgotten:
                counts[n] = max(0, counts[n] - 2)
        elif step == "take":
            assert tables.take(FIRST + n) == (0 if n in taken else counts[n])
            taken.add(n)
        elif step == "give back" and n in taken:
            tables.give_back(FIRST + n, unchanged=True)
            taken.discard(n)
            counts[n] = 0
        for other in set(range(5)) - taken:
            assert tables.lookups(FIRST + other) == counts[other]
    tables.release(7)
    assert bool(tables.size()[0]) == (bool(taken) or any(counts))
    for n in range(5):
        tables.give_back(FIRST + n, unchanged=False)
        tables.forgotten(FIRST + n, 1000)
    assert tables.size()[0] == 0


# --- through the loop -----------------------------------------------------------------------------

LAYERS = [
    {
        "d/top": "12345",
        "d/link": Symlink("top"),
        "d/sub/x": "",
        "d/two": "",
        "d/too": HardLink("d/two"),
    },
    {"d/below": "1", "d/sub/y": ""},
]
NAMES = {
    b"top": (REGULAR, (0,)),
    b"link": (stat.S_IFLNK, (0,)),
    b"below": (REGULAR, (1,)),
    b"sub": (DIRECTORY, (0, 1)),
    b"two": (REGULAR, (0,)),
}
D = 5


class Filled:
    """A table of one directory of two layers, and a loop that answers from it."""

    def __init__(self, base: Path) -> None:
        roots = [build(base / str(number), layer) for number, layer in enumerate(LAYERS)]
        self.path = roots[0] / "d"
        self.descriptors = [os.open(root, os.O_PATH | os.O_DIRECTORY) for root in roots]
        self.tables = Tables(self.descriptors, descriptors=2)
        device = os.stat(roots[0]).st_dev
        self.places = [(0, b"d", device, 0), (1, b"d", device, 1 << 60)]
        listed = [(name, kind, having) for name, (kind, having) in NAMES.items()]
        self.tables.add(D, FIRST, (50, 1), self.places, listed)
        self.loop = Loop(-1, lambda *_: None)
        self.loop.use_tables(self.tables, True)

    def ask(
        self, opcode: int, node: int, body: bytes = b""
    ) -> tuple[int, bytes] | tuple[()] | None:
        header = protocol.IN_HEADER.pack(40 + len(body), opcode, 9, node, 0, 0, 0, 0, 0)
        return self.loop.answer_request(header + body)

    def lookup(self, name: bytes, parent: int = D) -> tuple[int, bytes] | tuple[()] | None:
        return self.ask(Opcode.LOOKUP, parent, name + b"\0")

    def number(self, name: bytes) -> int:
        found = self.tables.get(D, name)
        assert found is not None
        return found[2]

    def listed(self, size: int = 4096) -> list[tuple[bytes, int]]:
        """(name, node id) of what READDIRPLUS answers, read in pieces."""
        found, cookie = list[tuple[bytes, int]](), 0
        while True:
            answer = self.ask(
                Opcode.READDIRPLUS, D, protocol.READ_IN.pack(0, cookie, size, 0, 0, 0, 0)
            )
            assert answer is not None and answer[0] == 0
            assert len(answer[1]) <= size
            if not answer[1]:
                return found
            found += [(name, node) for name, node, _ in records(answer[1])]
            *_, (_, _, cookie) = records(answer[1])


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    made = Filled(tmp_path)
    yield made
    for descriptor in made.descriptors:
        os.close(descriptor)


def attributes(entry: bytes) -> tuple[int, int, int]:
    """(inode number, size, mode) in a fuse_entry_out."""
    ino, size = struct.unpack_from("=2Q", entry, 40)
    return ino, size, struct.unpack_from("=I", entry, 40 + 60)[0]


def test_nothing_is_answered_before_all_is_said(filled: Filled) -> None:
    assert filled.lookup(b"top") is None and filled.lookup(b"absent") is None
    filled.tables.open(D, changed=False)
    assert filled.lookup(b"top") is not None and filled.lookup(b"absent") is not None


def test_what_an_earlier_daemon_gave_ids_to_is_not_answered_before_all_is_said(
    filled: Filled,
) -> None:
    top, link = filled.number(b"top"), filled.number(b"link")
    filled.tables.count(top)
    forget = Opcode.FORGET, top, struct.pack("=Q", 1)
    assert filled.ask(Opcode.GETATTR, top, bytes(16)) is None
    assert filled.ask(Opcode.READLINK, link) is None
    assert filled.ask(*forget) is None and filled.tables.lookups(top) == 1
    filled.tables.open(D, changed=False)
    assert filled.ask(Opcode.GETATTR, top, bytes(16)) is not None
    assert filled.ask(Opcode.READLINK, link) is not None
    assert filled.ask(*forget) == () and filled.tables.lookups(top) == 0


def test_lookup_shows_what_the_topmost_layer_has(filled: Filled) -> None:
    filled.tables.open(D, changed=False)
    answer = filled.lookup(b"top")
    status = os.stat(filled.path / "top")
    assert answer is not None and answer[0] == 0
    assert struct.unpack_from("=Q", answer[1])[0] == filled.number(b"top")
    assert attributes(answer[1]) == (status.st_ino, 5, status.st_mode)
    below = filled.lookup(b"below")
    assert below is not None and attributes(below[1])[0] >> 60 == 1
    assert filled.lookup(b"absent") == (0, bytes(16) + struct.pack("=Q", 1 << 30) + bytes(104))
    assert filled.lookup(b"two") is None  # a hard link
    assert filled.lookup(b"x", parent=999) is None


def test_a_directory_of_several_layers_shows_one_link(filled: Filled) -> None:
    filled.tables.open(D, changed=False)
    answer = filled.lookup(b"sub")
    assert answer is not None and struct.unpack_from("=I", answer[1], 40 + 64) == (1,)
    number = filled.number(b"sub")
    inside = [(layer, path + b"/sub", device, bits) for layer, path, device, bits in filled.places]
    filled.tables.add(number, FIRST + 100, (60, 50), inside, [(b"x", REGULAR, (0,))])
    assert filled.lookup(b"sub") == answer


@pytest.mark.parametrize(
    "mark", ["trusted.overlay.opaque", "user.overlay.redirect", ".wh..wh..opq"]
)
def test_a_directory_that_may_hide_others_is_the_unions(filled: Filled, mark: str) -> None:
    if mark.startswith("."):
        (filled.path / "sub" / mark).touch()
    else:
        os.setxattr(filled.path / "sub", mark, b"y")
    filled.tables.open(D, changed=False)
    assert filled.lookup(b"sub") is None
    number = filled.number(b"sub")
    layer, path, device, bits = filled.places[0]
    inside = [(layer, path + b"/sub", device, bits)]
    filled.tables.add(number, FIRST + 100, (60, 50), inside, [(b"x", REGULAR, (0,))])
    answer = filled.lookup(b"sub")  # it has been merged, of one layer
    assert answer is not None and struct.unpack_from("=I", answer[1], 40 + 64) == (2,)


def test_what_is_taken_or_asked_for_is_for_the_union(filled: Filled) -> None:
    filled.tables.open(D, changed=False)
    top = filled.number(b"top")
    filled.lookup(b"top")
    filled.lookup(b"top")
    assert filled.ask(Opcode.GETATTR, top, bytes(16)) is not None
    assert filled.tables.take(top) == 2
    for answer in (
        filled.lookup(b"top"),
        filled.ask(Opcode.GETATTR, top, bytes(16)),
        filled.ask(Opcode.FORGET, top, struct.pack("=Q", 1)),
        filled.ask(Opcode.GETXATTR, top, protocol.GETXATTR_IN.pack(9, 0) + b"security.x\0"),
    ):
        assert answer is None
    assert dict(filled.listed())[b"top"] == 0
    filled.tables.ask(D, b"new")
    filled.tables.ask(D, b"below")
    assert filled.lookup(b"new") is None and filled.lookup(b"below") is None
    assert filled.lookup(b"still absent") is not None
    filled.tables.ask_all(D)
    assert filled.lookup(b"still absent") is None


@pytest.mark.parametrize("size", [200, 400, 4096])
def test_listing_counts_what_it_emits(filled: Filled, size: int) -> None:
    filled.tables.open(D, changed=False)
    listed = filled.listed(size)
    assert [name for name, _ in listed] == [b".", b"..", *NAMES]
    nodes = dict(listed)
    # A hard link comes without its node.
    assert [name for name, node in listed if not node] == [b".", b"..", b"two"]
    for name in (b"top", b"link", b"below", b"sub"):
        assert nodes[name] == filled.number(name) and filled.tables.lookups(nodes[name]) == 1
    numbers = [node for node in nodes.values() if node]
    batch = struct.pack("=II", len(numbers), 0)
    batch += b"".join(struct.pack("=QQ", number, 1) for number in numbers)
    assert filled.ask(Opcode.BATCH_FORGET, 0, batch) == ()
    assert not any(filled.tables.lookups(number) for number in numbers)
    filled.tables.open(D, changed=True)
    assert filled.ask(Opcode.READDIRPLUS, D, protocol.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0)) is None


def test_links_and_attributes_that_are_not_there(filled: Filled) -> None:
    filled.tables.open(D, changed=False)
    assert filled.ask(Opcode.READLINK, filled.number(b"link")) == (0, b"top")
    body = protocol.GETXATTR_IN.pack(0, 0) + b"security.absent\0"
    assert filled.ask(Opcode.GETXATTR, filled.number(b"top"), body) == (61, b"")
    own = protocol.GETXATTR_IN.pack(0, 0) + b"user.unionfuse.layer\0"
    assert filled.ask(Opcode.GETXATTR, filled.number(b"top"), own) is None


def test_what_is_gone_from_a_layer_is_for_the_union(filled: Filled) -> None:
    filled.tables.open(D, changed=False)
    os.unlink(filled.path / "top")
    assert filled.lookup(b"top") is None
    assert filled.ask(Opcode.READDIRPLUS, D, protocol.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0)) is None
    assert not filled.tables.lookups(filled.number(b"top"))


def test_names_only(filled: Filled) -> None:
    filled.tables.open(D, changed=False)
    filled.loop.use_tables(filled.tables, False)
    assert filled.lookup(b"top") is None and filled.lookup(b"absent") is not None
    assert filled.ask(Opcode.GETATTR, filled.number(b"top"), bytes(16)) is None


def test_threads_that_read_and_one_that_changes(filled: Filled) -> None:
    """No reply is torn, no directory is freed under a reader, and every lookup is counted."""
    filled.tables.open(D, changed=False)
    below = filled.lookup(b"below")
    assert below is not None
    expected = attributes(below[1])
    wrong, answered, stop = list[object](), list[int](), threading.Event()

    def read() -> None:
        loop = Loop(-1, lambda *_: None)
        loop.use_tables(filled.tables, True)
        count = 0
        header = protocol.IN_HEADER.pack(46, Opcode.LOOKUP, 9, D, 0, 0, 0, 0, 0)
        while not stop.is_set():
            answer = loop.answer_request(header + b"below\0")
            if answer is None or attributes(answer[1]) != expected:
                wrong.append(answer)
            count += 1
            for directory in range(100, 110):
                header_there = protocol.IN_HEADER.pack(
                    44, Opcode.LOOKUP, 9, directory, 0, 0, 0, 0, 0
                )
                there = loop.answer_request(header_there + b"top\0")
                if there is not None and there[1] and attributes(there[1])[1] != 5:
                    wrong.append(there)
        answered.append(count)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    first = FIRST + 1000
    for turn in range(3000):
        directory = 100 + turn % 10
        listed = [(b"top", REGULAR, (0,)), (b"other", REGULAR, (1,))]
        filled.tables.add(directory, first, (1, 1), filled.places, listed)
        filled.tables.open(directory, changed=False)
        filled.tables.ask(directory, b"%d" % turn)
        filled.tables.take(first)
        filled.tables.give_back(first, unchanged=False)
        filled.tables.release(directory)
        filled.tables.forgotten(first, 1 << 30)
        first += 2
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert filled.tables.lookups(filled.number(b"below")) == 1 + sum(answered)
    assert filled.tables.size()[0] <= 11
