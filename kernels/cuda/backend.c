/*
 * The cuda backend. A call's tables and rows are packed into pinned memory and uploaded at once; then, for the
 * geometries of decode.h, one launch stores the new rows, plans, attends and merges (two where prefixes are shared).
 * For others the host walks the line over the lengths of the call and uploads what the thread blocks have to do;
 * append, attend and merge follow one another (attend.cu). Kernels write outputs straight to pinned memory.
 *
 * Two decodes may be started (kernels/pipeline.h). All kernels are on one stream, in order, and share the device memory
 * that they work in; what is filled, uploaded or read while kernels of another decode run, each has for itself
 * (flight).
 *
 * What a call puts into an arena is laid out twice by the same function: with no memory, which measures, and in
 * earnest.
 */
#define _POSIX_C_SOURCE 200809L

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/backend.h"
#include "kernels/cpu/workers.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/export.h"
#include "kernels/cuda/in_place.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/nccl_channel.h"
#include "kernels/cuda/probe.h"
#ifndef ATTN_RELEASE
#include "kernels/cuda/fault.h"
#endif

/* Builds that take every device for one from before Hopper, to try the kernels for those (.bazelrc). */
#ifdef ATTN_CUDA_GENERIC
#define HOPPER_MAJOR 0
#else
#define HOPPER_MAJOR 9
#endif

#define ALIGNMENT          256
#define BLOCKS_AN_SM       2
#define COPIERS_MOST       6
#define FLIGHTS            2
#define UPLOADED_BY_ITSELF ((size_t)64 << 10)
#define SLOT_BYTES_MOST                                                                                                \
    ((size_t)256 << 20) /* batch_invariant: of partial results of a wave, at least one sequence's                      \
                         */

/*
 * Memory of which a call takes what it needs. Pinned memory, and what the device sees of it: device memory with the
 * same layout, or the same memory; or device memory alone. Only grows.
 */
typedef enum { ARENA_COPIED, ARENA_SHARED, ARENA_DEVICE } arena_kind;

typedef struct {
    char *host, *device;
    size_t bytes;
    arena_kind kind;
} arena;

typedef struct {
    void *host, *device;
} place;

/* What is uploaded, and what comes back. */
typedef struct {
    place sequences, lengths, page_offsets, page_table, places, queries, keys, values, sinks;
    /* The sequences as their rows are packed: first those that share a prefix; and which those are. If there are any.
     */
    place order, is_sharing;
    place first_pieces, pieces, merges, slots;
    place out, lse, partial_out, partial_lse;
    uint32_t *status; /* pinned: set to 1 by a kernel that met a page outside the pool */
} call_memory;

/* A decode from its start until it is finished. Two take turns; append and export use the first, with none started. */
typedef struct {
    arena up, down;
    arena rows; /* device memory for rows that come from where they are */
    attn_cuda_rows_in_place in_place;
    uint32_t *status;                       /* pinned; call_memory.status */
    cudaEvent_t uploaded, ended;            /* recorded behind its upload and its last kernel */
    cudaEvent_t kernels_begin, kernels_end; /* attn_batch.device_time: around the kernels */
    const attn_batch *batch;
    call_memory memory;
    size_t out_bytes; /* of what is to be copied out, about */
    int64_t start_ns;
    attn_timing timing; /* what is known of it */
} flight;

typedef struct {
    attn_backend base;
    int device;
    cudaStream_t stream;
    cudaStream_t uploads;  /* of decodes that are started behind another */
    attn_cuda_layer layer; /* .memory is that of layer 0 */
    size_t layer_bytes;
    flight flights[FLIGHTS];
    uint32_t oldest;            /* flight; base.started of them from it on are started */
    attn_cpu_workers *copiers;  /* copy rows to pinned memory and back, which takes a core as long as the kernels do */
    arena apart;                /* what sequences that share a prefix leave to be merged: device memory */
    float *slot_out, *slot_lse; /* device; [slots, MAX_ROWS, head_dim_v], [slots, MAX_ROWS] */
    uint64_t slots;
    bool is_fast; /* the geometry and the device are what decode.h is for; else slot_out and slot_lse are there */
    attn_cuda_tuning tuning;
    attn_cuda_workspace runs, chunks; /* of decode.h: default mode, batch_invariant */
    float *scales;                    /* device; fp8: [2, layers, heads_kv], of keys and of values; else NULL */
    uint32_t *statuses;               /* pinned, [FLIGHTS] */
    attn_cuda_borrowed borrowed;
    cudaError_t failed; /* what an operation that returns nothing has met */
    uint32_t launches;  /* of kernels, by the decode that is being started */
} cuda_backend;

static cuda_backend *of(attn_backend *backend) { return (cuda_backend *)backend; }

static uint32_t group_of(const cuda_backend *self) {
    return self->base.geometry.heads_q / self->base.geometry.heads_kv;
}

/*
 * Rows of a block of the narrow kernels, which batch_invariant is for: a unit of the line, here as there. The kernels
 * for any geometry take up to 16, too.
 */
static uint32_t narrow_rows(const attn_geometry *geometry) {
    return geometry->heads_q / geometry->heads_kv <= 8 ? 8 : 16;
}

/* ------------------------------------------------------------------------------------------- */
/* Errors: after one, nothing of the device is to be relied on, and the rank is lost */

static attn_status cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError(); /* a later launch of this thread, in a new context maybe, is not to be taken for this one */
    return attn_error(ATTN_UNAVAILABLE, "cuda: %s: %s", what, cudaGetErrorString(error));
}

#define CUDA_TRY(call) ATTN_TRY(cuda_status((cudaError_t)(call), #call))

/* ------------------------------------------------------------------------------------------- */
/* Arenas */

static void arena_fini(arena *memory) {
    cudaFreeHost(memory->host);
    if (memory->kind != ARENA_SHARED) attn_cuda_free(memory->device);
    *memory = (arena){.kind = memory->kind};
}

/* Waits for the device where it has to grow. False: there is no memory, and the arena is empty, or the device has
 * failed, as *status says. */
static bool arena_reserve(arena *memory, size_t bytes, attn_status *status) {
    *status = attn_ok();
    if (bytes <= memory->bytes) return true;
    size_t grown = memory->bytes < ((size_t)1 << 20) ? (size_t)1 << 20 : memory->bytes;
    while (grown < bytes)
        grown *= 2;
    if (ATTN_CUDA_IS_CHECKED) grown = bytes;
    /* Kernels of a decode before this one may still be using it. */
    *status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize()");
    if (attn_failed(*status)) return false;
    arena_fini(memory);
    cudaError_t error = cudaSuccess;
    if (memory->kind != ARENA_DEVICE) error = cudaMallocHost((void **)&memory->host, grown);
    if (memory->kind == ARENA_SHARED) memory->device = memory->host;
    if (error == cudaSuccess && memory->kind != ARENA_SHARED)
        error = attn_cuda_allocate((void **)&memory->device, grown, "staging memory");
    if (error != cudaSuccess) {
        cudaGetLastError();
        arena_fini(memory);
        attn_code code = attn_cuda_context_is_broken() ? ATTN_UNAVAILABLE : ATTN_RESOURCE_EXHAUSTED;
        *status =
            attn_error(code, "cuda: no memory to stage a call of %zu bytes: %s", bytes, cudaGetErrorString(error));
        return false;
    }
    memory->bytes = grown;
    return true;
}

/* Lays out what an arena holds. Without one, which measures, the places are NULL, and only `used` counts. */
typedef struct {
    const arena *memory;
    size_t used;
} carver;

static place carve(carver *from, size_t bytes) {
    place carved = {NULL, NULL};
    if (from->memory != NULL) carved = (place){from->memory->host + from->used, from->memory->device + from->used};
    from->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return carved;
}

/* ------------------------------------------------------------------------------------------- */
/* The pool */

static attn_cuda_layer layer_at(const cuda_backend *self, uint32_t layer) {
    attn_cuda_layer found = self->layer;
    found.memory += layer * self->layer_bytes;
    if (self->scales) {
        found.key_scales = self->scales + (size_t)layer * found.heads_kv;
        found.value_scales = found.key_scales + (size_t)self->base.geometry.layers * found.heads_kv;
    }
    return found;
}

/* The least head_dim that decode.h has a kernel for. */
static uint32_t padded_dim(uint32_t dim) {
    static const uint32_t built[] = {64, 96, 128, 192};
    for (size_t i = 0; i < sizeof built / sizeof *built; i++) {
        if (dim <= built[i]) return built[i];
    }
    return 256;
}

/*
 * The dims that kernels work with: columns of zeros behind the geometry's change neither scores nor outputs. Float32
 * has no tensor cores, and stays as it is.
 */
static void pad_dims(attn_cuda_layer *layer) {
    if (layer->dtype == ATTN_FP32) return;
    layer->head_dim = padded_dim(layer->head_dim);
    layer->head_dim_v = padded_dim(layer->head_dim_v);
    if (layer->head_dim == 192 && layer->head_dim_v <= 128) {
        layer->head_dim_v = 128;
    } else if (layer->head_dim > layer->head_dim_v) {
        layer->head_dim_v = layer->head_dim;
    } else {
        layer->head_dim = layer->head_dim_v;
    }
}

/* Copies rows of `from_bytes` each to rows of `to_bytes` each: cut, or filled up with zeros. */
static void copy_rows(void *to, size_t to_bytes, const void *from, size_t from_bytes, size_t rows) {
    if (to_bytes == from_bytes) {
        memcpy(to, from, rows * to_bytes);
        return;
    }
    size_t kept = to_bytes < from_bytes ? to_bytes : from_bytes;
    for (size_t i = 0; i < rows; i++) {
        memcpy((char *)to + i * to_bytes, (const char *)from + i * from_bytes, kept);
        memset((char *)to + i * to_bytes + kept, 0, to_bytes - kept);
    }
}

/* Bytes of one head's row on the device, in the layer's dtype; and on the host. */
typedef struct {
    size_t key, value; /* also of a query; of an output */
} row_bytes;

static row_bytes device_row(const cuda_backend *self) {
    size_t element = attn_dtype_bytes(self->base.geometry.dtype);
    return (row_bytes){self->layer.head_dim * element, self->layer.head_dim_v * element};
}

static row_bytes host_row(const cuda_backend *self) {
    size_t element = attn_dtype_bytes(self->base.geometry.dtype);
    return (row_bytes){self->base.geometry.head_dim * element, self->base.geometry.head_dim_v * element};
}

static attn_status allocate_pool(cuda_backend *self, const attn_backend_config *config) {
    const attn_geometry *geometry = &config->geometry;
    uint32_t element = (uint32_t)attn_dtype_bytes(attn_kv_dtype(geometry));
    self->layer = (attn_cuda_layer){
        .pages = config->pages,
        .page_size = geometry->page_size,
        .heads_q = geometry->heads_q,
        .heads_kv = geometry->heads_kv,
        .head_dim = geometry->head_dim,
        .head_dim_v = geometry->head_dim_v,
        .dtype = geometry->dtype,
        .kv_dtype = attn_kv_dtype(geometry),
        .element_bytes = element,
    };
    pad_dims(&self->layer);
    self->layer.tile_bytes =
        attn_cuda_tile_bytes(geometry->page_size, self->layer.head_dim, self->layer.head_dim_v, element);
    size_t bytes;
    if (__builtin_mul_overflow((size_t)self->layer.tile_bytes * geometry->heads_kv, (size_t)config->pages,
                               &self->layer_bytes) ||
        __builtin_mul_overflow(self->layer_bytes, (size_t)geometry->layers, &bytes)) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "a KV pool of %u pages of %zu bytes is more than an address space",
                          config->pages, attn_page_bytes(geometry));
    }
    cudaError_t error = attn_cuda_allocate((void **)&self->layer.memory, bytes, "KV pool");
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

void attn_cuda_describe_end(attn_backend *backend, attn_channel_end *end) {
    const cuda_backend *self = of(backend);
    end->pool = self->layer.memory;
    end->layer_bytes = self->layer_bytes;
    end->page_bytes = (size_t)self->layer.tile_bytes * self->layer.heads_kv;
    end->device = self->device;
}

static void cuda_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots) {
    cuda_backend *self = of(backend);
    cudaSetDevice(self->device);
    for (uint32_t i = 0; i < backend->geometry.layers; i++) {
        attn_cuda_layer layer = layer_at(self, i);
        note(self, (cudaError_t)attn_cuda_poison(&layer, page, first_slot, slots, self->stream));
    }
}

/* Waits for the flight, whose kernels have all been launched, and says what has gone wrong with it. */
static attn_status settle(cuda_backend *self, flight *settled) {
    CUDA_TRY(self->failed);
    CUDA_TRY(cudaEventSynchronize(settled->ended));
    if (ATTN_CUDA_IS_CHECKED) CUDA_TRY(cudaStreamSynchronize(self->stream)); /* for the guards: idle */
    const char *damaged = attn_cuda_check_guards();
    if (damaged != NULL) return attn_error(ATTN_INTERNAL, "cuda: something was written next to the %s", damaged);
    if (*settled->status == 0) return attn_ok();
    *settled->status = 0;
    return attn_error(ATTN_INTERNAL, "a page table led a kernel to a page outside the pool");
}

/* ------------------------------------------------------------------------------------------- */
/* Uploads; appending and exporting rows of one sequence */

static attn_status upload(place from, const void *to_end, cudaStream_t stream) {
    size_t bytes = (size_t)((const char *)to_end - (const char *)from.host);
    return cuda_status(cudaMemcpyAsync(from.device, from.host, bytes, cudaMemcpyHostToDevice, stream),
                       "upload of a call");
}

static attn_status upload_rows(const void *from, place to, size_t bytes, cudaStream_t stream) {
    if (bytes == 0) return attn_ok();
    CUDA_TRY(cudaMemcpyAsync(to.device, from, bytes, cudaMemcpyHostToDevice, stream));
    return attn_ok();
}

/* Where `tokens` tokens of a page table are, as the kernels take it: page * page_size + slot. */
static void fill_places(const cuda_backend *self, uint32_t *places, const uint32_t *pages, uint64_t position,
                        uint32_t tokens) {
    uint32_t page_size = self->base.geometry.page_size;
    for (uint32_t t = 0; t < tokens; t++) {
        uint64_t token = position + t;
        places[t] = pages[token / page_size] * page_size + (uint32_t)(token % page_size);
    }
}

/* Is the host's row of a head as long as the device's? Else rows are copied to be filled up, or cut. */
static bool has_rows_as_they_are(const cuda_backend *self) {
    return self->base.geometry.head_dim == self->layer.head_dim &&
           self->base.geometry.head_dim_v == self->layer.head_dim_v;
}

/* Need key and value rows, of so many heads in all, not be copied? */
static bool stays(const cuda_backend *self, const void *keys, const void *values, size_t rows) {
    row_bytes row = host_row(self);
    return has_rows_as_they_are(self) && attn_cuda_address(&self->borrowed, keys, rows * row.key) &&
           attn_cuda_address(&self->borrowed, values, rows * row.value);
}

static attn_status cuda_append(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                               uint32_t tokens, const void *keys, const void *values) {
    cuda_backend *self = of(backend);
    flight *only = &self->flights[0];
    size_t rows = (size_t)tokens * backend->geometry.heads_kv;
    row_bytes there = device_row(self), here = host_row(self);
    place at, key, value;
    attn_status status;
    bool stay = stays(self, keys, values, rows);
    cudaSetDevice(self->device);
    for (int earnest = 0; earnest < 2; earnest++) {
        carver from = {.memory = earnest ? &only->up : NULL}, apart = {.memory = earnest ? &only->rows : NULL};
        at = carve(&from, tokens * sizeof(uint32_t));
        key = carve(stay ? &apart : &from, rows * there.key);
        value = carve(stay ? &apart : &from, rows * there.value);
        if (earnest) continue;
        if (!arena_reserve(&only->up, from.used, &status) || !arena_reserve(&only->rows, apart.used, &status)) {
            return status;
        }
    }
    fill_places(self, at.host, pages, position, tokens);
    if (stay) {
        ATTN_TRY(upload(at, (uint32_t *)at.host + tokens, self->stream));
        ATTN_TRY(upload_rows(keys, key, rows * here.key, self->stream));
        ATTN_TRY(upload_rows(values, value, rows * here.value, self->stream));
    } else {
        copy_rows(key.host, there.key, keys, here.key, rows);
        copy_rows(value.host, there.value, values, here.value, rows);
        ATTN_TRY(upload(at, (char *)value.host + rows * there.value, self->stream));
    }
    attn_cuda_layer to = layer_at(self, layer);
    CUDA_TRY(attn_cuda_append(&to, at.device, key.device, value.device, tokens, only->status, self->stream));
    CUDA_TRY(cudaEventRecord(only->ended, self->stream));
    return settle(self, only);
}

static attn_status cuda_export(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                               uint32_t tokens, void *keys, void *values) {
    cuda_backend *self = of(backend);
    flight *only = &self->flights[0];
    size_t rows = (size_t)tokens * backend->geometry.heads_kv;
    row_bytes there = device_row(self), here = host_row(self);
    place at, key, value;
    attn_status status;
    bool stay = stays(self, keys, values, rows);
    cudaSetDevice(self->device);
    for (int earnest = 0; earnest < 2; earnest++) {
        carver up = {.memory = earnest ? &only->up : NULL}, down = {.memory = earnest ? &only->down : NULL};
        at = carve(&up, tokens * sizeof(uint32_t));
        key = carve(&down, rows * there.key);
        value = carve(&down, rows * there.value);
        if (stay) {
            key.device = attn_cuda_address(&self->borrowed, keys, rows * here.key);
            value.device = attn_cuda_address(&self->borrowed, values, rows * here.value);
        }
        if (earnest) continue;
        if (!arena_reserve(&only->up, up.used, &status) || !arena_reserve(&only->down, down.used, &status)) {
            return status;
        }
    }
    fill_places(self, at.host, pages, position, tokens);
    ATTN_TRY(upload(at, (uint32_t *)at.host + tokens, self->stream));
    attn_cuda_layer from = layer_at(self, layer);
    CUDA_TRY(attn_cuda_export(&from, at.device, key.device, value.device, tokens, only->status, self->stream));
    CUDA_TRY(cudaEventRecord(only->ended, self->stream));
    ATTN_TRY(settle(self, only));
    if (stay) return attn_ok();
    copy_rows(keys, here.key, key.host, there.key, rows);
    copy_rows(values, here.value, value.host, there.value, rows);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* A call's tables and rows */

/* How much of everything a batch has. */
typedef struct {
    uint32_t rows;         /* query rows of all sequences */
    uint32_t partial_rows; /* of parts, times their chunks if those stay apart */
    uint32_t sharing;      /* sequences whose prefixes are attended to together.. */
    uint32_t shared_rows;  /* ..their query rows */
    uint32_t prefixes;     /* ..and how many those are: all or none of the batch's */
    uint32_t new_rows;
    uint32_t pages;
    uint32_t most_queries;
    uint32_t most_sharing_queries;  /* of the sequences that share a prefix, together */
    uint32_t shortest, longest;     /* tokens of a sequence in this pool */
    uint64_t pieces, merges, slots; /* at most, of one wave */
} tally;

static uint32_t chunks_of(uint32_t length) { return (length + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS; }

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

static tally count_batch(const cuda_backend *self, const attn_batch *batch) {
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
        count.partial_rows += queries * (batch->batch_invariant ? chunks_of(batch->lengths[i]) : 1);
    }
    if (shares_prefixes(self, batch)) count_prefixes(batch, &count);
    uint64_t total = attn_line_total(line), wave = total < self->slots ? total : self->slots;
    /* A chunk a tile; or a run a unit, and one more where a worker begins. */
    count.pieces = batch->batch_invariant ? wave : units + line->workers;
    count.merges = batch->batch_invariant ? wave : line->workers;
    count.slots = batch->batch_invariant ? wave : 2 * (uint64_t)line->workers;
    return count;
}

/* Rows that come from where they are have device memory of their own; the others are uploaded with the tables. */
static void lay_out(const cuda_backend *self, const flight *of, const tally *count, carver *up, carver *rows,
                    carver *down, call_memory *memory) {
    const attn_batch *batch = of->batch;
    const attn_geometry *geometry = &self->base.geometry;
    row_bytes row = device_row(self);
    size_t query_rows = (size_t)count->rows * geometry->heads_q,
           new_rows = (size_t)count->new_rows * geometry->heads_kv;
    size_t partial_rows = (size_t)count->partial_rows * geometry->heads_q;
    memory->sequences = carve(up, (batch->size + count->prefixes) * sizeof(attn_cuda_sequence));
    if (count->prefixes > 0) {
        memory->order = carve(up, batch->size * sizeof(uint32_t));
        memory->is_sharing = carve(up, batch->size * sizeof(uint32_t));
    }
    memory->lengths = carve(up, batch->size * sizeof(uint32_t));
    memory->page_offsets = carve(up, batch->size * sizeof(uint32_t));
    memory->page_table = carve(up, count->pages * sizeof(uint32_t));
    memory->places = carve(up, count->new_rows * sizeof(uint32_t));
    if (!of->in_place.ins) rows = up;
    memory->queries = carve(rows, query_rows * row.key);
    memory->keys = carve(rows, new_rows * row.key);
    memory->values = carve(rows, new_rows * row.value);
    memory->sinks = carve(up, geometry->heads_q * sizeof(float));
    memory->first_pieces = carve(up, (self->base.line.workers + 1) * sizeof(uint32_t));
    memory->merges = carve(up, count->merges * sizeof(attn_cuda_merge));
    memory->slots = carve(up, count->slots * sizeof(uint32_t));
    memory->pieces = carve(up, count->pieces * sizeof(attn_cuda_piece)); /* last: only those in use are uploaded */

    memory->out = carve(down, query_rows * row.value);
    memory->lse = carve(down, query_rows * sizeof(float));
    memory->partial_out = carve(down, partial_rows * self->layer.head_dim_v * sizeof(float));
    memory->partial_lse = carve(down, partial_rows * sizeof(float));
}

/* False: as arena_reserve. */
static bool reserve_call(const cuda_backend *self, flight *next, const tally *count, attn_status *status) {
    carver up = {0}, rows = {0}, down = {0};
    next->memory = (call_memory){.status = next->status};
    lay_out(self, next, count, &up, &rows, &down, &next->memory);
    if (!arena_reserve(&next->up, up.used, status) || !arena_reserve(&next->rows, rows.used, status) ||
        !arena_reserve(&next->down, down.used, status)) {
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

/*
 * Which of the batch's rows stay where they are. Uploads of their own cost more than copies of few bytes; parts, and
 * sequences that share a prefix, have rows in another order.
 */
static attn_cuda_rows_in_place find_rows(const cuda_backend *self, const attn_batch *batch, size_t in_bytes,
                                         const tally *count) {
    if (!has_rows_as_they_are(self) || batch->parts != NULL || count->prefixes > 0) {
        return (attn_cuda_rows_in_place){0};
    }
    attn_cuda_rows_in_place found = attn_cuda_find_rows(&self->borrowed, &self->base.geometry, batch);
    if (in_bytes < UPLOADED_BY_ITSELF) found.ins = false;
    return found;
}

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
    if (part) at->partial_row += queries * (batch->batch_invariant ? chunks_of(batch->lengths[i]) : 1);
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
    row_bytes there = device_row(rows->self), here = host_row(rows->self);
    uint32_t i = sequence_at(rows->memory, k);
    char *queries = (char *)rows->memory->queries.host + (size_t)to->first_query * geometry->heads_q * there.key;
    copy_rows(queries, there.key, rows->batch->queries[i], here.key, (size_t)to->query_length * geometry->heads_q);
    if (to->new_rows == 0) return;
    size_t first = (size_t)to->first_new * geometry->heads_kv, count = (size_t)to->new_rows * geometry->heads_kv;
    char *keys = (char *)rows->memory->keys.host + first * there.key;
    char *values = (char *)rows->memory->values.host + first * there.value;
    copy_rows(keys, there.key, rows->batch->new_keys[i], here.key, count);
    copy_rows(values, there.value, rows->batch->new_values[i], here.value, count);
}

/* Partial results of a part, or outputs. */
static void copy_out(const copying *rows, uint32_t k) {
    const cuda_backend *self = rows->self;
    const attn_batch *batch = rows->batch;
    const attn_geometry *geometry = &self->base.geometry;
    const attn_cuda_sequence *from = (const attn_cuda_sequence *)rows->memory->sequences.host + k;
    size_t there = device_row(self).value, here = host_row(self).value, heads = geometry->heads_q;
    uint32_t i = sequence_at(rows->memory, k);
    size_t first = from->first_out * heads, count = from->query_length * heads;
    if (attn_batch_part(batch, i) != NULL) {
        size_t partial_there = self->layer.head_dim_v * sizeof(float);
        if (batch->batch_invariant) count *= chunks_of(batch->lengths[i]);
        copy_rows(batch->partials[i].out, geometry->head_dim_v * sizeof(float),
                  (const char *)rows->memory->partial_out.host + first * partial_there, partial_there, count);
        memcpy(batch->partials[i].lse, (const float *)rows->memory->partial_lse.host + first, count * sizeof(float));
        return;
    }
    copy_rows(batch->outs[i], here, (const char *)rows->memory->out.host + first * there, there, count);
    if (batch->lses && batch->lses[i]) {
        memcpy(batch->lses[i], (const float *)rows->memory->lse.host + first, count * sizeof(float));
    }
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

static attn_cuda_call describe_call(const cuda_backend *self, const attn_batch *batch, const call_memory *memory) {
    return (attn_cuda_call){
        .layer = layer_at(self, batch->layer),
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

static attn_cuda_work describe_work(const cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                                    uint32_t merges, uint32_t most_queries) {
    return (attn_cuda_work){
        .call = describe_call(self, batch, memory),
        .pieces = memory->pieces.device,
        .first_pieces = memory->first_pieces.device,
        .merges = memory->merges.device,
        .slots = memory->slots.device,
        .slot_out = self->slot_out,
        .slot_lse = self->slot_lse,
        .workers = self->base.line.workers,
        .merge_count = merges,
        .rows = (most_queries < self->base.line.block_queries ? most_queries : self->base.line.block_queries) *
                group_of(self),
    };
}

/* Tables and rows. */
static attn_status upload_all(const cuda_backend *self, const flight *uploaded, const tally *count,
                              cudaStream_t stream) {
    const call_memory *memory = &uploaded->memory;
    const attn_cuda_rows_in_place *rows = &uploaded->in_place;
    const attn_geometry *geometry = &self->base.geometry;
    ATTN_TRY(upload(memory->sequences, memory->first_pieces.host, stream));
    if (!rows->ins) return attn_ok();
    ATTN_TRY(upload_rows(rows->queries, memory->queries, count->rows * attn_query_row_bytes(geometry), stream));
    ATTN_TRY(upload_rows(rows->keys, memory->keys, count->new_rows * attn_key_row_bytes(geometry), stream));
    return upload_rows(rows->values, memory->values, count->new_rows * attn_value_row_bytes(geometry), stream);
}

/* Beside the kernels of the decode before, where there is one. */
static attn_status upload_flight(cuda_backend *self, const flight *uploaded, const tally *count) {
    if (self->base.started == 0) return upload_all(self, uploaded, count, self->stream);
    ATTN_TRY(upload_all(self, uploaded, count, self->uploads));
    CUDA_TRY(cudaEventRecord(uploaded->uploaded, self->uploads));
    CUDA_TRY(cudaStreamWaitEvent(self->stream, uploaded->uploaded, 0));
    return attn_ok();
}

static attn_status run_wave(cuda_backend *self, const attn_batch *batch, const attn_plan *plan,
                            const call_memory *memory, uint32_t most_queries) {
    work_lists lists = list_work(self, plan, memory);
    ATTN_TRY(upload(memory->first_pieces, lists.pieces + lists.piece_count, self->stream));
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
                              memory->status, self->stream));
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
/* The fast path: stores, plans, attends and merges in one launch, from the live lengths */

static attn_status launch_tuned(cuda_backend *self, const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                                attn_cuda_expected expected) {
    const attn_cuda_workspace *workspace = call->batch_invariant ? &self->chunks : &self->runs;
    CUDA_TRY(attn_cuda_decode_launch(call, tuning, workspace, &expected, self->stream));
    self->launches++;
    return attn_ok();
}

static attn_status launch_decode(cuda_backend *self, const attn_cuda_call *call, attn_cuda_expected expected) {
    return launch_tuned(self, call, &self->tuning, expected);
}

static attn_cuda_expected expected_of(const tally *count) {
    return (attn_cuda_expected){count->most_queries, count->shortest, count->longest};
}

/* The same without the prefixes. */
static attn_cuda_expected expected_of_own(const call_memory *memory, uint32_t batch, uint32_t most_queries) {
    const uint32_t *lengths = memory->lengths.host;
    attn_cuda_expected expected = {most_queries, UINT32_MAX, 0};
    for (uint32_t k = 0; k < batch; k++) {
        if (lengths[k] < expected.shortest) expected.shortest = lengths[k];
        if (lengths[k] > expected.longest) expected.longest = lengths[k];
    }
    return expected;
}

/* batch_invariant: as many sequences at a time as the chunks' slots are enough for. */
static attn_status run_chunks(cuda_backend *self, attn_cuda_call call, const tally *count, bool is_plain) {
    const attn_line *line = &self->base.line;
    const attn_cuda_sequence *sequences = call.sequences;
    uint32_t first = 0, size = line->batch->size;
    while (first < size) {
        uint32_t last = first + 1;
        while (last < size && line->starts[last + 1] - line->starts[first] <= self->chunks.slots)
            last++;
        call.sequences = is_plain && last - first == size ? NULL : sequences + first;
        call.batch = last - first;
        ATTN_TRY(launch_decode(self, &call, expected_of(count)));
        first = last;
    }
    return attn_ok();
}

/*
 * Prefixes, then the sequences' own tokens, with which the prefixes' results are merged. By themselves, since many
 * queries on one prefix are for the kernel with many rows a block, and few on each sequence's own tokens are not.
 */
static attn_status run_prefixes(cuda_backend *self, attn_cuda_call call, const call_memory *memory, const tally *count,
                                bool is_plain) {
    size_t rows = (size_t)count->shared_rows * call.layer.heads_q;
    size_t out_bytes = rows * call.layer.head_dim_v * sizeof(float);
    attn_status status;
    if (!arena_reserve(&self->apart, out_bytes + rows * sizeof(float), &status)) return status;
    attn_cuda_call shared = call;
    shared.partial_out = (void *)self->apart.device;
    shared.partial_lse = (void *)(self->apart.device + out_bytes);
    shared.sequences += call.batch;
    shared.batch = count->prefixes;
    ATTN_TRY(launch_decode(self, &shared, (attn_cuda_expected){.most_queries = count->most_sharing_queries}));
    if (is_plain) call.sequences = NULL;
    call.sharing = count->sharing;
    call.shared_out = shared.partial_out;
    call.shared_lse = shared.partial_lse;
    /* All that it needs of the launch before are results, for which it waits before it writes its own. */
    attn_cuda_tuning overlapping = self->tuning;
    overlapping.overlap_launches = self->tuning.is_hopper;
    return launch_tuned(self, &call, &overlapping, expected_of_own(memory, call.batch, count->most_queries));
}

static attn_status run_decode(cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                              const tally *count) {
    attn_cuda_call call = describe_call(self, batch, memory);
    bool has_new = count->new_rows > 0;
    if (!has_new) call.keys = call.values = NULL;
    bool is_plain = count->most_queries == 1 && count->partial_rows == 0 &&
                    (!has_new || count->new_rows == batch->size); /* as without call.sequences */
    if (batch->batch_invariant) return run_chunks(self, call, count, is_plain);
    if (count->prefixes > 0) return run_prefixes(self, call, memory, count, is_plain);
    if (is_plain) call.sequences = NULL;
    return launch_decode(self, &call, expected_of(count));
}

/* ------------------------------------------------------------------------------------------- */
/* Decoding */

static attn_status launch_flight(cuda_backend *self, flight *launched, const attn_plan *plan, const tally *count) {
    const attn_batch *batch = launched->batch;
    const call_memory *memory = &launched->memory;
    ATTN_TRY(upload_flight(self, launched, count));
    if (batch->device_time) CUDA_TRY(cudaEventRecord(launched->kernels_begin, self->stream));
    if (self->is_fast) {
        ATTN_TRY(run_decode(self, batch, memory, count));
    } else {
        ATTN_TRY(append_new_rows(self, batch, memory, count->new_rows));
        ATTN_TRY(run_pieces(self, batch, plan, memory, count));
    }
    if (batch->device_time) CUDA_TRY(cudaEventRecord(launched->kernels_end, self->stream));
    CUDA_TRY(cudaEventRecord(launched->ended, self->stream));
    return attn_ok();
}

/* Nothing of it is on a stream any more. */
static void take_back(cuda_backend *self, flight *failed) {
    cudaStreamSynchronize(self->uploads);
    cudaStreamSynchronize(self->stream);
    *failed->status = 0;
}

static attn_status cuda_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan) {
    cuda_backend *self = of(backend);
    flight *next = &self->flights[(self->oldest + backend->started) % FLIGHTS];
    attn_status status;
    next->batch = batch;
    next->timing = (attn_timing){0};
    next->start_ns = attn_now_ns();
    self->launches = 0;
    cudaSetDevice(self->device);
    CUDA_TRY(self->failed);
    ATTN_TRY(attn_line_build(&backend->line, batch));
    plan = attn_backend_accept_plan(backend, plan);
    tally count = count_batch(self, batch);
    row_bytes row = device_row(self);
    size_t heads_q = backend->geometry.heads_q, heads_kv = backend->geometry.heads_kv;
    size_t in_bytes = count.rows * heads_q * row.key + count.new_rows * heads_kv * (row.key + row.value);
    next->in_place = find_rows(self, batch, in_bytes, &count);
    next->out_bytes = count.rows * heads_q * row.value;
    if (!reserve_call(self, next, &count, &status)) return status;
    next->timing.plan_ns = attn_now_ns() - next->start_ns;

    pack_tables(self, batch, &next->memory, &count);
    copying rows = {.self = self, .batch = batch, .memory = &next->memory, .copy = copy_in};
    if (!next->in_place.ins) copy_all(&rows, in_bytes);
    status = launch_flight(self, next, plan, &count);
    next->timing.launches = self->launches;
    if (attn_failed(status)) take_back(self, next);
    return status;
}

/* An error is an end, too: it shows when the flight is settled. */
static bool cuda_has_ended(attn_backend *backend) {
    const cuda_backend *self = of(backend);
    bool has_ended = cudaEventQuery(self->flights[self->oldest].ended) != cudaErrorNotReady;
    if (!has_ended) cudaGetLastError(); /* or the next launch would be told of it */
    return has_ended;
}

/* After settle(). */
static attn_status read_device_time(const flight *ended, attn_timing *timing) {
    float ms = 0;
    CUDA_TRY(cudaEventElapsedTime(&ms, ended->kernels_begin, ended->kernels_end));
    timing->device_ns = (int64_t)((double)ms * 1e6);
    return attn_ok();
}

static attn_status cuda_finish(attn_backend *backend, attn_timing *timing) {
    cuda_backend *self = of(backend);
    flight *ended = &self->flights[self->oldest];
    self->oldest = (self->oldest + 1) % FLIGHTS;
    cudaSetDevice(self->device);
    ATTN_TRY(settle(self, ended));
    copying rows = {.self = self, .batch = ended->batch, .memory = &ended->memory, .copy = copy_out};
    if (!ended->in_place.outs) copy_all(&rows, ended->out_bytes);
    *timing = ended->timing;
    if (ended->batch->device_time) ATTN_TRY(read_device_time(ended, timing));
    timing->attention_ns = attn_now_ns() - ended->start_ns - timing->plan_ns;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static attn_status flight_init(flight *made, uint32_t *status) {
    made->down.kind = ARENA_SHARED;
    made->rows.kind = ARENA_DEVICE;
    made->status = status;
    *status = 0;
    CUDA_TRY(cudaEventCreateWithFlags(&made->uploaded, cudaEventDisableTiming));
    CUDA_TRY(cudaEventCreateWithFlags(&made->ended, cudaEventDisableTiming));
    CUDA_TRY(cudaEventCreate(&made->kernels_begin));
    CUDA_TRY(cudaEventCreate(&made->kernels_end));
    return attn_ok();
}

/* Also after a flight_init that has failed, or that there was none of. */
static void flight_fini(flight *made) {
    if (made->uploaded) cudaEventDestroy(made->uploaded);
    if (made->ended) cudaEventDestroy(made->ended);
    if (made->kernels_begin) cudaEventDestroy(made->kernels_begin);
    if (made->kernels_end) cudaEventDestroy(made->kernels_end);
    arena_fini(&made->up);
    arena_fini(&made->rows);
    arena_fini(&made->down);
}

static void destroy_stream(cudaStream_t stream) {
    if (!stream) return;
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
}

static void cuda_borrow(attn_backend *backend, void *memory, size_t bytes) {
    cudaSetDevice(of(backend)->device);
    attn_cuda_borrow(&of(backend)->borrowed, memory, bytes);
}

static void cuda_give_back(attn_backend *backend, void *memory) {
    cudaSetDevice(of(backend)->device);
    attn_cuda_give_back(&of(backend)->borrowed, memory);
}

static void cuda_destroy(attn_backend *backend) {
    cuda_backend *self = of(backend);
    cudaSetDevice(self->device);
    destroy_stream(self->uploads);
    destroy_stream(self->stream);
    for (uint32_t i = 0; i < FLIGHTS; i++)
        flight_fini(&self->flights[i]);
    arena_fini(&self->apart);
    attn_cuda_give_all_back(&self->borrowed);
    attn_cpu_workers_destroy(self->copiers);
    attn_cuda_free(self->layer.memory);
    attn_cuda_free(self->slot_out);
    attn_cuda_free(self->slot_lse);
    attn_cuda_free(self->runs.memory);
    attn_cuda_free(self->chunks.memory);
    attn_cuda_free(self->scales);
    cudaFreeHost(self->statuses);
    attn_cuda_context_leave(self->device);
    attn_backend_fini(backend);
    free(self);
}

#ifndef ATTN_RELEASE
static void cuda_break(attn_backend *backend) {
    cuda_backend *self = of(backend);
    cudaSetDevice(self->device);
    note(self, (cudaError_t)attn_cuda_write_nowhere(self->stream));
}
#endif

/* Of partial results: batch_invariant needs those of the longest sequence at least, others two a worker. */
static uint64_t count_slots(const cuda_backend *self, size_t slot_bytes) {
    const attn_geometry *geometry = &self->base.geometry;
    uint64_t least = attn_line_min_chunk_slots(geometry, self->base.pages), slots = 2 * self->base.line.workers;
    uint64_t usual = (uint64_t)self->base.pages * geometry->page_size / ATTN_CHUNK_TOKENS * geometry->heads_kv;
    if (usual > SLOT_BYTES_MOST / slot_bytes) usual = SLOT_BYTES_MOST / slot_bytes;
    if (slots < least) slots = least;
    return slots < usual ? usual : slots;
}

static attn_status partials_status(cudaError_t error, size_t bytes) {
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError();
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "no device memory for partial results: %zu MiB: %s", bytes >> 20,
                      cudaGetErrorString(error));
}

static attn_status allocate_slots(cuda_backend *self) {
    size_t slot_bytes = ATTN_CUDA_MAX_ROWS * self->layer.head_dim_v * sizeof(float);
    self->slots = count_slots(self, slot_bytes);
    cudaError_t error = attn_cuda_allocate((void **)&self->slot_out, self->slots * slot_bytes, "partial outputs");
    if (error == cudaSuccess) {
        size_t lse_bytes = self->slots * ATTN_CUDA_MAX_ROWS * sizeof(float);
        error = attn_cuda_allocate((void **)&self->slot_lse, lse_bytes, "partial LSE");
    }
    return partials_status(error, self->slots * slot_bytes);
}

static attn_status allocate_workspace(attn_cuda_workspace *workspace, uint64_t slots, uint32_t rows,
                                      uint32_t head_dim_v) {
    *workspace = (attn_cuda_workspace){.slots = (uint32_t)slots, .rows = rows};
    size_t bytes = attn_cuda_workspace_bytes(workspace->slots, rows, head_dim_v);
    cudaError_t error = attn_cuda_allocate(&workspace->memory, bytes, "partial results");
    if (error == cudaSuccess) error = cudaMemset(workspace->memory, 0, bytes);
    return partials_status(error, bytes);
}

static attn_status allocate_workspaces(cuda_backend *self) {
    uint32_t dim = self->layer.head_dim_v, rows = narrow_rows(&self->base.geometry);
    ATTN_TRY(allocate_workspace(&self->runs, 4 * self->tuning.workers, 64, dim));
    return allocate_workspace(&self->chunks, count_slots(self, rows * dim * sizeof(float)), rows, dim);
}

static attn_status upload_scales(cuda_backend *self, const attn_backend_config *config) {
    if (attn_kv_dtype(&config->geometry) != ATTN_FP8_E4M3) return attn_ok();
    size_t count = (size_t)config->geometry.layers * config->geometry.heads_kv;
    ATTN_TRY(attn_backend_keep_scales(&self->base, config));
    float *scales = calloc(2 * count, sizeof *scales);
    if (scales == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for scales");
    for (size_t i = 0; i < count; i++) {
        attn_scale scale = attn_backend_scale(&self->base, (uint32_t)(i / config->geometry.heads_kv),
                                              (uint32_t)(i % config->geometry.heads_kv));
        scales[i] = scale.key;
        scales[count + i] = scale.value;
    }
    cudaError_t error = attn_cuda_allocate((void **)&self->scales, 2 * count * sizeof *scales, "scales");
    if (error == cudaSuccess) {
        error = cudaMemcpy(self->scales, scales, 2 * count * sizeof *scales, cudaMemcpyHostToDevice);
    }
    free(scales);
    return cuda_status(error, "upload of the scales");
}

/* Device `rank`; where there are more ranks than devices, they share them in turn. */
static attn_status find_device(uint32_t rank, int *device, struct cudaDeviceProp *properties) {
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
    return attn_ok();
}

/* Has the device room for the kernels' shared memory? The widest need 130 KB. */
static bool has_room(const attn_cuda_layer *layer, const struct cudaDeviceProp *properties) {
    return properties->sharedMemPerBlockOptin >= 160 * 1024 || (layer->head_dim <= 128 && layer->head_dim_v <= 128);
}

/* Of the workers that it may have, some copy rows: a few do it as fast as memory allows. */
static attn_status start_copiers(cuda_backend *self, const attn_backend_config *config) {
    uint32_t count = config->workers < COPIERS_MOST ? config->workers : COPIERS_MOST;
    return count > 1 ? attn_cpu_workers_create(count, NULL, &self->copiers) : attn_ok();
}

static attn_status allocate(cuda_backend *self, const attn_backend_config *config,
                            const struct cudaDeviceProp *properties) {
    CUDA_TRY(cudaSetDevice(self->device));
    CUDA_TRY(attn_cuda_prepare()); /* every time: a context that was reset knows nothing of it */
    ATTN_TRY(start_copiers(self, config));
    ATTN_TRY(allocate_pool(self, config));
    self->apart.kind = ARENA_DEVICE;
    CUDA_TRY(cudaMallocHost((void **)&self->statuses, FLIGHTS * sizeof *self->statuses));
    for (uint32_t i = 0; i < FLIGHTS; i++)
        ATTN_TRY(flight_init(&self->flights[i], &self->statuses[i]));
    self->is_fast = attn_cuda_decode_fits(&self->layer) && has_room(&self->layer, properties);
    if (!self->is_fast && attn_kv_dtype(&config->geometry) == ATTN_FP8_E4M3) {
        return attn_error(ATTN_UNAVAILABLE,
                          "cuda: kv_dtype fp8_e4m3 with head_dim %u needs %u KiB of shared memory a block",
                          config->geometry.head_dim, 160);
    }
    self->tuning = (attn_cuda_tuning){.is_hopper = properties->major == HOPPER_MAJOR,
                                      .workers = (uint32_t)properties->multiProcessorCount,
                                      .shared_bytes = (uint32_t)properties->sharedMemPerBlockOptin,
                                      .align_tiles = 4,
                                      .patience_ns = ATTN_CUDA_PATIENCE_NS};
    if (self->is_fast && self->tuning.is_hopper) CUDA_TRY(attn_cuda_find_clusters(&self->tuning));
    ATTN_TRY(upload_scales(self, config));
    ATTN_TRY(self->is_fast ? allocate_workspaces(self) : allocate_slots(self));
    CUDA_TRY(cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking));
    CUDA_TRY(cudaStreamCreateWithFlags(&self->uploads, cudaStreamNonBlocking));
    return attn_ok();
}

static attn_status cuda_create(const attn_backend_config *config, attn_backend **backend) {
    struct cudaDeviceProp properties = {0};
    int device = 0;
    ATTN_TRY(find_device(config->device, &device, &properties));
    cuda_backend *self = calloc(1, sizeof *self);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a cuda backend");
    attn_status status = attn_cuda_context_enter(device);
    if (attn_failed(status)) {
        free(self);
        return status;
    }
    self->device = device;
    uint32_t workers = BLOCKS_AN_SM * (uint32_t)properties.multiProcessorCount;
    attn_backend_init(&self->base, &attn_cuda_backend_ops, config, ATTN_CUDA_TILE_TOKENS,
                      narrow_rows(&config->geometry) / (config->geometry.heads_q / config->geometry.heads_kv), workers);
    status = allocate(self, config, &properties);
    if (attn_failed(status)) {
        cuda_destroy(&self->base);
        return status;
    }
    snprintf(self->base.description, sizeof self->base.description, "cuda %d, %.80s, sm_%d%d, %s", device,
             properties.name, properties.major, properties.minor,
             self->is_fast ? "tensor cores, one launch" : "kernels for any geometry");
    *backend = &self->base;
    return status;
}

const attn_backend_ops attn_cuda_backend_ops = {
    .kind = "cuda",
    .stores_fp8 = true,
    .create = cuda_create,
    .destroy = cuda_destroy,
    .append = cuda_append,
    .export = cuda_export,
    .depth = FLIGHTS,
    .start = cuda_start,
    .has_ended = cuda_has_ended,
    .finish = cuda_finish,
    .copy_page = cuda_copy_page,
    .poison = cuda_poison,
    .borrow = cuda_borrow,
    .give_back = cuda_give_back,
#ifndef ATTN_RELEASE
    .break_device = cuda_break,
#endif
#ifdef ATTN_HAVE_NCCL
    .channels = &attn_nccl_channel_ops,
#endif
};
