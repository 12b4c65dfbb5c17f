/* bf16, fp16 and e4m3 conversions, held against ldexp and against their own definition of rounding. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/dtype.h"

typedef struct {
    const char *name;
    float (*to_float)(uint16_t);
    uint16_t (*from_float)(float);
    uint16_t infinity;
    int fraction_bits;
    int bias;
} half_format;

static const half_format bf16 = {"bf16", attn_bf16_to_float, attn_float_to_bf16, 0x7f80, 7, 127};
static const half_format fp16 = {"fp16", attn_fp16_to_float, attn_float_to_fp16, 0x7c00, 10, 15};

/* By the definition of the format. */
static double value_of(const half_format *format, uint16_t bits) {
    int exponent = (bits & 0x7fff) >> format->fraction_bits;
    int fraction = bits & ((1 << format->fraction_bits) - 1);
    double magnitude =
        exponent == 0 ? ldexp(fraction, 1 - format->bias - format->fraction_bits)
                      : ldexp(fraction + (1 << format->fraction_bits), exponent - format->bias - format->fraction_bits);
    return bits & 0x8000 ? -magnitude : magnitude;
}

static void check_all_values_round_trip(const half_format *format) {
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        float value = format->to_float((uint16_t)bits);
        uint16_t back = format->from_float(value);
        uint32_t magnitude = bits & 0x7fff;
        if (magnitude > format->infinity) {
            assert_true(isnan(value));
            assert_int_equal(back, bits | 1u << (format->fraction_bits - 1));
        } else if (magnitude == format->infinity) {
            assert_true(isinf(value) && (signbit(value) != 0) == (bits >> 15));
            assert_int_equal(back, bits);
        } else {
            assert_true(value == value_of(format, (uint16_t)bits) && (signbit(value) != 0) == (bits >> 15));
            assert_int_equal(back, bits);
        }
    }
}

/* Between every two neighbours: the middle goes to the even one, all else to the nearer one. */
static void check_rounding_is_to_nearest_even(const half_format *format) {
    for (uint32_t low = 0; low + 1 < format->infinity; low++) {
        uint32_t high = low + 1, even = low & 1 ? high : low;
        float below = format->to_float((uint16_t)low), above = format->to_float((uint16_t)high);
        float middle = (float)(((double)below + above) / 2);
        if (middle == below || middle == above) continue; /* neighbours of float32 itself: bf16 subnormals have room */
        for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
            float direction = sign ? -1.0f : 1.0f;
            assert_int_equal(format->from_float(direction * middle), sign | even);
            assert_int_equal(format->from_float(direction * nextafterf(middle, 0)), sign | low);
            assert_int_equal(format->from_float(direction * nextafterf(middle, INFINITY)), sign | high);
        }
    }
}

static void check_overflow_is_infinite(const half_format *format) {
    float largest = format->to_float(format->infinity - 1);
    float step = largest - format->to_float(format->infinity - 2);
    float limit = largest + step / 2; /* bf16: infinite in float itself if it overflowed; it does not */
    assert_true(isfinite(limit));
    assert_int_equal(format->from_float(nextafterf(limit, 0)), format->infinity - 1);
    assert_int_equal(format->from_float(limit), format->infinity);
    assert_int_equal(format->from_float(-limit), 0x8000 | format->infinity);
    assert_int_equal(format->from_float(INFINITY), format->infinity);
}

/* Signalling ones, and those whose payload lies in the bits that are cut off, too. */
static void check_nan_stays_nan(const half_format *format) {
    static const uint32_t nans[] = {0x7fc00000, 0xffc00000, 0x7f800001, 0xff800001, 0x7fffffff, 0xffffffff, 0x7f80ffff};
    for (size_t n = 0; n < sizeof nans / sizeof *nans; n++) {
        uint16_t bits = format->from_float(attn_float_of_bits(nans[n]));
        assert_true((bits & 0x7fff) > format->infinity);
        assert_int_equal(bits >> 15, nans[n] >> 31);
    }
}

static void every_bf16_value_round_trips(void **state) {
    (void)state;
    check_all_values_round_trip(&bf16);
}

static void every_fp16_value_round_trips(void **state) {
    (void)state;
    check_all_values_round_trip(&fp16);
}

static void bf16_rounds_to_nearest_even(void **state) {
    (void)state;
    check_rounding_is_to_nearest_even(&bf16);
}

static void fp16_rounds_to_nearest_even_subnormals_included(void **state) {
    (void)state;
    check_rounding_is_to_nearest_even(&fp16);
}

static void what_is_too_large_becomes_infinite(void **state) {
    (void)state;
    check_overflow_is_infinite(&bf16);
    check_overflow_is_infinite(&fp16);
}

static void nan_stays_nan_with_its_sign(void **state) {
    (void)state;
    check_nan_stays_nan(&bf16);
    check_nan_stays_nan(&fp16);
}

static void too_small_for_fp16_becomes_signed_zero(void **state) {
    (void)state;
    assert_int_equal(attn_float_to_fp16(0x1p-25f), 0); /* the tie between 0 and the smallest goes to even */
    assert_int_equal(attn_float_to_fp16(nextafterf(0x1p-25f, 1)), 1);
    assert_int_equal(attn_float_to_fp16(-0x1p-26f), 0x8000);
    assert_int_equal(attn_float_to_fp16(0x1p-149f), 0);
}

/* ------------------------------------------------------------------------------------------- */
/* e4m3 */

/* By the definition of the format: 4 bits of exponent, bias 7, 3 of fraction. */
static double e4m3_value_of(uint32_t code) {
    int exponent = code >> 3 & 0xf, fraction = code & 7;
    double magnitude = exponent == 0 ? ldexp(fraction, -9) : ldexp(8 + fraction, exponent - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

static void every_e4m3_code_round_trips(void **state) {
    (void)state;
    for (uint32_t code = 0; code < 256; code++) {
        float value = attn_e4m3_to_float((uint8_t)code);
        if ((code & 0x7f) == 0x7f) {
            assert_true(isnan(value) && (signbit(value) != 0) == (code >> 7));
        } else {
            assert_true(value == e4m3_value_of(code) && (signbit(value) != 0) == (code >> 7));
        }
        assert_int_equal(attn_float_to_e4m3(value), code);
    }
    assert_true(attn_e4m3_to_float(0x7e) == 448);
    assert_true(attn_e4m3_to_float(1) == 0x1p-9f);
}

static void e4m3_rounds_to_nearest_even_subnormals_included(void **state) {
    (void)state;
    for (uint32_t low = 0; low < 0x7e; low++) {
        uint32_t even = low & 1 ? low + 1 : low;
        float middle = (float)((e4m3_value_of(low) + e4m3_value_of(low + 1)) / 2);
        for (uint32_t sign = 0; sign <= 0x80; sign += 0x80) {
            float direction = sign ? -1.0f : 1.0f;
            assert_int_equal(attn_float_to_e4m3(direction * middle), sign | even);
            assert_int_equal(attn_float_to_e4m3(direction * nextafterf(middle, 0)), sign | low);
            assert_int_equal(attn_float_to_e4m3(direction * nextafterf(middle, INFINITY)), sign | (low + 1));
        }
    }
    assert_int_equal(attn_float_to_e4m3(0x1p-149f), 0);
    assert_int_equal(attn_float_to_e4m3(-0x1p-149f), 0x80);
}

static void e4m3_saturates_and_keeps_nan_with_its_sign(void **state) {
    static const float large[] = {448, 463.9f, 464, 480, 1e30f, 3.4e38f, INFINITY};
    static const uint32_t nans[] = {0x7fc00000, 0x7f800001, 0x7fffffff};
    (void)state;
    for (size_t n = 0; n < sizeof large / sizeof *large; n++) {
        assert_int_equal(attn_float_to_e4m3(large[n]), 0x7e);
        assert_int_equal(attn_float_to_e4m3(-large[n]), 0xfe);
    }
    for (size_t n = 0; n < sizeof nans / sizeof *nans; n++) {
        assert_int_equal(attn_float_to_e4m3(attn_float_of_bits(nans[n])), 0x7f);
        assert_int_equal(attn_float_to_e4m3(attn_float_of_bits(nans[n] | 0x80000000)), 0xff);
    }
}

/* Exact in the dtypes that rows may have beside it, too. */
static void every_e4m3_value_is_one_of_bf16_and_of_fp16(void **state) {
    (void)state;
    for (uint32_t code = 0; code < 256; code++) {
        float value = attn_e4m3_to_float((uint8_t)code);
        if (isnan(value)) continue;
        assert_true(attn_bf16_to_float(attn_float_to_bf16(value)) == value);
        assert_true(attn_fp16_to_float(attn_float_to_fp16(value)) == value);
    }
}

static void rows_become_codes_of_what_they_are_over_the_scale(void **state) {
    static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_FP16};
    static const float scales[] = {1, 0.013f, 3.7f};
    (void)state;
    for (size_t n = 0; n < 6; n++) {
        enum { COUNT = 256 };
        unsigned char rows[1 + 2 * COUNT];
        float elements[COUNT];
        uint8_t codes[COUNT + 1] = {0};
        for (int i = 0; i < COUNT; i++) {
            elements[i] = (float)(i - 100) * 0.0625f;
        }
        attn_elements_from_floats(dtypes[n % 2], elements, rows + 1, COUNT);
        attn_elements_to_e4m3(dtypes[n % 2], rows + 1, scales[n / 2], codes, COUNT);
        for (int i = 0; i < COUNT; i++) {
            assert_int_equal(codes[i], attn_float_to_e4m3(elements[i] / scales[n / 2]));
        }
        attn_elements_to_e4m3(dtypes[n % 2], rows + 1, 1, codes, 0);
        assert_int_equal(codes[COUNT], 0);
    }
}

/* As rows that codes and a scale stand for come and go. */
static void codes_survive_as_rows_times_the_scale(void **state) {
    static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_FP16, ATTN_FP32};
    static const float scales[] = {1, 0.013f, 3.7f};
    (void)state;
    for (size_t n = 0; n < 9; n++) {
        enum { COUNT = 256 };
        uint8_t codes[COUNT], again[COUNT];
        unsigned char rows[1 + 4 * COUNT];
        for (uint32_t code = 0; code < COUNT; code++)
            codes[code] = (uint8_t)code;
        attn_elements_from_e4m3(dtypes[n / 3], codes, scales[n % 3], rows + 1, COUNT);
        attn_elements_to_e4m3(dtypes[n / 3], rows + 1, scales[n % 3], again, COUNT);
        assert_memory_equal(again, codes, COUNT);
    }
}

static void rows_of_codes_convert_like_their_elements(void **state) {
    uint8_t codes[256], back[256];
    float floats[256];
    (void)state;
    for (uint32_t code = 0; code < 256; code++) {
        codes[code] = (uint8_t)code;
    }
    attn_elements_to_floats(ATTN_FP8_E4M3, codes, floats, 256);
    attn_elements_from_floats(ATTN_FP8_E4M3, floats, back, 256);
    assert_memory_equal(back, codes, sizeof codes);
}

/* ------------------------------------------------------------------------------------------- */

static void rows_convert_at_any_alignment(void **state) {
    (void)state;
    static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_FP16, ATTN_FP32};
    static const float source[] = {0.0f, -1.5f, 2.0f, 0.25f, -96.0f};
    for (size_t n = 0; n < 3; n++) {
        for (size_t offset = 0; offset < 4; offset++) {
            unsigned char bytes[4 + sizeof source];
            float back[5];
            attn_elements_from_floats(dtypes[n], source, bytes + offset, 5);
            attn_elements_to_floats(dtypes[n], bytes + offset, back, 5);
            assert_memory_equal(back, source, sizeof source);
        }
    }
}

static void names_and_sizes_are_those_of_the_dtypes(void **state) {
    (void)state;
    assert_int_equal(attn_dtype_bytes(ATTN_BF16), 2);
    assert_int_equal(attn_dtype_bytes(ATTN_FP16), 2);
    assert_int_equal(attn_dtype_bytes(ATTN_FP32), 4);
    assert_int_equal(attn_dtype_bytes(ATTN_FP8_E4M3), 1);
    assert_string_equal(attn_dtype_name(ATTN_BF16), "bf16");
    assert_string_equal(attn_dtype_name(ATTN_FP16), "fp16");
    assert_string_equal(attn_dtype_name(ATTN_FP32), "fp32");
    assert_string_equal(attn_dtype_name(ATTN_FP8_E4M3), "fp8_e4m3");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_bf16_value_round_trips),
        cmocka_unit_test(every_fp16_value_round_trips),
        cmocka_unit_test(bf16_rounds_to_nearest_even),
        cmocka_unit_test(fp16_rounds_to_nearest_even_subnormals_included),
        cmocka_unit_test(what_is_too_large_becomes_infinite),
        cmocka_unit_test(nan_stays_nan_with_its_sign),
        cmocka_unit_test(too_small_for_fp16_becomes_signed_zero),
        cmocka_unit_test(every_e4m3_code_round_trips),
        cmocka_unit_test(e4m3_rounds_to_nearest_even_subnormals_included),
        cmocka_unit_test(e4m3_saturates_and_keeps_nan_with_its_sign),
        cmocka_unit_test(every_e4m3_value_is_one_of_bf16_and_of_fp16),
        cmocka_unit_test(rows_become_codes_of_what_they_are_over_the_scale),
        cmocka_unit_test(codes_survive_as_rows_times_the_scale),
        cmocka_unit_test(rows_of_codes_convert_like_their_elements),
        cmocka_unit_test(rows_convert_at_any_alignment),
        cmocka_unit_test(names_and_sizes_are_those_of_the_dtypes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
