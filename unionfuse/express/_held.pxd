"""Files that have just been made and are open for writing: their attributes, by a descriptor.

Who unpacks an archive makes a file, writes it, gives it owner, mode and times, and closes it. A few
such files are held here, so that the last three need no Python.
"""

from libc.stdint cimport uint64_t
from posix.unistd cimport close

from unionfuse.wire._wire cimport fuse_attr


cdef extern from "_held.h" nogil:
    struct fuse_setattr_in:
        pass
    int held_change(int file, const fuse_setattr_in *wanted)
    int held_stat(int file, fuse_attr *out)

cdef extern from "_lane.h" nogil:
    int lane_add(int *counter, int by)
    int lane_load(int *counter)
    uint64_t lane_load_place(uint64_t *place)
    uint64_t lane_swap_place(uint64_t *place, uint64_t value)

cdef enum:
    HELD = 64  # files, by their node

cdef struct Held:
    uint64_t node  # 0 for none
    uint64_t inode  # to show
    int descriptor
    int looking  # threads that use it now


cdef inline void hold(Held *files, uint64_t node, int descriptor, uint64_t inode) noexcept:
    """Take a descriptor in; another file may have to go for it. One thread at a time does this."""
    cdef Held *file = &files[node % HELD]
    end_holding(file)
    file.descriptor, file.inode = descriptor, inode
    lane_swap_place(&file.node, node)


cdef inline void let_go(Held *files, uint64_t node) noexcept:
    """When this returns nobody uses the descriptor of a node any more."""
    if node and files[node % HELD].node == node:
        end_holding(&files[node % HELD])


cdef inline void let_all_go(Held *files) noexcept:
    for i in range(HELD):
        end_holding(&files[i])


cdef inline void end_holding(Held *file) noexcept:
    cdef int descriptor = file.descriptor
    cdef bint is_held = lane_swap_place(&file.node, 0) != 0
    with nogil:
        while lane_load(&file.looking):
            pass  # a change that began before
    if is_held:
        close(descriptor)


cdef inline int held_attributes(
    Held *files, uint64_t node, const char *wanted, fuse_attr *out
) noexcept nogil:
    """Change a file, unless `wanted` is NULL, and say what its attributes are.

    0, an errno, or -1: it is the union's to answer.
    """
    cdef Held *file = &files[node % HELD]
    cdef int failure = -1
    lane_add(&file.looking, 1)  # before the look: see end_holding
    if node and lane_load_place(&file.node) == node:
        failure = held_change(file.descriptor, <const fuse_setattr_in *>wanted) if wanted else 0
        if failure == 0:
            failure = held_stat(file.descriptor, out)
            out.ino = file.inode
    lane_add(&file.looking, -1)
    return failure
