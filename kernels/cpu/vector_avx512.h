/*
 * The vector of attend.inc on AVX-512 (F, BW, DQ, VL): 16 lanes of float32.
 *
 * Each vector_*.h gives the same names; attend.inc is compiled once over each. `lane_offset` picks
 * the lanes [lane_offset, lane_offset + VECTOR_LANES) of a granule of 16 (pool.h).
 */
#ifndef ATTND_KERNELS_CPU_VECTOR_AVX512_H
#define ATTND_KERNELS_CPU_VECTOR_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "kernels/cpu/convert_x86.h"

#define VECTOR_LANES        16
#define VECTOR_ROWS         8  /* query rows done together, at most.. */
#define VECTOR_ACCUMULATORS 16 /* ..and the registers for their sums */

typedef __m512 vector;

static inline vector vector_zero(void) { return _mm512_setzero_ps(); }
static inline vector vector_set(float x) { return _mm512_set1_ps(x); }
static inline vector vector_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vector_store(float *p, vector x) { _mm512_storeu_ps(p, x); }
static inline vector vector_add(vector a, vector b) { return _mm512_add_ps(a, b); }
static inline vector vector_subtract(vector a, vector b) { return _mm512_sub_ps(a, b); }
static inline vector vector_multiply(vector a, vector b) { return _mm512_mul_ps(a, b); }
static inline vector vector_divide(vector a, vector b) { return _mm512_div_ps(a, b); }
static inline vector vector_max(vector a, vector b) { return _mm512_max_ps(a, b); }

/* a * b + c, rounded once. */
static inline vector vector_fma(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }

/* The nearest whole number, ties to even. */
static inline vector vector_round(vector x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* x * 2^n for a whole n in -126 .. 0. */
static inline vector vector_scale(vector x, vector n) { return _mm512_scalef_ps(x, n); }

/* x < limit ? low : high, by lane. */
static inline vector vector_select_less(vector x, vector limit, vector low, vector high) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), high, low);
}

/* |x| with the sign of `sign`. */
static inline vector vector_copy_sign(vector x, vector sign) {
    const __m512i mask = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign), _mm512_castps_si512(x), 0xca));
}

/* Lane i of x where first <= i < end, else that of `other`. */
static inline vector vector_keep_range(vector x, int first, int end, vector other) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 keep = _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(first), _MM_CMPINT_NLT) &
                     _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(end), _MM_CMPINT_LT);
    return _mm512_mask_blend_ps(keep, other, x);
}

static inline float vector_reduce_max(vector x) { return _mm512_reduce_max_ps(x); }
static inline float vector_reduce_add(vector x) { return _mm512_reduce_add_ps(x); }

/* One granule of 32 bf16, interleaved in pairs, as two vectors. */
static inline void vector_load_pair_bf16(const void *granule, int lane_offset, vector *low, vector *high) {
    __m512i pairs = _mm512_loadu_si512((const uint32_t *)granule + lane_offset);
    *low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000)));
}

/* One granule of 2 x 16 fp16 as two vectors. */
static inline void vector_load_pair_fp16(const void *granule, int lane_offset, vector *low, vector *high) {
    const uint16_t *halves = (const uint16_t *)granule + lane_offset;
    *low = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
    *high = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(halves + 16)));
}

#ifdef VECTOR_DOT_BF16
typedef __m512i vector_pairs;

static inline vector_pairs vector_load_pairs(const void *granule, int lane_offset) {
    return _mm512_loadu_si512((const uint32_t *)granule + lane_offset);
}
static inline vector_pairs vector_set_pairs(uint32_t pair) { return _mm512_set1_epi32((int32_t)pair); }

/* sum + a.odd * b.odd + a.even * b.even, by lane; each step rounded to float32 (VDPBF16PS). */
static inline vector vector_dot_pairs(vector_pairs a, vector_pairs b, vector sum) {
#ifdef VECTOR_DOT_BF16_EMULATED /* for tests where the instruction is absent */
    const __m512i odd = _mm512_set1_epi32((int32_t)0xffff0000);
    vector a_odd = _mm512_castsi512_ps(_mm512_and_si512(a, odd)),
           a_even = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    vector b_odd = _mm512_castsi512_ps(_mm512_and_si512(b, odd)),
           b_even = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    return _mm512_fmadd_ps(a_even, b_even, _mm512_fmadd_ps(a_odd, b_odd, sum));
#else
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
}
#endif

#endif
