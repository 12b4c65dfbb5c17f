#include "kernels/cuda/bench_decode_device.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include "kernels/attention.h"
#include "kernels/cuda/layout.cuh"
#include "kernels/cuda/results.cuh"

namespace {

constexpr uint32_t MAX_DIM = 256;

/* SplitMix64's finisher, as a float uniform in (-2, 2). */
__device__ float random_number(uint64_t seed, uint64_t place) {
    uint64_t x = (place + 1) * 0x9e3779b97f4a7c15u + seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return (float)(x >> 40) * (4.0f / 16777216.0f) - 2.0f;
}

__device__ void set_random(void *memory, size_t i, uint32_t dtype, uint64_t seed) {
    float number = random_number(seed, i);
    if (dtype == ATTN_BF16) ((__nv_bfloat16 *)memory)[i] = __float2bfloat16(number);
    if (dtype == ATTN_FP16) ((__half *)memory)[i] = __float2half(number);
    if (dtype == ATTN_FP8_E4M3) ((__nv_fp8_e4m3 *)memory)[i] = __nv_fp8_e4m3(number);
}

__device__ double element_at(const void *memory, size_t i, uint32_t dtype) {
    if (dtype == ATTN_BF16) return (double)__bfloat162float(((const __nv_bfloat16 *)memory)[i]);
    if (dtype == ATTN_FP16) return (double)__half2float(((const __half *)memory)[i]);
    return (double)(float)((const __nv_fp8_e4m3 *)memory)[i];
}

__global__ void fill_kernel(void *memory, size_t elements, uint32_t dtype, uint64_t seed) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += step) {
        set_random(memory, i, dtype, seed);
    }
}

__device__ const uint32_t *table_of(const attn_cuda_call &call, uint32_t sequence) {
    return call.page_table + (size_t)sequence * call.page_table_stride;
}

/* A block a (sequence, head), a thread a piece. */
__global__ void poison_kernel(attn_cuda_call call, bool restore, uint64_t seed) {
    const attn_cuda_layer &layer = call.layer;
    uint32_t sequence = blockIdx.x / layer.heads_kv, head = blockIdx.x % layer.heads_kv;
    uint32_t length = call.lengths[sequence], live = length % layer.page_size;
    if (live == 0) return;
    uint32_t page = table_of(call, sequence)[length / layer.page_size];
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t row_bytes = (half ? layer.head_dim_v : layer.head_dim) * layer.element_bytes;
        for (uint32_t slot = live; slot < layer.page_size; slot++) {
            if (threadIdx.x * layout::PIECE_BYTES >= row_bytes) continue;
            char *piece = layout::pool_piece(layer, page, head, slot, half, threadIdx.x);
            for (uint32_t byte = 0; byte < layout::PIECE_BYTES; byte += layer.element_bytes) {
                if (restore) {
                    set_random(layer.memory, (size_t)(piece + byte - layer.memory) / layer.element_bytes,
                               layer.kv_dtype, seed);
                } else {
                    for (uint32_t i = 0; i < layer.element_bytes; i++)
                        piece[byte + i] = (char)0xff;
                }
            }
        }
    }
}

/* A block an output row; a warp every eighth token, with a state of its own; a lane every 32nd column. */
__global__ void reference_kernel(attn_cuda_call call, uint32_t query_length, const uint32_t *rows, double *out,
                                 double *lse) {
    constexpr uint32_t WARPS = 8, COLUMNS = MAX_DIM / 32;
    __shared__ double outs[WARPS][MAX_DIM];
    __shared__ double maxima[WARPS], sums[WARPS];
    const attn_cuda_layer &layer = call.layer;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = rows[blockIdx.x];
    uint32_t heads_q = layer.heads_q, head = row % heads_q / (heads_q / layer.heads_kv);
    uint32_t query = row / heads_q, sequence = query / query_length;
    uint32_t length = call.lengths[sequence], ahead = query_length - 1 - query % query_length;
    length = length > ahead ? length - ahead : 0;
    double elements[COLUMNS] = {}, accumulated[COLUMNS] = {};
    for (uint32_t i = 0; i < COLUMNS && i * 32 + lane < layer.head_dim; i++) {
        elements[i] = element_at(call.queries, (size_t)row * layer.head_dim + i * 32 + lane, layer.dtype);
    }
    double maximum = -INFINITY, sum = 0.0;
    uint32_t a_piece = layout::PIECE_BYTES / layer.element_bytes;
    for (uint32_t token = warp; token < length; token += WARPS) {
        uint32_t page = table_of(call, sequence)[token / layer.page_size], slot = token % layer.page_size;
        double score = 0.0;
        for (uint32_t i = 0; i < COLUMNS && i * 32 + lane < layer.head_dim; i++) {
            uint32_t column = i * 32 + lane;
            const char *piece = layout::pool_piece(layer, page, head, slot, false, column / a_piece);
            score += elements[i] * element_at(piece, column % a_piece, layer.kv_dtype);
        }
        for (uint32_t step = 16; step > 0; step /= 2) {
            score += __shfl_xor_sync(0xffffffffu, score, step);
        }
        score *= (double)call.scale;
        double most = fmax(maximum, score);
        double factor = exp(maximum - most), weight = exp(score - most);
        maximum = most;
        sum = sum * factor + weight;
        for (uint32_t i = 0; i < COLUMNS && i * 32 + lane < layer.head_dim_v; i++) {
            uint32_t column = i * 32 + lane;
            const char *piece = layout::pool_piece(layer, page, head, slot, true, column / a_piece);
            accumulated[i] = accumulated[i] * factor + weight * element_at(piece, column % a_piece, layer.kv_dtype);
        }
    }
    for (uint32_t i = 0; i < COLUMNS; i++) {
        outs[warp][i * 32 + lane] = accumulated[i];
    }
    if (lane == 0) {
        maxima[warp] = maximum;
        sums[warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= layer.head_dim_v) return;
    double most = -INFINITY, total = 0.0, merged = 0.0;
    for (uint32_t w = 0; w < WARPS; w++) {
        most = fmax(most, maxima[w]);
    }
    for (uint32_t w = 0; w < WARPS; w++) {
        double factor = maxima[w] == -INFINITY ? 0.0 : exp(maxima[w] - most);
        total += sums[w] * factor;
        merged += outs[w][threadIdx.x] * factor;
    }
    out[(size_t)blockIdx.x * layer.head_dim_v + threadIdx.x] = total > 0.0 ? merged / total : 0.0;
    if (threadIdx.x == 0) lse[blockIdx.x] = total > 0.0 ? most + log(total) : -INFINITY;
}

} /* namespace */

extern "C" void bench_fill(void *memory, size_t elements, uint32_t dtype, uint64_t seed) {
    fill_kernel<<<2048, 256>>>(memory, elements, dtype, seed);
}

extern "C" void bench_poison_tails(const attn_cuda_call *call, int restore, uint64_t seed) {
    poison_kernel<<<call->batch * call->layer.heads_kv, 32>>>(*call, restore != 0, seed);
}

extern "C" void bench_reference(const attn_cuda_call *call, uint32_t query_length, const uint32_t *rows, uint32_t count,
                                double *out, double *lse) {
    reference_kernel<<<count, 256>>>(*call, query_length, rows, out, lse);
}
