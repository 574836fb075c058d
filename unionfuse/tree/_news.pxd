"""Which directories have come and gone, in their order: a list that grows until somebody fetches it."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport realloc


cdef struct Piece:
    uint64_t directory
    uint64_t note  # where its record is in the journal; 0: the directory has gone

cdef struct News:
    Piece *pieces
    uint64_t count, room


cdef inline bint has_room(News *news) noexcept nogil:
    """Make room for one piece more; False: there is no memory."""
    cdef uint64_t room = news.room * 2 or 64
    cdef Piece *bigger
    if news.count < news.room:
        return True
    bigger = <Piece *>realloc(news.pieces, room * sizeof(Piece))
    if not bigger:
        return False
    news.pieces, news.room = bigger, room
    return True


cdef inline void add_piece(News *news, uint64_t directory, uint64_t note) noexcept nogil:
    if has_room(news):
        news.pieces[news.count].directory, news.pieces[news.count].note = directory, note
        news.count += 1
