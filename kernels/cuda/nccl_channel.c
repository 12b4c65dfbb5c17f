#define _GNU_SOURCE
#include "kernels/cuda/nccl_channel.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "kernels/cuda/context.h"

#define STAGING_BYTES ((size_t)64 << 20)
#define LOOK_NS       20000 /* between two looks at what is waited for */

/* ------------------------------------------------------------------------------------------- */
/* The library, found at run time */

typedef struct {
    char missing[160]; /* why there is none; empty: there is */
    ncclResult_t (*get_unique_id)(ncclUniqueId *);
    ncclResult_t (*init_rank)(ncclComm_t *, int, ncclUniqueId, int, ncclConfig_t *);
    ncclResult_t (*get_async_error)(ncclComm_t, ncclResult_t *);
    ncclResult_t (*send)(const void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
    ncclResult_t (*receive)(void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
    ncclResult_t (*abort)(ncclComm_t);
    const char *(*error_text)(ncclResult_t);
} nccl_library;

static nccl_library nccl;
static pthread_once_t nccl_once = PTHREAD_ONCE_INIT;

static void find_nccl(void) {
    const struct {
        const char *name;
        void *function;
    } wanted[] = {
        {"ncclGetUniqueId", &nccl.get_unique_id},
        {"ncclCommInitRankConfig", &nccl.init_rank},
        {"ncclCommGetAsyncError", &nccl.get_async_error},
        {"ncclSend", &nccl.send},
        {"ncclRecv", &nccl.receive},
        {"ncclCommAbort", &nccl.abort},
        {"ncclGetErrorString", &nccl.error_text},
    };
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(nccl.missing, sizeof nccl.missing, "no NCCL: %s", dlerror());
        return;
    }
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = dlsym(library, wanted[i].name);
        if (found == NULL) snprintf(nccl.missing, sizeof nccl.missing, "this NCCL has no %s", wanted[i].name);
        *(void **)wanted[i].function = found; /* as POSIX has it */
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Channels */

/* Owned by the thread that drives the side's backend, but for what the channel's lock guards. */
typedef struct {
    bool is_here;            /* and not in another process */
    attn_cuda_pages pool;    /* without a list of pages.. */
    int device;              /* ..of this device */
    ncclComm_t communicator; /* NULL: not connected yet */
    cudaStream_t stream;
    char *staging;   /* device [batch pages, layers, page_bytes] */
    uint32_t *pages; /* device [batch pages] */
} channel_side;

typedef struct {
    attn_channel base;
    ncclUniqueId id;
    uint32_t batch; /* pages that staging has room for */
    channel_side sides[2];
    bool (*is_revoked)(void *context); /* attn_channel_side; or NULL */
    void *context;
    pthread_mutex_t lock;
    bool broken;   /* guarded by lock, as is.. */
    char why[160]; /* ..this */
} nccl_channel;

static nccl_channel *of(attn_channel *channel) { return (nccl_channel *)channel; }

static attn_status broken_status(nccl_channel *self) {
    return attn_error(ATTN_UNAVAILABLE, "the channel between devices %d and %d is broken: %s", self->sides[0].device,
                      self->sides[1].device, self->why);
}

static bool is_broken(nccl_channel *self) {
    pthread_mutex_lock(&self->lock);
    bool broken = self->broken;
    pthread_mutex_unlock(&self->lock);
    return broken || (self->is_revoked != NULL && self->is_revoked(self->context));
}

static void break_channel(nccl_channel *self, const char *what, const char *why) {
    pthread_mutex_lock(&self->lock);
    if (!self->broken) snprintf(self->why, sizeof self->why, "%s%s%s", what, what[0] == '\0' ? "" : ": ", why);
    self->broken = true;
    pthread_mutex_unlock(&self->lock);
}

/* Breaks the channel, unless it is broken already, and lets go of this side's communicator. */
static attn_status give_up(nccl_channel *self, channel_side *side, const char *what, const char *why) {
    break_channel(self, what, why);
    if (side->communicator != NULL) nccl.abort(side->communicator);
    side->communicator = NULL;
    cudaGetLastError(); /* not a later launch's */
    return broken_status(self);
}

static void wait_briefly(void) { nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL); }

/* Waits for what NCCL was asked for to be under way, and with a stream until that has done it. */
static attn_status wait_until(nccl_channel *self, channel_side *side, bool with_stream, int64_t deadline,
                              const char *what) {
    for (;; wait_briefly()) {
        ncclResult_t state = ncclSuccess;
        ncclResult_t asked = nccl.get_async_error(side->communicator, &state);
        if (asked != ncclSuccess) return give_up(self, side, what, nccl.error_text(asked));
        if (state != ncclSuccess && state != ncclInProgress) return give_up(self, side, what, nccl.error_text(state));
        if (state == ncclSuccess && !with_stream) return attn_ok();
        if (state == ncclSuccess) {
            cudaError_t error = cudaStreamQuery(side->stream);
            if (error == cudaSuccess) return attn_ok();
            if (error != cudaErrorNotReady) return give_up(self, side, what, cudaGetErrorString(error));
        }
        if (is_broken(self)) return give_up(self, side, what, "the other side has given up");
        if (attn_now_ns() > deadline) return give_up(self, side, what, "the other side did not come in time");
    }
}

static attn_status check_cuda(nccl_channel *self, channel_side *side, cudaError_t error, const char *what) {
    return error == cudaSuccess ? attn_ok() : give_up(self, side, what, cudaGetErrorString(error));
}

/* NCCL's answer to a call that goes on behind it. */
static attn_status check_nccl(nccl_channel *self, channel_side *side, ncclResult_t result, const char *what) {
    bool goes_on = result == ncclSuccess || result == ncclInProgress;
    return goes_on ? attn_ok() : give_up(self, side, what, nccl.error_text(result));
}

static size_t packed_bytes(const channel_side *side, uint32_t pages) {
    return (size_t)pages * side->pool.layers * side->pool.page_bytes;
}

static attn_status connect_side(nccl_channel *self, channel_side *side, int64_t deadline) {
    if (side->communicator != NULL) return attn_ok();
    ATTN_TRY(check_cuda(self, side, cudaStreamCreateWithFlags(&side->stream, cudaStreamNonBlocking), "stream"));
    ATTN_TRY(check_cuda(self, side, cudaMalloc((void **)&side->staging, packed_bytes(side, self->batch)), "staging"));
    ATTN_TRY(check_cuda(self, side, cudaMalloc((void **)&side->pages, self->batch * sizeof(uint32_t)), "staging"));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    int rank = side == &self->sides[1];
    ATTN_TRY(check_nccl(self, side, nccl.init_rank(&side->communicator, 2, self->id, rank, &config), "connecting"));
    return wait_until(self, side, false, deadline, "connecting");
}

/* Finds the side, connected. */
static attn_status take_side(nccl_channel *self, const attn_backend *own, int64_t deadline, channel_side **side) {
    *side = &self->sides[own == self->base.ends[1].backend];
    cudaError_t error = cudaSetDevice((*side)->device);
    if (is_broken(self)) return give_up(self, *side, "used again", "it was broken before");
    ATTN_TRY(check_cuda(self, *side, error, "device"));
    return connect_side(self, *side, deadline);
}

static attn_status list_pages(nccl_channel *self, channel_side *side, const uint32_t *pages, uint32_t count,
                              attn_cuda_pages *listed) {
    *listed = side->pool;
    listed->pages = side->pages;
    listed->count = count;
    return check_cuda(self, side,
                      cudaMemcpyAsync(side->pages, pages, count * sizeof *pages, cudaMemcpyHostToDevice, side->stream),
                      "page list");
}

static attn_status send_batch(nccl_channel *self, channel_side *side, const uint32_t *pages, uint32_t count,
                              int64_t deadline) {
    attn_cuda_pages listed;
    int other = side == &self->sides[0];
    ATTN_TRY(list_pages(self, side, pages, count, &listed));
    int error = attn_cuda_pack_pages(&listed, side->staging, side->stream);
    ATTN_TRY(check_cuda(self, side, (cudaError_t)error, "packing pages"));
    ncclResult_t result =
        nccl.send(side->staging, packed_bytes(side, count), ncclUint8, other, side->communicator, side->stream);
    ATTN_TRY(check_nccl(self, side, result, "sending"));
    return wait_until(self, side, true, deadline, "sending");
}

static attn_status receive_batch(nccl_channel *self, channel_side *side, const uint32_t *pages, uint32_t count,
                                 int64_t deadline) {
    attn_cuda_pages listed;
    int other = side == &self->sides[0];
    ATTN_TRY(list_pages(self, side, pages, count, &listed));
    ncclResult_t result =
        nccl.receive(side->staging, packed_bytes(side, count), ncclUint8, other, side->communicator, side->stream);
    ATTN_TRY(check_nccl(self, side, result, "receiving"));
    ATTN_TRY(wait_until(self, side, true, deadline, "receiving"));
    int error = attn_cuda_unpack_pages(&listed, side->staging, side->stream);
    ATTN_TRY(check_cuda(self, side, (cudaError_t)error, "unpacking pages"));
    return wait_until(self, side, true, deadline, "unpacking pages");
}

typedef attn_status (*batch_function)(nccl_channel *self, channel_side *side, const uint32_t *pages, uint32_t count,
                                      int64_t deadline);

static attn_status for_batches(attn_channel *channel, const attn_backend *own, const uint32_t *pages, uint32_t count,
                               int64_t timeout_ns, batch_function run) {
    nccl_channel *self = of(channel);
    int64_t deadline = attn_now_ns() + timeout_ns;
    channel_side *side;
    ATTN_TRY(take_side(self, own, deadline, &side));
    for (uint32_t first = 0; first < count; first += self->batch) {
        uint32_t size = count - first < self->batch ? count - first : self->batch;
        ATTN_TRY(run(self, side, pages + first, size, deadline));
    }
    return attn_ok();
}

static attn_status channel_send(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                int64_t timeout_ns) {
    return for_batches(channel, own, pages, count, timeout_ns, send_batch);
}

static attn_status channel_receive(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                   int64_t timeout_ns) {
    return for_batches(channel, own, pages, count, timeout_ns, receive_batch);
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static void free_side(channel_side *side) {
    cudaSetDevice(side->device);
    if (side->communicator != NULL) nccl.abort(side->communicator);
    if (side->stream != NULL) cudaStreamDestroy(side->stream);
    cudaFree(side->staging);
    cudaFree(side->pages);
}

static void channel_break_off(attn_channel *channel, const char *why) { break_channel(of(channel), "", why); }

/* What the channel has on a device outlives the backend there. */
static void free_channel(nccl_channel *self) {
    for (int i = 0; i < 2; i++) {
        if (!self->sides[i].is_here) continue;
        free_side(&self->sides[i]);
        attn_cuda_context_leave(self->sides[i].device);
    }
    pthread_mutex_destroy(&self->lock);
    free(self);
}

static void channel_destroy(attn_channel *channel) { free_channel(of(channel)); }

static attn_status make_id(attn_channel_id *id) {
    _Static_assert(sizeof(ncclUniqueId) == sizeof(attn_channel_id), "an id is NCCL's");
    ncclUniqueId made;
    pthread_once(&nccl_once, find_nccl);
    if (nccl.missing[0] != '\0') return attn_error(ATTN_UNAVAILABLE, "no channel between devices: %s", nccl.missing);
    ncclResult_t result = nccl.get_unique_id(&made);
    if (result != ncclSuccess) {
        return attn_error(ATTN_UNAVAILABLE, "no channel between devices: NCCL: %s", nccl.error_text(result));
    }
    memcpy(id, &made, sizeof made);
    return attn_ok();
}

/* A channel without sides. */
static nccl_channel *make_channel(const attn_channel_id *id) {
    nccl_channel *made = calloc(1, sizeof *made);
    if (made == NULL) return NULL;
    made->base.ops = &attn_nccl_channel_ops;
    memcpy(&made->id, id, sizeof made->id);
    pthread_mutex_init(&made->lock, NULL);
    return made;
}

/* Makes side `index` be here. */
static attn_status add_side(nccl_channel *self, int index, const attn_channel_end *end) {
    channel_side *side = &self->sides[index];
    ATTN_TRY(attn_cuda_context_enter(end->device));
    self->base.ends[index] = *end;
    *side = (channel_side){.is_here = true,
                           .pool = {.pool = end->pool,
                                    .layer_bytes = end->layer_bytes,
                                    .page_bytes = end->page_bytes,
                                    .layers = end->geometry.layers},
                           .device = end->device};
    size_t page = packed_bytes(side, 1);
    self->batch = page < STAGING_BYTES ? (uint32_t)(STAGING_BYTES / page) : 1;
    return attn_ok();
}

static attn_status channel_create(const attn_channel_end *first, const attn_channel_end *second,
                                  attn_channel **channel) {
    attn_channel_id id;
    if (first->device == second->device) {
        return attn_error(ATTN_UNAVAILABLE, "no channel: both ends are on device %d", first->device);
    }
    ATTN_TRY(make_id(&id));
    nccl_channel *self = make_channel(&id);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a channel");
    attn_status status = add_side(self, 0, first);
    if (!attn_failed(status)) status = add_side(self, 1, second);
    if (attn_failed(status)) {
        free_channel(self);
        return status;
    }
    *channel = &self->base;
    return attn_ok();
}

static attn_status channel_create_side(const attn_channel_side *side, attn_channel **channel) {
    pthread_once(&nccl_once, find_nccl);
    if (nccl.missing[0] != '\0') return attn_error(ATTN_UNAVAILABLE, "no channel between devices: %s", nccl.missing);
    nccl_channel *self = make_channel(&side->id);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a channel");
    self->is_revoked = side->is_revoked;
    self->context = side->context;
    self->sides[1 - side->index].device = side->other_device;
    attn_status status = add_side(self, (int)side->index, &side->own);
    if (attn_failed(status)) {
        free_channel(self);
        return status;
    }
    *channel = &self->base;
    return attn_ok();
}

const attn_channel_ops attn_nccl_channel_ops = {
    .describe = attn_cuda_describe_end,
    .create = channel_create,
    .make_id = make_id,
    .create_side = channel_create_side,
    .destroy = channel_destroy,
    .break_off = channel_break_off,
    .send = channel_send,
    .receive = channel_receive,
};
