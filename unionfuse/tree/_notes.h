/* For _notes.pyx alone. */
#include <stdint.h>

/* A store that comes after all stores before it, and before all that follow: who is killed leaves
 * what was executed, and the compiler must not change its order. */
static inline void notes_store(uint64_t *place, uint64_t value) {
    __atomic_store_n(place, value, __ATOMIC_SEQ_CST);
}
