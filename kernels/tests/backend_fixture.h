/*
 * What the tests of backends stand on. A test of this kind is written once and runs on every row of
 * `backend_rows`: list it with ON_EVERY_BACKEND. A new backend is one more row. Rows that this machine
 * or build cannot run are skipped, visibly.
 *
 * The fixture is hostile on purpose: pages are handed out in random order and are full of NaN before
 * they are written, entries of page tables beyond their last page are 2147480000, rows lie at odd
 * addresses, outputs are garbage before a decode, and layer 0 is never written: tests use LAYER. A pool
 * of fp8 has a random scale for every layer and head, small enough that some elements saturate.
 *
 * With ATTND_TEST_ISOLATED in the environment backends are isolated: main() begins with attn_isolated_main.
 *
 * The oracle (sequence_errors) is float64 on the test's own copy of the rows, of fp8 on what is meant by
 * their stored values; it shares no code with any backend, the reference included.
 */
#ifndef ATTND_KERNELS_TESTS_BACKEND_FIXTURE_H
#define ATTND_KERNELS_TESTS_BACKEND_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/attention.h"
#include "kernels/isolated.h"
#include "kernels/split_plan.h"

/* ------------------------------------------------------------------------------------------- */
/* Backends */

typedef struct {
    const char *kind;
    const char *isa;
    uint64_t work_limit; /* multiply-adds that a case may ask of it, for tests that choose */
    attn_dtype kv_dtype; /* of its pools, where dtype allows it and the geometry has none; 0: as dtype */
} backend_row;

enum { BACKEND_ROWS = 10 };
extern const backend_row backend_rows[BACKEND_ROWS];

#define ON_BACKEND(test, label, row)                                                                                   \
    { #test " on " label, test, NULL, NULL, (void *)&backend_rows[row] }
#define ON_EVERY_BACKEND(test)                                                                                         \
    ON_BACKEND(test, "reference", 0), ON_BACKEND(test, "cpu portable", 1), ON_BACKEND(test, "cpu avx2", 2),            \
        ON_BACKEND(test, "cpu avx512", 3), ON_BACKEND(test, "cpu avx512bf16", 4), ON_BACKEND(test, "cuda", 5),         \
        ON_EVERY_FP8_BACKEND(test)
#define ON_EVERY_FP8_BACKEND(test)                                                                                     \
    ON_BACKEND(test, "reference, fp8", 6), ON_BACKEND(test, "cpu portable, fp8", 7),                                   \
        ON_BACKEND(test, "cpu auto, fp8", 8), ON_BACKEND(test, "cuda, fp8", 9)

/* Built with ASan or TSan: tests that choose their size choose a smaller one. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FIXTURE_SANITIZED true
#else
#define FIXTURE_SANITIZED false
#endif

enum { LAYERS = 2, LAYER = 1, UNUSED_PAGE_ENTRY = 2147480000 };

/* bf16, two layers, 8 query heads on 2 KV heads, head_dim 64, pages of 16: for tests that are not about shapes. */
extern const attn_geometry plain_geometry;

/* ------------------------------------------------------------------------------------------- */
/* Random numbers, the same in every run */

typedef struct {
    uint64_t state;
} test_random;

uint64_t random_next(test_random *random);
uint32_t random_below(test_random *random, uint32_t limit);
float random_uniform(test_random *random, float low, float high);

/* ------------------------------------------------------------------------------------------- */
/* A backend with its pool */

typedef struct {
    attn_backend *backend;
    attn_geometry geometry; /* with the row's kv_dtype */
    float *k_scales;        /* [layers, heads_kv] of fp8; NULL: none */
    float *v_scales;
    test_random random;
    uint32_t pages;
    uint32_t *free_pages; /* [free_count] in random order, full of NaN */
    uint32_t free_count;
} test_pool;

/*
 * Opens a backend on the row with so many pages and workers; skips the test if this machine cannot.
 * To be called before anything else of the test is allocated; undone by pool_close.
 */
void pool_open(test_pool *pool, const backend_row *row, const attn_geometry *geometry, uint32_t pages, uint32_t workers,
               uint64_t seed);
void pool_close(test_pool *pool);

uint32_t pool_pages_for(const attn_geometry *geometry, uint64_t tokens);

/* What a key or value row of one head means once the pool's LAYER has stored it: `count` elements, `scales` the pool's.
 */
void pool_meant_row(const test_pool *pool, const float *scales, uint32_t head, const unsigned char *row, uint32_t count,
                    double *meant);

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

typedef enum {
    INPUTS_UNIFORM,  /* -2 .. 2 */
    INPUTS_DOMINANT, /* one key is 16 times as long as the others */
    INPUTS_EQUAL,    /* all keys are the same */
    INPUTS_HUGE,     /* integers -16 .. 16: with scale 1, logits of thousands */
} test_inputs;

enum { INPUT_KINDS = 4 };

typedef struct {
    uint32_t stored; /* tokens in the pool before the decode */
    uint32_t query_length;
    bool read; /* no new rows */
    test_inputs inputs;
} sequence_spec;

/* A sequence with its rows of layer LAYER in the pool; the new ones are appended by the decode. */
typedef struct {
    sequence_spec spec;
    uint32_t length; /* stored, and the new rows unless it is a read */
    unsigned char *queries;
    unsigned char *keys, *values; /* [length] rows, the test's own copy */
    size_t key_row_bytes, value_row_bytes;
    uint32_t *pages;     /* [table_size] */
    uint32_t page_count; /* that hold tokens */
    uint32_t table_size; /* with unused entries */
    unsigned char *out;  /* out rows of the last decode */
    float *lse;

    /* Of a part (sequence_make_part) only: */
    attn_part part;
    attn_partial partial;
    const unsigned char *part_keys, *part_values; /* its new rows */
} test_sequence;

void sequence_init(test_sequence *sequence, test_pool *pool, sequence_spec spec);
void sequence_fini(test_sequence *sequence);

/*
 * Makes `part` part number `index` of `count` of a whole sequence: chunks index, index + count, .. in
 * `pool`, and room for its partial results (one, or with `chunked` one a chunk). Borrows the whole's rows.
 */
void sequence_make_part(test_sequence *part, test_pool *pool, const test_sequence *whole, uint32_t index,
                        uint32_t count, bool chunked);

/*
 * Makes `fork` a sequence whose first `shared` tokens, whole pages that `parent` has stored, are the parent's: the same
 * pages. Others of its spec are its own. The parent's pages must stay as long.
 */
void sequence_make_fork(test_sequence *fork, test_pool *pool, const test_sequence *parent, uint32_t shared,
                        sequence_spec spec);

size_t sequence_out_bytes(const test_sequence *sequence, const attn_geometry *geometry);
size_t sequence_lse_bytes(const test_sequence *sequence, const attn_geometry *geometry);

/* ------------------------------------------------------------------------------------------- */
/* Decoding */

typedef struct {
    float scale;
    float softcap;
    uint32_t window;
    const float *sinks;
    bool batch_invariant;
    bool no_lse;
} decode_options;

/* The batch of some sequences: owns its arrays, borrows the rest. */
typedef struct {
    attn_batch batch;
    uint32_t *lengths, *query_lengths, *page_offsets, *pages;
    const void **queries, **new_keys, **new_values;
    void **outs;
    float **lses;
    attn_part *parts;
    attn_partial *partials;
} test_batch;

void test_batch_init(test_batch *batch, test_sequence *const *sequences, uint32_t count, const decode_options *options);
void test_batch_fini(test_batch *batch);

/* Fills the outputs with garbage and decodes; fails the test unless the decode is ATTN_OK. */
void decode_batch(test_pool *pool, test_batch *batch, const attn_plan *plan);

/* test_batch_init, decode_batch without a plan, test_batch_fini. */
void decode_sequences(test_pool *pool, test_sequence *const *sequences, uint32_t count, const decode_options *options);

/* ------------------------------------------------------------------------------------------- */
/* The oracle */

typedef struct {
    double out;           /* ||out - expected|| / ||expected|| over the rows looked at */
    double lse;           /* largest absolute error */
    double largest_score; /* absolute */
    double largest_lse;   /* absolute */
    bool of_fp8;          /* the keys and values */
} decode_errors;

/*
 * How far the last decode of `sequence` was off. Looks at some (query row, head) pairs, the first and
 * the last among them, for about max_work multiply-adds. Fails the test if a row that sees
 * nothing is not exactly zero and -inf (or the sink).
 */
decode_errors sequence_errors(test_pool *pool, const test_sequence *sequence, const decode_options *options,
                              uint64_t max_work);

/* Fails the test, saying `what`, unless the errors are within the bounds of the dtype: see the .c file. */
void assert_errors_within_bounds(const decode_errors *errors, attn_dtype dtype, const char *what);

#endif
