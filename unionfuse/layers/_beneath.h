/* How the compiled modules enter layers. */
#ifndef UNIONFUSE_BENEATH_H
#define UNIONFUSE_BENEATH_H
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Open what lies below a layer's root without crossing mounts or following links; -1 and errno.
 * O_NOATIME is given up where the file is somebody else's. */
static int beneath_open(int root, const char *path, int flags) {
    struct open_how how;
    int fd;
    memset(&how, 0, sizeof how);
    how.flags = flags | O_CLOEXEC | O_NOFOLLOW;
    how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV;
    fd = syscall(SYS_openat2, root, path, &how, sizeof how);
    if (fd < 0 && errno == EPERM && flags & O_NOATIME) {
        how.flags &= ~O_NOATIME;
        fd = syscall(SYS_openat2, root, path, &how, sizeof how);
    }
    return fd;
}
#endif
