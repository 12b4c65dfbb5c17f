/*
 * Steps: begun under the engine's lock, run layer by layer without it, committed or aborted under it.
 *
 * A step is kept for use again when it is done with; its tables grow to what the largest step needed.
 * Its memory is held by reference: the open step has one, each layer in flight has one.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dp/state.h"
#include "dp/tensors.h"

#define NO_SLOT UINT32_MAX

/* ------------------------------------------------------------------------------------------- */
/* The table of steps: with the engine's lock held */

attn_status dp_steps_init(dp_steps *steps) {
    *steps = (dp_steps){.first_free = NO_SLOT};
    return dp_handle_key_random(&steps->key);
}

static void step_free(dp_step *step) {
    if (step == NULL) return;
    dp_partition_fini(&step->partition);
    free(step->sequences);
    free(step->handles);
    free(step->query_lengths);
    free(step->parts);
    free(step->timing);
    free(step);
}

void dp_steps_fini(dp_steps *steps) {
    for (uint32_t i = 0; i < steps->count; i++)
        step_free(steps->slots[i]);
    free(steps->slots);
    *steps = (dp_steps){.first_free = NO_SLOT};
}

static attn_status steps_reserve(dp_steps *steps) {
    if (steps->count < steps->capacity) return attn_ok();
    uint32_t capacity = steps->capacity == 0 ? 16 : steps->capacity * 2;
    dp_step **slots = realloc(steps->slots, capacity * sizeof *slots);
    if (slots == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a table of %u steps", capacity);
    steps->slots = slots;
    steps->capacity = capacity;
    return attn_ok();
}

/* NULL: there is no memory for one, as *status says. */
static dp_step *steps_add(dp_engine *engine, attn_status *status) {
    dp_steps *steps = &engine->steps;
    *status = steps_reserve(steps);
    if (attn_failed(*status)) return NULL;
    dp_step *added = calloc(1, sizeof *added);
    if (added != NULL) {
        added->parts = calloc(engine->config.ranks, sizeof *added->parts);
        added->timing = calloc(engine->config.ranks, sizeof *added->timing);
    }
    if (added == NULL || added->parts == NULL || added->timing == NULL) {
        step_free(added);
        *status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a step");
        return NULL;
    }
    added->engine = engine;
    added->slot = steps->count;
    steps->slots[steps->count++] = added;
    return added;
}

/* A free step; or NULL, as steps_add. */
static dp_step *steps_acquire(dp_engine *engine, attn_status *status) {
    dp_steps *steps = &engine->steps;
    if (steps->first_free == NO_SLOT) return steps_add(engine, status);
    dp_step *step = steps->slots[steps->first_free];
    steps->first_free = step->next_free;
    return step;
}

static void steps_return(dp_steps *steps, dp_step *step) {
    step->next_free = steps->first_free;
    steps->first_free = step->slot;
}

static void release_buffers(dp_step *step) {
    dp_result_release(step->result);
    dp_result_release(step->partials);
    step->result = NULL;
    step->partials = NULL;
}

/* Without the lock: the caller's memory may go with the step. */
static void unreference(dp_step *step) {
    dp_engine *engine = step->engine;
    if (atomic_fetch_sub_explicit(&step->references, 1, memory_order_acq_rel) != 1) return;
    release_buffers(step);
    dp_keep_release(&step->keep);
    pthread_mutex_lock(&engine->lock);
    steps_return(&engine->steps, step);
    pthread_mutex_unlock(&engine->lock);
}

static void step_register(dp_step *step) {
    dp_steps *steps = &step->engine->steps;
    do {
        step->generation++;
        step->id = dp_handle_seal(&steps->key, step->slot, step->generation);
    } while (step->id == 0);
    step->registered = true;
    step->owned = true;
    steps->open++;
}

static dp_step *steps_find(dp_steps *steps, uint32_t tenant, uint64_t id) {
    uint32_t slot, generation;
    dp_handle_unseal(&steps->key, id, &slot, &generation);
    if (slot >= steps->count) return NULL;
    dp_step *step = steps->slots[slot];
    bool found = step->registered && step->generation == generation && step->tenant == tenant;
    return found ? step : NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Begin */

static attn_status check_request(const dp_engine *engine, const dp_step_request *request, uint32_t *tokens) {
    if (request->tenant >= engine->config.tenants) return attn_error(ATTN_INTERNAL, "tenant %u", request->tenant);
    if (request->count == 0) return attn_error(ATTN_INVALID_ARGUMENT, "sequences: empty");
    if (request->count > engine->config.max_batch) {
        return attn_error(ATTN_INVALID_ARGUMENT, "sequences: %u; a step has %u at most", request->count,
                          engine->config.max_batch);
    }
    *tokens = request->count;
    if (request->query_lengths == NULL) return attn_ok();
    *tokens = 0;
    for (uint32_t i = 0; i < request->count; i++) {
        uint32_t length = request->query_lengths[i];
        if (length < 1 || length > ATTN_MAX_QUERY_LENGTH) {
            return attn_error(ATTN_INVALID_ARGUMENT, "query_lengths[%u]: %u; must be 1 .. %d", i, length,
                              ATTN_MAX_QUERY_LENGTH);
        }
        *tokens += length;
    }
    return attn_ok();
}

static attn_status reserve_lists(dp_step *step, uint32_t count) {
    if (count <= step->capacity) return attn_ok();
    free(step->sequences);
    free(step->handles);
    free(step->query_lengths);
    step->capacity = 0;
    step->sequences = malloc(count * sizeof *step->sequences);
    step->handles = malloc(count * sizeof *step->handles);
    step->query_lengths = malloc(count * sizeof *step->query_lengths);
    if (step->sequences == NULL || step->handles == NULL || step->query_lengths == NULL) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a step of %u sequences", count);
    }
    step->capacity = count;
    return attn_ok();
}

static attn_status step_describe(dp_step *step, const dp_step_request *request, uint32_t tokens) {
    ATTN_TRY(reserve_lists(step, request->count));
    step->tenant = request->tenant;
    step->read_only = request->read_only;
    step->count = request->count;
    step->tokens = tokens;
    step->next_layer = 0;
    memcpy(step->handles, request->sequences, request->count * sizeof *step->handles);
    for (uint32_t i = 0; i < request->count; i++) {
        step->query_lengths[i] = request->query_lengths == NULL ? 1 : request->query_lengths[i];
    }
    return attn_ok();
}

static attn_status check_sequence(const dp_sequences *table, const dp_step *step, uint32_t i) {
    const dp_sequence *sequence = step->sequences[i];
    uint32_t rank;
    if (dp_sequence_lost(table, sequence, &rank)) {
        return attn_error(ATTN_UNAVAILABLE,
                          "sequences[%u]: rank %u, which held it, was lost: close it, open another and append its "
                          "tokens again",
                          i, rank);
    }
    if (step->read_only) return attn_ok();
    if (sequence->busy) {
        return attn_error(ATTN_ABORTED, "sequences[%u]: %s right now", i, dp_sequence_busy_with(sequence));
    }
    if (sequence->length + step->query_lengths[i] > table->max_length) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED,
                          "sequences[%u]: %" PRIu64 " tokens and %u new ones; a sequence holds %" PRIu64 " at most", i,
                          sequence->length, step->query_lengths[i], table->max_length);
    }
    return attn_ok();
}

/* Whether the step could begin once a sequence is there where it is on its way to. */
static bool waits_for_move(const dp_step *step, const dp_step_request *request, uint32_t i) {
    return request->wait != NULL && !step->read_only && step->sequences[i]->moving;
}

/* Takes the pages for the new rows of all sequences, or of none. */
static attn_status grow_sequences(dp_sequences *table, dp_step *step) {
    uint64_t needs[DP_MAX_RANKS] = {0};
    uint64_t quota = 0;
    for (uint32_t i = 0; i < step->count; i++) {
        dp_sequence_needs(table, step->sequences[i], step->query_lengths[i], needs, &quota);
    }
    ATTN_TRY(dp_sequences_afford(table, step->tenant, needs, quota));
    for (uint32_t i = 0; i < step->count; i++) {
        ATTN_TRY(dp_sequence_reserve(table, step->sequences[i], step->query_lengths[i]));
    }
    for (uint32_t i = 0; i < step->count; i++) {
        dp_sequence_grow(table, step->sequences[i], step->query_lengths[i]);
    }
    return attn_ok();
}

static attn_status make_partition(dp_step *step) {
    dp_partition_request request = {
        .table = &step->engine->sequences,
        .sequences = step->sequences,
        .query_lengths = step->query_lengths,
        .count = step->count,
        .read_only = step->read_only,
    };
    return dp_partition_make(&step->partition, &request);
}

/* A step that reads holds its pages like a sequence does: what it reads stays, whatever becomes of the sequences. */
static void for_pages_read(dp_step *step, void (*change)(dp_pages *, uint32_t)) {
    for (uint32_t b = 0; b < step->partition.batch_count; b++) {
        const dp_batch *batch = &step->partition.batches[b];
        dp_pages *pool = &step->engine->sequences.pools[batch->rank];
        if (pool->epoch != batch->epoch) continue; /* the pages are gone with their rank */
        for (uint32_t p = 0; p < batch->page_offsets[batch->size]; p++)
            change(pool, batch->pages[p]);
    }
}

static attn_status begin_locked(dp_step *step, const dp_step_request *request, uint32_t tokens, bool *waits) {
    dp_sequences *table = &step->engine->sequences;
    ATTN_TRY(step_describe(step, request, tokens));
    ATTN_TRY(dp_sequences_find_all(table, request->tenant, request->sequences, request->count, step->sequences));
    dp_engine_note_ranks(step->engine);
    for (uint32_t i = 0; i < step->count; i++) {
        attn_status status = check_sequence(table, step, i);
        *waits = status.code == ATTN_ABORTED && waits_for_move(step, request, i);
        if (*waits) dp_wait_begin(step->engine, request->wait);
        if (attn_failed(status)) return status;
    }
    if (!step->read_only) {
        ATTN_TRY(grow_sequences(table, step));
    } else {
        ATTN_TRY(make_partition(step));
        for_pages_read(step, dp_pages_share);
        int64_t now = attn_now_ns();
        for (uint32_t i = 0; i < step->count; i++)
            step->sequences[i]->used_ns = now;
    }
    atomic_store(&step->state, DP_STEP_RUNNING); /* not open, hence not reaped, before it is complete */
    atomic_store(&step->references, 1);
    atomic_store(&step->detained, false);
    atomic_store(&step->used_ns, attn_now_ns());
    step_register(step);
    return attn_ok();
}

static bool is_small(const dp_engine *engine, const dp_partition *partition) {
    if (partition->batch_count > 1) return false;
    const dp_batch *batch = &partition->batches[0];
    uint64_t bytes = batch->tokens * (engine->key_row_bytes + engine->value_row_bytes) +
                     batch->rows * (uint64_t)(engine->query_row_bytes + engine->out_row_bytes);
    return bytes <= engine->small_bytes;
}

static bool is_alone(const dp_engine *engine, const dp_batch *batch) {
    return batch->tokens * (uint64_t)(engine->key_row_bytes + engine->value_row_bytes) >= engine->alone_bytes;
}

static void make_parts(dp_step *step) {
    for (uint32_t b = 0; b < step->partition.batch_count; b++) {
        dp_layer_part *part = &step->parts[b];
        part->step = step;
        part->batch = &step->partition.batches[b];
        part->alone = is_alone(step->engine, part->batch);
        part->job.kind = &dp_layer_job_kind;
        part->job.weight = part->batch->size;
        part->job.epoch = part->batch->epoch;
        part->job.small = is_small(step->engine, &step->partition);
    }
}

attn_status dp_step_begin(dp_engine *engine, const dp_step_request *request, dp_step **step) {
    uint32_t tokens = 0;
    ATTN_TRY(check_request(engine, request, &tokens));
    attn_status status = attn_ok();
    bool waits = false;
    *step = NULL;
    pthread_mutex_lock(&engine->lock);
    dp_step *begun = steps_acquire(engine, &status);
    if (begun != NULL) {
        status = begin_locked(begun, request, tokens, &waits);
        if (attn_failed(status)) steps_return(&engine->steps, begun);
    }
    pthread_mutex_unlock(&engine->lock);
    if (waits) return attn_ok();
    if (begun == NULL || attn_failed(status)) return status;
    /* Page tables may be long: those of sequences that are now busy with this step are copied without the lock. */
    if (!request->read_only) status = make_partition(begun);
    if (!attn_failed(status)) make_parts(begun);
    atomic_store(&begun->state, DP_STEP_OPEN);
    if (attn_failed(status)) {
        dp_step_end(begun);
        return status;
    }
    *step = begun;
    return attn_ok();
}

uint64_t dp_step_id(const dp_step *step) { return step->id; }

uint32_t dp_step_tokens(const dp_step *step) { return step->tokens; }

uint32_t dp_step_next_layer(const dp_step *step) { return step->next_layer; }

attn_status dp_step_matches(const dp_step *step, const uint64_t *sequences, const uint32_t *query_lengths,
                            uint32_t count) {
    if (count != step->count) {
        return attn_error(ATTN_INVALID_ARGUMENT, "sequences: %u; the step has %u", count, step->count);
    }
    for (uint32_t i = 0; i < count; i++) {
        if (sequences[i] != step->handles[i]) {
            return attn_error(ATTN_INVALID_ARGUMENT, "sequences[%u]: not the one that the step began with", i);
        }
        uint32_t length = query_lengths == NULL ? 1 : query_lengths[i];
        if (length != step->query_lengths[i]) {
            return attn_error(ATTN_INVALID_ARGUMENT, "query_lengths[%u]: %u; the step began with %u", i, length,
                              step->query_lengths[i]);
        }
    }
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* The end of a step */

/* Commits or gives back what a step holds. Called once, by whoever moved it to its final state; with the lock held. */
static void settle_locked(dp_step *step, bool commit) {
    dp_engine *engine = step->engine;
    int64_t now = attn_now_ns();
    engine->steps.open--;
    if (step->read_only) {
        for_pages_read(step, dp_pages_drop);
        return;
    }
    for (uint32_t i = 0; i < step->count; i++) {
        if (commit)
            dp_sequence_commit(&engine->sequences, step->sequences[i], now);
        else
            dp_sequence_cancel(&engine->sequences, step->sequences[i], now);
    }
    if (commit)
        engine->steps.committed++;
    else
        engine->steps.aborted++;
}

static void settle(dp_step *step, bool commit) {
    pthread_mutex_lock(&step->engine->lock);
    settle_locked(step, commit);
    pthread_mutex_unlock(&step->engine->lock);
    dp_moves_resume(step->engine);
}

static bool move_state(dp_step *step, dp_step_state from, dp_step_state to) {
    int expected = from;
    return atomic_compare_exchange_strong(&step->state, &expected, to);
}

void dp_step_end(dp_step *step) {
    dp_engine *engine = step->engine;
    bool settles = move_state(step, DP_STEP_OPEN, DP_STEP_ABORTED);
    if (!settles && !move_state(step, DP_STEP_RUNNING, DP_STEP_RUNNING_ENDED)) {
        /* The layer in flight may have come back between the two looks. */
        settles = move_state(step, DP_STEP_OPEN, DP_STEP_ABORTED);
    }
    pthread_mutex_lock(&engine->lock);
    if (settles) settle_locked(step, false);
    step->registered = false;
    pthread_mutex_unlock(&engine->lock);
    unreference(step);
    if (settles) dp_moves_resume(engine);
}

void dp_step_keep(dp_step *step, dp_keep keep) { step->keep = keep; }

attn_status dp_step_take(dp_engine *engine, uint32_t tenant, uint64_t id, dp_step **step) {
    attn_status status = attn_ok();
    pthread_mutex_lock(&engine->lock);
    dp_step *found = steps_find(&engine->steps, tenant, id);
    if (found == NULL)
        status = attn_error(ATTN_NOT_FOUND, "step: unknown, ended or not yours");
    else if (found->owned)
        status = attn_error(ATTN_ABORTED, "step: another call of it is in progress");
    if (!attn_failed(status)) {
        found->owned = true;
        atomic_store_explicit(&found->used_ns, attn_now_ns(), memory_order_relaxed);
        *step = found;
    }
    pthread_mutex_unlock(&engine->lock);
    return status;
}

void dp_step_put(dp_step *step) {
    dp_engine *engine = step->engine;
    pthread_mutex_lock(&engine->lock);
    bool open = atomic_load(&step->state) == DP_STEP_OPEN;
    if (open) {
        atomic_store_explicit(&step->used_ns, attn_now_ns(), memory_order_relaxed);
        step->owned = false;
    }
    pthread_mutex_unlock(&engine->lock);
    if (!open) dp_step_end(step);
}

/* An open step that nobody owns has no layer in flight, and was never detained: the reference is its only one. */
static void unreference_unowned_locked(dp_step *step) {
    if (atomic_fetch_sub_explicit(&step->references, 1, memory_order_acq_rel) != 1) return;
    steps_return(&step->engine->steps, step);
}

void dp_steps_reap(dp_engine *engine, int64_t before) {
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = 0; i < engine->steps.count; i++) {
        dp_step *step = engine->steps.slots[i];
        if (!step->registered || atomic_load_explicit(&step->used_ns, memory_order_relaxed) >= before) continue;
        if (!move_state(step, DP_STEP_OPEN, DP_STEP_ABORTED)) continue;
        settle_locked(step, false);
        if (step->owned) continue; /* the owner finds it aborted, and ends it */
        step->registered = false;
        unreference_unowned_locked(step);
    }
    pthread_mutex_unlock(&engine->lock);
}

/* ------------------------------------------------------------------------------------------- */
/* Layers */

static attn_status check_state(const dp_step *step) {
    switch ((dp_step_state)atomic_load(&step->state)) {
    case DP_STEP_OPEN: return attn_ok();
    case DP_STEP_RUNNING:
    case DP_STEP_RUNNING_ENDED: return attn_error(ATTN_ABORTED, "step: a layer of it is in progress");
    case DP_STEP_COMMITTED: return attn_error(ATTN_INVALID_ARGUMENT, "layer: the step has had its last one");
    case DP_STEP_ABORTED: return attn_error(ATTN_ABORTED, "step: aborted, by an earlier failure or for being idle");
    }
    return attn_error(ATTN_INTERNAL, "step: in no known state");
}

static attn_status check_layer_index(const dp_step *step, uint32_t layer) {
    if (step->read_only) {
        uint32_t layers = step->engine->config.geometry.layers;
        if (layer < layers) return attn_ok();
        return attn_error(ATTN_INVALID_ARGUMENT, "layer: %u; the geometry has %u", layer, layers);
    }
    if (layer == step->next_layer) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "layer: %u; the step's next one is %u", layer, step->next_layer);
}

static attn_status check_options(const dp_engine *engine, const dp_options *options) {
    if (!isfinite(options->scale) || options->scale < 0) {
        return attn_error(ATTN_INVALID_ARGUMENT, "options.softmax_scale: %g; must be finite and not negative",
                          (double)options->scale);
    }
    if (!isfinite(options->softcap) || options->softcap < 0) {
        return attn_error(ATTN_INVALID_ARGUMENT, "options.softcap: %g; must be finite and not negative",
                          (double)options->softcap);
    }
    if (options->sink_count != 0 && options->sink_count != engine->config.geometry.heads_q) {
        return attn_error(ATTN_INVALID_ARGUMENT, "options.sinks: %u; must be one for each of the %u query heads",
                          options->sink_count, engine->config.geometry.heads_q);
    }
    for (uint32_t i = 0; i < options->sink_count; i++) {
        if (!isfinite(options->sinks[i])) {
            return attn_error(ATTN_INVALID_ARGUMENT, "options.sinks[%u]: %g; must be finite", i,
                              (double)options->sinks[i]);
        }
    }
    return attn_ok();
}

static attn_status check_layer(const dp_step *step, const dp_layer_call *call) {
    const dp_engine *engine = step->engine;
    size_t rows = step->tokens;
    size_t new_rows = step->read_only ? 0 : rows;
    ATTN_TRY(check_state(step));
    ATTN_TRY(check_layer_index(step, call->layer));
    ATTN_TRY(check_options(engine, &call->options));
    ATTN_TRY(dp_tensor_check(&call->queries, "q", rows * engine->query_row_bytes));
    ATTN_TRY(dp_tensor_check(&call->new_keys, "k", new_rows * engine->key_row_bytes));
    return dp_tensor_check(&call->new_values, "v", new_rows * engine->value_row_bytes);
}

/* Reserves a place in the queue of every rank that has work, or of none. */
static attn_status reserve_ranks(const dp_step *step) {
    const dp_engine_rank *ranks = step->engine->ranks;
    for (uint32_t b = 0; b < step->partition.batch_count; b++) {
        attn_status status = dp_rank_reserve(ranks[step->parts[b].batch->rank].rank, step->parts[b].job.epoch);
        if (!attn_failed(status)) continue;
        while (b-- > 0)
            dp_rank_unreserve(ranks[step->parts[b].batch->rank].rank);
        return status;
    }
    return attn_ok();
}

static attn_status take_buffers(dp_step *step, const dp_options *options) {
    dp_engine *engine = step->engine;
    const attn_geometry *geometry = &engine->config.geometry;
    size_t lse_size = options->return_lse ? (size_t)step->tokens * geometry->heads_q * sizeof(float) : 0;
    size_t partial_size = dp_gather_bytes(&step->partition, geometry, options->batch_invariant);
    step->result = dp_results_take(engine->results, step->tokens * engine->out_row_bytes, lse_size);
    step->partials = partial_size > 0 ? dp_results_take(engine->results, partial_size, 0) : NULL;
    if (step->result == NULL || (partial_size > 0 && step->partials == NULL)) {
        release_buffers(step);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the outputs of %u rows", step->tokens);
    }
    if (step->partials != NULL) {
        dp_gather_place(&step->partition, geometry, options->batch_invariant, step->partials->out);
    }
    return attn_ok();
}

static void start_layer(dp_step *step, dp_layer_call *call) {
    const attn_geometry *geometry = &step->engine->config.geometry;
    uint32_t count = step->partition.batch_count;
    step->call = call;
    step->scale = call->options.scale > 0 ? call->options.scale : 1.0f / sqrtf((float)geometry->head_dim);
    step->admitted_ns = attn_now_ns();
    call->result = NULL;
    call->detained = false;
    call->committed = false;
    call->timing_count = 0;
    call->timing = step->timing;
    step->input = *call;
    atomic_store_explicit(&step->failed, false, memory_order_relaxed);
    atomic_store_explicit(&step->used_ns, step->admitted_ns, memory_order_relaxed);
    atomic_fetch_add(&step->references, 1);
    dp_gather_init(&step->gather, count);
    for (uint32_t b = 0; b < count; b++)
        step->parts[b].failed = false;
    /* The layer cannot complete before the last part is handed over, nor the step be touched after that. */
    const dp_engine_rank *ranks = step->engine->ranks;
    for (uint32_t b = 0; b < count; b++)
        dp_rank_submit(ranks[step->parts[b].batch->rank].rank, &step->parts[b].job);
}

attn_status dp_step_layer(dp_step *step, dp_layer_call *call) {
    ATTN_TRY(check_layer(step, call));
    ATTN_TRY(reserve_ranks(step));
    attn_status status = take_buffers(step, &call->options);
    atomic_store(&step->cancelled, false);
    if (!attn_failed(status) && !move_state(step, DP_STEP_OPEN, DP_STEP_RUNNING)) {
        status = check_state(step); /* it was idle for too long, just now */
        release_buffers(step);
    }
    if (attn_failed(status)) {
        for (uint32_t b = 0; b < step->partition.batch_count; b++) {
            dp_rank_unreserve(step->engine->ranks[step->parts[b].batch->rank].rank);
        }
        return status;
    }
    start_layer(step, call);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Completion */

static void merge_spread_sequences(dp_step *step) {
    if (step->partials == NULL) return;
    int64_t start = attn_now_ns();
    const dp_options *options = &step->input.options;
    dp_gather_merge_request request = {
        .geometry = &step->engine->config.geometry,
        .batch_invariant = options->batch_invariant,
        .sinks = options->sink_count > 0 ? options->sinks : NULL,
        .memory = step->partials->out,
        .out = step->result->out,
        .lse = step->result->lse,
    };
    dp_gather_merge(&step->partition, &request);
    step->timing[0].combine_us += (float)(attn_now_ns() - start) / 1000.0f;
}

static attn_status layer_aborts(dp_step *step, attn_status status) {
    atomic_store(&step->state, DP_STEP_ABORTED);
    settle(step, false);
    return status;
}

/* Moves the step on after a layer that went well; fails if it has been ended meanwhile. */
static attn_status layer_advances(dp_step *step, bool *committed) {
    bool last = !step->read_only && step->next_layer + 1 == step->engine->config.geometry.layers;
    if (!step->read_only) step->next_layer++;
    atomic_store_explicit(&step->used_ns, attn_now_ns(), memory_order_relaxed);
    if (!move_state(step, DP_STEP_RUNNING, last ? DP_STEP_COMMITTED : DP_STEP_OPEN)) {
        return layer_aborts(step, attn_error(ATTN_CANCELLED, "the step was ended before its layer was done"));
    }
    if (last) settle(step, true);
    *committed = last;
    return attn_ok();
}

/* What the layer's ranks wrote to goes back to the pool, or stays the step's while a lost rank may still write to it.
 */
static dp_result *take_result(dp_step *step) {
    if (atomic_load(&step->detained)) return NULL;
    dp_result *result = step->result;
    step->result = NULL;
    release_buffers(step);
    return result;
}

static void layer_complete(dp_step *step) {
    dp_layer_call *call = step->call;
    bool failed = atomic_load(&step->failed);
    if (!failed) merge_spread_sequences(step);
    call->detained = atomic_load(&step->detained);
    dp_result *result = take_result(step);
    uint32_t ranks = step->partition.batch_count;
    bool committed = false;
    attn_status status =
        failed ? layer_aborts(step, attn_status_view(&step->failure)) : layer_advances(step, &committed);
    if (attn_failed(status)) {
        dp_result_release(result);
    } else {
        call->result = result;
        call->committed = committed;
        call->timing_count = ranks;
    }
    call->done(call, status);
    unreference(step);
}

static void part_arrives(dp_step *step) {
    if (dp_gather_arrive(&step->gather)) layer_complete(step);
}

void dp_layer_part_finish(dp_layer_part *part) {
    dp_step *step = part->step;
    if (part->failed && !atomic_exchange(&step->failed, true)) step->failure = part->failure;
    part_arrives(step);
}

void dp_layer_part_abandon(dp_layer_part *part, attn_status status) {
    dp_step *step = part->step;
    dp_engine_hold(step->engine);
    atomic_fetch_add(&step->references, 1);
    atomic_store(&step->detained, true);
    if (!atomic_exchange(&step->failed, true)) attn_status_save(&step->failure, status);
    part_arrives(step);
}

void dp_layer_part_reclaim(dp_layer_part *part) {
    dp_engine *engine = part->step->engine;
    unreference(part->step);
    dp_engine_let_go(engine);
}

static bool reference_if_alive(dp_step *step) {
    unsigned references = atomic_load(&step->references);
    while (references > 0) {
        if (atomic_compare_exchange_weak(&step->references, &references, references + 1)) return true;
    }
    return false;
}

void dp_layer_cancel(dp_step *step) {
    if (!reference_if_alive(step)) return;
    int state = atomic_load(&step->state);
    if (state == DP_STEP_RUNNING || state == DP_STEP_RUNNING_ENDED) {
        atomic_store(&step->cancelled, true);
        for (uint32_t b = 0; b < step->partition.batch_count; b++) {
            dp_layer_part *part = &step->parts[b];
            if (!dp_rank_withdraw(step->engine->ranks[part->batch->rank].rank, &part->job)) continue;
            dp_layer_part_fail(part, attn_error(ATTN_CANCELLED, "the call was cancelled"));
            dp_layer_part_finish(part);
        }
    }
    unreference(step);
}
