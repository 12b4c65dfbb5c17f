#define _GNU_SOURCE /* mmap flags */
#include "kernels/cpu/pool.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_PAGE_BYTES ((size_t)2 << 20)

/* ------------------------------------------------------------------------------------------- */
/* Memory */

static void lay_out(attn_cpu_pool *pool, const attn_geometry *geometry, uint32_t pages) {
    size_t element = attn_dtype_bytes(geometry->dtype);
    pool->geometry = *geometry;
    pool->pages = pages;
    pool->value_stride = (geometry->head_dim_v + ATTN_CPU_GRANULE - 1) / ATTN_CPU_GRANULE * ATTN_CPU_GRANULE;
    pool->key_block_bytes = ATTN_CPU_BLOCK_TOKENS * geometry->head_dim * element;
    pool->value_block_bytes = ATTN_CPU_BLOCK_TOKENS * pool->value_stride * element;
    size_t blocks = geometry->page_size / ATTN_CPU_BLOCK_TOKENS;
    pool->key_tile_bytes = blocks * pool->key_block_bytes;
    pool->head_bytes = pool->key_tile_bytes + blocks * pool->value_block_bytes;
    pool->layer_bytes = geometry->heads_kv * pool->head_bytes;
    pool->page_bytes = geometry->layers * pool->layer_bytes;
}

attn_status attn_cpu_pool_init(attn_cpu_pool *pool, const attn_geometry *geometry, uint32_t pages) {
    lay_out(pool, geometry, pages);
    pool->memory = NULL;
    size_t payload;
    if (__builtin_mul_overflow(pool->page_bytes, pages, &payload) ||
        __builtin_add_overflow(payload, 2 * HUGE_PAGE_BYTES, &pool->bytes)) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "a KV pool of %u pages of %zu bytes is more than an address space",
                          pages, pool->page_bytes);
    }
    void *memory = mmap(NULL, pool->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a KV pool of %.1f MiB (%u pages of %zu bytes): %s",
                          (double)payload / (1 << 20), pages, pool->page_bytes, strerror(errno));
    }
    /* The kernel may have no huge pages to give; the pool then works with small ones. */
    madvise(memory, pool->bytes, MADV_HUGEPAGE);
    pool->memory = memory;
    return attn_ok();
}

void attn_cpu_pool_fini(attn_cpu_pool *pool) {
    if (pool->memory != NULL) munmap(pool->memory, pool->bytes);
    pool->memory = NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Places of elements */

static char *head_memory(const attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t head) {
    return pool->memory + page * pool->page_bytes + layer * pool->layer_bytes + head * pool->head_bytes;
}

/* The lane of a token in its block of keys: where its dimension 0 is. */
static char *key_lane(const attn_cpu_pool *pool, char *head, uint32_t slot) {
    size_t element = attn_dtype_bytes(pool->geometry.dtype);
    size_t lane_bytes = pool->geometry.dtype == ATTN_BF16 ? 2 * element : element;
    return head + slot / ATTN_CPU_BLOCK_TOKENS * pool->key_block_bytes + slot % ATTN_CPU_BLOCK_TOKENS * lane_bytes;
}

static char *value_row(const attn_cpu_pool *pool, char *head, uint32_t slot) {
    return head + pool->key_tile_bytes + slot * (pool->value_block_bytes / ATTN_CPU_BLOCK_TOKENS);
}

static void write_key_bf16(char *lane, const char *key, uint32_t head_dim) {
    for (uint32_t i = 0; i < head_dim / 2; i++) {
        memcpy(lane + (size_t)i * ATTN_CPU_GRANULE * 2, key + (size_t)i * 4, 4);
    }
}

static void write_key_fp16(char *lane, const char *key, uint32_t head_dim) {
    for (uint32_t i = 0; i < head_dim; i++) {
        memcpy(lane + (size_t)i * ATTN_CPU_BLOCK_TOKENS * 2, key + (size_t)i * 2, 2);
    }
}

static void write_key_fp32(char *lane, const char *key, uint32_t head_dim) {
    for (uint32_t i = 0; i < head_dim; i++) {
        memcpy(lane + (size_t)i * ATTN_CPU_BLOCK_TOKENS * 4, key + (size_t)i * 4, 4);
    }
}

/* Columns c and c + 16 of each granule go side by side. */
static void write_value_bf16(char *row, const char *value, uint32_t head_dim_v) {
    for (uint32_t c = 0; c < head_dim_v; c++) {
        uint32_t place = c / 32 * 32 + c % 16 * 2 + c / 16 % 2;
        memcpy(row + (size_t)place * 2, value + (size_t)c * 2, 2);
    }
}

void attn_cpu_pool_write(attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t slot, uint32_t head,
                         const void *key, const void *value) {
    const attn_geometry *geometry = &pool->geometry;
    char *memory = head_memory(pool, layer, page, head);
    char *lane = key_lane(pool, memory, slot);
    char *row = value_row(pool, memory, slot);
    switch (geometry->dtype) {
    case ATTN_BF16:
        write_key_bf16(lane, key, geometry->head_dim);
        write_value_bf16(row, value, geometry->head_dim_v);
        break;
    case ATTN_FP16:
        write_key_fp16(lane, key, geometry->head_dim);
        memcpy(row, value, (size_t)geometry->head_dim_v * 2);
        break;
    case ATTN_FP32:
        write_key_fp32(lane, key, geometry->head_dim);
        memcpy(row, value, (size_t)geometry->head_dim_v * 4);
        break;
    case ATTN_FP8_E4M3: break; /* no dtype of rows */
    }
}

/* The other way round, a granule at a time: its low halves, then its high ones. */
static void read_value_bf16(const char *row, char *value, uint32_t head_dim_v) {
    for (uint32_t first = 0; first < head_dim_v; first += ATTN_CPU_GRANULE) {
        uint32_t pairs[16];
        uint16_t columns[ATTN_CPU_GRANULE];
        memcpy(pairs, row + (size_t)first * 2, sizeof pairs);
        for (uint32_t c = 0; c < 16; c++) {
            columns[c] = (uint16_t)pairs[c];
            columns[16 + c] = (uint16_t)(pairs[c] >> 16);
        }
        uint32_t count = head_dim_v - first < ATTN_CPU_GRANULE ? head_dim_v - first : ATTN_CPU_GRANULE;
        memcpy(value + (size_t)first * 2, columns, (size_t)count * 2);
    }
}

void attn_cpu_pool_read_key(const attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t slot, uint32_t head,
                            void *key) {
    const attn_geometry *geometry = &pool->geometry;
    const char *lane = key_lane(pool, head_memory(pool, layer, page, head), slot);
    bool is_paired = geometry->dtype == ATTN_BF16; /* two dimensions side by side */
    size_t element = attn_dtype_bytes(geometry->dtype), bytes = is_paired ? 2 * element : element;
    size_t step = ATTN_CPU_BLOCK_TOKENS * bytes, count = geometry->head_dim * element / bytes;
    for (size_t i = 0; i < count; i++)
        memcpy((char *)key + i * bytes, lane + i * step, bytes);
}

void attn_cpu_pool_read_value(const attn_cpu_pool *pool, uint32_t layer, uint32_t page, uint32_t slot, uint32_t head,
                              void *value) {
    const attn_geometry *geometry = &pool->geometry;
    const char *row = value_row(pool, head_memory(pool, layer, page, head), slot);
    if (geometry->dtype == ATTN_BF16) {
        read_value_bf16(row, value, geometry->head_dim_v);
    } else {
        memcpy(value, row, geometry->head_dim_v * attn_dtype_bytes(geometry->dtype));
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Whole pages */

void attn_cpu_pool_copy_page(attn_cpu_pool *pool, uint32_t from, uint32_t to) {
    memcpy(head_memory(pool, 0, to, 0), head_memory(pool, 0, from, 0), pool->page_bytes);
}

static void poison_slot(attn_cpu_pool *pool, char *head, uint32_t slot) {
    size_t element = attn_dtype_bytes(pool->geometry.dtype);
    char *lane = key_lane(pool, head, slot);
    char nan_row[256 * 4];
    memset(nan_row, 0xff, sizeof nan_row); /* all ones is a NaN in every dtype */
    switch (pool->geometry.dtype) {
    case ATTN_BF16: write_key_bf16(lane, nan_row, pool->geometry.head_dim); break;
    case ATTN_FP16: write_key_fp16(lane, nan_row, pool->geometry.head_dim); break;
    case ATTN_FP32: write_key_fp32(lane, nan_row, pool->geometry.head_dim); break;
    case ATTN_FP8_E4M3: break; /* no dtype of rows */
    }
    memset(value_row(pool, head, slot), 0xff, pool->value_stride * element);
}

void attn_cpu_pool_poison(attn_cpu_pool *pool, uint32_t page, uint32_t first_slot, uint32_t slots) {
    for (uint32_t layer = 0; layer < pool->geometry.layers; layer++) {
        for (uint32_t head = 0; head < pool->geometry.heads_kv; head++) {
            for (uint32_t slot = first_slot; slot < first_slot + slots; slot++) {
                poison_slot(pool, head_memory(pool, layer, page, head), slot);
            }
        }
    }
}
