/*
 * Decode attention in one launch: from the live lengths the thread blocks find their shares of the line
 * (kernels/split_plan.h), store the new rows, attend on tensor cores, and merge what was cut. docs/kernel-notes.md is
 * the notebook.
 *
 * Built for bf16, fp16 and fp8 (e4m3, with bf16 queries) caches; head_dim 64, 96, 128, 192 and 256 with head_dim_v the
 * same, or 192 with 128. Every other geometry is for attend.cu.
 *
 * Three kernels, one contract:
 *     narrow   rows of a block 8 or 16; a token's keys are the rows of the matrix product. sm_80 and later: tiles come
 *              by cp.async; from sm_90 on as bulk copies.
 *     wide     up to 64 rows a block, which are the rows of the product (wgmma). sm_90a, 16-bit caches.
 *
 * Threads: stateless; calls on different streams need different workspaces.
 */
#ifndef ATTND_KERNELS_CUDA_DECODE_H
#define ATTND_KERNELS_CUDA_DECODE_H

#include "kernels/cuda/launch.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How a launch is shaped. */
typedef struct {
    int is_hopper;    /* the device is of sm_90: the kernels for simple calls and the wide ones are built for it */
    uint32_t workers; /* thread blocks: the grid, constant for a device */
    uint32_t blocks_per_sm; /* 1, or 2 where built: simple calls, head_dim 128, at most 8 rows, 16-bit cache */
    uint32_t shared_bytes;  /* that a block may have; the ring has as many stages as fit, but.. */
    uint32_t stages;        /* ..so many at most; 0: what docs/kernel-notes.md found best */
    /* Where all sequences have as many tiles, a share larger than equal is taken.. */
    uint32_t align_tiles;   /* ..if it is larger by at most so many tiles and cuts no unit, or all into equal parts */
    uint32_t whole_workers; /* ..or if it cuts no unit, leaves so many workers with work.. */
    uint32_t whole_tiles;   /* ..and is at most so many tiles */
    /* Programmatic dependent launch: nothing that a decode reads may come from the launch before. */
    int overlap_launches;
    uint64_t *times; /* NULL, or device [workers, 4]: multiprocessor, begin, share found, end; ns of the global timer */
} attn_cuda_tuning;

/*
 * Device memory that launches work in, zeroed once, then kept from launch to launch. `slots` partial results: 2 *
 * workers at least; in batch_invariant mode a launch needs one a chunk of every unit, with at most block_rows rows.
 */
typedef struct {
    void *memory;
    uint32_t slots;
    uint32_t rows; /* of a slot: 8, 16 or 64 */
} attn_cuda_workspace;

/* Is the layer's geometry built? On any device of sm_80 or later. */
int attn_cuda_decode_fits(const attn_cuda_layer *layer);

size_t attn_cuda_workspace_bytes(uint32_t slots, uint32_t rows, uint32_t head_dim_v);

/*
 * Launches a call whose sequences have at most `most_queries` query rows. 0, or a cudaError_t; cudaErrorInvalidValue
 * (1) if the geometry or the tuning is not built, or a block's rows are more than a slot's. `call->status` becomes 1
 * when a page index outside the pool is met: the page is not read and the outputs are unspecified.
 */
int attn_cuda_decode_launch(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                            const attn_cuda_workspace *workspace, uint32_t most_queries, void *stream);

#ifdef __cplusplus
}
#endif

#endif
