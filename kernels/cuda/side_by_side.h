/*
 * Calls whose sequences share prefixes: two launches, one for the prefixes, each of which is read once with the query
 * rows of all that share it (tall blocks, wide.cuh), one for the sequences' own tokens. Either may come first; the
 * second merges what both have found.
 *
 *     one after the other   the prefixes on all multiprocessors; own tokens as blocks of that launch end
 *     side by side          own tokens on some multiprocessors, beside them the prefixes on the others
 *
 * The first part is bound by products, the second by memory, so that neither uses what the other does; but a
 * multiprocessor loads only so much in a time, and a prefix is cut into whole parts, a multiprocessor each. So which of
 * them is faster, and on how many multiprocessors, is found from a model of measured times (docs/kernel-notes.md).
 *
 * Threads: stateless, as decode.h.
 */
#ifndef ATTND_KERNELS_CUDA_SIDE_BY_SIDE_H
#define ATTND_KERNELS_CUDA_SIDE_BY_SIDE_H

#include "kernels/cuda/decode.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Such a call. Not batch_invariant. */
typedef struct {
    attn_cuda_call own;      /* the sequences without what they share; those that share something first */
    attn_cuda_call prefixes; /* as sequences (is_prefix); row j of one's outputs is the row of its j-th query */
    attn_cuda_expected own_expected, prefixes_expected;
    uint32_t sharing; /* sequences that share something */
    /* For attn_cuda_choose_own_workers() alone: the least queries of a prefix, and attn_cuda_own_tiles() of all. */
    uint32_t least_queries;
    uint64_t own_tiles;
    /*
     * Device memory for what the first launch leaves: [rows, heads_q, head_dim_v] and [rows, heads_q], by output row.
     * Not used where it sends them to the second, which is by way of the workspace.
     */
    float *apart_out, *apart_lse;
} attn_cuda_forks;

/* What a sequence with so many tokens of its own counts for, a KV head. */
uint32_t attn_cuda_own_tiles(uint32_t tokens);

/* Of the multiprocessors, how many the own tokens are to have beside the prefixes; 0: one after the other. */
uint32_t attn_cuda_choose_own_workers(const attn_cuda_forks *forks, const attn_cuda_tuning *tuning);

/* Launches both: own tokens on own_workers multiprocessors beside the prefixes; if it is 0, or all, after them. A
 * cudaError_t. */
int attn_cuda_launch_forks(const attn_cuda_forks *forks, const attn_cuda_tuning *tuning, uint32_t own_workers,
                           const attn_cuda_workspace *workspace, void *stream);

#ifdef __cplusplus
}
#endif

#endif
