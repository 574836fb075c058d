/* What tables of merged directories need of the system. For _tables.pyx alone. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/xattr.h>
#include <unistd.h>
#include "_beneath.h"
#include "_wire.h"

/* A directory below a layer's root, to look names up in. */
static int tables_open(int root, const char *path) {
    return beneath_open(root, path, O_PATH | O_DIRECTORY);
}

/* lstat of a name as a struct fuse_attr; 0 or an errno. */
static int tables_stat(int directory, const char *name, uint64_t *device, struct fuse_attr *out) {
    struct stat status;
    if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT)) return errno;
    *device = status.st_dev;
    wire_attributes(&status, out);
    return 0;
}

/* Of a directory that others below it add to, unless it says that they do not: as tables_stat, or EIO
 * where something about it is special. A merged directory shows one link. */
static int tables_stat_merged(
    int directory, const char *name, uint64_t *device, struct fuse_attr *out) {
    struct stat status;
    char names[4096];
    ssize_t length;
    int fd = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), result = EIO;
    if (fd < 0) return errno;
    length = flistxattr(fd, names, sizeof names);
    if ((length < 0 && errno != EOPNOTSUPP) || (length > 0 && memmem(names, length, "overlay", 7)))
        goto done;
    if (faccessat(fd, ".wh..wh..opq", F_OK, AT_SYMLINK_NOFOLLOW) == 0 || errno != ENOENT) goto done;
    if (fstat(fd, &status)) goto done;
    *device = status.st_dev;
    wire_attributes(&status, out);
    out->nlink = 1;
    result = 0;
done:
    close(fd);
    return result;
}

/* Whether a directory shows as well what layers below have under its name: it has no mark at all. */
static int tables_adds_to(int directory, const char *name) {
    char names[4096];
    ssize_t length;
    int fd = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), adds;
    if (fd < 0) return 0;
    length = flistxattr(fd, names, sizeof names);
    adds = length < 0 ? errno == EOPNOTSUPP : !length || !memmem(names, length, "overlay", 7);
    adds = adds && faccessat(fd, ".wh..wh..opq", F_OK, AT_SYMLINK_NOFOLLOW) < 0 && errno == ENOENT;
    close(fd);
    return adds;
}

static int tables_getxattr(int directory, const char *name, const char *attribute) {
    char path[32 + 256];
    snprintf(path, sizeof path, "/proc/self/fd/%d/%s", directory, name);
    return lgetxattr(path, attribute, 0, 0) < 0 ? errno : 0;
}

/* A name opened for reading where it is a regular file with one name and data of its own; -1. */
static int tables_open_file(int directory, const char *name, uint64_t device) {
    int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, fd;
    char names[4096];
    struct stat status;
    ssize_t length;
    fd = openat(directory, name, flags | O_NOATIME);
    if (fd < 0 && errno == EPERM) fd = openat(directory, name, flags); /* not our file */
    if (fd < 0) return -1;
    if (fstat(fd, &status) || !S_ISREG(status.st_mode) || status.st_nlink != 1
        || (uint64_t)status.st_dev != device)
        goto refuse;
    length = flistxattr(fd, names, sizeof names);
    if (length < 0 && errno != EOPNOTSUPP) goto refuse;
    /* A metacopy of overlayfs has its data in another layer. */
    if (length > 0 && memmem(names, length, "overlay.metacopy", 16)) goto refuse;
    return fd;
refuse:
    close(fd);
    return -1;
}

static int tables_set_once(int *where, int value) {
    int none = -1;
    return __atomic_compare_exchange_n(where, &none, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static int tables_load(int *where) { return __atomic_load_n(where, __ATOMIC_SEQ_CST); }
