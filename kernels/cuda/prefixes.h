/*
 * Merging what sequences that share a prefix (attn_prefix) have attended to apart: the prefix, and their own tokens.
 */
#ifndef ATTND_KERNELS_CUDA_PREFIXES_H
#define ATTND_KERNELS_CUDA_PREFIXES_H

#include "kernels/cuda/launch.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Out rows 0 .. rows - 1 and their LSE become what partial rows 0 .. rows - 1, of their own tokens, and rows .. 2 *
 * rows
 * - 1, of the prefix, make together with the sink. In float32, in this order whatever else the call has. On a
 * cudaStream_t; a cudaError_t, 0 if none.
 */
int attn_cuda_merge_prefixes(const attn_cuda_call *call, uint32_t rows, void *stream);

#ifdef __cplusplus
}
#endif

#endif
