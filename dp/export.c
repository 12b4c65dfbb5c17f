/*
 * Exports: stored rows of a range of a sequence's tokens, read chunk by chunk. The range's pages have one holder more
 * from begin to end, so what is read stays as it was, whatever becomes of the sequence. Each chunk goes to the ranks
 * that hold some of its tokens, which write their rows straight to the caller's memory.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "dp/state.h"

/* One rank's part of an export. Constant but for the failure of the chunk in flight. */
typedef struct {
    dp_job job; /* first: a job is its part */
    dp_export *export;
    uint32_t stripe;
    uint32_t rank;
    uint32_t *pages; /* [page_count] of the part's table; held from first_page on */
    uint32_t first_page, page_count;
    bool failed;
    attn_saved_status failure;
} export_part;

struct dp_export {
    dp_engine *engine;
    uint64_t first; /* position of the range's first token */
    uint64_t tokens;
    uint32_t stripes;
    export_part *parts;     /* [stripes] */
    atomic_uint references; /* to its pages: the open export, the chunk in flight */
    atomic_uint users;      /* of its memory: all of these together, runs abandoned */
    atomic_bool running;    /* a chunk is in flight */
    atomic_bool failed;     /* it has failed */
    atomic_bool detained;   /* a part of it was abandoned */
    dp_gather gather;
    dp_export_chunk *chunk;
    dp_export_chunk input;     /* a copy of it: what ranks look at, also when the chunk has come back without them */
    dp_keep keep;              /* until the last user is gone */
    attn_saved_status failure; /* written by the first to set `failed` */
};

/* ------------------------------------------------------------------------------------------- */
/* Begin and end */

static void export_free(dp_export *export) {
    for (uint32_t j = 0; export->parts != NULL && j < export->stripes; j++)
        free(export->parts[j].pages);
    free(export->parts);
    free(export);
}

/* Adds or ends a holder of the range's pages. With the engine's lock held. */
static void for_pages_held(dp_export *export, void (*change)(dp_pages *, uint32_t)) {
    for (uint32_t j = 0; j < export->stripes; j++) {
        const export_part *part = &export->parts[j];
        dp_pages *pool = &export->engine->sequences.pools[part->rank];
        if (pool->epoch != part->job.epoch) continue; /* the pages are gone with their rank */
        for (uint32_t p = part->first_page; p < part->page_count; p++)
            change(pool, part->pages[p]);
    }
}

static void let_go(dp_export *export) {
    if (atomic_fetch_sub_explicit(&export->users, 1, memory_order_acq_rel) > 1) return;
    dp_keep_release(&export->keep);
    export_free(export);
}

static void unreference(dp_export *export) {
    if (atomic_fetch_sub_explicit(&export->references, 1, memory_order_acq_rel) > 1) return;
    pthread_mutex_lock(&export->engine->lock);
    for_pages_held(export, dp_pages_drop);
    pthread_mutex_unlock(&export->engine->lock);
    let_go(export);
}

extern const dp_job_kind dp_export_job_kind;

/* False: there is no memory for the part's page table. */
static bool make_part(dp_export *export, const dp_sequence *sequence, uint32_t stripe) {
    const dp_sequences *table = &export->engine->sequences;
    export_part *part = &export->parts[stripe];
    uint64_t begin = dp_part_length(export->first, stripe, export->stripes);
    uint64_t end = dp_part_length(export->first + export->tokens, stripe, export->stripes);
    part->job.kind = &dp_export_job_kind;
    part->job.weight = 1;
    part->job.epoch = sequence->parts[stripe].epoch;
    part->export = export;
    part->stripe = stripe;
    part->rank = dp_sequence_rank(table, sequence, stripe);
    if (begin == end) return true;
    part->first_page = (uint32_t)(begin / table->geometry.page_size);
    part->page_count = dp_pages_for(&table->geometry, end);
    part->pages = malloc(part->page_count * sizeof *part->pages);
    if (part->pages == NULL) return false;
    memcpy(part->pages, sequence->parts[stripe].pages, part->page_count * sizeof *part->pages);
    return true;
}

/* NULL: there is no memory for it. */
static dp_export *make_export(dp_engine *engine, const dp_sequence *sequence, uint64_t first, uint64_t tokens) {
    dp_export *made = calloc(1, sizeof *made);
    if (made == NULL) return NULL;
    made->engine = engine;
    made->first = first;
    made->tokens = tokens;
    made->stripes = sequence->stripes;
    made->parts = calloc(made->stripes, sizeof *made->parts);
    bool is_made = made->parts != NULL;
    for (uint32_t j = 0; is_made && j < made->stripes; j++)
        is_made = make_part(made, sequence, j);
    if (!is_made) {
        export_free(made);
        return NULL;
    }
    atomic_init(&made->references, 1);
    atomic_init(&made->users, 1);
    atomic_init(&made->running, false);
    atomic_init(&made->failed, false);
    atomic_init(&made->detained, false);
    return made;
}

attn_status dp_export_hold(dp_engine *engine, const dp_sequence *sequence, uint64_t position, uint64_t tokens,
                           dp_export **export) {
    dp_export *made = make_export(engine, sequence, position, tokens);
    if (made == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for an export");
    for_pages_held(made, dp_pages_share);
    *export = made;
    return attn_ok();
}

/* With the lock held. */
static attn_status begin_locked(dp_engine *engine, dp_sequence *sequence, uint64_t position, uint64_t tokens,
                                dp_export **export) {
    dp_engine_note_ranks(engine);
    ATTN_TRY(dp_sequence_holds(&engine->sequences, sequence));
    uint64_t length = sequence->length;
    if (position > length) {
        return attn_error(ATTN_INVALID_ARGUMENT, "position: %" PRIu64 "; the sequence has %" PRIu64 " tokens", position,
                          length);
    }
    if (tokens > length - position) {
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "tokens: %" PRIu64 " from position %" PRIu64 " on; the sequence has %" PRIu64, tokens,
                          position, length);
    }
    ATTN_TRY(dp_export_hold(engine, sequence, position, tokens == 0 ? length - position : tokens, export));
    sequence->used_ns = attn_now_ns();
    return attn_ok();
}

attn_status dp_export_begin(dp_engine *engine, uint32_t tenant, uint64_t sequence, uint64_t position, uint64_t tokens,
                            dp_export **export) {
    pthread_mutex_lock(&engine->lock);
    dp_sequence *found = dp_sequences_find(&engine->sequences, tenant, sequence);
    attn_status status = found == NULL ? attn_error(ATTN_NOT_FOUND, "sequence: unknown, closed or not yours")
                                       : begin_locked(engine, found, position, tokens, export);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

uint64_t dp_export_tokens(const dp_export *export) { return export->tokens; }

void dp_export_end(dp_export *export) { unreference(export); }

void dp_export_keep(dp_export *export, dp_keep keep) { export->keep = keep; }

/* ------------------------------------------------------------------------------------------- */
/* What a rank does with a chunk */

static attn_status read_rows(dp_worker *worker, const export_part *part) {
    const dp_export *export = part->export;
    const dp_export_chunk *chunk = &export->input;
    size_t key_bytes = export->engine->key_row_bytes, value_bytes = export->engine->value_row_bytes;
    uint64_t first = export->first + chunk->token_offset, end = first + chunk->tokens, run;
    for (uint64_t position = first; position < end; position += run) {
        run = dp_part_run(position, export->stripes);
        if (run > end - position) run = end - position;
        if (dp_part_of(position, export->stripes) != part->stripe) continue;
        uint64_t local = dp_part_length(position, part->stripe, export->stripes), row = position - first;
        ATTN_TRY(attn_backend_export(dp_worker_backend(worker), chunk->layer, part->pages, part->page_count, local,
                                     (uint32_t)run, (char *)chunk->keys + row * key_bytes,
                                     (char *)chunk->values + row * value_bytes));
    }
    return attn_ok();
}

static void part_fail(export_part *part, attn_status status) {
    part->failed = true;
    attn_status_save(&part->failure, status);
}

/* Nothing joins an export's job: it runs alone. */
static attn_status export_run(dp_worker *worker, dp_job *const *jobs, uint32_t count) {
    (void)count;
    export_part *part = (export_part *)jobs[0];
    int64_t start = attn_now_ns();
    attn_status status = dp_worker_retired(worker) ? dp_rank_lost_status(part->rank) : read_rows(worker, part);
    dp_count(&part->export->engine->ranks[part->rank].counters.busy_ns, (uint64_t)(attn_now_ns() - start));
    if (attn_failed(status)) part_fail(part, status);
    return status;
}

/* Lets go of the export before it says so: who ends it in `done` or later gives its pages back at once. */
static void chunk_complete(dp_export *export) {
    dp_export_chunk *chunk = export->chunk;
    bool has_failed = atomic_load(&export->failed);
    attn_saved_status failure = {0};
    if (has_failed) failure = export->failure;
    atomic_fetch_add(&export->users, 1); /* until `done` has returned */
    chunk->detained = atomic_load(&export->detained);
    atomic_store(&export->running, false);
    unreference(export);
    chunk->done(chunk, has_failed ? attn_status_view(&failure) : attn_ok());
    let_go(export);
}

static void part_arrives(dp_export *export) {
    if (dp_gather_arrive(&export->gather)) chunk_complete(export);
}

static void export_finish(dp_job *job) {
    export_part *part = (export_part *)job;
    dp_export *export = part->export;
    if (part->failed && !atomic_exchange(&export->failed, true)) export->failure = part->failure;
    part_arrives(export);
}

static void export_drop(dp_job *job, attn_status status) {
    part_fail((export_part *)job, status);
    export_finish(job);
}

static void export_abandon(dp_job *job, attn_status status) {
    dp_export *export = ((export_part *)job)->export;
    dp_engine_hold(export->engine);
    atomic_fetch_add(&export->users, 1);
    atomic_store(&export->detained, true);
    if (!atomic_exchange(&export->failed, true)) attn_status_save(&export->failure, status);
    part_arrives(export);
}

static void export_reclaim(dp_job *job) {
    dp_export *export = ((export_part *)job)->export;
    dp_engine *engine = export->engine;
    let_go(export);
    dp_engine_let_go(engine);
}

const dp_job_kind dp_export_job_kind = {
    .run = export_run,
    .finish = export_finish,
    .drop = export_drop,
    .abandon = export_abandon,
    .reclaim = export_reclaim,
};

/* ------------------------------------------------------------------------------------------- */
/* Chunks */

static attn_status check_chunk(const dp_export *export, const dp_export_chunk *chunk) {
    uint32_t layers = export->engine->config.geometry.layers;
    if (atomic_load(&export->running)) return attn_error(ATTN_ABORTED, "a chunk of the export is in progress");
    if (atomic_load(&export->failed)) return attn_error(ATTN_ABORTED, "the export was aborted by an earlier failure");
    if (chunk->layer >= layers) {
        return attn_error(ATTN_INVALID_ARGUMENT, "layer: %u; the geometry has %u", chunk->layer, layers);
    }
    if (chunk->tokens == 0 || chunk->token_offset > export->tokens ||
        chunk->tokens > export->tokens - chunk->token_offset) {
        return attn_error(ATTN_INVALID_ARGUMENT, "tokens: %u at offset %" PRIu64 "; the export has %" PRIu64,
                          chunk->tokens, chunk->token_offset, export->tokens);
    }
    return attn_ok();
}

attn_status dp_export_read(dp_export *export, dp_export_chunk *chunk) {
    ATTN_TRY(check_chunk(export, chunk));
    const dp_engine_rank *ranks = export->engine->ranks;
    uint32_t stripes[DP_MAX_RANKS];
    uint32_t count = dp_parts_holding(export->first + chunk->token_offset, chunk->tokens, export->stripes, stripes);
    for (uint32_t s = 0; s < count; s++) {
        attn_status status =
            dp_rank_reserve(ranks[export->parts[stripes[s]].rank].rank, export->parts[stripes[s]].job.epoch);
        if (!attn_failed(status)) continue;
        while (s-- > 0)
            dp_rank_unreserve(ranks[export->parts[stripes[s]].rank].rank);
        return status;
    }
    export->chunk = chunk;
    export->input = *chunk;
    atomic_store(&export->running, true);
    atomic_fetch_add(&export->references, 1);
    dp_gather_init(&export->gather, count);
    for (uint32_t s = 0; s < count; s++) {
        export_part *part = &export->parts[stripes[s]];
        dp_rank_submit(ranks[part->rank].rank, &part->job);
    }
    return attn_ok();
}
