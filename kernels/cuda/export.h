/*
 * Reading rows back from the pool (launch.h), the other way round than attn_cuda_append.
 */
#ifndef ATTND_KERNELS_CUDA_EXPORT_H
#define ATTND_KERNELS_CUDA_EXPORT_H

#include "kernels/cuda/launch.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Row t of keys [tokens, heads_kv, head_dim] and values, in the layer's dtype, becomes what is in slot places[t] %
 * page_size of page places[t] / page_size: of fp8, times the head's scale. All pointers are device memory; `status` is
 * set to 1 when a page outside the pool is met, which is not read. On a cudaStream_t; a cudaError_t, 0 if none.
 */
int attn_cuda_export(const attn_cuda_layer *layer, const uint32_t *places, void *keys, void *values, uint32_t tokens,
                     uint32_t *status, void *stream);

#ifdef __cplusplus
}
#endif

#endif
