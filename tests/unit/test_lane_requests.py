"""What the lane asks the union, fed with requests that no kernel sends: an errno each."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.layers import HardLink, Symlink, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unionfuse.express.messages import MALFORMED, Call
from unionfuse.express.requests import Requests
from unionfuse.layers.layer import LayerStack
from unionfuse.options import parse
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode


class QuietLane:
    """Does at once what the lane would do later, and relays to nobody."""

    def later(self, unique: int, work: object) -> None:
        work()

    def relay(self, call: Call) -> None:
        pass

    def keep_statfs(self, answer: bytes) -> None:
        assert len(answer) == 80

    def listed(self, call: Call, cookie: int, size: int) -> None:
        pass

    def looked_up(self, parent: int, name: bytes) -> None:
        pass

    def opened(self, node: int, handle: int, made: object = None) -> tuple[int, int]:
        return 0, 0

    def released(self, node: int, handle: int) -> None:
        pass

    def released_here(self, handle: int) -> None:
        pass

    def asked_for(self, node: int) -> None:
        pass

    def forgotten(self, node: int) -> None:
        pass

    def has_no_capabilities(self, node: int, value: bool) -> None:
        pass

    def union_handle(self, handle: int) -> int:
        return handle

    def read_directly(self, node: int, handle: int, descriptor: int) -> None:
        pass


@pytest.fixture(scope="module")
def union(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Union]:
    base = tmp_path_factory.mktemp("requests")
    layer = build(base / "layer", {"a": "x", "b": HardLink("a"), "d/e": "y", "s": Symlink("a")})
    for name in ("upper", "work"):
        (base / name).mkdir()
    option = f"lowerdir={layer},upperdir={base / 'upper'},workdir={base / 'work'}"
    umask = os.umask(0o022)
    made = Union(LayerStack.open([os.fsencode(layer)]), parse(["-o", option, "/mnt"]).options)
    yield made
    made.close()
    os.umask(umask)


def served(union: Union, opcode: int, node: int, body: bytes) -> bytes | int | None:
    """The body of the reply, or an errno; any other exception is an accident."""
    method = Requests(QuietLane(), union).methods.get(opcode)
    if method is None:
        return None
    try:
        return method(Call(opcode, 1, node, 1000, 1000, 1, body))
    except OSError as error:
        assert error.errno
        return error.errno
    except MALFORMED:
        return 22


words = st.sampled_from([b"a", b"b", b"d", b"new", b"..", b".", b"", b"x" * 300, b".wh.a", b"a/b"])
names = st.lists(words, max_size=3).map(lambda found: b"".join(word + b"\0" for word in found))
numbers = st.binary(max_size=88) | st.integers(0, 11).map(lambda count: bytes(8 * count))
bodies = st.builds(bytes.__add__, numbers, names) | st.binary(max_size=200) | names
# SETATTR and FALLOCATE would fill the disk with sizes that are only just possible
opcodes = st.sampled_from([int(o) for o in Opcode if o not in (Opcode.SETATTR, Opcode.FALLOCATE)])


@settings(
    max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(opcodes, st.integers(0, 9) | st.just(1 << 63), bodies)
def test_any_body_is_answered(union: Union, opcode: int, node: int, body: bytes) -> None:
    answer = served(union, opcode, node, body)
    assert answer is None or isinstance(answer, bytes) or 0 < answer < 4096


@given(st.sampled_from([int(o) for o in Opcode]), st.binary(max_size=7))
@settings(max_examples=300, deadline=None)
def test_a_body_that_is_cut_short_is_refused(union: Union, opcode: int, body: bytes) -> None:
    answer = served(union, opcode, 1, body)
    assert answer is None or isinstance(answer, bytes) or 0 < answer < 4096


def test_names_must_be_terminated(union: Union) -> None:
    for body in (b"a", b"", b"\0", b"a\0b", b"a\0b\0"):
        assert served(union, Opcode.UNLINK, 1, body) == 22
    assert Path("/").exists()


def test_lookup_listing_and_attributes_fit_together(union: Union) -> None:
    entry = served(union, Opcode.LOOKUP, 1, b"d\0")
    assert isinstance(entry, bytes) and len(entry) == 128
    node = protocol.ENTRY_OUT.unpack_from(entry)[0]
    attributes = served(union, Opcode.GETATTR, node, bytes(16))
    assert isinstance(attributes, bytes) and attributes[16:] == entry[40:]
    read = protocol.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0)
    listing = served(union, Opcode.READDIRPLUS, node, read)
    assert isinstance(listing, bytes)
    assert listing[:128] == bytes(128)  # ".": no node
    assert protocol.DIRENT.unpack_from(listing, 128)[1:3] == (1, 1)
