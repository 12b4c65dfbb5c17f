/*
 * The cpu backend's inner parts: the exponential, conversions, every instruction set's kernel against
 * float64, rows that do not depend on their neighbours, the pool's places and bounds, the workers.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/pool.h"
#include "kernels/cpu/tests/emulated.h"
#include "kernels/cpu/workers.h"
#include "kernels/dtype.h"

/* ------------------------------------------------------------------------------------------- */
/* Kernels of this machine */

/* Those that run here; the BF16 path is emulated where the machine has AVX-512 but no such instruction. */
static uint32_t runnable_kernels(const attn_cpu_kernels *found[5]) {
    static const char *const names[] = {"portable", "avx2", "avx512", "avx512bf16"};
    uint32_t count = 0;
    for (int i = 0; i < 4; i++) {
        if (!attn_failed(attn_cpu_kernels_find(names[i], &found[count]))) count++;
    }
    const attn_cpu_kernels *avx512;
    if (!attn_failed(attn_cpu_kernels_find("avx512", &avx512))) found[count++] = &attn_cpu_kernels_emulated;
    return count;
}

static void kernels_are_found_by_name_and_unknown_names_refused(void **state) {
    (void)state;
    const attn_cpu_kernels *kernels = NULL;
    assert_int_equal(attn_cpu_kernels_find("portable", &kernels).code, ATTN_OK);
    assert_string_equal(kernels->name, "portable");
    assert_int_equal(attn_cpu_kernels_find(NULL, &kernels).code, ATTN_OK);
    assert_int_equal(attn_cpu_kernels_find("auto", &kernels).code, ATTN_OK);
    attn_status status = attn_cpu_kernels_find("sse9", &kernels);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(status.message, "avx512bf16, avx512, avx2, portable"));
    static const char *const names[] = {"avx2", "avx512", "avx512bf16"};
    for (int i = 0; i < 3; i++) {
        status = attn_cpu_kernels_find(names[i], &kernels);
        if (status.code == ATTN_OK) {
            assert_string_equal(kernels->name, names[i]);
        } else {
            assert_int_equal(status.code, ATTN_UNAVAILABLE);
            assert_non_null(strstr(status.message, names[i]));
        }
    }
}

static void exp2_is_within_two_ulp_and_zero_for_minus_infinity(void **state) {
    (void)state;
    enum { COUNT = 1 << 16 };
    float *x = malloc(COUNT * sizeof *x), *y = malloc(COUNT * sizeof *y);
    for (int i = 0; i < COUNT; i++) {
        x[i] = -(float)i * (126.0f / COUNT);
    }
    x[COUNT - 1] = -INFINITY;
    x[COUNT - 2] = -127.0f;
    x[COUNT - 3] = -1e30f;
    x[COUNT - 4] = NAN;
    x[COUNT - 5] = -126.0f;
    const attn_cpu_kernels *kernels[5];
    for (uint32_t k = runnable_kernels(kernels); k-- > 0;) {
        kernels[k]->exp2(x, y, COUNT);
        assert_true(y[0] == 1.0f);
        for (int i = 0; i < COUNT - 5; i++) {
            double exact = exp2((double)x[i]);
            if (!(fabs(y[i] - exact) <= 2 * exact * 0x1p-24 * 2)) fail_msg("%s: 2^%g", kernels[k]->name, (double)x[i]);
        }
        assert_true(y[COUNT - 1] == 0 && y[COUNT - 2] == 0 && y[COUNT - 3] == 0);
        assert_true(isnan(y[COUNT - 4]));
        assert_true(y[COUNT - 5] == 0x1p-126f);
    }
    free(x);
    free(y);
}

static void conversions_are_those_of_dtype_bit_for_bit(void **state) {
    (void)state;
    enum { COUNT = 1 << 16 };
    uint16_t *halves = malloc(COUNT * 2), *there = malloc(COUNT * 2), *expected = malloc(COUNT * 2);
    float *floats = malloc(COUNT * 4), *floats_expected = malloc(COUNT * 4);
    const attn_cpu_kernels *kernels[5];
    for (uint32_t k = runnable_kernels(kernels); k-- > 0;) {
        for (attn_dtype dtype = ATTN_BF16; dtype <= ATTN_FP16; dtype++) {
            for (int i = 0; i < COUNT; i++) {
                halves[i] = (uint16_t)i;
            }
            kernels[k]->to_floats(dtype, halves, floats, COUNT);
            attn_elements_to_floats(dtype, halves, floats_expected, COUNT);
            assert_memory_equal(floats, floats_expected, COUNT * 4);
            for (int i = 0; i < COUNT; i++) { /* every exponent and sign, with all sorts of fractions */
                floats[i] = attn_float_of_bits((uint32_t)i << 16 | ((uint32_t)i * 40503u & 0xffff));
            }
            kernels[k]->from_floats(dtype, floats, there, COUNT);
            attn_elements_from_floats(dtype, floats, expected, COUNT);
            assert_memory_equal(there, expected, COUNT * 2);
        }
    }
    free(halves);
    free(there);
    free(expected);
    free(floats);
    free(floats_expected);
}

/* ------------------------------------------------------------------------------------------- */
/* A sequence in a pool */

enum { TOKENS = 203, ROWS = 13, MOST_DIM = 256 };

typedef struct {
    attn_cpu_pool pool;
    uint32_t pages[16];
    float keys[TOKENS][MOST_DIM];   /* as stored: rounded to the dtype */
    float values[TOKENS][MOST_DIM]; /* likewise */
    float queries[ROWS][MOST_DIM];  /* likewise */
    attn_cpu_visible visible[ROWS];
} fixture;

static uint64_t random_state = 1;

static float uniform(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(random_state >> 40) * 0x1p-22f - 2.0f;
}

/* `count` random elements, and what they are as floats. */
static void random_row(attn_dtype dtype, float *row, char *elements, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        row[i] = uniform();
    }
    attn_elements_from_floats(dtype, row, elements, count);
    attn_elements_to_floats(dtype, elements, row, count);
}

/* One layer of three, KV head 1 of 2, pages in reverse order; everything else in the pool is NaN. */
static fixture *fill_fixture(attn_dtype dtype, uint32_t head_dim, uint32_t head_dim_v, uint32_t page_size) {
    fixture *f = calloc(1, sizeof *f);
    attn_geometry geometry = {3, 4, 2, head_dim, head_dim_v, dtype, page_size, 0};
    uint32_t count = (TOKENS + page_size - 1) / page_size;
    assert_int_equal(attn_cpu_pool_init(&f->pool, &geometry, count).code, ATTN_OK);
    for (uint32_t p = 0; p < count; p++) {
        attn_cpu_pool_poison(&f->pool, p, 0, page_size);
        f->pages[p] = count - 1 - p;
    }
    char key[MOST_DIM * 4], value[MOST_DIM * 4];
    for (uint32_t t = 0; t < TOKENS; t++) {
        random_row(dtype, f->keys[t], key, head_dim);
        random_row(dtype, f->values[t], value, head_dim_v);
        attn_cpu_pool_write(&f->pool, 2, f->pages[t / page_size], t % page_size, 1, key, value);
    }
    for (uint32_t r = 0; r < ROWS; r++) {
        random_row(dtype, f->queries[r], key, head_dim);
        f->visible[r] = (attn_cpu_visible){r * 9, TOKENS - (ROWS - 1 - r) * 3};
    }
    f->visible[4] = (attn_cpu_visible){70, 70}; /* sees nothing */
    return f;
}

static void free_fixture(fixture *f) {
    attn_cpu_pool_fini(&f->pool);
    free(f);
}

typedef struct {
    float out[ROWS][MOST_DIM];
    float lse[ROWS];
} results;

/* Rows first .. first + rows - 1 over tokens begin .. end - 1; packed at the front of *results. */
static bool run_rows(const fixture *f, const attn_cpu_kernels *kernels, uint32_t first, uint32_t rows, uint64_t begin,
                     uint64_t end, results *results) {
    const attn_geometry *geometry = &f->pool.geometry;
    bool keep = kernels->bf16_queries && geometry->dtype == ATTN_BF16;
    float queries[ROWS * MOST_DIM], *out = calloc((size_t)rows * f->pool.value_stride, sizeof *out);
    for (uint32_t c = 0; c < geometry->head_dim; c++) {
        for (uint32_t r = 0; r < rows; r++) {
            size_t place = ((size_t)c / 2 * rows + r) * 2 + c % 2;
            uint16_t half = attn_float_to_bf16(f->queries[first + r][c]);
            if (keep) memcpy((char *)queries + 2 * place, &half, sizeof half);
            if (!keep) queries[place] = f->queries[first + r][c];
        }
    }
    attn_cpu_job job = {
        .pool = &f->pool,
        .span = {.layer = 2, .head = 1, .pages = f->pages, .begin = begin, .end = end},
        .rows = rows,
        .queries = queries,
        .visible = f->visible + first,
        .scale = 1.0f / sqrtf((float)geometry->head_dim),
        .out = out,
        .lse = results->lse,
    };
    bool good = kernels->attend(&job);
    for (uint32_t r = 0; r < rows; r++) {
        memcpy(results->out[r], out + (size_t)r * f->pool.value_stride, geometry->head_dim_v * sizeof(float));
    }
    free(out);
    return good;
}

static double exact_score(const fixture *f, uint32_t row, uint64_t token) {
    double sum = 0;
    for (uint32_t c = 0; c < f->pool.geometry.head_dim; c++) {
        sum += (double)f->queries[row][c] * f->keys[token][c];
    }
    return sum / sqrt(f->pool.geometry.head_dim);
}

static void check_row(const fixture *f, uint32_t row, const float *out, float lse, const char *name) {
    uint32_t columns = f->pool.geometry.head_dim_v;
    double exact[MOST_DIM] = {0}, total = 0, difference = 0, norm = 0;
    for (uint64_t t = f->visible[row].begin; t < f->visible[row].end; t++) {
        double weight = exp(exact_score(f, row, t));
        total += weight;
        for (uint32_t c = 0; c < columns; c++) {
            exact[c] += weight * f->values[t][c];
        }
    }
    if (total == 0) {
        assert_true(lse == -INFINITY);
        for (uint32_t c = 0; c < columns; c++) {
            assert_true(out[c] == 0.0f);
        }
        return;
    }
    for (uint32_t c = 0; c < columns; c++) {
        difference += pow(out[c] - exact[c] / total, 2);
        norm += pow(exact[c] / total, 2);
    }
    if (!(sqrt(difference / norm) <= 2e-6)) fail_msg("%s: row %u: error %g", name, row, sqrt(difference / norm));
    if (!(fabs(lse - log(total)) <= 2e-6)) fail_msg("%s: row %u: LSE error %g", name, row, fabs(lse - log(total)));
}

static void every_kernel_agrees_with_float64(void **state) {
    (void)state;
    static const uint32_t shapes[][3] = {{128, 128, 64}, {64, 72, 16}, {32, 256, 32}, {104, 40, 128}};
    const attn_cpu_kernels *kernels[5];
    uint32_t count = runnable_kernels(kernels);
    results *got = calloc(1, sizeof *got);
    for (attn_dtype dtype = ATTN_BF16; dtype <= ATTN_FP32; dtype++) {
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
            fixture *f = fill_fixture(dtype, shapes[s][0], shapes[s][1], shapes[s][2]);
            for (uint32_t k = 0; k < count; k++) {
                assert_true(run_rows(f, kernels[k], 0, ROWS, 0, TOKENS, got));
                for (uint32_t r = 0; r < ROWS; r++) {
                    check_row(f, r, got->out[r], got->lse[r], kernels[k]->name);
                }
            }
            free_fixture(f);
        }
    }
    free(got);
}

static void a_row_has_the_same_bits_alone_and_among_others(void **state) {
    (void)state;
    const attn_cpu_kernels *kernels[5];
    uint32_t count = runnable_kernels(kernels);
    results *together = calloc(1, sizeof *together), *alone = calloc(1, sizeof *alone);
    for (attn_dtype dtype = ATTN_BF16; dtype <= ATTN_FP32; dtype++) {
        fixture *f = fill_fixture(dtype, 96, 96, 32);
        for (uint32_t k = 0; k < count; k++) {
            assert_true(run_rows(f, kernels[k], 0, ROWS, 0, TOKENS, together));
            for (uint32_t first = 0; first < ROWS; first++) {
                for (uint32_t rows = 1; first + rows <= ROWS; rows += 3) {
                    assert_true(run_rows(f, kernels[k], first, rows, 0, TOKENS, alone));
                    assert_memory_equal(alone->lse, together->lse + first, rows * sizeof(float));
                    for (uint32_t r = 0; r < rows; r++) {
                        assert_memory_equal(alone->out[r], together->out[first + r], 96 * sizeof(float));
                    }
                }
            }
        }
        free_fixture(f);
    }
    free(together);
    free(alone);
}

static void page_size_does_not_change_a_bit(void **state) {
    (void)state;
    const attn_cpu_kernels *kernels[5];
    uint32_t count = runnable_kernels(kernels);
    results *first = calloc(1, sizeof *first), *other = calloc(1, sizeof *other);
    for (uint32_t k = 0; k < count; k++) {
        for (uint32_t page_size = 16; page_size <= 128; page_size *= 2) {
            random_state = 99;
            fixture *f = fill_fixture(ATTN_BF16, 64, 64, page_size);
            assert_true(run_rows(f, kernels[k], 0, ROWS, 0, TOKENS, page_size == 16 ? first : other));
            if (page_size > 16) assert_memory_equal(first, other, sizeof *first);
            free_fixture(f);
        }
    }
    free(first);
    free(other);
}

/* ------------------------------------------------------------------------------------------- */
/* Pool */

static void a_page_outside_the_pool_fails_the_kernel(void **state) {
    (void)state;
    const attn_cpu_kernels *kernels[5];
    uint32_t count = runnable_kernels(kernels);
    results *got = calloc(1, sizeof *got);
    for (uint32_t k = 0; k < count; k++) {
        fixture *f = fill_fixture(ATTN_BF16, 64, 64, 16);
        uint32_t good = f->pages[12]; /* of tokens 192 .. 202 */
        f->pages[12] = 2147480000u;
        assert_false(run_rows(f, kernels[k], 0, ROWS, 0, TOKENS, got));
        assert_true(run_rows(f, kernels[k], 0, ROWS, 0, 192, got));
        f->pages[12] = f->pool.pages;
        assert_false(run_rows(f, kernels[k], 0, ROWS, 0, TOKENS, got));
        f->pages[12] = good;
        assert_true(run_rows(f, kernels[k], 0, ROWS, 0, TOKENS, got));
        free_fixture(f);
    }
    free(got);
}

static void heads_exist_only_for_pages_of_the_pool(void **state) {
    (void)state;
    attn_cpu_pool pool;
    attn_geometry geometry = {2, 2, 2, 64, 40, ATTN_FP16, 32, 0};
    assert_int_equal(attn_cpu_pool_init(&pool, &geometry, 5).code, ATTN_OK);
    assert_ptr_equal(attn_cpu_pool_head(&pool, 0, 0, 0), pool.memory);
    const char *last = attn_cpu_pool_head(&pool, 1, 4, 1);
    assert_true(last + pool.head_bytes == pool.memory + 5 * pool.page_bytes);
    assert_true(5 * pool.page_bytes <= pool.bytes);
    assert_null(attn_cpu_pool_head(&pool, 0, 5, 0));
    assert_null(attn_cpu_pool_head(&pool, 0, UINT32_MAX, 0));
    attn_cpu_pool_fini(&pool);
}

static void a_pool_larger_than_memory_is_refused_with_its_size(void **state) {
    (void)state;
    attn_cpu_pool pool;
    attn_geometry geometry = {80, 64, 8, 256, 256, ATTN_FP32, 128, 0};
    attn_status status = attn_cpu_pool_init(&pool, &geometry, UINT32_MAX);
    assert_int_equal(status.code, ATTN_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(status.message, "4294967295 pages"));
    attn_cpu_pool_fini(&pool);
}

/* ------------------------------------------------------------------------------------------- */
/* Workers */

typedef struct {
    _Atomic uint32_t calls[4];
    uint64_t input;
    uint64_t seen[4]; /* input, as each worker saw it */
} tally;

static void count_call(void *context, uint32_t worker) {
    tally *tally = context;
    atomic_fetch_add(&tally->calls[worker], 1);
    tally->seen[worker] = tally->input;
}

static void every_worker_runs_every_task_once_and_the_call_waits(void **state) {
    (void)state;
    attn_cpu_workers *workers;
    tally tally = {0};
    assert_int_equal(attn_cpu_workers_create(4, NULL, &workers).code, ATTN_OK);
    for (uint32_t round = 1; round <= 2000; round++) {
        tally.input = round;
        if (round % 5 == 0) {
            attn_cpu_workers_run_alone(workers, count_call, &tally);
        } else {
            attn_cpu_workers_run(workers, count_call, &tally);
        }
        for (int w = 0; w < 4; w++) {
            assert_int_equal(tally.calls[w], round);
            assert_int_equal(tally.seen[w], round);
        }
    }
    attn_cpu_workers_destroy(workers);
}

static void a_core_that_does_not_exist_is_refused(void **state) {
    (void)state;
    attn_cpu_workers *workers;
    const int cpus[] = {0, 1000};
    assert_int_equal(attn_cpu_workers_create(2, cpus, &workers).code, ATTN_INVALID_ARGUMENT);
    assert_null(workers);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kernels_are_found_by_name_and_unknown_names_refused),
        cmocka_unit_test(exp2_is_within_two_ulp_and_zero_for_minus_infinity),
        cmocka_unit_test(conversions_are_those_of_dtype_bit_for_bit),
        cmocka_unit_test(every_kernel_agrees_with_float64),
        cmocka_unit_test(a_row_has_the_same_bits_alone_and_among_others),
        cmocka_unit_test(page_size_does_not_change_a_bit),
        cmocka_unit_test(a_page_outside_the_pool_fails_the_kernel),
        cmocka_unit_test(heads_exist_only_for_pages_of_the_pool),
        cmocka_unit_test(a_pool_larger_than_memory_is_refused_with_its_size),
        cmocka_unit_test(every_worker_runs_every_task_once_and_the_call_waits),
        cmocka_unit_test(a_core_that_does_not_exist_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
