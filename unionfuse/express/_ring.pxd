"""One queue of FUSE requests over io_uring: its ring, and the entries that requests come in."""

from libc.errno cimport EINTR, ENOMEM, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.unistd cimport close, write


cdef extern from "_ring.h" nogil:
    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
        uint32_t uid
        uint32_t gid
        uint32_t pid
    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique
    struct iovec:
        void *iov_base
        size_t iov_len
    struct ring_header:
        char in_out[128]
        char op_in[128]
        uint64_t flags
        uint64_t commit_id
        uint32_t payload_size
    struct ring_note:
        uint64_t saved
        uint64_t answered
        uint64_t committed
        uint32_t size
        uint32_t arguments
    struct ring:
        int fd
    int RING_REGISTER, RING_COMMIT
    const uint64_t RING_RESEND
    int ring_open(ring *made, unsigned entries)
    void ring_close(ring *made)
    void ring_command(
        ring *into, int fuse, int operation, iovec *buffers, uint64_t commit_id, int queue,
        uint64_t user_data)
    void ring_read(ring *into, int fd, void *buffer, uint64_t user_data)
    int ring_enter(ring *entered, unsigned least)
    int ring_pop(ring *out, uint64_t *user_data, int *result)
    char *ring_map(int fd, size_t size)
    void ring_note_id(uint64_t *place, uint64_t id)
    int ring_take(int *flag)
    void ring_give(int *flag)
    void ring_stay_on(int cpu)
    int eventfd(unsigned count, int flags)

cdef enum:
    HEADER = 40
    OUT_HEADER = 16
    MAX_WRITE = 1 << 20
    HEADROOM = 256  # bytes before a payload
    # What the kernel wants: max_write and a page. No reply is longer.
    PAYLOAD = MAX_WRITE + 4096
    DEPTH = 8  # requests of one queue that are under way
    WAKE = 1 << 20  # user_data of the eventfd
    PAGE = 4096
    CLOSED_ON_EXEC = 0o2000000  # EFD_CLOEXEC
    # An entry in memory that outlives us: a page for header and note, a page of headroom, the
    # payload, and a copy of the request, since the reply is put together where the request was.
    SAVED = (1 << 18) + 4096
    ENTRY = 2 * 4096 + PAYLOAD + SAVED
    IN_PLACE = 2 * 4096 + (1 << 16)  # of it, from the beginning

# One request of a ring: it is the kernel's, ours, or waits for a reply from another thread.
cdef struct Entry:
    ring_header *header
    char *room  # headroom for header and arguments, then the payload
    iovec buffers[2]
    uint64_t pending  # `unique` of a request whose reply comes later; 0 for none
    int replied  # the reply is in the buffers
    ring_note *note  # for daemons to come; NULL for none
    char *saved  # a copy of the request
    bint left  # it is what an earlier daemon left
    uint64_t committing
    int wake  # eventfd of the ring's thread

cdef struct Queue:
    ring system
    int fuse, number
    Entry entries[DEPTH]
    int count  # of entries; 0: the thread has no ring
    int wake  # eventfd; 0 for none. A reply may come when the ring has ended
    uint64_t woken  # what is read from it


# --- begin and end ----------------------------------------------------------------------------

cdef inline int open_queue(Queue *queue, int fuse, int number, char *shared) noexcept nogil:
    """Make buffers and ring; 0 or an errno. Only the thread that does it may use the ring.

    Arguments:
        shared: the memory for all queues that outlives this process; NULL for none.
    """
    cdef Entry *entry
    cdef int at
    queue.fuse, queue.number = fuse, number
    queue.wake = eventfd(0, CLOSED_ON_EXEC)
    if queue.wake < 0:
        return errno
    for at in range(DEPTH):
        entry = &queue.entries[at]
        entry.wake = queue.wake
        queue.count += 1
        if not make_entry(entry, shared + ENTRY * <size_t>(number * DEPTH + at) if shared else NULL):
            return ENOMEM
    return ring_open(&queue.system, 4 * DEPTH)


cdef inline bint make_entry(Entry *entry, char *place) noexcept nogil:
    if place != NULL:
        entry.header = <ring_header *>place
        entry.note = <ring_note *>(place + sizeof(ring_header))
        entry.room = place + 2 * PAGE - HEADROOM
        entry.saved = place + 2 * PAGE + PAYLOAD
        touch_entry(place)
    else:
        entry.header = <ring_header *>calloc(1, sizeof(ring_header))
        entry.room = <char *>malloc(HEADROOM + PAYLOAD)
    if not entry.header or not entry.room:
        return False
    entry.buffers[0].iov_base, entry.buffers[0].iov_len = entry.header, sizeof(ring_header)
    entry.buffers[1].iov_base, entry.buffers[1].iov_len = entry.room + HEADROOM, PAYLOAD
    return True


cdef inline void touch_entry(char *place) noexcept nogil:
    """Have in place what the kernel writes most: see Loop.stay_resident."""
    cdef volatile char *page = place
    cdef size_t at = 0
    while at < IN_PLACE:
        page[at] = page[at]
        at += PAGE


cdef inline void free_queue(Queue *queue) noexcept nogil:
    cdef int at
    for at in range(queue.count):
        if queue.entries[at].note == NULL:
            free(queue.entries[at].header)
            free(queue.entries[at].room)
    if queue.wake > 0:
        close(queue.wake)


# --- what goes to the kernel ------------------------------------------------------------------

cdef inline void offer(Queue *queue, int at) noexcept nogil:
    """Tell the kernel of an entry that it may put requests in."""
    ring_command(
        &queue.system, queue.fuse, RING_REGISTER, queue.entries[at].buffers, 0, queue.number, at
    )


cdef inline void await_wake(Queue *queue) noexcept nogil:
    ring_read(&queue.system, queue.wake, &queue.woken, WAKE)


cdef inline void wake_up(Entry *entry) noexcept nogil:
    """Have the ring's thread look for replies."""
    cdef uint64_t one = 1
    write(entry.wake, &one, 8)


cdef inline void commit(Queue *queue) noexcept nogil:
    """Give the kernel the replies that there are."""
    cdef Entry *entry
    cdef int at
    for at in range(DEPTH):
        entry = &queue.entries[at]
        if ring_take(&entry.replied):
            entry.committing = entry.header.commit_id
            ring_command(
                &queue.system, queue.fuse, RING_COMMIT, entry.buffers, entry.committing,
                queue.number, at
            )


cdef inline int enter(Queue *queue, unsigned least) noexcept nogil:
    """Hand over what was said, and wait for so many events; 0 or an errno."""
    cdef Entry *entry
    cdef int at, failure = ring_enter(&queue.system, least)
    if failure:
        return 0 if failure == EINTR else failure
    for at in range(DEPTH):
        entry = &queue.entries[at]
        if entry.note != NULL and entry.committing:
            ring_note_id(&entry.note.committed, entry.committing)
        entry.committing = 0
    return 0


# --- requests, and replies --------------------------------------------------------------------

cdef inline bint has_left(Entry *entry) noexcept nogil:
    """Whether an earlier daemon had a request in an entry that is to be served again.

    The note tells how far it came. What was answered is committed as it is: the kernel may have it
    already, and says so. What was not is served again, from the copy.
    """
    cdef uint64_t current = entry.header.commit_id
    if not current or entry.note.committed == current:
        return False
    if entry.note.answered == current:
        entry.left = True
        ring_give(&entry.replied)
        return False
    if (
        entry.note.saved != current
        and (<const fuse_in_header *>entry.header.in_out).unique != current
    ):
        return False  # it never came here as a whole
    entry.left = True
    return True


cdef inline char *request_in(Entry *entry, size_t *size) noexcept nogil:
    """Put header, arguments and payload in one piece, as /dev/fuse has them."""
    cdef const fuse_in_header *header = <const fuse_in_header *>entry.header.in_out
    cdef size_t arguments = header.len - HEADER - entry.header.payload_size
    cdef ring_note *note = entry.note
    cdef char *payload = entry.room + HEADROOM
    cdef char *request
    if header.len < HEADER + entry.header.payload_size or arguments > 128:
        arguments = 0
    size[0] = HEADER + arguments + entry.header.payload_size
    if note != NULL and note.saved == entry.header.commit_id:  # by an earlier daemon
        arguments, size[0] = note.arguments, note.size
        request = payload - arguments - HEADER
        memcpy(request, entry.saved, size[0])
    else:
        request = payload - arguments - HEADER
        memcpy(request + HEADER, entry.header.op_in, arguments)
        memcpy(request, header, HEADER)
        if note != NULL and size[0] <= SAVED:
            memcpy(entry.saved, request, size[0])
            note.arguments, note.size = <uint32_t>arguments, <uint32_t>size[0]
            ring_note_id(&note.saved, entry.header.commit_id)
    if entry.left:
        (<fuse_in_header *>request).unique |= RING_RESEND
    return request


cdef inline void put_reply(
    Entry *entry, const fuse_out_header *out, const char *data, size_t length
) noexcept nogil:
    cdef size_t fitting = min(length, <size_t>PAYLOAD)
    if length and data != entry.room + HEADROOM:
        memcpy(entry.room + HEADROOM, data, fitting)
    memcpy(entry.header.in_out, out, OUT_HEADER)
    (<fuse_out_header *>entry.header.in_out).unique &= ~RING_RESEND
    entry.header.payload_size = <uint32_t>fitting
    if entry.note != NULL:
        ring_note_id(&entry.note.answered, entry.header.commit_id)
    ring_give(&entry.replied)
