/*
 * Channels: pages of one backend's pool sent to another's, of the same kind and geometry, without the host's memory.
 *
 * A channel is between two backends and goes both ways. Both sides take part, each on the thread that drives its
 * backend: one sends some pages, the other receives as many, of all layers, in the pool's own layout. Neither waits
 * longer than it is told to: where the other side does not come, or something fails, the channel is broken, says so on
 * both sides from then on, and is good for nothing but attn_channel_destroy; the backends are as good as before.
 *
 * cuda: NCCL, between two devices; the library is looked for when the first channel is made. The others have none.
 */
#ifndef ATTND_KERNELS_CHANNEL_H
#define ATTND_KERNELS_CHANNEL_H

#include "kernels/attention.h"

typedef struct attn_channel attn_channel;

/* What a channel has to know of a backend: a copy, for the backend may be gone before the channel is. */
typedef struct {
    const attn_backend *backend; /* who calls is compared with it */
    const struct attn_channel_ops *ops;
    attn_geometry geometry;
    char *pool; /* layer 0, page 0, where the device `device` has it */
    size_t layer_bytes, page_bytes;
    int device;
} attn_channel_end;

/* On the thread that drives the backend. */
attn_channel_end attn_channel_end_of(attn_backend *backend);

/*
 * Makes a channel between two backends. Any thread; the backends may be at work, or gone. The sides connect when they
 * first meet, which takes some tenths of a second.
 * ATTN_UNAVAILABLE: this kind of backend has no channels, or these two cannot have one: they share a device, or there
 * is no library (says which).
 */
attn_status attn_channel_create(const attn_channel_end *first, const attn_channel_end *second, attn_channel **channel);

/* Whether backends of a kind have channels at all. */
bool attn_backend_kind_has_channels(const char *kind);

/* Breaks the channel: a side that waits gives up soon. Any thread; `why` is copied. */
void attn_channel_break(attn_channel *channel, const char *why);

/* No side may be in a call. NULL is fine. */
void attn_channel_destroy(attn_channel *channel);

/*
 * Sends pages[count] of `own`, one of the two; the other side receives as many at the same time. Returns when they have
 * been taken over, or were given. ATTN_UNAVAILABLE: the channel is broken, now or since before (says why).
 * ATTN_INTERNAL: a page index outside the pool; the other side then waits in vain.
 */
attn_status attn_channel_send(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                              int64_t timeout_ns);

/* Receives what the other side sends to pages[count] of `own`. Errors likewise; what the pages hold then is
 * unspecified. */
attn_status attn_channel_receive(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                 int64_t timeout_ns);

#endif
