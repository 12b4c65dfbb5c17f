#include "dp/results.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define ALIGNMENT      64
#define SMALLEST_SHIFT 12
#define CLASSES        36

/* A block: this header, then out, then lse. On a class's free list it is guarded by the class's lock. */
typedef struct block {
    dp_result result; /* first: a dp_result is its block */
    dp_results *pool;
    struct block *next;
    uint32_t class;
} block;

#define HEADER_BYTES ((sizeof(block) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT)

typedef struct {
    pthread_mutex_t lock;
    block *free; /* guarded by lock */
} size_class;

struct dp_results {
    atomic_size_t references; /* blocks that are out, and one while open */
    size_class classes[CLASSES];
};

dp_results *dp_results_create(void) {
    dp_results *results = calloc(1, sizeof *results);
    if (results == NULL) return NULL;
    atomic_init(&results->references, 1);
    for (uint32_t i = 0; i < CLASSES; i++)
        pthread_mutex_init(&results->classes[i].lock, NULL);
    return results;
}

static void results_unreference(dp_results *results) {
    if (atomic_fetch_sub_explicit(&results->references, 1, memory_order_acq_rel) != 1) return;
    for (uint32_t i = 0; i < CLASSES; i++) {
        for (block *next, *each = results->classes[i].free; each != NULL; each = next) {
            next = each->next;
            free(each);
        }
        pthread_mutex_destroy(&results->classes[i].lock);
    }
    free(results);
}

void dp_results_close(dp_results *results) {
    if (results != NULL) results_unreference(results);
}

static size_t round_up(size_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static block *class_pop(size_class *class) {
    pthread_mutex_lock(&class->lock);
    block *taken = class->free;
    if (taken != NULL) class->free = taken->next;
    pthread_mutex_unlock(&class->lock);
    return taken;
}

dp_result *dp_results_take(dp_results *results, size_t out_size, size_t lse_size) {
    size_t bytes = HEADER_BYTES + round_up(out_size) + round_up(lse_size);
    uint32_t class = 0;
    while (class < CLASSES && (size_t)1 << (SMALLEST_SHIFT + class) < bytes)
        class ++;
    if (class == CLASSES) return NULL;
    block *taken = class_pop(&results->classes[class]);
    if (taken == NULL) {
        taken = aligned_alloc(ALIGNMENT, (size_t)1 << (SMALLEST_SHIFT + class));
        if (taken == NULL) return NULL;
        taken->pool = results;
        taken->class = class;
    }
    atomic_fetch_add_explicit(&results->references, 1, memory_order_relaxed);
    char *out = (char *)taken + HEADER_BYTES;
    taken->result.out = out;
    taken->result.out_size = out_size;
    taken->result.lse = lse_size > 0 ? (float *)(void *)(out + round_up(out_size)) : NULL;
    taken->result.lse_size = lse_size;
    return &taken->result;
}

void dp_result_release(dp_result *result) {
    if (result == NULL) return;
    block *released = (block *)result;
    dp_results *pool = released->pool;
    size_class *class = &pool->classes[released->class];
    pthread_mutex_lock(&class->lock);
    released->next = class->free;
    class->free = released;
    pthread_mutex_unlock(&class->lock);
    results_unreference(pool);
}
