/*
 * The cuda backend. A call's tables and rows are packed into pinned memory and uploaded at once; then, for the
 * geometries of decode.h, one launch stores the new rows, plans, attends and merges (two where prefixes are shared);
 * others take more (pieces.c). Kernels write outputs straight to pinned memory. state.h has the way of a call.
 */
#define _POSIX_C_SOURCE 200809L

#include "base/clock.h"
#include "kernels/cuda/backend/pack.h"
#include "kernels/cuda/backend/run.h"
#include "kernels/cuda/backend/state.h"
#include "kernels/cuda/backend/upload.h"
#include "kernels/cuda/nccl_channel.h"
#ifndef ATTN_RELEASE
#include "kernels/cuda/fault.h"
#endif

/* ------------------------------------------------------------------------------------------- */
/* Pages and borrowed memory */

static void note(cuda_backend *self, cudaError_t error) {
    if (self->failed == cudaSuccess) self->failed = error;
}

/* All layers' tiles of a page: they lie a layer apart. */
static void cuda_copy_page(attn_backend *backend, uint32_t from, uint32_t to) {
    cuda_backend *self = attn_cuda_of(backend);
    size_t bytes = (size_t)self->layer.tile_bytes * self->layer.heads_kv;
    cudaSetDevice(self->device);
    note(self,
         cudaMemcpy2DAsync(self->layer.memory + to * bytes, self->layer_bytes, self->layer.memory + from * bytes,
                           self->layer_bytes, bytes, backend->geometry.layers, cudaMemcpyDeviceToDevice, self->stream));
}

void attn_cuda_describe_end(attn_backend *backend, attn_channel_end *end) {
    const cuda_backend *self = attn_cuda_of(backend);
    end->pool = self->layer.memory;
    end->layer_bytes = self->layer_bytes;
    end->page_bytes = (size_t)self->layer.tile_bytes * self->layer.heads_kv;
    end->device = self->device;
}

static void cuda_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots) {
    cuda_backend *self = attn_cuda_of(backend);
    cudaSetDevice(self->device);
    for (uint32_t i = 0; i < backend->geometry.layers; i++) {
        attn_cuda_layer layer = attn_cuda_layer_at(self, i);
        note(self, (cudaError_t)attn_cuda_poison(&layer, page, first_slot, slots, self->stream));
    }
}

static void cuda_borrow(attn_backend *backend, void *memory, size_t bytes) {
    cudaSetDevice(attn_cuda_of(backend)->device);
    attn_cuda_borrow(&attn_cuda_of(backend)->borrowed, memory, bytes);
}

static void cuda_give_back(attn_backend *backend, void *memory) {
    cudaSetDevice(attn_cuda_of(backend)->device);
    attn_cuda_give_back(&attn_cuda_of(backend)->borrowed, memory);
}

#ifndef ATTN_RELEASE
static void cuda_break(attn_backend *backend) {
    cuda_backend *self = attn_cuda_of(backend);
    cudaSetDevice(self->device);
    note(self, (cudaError_t)attn_cuda_write_nowhere(self->stream));
}
#endif

/* ------------------------------------------------------------------------------------------- */
/* Decoding */

static attn_status launch_flight(cuda_backend *self, flight *launched, const attn_plan *plan, const tally *count) {
    const attn_batch *batch = launched->batch;
    const call_memory *memory = &launched->memory;
    ATTN_TRY(attn_cuda_upload_flight(self, launched, count));
    if (batch->device_time) CUDA_TRY(cudaEventRecord(launched->kernels_begin, self->stream));
    ATTN_TRY(self->is_fast ? attn_cuda_run_fast(self, batch, memory, count)
                           : attn_cuda_run_pieces(self, batch, plan, memory, count));
    if (batch->device_time) CUDA_TRY(cudaEventRecord(launched->kernels_end, self->stream));
    CUDA_TRY(cudaEventRecord(launched->ended, self->stream));
    return attn_ok();
}

/* Nothing of it is on a stream any more. */
static void take_back(cuda_backend *self, flight *failed) {
    cudaStreamSynchronize(self->uploads);
    cudaStreamSynchronize(self->stream);
    *failed->status = 0;
}

static attn_status cuda_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan) {
    cuda_backend *self = attn_cuda_of(backend);
    flight *next = &self->flights[(self->oldest + backend->started) % FLIGHTS];
    attn_status status;
    next->batch = batch;
    next->timing = (attn_timing){0};
    next->start_ns = attn_now_ns();
    self->launches = 0;
    cudaSetDevice(self->device);
    CUDA_TRY(self->failed);
    ATTN_TRY(attn_line_build(&backend->line, batch));
    plan = attn_backend_accept_plan(backend, plan);
    tally count = attn_cuda_count(self, batch);
    if (!attn_cuda_reserve(self, next, &count, &status)) return status;
    next->timing.plan_ns = attn_now_ns() - next->start_ns;

    attn_cuda_pack(self, next, &count);
    status = launch_flight(self, next, plan, &count);
    next->timing.launches = self->launches;
    if (attn_failed(status)) take_back(self, next);
    return status;
}

/* An error is an end, too: it shows when the flight is settled. */
static bool cuda_has_ended(attn_backend *backend) {
    const cuda_backend *self = attn_cuda_of(backend);
    bool has_ended = cudaEventQuery(self->flights[self->oldest].ended) != cudaErrorNotReady;
    if (!has_ended) cudaGetLastError(); /* or the next launch would be told of it */
    return has_ended;
}

/* After attn_cuda_settle(). */
static attn_status read_device_time(const flight *ended, attn_timing *timing) {
    float ms = 0;
    CUDA_TRY(cudaEventElapsedTime(&ms, ended->kernels_begin, ended->kernels_end));
    timing->device_ns = (int64_t)((double)ms * 1e6);
    return attn_ok();
}

static attn_status cuda_finish(attn_backend *backend, attn_timing *timing) {
    cuda_backend *self = attn_cuda_of(backend);
    flight *ended = &self->flights[self->oldest];
    self->oldest = (self->oldest + 1) % FLIGHTS;
    cudaSetDevice(self->device);
    ATTN_TRY(attn_cuda_settle(self, ended));
    attn_cuda_unpack(self, ended);
    *timing = ended->timing;
    if (ended->batch->device_time) ATTN_TRY(read_device_time(ended, timing));
    timing->attention_ns = attn_now_ns() - ended->start_ns - timing->plan_ns;
    return attn_ok();
}

const attn_backend_ops attn_cuda_backend_ops = {
    .kind = "cuda",
    .stores_fp8 = true,
    .create = attn_cuda_create,
    .destroy = attn_cuda_destroy,
    .append = attn_cuda_append_rows,
    .export = attn_cuda_export_rows,
    .depth = FLIGHTS,
    .start = cuda_start,
    .has_ended = cuda_has_ended,
    .finish = cuda_finish,
    .copy_page = cuda_copy_page,
    .poison = cuda_poison,
    .borrow = cuda_borrow,
    .give_back = cuda_give_back,
#ifndef ATTN_RELEASE
    .break_device = cuda_break,
#endif
#ifdef ATTN_HAVE_NCCL
    .channels = &attn_nccl_channel_ops,
#endif
};
