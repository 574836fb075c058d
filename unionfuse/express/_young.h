/* Files that the loop has made: a table of them, and the system calls. For _young.pyx alone.
 *
 * Nothing here locks; whoever calls holds the mutex of the table.
 */
#ifndef UNIONFUSE_YOUNG_H
#define UNIONFUSE_YOUNG_H
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include "_held.h"

struct young {
    uint64_t node, parent, inode; /* inode: to show */
    uint64_t lookups;
    uint64_t name_note, handle_note; /* offsets of its records in the journal; 0 for none */
    uint32_t backing;                /* 0 for none */
    int descriptor;                  /* of the open that made it; -1: closed */
    int flags;                       /* of that open */
    uint8_t noted;                   /* Python knows of the name */
    uint8_t waits;                   /* Python is to hear of it */
    uint8_t gone;                    /* it was deleted, and is what `last` says */
    struct fuse_attr last;
    struct young *next_node, *next_name;    /* with the same hash */
    struct young *before, *after;           /* among those that wait */
    uint8_t length;
    char name[];
};

struct young_parent { /* a directory that has some */
    uint64_t node, count;
    struct young_parent *next;
};

#define YOUNG_PARENTS 4096 /* chains of them */

struct young_table {
    struct young **nodes, **names;
    size_t room; /* of each of the two, a power of two */
    size_t count, open;
    struct young *first, *last; /* of those that wait, in the order in which Python is to hear */
    size_t waiting;
    struct young_parent *parents[YOUNG_PARENTS];
};

static inline size_t young_hash(uint64_t parent, const char *name, size_t length) {
    uint64_t hash = parent * 0x9E3779B97F4A7C15u ^ length;
    for (size_t i = 0; i < length; i++) hash = (hash ^ (uint8_t)name[i]) * 0x100000001B3u;
    return hash ^ hash >> 29;
}

static inline struct young *young_by_node(const struct young_table *table, uint64_t node) {
    struct young *file = table->room ? table->nodes[node & (table->room - 1)] : NULL;
    while (file && file->node != node) file = file->next_node;
    return file;
}

static inline struct young *young_by_name(const struct young_table *table, uint64_t parent,
                                          const char *name, size_t length) {
    if (!table->room) return NULL;
    struct young *file = table->names[young_hash(parent, name, length) & (table->room - 1)];
    while (file && (file->parent != parent || file->length != length
                    || memcmp(file->name, name, length))) file = file->next_name;
    return file;
}

static inline void young_link(struct young_table *table, struct young *file) {
    struct young **head = &table->nodes[file->node & (table->room - 1)];
    file->next_node = *head;
    *head = file;
    if (file->gone) return;
    head = &table->names[young_hash(file->parent, file->name, file->length) & (table->room - 1)];
    file->next_name = *head;
    *head = file;
}

/* Make room for one more; 0: there is no memory. */
static inline int young_room(struct young_table *table) {
    struct young_table old = *table;
    if (table->count < table->room) return 1;
    table->room = old.room ? old.room * 2 : 1024;
    table->nodes = calloc(table->room, sizeof *table->nodes);
    table->names = calloc(table->room, sizeof *table->names);
    if (!table->nodes || !table->names) {
        free(table->nodes);
        free(table->names);
        *table = old;
        return 0;
    }
    for (size_t i = 0; i < old.room; i++)
        for (struct young *file = old.nodes[i], *next; file; file = next) {
            next = file->next_node;
            young_link(table, file);
        }
    free(old.nodes);
    free(old.names);
    return 1;
}

static inline struct young_parent **young_parent(struct young_table *table, uint64_t node) {
    struct young_parent **at = &table->parents[node % YOUNG_PARENTS];
    while (*at && (*at)->node != node) at = &(*at)->next;
    return at;
}

/* One file more, or fewer, that has its name in a directory; 0: there is no memory. */
static inline int young_count(struct young_table *table, uint64_t directory, int by) {
    struct young_parent **at = young_parent(table, directory), *parent = *at;
    if (!parent) {
        parent = calloc(1, sizeof *parent);
        if (!parent) return 0;
        parent->node = directory;
        *at = parent;
    }
    parent->count += by;
    if (!parent->count) {
        *at = parent->next;
        free(parent);
    }
    return 1;
}

static inline void young_wait(struct young_table *table, struct young *file) {
    file->before = table->last;
    file->after = NULL;
    *(table->last ? &table->last->after : &table->first) = file;
    table->last = file;
    table->waiting++;
    file->waits = 1;
}

static inline void young_heard(struct young_table *table, struct young *file) {
    if (!file->waits) return;
    *(file->before ? &file->before->after : &table->first) = file->after;
    *(file->after ? &file->after->before : &table->last) = file->before;
    table->waiting--;
    file->waits = 0;
}

static inline void young_unlink_name(struct young_table *table, struct young *file) {
    struct young **at =
        &table->names[young_hash(file->parent, file->name, file->length) & (table->room - 1)];
    while (*at != file) at = &(*at)->next_name;
    *at = file->next_name;
    young_count(table, file->parent, -1);
}

/* Nobody finds it any more; it stays for as long as Python is to hear of its name. */
static inline void young_remove(struct young_table *table, struct young *file) {
    struct young **at = &table->nodes[file->node & (table->room - 1)];
    while (*at != file) at = &(*at)->next_node;
    *at = file->next_node;
    if (!file->gone) young_unlink_name(table, file);
    table->count--;
    table->open -= file->descriptor >= 0;
    file->node = 0;
    if (!file->waits) free(file);
}

static inline struct young *young_new(const char *name, size_t length) {
    struct young *file = calloc(1, sizeof *file + length + 1);
    if (!file) return NULL;
    file->length = length;
    memcpy(file->name, name, length);
    return file;
}

/* --- system calls ----------------------------------------------------------------------- */

static inline int young_is_absent(int directory, const char *name) {
    struct stat status;
    return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) && errno == ENOENT;
}

/* Create a file as somebody; its descriptor, or -1. */
static inline int young_create(int directory, const char *name, int flags, unsigned mode,
                               uint32_t uid, uint32_t gid) {
    int file, as_other = uid != geteuid() || gid != getegid(), old_uid = 0, old_gid = 0;
    if (as_other) {
        old_gid = setfsgid(gid);
        old_uid = setfsuid(uid);
    }
    file = openat(directory, name, flags | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (as_other) {
        setfsuid(old_uid);
        setfsgid(old_gid);
    }
    return file;
}

/* The attributes of a regular file with one name; 0, or -1 where it is none. */
static inline int young_stat(int directory, const char *name, uint64_t mix,
                             struct fuse_attr *out) {
    struct stat status;
    if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW | (*name ? 0 : AT_EMPTY_PATH))
        || !S_ISREG(status.st_mode) || status.st_nlink != 1) return -1;
    wire_attributes(&status, out);
    out->ino ^= mix;
    return 0;
}

/* linux/fuse.h of 6.9 and later has these. */
struct young_backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};
#define YOUNG_BACKING_OPEN _IOW(229, 1, struct young_backing_map)
#define YOUNG_BACKING_CLOSE _IOW(229, 2, uint32_t)

/* Have the kernel read and write a file by itself: a backing id, or an errno below 0. */
static inline int young_register(int fuse, int file) {
    struct young_backing_map map = {.fd = file};
    int backing = ioctl(fuse, YOUNG_BACKING_OPEN, &map);
    return backing < 0 ? -errno : backing;
}

static inline void young_unregister(int fuse, uint32_t backing) {
    ioctl(fuse, YOUNG_BACKING_CLOSE, &backing);
}

/* What survival/farewell.py writes of a deleted file; behind its name, which has its length in
 * front. Returns how long it is. */
static inline size_t young_farewell(const struct young *file, const struct fuse_attr *last,
                                    char *out) {
    struct __attribute__((packed)) {
        uint32_t flags, kind;
        int64_t link_offset;
        int32_t layer;
        uint16_t lengths[3];
        uint64_t inode, size, blocks, device;
        int64_t times[3];
        uint64_t blksize, mode, links, uid, gid;
    } said = {
        .flags = 1 | 4 | ((file->flags & O_ACCMODE) == O_RDWR ? 8 : 0), /* in upper, has a last */
        .kind = S_IFREG,
        .layer = -1,
        .inode = last->ino,
        .size = last->size,
        .blocks = last->blocks,
        .times = {last->atime * 1000000000 + last->atimensec,
                  last->mtime * 1000000000 + last->mtimensec,
                  last->ctime * 1000000000 + last->ctimensec},
        .blksize = last->blksize,
        .mode = last->mode,
        .uid = last->uid,
        .gid = last->gid,
    };
    out[0] = file->length;
    memcpy(out + 1, file->name, file->length);
    memcpy(out + 1 + file->length, &said, sizeof said);
    return 1 + file->length + sizeof said;
}

static inline void young_die(void) { /* for tests */
    kill(getpid(), SIGKILL);
}
#endif
