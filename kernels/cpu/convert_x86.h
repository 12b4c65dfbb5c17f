/*
 * Eight elements to floats and back, on AVX2 and F16C: the same bits as attn_elements_to_floats and
 * attn_elements_from_floats (kernels/dtype.h). Pointers have any alignment.
 */
#ifndef ATTND_KERNELS_CPU_CONVERT_X86_H
#define ATTND_KERNELS_CPU_CONVERT_X86_H

#include <immintrin.h>
#include <stdint.h>

static inline void convert_8_from_bf16(const void *source, float *destination) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)source));
    _mm256_storeu_ps(destination, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}

static inline void convert_8_from_fp16(const void *source, float *destination) {
    _mm256_storeu_ps(destination, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)source)));
}

/* To nearest, ties to even; NaN stays NaN, made quiet. */
static inline void convert_8_to_bf16(const float *source, void *destination) {
    __m256 value = _mm256_loadu_ps(source);
    __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    __m256i bias = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
    __m128i low = _mm256_castsi256_si128(result), top = _mm256_extracti128_si256(result, 1);
    _mm_storeu_si128((__m128i *)destination, _mm_packus_epi32(low, top));
}

static inline void convert_8_to_fp16(const float *source, void *destination) {
    __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)destination, halves);
}

#endif
