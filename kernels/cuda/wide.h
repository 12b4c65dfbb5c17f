/* The wide kernels (wide.cuh), a source file a cache dtype. Blocks of 64 rows. Each returns a cudaError_t. */
#ifndef ATTND_KERNELS_CUDA_WIDE_H
#define ATTND_KERNELS_CUDA_WIDE_H

#include "kernels/cuda/decode.h"

int attn_cuda_launch_wide_bf16(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                               const attn_cuda_workspace *workspace, void *stream);
int attn_cuda_launch_wide_fp16(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                               const attn_cuda_workspace *workspace, void *stream);

#endif
