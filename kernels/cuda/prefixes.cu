#include "kernels/cuda/prefixes.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda/results.cuh"

namespace {

constexpr uint32_t THREADS = 256;

/* exp(x - most), of x that may be -inf, as most may then be, too. */
__device__ float weight_of(float x, float most) { return x == -INFINITY ? 0.0f : expf(x - most); }

/* A warp a row and head. */
__global__ void merge_kernel(attn_cuda_call call, uint32_t rows) {
    uint32_t heads = call.layer.heads_q, dim = call.layer.head_dim_v, lane = threadIdx.x % 32;
    size_t row = ((size_t)blockIdx.x * THREADS + threadIdx.x) / 32, all = (size_t)rows * heads;
    if (row >= all) return;
    float own = call.partial_lse[row], shared = call.partial_lse[all + row];
    float sink = call.sinks != nullptr ? call.sinks[row % heads] : -INFINITY;
    float most = fmaxf(fmaxf(own, shared), sink);
    float own_weight = weight_of(own, most), shared_weight = weight_of(shared, most);
    float total = own_weight + shared_weight + weight_of(sink, most);
    float factor = total == 0.0f ? 0.0f : 1.0f / total;
    const float *own_out = call.partial_out + row * dim, *shared_out = call.partial_out + (all + row) * dim;
    for (uint32_t column = lane; column < dim; column += 32) {
        float sum = fmaf(shared_weight, shared_out[column], own_weight * own_out[column]) * factor;
        ((results::either_16_bits *)call.out)[row * dim + column] =
            results::from_float<results::either_16_bits>(sum, call.layer.dtype);
    }
    if (lane == 0) call.lse[row] = total == 0.0f ? -INFINITY : most + logf(total);
}

} /* namespace */

extern "C" int attn_cuda_merge_prefixes(const attn_cuda_call *call, uint32_t rows, void *stream) {
    if (call->layer.dtype == ATTN_FP32) return cudaErrorInvalidValue;
    uint64_t threads = (uint64_t)rows * call->layer.heads_q * 32;
    merge_kernel<<<(uint32_t)((threads + THREADS - 1) / THREADS), THREADS, 0, (cudaStream_t)stream>>>(*call, rows);
    return cudaGetLastError();
}
