"""Directories of upper, for whose attributes and absent names the loop answers by itself.

The kernel asks for the attributes of a directory after each change of its names, and for a name
before it makes it. One `fstat` or `fstatat` tells, by a descriptor that the loop has.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport close

from unionfuse.wire._wire cimport fuse_attr


cdef extern from "_lane.h" nogil:
    int lane_add(int *counter, int by)
    int lane_load(int *counter)
    uint64_t lane_load_place(uint64_t *place)
    uint64_t lane_swap_place(uint64_t *place, uint64_t value)
    int lane_stat_directory(int directory, fuse_attr *attr)

cdef enum:
    SHOWN = 128  # directories, by their node

cdef struct Shown:
    uint64_t node  # 0 for none
    uint64_t inode  # to show
    uint32_t links  # to show; 0: as many as it has
    bint alone  # nothing lies below it
    bint lent  # files may be made and deleted in it
    int directory
    int looking  # threads that use it now


cdef inline void show(Shown *directories, uint64_t node, const Shown *wanted) noexcept:
    """Take a directory in; another one may have to go for it."""
    cdef Shown *shown = &directories[node % SHOWN]
    end_showing(shown)
    shown.directory, shown.inode, shown.links = wanted.directory, wanted.inode, wanted.links
    shown.alone, shown.lent = wanted.alone, wanted.lent
    lane_swap_place(&shown.node, node)


cdef inline bint shows(const Shown *directories, uint64_t node) noexcept:
    return node != 0 and directories[node % SHOWN].node == node


cdef inline void end_showing(Shown *shown) noexcept:
    # Taken down first: while we wait another thread may put another directory here.
    cdef int directory = shown.directory
    cdef bint is_shown = lane_swap_place(&shown.node, 0) != 0
    with nogil:
        while lane_load(&shown.looking):
            pass  # somebody who began before, be it with what another thread has just ended
    if is_shown:
        close(directory)


cdef inline void hide_all(Shown *directories) noexcept:
    for i in range(SHOWN):
        end_showing(&directories[i])


cdef inline Shown *begin_looking(Shown *directories, uint64_t node) noexcept nogil:
    """A directory that stays until `end_looking`; NULL where it is not shown."""
    cdef Shown *shown = &directories[node % SHOWN]
    lane_add(&shown.looking, 1)  # before the look: see end_showing
    if node and lane_load_place(&shown.node) == node:
        return shown
    lane_add(&shown.looking, -1)
    return NULL


cdef inline void end_looking(Shown *shown) noexcept nogil:
    lane_add(&shown.looking, -1)


cdef inline bint stat_shown(const Shown *shown, fuse_attr *attr) noexcept nogil:
    """What is to be shown of a directory; False: only the union can tell."""
    if lane_stat_directory(shown.directory, attr):
        return False
    attr.ino = shown.inode
    if shown.links:
        attr.nlink = shown.links
    return True
