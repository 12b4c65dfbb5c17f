#include "kernels/cuda/wide.cuh"
#include "kernels/cuda/wide.h"

int attn_cuda_launch_wide_fp16(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                               const attn_cuda_workspace *workspace, const attn_cuda_expected *expected, uint32_t rows,
                               void *stream) {
    return wide::launch_dims<elements::fp16>(*call, *tuning, *workspace, *expected, rows, (cudaStream_t)stream);
}
