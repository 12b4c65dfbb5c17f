/* Many threads at once, and steps that go on from their callbacks. */
#define _GNU_SOURCE
#include "dp/tests/fixture.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/clock.h"
#include "dp/state.h"

/* A step that goes from layer to layer in its own callbacks. */
typedef struct {
    dp_layer_call call; /* first */
    dp_step *step;
    uint32_t layers;
    atomic_int finished; /* 1: committed, -1: failed */
} runner;

static void run_next_layer(dp_layer_call *call, attn_status status) {
    runner *running = (runner *)call;
    if (!attn_failed(status)) dp_result_release(call->result);
    if (attn_failed(status) || call->committed) {
        atomic_store(&running->finished, attn_failed(status) ? -1 : 1);
        return;
    }
    call->layer++;
    if (attn_failed(dp_step_layer(running->step, call))) atomic_store(&running->finished, -1);
}

static void callbacks_may_start_the_next_layer(void **state) {
    (void)state;
    dp_config config = small_config();
    config.geometry.layers = 200;
    config.ranks = 2;
    for (int spread = 0; spread < 2; spread++) {
        dp_engine *engine = create_engine(&config);
        uint64_t handle = open_sequence(engine, spread ? DP_SPREAD : DP_LEAST_TOKENS, 0);
        dice dice = {1};
        layer_rows rows = random_rows(&dice, &config.geometry, 1, false);
        waiting_call tensors;
        prepare_call(&tensors, &config.geometry, 0, &rows, NULL, NULL);
        runner running = {.call = tensors.call, .step = begin_step(engine, &handle, NULL, 1, false)};
        running.call.done = run_next_layer;
        assert_ok(dp_step_layer(running.step, &running.call));
        while (atomic_load(&running.finished) == 0)
            usleep(100);
        assert_int_equal(1, atomic_load(&running.finished));
        dp_step_end(running.step);
        assert_int_equal(1, describe(engine, handle).length);
        free_call(&tensors);
        free_rows(&rows);
        close_sequence(engine, handle);
        destroy_engine(engine);
    }
}

typedef struct {
    dp_engine *engine;
    uint64_t handle;
    uint32_t committed;
    uint32_t turned_away;
    uint64_t seed;
    atomic_bool *stop;
} stepper;

static void *step_one_sequence(void *argument) {
    stepper *self = argument;
    const attn_geometry *geometry = &self->engine->config.geometry;
    dice dice = {self->seed};
    for (int steps = 0; steps < 200; steps++) {
        dp_step *step;
        attn_status status;
        while (attn_failed(status = try_begin_step(self->engine, &self->handle, NULL, 1, false, &step))) {
            assert_int_equal(ATTN_ABORTED, status.code);
            self->turned_away++;
            sched_yield();
        }
        layer_rows rows = random_rows(&dice, geometry, 1, false);
        uint32_t layers = dice_below(&dice, 3) == 0 ? 1 : geometry->layers;
        bool good = true;
        for (uint32_t layer = 0; layer < layers && good; layer++) {
            good = !attn_failed(try_layer(step, geometry, layer, &rows, NULL, NULL, NULL, NULL));
        }
        if (good && layers == geometry->layers) self->committed++;
        free_rows(&rows);
        dp_step_end(step);
    }
    return NULL;
}

static void two_threads_stepping_one_sequence_take_turns_or_are_refused(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    stepper steppers[2] = {{.engine = engine, .seed = 1}, {.engine = engine, .seed = 2}};
    steppers[0].handle = steppers[1].handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, step_one_sequence, &steppers[i]);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(steppers[0].committed + steppers[1].committed, describe(engine, steppers[0].handle).length);
    assert_true(steppers[0].committed > 0 && steppers[1].committed > 0);
    close_sequence(engine, steppers[0].handle);
    destroy_engine(engine);
}

/* One thread's part of the crowd: sequences of its own, every operation there is, often cut short. */
static void crowd_step(stepper *self, dice *dice, const uint64_t *handles, uint32_t count) {
    const attn_geometry *geometry = &self->engine->config.geometry;
    dp_step *step;
    bool read_only = dice_below(dice, 4) == 0;
    if (attn_failed(try_begin_step(self->engine, handles, NULL, count, read_only, &step))) return;
    uint32_t layers = dice_below(dice, 2) == 0 ? geometry->layers : dice_below(dice, geometry->layers);
    layer_rows rows = random_rows(dice, geometry, count, read_only);
    for (uint32_t layer = 0; layer < layers; layer++) {
        waiting_call call;
        dp_options options = {.batch_invariant = dice_below(dice, 2) == 0};
        prepare_call(&call, geometry, layer, &rows, &options, dice);
        if (dice_below(dice, 8) == 0) call.call.deadline_ns = attn_now_ns() + dice_below(dice, 50000);
        attn_status status = start_call(step, &call);
        bool started = !attn_failed(status);
        uint32_t fate = dice_below(dice, 12);
        if (started && fate == 0) dp_layer_cancel(step);
        if (started && fate == 1) {
            dp_step_end(step);
            step = NULL;
        }
        if (started) status = wait_for_call(&call);
        bool goes_on = step != NULL && !attn_failed(status);
        free_call(&call);
        if (!goes_on) break;
    }
    free_rows(&rows);
    if (step != NULL) dp_step_end(step);
}

static void *be_in_the_crowd(void *argument) {
    stepper *self = argument;
    dice dice = {self->seed};
    uint64_t handles[4];
    uint32_t ranks[4];
    while (!atomic_load(self->stop)) {
        dp_placement placement = (dp_placement)dice_below(&dice, 4);
        if (attn_failed(dp_sequences_open(self->engine, TENANT, 3, placement, 1, handles, ranks))) continue;
        uint32_t tokens = 1 + dice_below(&dice, 600);
        try_upload(self->engine, &self->engine->config.geometry, &dice, &dice, handles[0], tokens);
        uint32_t count = 3;
        if (!attn_failed(dp_sequence_fork(self->engine, TENANT, handles[0], describe(self->engine, handles[0]).length,
                                          &handles[3], &ranks[3]))) {
            count = 4;
        }
        for (int i = 0; i < 6; i++)
            crowd_step(self, &dice, handles, count);
        dp_sequence_truncate(self->engine, TENANT, handles[0], describe(self->engine, handles[0]).length / 2);
        crowd_step(self, &dice, handles, count);
        self->committed += 1;
        dp_sequences_close(self->engine, TENANT, handles, count);
    }
    return NULL;
}

static void crowd_of_threads_leaves_nothing_behind(void **state) {
    (void)state;
    enum { THREADS = 6 };
    dp_config config = small_config();
    config.backend = "cpu";
    config.ranks = 3;
    config.max_queue = 3;
    config.pages_per_rank = 160;
    config.step_idle_ns = 1000000;
    dp_engine *engine = create_engine(&config);
    atomic_bool stop = false;
    stepper steppers[THREADS];
    pthread_t threads[THREADS];
    for (uint64_t i = 0; i < THREADS; i++) {
        steppers[i] = (stepper){.engine = engine, .seed = i, .stop = &stop};
        pthread_create(&threads[i], NULL, be_in_the_crowd, &steppers[i]);
    }
    for (int64_t end = attn_now_ns() + 3000000000; attn_now_ns() < end;) {
        usleep(500);
        dp_engine_reap(engine);
        for (uint32_t r = 0; r < config.ranks; r++)
            rank_info(engine, r);
    }
    atomic_store(&stop, true);
    uint32_t rounds = 0;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        rounds += steppers[i].committed;
    }
    assert_true(rounds > THREADS);
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(callbacks_may_start_the_next_layer),
        cmocka_unit_test(two_threads_stepping_one_sequence_take_turns_or_are_refused),
        cmocka_unit_test(crowd_of_threads_leaves_nothing_behind),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
