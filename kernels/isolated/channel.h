/*
 * Channels (kernels/channel.h) between backends in processes of their own, each of which has its side of the kind's own
 * channel. Here is what knows both: it gives them an id in common, which the first side's process makes, and tells each
 * when the other has failed.
 *
 * Commands have a request in the rows region, and behind it the pages.
 */
#ifndef ATTND_KERNELS_ISOLATED_CHANNEL_H
#define ATTND_KERNELS_ISOLATED_CHANNEL_H

#include <stdint.h>

#include "kernels/backend.h"
#include "kernels/isolated/mailbox.h"

typedef struct {
    uint64_t number;    /* of the channel, in the parent; when attn_control.revoked_channel is it, it is not to go on */
    attn_channel_id id; /* of ATTN_COMMAND_CHANNEL_ID the answer */
    int64_t timeout_ns;
    uint32_t index; /* of the side */
    int other_device;
    uint32_t count; /* of pages */
} attn_channel_request;

extern const attn_channel_ops attn_isolated_channel_ops;

/* Which device the backend's process has it on. */
void attn_isolated_describe_end(attn_backend *backend, attn_channel_end *end);

/* Has the backend's process do a channel command, on the thread that drives the backend. */
attn_status attn_isolated_ask(attn_backend *backend, attn_command_kind kind, attn_channel_request *request,
                              const uint32_t *pages);

/* Revokes a channel where the backend's process has a side of it. Any thread; the backend may be gone. */
void attn_isolated_revoke(const attn_backend *backend, uint64_t number);

#endif
