/* The narrow kernels (narrow.cuh), a source file a cache dtype. `rows`: of a block, 8 or 16. Each returns a
 * cudaError_t. */
#ifndef ATTND_KERNELS_CUDA_NARROW_H
#define ATTND_KERNELS_CUDA_NARROW_H

#include "kernels/cuda/decode.h"

int attn_cuda_launch_narrow_bf16(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                                 const attn_cuda_workspace *workspace, const attn_cuda_expected *expected,
                                 uint32_t rows, void *stream);
int attn_cuda_launch_narrow_fp16(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                                 const attn_cuda_workspace *workspace, const attn_cuda_expected *expected,
                                 uint32_t rows, void *stream);
int attn_cuda_launch_narrow_fp8(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                                const attn_cuda_workspace *workspace, const attn_cuda_expected *expected, uint32_t rows,
                                void *stream);

#endif
