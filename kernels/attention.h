/*
 * The engine's interface: what a backend is and does. Everything above this header (dp, service)
 * runs the same on every backend; nothing in it knows sequences, handles, gRPC or ranks.
 *
 * A backend owns one KV pool: `pages` pages, each with the keys and values of `page_size` tokens of
 * every layer and KV head, in a layout of its own. The caller decides which page holds what: it
 * names pages by index, in page tables, and the backend neither allocates nor frees them.
 *
 * Three operations touch the pool:
 *   attn_backend_append   writes rows of one layer into pages
 *   attn_backend_export   reads them back
 *   attn_backend_decode   for one layer and a batch: appends the batch's new rows, attends, combines
 *
 * Shapes: h = heads_q, g = heads_kv, d = head_dim, e = head_dim_v; row-major, packed.
 *   query rows   [query_length, h, d]   geometry dtype
 *   key rows     [tokens, g, d]         geometry dtype
 *   value rows   [tokens, g, e]         geometry dtype
 *   out rows     [query_length, h, e]   geometry dtype
 *   lse rows     [query_length, h]      float32, natural log
 * Query head j attends with KV head j / (h / g).
 *
 * Mathematics, for query row r (of n) of a sequence with `length` visible tokens, the new ones
 * included, at position p = length - n + r (a read without new rows: p = length - 1 for every r):
 *   score(t) = q . k[t] * scale, then softcap * tanh(score / softcap) if softcap > 0
 *   t is visible if t <= p and (window == 0 or t > p - window)
 *   LSE = log(sum over visible t of exp(score(t)) + (sinks ? exp(sinks[j]) : 0))
 *   out = sum over visible t of exp(score(t) - LSE) v[t]
 * With nothing visible: out = 0 and LSE = -inf (the sink's value, if there is one).
 *
 * The pool stores key and value rows as they come or, where the geometry says so, in fp8: OCP e4m3, with
 * 448 for its largest number, a NaN of each sign and no infinities. Each layer and KV head then has a scale
 * for its keys and one for its values:
 *   stored = e4m3(x / scale): a float32 division, then rounded to nearest, ties to even; what is larger than
 *            448, infinity too, becomes +-448; NaN stays NaN, with its sign
 *   k[t] and v[t] above are stored * scale
 * Queries, outs, and key and value rows on their way to the pool keep the geometry's dtype.
 *
 * Safety (docs/design.md, "the split plan"): loop extents come from the lengths of this very call;
 * a plan is a checked hint; a page index outside the pool fails the call with ATTN_INTERNAL before
 * it is used; pool slots at and beyond a sequence's length, and page-table entries beyond its last
 * page, are never read for a value: they may hold NaN or anything.
 *
 * Threads: one thread at a time drives a backend (the rank thread); the backend has workers of its
 * own. Results are there when the call returns.
 */
#ifndef ATTND_KERNELS_ATTENTION_H
#define ATTND_KERNELS_ATTENTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* ------------------------------------------------------------------------------------------- */
/* Geometry */

typedef enum {
    ATTN_BF16 = 1,
    ATTN_FP16 = 2,
    ATTN_FP32 = 3,
    ATTN_FP8_E4M3 = 4, /* of stored keys and values only */
} attn_dtype;

/* Bytes of one element: 1, 2 or 4. */
size_t attn_dtype_bytes(attn_dtype dtype);

/* "bf16", "fp16", "fp32", "fp8_e4m3". A literal. */
const char *attn_dtype_name(attn_dtype dtype);

typedef struct {
    uint32_t layers;
    uint32_t heads_q; /* a multiple of heads_kv; group heads_q / heads_kv is 1 .. 16 */
    uint32_t heads_kv;
    uint32_t head_dim;   /* 32 .. 256, a multiple of 8 */
    uint32_t head_dim_v; /* likewise */
    attn_dtype dtype;    /* of all rows: bf16, fp16 or fp32 */
    uint32_t page_size;  /* tokens: 16, 32, 64 or 128 */
    attn_dtype kv_dtype; /* of the pool: 0, dtype (the same), or with bf16 and fp16 ATTN_FP8_E4M3; see attn_kv_dtype */
} attn_geometry;

/* What keys and values are stored as: kv_dtype, or dtype where that is 0. */
attn_dtype attn_kv_dtype(const attn_geometry *geometry);

/* ATTN_INVALID_ARGUMENT, naming the field, if no backend supports the geometry. */
attn_status attn_geometry_check(const attn_geometry *geometry);

/* Bytes of one row of q, k, v and out of one token, in dtype: as they come and go. */
size_t attn_query_row_bytes(const attn_geometry *geometry);
size_t attn_key_row_bytes(const attn_geometry *geometry);
size_t attn_value_row_bytes(const attn_geometry *geometry);
size_t attn_out_row_bytes(const attn_geometry *geometry);

/* Bytes of one page of the pool: K and V of page_size tokens, all heads, all layers, in kv_dtype. */
size_t attn_page_bytes(const attn_geometry *geometry);

#define ATTN_MAX_QUERY_LENGTH 128
#define ATTN_MAX_GROUP        16

/*
 * The fixed split boundary of batch_invariant mode, and the stripe of spread sequences: tokens
 * [c * ATTN_CHUNK_TOKENS, (c + 1) * ATTN_CHUNK_TOKENS) of a sequence are its chunk c. A multiple of
 * every page size.
 */
#define ATTN_CHUNK_TOKENS 512

/* ------------------------------------------------------------------------------------------- */
/* Partial results */

/*
 * Where a sequence is spread over ranks, each rank holds whole chunks of it:  chunk_first,
 * chunk_first + chunk_stride, and so on, packed in its own page table. The backend then attends to
 * this part only and gives back partial results instead of out and lse.
 */
typedef struct {
    uint32_t chunk_first;  /* global index of the part's chunk 0 */
    uint32_t chunk_stride; /* ranks the sequence is spread over */
    uint64_t total_length; /* of the whole sequence, the new rows included: gives query positions */
    uint32_t new_first;    /* the first of this step's new rows that this part stores.. */
    uint32_t new_count;    /* ..and how many (maybe 0): they are consecutive, and the last of the part */
} attn_part;

/*
 * A partial result of n query rows over some KV range: the normalised output in float32 and the
 * log of its normaliser, without any sink. An empty range has out = 0 and lse = -inf.
 *   out [n, h, e] float32      lse [n, h] float32
 */
typedef struct {
    float *out;
    float *lse;
} attn_partial;

/* ------------------------------------------------------------------------------------------- */
/* Shared prefixes */

/*
 * Sequences of a batch that share their leading pages, so that a backend may read those once for all of them: it
 * attends to the prefix with all their queries, to what each has besides on its own, and merges both by their LSE. A
 * hint: a backend may attend to each sequence by itself, as it does in batch_invariant mode and with a window.
 */
typedef struct {
    const uint32_t *members; /* [count] indices of whole sequences of the batch; each is in one prefix at most */
    uint32_t count;          /* 2 and more */
    /*
     * The leading tokens that they share: a multiple of ATTN_CHUNK_TOKENS, no more than any member has without its new
     * rows. In all members' page tables these are the same pages.
     */
    uint32_t tokens;
} attn_prefix;

/* ------------------------------------------------------------------------------------------- */
/* A batch: one layer, some sequences */

typedef struct {
    uint32_t layer;
    uint32_t size;                 /* sequences, 0 and more; below, i runs over them */
    const uint32_t *lengths;       /* [size] tokens to attend to that are in this pool, new ones included */
    const uint32_t *query_lengths; /* [size] 1 .. ATTN_MAX_QUERY_LENGTH */
    const uint32_t *page_offsets;  /* [size + 1] sequence i's page table is pages[page_offsets[i] ..] */
    const uint32_t *pages;         /* page indices; entries at and beyond ceil(lengths[i] / page_size) are ignored */

    /* Rows, one pointer a sequence; any alignment. Borrowed until decode returns. */
    const void *const *queries; /* [size] query rows */
    /*
     * [size] query_lengths[i] key rows to append at the end, or NULL: a read. For a part: its new_count
     * rows, starting with row new_first; NULL only for a read, never because new_count is 0 (the
     * query positions of a part follow from total_length by the same rules as for a whole sequence).
     */
    const void *const *new_keys;
    const void *const *new_values; /* [size] likewise; NULL exactly if new_keys is */
    void *const *outs;             /* [size] out rows, written */
    float *const *lses;            /* [size] lse rows, written; or NULL: not wanted */

    /* Spread sequences. NULL: all whole. Else [size], and chunk_stride 0 marks a whole sequence. */
    const attn_part *parts;
    /*
     * [size] for each spread sequence where its partial results go, instead of outs and lses:
     * default mode: one partial; batch_invariant: one a chunk of the part, in chunk order, packed
     * ([chunks, n, h, e] and [chunks, n, h]). NULL if parts is.
     */
    const attn_partial *partials;

    const attn_prefix *prefixes; /* [prefix_count], or NULL */
    uint32_t prefix_count;

    float scale;        /* > 0 */
    float softcap;      /* 0: off */
    uint32_t window;    /* 0: off */
    const float *sinks; /* [h] or NULL */
    bool batch_invariant;
    bool device_time; /* also measure attn_timing.device_ns, which costs the call a few microseconds */
} attn_batch;

/* Where a decode's time went, nanoseconds. */
typedef struct {
    int64_t plan_ns;
    int64_t attention_ns; /* append and attention; cuda: staging, merging and waiting for the device, too */
    int64_t combine_ns;
    /*
     * cuda, where device_time is set: of attention_ns, what the device's own clock says from the end of the rows'
     * upload to the end of the last kernel. Else 0.
     */
    int64_t device_ns;
    uint32_t launches; /* of kernels on a device; cpu and reference: 0 */
} attn_timing;

/* ------------------------------------------------------------------------------------------- */
/* Backends */

typedef struct attn_backend attn_backend;
typedef struct attn_plan attn_plan; /* kernels/split_plan.h */

typedef struct {
    const char *kind; /* "cpu", "reference"; "cuda" where it is built in */
    attn_geometry geometry;
    uint32_t pages;   /* of the pool */
    uint32_t workers; /* CPU threads, the calling one included; 0: one */
    const char *isa;  /* cpu: "auto" (or NULL), "avx512bf16", "avx512", "avx2", "portable" */
    uint32_t device;  /* cuda: device index; counts on from 0 again where there are fewer devices */
    const int *cpus;  /* cpu: the cores to pin the workers to, [workers]; or NULL */
    bool isolated;    /* in a process of its own: kernels/isolated.h */

    /* fp8 only: [layers, heads_kv] each, finite and above 0; NULL: all 1. Borrowed until create returns. */
    const float *k_scales;
    const float *v_scales;
} attn_backend_config;

/*
 * Creates a backend with an empty pool. The caller destroys it.
 * ATTN_INVALID_ARGUMENT: unknown kind or isa, bad geometry, a scale that is not finite and above 0 (names
 * its index), scales without fp8. ATTN_UNAVAILABLE: this machine, or this kind, cannot run it (says why).
 * ATTN_RESOURCE_EXHAUSTED: no memory for the pool (says how much was asked for).
 */
attn_status attn_backend_create(const attn_backend_config *config, attn_backend **backend);

/* Frees the backend and its pool. NULL is fine. No call may be running. */
void attn_backend_destroy(attn_backend *backend);

/* One line for people: instruction set or device, workers. Valid as long as the backend. */
const char *attn_backend_describe(const attn_backend *backend);

const attn_geometry *attn_backend_geometry(const attn_backend *backend);

/*
 * A decode that reads and writes this many bytes at most is done in about 0.1 ms of the calling thread: sooner
 * than another thread is woken up for it. 0: none is.
 */
uint64_t attn_backend_small_bytes(const attn_backend *backend);

/*
 * Writes `tokens` key and value rows of one layer at positions position .. position + tokens - 1 of
 * the pool-local sequence whose page table is `pages` [page_count]. Rows have any alignment.
 * ATTN_INTERNAL: a page index outside the pool, or a table too short; nothing was written.
 */
attn_status attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint32_t page_count,
                                uint64_t position, uint32_t tokens, const void *keys, const void *values);

/*
 * Reads rows back as attn_backend_append takes them, in dtype, to `keys` and `values` of any alignment: the very bits
 * that were appended. With fp8 what is stored times its scale, rounded to dtype: appended again, that is stored as the
 * same numbers (unless it is too small or too large for dtype). Slots that nothing was written to hold anything.
 * ATTN_INTERNAL: as attn_backend_append.
 */
attn_status attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint32_t page_count,
                                uint64_t position, uint32_t tokens, void *keys, void *values);

/*
 * Runs one layer for a batch: appends, attends, combines. `plan` is NULL (the partition is derived
 * from the batch's lengths) or a per-step plan, which is checked against this batch and, if it does
 * not fit, counted (attn_backend_plans_rejected), logged and not used. `timing` may be NULL.
 * ATTN_INTERNAL: a page index outside the pool; nothing was appended and outs are unspecified.
 * An empty batch does nothing.
 */
attn_status attn_backend_decode(attn_backend *backend, const attn_batch *batch, const attn_plan *plan,
                                attn_timing *timing);

/* Copies all layers of page `from` to page `to` (copy on write). */
attn_status attn_backend_copy_page(attn_backend *backend, uint32_t from, uint32_t to);

/* Plans offered to this backend that did not fit their batch, since creation. Any thread. */
uint64_t attn_backend_plans_rejected(const attn_backend *backend);

/*
 * Test aid: fills the given slots of a page, all layers and heads, with NaN.
 */
attn_status attn_backend_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots);

/* ------------------------------------------------------------------------------------------- */
/* Combine */

/*
 * Merges `count` partial results of `rows` (query row, head) pairs in the order given, adds the sink
 * and writes out rows in `dtype` and, if `lse` is not NULL, the LSE. The order and the arithmetic
 * are fixed, so equal partials give bitwise equal outputs; batch_invariant decode uses this very
 * function.
 *   partials[c].out [n, h, e], partials[c].lse [n, h]; sinks [h] or NULL; out [n, h, e] in dtype
 */
void attn_combine(const attn_partial *partials, uint32_t count, uint32_t query_length, uint32_t heads_q,
                  uint32_t head_dim_v, const float *sinks, attn_dtype dtype, void *out, float *lse);

#endif
