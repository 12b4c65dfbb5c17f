/*
 * The CPU backend's KV pool: where every key and value element lives, and nothing else. Elements are of
 * the geometry's dtype, whatever its kv_dtype: what fp8 rounds them to is the backend's business.
 *
 * LAYOUT. One anonymous mapping, page after page; a page holds its layers, a layer its KV heads, and a
 * head one tile of keys and then one of values, each contiguous:
 *
 *     page 0                                              page 1 ..
 *     | layer 0                          | layer 1 .. |
 *     | head 0          | head 1 ..      |
 *     | K tile | V tile | K tile | V tile |
 *
 * The kernels put tokens in the lanes of a vector for the scores, so that no sum across lanes is
 * needed, and output columns for the values. Both are read in granules of 32 elements:
 *
 *   K tile   blocks of 16 tokens; a block is [head_dim / 2] granules: dimensions 2i and 2i+1 of its 16
 *            tokens
 *   V tile   rows of one token; a row is [value_stride / 32] granules of 32 columns (value_stride is
 *            head_dim_v rounded up to 32; the padding is never looked at)
 *
 * A granule is two vectors of 16: `low` (dimension 2i; columns 0 .. 15) and `high` (dimension 2i+1;
 * columns 16 .. 31). In fp16 and fp32 they follow each other. In bf16 they are interleaved, low[0],
 * high[0], low[1], ..: one 32-bit lane holds both, so a shift and a mask give two vectors of float32,
 * and a lane of keys is the pair of dimensions that the BF16 dot product wants.
 *
 * Memory: reserved at creation, backed by huge pages as it is touched, so a pool costs what is used.
 *
 * Threads: any number may read; writers of different tokens may run at the same time; readers of a
 * token come after its writer (the backend's phases see to that).
 */
#ifndef ATTND_KERNELS_CPU_POOL_H
#define ATTND_KERNELS_CPU_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/attention.h"

#define ATTN_CPU_GRANULE      32 /* elements */
#define ATTN_CPU_BLOCK_TOKENS 16 /* tokens of a block of keys; every page size is a multiple */

typedef struct {
    attn_geometry geometry;
    uint32_t pages;
    uint32_t value_stride; /* elements of a value row */
    size_t key_block_bytes;
    size_t value_block_bytes; /* of ATTN_CPU_BLOCK_TOKENS rows */
    size_t key_tile_bytes;
    size_t head_bytes; /* a K tile and a V tile */
    size_t layer_bytes;
    size_t page_bytes;
    char *memory; /* owned */
    size_t bytes;
} attn_cpu_pool;

/* Reserves a pool. ATTN_RESOURCE_EXHAUSTED, saying how much was asked for. Undo with attn_cpu_pool_fini. */
attn_status attn_cpu_pool_init(attn_cpu_pool *pool, const attn_geometry *geometry, uint32_t pages);
void attn_cpu_pool_fini(attn_cpu_pool *pool);

/* The K tile of a page, layer and head, with the V tile behind it; NULL if the page is outside the pool. */
static inline const char *attn_cpu_pool_head(const attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t head) {
    if (page >= pool->pages) return NULL;
    return pool->memory + page * pool->page_bytes + layer * pool->layer_bytes + head * pool->head_bytes;
}

/*
 * Writes one token's key row (head_dim elements) and value row (head_dim_v), of any alignment, to
 * `slot` of a page. The page is in the pool and the slot in the page.
 */
void attn_cpu_pool_write(attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t slot, uint32_t head,
                         const void *key, const void *value);

/* Reads one token's key row back, as it was written: head_dim elements, of any alignment. */
void attn_cpu_pool_read_key(const attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t slot, uint32_t head,
                            void *key);

/* Reads one token's value row back, as it was written: head_dim_v elements, of any alignment. */
void attn_cpu_pool_read_value(const attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t slot, uint32_t head,
                              void *value);

/* Copies all layers of a page. Both are in the pool. */
void attn_cpu_pool_copy_page(attn_cpu_pool *pool, uint32_t from, uint32_t to);

/* Fills slots of a page with NaN, padding included. */
void attn_cpu_pool_poison(attn_cpu_pool *pool, uint32_t page, uint32_t first_slot, uint32_t slots);

#endif
