#include "dp/collective.h"

void dp_gather_init(dp_gather *gather, uint32_t ranks) { atomic_init(&gather->missing, ranks); }

bool dp_gather_arrive(dp_gather *gather) {
    return atomic_fetch_sub_explicit(&gather->missing, 1, memory_order_acq_rel) == 1;
}

static uint64_t chunks_of(uint64_t tokens) { return (tokens + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS; }

/* Partial results of one part: one, or one a chunk. */
static uint64_t partials_of_part(const dp_spread *spread, uint32_t stripe, bool batch_invariant) {
    return batch_invariant ? chunks_of(dp_part_length(spread->length, stripe, spread->stripes)) : 1;
}

/* Floats of one partial result's out, and of its lse. */
static size_t out_floats(const dp_spread *spread, const attn_geometry *geometry) {
    return (size_t)spread->query_length * geometry->heads_q * geometry->head_dim_v;
}

static size_t lse_floats(const dp_spread *spread, const attn_geometry *geometry) {
    return (size_t)spread->query_length * geometry->heads_q;
}

/* The memory starts with the list that attn_combine takes: as long as the longest. */
static size_t list_entries(const dp_partition *partition, bool batch_invariant) {
    uint64_t longest = 0;
    for (uint32_t s = 0; s < partition->spread_count; s++) {
        const dp_spread *spread = &partition->spreads[s];
        uint64_t entries = batch_invariant ? chunks_of(spread->length) : spread->stripes;
        if (entries > longest) longest = entries;
    }
    return longest;
}

static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t dp_gather_bytes(const dp_partition *partition, const attn_geometry *geometry, bool batch_invariant) {
    if (partition->spread_count == 0) return 0;
    size_t floats = 0;
    for (uint32_t s = 0; s < partition->spread_count; s++) {
        const dp_spread *spread = &partition->spreads[s];
        size_t each = out_floats(spread, geometry) + lse_floats(spread, geometry);
        for (uint32_t j = 0; j < spread->stripes; j++) {
            if (spread->partials[j] != NULL) floats += partials_of_part(spread, j, batch_invariant) * each;
        }
    }
    return 64 + round_up(list_entries(partition, batch_invariant) * sizeof(attn_partial)) + floats * sizeof(float);
}

void dp_gather_place(const dp_partition *partition, const attn_geometry *geometry, bool batch_invariant, void *memory) {
    size_t list = round_up(list_entries(partition, batch_invariant) * sizeof(attn_partial));
    float *next = (float *)(void *)((char *)memory + list);
    for (uint32_t s = 0; s < partition->spread_count; s++) {
        const dp_spread *spread = &partition->spreads[s];
        for (uint32_t j = 0; j < spread->stripes; j++) {
            if (spread->partials[j] == NULL) continue;
            uint64_t count = partials_of_part(spread, j, batch_invariant);
            spread->partials[j]->out = next;
            next += count * out_floats(spread, geometry);
            spread->partials[j]->lse = next;
            next += count * lse_floats(spread, geometry);
        }
    }
}

/* One entry a part, starting at the home rank. */
static uint32_t list_by_part(const dp_spread *spread, attn_partial *list) {
    uint32_t count = 0;
    for (uint32_t j = 0; j < spread->stripes; j++) {
        if (spread->partials[j] != NULL) list[count++] = *spread->partials[j];
    }
    return count;
}

/* One entry a chunk of the whole sequence. */
static uint32_t list_by_chunk(const dp_spread *spread, const attn_geometry *geometry, attn_partial *list) {
    uint32_t count = (uint32_t)chunks_of(spread->length);
    for (uint32_t c = 0; c < count; c++) {
        const attn_partial *part = spread->partials[c % spread->stripes];
        size_t before = c / spread->stripes;
        list[c].out = part->out + before * out_floats(spread, geometry);
        list[c].lse = part->lse + before * lse_floats(spread, geometry);
    }
    return count;
}

void dp_gather_merge(const dp_partition *partition, const dp_gather_merge_request *request) {
    const attn_geometry *geometry = request->geometry;
    attn_partial *list = request->memory;
    for (uint32_t s = 0; s < partition->spread_count; s++) {
        const dp_spread *spread = &partition->spreads[s];
        uint32_t count = request->batch_invariant ? list_by_chunk(spread, geometry, list) : list_by_part(spread, list);
        char *out = (char *)request->out + spread->first_row * attn_out_row_bytes(geometry);
        float *lse = request->lse == NULL ? NULL : request->lse + (size_t)spread->first_row * geometry->heads_q;
        attn_combine(list, count, spread->query_length, geometry->heads_q, geometry->head_dim_v, request->sinks,
                     geometry->dtype, out, lse);
    }
}
