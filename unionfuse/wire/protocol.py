"""The FUSE wire format, up to protocol 7.45: structs, opcodes, flags and the INIT handshake.

Source: include/uapi/linux/fuse.h of Linux 6.18. All numbers are in host byte order, as the kernel
sends them. This module packs and unpacks; it reads and writes no descriptor.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 45
ROOT_ID = 1
RESEND_BIT = 1 << 63  # set in `unique` when the kernel sends an unanswered request again
FOREVER = 1 << 30  # a practically infinite timeout, in seconds (34 years)


class Opcode(enum.IntEnum):
    """What a request asks for (`enum fuse_opcode`)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Notify(enum.IntEnum):
    """Messages from the daemon to the kernel: `error` of a reply whose `unique` is 0."""

    POLL = 1
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RETRIEVE = 5
    DELETE = 6
    RESEND = 7
    INC_EPOCH = 8
    PRUNE = 9


class InitFlag(enum.IntFlag):
    """Capabilities that INIT offers and accepts; bits from 32 travel in `flags2`."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


class OpenFlag:  # not an enum: these are looked at for every open
    """`open_flags` of the reply to OPEN and CREATE (FOPEN_*)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class SetattrValid:  # nor are these
    """Which fields of SETATTR count (FATTR_*)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


OPEN_KILL_SUIDGID = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2
SETXATTR_ACL_KILL_SGID = 1 << 0
FSYNC_FDATASYNC = 1 << 0

# Every struct is named after the C struct that it mirrors, without `fuse_`.
IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen/8 padding
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
#      ino size blocks atime mtime ctime, their nanoseconds, mode nlink uid gid rdev blksize flags
ENTRY_OUT = struct.Struct("=QQQQII")  # nodeid generation entry_valid attr_valid, ns of both; ATTR
ATTR_OUT = struct.Struct("=QII")  # attr_valid attr_valid_nsec dummy; ATTR follows
DIRENT = struct.Struct("=QQII")  # ino off namelen type; the name follows, padded to 8 bytes
GETATTR_IN = struct.Struct("=IIQ")  # flags dummy fh
SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")
#      valid padding fh size lock_owner atime mtime ctime, ns of them, mode unused uid gid unused
MKNOD_IN = struct.Struct("=IIII")  # mode rdev umask padding; name
MKDIR_IN = struct.Struct("=II")  # mode umask; name
RENAME_IN = struct.Struct("=Q")  # newdir; two names
RENAME2_IN = struct.Struct("=QII")  # newdir flags padding; two names
LINK_IN = struct.Struct("=Q")  # oldnodeid; name
OPEN_IN = struct.Struct("=II")  # flags open_flags
CREATE_IN = struct.Struct("=IIII")  # flags mode umask open_flags; name
OPEN_OUT = struct.Struct("=QIi")  # fh open_flags backing_id
RELEASE_IN = struct.Struct("=QIIQ")  # fh flags release_flags lock_owner
READ_IN = struct.Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
WRITE_IN = struct.Struct("=QQIIQII")  # fh offset size write_flags lock_owner flags padding; data
WRITE_OUT = struct.Struct("=II")  # size padding
STATFS_OUT = struct.Struct("=QQQQQIIII24x")  # blocks bfree bavail files ffree bsize namelen frsize
FSYNC_IN = struct.Struct("=QII")  # fh fsync_flags padding
SETXATTR_EXT_IN = struct.Struct("=IIII")  # size flags setxattr_flags padding; name, value
GETXATTR_IN = struct.Struct("=II")  # size padding; name
GETXATTR_OUT = struct.Struct("=II")  # size padding
FORGET_IN = struct.Struct("=Q")  # nlookup
BATCH_FORGET_IN = struct.Struct("=II")  # count dummy; FORGET_ONE each
FORGET_ONE = struct.Struct("=QQ")  # nodeid nlookup
IOCTL_IN = struct.Struct("=QIIQII")  # fh flags cmd arg in_size out_size; what the call hands over
IOCTL_OUT = struct.Struct("=iIII")  # result flags in_iovs out_iovs; what the call gets
FALLOCATE_IN = struct.Struct("=QQQII")  # fh offset length mode padding
LSEEK_IN = struct.Struct("=QQII")  # fh offset whence padding
LSEEK_OUT = struct.Struct("=Q")  # offset
COPY_FILE_RANGE_IN = struct.Struct("=QQQQQQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
COPY_FILE_RANGE_OUT = struct.Struct("=Q")  # bytes copied, answer to COPY_FILE_RANGE_64
STATX_IN = struct.Struct("=IIQII")  # getattr_flags reserved fh sx_flags sx_mask
STATX_OUT = struct.Struct("=QII16x")  # attr_valid attr_valid_nsec flags; STATX follows
STATX = struct.Struct("=IIQIIIHHQQQQ" + "qIi" * 4 + "IIII112x")
#      mask blksize attributes nlink uid gid mode spare ino size blocks attributes_mask,
#      atime btime ctime mtime (each sec nsec reserved), rdev major minor, dev major minor
NOTIFY_INVAL_INODE_OUT = struct.Struct("=Qqq")  # nodeid offset length
NOTIFY_INVAL_ENTRY_OUT = struct.Struct("=QII")  # parent namelen flags; name and a NUL
BACKING_MAP = struct.Struct("=iIQ")  # fd flags padding
_INIT_IN = struct.Struct("=IIIII")  # major minor max_readahead flags flags2 (unused[11] follows)
_INIT_IN_OLD = struct.Struct("=IIII")  # before INIT_EXT
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
#      major minor max_readahead flags max_background congestion_threshold max_write time_gran
#      max_pages map_alignment flags2 max_stack_depth request_timeout

FUSE_DEV_IOC_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
FUSE_DEV_IOC_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)


class Request(NamedTuple):
    """The header of one request."""

    length: int
    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int


class ProtocolError(Exception):
    """Bytes that no kernel sends: too short, or of another major version."""


def parse_header(request: bytes | memoryview) -> Request:
    """Read the header at the start of a request. Raises ProtocolError where it is cut short."""
    if len(request) < IN_HEADER.size:
        raise ProtocolError(f"a FUSE request of {len(request)} bytes has no whole header")
    return Request(*IN_HEADER.unpack_from(request)[:7])


def reply(unique: int, body: bytes = b"", error: int = 0) -> bytes:
    """One reply message; `error` is a positive errno (the wire has it negative), or 0."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body


def notification(code: Notify, body: bytes) -> bytes:
    """One message to the kernel that answers no request."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), code, 0) + body


class InitIn(NamedTuple):
    """What the kernel offers."""

    major: int
    minor: int
    max_readahead: int
    flags: InitFlag


def parse_init(body: bytes | memoryview) -> InitIn:
    """Read the body of INIT (what follows the header). Raises ProtocolError."""
    if len(body) < _INIT_IN_OLD.size:
        raise ProtocolError(f"INIT of {len(body)} bytes: the kernel is older than protocol 7.6")
    major, minor, max_readahead, flags = _INIT_IN_OLD.unpack_from(body)
    if len(body) >= _INIT_IN.size and flags & InitFlag.INIT_EXT:
        flags |= _INIT_IN.unpack_from(body)[4] << 32
    return InitIn(major, minor, max_readahead, InitFlag(flags))


# What both doors want of every kernel that has it. Not here, and why: AUTO_INVAL_DATA costs a
# GETATTR for each opendir, READDIRPLUS_AUTO sends READDIR where READDIRPLUS fills the caches,
# POSIX_LOCKS and FLOCK_LOCKS would bring locks to the daemon that the kernel keeps well by itself,
# WRITEBACK_CACHE would let the kernel make up mtime and size, EXPORT_SUPPORT promises a LOOKUP of
# "." for nodes that were forgotten, SETXATTR_EXT is unknown to libfuse before 3.17.
ALWAYS = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.DONT_MASK
    | InitFlag.HAS_IOCTL_DIR
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.POSIX_ACL
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.INIT_EXT
    | InitFlag.HAS_EXPIRE_ONLY
    | InitFlag.DIRECT_IO_ALLOW_MMAP
    | InitFlag.ALLOW_IDMAP
)


class Wanted(NamedTuple):
    """What a daemon asks for; it gets the part of `flags` that the kernel offers.

    max_write and max_readahead are bytes, max_pages is what one request carries at most,
    max_stack_depth counts file systems below a passthrough file (1 allows layers on an ordinary
    file system), request_timeout is seconds, 0 for none.
    """

    flags: InitFlag = ALWAYS
    max_write: int = 1 << 20
    max_pages: int = 256
    max_readahead: int = 1 << 20
    max_background: int = 64
    congestion_threshold: int = 48
    max_stack_depth: int = 0
    request_timeout: int = 0

    def granted(self, offer: InitIn) -> InitFlag:
        """The capabilities that will hold for the connection."""
        flags = self.flags & offer.flags
        if not self.max_stack_depth:
            flags &= ~InitFlag.PASSTHROUGH
        return flags


def negotiate(init_in: bytes | memoryview, wanted: Wanted) -> bytes:
    """Answer INIT: the body of the request (without its header) → the body of the reply.

    Raises ProtocolError for a kernel of another major version, or older than 7.23 (Linux 3.15),
    whose replies have other sizes.
    """
    offer = parse_init(init_in)
    if offer.major != KERNEL_VERSION or offer.minor < 23:
        raise ProtocolError(
            f"the kernel speaks FUSE {offer.major}.{offer.minor}, 7.23 or later is needed"
        )
    flags = wanted.granted(offer)
    return _INIT_OUT.pack(
        KERNEL_VERSION,
        min(KERNEL_MINOR_VERSION, offer.minor),
        max(offer.max_readahead, wanted.max_readahead),
        flags & 0xFFFFFFFF,
        wanted.max_background,
        wanted.congestion_threshold,
        wanted.max_write,
        1,  # time_gran: nanoseconds
        wanted.max_pages if flags & InitFlag.MAX_PAGES else 0,
        0,
        flags >> 32,
        wanted.max_stack_depth if flags & InitFlag.PASSTHROUGH else 0,
        wanted.request_timeout if flags & InitFlag.REQUEST_TIMEOUT else 0,
    )


LIBFUSE_INIT_UNIQUE = 1 << 61  # no kernel request has this number


def init_for_libfuse(request: bytes | memoryview) -> bytes:
    """The INIT request that libfuse gets in place of the kernel's.

    Its protocol is 7.13, so that libfuse does not try to splice from a socket and negotiates
    nothing of its own; its `unique` belongs to no request, so the kernel takes no notice of a
    reply to it.
    """
    copy = bytearray(request)
    struct.pack_into("=Q", copy, 8, LIBFUSE_INIT_UNIQUE)
    struct.pack_into("=I", copy, IN_HEADER.size + 4, 13)
    return bytes(copy)
