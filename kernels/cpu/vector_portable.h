/*
 * The vector of attend.inc in plain C: four lanes of float32 in the compiler's vector extension,
 * which any target has. Names: vector_avx512.h. Compiled with -ffp-contract=off, so that the same
 * source gives the same bits wherever a row is computed.
 */
#ifndef ATTND_KERNELS_CPU_VECTOR_PORTABLE_H
#define ATTND_KERNELS_CPU_VECTOR_PORTABLE_H

#include <stdint.h>
#include <string.h>

#include "kernels/dtype.h"

#define VECTOR_LANES        4
#define VECTOR_ROWS         4
#define VECTOR_ACCUMULATORS 8

typedef float vector __attribute__((vector_size(16)));
typedef int32_t vector_words __attribute__((vector_size(16)));
typedef uint32_t vector_bits __attribute__((vector_size(16)));

static inline vector vector_set(float x) { return (vector){x, x, x, x}; }
static inline vector vector_zero(void) { return vector_set(0.0f); }
static inline vector vector_load(const float *p) {
    vector x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void vector_store(float *p, vector x) { memcpy(p, &x, sizeof x); }
static inline vector vector_add(vector a, vector b) { return a + b; }
static inline vector vector_subtract(vector a, vector b) { return a - b; }
static inline vector vector_multiply(vector a, vector b) { return a * b; }
static inline vector vector_divide(vector a, vector b) { return a / b; }

/* keep's lanes are all ones (take a) or all zeros (take b). */
static inline vector vector_choose(vector_words keep, vector a, vector b) {
    return (vector)(((vector_words)a & keep) | ((vector_words)b & ~keep));
}

static inline vector vector_max(vector a, vector b) { return vector_choose(a > b, a, b); }

/* a * b + c, rounded twice: plain C has no cheap fused form everywhere. */
static inline vector vector_fma(vector a, vector b, vector c) { return a * b + c; }

/* Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to the nearest whole number, ties to even. */
static inline vector vector_round(vector x) {
    const vector magic = vector_set(12582912.0f);
    return (x + magic) - magic;
}

static inline vector vector_scale(vector x, vector n) {
    vector_words biased = __builtin_convertvector(n, vector_words) + 127;
    return x * (vector)(biased << 23);
}

static inline vector vector_select_less(vector x, vector limit, vector low, vector high) {
    return vector_choose(x < limit, low, high);
}

static inline vector vector_copy_sign(vector x, vector sign) {
    const vector_words mask = (vector_words)vector_set(-0.0f);
    return (vector)(((vector_words)x & ~mask) | ((vector_words)sign & mask));
}

static inline vector vector_keep_range(vector x, int first, int end, vector other) {
    const vector_words lane = {0, 1, 2, 3};
    return vector_choose((lane >= first) & (lane < end), x, other);
}

static inline float vector_reduce_max(vector x) {
    float a = x[0] > x[2] ? x[0] : x[2];
    float b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}

static inline float vector_reduce_add(vector x) { return (x[0] + x[2]) + (x[1] + x[3]); }

static inline void vector_load_pair_bf16(const void *granule, int lane_offset, vector *low, vector *high) {
    vector_bits pairs;
    memcpy(&pairs, (const char *)granule + 4 * lane_offset, sizeof pairs);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    *low = (vector)(pairs << 16);
    *high = (vector)(pairs & 0xffff0000u);
#else
    *low = (vector)(pairs & 0xffff0000u);
    *high = (vector)(pairs << 16);
    static inline void convert_8_from_bf16(const void *source, float *destination) {
        attn_elements_to_floats(ATTN_BF16, source, destination, 8);
    }
    static inline void convert_8_from_fp16(const void *source, float *destination) {
        attn_elements_to_floats(ATTN_FP16, source, destination, 8);
    }
    static inline void convert_8_to_bf16(const float *source, void *destination) {
        attn_elements_from_floats(ATTN_BF16, source, destination, 8);
    }
    static inline void convert_8_to_fp16(const float *source, void *destination) {
        attn_elements_from_floats(ATTN_FP16, source, destination, 8);
    }

#endif
}

/*
 * fp16 by lanes: the exponent and mantissa moved to their float32 places and scaled by 2^112, which
 * is exact for numbers and subnormals; infinities and NaN get the whole exponent back.
 */
static inline vector vector_widen_fp16(vector_bits half) {
    vector_bits sign = (half & 0x8000u) << 16;
    vector_bits magnitude = (half & 0x7fffu) << 13;
    vector scaled = (vector)magnitude * vector_set(0x1p112f);
    vector special = (vector)(magnitude | 0x7f800000u);
    vector value = vector_choose((vector_words)((half & 0x7c00u) == 0x7c00u), special, scaled);
    return (vector)((vector_bits)value | sign);
}

static inline vector_bits vector_load_halves(const uint16_t *halves) {
    uint16_t half[4];
    memcpy(half, halves, sizeof half);
    return (vector_bits){half[0], half[1], half[2], half[3]};
}

static inline void vector_load_pair_fp16(const void *granule, int lane_offset, vector *low, vector *high) {
    const uint16_t *halves = (const uint16_t *)granule + lane_offset;
    *low = vector_widen_fp16(vector_load_halves(halves));
    *high = vector_widen_fp16(vector_load_halves(halves + 16));
}

static inline void convert_8_from_bf16(const void *source, float *destination) {
    attn_elements_to_floats(ATTN_BF16, source, destination, 8);
}
static inline void convert_8_from_fp16(const void *source, float *destination) {
    attn_elements_to_floats(ATTN_FP16, source, destination, 8);
}
static inline void convert_8_to_bf16(const float *source, void *destination) {
    attn_elements_from_floats(ATTN_BF16, source, destination, 8);
}
static inline void convert_8_to_fp16(const float *source, void *destination) {
    attn_elements_from_floats(ATTN_FP16, source, destination, 8);
}

#endif
