/* The wide kernels (wide.cuh), a source file a cache dtype. Blocks of 64 rows, or if
 * there are more than that in a sequence, and it is built, of 128. Each returns a cudaError_t. */
#ifndef ATTND_KERNELS_CUDA_WIDE_H
#define ATTND_KERNELS_CUDA_WIDE_H

#include "kernels/cuda/decode.h"

int attn_cuda_launch_wide_bf16(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                               const attn_cuda_workspace *workspace, const attn_cuda_expected *expected, uint32_t rows,
                               void *stream);
int attn_cuda_launch_wide_fp16(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                               const attn_cuda_workspace *workspace, const attn_cuda_expected *expected, uint32_t rows,
                               void *stream);

#endif
