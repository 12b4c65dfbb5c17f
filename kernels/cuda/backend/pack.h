/*
 * A call's tables and rows in pinned memory, as kernels read them, and results from there.
 *
 * Queries, new rows and results are packed: one sequence's rows behind the other's.
 */
#ifndef ATTND_KERNELS_CUDA_BACKEND_PACK_H
#define ATTND_KERNELS_CUDA_BACKEND_PACK_H

#include "kernels/cuda/backend/state.h"

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

/* After attn_line_build of the backend's line for the batch. */
tally attn_cuda_count(const cuda_backend *self, const attn_batch *batch);

/* Chunks of batch_invariant mode. */
static inline uint32_t attn_cuda_chunks(uint32_t length) {
    return (length + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS;
}

/*
 * Finds out which of next->batch's rows stay where they are, and room for the others and the tables: next->in_place,
 * next->memory, and the bytes of all rows, next->in_bytes and next->out_bytes. False: as attn_cuda_arena_reserve.
 */
bool attn_cuda_reserve(const cuda_backend *self, flight *next, const tally *count, attn_status *status);

/* Packs tables, and queries and new rows but those that stay. */
void attn_cuda_pack(const cuda_backend *self, flight *next, const tally *count);

/* Copies outputs, but those that are where they belong, and partial results to where the batch wants them. */
void attn_cuda_unpack(const cuda_backend *self, const flight *ended);

/* The packed call, as kernels take it. */
attn_cuda_call attn_cuda_describe_call(const cuda_backend *self, const attn_batch *batch, const call_memory *memory);

#endif
