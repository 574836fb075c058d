"""The wire format against the sizes of linux/fuse.h, and the INIT handshake."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfuse.wire import protocol
from unionfuse.wire.protocol import InitFlag, Wanted

# sizeof() of the C structs, from include/uapi/linux/fuse.h
SIZES = {
    "IN_HEADER": 40,
    "OUT_HEADER": 16,
    "ATTR": 88,
    "ENTRY_OUT": 128 - 88,
    "ATTR_OUT": 104 - 88,
    "DIRENT": 24,
    "GETATTR_IN": 16,
    "SETATTR_IN": 88,
    "MKNOD_IN": 16,
    "MKDIR_IN": 8,
    "RENAME2_IN": 16,
    "OPEN_IN": 8,
    "CREATE_IN": 16,
    "OPEN_OUT": 16,
    "RELEASE_IN": 24,
    "READ_IN": 40,
    "WRITE_IN": 40,
    "WRITE_OUT": 8,
    "STATFS_OUT": 80,
    "FSYNC_IN": 16,
    "SETXATTR_EXT_IN": 16,
    "FALLOCATE_IN": 32,
    "LSEEK_IN": 24,
    "COPY_FILE_RANGE_IN": 56,
    "STATX_IN": 24,
    "STATX_OUT": 32,
    "STATX": 256,
    "BACKING_MAP": 16,
}


@pytest.mark.parametrize("name", SIZES)
def test_struct_has_the_size_of_its_c_struct(name: str) -> None:
    assert getattr(protocol, name).size == SIZES[name]


def init_in(flags: int, minor: int = 45, readahead: int = 131072) -> bytes:
    body = struct.pack("=IIIII", 7, minor, readahead, flags & 0xFFFFFFFF, flags >> 32)
    return body.ljust(64, b"\0")


def parse_out(body: bytes) -> tuple[int, ...]:
    return protocol._INIT_OUT.unpack(body)


def test_negotiate_takes_only_what_is_offered() -> None:
    offered = InitFlag.INIT_EXT | InitFlag.DONT_MASK | InitFlag.POSIX_LOCKS | InitFlag.PASSTHROUGH
    body = protocol.negotiate(init_in(offered), Wanted(protocol.ALWAYS | InitFlag.PASSTHROUGH))
    assert len(body) == 64
    major, minor, readahead, flags, *_, flags2, depth, timeout = parse_out(body)
    assert (major, minor, readahead) == (7, 45, 1 << 20)
    assert flags == InitFlag.INIT_EXT | InitFlag.DONT_MASK
    assert (flags2, depth, timeout) == (0, 0, 0)  # no passthrough without a stack depth


def test_negotiate_passthrough_and_max_pages() -> None:
    offered = InitFlag.INIT_EXT | InitFlag.MAX_PAGES | InitFlag.PASSTHROUGH
    wanted = Wanted(InitFlag.INIT_EXT | offered, 1 << 18, max_pages=64, max_stack_depth=1)
    out = parse_out(protocol.negotiate(init_in(offered), wanted))
    assert out[6] == 1 << 18
    assert out[7] == 1  # nanosecond times
    assert out[8] == 64  # pages in one request
    assert out[10:12] == (1 << (37 - 32), 1)


def test_flags2_is_read_only_with_init_ext() -> None:
    offer = protocol.parse_init(init_in(InitFlag.PASSTHROUGH))
    assert not offer.flags & InitFlag.PASSTHROUGH


@pytest.mark.parametrize("body", [b"", b"\0" * 15])
def test_a_short_init_is_refused(body: bytes) -> None:
    with pytest.raises(protocol.ProtocolError, match="INIT of"):
        protocol.negotiate(body, Wanted())


def test_an_old_kernel_is_refused_with_its_version() -> None:
    with pytest.raises(protocol.ProtocolError, match=r"7\.9"):
        protocol.negotiate(init_in(0, minor=9), Wanted())


def test_libfuse_gets_an_init_of_protocol_13() -> None:
    header = protocol.IN_HEADER.pack(104, protocol.Opcode.INIT, 2, 0, 0, 0, 0, 0, 0)
    copy = protocol.init_for_libfuse(header + init_in(InitFlag.INIT_EXT))
    assert protocol.parse_header(copy).unique == protocol.LIBFUSE_INIT_UNIQUE
    assert protocol.parse_init(copy[40:]).minor == 13
    assert len(copy) == 104


def test_reply_carries_a_negative_errno() -> None:
    assert protocol.OUT_HEADER.unpack(protocol.reply(7, error=2)) == (16, -2, 7)
    assert protocol.reply(7, b"body")[16:] == b"body"


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(data: bytes) -> None:
    try:
        assert len(protocol.negotiate(data, Wanted())) == 64
    except protocol.ProtocolError:
        pass
    try:
        protocol.parse_header(data)
    except protocol.ProtocolError:
        assert len(data) < 40
