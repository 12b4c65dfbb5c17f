/*
 * The CPU backend: a KV pool in the kernels' own layout (pool.h), kernels for the instruction set of
 * this machine (attend.h), and workers (workers.h) that share a batch by the split plan.
 *
 * A decode is one or two rounds of all workers: the new rows are appended, if there are any, and then
 * each worker walks its share of the line. The unit of work is a piece: a run of the line, or in
 * batch_invariant mode each chunk of it. A piece ends as out rows (the run is a whole unit), as a
 * partial in its slot, or as the partial result of a spread sequence. Who finishes a cut unit last
 * merges its partials, in the same round.
 *
 * SHARED PREFIXES. A batch with prefixes that are worth it is split in two (kernels/prefixes.h), each a line of its
 * own: a tile of a prefix is attended to by many more query rows than one of a single sequence, so that even shares of
 * one line of both would not be even. A last round merges the members' results, an even share of the members each.
 *
 * FP8. The pool holds what a row is rounded to, e4m3(element / scale), in the geometry's dtype: bf16 and fp16 have
 * every such number, so the kernels are those of bf16 and fp16. A page thus takes twice attn_page_bytes. A
 * run is of one KV head: its key scale goes into the softmax scale of its scores, and its value scale into
 * its outputs as they leave the kernel, before anything is merged.
 */
#define _GNU_SOURCE /* mmap flags */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "kernels/backend.h"
#include "kernels/combine.h"
#include "kernels/cpu/attend.h"
#include "kernels/cpu/pool.h"
#include "kernels/cpu/workers.h"
#include "kernels/dtype.h"
#include "kernels/prefixes.h"

#define MAX_HEAD_DIM 256

/* Below so many bytes of keys and values the calling thread is done before another one is awake. */
#define ALONE_BYTES ((uint64_t)1 << 20)
/* Appending fewer (token, head) rows than this likewise. */
#define ALONE_ROWS 32

/* So many query rows take as long to attend to a token as its read does (docs/cpu-kernel-notes.md, "Shared prefixes").
 */
#define READ_ROWS          6
#define READ_ROWS_WITH_DOT 12 /* with products in bf16 */

/* Address space for the partials of batch_invariant mode, at least; touched only as far as needed. */
#define CHUNK_MEMORY_BYTES ((size_t)64 << 20)

/* Memory of one worker, on cache lines of its own. */
typedef struct {
    _Alignas(64) float queries[ATTN_CPU_MAX_ROWS * MAX_HEAD_DIM];
    float out[ATTN_CPU_MAX_ROWS * MAX_HEAD_DIM];
    float lse[ATTN_CPU_MAX_ROWS];
    attn_cpu_visible visible[ATTN_CPU_MAX_ROWS];
    attn_partial *partials; /* [workers, or chunks of a sequence, if more]: views, for a merge */
    uint32_t *slots;        /* [workers] of a cut unit */
    int64_t combine_ns;     /* of this decode */
    bool failed;            /* a page index led out of the pool */
} worker_memory;

/* Places for partial results of ATTN_CPU_MAX_ROWS rows, or of a batch's rows, at equal distance. */
typedef struct {
    float *memory;
    size_t stride; /* floats, a multiple of a cache line */
    size_t lse_offset;
} partial_store;

typedef struct {
    attn_backend base;
    attn_cpu_pool pool;
    const attn_cpu_kernels *kernels;
    attn_cpu_workers *workers;
    worker_memory *memories; /* [workers] */
    attn_ticket *tickets;    /* [workers] */
    partial_store slots;     /* [2 * workers] */
    partial_store chunks;    /* batch_invariant: of the current wave */
    size_t chunk_bytes;      /* reserved at chunks.memory */
    attn_sharing sharing;
    uint32_t group;
    bool is_fp8;
    const attn_plan *plan; /* of the current decode: accepted, or NULL */
} cpu_backend;

static cpu_backend *of(attn_backend *backend) { return (cpu_backend *)backend; }

/* ------------------------------------------------------------------------------------------- */
/* Partial stores */

/* Sets out places for partials of `rows` rows of `columns`. */
static void shape_store(partial_store *store, uint32_t rows, uint32_t columns) {
    size_t floats = (size_t)rows * columns + rows;
    store->stride = (floats + 15) / 16 * 16;
    store->lse_offset = (size_t)rows * columns;
}

static attn_partial store_at(const partial_store *store, uint64_t index) {
    float *place = store->memory + index * store->stride;
    return (attn_partial){.out = place, .lse = place + store->lse_offset};
}

/* ------------------------------------------------------------------------------------------- */
/* Appending */

/* `tokens` key and value rows to write from position `position` of a page table on. */
typedef struct {
    uint32_t layer;
    const uint32_t *pages;
    uint64_t position;
    uint32_t tokens;
    const char *keys;
    const char *values;
} append_job;

/* `count` elements of a row in the geometry's dtype, rounded as fp8 stores them: `rounded`. */
static const char *round_row(const cpu_backend *self, const char *row, uint32_t count, float scale, char *rounded) {
    attn_dtype dtype = self->base.geometry.dtype;
    uint8_t codes[MAX_HEAD_DIM];
    float floats[MAX_HEAD_DIM];
    attn_elements_to_e4m3(dtype, row, scale, codes, count);
    attn_elements_to_floats(ATTN_FP8_E4M3, codes, floats, count);
    self->kernels->from_floats(dtype, floats, rounded, count);
    return rounded;
}

/* Writes one head's key and value row to a slot. */
static void write_row(cpu_backend *self, uint32_t layer, uint32_t page, uint32_t slot, uint32_t head, const char *key,
                      const char *value) {
    const attn_geometry *geometry = &self->base.geometry;
    char rounded_key[MAX_HEAD_DIM * 2], rounded_value[MAX_HEAD_DIM * 2];
    if (self->is_fp8) {
        attn_scale scale = attn_backend_scale(&self->base, layer, head);
        key = round_row(self, key, geometry->head_dim, scale.key, rounded_key);
        value = round_row(self, value, geometry->head_dim_v, scale.value, rounded_value);
    }
    attn_cpu_pool_write(&self->pool, layer, page, slot, head, key, value);
}

/*
 * Writes rows first .. end - 1 of the job, a block of 16 tokens and head at a time: the lines of a
 * block of keys are written by all its tokens while they are in the cache.
 */
static void write_rows(cpu_backend *self, const append_job *job, uint32_t first, uint32_t end) {
    const attn_geometry *geometry = &self->base.geometry;
    size_t key_bytes = geometry->head_dim * attn_dtype_bytes(geometry->dtype);
    size_t value_bytes = geometry->head_dim_v * attn_dtype_bytes(geometry->dtype);
    uint32_t heads = geometry->heads_kv;
    while (first < end) {
        uint64_t token = job->position + first;
        uint32_t page = job->pages[token / geometry->page_size];
        uint32_t slot = (uint32_t)(token % geometry->page_size);
        uint32_t count = ATTN_CPU_BLOCK_TOKENS - slot % ATTN_CPU_BLOCK_TOKENS;
        if (count > end - first) count = end - first;
        for (uint32_t head = 0; head < heads; head++) {
            for (uint32_t row = first; row < first + count; row++) {
                size_t index = (size_t)row * heads + head;
                write_row(self, job->layer, page, slot + row - first, head, job->keys + index * key_bytes,
                          job->values + index * value_bytes);
            }
        }
        first += count;
    }
}

typedef struct {
    cpu_backend *self;
    const append_job *job;
} append_task;

static void append_share(void *context, uint32_t worker) {
    const append_task *task = context;
    uint64_t tokens = task->job->tokens, workers = task->self->base.line.workers;
    write_rows(task->self, task->job, (uint32_t)(worker * tokens / workers),
               (uint32_t)((worker + 1) * tokens / workers));
}

static attn_status cpu_append(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                              uint32_t tokens, const void *keys, const void *values) {
    cpu_backend *self = of(backend);
    append_job job = {layer, pages, position, tokens, keys, values};
    append_task task = {self, &job};
    if ((uint64_t)tokens * backend->geometry.heads_kv < ALONE_ROWS) {
        write_rows(self, &job, 0, tokens);
    } else {
        attn_cpu_workers_run(self->workers, append_share, &task);
    }
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Exporting */

/* A row of stored numbers becomes what is meant by them: itself but with fp8, where a scale is missing. */
static void scale_row(const cpu_backend *self, char *row, uint32_t count, float scale) {
    if (!self->is_fp8) return;
    attn_dtype dtype = self->base.geometry.dtype;
    float floats[MAX_HEAD_DIM];
    attn_elements_to_floats(dtype, row, floats, count);
    for (uint32_t i = 0; i < count; i++)
        floats[i] *= scale;
    attn_elements_from_floats(dtype, floats, row, count);
}

typedef struct {
    uint32_t layer;
    const uint32_t *pages;
    uint64_t position;
    uint32_t tokens;
    char *keys;
    char *values;
} export_job;

static void read_rows(const cpu_backend *self, const export_job *job, uint32_t first, uint32_t end) {
    const attn_geometry *geometry = &self->base.geometry;
    size_t key_bytes = geometry->head_dim * attn_dtype_bytes(geometry->dtype);
    size_t value_bytes = geometry->head_dim_v * attn_dtype_bytes(geometry->dtype);
    for (uint32_t row = first; row < end; row++) {
        uint64_t token = job->position + row;
        uint32_t page = job->pages[token / geometry->page_size], slot = (uint32_t)(token % geometry->page_size);
        for (uint32_t head = 0; head < geometry->heads_kv; head++) {
            size_t index = (size_t)row * geometry->heads_kv + head;
            char *key = job->keys + index * key_bytes, *value = job->values + index * value_bytes;
            attn_scale scale = attn_backend_scale(&self->base, job->layer, head);
            attn_cpu_pool_read_key(&self->pool, job->layer, page, slot, head, key);
            attn_cpu_pool_read_value(&self->pool, job->layer, page, slot, head, value);
            scale_row(self, key, geometry->head_dim, scale.key);
            scale_row(self, value, geometry->head_dim_v, scale.value);
        }
    }
}

typedef struct {
    const cpu_backend *self;
    const export_job *job;
} export_task;

static void export_share(void *context, uint32_t worker) {
    const export_task *task = context;
    uint64_t tokens = task->job->tokens, workers = task->self->base.line.workers;
    read_rows(task->self, task->job, (uint32_t)(worker * tokens / workers),
              (uint32_t)((worker + 1) * tokens / workers));
}

static attn_status cpu_export(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                              uint32_t tokens, void *keys, void *values) {
    cpu_backend *self = of(backend);
    export_job job = {layer, pages, position, tokens, keys, values};
    export_task task = {self, &job};
    if ((uint64_t)tokens * backend->geometry.heads_kv < ALONE_ROWS) {
        read_rows(self, &job, 0, tokens);
    } else {
        attn_cpu_workers_run(self->workers, export_share, &task);
    }
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* A batch's new rows */

/* The new rows of a batch's sequence; job->tokens is 0 if there are none. */
static append_job batch_append_job(const attn_batch *batch, uint32_t i) {
    append_job job = {.layer = batch->layer, .tokens = attn_batch_new_rows(batch, i)};
    if (job.tokens > 0) {
        job.pages = batch->pages + batch->page_offsets[i];
        job.position = batch->lengths[i] - job.tokens;
        job.keys = batch->new_keys[i];
        job.values = batch->new_values[i];
    }
    return job;
}

static uint64_t count_new_rows(const attn_batch *batch) {
    uint64_t rows = 0;
    for (uint32_t i = 0; i < batch->size; i++) {
        rows += attn_batch_new_rows(batch, i);
    }
    return rows;
}

/* A worker's share of the batch's new rows, counted along the batch. */
static void append_batch_share(void *context, uint32_t worker) {
    cpu_backend *self = context;
    const attn_batch *batch = self->base.line.batch;
    uint64_t rows = count_new_rows(batch), workers = self->base.line.workers;
    uint64_t first = worker * rows / workers, end = (worker + 1) * rows / workers, before = 0;
    for (uint32_t i = 0; i < batch->size && before < end; i++) {
        append_job job = batch_append_job(batch, i);
        uint64_t after = before + job.tokens;
        uint64_t from = first > before ? first : before, to = end < after ? end : after;
        if (from < to) write_rows(self, &job, (uint32_t)(from - before), (uint32_t)(to - before));
        before = after;
    }
}

static void append_batch(cpu_backend *self, const attn_batch *batch) {
    uint64_t rows = count_new_rows(batch);
    if (rows == 0) return;
    if (rows * self->base.geometry.heads_kv < ALONE_ROWS) {
        attn_cpu_workers_run_alone(self->workers, append_batch_share, self);
    } else {
        attn_cpu_workers_run(self->workers, append_batch_share, self);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Results */

/* Where a row of the batch ends: an out row in the geometry's dtype, or a spread sequence's partial. */
typedef struct {
    void *out;
    float *lse; /* or NULL: not wanted */
    attn_dtype dtype;
    const float *sink;
} destination;

/* The place of row `row` of a run's block in [query_length, h]. */
static size_t batch_row(const cpu_backend *self, const attn_run *run, uint32_t row) {
    size_t query = run->query_first + row / self->group;
    return query * self->base.geometry.heads_q + run->head * self->group + row % self->group;
}

static destination find_destination(const cpu_backend *self, const attn_run *run, uint32_t row) {
    const attn_batch *batch = self->base.line.batch;
    const attn_geometry *geometry = &self->base.geometry;
    size_t index = batch_row(self, run, row), element = index * geometry->head_dim_v;
    if (attn_batch_part(batch, run->sequence) != NULL) {
        const attn_partial *partial = &batch->partials[run->sequence];
        return (destination){partial->out + element, partial->lse + index, ATTN_FP32, NULL};
    }
    float *lse = batch->lses != NULL ? batch->lses[run->sequence] : NULL;
    return (destination){
        .out = (char *)batch->outs[run->sequence] + element * attn_dtype_bytes(geometry->dtype),
        .lse = lse != NULL ? lse + index : NULL,
        .dtype = geometry->dtype,
        .sink = batch->sinks != NULL ? &batch->sinks[index % geometry->heads_q] : NULL,
    };
}

/* The kernel's results are the unit's: to their destination. */
static void write_results(const cpu_backend *self, const attn_run *run, const worker_memory *memory) {
    uint32_t columns = self->base.geometry.head_dim_v;
    for (uint32_t row = 0; row < run->queries * self->group; row++) {
        destination to = find_destination(self, run, row);
        float *out = (float *)memory->out + (size_t)row * self->pool.value_stride, lse = memory->lse[row];
        if (to.sink != NULL) {
            attn_combine_row(&(attn_partial){out, &lse}, 1, 0, columns, to.sink, to.dtype, to.out, to.lse);
            continue;
        }
        self->kernels->from_floats(to.dtype, out, to.out, columns);
        if (to.lse != NULL) *to.lse = lse;
    }
}

/* The kernel's results are a part of the unit's: rows packed, to `partial`. */
static void write_partial(const cpu_backend *self, const attn_run *run, const worker_memory *memory,
                          attn_partial partial) {
    uint32_t columns = self->base.geometry.head_dim_v;
    for (uint32_t row = 0; row < run->queries * self->group; row++) {
        memcpy(partial.out + (size_t)row * columns, memory->out + (size_t)row * self->pool.value_stride,
               columns * sizeof(float));
        partial.lse[row] = memory->lse[row];
    }
}

/* One chunk's results of a spread sequence, in batch_invariant mode, to where the caller wants them. */
static void write_chunk_of_part(const cpu_backend *self, const attn_run *run, uint64_t chunk,
                                const worker_memory *memory) {
    const attn_batch *batch = self->base.line.batch;
    const attn_geometry *geometry = &self->base.geometry;
    const attn_partial *partials = &batch->partials[run->sequence];
    if (chunk * ATTN_CHUNK_TOKENS >= batch->lengths[run->sequence]) return; /* a part without any token */
    size_t first = chunk * batch->query_lengths[run->sequence] * geometry->heads_q;
    for (uint32_t row = 0; row < run->queries * self->group; row++) {
        size_t index = first + batch_row(self, run, row);
        memcpy(partials->out + index * geometry->head_dim_v, memory->out + (size_t)row * self->pool.value_stride,
               geometry->head_dim_v * sizeof(float));
        partials->lse[index] = memory->lse[row];
    }
}

static void merge_partials(const cpu_backend *self, const attn_run *run, worker_memory *memory, uint32_t count) {
    int64_t start = attn_now_ns();
    for (uint32_t row = 0; row < run->queries * self->group; row++) {
        destination to = find_destination(self, run, row);
        attn_combine_row(memory->partials, count, row, self->base.geometry.head_dim_v, to.sink, to.dtype, to.out,
                         to.lse);
    }
    memory->combine_ns += attn_now_ns() - start;
}

/* ------------------------------------------------------------------------------------------- */
/* Pieces */

typedef struct {
    attn_run run;
    uint64_t tile; /* batch_invariant: the chunk, as tile of the run; else the run's first tile */
    attn_cpu_span span;
} piece;

/* The worker's next piece after *piece; its first if `first`. False at the end. */
static bool next_piece(const cpu_backend *self, attn_walk *walk, piece *piece, bool first) {
    const attn_line *line = &self->base.line;
    const attn_batch *batch = line->batch;
    if (!first && batch->batch_invariant && piece->tile + 1 < piece->run.tile_end) {
        piece->tile++;
    } else {
        if (!attn_walk_next(walk, &piece->run)) return false;
        piece->tile = piece->run.tile_begin;
        piece->span.layer = batch->layer;
        piece->span.head = piece->run.head;
        piece->span.pages = batch->pages + batch->page_offsets[piece->run.sequence];
    }
    piece->span.begin = piece->run.token_begin;
    piece->span.end = piece->run.token_end;
    if (batch->batch_invariant) attn_run_tile(line, &piece->run, piece->tile, &piece->span.begin, &piece->span.end);
    return true;
}

/* One query row, of elements of `bytes` each, to its pairs among those of `rows` rows. */
static void spread_pairs(char *pairs, const char *row, size_t bytes, uint32_t rows, uint32_t head_dim) {
    for (uint32_t i = 0; i < head_dim / 2; i++) {
        memcpy(pairs + (size_t)i * rows * 2 * bytes, row + (size_t)i * 2 * bytes, 2 * bytes);
    }
}

/* The query rows of a run's block, as the kernel wants them, and what each of them sees. */
static void load_queries(const cpu_backend *self, const attn_run *run, worker_memory *memory) {
    const attn_batch *batch = self->base.line.batch;
    const attn_geometry *geometry = &self->base.geometry;
    size_t row_bytes = geometry->head_dim * attn_dtype_bytes(geometry->dtype);
    bool keep = self->kernels->bf16_queries && geometry->dtype == ATTN_BF16;
    uint32_t rows = run->queries * self->group;
    for (uint32_t row = 0; row < rows; row++) {
        const char *source = (const char *)batch->queries[run->sequence] + batch_row(self, run, row) * row_bytes;
        if (keep) {
            spread_pairs((char *)memory->queries + row * 4, source, 2, rows, geometry->head_dim);
        } else {
            float floats[MAX_HEAD_DIM];
            self->kernels->to_floats(geometry->dtype, source, floats, geometry->head_dim);
            spread_pairs((char *)memory->queries + row * 8, (const char *)floats, 4, rows, geometry->head_dim);
        }
        attn_cpu_visible *visible = &memory->visible[row];
        attn_row_visible(batch, run->sequence, run->query_first + row / self->group, &visible->begin, &visible->end);
    }
}

/* The kernel's outputs are of stored values: times their scale. */
static void scale_outs(const cpu_backend *self, uint32_t rows, float scale, worker_memory *memory) {
    if (scale == 1.0f) return;
    for (uint32_t row = 0; row < rows; row++) {
        float *out = memory->out + (size_t)row * self->pool.value_stride;
        for (uint32_t c = 0; c < self->base.geometry.head_dim_v; c++) {
            out[c] *= scale;
        }
    }
}

static bool attend_piece(const cpu_backend *self, const piece *piece, const attn_cpu_span *next,
                         worker_memory *memory) {
    const attn_batch *batch = self->base.line.batch;
    attn_scale scale = attn_backend_scale(&self->base, piece->span.layer, piece->span.head);
    attn_cpu_job job = {
        .pool = &self->pool,
        .span = piece->span,
        .next = next,
        .rows = piece->run.queries * self->group,
        .queries = memory->queries,
        .visible = memory->visible,
        .scale = batch->scale * scale.key,
        .softcap = batch->softcap,
        .out = memory->out,
        .lse = memory->lse,
    };
    if (!self->kernels->attend(&job)) return false;
    scale_outs(self, job.rows, scale.value, memory);
    return true;
}

/* Default mode: the run is the unit, or goes to one of the worker's slots. */
static void deliver_run(cpu_backend *self, const piece *piece, worker_memory *memory) {
    const attn_run *run = &piece->run;
    if (run->whole) {
        write_results(self, run, memory);
        return;
    }
    write_partial(self, run, memory, store_at(&self->slots, run->slot));
    if (!attn_run_arrive(run, self->tickets)) return;
    uint32_t count = attn_run_slots(&self->base.line, run, memory->slots);
    for (uint32_t c = 0; c < count; c++) {
        memory->partials[c] = store_at(&self->slots, memory->slots[c]);
    }
    merge_partials(self, run, memory, count);
}

/* batch_invariant: every chunk to its slot; the unit's chunks are merged when all are there. */
static void deliver_chunk(cpu_backend *self, const piece *piece, worker_memory *memory) {
    const attn_run *run = &piece->run;
    if (attn_batch_part(self->base.line.batch, run->sequence) != NULL) {
        write_chunk_of_part(self, run, attn_run_chunk(run, piece->tile), memory);
        return;
    }
    uint64_t unit_slot = run->line_tile - run->tile_begin - self->base.line.begin;
    write_partial(self, run, memory, store_at(&self->chunks, unit_slot + piece->tile));
    if (piece->tile + 1 < run->tile_end || (!run->whole && !attn_run_arrive(run, self->tickets))) return;
    for (uint64_t c = 0; c < run->unit_tiles; c++) {
        memory->partials[c] = store_at(&self->chunks, unit_slot + c);
    }
    merge_partials(self, run, memory, (uint32_t)run->unit_tiles);
}

/*
 * Does every row of the run see one and the same token, with nothing else in the softmax and no LSE
 * wanted? Then its probability is 1, whatever the query: the output is that token's value. The first
 * token of a sequence is such a case; to score it would read 16 tokens' lines of keys.
 */
static bool output_is_a_value(const cpu_backend *self, const attn_run *run) {
    const attn_batch *batch = self->base.line.batch;
    if (run->unit_end - run->unit_begin != 1 || batch->sinks != NULL || batch->batch_invariant) return false;
    if (batch->lses != NULL || attn_batch_part(batch, run->sequence) != NULL) return false;
    for (uint32_t q = 0; q < run->queries; q++) {
        uint64_t begin, end;
        attn_row_visible(batch, run->sequence, run->query_first + q, &begin, &end);
        if (begin != run->unit_begin || end != run->unit_end) return false;
    }
    return true;
}

/* A value row in the geometry's dtype, times its scale. */
static void scale_value(const cpu_backend *self, float scale, char *value) {
    const attn_geometry *geometry = &self->base.geometry;
    float floats[MAX_HEAD_DIM];
    if (scale == 1.0f) return;
    self->kernels->to_floats(geometry->dtype, value, floats, geometry->head_dim_v);
    for (uint32_t c = 0; c < geometry->head_dim_v; c++) {
        floats[c] *= scale;
    }
    self->kernels->from_floats(geometry->dtype, floats, value, geometry->head_dim_v);
}

static bool write_value(const cpu_backend *self, const piece *piece) {
    const attn_geometry *geometry = &self->base.geometry;
    const attn_run *run = &piece->run;
    uint64_t token = run->unit_begin;
    size_t bytes = attn_value_row_bytes(geometry) / geometry->heads_kv;
    char value[MAX_HEAD_DIM * sizeof(float)];
    uint32_t page = piece->span.pages[token / geometry->page_size];
    if (page >= self->pool.pages) return false;
    attn_cpu_pool_read_value(&self->pool, piece->span.layer, page, (uint32_t)(token % geometry->page_size),
                             piece->span.head, value);
    scale_value(self, attn_backend_scale(&self->base, piece->span.layer, piece->span.head).value, value);
    for (uint32_t q = 0; q < run->queries; q++) {
        char *out = find_destination(self, run, q * self->group).out;
        for (uint32_t j = 0; j < self->group; j++)
            memcpy(out + j * bytes, value, bytes);
    }
    return true;
}

/* A worker's share of the line, or of a wave of it. */
static void attend_share(void *context, uint32_t worker) {
    cpu_backend *self = context;
    worker_memory *memory = &self->memories[worker];
    bool batch_invariant = self->base.line.batch->batch_invariant;
    attn_walk walk;
    piece now, next;
    attn_walk_start(&walk, &self->base.line, worker, self->plan);
    bool more = next_piece(self, &walk, &now, true);
    while (more) {
        next = now;
        more = next_piece(self, &walk, &next, false);
        if (output_is_a_value(self, &now.run)) {
            if (!write_value(self, &now)) memory->failed = true;
            now = next;
            continue;
        }
        if (now.tile == now.run.tile_begin) load_queries(self, &now.run, memory);
        if (!attend_piece(self, &now, more ? &next.span : NULL, memory)) memory->failed = true;
        if (batch_invariant) {
            deliver_chunk(self, &now, memory);
        } else {
            deliver_run(self, &now, memory);
        }
        now = next;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Decoding */

/* By the work alone, so that equal batches take equal paths; the shares are the same in any case. */
static bool is_little(const cpu_backend *self) {
    const attn_geometry *geometry = &self->base.geometry;
    uint64_t row = (uint64_t)(geometry->head_dim + geometry->head_dim_v) * attn_dtype_bytes(geometry->dtype);
    return attn_line_total(&self->base.line) * self->base.line.tile * row < ALONE_BYTES;
}

static void attend_line(cpu_backend *self) {
    attn_tickets_reset(self->tickets, self->base.line.workers);
    if (is_little(self)) {
        attn_cpu_workers_run_alone(self->workers, attend_share, self);
    } else {
        attn_cpu_workers_run(self->workers, attend_share, self);
    }
}

static uint32_t most_rows(const cpu_backend *self, const attn_batch *batch) {
    uint32_t most = 1;
    for (uint32_t i = 0; i < batch->size; i++) {
        if (batch->query_lengths[i] > most) most = batch->query_lengths[i];
    }
    if (most > self->base.line.block_queries) most = self->base.line.block_queries;
    return most * self->group;
}

static void attend_chunks(cpu_backend *self, const attn_batch *batch) {
    shape_store(&self->chunks, most_rows(self, batch), self->base.geometry.head_dim_v);
    uint64_t slots = self->chunk_bytes / (self->chunks.stride * sizeof(float));
    attn_line_first_wave(&self->base.line);
    while (attn_line_next_wave(&self->base.line, slots)) {
        attend_line(self);
    }
}

/* Gathers what the workers noted. */
static attn_status collect(cpu_backend *self, attn_timing *timing) {
    bool failed = false;
    for (uint32_t w = 0; w < self->base.line.workers; w++) {
        worker_memory *memory = &self->memories[w];
        if (memory->combine_ns > timing->combine_ns) timing->combine_ns = memory->combine_ns;
        failed = failed || memory->failed;
        memory->combine_ns = 0;
        memory->failed = false;
    }
    return failed ? attn_error(ATTN_INTERNAL, "a page table changed during decode, to a page outside the pool")
                  : attn_ok();
}

/* A worker's share of the members of shared prefixes. */
static void merge_share(void *context, uint32_t worker) {
    cpu_backend *self = context;
    uint64_t members = self->sharing.member_count, workers = self->base.line.workers;
    int64_t start = attn_now_ns();
    attn_sharing_merge(&self->sharing, (uint32_t)(worker * members / workers),
                       (uint32_t)((worker + 1) * members / workers));
    self->memories[worker].combine_ns += attn_now_ns() - start;
}

static void merge_members(cpu_backend *self) {
    const attn_geometry *geometry = &self->base.geometry;
    uint64_t floats = (uint64_t)self->sharing.member_rows * geometry->heads_q * geometry->head_dim_v;
    if (2 * floats * sizeof(float) < ALONE_BYTES) {
        attn_cpu_workers_run_alone(self->workers, merge_share, self);
    } else {
        attn_cpu_workers_run(self->workers, merge_share, self);
    }
}

/* Decodes the batch as it has been split: what is shared, then what is each sequence's own. */
static attn_status decode_shared(cpu_backend *self, int64_t start, attn_timing *timing) {
    attn_line *line = &self->base.line;
    self->plan = NULL;
    ATTN_TRY(attn_line_build(line, &self->sharing.shared));
    int64_t planned = attn_now_ns();
    attend_line(self);
    ATTN_TRY(attn_line_build(line, &self->sharing.own));
    append_batch(self, &self->sharing.own);
    attend_line(self);
    merge_members(self);
    attn_status status = collect(self, timing);
    timing->plan_ns = planned - start;
    timing->attention_ns = attn_now_ns() - planned - timing->combine_ns;
    return status;
}

static attn_status cpu_decode(attn_backend *backend, const attn_batch *batch, const attn_plan *plan,
                              attn_timing *timing) {
    cpu_backend *self = of(backend);
    int64_t start = attn_now_ns();
    bool shares;
    ATTN_TRY(attn_sharing_split(&self->sharing, batch, &shares));
    if (shares) return decode_shared(self, start, timing);
    ATTN_TRY(attn_line_build(&backend->line, batch));
    self->plan = attn_backend_accept_plan(backend, plan);
    int64_t planned = attn_now_ns();
    append_batch(self, batch);
    if (batch->batch_invariant) {
        attend_chunks(self, batch);
    } else {
        attend_line(self);
    }
    attn_status status = collect(self, timing);
    timing->plan_ns = planned - start;
    timing->attention_ns = attn_now_ns() - planned - timing->combine_ns;
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static void *allocate_lines(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

static attn_status allocate_memories(cpu_backend *self, uint32_t workers, uint64_t partials) {
    attn_status status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u cpu workers", workers);
    self->memories = allocate_lines(workers * sizeof *self->memories);
    if (self->memories == NULL) return status;
    memset(self->memories, 0, workers * sizeof *self->memories);
    for (uint32_t w = 0; w < workers; w++) {
        self->memories[w].partials = malloc(partials * sizeof(attn_partial));
        self->memories[w].slots = malloc(workers * sizeof(uint32_t));
        if (self->memories[w].partials == NULL || self->memories[w].slots == NULL) return status;
    }
    self->tickets = allocate_lines(workers * sizeof *self->tickets);
    if (self->tickets == NULL) return status;
    shape_store(&self->slots, ATTN_CPU_MAX_ROWS, self->base.geometry.head_dim_v);
    self->slots.memory = allocate_lines(2 * workers * self->slots.stride * sizeof(float));
    return self->slots.memory == NULL ? status : attn_ok();
}

static attn_status reserve_chunks(cpu_backend *self, uint64_t least) {
    partial_store widest;
    shape_store(&widest, ATTN_CPU_MAX_ROWS, self->base.geometry.head_dim_v);
    self->chunk_bytes = least * widest.stride * sizeof(float);
    if (self->chunk_bytes < CHUNK_MEMORY_BYTES) self->chunk_bytes = CHUNK_MEMORY_BYTES;
    void *memory =
        mmap(NULL, self->chunk_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for partial results: %zu MiB", self->chunk_bytes >> 20);
    }
    self->chunks.memory = memory;
    return attn_ok();
}

static void cpu_destroy(attn_backend *backend) {
    cpu_backend *self = of(backend);
    attn_cpu_workers_destroy(self->workers);
    attn_cpu_pool_fini(&self->pool);
    for (uint32_t w = 0; self->memories != NULL && w < backend->line.workers; w++) {
        free(self->memories[w].partials);
        free(self->memories[w].slots);
    }
    free(self->memories);
    free(self->tickets);
    free(self->slots.memory);
    if (self->chunks.memory != NULL) munmap(self->chunks.memory, self->chunk_bytes);
    attn_sharing_fini(&self->sharing);
    attn_backend_fini(backend);
    free(self);
}

static attn_status cpu_create(const attn_backend_config *config, attn_backend **backend) {
    attn_status status = attn_ok();
    const attn_cpu_kernels *kernels;
    ATTN_TRY(attn_cpu_kernels_find(config->isa, &kernels));
    cpu_backend *self = calloc(1, sizeof *self);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a cpu backend");
    uint32_t workers = config->workers > 0 ? config->workers : 1;
    self->kernels = kernels;
    self->group = config->geometry.heads_q / config->geometry.heads_kv;
    self->is_fp8 = attn_kv_dtype(&config->geometry) == ATTN_FP8_E4M3;
    attn_backend_init(&self->base, &attn_cpu_backend_ops, config, ATTN_CPU_TILE_TOKENS, ATTN_CPU_MAX_ROWS / self->group,
                      workers);
    bool has_dot = kernels->bf16_queries && config->geometry.dtype == ATTN_BF16;
    attn_sharing_init(&self->sharing, &config->geometry, self->base.line.block_queries,
                      has_dot ? READ_ROWS_WITH_DOT : READ_ROWS);
    uint64_t chunks = attn_line_min_chunk_slots(&config->geometry, config->pages);
    ATTN_TRY_GOTO(status, allocate_memories(self, workers, chunks > workers ? chunks : workers), cleanup);
    ATTN_TRY_GOTO(status, reserve_chunks(self, chunks), cleanup);
    ATTN_TRY_GOTO(status, attn_backend_keep_scales(&self->base, config), cleanup);
    ATTN_TRY_GOTO(status, attn_cpu_pool_init(&self->pool, &config->geometry, config->pages), cleanup);
    ATTN_TRY_GOTO(status, attn_cpu_workers_create(workers, config->cpus, &self->workers), cleanup);
    snprintf(self->base.description, sizeof self->base.description, "cpu, %s, %u worker%s%s", kernels->name, workers,
             workers == 1 ? "" : "s", self->is_fp8 ? ", fp8 in 16 bits" : "");
    *backend = &self->base;
    return status;
cleanup:
    cpu_destroy(&self->base);
    return status;
}

static void cpu_copy_page(attn_backend *backend, uint32_t from, uint32_t to) {
    attn_cpu_pool_copy_page(&of(backend)->pool, from, to);
}

static void cpu_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots) {
    attn_cpu_pool_poison(&of(backend)->pool, page, first_slot, slots);
}

const attn_backend_ops attn_cpu_backend_ops = {
    .kind = "cpu",
    .small_bytes = 1024 * 1024,
    .stores_fp8 = true,
    .create = cpu_create,
    .destroy = cpu_destroy,
    .append = cpu_append,
    .export = cpu_export,
    .decode = cpu_decode,
    .copy_page = cpu_copy_page,
    .poison = cpu_poison,
};
