/*
 * Decodes that are started while others are: each is right, they follow one another, and nothing else of the backend
 * comes between. As many are started as the backend allows, so that on one that decodes at once they take turns.
 */
#include "kernels/pipeline.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/tests/backend_fixture.h"

static const decode_options plain_options = {.scale = 0.125f};

static void start(test_pool *pool, test_batch *batch) {
    attn_status status = attn_backend_start(pool->backend, &batch->batch, NULL);
    assert_string_equal(status.message, "");
    assert_int_equal(status.code, ATTN_OK);
}

static attn_timing finish(test_pool *pool) {
    attn_timing timing = {.plan_ns = -1, .attention_ns = -1, .combine_ns = -1};
    attn_status status = attn_backend_finish(pool->backend, &timing);
    assert_string_equal(status.message, "");
    assert_int_equal(status.code, ATTN_OK);
    assert_true(timing.plan_ns >= 0 && timing.attention_ns >= 0 && timing.combine_ns >= 0);
    return timing;
}

static void assert_right(test_pool *pool, const test_sequence *sequence, const decode_options *options,
                         const char *what) {
    decode_errors errors = sequence_errors(pool, sequence, options, 200000);
    assert_errors_within_bounds(&errors, pool->geometry.dtype, what);
}

/* ------------------------------------------------------------------------------------------- */
/* One behind another */

/* Batches of one sequence, of some, and of more and more query rows: what is staged grows while others are started. */
enum { BATCHES = 7, MOST_SEQUENCES = 4 };
static const sequence_spec specs[BATCHES][MOST_SEQUENCES] = {
    {{40, 1, false, INPUTS_UNIFORM}},
    {{700, 1, false, INPUTS_UNIFORM}, {3, 1, false, INPUTS_UNIFORM}},
    {{1200, 5, true, INPUTS_UNIFORM}, {513, 2, false, INPUTS_DOMINANT}},
    {{100, 1, false, INPUTS_UNIFORM}, {100, 1, false, INPUTS_UNIFORM}, {600, 1, false, INPUTS_EQUAL}},
    {{30, 128, false, INPUTS_UNIFORM}, {20, 128, false, INPUTS_UNIFORM}, {200, 7, false, INPUTS_UNIFORM}},
    {{900, 1, true, INPUTS_HUGE}, {10, 1, false, INPUTS_UNIFORM}},
    {{9, 128, false, INPUTS_UNIFORM},
     {5, 128, false, INPUTS_UNIFORM},
     {70, 128, false, INPUTS_UNIFORM},
     {300, 128, false, INPUTS_UNIFORM}},
};

typedef struct {
    test_sequence sequences[MOST_SEQUENCES];
    uint32_t count;
    test_batch batch;
} passenger;

static void board(passenger *boarding, test_pool *pool, const sequence_spec *of, const decode_options *options) {
    test_sequence *sequences[MOST_SEQUENCES];
    memset(boarding, 0, sizeof *boarding);
    while (boarding->count < MOST_SEQUENCES && of[boarding->count].query_length > 0) {
        sequences[boarding->count] = &boarding->sequences[boarding->count];
        sequence_init(sequences[boarding->count], pool, of[boarding->count]);
        boarding->count++;
    }
    test_batch_init(&boarding->batch, sequences, boarding->count, options);
}

static void land(passenger *landing, test_pool *pool, const decode_options *options) {
    attn_timing timing = finish(pool);
    if (!landing->batch.batch.device_time) assert_int_equal(0, timing.device_ns);
    for (uint32_t i = 0; i < landing->count; i++) {
        assert_right(pool, &landing->sequences[i], options, "started with others");
        sequence_fini(&landing->sequences[i]);
    }
    test_batch_fini(&landing->batch);
}

static void run_in_turn(const backend_row *row, const attn_geometry *geometry, const decode_options *options) {
    test_pool pool;
    passenger passengers[BATCHES];
    pool_open(&pool, row, geometry, 600, 2, 9);
    uint32_t depth = attn_backend_depth(pool.backend), finished = 0;
    assert_true(depth >= 1);
    for (uint32_t i = 0; i < BATCHES; i++)
        board(&passengers[i], &pool, specs[i], options);
    for (uint32_t i = 0; i < BATCHES; i++) {
        passengers[i].batch.batch.device_time = i % 3 == 1;
        start(&pool, &passengers[i].batch);
        if (i + 1 - finished == depth) land(&passengers[finished++], &pool, options);
    }
    while (finished < BATCHES)
        land(&passengers[finished++], &pool, options);
    pool_close(&pool);
}

static void decodes_started_behind_others_are_right(void **state) {
    run_in_turn(*state, &plain_geometry, &plain_options);
}

static void so_they_are_in_batch_invariant_mode(void **state) {
    static const decode_options options = {.scale = 0.125f, .batch_invariant = true};
    run_in_turn(*state, &plain_geometry, &options);
}

/* On a device by other kernels. */
static void so_they_are_in_float32(void **state) {
    attn_geometry geometry = plain_geometry;
    geometry.dtype = ATTN_FP32;
    for (uint32_t invariant = 0; invariant < 2; invariant++) {
        decode_options options = {.scale = 0.125f, .batch_invariant = invariant > 0};
        run_in_turn(*state, &geometry, &options);
    }
}

enum { FAMILIES = 4, MEMBERS = 5, SHARED = 512 };

/* What they leave to be merged is in memory that all of them use, and the third needs more of it. */
static void decodes_that_share_prefixes_follow_one_another(void **state) {
    static const uint32_t members[MEMBERS] = {0, 1, 2, 3, 4}, queries[FAMILIES] = {1, 2, 128, 1};
    static const attn_prefix prefix = {.members = members, .count = MEMBERS, .tokens = SHARED};
    test_pool pool;
    test_sequence sequences[FAMILIES][MEMBERS];
    test_batch batches[FAMILIES];
    pool_open(&pool, *state, &plain_geometry, 600, 2, 16);
    uint32_t depth = attn_backend_depth(pool.backend), finished = 0;
    for (uint32_t f = 0; f < FAMILIES; f++) {
        test_sequence *family[MEMBERS];
        for (uint32_t m = 0; m < MEMBERS; m++) {
            sequence_spec spec = {.stored = SHARED + 20 * m, .query_length = queries[f]};
            family[m] = &sequences[f][m];
            if (m == 0) sequence_init(family[0], &pool, spec);
            if (m > 0) sequence_make_fork(family[m], &pool, family[0], SHARED, spec);
        }
        test_batch_init(&batches[f], family, MEMBERS, &plain_options);
        batches[f].batch.prefixes = &prefix;
        batches[f].batch.prefix_count = 1;
    }
    for (uint32_t f = 0; f < FAMILIES; f++) {
        start(&pool, &batches[f]);
        for (; f + 1 - finished == depth || (f + 1 == FAMILIES && finished < FAMILIES); finished++)
            finish(&pool);
    }
    for (uint32_t f = 0; f < FAMILIES; f++) {
        for (uint32_t m = 0; m < MEMBERS; m++) {
            assert_right(&pool, &sequences[f][m], &plain_options, "with a prefix, started with others");
            sequence_fini(&sequences[f][m]);
        }
        test_batch_fini(&batches[f]);
    }
    pool_close(&pool);
}

static void a_decode_reads_what_the_one_before_appends(void **state) {
    test_pool pool;
    test_sequence writer, *written[] = {&writer};
    pool_open(&pool, *state, &plain_geometry, 200, 2, 10);
    sequence_init(&writer, &pool, (sequence_spec){.stored = 2000, .query_length = 40});
    test_sequence reader = writer, *read[] = {&reader};
    reader.spec.read = true;
    reader.out = malloc(sequence_out_bytes(&reader, &pool.geometry));
    reader.lse = malloc(sequence_lse_bytes(&reader, &pool.geometry));
    test_batch writing, reading;
    test_batch_init(&writing, written, 1, &plain_options);
    test_batch_init(&reading, read, 1, &plain_options);
    start(&pool, &writing);
    if (attn_backend_depth(pool.backend) == 1) finish(&pool);
    start(&pool, &reading);
    finish(&pool);
    if (attn_backend_depth(pool.backend) > 1) finish(&pool);
    assert_right(&pool, &writer, &plain_options, "the one that appends");
    assert_right(&pool, &reader, &plain_options, "the one that reads");
    test_batch_fini(&writing);
    test_batch_fini(&reading);
    free(reader.out);
    free(reader.lse);
    sequence_fini(&writer);
    pool_close(&pool);
}

static void a_page_is_copied_as_the_decode_before_left_it(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    test_batch batch;
    pool_open(&pool, *state, &plain_geometry, 200, 2, 11);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 2000, .query_length = 3});
    test_batch_init(&batch, sequences, 1, &plain_options);
    start(&pool, &batch);
    uint32_t last = (sequence.length - 1) / 16, copy = pool.free_pages[--pool.free_count];
    assert_int_equal(attn_backend_copy_page(pool.backend, sequence.pages[last], copy).code, ATTN_OK);
    finish(&pool);
    test_batch_fini(&batch);
    assert_int_equal(attn_backend_poison(pool.backend, sequence.pages[last], 0, 16).code, ATTN_OK);
    sequence.pages[last] = copy;
    sequence.spec.read = true;
    decode_sequences(&pool, sequences, 1, &plain_options);
    assert_right(&pool, &sequence, &plain_options, "of a page that was copied");
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void a_decode_ends_without_being_finished(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    test_batch batch;
    pool_open(&pool, *state, &plain_geometry, 20, 2, 12);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1});
    test_batch_init(&batch, sequences, 1, &plain_options);
    start(&pool, &batch);
    while (!attn_backend_has_ended(pool.backend))
        continue;
    finish(&pool);
    assert_right(&pool, &sequence, &plain_options, "that was seen to end");
    test_batch_fini(&batch);
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void a_backend_goes_with_decodes_that_nobody_finishes(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    test_batch batch;
    pool_open(&pool, *state, &plain_geometry, 20, 2, 13);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1});
    test_batch_init(&batch, sequences, 1, &plain_options);
    for (uint32_t i = 0; i < attn_backend_depth(pool.backend); i++)
        start(&pool, &batch);
    pool_close(&pool);
    test_batch_fini(&batch);
    sequence_fini(&sequence);
}

/* ------------------------------------------------------------------------------------------- */
/* What is refused meanwhile */

static void assert_refused(attn_status status, attn_code code, const char *words) {
    assert_int_equal(status.code, code);
    assert_non_null(strstr(status.message, words));
}

static void while_a_decode_is_started_the_pool_is_left_alone(void **state) {
    static const char *const words = "while a decode is started";
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    test_batch batch;
    pool_open(&pool, *state, &plain_geometry, 20, 2, 14);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1});
    test_batch_init(&batch, sequences, 1, &plain_options);
    start(&pool, &batch);
    assert_refused(attn_backend_append(pool.backend, LAYER, sequence.pages, 1, 0, 1, sequence.keys, sequence.values),
                   ATTN_INTERNAL, words);
    assert_refused(attn_backend_export(pool.backend, LAYER, sequence.pages, 1, 0, 1, sequence.keys, sequence.values),
                   ATTN_INTERNAL, words);
    assert_refused(attn_backend_poison(pool.backend, sequence.pages[0], 0, 1), ATTN_INTERNAL, words);
    assert_refused(attn_backend_decode(pool.backend, &batch.batch, NULL, NULL), ATTN_INTERNAL, words);
    finish(&pool);
    assert_right(&pool, &sequence, &plain_options, "after refusals");
    test_batch_fini(&batch);
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void a_start_that_is_refused_leaves_those_before_it(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    test_batch batch, bad;
    pool_open(&pool, *state, &plain_geometry, 20, 2, 15);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1});
    test_batch_init(&batch, sequences, 1, &plain_options);
    test_batch_init(&bad, sequences, 1, &plain_options);
    bad.pages[2] = 20;
    assert_refused(attn_backend_finish(pool.backend, NULL), ATTN_INTERNAL, "no decode is started");
    for (uint32_t i = 0; i < attn_backend_depth(pool.backend); i++) {
        attn_batch empty = {.scale = 1};
        assert_refused(attn_backend_start(pool.backend, &bad.batch, NULL), ATTN_INTERNAL, "page");
        assert_refused(attn_backend_start(pool.backend, &empty, NULL), ATTN_INVALID_ARGUMENT, "empty");
        start(&pool, &batch);
    }
    assert_refused(attn_backend_start(pool.backend, &batch.batch, NULL), ATTN_INTERNAL, "as many as may be");
    for (uint32_t i = 0; i < attn_backend_depth(pool.backend); i++)
        finish(&pool);
    assert_refused(attn_backend_finish(pool.backend, NULL), ATTN_INTERNAL, "no decode is started");
    assert_right(&pool, &sequence, &plain_options, "after refusals");
    test_batch_fini(&batch);
    test_batch_fini(&bad);
    sequence_fini(&sequence);
    pool_close(&pool);
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    const struct CMUnitTest tests[] = {
        ON_EVERY_BACKEND(decodes_started_behind_others_are_right),
        ON_EVERY_BACKEND(so_they_are_in_batch_invariant_mode),
        ON_EVERY_BACKEND(so_they_are_in_float32),
        ON_EVERY_BACKEND(decodes_that_share_prefixes_follow_one_another),
        ON_EVERY_BACKEND(a_decode_reads_what_the_one_before_appends),
        ON_EVERY_BACKEND(a_page_is_copied_as_the_decode_before_left_it),
        ON_EVERY_BACKEND(a_decode_ends_without_being_finished),
        ON_EVERY_BACKEND(a_backend_goes_with_decodes_that_nobody_finishes),
        ON_EVERY_BACKEND(while_a_decode_is_started_the_pool_is_left_alone),
        ON_EVERY_BACKEND(a_start_that_is_refused_leaves_those_before_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
