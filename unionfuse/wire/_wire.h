/* What stat(2) says, in FUSE's words. */
#ifndef UNIONFUSE_WIRE_H
#define UNIONFUSE_WIRE_H
#include <linux/fuse.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

/* The kernel's new_encode_dev. */
static inline uint32_t wire_device(uint64_t device) {
    unsigned major_number = major(device), minor_number = minor(device);
    return (minor_number & 0xff) | (major_number & 0xfff) << 8 | (minor_number & ~0xffu) << 12;
}

static inline void wire_attributes(const struct stat *status, struct fuse_attr *out) {
    memset(out, 0, sizeof *out);
    out->ino = status->st_ino;
    out->size = status->st_size;
    out->blocks = status->st_blocks;
    out->atime = status->st_atim.tv_sec;
    out->mtime = status->st_mtim.tv_sec;
    out->ctime = status->st_ctim.tv_sec;
    out->atimensec = status->st_atim.tv_nsec;
    out->mtimensec = status->st_mtim.tv_nsec;
    out->ctimensec = status->st_ctim.tv_nsec;
    out->mode = status->st_mode;
    out->nlink = status->st_nlink;
    out->uid = status->st_uid;
    out->gid = status->st_gid;
    out->rdev = wire_device(status->st_rdev);
    out->blksize = status->st_blksize;
}
#endif
