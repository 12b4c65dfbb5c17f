/*
 * The cuda backend's kernels, as backend.c calls them: plain CUDA for sm_80 and later, any geometry that
 * attn_geometry_check accepts.
 *
 * THE POOL. layers x pages x heads_kv tiles. A tile is page_size key rows, then page_size value rows, of one page
 * and KV head. A row's 16-byte pieces are stored as decode_hopper.h has them: piece c of row r at place c ^ (r & 7)
 * where a row is a multiple of 128 bytes long, and in order where it is not.
 *
 * THE WORK. backend.c walks the line (kernels/split_plan.h) over the live lengths of the very call and uploads
 * what each worker, a thread block, has to do as a list of pieces. A piece is a run, or in batch_invariant mode one
 * chunk of it: some tokens of one unit (sequence, KV head, row block). Its rows are queries x group, 16 at most.
 *
 * All pointers are device memory. Rows of the batch are packed, sequence after sequence.
 */
#ifndef ATTND_KERNELS_CUDA_LAUNCH_H
#define ATTND_KERNELS_CUDA_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    ATTN_CUDA_TILE_TOKENS = 64, /* of the line */
    ATTN_CUDA_MAX_ROWS = 16,    /* query rows x group of a piece */
    ATTN_CUDA_THREADS = 128,
};

/* One layer of the pool. */
typedef struct {
    char *memory;
    uint32_t pages;
    uint32_t page_size;
    uint32_t heads_q, heads_kv;
    uint32_t head_dim, head_dim_v;
    uint32_t dtype; /* attn_dtype */
    uint32_t tile_bytes;
} attn_cuda_layer;

typedef struct {
    uint32_t length; /* in this pool */
    uint32_t query_length;
    uint32_t is_read;
    uint32_t chunk_first, chunk_stride; /* a part; stride 0: whole */
    uint32_t page_offset;               /* of its table in attn_cuda_work.page_table */
    uint32_t first_query;               /* its first row among all query rows */
    uint32_t first_out;                 /* whole: among all out rows; a part: among all partial rows.. */
    uint32_t chunk_rows;                /* ..of a chunk, if chunks are wanted apart; else 0 */
    uint32_t unused;
    uint64_t total_length;
} attn_cuda_sequence;

/* Where a piece's results go. */
enum { ATTN_CUDA_TO_SLOT = 0, ATTN_CUDA_TO_OUT = 1 };

typedef struct {
    uint32_t sequence, head;
    uint32_t query_first, queries;
    uint32_t token_begin, token_end; /* what some row sees */
    uint32_t to;                     /* ATTN_CUDA_TO_.. */
    uint32_t slot;                   /* TO_SLOT: which; TO_OUT of a part with chunks apart: which chunk */
} attn_cuda_piece;

/* A unit that was cut: slots to merge, in this order, to its sequence's out rows or partial. */
typedef struct {
    uint32_t sequence, head;
    uint32_t query_first, queries;
    uint32_t first_slot, slot_count; /* in attn_cuda_work.slots */
} attn_cuda_merge;

typedef struct {
    attn_cuda_layer layer;
    const attn_cuda_sequence *sequences;
    const uint32_t *page_table;
    const attn_cuda_piece *pieces;
    const uint32_t *first_pieces; /* [workers + 1] */
    const attn_cuda_merge *merges;
    const uint32_t *slots;
    const void *queries;        /* [rows, heads_q, head_dim] dtype */
    const float *sinks;         /* [heads_q] or NULL */
    void *out;                  /* [rows, heads_q, head_dim_v] dtype */
    float *lse;                 /* [rows, heads_q] */
    float *partial_out;         /* [partial rows, heads_q, head_dim_v] */
    float *partial_lse;         /* [partial rows, heads_q] */
    float *slot_out, *slot_lse; /* [slots, ATTN_CUDA_MAX_ROWS, head_dim_v], [slots, ATTN_CUDA_MAX_ROWS] */
    uint32_t *status;           /* set to 1 when a page outside the pool is met; it is not read */
    float scale, softcap;
    uint32_t window;
    uint32_t workers, merge_count;
    uint32_t rows; /* of the largest piece */
} attn_cuda_work;

/* Bytes of a tile: keys and values of one page and KV head. */
uint32_t attn_cuda_tile_bytes(uint32_t page_size, uint32_t head_dim, uint32_t head_dim_v, uint32_t element_bytes);

/*
 * The launches, on a cudaStream_t; each returns a cudaError_t, 0 if none.
 * append: `tokens` rows of keys [tokens, heads_kv, head_dim] and values; token t goes to slot places[t] % page_size of
 *   page places[t] / page_size.
 * attend: all pieces, a worker a thread block.
 * merge: the cut units; arithmetic bit by bit that of attn_combine_row (kernels/combine.h).
 */
int attn_cuda_append(const attn_cuda_layer *layer, const uint32_t *places, const void *keys, const void *values,
                     uint32_t tokens, uint32_t *status, void *stream);
int attn_cuda_attend(const attn_cuda_work *work, void *stream);
int attn_cuda_merge_units(const attn_cuda_work *work, void *stream);

/* Once a device, before the launches: allows them the shared memory that they use. A cudaError_t. */
int attn_cuda_prepare(void);

#ifdef __cplusplus
}
#endif

#endif
