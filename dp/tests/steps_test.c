/* Steps and uploads are transactions: all of it, or nothing and the pages come back. */
#include "dp/tests/fixture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void grow(dp_engine *engine, const dp_config *config, uint64_t handle, uint32_t tokens) {
    dice contents = {handle}, cuts = {tokens};
    assert_ok(try_upload(engine, &config->geometry, &contents, &cuts, handle, tokens));
}

/* Runs layers first .. end - 1 with random rows. */
static void run_layers(dp_step *step, const attn_geometry *geometry, uint32_t first, uint32_t end) {
    dice dice = {first};
    for (uint32_t layer = first; layer < end; layer++) {
        layer_rows rows = random_rows(&dice, geometry, dp_step_tokens(step), false);
        assert_ok(try_layer(step, geometry, layer, &rows, NULL, NULL, NULL, NULL));
        free_rows(&rows);
    }
}

static attn_status try_one_layer(dp_step *step, const attn_geometry *geometry, uint32_t layer,
                                 const dp_options *options) {
    dice dice = {layer};
    layer_rows rows = random_rows(&dice, geometry, dp_step_tokens(step), false);
    attn_status status = try_layer(step, geometry, layer, &rows, options, NULL, NULL, NULL);
    free_rows(&rows);
    return status;
}

/* ------------------------------------------------------------------------------------------- */

static void step_given_up_at_any_layer_leaves_no_trace(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[3] = {open_sequence(engine, DP_EXPLICIT, 0), open_sequence(engine, DP_EXPLICIT, 1),
                           open_sequence(engine, DP_SPREAD, 0)};
    static const uint32_t lengths[3] = {31, 16, 510};
    static const uint32_t query_lengths[3] = {5, 1, 6};
    for (int i = 0; i < 3; i++)
        grow(engine, &config, handles[i], lengths[i]);
    uint64_t free = pages_free(engine);
    for (uint32_t layers = 0; layers < config.geometry.layers; layers++) {
        dp_step *step = begin_step(engine, handles, query_lengths, 3, false);
        assert_true(pages_free(engine) < free);
        run_layers(step, &config.geometry, 0, layers);
        assert_int_equal(layers, dp_step_next_layer(step));
        for (int i = 0; i < 3; i++) {
            assert_int_equal(lengths[i], describe(engine, handles[i]).length);
            assert_true(describe(engine, handles[i]).busy);
        }
        dp_step_end(step);
        assert_int_equal(free, pages_free(engine));
        for (int i = 0; i < 3; i++) {
            assert_int_equal(lengths[i], describe(engine, handles[i]).length);
            assert_false(describe(engine, handles[i]).busy);
        }
    }
    dp_step *step = begin_step(engine, handles, query_lengths, 3, false);
    run_layers(step, &config.geometry, 0, config.geometry.layers);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(lengths[i] + query_lengths[i], describe(engine, handles[i]).length);
        assert_false(describe(engine, handles[i]).busy);
    }
    dp_step_end(step);
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(1, counts.steps_committed);
    assert_int_equal(3, counts.steps_aborted);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    destroy_engine(engine);
}

static void abandoned_step_does_not_change_later_outputs(void **state) {
    (void)state;
    dp_config config = small_config();
    float out[2][4 * 40];
    for (int abandon = 0; abandon < 2; abandon++) {
        dp_engine *engine = create_engine(&config);
        uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
        dice same = {3}, cuts = {4};
        assert_ok(try_upload(engine, &config.geometry, &same, &cuts, handle, 40));
        if (abandon) {
            dp_step *step = begin_step(engine, &handle, NULL, 1, false);
            run_layers(step, &config.geometry, 0, 2);
            dp_step_end(step);
        }
        dp_step *step = begin_step(engine, &handle, NULL, 1, false);
        layer_rows rows = random_rows(&same, &config.geometry, 1, false);
        for (uint32_t layer = 0; layer < config.geometry.layers; layer++) {
            assert_ok(try_layer(step, &config.geometry, layer, &rows, NULL, NULL, out[abandon], NULL));
        }
        dp_step_end(step);
        free_rows(&rows);
        close_sequence(engine, handle);
        destroy_engine(engine);
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
}

static void bad_requests_are_refused_and_change_nothing(void **state) {
    (void)state;
    dp_config config = small_config();
    config.max_batch = 3;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[4];
    for (int i = 0; i < 4; i++)
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_step *step;
    assert_error(ATTN_INVALID_ARGUMENT, try_begin_step(engine, handles, NULL, 0, false, &step), "sequences: empty");
    assert_error(ATTN_INVALID_ARGUMENT, try_begin_step(engine, handles, NULL, 4, false, &step), "3 at most");
    uint32_t lengths[3] = {1, 129, 1};
    assert_error(ATTN_INVALID_ARGUMENT, try_begin_step(engine, handles, lengths, 3, false, &step),
                 "query_lengths[1]: 129");
    lengths[1] = 0;
    assert_error(ATTN_INVALID_ARGUMENT, try_begin_step(engine, handles, lengths, 3, false, &step),
                 "query_lengths[1]: 0");
    uint64_t twice[3] = {handles[0], handles[1], handles[0]};
    assert_error(ATTN_FAILED_PRECONDITION, try_begin_step(engine, twice, NULL, 3, false, &step),
                 "sequences[2]: the same sequence as sequences[0]");
    assert_error(ATTN_FAILED_PRECONDITION, try_begin_step(engine, twice, NULL, 3, true, &step), "sequences[2]");
    dp_step *first = begin_step(engine, &handles[1], NULL, 1, false);
    assert_error(ATTN_ABORTED, try_begin_step(engine, handles, NULL, 3, false, &step), "sequences[1]");
    dp_upload *upload;
    assert_code(ATTN_ABORTED, dp_upload_begin(engine, TENANT, handles[1], 1, &upload));
    assert_false(describe(engine, handles[0]).busy);
    dp_step *reader = begin_step(engine, handles, NULL, 3, true); /* reading what is busy is fine */
    dp_step_end(reader);
    dp_step_end(first);
    assert_int_equal(256, pages_free(engine));
    assert_ok(dp_sequences_close(engine, TENANT, handles, 4));
    destroy_engine(engine);
}

static void bad_layers_are_refused_and_the_step_goes_on(void **state) {
    (void)state;
    dp_config config = small_config();
    const attn_geometry *geometry = &config.geometry;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[2] = {open_sequence(engine, DP_LEAST_TOKENS, 0), open_sequence(engine, DP_LEAST_TOKENS, 0)};
    dp_step *step = begin_step(engine, handles, NULL, 2, false);
    assert_error(ATTN_INVALID_ARGUMENT, try_one_layer(step, geometry, 1, NULL), "layer: 1; the step's next one is 0");
    dp_options options = {.scale = NAN};
    assert_error(ATTN_INVALID_ARGUMENT, try_one_layer(step, geometry, 0, &options), "softmax_scale");
    options = (dp_options){.scale = -1};
    assert_error(ATTN_INVALID_ARGUMENT, try_one_layer(step, geometry, 0, &options), "softmax_scale");
    options = (dp_options){.softcap = INFINITY};
    assert_error(ATTN_INVALID_ARGUMENT, try_one_layer(step, geometry, 0, &options), "softcap");
    float sinks[4] = {0, 0, NAN, 0};
    options = (dp_options){.sinks = sinks, .sink_count = 3};
    assert_error(ATTN_INVALID_ARGUMENT, try_one_layer(step, geometry, 0, &options), "sinks: 3");
    options.sink_count = 4;
    assert_error(ATTN_INVALID_ARGUMENT, try_one_layer(step, geometry, 0, &options), "sinks[2]");
    dice dice = {1};
    layer_rows rows = random_rows(&dice, geometry, 3, false);
    assert_error(ATTN_INVALID_ARGUMENT, try_layer(step, geometry, 0, &rows, NULL, NULL, NULL, NULL), "q: 1536 bytes");
    free_rows(&rows);
    rows = random_rows(&dice, geometry, 2, true);
    assert_error(ATTN_INVALID_ARGUMENT, try_layer(step, geometry, 0, &rows, NULL, NULL, NULL, NULL), "k: 0 bytes");
    free_rows(&rows);
    assert_int_equal(0, dp_step_next_layer(step));
    run_layers(step, geometry, 0, 3);
    assert_error(ATTN_INVALID_ARGUMENT, try_one_layer(step, geometry, 3, NULL), "last one");
    dp_step_end(step);
    step = begin_step(engine, handles, NULL, 2, true);
    rows = random_rows(&dice, geometry, 2, false);
    assert_error(ATTN_INVALID_ARGUMENT, try_layer(step, geometry, 0, &rows, NULL, NULL, NULL, NULL), "k: ");
    free_rows(&rows);
    rows = random_rows(&dice, geometry, 2, true);
    assert_error(ATTN_INVALID_ARGUMENT, try_layer(step, geometry, 3, &rows, NULL, NULL, NULL, NULL), "layer: 3");
    for (int i = 0; i < 3; i++)
        assert_ok(try_layer(step, geometry, 2 - i, &rows, NULL, NULL, NULL, NULL));
    free_rows(&rows);
    dp_step_end(step);
    assert_int_equal(1, describe(engine, handles[0]).length);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 2));
    destroy_engine(engine);
}

static void spans_that_hold_less_than_they_claim_are_refused(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_step *step = begin_step(engine, &handle, NULL, 1, false);
    dice dice = {1};
    layer_rows rows = random_rows(&dice, &config.geometry, 1, false);
    waiting_call call;
    prepare_call(&call, &config.geometry, 0, &rows, NULL, NULL);
    call.k.spans[0].size--;
    assert_error(ATTN_INVALID_ARGUMENT, dp_step_layer(step, &call.call), "k: its pieces hold 255 bytes");
    free_call(&call);
    free_rows(&rows);
    dp_step_end(step);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void step_is_matched_by_what_it_began_with(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handles[2] = {open_sequence(engine, DP_LEAST_TOKENS, 0), open_sequence(engine, DP_LEAST_TOKENS, 0)};
    uint64_t swapped[2] = {handles[1], handles[0]};
    uint32_t lengths[2] = {1, 2}, ones[2] = {1, 1};
    dp_step *step = begin_step(engine, handles, lengths, 2, false);
    assert_int_equal(3, dp_step_tokens(step));
    assert_ok(dp_step_matches(step, handles, lengths, 2));
    assert_error(ATTN_INVALID_ARGUMENT, dp_step_matches(step, swapped, lengths, 2), "sequences[0]");
    assert_error(ATTN_INVALID_ARGUMENT, dp_step_matches(step, handles, ones, 2), "query_lengths[1]");
    assert_error(ATTN_INVALID_ARGUMENT, dp_step_matches(step, handles, NULL, 2), "query_lengths[1]");
    assert_code(ATTN_INVALID_ARGUMENT, dp_step_matches(step, handles, lengths, 1));
    dp_step_end(step);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 2));
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */

static void exhausted_pages_fail_the_step_and_nothing_else(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    config.pages_per_rank = 4;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[3] = {open_sequence(engine, DP_EXPLICIT, 0), open_sequence(engine, DP_EXPLICIT, 1),
                           open_sequence(engine, DP_EXPLICIT, 1)};
    grow(engine, &config, handles[0], 16);
    grow(engine, &config, handles[1], 32);
    grow(engine, &config, handles[2], 16);
    dp_step *step;
    assert_error(ATTN_RESOURCE_EXHAUSTED, try_begin_step(engine, handles, NULL, 3, false, &step),
                 "2 needed on rank 1, and 1 of its 4 are free");
    for (int i = 0; i < 3; i++)
        assert_false(describe(engine, handles[i]).busy);
    assert_int_equal(4, pages_free(engine));
    step = begin_step(engine, handles, NULL, 2, false);
    dp_upload *upload;
    assert_error(ATTN_RESOURCE_EXHAUSTED, dp_upload_begin(engine, TENANT, handles[2], 1, &upload), "rank 1");
    run_layers(step, &config.geometry, 0, 3);
    dp_step_end(step);
    /* A read needs no page, with the pool full. */
    dice dice = {1};
    layer_rows rows = random_rows(&dice, &config.geometry, 3, true);
    step = begin_step(engine, handles, NULL, 3, true);
    assert_ok(try_layer(step, &config.geometry, 0, &rows, NULL, NULL, NULL, NULL));
    dp_step_end(step);
    free_rows(&rows);
    assert_ok(dp_sequence_truncate(engine, TENANT, handles[1], 32));
    step = begin_step(engine, &handles[2], NULL, 1, false);
    run_layers(step, &config.geometry, 0, 3);
    dp_step_end(step);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    destroy_engine(engine);
}

static void exhausted_pages_for_a_copy_fail_the_step(void **state) {
    (void)state;
    dp_config config = small_config();
    config.pages_per_rank = 2;
    dp_engine *engine = create_engine(&config);
    uint64_t parent = open_sequence(engine, DP_LEAST_TOKENS, 0);
    grow(engine, &config, parent, 20);
    uint64_t child = fork_sequence(engine, parent, 20);
    dp_step *step;
    assert_error(ATTN_RESOURCE_EXHAUSTED, try_begin_step(engine, &child, NULL, 1, false, &step), "1 needed");
    close_sequence(engine, parent);
    step = begin_step(engine, &child, NULL, 1, false);
    dp_step_end(step);
    close_sequence(engine, child);
    destroy_engine(engine);
}

static void upload_is_unseen_until_complete(void **state) {
    (void)state;
    dp_config config = small_config();
    const attn_geometry *geometry = &config.geometry;
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0), length;
    grow(engine, &config, handle, 10);
    dp_upload *upload;
    dice dice = {1};
    layer_rows rows = random_rows(&dice, geometry, 40, false);
    assert_ok(dp_upload_begin(engine, TENANT, handle, 40, &upload));
    assert_int_equal(256 - 4, pages_free(engine));
    assert_error(ATTN_INVALID_ARGUMENT, try_chunk(upload, geometry, 0, &rows, 1, 5, NULL), "token_offset: 1");
    assert_ok(try_chunk(upload, geometry, 2, &rows, 0, 40, NULL));
    assert_ok(try_chunk(upload, geometry, 0, &rows, 0, 30, NULL));
    assert_error(ATTN_INVALID_ARGUMENT, try_chunk(upload, geometry, 0, &rows, 0, 1, NULL), "goes on at 30");
    assert_error(ATTN_INVALID_ARGUMENT, try_chunk(upload, geometry, 3, &rows, 0, 1, NULL), "layer: 3");
    assert_error(ATTN_INVALID_ARGUMENT, dp_upload_commit(upload, &length), "layer 0: 30 of the upload's 40");
    assert_ok(try_chunk(upload, geometry, 0, &rows, 30, 10, NULL));
    assert_error(ATTN_INVALID_ARGUMENT, dp_upload_commit(upload, &length), "layer 1: 0 of the upload's 40");
    assert_ok(try_chunk(upload, geometry, 1, &rows, 0, 40, NULL));
    assert_int_equal(10, describe(engine, handle).length);
    assert_true(describe(engine, handle).busy);
    assert_code(ATTN_ABORTED, dp_sequences_close(engine, TENANT, &handle, 1));
    assert_ok(dp_upload_commit(upload, &length));
    assert_int_equal(50, length);
    assert_int_equal(50, describe(engine, handle).length);
    assert_code(ATTN_FAILED_PRECONDITION, dp_upload_commit(upload, &length));
    dp_upload_end(upload);
    free_rows(&rows);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void chunk_longer_than_announced_is_refused(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_upload *upload;
    dice dice = {1};
    layer_rows rows = random_rows(&dice, &config.geometry, 5, false);
    assert_ok(dp_upload_begin(engine, TENANT, handle, 4, &upload));
    assert_error(ATTN_INVALID_ARGUMENT, try_chunk(upload, &config.geometry, 0, &rows, 0, 5, NULL), "announced 4");
    dp_upload_end(upload);
    free_rows(&rows);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void exhausted_pages_fail_an_upload_before_it_begins(void **state) {
    (void)state;
    dp_config config = small_config();
    config.pages_per_rank = 4;
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_upload *upload;
    assert_error(ATTN_RESOURCE_EXHAUSTED, dp_upload_begin(engine, TENANT, handle, 65, &upload),
                 "5 needed on rank 0, and 4 of its 4 are free");
    assert_int_equal(4, pages_free(engine));
    grow(engine, &config, handle, 64);
    assert_int_equal(0, pages_free(engine));
    close_sequence(engine, handle);
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */

static void unary_step_goes_from_call_to_call(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_step *step = begin_step(engine, &handle, NULL, 1, false);
    uint64_t id = dp_step_id(step);
    for (uint32_t layer = 0; layer < config.geometry.layers; layer++) {
        if (layer > 0) assert_ok(dp_step_take(engine, TENANT, id, &step));
        assert_int_equal(layer, dp_step_next_layer(step));
        run_layers(step, &config.geometry, layer, layer + 1);
        dp_step_put(step);
    }
    assert_code(ATTN_NOT_FOUND, dp_step_take(engine, TENANT, id, &step)); /* it has committed */
    assert_int_equal(1, describe(engine, handle).length);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void idle_step_is_aborted_owned_or_not(void **state) {
    (void)state;
    dp_config config = small_config();
    config.step_idle_ns = 1;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[2] = {open_sequence(engine, DP_LEAST_TOKENS, 0), open_sequence(engine, DP_LEAST_TOKENS, 0)};
    dp_step *left = begin_step(engine, &handles[0], NULL, 1, false);
    dp_step *owned = begin_step(engine, &handles[1], NULL, 1, false), *taken;
    uint64_t id = dp_step_id(left);
    run_layers(left, &config.geometry, 0, 1);
    run_layers(owned, &config.geometry, 0, 1);
    dp_step_put(left);
    dp_engine_reap(engine);
    assert_code(ATTN_NOT_FOUND, dp_step_take(engine, TENANT, id, &taken));
    assert_int_equal(256, pages_free(engine));
    assert_false(describe(engine, handles[0]).busy);
    assert_false(describe(engine, handles[1]).busy);
    assert_error(ATTN_ABORTED, try_one_layer(owned, &config.geometry, 1, NULL), "aborted");
    dp_step_put(owned);
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(2, counts.steps_aborted);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 2));
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */

static void reading_empty_sequences_gives_zeros_and_no_mass(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 3;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[2] = {open_sequence(engine, DP_LEAST_TOKENS, 0), open_sequence(engine, DP_SPREAD, 0)};
    uint32_t lengths[2] = {2, 3};
    float sinks[4] = {0.5f, -1, 0, 2}, out[5 * 4 * 40], lse[5 * 4];
    dice dice = {1};
    layer_rows rows = random_rows(&dice, &config.geometry, 5, true);
    for (int variant = 0; variant < 4; variant++) {
        dp_options options = {.return_lse = true, .batch_invariant = variant & 1};
        if (variant & 2) {
            options.sinks = sinks;
            options.sink_count = 4;
        }
        dp_step *step = begin_step(engine, handles, lengths, 2, true);
        memset(out, 0x77, sizeof out);
        assert_ok(try_layer(step, &config.geometry, 0, &rows, &options, NULL, out, lse));
        dp_step_end(step);
        for (int i = 0; i < 5 * 4 * 40; i++)
            assert_true(out[i] == 0);
        for (int i = 0; i < 5 * 4; i++) {
            if (variant & 2)
                assert_true(fabsf(lse[i] - sinks[i % 4]) < 1e-6f);
            else
                assert_true(lse[i] == -INFINITY);
        }
    }
    free_rows(&rows);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 2));
    destroy_engine(engine);
}

static void step_of_1024_sequences_on_four_ranks(void **state) {
    (void)state;
    enum { COUNT = 1024 };
    dp_config config = small_config();
    config.backend = "cpu";
    config.ranks = 4;
    config.max_sequences = COUNT;
    config.max_batch = COUNT;
    config.pages_per_rank = 512;
    const attn_geometry *geometry = &config.geometry;
    dp_engine *engine = create_engine(&config);
    uint64_t *handles = malloc(COUNT * sizeof *handles);
    uint32_t *ranks = malloc(COUNT * sizeof *ranks);
    assert_ok(dp_sequences_open(engine, TENANT, COUNT, DP_LEAST_TOKENS, 0, handles, ranks));
    for (uint32_t i = 0; i < COUNT; i++)
        assert_int_equal(i % 4, ranks[i]);
    /* With one token each, the outputs are that token's values. */
    dice dice = {1};
    float *out = malloc(COUNT * attn_out_row_bytes(geometry));
    dp_step *step = begin_step(engine, handles, NULL, COUNT, false);
    for (uint32_t layer = 0; layer < geometry->layers; layer++) {
        layer_rows rows = random_rows(&dice, geometry, COUNT, false);
        assert_ok(try_layer(step, geometry, layer, &rows, NULL, &dice, out, NULL));
        const float *values = rows.v;
        for (uint32_t i = 0; i < COUNT; i++) {
            for (uint32_t h = 0; h < 4; h++) {
                for (uint32_t e = 0; e < 40; e++) {
                    float expected = values[(i * 2 + h / 2) * 40 + e];
                    if (fabsf(out[(i * 4 + h) * 40 + e] - expected) > 1e-6f) fail_msg("row %u head %u", i, h);
                }
            }
        }
        free_rows(&rows);
    }
    dp_step_end(step);
    for (uint32_t r = 0; r < 4; r++)
        assert_int_equal(256, rank_info(engine, r).tokens);
    assert_ok(dp_sequences_close(engine, TENANT, handles, COUNT));
    free(out);
    free(ranks);
    free(handles);
    destroy_engine(engine);
}

static void long_query_crosses_from_one_rank_to_the_next(void **state) {
    (void)state;
    /* 3 rows before a chunk border and 125 behind: parts of the new rows on two ranks, keys stored on both. */
    dp_config config = small_config();
    config.max_sequences = 8;
    float out[2][128 * 4 * 40], lse[2][128 * 4];
    for (int spread = 0; spread < 2; spread++) {
        config.ranks = spread ? 3 : 1;
        dp_engine *engine = create_engine(&config);
        uint64_t handle = open_sequence(engine, spread ? DP_SPREAD : DP_LEAST_TOKENS, 0);
        dice same = {8}, cuts = {9};
        assert_ok(try_upload(engine, &config.geometry, &same, &cuts, handle, 2 * ATTN_CHUNK_TOKENS - 3));
        uint32_t rows_a_step = 128;
        dp_options options = {.return_lse = true, .batch_invariant = true};
        dp_step *step = begin_step(engine, &handle, &rows_a_step, 1, false);
        for (uint32_t layer = 0; layer < config.geometry.layers; layer++) {
            layer_rows rows = random_rows(&same, &config.geometry, 128, false);
            assert_ok(try_layer(step, &config.geometry, layer, &rows, &options, &cuts, out[spread], lse[spread]));
            free_rows(&rows);
        }
        dp_step_end(step);
        if (spread) assert_int_equal(125, rank_info(engine, 2).tokens);
        close_sequence(engine, handle);
        destroy_engine(engine);
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
    assert_memory_equal(lse[0], lse[1], sizeof lse[0]);
}

static void rows_in_one_span_are_used_in_place(void **state) {
    (void)state;
    dp_config config = small_config();
    const attn_geometry *geometry = &config.geometry;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[4];
    for (int i = 0; i < 4; i++)
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_step *step = begin_step(engine, handles, NULL, 4, false);
    size_t row_bytes = attn_query_row_bytes(geometry) + attn_key_row_bytes(geometry) + attn_value_row_bytes(geometry);
    run_layers(step, geometry, 0, 1);
    assert_int_equal(4 * row_bytes, rank_info(engine, 0).bytes_in_place);
    assert_int_equal(0, rank_info(engine, 0).bytes_gathered);
    /* Queries in two spans, cut inside row 1: that row is gathered, the others are not. */
    dice dice = {1};
    layer_rows rows = random_rows(&dice, geometry, 4, false);
    waiting_call call;
    prepare_call(&call, geometry, 1, &rows, NULL, NULL);
    dp_span halves[2] = {{call.q.memory, 700}, {call.q.memory + 700, 4 * 512 - 700}};
    call.call.queries = (dp_tensor_view){halves, 2, 4 * 512};
    assert_ok(dp_step_layer(step, &call.call));
    assert_ok(wait_for_call(&call));
    assert_int_equal(512, rank_info(engine, 0).bytes_gathered);
    assert_int_equal(8 * row_bytes - 512, rank_info(engine, 0).bytes_in_place);
    free_call(&call);
    free_rows(&rows);
    dp_step_end(step);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 4));
    destroy_engine(engine);
}

static void result_outlives_the_engine(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_step *step = begin_step(engine, &handle, NULL, 1, false);
    dice dice = {1};
    layer_rows rows = random_rows(&dice, &config.geometry, 1, false);
    waiting_call call;
    prepare_call(&call, &config.geometry, 0, &rows, NULL, NULL);
    assert_ok(dp_step_layer(step, &call.call));
    assert_ok(wait_for_call(&call));
    assert_null(call.call.result->lse);
    assert_int_equal(1, call.call.timing_count);
    assert_int_equal(1, call.call.timing[0].tokens);
    dp_step_end(step);
    close_sequence(engine, handle);
    destroy_engine(engine);
    memset(call.call.result->out, 0, call.call.result->out_size);
    free_call(&call);
    free_rows(&rows);
}

static void wrong_configuration_names_its_field(void **state) {
    (void)state;
    dp_engine *engine;
    dp_config config = small_config();
    config.ranks = 0;
    assert_error(ATTN_INVALID_ARGUMENT, dp_engine_create(&config, &engine), "ranks");
    config = small_config();
    config.max_batch = 0;
    assert_error(ATTN_INVALID_ARGUMENT, dp_engine_create(&config, &engine), "max_batch");
    config = small_config();
    config.max_sequence_tokens = (uint64_t)UINT32_MAX + 1;
    assert_error(ATTN_INVALID_ARGUMENT, dp_engine_create(&config, &engine), "max_sequence_tokens");
    config = small_config();
    config.backend = "abacus";
    assert_code(ATTN_INVALID_ARGUMENT, dp_engine_create(&config, &engine));
    config = small_config();
    config.geometry.head_dim = 33;
    assert_error(ATTN_INVALID_ARGUMENT, dp_engine_create(&config, &engine), "head_dim");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(step_given_up_at_any_layer_leaves_no_trace),
        cmocka_unit_test(abandoned_step_does_not_change_later_outputs),
        cmocka_unit_test(bad_requests_are_refused_and_change_nothing),
        cmocka_unit_test(bad_layers_are_refused_and_the_step_goes_on),
        cmocka_unit_test(spans_that_hold_less_than_they_claim_are_refused),
        cmocka_unit_test(step_is_matched_by_what_it_began_with),
        cmocka_unit_test(exhausted_pages_fail_the_step_and_nothing_else),
        cmocka_unit_test(exhausted_pages_for_a_copy_fail_the_step),
        cmocka_unit_test(upload_is_unseen_until_complete),
        cmocka_unit_test(chunk_longer_than_announced_is_refused),
        cmocka_unit_test(exhausted_pages_fail_an_upload_before_it_begins),
        cmocka_unit_test(unary_step_goes_from_call_to_call),
        cmocka_unit_test(idle_step_is_aborted_owned_or_not),
        cmocka_unit_test(reading_empty_sequences_gives_zeros_and_no_mass),
        cmocka_unit_test(step_of_1024_sequences_on_four_ranks),
        cmocka_unit_test(long_query_crosses_from_one_rank_to_the_next),
        cmocka_unit_test(rows_in_one_span_are_used_in_place),
        cmocka_unit_test(result_outlives_the_engine),
        cmocka_unit_test(wrong_configuration_names_its_field),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
