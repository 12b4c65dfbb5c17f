/*
 * Channels (kernels/channel.h) between two devices by NCCL.
 *
 * Either side has a communicator of its own, non-blocking, and a stream; pages are packed into a staging buffer, sent
 * and unpacked, a buffer at a time. Whoever waits looks whether the other side has given up, and aborts its own
 * communicator when it has, when NCCL reports an error or when the time is over: so no side waits for one that is gone.
 * A broken channel is thrown away and another one made; that is how communicators are rebuilt.
 */
#ifndef ATTND_KERNELS_CUDA_NCCL_CHANNEL_H
#define ATTND_KERNELS_CUDA_NCCL_CHANNEL_H

#include "kernels/backend.h"
#include "kernels/cuda/pages.h"

/* A backend's pool, without a list of pages, and its device. */
typedef struct {
    attn_cuda_pages pool;
    int device;
} attn_cuda_place;

/* Of a cuda backend; backend.c. Any thread. */
attn_cuda_place attn_cuda_place_of(attn_backend *backend);

extern const attn_channel_ops attn_nccl_channel_ops;

#endif
