/*
 * Decode attention in one launch: from the live lengths the thread blocks find their shares of the line
 * (kernels/split_plan.h), store the new rows, attend on tensor cores, and merge what was cut. docs/kernel-notes.md is
 * the notebook.
 *
 * Built for bf16, fp16 and fp8 (e4m3, with bf16 queries) caches; head_dim 64, 96, 128, 192 and 256 with head_dim_v the
 * same, or 192 with 128. Every other geometry is for attend.cu.
 *
 * Two kernels, one contract:
 *     narrow   rows of a block 8 or 16; a token's keys are the rows of the matrix product. sm_80 and later: tiles come
 *              by cp.async; from sm_90 on as bulk copies.
 *     wide     up to 64 or 128 rows a block, which are the rows of the product (wgmma). sm_90a, 16-bit caches.
 *              Simple calls of 17 to 32 heads a group whose units are few have a form of their own (twins.cuh).
 *
 * Threads: stateless; calls on different streams need different workspaces.
 */
#ifndef ATTND_KERNELS_CUDA_DECODE_H
#define ATTND_KERNELS_CUDA_DECODE_H

#include "kernels/cuda/launch.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { ATTN_CUDA_MAX_CLUSTER = 8 };      /* thread blocks */
enum { ATTN_CUDA_PATIENCE_NS = 20000 };  /* a good patience_ns: longer than workers of one launch differ */
enum { ATTN_CUDA_MAX_BESIDE_ROWS = 16 }; /* attn_cuda_tuning.beside */

/* How a launch is shaped. */
typedef struct {
    int is_hopper;    /* the device is of sm_90: the kernels for simple calls and the wide ones are built for it */
    uint32_t workers; /* thread blocks: multiprocessors of the device */
    /* 1; 2: twice as many blocks, only for simple calls, head_dim 128, at most 8 rows and 16-bit caches; 0: either. */
    uint32_t blocks_per_sm;
    uint32_t shared_bytes; /* that a block may have; the ring has as many stages as fit, but.. */
    uint32_t stages;       /* ..so many at most; 0: what docs/kernel-notes.md found best */
    /* Where all units have as many tiles, a share may be larger by so many if it cuts none, or all into equal parts. */
    uint32_t align_tiles;
    /* How long a worker waits for others to merge a long unit with it (joint.cuh); 0: the last one merges it alone. */
    uint32_t patience_ns;
    /*
     * Clusters of so many blocks that the device runs at once (attn_cuda_find_clusters); all 0: none are launched, nor
     * long parts (parts.cuh): all calls are cut into shares of the line.
     */
    uint32_t clusters[ATTN_CUDA_MAX_CLUSTER + 1];
    /*
     * Programmatic dependent launch: nothing that a decode reads may come from the launch before, but for shared_out
     * and shared_lse, and what it appends must not be read there.
     */
    int overlap_launches;
    /*
     * Of two launches that are on the device together (side_by_side.h), the first: its blocks are launched as clusters
     * of two, though they need none, so that what they leave of the multiprocessors are pairs, for the second's.
     */
    int leaves_pairs;
    /*
     * Of the second: workers of the first, which has at most ATTN_CUDA_MAX_BESIDE_ROWS rows a block. Nothing else is at
     * work in the workspace, so that partial results need not wait for the first to end if they are not stored where
     * its are. 0: they wait.
     */
    uint32_t beside;
    int only_asks;   /* launches nothing, but returns what it would without it, if the device takes the launch */
    uint64_t *times; /* NULL, or device [blocks, 4]: multiprocessor, begin, share found, end; ns of the global timer */
} attn_cuda_tuning;

/*
 * Device memory that launches work in, zeroed once, then kept from launch to launch. `slots` partial results: 4 *
 * workers at least, or 2 * workers if blocks_per_sm is 1; in batch_invariant mode a launch needs one a chunk of every
 * unit, with at most block_rows rows.
 */
typedef struct {
    void *memory;
    uint32_t slots;
    uint32_t rows; /* of a slot: 8, 16 or 64; of blocks of 128 rows a partial result takes two slots of 64 */
} attn_cuda_workspace;

/*
 * What the caller knows of a call. The lengths that are attended to are those in the call, as they are when it runs; if
 * they are not what was expected, the launch takes longer, no more.
 */
typedef struct {
    uint32_t most_queries;      /* query rows of a sequence: it must not have more */
    uint32_t shortest, longest; /* lengths of the sequences; 0, 0: not known */
} attn_cuda_expected;

/* Fills in tuning->clusters for the current device, which is of sm_90. A cudaError_t. */
int attn_cuda_find_clusters(attn_cuda_tuning *tuning);

/* Is the layer's geometry built? From sm_80 on; groups of more than 16 heads on sm_90 alone, in caches of 16 bits. */
int attn_cuda_decode_fits(const attn_cuda_layer *layer);

/* Of a workspace with so many slots of so many rows, for calls with so many columns a value. */
size_t attn_cuda_workspace_bytes(uint32_t slots, uint32_t rows, uint32_t head_dim_v);

/*
 * Memory of the workspace for the rows that a launch sends to the next (attn_cuda_call.sends_rows), [rows, columns] and
 * [rows] floats: zeros. NULL if it has no room for as many. attn_cuda_clear_sent: makes it zeros again, on the stream,
 * where the next was not launched; a cudaError_t.
 */
float *attn_cuda_room_for_sent(const attn_cuda_workspace *workspace, size_t rows, uint32_t columns);
int attn_cuda_clear_sent(float *room, size_t rows, uint32_t columns, void *stream);

/*
 * Launches a call. 0, or a cudaError_t; cudaErrorInvalidValue (1) if the geometry or the tuning is not built, or a
 * block's rows are more than a slot's. `call->status` becomes 1 when a page index outside the pool is met: the page is
 * not read and the outputs are unspecified.
 */
int attn_cuda_decode_launch(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                            const attn_cuda_workspace *workspace, const attn_cuda_expected *expected, void *stream);

#ifdef __cplusplus
}
#endif

#endif
