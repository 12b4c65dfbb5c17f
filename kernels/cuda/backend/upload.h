/* What goes to the device: copies from pinned memory, or from where rows are, on a stream. */
#ifndef ATTND_KERNELS_CUDA_BACKEND_UPLOAD_H
#define ATTND_KERNELS_CUDA_BACKEND_UPLOAD_H

#include "kernels/cuda/backend/pack.h"
#include "kernels/cuda/backend/state.h"

/* An arena's bytes from a place on, to before `to_end` of its pinned memory. */
attn_status attn_cuda_upload(place from, const void *to_end, cudaStream_t stream);

/* Bytes from where they are. */
attn_status attn_cuda_upload_rows(const void *from, place to, size_t bytes, cudaStream_t stream);

/*
 * A decode's tables and rows: beside the kernels of the decode before, where there is one, and before its own on the
 * backend's stream.
 */
attn_status attn_cuda_upload_flight(cuda_backend *self, const flight *uploaded, const tally *count);

#endif
