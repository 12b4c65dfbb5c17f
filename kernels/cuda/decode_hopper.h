/*
 * Decode attention on Hopper (sm_90a), the fast path: bf16 keys and values, head_dim 128, one query row a
 * sequence, any batch, in one launch. docs/kernel-notes.md is its notebook.
 *
 * THE POOL. A page holds page_size tokens of every KV head. Page p's tile of KV head h is one run of
 * attn_hopper_tile_bytes() bytes at ((p * heads_kv + h) * that): first page_size key rows, then page_size
 * value rows, 256 bytes each. The sixteen 16-byte pieces of a row are stored in the order in which ldmatrix reads
 * them without bank conflicts: piece c of row r lies at place c ^ (r & 7). So a tile, or the live rows of the last
 * one, is a bulk copy without a tensor map.
 *
 * THE CUT. All tiles of 64 tokens of a batch are one line (sequence, KV head, tile); the blocks cut it into shares that
 * they derive from the live lengths. Nothing but `lengths` says how much there is to do. A cut unit (sequence, KV head)
 * costs about 4 us of latency for its merge, so where all units are alike, shares are rounded up to cut fewer
 * (attn_hopper_tuning).
 *
 * Threads: stateless; calls on different streams need different workspaces.
 */
#ifndef ATTND_KERNELS_CUDA_DECODE_HOPPER_H
#define ATTND_KERNELS_CUDA_DECODE_HOPPER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    ATTN_HOPPER_HEAD_DIM = 128,
    ATTN_HOPPER_TILE_TOKENS = 64, /* what one stage of the ring holds, whatever the page size */
    ATTN_HOPPER_MAX_GROUP = 32,
};

/* How a launch is shaped. */
typedef struct {
    uint32_t workers;       /* thread blocks: the grid, constant for a device */
    uint32_t blocks_per_sm; /* 1, or 2 (three stages a block; groups above 8 take 1 all the same) */
    uint32_t stages;        /* of 32 KB, of one block an SM: 3, 4 or 6; groups above 8 have their own */
    /* Where all sequences have as many tiles, a share larger than equal is taken.. */
    uint32_t align_tiles;   /* ..if it is larger by at most so many tiles and cuts no unit, or all into equal parts */
    uint32_t whole_workers; /* ..or if it cuts no unit, leaves so many workers with work.. */
    uint32_t whole_tiles;   /* ..and is at most so many tiles */
    int overlap_launches; /* programmatic dependent launch: nothing that a decode reads may come from the launch before
                           */
} attn_hopper_tuning;

/* One layer's decode. All pointers are device memory, borrowed until the launch has run. */
typedef struct {
    const void *pool;
    uint32_t pool_pages;
    uint32_t page_size; /* 16, 32 or 64 */
    uint32_t heads_kv;
    uint32_t group; /* query heads a KV head, 1 .. ATTN_HOPPER_MAX_GROUP */
    uint32_t batch;
    const uint32_t *lengths;    /* [batch], 0 and more */
    const uint32_t *page_table; /* [batch, page_table_stride]; entries beyond a sequence's last page are never read */
    uint32_t page_table_stride;
    /* NULL, or [batch]: where each sequence's table begins in page_table, which then need only have batch *
     * page_table_stride entries at least. */
    const uint32_t *page_offsets;
    const void *queries; /* bf16 [batch, heads_kv * group, 128] */
    void *out;           /* likewise */
    float *lse;          /* [batch, heads_kv * group] natural log; -inf (and out 0) for an empty sequence */
    float scale;         /* of q . k, > 0 */
    /*
     * attn_hopper_workspace_bytes(), zeroed once, then kept from launch to launch. Its first word, a uint32_t, becomes
     * 1 when a page index outside the pool is met: the page is not read and the outputs are unspecified.
     */
    void *workspace;
} attn_hopper_decode;

/* Bytes of one page's tile of one KV head: keys and values. */
size_t attn_hopper_tile_bytes(uint32_t page_size);

/* Bytes of workspace of so many workers at this group, whatever the batch. */
size_t attn_hopper_workspace_bytes(uint32_t workers, uint32_t group);

/*
 * Launches on `stream`, a cudaStream_t. 0, or a cudaError_t; cudaErrorInvalidValue (1) for a page size, group or
 * tuning that is not built.
 */
int attn_hopper_decode_launch(const attn_hopper_decode *decode, const attn_hopper_tuning *tuning, void *stream);

#ifdef __cplusplus
}
#endif

#endif
