#include "kernels/cuda/backend/arena.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda/backend/state.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/device_memory.h"

#define ALIGNMENT 256

void attn_cuda_arena_fini(arena *memory) {
    cudaFreeHost(memory->host);
    if (memory->kind != ARENA_SHARED) attn_cuda_free(memory->device);
    *memory = (arena){.kind = memory->kind};
}

bool attn_cuda_arena_reserve(arena *memory, size_t bytes, attn_status *status) {
    *status = attn_ok();
    if (bytes <= memory->bytes) return true;
    size_t grown = memory->bytes < ((size_t)1 << 20) ? (size_t)1 << 20 : memory->bytes;
    while (grown < bytes)
        grown *= 2;
    if (ATTN_CUDA_IS_CHECKED) grown = bytes;
    /* Kernels of a decode before this one may still be using it. */
    *status = attn_cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize()");
    if (attn_failed(*status)) return false;
    attn_cuda_arena_fini(memory);
    cudaError_t error = cudaSuccess;
    if (memory->kind != ARENA_DEVICE) error = cudaMallocHost((void **)&memory->host, grown);
    if (memory->kind == ARENA_SHARED) memory->device = memory->host;
    if (error == cudaSuccess && memory->kind != ARENA_SHARED)
        error = attn_cuda_allocate((void **)&memory->device, grown, "staging memory");
    if (error != cudaSuccess) {
        cudaGetLastError();
        attn_cuda_arena_fini(memory);
        attn_code code = attn_cuda_context_is_broken() ? ATTN_UNAVAILABLE : ATTN_RESOURCE_EXHAUSTED;
        *status =
            attn_error(code, "cuda: no memory to stage a call of %zu bytes: %s", bytes, cudaGetErrorString(error));
        return false;
    }
    memory->bytes = grown;
    return true;
}

place attn_cuda_carve(carver *from, size_t bytes) {
    place carved = {NULL, NULL};
    if (from->memory != NULL) carved = (place){from->memory->host + from->used, from->memory->device + from->used};
    from->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return carved;
}
