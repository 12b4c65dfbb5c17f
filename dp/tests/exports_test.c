/* Exports: what comes is what was stored when they began, from whole and spread sequences. */
#include "dp/tests/fixture.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    dp_export_chunk chunk; /* first */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done; /* guarded by lock */
    attn_saved_status status;
} waiting_read;

static void read_done(dp_export_chunk *chunk, attn_status status) {
    waiting_read *waiting = (waiting_read *)chunk;
    pthread_mutex_lock(&waiting->lock);
    attn_status_save(&waiting->status, status);
    waiting->done = true;
    pthread_cond_broadcast(&waiting->changed);
    pthread_mutex_unlock(&waiting->lock);
}

/* Rows of one layer of an export. */
static void read_layer(dp_export *export, const attn_geometry *geometry, uint32_t layer, dice *cuts, char *keys,
                       char *values) {
    for (uint64_t first = 0; first < dp_export_tokens(export);) {
        waiting_read waiting = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
        uint32_t tokens = 1 + dice_below(cuts, (uint32_t)(dp_export_tokens(export) - first));
        waiting.chunk = (dp_export_chunk){.layer = layer,
                                          .token_offset = first,
                                          .tokens = tokens,
                                          .keys = keys + first * attn_key_row_bytes(geometry),
                                          .values = values + first * attn_value_row_bytes(geometry),
                                          .done = read_done};
        assert_ok(dp_export_read(export, &waiting.chunk));
        pthread_mutex_lock(&waiting.lock);
        while (!waiting.done)
            pthread_cond_wait(&waiting.changed, &waiting.lock);
        pthread_mutex_unlock(&waiting.lock);
        assert_int_equal(ATTN_OK, waiting.status.code);
        first += tokens;
    }
}

/* Is the export tokens position .. of a sequence whose layers were uploaded from dice that began at `seed`? */
static void assert_exports(dp_export *export, const attn_geometry *geometry, uint64_t seed, uint32_t uploaded,
                           uint32_t position) {
    dice contents = {seed}, cuts = {position + 1};
    size_t tokens = dp_export_tokens(export), key_bytes = attn_key_row_bytes(geometry),
           value_bytes = attn_value_row_bytes(geometry);
    char *keys = malloc(tokens * key_bytes + 1), *values = malloc(tokens * value_bytes + 1);
    assert_non_null(keys);
    assert_non_null(values);
    for (uint32_t layer = 0; layer < geometry->layers; layer++) {
        layer_rows rows = random_rows(&contents, geometry, uploaded, false);
        read_layer(export, geometry, layer, &cuts, keys, values);
        assert_memory_equal(keys, (char *)rows.k + position * key_bytes, tokens * key_bytes);
        assert_memory_equal(values, (char *)rows.v + position * value_bytes, tokens * value_bytes);
        free_rows(&rows);
    }
    free(keys);
    free(values);
}

/* ------------------------------------------------------------------------------------------- */

static void ranges_of_whole_and_spread_sequences_are_what_was_uploaded(void **state) {
    (void)state;
    static const dp_placement placements[] = {DP_EXPLICIT, DP_SPREAD};
    static const struct {
        uint32_t position, tokens;
    } ranges[] = {{0, 0}, {0, 1}, {15, 2}, {500, 30}, {511, 700}, {1299, 1}};
    dp_config config = small_config();
    config.ranks = 3;
    dp_engine *engine = create_engine(&config);
    for (uint32_t p = 0; p < 2; p++) {
        uint64_t handle = open_sequence(engine, placements[p], 1);
        fill(engine, handle, 1300, 7);
        uint64_t free = pages_free(engine);
        for (size_t r = 0; r < sizeof ranges / sizeof *ranges; r++) {
            dp_export *export;
            assert_ok(dp_export_begin(engine, TENANT, handle, ranges[r].position, ranges[r].tokens, &export));
            uint32_t expected = ranges[r].tokens == 0 ? 1300 - ranges[r].position : ranges[r].tokens;
            assert_int_equal(expected, dp_export_tokens(export));
            assert_exports(export, &config.geometry, 7, 1300, ranges[r].position);
            dp_export_end(export);
            assert_int_equal(free, pages_free(engine));
        }
        close_sequence(engine, handle);
    }
    destroy_engine(engine);
}

static void what_is_held_outlives_its_sequence(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_SPREAD, 0), other;
    dp_export *export;
    fill(engine, handle, 1030, 9);
    assert_ok(dp_export_begin(engine, TENANT, handle, 10, 1010, &export));
    assert_ok(dp_sequence_truncate(engine, TENANT, handle, 100));
    fill(engine, handle, 500, 10); /* writes behind what is held, in pages of its own */
    close_sequence(engine, handle);
    other = open_sequence(engine, DP_SPREAD, 0);
    fill(engine, other, 2000, 11);
    assert_exports(export, &config.geometry, 9, 1030, 10);
    dp_export_end(export);
    close_sequence(engine, other);
    destroy_engine(engine); /* no page is left behind */
}

static void bad_ranges_and_chunks_are_refused(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_export *export;
    fill(engine, handle, 20, 1);
    assert_error(ATTN_NOT_FOUND, dp_export_begin(engine, TENANT, handle + 1, 0, 0, &export), "sequence");
    assert_error(ATTN_NOT_FOUND, dp_export_begin(engine, OTHER_TENANT, handle, 0, 0, &export), "sequence");
    assert_error(ATTN_INVALID_ARGUMENT, dp_export_begin(engine, TENANT, handle, 21, 0, &export), "position: 21");
    assert_error(ATTN_INVALID_ARGUMENT, dp_export_begin(engine, TENANT, handle, 20, 1, &export), "tokens: 1");
    assert_error(ATTN_INVALID_ARGUMENT, dp_export_begin(engine, TENANT, handle, 1, UINT64_MAX, &export), "tokens");
    assert_ok(dp_export_begin(engine, TENANT, handle, 20, 0, &export));
    assert_int_equal(0, dp_export_tokens(export));
    dp_export_end(export);
    assert_ok(dp_export_begin(engine, TENANT, handle, 4, 0, &export));
    dp_export_chunk chunk = {.layer = 3, .tokens = 1, .done = read_done};
    assert_error(ATTN_INVALID_ARGUMENT, dp_export_read(export, &chunk), "layer: 3");
    chunk.layer = 0;
    chunk.token_offset = 16;
    assert_error(ATTN_INVALID_ARGUMENT, dp_export_read(export, &chunk), "tokens: 1 at offset 16");
    chunk.tokens = 0;
    assert_error(ATTN_INVALID_ARGUMENT, dp_export_read(export, &chunk), "tokens: 0");
    dp_export_end(export);
    close_sequence(engine, handle);
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranges_of_whole_and_spread_sequences_are_what_was_uploaded),
        cmocka_unit_test(what_is_held_outlives_its_sequence),
        cmocka_unit_test(bad_ranges_and_chunks_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
