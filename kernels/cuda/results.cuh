/*
 * What a row sees, where its result goes, and how partial results are merged to the bit as attn_combine_row
 * (kernels/combine.h) does: shared by all attention kernels. Sources that include this are compiled with -fmad=false
 * and say fmaf where they mean it.
 */
#ifndef ATTND_KERNELS_CUDA_RESULTS_CUH
#define ATTND_KERNELS_CUDA_RESULTS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/attention.h"
#include "kernels/combine_math.h"
#include "kernels/cuda/launch.h"

namespace results {

/* bf16 or fp16, as the layer's dtype says. */
struct either_16_bits {
    uint16_t bits;
};

/* As an output of a layer of this dtype. */
template <typename T> __device__ inline T from_float(float value, uint32_t dtype);
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value, uint32_t) {
    return __float2bfloat16_rn(value);
}
template <> __device__ inline __half from_float<__half>(float value, uint32_t) { return __float2half_rn(value); }
template <> __device__ inline float from_float<float>(float value, uint32_t) { return value; }
template <> __device__ inline either_16_bits from_float<either_16_bits>(float value, uint32_t dtype) {
    return {dtype == ATTN_FP16 ? __half_as_ushort(__float2half_rn(value))
                               : __bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

/* ------------------------------------------------------------------------------------------- */
/* What a row sees: attn_row_visible (kernels/split_plan.h), of the live sequence */

__device__ inline uint64_t part_tokens_below(const attn_cuda_sequence &part, uint64_t position) {
    uint64_t chunk = position / ATTN_CHUNK_TOKENS;
    if (chunk < part.chunk_first) return 0;
    uint64_t distance = chunk - part.chunk_first;
    uint64_t chunks_before = (distance + part.chunk_stride - 1) / part.chunk_stride;
    bool is_ours = distance % part.chunk_stride == 0;
    return chunks_before * ATTN_CHUNK_TOKENS + (is_ours ? position % ATTN_CHUNK_TOKENS : 0);
}

/* The positions before this one are what the row sees but for a window. */
__device__ inline uint64_t visible_upto(const attn_cuda_sequence &sequence, uint32_t query) {
    return sequence.is_read ? sequence.total_length : sequence.total_length - sequence.query_length + query + 1;
}

/* Not inlined, and by value: most calls have no window and whole sequences, and what they do is to stay small. */
static __device__ __noinline__ uint2 row_visible_of(attn_cuda_sequence sequence, uint32_t window, uint32_t query) {
    uint64_t upto = visible_upto(sequence, query);
    uint64_t from = window != 0 && upto > window ? upto - window : 0;
    if (sequence.chunk_stride != 0) {
        upto = part_tokens_below(sequence, upto);
        from = part_tokens_below(sequence, from);
    }
    uint64_t end = upto < sequence.length ? upto : sequence.length;
    return make_uint2((uint32_t)(from < end ? from : end), (uint32_t)end);
}

__device__ inline uint2 row_visible(const attn_cuda_sequence &sequence, uint32_t window, uint32_t query) {
    if (window == 0 && sequence.chunk_stride == 0)
        return make_uint2(0, (uint32_t)min((uint64_t)sequence.length, visible_upto(sequence, query)));
    attn_cuda_sequence copy = sequence;
    return row_visible_of(copy, window, query);
}

/* ------------------------------------------------------------------------------------------- */
/* Results */

/* Where a row of a piece or of a cut unit ends. */
struct destination {
    size_t row;      /* [.., heads_q] of the out rows or the partial rows */
    bool is_partial; /* float32, without a sink */
    const float *sink;
};

/* Of a query of the sequence and a query head. */
__device__ inline destination find_destination(const attn_cuda_call &call, const attn_cuda_sequence &sequence,
                                               uint32_t query, uint32_t query_head, uint32_t chunk) {
    size_t query_row = (size_t)sequence.first_out + (size_t)chunk * sequence.chunk_rows + query;
    destination to;
    to.row = query_row * call.layer.heads_q + query_head;
    to.is_partial = sequence.chunk_stride != 0 || sequence.is_prefix;
    to.sink = call.sinks != nullptr && !to.is_partial ? &call.sinks[query_head] : nullptr;
    return to;
}

/* Partial results of a row, as attn_combine_row takes them: `lse_of(c)`. Weights by weight_of(c). */
struct row_weights {
    double largest, total;
    bool any;
};

template <typename LseOf> __device__ inline row_weights weigh(uint32_t count, const float *sink, LseOf lse_of) {
    row_weights weights;
    float largest = sink != nullptr ? *sink : -INFINITY;
    for (uint32_t c = 0; c < count; c++) {
        float lse = lse_of(c);
        if (lse > largest || isnan(largest)) largest = lse;
    }
    weights.largest = largest;
    weights.total = 0.0;
    weights.any = sink != nullptr && *sink != -INFINITY;
    if (weights.any) weights.total = attn_fixed_exp(*sink - weights.largest);
    for (uint32_t c = 0; c < count; c++) {
        float lse = lse_of(c);
        if (lse == -INFINITY) continue;
        weights.any = true;
        weights.total += attn_fixed_exp(lse - weights.largest);
    }
    return weights;
}

/* Of a partial, before it is divided by the total; 0 if it has seen nothing. */
__device__ inline double power_of(const row_weights &weights, float lse) {
    double power = attn_fixed_exp(lse - weights.largest);
    return lse == -INFINITY ? 0.0 : power;
}

__device__ inline float weight_of(const row_weights &weights, float lse) {
    return lse == -INFINITY ? 0.0f : (float)(attn_fixed_exp(lse - weights.largest) / weights.total);
}

__device__ inline float merged_lse(const row_weights &weights) {
    return weights.any ? (float)(weights.largest + attn_fixed_log(weights.total)) : -INFINITY;
}

template <typename T>
__device__ inline void write_out(const attn_cuda_call &call, const destination &to, uint32_t column, float value) {
    size_t at = to.row * call.layer.head_dim_v + column;
    if (to.is_partial) {
        call.partial_out[at] = value;
    } else {
        ((T *)call.out)[at] = from_float<T>(value, call.layer.dtype);
    }
}

__device__ inline void write_lse(const attn_cuda_call &call, const destination &to, float lse) {
    (to.is_partial ? call.partial_lse : call.lse)[to.row] = lse;
}

} /* namespace results */

#endif
