/*
 * What the launches of the narrow and the wide kernels have in common.
 */
#ifndef ATTND_KERNELS_CUDA_LAUNCHING_CUH
#define ATTND_KERNELS_CUDA_LAUNCHING_CUH

#include <cuda_runtime_api.h>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/line.cuh"

namespace launching {

/* What a launch passes besides the call. */
struct arguments {
    line::cut cut;
    attn_cuda_workspace workspace;
    uint32_t stages;
    uint32_t patience_ns; /* attn_cuda_tuning */
    uint64_t *times;      /* attn_cuda_tuning */
    uint32_t chunk_slots; /* chunks that a block can keep (chunks.cuh) */
    uint32_t beside;      /* bytes of the workspace's partials that are the launch before's; 0: all may be (wide.cuh) */
    uint32_t unit_blocks; /* row blocks of a sequence, at most; of units in parts (wide.cuh) */
    uint32_t *mail = nullptr; /* the workspace's room for it (mail.cuh) */
};

/* ------------------------------------------------------------------------------------------- */
/* On the device: how a launch begins */

/*
 * Brings a page table into the L2 cache while the lengths, which say where in it to look, are on their way: as much as
 * there are blocks, or by `lane` lanes of each so many times as much.
 */
__device__ inline void prefetch_page_table(const attn_cuda_call &call, uint32_t lane = 0) {
    constexpr uint32_t LINE_ENTRIES = 32;
    size_t entry = (size_t)(lane * gridDim.x + blockIdx.x) * LINE_ENTRIES;
    if (entry < (size_t)call.batch * call.page_table_stride) ptx::prefetch_l2(call.page_table + entry);
}

/*
 * The constant cache is cold when a launch begins, and what a launch is passed lies in several of its lines, which
 * would be fetched one after the other as they are needed. So each warp first asks for another one. CUDA 13.0's
 * compiler makes no load of it, but orders what follows otherwise: the wide kernels are slower without it, narrow ones
 * and twins are not, and do without (docs/kernel-notes.md, "Shares" and "The ninth version").
 */
__device__ inline void fetch_constants(const attn_cuda_call &call, const arguments &with, uint32_t warp) {
    uint32_t word = 0;
    if (warp == 0) word = call.layer.heads_kv;
    if (warp == 1) word = call.batch;
    if (warp == 2) word = call.page_table_stride;
    if (warp == 3) word = call.window;
    if (warp == 4) word = with.cut.page_shift;
    if (warp == 5) word = with.stages;
    asm volatile("" ::"r"(word));
}

/* ------------------------------------------------------------------------------------------- */
/* On the host */

/* How many thread blocks of how many threads, in clusters of so many, with how much shared memory. */
struct grid {
    uint32_t blocks, threads, cluster;
    size_t shared_bytes;
};

using kernel_function = void (*)(attn_cuda_call, arguments);

inline cudaError_t allow_shared_memory(kernel_function kernel, size_t bytes) {
    return cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}

/* Points `config` to `attributes`, which has room for two. */
inline void describe_launch(cudaLaunchConfig_t &config, cudaLaunchAttribute *attributes, const grid &size,
                            bool overlaps, cudaStream_t stream) {
    config = {};
    config.gridDim = dim3(size.blocks);
    config.blockDim = dim3(size.threads);
    config.dynamicSmemBytes = size.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (overlaps) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (size.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = size.cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
}

inline cudaError_t launch_kernel(kernel_function kernel, const grid &size, const attn_cuda_tuning &tuning,
                                 const attn_cuda_call &call, const arguments &with, cudaStream_t stream) {
    if (tuning.only_asks) return cudaSuccess;
    cudaError_t error = allow_shared_memory(kernel, size.shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config;
    describe_launch(config, attributes, size, tuning.overlap_launches, stream);
    return cudaLaunchKernelEx(&config, kernel, call, with);
}

} /* namespace launching */

#endif
