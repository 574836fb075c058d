# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Young files: those that the loop has made in upper, and that Python knows nothing of yet.

Most new files are made, written, closed, perhaps deleted, and nothing else is ever asked of them.
They are made and deleted here, without the GIL: in directories that Python has lent to the loop,
under names that no layer has. A young file is a node id, its place, and the descriptor of the open
that made it.

Whatever else is asked goes to Python, and Python first hears of the names that have come and gone
(`news`), and takes the file that is meant out of here (`take`) to make an ordinary node of it. So a
node is either young or Python's. The kernel holds a directory's lock while a name in it is made,
deleted, moved or listed: what Python has heard when it is asked is true until it has answered.

With a keeper the notes are those that Python would have written, in the same order.
"""

from libc.errno cimport ENODATA, ENOTTY, EPERM
from libc.stdlib cimport free
from libc.string cimport memchr, memcmp, memcpy, memset
from posix.unistd cimport close

from unionfuse.wire._wire cimport ATTR_AT, ENTRY_SIZE, fuse_attr
from unionfuse.express._requests cimport GETATTR, GETXATTR, IOCTL, LOOKUP, RELEASE, SETATTR
from unionfuse.tree._notes cimport (
    IS_BEGUN, IS_FREE, Notes, Record, Slot, notes_store, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock,
)

cdef extern from "_young.h" nogil:
    struct fuse_setattr_in:
        pass
    int held_change(int file, const fuse_setattr_in *wanted)
    young *young_by_node(const young_table *table, uint64_t node)
    young *young_by_name(
        const young_table *table, uint64_t parent, const char *name, size_t length)
    void young_link(young_table *table, young *file)
    bint young_room(young_table *table)
    young_parent **young_parent_of "young_parent"(young_table *table, uint64_t node)
    bint young_count(young_table *table, uint64_t directory, int by)
    void young_wait(young_table *table, young *file)
    void young_heard(young_table *table, young *file)
    void young_unlink_name(young_table *table, young *file)
    void young_remove(young_table *table, young *file)
    young *young_new(const char *name, size_t length)
    bint young_is_absent(int directory, const char *name)
    int young_create(
        int directory, const char *name, int flags, unsigned mode, uint32_t uid, uint32_t gid)
    int young_stat(int directory, const char *name, uint64_t mix, fuse_attr *out)
    int young_register(int fuse, int file)
    void young_unregister(int fuse, uint32_t backing)
    size_t young_farewell(const young *file, const fuse_attr *last, char *out)
    void young_die()

cdef extern from "<unistd.h>" nogil:
    int unlinkat(int directory, const char *name, int flags)

cdef enum:
    IOCTL_SIZE = 32
    ASKS_FOR_TERMINAL = 0x5401  # TCGETS, what isatty(3) asks
    SETATTR_SIZE = 88
    CREATE_SIZE = 16  # flags, mode, umask, open_flags; the name
    RELEASE_SIZE = 24
    OPEN_OUT = 16  # fh, open_flags, backing_id
    KEPT_FLAGS = 3 | 0o4010000  # O_ACCMODE | O_SYNC, which has O_DSYNC in it
    ACCESS_MODE = 3
    READ_WRITE = 2
    WRITE_ONLY = 1
    REGULAR = 8  # S_IFREG >> 12
    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7
    NAME_MAX = 255
    FAREWELL_MOST = 512
    NEWS = 4096  # names that Python has not heard of; then it is asked, so that it does
    # Of the journal and its words (survival/journal.py, survival/memory.py).
    NAME = 1
    GOING = 2
    GONE = 3
    OPEN = 4
    BACKING_WORD = 8
    CLOSING_WORD = 10

cdef uint64_t RESEND = <uint64_t>1 << 63
cdef uint64_t FIRST_NODE = <uint64_t>1 << 62  # journal.FIRST_FRESH_ID
cdef uint64_t HANDLE_BIT = <uint64_t>1 << 43


def handle_of(uint64_t node):
    """The handle of the open that made a young file: Python's count from 1 up."""
    return HANDLE_BIT | node - FIRST_NODE


cdef class YoungFiles:
    """The young files of one mount.

    Arguments:
        fuse: /dev/fuse.
        valid: for how many seconds the kernel may keep a name and its attributes.
        mix: what upper's inode numbers are mixed with (inodes.py).
        most_open: so many of them may be open.
        notes: of a mount with a keeper.
        dies_at: for tests: the process ends before this step of a change, counted from one.
    """

    def __cinit__(
        self, int fuse, uint64_t valid, uint64_t mix, long most_open, Notes notes=None,
        long dies_at=0
    ):
        self.fuse, self.valid, self.mix, self.most_open = fuse, valid, mix, most_open
        self.notes, self.steps = notes, dies_at
        pthread_mutex_init(&self.changing, NULL)
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        cdef size_t i
        for i in range(self.table.room):
            while self.table.nodes[i] != NULL:
                if self.table.nodes[i].descriptor >= 0:
                    close(self.table.nodes[i].descriptor)
                young_heard(&self.table, self.table.nodes[i])
                young_remove(&self.table, self.table.nodes[i])
        pthread_mutex_destroy(&self.mutex)
        pthread_mutex_destroy(&self.changing)

    def __enter__(self):
        """Keep everything here as it is."""
        with nogil:
            pthread_mutex_lock(&self.changing)
            self.lock()

    def __exit__(self, *_):
        self.unlock()
        pthread_mutex_unlock(&self.changing)

    def __len__(self):
        return self.table.count

    def opened(self):
        """How many of them are open."""
        return self.table.open

    def pass_files_through(self):
        """Have the kernel read and write files by itself."""
        self.passes = True

    def stop(self):
        """Make and delete nothing any more."""
        with self:
            self.stopped = True

    def wants_nodes(self):
        """Whether all node ids are used up."""
        return self.next_node == self.last_node and not self.stopped

    def give_nodes(self, uint64_t first, uint64_t count):
        """Use these node ids, which nobody else has."""
        with self:
            self.next_node, self.last_node = first, first + count

    def news(self):
        """(directory, name, whether it is there) of each name that came or went, in that order."""
        cdef young *file
        found = []
        with self:
            while self.table.first != NULL:
                file = self.table.first
                found.append((file.parent, (<char *>file.name)[:file.length], not file.gone))
                file.noted = True
                young_heard(&self.table, file)
                if not file.node:
                    free(file)
        return found

    def named(self, uint64_t parent, const unsigned char[:] name):
        """The node id of a young file under a name; 0 for none."""
        cdef young *file
        if not len(name):
            return 0
        with self:
            file = young_by_name(&self.table, parent, <const char *>&name[0], len(name))
            return file.node if file != NULL else 0

    def inside(self, uint64_t directory):
        """The node ids of all young files in a directory."""
        cdef young *file
        found = []
        with self:
            if young_parent_of(&self.table, directory)[0] == NULL:
                return found
            for i in range(self.table.room):
                file = self.table.nodes[i]
                while file != NULL:
                    if file.parent == directory and not file.gone:
                        found.append(file.node)
                    file = file.next_node
        return found

    def inode(self, uint64_t parent, bytes name):
        """The inode number of a young file under a name; 0 for none."""
        cdef young *file
        with self:
            file = young_by_name(&self.table, parent, name, len(name))
            return file.inode if file != NULL else 0

    def take(self, uint64_t node):
        """Hand a file over to Python: all that is known of it, None for one that is not young.

        Ask for the news first, and hold the union's lock from then on. The news will not say of
        its name that it is there.

        Returns:
            (parent, name, inode, lookups, offset of its record, flags of the open that made it,
            farewell, open): farewell as in survival/farewell.py, of a deleted file, else None; open
            is None or (descriptor, backing id, offset of its record).
        """
        cdef young *file
        cdef char said[FAREWELL_MOST]
        with self:
            file = young_by_node(&self.table, node)
            if file == NULL:
                return None
            opened = None
            if file.descriptor >= 0:
                opened = file.descriptor, file.backing, file.handle_note
            last = None
            if file.gone:
                last = said[:young_farewell(file, &file.last, said)][1 + file.length:]
            found = (
                file.parent, (<char *>file.name)[:file.length], file.inode, file.lookups,
                file.name_note, file.flags, last, opened,
            )
            if not file.gone:
                young_heard(&self.table, file)
            young_remove(&self.table, file)
            return found

    def move_notes(self, uint64_t end):
        """Copy the records of all files behind `end`, which is returned as it is then.

        The caller holds on to everything here (`with young:`).
        """
        cdef young *file
        for i in range(self.table.room):
            file = self.table.nodes[i]
            while file != NULL:
                end = self.move(&file.name_note, end)
                end = self.move(&file.handle_note, end)
                file = file.next_node
        return end

    cdef uint64_t move(self, uint64_t *at, uint64_t end):
        cdef uint64_t size
        if at[0]:
            size = (<Record *>(self.notes.base + at[0])).header & <uint64_t>0xFFFFFFFF
            memcpy(self.notes.base + end, self.notes.base + at[0], size)
            at[0] = end
            end += size
        return end

    # --- what the loop asks -------------------------------------------------------------------

    cdef bint concern(self, uint64_t node) noexcept nogil:
        """Whether Python has to prepare for a request about a node."""
        cdef bint does
        self.lock()
        does = (
            self.table.waiting or young_by_node(&self.table, node) != NULL
            or (self.next_node == self.last_node and not self.stopped)
        )
        self.unlock()
        return does

    cdef bint is_young(self, uint64_t node) noexcept nogil:
        cdef bint found
        self.lock()
        found = young_by_node(&self.table, node) != NULL
        self.unlock()
        return found

    cdef int answer(self, Asked *asked) noexcept nogil:
        """Answer what is asked of a young file."""
        cdef young *file
        cdef int how = FOR_PYTHON
        if asked.opcode == LOOKUP:
            return FOR_PYTHON if self.has_name(asked) else NOT_YOUNG
        if not self.is_young(asked.node):
            return NOT_YOUNG
        pthread_mutex_lock(&self.changing)
        file = young_by_node(&self.table, asked.node)
        if file == NULL:
            how = NOT_YOUNG
        elif asked.opcode == RELEASE:
            how = self.release(asked, file)
        elif asked.opcode == GETATTR or asked.opcode == SETATTR:
            how = self.attributes(asked, file)
        elif asked.opcode == GETXATTR:
            if asked.size == 8 + 20 and memcmp(asked.body + 8, b"security.capability", 20) == 0:
                how = NOT_YOUNG  # the loop knows
            elif asked.size == 8 + 24 and memcmp(
                asked.body + 8, b"system.posix_acl_access", 24
            ) == 0:
                asked.error, how = ENODATA, ANSWERED
        elif asked.opcode == IOCTL and asked.size >= IOCTL_SIZE:
            if (<const uint32_t *>asked.body)[3] == ASKS_FOR_TERMINAL:
                asked.error, how = ENOTTY, ANSWERED
        pthread_mutex_unlock(&self.changing)
        return how

    cdef bint has_name(self, Asked *asked) noexcept nogil:
        cdef bint found
        if not asked.size:
            return False
        self.lock()
        found = young_by_name(&self.table, asked.node, asked.body, asked.size - 1) != NULL
        self.unlock()
        return found

    cdef int create(self, Asked *asked, int directory) noexcept nogil:
        """Make a file in a directory of upper, under a name that no layer has, and open it."""
        cdef const unsigned *wanted = <const unsigned *>asked.body  # flags, mode, umask
        cdef young *file
        cdef int how = FOR_PYTHON
        if asked.unique & RESEND or not is_plain_name(asked, CREATE_SIZE):
            return FOR_PYTHON
        pthread_mutex_lock(&self.changing)
        file = self.prepared(asked, directory)
        if file != NULL:
            file.flags = wanted[0] & KEPT_FLAGS
            how = self.make(asked, directory, file, wanted[1] & ~wanted[2] & 0o7777)
            if how == FOR_PYTHON:
                self.abandon(file)
        pthread_mutex_unlock(&self.changing)
        return how

    cdef int unlink(self, Asked *asked, int directory) noexcept nogil:
        """Delete a young file that is not open."""
        cdef young *file
        cdef int how = FOR_PYTHON
        if asked.unique & RESEND or not is_plain_name(asked, 0):
            return FOR_PYTHON
        pthread_mutex_lock(&self.changing)
        file = young_by_name(&self.table, asked.node, asked.body, asked.size - 1)
        if file != NULL and file.descriptor < 0 and not self.stopped:
            if self.notes is None or asked.slot:
                how = self.delete(asked, directory, file)
        pthread_mutex_unlock(&self.changing)
        return how

    cdef int forget(self, uint64_t node, uint64_t count) noexcept nogil:
        """The kernel has dropped lookups of a node."""
        cdef young *file
        cdef int how = SILENT
        if not self.is_young(node):
            return NOT_YOUNG
        pthread_mutex_lock(&self.changing)
        self.lock()
        file = young_by_node(&self.table, node)
        if file == NULL:
            how = NOT_YOUNG
        elif file.lookups > count:
            file.lookups -= count
            self.count(file)
        elif file.gone:
            if file.name_note:
                self.notes.end_record(file.name_note)
            young_remove(&self.table, file)
        else:
            how = FOR_PYTHON  # it stays, and somebody has to know it
        self.unlock()
        pthread_mutex_unlock(&self.changing)
        return how

    # --- make ---------------------------------------------------------------------------------

    cdef young *prepared(self, Asked *asked, int directory) noexcept nogil:
        """A file that is about to be made, with room for all there will be of it; NULL."""
        cdef const char *name = asked.body + CREATE_SIZE
        cdef bint has_room
        cdef young *file
        if (
            self.stopped or self.next_node == self.last_node or self.table.waiting >= NEWS
            or self.table.open >= <size_t>self.most_open or not young_is_absent(directory, name)
            or (self.notes is not None and not asked.slot)
        ):
            return NULL
        file = young_new(name, asked.size - CREATE_SIZE - 1)
        if file == NULL:
            return NULL
        file.descriptor, file.node, file.parent = -1, self.next_node, asked.node
        self.lock()
        has_room = young_room(&self.table) and young_count(&self.table, file.parent, 1)
        self.unlock()
        if not has_room:
            free(file)
            return NULL
        if self.notes is None:
            return file
        # They count as soon as they have a kind. What they say of the file comes later.
        file.name_note = self.notes.put(
            0, REGULAR, file.node, 0, 0, file.parent, file.name, file.length, False
        )
        file.handle_note = self.notes.put(
            0, 0, HANDLE_BIT | file.node - FIRST_NODE, 0, 0, file.node, NULL, 0, False
        )
        if not file.name_note or not file.handle_note:
            self.abandon(file)
            return NULL
        return file

    cdef void abandon(self, young *file) noexcept nogil:
        """Let go of a file that was not made after all."""
        if file.name_note:
            self.notes.end_record(file.name_note)
        if file.handle_note:
            self.notes.end_record(file.handle_note)
        self.lock()
        young_count(&self.table, file.parent, -1)
        self.unlock()
        free(file)

    cdef int make(self, Asked *asked, int directory, young *file, unsigned mode) noexcept nogil:
        cdef fuse_attr found
        cdef Slot *slot = NULL
        cdef Record *record
        memset(&found, 0, sizeof(found))
        if self.notes is not None:
            slot = <Slot *>(self.notes.base + asked.slot)
            self.notes.open_slot(
                slot, asked.unique, asked.opcode, asked.node, asked.body, asked.size
            )
            slot.handle = HANDLE_BIT | file.node - FIRST_NODE
            notes_store(&slot.state, IS_BEGUN)
        self.step()
        file.descriptor = young_create(
            directory, file.name, file.flags, mode, asked.uid, asked.gid
        )
        self.step()
        if file.descriptor < 0:
            if slot != NULL:
                notes_store(&slot.state, IS_FREE)
            return FOR_PYTHON  # it does the same, and says what is wrong
        young_stat(file.descriptor, b"", self.mix, &found)
        file.inode, file.lookups = found.ino, 1
        if slot != NULL:
            record = <Record *>(self.notes.base + file.name_note)
            record.lookups, record.inode = 1, found.ino
            self.notes.turn(file.name_note, NAME)
            record = <Record *>(self.notes.base + file.handle_note)
            record.lookups = <uint64_t>file.flags
            self.step()
            self.notes.turn(file.handle_note, OPEN)
        self.step()
        self.pass_through(file)
        self.lock()
        self.next_node += 1
        self.table.count += 1
        self.table.open += 1
        young_link(&self.table, file)
        young_wait(&self.table, file)
        self.unlock()
        self.write_reply(asked, file)
        memcpy(asked.out + ATTR_AT, &found, sizeof(fuse_attr))
        if slot != NULL:
            self.step()
            self.notes.close_slot(slot, 0, asked.out, asked.length)
            self.step()
        return ANSWERED

    cdef void pass_through(self, young *file) noexcept nogil:
        """Have the kernel read and write a file by itself, if it will."""
        cdef int backing
        cdef uint64_t *words
        if not self.passes:
            return
        backing = young_register(self.fuse, file.descriptor)
        self.step()
        if backing == -EPERM:
            self.passes = False
        if backing <= 0:
            return
        file.backing = backing
        if self.notes is not None:
            (<Record *>(self.notes.base + file.handle_note)).inode = backing
            words = <uint64_t *>self.notes.base
            if words[BACKING_WORD] < <uint64_t>backing:
                words[BACKING_WORD] = backing

    cdef void write_reply(self, Asked *asked, young *file) noexcept nogil:
        """Write the reply to CREATE, but for the attributes."""
        cdef uint64_t *entry = <uint64_t *>asked.out
        cdef uint32_t *opened = <uint32_t *>(asked.out + ENTRY_SIZE)
        memset(asked.out, 0, ENTRY_SIZE + OPEN_OUT)
        asked.made = file.node
        entry[0], entry[2], entry[3] = file.node, self.valid, self.valid
        (<uint64_t *>opened)[0] = HANDLE_BIT | file.node - FIRST_NODE
        opened[2] = NOFLUSH | (PASSTHROUGH if file.backing else KEEP_CACHE)
        opened[3] = file.backing
        asked.length = ENTRY_SIZE + OPEN_OUT

    # --- use, delete --------------------------------------------------------------------------

    cdef int attributes(self, Asked *asked, young *file) noexcept nogil:
        """GETATTR and SETATTR of a file that is open for writing only: it has no shared map."""
        cdef fuse_attr *out = <fuse_attr *>(asked.out + 16)
        cdef const fuse_setattr_in *wanted = <const fuse_setattr_in *>asked.body
        cdef int failure
        if file.descriptor < 0 or file.flags & ACCESS_MODE != WRITE_ONLY:
            return FOR_PYTHON
        if asked.opcode == SETATTR:
            if asked.size < SETATTR_SIZE:
                return FOR_PYTHON
            failure = held_change(file.descriptor, wanted)
            if failure < 0:
                return FOR_PYTHON
            if failure:
                asked.error = failure
                return ANSWERED
        if young_stat(file.descriptor, b"", self.mix, out):
            return FOR_PYTHON
        memset(asked.out, 0, 16)
        (<uint64_t *>asked.out)[0] = self.valid
        asked.length = 16 + sizeof(fuse_attr)
        return ANSWERED

    cdef int release(self, Asked *asked, young *file) noexcept nogil:
        if (
            asked.size < RELEASE_SIZE or file.descriptor < 0
            or (<const uint64_t *>asked.body)[0] != (HANDLE_BIT | file.node - FIRST_NODE)
        ):
            return FOR_PYTHON
        if file.handle_note:
            # First: at any moment the record says which id is to be given back, or this does.
            if file.backing:
                (<uint64_t *>self.notes.base)[CLOSING_WORD] = file.backing
            self.step()
            self.notes.end_record(file.handle_note)
            file.handle_note = 0
        self.step()
        if file.backing:
            young_unregister(self.fuse, file.backing)
            file.backing = 0
        self.step()
        close(file.descriptor)
        file.descriptor = -1
        self.table.open -= 1
        self.step()
        return ANSWERED

    cdef int delete(self, Asked *asked, int directory, young *file) noexcept nogil:
        cdef fuse_attr last
        cdef Slot *slot = NULL
        cdef uint64_t note
        cdef char farewell[FAREWELL_MOST]
        if young_stat(directory, file.name, self.mix, &last):
            return FOR_PYTHON  # somebody has changed upper behind our back
        last.nlink = 0
        if self.notes is not None:
            note = self.notes.put(
                GOING, REGULAR, file.node, file.lookups, file.inode, file.parent, farewell,
                young_farewell(file, &last, farewell), False
            )
            if not note:
                return FOR_PYTHON
            self.notes.end_record(file.name_note)
            file.name_note = note
            self.step()
            slot = <Slot *>(self.notes.base + asked.slot)
            self.notes.open_slot(
                slot, asked.unique, asked.opcode, asked.node, asked.body, asked.size
            )
            slot.nodes[0] = 1  # it is there
            notes_store(&slot.state, IS_BEGUN)
        self.step()
        if unlinkat(directory, file.name, 0):
            if slot != NULL:
                notes_store(&slot.state, IS_FREE)
            return FOR_PYTHON
        self.step()
        if slot != NULL:
            self.notes.turn(file.name_note, GONE)
            self.step()
            self.notes.close_slot(slot, 0, NULL, 0)
        self.lock()
        young_unlink_name(&self.table, file)
        file.gone, file.last = True, last
        young_heard(&self.table, file)
        if file.noted:
            young_wait(&self.table, file)
        self.unlock()
        self.step()
        return ANSWERED

    # --- help ---------------------------------------------------------------------------------

    cdef void count(self, young *file) noexcept nogil:
        """Note the lookups of a file."""
        if file.name_note:
            notes_store(&(<Record *>(self.notes.base + file.name_note)).lookups, file.lookups)

    cdef void step(self) noexcept nogil:
        if self.steps:
            self.steps -= 1
            if not self.steps:
                young_die()

    cdef void lock(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)

    cdef void unlock(self) noexcept nogil:
        pthread_mutex_unlock(&self.mutex)


cdef bint is_plain_name(const Asked *asked, size_t at) noexcept nogil:
    """Whether a request ends with a name that may be made or deleted without a further look."""
    cdef const char *name = asked.body + at
    cdef size_t length
    if asked.size < at + 2 or asked.size > at + NAME_MAX + 1:
        return False
    length = asked.size - at - 1
    if name[length] != 0 or memchr(name, 0, length) != NULL or memchr(name, 47, length) != NULL:
        return False
    return name[0] != 46 or (length > 2 and memcmp(name, b".wh.", 4) != 0)
