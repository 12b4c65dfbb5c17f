/* The vector of attend.inc on AVX2, FMA and F16C: 8 lanes of float32. Names: vector_avx512.h. */
#ifndef ATTND_KERNELS_CPU_VECTOR_AVX2_H
#define ATTND_KERNELS_CPU_VECTOR_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#include "kernels/cpu/convert_x86.h"

#define VECTOR_LANES        8
#define VECTOR_ROWS         4
#define VECTOR_ACCUMULATORS 8

typedef __m256 vector;

static inline vector vector_zero(void) { return _mm256_setzero_ps(); }
static inline vector vector_set(float x) { return _mm256_set1_ps(x); }
static inline vector vector_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vector_store(float *p, vector x) { _mm256_storeu_ps(p, x); }
static inline vector vector_add(vector a, vector b) { return _mm256_add_ps(a, b); }
static inline vector vector_subtract(vector a, vector b) { return _mm256_sub_ps(a, b); }
static inline vector vector_multiply(vector a, vector b) { return _mm256_mul_ps(a, b); }
static inline vector vector_divide(vector a, vector b) { return _mm256_div_ps(a, b); }
static inline vector vector_max(vector a, vector b) { return _mm256_max_ps(a, b); }
static inline vector vector_fma(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }

static inline vector vector_round(vector x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vector vector_scale(vector x, vector n) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

static inline vector vector_select_less(vector x, vector limit, vector low, vector high) {
    return _mm256_blendv_ps(high, low, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}

static inline vector vector_copy_sign(vector x, vector sign) {
    const vector mask = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(mask, x), _mm256_and_ps(mask, sign));
}

static inline vector vector_keep_range(vector x, int first, int end, vector other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
    __m256i inside = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(inside));
}

static inline float vector_reduce_max(vector x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

static inline float vector_reduce_add(vector x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

static inline void vector_load_pair_bf16(const void *granule, int lane_offset, vector *low, vector *high) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)((const uint32_t *)granule + lane_offset));
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *high = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int32_t)0xffff0000)));
}

static inline void vector_load_pair_fp16(const void *granule, int lane_offset, vector *low, vector *high) {
    const uint16_t *halves = (const uint16_t *)granule + lane_offset;
    *low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
    *high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + 16)));
}

#endif
