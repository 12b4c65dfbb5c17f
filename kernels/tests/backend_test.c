/* What every backend does besides the mathematics: creation, the pool, refusals, and nothing to do. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/dtype.h"
#include "kernels/tests/backend_fixture.h"

static const decode_options plain_options = {.scale = 0.125f};

/* ------------------------------------------------------------------------------------------- */
/* Creation */

static attn_status create(const char *kind, const char *isa, const attn_geometry *geometry, uint32_t pages) {
    attn_backend *backend = NULL;
    attn_backend_config config = {.kind = kind, .geometry = *geometry, .pages = pages, .workers = 1, .isa = isa};
    attn_status status = attn_backend_create(&config, &backend);
    if (attn_failed(status)) assert_null(backend);
    attn_backend_destroy(backend);
    return status;
}

static void unknown_kind_is_refused_with_those_there_are(void **state) {
    (void)state;
    attn_status status = create("abacus", NULL, &plain_geometry, 4);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(status.message, "abacus"));
    assert_non_null(strstr(status.message, "cpu"));
    assert_non_null(strstr(status.message, "reference"));
}

static void unknown_isa_is_refused(void **state) {
    (void)state;
    attn_status status = create("cpu", "mmx", &plain_geometry, 4);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(status.message, "mmx"));
}

static void auto_is_the_cpu(void **state) {
    (void)state;
    attn_backend *backend = NULL;
    attn_backend_config config = {.kind = "auto", .geometry = plain_geometry, .pages = 4, .workers = 2};
    assert_int_equal(attn_backend_create(&config, &backend).code, ATTN_OK);
    assert_non_null(strstr(attn_backend_describe(backend), "cpu"));
    attn_backend_destroy(backend);
}

static void destroying_nothing_is_fine(void **state) {
    (void)state;
    attn_backend_destroy(NULL);
}

static void bad_geometry_is_refused_naming_the_field(void **state) {
    static const struct {
        const char *field;
        attn_geometry geometry;
    } cases[] = {
        {"layers", {0, 8, 2, 64, 64, ATTN_BF16, 16, 0}},
        {"heads_kv", {1, 8, 0, 64, 64, ATTN_BF16, 16, 0}},
        {"heads_q", {1, 0, 2, 64, 64, ATTN_BF16, 16, 0}},
        {"heads_q", {1, 7, 2, 64, 64, ATTN_BF16, 16, 0}},
        {"heads_q", {1, 34, 2, 64, 64, ATTN_BF16, 16, 0}},
        {"head_dim", {1, 8, 2, 24, 64, ATTN_BF16, 16, 0}},
        {"head_dim", {1, 8, 2, 68, 64, ATTN_BF16, 16, 0}},
        {"head_dim", {1, 8, 2, 264, 64, ATTN_BF16, 16, 0}},
        {"head_dim_v", {1, 8, 2, 64, 260, ATTN_BF16, 16, 0}},
        {".dtype", {1, 8, 2, 64, 64, ATTN_FP8_E4M3, 16, 0}},
        {".dtype", {1, 8, 2, 64, 64, ATTN_FP8_E4M3, 16, ATTN_FP8_E4M3}},
        {".dtype", {1, 8, 2, 64, 64, (attn_dtype)5, 16, 0}},
        {"kv_dtype", {1, 8, 2, 64, 64, ATTN_FP32, 16, ATTN_FP8_E4M3}},
        {"kv_dtype", {1, 8, 2, 64, 64, ATTN_BF16, 16, ATTN_FP16}},
        {"kv_dtype", {1, 8, 2, 64, 64, ATTN_FP16, 16, (attn_dtype)5}},
        {"page_size", {1, 8, 2, 64, 64, ATTN_BF16, 0, 0}},
        {"page_size", {1, 8, 2, 64, 64, ATTN_BF16, 48, 0}},
        {"page_size", {1, 8, 2, 64, 64, ATTN_BF16, 256, 0}},
    };
    const backend_row *row = *state;
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        attn_status status = create(row->kind, row->isa, &cases[n].geometry, 4);
        assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
        assert_non_null(strstr(status.message, cases[n].field));
    }
    assert_int_equal(create(row->kind, row->isa, &plain_geometry, 0).code, ATTN_INVALID_ARGUMENT);
}

static void a_pool_beyond_all_memory_is_refused(void **state) {
    const backend_row *row = *state;
    attn_geometry geometry = {4096, 4096, 4096, 256, 256, ATTN_FP32, 128, 0};
    if (FIXTURE_SANITIZED) skip(); /* a sanitizer's allocator aborts instead */
    attn_status status = create(row->kind, row->isa, &geometry, 100000);
    if (status.code == ATTN_UNAVAILABLE) skip();
    assert_int_equal(status.code, ATTN_RESOURCE_EXHAUSTED);
}

static void a_backend_tells_its_geometry_and_itself(void **state) {
    test_pool pool;
    pool_open(&pool, *state, &plain_geometry, 4, 2, 1);
    const attn_geometry *geometry = attn_backend_geometry(pool.backend);
    assert_memory_equal(geometry, &pool.geometry, sizeof *geometry);
    assert_true(strlen(attn_backend_describe(pool.backend)) > 0);
    assert_int_equal(attn_backend_plans_rejected(pool.backend), 0);
    pool_close(&pool);
}

static void sizes_of_rows_and_pages_follow_the_geometry(void **state) {
    (void)state;
    attn_geometry geometry = {3, 8, 2, 64, 96, ATTN_BF16, 32, 0};
    assert_int_equal(attn_kv_dtype(&geometry), ATTN_BF16);
    assert_int_equal(attn_query_row_bytes(&geometry), 8 * 64 * 2);
    assert_int_equal(attn_key_row_bytes(&geometry), 2 * 64 * 2);
    assert_int_equal(attn_value_row_bytes(&geometry), 2 * 96 * 2);
    assert_int_equal(attn_out_row_bytes(&geometry), 8 * 96 * 2);
    assert_int_equal(attn_page_bytes(&geometry), 2 * (64 + 96) * 2 * 32 * 3);
    geometry.kv_dtype = ATTN_FP8_E4M3; /* changes what is stored, not what comes and goes */
    assert_int_equal(attn_kv_dtype(&geometry), ATTN_FP8_E4M3);
    assert_int_equal(attn_key_row_bytes(&geometry), 2 * 64 * 2);
    assert_int_equal(attn_value_row_bytes(&geometry), 2 * 96 * 2);
    assert_int_equal(attn_page_bytes(&geometry), 2 * (64 + 96) * 32 * 3);
}

/* In the configuration of a geometry with this kv_dtype: k_scales or v_scales of which number 3 is `scale`. */
static attn_status create_with_scale(const backend_row *row, attn_dtype kv_dtype, bool of_values, float scale) {
    float scales[LAYERS * 2] = {1, 1, 1, scale};
    attn_backend *backend = NULL;
    attn_backend_config config = {.kind = row->kind, .geometry = plain_geometry, .pages = 4, .isa = row->isa};
    config.geometry.kv_dtype = kv_dtype;
    *(of_values ? &config.v_scales : &config.k_scales) = scales;
    attn_status status = attn_backend_create(&config, &backend);
    if (attn_failed(status)) assert_null(backend);
    attn_backend_destroy(backend);
    return status;
}

static void a_scale_that_is_none_is_refused_by_its_index(void **state) {
    static const float wrong[] = {0, -1, NAN, INFINITY};
    for (uint32_t of_values = 0; of_values < 2; of_values++) {
        for (size_t n = 0; n < sizeof wrong / sizeof *wrong; n++) {
            attn_status status = create_with_scale(*state, ATTN_FP8_E4M3, of_values, wrong[n]);
            assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
            assert_non_null(
                strstr(status.message, of_values ? "v_scales[3] (layer 1, KV head 1)" : "k_scales[3] (layer"));
        }
        attn_status status = create_with_scale(*state, ATTN_BF16, of_values, 1);
        assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
        assert_non_null(strstr(status.message, of_values ? "v_scales" : "k_scales"));
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Nothing to attend to */

static void an_empty_batch_does_nothing(void **state) {
    test_pool pool;
    pool_open(&pool, *state, &plain_geometry, 4, 2, 1);
    attn_batch batch = {.scale = 1};
    attn_timing timing = {.plan_ns = 1, .attention_ns = 2, .combine_ns = 3, .device_ns = 4, .launches = 5};
    assert_int_equal(attn_backend_decode(pool.backend, &batch, NULL, &timing).code, ATTN_OK);
    assert_true(timing.plan_ns == 0 && timing.attention_ns == 0 && timing.combine_ns == 0);
    assert_true(timing.device_ns == 0 && timing.launches == 0);
    assert_int_equal(attn_backend_decode(pool.backend, &batch, NULL, NULL).code, ATTN_OK);
    pool_close(&pool);
}

static void assert_rows_are_zero(const test_sequence *sequence, const attn_geometry *geometry) {
    for (size_t n = 0; n < sequence_out_bytes(sequence, geometry); n++) {
        assert_int_equal(sequence->out[n], 0);
    }
}

static void an_empty_range_gives_zero_and_minus_infinity(void **state) {
    for (uint32_t mode = 0; mode < 4; mode++) {
        float sinks[8] = {0, 1, 2, 3, -1, -2, -3, -4};
        test_pool pool;
        test_sequence empty, full, other, *sequences[] = {&empty, &full, &other};
        pool_open(&pool, *state, &plain_geometry, 100, 3, mode);
        decode_options options = {.scale = 0.125f, .batch_invariant = mode & 1, .sinks = mode & 2 ? sinks : NULL};
        sequence_init(&empty, &pool, (sequence_spec){.stored = 0, .query_length = 3, .read = true});
        sequence_init(&full, &pool, (sequence_spec){.stored = 1000, .query_length = 2});
        sequence_init(&other, &pool, (sequence_spec){.stored = 0, .query_length = 1, .read = true});
        decode_sequences(&pool, sequences, 3, &options);
        assert_rows_are_zero(&empty, &pool.geometry);
        assert_rows_are_zero(&other, &pool.geometry);
        for (uint32_t n = 0; n < 3 * 8; n++) {
            assert_true(empty.lse[n] == (options.sinks ? sinks[n % 8] : -INFINITY));
        }
        decode_errors errors = sequence_errors(&pool, &full, &options, 1000000);
        assert_errors_within_bounds(&errors, ATTN_BF16, "the sequence between two empty ones");
        sequence_fini(&empty);
        sequence_fini(&full);
        sequence_fini(&other);
        pool_close(&pool);
    }
}

/* Row `row` of the last decode is the value row of `token`, as it is meant, head by head and bit by bit. */
static void assert_row_is_value(const test_pool *pool, const test_sequence *sequence, uint32_t row, uint32_t token) {
    const attn_geometry *g = &pool->geometry;
    size_t bytes = g->head_dim_v * attn_dtype_bytes(g->dtype);
    for (uint32_t head = 0; head < g->heads_q; head++) {
        uint32_t kv_head = head / (g->heads_q / g->heads_kv);
        const unsigned char *value = sequence->values + token * attn_value_row_bytes(g) + kv_head * bytes;
        double meant[256];
        float floats[256];
        unsigned char expected[256 * sizeof(float)];
        pool_meant_row(pool, pool->v_scales, kv_head, value, g->head_dim_v, meant);
        for (uint32_t e = 0; e < g->head_dim_v; e++) {
            floats[e] = (float)meant[e];
        }
        attn_elements_from_floats(g->dtype, floats, expected, g->head_dim_v);
        assert_memory_equal(sequence->out + row * attn_out_row_bytes(g) + head * bytes, expected, bytes);
    }
}

/* Whether the scores are needed, for the LSE, or not. */
static void a_row_that_sees_one_token_is_its_value(void **state) {
    for (uint32_t variant = 0; variant < 12; variant++) {
        attn_geometry geometry = plain_geometry;
        geometry.dtype = (attn_dtype)(ATTN_BF16 + variant % 3);
        geometry.head_dim_v = variant / 3 % 2 ? 40 : 64;
        decode_options options = {.scale = 0.125f, .window = 1, .no_lse = variant / 6};
        test_pool pool;
        test_sequence first, read, windowed, *sequences[] = {&first, &read, &windowed};
        pool_open(&pool, *state, &geometry, 40, 2, variant);
        sequence_init(&first, &pool, (sequence_spec){.stored = 0, .query_length = 1});
        sequence_init(&read, &pool, (sequence_spec){.stored = 1, .query_length = 5, .read = true});
        sequence_init(&windowed, &pool, (sequence_spec){.stored = 200, .query_length = 3});
        decode_sequences(&pool, sequences, 3, &options);
        assert_row_is_value(&pool, &first, 0, 0);
        for (uint32_t row = 0; row < 5; row++)
            assert_row_is_value(&pool, &read, row, 0);
        for (uint32_t row = 0; row < 3; row++)
            assert_row_is_value(&pool, &windowed, row, 200 + row);
        for (uint32_t i = 0; i < 3; i++)
            sequence_fini(sequences[i]);
        pool_close(&pool);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The pool */

/* Uploaded in one call across many pages from the middle of one, then attended to. */
static void an_append_across_pages_is_what_is_attended_to(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 40, 2, 3);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 300, .query_length = 1, .read = true});
    for (uint32_t page = 0; page < sequence.page_count; page++) {
        assert_int_equal(attn_backend_poison(pool.backend, sequence.pages[page], 0, 16).code, ATTN_OK);
    }
    const attn_geometry *g = &pool.geometry;
    assert_int_equal(attn_backend_append(pool.backend, LAYER, sequence.pages, sequence.page_count, 7, 293,
                                         sequence.keys + 7 * attn_key_row_bytes(g),
                                         sequence.values + 7 * attn_value_row_bytes(g))
                         .code,
                     ATTN_OK);
    assert_int_equal(attn_backend_append(pool.backend, LAYER, sequence.pages, sequence.page_count, 0, 7, sequence.keys,
                                         sequence.values)
                         .code,
                     ATTN_OK);
    decode_sequences(&pool, sequences, 1, &plain_options);
    decode_errors errors = sequence_errors(&pool, &sequence, &plain_options, 1000000);
    assert_errors_within_bounds(&errors, ATTN_BF16, "after one long append");
    sequence_fini(&sequence);
    pool_close(&pool);
}

/* Rows first .. of a sequence, read back to odd addresses with a guard behind them. Both are freed. */
typedef struct {
    unsigned char *keys, *values;
    size_t key_bytes, value_bytes;
} exported_rows;

static void export_rows(exported_rows *rows, test_pool *pool, const uint32_t *pages, uint32_t page_count,
                        uint32_t first, uint32_t count) {
    rows->key_bytes = count * attn_key_row_bytes(&pool->geometry);
    rows->value_bytes = count * attn_value_row_bytes(&pool->geometry);
    rows->keys = malloc(rows->key_bytes + 2);
    rows->values = malloc(rows->value_bytes + 2);
    assert_non_null(rows->keys);
    assert_non_null(rows->values);
    rows->keys[rows->key_bytes + 1] = rows->values[rows->value_bytes + 1] = 0x5a;
    assert_int_equal(
        attn_backend_export(pool->backend, LAYER, pages, page_count, first, count, rows->keys + 1, rows->values + 1)
            .code,
        ATTN_OK);
    assert_int_equal(rows->keys[rows->key_bytes + 1], 0x5a);
    assert_int_equal(rows->values[rows->value_bytes + 1], 0x5a);
}

static void exported_rows_free(exported_rows *rows) {
    free(rows->keys);
    free(rows->values);
}

/* Without fp8 what was appended; with it, what gives itself when it is appended again, and differs from it by rounding.
 */
static void exported_rows_are_the_appended_ones(void **state) {
    static const attn_geometry geometries[] = {{2, 8, 2, 64, 64, ATTN_BF16, 16, 0},
                                               {2, 4, 4, 40, 72, ATTN_FP16, 32, 0},
                                               {2, 6, 2, 128, 128, ATTN_FP32, 128, 0}};
    enum { STORED = 300, FIRST = 5, COUNT = 290 };
    for (size_t n = 0; n < sizeof geometries / sizeof *geometries; n++) {
        test_pool pool;
        test_sequence sequence;
        exported_rows rows, again;
        pool_open(&pool, *state, &geometries[n], 60, 3, 3);
        sequence_init(&sequence, &pool, (sequence_spec){.stored = STORED, .query_length = 1, .read = true});
        const attn_geometry *g = &pool.geometry;
        const unsigned char *keys = (const unsigned char *)sequence.keys + FIRST * attn_key_row_bytes(g);
        const unsigned char *values = (const unsigned char *)sequence.values + FIRST * attn_value_row_bytes(g);
        export_rows(&rows, &pool, sequence.pages, sequence.page_count, FIRST, COUNT);
        bool is_same =
            memcmp(rows.keys + 1, keys, rows.key_bytes) == 0 && memcmp(rows.values + 1, values, rows.value_bytes) == 0;
        assert_int_equal(is_same, attn_kv_dtype(g) != ATTN_FP8_E4M3);
        assert_int_equal(attn_backend_append(pool.backend, LAYER, sequence.pages, sequence.page_count, FIRST, COUNT,
                                             rows.keys + 1, rows.values + 1)
                             .code,
                         ATTN_OK);
        export_rows(&again, &pool, sequence.pages, sequence.page_count, FIRST, COUNT);
        assert_memory_equal(again.keys + 1, rows.keys + 1, rows.key_bytes);
        assert_memory_equal(again.values + 1, rows.values + 1, rows.value_bytes);
        exported_rows_free(&rows);
        exported_rows_free(&again);
        sequence_fini(&sequence);
        pool_close(&pool);
    }
}

static void a_page_outside_the_pool_fails_the_export(void **state) {
    test_pool pool;
    unsigned char rows[64];
    pool_open(&pool, *state, &plain_geometry, 4, 2, 5);
    uint32_t table[2] = {1, 4};
    assert_int_equal(attn_backend_export(pool.backend, LAYER, table, 2, 15, 2, rows, rows).code, ATTN_INTERNAL);
    assert_int_equal(attn_backend_export(pool.backend, LAYER, table, 1, 15, 2, rows, rows).code, ATTN_INTERNAL);
    assert_int_equal(attn_backend_export(pool.backend, LAYERS, table, 1, 0, 1, rows, rows).code, ATTN_INVALID_ARGUMENT);
    assert_int_equal(attn_backend_export(pool.backend, LAYER, NULL, 0, 0, 0, NULL, NULL).code, ATTN_OK);
    pool_close(&pool);
}

static void appending_nothing_is_fine(void **state) {
    test_pool pool;
    pool_open(&pool, *state, &plain_geometry, 4, 1, 3);
    assert_int_equal(attn_backend_append(pool.backend, LAYER, NULL, 0, 0, 0, NULL, NULL).code, ATTN_OK);
    pool_close(&pool);
}

/* bf16 NaN in each element of the first out row of each head. */
static bool out_is_nan(const test_sequence *sequence) {
    uint16_t element;
    memcpy(&element, sequence->out, sizeof element);
    return (element & 0x7fff) > 0x7f80;
}

/* That poison is seen at all is what gives "poison changes nothing" its meaning. */
static void poison_within_the_length_is_seen(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 20, 2, 3);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1, .read = true});
    decode_sequences(&pool, sequences, 1, &plain_options);
    assert_false(out_is_nan(&sequence));
    assert_int_equal(attn_backend_poison(pool.backend, sequence.pages[2], 5, 1).code, ATTN_OK);
    decode_sequences(&pool, sequences, 1, &plain_options);
    assert_true(out_is_nan(&sequence));
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void decode_layer(test_pool *pool, test_sequence *const *sequences, uint32_t layer) {
    test_batch batch;
    test_batch_init(&batch, sequences, 1, &plain_options);
    batch.batch.layer = layer;
    decode_batch(pool, &batch, NULL);
    test_batch_fini(&batch);
}

static void a_copied_page_holds_the_same_rows_in_all_layers(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 60, 2, 4);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 333, .query_length = 1, .read = true});
    /* The same rows in layer 0; of fp8 its scales are others, and so are its outputs. */
    assert_int_equal(attn_backend_append(pool.backend, 0, sequence.pages, sequence.page_count, 0, 333, sequence.keys,
                                         sequence.values)
                         .code,
                     ATTN_OK);
    size_t bytes = sequence_out_bytes(&sequence, &pool.geometry);
    unsigned char *before = malloc(LAYERS * bytes);
    assert_non_null(before);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        decode_layer(&pool, sequences, layer);
        memcpy(before + layer * bytes, sequence.out, bytes);
    }

    for (uint32_t p = 0; p < sequence.page_count; p++) {
        uint32_t copy = pool.free_pages[--pool.free_count];
        assert_int_equal(attn_backend_copy_page(pool.backend, sequence.pages[p], copy).code, ATTN_OK);
        assert_int_equal(attn_backend_poison(pool.backend, sequence.pages[p], 0, 16).code, ATTN_OK);
        sequence.pages[p] = copy;
    }
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        decode_layer(&pool, sequences, layer);
        assert_memory_equal(sequence.out, before + layer * bytes, bytes);
    }
    free(before);
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void a_page_copied_to_itself_stays_as_it_is(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 20, 2, 4);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 10, .query_length = 1, .read = true});
    assert_int_equal(attn_backend_copy_page(pool.backend, sequence.pages[0], sequence.pages[0]).code, ATTN_OK);
    decode_sequences(&pool, sequences, 1, &plain_options);
    decode_errors errors = sequence_errors(&pool, &sequence, &plain_options, 1000000);
    assert_errors_within_bounds(&errors, ATTN_BF16, "after copying a page to itself");
    sequence_fini(&sequence);
    pool_close(&pool);
}

/* Write to layer 0 of the same pages: layer 1 must not notice. */
static void layers_do_not_touch_each_other(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 20, 2, 4);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1, .read = true});
    assert_int_equal(attn_backend_append(pool.backend, 0, sequence.pages, sequence.page_count, 0, 100, sequence.values,
                                         sequence.keys)
                         .code,
                     ATTN_OK);
    decode_sequences(&pool, sequences, 1, &plain_options);
    decode_errors errors = sequence_errors(&pool, &sequence, &plain_options, 1000000);
    assert_errors_within_bounds(&errors, ATTN_BF16, "after writing another layer");
    sequence_fini(&sequence);
    pool_close(&pool);
}

/* ------------------------------------------------------------------------------------------- */
/* What fp8 has no number for */

/* Of a sequence of one token the output is its value. */
static void fp8_saturates_what_is_too_large_and_keeps_nan(void **state) {
    static const uint16_t extremes[] = {0x7f80, 0xff80, 0x7f7f, 0x7fc0, 0xffc0, 0x8000}; /* bf16 */
    for (uint32_t no_lse = 0; no_lse < 2; no_lse++) {
        decode_options options = {.scale = 0.125f, .no_lse = no_lse};
        test_pool pool;
        test_sequence sequence, *sequences[] = {&sequence};
        pool_open(&pool, *state, &plain_geometry, 4, 1, 8);
        sequence_init(&sequence, &pool, (sequence_spec){.stored = 1, .query_length = 1, .read = true});
        memcpy(sequence.values, extremes, sizeof extremes);
        assert_int_equal(
            attn_backend_append(pool.backend, LAYER, sequence.pages, 1, 0, 1, sequence.keys, sequence.values).code,
            ATTN_OK);
        decode_sequences(&pool, sequences, 1, &options);
        uint16_t out[sizeof extremes / sizeof *extremes], largest;
        memcpy(out, sequence.out, sizeof out);
        float expected = 448 * pool.v_scales[LAYER * 2];
        attn_elements_from_floats(ATTN_BF16, &expected, &largest, 1);
        assert_int_equal(out[0], largest);
        assert_int_equal(out[1], largest | 0x8000);
        assert_int_equal(out[2], largest);
        assert_true((out[3] & 0x7fff) > 0x7f80 && (out[4] & 0x7fff) > 0x7f80);
        assert_int_equal(out[5] & 0x7fff, 0);
        sequence_fini(&sequence);
        pool_close(&pool);
    }
}

/* An infinite key is the largest one, and so is its score: finite. */
static void fp8_scores_of_infinite_keys_are_finite(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 20, 2, 8);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1, .read = true});
    const uint16_t infinite = 0x7f80;
    for (uint32_t head = 0; head < 2; head++) {
        memcpy(sequence.keys + 50 * sequence.key_row_bytes + head * 64 * 2, &infinite, sizeof infinite);
    }
    assert_int_equal(attn_backend_append(pool.backend, LAYER, sequence.pages, sequence.page_count, 0, 100,
                                         sequence.keys, sequence.values)
                         .code,
                     ATTN_OK);
    decode_sequences(&pool, sequences, 1, &plain_options);
    decode_errors errors = sequence_errors(&pool, &sequence, &plain_options, 1000000);
    assert_errors_within_bounds(&errors, ATTN_BF16, "with an infinite key");
    sequence_fini(&sequence);
    pool_close(&pool);
}

/* ------------------------------------------------------------------------------------------- */
/* Pages outside the pool */

static void assert_refused(test_pool *pool, const test_batch *batch, attn_code code, const char *word) {
    attn_status status = attn_backend_decode(pool->backend, &batch->batch, NULL, NULL);
    assert_int_equal(status.code, code);
    assert_non_null(strstr(status.message, word));
}

static void a_page_outside_the_pool_fails_the_decode_and_appends_nothing(void **state) {
    static const uint32_t bad_pages[] = {20, 21, UNUSED_PAGE_ENTRY, UINT32_MAX};
    for (size_t n = 0; n < sizeof bad_pages / sizeof *bad_pages; n++) {
        test_pool pool;
        test_sequence good, bad, *sequences[] = {&good, &bad};
        pool_open(&pool, *state, &plain_geometry, 20, 2, 5);
        sequence_init(&good, &pool, (sequence_spec){.stored = 40, .query_length = 2});
        sequence_init(&bad, &pool, (sequence_spec){.stored = 100, .query_length = 1});
        bad.pages[n] = bad_pages[n];
        test_batch batch;
        test_batch_init(&batch, sequences, 2, &plain_options);
        assert_refused(&pool, &batch, ATTN_INTERNAL, "page");
        test_batch_fini(&batch);

        /* The good sequence's new rows are still the NaN that was there. */
        good.spec.read = true;
        decode_sequences(&pool, sequences, 1, &plain_options);
        assert_true(out_is_nan(&good));
        sequence_fini(&good);
        sequence_fini(&bad);
        pool_close(&pool);
    }
}

static void a_page_table_too_short_fails_the_decode(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 20, 2, 5);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 1});
    test_batch batch;
    test_batch_init(&batch, sequences, 1, &plain_options);
    batch.page_offsets[1] = sequence.page_count - 1;
    assert_refused(&pool, &batch, ATTN_INTERNAL, "page");
    test_batch_fini(&batch);
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void a_page_outside_the_pool_fails_the_append_and_writes_nothing(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 20, 2, 5);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 48, .query_length = 1, .read = true});
    assert_int_equal(attn_backend_poison(pool.backend, sequence.pages[0], 0, 16).code, ATTN_OK);
    uint32_t table[3] = {sequence.pages[0], sequence.pages[1], 20};
    attn_status status = attn_backend_append(pool.backend, LAYER, table, 3, 0, 33, sequence.keys, sequence.values);
    assert_int_equal(status.code, ATTN_INTERNAL);
    status = attn_backend_append(pool.backend, LAYER, table, 2, 0, 33, sequence.keys, sequence.values);
    assert_int_equal(status.code, ATTN_INTERNAL);
    status = attn_backend_append(pool.backend, LAYER, table, 2, UINT64_MAX, 2, sequence.keys, sequence.values);
    assert_int_equal(status.code, ATTN_INTERNAL);
    decode_sequences(&pool, sequences, 1, &plain_options);
    assert_true(out_is_nan(&sequence));
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void pages_outside_the_pool_are_not_copied_or_poisoned(void **state) {
    test_pool pool;
    pool_open(&pool, *state, &plain_geometry, 4, 2, 5);
    assert_int_equal(attn_backend_copy_page(pool.backend, 4, 0).code, ATTN_INTERNAL);
    assert_int_equal(attn_backend_copy_page(pool.backend, 0, 4).code, ATTN_INTERNAL);
    assert_int_equal(attn_backend_poison(pool.backend, 4, 0, 1).code, ATTN_INTERNAL);
    assert_int_equal(attn_backend_poison(pool.backend, 0, 10, 7).code, ATTN_INVALID_ARGUMENT);
    assert_int_equal(attn_backend_poison(pool.backend, 0, 17, UINT32_MAX).code, ATTN_INVALID_ARGUMENT);
    pool_close(&pool);
}

/* ------------------------------------------------------------------------------------------- */
/* Batches that are none */

static void a_senseless_batch_is_refused(void **state) {
    test_pool pool;
    test_sequence sequence, *sequences[] = {&sequence};
    pool_open(&pool, *state, &plain_geometry, 20, 2, 5);
    sequence_init(&sequence, &pool, (sequence_spec){.stored = 100, .query_length = 2});
    test_batch batch;
    test_batch_init(&batch, sequences, 1, &plain_options);

    batch.batch.layer = LAYERS;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "layer");
    batch.batch.layer = LAYER;
    batch.batch.scale = NAN;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "scale");
    batch.batch.scale = 0;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "scale");
    batch.batch.scale = 1;
    batch.batch.softcap = -1;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "softcap");
    batch.batch.softcap = 0;
    batch.query_lengths[0] = 0;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "query length");
    batch.query_lengths[0] = ATTN_MAX_QUERY_LENGTH + 1;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "query length");
    batch.query_lengths[0] = 2;
    batch.lengths[0] = 1;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "new rows");
    batch.lengths[0] = 20 * 16 + 1;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "pool");
    batch.lengths[0] = 102;
    batch.batch.new_values = NULL;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "values");

    test_batch_fini(&batch);
    sequence_fini(&sequence);
    pool_close(&pool);
}

static void a_part_that_contradicts_itself_is_refused(void **state) {
    test_pool pool;
    test_sequence whole, part, *sequences[] = {&part};
    pool_open(&pool, *state, &plain_geometry, 200, 2, 5);
    sequence_init(&whole, &pool, (sequence_spec){.stored = 1500, .query_length = 2});
    sequence_make_part(&part, &pool, &whole, 0, 2, false);
    test_batch batch;
    test_batch_init(&batch, sequences, 1, &plain_options);
    batch.parts[0].total_length = part.length - 1;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "part");
    batch.parts[0] = part.part;
    batch.parts[0].new_count = 3;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "part");
    batch.parts[0] = part.part;
    batch.batch.partials = NULL;
    assert_refused(&pool, &batch, ATTN_INVALID_ARGUMENT, "part");
    test_batch_fini(&batch);
    sequence_fini(&part);
    sequence_fini(&whole);
    pool_close(&pool);
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unknown_kind_is_refused_with_those_there_are),
        cmocka_unit_test(unknown_isa_is_refused),
        cmocka_unit_test(auto_is_the_cpu),
        cmocka_unit_test(destroying_nothing_is_fine),
        cmocka_unit_test(sizes_of_rows_and_pages_follow_the_geometry),
        ON_EVERY_BACKEND(bad_geometry_is_refused_naming_the_field),
        ON_EVERY_BACKEND(a_scale_that_is_none_is_refused_by_its_index),
        ON_EVERY_BACKEND(a_pool_beyond_all_memory_is_refused),
        ON_EVERY_BACKEND(a_backend_tells_its_geometry_and_itself),
        ON_EVERY_BACKEND(an_empty_batch_does_nothing),
        ON_EVERY_BACKEND(an_empty_range_gives_zero_and_minus_infinity),
        ON_EVERY_BACKEND(a_row_that_sees_one_token_is_its_value),
        ON_EVERY_BACKEND(an_append_across_pages_is_what_is_attended_to),
        ON_EVERY_BACKEND(appending_nothing_is_fine),
        ON_EVERY_BACKEND(exported_rows_are_the_appended_ones),
        ON_EVERY_BACKEND(a_page_outside_the_pool_fails_the_export),
        ON_EVERY_BACKEND(poison_within_the_length_is_seen),
        ON_EVERY_BACKEND(a_copied_page_holds_the_same_rows_in_all_layers),
        ON_EVERY_BACKEND(a_page_copied_to_itself_stays_as_it_is),
        ON_EVERY_BACKEND(layers_do_not_touch_each_other),
        ON_EVERY_FP8_BACKEND(fp8_saturates_what_is_too_large_and_keeps_nan),
        ON_EVERY_FP8_BACKEND(fp8_scores_of_infinite_keys_are_finite),
        ON_EVERY_BACKEND(a_page_outside_the_pool_fails_the_decode_and_appends_nothing),
        ON_EVERY_BACKEND(a_page_table_too_short_fails_the_decode),
        ON_EVERY_BACKEND(a_page_outside_the_pool_fails_the_append_and_writes_nothing),
        ON_EVERY_BACKEND(pages_outside_the_pool_are_not_copied_or_poisoned),
        ON_EVERY_BACKEND(a_senseless_batch_is_refused),
        ON_EVERY_BACKEND(a_part_that_contradicts_itself_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
