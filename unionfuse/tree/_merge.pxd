"""Directories of several layers merged into one block, as long as there is nothing special to them.

What is special: marks of an overlay, whiteouts of any dialect, names that are neither file,
directory nor link, and whatever cannot be read. Then the union merges the directory (view.merge),
with the same names in the same order.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, strlen
from posix.unistd cimport close

from unionfuse.tree._block cimport TYPE, Block, Group, Name, Place, free_block, name_key


cdef extern from "_merge.h" nogil:
    struct merge_entry:
        uint64_t inode
        uint16_t size
        uint8_t type
        char name[1]
    int merge_open(int root, const char *path, uint64_t *inode)
    int merge_tells_inodes(int directory)
    ssize_t merge_read(int directory, void *out, size_t room)

cdef enum:
    DT_DIR = 4
    DT_REG = 8
    DT_LNK = 10
    ROOM = 32768

cdef struct Having:  # one directory that has a name
    uint32_t before  # the one above it, plus one
    uint16_t place

cdef struct Found:
    uint64_t key
    uint64_t inode  # in the topmost directory that has it; 0: not known
    uint32_t at  # of its text
    uint32_t having  # the lowest directory that has it, plus one
    uint32_t count  # how many have it
    uint32_t rank  # in the listing, plus one, once nothing below can add to it
    uint8_t length, type

cdef struct Draft:
    Block *block
    Found *found
    uint32_t *slots
    Having *having
    char *text
    uint32_t count, room, mask, ranks, having_count, having_room, text_length, text_room


cdef inline bint merge_places(Block *block, const int *layers) noexcept nogil:
    """Fill a block with what its places have; False: it is not that simple.

    Descriptors of the places are left in them.
    """
    cdef Draft draft
    cdef uint32_t place
    cdef bint is_good
    draft.block = block
    draft.found, draft.slots, draft.having, draft.text = NULL, NULL, NULL, NULL
    draft.count = draft.room = draft.mask = draft.ranks = 0
    draft.having_count = draft.having_room = draft.text_length = draft.text_room = 0
    is_good = True
    for place in range(block.place_count):
        is_good = is_good and scan_place(&draft, place, layers)
    is_good = is_good and write_block(&draft)
    free(draft.found)
    free(draft.slots)
    free(draft.having)
    free(draft.text)
    return is_good


cdef inline bint scan_place(Draft *draft, uint32_t number, const int *layers) noexcept nogil:
    cdef Place *place = &draft.block.places[number]
    cdef char buffer[ROOM]
    cdef const merge_entry *entry
    cdef uint64_t inode = 0
    cdef ssize_t got, at
    cdef bint tells
    place.descriptor = merge_open(layers[place.layer], place.path, &inode)
    if place.descriptor < 0:
        return False
    draft.block.open_count += 1
    if number == 0:
        draft.block.ino = inode ^ place.bits
    tells = merge_tells_inodes(place.descriptor) != 0
    while True:
        got = merge_read(place.descriptor, buffer, ROOM)
        if got <= 0:
            return got == 0
        at = 0
        while at < got:
            entry = <const merge_entry *>(buffer + at)
            at += entry.size
            if not take_entry(draft, number, entry, tells):
                return False


cdef inline bint take_entry(
    Draft *draft, uint32_t place, const merge_entry *entry, bint tells
) noexcept nogil:
    cdef size_t length = strlen(entry.name)
    if entry.name[0] == 46:
        if length == 1 or (length == 2 and entry.name[1] == 46):
            return True
        if length >= 4 and memcmp(entry.name, b".wh.", 4) == 0:
            return False
    if not 0 < length <= 255:
        return False
    if entry.type != DT_DIR and entry.type != DT_REG and entry.type != DT_LNK:
        return False
    cdef uint64_t key = name_key(draft.block.directory, entry.name, length)
    cdef Found *found = find_found(draft, entry.name, length, key)
    if found == NULL:
        found = new_found(draft, entry.name, length, key)
        if found == NULL or not add_having(draft, found, place):
            return False
        found.type, found.inode = entry.type, entry.inode if tells else 0
        if entry.type != DT_DIR:
            close_found(draft, found)
    elif not found.rank:  # a directory so far
        if entry.type == DT_DIR:
            return add_having(draft, found, place)
        close_found(draft, found)
    return True


cdef inline void close_found(Draft *draft, Found *found) noexcept nogil:
    draft.ranks += 1
    found.rank = draft.ranks


cdef inline Found *find_found(
    Draft *draft, const char *name, size_t length, uint64_t key
) noexcept nogil:
    cdef uint32_t slot = key & draft.mask
    cdef Found *found
    while draft.slots != NULL and draft.slots[slot]:
        found = &draft.found[draft.slots[slot] - 1]
        if found.key == key and found.length == length and memcmp(
            draft.text + found.at, name, length
        ) == 0:
            return found
        slot = (slot + 1) & draft.mask
    return NULL


cdef inline void put_found(Draft *draft, uint32_t number) noexcept nogil:
    cdef uint32_t slot = draft.found[number].key & draft.mask
    while draft.slots[slot]:
        slot = (slot + 1) & draft.mask
    draft.slots[slot] = number + 1


cdef inline Found *new_found(
    Draft *draft, const char *name, size_t length, uint64_t key
) noexcept nogil:
    """Room for one name more; NULL: there is none."""
    cdef Found *found
    if draft.count == draft.room and not more_found(draft):
        return NULL
    if draft.text_length + length + 1 > draft.text_room:
        draft.text_room = draft.text_room * 2 + 4096
        bigger = <char *>realloc(draft.text, draft.text_room)
        if bigger == NULL:
            return NULL
        draft.text = bigger
    found = &draft.found[draft.count]
    found.key, found.at, found.length = key, draft.text_length, <uint8_t>length
    found.having = found.count = found.rank = 0
    memcpy(draft.text + found.at, name, length + 1)
    draft.text_length += <uint32_t>length + 1
    put_found(draft, draft.count)
    draft.count += 1
    return found


cdef inline bint more_found(Draft *draft) noexcept nogil:
    cdef uint32_t i, room = draft.room * 2 or 64
    cdef Found *bigger = <Found *>realloc(draft.found, room * sizeof(Found))
    cdef uint32_t *slots
    if bigger == NULL:
        return False
    draft.found = bigger
    slots = <uint32_t *>calloc(room * 2, sizeof(uint32_t))
    if slots == NULL:
        return False
    free(draft.slots)
    draft.slots, draft.mask, draft.room = slots, room * 2 - 1, room
    for i in range(draft.count):
        put_found(draft, i)
    return True


cdef inline bint add_having(Draft *draft, Found *found, uint32_t place) noexcept nogil:
    cdef uint32_t room = draft.having_room * 2 + 64
    cdef Having *bigger
    if draft.having_count == draft.having_room:
        bigger = <Having *>realloc(draft.having, room * sizeof(Having))
        if bigger == NULL:
            return False
        draft.having, draft.having_room = bigger, room
    draft.having[draft.having_count].before = found.having
    draft.having[draft.having_count].place = <uint16_t>place
    draft.having_count += 1
    found.having = draft.having_count
    found.count += 1
    return True


# --- into the block ---------------------------------------------------------------------------

cdef inline bint write_block(Draft *draft) noexcept nogil:
    """Names in the order of a listing: those that are settled first, as they were settled."""
    cdef Block *block = draft.block
    cdef uint32_t i, groups
    cdef size_t positions
    block.count, block.mask = draft.count, 1
    while block.mask < block.count + block.count // 2 + 1:
        block.mask = block.mask * 2 + 1
    groups = positions = block.place_count
    for i in range(draft.count):
        if not draft.found[i].rank:
            close_found(draft, &draft.found[i])
        if draft.found[i].count > 1:
            groups += 1
            positions += draft.found[i].count
    block.slots = <uint32_t *>calloc(block.mask + 1, sizeof(uint32_t))
    block.names = <Name *>calloc(block.count + 1, sizeof(Name))
    block.groups = <Group *>calloc(groups + 1, sizeof(Group))
    block.positions = <uint16_t *>calloc(positions + 1, sizeof(uint16_t))
    block.text = <char *>malloc(draft.text_length + 1)
    if not (block.slots and block.names and block.groups and block.positions and block.text):
        return False
    if draft.text_length:
        memcpy(block.text, draft.text, draft.text_length)
    for i in range(block.place_count):  # a group for each place alone
        block.groups[i].first, block.groups[i].count, block.positions[i] = i, 1, i
    write_names(draft)
    return True


cdef inline void write_names(Draft *draft) noexcept nogil:
    cdef Block *block = draft.block
    cdef uint32_t i, slot, group = block.place_count, first = block.place_count
    cdef Found *found
    cdef Name *name
    for i in range(draft.count):
        found = &draft.found[i]
        name = &block.names[found.rank - 1]
        name.at, name.length, name.kind = found.at, found.length, found.type
        name.inode = found.inode
        if found.count == 1:
            name.group = draft.having[found.having - 1].place
        else:
            name.group = group
            write_group(draft, found, &block.groups[group], first)
            first += found.count
            group += 1
        slot = found.key & block.mask
        while block.slots[slot]:
            slot = (slot + 1) & block.mask
        block.slots[slot] = found.rank


cdef inline void write_group(
    Draft *draft, const Found *found, Group *group, uint32_t first
) noexcept nogil:
    cdef uint32_t left = found.count, having = found.having
    group.first, group.count = first, found.count
    while left:
        left -= 1
        draft.block.positions[first + left] = draft.having[having - 1].place
        having = draft.having[having - 1].before


cdef inline char *names_in_record(const Block *block, size_t *length) noexcept nogil:
    """The names as a record of the journal has them: of each its type and a NUL behind it.

    NULL: no memory.
    """
    cdef uint32_t i
    cdef size_t room = 1
    cdef char *text
    cdef char *at
    for i in range(block.count):
        room += block.names[i].length + 2
    text = at = <char *>malloc(room)
    if text == NULL:
        return NULL
    for i in range(block.count):
        at[0] = block.names[i].kind & TYPE
        memcpy(at + 1, block.text + block.names[i].at, block.names[i].length)
        at += block.names[i].length + 2
        at[-1] = 0
    length[0] = at - text
    return text


cdef inline void free_draft(Block *block) noexcept nogil:
    """Free a block that has not been put anywhere."""
    cdef uint32_t i
    for i in range(block.place_count):
        if block.places[i].descriptor >= 0:
            close(block.places[i].descriptor)
    free_block(block)
