/* Pages, forks, truncation, quotas and placement: every page is accounted for, whatever happens. */
#include "dp/tests/fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static dice any_dice(uint64_t seed) { return (dice){seed}; }

/* Grows one sequence by `tokens` with uploads. */
static void grow(dp_engine *engine, const dp_config *config, uint64_t handle, uint32_t tokens) {
    dice contents = any_dice(handle), cuts = any_dice(tokens);
    assert_ok(try_upload(engine, &config->geometry, &contents, &cuts, handle, tokens));
}

/* ------------------------------------------------------------------------------------------- */
/* Pages */

static void pages_follow_the_length(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    uint32_t length = 0;
    static const uint32_t steps[] = {1, 14, 1, 1, 15, 100, 128};
    for (uint32_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        dice dice = any_dice(i);
        grow_by_step(engine, &config.geometry, &dice, &handle, &steps[i], 1);
        length += steps[i];
        dp_sequence_info info = describe(engine, handle);
        assert_int_equal(length, info.length);
        assert_int_equal((length + 15) / 16, info.pages);
        assert_int_equal(256 - info.pages, pages_free(engine));
        assert_int_equal(length, rank_info(engine, 0).tokens);
        assert_false(info.busy);
    }
    for (uint32_t to = length; to > 0; to -= to > 37 ? 37 : to) {
        assert_ok(dp_sequence_truncate(engine, TENANT, handle, to));
        assert_int_equal((to + 15) / 16, describe(engine, handle).pages);
    }
    assert_ok(dp_sequence_truncate(engine, TENANT, handle, 0));
    assert_int_equal(256, pages_free(engine));
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void fork_shares_pages_and_copies_the_partial_one_when_written(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t parent = open_sequence(engine, DP_LEAST_TOKENS, 0);
    grow(engine, &config, parent, 40);
    assert_int_equal(253, pages_free(engine));
    uint64_t child = fork_sequence(engine, parent, 40);
    assert_int_equal(253, pages_free(engine));
    assert_int_equal(3, describe(engine, child).shared_pages);
    assert_int_equal(80, rank_info(engine, 0).tokens);
    dice dice = any_dice(1);
    grow_by_step(engine, &config.geometry, &dice, &child, NULL, 1);
    assert_int_equal(252, pages_free(engine)); /* the copy of the partial page */
    assert_int_equal(2, describe(engine, child).shared_pages);
    assert_int_equal(2, describe(engine, parent).shared_pages);
    grow_by_step(engine, &config.geometry, &dice, &parent, NULL, 1); /* now its own: written in place */
    assert_int_equal(252, pages_free(engine));
    close_sequence(engine, parent);
    assert_int_equal(253, pages_free(engine));
    assert_int_equal(0, describe(engine, child).shared_pages);
    close_sequence(engine, child);
    destroy_engine(engine);
}

static void fork_at_a_page_border_needs_no_copy(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t parent = open_sequence(engine, DP_LEAST_TOKENS, 0);
    grow(engine, &config, parent, 40);
    uint64_t child = fork_sequence(engine, parent, 32);
    dice dice = any_dice(1);
    grow_by_step(engine, &config.geometry, &dice, &child, NULL, 1);
    assert_int_equal(252, pages_free(engine));
    assert_int_equal(2, describe(engine, child).shared_pages);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){parent, child}, 2));
    destroy_engine(engine);
}

static void aborted_copy_on_write_leaves_the_page_shared(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t both[2] = {open_sequence(engine, DP_LEAST_TOKENS, 0), 0};
    grow(engine, &config, both[0], 20);
    both[1] = fork_sequence(engine, both[0], 20);
    dp_step *step = begin_step(engine, both, NULL, 2, false);
    assert_int_equal(252, pages_free(engine)); /* a copy for each of them */
    dp_step_end(step);
    assert_int_equal(254, pages_free(engine));
    assert_int_equal(2, describe(engine, both[0]).shared_pages);
    assert_ok(dp_sequences_close(engine, TENANT, both, 2));
    destroy_engine(engine);
}

static void fork_longer_than_its_parent_is_refused(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t parent = open_sequence(engine, DP_LEAST_TOKENS, 0), child;
    uint32_t rank;
    grow(engine, &config, parent, 5);
    assert_error(ATTN_INVALID_ARGUMENT, dp_sequence_fork(engine, TENANT, parent, 6, &child, &rank), "length: 6");
    assert_error(ATTN_INVALID_ARGUMENT, dp_sequence_truncate(engine, TENANT, parent, 6), "length: 6");
    close_sequence(engine, parent);
    destroy_engine(engine);
}

static void spread_sequences_take_pages_where_their_chunks_are(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 3;
    dp_engine *engine = create_engine(&config);
    uint64_t handle;
    uint32_t home;
    assert_ok(dp_sequences_open(engine, TENANT, 1, DP_SPREAD, 0, &handle, &home));
    assert_int_equal(0, home);
    grow(engine, &config, handle, 4 * ATTN_CHUNK_TOKENS + 17);
    assert_true(describe(engine, handle).spread);
    assert_int_equal(2 * ATTN_CHUNK_TOKENS, rank_info(engine, 0).tokens);
    assert_int_equal(ATTN_CHUNK_TOKENS + 17, rank_info(engine, 1).tokens);
    assert_int_equal(ATTN_CHUNK_TOKENS, rank_info(engine, 2).tokens);
    assert_int_equal(256 - 64, rank_info(engine, 0).pages_free);
    assert_int_equal(256 - 34, rank_info(engine, 1).pages_free);
    assert_int_equal(256 - 32, rank_info(engine, 2).pages_free);
    uint64_t child = fork_sequence(engine, handle, 4 * ATTN_CHUNK_TOKENS + 1);
    dice dice = any_dice(4);
    uint32_t rows = 20;
    grow_by_step(engine, &config.geometry, &dice, &child, &rows, 1);
    assert_int_equal(256 - 36, rank_info(engine, 1).pages_free); /* a copy and one more */
    assert_ok(dp_sequence_truncate(engine, TENANT, child, ATTN_CHUNK_TOKENS));
    assert_int_equal(256 - 34, rank_info(engine, 1).pages_free);
    assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){handle, child}, 2));
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* A model: random operations, and what they should have left */

enum { MODEL_SEQUENCES = 12 };

typedef struct {
    uint64_t handle; /* 0: not open */
    uint32_t length;
} model_sequence;

typedef struct {
    dp_engine *engine;
    const dp_config *config;
    dice dice;
    model_sequence sequences[MODEL_SEQUENCES];
} model;

static model_sequence *pick(model *model, bool open) {
    uint32_t first = dice_below(&model->dice, MODEL_SEQUENCES);
    for (uint32_t i = 0; i < MODEL_SEQUENCES; i++) {
        model_sequence *sequence = &model->sequences[(first + i) % MODEL_SEQUENCES];
        if ((sequence->handle != 0) == open) return sequence;
    }
    return NULL;
}

static void model_open(model *model) {
    model_sequence *sequence = pick(model, false);
    if (sequence == NULL) return;
    sequence->handle = open_sequence(model->engine, (dp_placement)(dice_below(&model->dice, 4)),
                                     dice_below(&model->dice, model->config->ranks));
    sequence->length = 0;
}

static void model_close(model *model) {
    model_sequence *sequence = pick(model, true);
    if (sequence == NULL) return;
    close_sequence(model->engine, sequence->handle);
    sequence->handle = 0;
}

static void model_fork(model *model) {
    model_sequence *parent = pick(model, true), *child = pick(model, false);
    if (parent == NULL || child == NULL) return;
    child->length = dice_below(&model->dice, parent->length + 1);
    child->handle = fork_sequence(model->engine, parent->handle, child->length);
}

static void model_truncate(model *model) {
    model_sequence *sequence = pick(model, true);
    if (sequence == NULL) return;
    sequence->length = dice_below(&model->dice, sequence->length + 1);
    assert_ok(dp_sequence_truncate(model->engine, TENANT, sequence->handle, sequence->length));
}

/* An upload that may be given up halfway, or refused for want of pages. */
static void model_upload(model *model) {
    model_sequence *sequence = pick(model, true);
    if (sequence == NULL) return;
    uint32_t tokens = 1 + dice_below(&model->dice, 700);
    dice contents = any_dice(1);
    if (dice_below(&model->dice, 3) == 0) {
        dp_upload *upload;
        attn_status status = dp_upload_begin(model->engine, TENANT, sequence->handle, tokens, &upload);
        if (attn_failed(status)) {
            assert_code(ATTN_RESOURCE_EXHAUSTED, status);
            return;
        }
        layer_rows rows = random_rows(&contents, &model->config->geometry, 1, false);
        assert_ok(try_chunk(upload, &model->config->geometry, 0, &rows, 0, 1, NULL));
        free_rows(&rows);
        dp_upload_end(upload);
        return;
    }
    attn_status status =
        try_upload(model->engine, &model->config->geometry, &contents, &model->dice, sequence->handle, tokens);
    if (attn_failed(status))
        assert_code(ATTN_RESOURCE_EXHAUSTED, status);
    else
        sequence->length += tokens;
}

/* A step of some sequences, perhaps one that reads, perhaps given up after some layers. */
static void model_step(model *model) {
    const attn_geometry *geometry = &model->config->geometry;
    uint64_t handles[MODEL_SEQUENCES];
    uint32_t query_lengths[MODEL_SEQUENCES], picked[MODEL_SEQUENCES], count = 0;
    for (uint32_t i = 0; i < MODEL_SEQUENCES; i++) {
        if (model->sequences[i].handle == 0 || dice_below(&model->dice, 2) == 0) continue;
        picked[count] = i;
        handles[count] = model->sequences[i].handle;
        query_lengths[count++] = 1 + dice_below(&model->dice, 40);
    }
    if (count == 0) return;
    bool read_only = dice_below(&model->dice, 4) == 0;
    uint32_t layers = dice_below(&model->dice, 2) == 0 ? dice_below(&model->dice, geometry->layers) : geometry->layers;
    dp_step *step;
    attn_status status = try_begin_step(model->engine, handles, query_lengths, count, read_only, &step);
    if (attn_failed(status)) {
        assert_code(ATTN_RESOURCE_EXHAUSTED, status);
        return;
    }
    for (uint32_t layer = 0; layer < layers; layer++) {
        layer_rows rows = random_rows(&model->dice, geometry, dp_step_tokens(step), read_only);
        assert_ok(try_layer(step, geometry, layer, &rows, NULL, &model->dice, NULL, NULL));
        free_rows(&rows);
    }
    dp_step_end(step);
    if (read_only || layers < geometry->layers) return;
    for (uint32_t i = 0; i < count; i++)
        model->sequences[picked[i]].length += query_lengths[i];
}

static void model_check(model *model) {
    uint64_t tokens = 0, held = 0, open = 0, unshared = 0;
    for (uint32_t i = 0; i < MODEL_SEQUENCES; i++) {
        if (model->sequences[i].handle == 0) continue;
        dp_sequence_info info = describe(model->engine, model->sequences[i].handle);
        assert_int_equal(model->sequences[i].length, info.length);
        assert_int_equal((info.length + 15) / 16, info.pages);
        assert_false(info.busy);
        tokens += info.length;
        unshared += info.pages - info.shared_pages;
        open++;
    }
    for (uint32_t r = 0; r < model->config->ranks; r++) {
        dp_rank_info info = rank_info(model->engine, r);
        held += info.tokens;
        assert_int_equal(0, info.tokens_in_flight);
    }
    assert_int_equal(tokens, held);
    uint64_t used = (uint64_t)model->config->ranks * model->config->pages_per_rank - pages_free(model->engine);
    assert_true(used >= unshared);
    assert_true(used <= (tokens + 15 * open) / 16);
    dp_engine_counts counts;
    dp_engine_count(model->engine, &counts);
    assert_int_equal(open, counts.sequences);
    assert_int_equal(0, counts.steps);
}

static void run_model(uint32_t ranks, uint32_t operations) {
    dp_config config = small_config();
    config.backend = "cpu";
    config.ranks = ranks;
    config.pages_per_rank = 200 / ranks;
    config.geometry.layers = 2;
    model model = {.engine = create_engine(&config), .config = &config, .dice = any_dice(ranks)};
    for (uint32_t i = 0; i < operations; i++) {
        switch (dice_below(&model.dice, 9)) {
        case 0:
        case 1: model_open(&model); break;
        case 2: model_close(&model); break;
        case 3: model_fork(&model); break;
        case 4: model_truncate(&model); break;
        case 5: model_upload(&model); break;
        default: model_step(&model); break;
        }
        model_check(&model);
    }
    for (uint32_t i = 0; i < MODEL_SEQUENCES; i++) {
        if (model.sequences[i].handle != 0) close_sequence(model.engine, model.sequences[i].handle);
    }
    destroy_engine(model.engine);
}

static void random_operations_lose_no_page(void **state) {
    (void)state;
    for (uint32_t ranks = 1; ranks <= 4; ranks++)
        run_model(ranks, 400);
}

/* ------------------------------------------------------------------------------------------- */
/* What forks share must not be written by either: contents, not counts */

static void read_one(dp_engine *engine, const dp_config *config, uint64_t handle, const layer_rows *rows, float *out) {
    dp_step *step = begin_step(engine, &handle, NULL, 1, true);
    assert_ok(try_layer(step, &config->geometry, 1, rows, NULL, NULL, out, NULL));
    dp_step_end(step);
}

static void writing_to_a_fork_leaves_its_relatives_as_they_were(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    dp_engine *engine = create_engine(&config);
    for (int spread = 0; spread < 2; spread++) {
        uint64_t family[3];
        float before[3][4 * 40], after[4 * 40];
        dice dice = any_dice(9);
        layer_rows query = random_rows(&dice, &config.geometry, 1, true);
        family[0] = open_sequence(engine, spread ? DP_SPREAD : DP_LEAST_TOKENS, 0);
        grow(engine, &config, family[0], 1000);
        family[1] = fork_sequence(engine, family[0], 1000);
        family[2] = fork_sequence(engine, family[1], 501);
        for (int i = 0; i < 3; i++)
            read_one(engine, &config, family[i], &query, before[i]);
        for (int writer = 0; writer < 3; writer++) {
            uint32_t rows = 3 + (uint32_t)writer;
            grow_by_step(engine, &config.geometry, &dice, &family[writer], &rows, 1);
            read_one(engine, &config, family[writer], &query, after);
            assert_memory_not_equal(before[writer], after, sizeof after);
            memcpy(before[writer], after, sizeof after);
            for (int i = 0; i < 3; i++) {
                read_one(engine, &config, family[i], &query, after);
                assert_memory_equal(before[i], after, sizeof after);
            }
        }
        /* Rolled back and written over: the same tokens are in the fork still. */
        uint64_t twin = fork_sequence(engine, family[0], 1003);
        assert_ok(dp_sequence_truncate(engine, TENANT, family[0], 995));
        uint32_t rows = 8;
        grow_by_step(engine, &config.geometry, &dice, &family[0], &rows, 1);
        read_one(engine, &config, twin, &query, after);
        assert_memory_equal(before[0], after, sizeof after);
        close_sequence(engine, twin);
        assert_ok(dp_sequences_close(engine, TENANT, family, 3));
        free_rows(&query);
    }
    destroy_engine(engine);
}

/* 1000 tokens, cut to 501 and grown by two steps: in a sequence of its own, or in a fork whose pages are shared. */
static uint64_t make_cut_and_grown(dp_engine *engine, const dp_config *config, dp_placement placement, bool forked) {
    const attn_geometry *geometry = &config->geometry;
    dice contents = any_dice(7), cuts = any_dice(8);
    uint64_t handle = open_sequence(engine, placement, 0);
    assert_ok(try_upload(engine, geometry, &contents, &cuts, handle, 1000));
    if (forked)
        handle = fork_sequence(engine, handle, 501);
    else
        assert_ok(dp_sequence_truncate(engine, TENANT, handle, 501));
    uint32_t rows = 3;
    grow_by_step(engine, geometry, &contents, &handle, &rows, 1);
    if (forked) {
        /* And a fork of the fork that grows by an upload, which has to copy too. */
        handle = fork_sequence(engine, handle, 504);
    }
    assert_ok(try_upload(engine, geometry, &contents, &cuts, handle, 20));
    return handle;
}

static void fork_that_grew_reads_like_a_sequence_of_its_own(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    for (int spread = 0; spread < 2; spread++) {
        dp_engine *engine = create_engine(&config);
        dp_placement placement = spread ? DP_SPREAD : DP_LEAST_TOKENS;
        float own[4 * 40], forked[4 * 40];
        dice dice = any_dice(9);
        layer_rows query = random_rows(&dice, &config.geometry, 1, true);
        uint64_t handle = make_cut_and_grown(engine, &config, placement, false);
        read_one(engine, &config, handle, &query, own);
        close_sequence(engine, handle);
        handle = make_cut_and_grown(engine, &config, placement, true);
        assert_int_equal(524, describe(engine, handle).length);
        assert_true(describe(engine, handle).shared_pages > 0);
        read_one(engine, &config, handle, &query, forked);
        assert_memory_equal(own, forked, sizeof own);
        free_rows(&query);
        dp_engine_destroy(engine);
    }
}

static void open_read_sees_what_was_there_when_it_began(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    float before[4 * 40], after[4 * 40];
    dice dice = any_dice(5);
    layer_rows query = random_rows(&dice, &config.geometry, 1, true);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    grow(engine, &config, handle, 100);
    dp_step *reader = begin_step(engine, &handle, NULL, 1, true);
    assert_ok(try_layer(reader, &config.geometry, 0, &query, NULL, NULL, before, NULL));
    assert_false(describe(engine, handle).busy);
    assert_ok(dp_sequence_truncate(engine, TENANT, handle, 90));
    grow(engine, &config, handle, 30);
    assert_ok(try_layer(reader, &config.geometry, 0, &query, NULL, NULL, after, NULL));
    assert_memory_equal(before, after, sizeof after);
    close_sequence(engine, handle);
    uint64_t next = open_sequence(engine, DP_LEAST_TOKENS, 0);
    grow(engine, &config, next, 3000);
    assert_ok(try_layer(reader, &config.geometry, 0, &query, NULL, NULL, after, NULL));
    assert_memory_equal(before, after, sizeof after);
    dp_step_end(reader);
    close_sequence(engine, next);
    free_rows(&query);
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Quotas and limits */

static void quotas_bind_their_tenant_only(void **state) {
    (void)state;
    uint64_t max_pages[TENANTS] = {4, 0, 0}, max_sequences[TENANTS] = {2, 0, 0};
    dp_config config = small_config();
    config.tenant_max_pages = max_pages;
    config.tenant_max_sequences = max_sequences;
    dp_engine *engine = create_engine(&config);
    uint64_t mine[2], theirs[3], extra;
    uint32_t ranks[3];
    assert_ok(dp_sequences_open(engine, TENANT, 2, DP_LEAST_TOKENS, 0, mine, ranks));
    assert_error(ATTN_RESOURCE_EXHAUSTED, dp_sequences_open(engine, TENANT, 1, DP_LEAST_TOKENS, 0, &extra, ranks),
                 "1 wanted, and 2 of the quota of 2 are open");
    assert_ok(dp_sequences_open(engine, OTHER_TENANT, 3, DP_LEAST_TOKENS, 0, theirs, ranks));
    grow(engine, &config, mine[0], 48);
    dp_upload *upload;
    assert_error(ATTN_RESOURCE_EXHAUSTED, dp_upload_begin(engine, TENANT, mine[1], 17, &upload),
                 "2 needed, and 3 of the quota of 4");
    grow(engine, &config, mine[1], 16);
    dp_step *step;
    assert_code(ATTN_RESOURCE_EXHAUSTED, try_begin_step(engine, mine, NULL, 2, false, &step));
    /* A shared page counts for each of its holders. */
    close_sequence(engine, mine[1]);
    assert_code(ATTN_RESOURCE_EXHAUSTED, dp_sequence_fork(engine, TENANT, mine[0], 17, &mine[1], ranks));
    assert_ok(dp_sequence_fork(engine, TENANT, mine[0], 16, &mine[1], ranks));
    assert_ok(dp_sequences_close(engine, TENANT, mine, 2));
    assert_ok(dp_sequences_open(engine, TENANT, 2, DP_LEAST_TOKENS, 0, mine, ranks));
    assert_ok(dp_sequences_close(engine, TENANT, mine, 2));
    assert_ok(dp_sequences_close(engine, OTHER_TENANT, theirs, 3));
    destroy_engine(engine);
}

static void table_and_length_have_limits(void **state) {
    (void)state;
    dp_config config = small_config();
    config.max_sequences = 3;
    config.max_sequence_tokens = 100;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[4];
    uint32_t ranks[4];
    assert_error(ATTN_RESOURCE_EXHAUSTED, dp_sequences_open(engine, TENANT, 4, DP_LEAST_TOKENS, 0, handles, ranks),
                 "4 wanted, and 3 of 3");
    assert_code(ATTN_INVALID_ARGUMENT, dp_sequences_open(engine, TENANT, 0, DP_LEAST_TOKENS, 0, handles, ranks));
    assert_ok(dp_sequences_open(engine, TENANT, 3, DP_LEAST_TOKENS, 0, handles, ranks));
    dp_upload *upload;
    assert_error(ATTN_RESOURCE_EXHAUSTED, dp_upload_begin(engine, TENANT, handles[0], 101, &upload), "100 at most");
    assert_error(ATTN_RESOURCE_EXHAUSTED, dp_upload_begin(engine, TENANT, handles[0], UINT64_MAX, &upload),
                 "100 at most");
    assert_code(ATTN_INVALID_ARGUMENT, dp_upload_begin(engine, TENANT, handles[0], 0, &upload));
    grow(engine, &config, handles[0], 100);
    dp_step *step;
    assert_error(ATTN_RESOURCE_EXHAUSTED, try_begin_step(engine, handles, NULL, 1, false, &step), "100 at most");
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    destroy_engine(engine);
}

static void closing_is_all_or_nothing(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handles[3];
    for (int i = 0; i < 3; i++)
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_step *step = begin_step(engine, &handles[1], NULL, 1, false);
    assert_error(ATTN_ABORTED, dp_sequences_close(engine, TENANT, handles, 3), "sequences[1]");
    assert_code(ATTN_ABORTED, dp_sequence_truncate(engine, TENANT, handles[1], 0));
    assert_true(describe(engine, handles[1]).busy);
    dp_step_end(step);
    uint64_t twice[3] = {handles[0], handles[1], handles[0]};
    assert_error(ATTN_FAILED_PRECONDITION, dp_sequences_close(engine, TENANT, twice, 3),
                 "sequences[2]: the same sequence as sequences[0]");
    assert_code(ATTN_INVALID_ARGUMENT, dp_sequences_close(engine, TENANT, handles, 0));
    assert_int_equal(0, describe(engine, handles[0]).length);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    destroy_engine(engine);
}

static void idle_sequences_are_closed_busy_ones_are_not(void **state) {
    (void)state;
    dp_config config = small_config();
    config.sequence_idle_ns = 1;
    dp_engine *engine = create_engine(&config);
    uint64_t idle = open_sequence(engine, DP_LEAST_TOKENS, 0), busy = open_sequence(engine, DP_LEAST_TOKENS, 0);
    grow(engine, &config, idle, 50);
    dp_step *step = begin_step(engine, &busy, NULL, 1, false);
    dp_engine_reap(engine);
    dp_sequence_info info;
    assert_code(ATTN_NOT_FOUND, dp_sequences_describe(engine, TENANT, &idle, 1, &info));
    assert_ok(dp_sequences_describe(engine, TENANT, &busy, 1, &info));
    dp_step_end(step);
    dp_engine_reap(engine);
    destroy_engine(engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Placement */

static void least_tokens_levels_what_ranks_hold_and_have_in_flight(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 3;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[8];
    uint32_t ranks[8];
    assert_ok(dp_sequences_open(engine, TENANT, 6, DP_LEAST_TOKENS, 0, handles, ranks));
    for (uint32_t i = 0; i < 6; i++)
        assert_int_equal(i % 3, ranks[i]); /* empty ones spread evenly */
    grow(engine, &config, handles[0], 100);
    grow(engine, &config, handles[1], 10);
    dp_upload *upload;
    assert_ok(dp_upload_begin(engine, TENANT, handles[2], 50, &upload));
    assert_ok(dp_sequences_open(engine, TENANT, 1, DP_LEAST_TOKENS, 0, &handles[6], &ranks[6]));
    assert_int_equal(1, ranks[6]);
    grow(engine, &config, handles[6], 45);
    assert_ok(dp_sequences_open(engine, TENANT, 1, DP_LEAST_TOKENS, 0, &handles[7], &ranks[7]));
    assert_int_equal(2, ranks[7]); /* 50 in flight against 55 held */
    dp_upload_end(upload);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 8));
    destroy_engine(engine);
}

static void round_robin_and_explicit_go_where_they_say(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 3;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[8];
    uint32_t ranks[8];
    assert_ok(dp_sequences_open(engine, TENANT, 5, DP_ROUND_ROBIN, 0, handles, ranks));
    for (uint32_t i = 0; i < 5; i++)
        assert_int_equal(i % 3, ranks[i]);
    assert_ok(dp_sequences_open(engine, TENANT, 3, DP_EXPLICIT, 2, handles + 5, ranks + 5));
    for (uint32_t i = 5; i < 8; i++)
        assert_int_equal(2, ranks[i]);
    uint64_t none;
    assert_error(ATTN_INVALID_ARGUMENT, dp_sequences_open(engine, TENANT, 1, DP_EXPLICIT, 3, &none, ranks), "dp_rank");
    assert_int_equal(2, describe(engine, fork_sequence(engine, handles[7], 0)).rank);
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(9, counts.sequences);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 8));
    dp_engine_destroy(engine); /* with one still open: that is nobody's leak */
}

static void spread_on_one_rank_is_whole(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_SPREAD, 0);
    assert_false(describe(engine, handle).spread);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

static void engine_frees_the_tables_of_sequences_that_are_open(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    dp_engine *engine = create_engine(&config);
    uint64_t first = open_sequence(engine, DP_LEAST_TOKENS, 0);
    grow(engine, &config, first, 40);
    close_sequence(engine, first); /* the slot keeps its table.. */
    grow(engine, &config, open_sequence(engine, DP_SPREAD, 0), 40);
    grow(engine, &config, open_sequence(engine, DP_LEAST_TOKENS, 0), 40);
    dp_engine_destroy(engine); /* ..which the leak checker would find, if it were left behind the spread one's */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_follow_the_length),
        cmocka_unit_test(fork_shares_pages_and_copies_the_partial_one_when_written),
        cmocka_unit_test(fork_at_a_page_border_needs_no_copy),
        cmocka_unit_test(aborted_copy_on_write_leaves_the_page_shared),
        cmocka_unit_test(fork_longer_than_its_parent_is_refused),
        cmocka_unit_test(spread_sequences_take_pages_where_their_chunks_are),
        cmocka_unit_test(random_operations_lose_no_page),
        cmocka_unit_test(writing_to_a_fork_leaves_its_relatives_as_they_were),
        cmocka_unit_test(fork_that_grew_reads_like_a_sequence_of_its_own),
        cmocka_unit_test(open_read_sees_what_was_there_when_it_began),
        cmocka_unit_test(quotas_bind_their_tenant_only),
        cmocka_unit_test(table_and_length_have_limits),
        cmocka_unit_test(closing_is_all_or_nothing),
        cmocka_unit_test(idle_sequences_are_closed_busy_ones_are_not),
        cmocka_unit_test(least_tokens_levels_what_ranks_hold_and_have_in_flight),
        cmocka_unit_test(round_robin_and_explicit_go_where_they_say),
        cmocka_unit_test(spread_on_one_rank_is_whole),
        cmocka_unit_test(engine_frees_the_tables_of_sequences_that_are_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
