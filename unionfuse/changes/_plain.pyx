# cython: language_level=3, boundscheck=False, wraparound=False
"""The copy of a small file that is nothing but data, without the GIL from its first step to its last.

It does what staging.py does, in the same order. Most files are of this kind, and a tree of them
(`chmod -R`) is copied by several threads at a time: with a system call of each at a time they would
hand the GIL to each other some twenty times for each file.
"""

from posix.time cimport timespec

cdef extern from "_plain.h" nogil:
    struct plain_mark:
        const char *name
        const char *value
        size_t size
    struct plain_state "plain_copy":
        int work
        const char *name
        unsigned uid, gid, mode
        timespec times[2]
        plain_mark marks[2]
        int mark_count, settling
        double waited
    int plain_copy(int source, plain_state *copy)

NO_WAIT, DATA_SYNC, WRITE_BACK = range(3)


def copy_plain(int source, int work, bytes name, status, tuple marks, int settling):
    """Stage a copy of a file.

    Arguments:
        source: the file, open for reading.
        work, name: where the copy is made.
        status: its owner, mode and times.
        marks: up to two extended attributes that it gets, (name, value); where they are refused it
            goes without.
        settling: how it is to be on disk afterwards.

    Returns:
        Seconds that it took until it was on disk; -1 where the file is another kind, and nothing
        was done.

    Raises:
        OSError: the copy may be there, and is not whole.
    """
    cdef plain_state copy
    cdef int failure
    copy.work, copy.name, copy.waited = work, name, 0
    copy.uid, copy.gid, copy.mode = status.st_uid, status.st_gid, status.st_mode & 0o7777
    split_time(status.st_atime_ns, &copy.times[0])
    split_time(status.st_mtime_ns, &copy.times[1])
    copy.settling = settling
    copy.mark_count = min(len(marks), 2)
    for i in range(copy.mark_count):
        attribute, value = marks[i]
        copy.marks[i].name, copy.marks[i].value = <const char *>attribute, <const char *>value
        copy.marks[i].size = len(value)
    with nogil:
        failure = plain_copy(source, &copy)
    if failure > 0:
        raise OSError(failure, "a copy cannot be made")
    return copy.waited if failure == 0 else -1.0


cdef void split_time(long long moment, timespec *time):
    # Down, also before 1970: nanoseconds are never negative.
    time.tv_nsec = moment % 1000000000
    time.tv_sec = (moment - time.tv_nsec) // 1000000000
