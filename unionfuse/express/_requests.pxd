"""The requests that are answered in compiled code, and what they bring (linux/fuse.h)."""

from libc.stdint cimport uint32_t, uint64_t


cdef extern from "<linux/fuse.h>" nogil:
    struct fuse_read_in:
        uint64_t fh
        uint64_t offset
        uint32_t size
    struct fuse_open_in:
        uint32_t flags
        uint32_t open_flags
    struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags
        uint32_t padding
    struct fuse_release_in:
        uint64_t fh
    struct fuse_getxattr_in:
        uint32_t size
        uint32_t padding
    struct fuse_forget_one:
        uint64_t nodeid
        uint64_t nlookup
    struct fuse_batch_forget_in:
        uint32_t count
        uint32_t dummy

# Opcodes (enum fuse_opcode).
cdef enum:
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    UNLINK = 10
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    FLUSH = 25
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42
    READDIRPLUS = 44
