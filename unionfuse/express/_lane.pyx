# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The compiled loop of the express lane: reads FUSE requests and answers what the index knows.

What it answers itself it answers without the GIL, from the mapped lookup index and from the tables
of merged directories. Everything else it hands, with the GIL, to a Python callable. It trusts
neither the request nor the index: every length and offset is checked before it is followed, and
what does not fit is answered with an error.

It does not know the union and copies no file. On disk it makes and deletes files in directories that
it was lent (_young.pyx), and changes the attributes of new files that it was given to hold
(_held.pxd).
"""

from libc.errno cimport EIO, EINTR, EAGAIN, EINVAL, ENAMETOOLONG, ENODATA, ENODEV, ENOENT, ENOSYS, \
    ENOTCONN, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport close, pread

from unionfuse.tree._tables cimport ABSENT, ASK as ASK_UNION, BELOW, FOUND, SPARSE_NAMES, Tables
from unionfuse.wire._wire cimport (
    ATTR_AT, ENTRY_SIZE, RECORD_SIZE, fuse_attr, fuse_dirent, record_length,
)
from unionfuse.express._held cimport HELD, Held, held_attributes, hold, let_all_go, let_go
from unionfuse.express._index cimport (
    DIRECTORY, HAS_LINKS, HAS_XATTRS, METACOPY, PATH_MAX, SYMLINK, Index, find_record, has_node,
    index_node, map_index, path_in_layer, record_before, record_of, seek, target_of,
)
from unionfuse.express._opens cimport (
    ASK, OURS, SLOTS, Opened, Opens, begin_open, begin_reading, count_opens, end_open, end_opening,
    end_reading, free_table, offer_file, open_table, stop_opening, swap_file,
)
from unionfuse.express._requests cimport (
    LOOKUP, FORGET, GETATTR, SETATTR, READLINK, UNLINK, OPEN, READ, STATFS, RELEASE, GETXATTR,
    LISTXATTR, FLUSH, OPENDIR, READDIR, RELEASEDIR, ACCESS, CREATE, INTERRUPT, BATCH_FORGET,
    READDIRPLUS, fuse_read_in, fuse_open_in, fuse_open_out, fuse_release_in, fuse_getxattr_in,
    fuse_forget_one, fuse_batch_forget_in,
)
from unionfuse.express._shown cimport (
    SHOWN, Shown, begin_looking, end_looking, end_showing, hide_all, show, shows, stat_shown,
)
from unionfuse.express._sparse cimport (
    SPARSE, Sparse, is_regretted, note_listing, wants_sparse,
)
from unionfuse.express._young cimport NOT_YOUNG, Asked, YoungFiles
from unionfuse.express._ring cimport (
    DEPTH, ENTRY, HEADER, HEADROOM, MAX_WRITE, OUT_HEADER, PAYLOAD, WAKE, Entry, Queue, await_wake,
    commit, enter, free_queue, fuse_in_header, fuse_out_header, has_left, iovec, offer, open_queue,
    put_reply, request_in, ring, ring_close, ring_map, ring_open, ring_pop, ring_stay_on, wake_up,
)

cdef extern from "_lane.h":
    int munmap(void *address, size_t size) nogil
    int lane_add(int *counter, int by) nogil
    int lane_load(int *counter) nogil
    uint64_t lane_load_place(uint64_t *place) nogil
    uint64_t lane_swap_place(uint64_t *place, uint64_t value) nogil
    long lane_most_files() nogil
    int lane_splice(
        int *ends, int fuse, uint64_t unique, int file, uint64_t offset, size_t size) nogil
    int lane_is_absent(int directory, const char *name) nogil
    int mlock(const void *address, size_t length) nogil
    ssize_t writev(int fd, const iovec *iov, int count) nogil
    double lane_clock() nogil

cdef extern from "_spin.h":
    enum:
        SPIN_ALWAYS
    struct spin:
        int enabled
        uint64_t found
    ssize_t spin_read(spin *turns, int fd, void *buffer, size_t size) nogil
    void spin_open(spin *turns) nogil

cdef extern from "_opens.h":
    int opens_lower(int root, const char *path) nogil
    int64_t opens_size(int file) nogil
    int opens_bring(int fuse, uint64_t node, int file, char *buffer, size_t size) nogil
    void opens_mark(uint8_t *place, uint8_t bit) nogil
    void opens_unmark(uint8_t *place, uint8_t bit) nogil

cdef enum:
    MAX_THREADS = 1024
    OPCODES = 64  # counters; what is above shares the last one
    NAME_MAX = 255
    CREATE_SIZE = 16  # flags, mode, umask, open_flags; the name
    DT_DIR = 4
    SHORT = 4096  # bytes of a reply

cdef enum:
    ACCESS_MODE = 3  # O_ACCMODE
    TRUNCATE = 0o1000  # O_TRUNC
    KEEP_CACHE_NOFLUSH = 1 << 1 | 1 << 5
    BROUGHT = 32768  # bytes of a file that goes into the page cache as a whole when it is opened
    BARE = 4096  # new files, of which the loop knows that they have no capabilities
    HANDLES = 1 << 16  # open files that the loop knows the descriptors of
    DESCRIPTOR_BITS = 20

# A handle that the loop gave: this bit, and the node id. It stands for all opens of the node.
cdef uint64_t NODE_BIT = <uint64_t>1 << 63
NODE_HANDLE = NODE_BIT

# How a request ended.
cdef enum:
    FOR_PYTHON = 0
    ANSWERED = 1
    SILENT = 2  # no reply is due, or it has been sent

# What has come to be known of a node of the index.
cdef enum:
    CHANGED = 1  # its attributes, names or content differ from the index
    LISTING = 2  # a name in it leads to a node that is CHANGED
    CACHED = 4  # the page cache has its data, as far as it needs it

cdef size_t BUFFER = MAX_WRITE + 8192  # the largest request: max_write and its headers
cdef size_t MEMORY = 16  # directories whose place a thread remembers
cdef double STATFS_VALID = 0.05  # seconds

cdef struct Reply:
    int error
    const char *data
    size_t length

cdef struct Place:
    uint64_t directory, cookie, offset

# What belongs to one thread.
cdef struct Thread:
    uint64_t slot  # of the intent log; see survival/intents.py
    char *request  # one request, header included
    char *out  # where replies are put together
    Entry *entry  # where the request came from; NULL: from /dev/fuse
    Queue queue  # of io_uring, where it has one
    Place places[16]
    int pipe[2]  # zeros for none
    uint64_t here[64]  # requests answered here, by opcode
    uint64_t python[64]  # requests handed to Python


cdef void free_thread(Thread *thread) noexcept:
    if thread.queue.count:
        free_queue(&thread.queue)  # its other buffers are those of the entries
    else:
        free(thread.request)
        free(thread.out)
    if thread.pipe[1]:
        close(thread.pipe[0])
        close(thread.pipe[1])
    free(thread)


def can_use_rings():
    """Whether this process may make the kind of io_uring that FUSE needs."""
    cdef ring tried
    cdef int failure = ring_open(&tried, 4)
    if failure == 0:
        ring_close(&tried)
    return failure == 0


cdef class Loop:
    """The requests of one mount, answered by any number of threads.

    Arguments:
        fd: /dev/fuse, mounted, INIT answered.
        handler: called with (opcode, unique, node, uid, gid, pid, body); returns the body of the
            reply as bytes, an errno as int, or None where a reply comes later or never.
        valid: for how many seconds the kernel may keep an answer of the index.
        xattrs: whether absent extended attributes may be answered from the index.
        unlabelled: the errno for a `security.selinux` that is not there.
    """

    cdef int fd
    cdef object handler, trace, prepare
    cdef bint tracing
    cdef size_t resident  # bytes of each buffer for requests; 0: as they are touched
    cdef uint64_t valid, forever
    cdef bint xattrs
    cdef int unlabelled
    cdef Index index
    cdef void *own_marks  # NULL where marks were given
    cdef uint8_t *dirty  # by node: what Python has told
    cdef unsigned char[:] marks
    cdef char statfs[80]
    cdef double statfs_until
    cdef Thread *threads[1024]
    cdef int thread_count
    cdef spin turns
    cdef bint stopping
    cdef const unsigned char[:] view
    cdef bint opening
    cdef uint64_t open_size  # files of this size and more are for Python to open
    cdef Opens opens
    cdef void *own_opens  # NULL where the memory was given
    cdef unsigned char[:] given_opens
    cdef char *rings  # NULL where they end with us
    cdef size_t rings_size
    cdef bint takes_over
    cdef int ready_rings
    cdef Tables tables  # None without
    cdef bint shows_tables  # attributes, not names alone
    cdef Shown shown[SHOWN]
    cdef YoungFiles young  # None: Python makes all files
    cdef Held held[HELD]
    cdef Sparse sparse
    cdef object list_again  # None: all directories are listed in full
    cdef bint lists_sparsely
    cdef uint64_t bare[4096]  # by a hash of the node: the node
    # By a hash of the handle: handle and the descriptor that READ reads, in one number.
    cdef uint64_t *descriptors

    def __cinit__(
        self, int fd, handler, uint64_t valid=1 << 30, bint xattrs=True, int unlabelled=ENODATA
    ):
        self.fd, self.handler, self.valid, self.forever = fd, handler, valid, 1 << 30
        self.xattrs, self.unlabelled = xattrs, unlabelled
        self.descriptors = <uint64_t *>calloc(HANDLES, sizeof(uint64_t))
        if not self.descriptors:
            raise MemoryError

    def __dealloc__(self):
        if self.opening:
            for i in range(SLOTS):
                if self.opens.reading[i].file & OURS:
                    close((self.opens.reading[i].file & ~OURS) - 1)
            free_table(&self.opens)
        free(self.own_opens)
        if self.rings:
            munmap(self.rings, self.rings_size)
        hide_all(self.shown)
        let_all_go(self.held)
        free(self.own_marks)
        free(self.descriptors)
        for i in range(self.thread_count):
            free_thread(self.threads[i])

    def use_index(self, index, unsigned char[:] marks=None):
        """Answer from a LookupIndex from now on; it must stay open. Called before any thread runs.

        Arguments:
            marks: `size_of_marks` bytes, zeros or as another loop left them: what `changed` has
                told.
        """
        size = self.size_of_marks(index.count)
        if marks is not None:
            if len(marks) != size:
                raise ValueError("marks of another size")
            self.marks = marks
            self.dirty = &self.marks[0]
        else:
            self.own_marks = calloc(size, 1)
            if not self.own_marks:
                raise MemoryError
            self.dirty = <uint8_t *>self.own_marks
        self.view = index.map
        map_index(&self.index, <const char *>&self.view[0], index)

    @staticmethod
    def size_of_marks(uint64_t count):
        """Bytes that are noted of an index of `count` nodes."""
        return count + 1

    def use_tables(self, Tables tables, bint attributes):
        """Answer from tables of merged directories from now on. Called before any thread runs.

        Arguments:
            attributes: the mount shows owners, modes and links as they are on disk; otherwise only
                the absence of a name is answered.
        """
        self.tables, self.shows_tables = tables, attributes

    def list_sparsely(self, list_again):
        """Leave out of listings what is known of files, as long as nobody looks them up (_sparse.pxd).

        Called before any thread runs.

        Arguments:
            list_again: called, in any thread, with the nodes of directories that the kernel is to
                have listed anew. It must not wait for the kernel.
        """
        self.list_again, self.lists_sparsely = list_again, True

    def list_from_tables(self, uint64_t node, uint64_t cookie, size_t size, uint32_t thread=0):
        """The records of READDIRPLUS that a table has; None where it does not have all of them.

        Arguments:
            thread: who asks.
        """
        cdef bytearray out
        cdef ssize_t got
        if self.tables is None or not self.shows_tables:
            return None
        out = bytearray(min(size, BUFFER))
        got = self.list_table(thread, node, cookie, len(out), out)
        return bytes(out[:got]) if got >= 0 else None

    def look_up_in_tables(self, uint64_t parent, bytes name):
        """The body of the reply to LOOKUP, as far as a table has one; None: ask the union."""
        cdef char out[ENTRY_SIZE]
        cdef int how
        if self.tables is None or not self.shows_tables or len(name) > NAME_MAX:
            return None
        how = self.tables.lookup(parent, name, len(name), out)
        if how == ABSENT:
            memset(out, 0, ENTRY_SIZE)
            (<uint64_t *>out)[2] = self.valid
        elif how == FOUND:
            self.limit(out)
        else:
            return None
        return out[:ENTRY_SIZE]

    def trace_to(self, trace):
        """Have (opcode, node, body, errno) of each request told that is answered here."""
        self.trace, self.tracing = trace, True

    def changed(self, uint64_t node, parents):
        """Ask Python about a node from now on, and about the listings that show it."""
        cdef uint64_t parent
        if has_node(&self.index, node):
            opens_mark(&self.dirty[node], CHANGED)
        for parent in parents:
            if has_node(&self.index, parent):
                opens_mark(&self.dirty[parent], LISTING)

    def is_changed(self, uint64_t node):
        """Whether Python is asked about a node."""
        return not has_node(&self.index, node) or bool(self.dirty[node] & CHANGED)

    def stay_resident(self, size_t max_write):
        """Have memory that the kernel copies to or from in place before it does so.

        In a process that is being killed no page can be brought in any more: the kernel would end
        the request that it was about to hand over with EIO, not keep it for the next daemon.
        Called before any thread runs.

        Arguments:
            max_write: the most data that a request brings.
        """
        self.resident = min(max_write + BUFFER - MAX_WRITE, BUFFER)

    def spin(self, bint always=False):
        """Look for the next request before sleeping (_spin.h). Called before any thread runs.

        Arguments:
            always: whenever requests come, not only while it is seen to pay.
        """
        self.turns.enabled = SPIN_ALWAYS if always else 1

    def found_awake(self):
        """How many requests were there before their reader slept."""
        return self.turns.found

    def read_from(self, uint64_t handle, int descriptor):
        """READ of an open handle reads this descriptor from now on; -1 asks Python again."""
        cdef uint64_t *slot = &self.descriptors[handle % HANDLES]
        if descriptor < 0:
            if slot[0] >> DESCRIPTOR_BITS == handle:
                lane_swap_place(slot, 0)
        elif not descriptor >> DESCRIPTOR_BITS and not handle >> (64 - DESCRIPTOR_BITS):
            lane_swap_place(slot, handle << DESCRIPTOR_BITS | <uint64_t>descriptor)

    @staticmethod
    def size_of_opens():
        """Bytes that are noted of open files."""
        return SLOTS * sizeof(Opened)

    def open_here(self, uint64_t below, unsigned char[:] opens=None):
        """Answer OPEN for reading of files that are as in the index or a table, and smaller.

        The whole of a small file is put into the page cache then, before the answer: no READ
        comes. Another file stays open until the last RELEASE. Called before any thread runs.

        Arguments:
            below: bytes.
            opens: `size_of_opens` bytes, zeros or as another loop left them.
        """
        cdef void *memory
        if opens is not None:
            if len(opens) != self.size_of_opens():
                raise ValueError("a memory of another size")
            self.given_opens = opens
            memory = &self.given_opens[0]
        else:
            memory = self.own_opens = calloc(SLOTS, sizeof(Opened))
        if not memory or not open_table(&self.opens, memory):
            raise MemoryError
        self.open_size, self.opening = below, True

    def open_no_more(self, bint value):
        """Leave each OPEN to Python from now on, or no longer; returns the nodes that are open."""
        if not self.opening:
            return []
        stop_opening(&self.opens, value)
        return [
            self.opens.opened[i].node for i in range(SLOTS) if self.opens.opened[i].count
        ]

    def opened_here(self, uint64_t node):
        """How many opens of a node the loop has answered that are still open."""
        cdef uint64_t found = 0
        if self.opening:
            with nogil:
                found = count_opens(&self.opens, node)
        return found

    def opened_elsewhere(self, uint64_t node):
        """Python has opened a node: its data is not put into the page cache from now on, and a
        node of a table is Python's to open again."""
        if has_node(&self.index, node):
            opens_mark(&self.dirty[node], CACHED)
        elif self.tables is not None:
            with nogil:
                self.tables.note_opened(node)
        self.opened_here(node)  # nobody does now

    def read_node_from(self, uint64_t node, int descriptor, bint held=True):
        """READ of opens that the loop has answered reads this descriptor; -1 asks Python.

        When it returns, nobody reads the one before any more.

        Arguments:
            held: Python has the file open, and has to be told of the last RELEASE.
        """
        cdef int old, value = descriptor + 1 if descriptor >= 0 else ASK if held else 0
        if self.opening:
            with nogil:
                old = swap_file(&self.opens, node, value)
                if old & OURS:
                    close((old & ~OURS) - 1)

    def show(
        self, uint64_t node, int directory, uint64_t inode, uint32_t links, bint alone,
        bint lent=False,
    ):
        """Answer from a descriptor what is asked of a directory of upper after each change in it.

        That is its attributes, and which names are absent. Another directory may take its place.

        Arguments:
            directory: becomes the loop's.
            inode: its number in the mount.
            links: the link count to show; 0 for the one that it has.
            alone: nothing lies below it, so what upper does not have is not there.
            lent: what is made in it inherits no ACL.
        """
        cdef Shown wanted
        if not node or lane_most_files() < SHOWN:
            close(directory)
            return
        wanted.directory, wanted.inode, wanted.links = directory, inode, links
        wanted.alone, wanted.lent = alone, lent
        show(self.shown, node, &wanted)

    def make_files(self, YoungFiles young, prepare):
        """Make and delete files in directories that are lent. Called before any thread runs.

        Arguments:
            prepare: called with a node before Python is asked about it, where it has to hear of
                such files first.
        """
        self.young, self.prepare = young, prepare

    def has_no_capabilities(self, uint64_t node, bint value):
        """Answer by ourselves that a file has no `security.capability`, or ask Python again.

        The kernel asks for it at the first write to a file and at each change of its owner.
        """
        if value:
            self.bare[node % BARE] = node
        elif self.bare[node % BARE] == node:
            self.bare[node % BARE] = 0

    def hold(self, uint64_t node, int descriptor, uint64_t inode):
        """Answer for the attributes of a new file, and change them, until `let_go`.

        One thread at a time may call this. Another file may have to go for it.

        Arguments:
            descriptor: of the file, for writing; becomes the loop's.
            inode: its number in the mount.
        """
        if node <= self.index.count or lane_most_files() < HELD:
            close(descriptor)
        else:
            hold(self.held, node, descriptor, inode)

    def let_go(self, uint64_t node):
        """Ask Python about a file from now on; its descriptor is closed."""
        let_go(self.held, node)

    def hide(self, uint64_t node):
        """Ask Python about a directory of upper from now on."""
        if shows(self.shown, node):
            end_showing(&self.shown[node % SHOWN])

    def shows(self, uint64_t node):
        """Whether the loop answers for a directory of upper."""
        return shows(self.shown, node)

    def counts(self):
        """Requests by opcode: (answered here, handed to Python)."""
        found = {}
        for i in range(self.thread_count):
            for opcode in range(OPCODES):
                here, python = self.threads[i].here[opcode], self.threads[i].python[opcode]
                if here or python:
                    before = found.get(opcode, (0, 0))
                    found[opcode] = (before[0] + here, before[1] + python)
        return found

    def stop(self):
        """Threads end after the request that they are at."""
        self.stopping = True
        spin_open(&self.turns)

    # --- the classic transport ----------------------------------------------------------------

    def run(self, uint64_t slot=0):
        """Read and answer until the mount ends; run it in as many threads as you like.

        Arguments:
            slot: this thread's of the intent log; 0 without a keeper.

        Returns the errno that ended it: ENODEV after an unmount, 0 after `stop`.
        """
        cdef Thread *thread = self.new_thread()
        cdef ssize_t size
        cdef int failure = 0
        thread.slot = slot
        with nogil:
            while not self.stopping:
                size = spin_read(&self.turns, self.fd, thread.request, BUFFER)
                if size < 0:
                    # ENOENT: the request was interrupted before we could read it.
                    if errno == EINTR or errno == EAGAIN or errno == ENOENT:
                        continue
                    failure = errno
                    break
                if size < HEADER:
                    continue
                self.serve(thread, <size_t>size)
        return failure

    cdef Thread *new_thread(self) except NULL:
        cdef Thread *thread = self.add_thread()
        # Pages of these are resident only once they are touched.
        thread.request = <char *>malloc(BUFFER)
        thread.out = <char *>malloc(BUFFER)
        if not thread.request or not thread.out:
            raise MemoryError
        if self.resident:
            memset(thread.request, 0, self.resident)
            mlock(thread.request, self.resident)  # where that is not allowed they are hardly ever swapped
        return thread

    cdef Thread *add_thread(self) except NULL:
        cdef Thread *thread
        if self.thread_count >= MAX_THREADS:
            raise RuntimeError("too many threads")
        thread = <Thread *>calloc(1, sizeof(Thread))
        if not thread:
            raise MemoryError
        self.threads[self.thread_count] = thread
        self.thread_count += 1
        return thread

    cdef void serve(self, Thread *thread, size_t size) noexcept nogil:
        cdef const fuse_in_header *header = <const fuse_in_header *>thread.request
        cdef Reply reply
        cdef uint32_t opcode = header.opcode if header.opcode < OPCODES else OPCODES - 1
        cdef bint is_due, regret, prepares
        thread.here[opcode] += 1  # first: a spliced READ is replied to before `answer` returns
        cdef int how = self.answer(thread, size, &reply)
        if how == FOR_PYTHON:
            thread.here[opcode] -= 1
            thread.python[opcode] += 1
            spin_open(&self.turns)
            prepares = self.young is not None and self.young.concern(header.nodeid)
            with gil:
                is_due = self.ask_python(thread, size, prepares, &reply)
            if is_due:
                self.send(NULL, header.unique, &reply)
            return
        regret = (
            self.lists_sparsely and opcode == LOOKUP and self.found_file(&reply)
            and is_regretted(&self.sparse, header.nodeid)
        )
        if how == ANSWERED:
            self.send(thread.entry, header.unique, &reply)
        if regret:
            with gil:
                self.relist()
        if self.tracing:
            with gil:
                self.trace(
                    header.opcode, header.nodeid, (<char *>thread.request)[HEADER:size],
                    reply.error,
                )

    cdef bint found_file(self, const Reply *reply) noexcept nogil:
        """Whether the answer to a LOOKUP is a node that is no directory."""
        cdef const char *entry = reply.data
        return (
            reply.length == ENTRY_SIZE and (<const uint64_t *>entry)[0] != 0
            and (<const fuse_attr *>(entry + ATTR_AT)).mode & 0o170000 != 0o040000
        )

    cdef void relist(self) noexcept:
        """Have those directories listed anew that are without their files."""
        found = []
        for i in range(SPARSE):
            if self.sparse.directories[i]:
                found.append(lane_swap_place(&self.sparse.directories[i], 0))
        self.list_again(found)

    cdef ssize_t list_table(
        self, uint32_t thread, uint64_t node, uint64_t cookie, size_t room, char *out
    ) noexcept nogil:
        cdef bint sparse = self.lists_sparsely and wants_sparse(&self.sparse, thread, node, cookie)
        cdef ssize_t got
        if sparse and not cookie:
            sparse = note_listing(&self.sparse, node, True)
        got = self.tables.readdir(node, cookie, room, self.valid, &sparse, out)
        if got < 0 and self.tables.merge_here(node):
            got = self.tables.readdir(node, cookie, room, self.valid, &sparse, out)
        if not sparse:
            note_listing(&self.sparse, node, False)
        return got

    cdef void send(self, Entry *entry, uint64_t unique, const Reply *reply) noexcept nogil:
        cdef fuse_out_header out
        cdef iovec parts[2]
        out.len = <uint32_t>(OUT_HEADER + reply.length)
        out.error = -reply.error
        out.unique = unique
        if entry != NULL:
            put_reply(entry, &out, reply.data, reply.length)
            return
        if self.resident:
            self.touch(reply)
        parts[0].iov_base, parts[0].iov_len = &out, OUT_HEADER
        parts[1].iov_base, parts[1].iov_len = <void *>reply.data, reply.length
        # A failure means that nobody waits any more (ENOENT, ENODEV): there is nothing to do.
        writev(self.fd, parts, 2 if reply.length else 1)

    cdef void touch(self, const Reply *reply) noexcept nogil:
        cdef size_t at = 0
        cdef const volatile char *data = <const volatile char *>reply.data
        while at < reply.length:
            data[at]
            at += 4096
        if reply.length:
            data[reply.length - 1]

    cdef bint ask_python(
        self, Thread *thread, size_t size, bint prepares, Reply *reply
    ) noexcept:
        """Have Python answer; whether a reply is to be sent once the GIL has been let go.

        To let go of it, send, and take it again would cost more than to copy a short reply.
        """
        cdef const fuse_in_header *header = <const fuse_in_header *>thread.request
        cdef bytes answer
        reply.error, reply.length, reply.data = 0, 0, NULL
        body = (<char *>thread.request)[HEADER:size]
        unique = header.unique
        if thread.entry != NULL:
            thread.entry.pending = unique  # before the handler: another thread may be quicker
        try:
            if prepares:
                self.prepare(header.nodeid)
            result = self.handler(
                header.opcode, header.unique, header.nodeid, header.uid, header.gid, header.pid,
                body,
            )
            if result is None:
                return False
            if type(result) is int:
                reply.error = result
            else:
                answer = result
                reply.data, reply.length = <const char *>answer, len(answer)
        except BaseException:  # the handler answers for its own errors: this is the last resort
            reply.error = EIO
        if thread.entry != NULL:
            thread.entry.pending = 0
            self.send(thread.entry, unique, reply)
            return False
        if reply.length <= SHORT:
            if reply.length:
                memcpy(thread.out, reply.data, reply.length)
                reply.data = thread.out
            return True
        with nogil:
            self.send(NULL, unique, reply)
        return False

    def reply(self, uint64_t unique, int error, const unsigned char[:] body):
        """Answer a request that a handler left open."""
        cdef Reply reply
        reply.error, reply.length, reply.data = error, len(body), NULL
        cdef Entry *entry = self.pending_entry(unique)
        if reply.length:
            reply.data = <const char *>&body[0]
        if entry == NULL:
            with nogil:
                self.send(NULL, unique, &reply)
            return
        entry.pending = 0
        self.send(entry, unique, &reply)
        wake_up(entry)

    cdef Entry *pending_entry(self, uint64_t unique) noexcept:
        """The entry of a ring that waits for the reply to a request; NULL for none."""
        for i in range(self.thread_count):
            for j in range(self.threads[i].queue.count):
                if self.threads[i].queue.entries[j].pending == unique:
                    return &self.threads[i].queue.entries[j]
        return NULL

    # --- FUSE over io_uring -------------------------------------------------------------------

    @staticmethod
    def size_of_rings(int queues):
        """Bytes of memory for the buffers of so many rings."""
        return <size_t>queues * DEPTH * ENTRY

    def share_rings(self, int descriptor, int queues, bint takes_over):
        """Have the buffers of the rings in a memory that outlives this process.

        Arguments:
            descriptor: of `size_of_rings` bytes.
            takes_over: the kernel knows them from a daemon before this one.

        Raises OSError where they cannot be where the kernel expects them.
        """
        self.rings_size, self.takes_over = self.size_of_rings(queues), takes_over
        self.rings = ring_map(descriptor, self.rings_size)
        if not self.rings:
            raise OSError(errno, "the buffers of io_uring cannot be mapped at their address")

    def registered(self):
        """How many rings have told the kernel of all their entries."""
        return lane_add(&self.ready_rings, 0)

    def run_ring(self, int cpu, uint64_t slot=0):
        """Serve the requests of one CPU; run it in a thread for each, once INIT is answered.

        The kernel sends what is asked on that CPU here. FORGET, INTERRUPT and notifications keep
        to /dev/fuse. Returns the errno that ended it: ENOTCONN after an unmount.
        """
        cdef Thread *thread = self.add_thread()
        cdef Queue *queue = &thread.queue
        cdef Entry *entry
        cdef uint64_t which
        cdef int result, failure, at
        thread.slot = slot
        ring_stay_on(cpu)
        failure = open_queue(queue, self.fd, cpu, self.rings)
        if failure:
            return failure
        with nogil:
            for at in range(DEPTH):
                entry = &queue.entries[at]
                if self.takes_over and has_left(entry):
                    self.serve_entry(thread, entry)
                elif not entry.left:
                    offer(queue, at)
            await_wake(queue)
            commit(queue)
            failure = enter(queue, 0)
            lane_add(&self.ready_rings, 1)
            while failure == 0 and not self.stopping:
                while failure == 0 and ring_pop(&queue.system, &which, &result):
                    if which == WAKE:
                        await_wake(queue)
                        continue
                    entry = &queue.entries[which]
                    if result >= 0:
                        entry.left = False
                        self.serve_entry(thread, entry)
                    elif entry.left and result != -ENOTCONN:
                        entry.left = False
                        offer(queue, which)  # it had been answered: nothing was left to commit
                    else:
                        failure = -result
                commit(queue)
                if failure == 0:
                    failure = enter(queue, 1)
            ring_close(&queue.system)
        return failure

    cdef void serve_entry(self, Thread *thread, Entry *entry) noexcept nogil:
        cdef size_t size
        thread.entry = entry
        thread.out = entry.room + HEADROOM  # where the kernel takes the reply from
        thread.request = request_in(entry, &size)
        self.serve(thread, size)

    # --- answers ------------------------------------------------------------------------------

    def answer_request(self, bytes request):
        """What the loop would do with a request, for tests: None for Python, () for silence, or
        (errno, body)."""
        cdef Reply reply
        cdef Thread *thread
        cdef int how
        cdef size_t size
        if not self.thread_count:
            self.new_thread()
        thread = self.threads[0]
        if len(request) < HEADER or <size_t>len(request) > BUFFER:
            return ()
        memcpy(thread.request, <const char *>request, len(request))
        size = len(request)
        with nogil:
            how = self.answer(thread, size, &reply)
        if how == FOR_PYTHON:
            return None
        return () if how == SILENT else (reply.error, reply.data[:reply.length])

    cdef int answer(self, Thread *thread, size_t size, Reply *reply) noexcept nogil:
        """Answer a request without Python where that is possible."""
        cdef const fuse_in_header *header = <const fuse_in_header *>thread.request
        cdef const char *body = thread.request + HEADER
        cdef uint32_t opcode = header.opcode
        cdef uint64_t node = header.nodeid
        cdef int how
        size -= HEADER
        reply.error, reply.data, reply.length = 0, NULL, 0
        if opcode == FORGET:
            return self.forget(node, <const uint64_t *>body) if size >= 8 else SILENT
        if opcode == BATCH_FORGET:
            return self.batch_forget(thread.request + HEADER, size)
        if opcode == INTERRUPT:
            return SILENT
        if opcode == OPENDIR or opcode == FLUSH:
            reply.error = ENOSYS  # and the kernel never asks again
            return ANSWERED
        if opcode == RELEASEDIR or opcode == ACCESS:
            return ANSWERED
        if opcode == STATFS:
            if lane_clock() >= self.statfs_until:
                return FOR_PYTHON
            reply.data, reply.length = self.statfs, 80
            return ANSWERED
        if opcode == READ:
            return self.read_data(thread, body, size, reply)
        if self.young is not None and self.young.table.count:
            how = self.answer_young(thread, -1, size, reply)
            if how != NOT_YOUNG:
                return how
        if opcode == RELEASE:
            return self.release(thread, body, size, reply)
        if not self.is_as_indexed(node):
            how = self.answer_from_tables(thread, opcode, node, body, size, reply)
            if how == FOR_PYTHON:
                how = self.answer_shown(thread, opcode, node, body, size, reply)
            if how == FOR_PYTHON and (opcode == GETATTR or opcode == SETATTR):
                how = self.answer_held(thread, opcode, node, body, size, reply)
            return how
        if opcode == LOOKUP:
            return self.lookup(thread, node, body, size, reply)
        if opcode == GETATTR:
            return self.getattr(thread, node, reply)
        if opcode == OPEN:
            return self.open(thread, node, body, size, reply)
        if opcode == READDIRPLUS or opcode == READDIR:
            return self.readdir(thread, node, opcode == READDIRPLUS, body, size, reply)
        if opcode == READLINK:
            return self.readlink(node, reply)
        if opcode == GETXATTR or opcode == LISTXATTR:
            return self.xattr(thread, node, opcode == LISTXATTR, body, size, reply)
        return FOR_PYTHON

    cdef bint is_as_indexed(self, uint64_t node) noexcept nogil:
        """Whether a node is what the index says."""
        return has_node(&self.index, node) and not self.dirty[node] & CHANGED

    cdef int fail(self, Reply *reply, int error) noexcept nogil:
        reply.error, reply.data, reply.length = error, NULL, 0
        return ANSWERED

    cdef int lookup(
        self, Thread *thread, uint64_t parent, const char *name, size_t size, Reply *reply
    ) noexcept nogil:
        cdef const char *record
        cdef int failure = self.check_name(name, size)
        if failure:
            return self.fail(reply, failure)
        if not self.index.nodes[parent].flags & DIRECTORY:
            return FOR_PYTHON
        if not find_record(&self.index, parent, name, size - 1, &record):
            return self.fail(reply, EIO)
        if record == NULL:
            return self.absent(thread, reply)
        if self.dirty[(<const uint64_t *>record)[0]] & CHANGED:
            return FOR_PYTHON
        reply.data, reply.length = record, ENTRY_SIZE
        if self.valid != self.forever:
            memcpy(thread.out, record, ENTRY_SIZE)
            self.limit(thread.out)
            reply.data = thread.out
        return ANSWERED

    cdef int check_name(self, const char *name, size_t size) noexcept nogil:
        """The errno for a name in a request, 0 for none."""
        if not size or name[size - 1] != 0 or memchr(name, 0, size - 1) != NULL:
            return EINVAL
        return ENAMETOOLONG if size - 1 > NAME_MAX else 0

    cdef int absent(self, Thread *thread, Reply *reply) noexcept nogil:
        """Answer that a name is not there, and for how long."""
        memset(thread.out, 0, ENTRY_SIZE)
        (<uint64_t *>thread.out)[2] = self.valid
        reply.data, reply.length = thread.out, ENTRY_SIZE
        return ANSWERED

    cdef void limit(self, char *entry) noexcept nogil:
        """Make an entry hold for `valid` seconds only."""
        (<uint64_t *>entry)[2] = self.valid
        (<uint64_t *>entry)[3] = self.valid

    cdef int getattr(self, Thread *thread, uint64_t node, Reply *reply) noexcept nogil:
        cdef const char *record = record_of(&self.index, node)
        if record == NULL:
            return self.fail(reply, EIO)
        memcpy(thread.out + 16, record + ATTR_AT, ENTRY_SIZE - ATTR_AT)
        return self.attributes(thread, reply)

    cdef int attributes(self, Thread *thread, Reply *reply) noexcept nogil:
        """Answer with the attributes that stand in `out` behind a fuse_attr_out's header."""
        memset(thread.out, 0, 16)
        (<uint64_t *>thread.out)[0] = self.valid
        reply.data, reply.length = thread.out, 16 + sizeof(fuse_attr)
        return ANSWERED

    cdef int answer_shown(
        self, Thread *thread, uint32_t opcode, uint64_t node, const char *body, size_t size,
        Reply *reply
    ) noexcept nogil:
        """Answer for what upper has, as far as `show` and `has_no_capabilities` have told of it."""
        cdef Shown *shown
        cdef int how = FOR_PYTHON
        if opcode == GETXATTR and node and self.bare[node % BARE] == node:
            if size == 8 + 20 and memcmp(body + 8, b"security.capability", 20) == 0:
                return self.fail(reply, ENODATA)
            return FOR_PYTHON
        if opcode != GETATTR and opcode != LOOKUP and opcode != CREATE and opcode != UNLINK:
            return FOR_PYTHON
        shown = begin_looking(self.shown, node)
        if shown == NULL:
            return FOR_PYTHON
        if opcode == GETATTR:
            if stat_shown(shown, <fuse_attr *>(thread.out + 16)):
                how = self.attributes(thread, reply)
        elif opcode == LOOKUP:
            if shown.alone and size > 1 and size <= NAME_MAX + 1 and body[size - 1] == 0:
                if lane_is_absent(shown.directory, body):
                    how = self.absent(thread, reply)
        elif shown.lent and self.young is not None:
            if opcode == UNLINK or shown.alone or self.has_nothing_below(node, body, size):
                how = self.answer_young(thread, shown.directory, size, reply)
        end_looking(shown)
        return how

    cdef bint has_nothing_below(
        self, uint64_t parent, const char *body, size_t size
    ) noexcept nogil:
        """Whether no layer has the name that a CREATE is about, and upper never had it."""
        cdef const char *name = body + CREATE_SIZE
        cdef const char *record
        cdef int how
        if self.tables is None or size <= CREATE_SIZE or self.check_name(name, size - CREATE_SIZE):
            return False
        how = self.tables.lookup(parent, name, size - CREATE_SIZE - 1, NULL)
        if how != BELOW:
            return how == ABSENT
        return (
            has_node(&self.index, parent)
            and find_record(&self.index, parent, name, size - CREATE_SIZE - 1, &record)
            and record == NULL
        )

    cdef int answer_young(
        self, Thread *thread, int directory, size_t size, Reply *reply
    ) noexcept nogil:
        """Answer what is asked of a young file, or make or delete one in a directory of upper."""
        cdef const fuse_in_header *header = <const fuse_in_header *>thread.request
        cdef Asked asked
        cdef int how
        asked.opcode, asked.unique, asked.node = header.opcode, header.unique, header.nodeid
        asked.uid, asked.gid, asked.slot = header.uid, header.gid, thread.slot
        asked.body, asked.size = thread.request + HEADER, size
        asked.out, asked.length, asked.error = thread.out, 0, 0
        if directory < 0:
            how = self.young.answer(&asked)
        elif asked.opcode == UNLINK:
            how = self.young.unlink(&asked, directory)
        else:
            how = self.young.create(&asked, directory)
            if how == ANSWERED and self.xattrs:
                self.bare[asked.made % BARE] = asked.made
        reply.error, reply.data, reply.length = asked.error, asked.out, asked.length
        return how

    cdef int answer_held(
        self, Thread *thread, uint32_t opcode, uint64_t node, const char *body, size_t size,
        Reply *reply
    ) noexcept nogil:
        """Answer for a new file that we hold, or change it."""
        cdef const char *wanted = body if opcode == SETATTR else NULL
        cdef int failure
        if wanted != NULL and size < 88:  # struct fuse_setattr_in
            return FOR_PYTHON
        failure = held_attributes(self.held, node, wanted, <fuse_attr *>(thread.out + 16))
        if failure < 0:
            return FOR_PYTHON
        return self.fail(reply, failure) if failure else self.attributes(thread, reply)

    cdef int readlink(self, uint64_t node, Reply *reply) noexcept nogil:
        if not self.index.nodes[node].flags & SYMLINK:
            return self.fail(reply, EINVAL)
        reply.data = target_of(&self.index, node, &reply.length)
        return ANSWERED if reply.data != NULL else self.fail(reply, EIO)

    cdef int xattr(
        self, Thread *thread, uint64_t node, bint all_names, const char *body, size_t size,
        Reply *reply
    ) noexcept nogil:
        cdef const fuse_getxattr_in *wanted = <const fuse_getxattr_in *>body
        if size < sizeof(fuse_getxattr_in):
            return self.fail(reply, EINVAL)
        if not self.xattrs or self.index.nodes[node].flags & HAS_XATTRS:
            return FOR_PYTHON
        if all_names:
            if wanted.size == 0:
                memset(thread.out, 0, 8)
                reply.data, reply.length = thread.out, 8
            return ANSWERED
        # What the union itself makes up: see user.unionfuse.layer.
        if size >= 8 + 15 and memcmp(body + 8, b"user.unionfuse.", 15) == 0:
            return FOR_PYTHON
        return self.no_xattr(body, size, reply)

    cdef int no_xattr(self, const char *body, size_t size, Reply *reply) noexcept nogil:
        """Answer that an extended attribute is not there."""
        if size == 8 + 17 and memcmp(body + 8, b"security.selinux", 17) == 0:
            return self.fail(reply, self.unlabelled)
        return self.fail(reply, ENODATA)

    cdef int forget(self, uint64_t node, const uint64_t *count) noexcept nogil:
        """Nodes of the index need no counting until they change; those of tables count there."""
        cdef int how
        if self.young is not None and self.young.table.count:
            how = self.young.forget(node, count[0])
            if how != NOT_YOUNG:
                return how
        if self.is_as_indexed(node):
            if self.dirty[node] & CACHED:
                opens_unmark(&self.dirty[node], CACHED)  # what the kernel forgets has no pages
            return SILENT
        if self.tables is not None and self.tables.forget(node, count[0], False) == FOUND:
            return SILENT
        return FOR_PYTHON

    cdef int batch_forget(self, char *body, size_t size) noexcept nogil:
        """Forget what can be forgotten here, and leave the rest in the request for Python."""
        cdef fuse_batch_forget_in *batch = <fuse_batch_forget_in *>body
        cdef fuse_forget_one *one
        cdef uint32_t i, left = 0
        if size < sizeof(fuse_batch_forget_in):
            return SILENT
        one = <fuse_forget_one *>(body + sizeof(fuse_batch_forget_in))
        size = (size - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one)
        for i in range(batch.count):
            if i >= size:
                break
            if self.forget(one[i].nodeid, &one[i].nlookup) == FOR_PYTHON:
                one[left] = one[i]
                left += 1
        batch.count = left
        return FOR_PYTHON if left else SILENT

    # --- from the tables ----------------------------------------------------------------------

    cdef int answer_from_tables(
        self, Thread *thread, uint32_t opcode, uint64_t node, const char *body, size_t size,
        Reply *reply
    ) noexcept nogil:
        cdef ssize_t got
        if self.tables is None:
            return FOR_PYTHON
        if opcode == LOOKUP:
            return self.lookup_in_tables(thread, node, body, size, reply)
        if not self.shows_tables:
            return FOR_PYTHON
        if opcode == GETATTR:
            if self.tables.getattr(node, thread.out + 16) != FOUND:
                return FOR_PYTHON
            return self.attributes(thread, reply)
        if opcode == OPEN:
            return self.open(thread, node, body, size, reply)
        if opcode == READDIRPLUS and size >= sizeof(fuse_read_in):
            got = self.list_table(
                (<const fuse_in_header *>thread.request).pid, node,
                (<const fuse_read_in *>body).offset,
                min((<const fuse_read_in *>body).size, PAYLOAD), thread.out
            )
        elif opcode == READLINK:
            got = self.tables.readlink(node, thread.out, 4096)
        elif opcode == GETXATTR and self.is_often_asked(body, size):
            if self.tables.getxattr(node, body + sizeof(fuse_getxattr_in)) != ABSENT:
                return FOR_PYTHON
            return self.no_xattr(body, size, reply)
        else:
            return FOR_PYTHON
        if got < 0:
            return FOR_PYTHON
        reply.data, reply.length = thread.out, got
        return ANSWERED

    cdef int lookup_in_tables(
        self, Thread *thread, uint64_t parent, const char *name, size_t size, Reply *reply
    ) noexcept nogil:
        cdef int failure = self.check_name(name, size)
        cdef int how
        # Not in `out`: over io_uring the name is there, which Python may have to read after all.
        cdef char entry[ENTRY_SIZE]
        if failure:
            return self.fail(reply, failure)
        if name[0] == 46 and (size == 2 or (size == 3 and name[1] == 46)):  # "." and ".."
            return FOR_PYTHON
        how = self.tables.lookup(parent, name, size - 1, entry if self.shows_tables else NULL)
        if how == ASK_UNION and self.tables.merge_here(parent):
            how = self.tables.lookup(parent, name, size - 1, entry if self.shows_tables else NULL)
        if how == ABSENT:
            return self.absent(thread, reply)
        if how == BELOW and has_node(&self.index, parent):
            return self.lookup(thread, parent, name, size, reply)
        if how != FOUND:
            return FOR_PYTHON
        memcpy(thread.out, entry, ENTRY_SIZE)
        self.limit(thread.out)
        reply.data, reply.length = thread.out, ENTRY_SIZE
        return ANSWERED

    cdef bint is_often_asked(self, const char *body, size_t size) noexcept nogil:
        """Whether an extended attribute is one that `ls -l` and the kernel ask of every file."""
        if not self.xattrs or size < 8 + 10 or body[size - 1] != 0 or size > 8 + NAME_MAX:
            return False
        return memcmp(body + 8, b"security.", 9) == 0 or memcmp(body + 8, b"system.pos", 10) == 0

    # --- listing ------------------------------------------------------------------------------

    cdef int readdir(
        self, Thread *thread, uint64_t directory, bint plus, const char *body, size_t size,
        Reply *reply
    ) noexcept nogil:
        cdef const index_node *node = &self.index.nodes[directory]
        cdef const fuse_read_in *wanted = <const fuse_read_in *>body
        cdef uint64_t at, end = node.offset + node.length, start, cookie = 0
        cdef size_t room, used = 0, length, whole
        cdef const char *record
        cdef const fuse_dirent *entry
        cdef bint sparse = False, copies
        if size < sizeof(fuse_read_in):
            return self.fail(reply, EINVAL)
        if not node.flags & DIRECTORY or (plus and self.dirty[directory] & LISTING):
            return FOR_PYTHON
        room = min(wanted.size, PAYLOAD)
        if not self.seek(thread, directory, wanted.offset, &at):
            return self.fail(reply, EIO)
        start = at
        if plus and self.lists_sparsely:
            sparse = node.length <= SPARSE_NAMES * RECORD_SIZE and wants_sparse(
                &self.sparse, (<const fuse_in_header *>thread.request).pid, directory, wanted.offset
            )
            sparse = note_listing(&self.sparse, directory, sparse)
        copies = sparse or self.valid != self.forever
        while at < end:
            record = record_before(&self.index, at, end)
            if record == NULL:
                return self.fail(reply, EIO)
            entry = <const fuse_dirent *>(record + ENTRY_SIZE)
            whole = length = record_length(entry.namelen)
            if not plus:
                length -= ENTRY_SIZE
            if used + length > room:
                break
            if not plus:
                memcpy(thread.out + used, record + ENTRY_SIZE, length)
            elif sparse and entry.type != DT_DIR:
                memset(thread.out + used, 0, ENTRY_SIZE)
                memcpy(thread.out + used + ENTRY_SIZE, record + ENTRY_SIZE, length - ENTRY_SIZE)
            elif copies:
                memcpy(thread.out + used, record, length)
                if self.valid != self.forever:
                    self.limit(thread.out + used)
            used += length
            at += whole
            cookie = entry.off
        if used == 0 and at < end:
            return self.fail(reply, EINVAL)
        if plus and not copies:
            if at > self.index.records_length:
                return self.fail(reply, EIO)
            reply.data = self.index.records + start
        else:
            reply.data = thread.out
        reply.length = used
        if cookie:
            self.remember(thread, directory, cookie, at)
        return ANSWERED

    cdef bint seek(
        self, Thread *thread, uint64_t directory, uint64_t cookie, uint64_t *offset
    ) noexcept nogil:
        """The offset of the record behind a cookie."""
        cdef const Place *known = &thread.places[directory % MEMORY]
        if cookie and known.directory == directory and known.cookie == cookie:
            offset[0] = known.offset
            return True
        return seek(&self.index, directory, cookie, offset)

    cdef void remember(
        self, Thread *thread, uint64_t directory, uint64_t cookie, uint64_t offset
    ) noexcept nogil:
        cdef Place *place = &thread.places[directory % MEMORY]
        place.directory, place.cookie, place.offset = directory, cookie, offset

    # --- data ---------------------------------------------------------------------------------

    cdef int read_data(
        self, Thread *thread, const char *body, size_t size, Reply *reply
    ) noexcept nogil:
        cdef const fuse_read_in *wanted = <const fuse_read_in *>body
        cdef uint64_t found
        if size < sizeof(fuse_read_in):
            return self.fail(reply, EINVAL)
        if wanted.size > PAYLOAD:
            return self.fail(reply, EINVAL)
        if wanted.fh & NODE_BIT:
            return self.read_node(thread, wanted.fh & ~NODE_BIT, wanted, reply)
        found = lane_load_place(&self.descriptors[wanted.fh % HANDLES])
        if not found or found >> DESCRIPTOR_BITS != wanted.fh:
            return FOR_PYTHON
        return self.read_file(thread, found & ((1 << DESCRIPTOR_BITS) - 1), wanted, reply)

    cdef int read_file(
        self, Thread *thread, int descriptor, const fuse_read_in *wanted, Reply *reply
    ) noexcept nogil:
        cdef ssize_t got
        cdef uint64_t unique = (<const fuse_in_header *>thread.request).unique
        if thread.entry == NULL:
            if lane_splice(
                thread.pipe, self.fd, unique, descriptor, wanted.offset, wanted.size
            ):
                return SILENT
        got = pread(descriptor, thread.out, wanted.size, <off_t>wanted.offset)
        if got < 0:
            return self.fail(reply, errno)
        reply.data, reply.length = thread.out, got
        return ANSWERED

    cdef int read_node(
        self, Thread *thread, uint64_t node, const fuse_read_in *wanted, Reply *reply
    ) noexcept nogil:
        cdef uint32_t slot
        cdef int file = 0, descriptor, how = FOR_PYTHON
        if not self.opening:
            return self.fail(reply, EINVAL)
        slot = begin_reading(&self.opens, node, &file)
        if not slot:
            return FOR_PYTHON
        if file == 0 and self.opens.our_files < lane_most_files():
            descriptor = self.open_lower(node)
            if descriptor >= 0:
                file = offer_file(&self.opens, slot, descriptor)
                if file != (descriptor + 1) | OURS:  # somebody was faster
                    close(descriptor)
        if file != 0 and file != ASK:
            how = self.read_file(thread, (file & ~OURS) - 1, wanted, reply)
        end_reading(&self.opens, slot)
        return how

    cdef int open(
        self, Thread *thread, uint64_t node, const char *body, size_t size, Reply *reply
    ) noexcept nogil:
        cdef const fuse_open_in *wanted = <const fuse_open_in *>body
        cdef fuse_open_out *out = <fuse_open_out *>thread.out
        cdef bint first = False
        cdef uint32_t slot
        if size < sizeof(fuse_open_in):
            return self.fail(reply, EINVAL)
        if not self.opening or wanted.flags & (ACCESS_MODE | TRUNCATE):
            return FOR_PYTHON
        slot = begin_open(&self.opens, node, &first)  # before the look: Python looks after it
        if not slot or not self.open_counted(thread, node, slot, first):
            return FOR_PYTHON
        memset(out, 0, sizeof(fuse_open_out))
        out.fh, out.open_flags = NODE_BIT | node, KEEP_CACHE_NOFLUSH
        reply.data, reply.length = thread.out, sizeof(fuse_open_out)
        return ANSWERED

    cdef bint open_counted(
        self, Thread *thread, uint64_t node, uint32_t slot, bint first
    ) noexcept nogil:
        """Open a node, or bring what it has, unless it is there already; False: ask Python."""
        cdef bint cached = False, is_open = self.is_openable(node, &cached)
        cdef int descriptor = -1
        cdef int64_t size = -1
        if is_open and first and not cached:
            descriptor = self.open_lower(node)
            if descriptor >= 0:
                size = opens_size(descriptor)
            is_open = size >= 0 and <uint64_t>size < self.open_size
            if is_open and size <= BROUGHT:
                self.bring(thread, node, descriptor, size)
            if descriptor >= 0 and (
                not is_open or size <= BROUGHT or self.opens.our_files >= lane_most_files()
            ):
                close(descriptor)
                descriptor = -1
        end_opening(&self.opens, slot, first, descriptor, is_open)
        return is_open

    cdef bint is_openable(self, uint64_t node, bint *cached) noexcept nogil:
        """Whether a node's file is the layer's, as far as can be told without a look at it."""
        cdef const char *record
        cdef uint8_t marks
        if not has_node(&self.index, node):
            return self.tables is not None and self.tables.is_openable(node, cached)
        marks = self.dirty[node]
        record = record_of(&self.index, node)
        cached[0] = marks & CACHED != 0
        return (
            not marks & CHANGED and record != NULL
            and (<const uint64_t *>(record + ATTR_AT))[1] < self.open_size
        )

    cdef void bring(self, Thread *thread, uint64_t node, int file, size_t size) noexcept nogil:
        if not opens_bring(self.fd, node, file, thread.out, size):
            return
        if has_node(&self.index, node):
            opens_mark(&self.dirty[node], CACHED)
        else:
            self.tables.note_cached(node)

    cdef int open_lower(self, uint64_t node) noexcept nogil:
        """The file of a node in its layer, opened; -1 where only Python knows, or it fails."""
        cdef char path[PATH_MAX]
        cdef const char *found
        if not has_node(&self.index, node):
            return self.tables.open_file(node) if self.tables is not None else -1
        # A file with several names may have another one in its layer; a metacopy is elsewhere.
        if (
            self.tables is None or self.dirty[node] & CHANGED
            or self.index.nodes[node].flags & (HAS_LINKS | METACOPY | DIRECTORY | SYMLINK)
            or self.index.nodes[node].layer >= min(self.index.layers, self.tables.layer_count)
        ):
            return -1
        found = path_in_layer(&self.index, node, path)
        if found == NULL:
            return -1
        # The index counts from the base.
        return opens_lower(
            self.tables.layers[self.index.layers - 1 - self.index.nodes[node].layer], found
        )

    cdef int release(
        self, Thread *thread, const char *body, size_t size, Reply *reply
    ) noexcept nogil:
        cdef const fuse_release_in *wanted = <const fuse_release_in *>body
        cdef int file, done = ANSWERED
        if size < sizeof(fuse_release_in) or not wanted.fh & NODE_BIT or not self.opening:
            return FOR_PYTHON
        if self.resident:
            # Answered before it is counted: if we die in between it does not come again, and one
            # open too many is counted. One too few would close a file that is open.
            self.send(thread.entry, (<const fuse_in_header *>thread.request).unique, reply)
            done = SILENT
        file = end_open(&self.opens, wanted.fh & ~NODE_BIT)
        if file & OURS:
            close((file & ~OURS) - 1)
        return FOR_PYTHON if file and not file & OURS else done  # Python closes what it opened

    def keep_statfs(self, bytes answer):
        """Answer STATFS with these bytes for a moment: the kernel never caches it."""
        if len(answer) == 80:
            memcpy(self.statfs, <const char *>answer, 80)
            self.statfs_until = lane_clock() + STATFS_VALID
