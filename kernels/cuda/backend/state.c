#include "kernels/cuda/backend/state.h"

#include <string.h>

#include "kernels/cuda/device_memory.h"

attn_status attn_cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError(); /* a later launch of this thread, in a new context maybe, is not to be taken for this one */
    return attn_error(ATTN_UNAVAILABLE, "cuda: %s: %s", what, cudaGetErrorString(error));
}

attn_status attn_cuda_settle(cuda_backend *self, flight *settled) {
    CUDA_TRY(self->failed);
    CUDA_TRY(cudaEventSynchronize(settled->ended));
    if (ATTN_CUDA_IS_CHECKED) CUDA_TRY(cudaStreamSynchronize(self->stream)); /* for the guards: idle */
    const char *damaged = attn_cuda_check_guards();
    if (damaged != NULL) return attn_error(ATTN_INTERNAL, "cuda: something was written next to the %s", damaged);
    if (*settled->status == 0) return attn_ok();
    *settled->status = 0;
    return attn_error(ATTN_INTERNAL, "a page table led a kernel to a page outside the pool");
}

attn_cuda_layer attn_cuda_layer_at(const cuda_backend *self, uint32_t layer) {
    attn_cuda_layer found = self->layer;
    found.memory += layer * self->layer_bytes;
    if (self->scales) {
        found.key_scales = self->scales + (size_t)layer * found.heads_kv;
        found.value_scales = found.key_scales + (size_t)self->base.geometry.layers * found.heads_kv;
    }
    return found;
}

row_bytes attn_cuda_device_row(const cuda_backend *self) {
    size_t element = attn_dtype_bytes(self->base.geometry.dtype);
    return (row_bytes){self->layer.head_dim * element, self->layer.head_dim_v * element};
}

row_bytes attn_cuda_host_row(const cuda_backend *self) {
    size_t element = attn_dtype_bytes(self->base.geometry.dtype);
    return (row_bytes){self->base.geometry.head_dim * element, self->base.geometry.head_dim_v * element};
}

bool attn_cuda_has_rows_as_they_are(const cuda_backend *self) {
    return self->base.geometry.head_dim == self->layer.head_dim &&
           self->base.geometry.head_dim_v == self->layer.head_dim_v;
}

void attn_cuda_copy_rows(void *to, size_t to_bytes, const void *from, size_t from_bytes, size_t rows) {
    if (to_bytes == from_bytes) {
        memcpy(to, from, rows * to_bytes);
        return;
    }
    size_t kept = to_bytes < from_bytes ? to_bytes : from_bytes;
    for (size_t i = 0; i < rows; i++) {
        memcpy((char *)to + i * to_bytes, (const char *)from + i * from_bytes, kept);
        memset((char *)to + i * to_bytes + kept, 0, to_bytes - kept);
    }
}
