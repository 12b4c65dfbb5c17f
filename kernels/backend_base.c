/* What all backends share: the base's life, the check of a batch, plans offered and refused. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"

/* Each backend's rank until it is told one: numbers far from those that owners give. */
static _Atomic uint32_t next_unnamed_rank = 0x80000000u;

void attn_backend_init(attn_backend *backend, const attn_backend_ops *ops, const attn_backend_config *config,
                       uint32_t tile_tokens, uint32_t block_queries, uint32_t workers) {
    *backend = (attn_backend){.ops = ops, .geometry = config->geometry, .pages = config->pages};
    backend->identity.rank = atomic_fetch_add(&next_unnamed_rank, 1);
    attn_line_init(&backend->line, &config->geometry, tile_tokens, block_queries, workers);
}

void attn_backend_fini(attn_backend *backend) {
    free(backend->scales);
    attn_line_fini(&backend->line);
}

attn_status attn_backend_keep_scales(attn_backend *backend, const attn_backend_config *config) {
    if (attn_kv_dtype(&config->geometry) != ATTN_FP8_E4M3) return attn_ok();
    size_t count = (size_t)config->geometry.layers * config->geometry.heads_kv;
    backend->scales = calloc(count, sizeof *backend->scales);
    if (!backend->scales) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %zu pairs of scales", count);
    for (size_t n = 0; n < count; n++) {
        backend->scales[n].key = config->k_scales ? config->k_scales[n] : 1;
        backend->scales[n].value = config->v_scales ? config->v_scales[n] : 1;
    }
    return attn_ok();
}

attn_scale attn_backend_scale(const attn_backend *backend, uint32_t layer, uint32_t head) {
    if (!backend->scales) return (attn_scale){1, 1};
    return backend->scales[(size_t)layer * backend->geometry.heads_kv + head];
}

attn_status attn_backend_check_idle(const attn_backend *backend, const char *what) {
    if (backend->started == 0) return attn_ok();
    return attn_error(ATTN_INTERNAL, "%s was asked for while a decode is started", what);
}

/* ------------------------------------------------------------------------------------------- */
/* Is a batch sound? */

static attn_status check_part(const attn_batch *batch, uint32_t i, const attn_part *part) {
    uint32_t length = batch->lengths[i], new_rows = attn_batch_new_rows(batch, i);
    if (!batch->partials || !batch->partials[i].out || !batch->partials[i].lse) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch sequence %u: a part without a place for its partial results",
                          i);
    }
    if (length > part->total_length || new_rows > length ||
        (uint64_t)part->new_first + part->new_count > batch->query_lengths[i]) {
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "batch sequence %u: a part of %u tokens, %u of them new from row %u on, does not fit %u "
                          "query rows and %llu tokens in all",
                          i, length, new_rows, part->new_first, batch->query_lengths[i],
                          (unsigned long long)part->total_length);
    }
    return attn_ok();
}

static attn_status check_sequence(const attn_backend *backend, const attn_batch *batch, uint32_t i) {
    uint32_t length = batch->lengths[i], query_length = batch->query_lengths[i];
    if (query_length < 1 || query_length > ATTN_MAX_QUERY_LENGTH) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch sequence %u: query length %u is not 1 to %d", i, query_length,
                          ATTN_MAX_QUERY_LENGTH);
    }
    if (length > (uint64_t)backend->pages * backend->geometry.page_size) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch sequence %u: %u tokens are more than the pool holds", i,
                          length);
    }
    const attn_part *part = attn_batch_part(batch, i);
    uint64_t total = part ? part->total_length : length;
    if (!attn_batch_is_read(batch, i) && total < query_length) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch sequence %u: length %llu does not include the %u new rows", i,
                          (unsigned long long)total, query_length);
    }
    if (!batch->queries[i] || (!part && !batch->outs[i])) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch sequence %u: no query or out rows", i);
    }
    if (attn_batch_new_rows(batch, i) > 0 && (!batch->new_values || !batch->new_values[i])) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch sequence %u: new keys without new values", i);
    }
    return part ? check_part(batch, i, part) : attn_ok();
}

static attn_status check_pages(const attn_backend *backend, const attn_batch *batch, uint32_t i) {
    const uint32_t *pages = batch->pages + batch->page_offsets[i];
    uint32_t page_size = backend->geometry.page_size;
    uint32_t count = (uint32_t)(((uint64_t)batch->lengths[i] + page_size - 1) / page_size);
    uint64_t room = (uint64_t)batch->page_offsets[i + 1] - batch->page_offsets[i];
    if (batch->page_offsets[i + 1] < batch->page_offsets[i] || room < count) {
        return attn_error(ATTN_INTERNAL, "batch sequence %u: %u tokens need %u pages, its page table has %llu", i,
                          batch->lengths[i], count, (unsigned long long)room);
    }
    for (uint32_t p = 0; p < count; p++) {
        if (pages[p] >= backend->pages) {
            return attn_error(ATTN_INTERNAL, "batch sequence %u: page %u of its table is %u, the pool has %u", i, p,
                              pages[p], backend->pages);
        }
    }
    return attn_ok();
}

/* Member `m` of prefix `p`: a whole sequence that has the prefix's tokens, in the same pages as the first member. */
static attn_status check_member(const attn_backend *backend, const attn_batch *batch, uint32_t p, uint32_t m) {
    const attn_prefix *prefix = &batch->prefixes[p];
    uint32_t i = prefix->members[m];
    if (i >= batch->size) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch prefix %u: member %u is sequence %u of a batch of %u", p, m, i,
                          batch->size);
    }
    if (attn_batch_part(batch, i)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch prefix %u: member %u (sequence %u) is a part, not whole", p, m,
                          i);
    }
    uint32_t stored = batch->lengths[i] - attn_batch_new_rows(batch, i);
    if (prefix->tokens > stored) {
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "batch prefix %u: member %u (sequence %u) has %u tokens without its new rows, not %u", p, m,
                          i, stored, prefix->tokens);
    }
    const uint32_t *pages = batch->pages + batch->page_offsets[i];
    const uint32_t *expected = batch->pages + batch->page_offsets[prefix->members[0]];
    if (memcmp(pages, expected, prefix->tokens / backend->geometry.page_size * sizeof *pages) != 0) {
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "batch prefix %u: member %u (sequence %u) has other pages than member 0 (sequence %u)", p, m,
                          i, prefix->members[0]);
    }
    return attn_ok();
}

static attn_status check_prefix(const attn_backend *backend, const attn_batch *batch, uint32_t p) {
    const attn_prefix *prefix = &batch->prefixes[p];
    if (prefix->count < 2) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch prefix %u: shared by %u sequences; must be 2 and more", p,
                          prefix->count);
    }
    if (prefix->tokens == 0 || prefix->tokens % ATTN_CHUNK_TOKENS != 0) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch prefix %u: %u tokens; must be a multiple of %d, and not 0", p,
                          prefix->tokens, ATTN_CHUNK_TOKENS);
    }
    for (uint32_t m = 0; m < prefix->count; m++)
        ATTN_TRY(check_member(backend, batch, p, m));
    return attn_ok();
}

/* So many sequences are told apart at a time: this check has no memory but its stack. */
enum { MARKED_SEQUENCES = 1 << 15 };

/* Is none of the sequences first .. first + MARKED_SEQUENCES - 1 a member twice? All members are within the batch. */
static attn_status check_distinct(const attn_batch *batch, uint32_t first) {
    uint64_t marks[MARKED_SEQUENCES / 64];
    uint32_t rest = batch->size - first, marked = rest < MARKED_SEQUENCES ? rest : MARKED_SEQUENCES;
    memset(marks, 0, (marked + (size_t)63) / 64 * sizeof *marks);
    for (uint32_t p = 0; p < batch->prefix_count; p++) {
        for (uint32_t m = 0; m < batch->prefixes[p].count; m++) {
            uint32_t i = batch->prefixes[p].members[m];
            if (i < first || i - first >= marked) continue;
            uint64_t bit = (uint64_t)1 << (i - first) % 64;
            if (marks[(i - first) / 64] & bit) {
                return attn_error(ATTN_INVALID_ARGUMENT,
                                  "batch prefix %u: member %u (sequence %u) is a member already, of this prefix or "
                                  "of one before it",
                                  p, m, i);
            }
            marks[(i - first) / 64] |= bit;
        }
    }
    return attn_ok();
}

static attn_status check_prefixes(const attn_backend *backend, const attn_batch *batch) {
    if (batch->prefix_count == 0) return attn_ok();
    if (!batch->prefixes) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch prefixes: none, where there are to be %u", batch->prefix_count);
    }
    for (uint32_t p = 0; p < batch->prefix_count; p++)
        ATTN_TRY(check_prefix(backend, batch, p));
    for (uint64_t first = 0; first < batch->size; first += MARKED_SEQUENCES)
        ATTN_TRY(check_distinct(batch, (uint32_t)first));
    return attn_ok();
}

attn_status attn_batch_check(const attn_backend *backend, const attn_batch *batch) {
    if (batch->size == 0) return attn_ok();
    if (batch->layer >= backend->geometry.layers) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch layer %u: the geometry has %u", batch->layer,
                          backend->geometry.layers);
    }
    if (!(batch->scale > 0) || !isfinite(batch->scale) || !(batch->softcap >= 0) || !isfinite(batch->softcap)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "batch scale %g, softcap %g: must be finite, above 0 and not below 0",
                          (double)batch->scale, (double)batch->softcap);
    }
    for (uint32_t i = 0; i < batch->size; i++) {
        ATTN_TRY(check_sequence(backend, batch, i));
        ATTN_TRY(check_pages(backend, batch, i));
    }
    return check_prefixes(backend, batch);
}

/* ------------------------------------------------------------------------------------------- */
/* Plans */

static void (*plan_log)(void *context, const char *line);
static void *plan_log_context;

void attn_set_plan_log(void (*log)(void *context, const char *line), void *context) {
    plan_log = log;
    plan_log_context = context;
}

static void log_rejected_plan(const attn_backend *backend, attn_plan_verdict verdict) {
    if (!plan_log) return;
    char line[160];
    snprintf(line, sizeof line, "plan rejected: %s does not fit; rank %u, generation %llu, batch of %u",
             attn_plan_verdict_name(verdict), backend->identity.rank, (unsigned long long)backend->identity.generation,
             backend->line.batch->size);
    plan_log(plan_log_context, line);
}

const attn_plan *attn_backend_accept_plan(attn_backend *backend, const attn_plan *plan) {
    if (!plan) return NULL;
    attn_plan_verdict verdict = attn_plan_check(plan, &backend->line, backend->identity);
    if (verdict == ATTN_PLAN_FITS) return plan;
    atomic_fetch_add_explicit(&backend->plans_rejected, 1, memory_order_relaxed);
    log_rejected_plan(backend, verdict);
    return NULL;
}

void attn_backend_set_identity(attn_backend *backend, attn_plan_identity identity) { backend->identity = identity; }

attn_status attn_plan_create(const attn_backend *backend, attn_plan **plan) {
    size_t bytes = attn_plan_bytes(backend->line.workers);
    *plan = calloc(1, bytes); /* without a magic: it fits nothing until it is filled */
    if (!*plan) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a plan of %zu bytes", bytes);
    return attn_ok();
}

void attn_plan_destroy(attn_plan *plan) { free(plan); }

attn_status attn_backend_plan_step(attn_backend *backend, const attn_batch *batch, attn_plan *plan) {
    ATTN_TRY(attn_batch_check(backend, batch));
    ATTN_TRY(attn_line_build(&backend->line, batch));
    attn_plan_fill(plan, &backend->line, backend->identity);
    return attn_ok();
}
