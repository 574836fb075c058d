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
"""

from libc.errno cimport ENODATA, errno
from libc.stdint cimport UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset, strerror
from posix.unistd cimport close


cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/fuse.h>
    #include <linux/openat2.h>
    #include <pthread.h>
    #include <stdio.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <sys/xattr.h>
    #include <unistd.h>

    /* A directory below a layer's root, entered without crossing mounts or following links. */
    static int tables_open(int root, const char *path) {
        struct open_how how;
        memset(&how, 0, sizeof how);
        how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW;
        how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV;
        return syscall(SYS_openat2, root, path, &how, sizeof how);
    }

    /* lstat of a name as a struct fuse_attr; 0 or an errno. */
    static int tables_stat(int directory, const char *name, uint64_t *device, struct fuse_attr *out) {
        struct stat st;
        if (fstatat(directory, name, &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT)) return errno;
        *device = st.st_dev;
        memset(out, 0, sizeof *out);
        out->ino = st.st_ino;
        out->size = st.st_size;
        out->blocks = st.st_blocks;
        out->atime = st.st_atim.tv_sec;
        out->mtime = st.st_mtim.tv_sec;
        out->ctime = st.st_ctim.tv_sec;
        out->atimensec = st.st_atim.tv_nsec;
        out->mtimensec = st.st_mtim.tv_nsec;
        out->ctimensec = st.st_ctim.tv_nsec;
        out->mode = st.st_mode;
        out->nlink = st.st_nlink;
        out->uid = st.st_uid;
        out->gid = st.st_gid;
        out->rdev = (minor(st.st_rdev) & 0xff) | (major(st.st_rdev) & 0xfff) << 8
            | (minor(st.st_rdev) & ~0xffu) << 12;
        out->blksize = st.st_blksize;
        return 0;
    }

    static int tables_getxattr(int directory, const char *name, const char *attribute) {
        char path[32 + 256];
        snprintf(path, sizeof path, "/proc/self/fd/%d/%s", directory, name);
        return lgetxattr(path, attribute, 0, 0) < 0 ? errno : 0;
    }

    struct tables_dirent { uint64_t inode, offset; uint16_t size; uint8_t type; char name[1]; };
    static ssize_t tables_read(int directory, void *out, size_t room) {
        return syscall(SYS_getdents64, directory, out, room);
    }

    static int tables_set_once(int *where, int value) {
        int none = -1;
        return __atomic_compare_exchange_n(where, &none, value, 0, __ATOMIC_SEQ_CST,
                                           __ATOMIC_SEQ_CST);
    }
    static uint64_t tables_mix(uint64_t number) { return number * 0x9E3779B97F4A7C15u >> 20; }
    static int tables_load(int *where) { return __atomic_load_n(where, __ATOMIC_SEQ_CST); }
    """
    struct fuse_attr:
        uint64_t ino
        uint32_t mode
        uint32_t nlink
    struct fuse_dirent:
        uint64_t ino
        uint64_t off
        uint32_t namelen
        uint32_t type
    uint64_t XXH3_64bits_withSeed(const void *data, size_t length, uint64_t seed) nogil
    int tables_open(int root, const char *path) nogil
    int tables_stat(int directory, const char *name, uint64_t *device, fuse_attr *out) nogil
    int tables_getxattr(int directory, const char *name, const char *attribute) nogil
    struct tables_dirent:
        uint16_t size
        uint8_t type
        char name[1]
    ssize_t tables_read(int directory, void *out, size_t room) nogil
    int tables_set_once(int *where, int value) nogil
    int tables_load(int *where) nogil
    uint64_t tables_mix(uint64_t number) nogil
    ssize_t readlinkat(int directory, const char *name, char *out, size_t room) nogil

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    ENTRY_SIZE = 128
    ATTR_AT = 40  # in a fuse_entry_out
    RECORD_SIZE = 152
    TYPE = 0x0F  # of Name.kind: DT_*
    TAKEN = 0x80  # the union's
    MADE = 0x40  # the union has a node for it
    DT_DIR = 4
    DT_REG = 8
    DT_LNK = 10
    DOTS = 2  # `.` and `..` have the cookies 1 and 2

cdef uint32_t NOTHING = UINT32_MAX
cdef uint32_t MANY = 1 << 31  # lookups of a node that nobody has counted


def read_names(int directory):
    """What an open directory holds: {name: type bits of the mode}, and what is neither file,
    directory nor link, or on a file system that does not say.

    Raises:
        OSError: it cannot be read.
    """
    cdef char buffer[32768]
    cdef dict kinds = {}
    cdef list others = []
    cdef tables_dirent *entry
    cdef ssize_t got, at
    while True:
        with nogil:
            got = tables_read(directory, buffer, sizeof(buffer))
        if got < 0:
            raise OSError(errno, strerror(errno).decode())
        if got == 0:
            return kinds, others
        at = 0
        while at < got:
            entry = <tables_dirent *>(buffer + at)
            at += entry.size
            name = <bytes>entry.name
            if name == b"." or name == b"..":
                continue
            if entry.type == DT_REG or entry.type == DT_DIR or entry.type == DT_LNK:
                kinds[name] = entry.type << 12
            else:
                others.append(name)


cdef void free_block(Block *block) noexcept nogil:
    free(block.slots)
    free(block.names)
    free(block.text)
    free(block.groups)
    free(block.positions)
    free(block.places)
    free(block.paths)
    free(block.extra)
    free(block)


cdef dict fill_names(Block *block, names, uint32_t lookups):
    """Fill in the names, and where to find them; returns positions in `places` -> group."""
    cdef dict groups = {}
    cdef uint32_t slot, at = 0
    cdef Name *entry
    cdef bytes name
    block.count = len(names)
    block.known = block.count if lookups else 0
    block.mask = 1
    while block.mask < block.count + block.count // 2 + 1:
        block.mask = block.mask * 2 + 1
    block.slots = <uint32_t *>calloc(block.mask + 1, sizeof(uint32_t))
    block.names = entry = <Name *>calloc(block.count + 1, sizeof(Name))
    block.text = <char *>malloc(sum([len(item[0]) for item in names]) + block.count + 1)
    if not (block.slots and block.names and block.text):
        raise MemoryError
    for name, kind, having in names:
        if not 0 < len(name) <= 255:
            raise ValueError("a name of this length")
        memcpy(block.text + at, <const char *>name, len(name) + 1)
        entry.at, entry.length, entry.kind, entry.lookups = at, len(name), kind >> 12, lookups
        entry.group = groups.setdefault(having, len(groups))
        slot = XXH3_64bits_withSeed(block.text + at, len(name), block.directory) & block.mask
        while block.slots[slot]:
            slot = (slot + 1) & block.mask
        entry += 1
        block.slots[slot] = <uint32_t>(entry - block.names)
        at += len(name) + 1
    return groups


cdef int fill_groups(Block *block, dict groups) except -1:
    cdef uint32_t at = 0, index = 0
    block.groups = <Group *>calloc(len(groups) + 1, sizeof(Group))
    block.positions = <uint16_t *>calloc(sum(map(len, groups)) + 1, sizeof(uint16_t))
    if not block.groups or not block.positions:
        raise MemoryError
    for having in groups:
        block.groups[index].first, block.groups[index].count = at, len(having)
        for position in having:
            if not 0 <= position < block.place_count:
                raise ValueError("no such place")
            block.positions[at] = position
            at += 1
        index += 1
    return 0


cdef uint32_t position_of(
    const Block *block, const char *name, size_t length, uint64_t key
) noexcept nogil:
    """The position of a name."""
    cdef uint32_t slot = key & block.mask, position
    while block.slots[slot]:
        position = block.slots[slot] - 1
        if block.names[position].length == length and memcmp(
            block.text + block.names[position].at, name, length
        ) == 0:
            return position
        slot = (slot + 1) & block.mask
    return NOTHING


cdef bint has_extra(const Block *block, uint64_t key) noexcept nogil:
    cdef uint32_t slot
    if not block.extra_count:
        return False
    key = key or 1
    slot = key & block.extra_mask
    while block.extra[slot]:
        if block.extra[slot] == key:
            return True
        slot = (slot + 1) & block.extra_mask
    return False


cdef void put_extra(uint64_t *extra, uint32_t mask, uint64_t key) noexcept nogil:
    cdef uint32_t slot = key & mask
    while extra[slot]:
        slot = (slot + 1) & mask
    extra[slot] = key


cdef bint add_extra(Block *block, uint64_t key) noexcept nogil:
    """Have a name be the union's to tell; False: all are, since there is no memory."""
    cdef uint32_t i, size = block.extra_mask + 1 if block.extra else 0
    cdef uint64_t *bigger
    if has_extra(block, key):
        return True
    if (block.extra_count + 1) * 2 > size:
        bigger = <uint64_t *>calloc(size * 2 or 8, sizeof(uint64_t))
        if not bigger:
            block.closed = True
            return False
        for i in range(size):
            if block.extra[i]:
                put_extra(bigger, (size * 2) - 1, block.extra[i])
        free(block.extra)
        block.extra, block.extra_mask = bigger, (size * 2 or 8) - 1
    put_extra(block.extra, block.extra_mask, key or 1)
    block.extra_count += 1
    return True


cdef void count_lookup(Block *block, uint32_t position) noexcept nogil:
    cdef Name *name = &block.names[position]
    if name.lookups == 0:
        block.known += 1
    if name.lookups < MANY:
        name.lookups += 1


cdef bint is_taken(const Block *block, uint32_t position) noexcept nogil:
    return block.names[position].kind & TAKEN != 0


cdef size_t record_size(const Block *block, uint64_t cookie) noexcept nogil:
    """How long the READDIRPLUS record behind a cookie is; 1 and 2 are `.` and `..`."""
    cdef size_t length = cookie if cookie <= DOTS else block.names[cookie - DOTS - 1].length
    return (RECORD_SIZE + length + 7) & ~<size_t>7


cdef bint count_listed(Block *block, const char *records, ssize_t used) noexcept nogil:
    """Count a lookup for each record with a node; False where one was taken meanwhile."""
    cdef ssize_t at = 0
    cdef uint64_t node
    cdef bint counts
    for counts in range(2):
        at = 0
        while at < used:
            node = (<const uint64_t *>(records + at))[0]
            if node and counts:
                count_lookup(block, <uint32_t>(node - block.first))
            elif node and is_taken(block, <uint32_t>(node - block.first)):
                return False
            at += record_size(block, (<const fuse_dirent *>(records + at + ENTRY_SIZE)).off)
    return True


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
        self.directory_mask = 63
        self.by_directory = <Block **>calloc(self.directory_mask + 1, sizeof(Block *))
        if not self.layers or not self.by_directory:
            raise MemoryError
        for i in range(self.layer_count):
            self.layers[i] = layers[i]

    def __dealloc__(self):
        if self.by_directory:
            for i in range(self.directory_mask + 1):
                if self.by_directory[i]:
                    self.close_places(self.by_directory[i])
                    free_block(self.by_directory[i])
        free(self.by_directory)
        free(self.by_number)
        free(self.gone)
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
        if self.hold(directory):
            return
        block = <Block *>calloc(1, sizeof(Block))
        if not block:
            raise MemoryError
        block.directory, block.first, block.held = directory, first, True
        block.ino, block.parent_ino = inodes
        try:
            self.fill_places(block, places)
            fill_groups(block, fill_names(block, names, MANY if known else 0))
            self.grow()
        except BaseException:
            free_block(block)
            raise
        pthread_mutex_lock(&self.mutex)
        self.insert(block)
        pthread_mutex_unlock(&self.mutex)

    cdef int fill_places(self, Block *block, places) except -1:
        cdef Place *place
        cdef char *text
        block.place_count = len(places)
        block.places = <Place *>calloc(block.place_count + 1, sizeof(Place))
        block.paths = text = <char *>malloc(sum([len(item[1]) + 1 for item in places]) + 1)
        if not block.places or not block.paths:
            raise MemoryError
        place = block.places
        for layer, path, device, bits in places:
            if not 0 <= layer < self.layer_count:
                raise ValueError("no such layer")
            memcpy(text, <const char *>path, len(path) + 1)
            place.path, place.layer, place.descriptor = text, layer, -1
            place.device, place.bits = device, bits
            text += len(path) + 1
            place += 1
        return 0

    def lay_over_index(self, uint64_t directory):
        """Hold a directory of the lookup index of which some names will be the union's to tell."""
        self.add(directory, 0, (0, 0), (), ())
        pthread_mutex_lock(&self.mutex)
        self.find(directory).below = True
        pthread_mutex_unlock(&self.mutex)

    def open(self, uint64_t directory, bint changed):
        """All has been said about a directory: answer from it.

        Arguments:
            changed: it is in upper, and its listing is the union's to tell.
        """
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        if block != NULL:
            block.ready = True
            block.changed |= changed
        pthread_mutex_unlock(&self.mutex)

    def hold(self, uint64_t directory):
        """Keep a directory until `release`; False where it is not here."""
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        if block != NULL:
            block.held = True
        pthread_mutex_unlock(&self.mutex)
        return block != NULL

    def release(self, uint64_t directory):
        """Drop a directory as soon as the kernel knows neither it nor anything in it."""
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        if block != NULL:
            block.held = False
            self.free_if_unused(block)
        pthread_mutex_unlock(&self.mutex)

    def dropped(self):
        """The directories whose names had ids and that are gone since this was last asked."""
        cdef uint64_t i, count
        cdef uint64_t *gone
        pthread_mutex_lock(&self.mutex)
        gone, count = self.gone, self.gone_count
        self.gone, self.gone_count, self.gone_room = NULL, 0, 0
        pthread_mutex_unlock(&self.mutex)
        try:
            return [gone[i] for i in range(count)]
        finally:
            free(gone)

    def ask(self, uint64_t directory, bytes name):
        """A name in a directory, new or not, is the union's to tell from now on."""
        cdef Block *block
        cdef uint64_t key = XXH3_64bits_withSeed(<const char *>name, len(name), directory)
        cdef bint has_room = True
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        if block != NULL:
            block.changed = True
            # Its node is not taken by that: it may live on under another name.
            has_room = add_extra(block, key)
        pthread_mutex_unlock(&self.mutex)
        if not has_room:
            raise MemoryError

    def ask_all(self, uint64_t directory):
        """All names in a directory are the union's to tell from now on."""
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        if block != NULL:
            block.changed = block.closed = True
        pthread_mutex_unlock(&self.mutex)

    def take(self, uint64_t number):
        """A node is the union's from now on; returns how many lookups of it were counted here."""
        cdef uint32_t position, lookups = 0
        pthread_mutex_lock(&self.mutex)
        cdef Block *block = self.block_of(number)
        if block != NULL:
            position = <uint32_t>(number - block.first)
            if not is_taken(block, position):
                block.names[position].kind |= TAKEN
                block.names[position].kind &= ~MADE
                lookups = block.names[position].lookups
                block.names[position].lookups = 1  # the union's: until `give_back`
                if lookups == 0:
                    block.known += 1
        pthread_mutex_unlock(&self.mutex)
        return lookups

    def give_back(self, uint64_t number, bint unchanged):
        """Nobody knows a node any more that was taken; it may be as the layers have it."""
        cdef uint32_t position
        pthread_mutex_lock(&self.mutex)
        cdef Block *block = self.block_of(number)
        if block != NULL:
            position = <uint32_t>(number - block.first)
            if is_taken(block, position) and block.names[position].lookups:
                block.names[position].lookups = 0
                block.known -= 1
                if unchanged:
                    block.names[position].kind &= ~TAKEN
                self.free_if_unused(block)
        pthread_mutex_unlock(&self.mutex)

    def made(self, uint64_t number, bint is_made):
        """The union has a node with this id, or has none any more."""
        pthread_mutex_lock(&self.mutex)
        cdef Block *block = self.block_of(number)
        if block != NULL and is_made:
            block.names[number - block.first].kind |= MADE
        elif block != NULL:
            block.names[number - block.first].kind &= ~MADE
        pthread_mutex_unlock(&self.mutex)

    def count(self, uint64_t number):
        """The union has answered a lookup of a node that is counted here."""
        pthread_mutex_lock(&self.mutex)
        cdef Block *block = self.block_of(number)
        if block != NULL:
            count_lookup(block, <uint32_t>(number - block.first))
        pthread_mutex_unlock(&self.mutex)

    def forgotten(self, uint64_t number, uint64_t count):
        """The kernel has dropped lookups; False where the node is not counted here."""
        return self.forget(number, count, True) == FOUND

    # --- what the union asks ------------------------------------------------------------------

    def get(self, uint64_t directory, bytes name):
        """(type bits, positions, node id) of a name that was added; None for no such name.

        The id is 0 where the name has none, or it has been taken.
        """
        cdef uint64_t key = XXH3_64bits_withSeed(<const char *>name, len(name), directory)
        cdef uint32_t position = NOTHING
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        if block != NULL:  # it stays: the caller holds it
            position = position_of(block, name, len(name), key)
        pthread_mutex_unlock(&self.mutex)
        if block == NULL:
            raise KeyError(directory)
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
        cdef Block *block
        cdef uint32_t i
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        pthread_mutex_unlock(&self.mutex)
        if block == NULL:
            raise KeyError(directory)
        count = min(count, block.count - start) if start < block.count else 0
        return [
            block.text[block.names[start + i].at:block.names[start + i].at
                       + block.names[start + i].length]
            for i in range(count)
        ]

    def places(self, uint64_t directory):
        """(layer, path) of each directory that was merged, topmost first."""
        cdef Block *block
        cdef uint32_t i
        pthread_mutex_lock(&self.mutex)
        block = self.find(directory)
        pthread_mutex_unlock(&self.mutex)
        if block == NULL:
            raise KeyError(directory)
        return [(block.places[i].layer, <bytes>block.places[i].path)
                for i in range(block.place_count)]

    def place_of(self, uint64_t number):
        """(directory's node id, name) of a node; None where no name has this id."""
        cdef Block *block
        cdef Name *name
        cdef char text[256]
        cdef size_t length = 0
        cdef uint64_t directory = 0
        pthread_mutex_lock(&self.mutex)
        block = self.block_of(number)
        if block != NULL:
            name = &block.names[number - block.first]
            directory, length = block.directory, name.length
            memcpy(text, block.text + name.at, length)
        pthread_mutex_unlock(&self.mutex)
        return (directory, text[:length]) if block != NULL else None

    def lookups(self, uint64_t number):
        """How many lookups of a node are counted here."""
        pthread_mutex_lock(&self.mutex)
        found = self.lookups_of(number)
        pthread_mutex_unlock(&self.mutex)
        return found

    def stop(self):
        """Answer nothing from now on."""
        pthread_mutex_lock(&self.mutex)
        self.stopped = True
        pthread_mutex_unlock(&self.mutex)

    def counted(self):
        """The nodes that the kernel knows and that are not taken."""
        cdef uint64_t i, known = 0, count = 0
        cdef uint64_t *found
        cdef uint32_t position
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        for i in range(self.numbered):
            known += self.by_number[i].known
        found = <uint64_t *>malloc((known + 1) * sizeof(uint64_t))
        if found != NULL:
            for i in range(self.numbered):
                block = self.by_number[i]
                for position in range(block.count):
                    if block.names[position].lookups and not is_taken(block, position):
                        found[count] = block.first + position
                        count += 1
        pthread_mutex_unlock(&self.mutex)
        if found == NULL:
            raise MemoryError
        try:
            return [found[i] for i in range(count)]
        finally:
            free(found)

    def size(self):
        """(directories held, directories in layers that are open)."""
        return self.directories, self.open_count

    # --- what the lane asks -------------------------------------------------------------------

    cdef int lookup(
        self, uint64_t parent, const char *name, size_t length, char *out
    ) noexcept nogil:
        """Node id and attributes of a name, in a fuse_entry_out; counts one lookup.

        Arguments:
            out: NULL to find out only whether a name is absent.
        """
        cdef uint64_t key = XXH3_64bits_withSeed(name, length, parent)
        cdef uint32_t position = NOTHING
        cdef int how = ASK
        cdef Block *block
        pthread_mutex_lock(&self.mutex)
        block = self.find(parent)
        if block != NULL and self.answers(block) and not has_extra(block, key):
            position = position_of(block, name, length, key)
            if position == NOTHING:
                how = BELOW if block.below else ABSENT
        if (
            position == NOTHING or out == NULL or not block.first
            or is_taken(block, position)
        ):
            pthread_mutex_unlock(&self.mutex)
            return how
        block.pins += 1
        pthread_mutex_unlock(&self.mutex)
        cdef bint is_right = self.stat_pinned(block, position, out + ATTR_AT)
        pthread_mutex_lock(&self.mutex)
        if (
            is_right and self.answers(block) and not is_taken(block, position)
            and not has_extra(block, key)
        ):
            count_lookup(block, position)
            memset(out, 0, ATTR_AT)
            (<uint64_t *>out)[0] = block.first + position
            how = FOUND
        self.unpin(block)
        pthread_mutex_unlock(&self.mutex)
        return how

    cdef Block *pinned(self, uint64_t number, uint32_t *position) noexcept nogil:
        """The directory of a node that is answered for and not taken, pinned; NULL for none."""
        pthread_mutex_lock(&self.mutex)
        cdef Block *block = self.block_of(number)
        if block != NULL:
            position[0] = <uint32_t>(number - block.first)
            if not block.ready or is_taken(block, position[0]):
                block = NULL
            else:
                block.pins += 1
        pthread_mutex_unlock(&self.mutex)
        return block

    cdef int getattr(self, uint64_t number, char *out) noexcept nogil:
        """The attributes of a node, in a fuse_attr."""
        cdef uint32_t position
        cdef Block *block = self.pinned(number, &position)
        if block == NULL:
            return ASK
        cdef int how = FOUND if self.stat_pinned(block, position, out) else ASK
        pthread_mutex_lock(&self.mutex)
        if is_taken(block, position):
            how = ASK
        self.unpin(block)
        pthread_mutex_unlock(&self.mutex)
        return how

    cdef ssize_t readlink(self, uint64_t number, char *out, size_t room) noexcept nogil:
        """The target of a symbolic link; -1 asks the union."""
        cdef uint32_t position
        cdef ssize_t got = -1
        cdef int directory
        cdef Block *block = self.pinned(number, &position)
        if block == NULL:
            return -1
        directory = self.open_place(
            block, &block.places[block.positions[block.groups[block.names[position].group].first]]
        )
        if directory >= 0:
            got = readlinkat(directory, block.text + block.names[position].at, out, room)
        pthread_mutex_lock(&self.mutex)
        if is_taken(block, position):
            got = -1
        self.unpin(block)
        pthread_mutex_unlock(&self.mutex)
        return got

    cdef int getxattr(self, uint64_t number, const char *name) noexcept nogil:
        """ABSENT where a node does not have an extended attribute of this name."""
        cdef uint32_t position
        cdef int directory, failure = 0
        cdef Block *block = self.pinned(number, &position)
        if block == NULL:
            return ASK
        directory = self.open_place(
            block, &block.places[block.positions[block.groups[block.names[position].group].first]]
        )
        if directory >= 0:
            failure = tables_getxattr(directory, block.text + block.names[position].at, name)
        pthread_mutex_lock(&self.mutex)
        if is_taken(block, position):
            failure = 0
        self.unpin(block)
        pthread_mutex_unlock(&self.mutex)
        return ABSENT if failure == ENODATA else ASK

    cdef int forget(self, uint64_t number, uint64_t count, bint held) noexcept nogil:
        """The kernel has dropped lookups: FOUND, or ASK where the union has to do it.

        Arguments:
            held: do it though the union has made a node of it, which must go as well.
        """
        cdef Block *block
        cdef Block *inside
        cdef Name *name
        cdef int how = ASK
        pthread_mutex_lock(&self.mutex)
        block = self.block_of(number)
        if block != NULL:
            name = &block.names[number - block.first]
            inside = self.find(number)
            if not name.kind & TAKEN and (
                held or block.ready and (name.lookups > count or not name.kind & MADE)
            ):
                how = FOUND
                if name.lookups < MANY and name.lookups:
                    name.lookups -= <uint32_t>min(count, name.lookups)
                    if name.lookups == 0:
                        block.known -= 1
                        if inside != NULL:
                            self.free_if_unused(inside)
                        self.free_if_unused(block)
        pthread_mutex_unlock(&self.mutex)
        return how

    cdef ssize_t readdir(
        self, uint64_t directory, uint64_t cookie, size_t room, uint64_t valid, char *out
    ) noexcept nogil:
        """The records of READDIRPLUS behind a cookie; how many bytes, or -1: ask the union.

        A name that only the union can tell about is listed without its node.
        """
        cdef uint64_t next_cookie = cookie + 1
        cdef ssize_t length, used = 0
        cdef bint is_right = True
        cdef Block *block = self.pinned_listing(directory)
        if block == NULL:
            return -1
        while next_cookie and next_cookie <= block.count + DOTS:
            if used + record_size(block, next_cookie) > room:
                is_right = used > 0
                break
            length = self.write_record(block, next_cookie, valid, out + used)
            if length < 0:
                is_right = False
                break
            used += length
            next_cookie += 1
        pthread_mutex_lock(&self.mutex)
        is_right = is_right and self.answers(block) and not block.changed
        is_right = is_right and count_listed(block, out, used)
        self.unpin(block)
        pthread_mutex_unlock(&self.mutex)
        return used if is_right else -1

    cdef Block *pinned_listing(self, uint64_t directory) noexcept nogil:
        """A directory that is listed as its layers have it, pinned; NULL for none."""
        pthread_mutex_lock(&self.mutex)
        cdef Block *block = self.find(directory)
        if block != NULL and (
            not self.answers(block) or block.changed or block.below or not block.first
        ):
            block = NULL
        if block != NULL:
            block.pins += 1
        pthread_mutex_unlock(&self.mutex)
        return block

    cdef ssize_t write_record(
        self, Block *block, uint64_t cookie, uint64_t valid, char *record
    ) noexcept nogil:
        """The record of one name, or of `.` or `..`; its length, or -1: ask the union."""
        cdef size_t size = record_size(block, cookie)
        cdef fuse_dirent *entry = <fuse_dirent *>(record + ENTRY_SIZE)
        cdef uint32_t position = <uint32_t>(cookie - DOTS - 1)
        cdef bint is_right
        memset(record, 0, size)
        entry.off = cookie
        if cookie <= DOTS:
            entry.ino = block.ino if cookie == 1 else block.parent_ino
            entry.type, entry.namelen = DT_DIR, <uint32_t>cookie
            memcpy(record + RECORD_SIZE, b"..", cookie)
            return size
        is_right = self.stat_pinned(block, position, record + ATTR_AT)
        entry.ino = (<fuse_attr *>(record + ATTR_AT)).ino
        if entry.ino == 0:
            return -1
        entry.type = block.names[position].kind & TYPE
        entry.namelen = block.names[position].length
        memcpy(record + RECORD_SIZE, block.text + block.names[position].at, entry.namelen)
        if is_right and not is_taken(block, position):
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
        cdef const Group *group = &block.groups[name.group]
        cdef Place *place = &block.places[block.positions[group.first]]
        cdef fuse_attr *found = <fuse_attr *>attributes
        cdef int directory = self.open_place(block, place)
        cdef Block *inside
        cdef uint64_t device
        found.ino = 0
        if directory < 0 or tables_stat(directory, block.text + name.at, &device, found):
            return False
        if device != place.device or found.mode >> 12 != name.kind & TYPE:
            found.ino = 0
            return False
        found.ino ^= place.bits
        if name.kind & TYPE != DT_DIR:
            return found.nlink == 1  # hard links share a node: the union knows which
        # Its layers decide whether it is merged: one that hides the others may be opaque.
        pthread_mutex_lock(&self.mutex)
        inside = self.find(block.first + position)
        if inside != NULL and inside.place_count > 1:
            found.nlink = 1
        pthread_mutex_unlock(&self.mutex)
        return inside != NULL or group.count == 1

    cdef int open_place(self, Block *block, Place *place) noexcept nogil:
        """The descriptor of a directory in a layer, opened when it is first wanted; -1: cannot."""
        cdef int descriptor = tables_load(&place.descriptor)
        cdef uint64_t tries
        cdef Block *other
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
        self.open_count += 1
        tries = 0
        while self.open_count > self.open_limit and tries <= self.directory_mask:
            self.hand = (self.hand + 1) & self.directory_mask
            other = self.by_directory[self.hand]
            if other != NULL and not other.pins and other.open_count:
                self.close_places(other)
            tries += 1
        pthread_mutex_unlock(&self.mutex)
        return descriptor

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

    # --- blocks; the mutex is held ------------------------------------------------------------

    cdef void unpin(self, Block *block) noexcept nogil:
        block.pins -= 1
        if not block.pins and block.dead:
            self.close_places(block)
            free_block(block)

    cdef void free_if_unused(self, Block *block) noexcept nogil:
        """Free a directory that neither the union nor the kernel needs."""
        if block.held or block.known or self.lookups_of(block.directory):
            return
        self.take_out(block)
        if block.first:
            self.note_gone(block.directory)
        if block.pins:
            block.dead = True
            return
        self.close_places(block)
        free_block(block)

    cdef void note_gone(self, uint64_t directory) noexcept nogil:
        cdef uint64_t room = self.gone_room * 2 or 64
        cdef uint64_t *bigger
        if self.gone_count == self.gone_room:
            bigger = <uint64_t *>realloc(self.gone, room * sizeof(uint64_t))
            if not bigger:
                return  # the journal keeps a record that nobody needs
            self.gone, self.gone_room = bigger, room
        self.gone[self.gone_count] = directory
        self.gone_count += 1

    cdef uint32_t lookups_of(self, uint64_t number) noexcept nogil:
        cdef Block *block = self.block_of(number)
        return block.names[number - block.first].lookups if block != NULL else 0

    cdef bint answers(self, const Block *block) noexcept nogil:
        return block.ready and not block.closed and not self.stopped

    cdef Block *find(self, uint64_t directory) noexcept nogil:
        cdef uint64_t slot = tables_mix(directory) & self.directory_mask
        while self.by_directory[slot] != NULL:
            if self.by_directory[slot].directory == directory:
                return self.by_directory[slot]
            slot = (slot + 1) & self.directory_mask
        return NULL

    cdef int grow(self) except -1:
        """Make room for one more directory."""
        cdef Block **old = self.by_directory
        cdef Block **bigger
        cdef uint64_t i, size = self.directory_mask + 1
        if self.numbered == self.numbered_room:
            bigger = <Block **>malloc((self.numbered_room + 1) * 2 * sizeof(Block *))
            if not bigger:
                raise MemoryError
            pthread_mutex_lock(&self.mutex)
            if self.numbered:
                memcpy(bigger, self.by_number, self.numbered * sizeof(Block *))
            old, self.by_number = self.by_number, bigger
            self.numbered_room = (self.numbered_room + 1) * 2
            pthread_mutex_unlock(&self.mutex)
            free(old)
        if (self.directories + 1) * 2 <= size:
            return 0
        bigger = <Block **>calloc(size * 2, sizeof(Block *))
        if not bigger:
            raise MemoryError
        pthread_mutex_lock(&self.mutex)
        old, self.by_directory = self.by_directory, bigger
        self.directory_mask = size * 2 - 1
        for i in range(size):
            if old[i] != NULL:
                self.put(old[i])
        pthread_mutex_unlock(&self.mutex)
        free(old)
        return 0

    cdef void put(self, Block *block) noexcept nogil:
        cdef uint64_t slot = tables_mix(block.directory) & self.directory_mask
        while self.by_directory[slot] != NULL:
            slot = (slot + 1) & self.directory_mask
        self.by_directory[slot] = block

    cdef void insert(self, Block *block) noexcept nogil:
        cdef uint64_t at
        self.put(block)
        self.directories += 1
        if block.first and block.count:
            at = self.index_of(block.first)
            memmove(
                &self.by_number[at + 1], &self.by_number[at], (self.numbered - at) * sizeof(Block *)
            )
            self.by_number[at] = block
            self.numbered += 1

    cdef void take_out(self, Block *block) noexcept nogil:
        cdef uint64_t at, slot = tables_mix(block.directory) & self.directory_mask
        cdef Block *moved
        while self.by_directory[slot] != block:
            slot = (slot + 1) & self.directory_mask
        self.by_directory[slot] = NULL
        self.directories -= 1
        slot = (slot + 1) & self.directory_mask
        while self.by_directory[slot] != NULL:  # close the gap
            moved = self.by_directory[slot]
            self.by_directory[slot] = NULL
            self.put(moved)
            slot = (slot + 1) & self.directory_mask
        if block.first and block.count:
            at = self.index_of(block.first) - 1
            self.numbered -= 1
            memmove(
                &self.by_number[at], &self.by_number[at + 1], (self.numbered - at) * sizeof(Block *)
            )

    cdef uint64_t index_of(self, uint64_t number) noexcept nogil:
        """How many directories' names begin at this id or before."""
        cdef uint64_t low = 0, high = self.numbered, middle
        while low < high:
            middle = (low + high) // 2
            if self.by_number[middle].first <= number:
                low = middle + 1
            else:
                high = middle
        return low

    cdef Block *block_of(self, uint64_t number) noexcept nogil:
        """The directory that has a node id."""
        cdef uint64_t at = self.index_of(number)
        cdef Block *block
        if at == 0:
            return NULL
        block = self.by_number[at - 1]
        return block if number - block.first < block.count else NULL
