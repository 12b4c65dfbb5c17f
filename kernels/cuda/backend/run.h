/*
 * The kernels of a call whose tables and rows are on their way to the device. They are launched on the backend's
 * stream, and counted; errors are a launch's.
 */
#ifndef ATTND_KERNELS_CUDA_BACKEND_RUN_H
#define ATTND_KERNELS_CUDA_BACKEND_RUN_H

#include "kernels/cuda/backend/pack.h"
#include "kernels/cuda/backend/state.h"

/* By decode.h: if self->is_fast. */
attn_status attn_cuda_run_fast(cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                               const tally *count);

/* By the kernels for any geometry (launch.h), else. `plan`: one that has been accepted, or NULL. */
attn_status attn_cuda_run_pieces(cuda_backend *self, const attn_batch *batch, const attn_plan *plan,
                                 const call_memory *memory, const tally *count);

#endif
