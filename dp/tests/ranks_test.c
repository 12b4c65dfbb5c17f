/*
 * Ranks: queues, merging, deadlines, cancellation and loss.
 *
 * The linker puts this file's attn_backend_start in front of the real one (--wrap), so that a test can
 * hold a rank in the middle of a launch, make a launch fail, and see what is launched.
 */
#define _GNU_SOURCE
#include "dp/tests/fixture.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "dp/state.h"

/* ------------------------------------------------------------------------------------------- */
/* The gate in front of the backends */

static struct {
    pthread_mutex_t lock; /* guards all */
    pthread_cond_t changed;
    bool closed;
    uint32_t held;      /* launches that wait at the gate */
    attn_code fails;    /* what launches end with, unless ATTN_OK.. */
    uint32_t fail_rank; /* ..on the rank of this thread name only, unless UINT32_MAX */
    pthread_t last;     /* the thread of the last launch */
    uint32_t prefixes;  /* of the last launch */
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER, .fail_rank = UINT32_MAX};

attn_status __real_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan);
attn_status __wrap_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan);

static bool on_rank(uint32_t rank) {
    char name[16], wanted[16];
    pthread_getname_np(pthread_self(), name, sizeof name);
    snprintf(wanted, sizeof wanted, "rank %u", rank);
    return strcmp(name, wanted) == 0;
}

attn_status __wrap_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan) {
    pthread_mutex_lock(&gate.lock);
    gate.last = pthread_self();
    gate.prefixes = batch->prefix_count;
    gate.held++;
    pthread_cond_broadcast(&gate.changed);
    while (gate.closed)
        pthread_cond_wait(&gate.changed, &gate.lock);
    gate.held--;
    attn_code fails = gate.fail_rank == UINT32_MAX || on_rank(gate.fail_rank) ? gate.fails : ATTN_OK;
    pthread_mutex_unlock(&gate.lock);
    if (fails != ATTN_OK) return attn_error(fails, "the device is on fire");
    return __real_attn_backend_start(backend, batch, plan);
}

static void close_gate(void) {
    pthread_mutex_lock(&gate.lock);
    gate.closed = true;
    pthread_mutex_unlock(&gate.lock);
}

static void open_gate(void) {
    pthread_mutex_lock(&gate.lock);
    gate.closed = false;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
}

static void wait_until_held(uint32_t launches) {
    pthread_mutex_lock(&gate.lock);
    while (gate.held < launches)
        pthread_cond_wait(&gate.changed, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
}

static void make_launches_fail(attn_code code, uint32_t rank) {
    pthread_mutex_lock(&gate.lock);
    gate.fails = code;
    gate.fail_rank = rank;
    pthread_mutex_unlock(&gate.lock);
}

static pthread_t last_launch_thread(void) {
    pthread_mutex_lock(&gate.lock);
    pthread_t thread = gate.last;
    pthread_mutex_unlock(&gate.lock);
    return thread;
}

static uint32_t prefixes_of_last_launch(void) {
    pthread_mutex_lock(&gate.lock);
    uint32_t prefixes = gate.prefixes;
    pthread_mutex_unlock(&gate.lock);
    return prefixes;
}

/* An engine whose launches are always made by the rank's own thread. */
static dp_engine *create_queueing_engine(const dp_config *config) {
    dp_engine *engine = create_engine(config);
    engine->small_bytes = 0;
    return engine;
}

/* ------------------------------------------------------------------------------------------- */
/* Steps of one sequence or more with a call in flight */

typedef struct {
    uint64_t handles[4];
    uint32_t count;
    dp_step *step;
    layer_rows rows;
    waiting_call call;
} flight;

static void board(flight *flight, dp_engine *engine, const uint64_t *handles, uint32_t count, bool read_only,
                  uint64_t seed) {
    dice dice = {seed};
    memset(flight, 0, sizeof *flight);
    memcpy(flight->handles, handles, count * sizeof *handles);
    flight->count = count;
    flight->step = begin_step(engine, handles, NULL, count, read_only);
    flight->rows = random_rows(&dice, &engine->config.geometry, count, read_only);
}

static attn_status try_start(flight *flight, uint32_t layer, const dp_options *options) {
    prepare_call(&flight->call, &flight->step->engine->config.geometry, layer, &flight->rows, options, NULL);
    return start_call(flight->step, &flight->call);
}

static void land(flight *flight) {
    free_call(&flight->call);
    free_rows(&flight->rows);
    dp_step_end(flight->step);
}

/* Holds a rank in a launch of its own until the gate opens. */
static void hold_rank(flight *blocker, dp_engine *engine, uint64_t handle) {
    close_gate();
    board(blocker, engine, &handle, 1, true, 1);
    assert_ok(try_start(blocker, 2, NULL));
    wait_until_held(1);
}

static void release_rank(flight *blocker) {
    open_gate();
    assert_ok(wait_for_call(&blocker->call));
    land(blocker);
}

static void grow(dp_engine *engine, uint64_t handle, uint32_t tokens, uint64_t seed) {
    dice contents = {seed}, cuts = {seed};
    assert_ok(try_upload(engine, &engine->config.geometry, &contents, &cuts, handle, tokens));
}

/* ------------------------------------------------------------------------------------------- */
/* Merging */

enum { MERGED = 5 };

/* The outputs of MERGED steps' layer 0, run merged or one by one. */
static void run_steps(const char *backend, bool merged, bool spread, char *outs, float *lses) {
    dp_config config = small_config();
    config.backend = backend;
    config.ranks = spread ? 2 : 1;
    const attn_geometry *geometry = &config.geometry;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handles[MERGED],
        held[2] = {open_sequence(engine, DP_EXPLICIT, 0), open_sequence(engine, DP_EXPLICIT, config.ranks - 1)};
    flight flights[MERGED], blocker[2];
    uint32_t launches = 0;
    for (uint32_t i = 0; i < MERGED; i++) {
        handles[i] = open_sequence(engine, spread && i % 2 == 0 ? DP_SPREAD : DP_LEAST_TOKENS, 0);
        grow(engine, handles[i], 300 + 211 * i, i);
    }
    if (merged) {
        hold_rank(&blocker[0], engine, held[0]);
        if (spread) {
            board(&blocker[1], engine, &held[1], 1, true, 1);
            assert_ok(try_start(&blocker[1], 2, NULL));
            wait_until_held(2);
        }
    }
    for (uint32_t r = 0; r < config.ranks; r++)
        launches += rank_info(engine, r).launches;
    for (uint32_t i = 0; i < MERGED; i++) {
        dp_options options = {.batch_invariant = true, .return_lse = i % 2 == 0};
        board(&flights[i], engine, &handles[i], 1, false, 100 + i);
        assert_ok(try_start(&flights[i], 0, &options));
        if (!merged) assert_ok(wait_for_call(&flights[i].call));
    }
    if (merged) {
        release_rank(&blocker[0]);
        if (spread) release_rank(&blocker[1]);
    }
    for (uint32_t i = 0; i < MERGED; i++) {
        assert_ok(wait_for_call(&flights[i].call));
        const dp_layer_call *call = &flights[i].call.call;
        if (!spread) assert_int_equal(merged ? MERGED : 1, call->timing[0].merged_calls);
        memcpy(outs + i * attn_out_row_bytes(geometry), call->result->out, attn_out_row_bytes(geometry));
        if (i % 2 == 0)
            memcpy(lses + i * 4, call->result->lse, 4 * sizeof(float));
        else
            assert_null(call->result->lse);
        land(&flights[i]);
    }
    uint32_t calls = 0, all_launches = 0;
    for (uint32_t r = 0; r < config.ranks; r++) {
        calls += rank_info(engine, r).calls;
        all_launches += rank_info(engine, r).launches;
    }
    if (merged) {
        assert_int_equal(spread ? 4 : 2, all_launches); /* a blocker and all the rest, on each rank */
        assert_int_equal(launches, 0);
    } else {
        assert_int_equal(calls, all_launches);
    }
    assert_ok(dp_sequences_close(engine, TENANT, handles, MERGED));
    assert_ok(dp_sequences_close(engine, TENANT, held, 2));
    destroy_engine(engine);
}

static void check_merging(const char *backend, bool spread) {
    char outs[2][MERGED * 4 * 40 * sizeof(float)];
    float lses[2][MERGED * 4] = {{0}};
    for (int merged = 0; merged < 2; merged++)
        run_steps(backend, merged, spread, outs[merged], lses[merged]);
    assert_memory_equal(outs[0], outs[1], sizeof outs[0]);
    assert_memory_equal(lses[0], lses[1], sizeof lses[0]);
}

static void merged_calls_give_the_bits_of_single_ones(void **state) {
    (void)state;
    check_merging("reference", false);
    check_merging("cpu", false);
}

static void merged_calls_of_spread_sequences_do_too(void **state) {
    (void)state;
    check_merging("reference", true);
    check_merging("cpu", true);
}

/*
 * Layer 0 of two steps, each of a sequence, two forks of a prompt of its own and their parent, merged or one by one.
 * The backend refuses members that do not share pages, as those of the other step do not.
 */
static void run_steps_of_forks(bool merged, char *outs) {
    enum { STEPS = 2, EACH = 4 };
    dp_config config = small_config();
    size_t out_bytes = EACH * attn_out_row_bytes(&config.geometry);
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handles[STEPS][EACH], held = open_sequence(engine, DP_LEAST_TOKENS, 0);
    flight flights[STEPS], blocker;
    for (uint32_t n = 0; n < STEPS; n++) {
        handles[n][0] = open_sequence(engine, DP_LEAST_TOKENS, 0);
        grow(engine, handles[n][0], 20 + n, 50 + n);
        handles[n][2] = open_sequence(engine, DP_LEAST_TOKENS, 0);
        grow(engine, handles[n][2], 600 + n, 60 + n);
        handles[n][1] = fork_sequence(engine, handles[n][2], 520);
        handles[n][3] = fork_sequence(engine, handles[n][2], 600);
    }
    if (merged) hold_rank(&blocker, engine, held);
    for (uint32_t n = 0; n < STEPS; n++) {
        board(&flights[n], engine, handles[n], EACH, false, 100 + n);
        assert_ok(try_start(&flights[n], 0, NULL));
        if (!merged) assert_ok(wait_for_call(&flights[n].call));
    }
    if (merged) release_rank(&blocker);
    for (uint32_t n = 0; n < STEPS; n++) {
        assert_ok(wait_for_call(&flights[n].call));
        assert_int_equal(merged ? STEPS : 1, flights[n].call.call.timing[0].merged_calls);
        memcpy(outs + n * out_bytes, flights[n].call.call.result->out, out_bytes);
    }
    assert_int_equal(merged ? STEPS : 1, prefixes_of_last_launch());
    assert_int_equal(STEPS * 2 * ATTN_CHUNK_TOKENS, rank_info(engine, 0).prefix_tokens_shared);
    for (uint32_t n = 0; n < STEPS; n++) {
        land(&flights[n]);
        assert_ok(dp_sequences_close(engine, TENANT, handles[n], EACH));
    }
    close_sequence(engine, held);
    destroy_engine(engine);
}

static void merged_calls_keep_the_prefixes_of_each(void **state) {
    (void)state;
    char outs[2][2 * 4 * 4 * 40 * sizeof(float)];
    for (int merged = 0; merged < 2; merged++)
        run_steps_of_forks(merged, outs[merged]);
    assert_memory_equal(outs[0], outs[1], sizeof outs[0]);
}

static void calls_that_differ_are_not_merged(void **state) {
    (void)state;
    enum { KINDS = 9 };
    dp_config config = small_config();
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handles[KINDS], held = open_sequence(engine, DP_LEAST_TOKENS, 0);
    float sinks[4] = {1, 2, 3, 4}, same_sinks[4] = {1, 2, 3, 4};
    /* Each differs from the first in one thing; but the sinks' values are the same. */
    static const uint32_t first_with_sinks = 5, first_read = 7;
    dp_options options[KINDS] = {[1] = {.window = 5},
                                 [2] = {.softcap = 2},
                                 [3] = {.scale = 0.5f},
                                 [4] = {.batch_invariant = true},
                                 [5] = {.sinks = sinks, .sink_count = 4},
                                 [6] = {.sinks = same_sinks, .sink_count = 4}};
    flight flights[KINDS], blocker;
    hold_rank(&blocker, engine, held);
    for (uint32_t i = 0; i < KINDS; i++) {
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
        board(&flights[i], engine, &handles[i], 1, i >= first_read, 1);
        assert_ok(try_start(&flights[i], i == KINDS - 1 ? 1 : 0, &options[i]));
    }
    release_rank(&blocker);
    for (uint32_t i = 0; i < KINDS; i++) {
        assert_ok(wait_for_call(&flights[i].call));
        bool joined = i == first_with_sinks || i == first_with_sinks + 1;
        assert_int_equal(joined ? 2 : 1, flights[i].call.call.timing[0].merged_calls);
        land(&flights[i]);
    }
    assert_ok(dp_sequences_close(engine, TENANT, handles, KINDS));
    close_sequence(engine, held);
    destroy_engine(engine);
}

static void launch_is_no_larger_than_the_largest_batch(void **state) {
    (void)state;
    dp_config config = small_config();
    config.max_batch = 3;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handles[6], held = open_sequence(engine, DP_LEAST_TOKENS, 0);
    flight flights[3], blocker;
    hold_rank(&blocker, engine, held);
    for (int i = 0; i < 6; i++)
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
    board(&flights[0], engine, handles, 2, false, 1);
    board(&flights[1], engine, handles + 2, 2, false, 1);
    board(&flights[2], engine, handles + 4, 1, false, 1);
    for (int i = 0; i < 3; i++)
        assert_ok(try_start(&flights[i], 0, NULL));
    release_rank(&blocker);
    for (int i = 0; i < 3; i++) {
        assert_ok(wait_for_call(&flights[i].call));
        assert_int_equal(i == 1 ? 1 : 2, flights[i].call.call.timing[0].merged_calls);
        land(&flights[i]);
    }
    assert_ok(dp_sequences_close(engine, TENANT, handles, 6));
    close_sequence(engine, held);
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Queues, deadlines, cancellation */

static void full_queue_refuses_and_the_step_goes_on_later(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    config.max_queue = 2;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t held = open_sequence(engine, DP_EXPLICIT, 1), waiting[2], both[2];
    flight blocker, waiters[2], refused;
    for (int i = 0; i < 2; i++)
        waiting[i] = open_sequence(engine, DP_EXPLICIT, 1);
    for (uint32_t i = 0; i < 2; i++)
        both[i] = open_sequence(engine, DP_EXPLICIT, i);
    hold_rank(&blocker, engine, held);
    for (int i = 0; i < 2; i++) {
        board(&waiters[i], engine, &waiting[i], 1, false, 1);
        assert_ok(try_start(&waiters[i], 0, NULL));
    }
    assert_int_equal(2, rank_info(engine, 1).queue_depth);
    board(&refused, engine, both, 2, false, 1);
    assert_error(ATTN_RESOURCE_EXHAUSTED, try_start(&refused, 0, NULL), "queue: rank 1 has 2 calls waiting");
    free_call(&refused.call);
    assert_int_equal(0, rank_info(engine, 0).queue_depth); /* nothing was left on the rank that had room */
    assert_int_equal(0, dp_step_next_layer(refused.step));
    dp_upload *upload;
    uint64_t fresh = open_sequence(engine, DP_EXPLICIT, 1);
    assert_ok(dp_upload_begin(engine, TENANT, fresh, 1, &upload));
    assert_code(ATTN_RESOURCE_EXHAUSTED, try_chunk(upload, &config.geometry, 0, &refused.rows, 0, 1, NULL));
    release_rank(&blocker);
    for (int i = 0; i < 2; i++) {
        assert_ok(wait_for_call(&waiters[i].call));
        land(&waiters[i]);
    }
    assert_ok(try_chunk(upload, &config.geometry, 0, &refused.rows, 0, 1, NULL));
    dp_upload_end(upload);
    assert_ok(try_start(&refused, 0, NULL));
    assert_ok(wait_for_call(&refused.call));
    land(&refused);
    assert_ok(
        dp_sequences_close(engine, TENANT, (uint64_t[]){held, waiting[0], waiting[1], both[0], both[1], fresh}, 6));
    destroy_engine(engine);
}

static void deadline_that_passes_in_the_queue_drops_the_call(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t held = open_sequence(engine, DP_EXPLICIT, 1), both[2];
    for (uint32_t i = 0; i < 2; i++)
        both[i] = open_sequence(engine, DP_EXPLICIT, i);
    grow(engine, both[1], 16, 1);
    flight blocker, late;
    hold_rank(&blocker, engine, held);
    board(&late, engine, both, 2, false, 1);
    prepare_call(&late.call, &config.geometry, 0, &late.rows, NULL, NULL);
    late.call.call.deadline_ns = attn_now_ns() + 2000000;
    assert_ok(start_call(late.step, &late.call));
    usleep(4000);
    release_rank(&blocker);
    assert_code(ATTN_DEADLINE_EXCEEDED, wait_for_call(&late.call));
    assert_null(late.call.call.result);
    assert_int_equal(1, rank_info(engine, 1).launches); /* the blocker's only */
    assert_int_equal(16, describe(engine, both[1]).length);
    assert_false(describe(engine, both[1]).busy);
    assert_int_equal(511, pages_free(engine));
    land(&late);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){held, both[0], both[1]}, 3));
    destroy_engine(engine);
}

static void cancelled_call_comes_back_though_its_rank_is_held(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t held = open_sequence(engine, DP_LEAST_TOKENS, 0), handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    flight blocker, cancelled;
    hold_rank(&blocker, engine, held);
    board(&cancelled, engine, &handle, 1, false, 1);
    assert_ok(try_start(&cancelled, 0, NULL));
    assert_int_equal(1, rank_info(engine, 0).queue_depth);
    dp_layer_cancel(cancelled.step);
    assert_code(ATTN_CANCELLED, wait_for_call(&cancelled.call));
    assert_int_equal(0, rank_info(engine, 0).queue_depth);
    assert_int_equal(config.pages_per_rank, pages_free(engine));
    dp_layer_cancel(cancelled.step); /* nothing is in flight: nothing happens */
    dp_layer_cancel(blocker.step);   /* it has started: it goes on */
    land(&cancelled);
    release_rank(&blocker);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){held, handle}, 2));
    destroy_engine(engine);
}

static void step_ended_in_flight_is_aborted_when_its_ranks_are_done(void **state) {
    (void)state;
    dp_config config = small_config();
    config.geometry.layers = 1; /* the layer in flight would commit */
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    flight flight;
    close_gate();
    board(&flight, engine, &handle, 1, false, 1);
    assert_ok(try_start(&flight, 0, NULL));
    wait_until_held(1);
    dp_step_end(flight.step);
    assert_true(describe(engine, handle).busy); /* its pages are being written to */
    assert_code(ATTN_ABORTED, dp_sequences_close(engine, TENANT, &handle, 1));
    open_gate();
    assert_code(ATTN_CANCELLED, wait_for_call(&flight.call));
    assert_int_equal(0, describe(engine, handle).length);
    assert_false(describe(engine, handle).busy);
    free_call(&flight.call);
    free_rows(&flight.rows);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static atomic_int chunk_outcome;

static void note_chunk_outcome(dp_upload_chunk *chunk, attn_status status) {
    (void)chunk;
    atomic_store(&chunk_outcome, (int)status.code);
}

static void upload_ended_in_flight_gives_its_pages_back_when_written(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t held = open_sequence(engine, DP_LEAST_TOKENS, 0), handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    flight blocker;
    hold_rank(&blocker, engine, held);
    dice dice = {1};
    layer_rows rows = random_rows(&dice, &config.geometry, 1, false);
    tensor keys = whole_tensor(rows.k, attn_key_row_bytes(&config.geometry));
    tensor values = whole_tensor(rows.v, attn_value_row_bytes(&config.geometry));
    dp_upload_chunk chunk = {.tokens = 1, .keys = keys.view, .values = values.view, .done = note_chunk_outcome};
    dp_upload *upload;
    atomic_store(&chunk_outcome, -1);
    assert_ok(dp_upload_begin(engine, TENANT, handle, 20, &upload));
    assert_ok(dp_upload_write(upload, &chunk));
    dp_upload_end(upload);
    assert_int_equal(-1, atomic_load(&chunk_outcome));
    assert_int_equal(config.pages_per_rank - 2, pages_free(engine));
    release_rank(&blocker);
    while (atomic_load(&chunk_outcome) < 0)
        usleep(100);
    assert_int_equal(ATTN_CANCELLED, atomic_load(&chunk_outcome));
    assert_int_equal(config.pages_per_rank, pages_free(engine));
    free_tensor(&keys);
    free_tensor(&values);
    free_rows(&rows);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){held, handle}, 2));
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Failures and lost ranks */

static void failure_on_one_rank_aborts_the_step_on_all(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t both[2] = {open_sequence(engine, DP_EXPLICIT, 0), open_sequence(engine, DP_SPREAD, 1)};
    grow(engine, both[0], 16, 1);
    grow(engine, both[1], 700, 1);
    uint64_t free = pages_free(engine);
    flight flight;
    board(&flight, engine, both, 2, false, 1);
    make_launches_fail(ATTN_INTERNAL, 1);
    assert_ok(try_start(&flight, 0, NULL));
    assert_error(ATTN_INTERNAL, wait_for_call(&flight.call), "on fire");
    make_launches_fail(ATTN_OK, UINT32_MAX);
    free_call(&flight.call);
    assert_int_equal(free, pages_free(engine));
    assert_int_equal(16, describe(engine, both[0]).length);
    assert_error(ATTN_ABORTED, try_start(&flight, 1, NULL), "aborted");
    land(&flight);
    assert_int_equal(DP_RANK_SERVING, rank_info(engine, 1).state);
    dice dice = {1};
    grow_by_step(engine, &config.geometry, &dice, both, NULL, 2);
    assert_ok(dp_sequences_close(engine, TENANT, both, 2));
    destroy_engine(engine);
}

static void lost_rank_takes_its_own_sequences_and_no_others(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 3;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handles[3], spread = open_sequence(engine, DP_SPREAD, 0), other;
    uint32_t rank, ranks[4];
    for (uint32_t i = 0; i < 3; i++)
        handles[i] = open_sequence(engine, DP_EXPLICIT, i);
    for (uint32_t i = 0; i < 3; i++)
        grow(engine, handles[i], 20, i);
    dp_step *open = begin_step(engine, &handles[1], NULL, 1, false);
    dp_upload *upload;
    assert_ok(dp_upload_begin(engine, TENANT, spread, 600, &upload));
    dp_engine_fail_rank(engine, 1);
    assert_int_equal(DP_RANK_LOST, rank_info(engine, 1).state);

    dice dice = {1};
    layer_rows row = random_rows(&dice, &config.geometry, 1, false),
               rows = random_rows(&dice, &config.geometry, 600, false);
    const char *text = "rank 1";
    assert_error(ATTN_UNAVAILABLE, try_layer(open, &config.geometry, 0, &row, NULL, NULL, NULL, NULL), text);
    dp_step_end(open);
    assert_error(ATTN_UNAVAILABLE, try_chunk(upload, &config.geometry, 0, &rows, 0, 600, NULL), text);
    dp_upload_end(upload);
    dp_step *step;
    assert_error(ATTN_UNAVAILABLE, try_begin_step(engine, handles, NULL, 3, false, &step), "sequences[1]: rank 1");
    assert_error(ATTN_UNAVAILABLE, try_begin_step(engine, &handles[1], NULL, 1, true, &step), text);
    assert_error(ATTN_UNAVAILABLE, dp_upload_begin(engine, TENANT, handles[1], 1, &upload), text);
    assert_error(ATTN_UNAVAILABLE, dp_upload_begin(engine, TENANT, spread, 1, &upload), text);
    assert_error(ATTN_UNAVAILABLE, dp_sequence_fork(engine, TENANT, handles[1], 1, &other, &rank), text);
    assert_error(ATTN_UNAVAILABLE, dp_sequences_open(engine, TENANT, 1, DP_EXPLICIT, 1, &other, &rank), text);
    assert_error(ATTN_UNAVAILABLE, dp_sequences_open(engine, TENANT, 1, DP_SPREAD, 0, &other, &rank), text);

    uint64_t healthy[2] = {handles[0], handles[2]}, opened[4];
    grow_by_step(engine, &config.geometry, &dice, healthy, NULL, 2);
    assert_int_equal(20, describe(engine, handles[1]).length);
    assert_ok(dp_sequences_open(engine, TENANT, 4, DP_LEAST_TOKENS, 0, opened, ranks));
    for (int i = 0; i < 4; i++)
        assert_true(ranks[i] != 1);
    assert_ok(dp_sequences_close(engine, TENANT, opened, 4));
    assert_ok(dp_sequences_open(engine, TENANT, 4, DP_ROUND_ROBIN, 0, opened, ranks));
    for (int i = 0; i < 4; i++)
        assert_true(ranks[i] != 1);
    assert_ok(dp_sequences_close(engine, TENANT, opened, 4));
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    close_sequence(engine, spread);
    free_rows(&row);
    free_rows(&rows);
    destroy_engine(engine);
}

static void calls_waiting_for_a_rank_that_is_lost_end_at_once(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t held = open_sequence(engine, DP_LEAST_TOKENS, 0), handles[3];
    flight blocker, waiting[3];
    hold_rank(&blocker, engine, held);
    for (int i = 0; i < 3; i++) {
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
        board(&waiting[i], engine, &handles[i], 1, false, 1);
        assert_ok(try_start(&waiting[i], 0, NULL));
    }
    dp_engine_fail_rank(engine, 0);
    for (int i = 0; i < 3; i++) {
        assert_error(ATTN_UNAVAILABLE, wait_for_call(&waiting[i].call), "rank 0 is lost");
        land(&waiting[i]);
    }
    /* The one that is at work too: what its launch does when it comes back is nobody's concern. */
    assert_error(ATTN_UNAVAILABLE, wait_for_call(&blocker.call), "rank 0 is lost");
    land(&blocker);
    open_gate();
    wait_until_none_is_detained();
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    close_sequence(engine, held);
    destroy_engine(engine);
}

static void device_that_reports_itself_gone_is_a_lost_rank(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 1);
    flight flight;
    make_launches_fail(ATTN_UNAVAILABLE, 1);
    board(&flight, engine, &handle, 1, false, 1);
    assert_ok(try_start(&flight, 0, NULL));
    assert_code(ATTN_UNAVAILABLE, wait_for_call(&flight.call));
    make_launches_fail(ATTN_OK, UINT32_MAX);
    land(&flight);
    assert_int_equal(DP_RANK_LOST, rank_info(engine, 1).state);
    assert_int_equal(DP_RANK_SERVING, rank_info(engine, 0).state);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void rank_without_work_launches_nothing(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 4;
    dp_engine *engine = create_queueing_engine(&config);
    uint64_t handles[3] = {open_sequence(engine, DP_EXPLICIT, 2), open_sequence(engine, DP_EXPLICIT, 2),
                           open_sequence(engine, DP_SPREAD, 0)}; /* short: on its home rank alone */
    assert_int_equal(0, describe(engine, handles[2]).rank);
    dice dice = {1};
    grow_by_step(engine, &config.geometry, &dice, handles, NULL, 3);
    static const uint32_t launches[4] = {3, 0, 3, 0};
    for (uint32_t r = 0; r < 4; r++) {
        assert_int_equal(launches[r], rank_info(engine, r).launches);
        assert_int_equal(launches[r], rank_info(engine, r).calls);
    }
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Threads */

static void small_call_on_an_idle_rank_runs_on_its_submitter(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handles[2] = {open_sequence(engine, DP_LEAST_TOKENS, 0), open_sequence(engine, DP_LEAST_TOKENS, 0)};
    flight small, big;
    board(&small, engine, &handles[0], 1, false, 1);
    assert_ok(try_start(&small, 0, NULL));
    assert_true(small.call.done);
    assert_true(pthread_equal(pthread_self(), last_launch_thread()));
    land(&small);
    grow(engine, handles[1], 2000, 1);
    board(&big, engine, &handles[1], 1, false, 1);
    assert_ok(try_start(&big, 0, NULL));
    assert_ok(wait_for_call(&big.call));
    assert_false(pthread_equal(pthread_self(), last_launch_thread()));
    land(&big);
    /* While the rank is held, small calls wait like others. */
    close_gate();
    board(&big, engine, &handles[1], 1, false, 1);
    assert_ok(try_start(&big, 0, NULL));
    wait_until_held(1);
    board(&small, engine, &handles[0], 1, false, 1);
    assert_ok(try_start(&small, 0, NULL));
    assert_int_equal(1, rank_info(engine, 0).queue_depth);
    open_gate();
    assert_ok(wait_for_call(&big.call));
    assert_ok(wait_for_call(&small.call));
    land(&big);
    land(&small);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 2));
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merged_calls_give_the_bits_of_single_ones),
        cmocka_unit_test(merged_calls_of_spread_sequences_do_too),
        cmocka_unit_test(merged_calls_keep_the_prefixes_of_each),
        cmocka_unit_test(calls_that_differ_are_not_merged),
        cmocka_unit_test(launch_is_no_larger_than_the_largest_batch),
        cmocka_unit_test(full_queue_refuses_and_the_step_goes_on_later),
        cmocka_unit_test(deadline_that_passes_in_the_queue_drops_the_call),
        cmocka_unit_test(cancelled_call_comes_back_though_its_rank_is_held),
        cmocka_unit_test(step_ended_in_flight_is_aborted_when_its_ranks_are_done),
        cmocka_unit_test(upload_ended_in_flight_gives_its_pages_back_when_written),
        cmocka_unit_test(failure_on_one_rank_aborts_the_step_on_all),
        cmocka_unit_test(lost_rank_takes_its_own_sequences_and_no_others),
        cmocka_unit_test(calls_waiting_for_a_rank_that_is_lost_end_at_once),
        cmocka_unit_test(device_that_reports_itself_gone_is_a_lost_rank),
        cmocka_unit_test(rank_without_work_launches_nothing),
        cmocka_unit_test(small_call_on_an_idle_rank_runs_on_its_submitter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
