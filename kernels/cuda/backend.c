/*
 * The cuda backend. The host walks the line over the lengths of each call and uploads what the thread blocks
 * have to do, together with the rows, as one arena; then append, attend and merge, one after the other on the
 * backend's stream; then the outputs come back as another. docs/kernel-notes.md says what is to become of it.
 *
 * An arena is a block of pinned memory and one of device memory with the same layout; both only grow. What a call
 * puts into it is laid out twice by the same function: with no memory, which measures, and in earnest.
 */
#define _POSIX_C_SOURCE 200809L

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/backend.h"
#include "kernels/cuda/decode_hopper.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/probe.h"

#define ALIGNMENT    256
#define BLOCKS_AN_SM 2
#define SLOT_BYTES_MOST                                                                                                \
    ((size_t)256 << 20) /* batch_invariant: of partial results of a wave, at least one sequence's                      \
                         */

typedef struct {
    char *host, *device;
    size_t bytes;
} arena;

typedef struct {
    attn_backend base;
    int device;
    cudaStream_t stream;
    attn_cuda_layer layer; /* .memory is that of layer 0 */
    size_t layer_bytes;
    arena up, down;
    float *slot_out, *slot_lse; /* device; [slots, MAX_ROWS, head_dim_v], [slots, MAX_ROWS] */
    uint64_t slots;
    bool is_hopper; /* the device and the geometry are what decode_hopper.h is for */
    attn_hopper_tuning tuning;
    void *workspace;    /* of decode_hopper.h; its first word is the status */
    uint32_t *status;   /* device: set to 1 by a kernel that met a page outside the pool */
    cudaError_t failed; /* what an operation that returns nothing has met */

    cudaEvent_t kernels_begin, kernels_end; /* attn_batch.device_time: around the kernels of a decode */
    uint32_t launches;                      /* of kernels, by the current decode */
} cuda_backend;

static cuda_backend *of(attn_backend *backend) { return (cuda_backend *)backend; }

static uint32_t group_of(const cuda_backend *self) {
    return self->base.geometry.heads_q / self->base.geometry.heads_kv;
}

/* ------------------------------------------------------------------------------------------- */
/* Errors: after one, nothing of the device is to be relied on, and the rank is lost */

static attn_status cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return attn_ok();
    return attn_error(ATTN_UNAVAILABLE, "cuda: %s: %s", what, cudaGetErrorString(error));
}

#define CUDA_TRY(call) ATTN_TRY(cuda_status((cudaError_t)(call), #call))

/* ------------------------------------------------------------------------------------------- */
/* Arenas */

static void arena_fini(arena *memory) {
    cudaFreeHost(memory->host);
    cudaFree(memory->device);
    *memory = (arena){0};
}

static attn_status arena_reserve(arena *memory, size_t bytes) {
    if (bytes <= memory->bytes) return attn_ok();
    size_t grown = memory->bytes < ((size_t)1 << 20) ? (size_t)1 << 20 : memory->bytes;
    while (grown < bytes)
        grown *= 2;
    arena_fini(memory);
    cudaError_t error = cudaMallocHost((void **)&memory->host, grown);
    if (error == cudaSuccess) error = cudaMalloc((void **)&memory->device, grown);
    if (error != cudaSuccess) {
        cudaGetLastError();
        arena_fini(memory);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "cuda: no memory to stage a call of %zu bytes: %s", bytes,
                          cudaGetErrorString(error));
    }
    memory->bytes = grown;
    return attn_ok();
}

/* A place in an arena. With no memory behind it the pointers are NULL, and only `used` counts. */
typedef struct {
    char *host, *device;
    size_t used;
} carver;

typedef struct {
    void *host, *device;
} place;

static place carve(carver *from, size_t bytes) {
    place carved = {NULL, NULL};
    if (from->host != NULL) carved = (place){from->host + from->used, from->device + from->used};
    from->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return carved;
}

/* ------------------------------------------------------------------------------------------- */
/* The pool */

static attn_cuda_layer layer_at(const cuda_backend *self, uint32_t layer) {
    attn_cuda_layer found = self->layer;
    found.memory += layer * self->layer_bytes;
    return found;
}

static attn_status allocate_pool(cuda_backend *self, const attn_backend_config *config) {
    const attn_geometry *geometry = &config->geometry;
    uint32_t element = (uint32_t)attn_dtype_bytes(geometry->dtype);
    self->layer = (attn_cuda_layer){
        .pages = config->pages,
        .page_size = geometry->page_size,
        .heads_q = geometry->heads_q,
        .heads_kv = geometry->heads_kv,
        .head_dim = geometry->head_dim,
        .head_dim_v = geometry->head_dim_v,
        .dtype = geometry->dtype,
        .tile_bytes = attn_cuda_tile_bytes(geometry->page_size, geometry->head_dim, geometry->head_dim_v, element),
    };
    size_t bytes;
    if (__builtin_mul_overflow((size_t)self->layer.tile_bytes * geometry->heads_kv, (size_t)config->pages,
                               &self->layer_bytes) ||
        __builtin_mul_overflow(self->layer_bytes, (size_t)geometry->layers, &bytes)) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "a KV pool of %u pages of %zu bytes is more than an address space",
                          config->pages, attn_page_bytes(geometry));
    }
    cudaError_t error = cudaMalloc((void **)&self->layer.memory, bytes);
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError();
    size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return attn_error(ATTN_RESOURCE_EXHAUSTED,
                      "no device memory for a KV pool of %.1f MiB (%u pages of %zu bytes); %.1f MiB are free: %s",
                      (double)bytes / (1 << 20), config->pages, attn_page_bytes(geometry),
                      (double)free_bytes / (1 << 20), cudaGetErrorString(error));
}

static void note(cuda_backend *self, cudaError_t error) {
    if (self->failed == cudaSuccess) self->failed = error;
}

/* All layers' tiles of a page: they lie a layer apart. */
static void cuda_copy_page(attn_backend *backend, uint32_t from, uint32_t to) {
    cuda_backend *self = of(backend);
    size_t bytes = (size_t)self->layer.tile_bytes * self->layer.heads_kv;
    cudaSetDevice(self->device);
    note(self,
         cudaMemcpy2DAsync(self->layer.memory + to * bytes, self->layer_bytes, self->layer.memory + from * bytes,
                           self->layer_bytes, bytes, backend->geometry.layers, cudaMemcpyDeviceToDevice, self->stream));
}

static void cuda_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots) {
    cuda_backend *self = of(backend);
    const attn_geometry *geometry = &backend->geometry;
    size_t element = attn_dtype_bytes(geometry->dtype), tile = self->layer.tile_bytes;
    size_t key = geometry->head_dim * element, value = geometry->head_dim_v * element;
    cudaSetDevice(self->device);
    for (uint32_t layer = 0; layer < geometry->layers; layer++) { /* all bits set is NaN in every dtype */
        char *keys = layer_at(self, layer).memory + page * tile * geometry->heads_kv + first_slot * key;
        char *values = keys + geometry->page_size * key - first_slot * key + first_slot * value;
        note(self, cudaMemset2DAsync(keys, tile, 0xff, slots * key, geometry->heads_kv, self->stream));
        note(self, cudaMemset2DAsync(values, tile, 0xff, slots * value, geometry->heads_kv, self->stream));
    }
}

/* Waits for the stream, and says what has gone wrong since the last time. */
static attn_status settle(cuda_backend *self) {
    uint32_t outside = 0;
    CUDA_TRY(self->failed);
    CUDA_TRY(cudaMemcpyAsync(&outside, self->status, sizeof outside, cudaMemcpyDeviceToHost, self->stream));
    CUDA_TRY(cudaStreamSynchronize(self->stream));
    if (outside == 0) return attn_ok();
    CUDA_TRY(cudaMemset(self->status, 0, sizeof *self->status));
    return attn_error(ATTN_INTERNAL, "a page table led a kernel to a page outside the pool");
}

/* ------------------------------------------------------------------------------------------- */
/* Appending rows of one sequence */

static attn_status cuda_append(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                               uint32_t tokens, const void *keys, const void *values) {
    cuda_backend *self = of(backend);
    uint32_t page_size = backend->geometry.page_size;
    size_t key_bytes = tokens * attn_key_row_bytes(&backend->geometry);
    size_t value_bytes = tokens * attn_value_row_bytes(&backend->geometry);
    place at, key, value;
    cudaSetDevice(self->device);
    for (int earnest = 0; earnest < 2; earnest++) {
        carver from = {0};
        if (earnest) from = (carver){self->up.host, self->up.device, 0};
        at = carve(&from, tokens * sizeof(uint32_t));
        key = carve(&from, key_bytes);
        value = carve(&from, value_bytes);
        if (!earnest) ATTN_TRY(arena_reserve(&self->up, from.used));
    }
    for (uint32_t t = 0; t < tokens; t++) {
        uint64_t token = position + t;
        ((uint32_t *)at.host)[t] = pages[token / page_size] * page_size + (uint32_t)(token % page_size);
    }
    memcpy(key.host, keys, key_bytes);
    memcpy(value.host, values, value_bytes);
    size_t bytes = (size_t)((char *)value.host - self->up.host) + value_bytes;
    CUDA_TRY(cudaMemcpyAsync(self->up.device, self->up.host, bytes, cudaMemcpyHostToDevice, self->stream));
    attn_cuda_layer to = layer_at(self, layer);
    CUDA_TRY(attn_cuda_append(&to, at.device, key.device, value.device, tokens, self->status, self->stream));
    return settle(self);
}

/* ------------------------------------------------------------------------------------------- */
/* A call's tables and rows */

/* How much of everything a batch has. */
typedef struct {
    uint32_t rows;         /* query rows of all sequences */
    uint32_t partial_rows; /* of parts, times their chunks if those stay apart */
    uint32_t new_rows;
    uint32_t pages;
    uint32_t most_queries;
    uint64_t pieces, merges, slots; /* at most, of one wave */
} tally;

/* What is uploaded, and what comes back. */
typedef struct {
    place sequences, lengths, page_offsets, page_table, places, queries, keys, values, sinks;
    place first_pieces, pieces, merges, slots;
    place out, lse, partial_out, partial_lse;
    size_t down_bytes;
} call_memory;

static uint32_t chunks_of(uint32_t length) { return (length + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS; }

static uint32_t pages_of(const attn_geometry *geometry, uint32_t length) {
    return (uint32_t)(((uint64_t)length + geometry->page_size - 1) / geometry->page_size);
}

static tally count_batch(const cuda_backend *self, const attn_batch *batch) {
    tally count = {0};
    uint64_t units = 0;
    const attn_line *line = &self->base.line;
    for (uint32_t i = 0; i < batch->size; i++) {
        uint32_t queries = batch->query_lengths[i];
        units += (queries + line->block_queries - 1) / line->block_queries * self->base.geometry.heads_kv;
        count.rows += queries;
        count.new_rows += attn_batch_new_rows(batch, i);
        count.pages += pages_of(&self->base.geometry, batch->lengths[i]);
        if (queries > count.most_queries) count.most_queries = queries;
        if (attn_batch_part(batch, i) == NULL) continue;
        count.partial_rows += queries * (batch->batch_invariant ? chunks_of(batch->lengths[i]) : 1);
    }
    uint64_t total = attn_line_total(line), wave = total < self->slots ? total : self->slots;
    /* A chunk a tile; or a run a unit, and one more where a worker begins. */
    count.pieces = batch->batch_invariant ? wave : units + line->workers;
    count.merges = batch->batch_invariant ? wave : line->workers;
    count.slots = batch->batch_invariant ? wave : 2 * (uint64_t)line->workers;
    return count;
}

static void lay_out(const cuda_backend *self, const attn_batch *batch, const tally *count, carver *up, carver *down,
                    call_memory *memory) {
    const attn_geometry *geometry = &self->base.geometry;
    memory->sequences = carve(up, batch->size * sizeof(attn_cuda_sequence));
    memory->lengths = carve(up, batch->size * sizeof(uint32_t));
    memory->page_offsets = carve(up, batch->size * sizeof(uint32_t));
    memory->page_table = carve(up, count->pages * sizeof(uint32_t));
    memory->places = carve(up, count->new_rows * sizeof(uint32_t));
    memory->queries = carve(up, count->rows * attn_query_row_bytes(geometry));
    memory->keys = carve(up, count->new_rows * attn_key_row_bytes(geometry));
    memory->values = carve(up, count->new_rows * attn_value_row_bytes(geometry));
    memory->sinks = carve(up, geometry->heads_q * sizeof(float));
    memory->first_pieces = carve(up, (self->base.line.workers + 1) * sizeof(uint32_t));
    memory->merges = carve(up, count->merges * sizeof(attn_cuda_merge));
    memory->slots = carve(up, count->slots * sizeof(uint32_t));
    memory->pieces = carve(up, count->pieces * sizeof(attn_cuda_piece)); /* last: only those in use are uploaded */

    memory->out = carve(down, count->rows * attn_out_row_bytes(geometry));
    memory->lse = carve(down, (size_t)count->rows * geometry->heads_q * sizeof(float));
    memory->partial_out =
        carve(down, (size_t)count->partial_rows * geometry->heads_q * geometry->head_dim_v * sizeof(float));
    memory->partial_lse = carve(down, (size_t)count->partial_rows * geometry->heads_q * sizeof(float));
    memory->down_bytes = down->used;
}

static attn_status reserve_call(cuda_backend *self, const attn_batch *batch, const tally *count, call_memory *memory) {
    carver up = {0}, down = {0};
    lay_out(self, batch, count, &up, &down, memory);
    ATTN_TRY(arena_reserve(&self->up, up.used));
    ATTN_TRY(arena_reserve(&self->down, down.used));
    up = (carver){self->up.host, self->up.device, 0};
    down = (carver){self->down.host, self->down.device, 0};
    lay_out(self, batch, count, &up, &down, memory);
    return attn_ok();
}

/* Page tables, where new rows go, and the rows, packed. */
static void fill_rows(const cuda_backend *self, const attn_batch *batch, const call_memory *memory) {
    const attn_geometry *geometry = &self->base.geometry;
    uint32_t row = 0, partial_row = 0, new_row = 0, page = 0;
    for (uint32_t i = 0; i < batch->size; i++) {
        const attn_part *part = attn_batch_part(batch, i);
        const uint32_t *pages = batch->pages + batch->page_offsets[i];
        uint32_t queries = batch->query_lengths[i], new_rows = attn_batch_new_rows(batch, i);
        uint32_t page_count = pages_of(geometry, batch->lengths[i]);
        ((attn_cuda_sequence *)memory->sequences.host)[i] = (attn_cuda_sequence){
            .length = batch->lengths[i],
            .query_length = queries,
            .is_read = attn_batch_is_read(batch, i),
            .chunk_first = part ? part->chunk_first : 0,
            .chunk_stride = part ? part->chunk_stride : 0,
            .page_offset = page,
            .first_query = row,
            .first_out = part ? partial_row : row,
            .chunk_rows = part && batch->batch_invariant ? queries : 0,
            .total_length = part ? part->total_length : batch->lengths[i],
        };
        ((uint32_t *)memory->lengths.host)[i] = batch->lengths[i];
        ((uint32_t *)memory->page_offsets.host)[i] = page;
        memcpy((uint32_t *)memory->page_table.host + page, pages, page_count * sizeof *pages);
        memcpy((char *)memory->queries.host + row * attn_query_row_bytes(geometry), batch->queries[i],
               queries * attn_query_row_bytes(geometry));
        if (new_rows > 0) {
            memcpy((char *)memory->keys.host + new_row * attn_key_row_bytes(geometry), batch->new_keys[i],
                   new_rows * attn_key_row_bytes(geometry));
            memcpy((char *)memory->values.host + new_row * attn_value_row_bytes(geometry), batch->new_values[i],
                   new_rows * attn_value_row_bytes(geometry));
        }
        for (uint32_t t = batch->lengths[i] - new_rows; t < batch->lengths[i]; t++) {
            ((uint32_t *)memory->places.host)[new_row++] =
                pages[t / geometry->page_size] * geometry->page_size + t % geometry->page_size;
        }
        row += queries;
        page += page_count;
        if (part) partial_row += queries * (batch->batch_invariant ? chunks_of(batch->lengths[i]) : 1);
    }
    if (batch->sinks) memcpy(memory->sinks.host, batch->sinks, geometry->heads_q * sizeof(float));
}

/* ------------------------------------------------------------------------------------------- */
/* Pieces */

/* The lists of a wave, as they grow. */
typedef struct {
    attn_cuda_piece *pieces;
    attn_cuda_merge *merges;
    uint32_t *slots;
    uint32_t piece_count, merge_count, slot_count;
} work_lists;

static attn_cuda_piece piece_of(const attn_run *run, uint64_t begin, uint64_t end) {
    return (attn_cuda_piece){.sequence = run->sequence,
                             .head = run->head,
                             .query_first = run->query_first,
                             .queries = run->queries,
                             .token_begin = (uint32_t)begin,
                             .token_end = (uint32_t)end};
}

static attn_cuda_merge *add_merge(work_lists *lists, const attn_run *run) {
    attn_cuda_merge *merge = &lists->merges[lists->merge_count++];
    *merge = (attn_cuda_merge){.sequence = run->sequence,
                               .head = run->head,
                               .query_first = run->query_first,
                               .queries = run->queries,
                               .first_slot = lists->slot_count};
    return merge;
}

/* Default mode: a run is a piece. The first worker of a cut unit lists its merge. */
static void add_run(const cuda_backend *self, work_lists *lists, const attn_run *run) {
    attn_cuda_piece piece = piece_of(run, run->token_begin, run->token_end);
    piece.to = run->whole ? ATTN_CUDA_TO_OUT : ATTN_CUDA_TO_SLOT;
    piece.slot = run->whole ? 0 : run->slot;
    lists->pieces[lists->piece_count++] = piece;
    if (run->whole || run->tile_begin > 0) return;
    attn_cuda_merge *merge = add_merge(lists, run);
    merge->slot_count = attn_run_slots(&self->base.line, run, lists->slots + lists->slot_count);
    lists->slot_count += merge->slot_count;
}

/* batch_invariant: a chunk is a piece, of a part in its own place, else in the slot of its place in the wave. */
static void add_chunks(const cuda_backend *self, work_lists *lists, const attn_run *run) {
    const attn_line *line = &self->base.line;
    bool is_part = attn_batch_part(line->batch, run->sequence) != NULL;
    uint64_t unit_slot = run->line_tile - run->tile_begin - line->begin;
    for (uint64_t tile = run->tile_begin; tile < run->tile_end; tile++) {
        uint64_t begin, end;
        attn_run_tile(line, run, tile, &begin, &end);
        attn_cuda_piece piece = piece_of(run, begin, end);
        piece.to = is_part ? ATTN_CUDA_TO_OUT : ATTN_CUDA_TO_SLOT;
        piece.slot = (uint32_t)(is_part ? attn_run_chunk(run, tile) : unit_slot + tile);
        if (is_part && piece.slot >= chunks_of(line->batch->lengths[run->sequence])) continue; /* without any token */
        lists->pieces[lists->piece_count++] = piece;
    }
    if (is_part || run->tile_begin > 0) return;
    attn_cuda_merge *merge = add_merge(lists, run);
    merge->slot_count = (uint32_t)run->unit_tiles;
    for (uint64_t tile = 0; tile < run->unit_tiles; tile++) {
        lists->slots[lists->slot_count++] = (uint32_t)(unit_slot + tile);
    }
}

/* What every worker does in this wave. */
static work_lists list_work(const cuda_backend *self, const attn_plan *plan, const call_memory *memory) {
    const attn_line *line = &self->base.line;
    work_lists lists = {.pieces = memory->pieces.host, .merges = memory->merges.host, .slots = memory->slots.host};
    uint32_t *first_pieces = memory->first_pieces.host;
    for (uint32_t w = 0; w < line->workers; w++) {
        attn_walk walk;
        attn_run run;
        first_pieces[w] = lists.piece_count;
        attn_walk_start(&walk, line, w, plan);
        while (attn_walk_next(&walk, &run)) {
            (line->batch->batch_invariant ? add_chunks : add_run)(self, &lists, &run);
        }
    }
    first_pieces[line->workers] = lists.piece_count;
    return lists;
}

/* ------------------------------------------------------------------------------------------- */
/* Launches */

static attn_cuda_work describe_work(const cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                                    uint32_t merges, uint32_t most_queries) {
    return (attn_cuda_work){
        .layer = layer_at(self, batch->layer),
        .sequences = memory->sequences.device,
        .page_table = memory->page_table.device,
        .pieces = memory->pieces.device,
        .first_pieces = memory->first_pieces.device,
        .merges = memory->merges.device,
        .slots = memory->slots.device,
        .queries = memory->queries.device,
        .sinks = batch->sinks ? memory->sinks.device : NULL,
        .out = memory->out.device,
        .lse = memory->lse.device,
        .partial_out = memory->partial_out.device,
        .partial_lse = memory->partial_lse.device,
        .slot_out = self->slot_out,
        .slot_lse = self->slot_lse,
        .status = self->status,
        .scale = batch->scale,
        .softcap = batch->softcap,
        .window = batch->window,
        .workers = self->base.line.workers,
        .merge_count = merges,
        .rows = (most_queries < self->base.line.block_queries ? most_queries : self->base.line.block_queries) *
                group_of(self),
    };
}

static attn_status upload(cuda_backend *self, const void *from, const void *to_end) {
    size_t offset = (size_t)((const char *)from - self->up.host);
    return cuda_status(cudaMemcpyAsync(self->up.device + offset, from,
                                       (size_t)((const char *)to_end - (const char *)from), cudaMemcpyHostToDevice,
                                       self->stream),
                       "upload of a call");
}

static attn_status run_wave(cuda_backend *self, const attn_batch *batch, const attn_plan *plan,
                            const call_memory *memory, uint32_t most_queries) {
    work_lists lists = list_work(self, plan, memory);
    ATTN_TRY(upload(self, memory->first_pieces.host, lists.pieces + lists.piece_count));
    attn_cuda_work work = describe_work(self, batch, memory, lists.merge_count, most_queries);
    CUDA_TRY(attn_cuda_attend(&work, self->stream));
    CUDA_TRY(attn_cuda_merge_units(&work, self->stream));
    self->launches += lists.merge_count > 0 ? 2 : 1;
    return attn_ok();
}

static attn_status append_new_rows(cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                                   uint32_t rows) {
    attn_cuda_layer layer = layer_at(self, batch->layer);
    CUDA_TRY(attn_cuda_append(&layer, memory->places.device, memory->keys.device, memory->values.device, rows,
                              self->status, self->stream));
    self->launches += rows > 0;
    return attn_ok();
}

/* Every piece by the kernels that can do everything. */
static attn_status run_pieces(cuda_backend *self, const attn_batch *batch, const attn_plan *plan,
                              const call_memory *memory, const tally *count) {
    if (!batch->batch_invariant) return run_wave(self, batch, plan, memory, count->most_queries);
    attn_line *line = &self->base.line;
    attn_line_first_wave(line);
    for (bool first = true; attn_line_next_wave(line, self->slots); first = false) {
        if (!first) CUDA_TRY(cudaStreamSynchronize(self->stream)); /* the lists have been read */
        ATTN_TRY(run_wave(self, batch, plan, memory, count->most_queries));
    }
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Hopper's fast path: plans, attends and merges in one launch, from the live lengths */

static bool fits_hopper(const cuda_backend *self, const attn_batch *batch, const tally *count) {
    if (!self->is_hopper || count->most_queries > 1 || count->partial_rows > 0) return false;
    return !batch->batch_invariant && batch->softcap == 0 && batch->window == 0 && !batch->sinks;
}

static attn_status run_hopper(cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                              const tally *count) {
    attn_hopper_decode decode = {
        .pool = layer_at(self, batch->layer).memory,
        .pool_pages = self->base.pages,
        .page_size = self->base.geometry.page_size,
        .heads_kv = self->base.geometry.heads_kv,
        .group = group_of(self),
        .batch = batch->size,
        .lengths = memory->lengths.device,
        .page_table = memory->page_table.device,
        .page_table_stride = count->pages / batch->size,
        .page_offsets = memory->page_offsets.device,
        .queries = memory->queries.device,
        .out = memory->out.device,
        .lse = memory->lse.device,
        .scale = batch->scale,
        .workspace = self->workspace,
    };
    CUDA_TRY(attn_hopper_decode_launch(&decode, &self->tuning, self->stream));
    self->launches++;
    return attn_ok();
}

static attn_status allocate_workspace(cuda_backend *self, const struct cudaDeviceProp *properties) {
    const attn_geometry *geometry = &self->base.geometry;
    self->is_hopper = properties->major == 9 && geometry->dtype == ATTN_BF16 && geometry->page_size <= 64 &&
                      geometry->head_dim == ATTN_HOPPER_HEAD_DIM && geometry->head_dim_v == ATTN_HOPPER_HEAD_DIM;
    self->tuning = (attn_hopper_tuning){
        .workers = (uint32_t)properties->multiProcessorCount, .blocks_per_sm = 1, .stages = 3, .align_tiles = 4};
    size_t bytes =
        self->is_hopper ? attn_hopper_workspace_bytes(self->tuning.workers, group_of(self)) : sizeof(uint32_t);
    cudaError_t error = cudaMalloc(&self->workspace, bytes);
    if (error == cudaSuccess) error = cudaMemset(self->workspace, 0, bytes);
    self->status = self->workspace;
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError();
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "no device memory for a workspace of %zu bytes: %s", bytes,
                      cudaGetErrorString(error));
}

/* ------------------------------------------------------------------------------------------- */
/* Decoding */

/* From the packed rows to where the caller wants each sequence's. */
static void scatter(const cuda_backend *self, const attn_batch *batch, const call_memory *memory) {
    const attn_geometry *geometry = &self->base.geometry;
    size_t partial_bytes = (size_t)geometry->heads_q * geometry->head_dim_v * sizeof(float);
    size_t lse_bytes = geometry->heads_q * sizeof(float), row = 0, partial_row = 0;
    for (uint32_t i = 0; i < batch->size; i++) {
        size_t queries = batch->query_lengths[i];
        if (attn_batch_part(batch, i)) {
            size_t rows = queries * (batch->batch_invariant ? chunks_of(batch->lengths[i]) : 1);
            memcpy(batch->partials[i].out, (char *)memory->partial_out.host + partial_row * partial_bytes,
                   rows * partial_bytes);
            memcpy(batch->partials[i].lse, (char *)memory->partial_lse.host + partial_row * lse_bytes,
                   rows * lse_bytes);
            partial_row += rows;
        } else {
            memcpy(batch->outs[i], (char *)memory->out.host + row * attn_out_row_bytes(geometry),
                   queries * attn_out_row_bytes(geometry));
            if (batch->lses && batch->lses[i]) {
                memcpy(batch->lses[i], (char *)memory->lse.host + row * lse_bytes, queries * lse_bytes);
            }
        }
        row += queries;
    }
}

/* After settle(). */
static attn_status read_device_time(const cuda_backend *self, attn_timing *timing) {
    float ms = 0;
    CUDA_TRY(cudaEventElapsedTime(&ms, self->kernels_begin, self->kernels_end));
    timing->device_ns = (int64_t)((double)ms * 1e6);
    return attn_ok();
}

static attn_status cuda_decode(attn_backend *backend, const attn_batch *batch, const attn_plan *plan,
                               attn_timing *timing) {
    cuda_backend *self = of(backend);
    call_memory memory;
    int64_t start = attn_now_ns();
    self->launches = 0;
    cudaSetDevice(self->device);
    ATTN_TRY(attn_line_build(&backend->line, batch));
    plan = attn_backend_accept_plan(backend, plan);
    tally count = count_batch(self, batch);
    ATTN_TRY(reserve_call(self, batch, &count, &memory));
    timing->plan_ns = attn_now_ns() - start;

    fill_rows(self, batch, &memory);
    ATTN_TRY(upload(self, self->up.host, memory.first_pieces.host));
    if (batch->device_time) CUDA_TRY(cudaEventRecord(self->kernels_begin, self->stream));
    ATTN_TRY(append_new_rows(self, batch, &memory, count.new_rows));
    if (fits_hopper(self, batch, &count)) {
        ATTN_TRY(run_hopper(self, batch, &memory, &count));
    } else {
        ATTN_TRY(run_pieces(self, batch, plan, &memory, &count));
    }
    if (batch->device_time) CUDA_TRY(cudaEventRecord(self->kernels_end, self->stream));
    CUDA_TRY(
        cudaMemcpyAsync(self->down.host, self->down.device, memory.down_bytes, cudaMemcpyDeviceToHost, self->stream));
    ATTN_TRY(settle(self));
    scatter(self, batch, &memory);
    if (batch->device_time) ATTN_TRY(read_device_time(self, timing));
    timing->launches = self->launches;
    timing->attention_ns = attn_now_ns() - start - timing->plan_ns;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static void cuda_destroy(attn_backend *backend) {
    cuda_backend *self = of(backend);
    cudaSetDevice(self->device);
    if (self->stream) {
        cudaStreamSynchronize(self->stream);
        cudaStreamDestroy(self->stream);
    }
    if (self->kernels_begin) cudaEventDestroy(self->kernels_begin);
    if (self->kernels_end) cudaEventDestroy(self->kernels_end);
    arena_fini(&self->up);
    arena_fini(&self->down);
    cudaFree(self->layer.memory);
    cudaFree(self->slot_out);
    cudaFree(self->slot_lse);
    cudaFree(self->workspace);
    attn_backend_fini(backend);
    free(self);
}

static attn_status allocate_slots(cuda_backend *self) {
    const attn_geometry *geometry = &self->base.geometry;
    size_t slot_bytes = ATTN_CUDA_MAX_ROWS * geometry->head_dim_v * sizeof(float);
    uint64_t least = attn_line_min_chunk_slots(geometry, self->base.pages), runs = 2 * self->base.line.workers;
    uint64_t usual = (uint64_t)self->base.pages * geometry->page_size / ATTN_CHUNK_TOKENS * geometry->heads_kv;
    if (usual > SLOT_BYTES_MOST / slot_bytes) usual = SLOT_BYTES_MOST / slot_bytes;
    self->slots = runs;
    if (self->slots < least) self->slots = least;
    if (self->slots < usual) self->slots = usual;
    cudaError_t error = cudaMalloc((void **)&self->slot_out, self->slots * slot_bytes);
    if (error == cudaSuccess) {
        error = cudaMalloc((void **)&self->slot_lse, self->slots * ATTN_CUDA_MAX_ROWS * sizeof(float));
    }
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError();
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "no device memory for partial results: %zu MiB: %s",
                      (size_t)(self->slots * slot_bytes >> 20), cudaGetErrorString(error));
}

/* Device `rank`; where there are more ranks than devices, they share them in turn. */
static attn_status open_device(uint32_t rank, int *device, struct cudaDeviceProp *properties) {
    char why[160];
    int count = 0;
    if (attn_cuda_probe(why, sizeof why) == 0) return attn_error(ATTN_UNAVAILABLE, "cuda: %s", why);
    CUDA_TRY(cudaGetDeviceCount(&count));
    *device = (int)(rank % (uint32_t)count);
    CUDA_TRY(cudaGetDeviceProperties(properties, *device));
    if (properties->major < 8) {
        return attn_error(ATTN_UNAVAILABLE, "cuda: device %d is %.80s of compute capability %d.%d; 8.0 is needed",
                          *device, properties->name, properties->major, properties->minor);
    }
    CUDA_TRY(cudaSetDevice(*device));
    CUDA_TRY(attn_cuda_prepare());
    return attn_ok();
}

static attn_status cuda_create(const attn_backend_config *config, attn_backend **backend) {
    attn_status status = attn_ok();
    struct cudaDeviceProp properties;
    int device = 0;
    ATTN_TRY(open_device(config->device, &device, &properties));
    cuda_backend *self = calloc(1, sizeof *self);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a cuda backend");
    self->device = device;
    uint32_t workers = BLOCKS_AN_SM * (uint32_t)properties.multiProcessorCount;
    attn_backend_init(&self->base, &attn_cuda_backend_ops, config, ATTN_CUDA_TILE_TOKENS,
                      ATTN_CUDA_MAX_ROWS / (config->geometry.heads_q / config->geometry.heads_kv), workers);
    ATTN_TRY_GOTO(status, allocate_pool(self, config), cleanup);
    ATTN_TRY_GOTO(status, allocate_slots(self), cleanup);
    ATTN_TRY_GOTO(status, allocate_workspace(self, &properties), cleanup);
    ATTN_TRY_GOTO(status, cuda_status(cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking), "stream"),
                  cleanup);
    ATTN_TRY_GOTO(status, cuda_status(cudaEventCreate(&self->kernels_begin), "event"), cleanup);
    ATTN_TRY_GOTO(status, cuda_status(cudaEventCreate(&self->kernels_end), "event"), cleanup);
    snprintf(self->base.description, sizeof self->base.description, "cuda %d, %.80s, sm_%d%d, %u workers%s", device,
             properties.name, properties.major, properties.minor, workers, self->is_hopper ? ", Hopper's decode" : "");
    *backend = &self->base;
    return status;
cleanup:
    cuda_destroy(&self->base);
    return status;
}

const attn_backend_ops attn_cuda_backend_ops = {
    .kind = "cuda",
    .create = cuda_create,
    .destroy = cuda_destroy,
    .append = cuda_append,
    .decode = cuda_decode,
    .copy_page = cuda_copy_page,
    .poison = cuda_poison,
};
