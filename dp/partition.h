/*
 * Partition: a step's sequences, sorted into one batch for each rank that has some of them.
 *
 * It is made once, when the step begins, and used for every layer: page tables, lengths and row
 * numbers do not change between layers, only the tensors do. A batch keeps the request's order. A
 * spread sequence is in the batch of every rank that holds tokens of it, and in that of its home rank.
 *
 * All arrays lie in one arena, which is kept and used again by the next step.
 *
 * Threads: made by the thread that begins the step; read by the ranks until the step ends.
 */
#ifndef ATTND_DP_PARTITION_H
#define ATTND_DP_PARTITION_H

#include "dp/sequences.h"

/* Copy on write: to be done before the batch first writes. */
typedef struct {
    uint32_t from;
    uint32_t to;
} dp_page_copy;

/* One rank's part of a step. The arrays from `lengths` to `partials` have attn_batch's meaning. */
typedef struct {
    uint32_t rank;
    uint32_t epoch; /* of its pages: see dp_pages */
    uint32_t size;
    uint32_t rows;           /* query rows of all its sequences */
    uint64_t tokens;         /* attended to: the sum of lengths */
    uint32_t *first_rows;    /* [size] row in the request of the sequence's first query row */
    uint32_t *lengths;       /* [size] */
    uint32_t *query_lengths; /* [size] */
    uint32_t *page_offsets;  /* [size + 1] */
    uint32_t *pages;
    attn_part *parts;       /* [size]; NULL: all whole */
    attn_partial *partials; /* [size]; NULL likewise; filled for every layer */
    dp_page_copy *copies;   /* [copy_count] */
    uint32_t copy_count;
    /* What its sequences share (dp/prefixes.h). */
    attn_prefix *prefixes; /* [prefix_count]; room for one in two sequences */
    uint32_t prefix_count;
    uint64_t tokens_shared;   /* that need not be read, if each prefix is read once */
    uint32_t *prefix_scratch; /* [dp_prefixes_scratch(size)]: the prefixes' members, and what they were found with */
} dp_batch;

/* A spread sequence of a step, and where its partial results are found. */
typedef struct {
    uint32_t first_row;
    uint32_t query_length;
    uint64_t length; /* of the whole sequence, new rows included */
    uint32_t stripes;
    attn_partial **partials; /* [stripes] slots in the batches' `partials`; NULL: that part is empty */
} dp_spread;

typedef struct {
    dp_batch *batches; /* [batch_count] ranks ascending */
    uint32_t batch_count;
    dp_spread *spreads; /* [spread_count] in request order */
    uint32_t spread_count;
    void *arena;
    size_t arena_size;
} dp_partition;

/* What a partition is made of. The sequences hold still meanwhile: they are busy with the step, or the lock is held. */
typedef struct {
    const dp_sequences *table;
    dp_sequence *const *sequences; /* [count] */
    const uint32_t *query_lengths; /* [count] or NULL: 1 each */
    uint32_t count;
    bool read_only; /* nothing grows */
} dp_partition_request;

/* A zeroed partition is empty. ATTN_RESOURCE_EXHAUSTED: no memory. */
attn_status dp_partition_make(dp_partition *partition, const dp_partition_request *request);

void dp_partition_fini(dp_partition *partition);

#endif
