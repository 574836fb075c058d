"""One merged directory in memory: its names, and which of its layers have them.

Every name has a position, and a node id: that of the first one plus the position. What several
threads may use at once is guarded by who holds the block (see _tables.pyx).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, strlen

from unionfuse.wire._wire cimport ENTRY_SIZE, fuse_dirent, record_length


cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    """
    uint64_t XXH3_64bits_withSeed(const void *data, size_t length, uint64_t seed) nogil
    const uint32_t NOTHING "UINT32_MAX"  # no position
    const uint32_t MANY "INT32_MAX"  # lookups of a node that nobody has counted

cdef enum:
    TYPE = 0x0F  # of Name.kind: DT_*
    TAKEN = 0x80  # the union's
    MADE = 0x40  # the union has a node for it
    CACHED = 0x20  # the kernel's page cache has its data, as far as it needs it
    OPENED = 0x10  # Python has opened it, and may have it open still
    DOTS = 2  # `.` and `..` have the cookies 1 and 2

cdef struct Name:
    uint64_t inode  # on disk; 0: ask
    uint32_t at  # of its text
    uint32_t lookups
    uint32_t group
    uint8_t length
    uint8_t kind  # DT_*, TAKEN, MADE, CACHED and OPENED

cdef struct Group:  # the places that have a name
    uint32_t first, count  # in Block.positions

cdef struct Place:
    const char *path
    uint64_t device, bits  # of the inode numbers
    int descriptor  # -1: not opened yet
    uint16_t layer

cdef struct Block:
    uint64_t directory
    uint64_t first  # the node id of the first name; 0: they have none
    uint64_t ino, parent_ino
    uint32_t count, mask, known, place_count, extra_count, extra_mask
    int pins, open_count
    bint ready, held, changed, closed, below, dead
    uint32_t *slots  # position + 1
    Name *names
    char *text
    Group *groups
    uint16_t *positions
    Place *places
    char *paths
    uint64_t *extra  # hashes of names that are the union's to tell


# --- made, and freed --------------------------------------------------------------------------

cdef inline void free_block(Block *block) noexcept nogil:
    free(block.slots)
    free(block.names)
    free(block.text)
    free(block.groups)
    free(block.positions)
    free(block.places)
    free(block.paths)
    free(block.extra)
    free(block)


cdef inline Block *block_below(
    const Block *above, const Name *name, uint64_t number
) noexcept nogil:
    """An empty block for a name of a block, with its places; NULL: no memory."""
    cdef const Group *group = &above.groups[name.group]
    cdef const Place *place
    cdef uint32_t i
    cdef size_t length, room = 1
    cdef char *text
    cdef Block *block = <Block *>calloc(1, sizeof(Block))
    if block == NULL:
        return NULL
    for i in range(group.count):
        room += strlen(above.places[above.positions[group.first + i]].path) + name.length + 2
    block.places = <Place *>calloc(group.count + 1, sizeof(Place))
    block.paths = text = <char *>malloc(room)
    if block.places == NULL or block.paths == NULL:
        free_block(block)
        return NULL
    block.directory, block.parent_ino, block.place_count = number, above.ino, group.count
    for i in range(group.count):
        place = &above.places[above.positions[group.first + i]]
        block.places[i] = place[0]
        block.places[i].path, block.places[i].descriptor = text, -1
        length = strlen(place.path)
        memcpy(text, place.path, length)
        if length:
            text[length] = 47  # a slash
            length += 1
        memcpy(text + length, above.text + name.at, name.length)
        text[length + name.length] = 0
        text += length + name.length + 1
    return block


cdef inline int fill_places(Block *block, places, int layers) except -1:
    """Fill in the directories that were merged: (layer, path, device, bits) of each."""
    cdef Place *place
    cdef char *text
    block.place_count = len(places)
    block.places = <Place *>calloc(block.place_count + 1, sizeof(Place))
    block.paths = text = <char *>malloc(sum([len(item[1]) + 1 for item in places]) + 1)
    if not block.places or not block.paths:
        raise MemoryError
    place = block.places
    for layer, path, device, bits in places:
        if not 0 <= layer < layers:
            raise ValueError("no such layer")
        memcpy(text, <const char *>path, len(path) + 1)
        place.path, place.layer, place.descriptor = text, layer, -1
        place.device, place.bits = device, bits
        text += len(path) + 1
        place += 1
    return 0


cdef inline dict fill_names(Block *block, names, uint32_t lookups):
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
        slot = name_key(block.directory, block.text + at, len(name)) & block.mask
        while block.slots[slot]:
            slot = (slot + 1) & block.mask
        entry += 1
        block.slots[slot] = <uint32_t>(entry - block.names)
        at += len(name) + 1
    return groups


cdef inline int fill_groups(Block *block, dict groups) except -1:
    cdef uint32_t at = 0, index = 0
    block.groups = <Group *>calloc(len(groups) + 1, sizeof(Group))
    block.positions = <uint16_t *>calloc(sum(map(len, groups)) + 1, sizeof(uint16_t))
    if not block.groups or not block.positions:
        raise MemoryError
    for having in groups:
        if not having:
            raise ValueError("a name that no place has")
        block.groups[index].first, block.groups[index].count = at, len(having)
        for position in having:
            if not 0 <= position < block.place_count:
                raise ValueError("no such place")
            block.positions[at] = position
            at += 1
        index += 1
    return 0


# --- found ------------------------------------------------------------------------------------

cdef inline uint64_t name_key(uint64_t directory, const char *name, size_t length) noexcept nogil:
    return XXH3_64bits_withSeed(name, length, directory)


cdef inline uint32_t position_of(
    const Block *block, const char *name, size_t length, uint64_t key
) noexcept nogil:
    """The position of a name; NOTHING where there is no such name."""
    cdef uint32_t slot = key & block.mask, position
    while block.slots[slot]:
        position = block.slots[slot] - 1
        if block.names[position].length == length and memcmp(
            block.text + block.names[position].at, name, length
        ) == 0:
            return position
        slot = (slot + 1) & block.mask
    return NOTHING


cdef inline bint is_taken(const Block *block, uint32_t position) noexcept nogil:
    return block.names[position].kind & TAKEN != 0


cdef inline Place *topmost_place(const Block *block, uint32_t position) noexcept nogil:
    """The topmost directory that has a name."""
    return &block.places[block.positions[block.groups[block.names[position].group].first]]


# --- names that are the union's to tell -------------------------------------------------------

cdef inline bint has_extra(const Block *block, uint64_t key) noexcept nogil:
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


cdef inline bint add_extra(Block *block, uint64_t key) noexcept nogil:
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
                put_extra(bigger, size * 2 - 1, block.extra[i])
        free(block.extra)
        block.extra, block.extra_mask = bigger, (size * 2 or 8) - 1
    put_extra(block.extra, block.extra_mask, key or 1)
    block.extra_count += 1
    return True


cdef inline void put_extra(uint64_t *extra, uint32_t mask, uint64_t key) noexcept nogil:
    cdef uint32_t slot = key & mask
    while extra[slot]:
        slot = (slot + 1) & mask
    extra[slot] = key


# --- lookups, and listings --------------------------------------------------------------------

cdef inline void count_lookup(Block *block, Name *name) noexcept nogil:
    if name.lookups == 0:
        block.known += 1
    if name.lookups < MANY:
        name.lookups += 1


cdef inline size_t record_size(const Block *block, uint64_t cookie) noexcept nogil:
    """How long the READDIRPLUS record behind a cookie is; 1 and 2 are `.` and `..`."""
    return record_length(cookie if cookie <= DOTS else block.names[cookie - DOTS - 1].length)


cdef inline bint count_listed(Block *block, const char *records, ssize_t used) noexcept nogil:
    """Count a lookup for each record with a node; False where one was taken meanwhile."""
    cdef ssize_t at
    cdef uint64_t node
    cdef bint counts
    for counts in range(2):
        at = 0
        while at < used:
            node = (<const uint64_t *>(records + at))[0]
            if node and counts:
                count_lookup(block, &block.names[node - block.first])
            elif node and is_taken(block, <uint32_t>(node - block.first)):
                return False
            at += record_size(block, (<const fuse_dirent *>(records + at + ENTRY_SIZE)).off)
    return True
