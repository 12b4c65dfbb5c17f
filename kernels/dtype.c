#include "kernels/dtype.h"

#include <assert.h>

size_t attn_dtype_bytes(attn_dtype dtype) {
    switch (dtype) {
    case ATTN_FP8_E4M3: return 1;
    case ATTN_BF16:
    case ATTN_FP16: return 2;
    case ATTN_FP32: return 4;
    }
    return 2;
}

const char *attn_dtype_name(attn_dtype dtype) {
    switch (dtype) {
    case ATTN_BF16: return "bf16";
    case ATTN_FP16: return "fp16";
    case ATTN_FP32: return "fp32";
    case ATTN_FP8_E4M3: return "fp8_e4m3";
    }
    return "unknown dtype";
}

float attn_fp16_to_float(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16;
    uint32_t exponent = value >> 10 & 0x1f;
    uint32_t fraction = value & 0x3ff;
    if (exponent == 0x1f) { /* infinity, or NaN made quiet */
        return attn_float_of_bits(sign | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    }
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24 is a normal float */
        float magnitude = (float)fraction * 0x1p-24f;
        return attn_float_of_bits(sign | attn_float_bits(magnitude));
    }
    return attn_float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* value / 2^shift, to nearest, ties to even. shift 1 .. 31. */
static uint32_t shift_right_to_even(uint32_t value, uint32_t shift) {
    uint32_t half = (1u << (shift - 1)) - 1;
    return (value + half + (value >> shift & 1)) >> shift;
}

uint16_t attn_float_to_fp16(float value) {
    uint32_t bits = attn_float_bits(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff)); /* NaN, made quiet */
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);                            /* 2^16 and more */
    if (magnitude >= 0x38800000) { /* 2^-14 and more: normal; a carry out of the fraction is the next exponent */
        return (uint16_t)(sign | shift_right_to_even(magnitude - (112u << 23), 13));
    }
    if (magnitude < 0x33000000) return (uint16_t)sign; /* below 2^-25: nearer to zero */
    uint32_t fraction = (magnitude & 0x7fffff) | 0x800000;
    return (uint16_t)(sign | shift_right_to_even(fraction, 126 - (magnitude >> 23)));
}

float attn_e4m3_to_float(uint8_t value) {
    uint32_t sign = (uint32_t)(value & 0x80) << 24;
    uint32_t exponent = value >> 3 & 0xf;
    uint32_t fraction = value & 7;
    if ((value & 0x7f) == 0x7f) return attn_float_of_bits(sign | 0x7fc00000);
    if (exponent == 0) { /* zero or subnormal */
        float magnitude = (float)fraction * 0x1p-9f;
        return attn_float_of_bits(sign | attn_float_bits(magnitude));
    }
    return attn_float_of_bits(sign | (exponent + 120) << 23 | fraction << 20);
}

uint8_t attn_float_to_e4m3(float value) {
    uint32_t bits = attn_float_bits(value);
    uint32_t sign = bits >> 24 & 0x80;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint8_t)(sign | 0x7f);  /* NaN */
    if (magnitude >= 0x43e00000) return (uint8_t)(sign | 0x7e); /* 448 and more */
    if (magnitude >= 0x3c800000) {                              /* 2^-6 and more: normal */
        return (uint8_t)(sign | shift_right_to_even(magnitude - (120u << 23), 20));
    }
    if (magnitude < 0x3a800000) return (uint8_t)sign; /* below 2^-10: nearer to zero */
    uint32_t fraction = (magnitude & 0x7fffff) | 0x800000;
    return (uint8_t)(sign | shift_right_to_even(fraction, 141 - (magnitude >> 23)));
}

/* Elements are brought into line so many at a time, whatever their alignment is. */
enum { BLOCK = 64 };

void attn_elements_to_floats(attn_dtype dtype, const void *source, float *destination, size_t count) {
    const unsigned char *bytes = source;
    uint16_t elements[BLOCK];
    if (dtype == ATTN_FP32) {
        memcpy(destination, source, count * sizeof *destination);
        return;
    }
    if (dtype == ATTN_FP8_E4M3) {
        for (size_t n = 0; n < count; n++) {
            destination[n] = attn_e4m3_to_float(bytes[n]);
        }
        return;
    }
    for (size_t first = 0; first < count; first += BLOCK) {
        size_t some = count - first < BLOCK ? count - first : BLOCK;
        memcpy(elements, bytes + 2 * first, 2 * some);
        for (size_t n = 0; n < some; n++)
            destination[first + n] =
                dtype == ATTN_BF16 ? attn_bf16_to_float(elements[n]) : attn_fp16_to_float(elements[n]);
    }
}

void attn_elements_from_floats(attn_dtype dtype, const float *source, void *destination, size_t count) {
    unsigned char *bytes = destination;
    uint16_t elements[BLOCK];
    if (dtype == ATTN_FP32) {
        memcpy(destination, source, count * sizeof *source);
        return;
    }
    if (dtype == ATTN_FP8_E4M3) {
        for (size_t n = 0; n < count; n++) {
            bytes[n] = attn_float_to_e4m3(source[n]);
        }
        return;
    }
    for (size_t first = 0; first < count; first += BLOCK) {
        const float *floats = source + first;
        size_t some = count - first < BLOCK ? count - first : BLOCK;
        for (size_t n = 0; n < some; n++)
            elements[n] = dtype == ATTN_BF16 ? attn_float_to_bf16(floats[n]) : attn_float_to_fp16(floats[n]);
        memcpy(bytes + 2 * first, elements, 2 * some);
    }
}

void attn_elements_to_e4m3(attn_dtype dtype, const void *source, float scale, uint8_t *codes, size_t count) {
    const unsigned char *bytes = source;
    size_t element = attn_dtype_bytes(dtype);
    float floats[BLOCK];
    for (size_t first = 0; first < count; first += BLOCK) {
        size_t some = count - first < BLOCK ? count - first : BLOCK;
        attn_elements_to_floats(dtype, bytes + first * element, floats, some);
        for (size_t n = 0; n < some; n++) {
            codes[first + n] = attn_float_to_e4m3(floats[n] / scale);
        }
    }
}

void attn_elements_from_e4m3(attn_dtype dtype, const uint8_t *codes, float scale, void *destination, size_t count) {
    unsigned char *bytes = destination;
    size_t element = attn_dtype_bytes(dtype);
    float floats[BLOCK];
    for (size_t first = 0; first < count; first += BLOCK) {
        size_t some = count - first < BLOCK ? count - first : BLOCK;
        for (size_t n = 0; n < some; n++)
            floats[n] = attn_e4m3_to_float(codes[first + n]) * scale;
        attn_elements_from_floats(dtype, floats, bytes + first * element, some);
    }
}
