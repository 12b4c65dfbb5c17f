/*
 * The cuda backend's kernels, as backend/ calls them: plain CUDA for sm_80 and later, any geometry that
 * attn_geometry_check accepts.
 *
 * THE POOL. layers x pages x heads_kv tiles, each the keys and values of one page and KV head; layout.cuh says how
 * they lie in it.
 *
 * THE WORK. backend/pieces.c walks the line (kernels/split_plan.h) over the live lengths of the very call and uploads
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
    uint32_t dtype;         /* attn_dtype of queries, outputs and appended rows */
    uint32_t kv_dtype;      /* attn_dtype of what is stored */
    uint32_t element_bytes; /* of what is stored */
    uint32_t tile_bytes;    /* keys and values of one page and KV head */
    /* [heads_kv] or NULL: what stored keys and values are to be multiplied by. */
    const float *key_scales, *value_scales;
} attn_cuda_layer;

typedef struct {
    uint32_t length; /* in this pool */
    uint32_t query_length;
    uint32_t is_read;
    uint32_t chunk_first, chunk_stride; /* a part; stride 0: whole */
    uint32_t page_offset;               /* of its table in attn_cuda_call.page_table */
    uint32_t first_query;               /* its first row among all query rows */
    uint32_t first_out;                 /* whole: among all out rows; a part or prefix: among all partial rows.. */
    uint32_t chunk_rows;                /* ..of a chunk, if chunks are wanted apart; else 0 */
    uint32_t new_rows;                  /* to be stored at the end of `length`.. */
    uint32_t first_new;                 /* ..the first of them among all new rows */
    uint32_t is_prefix;                 /* that others share (attn_prefix): whole, but its results are partial */
    uint64_t total_length;
} attn_cuda_sequence;

/* One layer's call. */
typedef struct {
    attn_cuda_layer layer;
    uint32_t batch;
    const uint32_t *lengths; /* [batch] */
    /*
     * [batch], or NULL: every sequence has one query row and is whole; its table begins at page_offsets[i], or at
     * i * page_table_stride if page_offsets is NULL, too. If `keys` is not NULL each has one new row.
     */
    const attn_cuda_sequence *sequences;
    const uint32_t *page_table; /* entries beyond a sequence's last page are never read */
    const uint32_t *page_offsets;
    uint32_t page_table_stride;
    const void *queries;       /* [rows, heads_q, head_dim] dtype */
    const void *keys, *values; /* [new rows, heads_kv, head_dim or head_dim_v] dtype; or NULL: none */
    const float *sinks;        /* [heads_q] or NULL */
    void *out;                 /* [rows, heads_q, head_dim_v] dtype */
    float *lse;                /* [rows, heads_q] */
    float *partial_out;        /* [partial rows, heads_q, head_dim_v] */
    float *partial_lse;        /* [partial rows, heads_q] */
    /*
     * The first so many sequences are attended to in two launches: one for what they have of a prefix, which is a
     * sequence there, one for their own tokens. The one that comes second merges its results with those of the first,
     * [rows, heads_q, head_dim_v] and [rows, heads_q], which may come from the launch before. If shared_out is NULL it
     * is the first one: its results are left at partial_out and partial_lse. Not in batch_invariant mode.
     */
    uint32_t sharing;
    /*
     * Of both launches, where the second is beside the first (attn_cuda_tuning.beside): that one sends its results
     * (rows.cuh), each row as soon as it has it, and the second does not wait for the first to end, but for its rows'
     * words. Where they are there are zeros before and after. Not all calls can: cudaErrorInvalidValue.
     */
    uint32_t sends_rows;
    const float *shared_out, *shared_lse;
    uint32_t *status; /* set to 1 when a page outside the pool is met; it is not read */
    float scale, softcap;
    uint32_t window;
    uint32_t batch_invariant;
} attn_cuda_call;

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
    attn_cuda_call call;
    const attn_cuda_piece *pieces;
    const uint32_t *first_pieces; /* [workers + 1] */
    const attn_cuda_merge *merges;
    const uint32_t *slots;
    float *slot_out, *slot_lse; /* [slots, ATTN_CUDA_MAX_ROWS, head_dim_v], [slots, ATTN_CUDA_MAX_ROWS] */
    uint32_t workers, merge_count;
    uint32_t rows; /* of the largest piece */
} attn_cuda_work;

/* Bytes of a tile: keys and values of one page and KV head. */
uint32_t attn_cuda_tile_bytes(uint32_t page_size, uint32_t head_dim, uint32_t head_dim_v, uint32_t element_bytes);

/*
 * The launches, on a cudaStream_t; each returns a cudaError_t, 0 if none.
 * poison: fills some slots of a page, all KV heads, with NaN.
 * append: `tokens` rows of keys [tokens, heads_kv, head_dim] and values; token t goes to slot places[t] % page_size of
 *   page places[t] / page_size.
 * attend: all pieces, a worker a thread block.
 * merge: the cut units; arithmetic bit by bit that of attn_combine_row (kernels/combine.h).
 */
int attn_cuda_poison(const attn_cuda_layer *layer, uint32_t page, uint32_t first_slot, uint32_t slots, void *stream);
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
