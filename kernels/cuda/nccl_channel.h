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

/* attn_channel_ops.describe of a cuda backend; backend/backend.c. */
void attn_cuda_describe_end(attn_backend *backend, attn_channel_end *end);

extern const attn_channel_ops attn_nccl_channel_ops;

#endif
