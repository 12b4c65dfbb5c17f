/*
 * batch_invariant: a sequence's output is, bit for bit, the same alone, in any batch, with any number of
 * workers, whole or in parts merged by attn_combine. Default mode: the same for the same batch and
 * workers, every time.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/tests/backend_fixture.h"

enum { SEQUENCES = 12, SHORT_ROWS = 9, MAX_WORKERS = 4, MAX_PARTS = 4, MAX_CHUNKS = 64 };

/* Lengths around the chunk, long ones, empty ones; query lengths of one block and of many. */
static const sequence_spec specs[SEQUENCES] = {
    {511, 1, false, INPUTS_UNIFORM}, {512, 1, false, INPUTS_UNIFORM},  {1023, 3, false, INPUTS_DOMINANT},
    {0, 1, true, INPUTS_UNIFORM},    {5000, 1, false, INPUTS_UNIFORM}, {2047, 7, false, INPUTS_UNIFORM},
    {1536, 5, true, INPUTS_EQUAL},   {1, 1, true, INPUTS_UNIFORM},     {3, 20, false, INPUTS_UNIFORM},
    {700, 64, false, INPUTS_HUGE},   {2500, 2, true, INPUTS_UNIFORM},  {1530, 128, false, INPUTS_UNIFORM},
};

static bool is_reference(const backend_row *row) { return strcmp(row->kind, "reference") == 0; }

/* The reference is slow: the first few long ones are enough for it. The first SHORT_ROWS have few query rows. */
static uint32_t sequences_for(const backend_row *row) {
    if (is_reference(row) || FIXTURE_SANITIZED) return 6;
    return SEQUENCES;
}

static float sinks[8] = {0.5f, -1, 2, 0, 1, -2, 3, -0.25f};

typedef struct {
    const char *name;
    decode_options options;
} variant;

static const variant variants[] = {
    {"plain", {.scale = 0.125f, .batch_invariant = true}},
    {"softcap, window and sinks",
     {.scale = 0.125f, .softcap = 20, .window = 1300, .sinks = sinks, .batch_invariant = true}},
};

enum { VARIANTS = sizeof variants / sizeof *variants };

/* ------------------------------------------------------------------------------------------- */
/* Outputs kept aside */

typedef struct {
    unsigned char *out;
    unsigned char *lse;
    size_t out_bytes, lse_bytes;
} kept_output;

static void keep_output(kept_output *kept, const test_sequence *sequence, const attn_geometry *geometry) {
    kept->out_bytes = sequence_out_bytes(sequence, geometry);
    kept->lse_bytes = sequence_lse_bytes(sequence, geometry);
    kept->out = malloc(kept->out_bytes);
    kept->lse = malloc(kept->lse_bytes);
    assert_true(kept->out && kept->lse);
    memcpy(kept->out, sequence->out, kept->out_bytes);
    memcpy(kept->lse, sequence->lse, kept->lse_bytes);
}

static void free_output(kept_output *kept) {
    free(kept->out);
    free(kept->lse);
    *kept = (kept_output){0};
}

static void assert_output_is(const test_sequence *sequence, const kept_output *kept) {
    assert_memory_equal(sequence->out, kept->out, kept->out_bytes);
    assert_memory_equal(sequence->lse, kept->lse, kept->lse_bytes);
}

/* ------------------------------------------------------------------------------------------- */
/* The same sequences in a pool with so many workers */

typedef struct {
    test_pool pool;
    test_sequence sequences[SEQUENCES];
    uint32_t count;
} crowd;

static crowd the_crowd; /* large */

/* For the sequences, and for one of them once more in parts. */
static uint32_t pages_for(const attn_geometry *geometry, uint32_t count) {
    uint32_t pages = 0, largest = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t own = pool_pages_for(geometry, specs[i].stored + specs[i].query_length);
        pages += own;
        if (own > largest) largest = own;
    }
    return pages + largest + MAX_PARTS;
}

static void open_crowd(crowd *self, const backend_row *row, const attn_geometry *geometry, uint32_t workers,
                       uint32_t count) {
    pool_open(&self->pool, row, geometry, pages_for(geometry, count), workers, 77);
    self->count = count;
    for (uint32_t i = 0; i < self->count; i++) {
        sequence_init(&self->sequences[i], &self->pool, specs[i]);
    }
}

static void close_crowd(crowd *self) {
    for (uint32_t i = 0; i < self->count; i++) {
        sequence_fini(&self->sequences[i]);
    }
    pool_close(&self->pool);
}

static void decode_each_alone(crowd *self, const decode_options *options) {
    for (uint32_t i = 0; i < self->count; i++) {
        test_sequence *alone[] = {&self->sequences[i]};
        decode_sequences(&self->pool, alone, 1, options);
    }
}

/* Some of the sequences in random order. Returns how many. */
static uint32_t pick_batch(crowd *self, test_random *random, test_sequence **batch) {
    uint32_t size = 1 + random_below(random, self->count);
    for (uint32_t i = 0; i < self->count; i++) {
        uint32_t place = random_below(random, i + 1);
        batch[i] = batch[place];
        batch[place] = &self->sequences[i];
    }
    return size;
}

static void check_any_batch_and_workers(const backend_row *row, const attn_geometry *geometry,
                                        const decode_options *options, uint32_t count, uint32_t batches) {
    kept_output expected[SEQUENCES] = {{0}};
    test_random random = {5};
    for (uint32_t workers = 1; workers <= MAX_WORKERS; workers++) {
        open_crowd(&the_crowd, row, geometry, workers, count);
        decode_each_alone(&the_crowd, options);
        for (uint32_t i = 0; i < the_crowd.count; i++) {
            if (workers == 1) keep_output(&expected[i], &the_crowd.sequences[i], geometry);
            assert_output_is(&the_crowd.sequences[i], &expected[i]);
        }
        for (uint32_t n = 0; n < batches; n++) {
            test_sequence *batch[SEQUENCES];
            uint32_t size = pick_batch(&the_crowd, &random, batch);
            decode_sequences(&the_crowd.pool, batch, size, options);
            for (uint32_t i = 0; i < size; i++) {
                assert_output_is(batch[i], &expected[batch[i] - the_crowd.sequences]);
            }
        }
        if (workers == MAX_WORKERS) {
            for (uint32_t i = 0; i < the_crowd.count; i++) {
                free_output(&expected[i]);
            }
        }
        close_crowd(&the_crowd);
    }
}

static void any_batch_and_any_workers_give_the_same_bits(void **state) {
    const backend_row *row = *state;
    uint32_t batches = is_reference(row) || FIXTURE_SANITIZED ? 2 : 12;
    for (uint32_t n = 0; n < VARIANTS; n++) {
        check_any_batch_and_workers(row, &plain_geometry, &variants[n].options, sequences_for(row), batches);
    }
}

static void so_do_they_in_fp16_and_fp32_with_large_pages_and_other_dims(void **state) {
    const backend_row *row = *state;
    static const attn_geometry geometries[] = {{LAYERS, 6, 1, 72, 96, ATTN_FP16, 128, 0},
                                               {LAYERS, 5, 5, 128, 32, ATTN_FP32, 64, 0}};
    for (uint32_t n = 0; n < 2; n++) {
        check_any_batch_and_workers(row, &geometries[n], &variants[n].options, 4, 2);
    }
}

static void the_outputs_are_right_too(void **state) {
    for (uint32_t n = 0; n < VARIANTS; n++) {
        open_crowd(&the_crowd, *state, &plain_geometry, 3, sequences_for(*state));
        decode_each_alone(&the_crowd, &variants[n].options);
        for (uint32_t i = 0; i < the_crowd.count; i++) {
            decode_errors errors =
                sequence_errors(&the_crowd.pool, &the_crowd.sequences[i], &variants[n].options, 1000000);
            assert_errors_within_bounds(&errors, ATTN_BF16, variants[n].name);
        }
        close_crowd(&the_crowd);
    }
}

/* More partial results at once than a backend keeps room for: 16 rows for each of 8 KV heads of 600 sequences. */
static void a_batch_of_more_chunks_than_slots_gives_the_same_bits(void **state) {
    enum { CROWDED = 600 };
    uint32_t count = is_reference(*state) ? 30 : CROWDED; /* it keeps one row's chunks at a time, whatever the batch */
    static test_sequence sequences[CROWDED], *batch[CROWDED];
    static kept_output expected[CROWDED];
    static const attn_geometry geometry = {LAYERS, 128, 8, 32, 256, ATTN_BF16, 16, 0};
    const decode_options *options = &variants[0].options;
    uint32_t looked_at = FIXTURE_SANITIZED ? 13 : 1;
    test_pool pool;
    pool_open(&pool, *state, &geometry, count + 150, 3, 9);
    for (uint32_t i = 0; i < count; i++) {
        batch[i] = &sequences[i];
        uint32_t stored = i % 331 == 7 ? 600 : i % 12;
        sequence_init(&sequences[i], &pool, (sequence_spec){.stored = stored, .query_length = 1});
        if (i % looked_at != 0) continue;
        decode_sequences(&pool, &batch[i], 1, options);
        keep_output(&expected[i], &sequences[i], &geometry);
    }
    decode_sequences(&pool, batch, count, options);
    for (uint32_t i = 0; i < count; i++) {
        if (i % looked_at == 0) assert_output_is(&sequences[i], &expected[i]);
        free_output(&expected[i]);
        sequence_fini(&sequences[i]);
    }
    pool_close(&pool);
}

/* ------------------------------------------------------------------------------------------- */
/* Parts */

typedef struct {
    test_sequence parts[MAX_PARTS];
    uint32_t count;
    attn_partial merged[MAX_CHUNKS]; /* of all parts, in global order */
    uint32_t partials;
} spread;

/* batch_invariant: the chunks of all parts in the order of the whole sequence. Default: part by part. */
static void order_partials(spread *self, const attn_geometry *g, const test_sequence *whole, bool chunked) {
    size_t rows = (size_t)whole->spec.query_length * g->heads_q;
    self->partials = chunked ? (whole->length + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS : self->count;
    assert_true(self->partials <= MAX_CHUNKS);
    for (uint32_t p = 0; p < self->partials; p++) {
        const attn_partial *of_part = &self->parts[p % self->count].partial;
        size_t index = p / self->count;
        self->merged[p] = (attn_partial){of_part->out + index * rows * g->head_dim_v, of_part->lse + index * rows};
    }
}

/* Splits the whole over `count` parts, decodes them among `company`, and merges into the whole's out and lse. */
static void decode_in_parts(crowd *self, test_sequence *whole, uint32_t count, const decode_options *options,
                            test_sequence *company) {
    const attn_geometry *g = &self->pool.geometry;
    spread spread = {.count = count};
    test_sequence *batch[MAX_PARTS + 1];
    uint32_t size = 0;
    for (uint32_t p = 0; p < count; p++) {
        sequence_make_part(&spread.parts[p], &self->pool, whole, p, count, options->batch_invariant);
        batch[size++] = &spread.parts[p];
        if (p == 0 && company) batch[size++] = company;
    }
    decode_sequences(&self->pool, batch, size, options);
    order_partials(&spread, g, whole, options->batch_invariant);
    memset(whole->out, 0xa5, sequence_out_bytes(whole, g));
    attn_combine(spread.merged, spread.partials, whole->spec.query_length, g->heads_q, g->head_dim_v, options->sinks,
                 g->dtype, whole->out, whole->lse);
    for (uint32_t p = 0; p < count; p++) {
        for (uint32_t page = 0; page < spread.parts[p].page_count; page++) {
            self->pool.free_pages[self->pool.free_count++] = spread.parts[p].pages[page];
        }
        sequence_fini(&spread.parts[p]);
    }
}

static void parts_merged_in_order_give_the_same_bits(void **state) {
    for (uint32_t n = 0; n < VARIANTS; n++) {
        open_crowd(&the_crowd, *state, &plain_geometry, 3, sequences_for(*state));
        decode_each_alone(&the_crowd, &variants[n].options);
        for (uint32_t i = 0; i < the_crowd.count; i++) {
            test_sequence *whole = &the_crowd.sequences[i];
            kept_output expected;
            keep_output(&expected, whole, &plain_geometry);
            for (uint32_t parts = 1; parts <= MAX_PARTS; parts++) {
                test_sequence *company = i == 1 ? NULL : &the_crowd.sequences[1];
                decode_in_parts(&the_crowd, whole, parts, &variants[n].options, company);
                assert_output_is(whole, &expected);
            }
            free_output(&expected);
        }
        close_crowd(&the_crowd);
    }
}

static void parts_in_default_mode_merge_to_the_right_outputs(void **state) {
    for (uint32_t n = 0; n < VARIANTS; n++) {
        decode_options options = variants[n].options;
        options.batch_invariant = false;
        open_crowd(&the_crowd, *state, &plain_geometry, 3, sequences_for(*state));
        for (uint32_t i = 0; i < the_crowd.count; i++) {
            for (uint32_t parts = 1; parts <= MAX_PARTS; parts++) {
                test_sequence *whole = &the_crowd.sequences[i];
                test_sequence *company = i == 1 ? NULL : &the_crowd.sequences[1];
                decode_in_parts(&the_crowd, whole, parts, &options, company);
                decode_errors errors = sequence_errors(&the_crowd.pool, whole, &options, 300000);
                assert_errors_within_bounds(&errors, ATTN_BF16, variants[n].name);
            }
        }
        close_crowd(&the_crowd);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Default mode */

static void default_mode_repeats_bit_for_bit(void **state) {
    const backend_row *row = *state;
    uint32_t repeats = is_reference(row) ? 3 : FIXTURE_SANITIZED ? 10 : 100;
    decode_options options = {.scale = 0.125f, .softcap = 30, .sinks = sinks};
    kept_output expected[SEQUENCES] = {{0}};
    test_sequence *batch[SEQUENCES];
    uint32_t count = sequences_for(row) < SHORT_ROWS ? sequences_for(row) : SHORT_ROWS;
    open_crowd(&the_crowd, row, &plain_geometry, MAX_WORKERS, count);
    for (uint32_t i = 0; i < the_crowd.count; i++) {
        batch[i] = &the_crowd.sequences[i];
    }
    for (uint32_t repeat = 0; repeat < repeats; repeat++) {
        decode_sequences(&the_crowd.pool, batch, the_crowd.count, &options);
        for (uint32_t i = 0; i < the_crowd.count; i++) {
            if (repeat == 0) keep_output(&expected[i], batch[i], &plain_geometry);
            assert_output_is(batch[i], &expected[i]);
        }
    }
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        free_output(&expected[i]);
    }
    close_crowd(&the_crowd);
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    const struct CMUnitTest tests[] = {
        ON_EVERY_BACKEND(any_batch_and_any_workers_give_the_same_bits),
        ON_EVERY_BACKEND(so_do_they_in_fp16_and_fp32_with_large_pages_and_other_dims),
        ON_EVERY_BACKEND(a_batch_of_more_chunks_than_slots_gives_the_same_bits),
        ON_EVERY_BACKEND(the_outputs_are_right_too),
        ON_EVERY_BACKEND(parts_merged_in_order_give_the_same_bits),
        ON_EVERY_BACKEND(parts_in_default_mode_merge_to_the_right_outputs),
        ON_EVERY_BACKEND(default_mode_repeats_bit_for_bit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
