"""The compiled loop without a mount: what it answers, and that nothing malformed harms it."""

import os
import random
import struct
from pathlib import Path

import pytest
from harness.layers import File, HardLink, Symlink, build
from hypothesis import given, settings
from hypothesis import strategies as st

from unionfuse.express._lane import Loop
from unionfuse.index.builder import build as build_index
from unionfuse.index.lookup import LookupIndex, LookupIndexError
from unionfuse.layers.layer import LayerStack
from unionfuse.tree._tables import Tables
from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode, SetattrValid

LAYER = {
    "file": "x",
    "link": Symlink("file"),
    "d/one": "1",
    "d/two": HardLink("d/one"),
    "acl": File(data="x", xattrs={"user.a": b"1"}),
    **{f"many/{number:04}-{'n' * (number % 90)}": "" for number in range(700)},
}
PYTHON = None
NO_DATA = (61, b"")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def index(base: Path) -> LookupIndex:
    stack = LayerStack.open([os.fsencode(build(base / "layer", LAYER))])
    build_index(stack.layers).write(str(base / "index"))
    stack.close()
    return LookupIndex.open(str(base / "index"))


@pytest.fixture
def loop(index: LookupIndex) -> Loop:
    return loop_of(index)


def loop_of(index: LookupIndex, valid: int = 1 << 30) -> Loop:
    made = Loop(-1, lambda *_: None, valid)
    made.use_index(index)
    return made


def request(opcode: int, node: int, body: bytes = b"") -> bytes:
    return protocol.IN_HEADER.pack(40 + len(body), opcode, 9, node, 0, 0, 0, 0, 0) + body


def read_in(offset: int, size: int) -> bytes:
    return protocol.READ_IN.pack(0, offset, size, 0, 0, 0, 0)


def lookup(loop: Loop, parent: int, name: bytes) -> tuple[int, bytes] | tuple[()] | None:
    return loop.answer_request(request(Opcode.LOOKUP, parent, name + b"\0"))


def listed(loop: Loop, node: int, size: int, plus: bool) -> list[tuple[bytes, int, int]]:
    """(name, cookie, node) of a directory, read in pieces of `size` bytes."""
    found: list[tuple[bytes, int, int]] = []
    opcode, cookie = Opcode.READDIRPLUS if plus else Opcode.READDIR, 0
    while True:
        answer = loop.answer_request(request(opcode, node, read_in(cookie, size)))
        assert answer is not None and answer[0] == 0
        data = answer[1]
        assert len(data) <= size
        if not data:
            return found
        at = 0
        while at < len(data):
            child = struct.unpack_from("=Q", data, at)[0] if plus else 0
            at += 128 if plus else 0
            _, cookie, length, _ = protocol.DIRENT.unpack_from(data, at)
            found.append((data[at + 24 : at + 24 + length], cookie, child))
            at += (24 + length + 7) & ~7


def test_lookup_hits_and_misses(loop: Loop, index: LookupIndex) -> None:
    error, entry = lookup(loop, 1, b"file")
    assert error == 0 and len(entry) == 128
    node, _, name_valid, attr_valid, *_ = protocol.ENTRY_OUT.unpack_from(entry)
    assert (node, name_valid, attr_valid) == (index.lookup(1, b"file"), 1 << 30, 1 << 30)
    error, entry = lookup(loop, 1, b"nothing")
    assert error == 0
    assert protocol.ENTRY_OUT.unpack_from(entry)[::2][:2] == (0, 1 << 30)  # a lasting negative
    assert lookup(loop, 1, b"n" * 256) == (36, b"")
    assert lookup(loop, index.count + 1, b"file") is PYTHON


def test_a_shorter_timeout_is_kept(index: LookupIndex) -> None:
    brief = loop_of(index, valid=3)
    for name in (b"file", b"nothing"):
        _, entry = lookup(brief, 1, name)
        assert protocol.ENTRY_OUT.unpack_from(entry)[2] == 3
    answer = brief.answer_request(request(Opcode.READDIRPLUS, 1, read_in(2, 4096)))
    assert protocol.ENTRY_OUT.unpack_from(answer[1])[2:4] == (3, 3)
    _, attributes = brief.answer_request(request(Opcode.GETATTR, 1, bytes(16)))
    assert protocol.ATTR_OUT.unpack_from(attributes)[0] == 3


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("size", [512, 4096, 131072])
def test_listing_in_pieces(loop: Loop, index: LookupIndex, plus: bool, size: int) -> None:
    many = index.lookup(1, b"many")
    found = listed(loop, many, size, plus)
    assert [name for name, _, _ in found[:2]] == [b".", b".."]
    assert [(name, cookie) for name, cookie, _ in found[2:]] == [
        (name, cookie) for name, _, cookie in index.entries(many)
    ]
    if plus:
        assert [node for _, _, node in found[:2]] == [0, 0]  # trap 9: dots count no lookup
        assert [node for _, _, node in found[2:]] == [n for _, n, _ in index.entries(many)]


def test_any_cookie_is_fine(loop: Loop, index: LookupIndex) -> None:
    many = index.lookup(1, b"many")
    for cookie in (699, 702, 703, 1 << 40, (1 << 64) - 1, 350, 1):
        body = read_in(cookie, 8192)
        error, data = loop.answer_request(request(Opcode.READDIRPLUS, many, body))
        assert error == 0
        if data:
            assert protocol.DIRENT.unpack_from(data, 128)[1] == cookie + 1


def test_what_changed_goes_to_python(loop: Loop, index: LookupIndex) -> None:
    directory, one = index.lookup(1, b"d"), index.lookup(index.lookup(1, b"d"), b"one")
    loop.changed(one, [parent for parent, _ in index.names(one)])
    assert lookup(loop, directory, b"one") is PYTHON
    assert lookup(loop, directory, b"two") is PYTHON  # the other name of the same file
    assert loop.answer_request(request(Opcode.GETATTR, one, bytes(16))) is PYTHON
    plus = request(Opcode.READDIRPLUS, directory, read_in(0, 4096))
    assert loop.answer_request(plus) is PYTHON  # trap 3: a stale record may not be sent
    assert lookup(loop, 1, b"d") is not PYTHON
    assert loop.is_changed(one) and not loop.is_changed(directory)


def test_links_xattrs_and_the_rest(loop: Loop, index: LookupIndex) -> None:
    link, file, acl = (index.lookup(1, name) for name in (b"link", b"file", b"acl"))
    assert loop.answer_request(request(Opcode.READLINK, link)) == (0, b"file")
    assert loop.answer_request(request(Opcode.READLINK, file)) == (22, b"")
    ask = protocol.GETXATTR_IN.pack(100, 0)
    selinux = ask + b"security.selinux\0"
    assert loop.answer_request(request(Opcode.GETXATTR, file, selinux)) == NO_DATA
    assert loop.answer_request(request(Opcode.GETXATTR, acl, selinux)) is PYTHON
    made_up = ask + b"user.unionfuse.layer\0"
    assert loop.answer_request(request(Opcode.GETXATTR, file, made_up)) is PYTHON
    assert loop.answer_request(request(Opcode.LISTXATTR, file, ask)) == (0, b"")
    size_only = protocol.GETXATTR_IN.pack(0, 0)
    assert loop.answer_request(request(Opcode.LISTXATTR, file, size_only)) == (0, bytes(8))
    assert loop.answer_request(request(Opcode.OPENDIR, 1, bytes(8))) == (38, b"")
    assert loop.answer_request(request(Opcode.FLUSH, file, bytes(24))) == (38, b"")
    assert loop.answer_request(request(Opcode.INTERRUPT, 0, bytes(8))) == ()


def test_files_are_opened_where_the_index_says_that_they_lie(
    index: LookupIndex, base: Path
) -> None:
    layers = LayerStack.open([os.fsencode(base / "layer")])
    loop = loop_of(index)
    loop.use_tables(Tables([layers.layers[0].descriptor]), attributes=True)
    loop.open_here(below=1 << 20)
    many = index.lookup(1, b"many")
    names = [name for name, *_ in listed(loop, many, 4096, plus=True) if len(name) > 5][:40]
    nodes = {name: index.lookup(many, name) for name in names}
    for name in names:
        (base / "layer/many" / os.fsdecode(name)).write_bytes(name)

    def opened(node: int) -> int | None:
        answer = loop.answer_request(request(Opcode.OPEN, node, bytes(8)))
        return int(protocol.OPEN_OUT.unpack(answer[1])[0]) if answer else None

    def read(node: int, handle: int) -> object:
        body = protocol.READ_IN.pack(handle, 0, 4096, 0, 0, 0, 0)
        return loop.answer_request(request(Opcode.READ, node, body))

    def release(node: int, handle: int) -> object:
        body = protocol.RELEASE_IN.pack(handle, 0, 0, 0)
        return loop.answer_request(request(Opcode.RELEASE, node, body))

    before = len(os.listdir("/proc/self/fd"))
    handles = {name: opened(node) for name, node in nodes.items()}
    assert len(os.listdir("/proc/self/fd")) == before  # small ones are not kept open
    for name, node in nodes.items():
        assert read(node, handles[name]) == (0, name)
    assert len(os.listdir("/proc/self/fd")) == before + len(nodes)
    first, handle = nodes[names[0]], handles[names[0]]
    assert opened(first) == handle
    assert loop.opened_here(first) == 2
    copy = os.open(base / "layer/file", os.O_RDONLY)
    loop.changed(first, [many])
    loop.read_node_from(first, copy)  # as after a copy-up
    assert read(first, handle) == (0, b"x")
    loop.read_node_from(first, -1)
    assert read(first, handle) is PYTHON
    assert release(first, handle) == (0, b"")
    for name, node in nodes.items():
        assert release(node, handles[name]) == (PYTHON if node == first else (0, b""))
    loop.read_node_from(first, -1, held=False)
    os.close(copy)
    assert opened(first) is None  # it has changed
    assert loop.opened_here(first) == 0
    assert opened(index.lookup(index.lookup(1, b"d"), b"one")) is None  # it has two names
    assert len(os.listdir("/proc/self/fd")) == before
    assert loop.open_no_more(True) == []
    assert opened(nodes[names[1]]) is None
    loop.open_no_more(False)
    assert opened(nodes[names[1]]) is not None
    assert loop.open_no_more(True) == [nodes[names[1]]]
    layers.close()


def setattr_in(valid: int, mode: int = 0, owner: int = 0, times: tuple[int, int] = (0, 0)) -> bytes:
    nanoseconds = (500, 600, 0)
    return protocol.SETATTR_IN.pack(
        valid, 0, 0, 3, 0, *times, 0, *nanoseconds, mode, 0, owner, owner, 0
    )


def test_a_new_file_is_held_while_it_is_written(
    loop: Loop, index: LookupIndex, tmp_path: Path
) -> None:
    node, path = index.count + 1000, tmp_path / "new"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    loop.hold(node, descriptor, 77)

    def asked(opcode: int, body: bytes) -> os.stat_result:
        answer = loop.answer_request(request(opcode, node, body))
        assert answer and answer[0] == 0
        status = path.stat()
        ino, size, _, atime, mtime, _, a_ns, m_ns, _, mode, links, uid, gid, *_ = (
            protocol.ATTR.unpack_from(answer[1], protocol.ATTR_OUT.size)
        )
        assert (ino, size, mode, links) == (77, status.st_size, status.st_mode, status.st_nlink)
        assert (uid, gid) == (status.st_uid, status.st_gid)
        assert atime * 10**9 + a_ns == status.st_atime_ns
        assert mtime * 10**9 + m_ns == status.st_mtime_ns
        return status

    os.write(descriptor, b"written")
    assert asked(Opcode.GETATTR, bytes(16)).st_size == 7
    valid = SetattrValid
    found = asked(Opcode.SETATTR, setattr_in(valid.UID | valid.GID | valid.MODE, 0o104751, 12))
    assert (found.st_uid, found.st_gid, found.st_mode) == (12, 12, 0o104751)
    chown = valid.UID | valid.GID | valid.KILL_SUIDGID  # as the kernel asks for it
    found = asked(Opcode.SETATTR, setattr_in(chown, owner=13))
    assert (found.st_uid, found.st_mode) == (13, 0o100751)
    found = asked(Opcode.SETATTR, setattr_in(valid.MTIME, times=(1, 2)))
    assert found.st_mtime_ns == 2 * 10**9 + 600 and found.st_atime_ns > 10**18
    found = asked(
        Opcode.SETATTR, setattr_in(valid.ATIME | valid.MTIME | valid.MTIME_NOW, times=(1, 2))
    )
    assert found.st_atime_ns == 10**9 + 500 and found.st_mtime_ns > 10**18
    # A size, rights that go, and nothing at all, are the union's.
    for fields in (valid.SIZE, valid.MODE | valid.KILL_SUIDGID, valid.FH, 0):
        assert loop.answer_request(request(Opcode.SETATTR, node, setattr_in(fields))) is PYTHON
    assert loop.answer_request(request(Opcode.SETATTR, node, bytes(80))) is PYTHON
    path.unlink()
    error, body = loop.answer_request(request(Opcode.GETATTR, node, bytes(16)))
    assert error == 0 and protocol.ATTR.unpack_from(body, protocol.ATTR_OUT.size)[10] == 0
    loop.let_go(node)
    assert loop.answer_request(request(Opcode.GETATTR, node, bytes(16))) is PYTHON
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_forgets_of_indexed_nodes_need_nobody(loop: Loop, index: LookupIndex) -> None:
    assert loop.answer_request(request(Opcode.FORGET, 2, bytes(8))) == ()
    assert loop.answer_request(request(Opcode.FORGET, index.count + 1, bytes(8))) is PYTHON
    pairs = b"".join(protocol.FORGET_ONE.pack(node, 1) for node in (2, 3))
    batch = protocol.BATCH_FORGET_IN.pack(2, 0) + pairs
    assert loop.answer_request(request(Opcode.BATCH_FORGET, 0, batch)) == ()
    other = protocol.BATCH_FORGET_IN.pack(3, 0) + pairs + protocol.FORGET_ONE.pack(1 << 62, 1)
    assert loop.answer_request(request(Opcode.BATCH_FORGET, 0, other)) is PYTHON


opcodes = st.sampled_from([int(o) for o in Opcode] + [0, 63, 64, 1000, 0xFFFFFFFF])
nodes = st.one_of(st.integers(0, 12), st.integers(700, 720), st.integers(0, (1 << 64) - 1))
bodies = st.one_of(
    st.binary(max_size=64),
    st.builds(read_in, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1)),
    st.sampled_from([b"file\0", b"file", b"\0", b"a\0b\0", b"x" * 5000]),
)


@settings(max_examples=1500, deadline=None)
@given(opcodes, nodes, bodies)
def test_any_request_gets_an_answer(
    index: LookupIndex, opcode: int, node: int, body: bytes
) -> None:
    answer = loop_of(index).answer_request(request(opcode, node, body))
    if answer:
        assert 0 <= answer[0] < 4096


def test_any_damage_gets_an_answer(index: LookupIndex) -> None:
    whole = bytes(index.map)
    places = [at for s in index.sections.values() for at in range(s.offset, s.offset + s.length)]
    rng = random.Random(7)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.sample(places, 20):
            data[at] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        try:
            loop = loop_of(LookupIndex.read("bad", bytes(data)))
        except LookupIndexError:
            continue
        for node in (1, *rng.sample(range(1, index.count + 1), 20)):
            for name in (b"file", b"d", b"one", b"nothing"):
                lookup(loop, node, name)
            loop.answer_request(request(Opcode.GETATTR, node, bytes(16)))
            loop.answer_request(request(Opcode.READLINK, node))
            for cookie in (0, 2, 300):
                body = read_in(cookie, rng.choice((300, 5000, 1 << 20, (1 << 32) - 1)))
                loop.answer_request(request(Opcode.READDIRPLUS, node, body))
                loop.answer_request(request(Opcode.READDIR, node, body))


@pytest.mark.parametrize("handle", [0, 7, 1 << 16, (1 << 44) - 1])
def test_read_of_any_handle(handle: int, tmp_path: Path) -> None:
    """Handles count up for as long as a mount lives; two of them may have to share a place."""
    (tmp_path / "f").write_text("content")
    file = os.open(tmp_path / "f", os.O_RDONLY)
    loop = Loop(-1, lambda *_: None)

    def read(number: int) -> tuple[int, bytes] | tuple[()] | None:
        body = protocol.READ_IN.pack(number, 3, 100, 0, 0, 0, 0)
        return loop.answer_request(request(Opcode.READ, 1, body))

    loop.read_from(handle, file)
    assert read(handle) == (0, b"tent")
    assert read(handle + (1 << 16)) is PYTHON
    loop.read_from(handle + (1 << 16), -1)
    assert read(handle) == (0, b"tent")
    loop.read_from(handle, -1)
    assert read(handle) is PYTHON
    os.close(file)
