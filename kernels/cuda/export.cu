#include "kernels/cuda/export.h"

#include <cuda_runtime_api.h>

#include "kernels/attention.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/layout.cuh"
#include "kernels/cuda/results.cuh"

namespace {

using layout::PIECE_BYTES;

/* A stored piece as elements of a row of the layer's dtype: `to` is the row's, `piece` counts the stored ones. */
template <typename KV> struct exported {
    static __device__ void store(const attn_cuda_layer &layer, char *to, uint32_t piece, uint4 stored, float scale) {
        (void)layer;
        (void)scale;
        ((uint4 *)to)[piece] = stored;
    }
};

template <> struct exported<elements::fp8> {
    static __device__ void store(const attn_cuda_layer &layer, char *to, uint32_t piece, uint4 stored, float scale) {
        const uint32_t words[4] = {stored.x, stored.y, stored.z, stored.w};
        results::either_16_bits *row = (results::either_16_bits *)to + piece * PIECE_BYTES;
        for (uint32_t i = 0; i < PIECE_BYTES; i++) {
            __nv_fp8_e4m3 code;
            code.__x = (__nv_fp8_storage_t)(words[i / 4] >> i % 4 * 8);
            row[i] = results::from_float<results::either_16_bits>((float)code * scale, layer.dtype);
        }
    }
};

/* A 16-byte piece a thread: tiles to rows [token][head], the other way round than append_kernel. */
template <typename KV>
__global__ void export_kernel(attn_cuda_layer layer, const uint32_t *places, char *keys, char *values, uint32_t tokens,
                              uint32_t *status) {
    uint32_t key_pieces = layer.head_dim * KV::BYTES / PIECE_BYTES;
    uint32_t value_pieces = layer.head_dim_v * KV::BYTES / PIECE_BYTES;
    uint32_t row_pieces = key_pieces + value_pieces, element_bytes = layer.dtype == ATTN_FP32 ? 4 : 2;
    uint64_t total = (uint64_t)tokens * layer.heads_kv * row_pieces;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total;
         i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t row = i / row_pieces;
        uint32_t piece = i % row_pieces, head = row % layer.heads_kv;
        bool is_value = piece >= key_pieces;
        if (is_value) piece -= key_pieces;
        uint32_t place = places[row / layer.heads_kv], page = place / layer.page_size;
        if (page >= layer.pages) {
            *status = 1;
            continue;
        }
        const float *scales = is_value ? layer.value_scales : layer.key_scales;
        uint4 stored = *(const uint4 *)layout::pool_piece(layer, page, head, place % layer.page_size, is_value, piece);
        char *to =
            is_value ? values + row * layer.head_dim_v * element_bytes : keys + row * layer.head_dim * element_bytes;
        exported<KV>::store(layer, to, piece, stored, scales != nullptr ? scales[head] : 1.0f);
    }
}

template <typename KV>
cudaError_t launch_export(const attn_cuda_layer &layer, const uint32_t *places, void *keys, void *values,
                          uint32_t tokens, uint32_t *status, cudaStream_t on) {
    uint64_t pieces = (uint64_t)tokens * layer.heads_kv * (layer.head_dim + layer.head_dim_v) * KV::BYTES / PIECE_BYTES;
    uint32_t blocks = (uint32_t)min((pieces + 255) / 256, (uint64_t)4096);
    export_kernel<KV><<<blocks, 256, 0, on>>>(layer, places, (char *)keys, (char *)values, tokens, status);
    return cudaGetLastError();
}

} /* namespace */

extern "C" int attn_cuda_export(const attn_cuda_layer *layer, const uint32_t *places, void *keys, void *values,
                                uint32_t tokens, uint32_t *status, void *stream) {
    if (tokens == 0) return cudaSuccess;
    cudaStream_t on = (cudaStream_t)stream;
    switch (layer->kv_dtype) {
    case ATTN_BF16: return launch_export<elements::bf16>(*layer, places, keys, values, tokens, status, on);
    case ATTN_FP16: return launch_export<elements::fp16>(*layer, places, keys, values, tokens, status, on);
    case ATTN_FP32: return launch_export<elements::fp32>(*layer, places, keys, values, tokens, status, on);
    case ATTN_FP8_E4M3: return launch_export<elements::fp8>(*layer, places, keys, values, tokens, status, on);
    default: return cudaErrorInvalidValue;
    }
}
