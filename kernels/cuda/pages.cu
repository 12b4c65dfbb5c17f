#include "kernels/cuda/pages.h"

#include <cuda_runtime_api.h>

namespace {

/* A block a page and layer. */
template <bool PACK> __global__ void copy_kernel(attn_cuda_pages at, char *packed) {
    size_t page = at.pages[blockIdx.x];
    uint4 *in_pool = (uint4 *)(at.pool + blockIdx.y * at.layer_bytes + page * at.page_bytes);
    uint4 *in_packed = (uint4 *)(packed + ((size_t)blockIdx.x * at.layers + blockIdx.y) * at.page_bytes);
    for (size_t i = threadIdx.x; i < at.page_bytes / sizeof(uint4); i += blockDim.x) {
        if (PACK) {
            in_packed[i] = in_pool[i];
        } else {
            in_pool[i] = in_packed[i];
        }
    }
}

template <bool PACK> int copy_pages(const attn_cuda_pages &at, char *packed, void *stream) {
    if (at.count == 0) return cudaSuccess;
    copy_kernel<PACK><<<dim3(at.count, at.layers), 256, 0, (cudaStream_t)stream>>>(at, packed);
    return cudaGetLastError();
}

} /* namespace */

extern "C" int attn_cuda_pack_pages(const attn_cuda_pages *from, void *packed, void *stream) {
    return copy_pages<true>(*from, (char *)packed, stream);
}

extern "C" int attn_cuda_unpack_pages(const attn_cuda_pages *to, const void *packed, void *stream) {
    return copy_pages<false>(*to, (char *)packed, stream);
}
