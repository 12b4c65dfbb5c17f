/* The rule of side_by_side.h: whether own tokens are attended to beside a prefix, and on how many multiprocessors. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/attention.h"
#include "kernels/cuda/side_by_side.h"

enum { MULTIPROCESSORS = 132 };

static const attn_cuda_tuning hopper = {.is_hopper = 1, .workers = MULTIPROCESSORS};

/* Sequences of `own` tokens each that share `prefix` tokens, 32 query heads on 8 of bf16. */
static attn_cuda_forks forks_of(uint32_t sequences, uint32_t prefix, uint32_t own) {
    attn_cuda_forks forks = {.own_expected = {1, own, own},
                             .prefixes_expected = {sequences, prefix, prefix},
                             .least_queries = sequences,
                             .sharing = sequences,
                             .own_tiles = (uint64_t)sequences * attn_cuda_own_tiles(own)};
    forks.own = (attn_cuda_call){.batch = sequences,
                                 .layer = {.heads_q = 32,
                                           .heads_kv = 8,
                                           .head_dim = 128,
                                           .head_dim_v = 128,
                                           .dtype = ATTN_BF16,
                                           .kv_dtype = ATTN_BF16,
                                           .element_bytes = 2}};
    forks.prefixes = forks.own;
    forks.prefixes.batch = 1;
    return forks;
}

static uint32_t chosen(const attn_cuda_forks *forks) { return attn_cuda_choose_own_workers(forks, &hopper); }

/* 16 units, so that parts leave 132 - 16 * parts. */
static void the_measured_case_is_side_by_side(void **state) {
    (void)state;
    attn_cuda_forks forks = forks_of(64, 16384, 512);
    assert_int_equal(chosen(&forks), MULTIPROCESSORS - 5 * 16);
}

static void more_own_tokens_have_more_multiprocessors(void **state) {
    (void)state;
    uint32_t before = 0;
    for (uint32_t own = 256; own <= 640; own += 64) {
        attn_cuda_forks forks = forks_of(64, 16384, own);
        uint32_t workers = chosen(&forks);
        if (workers == 0) continue;
        assert_true(workers >= before && workers < MULTIPROCESSORS);
        assert_int_equal((MULTIPROCESSORS - workers) % 16, 0); /* all units in as many parts */
        before = workers;
    }
    assert_true(before > 0);
}

/* The fastest of what was measured, or at most 4% slower. */
static void measured_cases_have_about_the_fastest_number(void **state) {
    (void)state;
    static const struct {
        uint32_t sequences, prefix, own, workers;
    } cases[] = {
        {64, 16384, 64, 20},   {64, 16384, 256, 36}, {64, 16384, 1024, 68}, {64, 16384, 2048, 84},
        {64, 8192, 64, 36},    {64, 8192, 256, 52},  {64, 8192, 512, 68},   {64, 8192, 1024, 84},
        {64, 4096, 64, 36},    {64, 4096, 256, 68},  {64, 4096, 512, 84},   {64, 4096, 1024, 100},
        {64, 2048, 64, 52},    {64, 2048, 256, 84},  {64, 2048, 512, 100},  {64, 2048, 1024, 100},
        {64, 1024, 64, 68},    {64, 1024, 256, 100}, {64, 1024, 512, 100},  {64, 1024, 1024, 100},
        {128, 16384, 512, 68}, {32, 16384, 512, 52}, {128, 16384, 128, 36}, {32, 16384, 1024, 68},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        attn_cuda_forks forks = forks_of(cases[i].sequences, cases[i].prefix, cases[i].own);
        assert_int_equal(chosen(&forks), cases[i].workers);
    }
}

static void where_there_are_no_parts_it_waits(void **state) {
    (void)state;
    attn_cuda_forks one_tile = forks_of(64, 128, 512), many_units = forks_of(64 * 5, 16384, 512);
    assert_int_equal(chosen(&one_tile), 0);
    assert_int_equal(chosen(&many_units), 0); /* 80 */
}

static void own_tokens_on_too_few_wait(void **state) {
    (void)state;
    attn_cuda_forks forks = forks_of(64 * 4, 16384, 4096); /* 64 units, so that two parts leave four */
    assert_int_equal(chosen(&forks), 0);
}

static void units_for_all_multiprocessors_leave_none(void **state) {
    (void)state;
    attn_cuda_forks forks = forks_of(64 * 9, 16384, 512); /* 18 blocks of 8 heads */
    assert_int_equal(chosen(&forks), 0);
}

static void what_was_not_measured_is_one_after_the_other(void **state) {
    (void)state;
    static const attn_cuda_sequence sequence = {.length = 1};
    attn_cuda_forks forks = forks_of(64, 16384, 512);
    forks.own.sequences = &sequence;
    assert_int_equal(chosen(&forks), 0);
    forks = forks_of(64, 16384, 512);
    forks.own.softcap = 30;
    assert_int_equal(chosen(&forks), 0);
    forks = forks_of(64, 16384, 512);
    forks.own.layer.kv_dtype = ATTN_FP8_E4M3;
    assert_int_equal(chosen(&forks), 0);
    forks = forks_of(64, 16384, 512);
    forks.own.layer.head_dim = forks.own.layer.head_dim_v = 256;
    assert_int_equal(chosen(&forks), 0);
    forks = forks_of(16, 16384, 512); /* 64 rows: no tall blocks */
    assert_int_equal(chosen(&forks), 0);
    forks = forks_of(64, 16384, 512);
    forks.least_queries = 32; /* of another prefix */
    forks.prefixes.batch = 2;
    assert_int_equal(chosen(&forks), 0);
    forks = forks_of(64, 16384, 512);
    forks.prefixes_expected.shortest = 8192;
    forks.prefixes.batch = 2;
    assert_int_equal(chosen(&forks), 0);
    attn_cuda_tuning older = hopper;
    older.is_hopper = 0;
    forks = forks_of(64, 16384, 512);
    assert_int_equal(attn_cuda_choose_own_workers(&forks, &older), 0);
}

/* On any device, whatever the numbers, some are left for the prefixes. */
static void both_sides_always_have_multiprocessors(void **state) {
    (void)state;
    for (uint32_t workers = 1; workers <= 160; workers++) {
        attn_cuda_tuning tuning = {.is_hopper = 1, .workers = workers};
        for (uint32_t sequences = 17; sequences < 300; sequences += 31) {
            for (uint32_t own = 1; own < 3000; own += 499) {
                attn_cuda_forks forks = forks_of(sequences, 16384, own);
                uint32_t units = (sequences + 31) / 32 * 8, left = attn_cuda_choose_own_workers(&forks, &tuning);
                if (left != 0) assert_true(left + units <= workers && (workers - left) % units == 0);
            }
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_measured_case_is_side_by_side),
        cmocka_unit_test(more_own_tokens_have_more_multiprocessors),
        cmocka_unit_test(measured_cases_have_about_the_fastest_number),
        cmocka_unit_test(where_there_are_no_parts_it_waits),
        cmocka_unit_test(own_tokens_on_too_few_wait),
        cmocka_unit_test(units_for_all_multiprocessors_leave_none),
        cmocka_unit_test(what_was_not_measured_is_one_after_the_other),
        cmocka_unit_test(both_sides_always_have_multiprocessors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
