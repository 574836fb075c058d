# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Merged directories, held in memory so that the express lane can answer from them without Python.

The union fills a table when it merges a directory's layers: every name, its type, and which of the
layers have it. The table gives each name a node id. A name that is in it, and about which the union
has not said otherwise, is what the topmost layer has: its attributes are asked of that layer when
they are wanted, and never kept. A name that is not in it does not exist.

`take` a node, or `ask` for a name, and they are the union's to tell from then on. Until it is
taken, a node's lookups are counted here.

One mutex guards everything. Nothing is done under it that may wait, and no Python object is made:
the garbage collector might run, close a file, and let go of the interpreter's lock to a thread that
wants the mutex. A directory whose layers are looked at is pinned, and what was found counts only if
nothing was taken meanwhile.

A directory that is first asked for is merged by who asks, without the union, as long as there is
nothing special to it and there are ids for its names (`give_ids`).
"""

from libc.errno cimport ENODATA
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from unionfuse.tree._block cimport (
    CACHED, DOTS, MADE, MANY, NOTHING, OPENED, TAKEN, TYPE, Block, Name, Place, add_extra,
    block_below, count_listed, count_lookup, fill_groups, fill_names, fill_places, free_block,
    has_extra, is_taken, name_key, position_of, record_size, topmost_place,
)
from unionfuse.tree._merge cimport free_draft, merge_places, names_in_record
from unionfuse.tree._news cimport News, add_piece, has_room
from unionfuse.tree._notes cimport Notes
from unionfuse.tree._shelf cimport block_of, find, insert, open_shelf, take_out
from unionfuse.wire._wire cimport ATTR_AT, ENTRY_SIZE, RECORD_SIZE, fuse_attr, fuse_dirent


cdef extern from "_tables.h" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int tables_open(int root, const char *path)
    int tables_stat(int directory, const char *name, uint64_t *device, fuse_attr *out)
    int tables_adds_to(int directory, const char *name)
    int tables_getxattr(int directory, const char *name, const char *attribute)
    int tables_open_file(int directory, const char *name, uint64_t device)
    int tables_set_once(int *where, int value)
    int tables_load(int *where)
    ssize_t readlinkat(int directory, const char *name, char *out, size_t room)

cdef enum:
    DT_DIR = 4
    DT_REG = 8
    TABLE_RECORD = 6  # in the journal: see survival/journal.py


cdef class Tables:
    """The merged directories of one mount.

    Arguments:
        layers: the descriptor of each layer's root, topmost first; they stay open as long as this.
        descriptors: how many directories in layers are kept open at most, roughly.
    """

    def __cinit__(self, layers, int descriptors=1024):
        pthread_mutex_init(&self.mutex, NULL)
        self.open_limit = descriptors
        self.layer_count = len(layers)
        self.layers = <int *>calloc(max(1, self.layer_count), sizeof(int))
        if not self.layers or not open_shelf(&self.shelf):
            raise MemoryError
        for i in range(self.layer_count):
            self.layers[i] = layers[i]

    def __dealloc__(self):
        if self.shelf.slots:
            for i in range(self.shelf.mask + 1):
                if self.shelf.slots[i]:
                    self.close_places(self.shelf.slots[i])
                    free_block(self.shelf.slots[i])
        free(self.shelf.slots)
        free(self.shelf.sorted)
        free(self.news_list.pieces)
        free(self.layers)
        pthread_mutex_destroy(&self.mutex)

    # --- what the union fills in --------------------------------------------------------------

    def add(self, uint64_t directory, uint64_t first, inodes, places, names, bint known=False):
        """Hold a directory, unless it is here already; it answers nothing before `open`.

        Arguments:
            directory: its node id.
            first: the node id of the first name; the others follow. Greater than every one that
                was given before or, after a crash, between two of them. 0: the names have no ids.
            inodes: the inode numbers of the directory and of its parent.
            places: (layer, path in it, device, bits that inode numbers are mixed with) of each
                directory that was merged, topmost first.
            names: (name, type bits of the mode, positions in `places`), in the order of a listing.
            known: the kernel may know any of the names already.
        """
        cdef Block *block
        cdef bint is_in
        if self.hold(directory):
            return
        block = <Block *>calloc(1, sizeof(Block))
        if not block:
            raise MemoryError
        block.directory, block.first, block.held = directory, first, True
        block.ino, block.parent_ino = inodes
        try:
            fill_places(block, places, self.layer_count)
            fill_groups(block, fill_names(block, names, MANY if known else 0))
            pthread_mutex_lock(&self.mutex)
            is_in = insert(&self.shelf, block)
            self.unlock()
            if not is_in:
                raise MemoryError
        except BaseException:
            free_block(block)
            raise

    def merge(self, uint64_t number, ids):
        """Hold a directory that is a name in another one, as its layers have it; the union's lock
        is held by the caller.

        False where there is something special to it, or it is not for a table to tell.

        Arguments:
            ids: called with (directory, [(name, type bits of the mode)]); returns the id of the
                first name, 0 where it has to be left to the union.
        """
        cdef Block *block
        cdef bint is_in = False
        cdef uint64_t first = 0
        with self:
            block = self.draft(number)
            if block == NULL:
                return False
            try:
                with nogil:
                    is_in = merge_places(block, self.layers)
                if is_in and block.count:
                    first = ids(number, [
                        (block.text[block.names[i].at:block.names[i].at + block.names[i].length],
                         block.names[i].kind << 12)
                        for i in range(block.count)
                    ])
                    is_in = first != 0
                if is_in:
                    block.first, block.ready = first, True
                    pthread_mutex_lock(&self.mutex)
                    is_in = insert(&self.shelf, block)
                    if is_in:
                        self.note_open(block.open_count)
                    self.unlock()
            finally:
                if not is_in:
                    free_draft(block)
        return is_in

    # --- what is merged without the union -----------------------------------------------------

    def note_in(self, Notes notes):
        """Write to a journal which ids names have; `news` says where. Called before anything."""
        self.notes = notes

    def wants_ids(self):
        """Whether there are too few ids to merge what was asked for last."""
        return self.is_short or self.next_id == self.last_id

    def give_ids(self, uint64_t first, uint64_t count):
        """Use these node ids, which nobody else has, for names of directories merged from now on."""
        pthread_mutex_lock(&self.mutex)
        self.next_id, self.last_id, self.is_short = first, first + count, False
        self.unlock()

    def __enter__(self):
        """No directory is merged here until `__exit__`, unless the union does."""
        pthread_mutex_lock(&self.mutex)
        self.pauses += 1
        self.unlock()
        return self

    def __exit__(self, *_):
        pthread_mutex_lock(&self.mutex)
        self.pauses -= 1
        self.unlock()

    def news(self):
        """(directory, offset of its record in the journal) since this was last asked.

        The offset is 0 where its names had ids and it is gone.
        """
        cdef News found
        pthread_mutex_lock(&self.mutex)
        found = self.news_list
        memset(&self.news_list, 0, sizeof(News))
        self.unlock()
        try:
            return [(found.pieces[i].directory, found.pieces[i].note) for i in range(found.count)]
        finally:
            free(found.pieces)

    cdef bint merge_here(self, uint64_t number) noexcept nogil:
        """Hold a directory that is a name in another one, as its layers have it.

        False: it is not here now, and the union has to be asked.
        """
        cdef Block *block
        cdef char *payload = NULL
        cdef size_t length = 0
        cdef bint is_in
        if self.next_id == self.last_id:
            return False
        block = self.draft(number)
        if block == NULL:
            return False
        is_in = merge_places(block, self.layers)
        if is_in and self.notes is not None:
            payload = names_in_record(block, &length)
            is_in = payload != NULL
        if is_in:
            pthread_mutex_lock(&self.mutex)
            is_in = self.put_merged(block, payload, length)
            self.unlock()
        free(payload)
        if not is_in:
            free_draft(block)
        return is_in

    cdef bint put_merged(self, Block *block, const char *payload, size_t length) noexcept nogil:
        """Hold a directory that has just been merged, unless something has come in between."""
        cdef uint64_t note = 0
        cdef Block *above
        if self.pauses or not self.may_merge(block.directory, &above):
            return False
        if block.count > self.last_id - self.next_id:
            self.is_short = True
            return False
        if self.notes is not None and block.count:
            if has_room(&self.news_list):
                note = self.notes.put(
                    TABLE_RECORD, 0, self.next_id, block.count, length, block.directory, payload,
                    length, True,
                )
            if not note:
                self.is_short = True  # the union makes room
                return False
            add_piece(&self.news_list, block.directory, note)
        block.first, block.ready = self.next_id if block.count else 0, True
        if not insert(&self.shelf, block):
            if note:
                add_piece(&self.news_list, block.directory, 0)
            return False
        self.next_id += block.count
        self.note_open(block.open_count)
        return True

    cdef bint may_merge(self, uint64_t number, Block **above) noexcept nogil:
        """Whether a directory is not here, and is as its layers have it. The mutex is held."""
        cdef const Name *name
        above[0] = block_of(&self.shelf, number)
        if above[0] == NULL or not self.answers(above[0]) or find(&self.shelf, number) != NULL:
            return False
        name = &above[0].names[number - above[0].first]
        return name.kind & (TYPE | TAKEN) == DT_DIR

    cdef Block *draft(self, uint64_t number) noexcept nogil:
        """An empty block for a name that is a directory, with its places; NULL: ask the union."""
        cdef Block *above
        cdef Block *block = NULL
        pthread_mutex_lock(&self.mutex)
        if self.may_merge(number, &above):
            block = block_below(above, &above.names[number - above.first], number)
        self.unlock()
        return block

    def lay_over_index(self, uint64_t directory):
        """Hold a directory of the lookup index of which some names will be the union's to tell."""
        self.add(directory, 0, (0, 0), (), ())
        self.locked(directory).below = True
        self.unlock()

    def open(self, uint64_t directory, bint changed):
        """All has been said about a directory: answer from it.

        Arguments:
            changed: it is in upper, and its listing is the union's to tell.
        """
        cdef Block *block = self.locked(directory)
        if block != NULL:
            block.ready = True
            block.changed |= changed
        self.unlock()

    def hold(self, uint64_t directory):
        """Keep a directory until `release`; False where it is not here."""
        cdef Block *block = self.locked(directory)
        if block != NULL:
            block.held = True
        self.unlock()
        return block != NULL

    def release(self, uint64_t directory):
        """Drop a directory as soon as the kernel knows neither it nor anything in it."""
        cdef Block *block = self.locked(directory)
        if block != NULL:
            block.held = False
            self.free_if_unused(block)
        self.unlock()

    def ask(self, uint64_t directory, bytes name):
        """A name in a directory, new or not, is the union's to tell from now on."""
        cdef uint64_t key = name_key(directory, name, len(name))
        cdef bint has_room = True
        cdef Block *block = self.locked(directory)
        if block != NULL:
            block.changed = True
            # Its node is not taken by that: it may live on under another name.
            has_room = add_extra(block, key)
        self.unlock()
        if not has_room:
            raise MemoryError

    def ask_all(self, uint64_t directory):
        """All names in a directory are the union's to tell from now on."""
        cdef Block *block = self.locked(directory)
        if block != NULL:
            block.changed = block.closed = True
        self.unlock()

    def take(self, uint64_t number):
        """A node is the union's from now on; returns how many lookups of it were counted here."""
        cdef uint32_t lookups = 0
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name != NULL and not name.kind & TAKEN:
            name.kind = name.kind & ~MADE | TAKEN
            lookups = name.lookups
            name.lookups = 1  # the union's: until `give_back`
            if lookups == 0:
                block.known += 1
        self.unlock()
        return lookups

    def give_back(self, uint64_t number, bint unchanged):
        """Nobody knows a node any more that was taken; it may be as the layers have it."""
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name != NULL and name.kind & TAKEN and name.lookups:
            name.lookups = 0
            block.known -= 1
            name.kind &= ~(CACHED | OPENED)
            if unchanged:
                name.kind &= ~TAKEN
            self.free_if_unused(block)
        self.unlock()

    def made(self, uint64_t number, bint is_made):
        """The union has a node with this id, or has none any more."""
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name != NULL:
            name.kind = name.kind | MADE if is_made else name.kind & ~MADE
        self.unlock()

    def count(self, uint64_t number):
        """The union has answered a lookup of a node that is counted here."""
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name != NULL:
            count_lookup(block, name)
        self.unlock()

    def forgotten(self, uint64_t number, uint64_t count):
        """The kernel has dropped lookups; False where the node is not counted here."""
        return self.forget(number, count, True) == FOUND

    # --- what the union asks ------------------------------------------------------------------

    cdef Block *held(self, uint64_t directory) except NULL:
        """A directory that the caller holds: it stays, and its names do."""
        cdef Block *block = self.locked(directory)
        self.unlock()
        if block == NULL:
            raise KeyError(directory)
        return block

    def get(self, uint64_t directory, bytes name):
        """(type bits, positions, node id) of a name that was added; None for no such name.

        The id is 0 where the name has none, or it has been taken.
        """
        cdef Block *block = self.held(directory)
        cdef uint64_t key = name_key(directory, name, len(name))
        cdef uint32_t position = position_of(block, name, len(name), key)
        if position == NOTHING:
            return None
        group = &block.groups[block.names[position].group]
        kind = (block.names[position].kind & TYPE) << 12
        having = tuple([block.positions[group.first + i] for i in range(group.count)])
        if not block.first or is_taken(block, position):
            return kind, having, 0
        return kind, having, block.first + position

    def names(self, uint64_t directory, uint32_t start, uint32_t count):
        """Up to `count` names of a directory from a position on."""
        cdef Block *block = self.held(directory)
        cdef uint32_t i
        count = min(count, block.count - start) if start < block.count else 0
        return [
            block.text[block.names[start + i].at:block.names[start + i].at
                       + block.names[start + i].length]
            for i in range(count)
        ]

    def places(self, uint64_t directory):
        """(layer, path) of each directory that was merged, topmost first."""
        cdef Block *block = self.held(directory)
        cdef uint32_t i
        return [(block.places[i].layer, <bytes>block.places[i].path)
                for i in range(block.place_count)]

    def place_of(self, uint64_t number):
        """(directory's node id, name) of a node; None where no name has this id."""
        cdef char text[256]
        cdef size_t length = 0
        cdef uint64_t directory = 0
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name != NULL:
            directory, length = block.directory, name.length
            memcpy(text, block.text + name.at, length)
        self.unlock()
        return (directory, text[:length]) if length else None

    def lookups(self, uint64_t number):
        """How many lookups of a node are counted here."""
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        cdef uint32_t found = name.lookups if name != NULL else 0
        self.unlock()
        return found

    def stop(self):
        """Answer nothing from now on."""
        pthread_mutex_lock(&self.mutex)
        self.stopped = True
        self.unlock()

    def counted(self):
        """The nodes that the kernel knows and that are not taken."""
        cdef uint64_t i, known = 0, count = 0
        cdef uint64_t *found
        cdef uint32_t position
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        for i in range(self.shelf.sorted_count):
            known += self.shelf.sorted[i].known
        found = <uint64_t *>malloc((known + 1) * sizeof(uint64_t))
        if found != NULL:
            for i in range(self.shelf.sorted_count):
                block = self.shelf.sorted[i]
                for position in range(block.count):
                    if block.names[position].lookups and not is_taken(block, position):
                        found[count] = block.first + position
                        count += 1
        self.unlock()
        if found == NULL:
            raise MemoryError
        try:
            return [found[i] for i in range(count)]
        finally:
            free(found)

    def size(self):
        """(directories held, directories in layers that are open)."""
        return self.shelf.count, self.open_count

    # --- what the lane asks -------------------------------------------------------------------

    cdef int lookup(
        self, uint64_t parent, const char *name, size_t length, char *out
    ) noexcept nogil:
        """Node id and attributes of a name, in a fuse_entry_out; counts one lookup.

        Arguments:
            out: NULL to find out only whether a name is absent.
        """
        cdef uint64_t key = name_key(parent, name, length)
        cdef uint32_t position = NOTHING
        cdef int how = ASK
        cdef bint is_right
        cdef Block *block = self.locked(parent)
        if block != NULL and self.answers(block) and not has_extra(block, key):
            position = position_of(block, name, length, key)
            if position == NOTHING:
                how = BELOW if block.below else ABSENT
        if (
            position == NOTHING or out == NULL or not block.first
            or is_taken(block, position)
        ):
            self.unlock()
            return how
        block.pins += 1
        self.unlock()
        is_right = self.stat_pinned(block, position, out + ATTR_AT)
        pthread_mutex_lock(&self.mutex)
        if (
            is_right and self.answers(block) and not is_taken(block, position)
            and not has_extra(block, key)
        ):
            count_lookup(block, &block.names[position])
            memset(out, 0, ATTR_AT)
            (<uint64_t *>out)[0] = block.first + position
            how = FOUND
        self.unpin(block)
        self.unlock()
        return how

    cdef int getattr(self, uint64_t number, char *out) noexcept nogil:
        """The attributes of a node, in a fuse_attr."""
        cdef uint32_t position
        cdef bint is_right
        cdef Block *block = self.pinned(number, &position)
        if block == NULL:
            return ASK
        is_right = self.stat_pinned(block, position, out)
        return FOUND if self.is_still_so(block, position) and is_right else ASK

    cdef ssize_t readlink(self, uint64_t number, char *out, size_t room) noexcept nogil:
        """The target of a symbolic link; -1 asks the union."""
        cdef uint32_t position
        cdef ssize_t got = -1
        cdef int directory
        cdef Block *block = self.pinned(number, &position)
        if block == NULL:
            return -1
        directory = self.open_place(block, topmost_place(block, position))
        if directory >= 0:
            got = readlinkat(directory, block.text + block.names[position].at, out, room)
        return got if self.is_still_so(block, position) else -1

    cdef int getxattr(self, uint64_t number, const char *name) noexcept nogil:
        """ABSENT where a node does not have an extended attribute of this name."""
        cdef uint32_t position
        cdef int directory, failure = 0
        cdef Block *block = self.pinned(number, &position)
        if block == NULL:
            return ASK
        directory = self.open_place(block, topmost_place(block, position))
        if directory >= 0:
            failure = tables_getxattr(directory, block.text + block.names[position].at, name)
        return ABSENT if self.is_still_so(block, position) and failure == ENODATA else ASK

    cdef bint is_openable(self, uint64_t number, bint *cached) noexcept nogil:
        """Whether a node is a regular file, as the layers have it, and nothing that the union has
        to open; and if its data is cached."""
        cdef Block *block
        cdef bint is_right
        cdef Name *name = self.locked_name(number, &block)
        is_right = name != NULL and block.ready and name.kind & (TYPE | TAKEN | OPENED) == DT_REG
        cached[0] = is_right and name.kind & CACHED != 0
        self.unlock()
        return is_right

    cdef void note_cached(self, uint64_t number) noexcept nogil:
        """The kernel's page cache has a node's data, or will have it: until it is forgotten."""
        self.note(number, CACHED)

    cdef void note_opened(self, uint64_t number) noexcept nogil:
        """The union had to open a node, and has to each time: until it is forgotten.

        It may be one that is passed through, and must not be open in another way as well.
        """
        self.note(number, OPENED)

    cdef int open_file(self, uint64_t number) noexcept nogil:
        """A node's file, opened for reading; -1: only the union can, or there is an error."""
        cdef uint32_t position
        cdef int directory, descriptor = -1
        cdef Place *place
        cdef Block *block = self.pinned(number, &position)
        if block == NULL:
            return -1
        place = topmost_place(block, position)
        directory = self.open_place(block, place)
        if directory >= 0 and block.names[position].kind & TYPE == DT_REG:
            descriptor = tables_open_file(
                directory, block.text + block.names[position].at, place.device
            )
        if not self.is_still_so(block, position) and descriptor >= 0:
            close(descriptor)
            return -1
        return descriptor

    cdef Block *pinned(self, uint64_t number, uint32_t *position) noexcept nogil:
        """The directory of a node that is answered for and not taken, pinned until `is_still_so`;
        NULL for none."""
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name == NULL or not block.ready or name.kind & TAKEN:
            block = NULL
        else:
            position[0] = <uint32_t>(number - block.first)
            block.pins += 1
        self.unlock()
        return block

    cdef bint is_still_so(self, Block *block, uint32_t position) noexcept nogil:
        """Whether a node of a pinned directory was not taken meanwhile; ends the pin."""
        cdef bint is_right
        pthread_mutex_lock(&self.mutex)
        is_right = not is_taken(block, position)
        self.unpin(block)
        self.unlock()
        return is_right

    cdef int forget(self, uint64_t number, uint64_t count, bint held) noexcept nogil:
        """The kernel has dropped lookups: FOUND, or ASK where the union has to do it.

        Arguments:
            held: do it though the union has made a node of it, which must go as well.
        """
        cdef int how = ASK
        cdef Block *inside
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name != NULL and not name.kind & TAKEN and (
            held or block.ready and (name.lookups > count or not name.kind & MADE)
        ):
            how = FOUND
            if 0 < name.lookups < MANY:
                name.lookups -= <uint32_t>min(count, name.lookups)
                if name.lookups == 0:
                    name.kind &= ~(CACHED | OPENED)
                    block.known -= 1
                    inside = find(&self.shelf, number)
                    if inside != NULL:
                        self.free_if_unused(inside)
                    self.free_if_unused(block)
        self.unlock()
        return how

    cdef ssize_t readdir(
        self, uint64_t directory, uint64_t cookie, size_t room, uint64_t valid, bint *sparse,
        char *out
    ) noexcept nogil:
        """The records of READDIRPLUS behind a cookie; how many bytes, or -1: ask the union.

        A name that only the union can tell about is listed without its node.

        Arguments:
            sparse: whether all but directories are, if the directory is small; set to whether
                they were.
        """
        cdef uint64_t next_cookie = cookie + 1
        cdef ssize_t length, used = 0
        cdef bint is_right = True
        cdef Block *block = self.pinned_listing(directory)
        if block == NULL:
            return -1
        sparse[0] = sparse[0] and block.count <= SPARSE_NAMES
        while next_cookie and next_cookie <= block.count + DOTS:
            if used + record_size(block, next_cookie) > room:
                is_right = used > 0
                break
            length = self.write_record(block, next_cookie, valid, sparse[0], out + used)
            if length < 0:
                is_right = False
                break
            used += length
            next_cookie += 1
        pthread_mutex_lock(&self.mutex)
        is_right = is_right and self.answers(block) and not block.changed
        is_right = is_right and count_listed(block, out, used)
        self.unpin(block)
        self.unlock()
        return used if is_right else -1

    cdef Block *pinned_listing(self, uint64_t directory) noexcept nogil:
        """A directory that is listed as its layers have it, pinned; NULL for none."""
        cdef Block *block = self.locked(directory)
        if block != NULL and (
            not self.answers(block) or block.changed or block.below
            or (block.count and not block.first)
        ):
            block = NULL
        if block != NULL:
            block.pins += 1
        self.unlock()
        return block

    cdef ssize_t write_record(
        self, Block *block, uint64_t cookie, uint64_t valid, bint sparse, char *record
    ) noexcept nogil:
        """The record of one name, or of `.` or `..`; its length, or -1: ask the union."""
        cdef size_t size = record_size(block, cookie)
        cdef fuse_dirent *entry = <fuse_dirent *>(record + ENTRY_SIZE)
        cdef uint32_t position = <uint32_t>(cookie - DOTS - 1)
        cdef const Name *name
        cdef bint is_right
        memset(record, 0, size)
        entry.off = cookie
        if cookie <= DOTS:
            entry.ino = block.ino if cookie == 1 else block.parent_ino
            entry.type, entry.namelen = DT_DIR, <uint32_t>cookie
            memcpy(record + RECORD_SIZE, b"..", cookie)
            return size
        name = &block.names[position]
        entry.type, entry.namelen = name.kind & TYPE, name.length
        memcpy(record + RECORD_SIZE, block.text + name.at, name.length)
        if sparse and name.inode and entry.type != DT_DIR:
            entry.ino = name.inode ^ topmost_place(block, position).bits
            return size
        is_right = self.stat_pinned(block, position, record + ATTR_AT)
        entry.ino = (<fuse_attr *>(record + ATTR_AT)).ino
        if entry.ino == 0:
            return -1
        if is_right and not is_taken(block, position) and not (sparse and entry.type != DT_DIR):
            (<uint64_t *>record)[0] = block.first + position
            (<uint64_t *>record)[2] = valid
            (<uint64_t *>record)[3] = valid
        else:
            memset(record, 0, ENTRY_SIZE)
        return size

    # --- layers -------------------------------------------------------------------------------

    cdef bint stat_pinned(self, Block *block, uint32_t position, char *attributes) noexcept nogil:
        """Look a name up in its layer. False: it is not all that there is to say.

        The inode number is 0 where the layer does not say.
        """
        cdef const Name *name = &block.names[position]
        cdef Place *place = topmost_place(block, position)
        cdef fuse_attr *found = <fuse_attr *>attributes
        cdef int directory = self.open_place(block, place)
        cdef Block *inside
        cdef uint64_t device
        cdef bint merges, is_right = True
        found.ino = 0
        if directory < 0 or tables_stat(directory, block.text + name.at, &device, found):
            return False
        if device != place.device or found.mode >> 12 != name.kind & TYPE:
            found.ino = 0
            return False
        found.ino ^= place.bits
        if name.kind & TYPE != DT_DIR:
            return found.nlink == 1  # hard links share a node: the union knows which
        if block.groups[name.group].count == 1:
            return True
        # Its layers decide whether it is merged, which shows one link: the topmost may hide others.
        inside = self.locked(block.first + position)
        merges = inside != NULL and inside.place_count > 1
        self.unlock()
        if inside == NULL:
            merges = is_right = tables_adds_to(directory, block.text + name.at) != 0
        if merges:
            found.nlink = 1
        return is_right

    cdef int open_place(self, Block *block, Place *place) noexcept nogil:
        """The descriptor of a directory in a layer, opened when it is first wanted; -1: cannot."""
        cdef int descriptor = tables_load(&place.descriptor)
        if descriptor >= 0:
            return descriptor
        if place.path[0] == 0:
            return self.layers[place.layer]
        descriptor = tables_open(self.layers[place.layer], place.path)
        if descriptor < 0:
            return -1
        if not tables_set_once(&place.descriptor, descriptor):
            close(descriptor)  # another thread was quicker
            return tables_load(&place.descriptor)
        pthread_mutex_lock(&self.mutex)
        block.open_count += 1
        self.note_open(1)
        self.unlock()
        return descriptor

    cdef void note_open(self, int count) noexcept nogil:
        """So many directories of layers were opened: close others, those in use excepted."""
        cdef uint64_t tries = 0
        cdef Block *other
        self.open_count += count
        while self.open_count > self.open_limit and tries <= self.shelf.mask:
            self.hand = (self.hand + 1) & self.shelf.mask
            other = self.shelf.slots[self.hand]
            if other != NULL and not other.pins and other.open_count:
                self.close_places(other)
            tries += 1

    cdef void close_places(self, Block *block) noexcept nogil:
        cdef uint32_t i
        if not block.open_count:
            return
        for i in range(block.place_count):
            if block.places[i].descriptor >= 0:
                close(block.places[i].descriptor)
                block.places[i].descriptor = -1
        self.open_count -= block.open_count
        block.open_count = 0

    # --- the mutex, and what is done while it is held -----------------------------------------

    cdef Block *locked(self, uint64_t directory) noexcept nogil:
        """Lock, and find a directory; NULL where it is not here. `unlock` has to follow."""
        pthread_mutex_lock(&self.mutex)
        return find(&self.shelf, directory)

    cdef Name *locked_name(self, uint64_t number, Block **block) noexcept nogil:
        """Lock, and find a name and its directory by the node id; NULL for none, as `locked`."""
        pthread_mutex_lock(&self.mutex)
        block[0] = block_of(&self.shelf, number)
        return &block[0].names[number - block[0].first] if block[0] != NULL else NULL

    cdef void note(self, uint64_t number, uint8_t what) noexcept nogil:
        """Set a bit of a name's kind."""
        cdef Block *block
        cdef Name *name = self.locked_name(number, &block)
        if name != NULL:
            name.kind |= what
        self.unlock()

    cdef void unlock(self) noexcept nogil:
        pthread_mutex_unlock(&self.mutex)

    cdef bint answers(self, const Block *block) noexcept nogil:
        return block.ready and not block.closed and not self.stopped

    cdef void unpin(self, Block *block) noexcept nogil:
        block.pins -= 1
        if not block.pins and block.dead:
            self.close_places(block)
            free_block(block)

    cdef void free_if_unused(self, Block *block) noexcept nogil:
        """Free a directory that neither the union nor the kernel needs."""
        cdef Block *above
        if block.held or block.known:
            return
        above = block_of(&self.shelf, block.directory)
        if above != NULL and above.names[block.directory - above.first].lookups:
            return
        take_out(&self.shelf, block)
        if block.first and self.notes is not None:
            add_piece(&self.news_list, block.directory, 0)
        if block.pins:
            block.dead = True
            return
        self.close_places(block)
        free_block(block)
