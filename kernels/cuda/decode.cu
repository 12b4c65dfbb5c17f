#include "kernels/cuda/decode.h"

#include <cuda_runtime_api.h>

#include "kernels/attention.h"
#include "kernels/cuda/mail.cuh"
#include "kernels/cuda/narrow.h"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/wide.h"

namespace {

uint32_t group_of(const attn_cuda_layer &layer) { return layer.heads_q / layer.heads_kv; }

/* Rows of a block: as few as hold a sequence's. In batch_invariant mode that must not depend on the batch. */
uint32_t rows_a_block(const attn_cuda_call &call, uint32_t most_queries) {
    uint32_t group = group_of(call.layer), rows = call.batch_invariant ? group : most_queries * group;
    return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 64 ? 64 : 128;
}

/* More rows than that are for the wide kernel, where it is built. */
constexpr uint32_t MAX_NARROW_ROWS = 16;

bool is_wide(const attn_cuda_call &call, const attn_cuda_tuning &tuning, uint32_t rows) {
    bool is_built = call.layer.kv_dtype == ATTN_BF16 || call.layer.kv_dtype == ATTN_FP16;
    return rows > MAX_NARROW_ROWS && tuning.is_hopper && is_built && !call.batch_invariant;
}

int launch_narrow(const attn_cuda_call *call, const attn_cuda_tuning *tuning, const attn_cuda_workspace *workspace,
                  const attn_cuda_expected *expected, uint32_t rows, void *stream) {
    switch (call->layer.kv_dtype) {
    case ATTN_BF16: return attn_cuda_launch_narrow_bf16(call, tuning, workspace, expected, rows, stream);
    case ATTN_FP16: return attn_cuda_launch_narrow_fp16(call, tuning, workspace, expected, rows, stream);
    case ATTN_FP8_E4M3: return attn_cuda_launch_narrow_fp8(call, tuning, workspace, expected, rows, stream);
    default: return cudaErrorInvalidValue;
    }
}

} /* namespace */

extern "C" int attn_cuda_decode_fits(const attn_cuda_layer *layer) {
    uint32_t dim = layer->head_dim, dim_v = layer->head_dim_v, kv = layer->kv_dtype;
    bool is_built = dim == 64 || dim == 96 || dim == 128 || dim == 192 || dim == 256;
    bool is_16_bits = kv == ATTN_BF16 || kv == ATTN_FP16;
    return is_built && (dim == dim_v || (dim == 192 && dim_v == 128)) && (is_16_bits || kv == ATTN_FP8_E4M3) &&
           group_of(*layer) <= (is_16_bits ? 64 : MAX_NARROW_ROWS);
}

extern "C" size_t attn_cuda_workspace_bytes(uint32_t slots, uint32_t rows, uint32_t head_dim_v) {
    size_t bytes = rows::workspace_bytes(slots, rows, head_dim_v);
    return rows < mail::ROWS ? bytes : bytes + mail::room_bytes(slots, head_dim_v);
}

extern "C" float *attn_cuda_room_for_sent(const attn_cuda_workspace *workspace, size_t rows, uint32_t columns) {
    bool is_there = workspace->rows >= mail::ROWS;
    bool fits = rows * (columns + 1) * sizeof(float) <= mail::room_bytes(workspace->slots, columns);
    return is_there && fits ? (float *)mail::find_room(*workspace, columns) : nullptr;
}

extern "C" int attn_cuda_clear_sent(float *room, size_t rows, uint32_t columns, void *stream) {
    return cudaMemsetAsync(room, 0, rows * (columns + 1) * sizeof(float), (cudaStream_t)stream);
}

extern "C" int attn_cuda_decode_launch(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                                       const attn_cuda_workspace *workspace, const attn_cuda_expected *expected,
                                       void *stream) {
    if (!attn_cuda_decode_fits(&call->layer)) return cudaErrorInvalidValue;
    if (call->batch == 0) return cudaSuccess;
    uint32_t rows = rows_a_block(*call, expected->most_queries);
    if (is_wide(*call, *tuning, rows)) {
        return call->layer.kv_dtype == ATTN_BF16
                   ? attn_cuda_launch_wide_bf16(call, tuning, workspace, expected, rows, stream)
                   : attn_cuda_launch_wide_fp16(call, tuning, workspace, expected, rows, stream);
    }
    if (rows > MAX_NARROW_ROWS) rows = MAX_NARROW_ROWS;
    return launch_narrow(call, tuning, workspace, expected, rows, stream);
}
