/* For _held.pxd alone. */
#ifndef UNIONFUSE_HELD_H
#define UNIONFUSE_HELD_H
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/stat.h>
#include <unistd.h>
#include "_wire.h"

#define HELD_TIMES (FATTR_ATIME | FATTR_MTIME)
#define HELD_OWNER (FATTR_UID | FATTR_GID)
#define HELD_CHANGES (FATTR_MODE | HELD_OWNER | HELD_TIMES)
/* Those, and what goes with them. Sizes, and set-uid that goes, are for the union; but fchown(2)
 * takes set-uid away by itself. */
#define HELD_KNOWN \
    (HELD_CHANGES | FATTR_ATIME_NOW | FATTR_MTIME_NOW | FATTR_FH | FATTR_LOCKOWNER | FATTR_CTIME)

static inline struct timespec held_time(uint32_t fields, uint32_t given, uint32_t now,
                                        uint64_t seconds, uint32_t nanoseconds) {
    struct timespec time = {0, UTIME_OMIT};
    if (!(fields & given)) return time;
    time.tv_nsec = fields & now ? UTIME_NOW : nanoseconds;
    time.tv_sec = (time_t)seconds;
    return time;
}

/* Change owner, mode and times as SETATTR asks, in the union's order: 0, an errno, or -1 where
 * nothing was done because it asks for something else. */
static inline int held_change(int file, const struct fuse_setattr_in *in) {
    struct timespec times[2];
    uint32_t known = in->valid & HELD_OWNER ? HELD_KNOWN | FATTR_KILL_SUIDGID : HELD_KNOWN;
    if (in->valid & ~known || !(in->valid & HELD_CHANGES)) return -1;
    if (in->valid & HELD_OWNER
        && fchown(file, in->valid & FATTR_UID ? in->uid : (uid_t)-1,
                  in->valid & FATTR_GID ? in->gid : (gid_t)-1)) return errno;
    if (in->valid & FATTR_MODE && fchmod(file, in->mode & 07777)) return errno;
    times[0] = held_time(in->valid, FATTR_ATIME, FATTR_ATIME_NOW, in->atime, in->atimensec);
    times[1] = held_time(in->valid, FATTR_MTIME, FATTR_MTIME_NOW, in->mtime, in->mtimensec);
    return in->valid & HELD_TIMES && futimens(file, times) ? errno : 0;
}

static inline int held_stat(int file, struct fuse_attr *out) {
    struct stat status;
    if (fstat(file, &status)) return errno;
    wire_attributes(&status, out);
    return 0;
}
#endif
