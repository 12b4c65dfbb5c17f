/*
 * Is what comes out right? Every backend against the oracle, over dtype x head_dim x group x page size
 * x query length x length and the options: all pairs of values of any two of these, by a deterministic
 * greedy cover, and the full product of their extremes. Odd sequences share each batch, so that the
 * partition cuts anywhere.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/tests/backend_fixture.h"

/* ------------------------------------------------------------------------------------------- */
/* The matrix */

enum {
    DTYPE,
    HEAD_DIM,
    HEAD_DIM_V,
    HEADS_KV,
    GROUP,
    PAGE_SIZE,
    QUERY_LENGTH,
    STORED,
    READ,
    SOFTCAP,
    WINDOW,
    SINKS,
    INVARIANT,
    INPUTS,
    WORKERS,
    FACTORS
};

enum { MAX_VALUES = 24, MAX_CASES = 1000 };

typedef struct {
    uint32_t count;
    uint32_t values[MAX_VALUES];
} factor;

static const factor matrix[FACTORS] = {
    [DTYPE] = {3, {ATTN_BF16, ATTN_FP16, ATTN_FP32}},
    [HEAD_DIM] = {8, {32, 64, 72, 80, 96, 128, 192, 256}},
    [HEAD_DIM_V] = {8, {32, 64, 72, 80, 96, 128, 192, 256}},
    [HEADS_KV] = {3, {1, 2, 3}},
    [GROUP] = {7, {1, 2, 4, 5, 7, 8, 16}},
    [PAGE_SIZE] = {4, {16, 32, 64, 128}},
    [QUERY_LENGTH] = {6, {1, 2, 7, 16, 64, 128}},
    [STORED] = {19, {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 4096, 30000}},
    [READ] = {2, {false, true}},
    [SOFTCAP] = {3, {0, 5, 50}},
    [WINDOW] = {5, {0, 1, 17, 128, 1000}},
    [SINKS] = {2, {false, true}},
    [INVARIANT] = {2, {false, true}},
    [INPUTS] = {4, {INPUTS_UNIFORM, INPUTS_DOMINANT, INPUTS_EQUAL, INPUTS_HUGE}},
    [WORKERS] = {4, {1, 2, 3, 4}},
};

/* A case is a value index for every factor. */
typedef struct {
    uint8_t index[FACTORS];
} matrix_case;

static uint32_t value_of(const matrix_case *c, uint32_t which) { return matrix[which].values[c->index[which]]; }

/* ------------------------------------------------------------------------------------------- */
/* All pairs */

static bool covered[FACTORS][MAX_VALUES][FACTORS][MAX_VALUES];

static void cover(const matrix_case *c) {
    for (uint32_t a = 0; a < FACTORS; a++) {
        for (uint32_t b = 0; b < FACTORS; b++) {
            covered[a][c->index[a]][b][c->index[b]] = true;
        }
    }
}

/* How many new pairs value `value` of factor `f` makes with the factors that are set. */
static uint32_t new_pairs(const matrix_case *c, const bool *is_set, uint32_t f, uint32_t value) {
    uint32_t pairs = 0;
    for (uint32_t other = 0; other < FACTORS; other++) {
        pairs += is_set[other] && !covered[f][value][other][c->index[other]];
    }
    return pairs;
}

static void complete_case(matrix_case *c, bool *is_set, test_random *random) {
    for (uint32_t f = 0; f < FACTORS; f++) {
        if (is_set[f]) continue;
        uint32_t best = 0, first = random_below(random, matrix[f].count);
        for (uint32_t n = 0; n < matrix[f].count; n++) {
            uint32_t value = (first + n) % matrix[f].count, pairs = new_pairs(c, is_set, f, value);
            if (n == 0 || pairs > best) {
                best = pairs;
                c->index[f] = (uint8_t)value;
            }
        }
        is_set[f] = true;
    }
}

/* For every pair not yet covered a case with it, completed with what covers most. */
static uint32_t make_all_pairs(matrix_case *cases) {
    test_random random = {20};
    uint32_t count = 0;
    memset(covered, 0, sizeof covered);
    for (uint32_t a = 0; a < FACTORS; a++) {
        for (uint32_t b = a + 1; b < FACTORS; b++) {
            for (uint32_t pair = 0; pair < matrix[a].count * matrix[b].count; pair++) {
                uint32_t index_a = pair % matrix[a].count, index_b = pair / matrix[a].count;
                if (covered[a][index_a][b][index_b]) continue;
                bool is_set[FACTORS] = {[0] = false};
                matrix_case *c = &cases[count++];
                assert_true(count < MAX_CASES);
                c->index[a] = (uint8_t)index_a;
                c->index[b] = (uint8_t)index_b;
                is_set[a] = is_set[b] = true;
                complete_case(c, is_set, &random);
                cover(c);
            }
        }
    }
    return count;
}

/* ------------------------------------------------------------------------------------------- */
/* What was found: the largest errors on uniform inputs, by dtype */

typedef struct {
    uint32_t cases;
    double out[ATTN_FP32 + 1];
    double lse;
} findings;

static void add_finding(findings *found, const matrix_case *c, const decode_errors *errors) {
    double *out = &found->out[value_of(c, DTYPE)];
    if (value_of(c, INPUTS) != INPUTS_UNIFORM) return;
    if (errors->out > *out) *out = errors->out;
    if (errors->lse > found->lse) found->lse = errors->lse;
}

static void print_findings(const findings *found) {
    print_message("%u cases; largest errors on uniform inputs: bf16 %.2e, fp16 %.2e, fp32 %.2e, LSE %.2e\n",
                  found->cases, found->out[ATTN_BF16], found->out[ATTN_FP16], found->out[ATTN_FP32], found->lse);
}

/* ------------------------------------------------------------------------------------------- */
/* One case on one backend */

static uint64_t case_work(const matrix_case *c, uint32_t query_length, uint32_t heads_kv) {
    uint64_t length = value_of(c, STORED) + query_length;
    return length * query_length * heads_kv * value_of(c, GROUP) * (value_of(c, HEAD_DIM) + value_of(c, HEAD_DIM_V));
}

static void describe_case(const matrix_case *c, uint32_t query_length, uint32_t heads_kv, char *text, size_t bytes) {
    static const char *const inputs[] = {"uniform", "dominant", "equal", "huge"};
    snprintf(text, bytes,
             "%s d=%u dv=%u kv=%u group=%u page=%u n=%u stored=%u read=%u softcap=%u window=%u sinks=%u invariant=%u "
             "inputs=%s workers=%u",
             attn_dtype_name((attn_dtype)value_of(c, DTYPE)), value_of(c, HEAD_DIM), value_of(c, HEAD_DIM_V), heads_kv,
             value_of(c, GROUP), value_of(c, PAGE_SIZE), query_length, value_of(c, STORED), value_of(c, READ),
             value_of(c, SOFTCAP), value_of(c, WINDOW), value_of(c, SINKS), value_of(c, INVARIANT),
             inputs[value_of(c, INPUTS)], value_of(c, WORKERS));
}

static attn_geometry geometry_of(const matrix_case *c, uint32_t heads_kv) {
    return (attn_geometry){.layers = LAYERS,
                           .heads_q = heads_kv * value_of(c, GROUP),
                           .heads_kv = heads_kv,
                           .head_dim = value_of(c, HEAD_DIM),
                           .head_dim_v = value_of(c, HEAD_DIM_V),
                           .dtype = (attn_dtype)value_of(c, DTYPE),
                           .page_size = value_of(c, PAGE_SIZE)};
}

/* 1 / sqrt(head_dim), as models have it; 1 for huge logits. */
static float scale_of(const matrix_case *c) {
    if (value_of(c, INPUTS) == INPUTS_HUGE) return 1;
    double scale = 1;
    for (uint32_t n = 0; n < 40; n++) { /* Newton: no libm needed for one square root */
        scale = (scale + 1.0 / value_of(c, HEAD_DIM) / scale) / 2;
    }
    return (float)scale;
}

enum { SEQUENCES = 3, ORACLE_WORK = 3000000 };

static void run_case(const matrix_case *c, const backend_row *row, uint64_t seed, findings *found) {
    if (row->kv_dtype && value_of(c, DTYPE) == ATTN_FP32) return; /* has no fp8: the plain rows have done it */
    uint64_t limit = FIXTURE_SANITIZED ? row->work_limit / 8 : row->work_limit;
    uint32_t heads_kv = value_of(c, HEADS_KV), query_length = value_of(c, QUERY_LENGTH);
    while (heads_kv > 1 && (case_work(c, query_length, heads_kv) > limit || value_of(c, STORED) > 4096)) {
        heads_kv--;
    }
    while (query_length > 1 && case_work(c, query_length, heads_kv) > limit) {
        query_length /= 2;
    }
    if (case_work(c, query_length, heads_kv) > limit) return;

    char text[256];
    describe_case(c, query_length, heads_kv, text, sizeof text);
    attn_geometry geometry = geometry_of(c, heads_kv);
    sequence_spec specs[SEQUENCES] = {
        {(uint32_t)(seed % 150), 1, false, INPUTS_UNIFORM},
        {value_of(c, STORED), query_length, value_of(c, READ), (test_inputs)value_of(c, INPUTS)},
        {(uint32_t)(seed % 40), 1 + seed % 3, seed % 2 == 0, INPUTS_UNIFORM},
    };
    test_pool pool;
    pool_open(&pool, row, &geometry, pool_pages_for(&geometry, value_of(c, STORED) + 600) + 3, value_of(c, WORKERS),
              seed);
    float sinks[ATTN_MAX_GROUP * 3];
    for (uint32_t h = 0; h < geometry.heads_q; h++) {
        sinks[h] = random_uniform(&pool.random, -2, 2);
    }
    decode_options options = {.scale = scale_of(c),
                              .softcap = (float)value_of(c, SOFTCAP),
                              .window = value_of(c, WINDOW),
                              .sinks = value_of(c, SINKS) ? sinks : NULL,
                              .batch_invariant = value_of(c, INVARIANT),
                              .no_lse = seed % 5 == 0};
    test_sequence sequences[SEQUENCES], *pointers[SEQUENCES];
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        sequence_init(&sequences[i], &pool, specs[i]);
        pointers[i] = &sequences[i];
    }
    decode_sequences(&pool, pointers, SEQUENCES, &options);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        decode_errors errors = sequence_errors(&pool, &sequences[i], &options, ORACLE_WORK);
        assert_errors_within_bounds(&errors, geometry.dtype, text);
        add_finding(found, c, &errors);
        sequence_fini(&sequences[i]);
    }
    pool_close(&pool);
    found->cases++;
}

static void all_pairs_of_the_matrix_are_within_bounds(void **state) {
    static matrix_case cases[MAX_CASES];
    uint32_t count = make_all_pairs(cases), step = FIXTURE_SANITIZED ? 3 : 1;
    findings found = {0};
    for (uint32_t n = 0; n < count; n += step) {
        run_case(&cases[n], *state, n, &found);
    }
    print_findings(&found);
}

/* The first and last value of what shapes the work; the other factors go round. */
static void the_extremes_of_the_matrix_are_within_bounds(void **state) {
    static const uint32_t extreme[] = {HEAD_DIM, HEAD_DIM_V, GROUP, PAGE_SIZE, QUERY_LENGTH, STORED};
    enum { EXTREMES = sizeof extreme / sizeof *extreme };
    uint32_t step = FIXTURE_SANITIZED ? 5 : 1;
    findings found = {0};
    for (uint32_t n = 0; n < 1u << EXTREMES; n += step) {
        matrix_case c;
        for (uint32_t f = 0; f < FACTORS; f++) {
            c.index[f] = (uint8_t)((n * 7 + f) % matrix[f].count);
        }
        c.index[HEADS_KV] = 0;
        for (uint32_t e = 0; e < EXTREMES; e++) {
            c.index[extreme[e]] = (uint8_t)(n >> e & 1 ? matrix[extreme[e]].count - 1 : 0);
        }
        run_case(&c, *state, 1000 + n, &found);
    }
    print_findings(&found);
}

/* ------------------------------------------------------------------------------------------- */
/* Few long sequences, one query row each: alike or not, what is long is cut into many parts */

enum { MAX_FEW = 4 };

typedef struct {
    attn_dtype dtype;
    uint32_t head_dim, heads_kv, group, page_size;
    bool has_sinks;
    uint32_t stored[MAX_FEW]; /* a 0 ends them */
} few_long;

static const few_long FEW_LONG[] = {
    {ATTN_BF16, 128, 1, 8, 64, false, {9000}},                  /* so many parts that blocks merge them together */
    {ATTN_BF16, 128, 1, 4, 16, true, {4095}},                   /* its new row fills the last tile */
    {ATTN_BF16, 128, 2, 4, 64, false, {4100, 4090}},            /* about alike */
    {ATTN_FP16, 128, 1, 5, 32, true, {4096, 4097, 4090, 4088}}, /* the new row is a tile of its own */
    {ATTN_FP16, 64, 1, 1, 64, false, {6000}},                   /* all warps merge the only row */
    {ATTN_BF16, 64, 2, 3, 128, false, {4000, 4100}},            /* warps that have no row */
    {ATTN_BF16, 128, 1, 7, 64, true, {3000, 10, 8000}},         /* not alike at all */
};

static void run_few_long(const few_long *c, const backend_row *row, uint64_t seed) {
    attn_geometry geometry = {.layers = LAYERS,
                              .heads_q = c->heads_kv * c->group,
                              .heads_kv = c->heads_kv,
                              .head_dim = c->head_dim,
                              .head_dim_v = c->head_dim,
                              .dtype = c->dtype,
                              .page_size = c->page_size};
    uint32_t count = 0, tokens = 0;
    for (; count < MAX_FEW && c->stored[count] != 0; count++)
        tokens += c->stored[count] + 2 * c->page_size;
    test_pool pool;
    pool_open(&pool, row, &geometry, pool_pages_for(&geometry, tokens) + MAX_FEW, 2, seed);
    float sinks[ATTN_MAX_GROUP * 2];
    for (uint32_t h = 0; h < geometry.heads_q; h++)
        sinks[h] = random_uniform(&pool.random, -2, 2);
    decode_options options = {.scale = c->head_dim == 64 ? 0.125f : 0.0884f, .sinks = c->has_sinks ? sinks : NULL};
    test_sequence sequences[MAX_FEW], *pointers[MAX_FEW];
    for (uint32_t i = 0; i < count; i++) {
        sequence_init(&sequences[i], &pool, (sequence_spec){c->stored[i], 1, false, INPUTS_UNIFORM});
        pointers[i] = &sequences[i];
    }
    decode_sequences(&pool, pointers, count, &options);
    char text[64];
    snprintf(text, sizeof text, "few long ones, case %u", (unsigned)seed);
    for (uint32_t i = 0; i < count; i++) {
        decode_errors errors = sequence_errors(&pool, &sequences[i], &options, ORACLE_WORK);
        assert_errors_within_bounds(&errors, geometry.dtype, text);
        sequence_fini(&sequences[i]);
    }
    pool_close(&pool);
}

static void few_long_sequences_are_within_bounds(void **state) {
    uint32_t step = FIXTURE_SANITIZED ? 3 : 1;
    for (uint32_t n = 0; n < sizeof FEW_LONG / sizeof *FEW_LONG; n += step)
        run_few_long(&FEW_LONG[n], *state, n);
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    const struct CMUnitTest tests[] = {
        ON_EVERY_BACKEND(all_pairs_of_the_matrix_are_within_bounds),
        ON_EVERY_BACKEND(the_extremes_of_the_matrix_are_within_bounds),
        ON_EVERY_BACKEND(few_long_sequences_are_within_bounds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
