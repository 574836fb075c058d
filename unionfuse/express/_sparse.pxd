"""Which directories are listed without what is known of their files.

READDIRPLUS lets the kernel make an inode of each name, as `ls -l` and `tar` need them. `find` by
name needs none but the directories', and to make the others takes most of its time. Nobody says
what a listing is for. So the first directories that a thread lists are listed in full, as is a
large one; then the files are left out, until some of them are looked up. Those directories are to
be listed anew then, and for a while all are listed in full.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "_lane.h":
    double lane_clock() nogil
    uint64_t lane_load_place(uint64_t *place) nogil
    uint64_t lane_swap_place(uint64_t *place, uint64_t value) nogil

cdef enum:
    SPARSE = 4096  # directories, by their node
    IN_FULL = 2  # directories that a thread lists at first
    LOOKED_UP = 4  # files, that show that they should not have been left out
    RELIST = 5  # seconds in which all are listed in full then

cdef struct Sparse:
    uint64_t directories[4096]  # nodes, 0 for none
    uint64_t last  # directory that was asked about
    bint answer  # to that
    uint32_t thread, listed  # who lists, and how many by now
    uint32_t looked_up
    double not_before


cdef inline bint is_sparse(const Sparse *sparse, uint64_t directory) noexcept nogil:
    return sparse.directories[directory % SPARSE] == directory


cdef inline bint wants_sparse(
    Sparse *sparse, uint32_t thread, uint64_t directory, uint64_t cookie
) noexcept nogil:
    """Whether a listing may be without files. What threads do to each other's counts is harmless."""
    if cookie:
        return is_sparse(sparse, directory)
    if sparse.last == directory and sparse.thread == thread:
        return sparse.answer  # it was asked before: by us, and now on behalf of Python
    if sparse.thread != thread:
        sparse.thread, sparse.listed = thread, 0
    sparse.listed += 1
    sparse.last = directory
    sparse.answer = sparse.listed > IN_FULL and lane_clock() >= sparse.not_before
    return sparse.answer


cdef inline bint note_listing(Sparse *sparse, uint64_t directory, bint is_so) noexcept nogil:
    """A directory is listed now; returns whether without files: only if it can be noted."""
    cdef uint64_t *slot = &sparse.directories[directory % SPARSE]
    if not is_so and slot[0] == directory:
        lane_swap_place(slot, 0)
    elif is_so and slot[0] == 0:
        lane_swap_place(slot, directory)
    return is_so and slot[0] == directory


cdef inline bint is_regretted(Sparse *sparse, uint64_t parent) noexcept nogil:
    """A file was looked up; whether too many were that a listing had left out."""
    if not is_sparse(sparse, parent):
        return False
    sparse.looked_up += 1
    if sparse.looked_up < LOOKED_UP:
        return False
    sparse.looked_up, sparse.last = 0, 0
    sparse.not_before = lane_clock() + RELIST
    return True
