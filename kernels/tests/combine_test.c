/* attn_combine: the merge of partial results, against the same sum in long double. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/combine.h"
#include "kernels/dtype.h"

enum { QUERIES = 3, HEADS = 4, DIM = 72, ROWS = QUERIES * HEADS, MAX_PARTIALS = 40 };

typedef struct {
    float outs[MAX_PARTIALS][ROWS * DIM];
    float lses[MAX_PARTIALS][ROWS];
    attn_partial partials[MAX_PARTIALS];
    float sinks[HEADS];
    float out[ROWS * DIM];
    float lse[ROWS];
} combine_case;

static combine_case c;
static uint64_t random_state;

static float uniform(float low, float high) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * ((float)(random_state >> 40) / (float)(1 << 24));
}

static void fill(float lse_spread) {
    random_state = 7;
    memset(&c, 0, sizeof c);
    for (int p = 0; p < MAX_PARTIALS; p++) {
        c.partials[p] = (attn_partial){c.outs[p], c.lses[p]};
        for (int n = 0; n < ROWS * DIM; n++) {
            c.outs[p][n] = uniform(-2, 2);
        }
        for (int n = 0; n < ROWS; n++) {
            c.lses[p][n] = uniform(-lse_spread, lse_spread);
        }
    }
    for (int h = 0; h < HEADS; h++) {
        c.sinks[h] = uniform(-lse_spread, lse_spread);
    }
}

/* Its out rows are NaN: they are not to be looked at. */
static void make_empty(int partial) {
    memset(c.outs[partial], 0xff, sizeof c.outs[partial]);
    for (int n = 0; n < ROWS; n++) {
        c.lses[partial][n] = -INFINITY;
    }
}

static void combine(uint32_t count, const float *sinks) {
    attn_combine(c.partials, count, QUERIES, HEADS, DIM, sinks, ATTN_FP32, c.out, c.lse);
}

static void assert_is_exact_merge(uint32_t count, const float *sinks) {
    for (int row = 0; row < ROWS; row++) {
        long double total = sinks ? expl(sinks[row % HEADS]) : 0, out[DIM] = {0};
        for (uint32_t p = 0; p < count; p++) {
            total += expl(c.lses[p][row]);
        }
        for (uint32_t p = 0; p < count; p++) {
            for (int e = 0; e < DIM; e++) {
                out[e] += expl(c.lses[p][row]) / total * c.outs[p][row * DIM + e];
            }
        }
        assert_true(fabsl(c.lse[row] - logl(total)) <= 1e-7L * (1 + fabsl(logl(total))));
        for (int e = 0; e < DIM; e++) {
            assert_true(fabsl(c.out[row * DIM + e] - out[e]) <= 2e-6L);
        }
    }
}

static void merge_is_the_softmax_over_all_partials(void **state) {
    (void)state;
    static const float spreads[] = {0, 1, 10, 80, 600};
    for (int n = 0; n < 5; n++) {
        for (uint32_t count = 1; count <= MAX_PARTIALS; count += 3) {
            fill(spreads[n]);
            combine(count, NULL);
            assert_is_exact_merge(count, NULL);
            combine(count, c.sinks);
            assert_is_exact_merge(count, c.sinks);
        }
    }
}

static void one_partial_comes_out_as_it_went_in(void **state) {
    (void)state;
    fill(500);
    combine(1, NULL);
    assert_memory_equal(c.out, c.outs[0], sizeof c.out);
    assert_memory_equal(c.lse, c.lses[0], sizeof c.lse);
}

static void empty_partials_change_no_bit(void **state) {
    (void)state;
    static float out[ROWS * DIM], lse[ROWS];
    fill(5);
    combine(3, c.sinks);
    memcpy(out, c.out, sizeof out);
    memcpy(lse, c.lse, sizeof lse);

    fill(5);
    memmove(c.outs[4], c.outs[2], sizeof c.outs[2]);
    memmove(c.lses[4], c.lses[2], sizeof c.lses[2]);
    memmove(c.outs[2], c.outs[1], sizeof c.outs[1]);
    memmove(c.lses[2], c.lses[1], sizeof c.lses[1]);
    make_empty(1);
    make_empty(3);
    make_empty(5);
    combine(6, c.sinks);
    assert_memory_equal(out, c.out, sizeof out);
    assert_memory_equal(lse, c.lse, sizeof lse);
}

static void nothing_visible_is_zero_and_minus_infinity(void **state) {
    (void)state;
    for (uint32_t count = 0; count <= 2; count++) {
        fill(5);
        make_empty(0);
        make_empty(1);
        memset(c.out, 0xff, sizeof c.out);
        combine(count, NULL);
        for (int n = 0; n < ROWS * DIM; n++) {
            assert_true(c.out[n] == 0);
        }
        for (int n = 0; n < ROWS; n++) {
            assert_true(c.lse[n] == -INFINITY);
        }
    }
}

static void a_sink_alone_is_zero_and_the_sink(void **state) {
    (void)state;
    fill(5);
    make_empty(0);
    combine(1, c.sinks);
    for (int n = 0; n < ROWS * DIM; n++) {
        assert_true(c.out[n] == 0);
    }
    for (int n = 0; n < ROWS; n++) {
        assert_true(c.lse[n] == c.sinks[n % HEADS]);
    }
}

static void a_sink_of_minus_infinity_is_no_sink(void **state) {
    (void)state;
    static float out[ROWS * DIM];
    fill(5);
    combine(4, NULL);
    memcpy(out, c.out, sizeof out);
    for (int h = 0; h < HEADS; h++) {
        c.sinks[h] = -INFINITY;
    }
    combine(4, c.sinks);
    assert_memory_equal(out, c.out, sizeof out);
}

static void nan_is_not_hidden(void **state) {
    (void)state;
    fill(5);
    c.lses[1][2] = NAN;
    c.outs[2][5 * DIM + 7] = NAN;
    combine(3, NULL);
    assert_true(isnan(c.lse[2]) && isnan(c.out[2 * DIM]));
    assert_true(isnan(c.out[5 * DIM + 7]) && !isnan(c.out[5 * DIM + 8]) && !isnan(c.lse[5]));
}

static void out_is_the_float_result_rounded_once(void **state) {
    (void)state;
    static uint16_t halves[ROWS * DIM], rounded[ROWS * DIM];
    static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_FP16};
    fill(5);
    combine(5, c.sinks);
    for (int n = 0; n < 2; n++) {
        attn_combine(c.partials, 5, QUERIES, HEADS, DIM, c.sinks, dtypes[n], halves, NULL);
        attn_elements_from_floats(dtypes[n], c.out, rounded, ROWS * DIM);
        assert_memory_equal(halves, rounded, sizeof halves);
    }
}

static uint32_t digest_floats(uint32_t digest, const float *values, int count) {
    for (int n = 0; n < count; n++) {
        digest = (digest ^ attn_float_bits(values[n])) * 16777619u;
    }
    return digest;
}

/* Golden bits: they change only if the fixed arithmetic does, whatever machine or flags built it. */
static void the_arithmetic_is_the_same_everywhere(void **state) {
    (void)state;
    fill(20);
    combine(17, c.sinks);
    uint32_t digest = digest_floats(2166136261u, c.out, ROWS * DIM);
    assert_int_equal(digest_floats(digest, c.lse, ROWS), 0xb13b73aeu);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merge_is_the_softmax_over_all_partials),
        cmocka_unit_test(one_partial_comes_out_as_it_went_in),
        cmocka_unit_test(empty_partials_change_no_bit),
        cmocka_unit_test(nothing_visible_is_zero_and_minus_infinity),
        cmocka_unit_test(a_sink_alone_is_zero_and_the_sink),
        cmocka_unit_test(a_sink_of_minus_infinity_is_no_sink),
        cmocka_unit_test(nan_is_not_hidden),
        cmocka_unit_test(out_is_the_float_result_rounded_once),
        cmocka_unit_test(the_arithmetic_is_the_same_everywhere),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
