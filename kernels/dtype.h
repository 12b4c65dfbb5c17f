/*
 * Element types: conversions between bf16, fp16, e4m3 and float.
 *
 * Conversions to float are exact. Conversions from float round to nearest, ties to even; what is too
 * large becomes infinity; NaN stays NaN, with its sign and the top of its payload, and quiet.
 * Subnormals are kept. e4m3 has no infinities and one NaN of each sign: what is too large, infinity
 * included, becomes +-448. All are pure functions: any thread, the same bits on every machine.
 */
#ifndef ATTND_KERNELS_DTYPE_H
#define ATTND_KERNELS_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/attention.h"

static inline uint32_t attn_float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float attn_float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float attn_bf16_to_float(uint16_t value) { return attn_float_of_bits((uint32_t)value << 16); }

static inline uint16_t attn_float_to_bf16(float value) {
    uint32_t bits = attn_float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN, made quiet */
    uint32_t round = 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((bits + round) >> 16);
}

float attn_fp16_to_float(uint16_t value);
uint16_t attn_float_to_fp16(float value);

float attn_e4m3_to_float(uint8_t value);
uint8_t attn_float_to_e4m3(float value);

/* `count` elements at `source` (any alignment) to floats. The ranges do not overlap. */
void attn_elements_to_floats(attn_dtype dtype, const void *source, float *destination, size_t count);

/* `count` floats to elements at `destination` (any alignment). The ranges do not overlap. */
void attn_elements_from_floats(attn_dtype dtype, const float *source, void *destination, size_t count);

/*
 * `count` elements at `source` (any alignment) as an fp8 pool stores them: e4m3(element / scale), a float32
 * division. The ranges do not overlap.
 */
void attn_elements_to_e4m3(attn_dtype dtype, const void *source, float scale, uint8_t *codes, size_t count);

/* What is meant by such codes, code * scale, as elements at `destination` (any alignment). */
void attn_elements_from_e4m3(attn_dtype dtype, const uint8_t *codes, float scale, void *destination, size_t count);

#endif
