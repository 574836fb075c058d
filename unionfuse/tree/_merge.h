/* Reading the directories of layers that are merged. For _merge.pxd alone. */
#ifndef UNIONFUSE_MERGE_H
#define UNIONFUSE_MERGE_H
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>
#include "_beneath.h"

struct merge_entry { uint64_t inode, offset; uint16_t size; uint8_t type; char name[1]; };

/* A readable directory below a layer's root; -1 where it cannot be, or carries marks of an overlay. */
static int merge_open(int root, const char *path, uint64_t *inode) {
    struct stat status;
    char names[4096];
    ssize_t length;
    int fd;
    fd = beneath_open(root, path, O_RDONLY | O_DIRECTORY | O_NOATIME);
    if (fd < 0) return -1;
    length = flistxattr(fd, names, sizeof names);
    if ((length < 0 && errno != EOPNOTSUPP) || (length > 0 && memmem(names, length, "overlay", 7))
        || fstat(fd, &status)) {
        close(fd);
        return -1;
    }
    *inode = status.st_ino;
    return fd;
}

/* Whether getdents(2) tells the inode numbers of files that stat(2) does: a union below may not. */
static int merge_tells_inodes(int directory) {
    struct statfs status;
    if (fstatfs(directory, &status)) return 0;
    switch ((uint32_t)status.f_type) {
    case 0xEF53: /* ext4 */
    case 0x58465342: /* XFS */
    case 0x9123683E: /* btrfs */
    case 0x01021994: /* tmpfs */
    case 0x73717368: /* squashfs */
    case 0xE0F5E1E2: /* erofs */
        return 1;
    }
    return 0;
}

static ssize_t merge_read(int directory, void *out, size_t room) {
    return syscall(SYS_getdents64, directory, out, room);
}
#endif
