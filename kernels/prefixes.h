/*
 * Shared prefixes: a batch whose sequences share leading pages (attn_prefix) becomes two batches that share nothing,
 * so that a backend that knows no prefixes reads those pages once for all:
 *
 *     batch     sequence 0  |==== prefix A ====|-- own 0 --|
 *               sequence 1  |------ own 1 ------|
 *               sequence 2  |==== prefix A ====|- own 2 -|
 *
 *     shared    read 0      |==== prefix A ====|            query rows: those of sequence 0, then those of sequence 2
 *     own       part 0                         |-- own 0 --|
 *               sequence 1  |------ own 1 ------|           as it was
 *               part 2                         |- own 2 -|
 *
 * A read of `shared` appends nothing, and each of its rows sees the whole prefix. A prefix whose members have more
 * query rows than one sequence may have becomes several reads. In `own` a member is the part (attn_part) that begins
 * with the chunk behind its prefix; it appends the member's new rows, and its causal mask is that of the whole. Both
 * give partial results; a member's are then merged, the prefix's first and its own second, and only then is a sink
 * added.
 *
 * How a backend decodes with it, on the calling thread unless said otherwise:
 *
 *     ATTN_TRY(attn_sharing_split(&sharing, batch, &shares));
 *     if (!shares) ... decode `batch` as ever
 *     ... attend to sharing.shared, which appends nothing
 *     ... append the new rows of sharing.own and attend to it; in any order with sharing.shared, or at once
 *     on any threads, when both are there:
 *         attn_sharing_merge(&sharing, first, end);        each member once
 *
 * WHAT IS WORTH IT. Query rows go over keys and values in row blocks (kernels/split_plan.h), so a member with q query
 * rows reads its tokens ceil(q / block_queries) times by itself; together the members fill their blocks. Reading goes
 * on while what has been read is attended to: a read costs as much as `read_rows` rows of one query head attending to
 * it, and nothing where as many do anyway. Merging costs as much for each row as attending to a hundred tokens and
 * more. A prefix is used if all that together saves a sixth of its members' time at least.
 *
 * A plan (attn_plan) was made for the batch as it was: it does not fit `shared` or `own`, and is not to be looked at.
 */
#ifndef ATTND_KERNELS_PREFIXES_H
#define ATTND_KERNELS_PREFIXES_H

#include "kernels/attention.h"

/* A sequence of the batch that shares a prefix. */
typedef struct {
    uint32_t sequence;   /* in the batch, and in `own` */
    attn_partial prefix; /* its rows' results of the prefix: [query_length, h, e] and [query_length, h] */
} attn_sharing_member;

/*
 * Owned by the thread that drives the backend; its workers may read it, and merge. Init once, split for every decode:
 * the memory is kept and only grows with the largest batch seen.
 */
typedef struct {
    attn_geometry geometry;
    uint32_t block_queries; /* of the backend's row blocks */
    uint32_t read_rows;     /* rows that take as long as a read: see above */

    /* Of the last split that was worth it; borrows from the batch. Valid until the next. */
    const attn_batch *batch;
    /*
     * Whole batches as attention.h has them, but that page tables of `shared` are not in order: page_offsets[i] is
     * where table i begins, and page_offsets[i + 1] is not where it ends. All sequences of `shared` are parts; its outs
     * and lses are NULL.
     */
    attn_batch shared;
    attn_batch own;
    attn_sharing_member *members; /* [member_count] */
    uint32_t member_count;
    uint32_t member_rows; /* query rows of all members */

    void *memory; /* all arrays of the above */
    size_t memory_bytes;
} attn_sharing;

/* `block_queries` and `read_rows` >= 1. Allocates nothing yet. Undo with attn_sharing_fini, also after a failure. */
void attn_sharing_init(attn_sharing *sharing, const attn_geometry *geometry, uint32_t block_queries,
                       uint32_t read_rows);
void attn_sharing_fini(attn_sharing *sharing);

/*
 * Splits `batch`, which attn_batch_check has accepted. *shares is false, and nothing else changed, if there is
 * nothing to share: no prefix that is worth it, a window, or batch_invariant. Copies the members' query rows; allocates
 * only if no batch so far needed as much. ATTN_RESOURCE_EXHAUSTED if that fails.
 */
attn_status attn_sharing_split(attn_sharing *sharing, const attn_batch *batch, bool *shares);

/* Writes out and LSE of members first .. end - 1, whose partial results are all there. Any thread, each member once. */
void attn_sharing_merge(const attn_sharing *sharing, uint32_t first, uint32_t end);

#endif
