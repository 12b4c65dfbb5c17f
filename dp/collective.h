/*
 * The collective: how the ranks that hold parts of a spread sequence make one result of theirs.
 *
 * It is a gather. Before a layer starts, dp_gather_place gives every part a place for its partial
 * results. Each rank writes its own and arrives; nobody waits. The last one to arrive sees what
 * all have written, and merges, in the order of the sequence's parts, starting at its home rank; or,
 * batch-invariant, in the order of its chunks, which is the same whatever the number of ranks.
 *
 * This is the implementation between ranks of one process, through shared memory. A whole sequence
 * needs no collective, and a layer without spread sequences uses the gather only to count its ranks.
 *
 * Threads: place before any rank starts; arrive from any; merge from the last to arrive.
 */
#ifndef ATTND_DP_COLLECTIVE_H
#define ATTND_DP_COLLECTIVE_H

#include <stdatomic.h>

#include "dp/partition.h"

typedef struct {
    atomic_uint missing; /* ranks that have not arrived yet */
} dp_gather;

void dp_gather_init(dp_gather *gather, uint32_t ranks);

/* True for the last of them: all that the others wrote before they arrived is visible to it. */
bool dp_gather_arrive(dp_gather *gather);

/* Bytes of memory, at a multiple of 64, that the partial results of a step's spread sequences take; 0: it has none. */
size_t dp_gather_bytes(const dp_partition *partition, const attn_geometry *geometry, bool batch_invariant);

/* Sets the partials of the partition's batches to places in `memory`. */
void dp_gather_place(const dp_partition *partition, const attn_geometry *geometry, bool batch_invariant, void *memory);

typedef struct {
    const attn_geometry *geometry;
    bool batch_invariant;
    const float *sinks; /* [heads_q] or NULL */
    void *memory;       /* as given to dp_gather_place */
    void *out;          /* [rows of the step, heads_q, head_dim_v] */
    float *lse;         /* [rows of the step, heads_q] or NULL */
} dp_gather_merge_request;

/* Merges the partial results of every spread sequence into its rows of out and lse. */
void dp_gather_merge(const dp_partition *partition, const dp_gather_merge_request *request);

#endif
