/*
 * What the backend's files share: its state, and that of a call.
 *
 * The way of a call: backend.c starts it; pack.h counts what it has, lays that out and packs it; upload.h takes it to
 * the device; run.h launches the kernels; backend.c finishes it. rows.c appends and exports, create.c makes and ends
 * backends.
 *
 * Two decodes may be started (kernels/pipeline.h). All kernels are on one stream, in order, and share the device memory
 * that they work in; what is filled, uploaded or read while kernels of another decode run, each has for itself
 * (flight).
 *
 * All on the thread that drives the backend, whose device is the current one.
 */
#ifndef ATTND_KERNELS_CUDA_BACKEND_STATE_H
#define ATTND_KERNELS_CUDA_BACKEND_STATE_H

#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cpu/workers.h"
#include "kernels/cuda/backend/arena.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/in_place.h"

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
    size_t in_bytes, out_bytes; /* of rows that come in, and of outputs */
    int64_t start_ns;
    attn_timing timing; /* what is known of it */
} flight;

enum { FLIGHTS = 2 };

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
    int own_workers;    /* beside shared prefixes (side_by_side.h), where a test says how many (create.c); else -1 */
    cudaError_t failed; /* what an operation that returns nothing has met */
    uint32_t launches;  /* of kernels, by the decode that is being started */
} cuda_backend;

/* ------------------------------------------------------------------------------------------- */
/* Errors: after one, nothing of the device is to be relied on, and the rank is lost */

/* ATTN_UNAVAILABLE, if it is one. */
attn_status attn_cuda_status(cudaError_t error, const char *what);

#define CUDA_TRY(call) ATTN_TRY(attn_cuda_status((cudaError_t)(call), #call))

/* Waits for the flight, whose kernels have all been launched, and says what has gone wrong with it. */
attn_status attn_cuda_settle(cuda_backend *self, flight *settled);

/* ------------------------------------------------------------------------------------------- */
/* The layout of the pool, and of rows */

static inline cuda_backend *attn_cuda_of(attn_backend *backend) { return (cuda_backend *)backend; }

static inline uint32_t attn_cuda_group(const attn_geometry *geometry) { return geometry->heads_q / geometry->heads_kv; }

/*
 * Rows of a block of the narrow kernels, which batch_invariant is for: a unit of the line, here as there. The kernels
 * for any geometry take up to 16, too.
 */
static inline uint32_t attn_cuda_narrow_rows(const attn_geometry *geometry) {
    return attn_cuda_group(geometry) <= 8 ? 8 : 16;
}

/* One layer of the pool, as kernels take it. */
attn_cuda_layer attn_cuda_layer_at(const cuda_backend *self, uint32_t layer);

/* Bytes of one head's row on the device, in the layer's dtype; and on the host. */
typedef struct {
    size_t key, value; /* also of a query; of an output */
} row_bytes;

row_bytes attn_cuda_device_row(const cuda_backend *self);
row_bytes attn_cuda_host_row(const cuda_backend *self);

/* Is the host's row of a head as long as the device's? Else rows are copied to be filled up, or cut. */
bool attn_cuda_has_rows_as_they_are(const cuda_backend *self);

/* Copies rows of `from_bytes` each to rows of `to_bytes` each: cut, or filled up with zeros. */
void attn_cuda_copy_rows(void *to, size_t to_bytes, const void *from, size_t from_bytes, size_t rows);

/* ------------------------------------------------------------------------------------------- */
/* Operations that have files of their own (kernels/backend.h) */

attn_status attn_cuda_create(const attn_backend_config *config, attn_backend **backend);
void attn_cuda_destroy(attn_backend *backend);
attn_status attn_cuda_append_rows(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                  uint32_t tokens, const void *keys, const void *values);
attn_status attn_cuda_export_rows(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                  uint32_t tokens, void *keys, void *values);

#endif
