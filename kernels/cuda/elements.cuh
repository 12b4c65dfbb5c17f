/*
 * What a cache can hold, for the kernels on tensor cores: how 16 bits or 8 become the operands of a matrix product.
 *
 *     IO         queries, outputs and appended rows
 *     multiply   c[16 x 8] += a[16 x 16] b[16 x 8]
 *     pack       two floats as operands, the first in the low half
 *     TERMS      operands that a weight is the sum of: one alone would add an error of its own size to the output's
 *     TALL_TERMS the same in blocks of 128 rows (wide.cuh), which wait for products and not for memory
 *     multiply_rows, multiply_columns   products of a warpgroup (instructions.cuh); 16 bits only
 */
#ifndef ATTND_KERNELS_CUDA_ELEMENTS_CUH
#define ATTND_KERNELS_CUDA_ELEMENTS_CUH

#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/results.cuh"

namespace elements {

struct bf16 {
    using IO = __nv_bfloat16;
    static constexpr uint32_t BYTES = 2, TERMS = 2, TALL_TERMS = 1;
    static __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::multiply_add_bf16(c, a, b0, b1);
    }
    template <uint32_t COUNT>
    static __device__ void multiply_rows(float (&c)[COUNT], uint64_t a, uint64_t b, bool add) {
        ptx::multiply_rows_bf16(c, a, b, add);
    }
    template <uint32_t COUNT>
    static __device__ void multiply_columns(float (&c)[COUNT], const uint32_t (&a)[4], uint64_t b) {
        ptx::multiply_columns_bf16(c, a, b);
    }
    static __device__ uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }

    /* What pack(low, high) has rounded off, packed. */
    static __device__ uint32_t pack_rest(float low, float high, uint32_t packed) {
        return pack(low - __uint_as_float(packed << 16), high - __uint_as_float(packed & 0xffff0000u));
    }

    /* Piece `piece` of the appended row that begins at element `row` of `rows`, as it is stored. */
    static __device__ uint4 load_new(const attn_cuda_layer &layer, const void *rows, size_t row, uint32_t piece,
                                     float scale) {
        (void)layer;
        (void)scale;
        return ((const uint4 *)((const __nv_bfloat16 *)rows + row))[piece];
    }
};

struct fp16 {
    using IO = __half;
    static constexpr uint32_t BYTES = 2, TERMS = 2, TALL_TERMS = 2;
    static __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::multiply_add_fp16(c, a, b0, b1);
    }
    template <uint32_t COUNT>
    static __device__ void multiply_rows(float (&c)[COUNT], uint64_t a, uint64_t b, bool add) {
        ptx::multiply_rows_fp16(c, a, b, add);
    }
    template <uint32_t COUNT>
    static __device__ void multiply_columns(float (&c)[COUNT], const uint32_t (&a)[4], uint64_t b) {
        ptx::multiply_columns_fp16(c, a, b);
    }
    static __device__ uint32_t pack(float low, float high) { return ptx::pack_fp16(low, high); }
    static __device__ uint32_t pack_rest(float low, float high, uint32_t packed) {
        float2 kept = __half22float2(*reinterpret_cast<__half2 *>(&packed));
        return pack(low - kept.x, high - kept.y);
    }
    static __device__ uint4 load_new(const attn_cuda_layer &layer, const void *rows, size_t row, uint32_t piece,
                                     float scale) {
        (void)layer;
        (void)scale;
        return ((const uint4 *)((const __half *)rows + row))[piece];
    }
};

/*
 * e4m3, widened to fp16 for the products: exactly. So are bf16 queries, once a power of two has brought them in range.
 * Queries, outputs and appended rows are of either 16-bit dtype, which the layer tells.
 */
struct fp8 {
    using IO = results::either_16_bits;
    static constexpr uint32_t BYTES = 1, TERMS = 1;
    static __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::multiply_add_fp16(c, a, b0, b1);
    }
    static __device__ uint32_t pack(float low, float high) { return ptx::pack_fp16(low, high); }
    static __device__ uint32_t pack_rest(float, float, uint32_t) { return 0; }
    static __device__ float2 unpack(uint32_t pair, bool is_fp16) {
        if (is_fp16) return __half22float2(*reinterpret_cast<__half2 *>(&pair));
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ uint4 load_new(const attn_cuda_layer &layer, const void *rows, size_t row, uint32_t piece,
                                     float scale) {
        const uint4 *from = (const uint4 *)((const uint16_t *)rows + row) + 2 * piece;
        uint4 low = from[0], high = from[1];
        const uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        uint32_t stored[4] = {};
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            float2 pair = unpack(pairs[i], layer.dtype == ATTN_FP16);
            stored[i / 2] |= ptx::pack_e4m3(pair.x / scale, pair.y / scale) << i % 2 * 16;
        }
        return make_uint4(stored[0], stored[1], stored[2], stored[3]);
    }
};

/* What has no tensor cores: only stored. */
struct fp32 {
    static constexpr uint32_t BYTES = 4;
    static __device__ uint4 load_new(const attn_cuda_layer &layer, const void *rows, size_t row, uint32_t piece,
                                     float scale) {
        (void)layer;
        (void)scale;
        return ((const uint4 *)((const float *)rows + row))[piece];
    }
};

} /* namespace elements */

#endif
