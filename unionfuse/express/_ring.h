/* io_uring, without a library: one ring for a queue of FUSE requests. For _ring.pxd alone. */
#include <errno.h>
#include <linux/fuse.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define RING_REGISTER 1 /* FUSE_IO_URING_CMD_REGISTER */
#define RING_COMMIT 2   /* FUSE_IO_URING_CMD_COMMIT_AND_FETCH */
#define RING_RESEND (1ull << 63) /* FUSE_UNIQUE_RESEND */

struct ring_header { /* struct fuse_uring_req_header */
    char in_out[128];
    char op_in[128];
    uint64_t flags, commit_id;
    uint32_t payload_size, padding;
    uint64_t reserved;
};
/* What daemons tell those after them of one entry; behind its header. */
struct ring_note {
    uint64_t saved;     /* commit_id of the request that `size` bytes were saved of */
    uint64_t answered;  /* of that whose whole reply is in the buffers */
    uint64_t committed; /* of that whose reply the kernel has */
    uint32_t size, arguments;
};
struct ring_command { uint64_t flags, commit_id; uint16_t queue; uint8_t padding[6]; };
struct ring {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_cqe *cqes;
    char *sqes, *area;
    size_t area_size, sqes_size;
    unsigned waiting; /* pushed and not yet submitted */
};

static void ring_close(struct ring *ring) {
    if (ring->area) munmap(ring->area, ring->area_size);
    if (ring->sqes) munmap(ring->sqes, ring->sqes_size);
    if (ring->fd >= 0) close(ring->fd);
    ring->fd = -1;
    ring->area = ring->sqes = 0;
}

/* Returns 0 or an errno. The thread that opens a ring is the one that may use it. */
static int ring_open(struct ring *ring, unsigned entries) {
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
    if (ring->area == MAP_FAILED) { ring->area = 0; ring_close(ring); return ENOMEM; }
    ring->sqes = mmap(0, ring->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
                      IORING_OFF_SQES);
    if (ring->sqes == MAP_FAILED) { ring->sqes = 0; ring_close(ring); return ENOMEM; }
    ring->sq_tail = (unsigned *)(ring->area + p.sq_off.tail);
    ring->sq_mask = (unsigned *)(ring->area + p.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(ring->area + p.sq_off.array);
    ring->cq_head = (unsigned *)(ring->area + p.cq_off.head);
    ring->cq_tail = (unsigned *)(ring->area + p.cq_off.tail);
    ring->cq_mask = (unsigned *)(ring->area + p.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(ring->area + p.cq_off.cqes);
    return 0;
}

static struct io_uring_sqe *ring_next(struct ring *ring) {
    unsigned tail = *ring->sq_tail, at = tail & *ring->sq_mask;
    struct io_uring_sqe *sqe = (struct io_uring_sqe *)(ring->sqes + at * 128);
    memset(sqe, 0, 128);
    ring->sq_array[at] = at;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->waiting++;
    return sqe;
}

static void ring_command(struct ring *ring, int fuse, int operation,
                              struct iovec *buffers, uint64_t commit_id, int queue,
                              uint64_t user_data) {
    struct io_uring_sqe *sqe = ring_next(ring);
    struct ring_command *command = (struct ring_command *)((char *)sqe + 48);
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->fd = fuse;
    sqe->off = operation;
    sqe->addr = (uint64_t)(uintptr_t)buffers;
    sqe->len = 2;
    sqe->user_data = user_data;
    command->commit_id = commit_id;
    command->queue = queue;
}

static void ring_read(struct ring *ring, int fd, void *buffer, uint64_t user_data) {
    struct io_uring_sqe *sqe = ring_next(ring);
    sqe->opcode = IORING_OP_READ;
    sqe->fd = fd;
    sqe->addr = (uint64_t)(uintptr_t)buffer;
    sqe->len = 8;
    sqe->user_data = user_data;
}

/* Submit what was pushed, and wait until so much has happened; 0 or an errno. */
static int ring_enter(struct ring *ring, unsigned least) {
    int done = syscall(SYS_io_uring_enter, ring->fd, ring->waiting, least,
                       IORING_ENTER_GETEVENTS, 0, 0);
    if (done < 0) return errno;
    ring->waiting -= done;
    return 0;
}

static int ring_pop(struct ring *ring, uint64_t *user_data, int *result) {
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
static char *ring_map(int fd, size_t size) {
    void *found = mmap((void *)0x100000000000, size, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
    return found == MAP_FAILED ? 0 : found;
}
static void ring_note_id(uint64_t *place, uint64_t id) {
    __atomic_store_n(place, id, __ATOMIC_RELEASE);
}

static int ring_take(int *flag) { return __atomic_exchange_n(flag, 0, __ATOMIC_ACQ_REL); }
static void ring_give(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); }

static void ring_stay_on(int cpu) { /* where it fails the thread runs anywhere: only slower */
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}
