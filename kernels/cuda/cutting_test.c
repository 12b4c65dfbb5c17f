/* The choice of cutting.h: into what a call's units are cut. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/cuda/cutting.h"

enum { MULTIPROCESSORS = 132, TILE_TOKENS = 64 };

/* An H200, with as many clusters at once as one of those that were measured has. */
static const attn_cuda_tuning h200 = {
    .is_hopper = 1, .workers = MULTIPROCESSORS, .clusters = {0, 132, 66, 42, 32, 24, 20, 16, 16}};

/* Units of the narrow kernel, bf16, 128 columns, four query heads on each KV head. */
static attn_cuda_units units_of(uint64_t units, uint64_t least_tokens, uint64_t most_tokens) {
    return (attn_cuda_units){.units = units,
                             .least_tiles = (least_tokens + TILE_TOKENS - 1) / TILE_TOKENS,
                             .most_tiles = (most_tokens + TILE_TOKENS - 1) / TILE_TOKENS,
                             .workers = MULTIPROCESSORS,
                             .min_saved_tiles = 4,
                             .tile_bytes = 32768,
                             .rows = 4,
                             .warps = 8,
                             .partials_ahead = 8,
                             .joint_from = 33,
                             .most_parts = MULTIPROCESSORS};
}

static attn_cuda_cutting choose(uint64_t units, uint64_t tokens) {
    attn_cuda_units of = units_of(units, tokens, tokens);
    return attn_cuda_choose_cutting(&of, &h200);
}

static void assert_long_parts(attn_cuda_cutting chosen, uint32_t parts) {
    assert_false(chosen.is_clustered);
    assert_int_equal(chosen.parts, parts);
}

static void one_long_unit_has_all_multiprocessors(void **state) {
    (void)state;
    assert_long_parts(choose(1, 132 * 32 * TILE_TOKENS), 132);
}

static void a_unit_has_no_parts_that_make_none_shorter(void **state) {
    (void)state;
    assert_long_parts(choose(1, 128 * 16 * TILE_TOKENS), 128); /* of 132 parts some have 16 tiles, too */
}

static void a_few_long_units_have_equal_parts_of_them(void **state) {
    (void)state;
    assert_long_parts(choose(8, 131072), 16);
    assert_long_parts(choose(32, 32768), 4);
}

static void a_short_unit_is_a_cluster_s(void **state) {
    (void)state;
    attn_cuda_cutting chosen = choose(8, 1024);
    assert_true(chosen.is_clustered);
    assert_true(chosen.parts > 1);
}

static void a_unit_has_no_more_long_parts_than_are_good(void **state) {
    (void)state;
    attn_cuda_units of = units_of(1, 131072, 131072);
    of.most_parts = 64;
    assert_long_parts(attn_cuda_choose_cutting(&of, &h200), 64);
}

static void as_many_units_as_multiprocessors_are_not_cut(void **state) {
    (void)state;
    for (uint64_t units = 128; units <= 4096; units += 31) {
        attn_cuda_cutting chosen = choose(units, 8192);
        assert_false(chosen.is_clustered);
        assert_int_equal(chosen.parts, 1);
    }
}

static void clusters_are_for_units_that_are_alike(void **state) {
    (void)state;
    attn_cuda_units about = units_of(4, 18000, 22000), alike = units_of(8, 1024, 1024), unlike = units_of(8, 960, 1024);
    assert_true(attn_cuda_choose_cutting(&alike, &h200).is_clustered);
    assert_false(attn_cuda_choose_cutting(&unlike, &h200).is_clustered);
    attn_cuda_cutting chosen = attn_cuda_choose_cutting(&about, &h200);
    assert_false(chosen.is_clustered);
    assert_true(chosen.parts > 1);
}

static void one_long_unit_among_short_ones_is_for_shares(void **state) {
    (void)state;
    attn_cuda_units of = units_of(64, 512, 131072);
    assert_int_equal(attn_cuda_choose_cutting(&of, &h200).parts, 1);
}

static void what_is_not_there_is_not_chosen(void **state) {
    (void)state;
    attn_cuda_tuning without = h200;
    for (uint32_t parts = 0; parts <= ATTN_CUDA_MAX_CLUSTER; parts++)
        without.clusters[parts] = 0;
    attn_cuda_units of = units_of(1, 131072, 131072);
    assert_int_equal(attn_cuda_choose_cutting(&of, &without).parts, 1);
    of = units_of(1, 0, 131072); /* a sequence may be empty, or lengths are not known */
    assert_int_equal(attn_cuda_choose_cutting(&of, &h200).parts, 1);
}

/* Whatever the numbers, and on any device: no more blocks than it has, none without a tile, and clusters that fit. */
static void every_choice_can_be_launched(void **state) {
    (void)state;
    static const uint32_t WORKERS[] = {1, 2, 7, 16, 78, 114, 132, 144};
    for (uint32_t w = 0; w < sizeof WORKERS / sizeof *WORKERS; w++) {
        attn_cuda_tuning tuning = h200;
        tuning.workers = WORKERS[w];
        for (uint32_t parts = 2; parts <= ATTN_CUDA_MAX_CLUSTER; parts++)
            tuning.clusters[parts] = WORKERS[w] / parts;
        for (uint64_t units = 1; units < 200; units++) {
            for (uint64_t tokens = 1; tokens <= 1 << 20; tokens = tokens * 3 / 2 + 1) {
                for (uint32_t rows = 1; rows <= 8; rows++) {
                    attn_cuda_units of = units_of(units, tokens - tokens / 9 * (units % 2), tokens);
                    of.workers = WORKERS[w];
                    of.rows = rows;
                    attn_cuda_cutting chosen = attn_cuda_choose_cutting(&of, &tuning);
                    assert_true(chosen.parts >= 1 && chosen.parts <= of.least_tiles);
                    if (chosen.parts == 1) continue;
                    assert_true(units * chosen.parts <= WORKERS[w]);
                    if (chosen.is_clustered) assert_true(units <= tuning.clusters[chosen.parts]);
                }
            }
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_long_unit_has_all_multiprocessors),
        cmocka_unit_test(a_unit_has_no_parts_that_make_none_shorter),
        cmocka_unit_test(a_few_long_units_have_equal_parts_of_them),
        cmocka_unit_test(a_short_unit_is_a_cluster_s),
        cmocka_unit_test(a_unit_has_no_more_long_parts_than_are_good),
        cmocka_unit_test(as_many_units_as_multiprocessors_are_not_cut),
        cmocka_unit_test(clusters_are_for_units_that_are_alike),
        cmocka_unit_test(one_long_unit_among_short_ones_is_for_shares),
        cmocka_unit_test(what_is_not_there_is_not_chosen),
        cmocka_unit_test(every_choice_can_be_launched),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
