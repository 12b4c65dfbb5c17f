/*
 * Faults: ranks that stall, are lost and come back; backends that return late; what becomes of sequences,
 * steps, uploads and exports meanwhile.
 *
 * The linker puts this file's attn_backend_create and attn_backend_start in front of the real ones (--wrap),
 * so that a test can hold a launch, or have one or a restart fail. Elsewhere ranks are made to hang by
 * dp_engine_stall_rank, which holds them right before their backend, with everything in hand.
 */
#define _GNU_SOURCE
#include "dp/tests/fixture.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "dp/state.h"

#define MS INT64_C(1000000)

/* From the stall's discovery on, the promise of dp/engine.h. */
#define PROMISED_NS (1000 * MS)

/* ------------------------------------------------------------------------------------------- */
/* In front of the backends */

static struct {
    pthread_mutex_t lock; /* guards all */
    pthread_cond_t changed;
    bool closed;
    bool creation_closed;
    uint32_t creating; /* creations that wait at their own gate */
    uint32_t held;     /* launches that wait at the gate */
    attn_code fails;   /* what launches end with, unless ATTN_OK */
    uint32_t refusals; /* creations to come that fail */
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

attn_status __real_attn_backend_create(const attn_backend_config *config, attn_backend **backend);
attn_status __wrap_attn_backend_create(const attn_backend_config *config, attn_backend **backend);
attn_status __real_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan);
attn_status __wrap_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan);

attn_status __wrap_attn_backend_create(const attn_backend_config *config, attn_backend **backend) {
    pthread_mutex_lock(&gate.lock);
    bool refused = gate.refusals > 0;
    if (refused) gate.refusals--;
    gate.creating++;
    while (gate.creation_closed)
        pthread_cond_wait(&gate.changed, &gate.lock);
    gate.creating--;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
    if (refused) return attn_error(ATTN_RESOURCE_EXHAUSTED, "the device has no memory left");
    return __real_attn_backend_create(config, backend);
}

attn_status __wrap_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan) {
    pthread_mutex_lock(&gate.lock);
    gate.held++;
    pthread_cond_broadcast(&gate.changed);
    while (gate.closed)
        pthread_cond_wait(&gate.changed, &gate.lock);
    gate.held--;
    attn_code fails = gate.fails;
    pthread_mutex_unlock(&gate.lock);
    if (fails != ATTN_OK) return attn_error(fails, "the device is on fire");
    return __real_attn_backend_start(backend, batch, plan);
}

static void set_gate(bool closed) {
    pthread_mutex_lock(&gate.lock);
    gate.closed = closed;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
}

static void wait_until_held(uint32_t launches) {
    pthread_mutex_lock(&gate.lock);
    while (gate.held < launches)
        pthread_cond_wait(&gate.changed, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
}

static void close_creation(void) {
    pthread_mutex_lock(&gate.lock);
    gate.creation_closed = true;
    pthread_mutex_unlock(&gate.lock);
}

/* And waits until all who were held there have gone on. */
static void open_creation(void) {
    pthread_mutex_lock(&gate.lock);
    gate.creation_closed = false;
    pthread_cond_broadcast(&gate.changed);
    while (gate.creating > 0)
        pthread_cond_wait(&gate.changed, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
}

static void make_launches_fail(attn_code code) {
    pthread_mutex_lock(&gate.lock);
    gate.fails = code;
    pthread_mutex_unlock(&gate.lock);
}

static void refuse_creations(uint32_t count) {
    pthread_mutex_lock(&gate.lock);
    gate.refusals = count;
    pthread_mutex_unlock(&gate.lock);
}

/* ------------------------------------------------------------------------------------------- */

static dp_config faulty_config(uint32_t ranks) {
    dp_config config = small_config();
    config.ranks = ranks;
    config.rank_stall_ns = STALL_NS;
    return config;
}

/* Until nothing waits for the rank any more: what was submitted is being run. */
static void wait_until_at_work(dp_engine *engine, uint32_t rank) {
    while (rank_info(engine, rank).queue_depth > 0)
        usleep(200);
}

/* A step of one sequence or more with a call in flight. */
typedef struct {
    dp_step *step;
    layer_rows rows;
    waiting_call call;
    int64_t started_ns;
} flight;

static void take_off(flight *flight, dp_engine *engine, const uint64_t *handles, uint32_t count, bool read_only,
                     const dp_options *options) {
    dice dice = {7};
    const attn_geometry *geometry = &engine->config.geometry;
    flight->step = begin_step(engine, handles, NULL, count, read_only);
    flight->rows = random_rows(&dice, geometry, count, read_only);
    prepare_call(&flight->call, geometry, 0, &flight->rows, options, NULL);
    flight->started_ns = attn_now_ns();
    assert_ok(start_call(flight->step, &flight->call));
}

static void land(flight *flight) {
    free_call(&flight->call);
    free_rows(&flight->rows);
    dp_step_end(flight->step);
}

/* Waits until the call has ended because its rank was lost, soon enough. */
static void expect_crash(flight *flight) {
    assert_error(ATTN_UNAVAILABLE, wait_for_call(&flight->call), "is lost");
    assert_true(attn_now_ns() - flight->started_ns < STALL_NS + PROMISED_NS);
    assert_null(flight->call.call.result);
}

/* ------------------------------------------------------------------------------------------- */
/* Stalls */

static void stalled_rank_ends_its_calls_and_may_come_back_late(void **state) {
    (void)state;
    static const float sinks[4] = {1, 2, 3, 4};
    dp_options options = {.return_lse = true, .sinks = sinks, .sink_count = 4};
    dp_config config = faulty_config(2);
    dp_engine *engine = create_engine(&config);
    uint64_t stuck[3], other = open_sequence(engine, DP_EXPLICIT, 0);
    for (int i = 0; i < 3; i++)
        stuck[i] = open_sequence(engine, DP_EXPLICIT, 1);
    fill(engine, stuck[0], 100, 1);
    fill(engine, other, 100, 1);
    dp_engine_stall_rank(engine, 1);
    flight flights[3];
    take_off(&flights[0], engine, &stuck[0], 1, false, &options);
    wait_until_at_work(engine, 1);
    for (int i = 1; i < 3; i++)
        take_off(&flights[i], engine, &stuck[i], 1, i == 2, &options);
    dice dice = {1};
    grow_by_step(engine, &config.geometry, &dice, &other, NULL, 1); /* the other rank goes on */
    for (int i = 0; i < 3; i++)
        expect_crash(&flights[i]);
    assert_true(flights[0].call.call.detained);
    assert_false(flights[1].call.call.detained);
    assert_int_equal(1, detained_now());
    for (int i = 0; i < 3; i++)
        land(&flights[i]);
    dp_rank_info info = rank_info(engine, 1);
    assert_int_equal(DP_RANK_LOST, info.state);
    assert_int_equal(1, info.stalls);
    assert_int_equal(1, info.losses);
    assert_non_null(strstr(info.last_error, "stalled"));
    assert_int_equal(0, info.queue_depth);
    assert_int_equal(DP_RANK_SERVING, rank_info(engine, 0).state);
    assert_int_equal(1, detained_now());
    dp_engine_release_rank(engine, 1);
    wait_until_none_is_detained();
    assert_int_equal(1, rank_info(engine, 1).launches); /* the late one did run */
    assert_ok(dp_sequences_close(engine, TENANT, stuck, 3));
    close_sequence(engine, other);
    destroy_engine(engine);
}

static void merged_calls_of_a_stalled_rank_all_end(void **state) {
    (void)state;
    dp_config config = faulty_config(1);
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    uint64_t handles[4];
    flight flights[4];
    for (int i = 0; i < 4; i++)
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
    set_gate(true);
    take_off(&flights[0], engine, &handles[0], 1, false, NULL);
    wait_until_held(1);
    for (int i = 1; i < 4; i++)
        take_off(&flights[i], engine, &handles[i], 1, false, NULL);
    dp_engine_stall_rank(engine, 0);
    set_gate(false);
    assert_ok(wait_for_call(&flights[0].call));
    for (int i = 1; i < 4; i++) {
        expect_crash(&flights[i]);
        assert_true(flights[i].call.call.detained);
    }
    assert_int_equal(3, detained_now());
    for (int i = 0; i < 4; i++)
        land(&flights[i]);
    dp_engine_release_rank(engine, 0);
    wait_until_none_is_detained();
    assert_ok(dp_sequences_close(engine, TENANT, handles, 4));
    destroy_engine(engine);
}

static void busy_rank_is_not_taken_for_a_stalled_one(void **state) {
    (void)state;
    dp_config config = faulty_config(1);
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dice dice = {1};
    for (int64_t end = attn_now_ns() + 2 * STALL_NS; attn_now_ns() < end;) {
        grow_by_step(engine, &config.geometry, &dice, &handle, NULL, 1);
        dp_sequence_truncate(engine, TENANT, handle, 0);
    }
    usleep((useconds_t)(2 * STALL_NS / 1000)); /* nor is an idle one */
    assert_int_equal(DP_RANK_SERVING, rank_info(engine, 0).state);
    grow_by_step(engine, &config.geometry, &dice, &handle, NULL, 1);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

typedef struct {
    dp_export_chunk chunk; /* first */
    dp_export *export;
    char *memory;
    atomic_int code; /* -1: not done */
} waiting_read;

static atomic_bool read_memory_released;

static void release_read_memory(void *memory) {
    free(memory);
    atomic_store(&read_memory_released, true);
}

static void read_done(dp_export_chunk *chunk, attn_status status) {
    waiting_read *waiting = (waiting_read *)chunk;
    if (chunk->detained) {
        dp_export_keep(waiting->export, (dp_keep){.release = release_read_memory, .context = waiting->memory});
    }
    atomic_store(&waiting->code, (int)status.code);
}

static void uploads_and_exports_of_a_stalled_rank_end(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    dp_engine *engine = create_engine(&config);
    const attn_geometry *geometry = &config.geometry;
    uint64_t uploaded = open_sequence(engine, DP_EXPLICIT, 0), spread = open_sequence(engine, DP_SPREAD, 0);
    fill(engine, spread, 700, 1);
    dice dice = {1};
    layer_rows rows = random_rows(&dice, geometry, 20, false);
    dp_upload *upload;
    assert_ok(dp_upload_begin(engine, TENANT, uploaded, 20, &upload));
    dp_engine_stall_rank(engine, 0);
    assert_error(ATTN_UNAVAILABLE, try_chunk(upload, geometry, 0, &rows, 0, 20, NULL), "rank 0 is lost");
    assert_int_equal(1, detained_now());
    assert_error(ATTN_ABORTED, try_chunk(upload, geometry, 0, &rows, 0, 20, NULL), "aborted");
    dp_upload_end(upload);
    assert_false(describe(engine, uploaded).busy);
    close_sequence(engine, uploaded);
    dp_engine_release_rank(engine, 0);
    wait_until_none_is_detained();
    close_sequence(engine, spread);
    restart_rank(engine, 0);

    spread = open_sequence(engine, DP_SPREAD, 0);
    fill(engine, spread, 700, 1);
    atomic_store(&read_memory_released, false);
    waiting_read waiting = {.code = -1};
    size_t key_bytes = 700 * attn_key_row_bytes(geometry);
    waiting.memory = malloc(key_bytes + 700 * attn_value_row_bytes(geometry));
    assert_ok(dp_export_begin(engine, TENANT, spread, 0, 0, &waiting.export));
    dp_engine_stall_rank(engine, 0);
    waiting.chunk = (dp_export_chunk){
        .tokens = 700, .keys = waiting.memory, .values = waiting.memory + key_bytes, .done = read_done};
    assert_ok(dp_export_read(waiting.export, &waiting.chunk));
    while (atomic_load(&waiting.code) < 0)
        usleep(200);
    assert_int_equal(ATTN_UNAVAILABLE, atomic_load(&waiting.code));
    assert_true(waiting.chunk.detained);
    dp_export_end(waiting.export);
    close_sequence(engine, spread);
    assert_int_equal(config.pages_per_rank, rank_info(engine, 1).pages_free); /* a healthy rank's pages do not wait */
    assert_false(atomic_load(&read_memory_released));
    dp_engine_release_rank(engine, 0);
    while (!atomic_load(&read_memory_released))
        usleep(200);
    free_rows(&rows);
    destroy_engine(engine);
}

static void spread_sequence_fails_with_one_of_its_ranks_and_frees_the_others(void **state) {
    (void)state;
    dp_config config = faulty_config(3);
    dp_engine *engine = create_engine(&config);
    uint64_t spread = open_sequence(engine, DP_SPREAD, 0), alone = open_sequence(engine, DP_EXPLICIT, 0);
    fill(engine, spread, 2000, 1);
    char before[OUT_BYTES], after[OUT_BYTES];
    read_outputs(engine, spread, before);
    dp_engine_stall_rank(engine, 2);
    flight flight;
    take_off(&flight, engine, (uint64_t[]){alone, spread}, 2, false, NULL);
    expect_crash(&flight);
    land(&flight);
    assert_false(describe(engine, alone).busy);
    dice dice = {1};
    grow_by_step(engine, &config.geometry, &dice, &alone, NULL, 1);
    restart_rank(engine, 2);
    dp_step *step;
    assert_error(ATTN_UNAVAILABLE, try_begin_step(engine, &spread, NULL, 1, true, &step), "rank 2, which held it");
    close_sequence(engine, spread);
    spread = open_sequence(engine, DP_SPREAD, 0);
    fill(engine, spread, 2000, 1);
    dp_engine_release_rank(engine, 2);
    wait_until_none_is_detained();
    read_outputs(engine, spread, after);
    assert_memory_equal(before, after, OUT_BYTES);
    close_sequence(engine, spread);
    close_sequence(engine, alone);
    destroy_engine(engine);
}

static void loss_does_not_wait_for_the_call_at_work(void **state) {
    (void)state;
    dp_config config = faulty_config(1);
    config.rank_stall_ns = 0;
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    flight flight;
    set_gate(true);
    take_off(&flight, engine, &handle, 1, false, NULL);
    wait_until_held(1);
    dp_engine_fail_rank(engine, 0);
    assert_true(flight.call.done); /* from within */
    expect_crash(&flight);
    land(&flight);
    dp_engine_fail_rank(engine, 0); /* it is lost already */
    assert_int_equal(1, rank_info(engine, 0).losses);
    set_gate(false);
    wait_until_none_is_detained();
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void engine_may_be_destroyed_while_a_backend_hangs(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 1);
    flight flight;
    set_gate(true);
    take_off(&flight, engine, &handle, 1, false, NULL);
    wait_until_held(1);
    expect_crash(&flight);
    land(&flight);
    close_sequence(engine, handle);
    destroy_engine(engine);
    assert_int_equal(1, detained_now());
    set_gate(false);
    wait_until_none_is_detained();
}

static atomic_int slow_callback; /* 1: it has been called, 2: and is over */

static void call_back_slowly(dp_layer_call *call, attn_status status) {
    (void)status;
    dp_result_release(call->result);
    atomic_store(&slow_callback, 1);
    usleep(100000);
    atomic_store(&slow_callback, 2);
}

/* Its worker is retired while it is in a callback: nobody abandons that, and the engine waits for it. */
static void engine_waits_for_the_callbacks_of_a_lost_rank(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    uint64_t handle = open_sequence(engine, DP_EXPLICIT, 1);
    dice dice = {7};
    layer_rows rows = random_rows(&dice, &config.geometry, 1, false);
    waiting_call call;
    dp_step *step = begin_step(engine, &handle, NULL, 1, false);
    prepare_call(&call, &config.geometry, 0, &rows, NULL, NULL);
    call.call.done = call_back_slowly;
    assert_ok(dp_step_layer(step, &call.call));
    while (atomic_load(&slow_callback) == 0)
        usleep(200);
    dp_engine_fail_rank(engine, 1);
    dp_step_end(step);
    close_sequence(engine, handle);
    destroy_engine(engine);
    assert_int_equal(2, atomic_load(&slow_callback));
    call.call.result = NULL;
    free_call(&call);
    free_rows(&rows);
}

/* ------------------------------------------------------------------------------------------- */
/* Restarts */

static void device_that_fails_is_restarted_with_an_empty_pool(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    for (uint64_t small = 0; small < 2; small++) { /* on the worker, and on the submitter */
        dp_engine *engine = create_engine(&config);
        if (small == 0) engine->small_bytes = 0;
        uint64_t old = open_sequence(engine, DP_EXPLICIT, 1), other = open_sequence(engine, DP_EXPLICIT, 0), fresh;
        fill(engine, old, 50, 1);
        fill(engine, other, 50, 2);
        assert_error(ATTN_FAILED_PRECONDITION, dp_engine_restart_rank(engine, 1), "rank: 1 serves");
        assert_error(ATTN_INVALID_ARGUMENT, dp_engine_restart_rank(engine, 2), "ranks 0 .. 1");
        make_launches_fail(ATTN_UNAVAILABLE);
        flight flight;
        take_off(&flight, engine, &old, 1, false, NULL);
        assert_error(ATTN_UNAVAILABLE, wait_for_call(&flight.call), "on fire");
        assert_false(flight.call.call.detained); /* its backend has come back */
        make_launches_fail(ATTN_OK);
        land(&flight);
        assert_string_equal("the device is on fire", rank_info(engine, 1).last_error);
        restart_rank(engine, 1);
        dp_rank_info info = rank_info(engine, 1);
        assert_int_equal(1, info.losses);
        assert_int_equal(0, info.stalls);
        assert_int_equal(1, info.restarts);
        assert_int_equal(config.pages_per_rank, info.pages_free);
        assert_int_equal(0, info.sequences + info.tokens + info.tokens_in_flight);
        fresh = open_sequence(engine, DP_LEAST_TOKENS, 0);
        assert_int_equal(1, describe(engine, fresh).rank);
        char out[2][OUT_BYTES];
        fill(engine, fresh, 50, 2);
        read_outputs(engine, other, out[0]);
        read_outputs(engine, fresh, out[1]);
        assert_memory_equal(out[0], out[1], OUT_BYTES);
        close_sequence(engine, old);
        assert_int_equal(1, rank_info(engine, 1).sequences);
        assert_int_equal(config.pages_per_rank - 4, rank_info(engine, 1).pages_free);
        read_outputs(engine, fresh, out[1]);
        assert_memory_equal(out[0], out[1], OUT_BYTES);
        close_sequence(engine, fresh);
        close_sequence(engine, other);
        destroy_engine(engine);
    }
}

static void device_that_breaks_is_lost_at_its_next_call_and_restarted(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    dp_engine *engine = create_engine(&config);
    uint64_t other = open_sequence(engine, DP_EXPLICIT, 0);
    char expected[OUT_BYTES], out[OUT_BYTES];
    fill(engine, other, 50, 1);
    read_outputs(engine, other, expected);
    for (uint64_t round = 1; round <= 3; round++) {
        uint64_t lost = open_sequence(engine, DP_EXPLICIT, 1), fresh;
        fill(engine, lost, 50, 1);
        dp_engine_break_rank(engine, 1);
        assert_int_equal(DP_RANK_SERVING, rank_info(engine, 1).state); /* nobody knows yet */
        if (round == 1) {
            dice dice = {1};
            assert_code(ATTN_UNAVAILABLE, try_upload(engine, &config.geometry, &dice, &dice, lost, 5));
        } else {
            flight flight;
            take_off(&flight, engine, &lost, 1, round == 2, NULL);
            assert_code(ATTN_UNAVAILABLE, wait_for_call(&flight.call));
            land(&flight);
        }
        wait_for_state(engine, 1, DP_RANK_LOST);
        assert_string_equal("the device is broken, for a test", rank_info(engine, 1).last_error);
        read_outputs(engine, other, out);
        assert_memory_equal(expected, out, OUT_BYTES);
        restart_rank(engine, 1);
        assert_int_equal(round, rank_info(engine, 1).losses);
        close_sequence(engine, lost);
        fresh = open_sequence(engine, DP_EXPLICIT, 1);
        fill(engine, fresh, 50, 1);
        read_outputs(engine, fresh, out);
        assert_memory_equal(expected, out, OUT_BYTES);
        close_sequence(engine, fresh);
    }
    close_sequence(engine, other);
    destroy_engine(engine);
}

static void sequences_from_before_stay_lost_until_they_are_closed(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    uint64_t quotas[TENANTS] = {8};
    config.tenant_max_pages = quotas;
    dp_engine *engine = create_engine(&config);
    uint64_t old = open_sequence(engine, DP_EXPLICIT, 1), spread = open_sequence(engine, DP_SPREAD, 0), other;
    uint32_t rank;
    fill(engine, old, 64, 1);
    uint64_t fork = fork_sequence(engine, old, 40);
    dp_engine_fail_rank(engine, 1);
    restart_rank(engine, 1);
    const char *text = "rank 1, which held it, was lost: close it";
    dp_step *step;
    dp_upload *upload;
    dp_export *export;
    for (int i = 0; i < 2; i++) {
        uint64_t both[2] = {old, spread};
        assert_error(ATTN_UNAVAILABLE, try_begin_step(engine, &both[i], NULL, 1, false, &step), text);
        assert_error(ATTN_UNAVAILABLE, try_begin_step(engine, &both[i], NULL, 1, true, &step), "sequences[0]: rank 1");
        assert_error(ATTN_UNAVAILABLE, dp_upload_begin(engine, TENANT, both[i], 1, &upload), text);
        assert_error(ATTN_UNAVAILABLE, dp_export_begin(engine, TENANT, both[i], 0, 0, &export), text);
        assert_error(ATTN_UNAVAILABLE, dp_sequence_fork(engine, TENANT, both[i], 0, &other, &rank), text);
        assert_error(ATTN_UNAVAILABLE, dp_sequence_truncate(engine, TENANT, both[i], 0), text);
    }
    assert_int_equal(64, describe(engine, old).length);
    assert_int_equal(0, describe(engine, old).shared_pages);
    /* They count for the quota until they are closed. */
    uint64_t fresh = open_sequence(engine, DP_EXPLICIT, 1);
    dice dice = {1};
    assert_error(ATTN_RESOURCE_EXHAUSTED, try_upload(engine, &config.geometry, &dice, &dice, fresh, 64), "quota");
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){old, spread, fork}, 3));
    assert_ok(try_upload(engine, &config.geometry, &dice, &dice, fresh, 64));
    assert_int_equal(config.pages_per_rank - 4, rank_info(engine, 1).pages_free);
    close_sequence(engine, fresh);
    destroy_engine(engine);
}

static void lost_sequences_idle_out(void **state) {
    (void)state;
    dp_config config = faulty_config(1);
    config.sequence_idle_ns = MS;
    dp_engine *engine = create_engine(&config);
    fill(engine, open_sequence(engine, DP_LEAST_TOKENS, 0), 40, 1);
    dp_engine_fail_rank(engine, 0);
    restart_rank(engine, 0);
    usleep(3000);
    dp_engine_reap(engine);
    destroy_engine(engine);
}

static void what_was_open_over_a_restart_ends_without_touching_the_new_pool(void **state) {
    (void)state;
    dp_config config = faulty_config(1);
    dp_engine *engine = create_engine(&config);
    const attn_geometry *geometry = &config.geometry;
    uint64_t handles[4];
    for (uint32_t i = 0; i < 4; i++) {
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
        fill(engine, handles[i], 40, i);
    }
    dice dice = {1};
    layer_rows row = random_rows(&dice, geometry, 1, false), read = random_rows(&dice, geometry, 1, true);
    dp_step *writing = begin_step(engine, &handles[0], NULL, 1, false);
    dp_step *reading = begin_step(engine, &handles[1], NULL, 1, true);
    dp_upload *upload;
    dp_export *export;
    assert_ok(dp_upload_begin(engine, TENANT, handles[2], 100, &upload));
    assert_ok(dp_export_begin(engine, TENANT, handles[3], 0, 0, &export));
    assert_ok(try_layer(writing, geometry, 0, &row, NULL, NULL, NULL, NULL));
    dp_engine_fail_rank(engine, 0);
    restart_rank(engine, 0);
    uint64_t fresh = open_sequence(engine, DP_LEAST_TOKENS, 0);
    fill(engine, fresh, 200, 9);
    char before[OUT_BYTES], after[OUT_BYTES];
    read_outputs(engine, fresh, before);
    uint64_t free = pages_free(engine);
    waiting_read waiting = {.code = -1, .export = export, .chunk = {.tokens = 1, .done = read_done}};
    assert_error(ATTN_UNAVAILABLE, try_layer(writing, geometry, 1, &row, NULL, NULL, NULL, NULL), "rank 0 is lost");
    assert_error(ATTN_UNAVAILABLE, try_layer(reading, geometry, 0, &read, NULL, NULL, NULL, NULL), "rank 0 is lost");
    assert_error(ATTN_UNAVAILABLE, try_chunk(upload, geometry, 0, &row, 0, 1, NULL), "rank 0 is lost");
    assert_error(ATTN_UNAVAILABLE, dp_export_read(export, &waiting.chunk), "rank 0 is lost");
    dp_step_end(writing);
    dp_step_end(reading);
    dp_upload_end(upload);
    dp_export_end(export);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 4));
    assert_int_equal(free, pages_free(engine));
    read_outputs(engine, fresh, after);
    assert_memory_equal(before, after, OUT_BYTES);
    close_sequence(engine, fresh);
    free_rows(&row);
    free_rows(&read);
    destroy_engine(engine);
}

static void rank_is_restarted_while_its_old_backend_still_hangs(void **state) {
    (void)state;
    dp_config config = faulty_config(1);
    dp_engine *engine = create_engine(&config);
    uint64_t old = open_sequence(engine, DP_LEAST_TOKENS, 0);
    fill(engine, old, 40, 1);
    for (uint32_t loss = 1; loss <= 2; loss++) { /* two in a row, both hanging */
        dp_engine_stall_rank(engine, 0);
        flight flight;
        take_off(&flight, engine, &old, 1, false, NULL);
        expect_crash(&flight);
        land(&flight);
        restart_rank(engine, 0);
        close_sequence(engine, old);
        old = open_sequence(engine, DP_LEAST_TOKENS, 0);
        fill(engine, old, 40, 1);
        assert_int_equal(loss, detained_now());
        assert_int_equal(loss, rank_info(engine, 0).stalls);
        assert_int_equal(loss, rank_info(engine, 0).restarts);
    }
    char before[OUT_BYTES], after[OUT_BYTES];
    read_outputs(engine, old, before);
    dp_engine_release_rank(engine, 0);
    wait_until_none_is_detained();
    read_outputs(engine, old, after);
    assert_memory_equal(before, after, OUT_BYTES);
    close_sequence(engine, old);
    destroy_engine(engine);
}

static void delays_double_up_to_their_maximum(void **state) {
    (void)state;
    assert_int_equal(10 * MS, dp_restart_delay(10 * MS, 1));
    assert_int_equal(20 * MS, dp_restart_delay(10 * MS, 2));
    assert_int_equal(80 * MS, dp_restart_delay(10 * MS, 4));
    assert_int_equal(DP_RESTART_MAX_NS, dp_restart_delay(10 * MS, 20));
    assert_int_equal(DP_RESTART_MAX_NS, dp_restart_delay(10 * MS, UINT32_MAX));
    assert_int_equal(DP_RESTART_MAX_NS, dp_restart_delay(2 * DP_RESTART_MAX_NS, 1));
}

static void rank_restarts_by_itself_and_later_each_time(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    config.rank_restart_ns = 50 * MS;
    dp_engine *engine = create_engine(&config);
    for (uint32_t loss = 1; loss <= 3; loss++) {
        int64_t lost_ns = attn_now_ns();
        dp_engine_fail_rank(engine, 1);
        assert_int_equal(DP_RANK_LOST, rank_info(engine, 1).state);
        wait_for_state(engine, 1, DP_RANK_SERVING);
        assert_true(attn_now_ns() - lost_ns >= dp_restart_delay(50 * MS, loss));
        assert_int_equal(loss, rank_info(engine, 1).losses);
        assert_int_equal(loss, rank_info(engine, 1).restarts);
    }
    assert_int_equal(0, rank_info(engine, 0).losses);
    destroy_engine(engine);
}

static void restart_that_fails_is_told_and_tried_again(void **state) {
    (void)state;
    dp_config config = faulty_config(1);
    dp_engine *engine = create_engine(&config);
    dp_engine_fail_rank(engine, 0);
    refuse_creations(1);
    assert_ok(dp_engine_restart_rank(engine, 0));
    while (strcmp(rank_info(engine, 0).last_error, "the device has no memory left") != 0)
        usleep(200);
    wait_for_state(engine, 0, DP_RANK_LOST);
    usleep(100000); /* nobody wants it restarted */
    assert_int_equal(DP_RANK_LOST, rank_info(engine, 0).state);
    restart_rank(engine, 0);
    assert_int_equal(1, rank_info(engine, 0).failed_restarts);
    destroy_engine(engine);

    config.rank_restart_ns = 10 * MS;
    engine = create_engine(&config);
    refuse_creations(2);
    int64_t lost_ns = attn_now_ns();
    dp_engine_fail_rank(engine, 0);
    wait_for_state(engine, 0, DP_RANK_SERVING);
    assert_true(attn_now_ns() - lost_ns >= (10 + 20 + 40) * MS);
    assert_int_equal(1, rank_info(engine, 0).losses);
    assert_int_equal(1, rank_info(engine, 0).restarts);
    assert_int_equal(2, rank_info(engine, 0).failed_restarts);
    destroy_engine(engine);
}

static void restart_that_hangs_holds_up_nobody(void **state) {
    (void)state;
    dp_config config = faulty_config(2);
    for (int waits = 0; waits < 2; waits++) {
        dp_engine *engine = create_engine(&config);
        uint64_t handle = open_sequence(engine, DP_EXPLICIT, 0);
        dice dice = {1};
        dp_engine_fail_rank(engine, 1);
        close_creation();
        assert_ok(dp_engine_restart_rank(engine, 1));
        wait_for_state(engine, 1, DP_RANK_RESTARTING);
        assert_ok(dp_engine_restart_rank(engine, 1)); /* it is under way */
        usleep((useconds_t)(STALL_NS / 500));
        grow_by_step(engine, &config.geometry, &dice, &handle, NULL, 1);
        assert_int_equal(DP_RANK_RESTARTING, rank_info(engine, 1).state);
        close_sequence(engine, handle);
        if (waits) {
            open_creation();
            wait_for_state(engine, 1, DP_RANK_SERVING);
            assert_int_equal(1, rank_info(engine, 1).restarts);
        }
        destroy_engine(engine); /* the worker that is being made, or not */
        open_creation();
    }
}

/* ------------------------------------------------------------------------------------------- */
/* All at once */

typedef struct {
    dp_engine *engine;
    uint64_t seed;
    uint32_t served, lost, moved;
    atomic_bool *stop;
} client;

static void check_code(client *self, attn_status status) {
    bool expected = status.code == ATTN_OK || status.code == ATTN_UNAVAILABLE || status.code == ATTN_ABORTED;
    if (!expected) print_error("%s: %s\n", attn_code_name(status.code), status.message);
    assert_true(expected || status.code == ATTN_CANCELLED);
    if (status.code == ATTN_OK)
        self->served++;
    else
        self->lost++;
}

static void use_sequences(client *self, dice *dice, const uint64_t *handles, uint32_t count) {
    const attn_geometry *geometry = &self->engine->config.geometry;
    dp_step *step;
    bool read_only = dice_below(dice, 4) == 0;
    if (attn_failed(try_begin_step(self->engine, handles, NULL, count, read_only, &step))) return;
    layer_rows rows = random_rows(dice, geometry, count, read_only);
    attn_status status = attn_ok();
    for (uint32_t layer = 0; layer < geometry->layers && !attn_failed(status); layer++) {
        dp_options options = {.batch_invariant = dice_below(dice, 2) == 0, .return_lse = true};
        status = try_layer(step, geometry, layer, &rows, &options, dice, NULL, NULL);
        check_code(self, status);
    }
    free_rows(&rows);
    dp_step_end(step);
}

static void move_somewhere(client *self, dice *dice, uint64_t handle) {
    waiting_move move;
    uint32_t rank = dice_below(dice, self->engine->config.ranks);
    int64_t until_ns = attn_now_ns() + 20 * MS; /* the engine may be moving it */
    attn_status status = dice_below(dice, 4) == 0 ? start_spread(self->engine, &move, handle)
                                                  : start_move(self->engine, &move, handle, rank, until_ns);
    if (!attn_failed(status)) status = wait_for_move(&move);
    if (status.code == ATTN_OK && move.move.tokens > 0) self->moved++;
    if (status.code != ATTN_FAILED_PRECONDITION) check_code(self, status); /* it is spread */
}

/* The engine may be moving them: a close that is refused is tried again. */
static void close_all(dp_engine *engine, const uint64_t *handles, uint32_t count) {
    attn_status status;
    while ((status = dp_sequences_close(engine, TENANT, handles, count)).code == ATTN_ABORTED)
        usleep(200);
    assert_ok(status);
}

static void *be_a_client(void *argument) {
    client *self = argument;
    dice dice = {self->seed};
    while (!atomic_load(self->stop)) {
        uint64_t handles[3];
        uint32_t ranks[3];
        dp_placement placement = (dp_placement)dice_below(&dice, 4);
        if (attn_failed(dp_sequences_open(self->engine, TENANT, 3, placement, 1, handles, ranks))) continue;
        uint32_t tokens = 1 + dice_below(&dice, 600);
        check_code(self, try_upload(self->engine, &self->engine->config.geometry, &dice, &dice, handles[0], tokens));
        for (int i = 0; i < 4; i++) {
            use_sequences(self, &dice, handles, 3);
            if (dice_below(&dice, 2) == 0) move_somewhere(self, &dice, handles[0]);
        }
        close_all(self->engine, handles, 3);
    }
    return NULL;
}

static bool serves_on_all_ranks(dp_engine *engine) {
    uint64_t handle;
    uint32_t rank;
    dice dice = {1};
    if (attn_failed(dp_sequences_open(engine, TENANT, 1, DP_SPREAD, 0, &handle, &rank))) return false;
    attn_status status = try_upload(engine, &engine->config.geometry, &dice, &dice, handle, 3000);
    if (attn_failed(status)) assert_int_equal(ATTN_UNAVAILABLE, status.code);
    close_sequence(engine, handle);
    return !attn_failed(status);
}

static void crowd_lives_with_ranks_that_come_and_go(void **state) {
    (void)state;
    enum { CLIENTS = 5, RANKS = 4 };
    dp_config config = faulty_config(RANKS);
    config.backend = "cpu";
    config.rank_stall_ns = STALL_NS / 2;
    config.rank_restart_ns = 5 * MS;
    config.rebalance_factor = 1.2;
    config.spread_above_tokens = 550;
    dp_engine *engine = create_engine(&config);
    atomic_bool stop = false;
    client clients[CLIENTS];
    pthread_t threads[CLIENTS];
    for (uint64_t i = 0; i < CLIENTS; i++) {
        clients[i] = (client){.engine = engine, .seed = i, .stop = &stop};
        pthread_create(&threads[i], NULL, be_a_client, &clients[i]);
    }
    dice dice = {1};
    for (int64_t end = attn_now_ns() + 4000 * MS; attn_now_ns() < end;) {
        uint32_t rank = dice_below(&dice, RANKS);
        switch (dice_below(&dice, 4)) {
        case 0: dp_engine_fail_rank(engine, rank); break;
        case 1: dp_engine_stall_rank(engine, rank); break;
        case 2: dp_engine_release_rank(engine, rank); break;
        case 3: dp_engine_restart_rank(engine, rank); break;
        }
        usleep(1000 + dice_below(&dice, 60000));
        dp_engine_reap(engine);
    }
    atomic_store(&stop, true);
    uint32_t served = 0, lost = 0, moved = 0;
    for (int i = 0; i < CLIENTS; i++) {
        pthread_join(threads[i], NULL);
        served += clients[i].served;
        lost += clients[i].lost;
        moved += clients[i].moved;
    }
    assert_true(served > 0 && lost > 0 && moved > 0);
    for (uint32_t r = 0; r < RANKS; r++) {
        dp_engine_release_rank(engine, r);
        dp_engine_restart_rank(engine, r);
        wait_for_state(engine, r, DP_RANK_SERVING);
        dp_engine_release_rank(engine, r);
    }
    wait_until_none_is_detained();
    /* A machine that is slower than the stall's limit may cost a rank once more. */
    int64_t end = attn_now_ns() + 20 * PROMISED_NS;
    while (!serves_on_all_ranks(engine))
        assert_true(attn_now_ns() < end);
    wait_until_none_is_detained();
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stalled_rank_ends_its_calls_and_may_come_back_late),
        cmocka_unit_test(merged_calls_of_a_stalled_rank_all_end),
        cmocka_unit_test(busy_rank_is_not_taken_for_a_stalled_one),
        cmocka_unit_test(uploads_and_exports_of_a_stalled_rank_end),
        cmocka_unit_test(spread_sequence_fails_with_one_of_its_ranks_and_frees_the_others),
        cmocka_unit_test(loss_does_not_wait_for_the_call_at_work),
        cmocka_unit_test(engine_may_be_destroyed_while_a_backend_hangs),
        cmocka_unit_test(engine_waits_for_the_callbacks_of_a_lost_rank),
        cmocka_unit_test(device_that_fails_is_restarted_with_an_empty_pool),
        cmocka_unit_test(device_that_breaks_is_lost_at_its_next_call_and_restarted),
        cmocka_unit_test(sequences_from_before_stay_lost_until_they_are_closed),
        cmocka_unit_test(lost_sequences_idle_out),
        cmocka_unit_test(what_was_open_over_a_restart_ends_without_touching_the_new_pool),
        cmocka_unit_test(rank_is_restarted_while_its_old_backend_still_hangs),
        cmocka_unit_test(delays_double_up_to_their_maximum),
        cmocka_unit_test(rank_restarts_by_itself_and_later_each_time),
        cmocka_unit_test(restart_that_fails_is_told_and_tried_again),
        cmocka_unit_test(restart_that_hangs_holds_up_nobody),
        cmocka_unit_test(crowd_lives_with_ranks_that_come_and_go),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
