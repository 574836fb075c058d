"""FUSE's wire format, as far as the compiled modules put it together."""

from libc.stdint cimport uint32_t, uint64_t


cdef extern from "_wire.h":
    struct fuse_attr:
        uint64_t ino, size, blocks, atime, mtime, ctime
        uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize
    struct fuse_dirent:
        uint64_t ino
        uint64_t off
        uint32_t namelen
        uint32_t type
    uint32_t wire_device(uint64_t device) nogil

cdef enum:
    ENTRY_SIZE = 128  # struct fuse_entry_out
    ATTR_AT = 40  # in it
    RECORD_SIZE = 152  # struct fuse_direntplus without the name

cdef inline size_t record_length(size_t name) noexcept nogil:
    """How long the record of READDIRPLUS of a name of this length is."""
    return (RECORD_SIZE + name + 7) & ~<size_t>7
