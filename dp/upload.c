/*
 * Uploads: a sequence grows by many tokens at once, chunk by chunk and layer by layer, unseen until
 * all is there. Each chunk goes to the ranks that hold some of its tokens; a rank appends its rows in
 * place where they lie in one span, and gathers those that cross from one span into the next.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "dp/state.h"
#include "dp/tensors.h"

/* One rank's part of an upload. Constant but for `copied`, which is the rank's, and the failure of the chunk in
 * flight. */
typedef struct {
    dp_job job; /* first: a job is its part */
    dp_upload *upload;
    uint32_t stripe;
    uint32_t rank;
    uint32_t *pages; /* [page_count] the part's table, with the pages that the upload took */
    uint32_t page_count;
    dp_page_copy copy; /* `to` is DP_NO_PAGE: nothing to copy */
    bool copied;
    bool failed;
    attn_saved_status failure;
} upload_part;

struct dp_upload {
    dp_engine *engine;
    dp_sequence *sequence; /* busy with this upload; NULL: the pages are no sequence's yet */
    uint64_t first;        /* position of the upload's first token */
    uint64_t tokens;
    uint32_t stripes;
    upload_part *parts;     /* [stripes] */
    uint64_t *layer_tokens; /* [layers] how many are there; the caller's, and the chunk's while one is in flight */
    atomic_int state;       /* a dp_step_state: a chunk is to an upload what a layer is to a step */
    atomic_uint references; /* the open upload, the chunk in flight, runs abandoned */
    atomic_bool failed;
    atomic_bool detained; /* a part was abandoned */
    dp_gather gather;
    dp_upload_chunk *chunk;
    dp_upload_chunk input;     /* a copy of it: what ranks look at, also when the chunk has come back without them */
    dp_keep keep;              /* until the last reference is gone */
    attn_saved_status failure; /* written by the first to set `failed` */
};

/* ------------------------------------------------------------------------------------------- */
/* Begin and end */

static void upload_free(dp_upload *upload) {
    for (uint32_t j = 0; upload->parts != NULL && j < upload->stripes; j++)
        free(upload->parts[j].pages);
    free(upload->parts);
    free(upload->layer_tokens);
    free(upload);
}

static void unreference(dp_upload *upload) {
    if (atomic_fetch_sub_explicit(&upload->references, 1, memory_order_acq_rel) != 1) return;
    dp_keep_release(&upload->keep);
    upload_free(upload);
}

static bool move_state(dp_upload *upload, dp_step_state from, dp_step_state to) {
    int expected = from;
    return atomic_compare_exchange_strong(&upload->state, &expected, to);
}

static void give_back(dp_upload *upload) {
    if (upload->sequence == NULL) return;
    pthread_mutex_lock(&upload->engine->lock);
    dp_sequence_cancel(&upload->engine->sequences, upload->sequence, attn_now_ns());
    pthread_mutex_unlock(&upload->engine->lock);
    dp_moves_resume(upload->engine);
}

static attn_status grow_sequence(dp_engine *engine, uint32_t tenant, dp_sequence *sequence, uint64_t tokens) {
    dp_sequences *table = &engine->sequences;
    dp_engine_note_ranks(engine);
    ATTN_TRY(dp_sequence_holds(table, sequence));
    if (sequence->busy) return attn_error(ATTN_ABORTED, "sequence: %s right now", dp_sequence_busy_with(sequence));
    if (tokens > table->max_length - sequence->length) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED,
                          "tokens: %" PRIu64 " after the sequence's %" PRIu64 "; a sequence holds %" PRIu64 " at most",
                          tokens, sequence->length, table->max_length);
    }
    uint64_t needs[DP_MAX_RANKS] = {0};
    uint64_t quota = 0;
    dp_sequence_needs(table, sequence, tokens, needs, &quota);
    ATTN_TRY(dp_sequences_afford(table, tenant, needs, quota));
    ATTN_TRY(dp_sequence_reserve(table, sequence, tokens));
    dp_sequence_grow(table, sequence, tokens);
    return attn_ok();
}

extern const dp_job_kind dp_upload_job_kind;

static attn_status make_part(dp_upload *upload, const dp_part *part, uint32_t stripe, uint32_t rank) {
    upload_part *made = &upload->parts[stripe];
    made->job.kind = &dp_upload_job_kind;
    made->job.weight = 1;
    made->job.epoch = part->epoch;
    made->upload = upload;
    made->stripe = stripe;
    made->rank = rank;
    made->page_count = part->count + part->taken;
    made->copy.to = part->replacement;
    if (made->page_count == 0) return attn_ok();
    made->pages = malloc(made->page_count * sizeof *made->pages);
    if (made->pages == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for an upload's page table");
    memcpy(made->pages, part->pages, made->page_count * sizeof *made->pages);
    if (part->replacement != DP_NO_PAGE) {
        made->copy.from = part->pages[part->count - 1];
        made->pages[part->count - 1] = part->replacement;
    }
    return attn_ok();
}

/* With parts that have no page tables yet. NULL: there is no memory for one. */
static dp_upload *allocate_upload(uint32_t stripes, uint32_t layers) {
    dp_upload *made = calloc(1, sizeof *made);
    if (made == NULL) return NULL;
    made->stripes = stripes;
    made->parts = calloc(stripes, sizeof *made->parts);
    made->layer_tokens = calloc(layers, sizeof *made->layer_tokens);
    if (made->parts != NULL && made->layer_tokens != NULL) return made;
    upload_free(made);
    return NULL;
}

/* An upload of `tokens` from position `first` on into pages that lie as `place` says. */
static attn_status make_upload(dp_engine *engine, const dp_place *place, uint64_t first, uint64_t tokens,
                               dp_upload **upload) {
    dp_upload *made = allocate_upload(place->stripes, engine->config.geometry.layers);
    if (made == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for an upload");
    made->engine = engine;
    made->first = first;
    made->tokens = tokens;
    for (uint32_t j = 0; j < made->stripes; j++) {
        attn_status status = make_part(made, &place->parts[j], j, dp_place_rank(&engine->sequences, place, j));
        if (!attn_failed(status)) continue;
        upload_free(made);
        return status;
    }
    atomic_init(&made->state, DP_STEP_OPEN);
    atomic_init(&made->references, 1);
    atomic_init(&made->failed, false);
    atomic_init(&made->detained, false);
    *upload = made;
    return attn_ok();
}

attn_status dp_upload_into(dp_engine *engine, const dp_place *place, uint64_t tokens, dp_upload **upload) {
    return make_upload(engine, place, 0, tokens, upload);
}

attn_status dp_upload_begin(dp_engine *engine, uint32_t tenant, uint64_t sequence, uint64_t tokens,
                            dp_upload **upload) {
    if (tokens == 0) return attn_error(ATTN_INVALID_ARGUMENT, "tokens: 0; an upload brings 1 or more");
    pthread_mutex_lock(&engine->lock);
    dp_sequence *grown = dp_sequences_find(&engine->sequences, tenant, sequence);
    attn_status status = grown == NULL ? attn_error(ATTN_NOT_FOUND, "sequence: unknown, closed or not yours")
                                       : grow_sequence(engine, tenant, grown, tokens);
    pthread_mutex_unlock(&engine->lock);
    if (grown == NULL || attn_failed(status)) return status;
    dp_place place = {.home = grown->home, .stripes = grown->stripes, .parts = grown->parts};
    status = make_upload(engine, &place, grown->length, tokens, upload);
    if (!attn_failed(status)) {
        (*upload)->sequence = grown;
    } else {
        pthread_mutex_lock(&engine->lock);
        dp_sequence_cancel(&engine->sequences, grown, attn_now_ns());
        pthread_mutex_unlock(&engine->lock);
    }
    return status;
}

void dp_upload_end(dp_upload *upload) {
    bool gives_back = move_state(upload, DP_STEP_OPEN, DP_STEP_ABORTED);
    if (!gives_back && !move_state(upload, DP_STEP_RUNNING, DP_STEP_RUNNING_ENDED)) {
        gives_back = move_state(upload, DP_STEP_OPEN, DP_STEP_ABORTED);
    }
    if (gives_back) give_back(upload);
    unreference(upload);
}

void dp_upload_keep(dp_upload *upload, dp_keep keep) { upload->keep = keep; }

static attn_status check_state(const dp_upload *upload) {
    switch ((dp_step_state)atomic_load(&upload->state)) {
    case DP_STEP_OPEN: return attn_ok();
    case DP_STEP_RUNNING:
    case DP_STEP_RUNNING_ENDED: return attn_error(ATTN_ABORTED, "a chunk of the upload is in progress");
    case DP_STEP_COMMITTED: return attn_error(ATTN_FAILED_PRECONDITION, "the upload is complete");
    case DP_STEP_ABORTED: return attn_error(ATTN_ABORTED, "the upload was aborted by an earlier failure");
    }
    return attn_error(ATTN_INTERNAL, "upload in no known state");
}

attn_status dp_upload_commit(dp_upload *upload, uint64_t *length) {
    dp_engine *engine = upload->engine;
    ATTN_TRY(check_state(upload));
    for (uint32_t layer = 0; layer < engine->config.geometry.layers; layer++) {
        if (upload->layer_tokens[layer] == upload->tokens) continue;
        return attn_error(ATTN_INVALID_ARGUMENT, "layer %u: %" PRIu64 " of the upload's %" PRIu64 " tokens came", layer,
                          upload->layer_tokens[layer], upload->tokens);
    }
    atomic_store(&upload->state, DP_STEP_COMMITTED);
    pthread_mutex_lock(&engine->lock);
    dp_sequence_commit(&engine->sequences, upload->sequence, attn_now_ns());
    *length = upload->sequence->length;
    pthread_mutex_unlock(&engine->lock);
    dp_moves_resume(engine);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* What a rank does with a chunk */

typedef struct {
    dp_engine *engine;
    dp_worker *worker;
    const upload_part *part;
    dp_tensor_reader keys, values;
    uint64_t bytes_in_place, bytes_gathered;
} chunk_writer;

/* Rows from `row` on, up to `rows`, that lie in one piece: where their keys and values are, and how many. One row that
 * does not is gathered. */
static attn_status next_piece(chunk_writer *writer, uint64_t row, uint64_t rows, const void **keys, const void **values,
                              uint32_t *count) {
    size_t key_bytes = writer->engine->key_row_bytes, value_bytes = writer->engine->value_row_bytes;
    size_t keys_available, values_available;
    *keys = dp_tensor_reader_seek(&writer->keys, row * key_bytes, &keys_available);
    *values = dp_tensor_reader_seek(&writer->values, row * value_bytes, &values_available);
    uint64_t whole = rows;
    if (keys_available / key_bytes < whole) whole = keys_available / key_bytes;
    if (values_available / value_bytes < whole) whole = values_available / value_bytes;
    if (whole > 0) {
        *count = (uint32_t)whole;
        writer->bytes_in_place += whole * (key_bytes + value_bytes);
        return attn_ok();
    }
    dp_scratch *scratch = dp_worker_scratch(writer->worker);
    if (!dp_scratch_reserve(&scratch->staging, &scratch->staging_size, key_bytes + value_bytes)) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory to gather a row");
    }
    char *gathered = scratch->staging;
    dp_tensor_reader_copy(&writer->keys, row * key_bytes, key_bytes, gathered);
    dp_tensor_reader_copy(&writer->values, row * value_bytes, value_bytes, gathered + key_bytes);
    *keys = gathered;
    *values = gathered + key_bytes;
    *count = 1;
    writer->bytes_gathered += key_bytes + value_bytes;
    return attn_ok();
}

/* Appends rows that follow one another in the part too. */
static attn_status append_run(chunk_writer *writer, uint64_t position, uint64_t row, uint64_t rows) {
    const upload_part *part = writer->part;
    while (rows > 0) {
        const void *keys, *values;
        uint32_t count = 0;
        ATTN_TRY(next_piece(writer, row, rows, &keys, &values, &count));
        ATTN_TRY(attn_backend_append(dp_worker_backend(writer->worker), part->upload->input.layer, part->pages,
                                     part->page_count, position, count, keys, values));
        position += count;
        row += count;
        rows -= count;
    }
    return attn_ok();
}

static attn_status write_rows(chunk_writer *writer) {
    const upload_part *part = writer->part;
    const dp_upload *upload = part->upload;
    uint64_t first = upload->first + upload->input.token_offset;
    uint64_t end = first + upload->input.tokens;
    uint64_t run;
    for (uint64_t position = first; position < end; position += run) {
        run = dp_part_run(position, upload->stripes);
        if (run > end - position) run = end - position;
        if (dp_part_of(position, upload->stripes) != part->stripe) continue;
        uint64_t local = dp_part_length(position, part->stripe, upload->stripes);
        ATTN_TRY(append_run(writer, local, position - first, run));
    }
    return attn_ok();
}

static attn_status write_chunk(dp_worker *worker, upload_part *part) {
    dp_engine *engine = part->upload->engine;
    chunk_writer writer = {.engine = engine, .worker = worker, .part = part};
    if (dp_worker_retired(worker)) return dp_rank_lost_status(part->rank);
    if (part->copy.to != DP_NO_PAGE && !part->copied) {
        ATTN_TRY(attn_backend_copy_page(dp_worker_backend(worker), part->copy.from, part->copy.to));
        part->copied = true;
    }
    int64_t start = attn_now_ns();
    dp_tensor_reader_init(&writer.keys, &part->upload->input.keys);
    dp_tensor_reader_init(&writer.values, &part->upload->input.values);
    attn_status status = write_rows(&writer);
    dp_rank_counters *counters = &engine->ranks[part->rank].counters;
    dp_count(&counters->busy_ns, (uint64_t)(attn_now_ns() - start));
    if (part->upload->sequence == NULL) return status; /* no call's tensors */
    dp_count(&counters->bytes_in_place, writer.bytes_in_place);
    dp_count(&counters->bytes_gathered, writer.bytes_gathered);
    return status;
}

static void part_fail(upload_part *part, attn_status status) {
    part->failed = true;
    attn_status_save(&part->failure, status);
}

/* Nothing joins an upload's job: it runs alone. */
static attn_status upload_run(dp_worker *worker, dp_job *const *jobs, uint32_t count) {
    (void)count;
    upload_part *part = (upload_part *)jobs[0];
    attn_status status = write_chunk(worker, part);
    if (attn_failed(status)) part_fail(part, status);
    return status;
}

static void chunk_complete(dp_upload *upload) {
    dp_upload_chunk *chunk = upload->chunk;
    attn_status status = attn_ok();
    if (atomic_load(&upload->failed)) {
        status = attn_status_view(&upload->failure);
    } else {
        upload->layer_tokens[chunk->layer] += chunk->tokens;
        if (!move_state(upload, DP_STEP_RUNNING, DP_STEP_OPEN)) {
            status = attn_error(ATTN_CANCELLED, "the upload was ended before its chunk was written");
        }
    }
    if (attn_failed(status)) {
        atomic_store(&upload->state, DP_STEP_ABORTED);
        give_back(upload);
    }
    chunk->detained = atomic_load(&upload->detained);
    chunk->done(chunk, status);
    unreference(upload);
}

static void part_arrives(dp_upload *upload) {
    if (dp_gather_arrive(&upload->gather)) chunk_complete(upload);
}

static void upload_finish(dp_job *job) {
    upload_part *part = (upload_part *)job;
    dp_upload *upload = part->upload;
    if (part->failed && !atomic_exchange(&upload->failed, true)) upload->failure = part->failure;
    part_arrives(upload);
}

static void upload_drop(dp_job *job, attn_status status) {
    part_fail((upload_part *)job, status);
    upload_finish(job);
}

static void upload_abandon(dp_job *job, attn_status status) {
    dp_upload *upload = ((upload_part *)job)->upload;
    dp_engine_hold(upload->engine);
    atomic_fetch_add(&upload->references, 1);
    atomic_store(&upload->detained, true);
    if (!atomic_exchange(&upload->failed, true)) attn_status_save(&upload->failure, status);
    part_arrives(upload);
}

static void upload_reclaim(dp_job *job) {
    dp_upload *upload = ((upload_part *)job)->upload;
    dp_engine *engine = upload->engine;
    unreference(upload);
    dp_engine_let_go(engine);
}

const dp_job_kind dp_upload_job_kind = {
    .run = upload_run,
    .finish = upload_finish,
    .drop = upload_drop,
    .abandon = upload_abandon,
    .reclaim = upload_reclaim,
};

/* ------------------------------------------------------------------------------------------- */
/* Chunks */

static attn_status check_chunk(const dp_upload *upload, const dp_upload_chunk *chunk) {
    const dp_engine *engine = upload->engine;
    ATTN_TRY(check_state(upload));
    if (chunk->layer >= engine->config.geometry.layers) {
        return attn_error(ATTN_INVALID_ARGUMENT, "layer: %u; the geometry has %u", chunk->layer,
                          engine->config.geometry.layers);
    }
    uint64_t there = upload->layer_tokens[chunk->layer];
    if (chunk->token_offset != there) {
        return attn_error(ATTN_INVALID_ARGUMENT, "token_offset: %" PRIu64 "; layer %u goes on at %" PRIu64,
                          chunk->token_offset, chunk->layer, there);
    }
    if (chunk->tokens == 0) return attn_error(ATTN_INVALID_ARGUMENT, "tokens: 0; a chunk brings 1 or more");
    if (chunk->tokens > upload->tokens - there) {
        return attn_error(ATTN_INVALID_ARGUMENT, "tokens: %u at offset %" PRIu64 "; the upload announced %" PRIu64,
                          chunk->tokens, there, upload->tokens);
    }
    ATTN_TRY(dp_tensor_check(&chunk->keys, "k", chunk->tokens * engine->key_row_bytes));
    return dp_tensor_check(&chunk->values, "v", chunk->tokens * engine->value_row_bytes);
}

attn_status dp_upload_write(dp_upload *upload, dp_upload_chunk *chunk) {
    ATTN_TRY(check_chunk(upload, chunk));
    return dp_upload_write_anywhere(upload, chunk);
}

attn_status dp_upload_write_anywhere(dp_upload *upload, dp_upload_chunk *chunk) {
    const dp_engine_rank *ranks = upload->engine->ranks;
    uint32_t stripes[DP_MAX_RANKS];
    uint32_t count = dp_parts_holding(upload->first + chunk->token_offset, chunk->tokens, upload->stripes, stripes);
    for (uint32_t s = 0; s < count; s++) {
        attn_status status =
            dp_rank_reserve(ranks[upload->parts[stripes[s]].rank].rank, upload->parts[stripes[s]].job.epoch);
        if (!attn_failed(status)) continue;
        while (s-- > 0)
            dp_rank_unreserve(ranks[upload->parts[stripes[s]].rank].rank);
        return status;
    }
    upload->chunk = chunk;
    upload->input = *chunk;
    atomic_fetch_add(&upload->references, 1);
    dp_gather_init(&upload->gather, count);
    atomic_store(&upload->state, DP_STEP_RUNNING);
    for (uint32_t s = 0; s < count; s++) {
        upload_part *part = &upload->parts[stripes[s]];
        dp_rank_submit(ranks[part->rank].rank, &part->job);
    }
    return attn_ok();
}
