/* Files of layers, opened for reading and brought into the page cache. For _lane.pyx alone. */
#ifndef UNIONFUSE_OPENS_H
#define UNIONFUSE_OPENS_H
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include "_beneath.h"

/* A regular file below a layer's root; -1. */
static int opens_lower(int root, const char *path) {
    struct stat status;
    int fd = beneath_open(root, path, O_RDONLY | O_NONBLOCK | O_NOATIME);
    if (fd >= 0 && (fstat(fd, &status) || !S_ISREG(status.st_mode))) {
        close(fd);
        return -1;
    }
    return fd;
}

static int64_t opens_size(int file) {
    struct stat status;
    return fstat(file, &status) ? -1 : status.st_size;
}

/* Put the whole of a small file into the kernel's page cache of a node (FUSE_NOTIFY_STORE). It
 * must not be open: a page that is being read is locked until somebody answers the READ. */
static int opens_bring(int fuse, uint64_t node, int file, char *buffer, size_t size) {
    struct fuse_out_header head;
    struct fuse_notify_store_out store;
    struct iovec parts[3];
    if (size == 0) return 1;
    if (pread(file, buffer, size, 0) != (ssize_t)size) return 0;
    memset(&store, 0, sizeof store);
    store.nodeid = node;
    store.size = size;
    head.len = sizeof head + sizeof store + size;
    head.error = FUSE_NOTIFY_STORE;
    head.unique = 0;
    parts[0].iov_base = &head;
    parts[0].iov_len = sizeof head;
    parts[1].iov_base = &store;
    parts[1].iov_len = sizeof store;
    parts[2].iov_base = buffer;
    parts[2].iov_len = size;
    return writev(fuse, parts, 3) == (ssize_t)head.len;
}

/* One bit of a byte that several threads mark. */
static void opens_mark(uint8_t *place, uint8_t bit) {
    __atomic_fetch_or(place, bit, __ATOMIC_SEQ_CST);
}
static void opens_unmark(uint8_t *place, uint8_t bit) {
    __atomic_fetch_and(place, (uint8_t)~bit, __ATOMIC_SEQ_CST);
}
#endif
