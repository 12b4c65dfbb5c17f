#include "kernels/prefixes.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/split_plan.h"

/* Worth it: at least one part in so many of the time is saved. */
enum { LEAST_SAVED = 6 };

/* Keeping and merging a row's results takes about as long as it takes the row to attend to so many tokens. */
enum { MERGE_TOKENS = 128 };

/* Places of the arrays, for vector loads and against false sharing. */
enum { ALIGNMENT = 64 };

static inline uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

void attn_sharing_init(attn_sharing *sharing, const attn_geometry *geometry, uint32_t block_queries,
                       uint32_t read_rows) {
    assert(block_queries >= 1 && read_rows >= 1);
    *sharing = (attn_sharing){.geometry = *geometry, .block_queries = block_queries, .read_rows = read_rows};
}

void attn_sharing_fini(attn_sharing *sharing) {
    free(sharing->memory);
    sharing->memory = NULL;
    sharing->memory_bytes = 0;
}

/* ------------------------------------------------------------------------------------------- */
/* Which prefixes are worth it, and what they need room for */

typedef struct {
    uint32_t members;
    uint32_t rows;  /* query rows of all members */
    uint32_t reads; /* sequences of `shared` */
} sharing_count;

/* Query rows of one read: whole row blocks, if there is room for one. */
static uint32_t rows_of_read(const attn_sharing *sharing) {
    uint32_t block = sharing->block_queries;
    return block < ATTN_MAX_QUERY_LENGTH ? ATTN_MAX_QUERY_LENGTH / block * block : ATTN_MAX_QUERY_LENGTH;
}

static uint32_t count_rows(const attn_batch *batch, const attn_prefix *prefix) {
    uint32_t rows = 0;
    for (uint32_t m = 0; m < prefix->count; m++)
        rows += batch->query_lengths[prefix->members[m]];
    return rows;
}

/* How long a token takes, in rows of one query head that attend to it: reading it in each block, or attending. */
static uint64_t cost_of(const attn_sharing *sharing, uint64_t query_rows) {
    uint64_t reading = divide_up(query_rows, sharing->block_queries) * sharing->read_rows;
    uint64_t attending = query_rows * (sharing->geometry.heads_q / sharing->geometry.heads_kv);
    return reading > attending ? reading : attending;
}

static bool is_worth_it(const attn_sharing *sharing, const attn_batch *batch, const attn_prefix *prefix) {
    uint64_t group = sharing->geometry.heads_q / sharing->geometry.heads_kv, rows = count_rows(batch, prefix);
    uint64_t apart = 0, all = 0, together = cost_of(sharing, rows), merging = rows * group * MERGE_TOKENS;
    for (uint32_t m = 0; m < prefix->count; m++) {
        uint32_t i = prefix->members[m];
        apart += cost_of(sharing, batch->query_lengths[i]);
        all += cost_of(sharing, batch->query_lengths[i]) * batch->lengths[i];
    }
    uint64_t saved = apart > together ? (apart - together) * prefix->tokens : 0;
    return saved > merging && (saved - merging) * LEAST_SAVED >= all;
}

static sharing_count count_sharing(const attn_sharing *sharing, const attn_batch *batch) {
    sharing_count count = {0};
    if (batch->window != 0 || batch->batch_invariant) return count;
    for (uint32_t p = 0; p < batch->prefix_count; p++) {
        const attn_prefix *prefix = &batch->prefixes[p];
        if (!is_worth_it(sharing, batch, prefix)) continue;
        uint32_t rows = count_rows(batch, prefix);
        count.members += prefix->count;
        count.rows += rows;
        count.reads += (uint32_t)divide_up(rows, rows_of_read(sharing));
    }
    return count;
}

/* ------------------------------------------------------------------------------------------- */
/* The memory: measured by carving from a NULL base, then carved in earnest */

/* The arrays that a split fills. */
typedef struct {
    uint32_t *own_lengths, *own_page_offsets;    /* [size], [size + 1] */
    attn_part *own_parts;                        /* [size] */
    attn_partial *own_partials;                  /* [size] */
    uint32_t *read_lengths, *read_query_lengths; /* [reads] */
    uint32_t *read_page_offsets;                 /* [reads + 1] */
    const void **read_queries;                   /* [reads] */
    attn_part *read_parts;                       /* [reads] */
    attn_partial *read_partials;                 /* [reads] */
    attn_sharing_member *members;                /* [members] */
    char *queries;                               /* [rows, h, d] the members' query rows */
    attn_partial prefix_results, own_results;    /* [rows, h, e] and [rows, h] each */
} sharing_arrays;

typedef struct {
    char *base;
    size_t used;
} carver;

static void *carve(carver *from, size_t count, size_t size) {
    size_t at = divide_up(from->used, ALIGNMENT) * ALIGNMENT;
    from->used = at + count * size;
    return from->base == NULL ? NULL : from->base + at;
}

static attn_partial carve_results(carver *from, const attn_geometry *geometry, uint32_t rows) {
    size_t heads = (size_t)rows * geometry->heads_q;
    attn_partial results = {.out = carve(from, heads * geometry->head_dim_v, sizeof(float))};
    results.lse = carve(from, heads, sizeof(float));
    return results;
}

static sharing_arrays carve_arrays(carver *from, const attn_geometry *geometry, uint32_t size, sharing_count count) {
    sharing_arrays arrays = {
        .own_lengths = carve(from, size, sizeof(uint32_t)),
        .own_page_offsets = carve(from, (size_t)size + 1, sizeof(uint32_t)),
        .own_parts = carve(from, size, sizeof(attn_part)),
        .own_partials = carve(from, size, sizeof(attn_partial)),
        .read_lengths = carve(from, count.reads, sizeof(uint32_t)),
        .read_query_lengths = carve(from, count.reads, sizeof(uint32_t)),
        .read_page_offsets = carve(from, (size_t)count.reads + 1, sizeof(uint32_t)),
        .read_queries = carve(from, count.reads, sizeof(void *)),
        .read_parts = carve(from, count.reads, sizeof(attn_part)),
        .read_partials = carve(from, count.reads, sizeof(attn_partial)),
        .members = carve(from, count.members, sizeof(attn_sharing_member)),
        .queries = carve(from, count.rows, attn_query_row_bytes(geometry)),
    };
    arrays.prefix_results = carve_results(from, geometry, count.rows);
    arrays.own_results = carve_results(from, geometry, count.rows);
    return arrays;
}

static attn_status reserve_memory(attn_sharing *sharing, size_t bytes) {
    if (bytes <= sharing->memory_bytes) return attn_ok();
    size_t grown = divide_up(bytes + bytes / 2, ALIGNMENT) * ALIGNMENT;
    attn_sharing_fini(sharing);
    sharing->memory = aligned_alloc(ALIGNMENT, grown);
    if (!sharing->memory) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for partial results of shared prefixes: %zu MiB",
                          grown >> 20);
    }
    sharing->memory_bytes = grown;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Splitting */

/* The results of row `row` and on. */
static attn_partial results_at(const attn_geometry *geometry, const attn_partial *results, uint32_t row) {
    size_t index = (size_t)row * geometry->heads_q;
    return (attn_partial){.out = results->out + index * geometry->head_dim_v, .lse = results->lse + index};
}

/* `own` before any prefix is taken from it: the batch itself. */
static void copy_batch(sharing_arrays *arrays, const attn_batch *batch) {
    memcpy(arrays->own_lengths, batch->lengths, batch->size * sizeof *arrays->own_lengths);
    memcpy(arrays->own_page_offsets, batch->page_offsets, (batch->size + (size_t)1) * sizeof *arrays->own_page_offsets);
    if (batch->parts) {
        memcpy(arrays->own_parts, batch->parts, batch->size * sizeof *arrays->own_parts);
        memcpy(arrays->own_partials, batch->partials, batch->size * sizeof *arrays->own_partials);
    } else {
        memset(arrays->own_parts, 0, batch->size * sizeof *arrays->own_parts);
        memset(arrays->own_partials, 0, batch->size * sizeof *arrays->own_partials);
    }
}

/* Sequence i, a member of the prefix: its queries are rows `row` and on of the prefix's, and it keeps what is its own.
 */
static void take_member(attn_sharing *sharing, sharing_arrays *arrays, const attn_batch *batch,
                        const attn_prefix *prefix, uint32_t i, uint32_t row) {
    const attn_geometry *geometry = &sharing->geometry;
    size_t row_bytes = attn_query_row_bytes(geometry);
    memcpy(arrays->queries + row * row_bytes, batch->queries[i], batch->query_lengths[i] * row_bytes);
    arrays->members[sharing->member_count++] =
        (attn_sharing_member){.sequence = i, .prefix = results_at(geometry, &arrays->prefix_results, row)};
    arrays->own_lengths[i] -= prefix->tokens;
    arrays->own_page_offsets[i] += prefix->tokens / geometry->page_size;
    arrays->own_parts[i] = (attn_part){
        .chunk_first = prefix->tokens / ATTN_CHUNK_TOKENS,
        .chunk_stride = 1,
        .total_length = batch->lengths[i],
        .new_count = attn_batch_new_rows(batch, i),
    };
    arrays->own_partials[i] = results_at(geometry, &arrays->own_results, row);
}

/* One more sequence of `shared`: a read of the prefix by query rows row .. row + rows - 1. */
static void add_read(attn_sharing *sharing, sharing_arrays *arrays, const attn_batch *batch, const attn_prefix *prefix,
                     uint32_t row, uint32_t rows) {
    uint32_t n = sharing->shared.size++;
    arrays->read_lengths[n] = prefix->tokens;
    arrays->read_query_lengths[n] = rows;
    arrays->read_page_offsets[n] = batch->page_offsets[prefix->members[0]];
    arrays->read_queries[n] = arrays->queries + row * attn_query_row_bytes(&sharing->geometry);
    arrays->read_parts[n] = (attn_part){.chunk_first = 0, .chunk_stride = 1, .total_length = prefix->tokens};
    arrays->read_partials[n] = results_at(&sharing->geometry, &arrays->prefix_results, row);
}

static void take_prefix(attn_sharing *sharing, sharing_arrays *arrays, const attn_batch *batch,
                        const attn_prefix *prefix) {
    uint32_t first = sharing->member_rows, most = rows_of_read(sharing);
    for (uint32_t m = 0; m < prefix->count; m++) {
        uint32_t i = prefix->members[m];
        take_member(sharing, arrays, batch, prefix, i, sharing->member_rows);
        sharing->member_rows += batch->query_lengths[i];
    }
    for (uint32_t row = first; row < sharing->member_rows; row += most) {
        uint32_t rest = sharing->member_rows - row;
        add_read(sharing, arrays, batch, prefix, row, rest < most ? rest : most);
    }
}

/* Both batches over the arrays, which are yet to be filled; `shared` without any read. */
static void lay_out(attn_sharing *sharing, const sharing_arrays *arrays, const attn_batch *batch) {
    sharing->batch = batch;
    sharing->members = arrays->members;
    sharing->member_count = sharing->member_rows = 0;
    sharing->own = *batch;
    sharing->own.lengths = arrays->own_lengths;
    sharing->own.page_offsets = arrays->own_page_offsets;
    sharing->own.parts = arrays->own_parts;
    sharing->own.partials = arrays->own_partials;
    sharing->own.prefixes = NULL;
    sharing->own.prefix_count = 0;
    sharing->shared = (attn_batch){
        .layer = batch->layer,
        .lengths = arrays->read_lengths,
        .query_lengths = arrays->read_query_lengths,
        .page_offsets = arrays->read_page_offsets,
        .pages = batch->pages,
        .queries = arrays->read_queries,
        .parts = arrays->read_parts,
        .partials = arrays->read_partials,
        .scale = batch->scale,
        .softcap = batch->softcap,
        .device_time = batch->device_time,
    };
}

attn_status attn_sharing_split(attn_sharing *sharing, const attn_batch *batch, bool *shares) {
    sharing_count count = count_sharing(sharing, batch);
    *shares = count.members > 0;
    if (!*shares) return attn_ok();
    carver measure = {0};
    carve_arrays(&measure, &sharing->geometry, batch->size, count);
    ATTN_TRY(reserve_memory(sharing, measure.used));
    assert(sharing->memory != NULL);
    carver earnest = {.base = sharing->memory};
    sharing_arrays arrays = carve_arrays(&earnest, &sharing->geometry, batch->size, count);
    lay_out(sharing, &arrays, batch);
    copy_batch(&arrays, batch);
    for (uint32_t p = 0; p < batch->prefix_count; p++) {
        if (is_worth_it(sharing, batch, &batch->prefixes[p])) take_prefix(sharing, &arrays, batch, &batch->prefixes[p]);
    }
    arrays.read_page_offsets[sharing->shared.size] = batch->page_offsets[batch->size];
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Merging */

void attn_sharing_merge(const attn_sharing *sharing, uint32_t first, uint32_t end) {
    const attn_batch *batch = sharing->batch;
    for (uint32_t m = first; m < end; m++) {
        uint32_t i = sharing->members[m].sequence;
        const attn_partial partials[2] = {sharing->members[m].prefix, sharing->own.partials[i]};
        attn_combine(partials, 2, batch->query_lengths[i], sharing->geometry.heads_q, sharing->geometry.head_dim_v,
                     batch->sinks, sharing->geometry.dtype, batch->outs[i], batch->lses ? batch->lses[i] : NULL);
    }
}
