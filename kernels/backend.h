/*
 * What a backend implements. Private to kernels/.
 *
 * A backend is a struct that begins with attn_backend, and a table of operations. kernels/backend.c
 * dispatches to the table and has checked every argument first, so an operation is only called with:
 *   append     a layer, page indices and positions that are inside the pool; tokens > 0; export likewise
 *   decode     a batch that attn_batch_check accepts, of size > 0; `timing` is never NULL and is zero; start likewise
 *   has_ended, finish   while a decode is started; all else but start, copy_page and destroy while none is
 *   copy_page  two different pages of the pool
 *   poison     a page and slots that exist
 * A backend whose page tables live elsewhere (on a device) checks the indices it reads there again.
 */
#ifndef ATTND_KERNELS_BACKEND_H
#define ATTND_KERNELS_BACKEND_H

#include <stdatomic.h>

#include "kernels/attention.h"
#include "kernels/channel.h"
#include "kernels/split_plan.h"

/* What both sides of a channel between two processes have to know: what is in it is the kind's. */
typedef struct {
    char bytes[128];
} attn_channel_id;

/* Of a channel whose other side is in another process. */
typedef struct {
    attn_channel_end own;
    uint32_t index;   /* 0 or 1: which side it is */
    int other_device; /* where the other one is */
    attn_channel_id id;
    bool (*is_revoked)(void *context); /* by somebody who wants it broken; asked while a side waits */
    void *context;
} attn_channel_side;

/* A kind's channels: operations as attn_channel_.. , whose arguments have been checked; count > 0. */
typedef struct attn_channel_ops {
    /* Fills in where the backend's pool is. */
    void (*describe)(attn_backend *backend, attn_channel_end *end);
    attn_status (*create)(const attn_channel_end *first, const attn_channel_end *second, attn_channel **channel);
    /* For channels between processes: an id for both sides, and one side. NULL: there are none such. */
    attn_status (*make_id)(attn_channel_id *id);
    attn_status (*create_side)(const attn_channel_side *side, attn_channel **channel);
    void (*destroy)(attn_channel *channel);
    void (*break_off)(attn_channel *channel, const char *why);
    attn_status (*send)(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                        int64_t timeout_ns);
    attn_status (*receive)(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                           int64_t timeout_ns);
} attn_channel_ops;

/* The first member of every channel. */
struct attn_channel {
    const attn_channel_ops *ops;
    attn_channel_end ends[2];
};

typedef struct {
    const char *kind;     /* attn_backend_config.kind */
    uint64_t small_bytes; /* attn_backend_small_bytes */
    bool stores_fp8;      /* takes geometries with kv_dtype ATTN_FP8_E4M3; others are refused before create */

    /*
     * The geometry, the scales, and that pages > 0, have been checked. Makes a backend whose base has been through
     * attn_backend_init. Errors as attn_backend_create.
     */
    attn_status (*create)(const attn_backend_config *config, attn_backend **backend);

    /* Frees everything, the base too (attn_backend_fini). */
    void (*destroy)(attn_backend *backend);

    attn_status (*append)(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                          uint32_t tokens, const void *keys, const void *values);
    attn_status (*export)(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                          uint32_t tokens, void *keys, void *values);
    /* A kind has either this.. */
    attn_status (*decode)(attn_backend *backend, const attn_batch *batch, const attn_plan *plan, attn_timing *timing);
    /* ..or these, as in pipeline.h, for up to `depth` decodes. Where start fails, nothing is started. */
    uint32_t depth;
    attn_status (*start)(attn_backend *backend, const attn_batch *batch, const attn_plan *plan);
    bool (*has_ended)(attn_backend *backend);
    attn_status (*finish)(attn_backend *backend, attn_timing *timing);
    void (*copy_page)(attn_backend *backend, uint32_t from, uint32_t to);
    void (*poison)(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots);
    const attn_channel_ops *channels;       /* NULL: it has none */
    void (*give_up)(attn_backend *backend); /* attn_backend_give_up; NULL: nothing is to be done */
    void (*borrow)(attn_backend *backend, void *memory, size_t bytes); /* NULL: it would gain nothing */
    void (*give_back)(attn_backend *backend, void *memory);
#ifndef ATTN_RELEASE
    void (*break_device)(attn_backend *backend); /* NULL: it has no device that could break */
#endif
} attn_backend_ops;

/* What the stored keys and values of one layer and KV head are multiplied by. */
typedef struct {
    float key, value;
} attn_scale;

/* The first member of every backend. Owned by the thread that drives it, but for plans_rejected. */
struct attn_backend {
    const attn_backend_ops *ops;
    attn_geometry geometry;
    uint32_t pages;
    attn_scale *scales; /* attn_backend_keep_scales; NULL: no fp8, or not kept here */
    attn_line line;     /* workers, tiles; the live batch during a decode */
    attn_plan_identity identity;
    uint32_t started;                /* decodes that are not finished */
    attn_timing timing;              /* of the one that is started, of a kind that decodes at once */
    _Atomic uint64_t plans_rejected; /* read by any thread */
    uint32_t process;                /* attn_backend_process */
    char description[160];           /* attn_backend_describe; the backend fills it at creation */
#ifndef ATTN_RELEASE
    bool broken; /* attn_backend_break, of a backend without break_device */
#endif
};

/*
 * Fills the base. The tile and block sizes and the workers are the backend's choice (attn_line_init).
 * Cannot fail; undo with attn_backend_fini.
 */
void attn_backend_init(attn_backend *backend, const attn_backend_ops *ops, const attn_backend_config *config,
                       uint32_t tile_tokens, uint32_t block_queries, uint32_t workers);
void attn_backend_fini(attn_backend *backend);

/*
 * With fp8: keeps the configuration's scales, 1 where it has none, until attn_backend_fini. Else does nothing.
 * ATTN_RESOURCE_EXHAUSTED. A backend that keeps them elsewhere (on a device) need not call it.
 */
attn_status attn_backend_keep_scales(attn_backend *backend, const attn_backend_config *config);

/* The scales of a layer and KV head, as kept; 1 and 1 if none are. */
attn_scale attn_backend_scale(const attn_backend *backend, uint32_t layer, uint32_t head);

/*
 * Is the batch one that a backend may run? Layer, lengths, query lengths, parts, pointers, scale:
 * ATTN_INVALID_ARGUMENT. Every page index that is within a sequence's length: ATTN_INTERNAL.
 */
attn_status attn_batch_check(const attn_backend *backend, const attn_batch *batch);

/*
 * Lends the backend memory, until that is taken back: a device may then read rows from there, and write rows there,
 * that lie one after another, without copies by the host. It changes nothing else. Before the memory goes, and while no
 * call uses it, attn_backend_take_back.
 */
void attn_backend_lend(attn_backend *backend, void *memory, size_t bytes);
void attn_backend_take_back(attn_backend *backend, void *memory);

/* ATTN_INTERNAL if a decode is started: then the backend is not to be asked for `what`. */
attn_status attn_backend_check_idle(const attn_backend *backend, const char *what);

/*
 * After attn_line_build: `plan` if it fits the live batch; else NULL, and if there was a plan it is
 * counted and logged.
 */
const attn_plan *attn_backend_accept_plan(attn_backend *backend, const attn_plan *plan);

extern const attn_backend_ops attn_reference_backend_ops; /* kernels/reference.c */
extern const attn_backend_ops attn_cpu_backend_ops;       /* kernels/cpu */
extern const attn_backend_ops attn_cuda_backend_ops;      /* kernels/cuda; only in builds with ATTN_HAVE_CUDA */

#endif
