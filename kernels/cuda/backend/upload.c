#include "kernels/cuda/backend/upload.h"

attn_status attn_cuda_upload(place from, const void *to_end, cudaStream_t stream) {
    size_t bytes = (size_t)((const char *)to_end - (const char *)from.host);
    return attn_cuda_status(cudaMemcpyAsync(from.device, from.host, bytes, cudaMemcpyHostToDevice, stream),
                            "upload of a call");
}

attn_status attn_cuda_upload_rows(const void *from, place to, size_t bytes, cudaStream_t stream) {
    if (bytes == 0) return attn_ok();
    CUDA_TRY(cudaMemcpyAsync(to.device, from, bytes, cudaMemcpyHostToDevice, stream));
    return attn_ok();
}

/* Tables and rows. */
static attn_status upload_all(const cuda_backend *self, const flight *uploaded, const tally *count,
                              cudaStream_t stream) {
    const call_memory *memory = &uploaded->memory;
    const attn_cuda_rows_in_place *rows = &uploaded->in_place;
    const attn_geometry *geometry = &self->base.geometry;
    ATTN_TRY(attn_cuda_upload(memory->sequences, memory->first_pieces.host, stream));
    if (!rows->ins) return attn_ok();
    ATTN_TRY(
        attn_cuda_upload_rows(rows->queries, memory->queries, count->rows * attn_query_row_bytes(geometry), stream));
    ATTN_TRY(attn_cuda_upload_rows(rows->keys, memory->keys, count->new_rows * attn_key_row_bytes(geometry), stream));
    return attn_cuda_upload_rows(rows->values, memory->values, count->new_rows * attn_value_row_bytes(geometry),
                                 stream);
}

attn_status attn_cuda_upload_flight(cuda_backend *self, const flight *uploaded, const tally *count) {
    if (self->base.started == 0) return upload_all(self, uploaded, count, self->stream);
    ATTN_TRY(upload_all(self, uploaded, count, self->uploads));
    CUDA_TRY(cudaEventRecord(uploaded->uploaded, self->uploads));
    CUDA_TRY(cudaStreamWaitEvent(self->stream, uploaded->uploaded, 0));
    return attn_ok();
}
