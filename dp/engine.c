/* The engine: its life, its ranks, and what is done to sequences outside of steps. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dp/state.h"

/*
 * What a GPU reads in about 15 us. Calls that read less share a launch, which would take them several times its 5 us
 * one by one; of calls that read more one is got ready while another is run.
 */
#define ALONE_BYTES ((uint64_t)64 << 20)

/* ------------------------------------------------------------------------------------------- */
/* Life */

static attn_status check_config(const dp_config *config) {
    ATTN_TRY(attn_geometry_check(&config->geometry));
    if (config->backend == NULL) return attn_error(ATTN_INVALID_ARGUMENT, "backend: missing");
    if (config->ranks < 1 || config->ranks > DP_MAX_RANKS) {
        return attn_error(ATTN_INVALID_ARGUMENT, "ranks: %u; must be 1 .. %d", config->ranks, DP_MAX_RANKS);
    }
    if (config->pages_per_rank < 1) return attn_error(ATTN_INVALID_ARGUMENT, "pages_per_rank: must be 1 or more");
    if (config->max_sequences < 1 || config->max_sequences == UINT32_MAX) {
        return attn_error(ATTN_INVALID_ARGUMENT, "max_sequences: %u; must be 1 .. %u", config->max_sequences,
                          UINT32_MAX - 1);
    }
    if (config->max_batch < 1) return attn_error(ATTN_INVALID_ARGUMENT, "max_batch: must be 1 or more");
    if (config->max_queue < 1) return attn_error(ATTN_INVALID_ARGUMENT, "max_queue: must be 1 or more");
    if (config->max_sequence_tokens < 1 || config->max_sequence_tokens > UINT32_MAX) {
        return attn_error(ATTN_INVALID_ARGUMENT, "max_sequence_tokens: %" PRIu64 "; must be 1 .. %u",
                          config->max_sequence_tokens, UINT32_MAX);
    }
    if (config->tenants < 1) return attn_error(ATTN_INVALID_ARGUMENT, "tenants: must be 1 or more");
    if (config->step_idle_ns < 0) return attn_error(ATTN_INVALID_ARGUMENT, "step_idle_ns: must not be negative");
    if (config->sequence_idle_ns < 0) {
        return attn_error(ATTN_INVALID_ARGUMENT, "sequence_idle_ns: must not be negative");
    }
    if (config->rebalance_factor != 0 && !(config->rebalance_factor > 1)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "rebalance_factor: %g; must be 0 or above 1",
                          config->rebalance_factor);
    }
    if (config->rank_stall_ns < 0) return attn_error(ATTN_INVALID_ARGUMENT, "rank_stall_ns: must not be negative");
    if (config->rank_restart_ns < 0) return attn_error(ATTN_INVALID_ARGUMENT, "rank_restart_ns: must not be negative");
    return attn_ok();
}

static void copy_config(dp_engine *engine, const dp_config *config) {
    const attn_geometry *geometry = &config->geometry;
    engine->config = *config;
    snprintf(engine->backend, sizeof engine->backend, "%s", config->backend);
    engine->config.backend = engine->backend;
    if (config->isa != NULL) {
        snprintf(engine->isa, sizeof engine->isa, "%s", config->isa);
        engine->config.isa = engine->isa;
    }
    engine->config.tenant_max_pages = NULL;
    engine->config.tenant_max_sequences = NULL;
    engine->query_row_bytes = attn_query_row_bytes(geometry);
    engine->key_row_bytes = attn_key_row_bytes(geometry);
    engine->value_row_bytes = attn_value_row_bytes(geometry);
    engine->out_row_bytes = attn_out_row_bytes(geometry);
}

static attn_status start_rank(dp_engine *engine, uint32_t index) {
    const dp_config *config = &engine->config;
    uint32_t workers = config->workers_per_rank == 0 ? 1 : config->workers_per_rank;
    int *cpus = NULL;
    if (config->pin_cpus) {
        cpus = malloc(workers * sizeof *cpus);
        if (cpus == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for rank %u", index);
        for (uint32_t w = 0; w < workers; w++)
            cpus[w] = (int)(index * workers + w);
    }
    dp_rank_config rank = {
        .backend =
            {
                .kind = config->backend,
                .geometry = config->geometry,
                .pages = config->pages_per_rank,
                .workers = workers,
                .isa = config->isa,
                .device = index,
                .cpus = cpus,
                .isolated = config->isolated,
                .k_scales = config->k_scales,
                .v_scales = config->v_scales,
            },
        .index = index,
        .max_queue = config->max_queue,
        .max_weight = config->max_batch,
    };
    attn_status status = dp_rank_create(&rank, &engine->ranks[index].rank);
    free(cpus);
    return status;
}

static attn_status await_rank(dp_engine *engine, uint32_t index) {
    ATTN_TRY(dp_rank_await(engine->ranks[index].rank));
    engine->ranks[index].device = strdup(dp_rank_device(engine->ranks[index].rank));
    if (engine->ranks[index].device == NULL) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for rank %u", index);
    }
    return attn_ok();
}

/* All have come to an end of their start when this returns; the first failure. */
static attn_status start_ranks(dp_engine *engine) {
    attn_saved_status first = {0};
    uint32_t started = 0;
    while (started < engine->config.ranks && first.code == ATTN_OK) {
        attn_status_save(&first, start_rank(engine, started));
        if (first.code == ATTN_OK) started++;
    }
    for (uint32_t r = 0; r < started; r++) {
        attn_status status = await_rank(engine, r);
        if (first.code == ATTN_OK) attn_status_save(&first, status);
    }
    return first.code == ATTN_OK ? attn_ok() : attn_error(first.code, "%s", first.message);
}

attn_status dp_engine_create(const dp_config *config, dp_engine **engine) {
    ATTN_TRY(check_config(config));
    dp_engine *created = calloc(1, sizeof *created);
    if (created == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for an engine");
    attn_status status;
    pthread_mutex_init(&created->lock, NULL);
    dp_moves_init(&created->moves);
    atomic_init(&created->references, 1);
    copy_config(created, config);
    created->ranks = calloc(config->ranks, sizeof *created->ranks);
    created->results = dp_results_create();
    if (created->ranks == NULL || created->results == NULL) {
        status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u ranks", config->ranks);
        goto fail;
    }
    ATTN_TRY_GOTO(status, dp_steps_init(&created->steps), fail);
    ATTN_TRY_GOTO(status, dp_sequences_init(&created->sequences, config), fail);
    ATTN_TRY_GOTO(status, start_ranks(created), fail);
    ATTN_TRY_GOTO(status, dp_watchdog_create(created, &created->watchdog), fail);
    created->config.k_scales = NULL; /* the ranks have their own */
    created->config.v_scales = NULL;
    /* A pinned rank works on its own cores, not on the submitter's. */
    if (!config->pin_cpus) created->small_bytes = dp_rank_small_bytes(created->ranks[0].rank);
    created->alone_bytes = dp_rank_overlaps(created->ranks[0].rank) ? ALONE_BYTES : UINT64_MAX;
    *engine = created;
    return attn_ok();
fail:
    dp_engine_destroy(created);
    return status;
}

static void engine_free(dp_engine *engine) {
    for (uint32_t r = 0; engine->ranks != NULL && r < engine->config.ranks; r++)
        free(engine->ranks[r].device);
    free(engine->ranks);
    dp_sequences_fini(&engine->sequences);
    dp_steps_fini(&engine->steps);
    dp_results_close(engine->results);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

void dp_engine_hold(dp_engine *engine) { atomic_fetch_add_explicit(&engine->references, 1, memory_order_relaxed); }

void dp_engine_let_go(dp_engine *engine) {
    if (atomic_fetch_sub_explicit(&engine->references, 1, memory_order_acq_rel) == 1) engine_free(engine);
}

void dp_engine_destroy(dp_engine *engine) {
    if (engine == NULL) return;
    dp_moves_fini(engine); /* a rank that hangs in a move is given up by the watchdog */
    dp_watchdog_destroy(engine->watchdog);
    for (uint32_t r = 0; engine->ranks != NULL && r < engine->config.ranks; r++) {
        if (engine->ranks[r].rank != NULL) dp_rank_stop(engine->ranks[r].rank);
    }
    for (uint32_t r = 0; engine->ranks != NULL && r < engine->config.ranks; r++)
        dp_rank_destroy(engine->ranks[r].rank);
    dp_engine_let_go(engine);
}

void dp_keep_release(dp_keep *keep) {
    dp_keep kept = *keep;
    *keep = (dp_keep){0};
    if (kept.release != NULL) kept.release(kept.context);
}

/* ------------------------------------------------------------------------------------------- */
/* Looking at it */

uint32_t dp_engine_ranks(const dp_engine *engine) { return engine->config.ranks; }

static uint64_t counted(const atomic_uint_fast64_t *counter) {
    return atomic_load_explicit(counter, memory_order_relaxed);
}

static dp_rank_state state_of(const dp_rank_record *record) {
    if (!record->lost) return DP_RANK_SERVING;
    return record->starting ? DP_RANK_RESTARTING : DP_RANK_LOST;
}

void dp_engine_rank_info(dp_engine *engine, uint32_t rank, dp_rank_info *info) {
    dp_engine_rank *of = &engine->ranks[rank];
    dp_rank_record record;
    dp_rank_read_record(of->rank, &record);
    *info = (dp_rank_info){
        .state = state_of(&record),
        .queue_depth = dp_rank_queue_depth(of->rank),
        .calls = counted(&of->counters.calls),
        .launches = counted(&of->counters.launches),
        .plans_rejected = record.plans_rejected,
        .busy_ns = (int64_t)counted(&of->counters.busy_ns),
        .bytes_in_place = counted(&of->counters.bytes_in_place),
        .bytes_gathered = counted(&of->counters.bytes_gathered),
        .prefix_tokens_shared = counted(&of->counters.prefix_tokens_shared),
        .losses = record.losses,
        .stalls = record.stalls,
        .restarts = record.restarts,
        .failed_restarts = record.failed_restarts,
        .process = record.process,
        .device = of->device,
    };
    snprintf(info->last_error, sizeof info->last_error, "%s", record.last_error.message);
    pthread_mutex_lock(&engine->lock);
    info->sequences = engine->sequences.loads[rank].sequences;
    info->tokens = engine->sequences.loads[rank].tokens;
    info->tokens_in_flight = engine->sequences.loads[rank].tokens_in_flight;
    info->pages_total = engine->sequences.pools[rank].total;
    info->pages_free = engine->sequences.pools[rank].free;
    pthread_mutex_unlock(&engine->lock);
}

void dp_engine_count(dp_engine *engine, dp_engine_counts *counts) {
    pthread_mutex_lock(&engine->lock);
    *counts = (dp_engine_counts){
        .sequences = engine->sequences.open,
        .steps = engine->steps.open,
        .steps_committed = engine->steps.committed,
        .steps_aborted = engine->steps.aborted,
        .moves = engine->moves.succeeded,
        .moves_failed = engine->moves.failed,
        .moved_tokens = engine->moves.tokens,
        .moved_bytes = engine->moves.bytes,
        .moves_direct = atomic_load(&engine->moves_direct),
    };
    pthread_mutex_unlock(&engine->lock);
}

void dp_engine_note_ranks(dp_engine *engine) {
    for (uint32_t r = 0; r < engine->config.ranks; r++) {
        engine->sequences.loads[r].lost = dp_rank_lost(engine->ranks[r].rank);
        engine->sequences.loads[r].full = engine->sequences.pools[r].free == 0;
    }
}

static void close_idle_sequences(dp_engine *engine, int64_t before) {
    dp_sequences *table = &engine->sequences;
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = 0; i < table->capacity && table->open > 0; i++) {
        dp_sequence *sequence = &table->slots[i];
        if (sequence->open && !sequence->busy && sequence->used_ns < before) dp_sequences_remove(table, sequence);
    }
    pthread_mutex_unlock(&engine->lock);
}

void dp_engine_reap(dp_engine *engine) {
    int64_t now = attn_now_ns();
    if (engine->config.step_idle_ns > 0) dp_steps_reap(engine, now - engine->config.step_idle_ns);
    if (engine->config.sequence_idle_ns > 0) close_idle_sequences(engine, now - engine->config.sequence_idle_ns);
    dp_moves_resume(engine);
    dp_engine_balance(engine);
}

attn_status dp_engine_restart_rank(dp_engine *engine, uint32_t rank) {
    if (rank >= engine->config.ranks) {
        return attn_error(ATTN_INVALID_ARGUMENT, "rank: %u; this server has ranks 0 .. %u", rank,
                          engine->config.ranks - 1);
    }
    if (!dp_rank_lost(engine->ranks[rank].rank)) {
        return attn_error(ATTN_FAILED_PRECONDITION, "rank: %u serves; only a lost rank is restarted", rank);
    }
    dp_watchdog_restart(engine->watchdog, rank);
    return attn_ok();
}

#ifndef ATTN_RELEASE
void dp_engine_fail_rank(dp_engine *engine, uint32_t rank) {
    dp_rank_fence(engine->ranks[rank].rank, attn_error(ATTN_UNAVAILABLE, "failed for a test"));
}

void dp_engine_stall_rank(dp_engine *engine, uint32_t rank) { dp_rank_stall(engine->ranks[rank].rank); }

void dp_engine_release_rank(dp_engine *engine, uint32_t rank) { dp_rank_release(engine->ranks[rank].rank); }

void dp_engine_break_rank(dp_engine *engine, uint32_t rank) { dp_rank_break(engine->ranks[rank].rank); }
#endif

/* ------------------------------------------------------------------------------------------- */
/* Sequences. The _locked functions run with the engine's lock held. */

static attn_status open_one(dp_engine *engine, uint32_t tenant, dp_placement placement, uint32_t rank,
                            dp_sequence **sequence) {
    uint32_t home;
    ATTN_TRY(dp_placement_choose(engine->sequences.loads, engine->config.ranks, placement, rank, &engine->turn, &home));
    bool spread = placement == DP_SPREAD && engine->config.ranks > 1;
    return dp_sequences_add(&engine->sequences, tenant, home, spread, attn_now_ns(), sequence);
}

static attn_status open_locked(dp_engine *engine, uint32_t tenant, uint32_t count, dp_placement placement,
                               uint32_t rank, uint64_t *handles, uint32_t *ranks) {
    dp_sequences *table = &engine->sequences;
    ATTN_TRY(dp_sequences_room(table, tenant, count));
    dp_engine_note_ranks(engine);
    for (uint32_t i = 0; i < count; i++) {
        dp_sequence *sequence;
        attn_status status = open_one(engine, tenant, placement, rank, &sequence);
        if (attn_failed(status)) {
            while (i-- > 0)
                dp_sequences_remove(table, dp_sequences_find(table, tenant, handles[i]));
            return status;
        }
        handles[i] = dp_sequence_handle(table, sequence);
        ranks[i] = sequence->home;
    }
    return attn_ok();
}

attn_status dp_sequences_open(dp_engine *engine, uint32_t tenant, uint32_t count, dp_placement placement, uint32_t rank,
                              uint64_t *handles, uint32_t *ranks) {
    if (tenant >= engine->config.tenants) return attn_error(ATTN_INTERNAL, "tenant %u", tenant);
    if (count == 0) return attn_error(ATTN_INVALID_ARGUMENT, "count: 0; must be 1 or more");
    pthread_mutex_lock(&engine->lock);
    attn_status status = open_locked(engine, tenant, count, placement, rank, handles, ranks);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

static attn_status find_one(dp_engine *engine, uint32_t tenant, uint64_t handle, dp_sequence **sequence) {
    *sequence = dp_sequences_find(&engine->sequences, tenant, handle);
    if (*sequence == NULL) return attn_error(ATTN_NOT_FOUND, "sequence: unknown, closed or not yours");
    dp_engine_note_ranks(engine);
    return dp_sequence_holds(&engine->sequences, *sequence);
}

static attn_status check_length(const dp_sequence *sequence, uint64_t length) {
    if (length <= sequence->length) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "length: %" PRIu64 "; the sequence has %" PRIu64, length,
                      sequence->length);
}

static attn_status fork_locked(dp_engine *engine, uint32_t tenant, uint64_t parent, uint64_t length, uint64_t *handle,
                               uint32_t *rank) {
    dp_sequence *sequence, *child;
    ATTN_TRY(find_one(engine, tenant, parent, &sequence));
    ATTN_TRY(check_length(sequence, length));
    ATTN_TRY(dp_sequences_room(&engine->sequences, tenant, 1));
    ATTN_TRY(dp_sequences_fork(&engine->sequences, sequence, length, attn_now_ns(), &child));
    *handle = dp_sequence_handle(&engine->sequences, child);
    *rank = child->home;
    return attn_ok();
}

attn_status dp_sequence_fork(dp_engine *engine, uint32_t tenant, uint64_t parent, uint64_t length, uint64_t *handle,
                             uint32_t *rank) {
    pthread_mutex_lock(&engine->lock);
    attn_status status = fork_locked(engine, tenant, parent, length, handle, rank);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

static attn_status truncate_locked(dp_engine *engine, uint32_t tenant, uint64_t handle, uint64_t length) {
    dp_sequence *sequence;
    ATTN_TRY(find_one(engine, tenant, handle, &sequence));
    if (sequence->busy) return attn_error(ATTN_ABORTED, "sequence: %s right now", dp_sequence_busy_with(sequence));
    ATTN_TRY(check_length(sequence, length));
    dp_sequences_cut(&engine->sequences, sequence, length);
    sequence->used_ns = attn_now_ns();
    return attn_ok();
}

attn_status dp_sequence_truncate(dp_engine *engine, uint32_t tenant, uint64_t handle, uint64_t length) {
    pthread_mutex_lock(&engine->lock);
    attn_status status = truncate_locked(engine, tenant, handle, length);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

static attn_status close_locked(dp_engine *engine, uint32_t tenant, const uint64_t *handles, uint32_t count,
                                dp_sequence **sequences) {
    dp_sequences *table = &engine->sequences;
    ATTN_TRY(dp_sequences_find_all(table, tenant, handles, count, sequences));
    for (uint32_t i = 0; i < count; i++) {
        if (!sequences[i]->busy) continue;
        return attn_error(ATTN_ABORTED, "sequences[%u]: %s right now", i, dp_sequence_busy_with(sequences[i]));
    }
    for (uint32_t i = 0; i < count; i++)
        dp_sequences_remove(table, sequences[i]);
    return attn_ok();
}

attn_status dp_sequences_close(dp_engine *engine, uint32_t tenant, const uint64_t *handles, uint32_t count) {
    if (count == 0) return attn_error(ATTN_INVALID_ARGUMENT, "sequences: empty");
    dp_sequence **sequences = malloc(count * sizeof(dp_sequence *));
    if (sequences == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u handles", count);
    pthread_mutex_lock(&engine->lock);
    attn_status status = close_locked(engine, tenant, handles, count, sequences);
    pthread_mutex_unlock(&engine->lock);
    free(sequences);
    return status;
}

static void describe_one(const dp_sequences *table, const dp_sequence *sequence, uint64_t handle,
                         dp_sequence_info *info) {
    *info = (dp_sequence_info){
        .handle = handle,
        .length = sequence->length,
        .rank = sequence->home,
        .spread = sequence->stripes > 1,
        .busy = sequence->busy,
    };
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        const dp_part *part = &sequence->parts[j];
        const dp_pages *pool = &table->pools[dp_sequence_rank(table, sequence, j)];
        info->pages += part->count;
        for (uint32_t p = 0; p < part->count; p++)
            info->shared_pages += dp_pages_shared(pool, part->pages[p]);
    }
}

attn_status dp_sequences_describe(dp_engine *engine, uint32_t tenant, const uint64_t *handles, uint32_t count,
                                  dp_sequence_info *infos) {
    attn_status status = attn_ok();
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = 0; i < count; i++) {
        const dp_sequence *sequence = dp_sequences_find(&engine->sequences, tenant, handles[i]);
        if (sequence == NULL) {
            status = attn_error(ATTN_NOT_FOUND, "sequences[%u]: unknown, closed or not yours", i);
            break;
        }
        describe_one(&engine->sequences, sequence, handles[i], &infos[i]);
    }
    pthread_mutex_unlock(&engine->lock);
    return status;
}
