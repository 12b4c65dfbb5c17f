#include "dp/placement.h"

/* Whether `left` is the better place for a new sequence. */
static bool is_better(const dp_rank_load *left, const dp_rank_load *right) {
    if (left->full != right->full) return right->full;
    uint64_t left_tokens = left->tokens + left->tokens_in_flight;
    uint64_t right_tokens = right->tokens + right->tokens_in_flight;
    if (left_tokens != right_tokens) return left_tokens < right_tokens;
    return left->sequences < right->sequences;
}

static attn_status choose_least_tokens(const dp_rank_load *loads, uint32_t ranks, uint32_t *rank) {
    uint32_t best = ranks;
    for (uint32_t r = 0; r < ranks; r++) {
        if (loads[r].lost) continue;
        if (best == ranks || is_better(&loads[r], &loads[best])) best = r;
    }
    if (best == ranks) return attn_error(ATTN_UNAVAILABLE, "every rank is lost; try again when one serves");
    *rank = best;
    return attn_ok();
}

static attn_status choose_next(const dp_rank_load *loads, uint32_t ranks, uint32_t *turn, uint32_t *rank) {
    for (uint32_t i = 0; i < ranks; i++) {
        uint32_t r = (*turn + i) % ranks;
        if (loads[r].lost) continue;
        *turn = (r + 1) % ranks;
        *rank = r;
        return attn_ok();
    }
    return attn_error(ATTN_UNAVAILABLE, "every rank is lost; try again when one serves");
}

static attn_status choose_explicit(const dp_rank_load *loads, uint32_t ranks, uint32_t wanted, uint32_t *rank) {
    if (wanted >= ranks) {
        return attn_error(ATTN_INVALID_ARGUMENT, "dp_rank: %u; this server has ranks 0 .. %u", wanted, ranks - 1);
    }
    if (loads[wanted].lost)
        return attn_error(ATTN_UNAVAILABLE, "dp_rank: rank %u is lost; choose another, or wait until it serves again",
                          wanted);
    *rank = wanted;
    return attn_ok();
}

attn_status dp_placement_choose(const dp_rank_load *loads, uint32_t ranks, dp_placement placement, uint32_t wanted,
                                uint32_t *turn, uint32_t *rank) {
    switch (placement) {
    case DP_ROUND_ROBIN: return choose_next(loads, ranks, turn, rank);
    case DP_EXPLICIT: return choose_explicit(loads, ranks, wanted, rank);
    case DP_SPREAD:
        for (uint32_t r = 0; r < ranks; r++) {
            if (loads[r].lost)
                return attn_error(
                    ATTN_UNAVAILABLE,
                    "placement: spread needs rank %u, which is lost; choose another, or wait until it serves again", r);
        }
        return choose_least_tokens(loads, ranks, rank);
    case DP_LEAST_TOKENS: return choose_least_tokens(loads, ranks, rank);
    }
    return attn_error(ATTN_INVALID_ARGUMENT, "placement: %d is none of the known ones", (int)placement);
}
