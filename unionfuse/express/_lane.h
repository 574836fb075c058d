/* What the compiled loop of the express lane needs of the system: io_uring without a library,
 * atomic counters, splice, and files by descriptor. For _lane.pyx alone.
 */
#define XXH_INLINE_ALL
#include <fcntl.h>
#include <xxhash.h>
#include "_wire.h"
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <time.h>

/* One node of the index; see unionfuse/index.py. */
struct lane_node {
    uint32_t record, parent;
    uint16_t layer, flags;
    uint32_t length;
    uint64_t offset, places;
};
struct lane_slot { uint32_t tag, record; };

/* --- io_uring, without a library: one ring for a queue of FUSE requests ---------------- */
#include <errno.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LANE_WORTH_SPLICING 65536 /* bytes */
#define LANE_PIPE (1 << 20)
#define LANE_REGISTER 1 /* FUSE_IO_URING_CMD_REGISTER */
#define LANE_COMMIT 2   /* FUSE_IO_URING_CMD_COMMIT_AND_FETCH */

struct lane_header { /* struct fuse_uring_req_header */
    char in_out[128];
    char op_in[128];
    uint64_t flags, commit_id;
    uint32_t payload_size, padding;
    uint64_t reserved;
};
/* What daemons tell those after them of one entry; behind its header. */
struct lane_note {
    uint64_t saved;     /* commit_id of the request that `size` bytes were saved of */
    uint64_t answered;  /* of that whose whole reply is in the buffers */
    uint64_t committed; /* of that whose reply the kernel has */
    uint32_t size, arguments;
};
struct lane_command { uint64_t flags, commit_id; uint16_t queue; uint8_t padding[6]; };
struct lane_ring {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_cqe *cqes;
    char *sqes, *area;
    size_t area_size, sqes_size;
    unsigned waiting; /* pushed and not yet submitted */
};

static void lane_ring_close(struct lane_ring *ring) {
    if (ring->area) munmap(ring->area, ring->area_size);
    if (ring->sqes) munmap(ring->sqes, ring->sqes_size);
    if (ring->fd >= 0) close(ring->fd);
    ring->fd = -1;
    ring->area = ring->sqes = 0;
}

/* Returns 0 or an errno. The thread that opens a ring is the one that may use it. */
static int lane_ring_open(struct lane_ring *ring, unsigned entries) {
    struct io_uring_params p;
    size_t sq, cq;
    memset(ring, 0, sizeof *ring);
    memset(&p, 0, sizeof p);
    p.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    ring->fd = syscall(SYS_io_uring_setup, entries, &p);
    if (ring->fd < 0) return errno;
    sq = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    ring->area_size = sq > cq ? sq : cq; /* one mapping for both: IORING_FEAT_SINGLE_MMAP */
    ring->sqes_size = p.sq_entries * 128;
    ring->area = mmap(0, ring->area_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
                      IORING_OFF_SQ_RING);
    if (ring->area == MAP_FAILED) { ring->area = 0; lane_ring_close(ring); return ENOMEM; }
    ring->sqes = mmap(0, ring->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
                      IORING_OFF_SQES);
    if (ring->sqes == MAP_FAILED) { ring->sqes = 0; lane_ring_close(ring); return ENOMEM; }
    ring->sq_tail = (unsigned *)(ring->area + p.sq_off.tail);
    ring->sq_mask = (unsigned *)(ring->area + p.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(ring->area + p.sq_off.array);
    ring->cq_head = (unsigned *)(ring->area + p.cq_off.head);
    ring->cq_tail = (unsigned *)(ring->area + p.cq_off.tail);
    ring->cq_mask = (unsigned *)(ring->area + p.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(ring->area + p.cq_off.cqes);
    return 0;
}

static struct io_uring_sqe *lane_ring_next(struct lane_ring *ring) {
    unsigned tail = *ring->sq_tail, at = tail & *ring->sq_mask;
    struct io_uring_sqe *sqe = (struct io_uring_sqe *)(ring->sqes + at * 128);
    memset(sqe, 0, 128);
    ring->sq_array[at] = at;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->waiting++;
    return sqe;
}

static void lane_ring_command(struct lane_ring *ring, int fuse, int operation,
                              struct iovec *buffers, uint64_t commit_id, int queue,
                              uint64_t user_data) {
    struct io_uring_sqe *sqe = lane_ring_next(ring);
    struct lane_command *command = (struct lane_command *)((char *)sqe + 48);
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->fd = fuse;
    sqe->off = operation;
    sqe->addr = (uint64_t)(uintptr_t)buffers;
    sqe->len = 2;
    sqe->user_data = user_data;
    command->commit_id = commit_id;
    command->queue = queue;
}

static void lane_ring_read(struct lane_ring *ring, int fd, void *buffer, uint64_t user_data) {
    struct io_uring_sqe *sqe = lane_ring_next(ring);
    sqe->opcode = IORING_OP_READ;
    sqe->fd = fd;
    sqe->addr = (uint64_t)(uintptr_t)buffer;
    sqe->len = 8;
    sqe->user_data = user_data;
}

/* Submit what was pushed, and wait until so much has happened; 0 or an errno. */
static int lane_ring_enter(struct lane_ring *ring, unsigned least) {
    int done = syscall(SYS_io_uring_enter, ring->fd, ring->waiting, least,
                       IORING_ENTER_GETEVENTS, 0, 0);
    if (done < 0) return errno;
    ring->waiting -= done;
    return 0;
}

static int lane_ring_pop(struct lane_ring *ring, uint64_t *user_data, int *result) {
    unsigned head = *ring->cq_head;
    struct io_uring_cqe *cqe = &ring->cqes[head & *ring->cq_mask];
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE)) return 0;
    *user_data = cqe->user_data;
    *result = cqe->res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    return 1;
}

/* Memory that every daemon of a mount must have at the same address, since the kernel goes on
 * with the one that the first of them told. Far from where programs and libraries are put. */
static char *lane_map_rings(int fd, size_t size) {
    void *found = mmap((void *)0x100000000000, size, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
    return found == MAP_FAILED ? 0 : found;
}
static void lane_note_id(uint64_t *place, uint64_t id) {
    __atomic_store_n(place, id, __ATOMIC_RELEASE);
}

static int lane_take(int *flag) { return __atomic_exchange_n(flag, 0, __ATOMIC_ACQ_REL); }
static void lane_give(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); }

static void lane_stay_on(int cpu) { /* where it fails the thread runs anywhere: only slower */
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static inline int lane_add(int *counter, int by) {
    return __atomic_add_fetch(counter, by, __ATOMIC_SEQ_CST);
}
static inline int lane_load(int *counter) {
    return __atomic_load_n(counter, __ATOMIC_SEQ_CST);
}
static inline int lane_swap(int *counter, int value) {
    return __atomic_exchange_n(counter, value, __ATOMIC_SEQ_CST);
}

static inline int lane_replace(int *counter, int expected, int value) { /* what was there */
    __atomic_compare_exchange_n(counter, &expected, value, 0, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
    return expected;
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
static int lane_open(int directory, const char *name) {
    int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC, fd;
    fd = openat(directory, name, flags | O_NOATIME);
    return fd < 0 && errno == EPERM ? openat(directory, name, flags) : fd; /* not our file */
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
