#include "dp/partition.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "dp/prefixes.h"

/* What one rank's batch needs room for. */
typedef struct {
    uint32_t size;
    uint32_t pages;
    uint32_t copies;
    bool spread;
} rank_count;

/* One part of one sequence, as its rank sees it in this step. */
typedef struct {
    const dp_sequence *sequence;
    const dp_part *part;
    uint32_t stripe;
    uint32_t rank;
    uint64_t length; /* of the part, new rows included */
    uint32_t pages;
    bool present; /* the rank has work with it */
} part_view;

static uint64_t length_in_step(const dp_partition_request *request, const dp_sequence *sequence) {
    return sequence->length + (request->read_only ? 0 : sequence->growing);
}

static part_view view_part(const dp_partition_request *request, const dp_sequence *sequence, uint32_t stripe) {
    uint64_t length = dp_part_length(length_in_step(request, sequence), stripe, sequence->stripes);
    return (part_view){
        .sequence = sequence,
        .part = &sequence->parts[stripe],
        .stripe = stripe,
        .rank = dp_sequence_rank(request->table, sequence, stripe),
        .length = length,
        .pages = dp_pages_for(&request->table->geometry, length),
        .present = stripe == 0 || length > 0,
    };
}

static bool copies_page(const dp_partition_request *request, const dp_part *part) {
    return !request->read_only && part->replacement != DP_NO_PAGE;
}

static void count_parts(const dp_partition_request *request, rank_count *counts, uint32_t *spreads, uint32_t *stripes) {
    for (uint32_t i = 0; i < request->count; i++) {
        const dp_sequence *sequence = request->sequences[i];
        bool spread = sequence->stripes > 1;
        if (spread) {
            *spreads += 1;
            *stripes += sequence->stripes;
        }
        for (uint32_t j = 0; j < sequence->stripes; j++) {
            part_view view = view_part(request, sequence, j);
            if (!view.present) continue;
            rank_count *count = &counts[view.rank];
            count->size++;
            count->pages += view.pages;
            count->copies += copies_page(request, view.part);
            count->spread |= spread;
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The arena: measured by carving from a NULL base, then carved in earnest */

typedef struct {
    char *base;
    size_t used;
} carver;

static void *carve(carver *from, size_t count, size_t size) {
    size_t at = (from->used + 15) / 16 * 16;
    from->used = at + count * size;
    return from->base == NULL ? NULL : from->base + at;
}

static void carve_batch(carver *from, dp_batch *batch, const rank_count *count) {
    dp_batch carved = {
        .first_rows = carve(from, count->size, sizeof(uint32_t)),
        .lengths = carve(from, count->size, sizeof(uint32_t)),
        .query_lengths = carve(from, count->size, sizeof(uint32_t)),
        .page_offsets = carve(from, count->size + 1, sizeof(uint32_t)),
        .pages = carve(from, count->pages, sizeof(uint32_t)),
        .copies = carve(from, count->copies, sizeof(dp_page_copy)),
        .prefixes = carve(from, count->size / 2, sizeof(attn_prefix)),
        .prefix_scratch = carve(from, dp_prefixes_scratch(count->size), sizeof(uint32_t)),
    };
    if (count->spread) {
        carved.parts = carve(from, count->size, sizeof(attn_part));
        carved.partials = carve(from, count->size, sizeof(attn_partial));
    }
    if (batch != NULL) *batch = carved;
}

/* Carves all arrays; with a NULL base it only measures. Batches are indexed by rank in `by_rank`. */
static void carve_all(carver *from, dp_partition *partition, const rank_count *counts, uint32_t ranks, uint32_t spreads,
                      uint32_t stripes, dp_batch **by_rank, attn_partial ***slots) {
    partition->batches = carve(from, ranks, sizeof(dp_batch));
    partition->spreads = carve(from, spreads, sizeof(dp_spread));
    *slots = carve(from, stripes, sizeof(attn_partial *));
    partition->batch_count = 0;
    for (uint32_t r = 0; r < ranks; r++) {
        if (counts[r].size == 0) continue;
        dp_batch *batch = partition->batches == NULL ? NULL : &partition->batches[partition->batch_count];
        carve_batch(from, batch, &counts[r]);
        if (batch == NULL) continue;
        batch->rank = r;
        batch->page_offsets[0] = 0;
        by_rank[r] = batch;
        partition->batch_count++;
    }
}

static attn_status reserve_arena(dp_partition *partition, size_t size) {
    if (size <= partition->arena_size) return attn_ok();
    free(partition->arena);
    partition->arena_size = 0;
    partition->arena = malloc(size);
    if (partition->arena == NULL) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the step's %zu bytes of page tables", size);
    }
    partition->arena_size = size;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Filling */

/* Which of the `tokens` new rows the part stores. They touch two chunks at most. */
static void find_new_rows(const dp_sequence *sequence, uint32_t stripe, uint32_t tokens, attn_part *part) {
    uint64_t run = dp_part_run(sequence->length, sequence->stripes);
    uint32_t head = run < tokens ? (uint32_t)run : tokens;
    if (dp_part_of(sequence->length, sequence->stripes) == stripe) {
        part->new_first = 0;
        part->new_count = head;
    } else if (head < tokens && dp_part_of(sequence->length + head, sequence->stripes) == stripe) {
        part->new_first = head;
        part->new_count = tokens - head;
    }
}

static void add_pages(const dp_partition_request *request, dp_batch *batch, const part_view *view) {
    uint32_t first = batch->page_offsets[batch->size];
    if (view->pages > 0) memcpy(batch->pages + first, view->part->pages, view->pages * sizeof *batch->pages);
    if (copies_page(request, view->part)) {
        uint32_t tail = view->part->count - 1;
        batch->copies[batch->copy_count++] =
            (dp_page_copy){.from = view->part->pages[tail], .to = view->part->replacement};
        batch->pages[first + tail] = view->part->replacement;
    }
    batch->page_offsets[batch->size + 1] = first + view->pages;
}

static void add_part(const dp_partition_request *request, dp_batch *batch, const part_view *view, uint32_t row,
                     uint32_t rows) {
    uint32_t i = batch->size;
    const dp_sequence *sequence = view->sequence;
    batch->epoch = view->part->epoch;
    batch->first_rows[i] = row;
    batch->lengths[i] = (uint32_t)view->length;
    batch->query_lengths[i] = rows;
    add_pages(request, batch, view);
    if (batch->parts != NULL) {
        batch->parts[i] = (attn_part){0};
        batch->partials[i] = (attn_partial){0};
    }
    if (sequence->stripes > 1) {
        attn_part *part = &batch->parts[i];
        part->chunk_first = view->stripe;
        part->chunk_stride = sequence->stripes;
        part->total_length = length_in_step(request, sequence);
        if (!request->read_only) find_new_rows(sequence, view->stripe, rows, part);
    }
    batch->tokens += view->length;
    batch->rows += rows;
    batch->size++;
}

static void add_sequence(dp_partition *partition, const dp_partition_request *request, dp_batch **by_rank,
                         const dp_sequence *sequence, uint32_t row, uint32_t rows, attn_partial ***slots) {
    dp_spread *spread = NULL;
    if (sequence->stripes > 1) {
        spread = &partition->spreads[partition->spread_count++];
        *spread = (dp_spread){.first_row = row,
                              .query_length = rows,
                              .length = length_in_step(request, sequence),
                              .stripes = sequence->stripes,
                              .partials = *slots};
        *slots += sequence->stripes;
    }
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        part_view view = view_part(request, sequence, j);
        dp_batch *batch = view.present ? by_rank[view.rank] : NULL;
        if (spread != NULL) spread->partials[j] = batch == NULL ? NULL : &batch->partials[batch->size];
        if (batch != NULL) add_part(request, batch, &view, row, rows);
    }
}

attn_status dp_partition_make(dp_partition *partition, const dp_partition_request *request) {
    uint32_t ranks = request->table->ranks;
    rank_count counts[DP_MAX_RANKS] = {0};
    dp_batch *by_rank[DP_MAX_RANKS] = {0};
    attn_partial **slots;
    uint32_t spreads = 0, stripes = 0;
    count_parts(request, counts, &spreads, &stripes);
    carver measure = {0};
    carve_all(&measure, partition, counts, ranks, spreads, stripes, by_rank, &slots);
    ATTN_TRY(reserve_arena(partition, measure.used));
    carver earnest = {.base = partition->arena};
    carve_all(&earnest, partition, counts, ranks, spreads, stripes, by_rank, &slots);
    partition->spread_count = 0;
    uint32_t row = 0;
    for (uint32_t i = 0; i < request->count; i++) {
        uint32_t rows = request->query_lengths == NULL ? 1 : request->query_lengths[i];
        add_sequence(partition, request, by_rank, request->sequences[i], row, rows, &slots);
        row += rows;
    }
    for (uint32_t b = 0; b < partition->batch_count; b++)
        dp_prefixes_find(&partition->batches[b], &request->table->geometry, request->read_only);
    return attn_ok();
}

void dp_partition_fini(dp_partition *partition) {
    free(partition->arena);
    *partition = (dp_partition){0};
}
