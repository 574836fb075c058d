"""The nodes that are open through handles of the compiled loop: how often, and what READ reads.

A table of fixed size; what does not fit in is opened by Python. How often a node is open stands in
memory that may outlive the daemon. One mutex guards everything, for the moment it takes to look
or to note; nothing is opened, read or closed under it.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned microseconds)

cdef enum:
    SLOTS = 8192
    HEADS = 4096
    # What Reading.file has beside a descriptor plus one:
    OURS = 1 << 30  # the loop has opened it
    ASK = 1 << 29  # Python has it open, and reads it
    MOMENT = 20  # microseconds
    MOMENTS = 50000  # of them at most: no wait here is for ever

cdef struct Opened:  # may outlive the daemon
    uint64_t node
    uint64_t count  # opens that the kernel has; 0: free

cdef struct Reading:  # what this daemon has for it
    int file  # 0: nothing yet
    int users  # threads that read it now
    bint bringing  # a thread puts its data into the page cache
    uint32_t after  # the next one with this hash, or the next free one; plus one

cdef struct Opens:
    pthread_mutex_t mutex
    Opened *opened
    Reading *reading
    uint32_t *heads  # by a hash of the node: its slot plus one
    uint32_t spare  # the first free slot, plus one
    int our_files
    bint stopped  # no new ones


cdef inline bint open_table(Opens *opens, void *memory) noexcept nogil:
    """Begin with what the memory says is open; False: no memory for the rest."""
    cdef uint32_t slot
    cdef uint32_t *head
    pthread_mutex_init(&opens.mutex, NULL)
    opens.opened = <Opened *>memory
    opens.reading = <Reading *>calloc(SLOTS, sizeof(Reading))
    opens.heads = <uint32_t *>calloc(HEADS, sizeof(uint32_t))
    if opens.reading == NULL or opens.heads == NULL:
        return False
    for slot in range(SLOTS, 0, -1):
        head = &opens.spare
        if opens.opened[slot - 1].count:
            head = &opens.heads[opens.opened[slot - 1].node % HEADS]
        opens.reading[slot - 1].after = head[0]
        head[0] = slot
    return True


cdef inline void free_table(Opens *opens) noexcept nogil:
    free(opens.reading)
    free(opens.heads)
    pthread_mutex_destroy(&opens.mutex)


cdef inline void lock(Opens *opens) noexcept nogil:
    pthread_mutex_lock(&opens.mutex)


cdef inline void unlock(Opens *opens) noexcept nogil:
    pthread_mutex_unlock(&opens.mutex)


# --- while it is locked -----------------------------------------------------------------------

cdef inline uint32_t slot_of(const Opens *opens, uint64_t node) noexcept nogil:
    """The slot of a node plus one; 0 for none."""
    cdef uint32_t slot = opens.heads[node % HEADS]
    while slot and opens.opened[slot - 1].node != node:
        slot = opens.reading[slot - 1].after
    return slot


cdef inline uint32_t take_slot(Opens *opens, uint64_t node) noexcept nogil:
    """The slot of a node, a new one where it has none; 0 where there is no room."""
    cdef uint32_t slot = slot_of(opens, node)
    if slot or not opens.spare:
        return slot
    slot = opens.spare
    opens.spare = opens.reading[slot - 1].after
    opens.opened[slot - 1].node = node
    opens.reading[slot - 1].after = opens.heads[node % HEADS]
    opens.heads[node % HEADS] = slot
    return slot


cdef inline void drop_if_unused(Opens *opens, uint32_t slot) noexcept nogil:
    cdef Reading *reading = &opens.reading[slot - 1]
    cdef uint32_t *before = &opens.heads[opens.opened[slot - 1].node % HEADS]
    if opens.opened[slot - 1].count or reading.file or reading.users or reading.bringing:
        return
    while before[0] != slot:
        before = &opens.reading[before[0] - 1].after
    before[0] = reading.after
    reading.after = opens.spare
    opens.spare = slot


# --- what the loop asks -----------------------------------------------------------------------

cdef inline uint32_t begin_open(Opens *opens, uint64_t node, bint *first) noexcept nogil:
    """Count one more open; returns the slot plus one, 0: it is for Python.

    Nothing is answered while a thread brings the node's data: it would wait for a page that a READ
    of this open holds, and nobody might be left to answer that.
    """
    cdef uint32_t slot
    lock(opens)
    wait_for_data(opens, node)
    slot = 0 if opens.stopped else take_slot(opens, node)
    if slot:
        first[0] = opens.opened[slot - 1].count == 0 and not opens.reading[slot - 1].file
        opens.opened[slot - 1].count += 1
        opens.reading[slot - 1].bringing = first[0]
    unlock(opens)
    return slot


cdef inline void wait_for_data(Opens *opens, uint64_t node) noexcept nogil:
    """Wait until nobody brings the data of a node; locked before and after."""
    cdef uint32_t slot, i
    for i in range(MOMENTS):
        slot = slot_of(opens, node)
        if not slot or not opens.reading[slot - 1].bringing:
            return
        unlock(opens)
        usleep(MOMENT)
        lock(opens)


cdef inline void end_opening(
    Opens *opens, uint32_t slot, bint first, int descriptor, bint is_open
) noexcept nogil:
    """What `begin_open` has counted is open, with a descriptor perhaps (else -1), or it is not."""
    lock(opens)
    if first:
        opens.reading[slot - 1].bringing = False
    if descriptor >= 0:
        opens.reading[slot - 1].file = (descriptor + 1) | OURS
        opens.our_files += 1
    if not is_open:
        opens.opened[slot - 1].count -= 1
    drop_if_unused(opens, slot)
    unlock(opens)


cdef inline uint32_t begin_reading(Opens *opens, uint64_t node, int *file) noexcept nogil:
    """The slot plus one of a node that is open, and what it is read from until `end_reading`."""
    cdef uint32_t slot
    lock(opens)
    slot = slot_of(opens, node)
    if slot:
        opens.reading[slot - 1].users += 1
        file[0] = opens.reading[slot - 1].file
    unlock(opens)
    return slot


cdef inline int offer_file(Opens *opens, uint32_t slot, int descriptor) noexcept nogil:
    """Have a node that is being read read from a descriptor; what it is read from is returned.

    The descriptor is taken only where that is the one.
    """
    cdef Reading *reading = &opens.reading[slot - 1]
    cdef int file
    lock(opens)
    if reading.file == 0:
        reading.file = (descriptor + 1) | OURS
        opens.our_files += 1
    file = reading.file
    unlock(opens)
    return file


cdef inline void end_reading(Opens *opens, uint32_t slot) noexcept nogil:
    lock(opens)
    opens.reading[slot - 1].users -= 1
    drop_if_unused(opens, slot)
    unlock(opens)


cdef inline int swap_file(Opens *opens, uint64_t node, int file) noexcept nogil:
    """Have a node read from something else; what it was read from is returned, and nobody does."""
    cdef uint32_t slot, i
    cdef int old = 0
    cdef Reading *reading
    lock(opens)
    wait_for_data(opens, node)
    slot = take_slot(opens, node) if file else slot_of(opens, node)
    if slot:
        reading = &opens.reading[slot - 1]
        old, reading.file = reading.file, file
        opens.our_files -= old & OURS != 0
        reading.users += 1  # so that it stays
        for i in range(MOMENTS):
            if not old or reading.users == 1:
                break
            unlock(opens)
            usleep(MOMENT)
            lock(opens)
        if reading.users > 1:
            old = 0  # somebody reads it still: rather open for ever than closed meanwhile
        reading.users -= 1
        drop_if_unused(opens, slot)
    unlock(opens)
    return old


cdef inline int end_open(Opens *opens, uint64_t node) noexcept nogil:
    """Count one open less; returns what the node was read from, if that is to be closed now."""
    cdef int file = 0
    cdef uint32_t slot
    lock(opens)
    slot = slot_of(opens, node)
    if slot and opens.opened[slot - 1].count:
        opens.opened[slot - 1].count -= 1
        if not opens.opened[slot - 1].count:
            file = opens.reading[slot - 1].file
            if file & OURS:
                opens.reading[slot - 1].file = 0
                opens.our_files -= 1
        drop_if_unused(opens, slot)
    unlock(opens)
    return file


cdef inline uint64_t count_opens(Opens *opens, uint64_t node) noexcept nogil:
    """How many opens of a node there are; nobody brings its data when this returns."""
    cdef uint64_t count = 0
    cdef uint32_t slot
    lock(opens)
    wait_for_data(opens, node)
    slot = slot_of(opens, node)
    if slot:
        count = opens.opened[slot - 1].count
    unlock(opens)
    return count


cdef inline void stop_opening(Opens *opens, bint value) noexcept nogil:
    """Have every open be for Python, or no longer."""
    lock(opens)
    opens.stopped = value
    unlock(opens)
