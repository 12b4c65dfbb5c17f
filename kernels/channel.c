/* The way to a backend's channels: what is the same for all kinds is checked here. */
#include "kernels/channel.h"

#include <string.h>

#include "kernels/backend.h"

static bool same_geometry(const attn_geometry *first, const attn_geometry *second) {
    return first->layers == second->layers && first->heads_q == second->heads_q &&
           first->heads_kv == second->heads_kv && first->head_dim == second->head_dim &&
           first->head_dim_v == second->head_dim_v && first->dtype == second->dtype &&
           first->page_size == second->page_size && attn_kv_dtype(first) == attn_kv_dtype(second);
}

attn_channel_end attn_channel_end_of(attn_backend *backend) {
    attn_channel_end end = {.backend = backend, .ops = backend->ops->channels, .geometry = backend->geometry};
    if (end.ops != NULL) end.ops->describe(backend, &end);
    return end;
}

attn_status attn_channel_create(const attn_channel_end *first, const attn_channel_end *second, attn_channel **channel) {
    *channel = NULL;
    if (first->ops != second->ops || !same_geometry(&first->geometry, &second->geometry)) {
        return attn_error(ATTN_UNAVAILABLE, "no channel between backends of different kinds or geometries");
    }
    if (first->ops == NULL) return attn_error(ATTN_UNAVAILABLE, "backends of the host have no channels");
    return first->ops->create(first, second, channel);
}

void attn_channel_break(attn_channel *channel, const char *why) { channel->ops->break_off(channel, why); }

void attn_channel_destroy(attn_channel *channel) {
    if (channel != NULL) channel->ops->destroy(channel);
}

static attn_status check_pages(const attn_channel *channel, const attn_backend *own, const uint32_t *pages,
                               uint32_t count) {
    if (own != channel->ends[0].backend && own != channel->ends[1].backend) {
        return attn_error(ATTN_INTERNAL, "a channel was used by a backend that is not at its end");
    }
    ATTN_TRY(attn_backend_check_idle(own, "a channel"));
    for (uint32_t i = 0; i < count; i++) {
        if (pages[i] >= own->pages) return attn_error(ATTN_INTERNAL, "page %u: the pool has %u", pages[i], own->pages);
    }
    return attn_ok();
}

attn_status attn_channel_send(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                              int64_t timeout_ns) {
    ATTN_TRY(check_pages(channel, own, pages, count));
    return count == 0 ? attn_ok() : channel->ops->send(channel, own, pages, count, timeout_ns);
}

attn_status attn_channel_receive(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                 int64_t timeout_ns) {
    ATTN_TRY(check_pages(channel, own, pages, count));
    return count == 0 ? attn_ok() : channel->ops->receive(channel, own, pages, count, timeout_ns);
}
