"""A mapped lookup index, as the loop reads it: names, records, targets of links, paths in layers.

Its form is described in unionfuse/index/lookup.py. Nothing in it is trusted: every length and offset is
checked before it is followed. Only node ids have to be, by who asks (`has_node`).
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from unionfuse.wire._wire cimport ENTRY_SIZE, RECORD_SIZE, fuse_dirent, record_length


cdef extern from "_index.h":
    struct index_node:
        uint32_t record
        uint32_t parent
        uint16_t layer
        uint16_t flags
        uint32_t length
        uint64_t offset
        uint64_t places
    struct index_slot:
        uint32_t tag
        uint32_t record
    uint64_t XXH3_64bits_withSeed(const void *data, size_t length, uint64_t seed) nogil

# Flags of a node.
cdef enum:
    HAS_XATTRS = 1
    HAS_LINKS = 2
    METACOPY = 4
    DIRECTORY = 8
    SYMLINK = 16

cdef enum:
    PATH_MAX = 4096
    INHERITED = 0xFFFF  # of a place: it has the directory's own name

cdef struct Index:
    const index_slot *slots
    const index_node *nodes
    const char *records
    const char *targets
    const char *places
    uint64_t mask, count, records_length, targets_length, places_length
    int layers


cdef inline int map_index(Index *index, const char *base, found) except -1:
    """Fill in where everything is in a LookupIndex that lies at `base`."""
    sections = found.sections
    index.slots = <const index_slot *>(base + <size_t>sections["slots"].offset)
    index.mask = sections["slots"].length // sizeof(index_slot) - 1
    index.nodes = <const index_node *>(base + <size_t>sections["nodes"].offset)
    index.records = base + <size_t>sections["records"].offset
    index.records_length = sections["records"].length
    index.targets = base + <size_t>sections["targets"].offset
    index.targets_length = sections["targets"].length
    index.places = base + <size_t>sections["places"].offset
    index.places_length = sections["places"].length
    index.layers = len(found.layers)
    index.count = found.count
    return 0


cdef inline bint has_node(const Index *index, uint64_t node) noexcept nogil:
    return 0 < node <= index.count


# --- records ----------------------------------------------------------------------------------

cdef inline const char *record_before(
    const Index *index, uint64_t offset, uint64_t end
) noexcept nogil:
    """The record at an offset if it lies wholly before `end`; NULL where it does not."""
    cdef const fuse_dirent *entry
    if end > index.records_length or offset > end or end - offset < RECORD_SIZE:
        return NULL
    entry = <const fuse_dirent *>(index.records + offset + ENTRY_SIZE)
    if entry.namelen > end - offset - RECORD_SIZE:
        return NULL
    return index.records + offset


cdef inline const char *record_of(const Index *index, uint64_t node) noexcept nogil:
    """The record of a node, under one of its names; NULL where there is none."""
    return record_before(index, <uint64_t>index.nodes[node].record * 8, index.records_length)


cdef inline bint find_record(
    const Index *index, uint64_t parent, const char *name, size_t length, const char **found
) noexcept nogil:
    """The record of a name in a directory, NULL for no such name; False: the index is broken."""
    cdef const index_node *node = &index.nodes[parent]
    cdef uint64_t key = XXH3_64bits_withSeed(name, length, parent)
    cdef uint64_t slot = key & index.mask, tries, offset, end = node.offset + node.length
    cdef const char *record
    found[0] = NULL
    for tries in range(index.mask + 1):
        if index.slots[slot].record == 0:
            return True
        offset = <uint64_t>index.slots[slot].record * 8
        if index.slots[slot].tag == key >> 32 and node.offset <= offset < end:
            record = record_before(index, offset, end)
            if record == NULL:
                return False
            if (
                (<const fuse_dirent *>(record + ENTRY_SIZE)).namelen == length
                and memcmp(record + RECORD_SIZE, name, length) == 0
            ):
                found[0] = record
                return has_node(index, (<const uint64_t *>record)[0])
        slot = (slot + 1) & index.mask
    return False


cdef inline bint seek(
    const Index *index, uint64_t directory, uint64_t cookie, uint64_t *offset
) noexcept nogil:
    """The offset of the record behind a cookie in a listing; False: the index is broken."""
    cdef uint64_t at = index.nodes[directory].offset
    cdef uint64_t end = at + index.nodes[directory].length
    cdef const char *record
    cdef const fuse_dirent *entry
    while cookie and at < end:
        record = record_before(index, at, end)
        if record == NULL:
            return False
        entry = <const fuse_dirent *>(record + ENTRY_SIZE)
        if entry.off > cookie:
            break
        at += record_length(entry.namelen)
    offset[0] = at
    return True


cdef inline const char *target_of(
    const Index *index, uint64_t link, size_t *length
) noexcept nogil:
    """The target of a symbolic link; NULL: the index is broken."""
    cdef const index_node *node = &index.nodes[link]
    if node.offset > index.targets_length or index.targets_length - node.offset < node.length:
        return NULL
    length[0] = node.length
    return index.targets + node.offset


# --- where files lie --------------------------------------------------------------------------

cdef inline const char *path_in_layer(
    const Index *index, uint64_t node, char *room
) noexcept nogil:
    """Where a node lies in its layer, put together at the end of PATH_MAX bytes; or NULL."""
    cdef uint16_t layer = index.nodes[node].layer
    cdef uint64_t at = PATH_MAX - 1
    cdef const char *record
    cdef const char *place
    cdef size_t length
    room[at] = 0
    while True:
        record = record_of(index, node)
        node = index.nodes[node].parent
        if record == NULL or not has_node(index, node):
            return NULL
        length = (<const fuse_dirent *>(record + ENTRY_SIZE)).namelen
        if not prepend(room, &at, record + RECORD_SIZE, length):
            return NULL
        place = place_of(index, node, layer, &length)
        if place == NULL:
            return NULL
        if length != INHERITED:
            if length and not prepend(room, &at, place, length):
                return NULL
            return room + at


cdef inline bint prepend(
    char *room, uint64_t *at, const char *name, size_t length
) noexcept nogil:
    """Put a name in front of a path that begins at `at`."""
    if length == 0 or at[0] < length + 1:
        return False
    if room[at[0]]:
        at[0] -= 1
        room[at[0]] = 47  # a slash
    at[0] -= length
    memcpy(room + at[0], name, length)
    return True


cdef inline const char *place_of(
    const Index *index, uint64_t directory, uint16_t layer, size_t *length
) noexcept nogil:
    """The path that the index has for a directory in a layer; NULL where it has none."""
    cdef uint64_t at = index.nodes[directory].places, end = index.places_length
    cdef uint16_t count, size
    cdef const char *place
    if at > end or end - at < 2:
        return NULL
    count = (<const uint16_t *>(index.places + at))[0]
    at += 2
    while count and end - at >= 4:
        place = index.places + at
        size = (<const uint16_t *>place)[1]
        length[0] = size
        if size == INHERITED:
            size = 0
        if end - at - 4 < size:
            return NULL
        if (<const uint16_t *>place)[0] == layer:
            return place + 4
        at += 4 + size
        count -= 1
    return NULL
