/*
 * Moves: a sequence that was moved or spread is what it was, and nothing is left behind, whatever comes between.
 *
 * The linker puts this file's attn_backend_export in front of the real one (--wrap), so that a test can hold a move
 * on its way, and make its next chunk fail.
 */
#define _GNU_SOURCE
#include "dp/tests/fixture.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "dp/state.h"

enum { MAX_QUERY_ROWS = 4, OUTS = MAX_QUERY_ROWS * 4 * 40, LSES = MAX_QUERY_ROWS * 4 };

/* ------------------------------------------------------------------------------------------- */
/* The gate in front of the source rank */

static struct {
    pthread_mutex_t lock; /* guards all */
    pthread_cond_t changed;
    bool closed;
    uint32_t held;   /* reads that wait at the gate */
    uint32_t passed; /* reads since it was last closed */
    attn_code fails; /* what reads end with, unless ATTN_OK */
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

attn_status __real_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values);
attn_status __wrap_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values);

attn_status __wrap_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values) {
    pthread_mutex_lock(&gate.lock);
    gate.held++;
    pthread_cond_broadcast(&gate.changed);
    while (gate.closed)
        pthread_cond_wait(&gate.changed, &gate.lock);
    gate.held--;
    gate.passed++;
    attn_code fails = gate.fails;
    pthread_mutex_unlock(&gate.lock);
    if (fails != ATTN_OK) return attn_error(fails, "the device is on fire");
    return __real_attn_backend_export(backend, layer, pages, page_count, position, tokens, keys, values);
}

static void close_gate(void) {
    pthread_mutex_lock(&gate.lock);
    gate.closed = true;
    gate.passed = 0;
    gate.fails = ATTN_OK;
    pthread_mutex_unlock(&gate.lock);
}

static void open_gate(attn_code fails) {
    pthread_mutex_lock(&gate.lock);
    gate.closed = false;
    gate.fails = fails;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
}

static void wait_until_held(void) {
    pthread_mutex_lock(&gate.lock);
    while (gate.held == 0)
        pthread_cond_wait(&gate.changed, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
}

static uint32_t reads_passed(void) {
    pthread_mutex_lock(&gate.lock);
    uint32_t passed = gate.passed;
    pthread_mutex_unlock(&gate.lock);
    return passed;
}

/* ------------------------------------------------------------------------------------------- */
/* Waits that are counted */

typedef struct {
    dp_wait wait; /* first */
    atomic_int readies;
} counted_wait;

static void count_ready(dp_wait *wait) { atomic_fetch_add(&((counted_wait *)wait)->readies, 1); }

static attn_status begin_or_wait(dp_engine *engine, uint64_t handle, dp_wait *wait, dp_step **step) {
    dp_step_request request = {.tenant = TENANT, .sequences = &handle, .count = 1, .wait = wait};
    return dp_step_begin(engine, &request, step);
}

/* ------------------------------------------------------------------------------------------- */
/* Sequences with the same tokens */

/* The outputs of all layers of one step with random rows. */
static void step_once(dp_engine *engine, uint64_t handle, uint32_t rows, bool read_only, bool batch_invariant,
                      uint64_t seed, float *out, float *lse) {
    const attn_geometry *geometry = &engine->config.geometry;
    dice contents = {seed};
    dp_options options = {.return_lse = true, .batch_invariant = batch_invariant};
    dp_step *step = begin_step(engine, &handle, &rows, 1, read_only);
    for (uint32_t layer = 0; layer < geometry->layers; layer++) {
        layer_rows tensors = random_rows(&contents, geometry, rows, read_only);
        assert_ok(try_layer(step, geometry, layer, &tensors, &options, NULL, out + (size_t)layer * OUTS,
                            lse + (size_t)layer * LSES));
        free_rows(&tensors);
    }
    dp_step_end(step);
}

enum { LAYERS = 3 };

static void assert_close(const float *left, const float *right, size_t count, double bound) {
    double error = 0, norm = 1e-30;
    for (size_t i = 0; i < count; i++) {
        if (left[i] == right[i] && isinf(right[i])) continue;
        norm += (double)right[i] * right[i];
        error += ((double)left[i] - right[i]) * ((double)left[i] - right[i]);
    }
    if (!(sqrt(error / norm) <= bound)) fail_msg("outputs differ by %g", sqrt(error / norm));
}

/* Whether a sequence answers a read, and then a step that grows it, as its twin does; both are then as long again. */
static void assert_twins(dp_engine *engine, uint64_t left, uint64_t right, bool same_bits, uint64_t seed) {
    for (int read_only = 1; read_only >= 0; read_only--) {
        for (int batch_invariant = 0; batch_invariant < 2; batch_invariant++) {
            static float outs[2][LAYERS * OUTS], lses[2][LAYERS * LSES];
            memset(outs, 0, sizeof outs);
            memset(lses, 0, sizeof lses);
            uint32_t rows = 1 + (uint32_t)(seed % MAX_QUERY_ROWS);
            step_once(engine, left, rows, read_only, batch_invariant, seed, outs[0], lses[0]);
            step_once(engine, right, rows, read_only, batch_invariant, seed, outs[1], lses[1]);
            if (same_bits || batch_invariant) {
                assert_memory_equal(outs[0], outs[1], sizeof outs[0]);
                assert_memory_equal(lses[0], lses[1], sizeof lses[0]);
            } else {
                assert_close(outs[0], outs[1], sizeof outs[0] / sizeof(float), 2e-6);
                assert_close(lses[0], lses[1], sizeof lses[0] / sizeof(float), 1e-5);
            }
        }
    }
}

static dp_config ranks_config(uint32_t ranks, const char *backend) {
    dp_config config = small_config();
    config.ranks = ranks;
    config.backend = backend;
    return config;
}

static uint64_t free_on(dp_engine *engine, uint32_t rank) { return rank_info(engine, rank).pages_free; }

/* ------------------------------------------------------------------------------------------- */

static void check_moved_bits(const char *backend, attn_dtype dtype, attn_dtype kv_dtype) {
    static const uint32_t lengths[] = {1, 16, 513, 1300};
    dp_config config = ranks_config(3, backend);
    config.geometry.dtype = dtype;
    config.geometry.kv_dtype = kv_dtype;
    size_t count = sizeof lengths / sizeof *lengths;
    if (strcmp(backend, "reference") == 0) count -= 2; /* it is slow */
    for (size_t i = 0; i < count; i++) {
        dp_engine *engine = create_engine(&config);
        uint64_t moved = open_sequence(engine, DP_EXPLICIT, 0), twin = open_sequence(engine, DP_EXPLICIT, 0);
        fill(engine, moved, lengths[i], 7);
        fill(engine, twin, lengths[i], 7);
        for (uint32_t m = 1; m <= 3; m++) {
            uint64_t length = describe(engine, moved).length;
            assert_ok(try_move(engine, moved, m % 3));
            assert_int_equal(m % 3, describe(engine, moved).rank);
            assert_int_equal(length, describe(engine, moved).length);
            assert_int_equal((length + 15) / 16, describe(engine, moved).pages);
            assert_false(describe(engine, moved).busy);
            assert_twins(engine, moved, twin, true, m);
        }
        assert_int_equal(0, rank_info(engine, 2).tokens);
        assert_int_equal(256, free_on(engine, 2));
        assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){moved, twin}, 2));
        destroy_engine(engine);
    }
}

static void moved_sequence_gives_the_bits_of_one_that_stayed(void **state) {
    (void)state;
    check_moved_bits("reference", ATTN_FP32, 0);
    check_moved_bits("cpu", ATTN_FP32, 0);
    check_moved_bits("cpu", ATTN_BF16, 0);
}

static void moved_fp8_sequence_gives_the_bits_of_one_that_stayed(void **state) {
    (void)state;
    check_moved_bits("reference", ATTN_BF16, ATTN_FP8_E4M3);
    check_moved_bits("cpu", ATTN_BF16, ATTN_FP8_E4M3);
}

static void long_sequence_moves_in_chunks(void **state) {
    (void)state;
    dp_config config = ranks_config(3, "cpu");
    dp_engine *engine = create_engine(&config);
    uint64_t moved = open_sequence(engine, DP_EXPLICIT, 0), twin = open_sequence(engine, DP_EXPLICIT, 2);
    fill(engine, moved, 4000, 7);
    fill(engine, twin, 4000, 7);
    close_gate();
    open_gate(ATTN_OK);
    assert_ok(try_move(engine, moved, 1));
    assert_int_equal(LAYERS * 3, reads_passed()); /* of 1 MiB: 1820 tokens of 576 bytes */
    assert_twins(engine, moved, twin, true, 1);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){moved, twin}, 2));
    destroy_engine(engine);
}

static void spread_sequence_gives_what_it_gave_when_whole(void **state) {
    (void)state;
    static const char *const backends[] = {"reference", "cpu"};
    static const uint32_t lengths[] = {0, 513, 1, 512, 1025, 2200};
    for (uint32_t b = 0; b < 2; b++) {
        dp_config config = ranks_config(3, backends[b]);
        config.pages_per_rank = 512;
        for (size_t i = 0; i < (b == 0 ? 2 : sizeof lengths / sizeof *lengths); i++) {
            dp_engine *engine = create_engine(&config);
            uint64_t spread = open_sequence(engine, DP_EXPLICIT, 1), twin = open_sequence(engine, DP_EXPLICIT, 1);
            if (lengths[i] > 0) {
                fill(engine, spread, lengths[i], 7);
                fill(engine, twin, lengths[i], 7);
            }
            assert_ok(try_spread(engine, spread));
            assert_true(describe(engine, spread).spread);
            assert_int_equal(1, describe(engine, spread).rank);
            assert_int_equal(describe(engine, twin).pages, describe(engine, spread).pages);
            assert_twins(engine, spread, twin, false, 5 + i);
            fill(engine, spread, 600, 8);
            fill(engine, twin, 600, 8);
            assert_twins(engine, spread, twin, false, 6 + i);
            assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){spread, twin}, 2));
            destroy_engine(engine);
        }
    }
}

static void spreading_keeps_the_chunks_that_stay_in_their_pages(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    config.pages_per_rank = 100; /* the sequence takes 65 pages of 16 tokens; 33 are to go */
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 0);
    fill(engine, handle, 2 * ATTN_CHUNK_TOKENS + 10, 1);
    assert_int_equal(35, free_on(engine, 0));
    uint64_t child = fork_sequence(engine, handle, 2 * ATTN_CHUNK_TOKENS + 10);
    assert_ok(try_spread(engine, handle));
    assert_int_equal(35, free_on(engine, 0)); /* the child's */
    assert_int_equal(68, free_on(engine, 1));
    assert_int_equal(33, describe(engine, handle).shared_pages);
    assert_twins(engine, handle, child, false, 3); /* each writes to a tail page of its own */
    close_sequence(engine, child);
    assert_int_equal(0, describe(engine, handle).shared_pages);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void forks_stay_and_quotas_hold(void **state) {
    (void)state;
    uint64_t quotas[TENANTS] = {6};
    dp_config config = ranks_config(2, "cpu");
    config.tenant_max_pages = quotas;
    dp_engine *engine = create_engine(&config);
    uint64_t parent = open_sequence(engine, DP_EXPLICIT, 0), child, refused;
    uint32_t rank;
    fill(engine, parent, 40, 1);
    child = fork_sequence(engine, parent, 40);
    assert_ok(try_move(engine, child, 1)); /* both pages of it, and the quota is used up */
    assert_int_equal(253, free_on(engine, 0));
    assert_int_equal(253, free_on(engine, 1));
    assert_int_equal(0, describe(engine, parent).shared_pages);
    assert_int_equal(0, describe(engine, child).shared_pages);
    assert_int_equal(1, describe(engine, child).rank);
    assert_code(ATTN_RESOURCE_EXHAUSTED, dp_sequence_fork(engine, TENANT, child, 1, &refused, &rank));
    assert_twins(engine, parent, child, true, 1);
    assert_ok(dp_sequence_truncate(engine, TENANT, child, 32));
    refused = fork_sequence(engine, child, 16);
    assert_int_equal(1, describe(engine, refused).rank);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){parent, child, refused}, 3));
    destroy_engine(engine);
}

static void moves_that_make_no_sense_are_refused(void **state) {
    (void)state;
    dp_config config = ranks_config(3, "reference");
    dp_engine *engine = create_engine(&config);
    uint64_t whole = open_sequence(engine, DP_EXPLICIT, 0), spread = open_sequence(engine, DP_SPREAD, 0);
    uint64_t lost = open_sequence(engine, DP_EXPLICIT, 2);
    fill(engine, whole, 20, 1);
    waiting_move foreign = {.move = {.sequence = whole, .rank = 1}};
    assert_error(ATTN_NOT_FOUND, try_move(engine, whole + 1, 1), "sequence: unknown");
    assert_error(ATTN_NOT_FOUND, dp_sequence_move(engine, OTHER_TENANT, &foreign.move), "sequence: unknown");
    assert_error(ATTN_INVALID_ARGUMENT, try_move(engine, whole, 3), "dp_rank: 3; this server has ranks 0 .. 2");
    assert_error(ATTN_FAILED_PRECONDITION, try_move(engine, spread, 1), "sequence: spread over all ranks");
    assert_error(ATTN_FAILED_PRECONDITION, try_spread(engine, spread), "sequence: spread over all ranks");
    assert_ok(try_move(engine, whole, 0)); /* it is there */
    dp_engine_fail_rank(engine, 2);
    assert_error(ATTN_UNAVAILABLE, try_move(engine, whole, 2), "dp_rank: rank 2 is lost");
    assert_error(ATTN_UNAVAILABLE, try_spread(engine, whole), "spread: needs rank 2, which is lost");
    assert_error(ATTN_UNAVAILABLE, try_move(engine, lost, 1), "sequence: rank 2, which held it, was lost");
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(0, counts.moves);
    assert_int_equal(0, counts.moves_failed);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){whole, spread, lost}, 3));
    destroy_engine(engine);
}

static void rank_without_pages_takes_no_sequence(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    config.pages_per_rank = 4;
    dp_engine *engine = create_engine(&config);
    uint64_t big = open_sequence(engine, DP_EXPLICIT, 0), small = open_sequence(engine, DP_EXPLICIT, 1);
    fill(engine, big, 50, 1);
    fill(engine, small, 1, 1);
    assert_error(ATTN_RESOURCE_EXHAUSTED, try_move(engine, big, 1), "pages: 4 needed on rank 1, and 3 of its 4");
    assert_false(describe(engine, big).busy);
    assert_int_equal(0, rank_info(engine, 1).tokens_in_flight);
    close_sequence(engine, small);
    assert_ok(try_move(engine, big, 1));
    assert_int_equal(4, free_on(engine, 0));
    close_sequence(engine, big);
    destroy_engine(engine);
}

static void moves_are_counted(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 0);
    fill(engine, handle, 100, 1);
    uint64_t in_place = rank_info(engine, 1).bytes_in_place;
    assert_ok(try_move(engine, handle, 1));
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(1, counts.moves);
    assert_int_equal(0, counts.moves_failed);
    assert_int_equal(100, counts.moved_tokens);
    assert_int_equal(100 * 3 * (2 * 32 + 2 * 40) * 4, counts.moved_bytes);
    assert_int_equal(in_place, rank_info(engine, 1).bytes_in_place); /* those are of calls' tensors */
    close_sequence(engine, handle);
    destroy_engine(engine);
}

/* What an engine tells of its moves; those of these tests come one after another. */
typedef struct {
    uint32_t count;
    dp_move_record last;
    attn_saved_status status; /* the last one's */
} diary;

static void write_down(void *context, const dp_move_record *record) {
    diary *into = context;
    into->count++;
    into->last = *record;
    attn_status_save(&into->status, record->status);
}

static dp_engine *create_engine_with_diary(dp_config config, diary *into) {
    *into = (diary){0};
    config.moved = write_down;
    config.moved_context = into;
    return create_engine(&config);
}

static void every_move_that_sets_out_is_told_once(void **state) {
    (void)state;
    diary told;
    dp_engine *engine = create_engine_with_diary(ranks_config(3, "cpu"), &told);
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 0);
    fill(engine, handle, 1000, 1);
    int64_t start = attn_now_ns();
    assert_ok(try_move(engine, handle, 2));
    assert_int_equal(1, told.count);
    assert_int_equal(handle, told.last.sequence);
    assert_int_equal(0, told.last.from);
    assert_int_equal(2, told.last.to);
    assert_true(told.last.is_asked_for && !told.last.spread && !told.last.direct);
    assert_int_equal(1000, told.last.tokens);
    assert_int_equal(1000 * 3 * (2 * 32 + 2 * 40) * 4, told.last.bytes);
    assert_true(told.last.took_ns > 0 && told.last.took_ns <= attn_now_ns() - start);
    assert_int_equal(ATTN_OK, told.status.code);

    close_gate();
    open_gate(ATTN_INTERNAL);
    assert_code(ATTN_INTERNAL, try_move(engine, handle, 1));
    open_gate(ATTN_OK);
    assert_int_equal(2, told.count);
    assert_int_equal(2, told.last.from);
    assert_int_equal(1, told.last.to);
    assert_int_equal(ATTN_INTERNAL, told.status.code);
    assert_non_null(strstr(told.status.message, "on fire"));

    assert_ok(try_move(engine, handle, 2)); /* where it is */
    assert_code(ATTN_INVALID_ARGUMENT, try_move(engine, handle, 3));
    assert_int_equal(2, told.count);
    assert_ok(try_spread(engine, handle));
    assert_int_equal(3, told.count);
    assert_true(told.last.is_asked_for && told.last.spread);
    assert_int_equal(2, told.last.from);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* On the way */

/* A sequence of 100 tokens whose move from rank 0 to rank 1 is held at its first chunk. */
static dp_engine *create_engine_with_move(waiting_move *waiting, uint64_t *handle) {
    dp_config config = ranks_config(2, "cpu");
    dp_engine *engine = create_engine(&config);
    *handle = open_sequence(engine, DP_EXPLICIT, 0);
    fill(engine, *handle, 100, 1);
    close_gate();
    assert_ok(start_move(engine, waiting, *handle, 1, 0));
    wait_until_held();
    return engine;
}

static void assert_still_at_home(dp_engine *engine, uint64_t handle) {
    dp_sequence_info info = describe(engine, handle);
    assert_int_equal(0, info.rank);
    assert_int_equal(100, info.length);
    assert_false(info.busy);
    assert_int_equal(100, rank_info(engine, 0).tokens);
    assert_int_equal(0, rank_info(engine, 1).tokens);
    assert_int_equal(0, rank_info(engine, 1).tokens_in_flight);
    assert_int_equal(256, free_on(engine, 1));
    assert_int_equal(249, free_on(engine, 0));
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(0, counts.moves);
    assert_int_equal(1, counts.moves_failed);
}

static void sequence_on_its_way_is_busy_and_readable(void **state) {
    (void)state;
    waiting_move waiting, second;
    uint64_t handle, other;
    dp_engine *engine = create_engine_with_move(&waiting, &handle);
    dp_step *refused, *reading;
    dp_upload *upload;
    dp_export *export;
    assert_true(describe(engine, handle).busy);
    assert_int_equal(0, describe(engine, handle).rank);
    assert_int_equal(100, rank_info(engine, 1).tokens_in_flight);
    assert_error(ATTN_ABORTED, try_begin_step(engine, &handle, NULL, 1, false, &refused),
                 "sequences[0]: on its way to another rank");
    assert_error(ATTN_ABORTED, dp_upload_begin(engine, TENANT, handle, 1, &upload), "on its way to another rank");
    assert_error(ATTN_ABORTED, dp_sequence_truncate(engine, TENANT, handle, 1), "on its way to another rank");
    assert_error(ATTN_ABORTED, dp_sequences_close(engine, TENANT, &handle, 1), "on its way to another rank");
    assert_error(ATTN_ABORTED, start_move(engine, &second, handle, 1, 0), "on its way to another rank");
    other = fork_sequence(engine, handle, 90);
    reading = begin_step(engine, &handle, NULL, 1, true);
    assert_ok(dp_export_begin(engine, TENANT, handle, 0, 0, &export));
    open_gate(ATTN_OK);
    assert_ok(wait_for_move(&waiting));
    assert_int_equal(100, waiting.move.tokens);
    assert_int_equal(1, describe(engine, handle).rank);
    assert_int_equal(0, describe(engine, other).rank);
    /* The read began before, and so it goes on where it began, with the outputs of those pages. */
    dice contents = {9};
    const attn_geometry *geometry = &engine->config.geometry;
    layer_rows rows = random_rows(&contents, geometry, 1, true);
    float outs[2][4 * 40];
    uint64_t launches = rank_info(engine, 0).launches;
    assert_ok(try_layer(reading, geometry, 1, &rows, NULL, NULL, outs[0], NULL));
    assert_int_equal(launches + 1, rank_info(engine, 0).launches);
    dp_step_end(reading);
    assert_int_equal(249, free_on(engine, 0)); /* all seven pages are the export's, six of them the fork's, too */
    dp_export_end(export);
    assert_int_equal(250, free_on(engine, 0));
    reading = begin_step(engine, &handle, NULL, 1, true);
    assert_ok(try_layer(reading, geometry, 1, &rows, NULL, NULL, outs[1], NULL));
    assert_int_equal(launches + 1, rank_info(engine, 0).launches);
    dp_step_end(reading);
    assert_memory_equal(outs[0], outs[1], sizeof outs[0]);
    free_rows(&rows);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){handle, other}, 2));
    destroy_engine(engine);
}

static void cancelled_move_leaves_the_sequence_where_it_was(void **state) {
    (void)state;
    waiting_move waiting;
    uint64_t handle;
    dp_engine *engine = create_engine_with_move(&waiting, &handle);
    dp_move_cancel(engine, &waiting.move);
    open_gate(ATTN_OK);
    assert_error(ATTN_CANCELLED, wait_for_move(&waiting), "the move was cancelled");
    assert_int_equal(1, reads_passed()); /* and no chunk was read after it */
    assert_still_at_home(engine, handle);
    fill(engine, handle, 1, 1);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void failing_read_leaves_the_sequence_where_it_was(void **state) {
    (void)state;
    waiting_move waiting;
    uint64_t handle;
    dp_engine *engine = create_engine_with_move(&waiting, &handle);
    open_gate(ATTN_INTERNAL);
    assert_error(ATTN_INTERNAL, wait_for_move(&waiting), "on fire");
    open_gate(ATTN_OK);
    assert_still_at_home(engine, handle);
    assert_ok(try_move(engine, handle, 1));
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void move_to_a_rank_that_is_lost_meanwhile_fails(void **state) {
    (void)state;
    waiting_move waiting;
    uint64_t handle;
    dp_engine *engine = create_engine_with_move(&waiting, &handle);
    dp_engine_fail_rank(engine, 1);
    open_gate(ATTN_OK);
    assert_error(ATTN_UNAVAILABLE, wait_for_move(&waiting), "dp_rank: rank 1 was lost on the way");
    assert_still_at_home(engine, handle);
    fill(engine, handle, 1, 1);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void move_from_a_rank_that_is_lost_meanwhile_fails(void **state) {
    (void)state;
    waiting_move waiting;
    uint64_t handle;
    dp_engine *engine = create_engine_with_move(&waiting, &handle);
    dp_engine_fail_rank(engine, 0);
    open_gate(ATTN_UNAVAILABLE);
    assert_code(ATTN_UNAVAILABLE, wait_for_move(&waiting));
    open_gate(ATTN_OK);
    assert_still_at_home(engine, handle);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void step_waits_for_the_move_and_finds_the_sequence_moved(void **state) {
    (void)state;
    waiting_move waiting;
    uint64_t handle;
    dp_engine *engine = create_engine_with_move(&waiting, &handle);
    counted_wait wait = {.wait = {.ready = count_ready}}, withdrawn = {.wait = {.ready = count_ready}};
    dp_step *step;
    assert_ok(begin_or_wait(engine, handle, &wait.wait, &step));
    assert_null(step);
    assert_ok(begin_or_wait(engine, handle, &withdrawn.wait, &step));
    assert_null(step);
    assert_true(dp_wait_withdraw(engine, &withdrawn.wait));
    assert_int_equal(0, atomic_load(&wait.readies));
    open_gate(ATTN_OK);
    assert_ok(wait_for_move(&waiting));
    assert_int_equal(1, atomic_load(&wait.readies));
    assert_int_equal(0, atomic_load(&withdrawn.readies));
    assert_false(dp_wait_withdraw(engine, &wait.wait));
    assert_ok(begin_or_wait(engine, handle, &wait.wait, &step));
    assert_non_null(step);
    dp_step_end(step);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void step_does_not_wait_for_another_step(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 0);
    counted_wait wait = {.wait = {.ready = count_ready}};
    dp_step *step = begin_step(engine, &handle, NULL, 1, false), *other;
    assert_error(ATTN_ABORTED, begin_or_wait(engine, handle, &wait.wait, &other), "sequences[0]: in a step or upload");
    assert_false(dp_wait_withdraw(engine, &wait.wait));
    dp_step_end(step);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void move_waits_for_a_step_upload_or_move_to_end(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 0);
    fill(engine, handle, 100, 1);
    waiting_move waiting, behind;
    int64_t late = attn_now_ns() + INT64_C(3600000000000);
    dp_step *step = begin_step(engine, &handle, NULL, 1, false);
    assert_error(ATTN_ABORTED, start_move(engine, &waiting, handle, 1, 0), "sequence: in a step or upload right now");
    assert_ok(start_move(engine, &waiting, handle, 1, late));
    assert_false(move_is_done(&waiting));
    dp_step_end(step);
    assert_ok(wait_for_move(&waiting));
    assert_int_equal(1, describe(engine, handle).rank);

    dp_upload *upload;
    assert_ok(dp_upload_begin(engine, TENANT, handle, 5, &upload));
    assert_ok(start_move(engine, &waiting, handle, 0, late));
    close_gate();
    dp_upload_end(upload);
    wait_until_held();
    assert_ok(start_move(engine, &behind, handle, 1, late));
    assert_false(move_is_done(&waiting));
    open_gate(ATTN_OK);
    assert_ok(wait_for_move(&waiting));
    assert_ok(wait_for_move(&behind));
    assert_int_equal(1, describe(engine, handle).rank);

    step = begin_step(engine, &handle, NULL, 1, false); /* and one that commits */
    assert_ok(start_move(engine, &waiting, handle, 0, late));
    dice dice = {4};
    for (uint32_t layer = 0; layer < config.geometry.layers; layer++) {
        layer_rows rows = random_rows(&dice, &config.geometry, 1, false);
        assert_ok(try_layer(step, &config.geometry, layer, &rows, NULL, NULL, NULL, NULL));
        free_rows(&rows);
    }
    assert_ok(wait_for_move(&waiting));
    assert_int_equal(101, waiting.move.tokens);
    dp_step_end(step);
    assert_int_equal(0, describe(engine, handle).rank);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void move_gives_up_waiting(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 0);
    int64_t late = attn_now_ns() + INT64_C(3600000000000);
    waiting_move late_one, cancelled, closed;
    dp_step *step = begin_step(engine, &handle, NULL, 1, false);
    assert_ok(start_move(engine, &late_one, handle, 1, attn_now_ns() + 5000000));
    assert_ok(start_move(engine, &cancelled, handle, 1, late));
    usleep(10000);
    dp_engine_reap(engine);
    assert_error(ATTN_ABORTED, wait_for_move(&late_one), "sequence: in a step or upload right now");
    assert_false(move_is_done(&cancelled));
    dp_move_cancel(engine, &cancelled.move);
    assert_true(move_is_done(&cancelled)); /* at once */
    assert_code(ATTN_CANCELLED, wait_for_move(&cancelled));
    uint64_t other = open_sequence(engine, DP_EXPLICIT, 0);
    dp_step *others = begin_step(engine, &other, NULL, 1, false);
    assert_ok(start_move(engine, &closed, handle, 1, late));
    dp_step_end(others); /* not the one that is waited for */
    assert_false(move_is_done(&closed));
    dp_step_end(step);
    assert_ok(wait_for_move(&closed)); /* an empty sequence moves, too */
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){handle, other}, 2));
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Evening out */

static uint64_t load_of(dp_engine *engine, uint32_t rank) {
    dp_rank_info info = rank_info(engine, rank);
    return info.tokens + info.tokens_in_flight;
}

/* Until no move of the engine's own is under way. */
static void balance_to_rest(dp_engine *engine) {
    bool balancing = true;
    while (balancing) {
        usleep(200);
        pthread_mutex_lock(&engine->lock);
        balancing = engine->moves.balancing;
        pthread_mutex_unlock(&engine->lock);
    }
}

/* A tick and all that comes of it. The number of moves so far. */
static uint64_t balance(dp_engine *engine) {
    dp_engine_reap(engine);
    balance_to_rest(engine);
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(0, counts.moves_failed);
    return counts.moves;
}

static void skewed_load_is_evened_out_and_then_left_alone(void **state) {
    (void)state;
    static const uint32_t lengths[] = {900, 100, 700, 300, 1300, 50, 800, 1000, 20, 600, 400, 30};
    enum { COUNT = sizeof lengths / sizeof *lengths };
    dp_config config = ranks_config(4, "cpu");
    config.pages_per_rank = 512;
    config.rebalance_factor = 1.25;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[COUNT], twins[COUNT];
    for (uint32_t i = 0; i < COUNT; i++) {
        handles[i] = open_sequence(engine, DP_EXPLICIT, 1);
        fill(engine, handles[i], lengths[i], i);
    }
    uint64_t total = load_of(engine, 1), moves = balance(engine);
    assert_true(moves >= 3);
    for (uint32_t r = 0; r < 4; r++) {
        assert_true(load_of(engine, r) + 1024 > total / 4);
        assert_true(load_of(engine, r) < total / 4 + 1024);
    }
    for (int i = 0; i < 10; i++)
        assert_int_equal(moves, balance(engine));
    for (uint32_t i = 0; i < COUNT; i++) {
        twins[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
        fill(engine, twins[i], lengths[i], i);
        assert_twins(engine, handles[i], twins[i], true, i);
    }
    assert_ok(dp_sequences_close(engine, TENANT, handles, COUNT));
    assert_ok(dp_sequences_close(engine, TENANT, twins, COUNT));
    destroy_engine(engine);
}

static void small_differences_large_sequences_and_busy_ones_are_left_alone(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    dp_engine *engine = create_engine(&config);
    uint64_t moves, handles[2] = {open_sequence(engine, DP_EXPLICIT, 0), open_sequence(engine, DP_EXPLICIT, 0)};
    fill(engine, handles[0], 2000, 1);
    fill(engine, handles[1], 1000, 2);
    assert_int_equal(0, balance(engine)); /* it is off */
    engine->config.rebalance_factor = 1.5;
    dp_step *step = begin_step(engine, &handles[1], NULL, 1, false);
    assert_true((moves = balance(engine)) == 1); /* the other one, of two thirds of the difference */
    assert_int_equal(1, describe(engine, handles[0]).rank);
    dp_step_end(step);
    assert_int_equal(1, balance(engine)); /* 1000 and 2000: but a move back would turn it round */
    assert_ok(dp_sequence_truncate(engine, TENANT, handles[1], 0));
    assert_int_equal(1, balance(engine)); /* all in one sequence */
    close_sequence(engine, handles[0]);
    fill(engine, handles[1], 1024, 3);
    uint64_t halves[2] = {fork_sequence(engine, handles[1], 512), 0};
    assert_ok(dp_sequence_truncate(engine, TENANT, handles[1], 512));
    assert_int_equal(1, balance(engine)); /* 1024 and none */
    halves[1] = fork_sequence(engine, handles[1], 1);
    assert_int_equal(2, balance(engine)); /* one more is worth it */
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){handles[1], halves[0], halves[1]}, 3));
    destroy_engine(engine);
}

static int64_t used_ns(dp_engine *engine, uint64_t handle) {
    pthread_mutex_lock(&engine->lock);
    int64_t used = dp_sequences_find(&engine->sequences, TENANT, handle)->used_ns;
    pthread_mutex_unlock(&engine->lock);
    return used;
}

static void evening_out_is_no_use_of_a_sequence(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    config.rebalance_factor = 1.5;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[2] = {open_sequence(engine, DP_EXPLICIT, 0), open_sequence(engine, DP_EXPLICIT, 0)};
    fill(engine, handles[0], 1000, 1);
    fill(engine, handles[1], 1000, 2);
    int64_t before[2] = {used_ns(engine, handles[0]), used_ns(engine, handles[1])};
    assert_int_equal(1, balance(engine));
    for (int i = 0; i < 2; i++)
        assert_true(used_ns(engine, handles[i]) == before[i]); /* else a forgotten one would never idle out */
    assert_ok(try_move(engine, handles[0], 1 - describe(engine, handles[0]).rank));
    assert_true(used_ns(engine, handles[0]) > before[0]);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 2));
    destroy_engine(engine);
}

static void full_and_lost_ranks_get_nothing(void **state) {
    (void)state;
    dp_config config = ranks_config(3, "cpu");
    config.rebalance_factor = 1.5;
    config.pages_per_rank = 200;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[3];
    for (uint32_t i = 0; i < 3; i++) {
        handles[i] = open_sequence(engine, DP_EXPLICIT, 0);
        fill(engine, handles[i], 1000, i);
    }
    dp_engine_fail_rank(engine, 1);
    assert_int_equal(1, balance(engine));
    assert_int_equal(1000, load_of(engine, 2));
    assert_int_equal(0, load_of(engine, 1));
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    destroy_engine(engine);
}

static void sequence_that_outgrows_its_rank_is_spread(void **state) {
    (void)state;
    dp_config config = ranks_config(3, "cpu");
    config.spread_above_tokens = 1000;
    dp_engine *engine = create_engine(&config);
    uint64_t large = open_sequence(engine, DP_EXPLICIT, 1), small = open_sequence(engine, DP_EXPLICIT, 1);
    uint64_t twin = open_sequence(engine, DP_SPREAD, 0);
    fill(engine, large, 1000, 1);
    fill(engine, small, 900, 2);
    fill(engine, twin, 1000, 1);
    assert_int_equal(0, balance(engine));
    fill(engine, large, 700, 3);
    fill(engine, twin, 700, 3);
    assert_int_equal(1, balance(engine));
    assert_true(describe(engine, large).spread);
    assert_int_equal(1, describe(engine, large).rank);
    assert_false(describe(engine, small).spread);
    assert_twins(engine, large, twin, true, 1);
    assert_int_equal(1, balance(engine));
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){large, small, twin}, 3));
    destroy_engine(engine);
}

static void what_the_engine_moves_by_itself_is_told(void **state) {
    (void)state;
    diary told;
    dp_config config = ranks_config(2, "cpu");
    config.rebalance_factor = 1.5;
    config.spread_above_tokens = 2000;
    dp_engine *engine = create_engine_with_diary(config, &told);
    uint64_t even[] = {open_sequence(engine, DP_EXPLICIT, 0), open_sequence(engine, DP_EXPLICIT, 0)};
    for (int i = 0; i < 2; i++)
        fill(engine, even[i], 1000, 1);
    assert_int_equal(1, balance(engine));
    assert_int_equal(1, told.count);
    assert_true(!told.last.is_asked_for && !told.last.spread);
    assert_int_equal(0, told.last.from);
    assert_int_equal(1, told.last.to);
    fill(engine, even[0], 1001, 2);
    assert_int_equal(2, balance(engine));
    assert_int_equal(2, told.count);
    assert_true(!told.last.is_asked_for && told.last.spread);
    assert_int_equal(even[0], told.last.sequence);
    assert_int_equal(2001, told.last.tokens);
    assert_ok(dp_sequences_close(engine, TENANT, even, 2));
    destroy_engine(engine);
}

static void engine_that_is_balancing_can_be_destroyed(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    config.rebalance_factor = 1.1;
    for (int i = 0; i < 20; i++) {
        dp_engine *engine = create_engine(&config);
        for (int s = 0; s < 6; s++)
            fill(engine, open_sequence(engine, DP_EXPLICIT, 0), 500, 1);
        dp_engine_reap(engine);
        if (i > 0) usleep(100u * (unsigned)i);
        dp_engine_destroy(engine);
    }
}

static void least_tokens_prefers_a_rank_with_pages(void **state) {
    (void)state;
    dp_config config = ranks_config(2, "cpu");
    config.pages_per_rank = 4;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[6];
    for (uint32_t i = 0; i < 4; i++) {
        handles[i] = open_sequence(engine, DP_EXPLICIT, 0);
        fill(engine, handles[i], 1, 1);
    }
    handles[4] = open_sequence(engine, DP_EXPLICIT, 1);
    fill(engine, handles[4], 40, 1); /* 3 of its 4 pages */
    handles[5] = open_sequence(engine, DP_LEAST_TOKENS, 0);
    assert_int_equal(1, describe(engine, handles[5]).rank); /* rank 0 has fewer tokens, but no page */
    fill(engine, handles[5], 1, 1);
    uint64_t neither = open_sequence(engine, DP_LEAST_TOKENS, 0);
    assert_int_equal(0, describe(engine, neither).rank); /* both are full */
    close_sequence(engine, neither);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 6));
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Everything at once */

/* One thread's sequence, which only it steps, and which all threads move. */
typedef struct {
    dp_engine *engine;
    uint64_t seed;
    atomic_bool *stop;
    _Atomic uint64_t *handles; /* [THREADS] what each thread steps now */
    uint32_t index;
    uint32_t rounds, moves, forks;
} traveller;

enum { TRAVELLERS = 5 };

/* As a server does it: what the engine lets wait is tried again when it is ready. */
static dp_step *begin_when_moved(dp_engine *engine, uint64_t handle) {
    dp_step *step = NULL;
    while (step == NULL) {
        counted_wait wait = {.wait = {.ready = count_ready}};
        attn_status status = begin_or_wait(engine, handle, &wait.wait, &step);
        if (attn_failed(status)) {
            assert_int_equal(ATTN_RESOURCE_EXHAUSTED, status.code); /* never ABORTED: nobody else steps it */
            return NULL;
        }
        while (step == NULL && atomic_load(&wait.readies) == 0)
            usleep(20);
    }
    return step;
}

/* One layer is enough to see whether all rows are where they should be. */
static void read_bits(dp_engine *engine, uint64_t handle, uint64_t seed, float out[4 * 40]) {
    const attn_geometry *geometry = &engine->config.geometry;
    dice contents = {seed};
    dp_options options = {.batch_invariant = true};
    dp_step *step = begin_step(engine, &handle, NULL, 1, true);
    layer_rows rows = random_rows(&contents, geometry, 1, true);
    attn_status status;
    do {
        status = try_layer(step, geometry, (uint32_t)(seed % geometry->layers), &rows, &options, NULL, out, NULL);
    } while (status.code == ATTN_RESOURCE_EXHAUSTED); /* the queue is short */
    assert_ok(status);
    free_rows(&rows);
    dp_step_end(step);
}

static bool grow_one(traveller *self, dice *dice, uint64_t handle) {
    const attn_geometry *geometry = &self->engine->config.geometry;
    dp_step *step = begin_when_moved(self->engine, handle);
    if (step == NULL) return false;
    uint32_t layers = dice_below(dice, 4) == 0 ? 1 : geometry->layers;
    bool good = true;
    for (uint32_t layer = 0; layer < layers && good; layer++) {
        layer_rows rows = random_rows(dice, geometry, 1, false);
        good = !attn_failed(try_layer(step, geometry, layer, &rows, NULL, dice, NULL, NULL));
        free_rows(&rows);
    }
    dp_step_end(step);
    return good && layers == geometry->layers;
}

static void move_any(traveller *self, dice *dice) {
    waiting_move waiting;
    uint64_t handle = atomic_load(&self->handles[dice_below(dice, TRAVELLERS)]);
    int64_t until = dice_below(dice, 2) == 0 ? 0 : attn_now_ns() + 2000000;
    if (attn_failed(start_move(self->engine, &waiting, handle, dice_below(dice, 4), until))) return;
    if (dice_below(dice, 4) == 0) dp_move_cancel(self->engine, &waiting.move);
    if (!attn_failed(wait_for_move(&waiting))) self->moves++;
}

static void close_when_moved(dp_engine *engine, uint64_t handle) {
    attn_status status;
    while ((status = dp_sequences_close(engine, TENANT, &handle, 1)).code == ATTN_ABORTED)
        usleep(20);
    assert_ok(status);
}

/* A sequence's outputs do not change by its moves; they are those of a fork that is taken in between. */
static void travel_once(traveller *self, dice *dice) {
    dp_engine *engine = self->engine;
    uint64_t handle, child;
    uint32_t rank;
    if (attn_failed(dp_sequences_open(engine, TENANT, 1, DP_ROUND_ROBIN, 0, &handle, &rank))) return;
    uint32_t tokens = 1 + dice_below(dice, 700);
    uint64_t length =
        attn_failed(try_upload(engine, &engine->config.geometry, dice, dice, handle, tokens)) ? 0 : tokens;
    atomic_store(&self->handles[self->index], handle);
    for (int i = 0; i < 6; i++) {
        float outs[3][4 * 40];
        uint64_t seed = dice_next(dice);
        read_bits(engine, handle, seed, outs[0]);
        move_any(self, dice);
        read_bits(engine, handle, seed, outs[1]);
        assert_memory_equal(outs[0], outs[1], sizeof outs[0]);
        if (!attn_failed(dp_sequence_fork(engine, TENANT, handle, length, &child, &rank))) {
            self->forks++;
            move_any(self, dice);
            read_bits(engine, child, seed, outs[2]);
            assert_memory_equal(outs[0], outs[2], sizeof outs[0]);
            close_when_moved(engine, child);
        }
        if (grow_one(self, dice, handle)) length++;
        assert_int_equal(length, describe(engine, handle).length);
    }
    self->rounds++;
    close_when_moved(engine, handle);
}

static void *travel(void *argument) {
    traveller *self = argument;
    dice dice = {self->seed};
    while (!atomic_load(self->stop))
        travel_once(self, &dice);
    return NULL;
}

/* How long; ATTND_STRESS_SECONDS for more. */
static int64_t stress_ns(void) {
    const char *seconds = getenv("ATTND_STRESS_SECONDS");
    return (seconds != NULL ? strtoll(seconds, NULL, 10) : 3) * INT64_C(1000000000);
}

static void travellers_lose_nothing(void **state) {
    (void)state;
    dp_config config = ranks_config(4, "cpu");
    config.max_queue = 6;
    config.pages_per_rank = 160;
    config.rebalance_factor = 1.2;
    config.spread_above_tokens = 650;
    dp_engine *engine = create_engine(&config);
    atomic_bool stop = false;
    _Atomic uint64_t handles[TRAVELLERS] = {0};
    traveller travellers[TRAVELLERS];
    pthread_t threads[TRAVELLERS];
    for (uint32_t i = 0; i < TRAVELLERS; i++) {
        travellers[i] = (traveller){.engine = engine, .seed = i + 1, .stop = &stop, .handles = handles, .index = i};
        pthread_create(&threads[i], NULL, travel, &travellers[i]);
    }
    for (int64_t end = attn_now_ns() + stress_ns(); attn_now_ns() < end;) {
        usleep(1000);
        dp_engine_reap(engine);
    }
    atomic_store(&stop, true);
    uint32_t rounds = 0, moves = 0, forks = 0;
    for (int i = 0; i < TRAVELLERS; i++) {
        pthread_join(threads[i], NULL);
        rounds += travellers[i].rounds;
        moves += travellers[i].moves;
        forks += travellers[i].forks;
    }
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    print_message("%u rounds, %u forks, %u moves waited for, %lu made, %lu failed\n", rounds, forks, moves,
                  (unsigned long)counts.moves, (unsigned long)counts.moves_failed);
    assert_true(rounds > TRAVELLERS && moves > 0 && forks > 0);
    balance_to_rest(engine);
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(moved_sequence_gives_the_bits_of_one_that_stayed),
        cmocka_unit_test(moved_fp8_sequence_gives_the_bits_of_one_that_stayed),
        cmocka_unit_test(long_sequence_moves_in_chunks),
        cmocka_unit_test(spread_sequence_gives_what_it_gave_when_whole),
        cmocka_unit_test(spreading_keeps_the_chunks_that_stay_in_their_pages),
        cmocka_unit_test(forks_stay_and_quotas_hold),
        cmocka_unit_test(moves_that_make_no_sense_are_refused),
        cmocka_unit_test(rank_without_pages_takes_no_sequence),
        cmocka_unit_test(moves_are_counted),
        cmocka_unit_test(every_move_that_sets_out_is_told_once),
        cmocka_unit_test(sequence_on_its_way_is_busy_and_readable),
        cmocka_unit_test(cancelled_move_leaves_the_sequence_where_it_was),
        cmocka_unit_test(failing_read_leaves_the_sequence_where_it_was),
        cmocka_unit_test(move_to_a_rank_that_is_lost_meanwhile_fails),
        cmocka_unit_test(move_from_a_rank_that_is_lost_meanwhile_fails),
        cmocka_unit_test(step_waits_for_the_move_and_finds_the_sequence_moved),
        cmocka_unit_test(step_does_not_wait_for_another_step),
        cmocka_unit_test(move_waits_for_a_step_upload_or_move_to_end),
        cmocka_unit_test(move_gives_up_waiting),
        cmocka_unit_test(skewed_load_is_evened_out_and_then_left_alone),
        cmocka_unit_test(small_differences_large_sequences_and_busy_ones_are_left_alone),
        cmocka_unit_test(evening_out_is_no_use_of_a_sequence),
        cmocka_unit_test(full_and_lost_ranks_get_nothing),
        cmocka_unit_test(sequence_that_outgrows_its_rank_is_spread),
        cmocka_unit_test(what_the_engine_moves_by_itself_is_told),
        cmocka_unit_test(engine_that_is_balancing_can_be_destroyed),
        cmocka_unit_test(least_tokens_prefers_a_rank_with_pages),
        cmocka_unit_test(travellers_lose_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
