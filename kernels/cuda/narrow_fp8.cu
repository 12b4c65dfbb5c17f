#include "kernels/cuda/narrow.cuh"
#include "kernels/cuda/narrow.h"

int attn_cuda_launch_narrow_fp8(const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                                const attn_cuda_workspace *workspace, const attn_cuda_expected *expected, uint32_t rows,
                                void *stream) {
    return narrow::launch_dims<elements::fp8>(*call, *tuning, *workspace, *expected, rows, (cudaStream_t)stream);
}
