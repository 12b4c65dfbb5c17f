/* Shape files: what is read, and that a wrong line is refused by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/bench/shapes.h"

static void a_line_gives_name_heads_and_lengths(void **state) {
    (void)state;
    attn_shape shape;
    assert_false(attn_failed(attn_shape_parse(&shape, "b3_70b,3,64,8,128,16,const:2048")));
    assert_string_equal(shape.name, "b3_70b");
    assert_int_equal(shape.batch, 3);
    assert_int_equal(shape.heads_q, 64);
    assert_int_equal(shape.heads_kv, 8);
    assert_int_equal(shape.head_dim, 128);
    assert_int_equal(shape.page_size, 16);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(shape.lengths[i], 2048);
    }
    attn_shape_fini(&shape);
}

static void skew_has_one_long_sequence(void **state) {
    (void)state;
    attn_shape shape;
    assert_false(attn_failed(attn_shape_parse(&shape, "s,4,8,8,64,64,skew:1000:7")));
    assert_int_equal(shape.lengths[0], 1000);
    for (int i = 1; i < 4; i++) {
        assert_int_equal(shape.lengths[i], 7);
    }
    attn_shape_fini(&shape);
}

static void loguniform_stays_in_range_and_repeats_by_seed(void **state) {
    (void)state;
    attn_shape one, same, other;
    assert_false(attn_failed(attn_shape_parse(&one, "r,500,8,8,64,64,loguniform:16:4096:1")));
    assert_false(attn_failed(attn_shape_parse(&same, "r,500,8,8,64,64,loguniform:16:4096:1")));
    assert_false(attn_failed(attn_shape_parse(&other, "r,500,8,8,64,64,loguniform:16:4096:2")));
    assert_memory_equal(one.lengths, same.lengths, 500 * sizeof *one.lengths);
    assert_memory_not_equal(one.lengths, other.lengths, 500 * sizeof *one.lengths);
    int short_ones = 0;
    for (int i = 0; i < 500; i++) {
        assert_in_range(one.lengths[i], 16, 4096);
        if (one.lengths[i] < 256) short_ones++;
    }
    assert_in_range(short_ones, 200, 300); /* 256 is the middle of the logarithms */
    attn_shape_fini(&one);
    attn_shape_fini(&same);
    attn_shape_fini(&other);
}

static void wrong_lines_are_refused(void **state) {
    (void)state;
    static const char *const lines[] = {
        "no_fields",
        ",1,8,8,64,64,const:1",
        "x,0,8,8,64,64,const:1",
        "x,-1,8,8,64,64,const:1",
        "x,1,8,eight,64,64,const:1",
        "x,1,8,8,64,64",
        "x,1,8,8,64,64,const:0",
        "x,1,8,8,64,64,const:12x",
        "x,1,8,8,64,64,uniform:1:2",
        "x,1,8,8,64,64,skew:5",
        "x,1,8,8,64,64,loguniform:9:3:1",
        "x,1,8,8,64,64,const:1,more",
    };
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        attn_shape shape;
        attn_status status = attn_shape_parse(&shape, lines[i]);
        if (status.code != ATTN_INVALID_ARGUMENT) fail_msg("accepted: %s", lines[i]);
        attn_shape_fini(&shape);
    }
}

static void the_files_of_this_tree_are_read(void **state) {
    (void)state;
    attn_shape_list list;
    assert_false(attn_failed(attn_shape_list_read(&list, "tests/shapes/decode_shapes.csv")));
    assert_int_equal(list.count, 31);
    assert_string_equal(list.shapes[0].name, "b1_1k");
    attn_shape_list_fini(&list);
    assert_false(attn_failed(attn_shape_list_read(&list, "tests/shapes/cpu_shapes.csv")));
    assert_true(list.count > 3);
    attn_shape_list_fini(&list);
    assert_int_equal(attn_shape_list_read(&list, "tests/shapes/absent.csv").code, ATTN_NOT_FOUND);
    attn_shape_list_fini(&list);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_line_gives_name_heads_and_lengths),
        cmocka_unit_test(skew_has_one_long_sequence),
        cmocka_unit_test(loguniform_stays_in_range_and_repeats_by_seed),
        cmocka_unit_test(wrong_lines_are_refused),
        cmocka_unit_test(the_files_of_this_tree_are_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
