/* For _plain.pyx alone. */
#ifndef UNIONFUSE_PLAIN_H
#define UNIONFUSE_PLAIN_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

enum { PLAIN_NO_WAIT, PLAIN_DATA_SYNC, PLAIN_WRITE_BACK };

struct plain_mark {
    const char *name, *value;
    size_t size;
};

/* What a copy is to become. */
struct plain_copy {
    int work; /* the directory, and the name in it */
    const char *name;
    uid_t uid;
    gid_t gid;
    mode_t mode;
    struct timespec times[2];
    struct plain_mark marks[2];
    int mark_count, settling;
    double waited; /* out: seconds */
};

static inline double plain_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Whether a file has nothing but data: no hole, no extended attribute. */
static inline int plain_is_so(int source, const struct stat *status) {
    ssize_t attributes = flistxattr(source, NULL, 0);
    return status->st_blocks * 512 >= status->st_size
           && (attributes == 0 || (attributes < 0 && errno == EOPNOTSUPP));
}

/* 0, or an errno; it reads and writes where the kernel cannot copy between these two. */
static inline int plain_data(int source, int target, off_t size) {
    char buffer[1 << 14];
    loff_t from = 0, to = 0;
    while (to < size) {
        ssize_t got = copy_file_range(source, &from, target, &to, (size_t)(size - to), 0);
        if (got > 0) continue;
        got = pread(source, buffer, sizeof buffer, to);
        if (got < 0) return errno;
        if (got == 0) return ftruncate(target, size) ? errno : 0; /* it has become shorter */
        got = pwrite(target, buffer, (size_t)got, to);
        if (got < 0) return errno;
        from = to += got;
    }
    return 0;
}

static inline int plain_settle(int target, struct plain_copy *copy) {
    double start = plain_clock();
    int failed = 0;
    if (copy->settling == PLAIN_DATA_SYNC)
        failed = fdatasync(target);
    else if (copy->settling == PLAIN_WRITE_BACK)
        failed = sync_file_range(target, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE
                                                   | SYNC_FILE_RANGE_WAIT_AFTER);
    copy->waited = plain_clock() - start;
    return failed ? errno : 0;
}

static inline int plain_metadata(int target, const struct plain_copy *copy) {
    if (fchown(target, copy->uid, copy->gid)) return errno;
    for (int i = 0; i < copy->mark_count; i++)
        if (fsetxattr(target, copy->marks[i].name, copy->marks[i].value, copy->marks[i].size, 0)
            && errno != EPERM && errno != EOPNOTSUPP) return errno; /* it goes without */
    if (fchmod(target, copy->mode) || futimens(target, copy->times)) return errno;
    return 0;
}

/* 0, an errno, or -1 for a file that is not plain: nothing was done. */
static inline int plain_copy(int source, struct plain_copy *copy) {
    struct stat status;
    int target, failure;
    if (fstat(source, &status)) return errno;
    if (!plain_is_so(source, &status)) return -1;
    target = openat(copy->work, copy->name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                    0600);
    if (target < 0) return errno;
    failure = plain_data(source, target, status.st_size);
    if (!failure && copy->settling == PLAIN_WRITE_BACK)
        sync_file_range(target, 0, 0, SYNC_FILE_RANGE_WRITE); /* the rest is done meanwhile */
    if (!failure) failure = plain_metadata(target, copy);
    if (!failure) failure = plain_settle(target, copy);
    if (close(target) && !failure) failure = errno;
    return failure;
}
#endif
