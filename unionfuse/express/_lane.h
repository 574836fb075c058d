/* What the compiled loop of the express lane needs of the system: atomic counters, splice, and
 * files by descriptor. For _lane.pyx alone.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include "_wire.h"

#define LANE_WORTH_SPLICING 65536 /* bytes */
#define LANE_PIPE (1 << 20)

static inline int lane_add(int *counter, int by) {
    return __atomic_add_fetch(counter, by, __ATOMIC_SEQ_CST);
}
static inline int lane_load(int *counter) {
    return __atomic_load_n(counter, __ATOMIC_SEQ_CST);
}
static inline uint64_t lane_load_place(uint64_t *place) {
    return __atomic_load_n(place, __ATOMIC_SEQ_CST);
}
static inline uint64_t lane_swap_place(uint64_t *place, uint64_t value) {
    return __atomic_exchange_n(place, value, __ATOMIC_SEQ_CST);
}

static long lane_most_files(void) { /* of those that this process may have open, an eighth */
    struct rlimit limit;
    return getrlimit(RLIMIT_NOFILE, &limit) ? 0 : limit.rlim_cur / 8;
}

static int lane_stat_directory(int directory, struct fuse_attr *attr) {
    struct stat status;
    if (fstat(directory, &status)) return errno;
    wire_attributes(&status, attr);
    return 0;
}
static int lane_is_absent(int directory, const char *name) {
    struct stat status;
    return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) && errno == ENOENT;
}

/* Answer a READ by splice: the kernel copies once, from the file's pages to those that asked.
 * `ends` is a pipe, made when it is first needed. 0: nothing was sent. */
static int lane_splice(int *ends, int fuse, uint64_t unique, int file, uint64_t offset,
                       size_t size) {
    struct fuse_out_header out;
    struct stat status;
    loff_t at = offset;
    size_t done = 0;
    ssize_t moved = 0;
    if (fstat(file, &status) || offset >= (uint64_t)status.st_size) return 0;
    if (size > status.st_size - offset) size = status.st_size - offset;
    if (size < LANE_WORTH_SPLICING) return 0; /* two system calls more */
    if (!ends[1]) {
        if (pipe2(ends, O_CLOEXEC | O_NONBLOCK)) return ends[1] = 0;
        fcntl(ends[1], F_SETPIPE_SZ, LANE_PIPE);
    }
    out.len = sizeof out + size;
    out.error = 0;
    out.unique = unique;
    if (write(ends[1], &out, sizeof out) == sizeof out) {
        while (done < size &&
               (moved = splice(file, &at, ends[1], 0, size - done, SPLICE_F_NONBLOCK)) > 0)
            done += moved;
        if (done == size && splice(ends[0], 0, fuse, 0, out.len, 0) == out.len) return 1;
    }
    close(ends[0]); /* with what is left in it */
    close(ends[1]);
    return ends[0] = ends[1] = 0;
}

static inline double lane_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}
