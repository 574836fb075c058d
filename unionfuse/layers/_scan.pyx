# cython: language_level=3, boundscheck=False, wraparound=False
"""Reading a directory in large pieces, without an object for each entry."""

from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint8_t, uint16_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    struct scan_entry { uint64_t inode, offset; uint16_t size; uint8_t type; char name[1]; };
    static ssize_t scan_read(int directory, void *out, size_t room) {
        return syscall(SYS_getdents64, directory, out, room);
    }
    """
    struct scan_entry:
        uint16_t size
        uint8_t type
        char name[1]
    ssize_t scan_read(int directory, void *out, size_t room) nogil

cdef enum:
    DT_DIR = 4
    DT_REG = 8
    DT_LNK = 10


def read_names(int directory):
    """What an open directory holds: {name: type bits of the mode}, and what is neither file,
    directory nor link, or on a file system that does not say.

    Raises:
        OSError: it cannot be read.
    """
    cdef char buffer[32768]
    cdef dict kinds = {}
    cdef list others = []
    cdef scan_entry *entry
    cdef ssize_t got, at
    while True:
        with nogil:
            got = scan_read(directory, buffer, sizeof(buffer))
        if got < 0:
            PyErr_SetFromErrno(OSError)
        if got == 0:
            return kinds, others
        at = 0
        while at < got:
            entry = <scan_entry *>(buffer + at)
            at += entry.size
            name = <bytes>entry.name
            if name == b"." or name == b"..":
                continue
            if entry.type == DT_REG or entry.type == DT_DIR or entry.type == DT_LNK:
                kinds[name] = entry.type << 12
            else:
                others.append(name)
