/*
 * Shared prefixes: which sequences of a batch begin with the same pages, as forks of one prompt do. It is found once a
 * step, from the batch's page tables, and told to the backend with every layer (attn_prefix), which may then read those
 * pages once for all of them.
 *
 * What counts are whole chunks of ATTN_CHUNK_TOKENS committed tokens of whole sequences: new rows of the step are no
 * part of a prefix, nor are parts of spread sequences. Two tables that hold the same page at one place hold the same
 * pages at all places before it (only forks share pages, and they share them from the front), so the last page of a
 * chunk says whether all up to there is shared.
 *
 * A sequence is in one prefix at most. Forks of forks could be grouped in more than one way:
 *
 *     sequence 0  |= A =|= B =|= C =|
 *     sequence 1  |= A =|= B =|= C =|         {0, 1, 2} by A and {0, 1} by A B C save two chunks against three:
 *     sequence 2  |= A =|- D -|               the second it is
 *
 * Of all groupings the one is taken that saves most reads, counted as (members - 1) * tokens for each prefix.
 *
 * Calls of several steps may become one launch, whose batches' prefixes are then joined where they are the same pages.
 *
 * Cost: linear in the batch as long as nothing is shared; else the sequences that share something are sorted.
 *
 * Threads: that of the partition (dp/partition.h); dp_prefixes_join: any.
 */
#ifndef ATTND_DP_PREFIXES_H
#define ATTND_DP_PREFIXES_H

#include "dp/partition.h"

/* Entries of dp_batch.prefix_scratch for a batch of `size` sequences. */
size_t dp_prefixes_scratch(uint32_t size);

/*
 * Sets prefixes, prefix_count and tokens_shared of a batch whose sequences and tables are complete; `read_only`: there
 * are no new rows. Cannot fail: the batch has the memory.
 */
void dp_prefixes_find(dp_batch *batch, const attn_geometry *geometry, bool read_only);

/* The prefixes of the batches of one launch, and its page tables. */
typedef struct {
    attn_prefix *prefixes; /* [count] */
    uint32_t count;
    const uint32_t *page_offsets, *pages; /* attn_batch */
    uint32_t page_size;
    uint32_t *members; /* [members of all prefixes] memory that is not theirs yet */
} dp_launch_prefixes;

/*
 * Joins prefixes that begin with the same pages into one of all their members, as long as the shortest of them, unless
 * apart they save more. Their number becomes smaller by that, their members lie in `members`. Returns how many tokens
 * more are saved than before.
 */
uint64_t dp_prefixes_join(dp_launch_prefixes *launch);

#endif
