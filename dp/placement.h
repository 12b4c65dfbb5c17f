/*
 * Placement: which rank a new sequence lives on.
 *
 * Threads: guarded by the engine's lock.
 */
#ifndef ATTND_DP_PLACEMENT_H
#define ATTND_DP_PLACEMENT_H

#include "dp/engine.h"

/* What a rank carries, in what placement balances by. */
typedef struct {
    uint64_t tokens;           /* held by its sequences */
    uint64_t tokens_in_flight; /* of steps and uploads in progress */
    uint64_t sequences;
    bool lost; /* takes no new sequences */
    bool full; /* has no page free */
} dp_rank_load;

/*
 * Chooses the rank of one new sequence: the home rank, if it is spread.
 *   DP_LEAST_TOKENS, DP_SPREAD  fewest tokens held and in flight, then fewest sequences, then lowest number; of the
 *                               ranks that have a page free, if there is one
 *   DP_ROUND_ROBIN              the first serving rank from `*turn` on; moves `*turn` past it
 *   DP_EXPLICIT                 `wanted`, or an error: ATTN_INVALID_ARGUMENT out of range, ATTN_UNAVAILABLE lost
 * ATTN_UNAVAILABLE: no rank serves; for DP_SPREAD: one does not.
 */
attn_status dp_placement_choose(const dp_rank_load *loads, uint32_t ranks, dp_placement placement, uint32_t wanted,
                                uint32_t *turn, uint32_t *rank);

#endif
