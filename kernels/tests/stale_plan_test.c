/*
 * The bug this project is built not to have: a plan made for something else. On every backend a plan
 * that does not fit its batch is counted, told and not obeyed: the outputs are, bit for bit, those
 * of the partition derived from the live lengths. So are those of a plan that does fit.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/tests/backend_fixture.h"

enum { MAX_BATCH = 993, WORKERS = 4 };

static const decode_options options = {.scale = 0.125f};
static const decode_options invariant_options = {.scale = 0.125f, .batch_invariant = true};

/* A pool, some sequences, the batch of the first `size` of them and its outputs without a plan. */
typedef struct {
    test_pool pool;
    test_sequence sequences[MAX_BATCH];
    test_sequence *pointers[MAX_BATCH];
    uint32_t made;
    test_batch batch;
    unsigned char *outs; /* [size] out rows and lse rows, one after the other */
    size_t out_bytes;
} plan_case;

static plan_case c;

static char last_log[256];
static uint32_t log_lines;

static void keep_log(void *context, const char *line) {
    assert_ptr_equal(context, &c);
    snprintf(last_log, sizeof last_log, "%s", line);
    log_lines++;
}

static size_t copy_outputs(unsigned char *outs) {
    const attn_geometry *g = &c.pool.geometry;
    size_t bytes = 0;
    for (uint32_t i = 0; i < c.batch.batch.size; i++) {
        const test_sequence *sequence = c.pointers[i];
        if (outs) memcpy(outs + bytes, sequence->out, sequence_out_bytes(sequence, g));
        bytes += sequence_out_bytes(sequence, g);
        if (outs) memcpy(outs + bytes, sequence->lse, sequence_lse_bytes(sequence, g));
        bytes += sequence_lse_bytes(sequence, g);
    }
    return bytes;
}

static void close_batch(void) {
    test_batch_fini(&c.batch);
    free(c.outs);
    c.outs = NULL;
}

/* The batch of the first `size` sequences becomes the case's; its outputs without a plan are kept. */
static void open_batch(uint32_t size, const decode_options *batch_options) {
    assert_true(size <= c.made);
    test_batch_init(&c.batch, c.pointers, size, batch_options);
    decode_batch(&c.pool, &c.batch, NULL);
    c.out_bytes = copy_outputs(NULL);
    c.outs = malloc(c.out_bytes + 1);
    assert_non_null(c.outs);
    copy_outputs(c.outs);
}

/* Sequences of mixed lengths and query lengths, some reads; never a multiple of 16 tokens long. */
static sequence_spec mixed_spec(uint32_t i) {
    static const uint32_t stored[] = {700, 3, 1290, 40, 260, 2500, 90, 17};
    sequence_spec spec = {.stored = stored[i % 8] + i / 8, .query_length = 1 + i % 3, .read = i % 4 == 3};
    while ((spec.stored + (spec.read ? 0 : spec.query_length)) % 16 == 0) {
        spec.stored++;
    }
    return spec;
}

static void open_case(void **state, uint32_t sequences, uint32_t pages, sequence_spec (*spec)(uint32_t i)) {
    memset(&c, 0, sizeof c);
    log_lines = 0;
    last_log[0] = 0;
    pool_open(&c.pool, *state, &plain_geometry, pages, WORKERS, 11);
    for (uint32_t i = 0; i < sequences; i++) {
        sequence_init(&c.sequences[i], &c.pool, spec(i));
        c.pointers[i] = &c.sequences[i];
    }
    c.made = sequences;
    attn_set_plan_log(keep_log, &c);
    attn_backend_set_identity(c.pool.backend, (attn_plan_identity){2, 7});
}

static void close_case(void) {
    close_batch();
    for (uint32_t i = 0; i < c.made; i++) {
        sequence_fini(&c.sequences[i]);
    }
    pool_close(&c.pool);
    attn_set_plan_log(NULL, NULL);
}

static attn_plan *make_plan(const attn_batch *batch) {
    attn_plan *plan = NULL;
    assert_int_equal(attn_plan_create(c.pool.backend, &plan).code, ATTN_OK);
    assert_string_equal(attn_backend_plan_step(c.pool.backend, batch, plan).message, "");
    return plan;
}

/* Decodes the case's batch with the plan: the outputs must not change, and `rejected` plans be counted and told. */
static void decode_with(const attn_plan *plan, uint32_t rejected) {
    uint64_t before = attn_backend_plans_rejected(c.pool.backend);
    uint32_t lines = log_lines;
    decode_batch(&c.pool, &c.batch, plan);
    unsigned char *outs = malloc(c.out_bytes + 1);
    assert_non_null(outs);
    copy_outputs(outs);
    assert_memory_equal(outs, c.outs, c.out_bytes);
    free(outs);
    assert_int_equal(attn_backend_plans_rejected(c.pool.backend) - before, rejected);
    assert_int_equal(log_lines - lines, rejected);
}

static void decode_with_stale(const attn_plan *plan, const char *reason) {
    char expected[64];
    snprintf(expected, sizeof expected, "plan rejected: %s does not fit", reason);
    decode_with(plan, 1);
    assert_non_null(strstr(last_log, expected));
}

static void a_plan_that_fits_is_used_and_changes_no_bit(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    attn_plan *plan = make_plan(&c.batch.batch);
    for (uint32_t layer_call = 0; layer_call < 3; layer_call++) {
        decode_with(plan, 0);
    }
    attn_plan_destroy(plan);
    close_case();
}

static void a_plan_of_5_sequences_at_batch_8_is_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(5, &options);
    attn_plan *plan = make_plan(&c.batch.batch);
    decode_with(plan, 0);
    close_batch();
    open_batch(8, &options);
    decode_with_stale(plan, "batch");
    attn_plan_destroy(plan);
    close_case();
}

static void lengths_one_off_after_planning_are_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    for (uint32_t i = 0; i < 8; i++) {
        for (int change = -1; change <= 1; change += 2) {
            c.batch.lengths[i] += (uint32_t)change;
            attn_plan *plan = make_plan(&c.batch.batch);
            c.batch.lengths[i] -= (uint32_t)change;
            decode_with_stale(plan, "lengths");
            attn_plan_destroy(plan);
        }
    }
    close_case();
}

static void query_lengths_changed_after_planning_are_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    c.batch.query_lengths[1]--;
    attn_plan *plan = make_plan(&c.batch.batch);
    c.batch.query_lengths[1]++;
    decode_with_stale(plan, "lengths");
    attn_plan_destroy(plan);
    close_case();
}

static void a_window_changed_after_planning_is_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    c.batch.batch.window = 100;
    attn_plan *plan = make_plan(&c.batch.batch);
    c.batch.batch.window = 0;
    decode_with_stale(plan, "lengths");
    attn_plan_destroy(plan);
    close_case();
}

static void a_plan_of_another_rank_is_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    attn_backend_set_identity(c.pool.backend, (attn_plan_identity){3, 7});
    attn_plan *plan = make_plan(&c.batch.batch);
    attn_backend_set_identity(c.pool.backend, (attn_plan_identity){2, 7});
    decode_with_stale(plan, "rank");
    attn_plan_destroy(plan);
    close_case();
}

static void a_plan_of_another_generation_is_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    attn_plan *plan = make_plan(&c.batch.batch);
    attn_backend_set_identity(c.pool.backend, (attn_plan_identity){2, 8});
    decode_with_stale(plan, "generation");
    attn_plan_destroy(plan);
    close_case();
}

static void a_plan_of_another_backend_is_rejected(void **state) {
    open_case(state, 4, 300, mixed_spec);
    open_batch(4, &options);
    test_pool other;
    pool_open(&other, *state, &plain_geometry, 300, WORKERS, 11);
    attn_plan *plan = NULL;
    assert_int_equal(attn_plan_create(other.backend, &plan).code, ATTN_OK);
    assert_int_equal(attn_backend_plan_step(other.backend, &c.batch.batch, plan).code, ATTN_OK);
    decode_with_stale(plan, "rank");
    attn_plan_destroy(plan);
    pool_close(&other);
    close_case();
}

static void a_plan_of_another_geometry_is_rejected(void **state) {
    attn_geometry geometry = plain_geometry;
    geometry.heads_q = 4;
    open_case(state, 4, 300, mixed_spec);
    open_batch(4, &options);
    test_pool other;
    pool_open(&other, *state, &geometry, 300, WORKERS, 11);
    attn_backend_set_identity(other.backend, (attn_plan_identity){2, 7});
    attn_plan *plan = NULL;
    assert_int_equal(attn_plan_create(other.backend, &plan).code, ATTN_OK);
    assert_int_equal(attn_backend_plan_step(other.backend, &c.batch.batch, plan).code, ATTN_OK);
    decode_with_stale(plan, "geometry");
    attn_plan_destroy(plan);
    pool_close(&other);
    close_case();
}

static void a_plan_of_the_other_mode_is_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    attn_plan *plan = make_plan(&c.batch.batch);
    close_batch();
    open_batch(8, &invariant_options);
    decode_with_stale(plan, "tiles");
    attn_plan_destroy(plan);
    plan = make_plan(&c.batch.batch);
    decode_with(plan, 0);
    close_batch();
    open_batch(8, &options);
    decode_with_stale(plan, "tiles");
    attn_plan_destroy(plan);
    close_case();
}

static sequence_spec short_spec(uint32_t i) { return (sequence_spec){.stored = 50 + 40 * i, .query_length = 1}; }

static void every_flipped_bit_of_a_plan_is_rejected(void **state) {
    open_case(state, 3, 40, short_spec); /* there are many bits */
    open_batch(3, &options);
    attn_plan *plan = make_plan(&c.batch.batch);
    unsigned char *bytes = (unsigned char *)plan;
    size_t bits = 8 * attn_plan_bytes(plan->header.workers), step = FIXTURE_SANITIZED ? 29 : 1;
    for (size_t bit = 0; bit < bits; bit += step) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        decode_with(plan, 1);
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    decode_with(plan, 0);
    attn_plan_destroy(plan);
    close_case();
}

static void memory_that_never_was_a_plan_is_rejected(void **state) {
    open_case(state, 8, 400, mixed_spec);
    open_batch(8, &options);
    attn_plan *plan = NULL;
    assert_int_equal(attn_plan_create(c.pool.backend, &plan).code, ATTN_OK);
    decode_with_stale(plan, "magic"); /* created, not filled */
    attn_plan_destroy(plan);
    plan = make_plan(&c.batch.batch);
    memset((unsigned char *)plan + sizeof plan->header, 0xff, plan->header.workers * sizeof *plan->starts);
    decode_with_stale(plan, "crc");
    attn_plan_destroy(plan);
    close_case();
}

static sequence_spec empty_read(uint32_t i) {
    return (sequence_spec){.stored = 0, .query_length = 1 + i % 2, .read = true};
}

static sequence_spec short_read(uint32_t i) {
    return (sequence_spec){.stored = 1 + i % 37, .query_length = 1, .read = true};
}

static void lengths_that_became_all_zero_are_rejected(void **state) {
    open_case(state, 8, 100, short_read);
    open_batch(8, &options);
    attn_plan *full = make_plan(&c.batch.batch);
    uint32_t lengths[8];
    memcpy(lengths, c.batch.lengths, sizeof lengths);
    memset(c.batch.lengths, 0, sizeof lengths);
    attn_plan *zero = make_plan(&c.batch.batch);
    memcpy(c.batch.lengths, lengths, sizeof lengths);
    decode_with_stale(zero, "lengths");
    attn_plan_destroy(zero);
    close_case();

    open_case(state, 8, 100, empty_read);
    open_batch(8, &options);
    decode_with(full, 1);
    zero = make_plan(&c.batch.batch);
    decode_with(zero, 0);
    attn_plan_destroy(zero);
    attn_plan_destroy(full);
    close_case();
}

static void a_plan_of_5_sequences_at_batch_993_is_rejected(void **state) {
    open_case(state, 993, 3000, short_read);
    open_batch(5, &options);
    attn_plan *five = make_plan(&c.batch.batch);
    decode_with(five, 0);
    close_batch();

    open_batch(993, &options);
    decode_with_stale(five, "batch");
    attn_plan *all = make_plan(&c.batch.batch);
    decode_with(all, 0);
    close_batch();

    open_batch(5, &options);
    decode_with_stale(all, "batch");
    attn_plan_destroy(five);
    attn_plan_destroy(all);
    close_case();
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    const struct CMUnitTest tests[] = {
        ON_EVERY_BACKEND(a_plan_that_fits_is_used_and_changes_no_bit),
        ON_EVERY_BACKEND(a_plan_of_5_sequences_at_batch_8_is_rejected),
        ON_EVERY_BACKEND(lengths_one_off_after_planning_are_rejected),
        ON_EVERY_BACKEND(query_lengths_changed_after_planning_are_rejected),
        ON_EVERY_BACKEND(a_window_changed_after_planning_is_rejected),
        ON_EVERY_BACKEND(a_plan_of_another_rank_is_rejected),
        ON_EVERY_BACKEND(a_plan_of_another_generation_is_rejected),
        ON_EVERY_BACKEND(a_plan_of_another_backend_is_rejected),
        ON_EVERY_BACKEND(a_plan_of_another_geometry_is_rejected),
        ON_EVERY_BACKEND(a_plan_of_the_other_mode_is_rejected),
        ON_EVERY_BACKEND(every_flipped_bit_of_a_plan_is_rejected),
        ON_EVERY_BACKEND(memory_that_never_was_a_plan_is_rejected),
        ON_EVERY_BACKEND(lengths_that_became_all_zero_are_rejected),
        ON_EVERY_BACKEND(a_plan_of_5_sequences_at_batch_993_is_rejected),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
