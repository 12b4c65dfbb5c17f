#include "kernels/cuda/backend/pack.h"

#include <stdatomic.h>
#include <string.h>

/* Uploads of their own cost more than copies of fewer bytes. */
#define UPLOADED_BY_ITSELF ((size_t)64 << 10)

/* ------------------------------------------------------------------------------------------- */
/* Counting */

static uint32_t pages_of(const attn_geometry *geometry, uint32_t length) {
    return (uint32_t)(((uint64_t)length + geometry->page_size - 1) / geometry->page_size);
}

/*
 * Are prefixes read once for all that share them? Where a fast kernel does the call, nothing else of it is in parts,
 * and it is worth the larger row blocks: a quarter of what there is to read is saved.
 */
static bool shares_prefixes(const cuda_backend *self, const attn_batch *batch) {
    if (!self->is_fast || batch->batch_invariant || batch->window != 0 || batch->parts != NULL) return false;
    uint64_t tokens = 0, saved = 0;
    for (uint32_t i = 0; i < batch->size; i++)
        tokens += batch->lengths[i];
    for (uint32_t p = 0; p < batch->prefix_count; p++)
        saved += (uint64_t)(batch->prefixes[p].count - 1) * batch->prefixes[p].tokens;
    return saved > 0 && 4 * saved >= tokens;
}

static uint32_t rows_of_prefix(const attn_batch *batch, const attn_prefix *prefix) {
    uint32_t rows = 0;
    for (uint32_t m = 0; m < prefix->count; m++)
        rows += batch->query_lengths[prefix->members[m]];
    return rows;
}

/* The prefixes become sequences, too, with the queries of all that share them. */
static void count_prefixes(const attn_batch *batch, tally *count) {
    count->prefixes = batch->prefix_count;
    for (uint32_t p = 0; p < batch->prefix_count; p++) {
        uint32_t rows = rows_of_prefix(batch, &batch->prefixes[p]);
        count->sharing += batch->prefixes[p].count;
        count->shared_rows += rows;
        if (rows > count->most_sharing_queries) count->most_sharing_queries = rows;
    }
}

tally attn_cuda_count(const cuda_backend *self, const attn_batch *batch) {
    tally count = {.shortest = UINT32_MAX};
    uint64_t units = 0;
    const attn_line *line = &self->base.line;
    for (uint32_t i = 0; i < batch->size; i++) {
        uint32_t queries = batch->query_lengths[i];
        units += (queries + line->block_queries - 1) / line->block_queries * self->base.geometry.heads_kv;
        count.rows += queries;
        count.new_rows += attn_batch_new_rows(batch, i);
        count.pages += pages_of(&self->base.geometry, batch->lengths[i]);
        if (queries > count.most_queries) count.most_queries = queries;
        if (batch->lengths[i] < count.shortest) count.shortest = batch->lengths[i];
        if (batch->lengths[i] > count.longest) count.longest = batch->lengths[i];
        if (attn_batch_part(batch, i) == NULL) continue;
        count.partial_rows += queries * (batch->batch_invariant ? attn_cuda_chunks(batch->lengths[i]) : 1);
    }
    if (shares_prefixes(self, batch)) count_prefixes(batch, &count);
    uint64_t total = attn_line_total(line), wave = total < self->slots ? total : self->slots;
    /* A chunk a tile; or a run a unit, and one more where a worker begins. */
    count.pieces = batch->batch_invariant ? wave : units + line->workers;
    count.merges = batch->batch_invariant ? wave : line->workers;
    count.slots = batch->batch_invariant ? wave : 2 * (uint64_t)line->workers;
    return count;
}

/* ------------------------------------------------------------------------------------------- */
/* Laying out */

/* Rows that come from where they are have device memory of their own; the others are uploaded with the tables. */
static void lay_out(const cuda_backend *self, const flight *of, const tally *count, carver *up, carver *rows,
                    carver *down, call_memory *memory) {
    const attn_batch *batch = of->batch;
    const attn_geometry *geometry = &self->base.geometry;
    row_bytes row = attn_cuda_device_row(self);
    size_t query_rows = (size_t)count->rows * geometry->heads_q;
    size_t new_rows = (size_t)count->new_rows * geometry->heads_kv;
    size_t partial_rows = (size_t)count->partial_rows * geometry->heads_q;
    memory->sequences = attn_cuda_carve(up, (batch->size + count->prefixes) * sizeof(attn_cuda_sequence));
    if (count->prefixes > 0) {
        memory->order = attn_cuda_carve(up, batch->size * sizeof(uint32_t));
        memory->is_sharing = attn_cuda_carve(up, batch->size * sizeof(uint32_t));
    }
    memory->lengths = attn_cuda_carve(up, batch->size * sizeof(uint32_t));
    memory->page_offsets = attn_cuda_carve(up, batch->size * sizeof(uint32_t));
    memory->page_table = attn_cuda_carve(up, count->pages * sizeof(uint32_t));
    memory->places = attn_cuda_carve(up, count->new_rows * sizeof(uint32_t));
    if (!of->in_place.ins) rows = up;
    memory->queries = attn_cuda_carve(rows, query_rows * row.key);
    memory->keys = attn_cuda_carve(rows, new_rows * row.key);
    memory->values = attn_cuda_carve(rows, new_rows * row.value);
    memory->sinks = attn_cuda_carve(up, geometry->heads_q * sizeof(float));
    memory->first_pieces = attn_cuda_carve(up, (self->base.line.workers + 1) * sizeof(uint32_t));
    memory->merges = attn_cuda_carve(up, count->merges * sizeof(attn_cuda_merge));
    memory->slots = attn_cuda_carve(up, count->slots * sizeof(uint32_t));
    memory->pieces =
        attn_cuda_carve(up, count->pieces * sizeof(attn_cuda_piece)); /* last: only those in use are uploaded */

    memory->out = attn_cuda_carve(down, query_rows * row.value);
    memory->lse = attn_cuda_carve(down, query_rows * sizeof(float));
    memory->partial_out = attn_cuda_carve(down, partial_rows * self->layer.head_dim_v * sizeof(float));
    memory->partial_lse = attn_cuda_carve(down, partial_rows * sizeof(float));
}

/*
 * Which of the batch's rows stay where they are. Uploads of their own cost more than copies of few bytes; parts, and
 * sequences that share a prefix, have rows in another order.
 */
static attn_cuda_rows_in_place rows_that_stay(const cuda_backend *self, const flight *next, const tally *count) {
    if (!attn_cuda_has_rows_as_they_are(self) || next->batch->parts != NULL || count->prefixes > 0) {
        return (attn_cuda_rows_in_place){0};
    }
    attn_cuda_rows_in_place found = attn_cuda_find_rows(&self->borrowed, &self->base.geometry, next->batch);
    if (next->in_bytes < UPLOADED_BY_ITSELF) found.ins = false;
    return found;
}

bool attn_cuda_reserve(const cuda_backend *self, flight *next, const tally *count, attn_status *status) {
    const attn_geometry *geometry = &self->base.geometry;
    row_bytes row = attn_cuda_device_row(self);
    carver up = {0}, rows = {0}, down = {0};
    size_t query_rows = (size_t)count->rows * geometry->heads_q;
    size_t new_rows = (size_t)count->new_rows * geometry->heads_kv;
    next->in_bytes = query_rows * row.key + new_rows * (row.key + row.value);
    next->out_bytes = query_rows * row.value;
    next->in_place = rows_that_stay(self, next, count);
    next->memory = (call_memory){.status = next->status};
    lay_out(self, next, count, &up, &rows, &down, &next->memory);
    if (!attn_cuda_arena_reserve(&next->up, up.used, status) ||
        !attn_cuda_arena_reserve(&next->rows, rows.used, status) ||
        !attn_cuda_arena_reserve(&next->down, down.used, status)) {
        return false;
    }
    up = (carver){.memory = &next->up};
    rows = (carver){.memory = &next->rows};
    down = (carver){.memory = &next->down};
    lay_out(self, next, count, &up, &rows, &down, &next->memory);
    if (next->in_place.outs) next->memory.out.device = next->in_place.device_outs;
    if (next->in_place.outs && next->in_place.device_lses != NULL) {
        next->memory.lse.device = next->in_place.device_lses;
    }
    return true;
}

/* ------------------------------------------------------------------------------------------- */
/* Tables */

/* How far a call's rows are packed. */
typedef struct {
    uint32_t sequence, row, partial_row, new_row, page;
} packed;

/* Packs sequence i's page table, and where its rows go. */
static void pack_sequence(const cuda_backend *self, const attn_batch *batch, const call_memory *memory, packed *at,
                          uint32_t i) {
    const attn_geometry *geometry = &self->base.geometry;
    const attn_part *part = attn_batch_part(batch, i);
    const uint32_t *pages = batch->pages + batch->page_offsets[i];
    uint32_t queries = batch->query_lengths[i], new_rows = attn_batch_new_rows(batch, i);
    uint32_t page_count = pages_of(geometry, batch->lengths[i]);
    ((attn_cuda_sequence *)memory->sequences.host)[at->sequence] = (attn_cuda_sequence){
        .length = batch->lengths[i],
        .query_length = queries,
        .is_read = attn_batch_is_read(batch, i),
        .chunk_first = part ? part->chunk_first : 0,
        .chunk_stride = part ? part->chunk_stride : 0,
        .page_offset = at->page,
        .first_query = at->row,
        .first_out = part ? at->partial_row : at->row,
        .chunk_rows = part && batch->batch_invariant ? queries : 0,
        .new_rows = new_rows,
        .first_new = at->new_row,
        .total_length = part ? part->total_length : batch->lengths[i],
    };
    ((uint32_t *)memory->lengths.host)[at->sequence] = batch->lengths[i];
    ((uint32_t *)memory->page_offsets.host)[at->sequence] = at->page;
    memcpy((uint32_t *)memory->page_table.host + at->page, pages, page_count * sizeof *pages);
    for (uint32_t t = batch->lengths[i] - new_rows; t < batch->lengths[i]; t++) {
        ((uint32_t *)memory->places.host)[at->new_row++] =
            pages[t / geometry->page_size] * geometry->page_size + t % geometry->page_size;
    }
    at->sequence++;
    at->row += queries;
    at->page += page_count;
    if (part) at->partial_row += queries * (batch->batch_invariant ? attn_cuda_chunks(batch->lengths[i]) : 1);
}

/*
 * Packs the sequences that share a prefix, which go on after it. The prefix becomes sequence `entry`, which reads with
 * the queries of all of them: its partial row j is of query row j.
 */
static void pack_prefix(const cuda_backend *self, const attn_batch *batch, const call_memory *memory, packed *at,
                        const attn_prefix *prefix, uint32_t entry) {
    attn_cuda_sequence *sequences = memory->sequences.host;
    uint32_t first_row = at->row, first_page = at->page;
    for (uint32_t m = 0; m < prefix->count; m++) {
        uint32_t k = at->sequence;
        ((uint32_t *)memory->order.host)[k] = prefix->members[m];
        pack_sequence(self, batch, memory, at, prefix->members[m]);
        sequences[k].length -= prefix->tokens;
        sequences[k].total_length -= prefix->tokens;
        sequences[k].page_offset += prefix->tokens / self->base.geometry.page_size;
        ((uint32_t *)memory->lengths.host)[k] = sequences[k].length;
        ((uint32_t *)memory->page_offsets.host)[k] = sequences[k].page_offset;
    }
    sequences[entry] = (attn_cuda_sequence){
        .length = prefix->tokens,
        .query_length = at->row - first_row,
        .is_read = true,
        .page_offset = first_page,
        .first_query = first_row,
        .first_out = first_row,
        .is_prefix = true,
        .total_length = prefix->tokens,
    };
}

/* Packs the sequences that share a prefix before all others. `at->sequence` counts those that are packed. */
static void pack_prefixes(const cuda_backend *self, const attn_batch *batch, const call_memory *memory, packed *at) {
    uint32_t *order = memory->order.host, *is_sharing = memory->is_sharing.host;
    for (uint32_t p = 0; p < batch->prefix_count; p++)
        pack_prefix(self, batch, memory, at, &batch->prefixes[p], batch->size + p);
    uint32_t next = at->sequence;
    memset(is_sharing, 0, batch->size * sizeof *is_sharing);
    for (uint32_t k = 0; k < at->sequence; k++)
        is_sharing[order[k]] = 1;
    for (uint32_t i = 0; i < batch->size; i++) {
        if (!is_sharing[i]) order[next++] = i;
    }
}

/* The sequence of the batch that is packed as the k-th. */
static uint32_t sequence_at(const call_memory *memory, uint32_t k) {
    const uint32_t *order = memory->order.host;
    return order == NULL ? k : order[k];
}

/* Page tables, and where rows go. */
static void pack_tables(const cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                        const tally *count) {
    packed at = {0};
    if (count->prefixes > 0) pack_prefixes(self, batch, memory, &at);
    while (at.sequence < batch->size)
        pack_sequence(self, batch, memory, &at, sequence_at(memory, at.sequence));
    if (batch->sinks) memcpy(memory->sinks.host, batch->sinks, self->base.geometry.heads_q * sizeof(float));
}

/* ------------------------------------------------------------------------------------------- */
/* Rows to pinned memory and back, by several threads where there are many */

/* Less is copied by the calling thread before others are awake. */
#define COPIED_TOGETHER ((size_t)128 << 10)

typedef struct copying copying;
struct copying {
    const cuda_backend *self;
    const attn_batch *batch;
    const call_memory *memory;
    void (*copy)(const copying *rows, uint32_t k); /* the rows of the k-th packed sequence */
    atomic_uint next;
};

static void copy_some(void *context, uint32_t worker) {
    copying *rows = context;
    (void)worker;
    for (uint32_t k; (k = atomic_fetch_add(&rows->next, 1)) < rows->batch->size;)
        rows->copy(rows, k);
}

/* `bytes`: of all rows. */
static void copy_all(copying *rows, size_t bytes) {
    if (rows->self->copiers == NULL || bytes < COPIED_TOGETHER)
        copy_some(rows, 0);
    else
        attn_cpu_workers_run(rows->self->copiers, copy_some, rows);
}

/* Queries and new rows. */
static void copy_in(const copying *rows, uint32_t k) {
    const attn_geometry *geometry = &rows->self->base.geometry;
    const attn_cuda_sequence *to = (const attn_cuda_sequence *)rows->memory->sequences.host + k;
    row_bytes there = attn_cuda_device_row(rows->self), here = attn_cuda_host_row(rows->self);
    uint32_t i = sequence_at(rows->memory, k);
    char *queries = (char *)rows->memory->queries.host + (size_t)to->first_query * geometry->heads_q * there.key;
    attn_cuda_copy_rows(queries, there.key, rows->batch->queries[i], here.key,
                        (size_t)to->query_length * geometry->heads_q);
    if (to->new_rows == 0) return;
    size_t first = (size_t)to->first_new * geometry->heads_kv, count = (size_t)to->new_rows * geometry->heads_kv;
    char *keys = (char *)rows->memory->keys.host + first * there.key;
    char *values = (char *)rows->memory->values.host + first * there.value;
    attn_cuda_copy_rows(keys, there.key, rows->batch->new_keys[i], here.key, count);
    attn_cuda_copy_rows(values, there.value, rows->batch->new_values[i], here.value, count);
}

/* Partial results of a part, or outputs. */
static void copy_out(const copying *rows, uint32_t k) {
    const cuda_backend *self = rows->self;
    const attn_batch *batch = rows->batch;
    const attn_geometry *geometry = &self->base.geometry;
    const attn_cuda_sequence *from = (const attn_cuda_sequence *)rows->memory->sequences.host + k;
    size_t there = attn_cuda_device_row(self).value, here = attn_cuda_host_row(self).value, heads = geometry->heads_q;
    uint32_t i = sequence_at(rows->memory, k);
    size_t first = from->first_out * heads, count = from->query_length * heads;
    if (attn_batch_part(batch, i) != NULL) {
        size_t partial_there = self->layer.head_dim_v * sizeof(float);
        if (batch->batch_invariant) count *= attn_cuda_chunks(batch->lengths[i]);
        attn_cuda_copy_rows(batch->partials[i].out, geometry->head_dim_v * sizeof(float),
                            (const char *)rows->memory->partial_out.host + first * partial_there, partial_there, count);
        memcpy(batch->partials[i].lse, (const float *)rows->memory->partial_lse.host + first, count * sizeof(float));
        return;
    }
    attn_cuda_copy_rows(batch->outs[i], here, (const char *)rows->memory->out.host + first * there, there, count);
    if (batch->lses && batch->lses[i]) {
        memcpy(batch->lses[i], (const float *)rows->memory->lse.host + first, count * sizeof(float));
    }
}

void attn_cuda_pack(const cuda_backend *self, flight *next, const tally *count) {
    pack_tables(self, next->batch, &next->memory, count);
    copying rows = {.self = self, .batch = next->batch, .memory = &next->memory, .copy = copy_in};
    if (!next->in_place.ins) copy_all(&rows, next->in_bytes);
}

void attn_cuda_unpack(const cuda_backend *self, const flight *ended) {
    copying rows = {.self = self, .batch = ended->batch, .memory = &ended->memory, .copy = copy_out};
    if (!ended->in_place.outs) copy_all(&rows, ended->out_bytes);
}

/* ------------------------------------------------------------------------------------------- */
/* For the kernels */

attn_cuda_call attn_cuda_describe_call(const cuda_backend *self, const attn_batch *batch, const call_memory *memory) {
    return (attn_cuda_call){
        .layer = attn_cuda_layer_at(self, batch->layer),
        .batch = batch->size,
        .lengths = memory->lengths.device,
        .sequences = memory->sequences.device,
        .page_table = memory->page_table.device,
        .page_offsets = memory->page_offsets.device,
        .queries = memory->queries.device,
        .keys = memory->keys.device,
        .values = memory->values.device,
        .sinks = batch->sinks ? memory->sinks.device : NULL,
        .out = memory->out.device,
        .lse = memory->lse.device,
        .partial_out = memory->partial_out.device,
        .partial_lse = memory->partial_lse.device,
        .status = memory->status,
        .scale = batch->scale,
        .softcap = batch->softcap,
        .window = batch->window,
        .batch_invariant = batch->batch_invariant,
    };
}
