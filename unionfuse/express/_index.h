/* Records of a lookup index as they lie in its file; see unionfuse/index/lookup.py. For _index.pxd alone. */
#ifndef UNIONFUSE_INDEX_H
#define UNIONFUSE_INDEX_H
#define XXH_INLINE_ALL
#include <stdint.h>
#include <xxhash.h>

struct index_node {
    uint32_t record, parent;
    uint16_t layer, flags;
    uint32_t length;
    uint64_t offset, places;
};
struct index_slot { uint32_t tag, record; };
#endif
