# cython: language_level=3, boundscheck=False, wraparound=False
"""What stat(2) shows of a node: made for every answer that names a file, so it is compiled."""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset

from unionfuse.wire._wire cimport fuse_attr, wire_device

cdef enum:
    SECOND = 1000000000
    SIZE = 96  # bytes of what `packed` gives

PACKED_SIZE = SIZE


cdef class Attributes:
    """What stat(2) shows of a node. Times in nanoseconds, size in bytes, blocks of 512 bytes.

    Arguments:
        status: what lstat(2) says of its file.
    """

    # `packed` writes these as they lie here.
    cdef public uint64_t ino, size, blocks, rdev
    cdef public int64_t atime_ns, mtime_ns, ctime_ns
    cdef public uint64_t blksize, mode, nlink, uid, gid

    def __init__(self, status, uint64_t ino, uint64_t nlink):
        self.ino = ino
        self.nlink = nlink
        self.mode = status.st_mode
        self.size = status.st_size
        self.blocks = status.st_blocks
        self.blksize = status.st_blksize
        self.uid = status.st_uid
        self.gid = status.st_gid
        self.rdev = status.st_rdev
        self.atime_ns = status.st_atime_ns
        self.mtime_ns = status.st_mtime_ns
        self.ctime_ns = status.st_ctime_ns

    def wire(self):
        """As struct fuse_attr. Raises OverflowError for what has no room in it."""
        cdef fuse_attr out
        if (self.mode | self.nlink | self.uid | self.gid | self.blksize) >> 32:
            raise OverflowError("more than 32 bits")
        memset(&out, 0, sizeof(out))
        out.ino, out.size, out.blocks = self.ino, self.size, self.blocks
        out.atime, out.atimensec = self.atime_ns // SECOND, self.atime_ns % SECOND
        out.mtime, out.mtimensec = self.mtime_ns // SECOND, self.mtime_ns % SECOND
        out.ctime, out.ctimensec = self.ctime_ns // SECOND, self.ctime_ns % SECOND
        out.mode, out.nlink = self.mode, self.nlink
        out.uid, out.gid = self.uid, self.gid
        out.rdev, out.blksize = wire_device(self.rdev), self.blksize
        return (<char *>&out)[:sizeof(out)]

    def packed(self):
        """All of it, for another daemon on this machine: PACKED_SIZE bytes."""
        return (<char *>&self.ino)[:SIZE]

    @classmethod
    def unpacked(cls, bytes packed):
        """What `packed` wrote. Raises ValueError for bytes of another number."""
        cdef Attributes found = cls.__new__(cls)
        if len(packed) != SIZE:
            raise ValueError("no attributes")
        memcpy(&found.ino, <const char *>packed, SIZE)
        return found
