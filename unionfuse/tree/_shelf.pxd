"""All merged directories of a mount: found by their own node id, and by those of their names."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove

from unionfuse.tree._block cimport Block


cdef struct Shelf:
    Block **slots  # by a hash of the directory's node id
    uint64_t count, mask
    Block **sorted  # by the node id of the first name; without those that have none
    uint64_t sorted_count, sorted_room


cdef inline bint open_shelf(Shelf *shelf) noexcept nogil:
    """Begin with nothing; False: no memory."""
    shelf.mask = 63
    shelf.slots = <Block **>calloc(shelf.mask + 1, sizeof(Block *))
    return shelf.slots != NULL


cdef inline uint64_t slot_of(const Shelf *shelf, uint64_t directory) noexcept nogil:
    return directory * <uint64_t>0x9E3779B97F4A7C15 >> 20 & shelf.mask


cdef inline Block *find(const Shelf *shelf, uint64_t directory) noexcept nogil:
    """The block of a directory; NULL for none."""
    cdef uint64_t slot = slot_of(shelf, directory)
    while shelf.slots[slot] != NULL:
        if shelf.slots[slot].directory == directory:
            return shelf.slots[slot]
        slot = (slot + 1) & shelf.mask
    return NULL


cdef inline Block *block_of(const Shelf *shelf, uint64_t number) noexcept nogil:
    """The block with a name that has this node id; NULL for none."""
    cdef uint64_t at = rank(shelf, number)
    cdef Block *block
    if at == 0:
        return NULL
    block = shelf.sorted[at - 1]
    return block if number - block.first < block.count else NULL


cdef inline uint64_t rank(const Shelf *shelf, uint64_t number) noexcept nogil:
    """How many directories' names begin at this id or before."""
    cdef uint64_t low = 0, high = shelf.sorted_count, middle
    while low < high:
        middle = (low + high) // 2
        if shelf.sorted[middle].first <= number:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline bint insert(Shelf *shelf, Block *block) noexcept nogil:
    """Put a block where it is found; False: no memory."""
    cdef uint64_t at
    if not make_room(shelf):
        return False
    put(shelf, block)
    shelf.count += 1
    if block.first and block.count:
        at = rank(shelf, block.first)
        memmove(
            &shelf.sorted[at + 1], &shelf.sorted[at], (shelf.sorted_count - at) * sizeof(Block *)
        )
        shelf.sorted[at] = block
        shelf.sorted_count += 1
    return True


cdef inline bint make_room(Shelf *shelf) noexcept nogil:
    cdef Block **old = shelf.slots
    cdef Block **bigger
    cdef uint64_t i, size = shelf.mask + 1
    if shelf.sorted_count == shelf.sorted_room:
        bigger = <Block **>realloc(shelf.sorted, (shelf.sorted_room + 1) * 2 * sizeof(Block *))
        if not bigger:
            return False
        shelf.sorted, shelf.sorted_room = bigger, (shelf.sorted_room + 1) * 2
    if (shelf.count + 1) * 2 <= size:
        return True
    bigger = <Block **>calloc(size * 2, sizeof(Block *))
    if not bigger:
        return False
    shelf.slots, shelf.mask = bigger, size * 2 - 1
    for i in range(size):
        if old[i] != NULL:
            put(shelf, old[i])
    free(old)
    return True


cdef inline void put(Shelf *shelf, Block *block) noexcept nogil:
    cdef uint64_t slot = slot_of(shelf, block.directory)
    while shelf.slots[slot] != NULL:
        slot = (slot + 1) & shelf.mask
    shelf.slots[slot] = block


cdef inline void take_out(Shelf *shelf, Block *block) noexcept nogil:
    cdef uint64_t at, slot = slot_of(shelf, block.directory)
    cdef Block *moved
    while shelf.slots[slot] != block:
        slot = (slot + 1) & shelf.mask
    shelf.slots[slot] = NULL
    shelf.count -= 1
    slot = (slot + 1) & shelf.mask
    while shelf.slots[slot] != NULL:  # close the gap
        moved = shelf.slots[slot]
        shelf.slots[slot] = NULL
        put(shelf, moved)
        slot = (slot + 1) & shelf.mask
    if block.first and block.count:
        at = rank(shelf, block.first) - 1
        shelf.sorted_count -= 1
        memmove(
            &shelf.sorted[at], &shelf.sorted[at + 1], (shelf.sorted_count - at) * sizeof(Block *)
        )
