#define _GNU_SOURCE
#include "kernels/isolated/channel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"

typedef struct {
    attn_channel base;
    uint64_t number;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    attn_channel_id id; /* once.. */
    bool has_id;
    bool broken;
    char why[ATTN_STATUS_MESSAGE_BYTES];
} isolated_channel;

static isolated_channel *of(attn_channel *channel) { return (isolated_channel *)channel; }

/* With the lock held. */
static attn_status broken_status(const isolated_channel *self) { return attn_error(ATTN_UNAVAILABLE, "%s", self->why); }

/* The first reason stays. */
static void break_for(isolated_channel *self, attn_status why) {
    pthread_mutex_lock(&self->lock);
    if (!self->broken) snprintf(self->why, sizeof self->why, "%s", why.message);
    self->broken = true;
    pthread_cond_broadcast(&self->changed);
    pthread_mutex_unlock(&self->lock);
    for (int i = 0; i < 2; i++)
        attn_isolated_revoke(self->base.ends[i].backend, self->number);
}

static attn_status broken_because(const isolated_channel *self, const char *why) {
    return attn_error(ATTN_UNAVAILABLE, "the channel between devices %d and %d is broken: %s",
                      self->base.ends[0].device, self->base.ends[1].device, why);
}

static void channel_break_off(attn_channel *channel, const char *why) {
    break_for(of(channel), broken_because(of(channel), why));
}

/* What a side's process says of it, unless the channel was broken before. */
static attn_status side_fails(isolated_channel *self, attn_status status) {
    break_for(self, status);
    pthread_mutex_lock(&self->lock);
    status = broken_status(self);
    pthread_mutex_unlock(&self->lock);
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* The id */

static attn_status make_id(isolated_channel *self, attn_backend *own) {
    attn_channel_request request = {.number = self->number};
    attn_status status = attn_isolated_ask(own, ATTN_COMMAND_CHANNEL_ID, &request, NULL);
    if (attn_failed(status)) return side_fails(self, status);
    pthread_mutex_lock(&self->lock);
    self->id = request.id;
    self->has_id = true;
    pthread_cond_broadcast(&self->changed);
    pthread_mutex_unlock(&self->lock);
    return attn_ok();
}

static bool wait_for_change(isolated_channel *self, int64_t deadline) {
    struct timespec until = {.tv_sec = deadline / 1000000000, .tv_nsec = deadline % 1000000000};
    return pthread_cond_timedwait(&self->changed, &self->lock, &until) == 0;
}

static attn_status wait_for_id(isolated_channel *self, int64_t deadline) {
    bool in_time = true;
    pthread_mutex_lock(&self->lock);
    while (!self->has_id && !self->broken && in_time)
        in_time = wait_for_change(self, deadline);
    bool has_id = self->has_id;
    pthread_mutex_unlock(&self->lock);
    if (has_id) return attn_ok();
    return side_fails(self, broken_because(self, "connecting: the other side did not come in time"));
}

/* The first side makes it. Where the channel is broken, says so. */
static attn_status find_id(isolated_channel *self, attn_backend *own, uint32_t index, int64_t deadline) {
    pthread_mutex_lock(&self->lock);
    bool has_id = self->has_id;
    attn_status status = self->broken ? broken_status(self) : attn_ok();
    pthread_mutex_unlock(&self->lock);
    if (attn_failed(status) || has_id) return status;
    return index == 0 ? make_id(self, own) : wait_for_id(self, deadline);
}

/* ------------------------------------------------------------------------------------------- */
/* Sending and receiving */

static attn_status take_part(attn_channel *channel, attn_backend *own, attn_command_kind kind, const uint32_t *pages,
                             uint32_t count, int64_t timeout_ns) {
    isolated_channel *self = of(channel);
    int64_t deadline = attn_now_ns() + timeout_ns;
    uint32_t index = own == channel->ends[1].backend;
    ATTN_TRY(find_id(self, own, index, deadline));
    int64_t left_ns = deadline - attn_now_ns();
    attn_channel_request request = {.number = self->number,
                                    .id = self->id,
                                    .timeout_ns = left_ns > 0 ? left_ns : 0,
                                    .index = index,
                                    .other_device = channel->ends[1 - index].device,
                                    .count = count};
    attn_status status = attn_isolated_ask(own, kind, &request, pages);
    return attn_failed(status) ? side_fails(self, status) : status;
}

static attn_status channel_send(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                int64_t timeout_ns) {
    return take_part(channel, own, ATTN_COMMAND_SEND, pages, count, timeout_ns);
}

static attn_status channel_receive(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                   int64_t timeout_ns) {
    return take_part(channel, own, ATTN_COMMAND_RECEIVE, pages, count, timeout_ns);
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

/* The processes give back what they have for it with their next command. */
static void channel_destroy(attn_channel *channel) {
    isolated_channel *self = of(channel);
    for (int i = 0; i < 2; i++)
        attn_isolated_revoke(channel->ends[i].backend, self->number);
    pthread_cond_destroy(&self->changed);
    pthread_mutex_destroy(&self->lock);
    free(self);
}

static attn_status channel_create(const attn_channel_end *first, const attn_channel_end *second,
                                  attn_channel **channel) {
    static _Atomic uint64_t channels_made;
    if (first->device == second->device) {
        return attn_error(ATTN_UNAVAILABLE, "no channel: both ends are on device %d", first->device);
    }
    isolated_channel *self = calloc(1, sizeof *self);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a channel");
    self->base = (attn_channel){&attn_isolated_channel_ops, {*first, *second}};
    self->number = atomic_fetch_add(&channels_made, 1) + 1;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&self->changed, &clock);
    pthread_condattr_destroy(&clock);
    pthread_mutex_init(&self->lock, NULL);
    *channel = &self->base;
    return attn_ok();
}

const attn_channel_ops attn_isolated_channel_ops = {
    .describe = attn_isolated_describe_end,
    .create = channel_create,
    .destroy = channel_destroy,
    .break_off = channel_break_off,
    .send = channel_send,
    .receive = channel_receive,
};
