/*
 * Launches of a rank that overlap: which begin, in what order they end, what waits for them, and what becomes of them
 * when the rank is lost. The device is that of overlap.h.
 */
#define _GNU_SOURCE
#include "dp/tests/overlap.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "dp/state.h"
#include "dp/tests/fixture.h"

/* Long enough for a rank to do what it must not do. */
#define A_WHILE_US 20000

/* ------------------------------------------------------------------------------------------- */
/* In front of the backends, besides the device */

static atomic_uint pool_calls;    /* appends and exports */
static atomic_uint pool_overlaps; /* ..of a backend that had decodes in flight */

attn_status __real_attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, const void *keys,
                                       const void *values);
attn_status __wrap_attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, const void *keys,
                                       const void *values);
attn_status __real_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values);
attn_status __wrap_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values);

static void note_pool_call(const attn_backend *backend) {
    atomic_fetch_add(&pool_calls, 1);
    if (overlap_in_flight(backend) > 0) atomic_fetch_add(&pool_overlaps, 1);
}

attn_status __wrap_attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, const void *keys,
                                       const void *values) {
    note_pool_call(backend);
    return __real_attn_backend_append(backend, layer, pages, page_count, position, tokens, keys, values);
}

attn_status __wrap_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values) {
    note_pool_call(backend);
    return __real_attn_backend_export(backend, layer, pages, page_count, position, tokens, keys, values);
}

/* ------------------------------------------------------------------------------------------- */
/* Steps of one sequence with a call in flight */

typedef struct {
    uint64_t handle;
    dp_step *step;
    layer_rows rows;
    waiting_call call;
} flight;

/* One rank, whose launches are made by its own thread. */
static dp_engine *create_queueing_engine(void) {
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    return engine;
}

/* On a sequence of its own, of `tokens` tokens. */
static void board(flight *flight, dp_engine *engine, uint32_t tokens, uint64_t seed) {
    dice dice = {seed};
    memset(flight, 0, sizeof *flight);
    flight->handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    if (tokens > 0) fill(engine, flight->handle, tokens, seed);
    flight->step = begin_step(engine, &flight->handle, NULL, 1, false);
    flight->rows = random_rows(&dice, &engine->config.geometry, 1, false);
}

static void take_off_until(flight *flight, int64_t deadline_ns) {
    prepare_call(&flight->call, &flight->step->engine->config.geometry, dp_step_next_layer(flight->step), &flight->rows,
                 NULL, NULL);
    flight->call.call.deadline_ns = deadline_ns;
    assert_ok(start_call(flight->step, &flight->call));
}

static void take_off(flight *flight) { take_off_until(flight, INT64_MAX); }

static void land(flight *flight) {
    dp_engine *engine = flight->step->engine;
    free_call(&flight->call);
    free_rows(&flight->rows);
    dp_step_end(flight->step);
    close_sequence(engine, flight->handle);
}

/* flights[count], each in a launch of its own: the last ones wait where the rank takes no more. */
static void take_off_one_by_one(flight *flights, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        take_off(&flights[i]);
        overlap_wait_until_started(i < 2 ? i + 1 : 2);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Which begin, and in what order they end */

static void a_launch_begins_while_one_is_in_flight_and_a_third_waits(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[3];
    for (int i = 0; i < 3; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off_one_by_one(flights, 3);
    usleep(A_WHILE_US);
    assert_int_equal(2, overlap_started());
    assert_int_equal(1, rank_info(engine, 0).queue_depth);
    overlap_let_end(1);
    assert_ok(wait_for_call(&flights[0].call));
    overlap_wait_until_started(3);
    assert_int_equal(2, overlap_in_flight(NULL));
    overlap_let_end(1);
    assert_ok(wait_for_call(&flights[1].call));
    assert_int_equal(1, overlap_in_flight(NULL));
    overlap_release();
    assert_ok(wait_for_call(&flights[2].call));
    assert_int_equal(2, overlap_most());
    assert_int_equal(3, rank_info(engine, 0).launches);
    for (int i = 0; i < 3; i++)
        land(&flights[i]);
    destroy_engine(engine);
}

static void calls_that_wait_are_merged_behind_those_in_flight(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[6];
    for (int i = 0; i < 6; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off_one_by_one(flights, 6);
    overlap_release();
    for (int i = 0; i < 6; i++) {
        assert_ok(wait_for_call(&flights[i].call));
        assert_int_equal(i < 2 ? 1 : 4, flights[i].call.call.timing[0].merged_calls);
        land(&flights[i]);
    }
    assert_int_equal(3, rank_info(engine, 0).launches);
    destroy_engine(engine);
}

enum { MANY = 8 };

/* All layers of MANY steps at once on sequences, forks of one another among them; or one step after the other. */
static void run_steps(bool at_once, char *outs) {
    dp_engine *engine = create_queueing_engine();
    const attn_geometry *geometry = &engine->config.geometry;
    size_t bytes = attn_out_row_bytes(geometry);
    dp_options options = {.batch_invariant = true};
    flight flights[MANY];
    dice dice = {5};
    uint64_t parent = open_sequence(engine, DP_LEAST_TOKENS, 0);
    fill(engine, parent, 700, 9);
    for (uint32_t i = 0; i < MANY; i++) {
        memset(&flights[i], 0, sizeof flights[i]);
        flights[i].handle = fork_sequence(engine, parent, 30 * (i + 1)); /* their last page is to be copied */
        flights[i].rows = random_rows(&dice, geometry, 1, false);
        flights[i].step = begin_step(engine, &flights[i].handle, NULL, 1, false);
    }
    for (uint32_t layer = 0; layer < geometry->layers; layer++) {
        if (at_once) overlap_hold();
        for (uint32_t i = 0; i < MANY; i++) {
            prepare_call(&flights[i].call, geometry, layer, &flights[i].rows, &options, NULL);
            assert_ok(start_call(flights[i].step, &flights[i].call));
            if (!at_once) assert_ok(wait_for_call(&flights[i].call));
            if (at_once) overlap_wait_until_started(i < 2 ? i + 1 : 2);
        }
        if (at_once) overlap_release();
        for (uint32_t i = 0; i < MANY; i++) {
            assert_ok(wait_for_call(&flights[i].call));
            memcpy(outs, flights[i].call.call.result->out, bytes);
            outs += bytes;
            free_call(&flights[i].call);
        }
    }
    for (uint32_t i = 0; i < MANY; i++) {
        free_rows(&flights[i].rows);
        dp_step_end(flights[i].step);
        close_sequence(engine, flights[i].handle);
    }
    close_sequence(engine, parent);
    destroy_engine(engine);
}

static void calls_that_read_much_are_got_ready_behind_each_other_and_not_merged(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    engine->alone_bytes = 1;
    flight flights[4];
    for (int i = 0; i < 4; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off_one_by_one(flights, 4);
    assert_int_equal(2, overlap_in_flight(NULL));
    overlap_release();
    for (int i = 0; i < 4; i++) {
        assert_ok(wait_for_call(&flights[i].call));
        assert_int_equal(1, flights[i].call.call.timing[0].merged_calls);
        land(&flights[i]);
    }
    assert_int_equal(4, rank_info(engine, 0).launches);
    destroy_engine(engine);
}

static void launches_that_overlap_give_the_bits_of_single_ones(void **state) {
    (void)state;
    static char outs[2][3 * MANY * OUT_BYTES];
    run_steps(false, outs[0]);
    run_steps(true, outs[1]);
    assert_int_equal(2, overlap_most());
    assert_memory_equal(outs[0], outs[1], sizeof outs[0]);
}

static void time_that_launches_share_is_busy_once(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[2];
    for (int i = 0; i < 2; i++)
        board(&flights[i], engine, 0, 1 + (uint64_t)i);
    int64_t start = attn_now_ns();
    overlap_hold();
    take_off_one_by_one(flights, 2);
    usleep(A_WHILE_US);
    overlap_release();
    for (int i = 0; i < 2; i++)
        assert_ok(wait_for_call(&flights[i].call));
    int64_t busy_ns = rank_info(engine, 0).busy_ns;
    assert_true(busy_ns >= A_WHILE_US * INT64_C(1000));
    assert_true(busy_ns <= attn_now_ns() - start);
    for (int i = 0; i < 2; i++)
        land(&flights[i]);
    destroy_engine(engine);
}

/* A submitter does not wait for a device that others use. */
static void small_call_beside_one_in_flight_is_the_workers(void **state) {
    (void)state;
    dp_config config = small_config();
    config.backend = "cpu";
    dp_engine *engine = create_engine(&config);
    uint64_t small_bytes = engine->small_bytes;
    flight alone, big, small;
    board(&alone, engine, 0, 1);
    take_off(&alone);
    assert_true(alone.call.done);
    assert_true(pthread_equal(pthread_self(), overlap_last_thread()));
    land(&alone);
    engine->small_bytes = 0;
    board(&big, engine, 0, 2);
    engine->small_bytes = small_bytes;
    board(&small, engine, 0, 3);
    overlap_hold();
    take_off(&big);
    overlap_wait_until_started(1);
    take_off(&small);
    overlap_wait_until_started(2);
    assert_false(pthread_equal(pthread_self(), overlap_last_thread()));
    overlap_release();
    assert_ok(wait_for_call(&big.call));
    assert_ok(wait_for_call(&small.call));
    land(&big);
    land(&small);
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* What waits for them */

typedef struct {
    dp_engine *engine;
    uint64_t handle;
    atomic_bool done;
} uploader;

static void *upload_some(void *argument) {
    uploader *self = argument;
    fill(self->engine, self->handle, 20, 4);
    atomic_store(&self->done, true);
    return NULL;
}

static void other_jobs_begin_when_nothing_is_in_flight_and_are_not_overtaken(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[3];
    for (int i = 0; i < 3; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    uploader uploader = {.engine = engine, .handle = open_sequence(engine, DP_LEAST_TOKENS, 0)};
    overlap_hold();
    take_off(&flights[0]);
    overlap_wait_until_started(1);
    unsigned before = atomic_load(&pool_calls);
    pthread_t thread;
    pthread_create(&thread, NULL, upload_some, &uploader);
    while (rank_info(engine, 0).queue_depth < 1)
        usleep(100);
    usleep(A_WHILE_US);    /* it was reserved, and is now submitted */
    take_off(&flights[1]); /* there is room for it, but the chunk came first */
    usleep(A_WHILE_US);
    assert_int_equal(1, overlap_started());
    assert_int_equal(before, atomic_load(&pool_calls));
    overlap_let_end(1);
    assert_ok(wait_for_call(&flights[0].call));
    overlap_wait_until_started(2);
    assert_true(atomic_load(&pool_calls) > before);
    overlap_release();
    assert_ok(wait_for_call(&flights[1].call));
    pthread_join(thread, NULL);
    assert_true(atomic_load(&uploader.done));
    take_off(&flights[2]);
    assert_ok(wait_for_call(&flights[2].call));
    for (int i = 0; i < 3; i++)
        land(&flights[i]);
    close_sequence(engine, uploader.handle);
    assert_int_equal(0, atomic_load(&pool_overlaps));
    destroy_engine(engine);
}

static void call_that_came_too_late_ends_beside_one_in_flight(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[3];
    for (int i = 0; i < 3; i++)
        board(&flights[i], engine, 0, 1 + (uint64_t)i);
    overlap_hold();
    take_off(&flights[0]);
    overlap_wait_until_started(1);
    take_off_until(&flights[1], attn_now_ns());
    assert_code(ATTN_DEADLINE_EXCEEDED, wait_for_call(&flights[1].call));
    take_off(&flights[2]);
    overlap_wait_until_started(2);
    overlap_release();
    assert_ok(wait_for_call(&flights[0].call));
    assert_ok(wait_for_call(&flights[2].call));
    for (int i = 0; i < 3; i++)
        land(&flights[i]);
    destroy_engine(engine);
}

static void start_that_fails_ends_its_own_calls_only(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[3];
    for (int i = 0; i < 3; i++)
        board(&flights[i], engine, 0, 1 + (uint64_t)i);
    overlap_hold();
    take_off(&flights[0]);
    overlap_wait_until_started(1);
    overlap_fail_starts(ATTN_RESOURCE_EXHAUSTED);
    take_off(&flights[1]);
    assert_error(ATTN_RESOURCE_EXHAUSTED, wait_for_call(&flights[1].call), "takes nothing");
    overlap_fail_starts(ATTN_OK);
    take_off(&flights[2]);
    overlap_wait_until_started(2);
    overlap_release();
    assert_ok(wait_for_call(&flights[0].call));
    assert_ok(wait_for_call(&flights[2].call));
    assert_int_equal(DP_RANK_SERVING, rank_info(engine, 0).state);
    for (int i = 0; i < 3; i++)
        land(&flights[i]);
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Loss */

static void expect_crash(flight *flight, const char *words, bool detained) {
    assert_error(ATTN_UNAVAILABLE, wait_for_call(&flight->call), words);
    assert_int_equal(detained, flight->call.call.detained);
    assert_null(flight->call.call.result);
}

/* The rank is as good as new, and all that was in flight has been given back. */
static void expect_recovery(dp_engine *engine) {
    wait_until_none_is_detained();
    restart_rank(engine, 0);
    flight flights[2];
    for (int i = 0; i < 2; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off_one_by_one(flights, 2);
    overlap_release();
    for (int i = 0; i < 2; i++) {
        assert_ok(wait_for_call(&flights[i].call));
        land(&flights[i]);
    }
    destroy_engine(engine);
}

static void lost_rank_abandons_all_in_flight(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[4];
    for (int i = 0; i < 4; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off_one_by_one(flights, 4);
    dp_engine_fail_rank(engine, 0);
    for (int i = 0; i < 4; i++)
        expect_crash(&flights[i], "is lost", i < 2);
    for (int i = 0; i < 4; i++)
        land(&flights[i]);
    assert_int_equal(2, detained_now());
    usleep(A_WHILE_US);
    assert_int_equal(2, detained_now()); /* as long as the device may still write */
    overlap_release();
    expect_recovery(engine);
}

static void stalled_rank_abandons_all_in_flight(void **state) {
    (void)state;
    dp_config config = small_config();
    config.rank_stall_ns = STALL_NS;
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    flight flights[3];
    for (int i = 0; i < 3; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off_one_by_one(flights, 3);
    for (int i = 0; i < 3; i++)
        expect_crash(&flights[i], "is lost", i < 2);
    for (int i = 0; i < 3; i++)
        land(&flights[i]);
    assert_int_equal(1, rank_info(engine, 0).stalls);
    overlap_release();
    expect_recovery(engine);
}

static void rank_that_hangs_in_a_start_abandons_what_is_before(void **state) {
    (void)state;
    dp_config config = small_config();
    config.rank_stall_ns = STALL_NS;
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    flight flights[2];
    for (int i = 0; i < 2; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off(&flights[0]);
    overlap_wait_until_started(1);
    dp_engine_stall_rank(engine, 0);
    take_off(&flights[1]);
    for (int i = 0; i < 2; i++) {
        expect_crash(&flights[i], "is lost", true);
        land(&flights[i]);
    }
    overlap_release();
    usleep(A_WHILE_US);
    assert_int_equal(2, detained_now());
    dp_engine_release_rank(engine, 0);
    expect_recovery(engine);
}

/* One that moves, however slowly, is not stalled. */
static void rank_whose_launches_end_one_by_one_is_not_stalled(void **state) {
    (void)state;
    enum { LAUNCHES = 6 };
    dp_config config = small_config();
    config.rank_stall_ns = STALL_NS;
    dp_engine *engine = create_engine(&config);
    engine->small_bytes = 0;
    flight flights[LAUNCHES];
    for (int i = 0; i < LAUNCHES; i++)
        board(&flights[i], engine, 0, 1 + (uint64_t)i);
    overlap_hold();
    for (int i = 0; i < LAUNCHES; i++) {
        take_off(&flights[i]);
        overlap_wait_until_started((uint32_t)i + 1);
        if (i == 0) continue;
        usleep((useconds_t)(STALL_NS / 2000));
        overlap_let_end(1);
        assert_ok(wait_for_call(&flights[i - 1].call));
    }
    overlap_release();
    assert_ok(wait_for_call(&flights[LAUNCHES - 1].call));
    assert_int_equal(0, rank_info(engine, 0).stalls);
    for (int i = 0; i < LAUNCHES; i++)
        land(&flights[i]);
    destroy_engine(engine);
}

static void device_that_fails_at_an_end_abandons_what_is_behind(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[3];
    for (int i = 0; i < 3; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    overlap_fail_ends(ATTN_UNAVAILABLE);
    take_off_one_by_one(flights, 3);
    overlap_let_end(1);
    expect_crash(&flights[0], "on fire", false);
    expect_crash(&flights[1], "is lost", true);
    expect_crash(&flights[2], "is lost", false);
    assert_string_equal("the device is on fire", rank_info(engine, 0).last_error);
    assert_int_equal(1, rank_info(engine, 0).losses);
    for (int i = 0; i < 3; i++)
        land(&flights[i]);
    assert_int_equal(1, detained_now());
    overlap_release();
    wait_until_none_is_detained();
    assert_int_equal(1, rank_info(engine, 0).losses); /* its end failed, too, but it was lost already */
    overlap_fail_ends(ATTN_OK);
    expect_recovery(engine);
}

static void device_that_fails_at_a_start_abandons_what_is_before(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[2];
    for (int i = 0; i < 2; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off(&flights[0]);
    overlap_wait_until_started(1);
    overlap_fail_starts(ATTN_UNAVAILABLE);
    take_off(&flights[1]);
    expect_crash(&flights[1], "takes nothing", false);
    expect_crash(&flights[0], "is lost", true);
    overlap_fail_starts(ATTN_OK);
    for (int i = 0; i < 2; i++)
        land(&flights[i]);
    overlap_release();
    expect_recovery(engine);
}

static void engine_may_be_destroyed_with_two_launches_that_hang(void **state) {
    (void)state;
    dp_engine *engine = create_queueing_engine();
    flight flights[2];
    for (int i = 0; i < 2; i++)
        board(&flights[i], engine, 100, 1 + (uint64_t)i);
    overlap_hold();
    take_off_one_by_one(flights, 2);
    dp_engine_fail_rank(engine, 0);
    for (int i = 0; i < 2; i++) {
        expect_crash(&flights[i], "is lost", true);
        land(&flights[i]);
    }
    destroy_engine(engine);
    assert_int_equal(2, detained_now());
    overlap_release();
    wait_until_none_is_detained();
}

/* ------------------------------------------------------------------------------------------- */
/* A rank by itself */

typedef struct {
    dp_job job; /* first */
    atomic_int finished;
} bare_job;

static attn_status bare_start(dp_worker *worker, dp_job *const *jobs, uint32_t count, bool *in_flight) {
    (void)worker;
    (void)jobs;
    (void)count;
    *in_flight = true;
    return attn_ok();
}

static attn_status bare_complete(dp_worker *worker, dp_job *const *jobs, uint32_t count) {
    (void)worker;
    (void)jobs;
    (void)count;
    usleep(A_WHILE_US);
    return attn_ok();
}

static void bare_finish(dp_job *job) { atomic_fetch_add(&((bare_job *)job)->finished, 1); }

static const dp_job_kind bare_kind = {.start = bare_start, .complete = bare_complete, .finish = bare_finish};

static void stopping_a_rank_completes_what_is_in_flight(void **state) {
    (void)state;
    dp_config of = small_config();
    dp_rank_config config = {.backend = {.kind = "reference", .geometry = of.geometry, .pages = 4, .workers = 1},
                             .max_queue = 8,
                             .max_weight = 8};
    dp_rank *rank;
    bare_job jobs[2] = {{.job = {.kind = &bare_kind, .epoch = 1}}, {.job = {.kind = &bare_kind, .epoch = 1}}};
    assert_ok(dp_rank_create(&config, &rank));
    assert_ok(dp_rank_await(rank));
    overlap_hold();
    for (int i = 0; i < 2; i++) {
        assert_ok(dp_rank_reserve(rank, 1));
        dp_rank_submit(rank, &jobs[i].job);
    }
    while (dp_rank_queue_depth(rank) > 0)
        usleep(100);
    dp_rank_stop(rank);
    for (int i = 0; i < 2; i++)
        assert_int_equal(1, atomic_load(&jobs[i].finished));
    dp_rank_destroy(rank);
    overlap_release();
}

/* ------------------------------------------------------------------------------------------- */
/* Losses in a crowd */

typedef struct {
    dp_engine *engine;
    uint64_t seed;
    uint32_t committed, crashed;
    atomic_bool *stop;
} stepper;

/* A sequence's life: a step of all layers, again and again until its rank is lost. */
static void live_once(stepper *self, dice *dice) {
    const attn_geometry *geometry = &self->engine->config.geometry;
    uint64_t handle;
    uint32_t rank;
    if (attn_failed(dp_sequences_open(self->engine, TENANT, 1, DP_LEAST_TOKENS, 0, &handle, &rank))) {
        usleep(200);
        return;
    }
    attn_status status = attn_ok();
    while (!attn_failed(status) && !atomic_load(self->stop)) {
        dp_step *step;
        status = try_begin_step(self->engine, &handle, NULL, 1, false, &step);
        if (attn_failed(status)) break;
        layer_rows rows = random_rows(dice, geometry, 1, false);
        for (uint32_t layer = 0; layer < geometry->layers && !attn_failed(status); layer++)
            status = try_layer(step, geometry, layer, &rows, NULL, dice, NULL, NULL);
        if (!attn_failed(status)) self->committed++;
        free_rows(&rows);
        dp_step_end(step);
    }
    if (attn_failed(status)) {
        assert_int_equal(ATTN_UNAVAILABLE, status.code);
        self->crashed++;
    }
    dp_sequences_close(self->engine, TENANT, &handle, 1);
}

static void *live(void *argument) {
    stepper *self = argument;
    dice dice = {self->seed};
    while (!atomic_load(self->stop))
        live_once(self, &dice);
    return NULL;
}

static void losses_in_a_crowd_leave_nothing_behind(void **state) {
    (void)state;
    enum { THREADS = 6, LOSSES = 40 };
    dp_engine *engine = create_queueing_engine();
    atomic_bool stop = false;
    stepper steppers[THREADS];
    pthread_t threads[THREADS];
    overlap_hold();
    overlap_release();
    for (uint64_t i = 0; i < THREADS; i++) {
        steppers[i] = (stepper){.engine = engine, .seed = i, .stop = &stop};
        pthread_create(&threads[i], NULL, live, &steppers[i]);
    }
    for (int i = 0; i < LOSSES; i++) {
        usleep(5000);
        dp_engine_fail_rank(engine, 0);
        restart_rank(engine, 0);
    }
    usleep(5000);
    atomic_store(&stop, true);
    uint32_t committed = 0, crashed = 0;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        committed += steppers[i].committed;
        crashed += steppers[i].crashed;
    }
    wait_until_none_is_detained();
    assert_true(committed > 0 && crashed > 0);
    assert_int_equal(2, overlap_most());
    assert_int_equal(LOSSES, rank_info(engine, 0).losses);
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_launch_begins_while_one_is_in_flight_and_a_third_waits),
        cmocka_unit_test(calls_that_wait_are_merged_behind_those_in_flight),
        cmocka_unit_test(calls_that_read_much_are_got_ready_behind_each_other_and_not_merged),
        cmocka_unit_test(launches_that_overlap_give_the_bits_of_single_ones),
        cmocka_unit_test(time_that_launches_share_is_busy_once),
        cmocka_unit_test(small_call_beside_one_in_flight_is_the_workers),
        cmocka_unit_test(other_jobs_begin_when_nothing_is_in_flight_and_are_not_overtaken),
        cmocka_unit_test(call_that_came_too_late_ends_beside_one_in_flight),
        cmocka_unit_test(start_that_fails_ends_its_own_calls_only),
        cmocka_unit_test(lost_rank_abandons_all_in_flight),
        cmocka_unit_test(stalled_rank_abandons_all_in_flight),
        cmocka_unit_test(rank_that_hangs_in_a_start_abandons_what_is_before),
        cmocka_unit_test(rank_whose_launches_end_one_by_one_is_not_stalled),
        cmocka_unit_test(device_that_fails_at_an_end_abandons_what_is_behind),
        cmocka_unit_test(device_that_fails_at_a_start_abandons_what_is_before),
        cmocka_unit_test(engine_may_be_destroyed_with_two_launches_that_hang),
        cmocka_unit_test(stopping_a_rank_completes_what_is_in_flight),
        cmocka_unit_test(losses_in_a_crowd_leave_nothing_behind),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
