/*
 * The middle of attnd: sequences, pages, placement, steps, and the ranks that run them.
 *
 * An engine owns N data-parallel ranks. A rank is one worker thread that owns one kernels backend
 * (a set of CPU cores, or a GPU) with its page pool, and a bounded queue of work. A sequence lives
 * on one rank, or is spread over all of them in stripes of ATTN_CHUNK_TOKENS tokens. A whole one can be moved to
 * another rank, or spread, while it is open.
 *
 * The path of a decode call: a step of handles (dp_step_begin) is validated, partitioned over the
 * ranks and given its pages, once. Each layer's tensors (dp_step_layer) are then dispatched to the
 * ranks that have sequences of the step, and to no others; every rank reads its rows in place where
 * they are contiguous, gathers them where they are not, and writes its outputs straight into the
 * result in request order. The last rank to finish completes the call.
 *
 * A step is a transaction: lengths grow when its last layer has completed on every rank, and not
 * before. Ending it earlier, for whatever reason, leaves every sequence at its old length and gives
 * the pages back.
 *
 * Threads: every function here may be called from any thread. Calls on one dp_step, dp_upload or
 * dp_export must not overlap, but for dp_layer_cancel. Completion callbacks run on a rank thread, on the
 * calling thread, or on the one that watches the ranks; they must be short, must not block, and may
 * call back into the engine but for dp_engine_destroy.
 *
 * Errors: see base/status.h. Messages name the request's field and index ("sequences[3]: ..."), in
 * the words of proto/attnd.proto, and never another tenant's business. A call that fails has
 * changed nothing.
 */
#ifndef ATTND_DP_ENGINE_H
#define ATTND_DP_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "kernels/attention.h"

typedef struct dp_engine dp_engine;

/* ------------------------------------------------------------------------------------------- */
/* The engine */

/* What has become of a move of a sequence that set out. */
typedef struct {
    uint64_t sequence;
    uint32_t from, to;  /* ranks; `to` is.. */
    bool spread;        /* ..not looked at where it was to be spread over all */
    bool is_asked_for;  /* by dp_sequence_move; else dp_engine_reap's own */
    bool direct;        /* from device to device */
    uint64_t tokens;    /* the sequence's */
    uint64_t bytes;     /* of keys and values copied to other ranks */
    int64_t took_ns;    /* from when it set out */
    attn_status status; /* ATTN_OK: it lives there now; else it is where it was */
} dp_move_record;

typedef struct {
    attn_geometry geometry;
    const float *k_scales;     /* fp8: see attn_backend_config; borrowed until create returns */
    const float *v_scales;     /* likewise */
    const char *backend;       /* kernels backend kind: "cpu", "reference", .. */
    const char *isa;           /* cpu: see attn_backend_config; NULL: auto */
    uint32_t ranks;            /* 1 .. DP_MAX_RANKS */
    uint32_t workers_per_rank; /* CPU threads a rank, its own included */
    bool pin_cpus;             /* pin rank r's workers to cores r * workers_per_rank .. */
    bool isolated;             /* each rank's backend in a process of its own: kernels/isolated.h */
    uint32_t pages_per_rank;
    uint32_t max_sequences; /* open at once */
    uint32_t max_batch;     /* sequences a step */
    uint64_t max_sequence_tokens;
    uint32_t max_queue;                   /* calls waiting for one rank */
    uint32_t tenants;                     /* tenant numbers are 0 .. tenants - 1 */
    const uint64_t *tenant_max_pages;     /* [tenants] 0: no quota; or NULL. A shared page counts for each holder */
    const uint64_t *tenant_max_sequences; /* [tenants] likewise */
    int64_t step_idle_ns;                 /* an open step without a call for so long is aborted; 0: never */
    int64_t sequence_idle_ns;             /* a sequence not used for so long is closed; 0: never */
    double rebalance_factor;              /* see dp_engine_reap; 0: never, else above 1 */
    uint64_t spread_above_tokens;         /* likewise; 0: never */
    uint64_t direct_move_bytes;           /* as much moves from device to device where that can be; 0: nothing */
    int64_t rank_stall_ns;                /* a rank that has work and does not move for so long is lost; 0: never */
    int64_t rank_restart_ns;              /* a lost rank is restarted after so long, see "Loss" below; 0: never */
    /* NULL, or called for every move that ends after it set out, before dp_move.done; the record is valid during it. */
    void (*moved)(void *context, const dp_move_record *record);
    void *moved_context;
} dp_config;

#define DP_MAX_RANKS 64

/* Creates the ranks, their backends and pools, and starts their threads. ATTN_INVALID_ARGUMENT names the field. */
attn_status dp_engine_create(const dp_config *config, dp_engine **engine);

/*
 * Stops the ranks and frees everything. No call may be in flight, every step, upload, export and move ended. Waits for
 * callbacks to return, and for the engine's own move (see dp_engine_reap), where a rank hangs until that is lost.
 */
void dp_engine_destroy(dp_engine *engine);

typedef enum {
    DP_RANK_SERVING = 1,
    DP_RANK_LOST = 2,
    DP_RANK_RESTARTING = 3, /* lost, and its new backend is being created */
} dp_rank_state;

typedef struct {
    dp_rank_state state;
    uint64_t sequences; /* whole ones placed here, parts of spread ones */
    uint64_t tokens;    /* held, shared pages counted for every sequence */
    uint64_t tokens_in_flight;
    uint64_t pages_total;
    uint64_t pages_free;
    uint32_t queue_depth;
    uint64_t calls;    /* layer calls run since start */
    uint64_t launches; /* backend decodes run since start: fewer than calls where calls were merged */
    uint64_t plans_rejected;
    int64_t busy_ns; /* time in which its backend was at work since start */
    /* Tensor bytes since start that the rank used where they came in, and that it had to gather: see dp_tensor_view. */
    uint64_t bytes_in_place;
    uint64_t bytes_gathered;
    /*
     * Tokens since start, counted for every layer, that sequences of a launch had in common with others of it and that
     * the backend was told it need read once only: forks of one prompt. Nothing with a window or batch_invariant.
     */
    uint64_t prefix_tokens_shared;
    uint64_t losses;                            /* since start */
    uint64_t stalls;                            /* of those, because it hung */
    uint64_t restarts;                          /* since start */
    uint64_t failed_restarts;                   /* since start */
    char last_error[ATTN_STATUS_MESSAGE_BYTES]; /* why it was lost last, or not restarted; "": it never was */
    uint32_t process;                           /* its backend's own, if that has one and serves; else 0 */
    const char *device;                         /* lives as long as the engine */
} dp_rank_info;

uint32_t dp_engine_ranks(const dp_engine *engine);
void dp_engine_rank_info(dp_engine *engine, uint32_t rank, dp_rank_info *info);

typedef struct {
    uint64_t sequences;                      /* open now */
    uint64_t steps;                          /* open now */
    uint64_t steps_committed, steps_aborted; /* since start */
    uint64_t moves, moves_failed;            /* of sequences to other ranks, since start */
    uint64_t moved_tokens, moved_bytes;      /* by the moves that succeeded; bytes of keys and values */
    uint64_t moves_direct;                   /* that went from device to device */
} dp_engine_counts;

void dp_engine_count(dp_engine *engine, dp_engine_counts *counts);

/*
 * Aborts idle steps, closes idle sequences, ends moves that have waited for too long, and evens out the load. To be
 * called about once a second.
 *
 * Evening out: a whole sequence of more than spread_above_tokens tokens is spread over the ranks. Otherwise, where the
 * most loaded rank has more than rebalance_factor times the tokens (held and in flight) of the least loaded one, and
 * 1024 tokens more, the sequence that best evens the two is moved from the one to the other; and so on, until they
 * are even or there is none to move. That is no use of the sequence: it idles on. One sequence moves at a time, none
 * that is in a step or upload, none that is lost, and none whose move would leave the two ranks nearly as uneven the
 * other way round. Ranks that are lost are left alone, and nothing is spread while one is.
 */
void dp_engine_reap(dp_engine *engine);

/* ------------------------------------------------------------------------------------------- */
/* Loss */

/*
 * A rank is lost when its backend says that the device is gone (ATTN_UNAVAILABLE), or when it has work and
 * nothing moves for rank_stall_ns. At once, and whether or not the backend ever comes back:
 *   - calls on it, waiting or at work, end with ATTN_UNAVAILABLE; the other ranks and their calls go on;
 *   - its sequences, and the spread ones, answer ATTN_UNAVAILABLE until they are closed;
 *   - a sequence on its way there stays where it was;
 *   - new sequences go to the other ranks.
 * A restart gives the rank a new backend with an empty pool. New sequences use it again; those from before
 * stay lost. It happens by itself rank_restart_ns after the loss, and after twice that for each loss or failed
 * restart more in a row, up to DP_RESTART_MAX_NS; a rank that has served for DP_RESTART_MAX_NS starts anew.
 *
 * Detained memory. A backend that hangs may still come back to what it was given. So the engine keeps its own
 * memory until then, and a call that ended without its rank says so in `detained`: the caller must then keep the
 * tensors' bytes, the arrays of spans and the sinks as they are, and hand them over with dp_step_keep (or its
 * like for uploads and exports) before it ends the step. Only the call's struct itself is the caller's again.
 */
#define DP_RESTART_MAX_NS INT64_C(60000000000)

/*
 * Begins to restart a lost rank now; dp_engine_rank_info tells when it serves. No harm while that is under way.
 * ATTN_INVALID_ARGUMENT: no such rank. ATTN_FAILED_PRECONDITION: it serves.
 */
attn_status dp_engine_restart_rank(dp_engine *engine, uint32_t rank);

/* What a caller hands over. `release` is called once, on any thread, with nothing of the engine's held. */
typedef struct {
    void (*release)(void *context);
    void *context;
} dp_keep;

#ifndef ATTN_RELEASE
/* Test aids. The rank is lost, as if its device were. */
void dp_engine_fail_rank(dp_engine *engine, uint32_t rank);

/* The rank hangs from its next call of the backend on, until all that hangs on this rank is released. */
void dp_engine_stall_rank(dp_engine *engine, uint32_t rank);
void dp_engine_release_rank(dp_engine *engine, uint32_t rank);

/* The rank's device breaks at its next call of the backend: kernels/faults.h. */
void dp_engine_break_rank(dp_engine *engine, uint32_t rank);
#endif

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

typedef enum {
    DP_LEAST_TOKENS = 0, /* the rank with the fewest tokens held and in flight */
    DP_ROUND_ROBIN = 1,
    DP_EXPLICIT = 2,
    DP_SPREAD = 3,
} dp_placement;

/*
 * Opens `count` empty sequences, all or none: handles[count], and where each lives: ranks[count]
 * (the home rank, if spread). Handles are opaque, never 0, and differ from every handle ever given
 * by this or an earlier process but for chance (64 bits: slot, generation, a secret).
 * `count` 1 .. max_sequences; `rank` is looked at for DP_EXPLICIT only.
 */
attn_status dp_sequences_open(dp_engine *engine, uint32_t tenant, uint32_t count, dp_placement placement, uint32_t rank,
                              uint64_t *handles, uint32_t *ranks);

attn_status dp_sequence_fork(dp_engine *engine, uint32_t tenant, uint64_t parent, uint64_t length, uint64_t *handle,
                             uint32_t *rank);

attn_status dp_sequence_truncate(dp_engine *engine, uint32_t tenant, uint64_t handle, uint64_t length);

attn_status dp_sequences_close(dp_engine *engine, uint32_t tenant, const uint64_t *handles, uint32_t count);

typedef struct {
    uint64_t handle;
    uint64_t length;
    uint32_t rank;
    bool spread;
    uint64_t pages;
    uint64_t shared_pages;
    bool busy; /* in a step that writes, in an upload or on its way to another rank */
} dp_sequence_info;

/* infos[count], in order. */
attn_status dp_sequences_describe(dp_engine *engine, uint32_t tenant, const uint64_t *handles, uint32_t count,
                                  dp_sequence_info *infos);

/* ------------------------------------------------------------------------------------------- */
/* Moves */

typedef struct dp_move dp_move;

/* A sequence's way to another rank. The caller's memory, untouched by the caller from dp_sequence_move to `done`. */
struct dp_move {
    /* in */
    uint64_t sequence;
    uint32_t rank;         /* where it goes; not looked at if.. */
    bool spread;           /* ..it is to be spread over all ranks: its home stays the same */
    int64_t step_until_ns; /* a step or upload that it is in is waited for until this attn_now_ns(); 0: not at all */
    /* Called exactly once if dp_sequence_move returned ATTN_OK, maybe before that. `status` is valid during it. */
    void (*done)(dp_move *move, attn_status status);
    /* out, valid from `done` with success */
    uint64_t tokens; /* the sequence's; 0: it is where it was to go already */
    uint64_t bytes;  /* of keys and values copied to other ranks */
    /* the engine's */
    atomic_bool cancelled;
};

/*
 * Moves a whole sequence: its rows are copied to the new rank, and then, at once, it lives there. The handle stays.
 * Until then the sequence is readable where it was and may be forked, and is busy for all else: a step that is to
 * write to it is refused, or waits (dp_step_request.wait). Read-only steps and exports keep what they began with.
 * Forks of it stay where they are: pages shared with them are copied.
 *
 * A move that fails leaves the sequence as it was and no page behind.
 * ATTN_NOT_FOUND; ATTN_INVALID_ARGUMENT: no such rank; ATTN_FAILED_PRECONDITION: spread already; ATTN_ABORTED: in a
 * step, upload or other move; ATTN_RESOURCE_EXHAUSTED: no pages on the new rank, or a rank's queue is full;
 * ATTN_UNAVAILABLE: a rank that it leaves or goes to is lost, or was on the way; ATTN_CANCELLED.
 */
attn_status dp_sequence_move(dp_engine *engine, uint32_t tenant, dp_move *move);

/*
 * Lets a move end with ATTN_CANCELLED: at once if it waits, else before its next chunk, unless there is none. `done`
 * may come before this returns, and may have come before this is called, as long as the move's memory is there.
 */
void dp_move_cancel(dp_engine *engine, dp_move *move);

/*
 * A call that waits for a move to end. The caller's memory, untouched by the caller from when the engine says that it
 * waits to `ready`, or to a successful dp_wait_withdraw.
 */
typedef struct dp_wait dp_wait;
struct dp_wait {
    /* A move has ended: the call may be tried again, and may be made to wait again. */
    void (*ready)(dp_wait *wait);
    /* the engine's; guarded by its lock */
    bool listed;
    dp_wait *previous, *next;
};

/* Waits no longer: true, and `ready` will not come; false: it has come, or comes now. */
bool dp_wait_withdraw(dp_engine *engine, dp_wait *wait);

/* ------------------------------------------------------------------------------------------- */
/* Tensors */

/* Bytes in one piece. Borrowed. */
typedef struct {
    const void *data;
    size_t size;
} dp_span;

/* A tensor as it came off the wire: `count` pieces that follow one another, `size` bytes in all. */
typedef struct {
    const dp_span *spans;
    uint32_t count;
    size_t size;
} dp_tensor_view;

/*
 * A call's outputs, in request order, in a buffer from the engine's pool. Whoever receives it
 * releases it, from any thread, soon: the pool grows with the results that are out.
 */
typedef struct {
    void *out; /* [tokens, heads_q, head_dim_v] */
    size_t out_size;
    float *lse; /* [tokens, heads_q]; NULL if not asked for */
    size_t lse_size;
} dp_result;

void dp_result_release(dp_result *result);

/* ------------------------------------------------------------------------------------------- */
/* Steps */

typedef struct dp_step dp_step;

typedef struct {
    uint32_t tenant;
    const uint64_t *sequences;     /* [count] distinct */
    const uint32_t *query_lengths; /* [count] 1 .. ATTN_MAX_QUERY_LENGTH; NULL: 1 each */
    uint32_t count;                /* 1 .. max_batch */
    bool read_only;                /* no new rows: layers in any order, nothing to commit, sequences not made busy */
    dp_wait *wait;                 /* for sequences that are on their way to another rank; NULL: the step is refused */
} dp_step_request;

/*
 * Announces a step: checks handles, marks the sequences busy, takes the pages that the new tokens
 * need, partitions the batch. The caller ends it with dp_step_end.
 * ATTN_ABORTED: a sequence is in another step or upload, or on its way to another rank.
 *
 * With request->wait: if the step can not begin because of a sequence on its way, this returns ATTN_OK with a NULL
 * *step, and request->wait->ready is called when a move has ended, maybe before this returns.
 */
attn_status dp_step_begin(dp_engine *engine, const dp_step_request *request, dp_step **step);

/* The step's name on the wire; never 0. For read-only steps too. */
uint64_t dp_step_id(const dp_step *step);

/* Rows of all sequences together. */
uint32_t dp_step_tokens(const dp_step *step);

/* The layer a step expects next; geometry.layers once committed. */
uint32_t dp_step_next_layer(const dp_step *step);

/*
 * Whether a step is about these sequences and query lengths (NULL: 1 each), in this order:
 * ATTN_INVALID_ARGUMENT names the first that differs.
 */
attn_status dp_step_matches(const dp_step *step, const uint64_t *sequences, const uint32_t *query_lengths,
                            uint32_t count);

/*
 * Finds an open, unowned step by name and takes it: until dp_step_put nobody else gets it
 * (ATTN_ABORTED: somebody has it now). ATTN_NOT_FOUND: unknown, ended, idled out, or another tenant's.
 */
attn_status dp_step_take(dp_engine *engine, uint32_t tenant, uint64_t id, dp_step **step);

/* Leaves an open step to be taken again, or to idle out. The caller lets go of it. */
void dp_step_put(dp_step *step);

/*
 * Ends a step and frees it: aborted, unless committed. A layer in flight goes on until its ranks
 * are done with it; its callback still comes, before or after, and the step's memory lives so long.
 */
void dp_step_end(dp_step *step);

typedef struct {
    float scale;         /* 0: 1 / sqrt(head_dim); else finite and > 0 */
    float softcap;       /* 0: off; else finite and > 0 */
    uint32_t window;     /* 0: off */
    const float *sinks;  /* [sink_count]; must live until the call is done */
    uint32_t sink_count; /* 0 or heads_q */
    bool return_lse;
    bool batch_invariant;
} dp_options;

/* Where a layer's time went on one rank, microseconds: RankTiming of the proto. */
typedef struct {
    uint32_t rank;
    uint32_t sequences;
    uint64_t tokens;
    float queue_us, copy_in_us, plan_us, attention_us, combine_us, copy_out_us;
    uint32_t merged_calls;
    float device_us;
} dp_rank_timing;

typedef struct dp_layer_call dp_layer_call;

/* One layer of a step. The caller's memory, untouched by the caller from dp_step_layer to `done`. */
struct dp_layer_call {
    /* in */
    uint32_t layer;
    dp_options options;
    dp_tensor_view queries;    /* [tokens, heads_q, head_dim] */
    dp_tensor_view new_keys;   /* [tokens, heads_kv, head_dim]; empty if the step is read-only */
    dp_tensor_view new_values; /* [tokens, heads_kv, head_dim_v]; likewise */
    int64_t deadline_ns;       /* attn_now_ns() after which work not yet started is dropped; INT64_MAX: none */
    bool device_time;          /* wants dp_rank_timing.device_us, which costs a launch a few microseconds */
    /*
     * Called exactly once if dp_step_layer returned ATTN_OK. `status` is valid during the callback.
     * After it the spans and the call are the caller's again, unless the call is detained.
     */
    void (*done)(dp_layer_call *call, attn_status status);
    /* out, valid from `done` */
    dp_result *result;      /* NULL unless the status is ATTN_OK; the caller releases it */
    bool detained;          /* a lost rank may still use the tensors and sinks: see "Loss", dp_step_keep */
    bool committed;         /* this was the last layer of a step with new rows */
    uint32_t timing_count;  /* ranks that had work */
    dp_rank_timing *timing; /* [timing_count]; lives until the step ends or its next layer */
    /* the engine's */
    void *engine_private[4];
};

/*
 * Starts one layer. A failure here (wrong layer or size, queue full, rank lost) leaves the step
 * where it was; a failure in `done` aborts the step: only dp_step_end is left to call.
 */
attn_status dp_step_layer(dp_step *step, dp_layer_call *call);

/* Drops what has not started yet of the step's layer in flight, if any; its `done` comes with ATTN_CANCELLED. */
void dp_layer_cancel(dp_step *step);

/*
 * For a detained call, from within its `done` on and before dp_step_end; if the step has been ended already, only
 * from within. `keep` is released when no rank uses the step any more.
 */
void dp_step_keep(dp_step *step, dp_keep keep);

/* ------------------------------------------------------------------------------------------- */
/* Uploads of prefilled keys and values */

typedef struct dp_upload dp_upload;

/*
 * Announces `tokens` (1 or more) new tokens at the end of a sequence, marks it busy and takes the
 * pages. The caller ends it with dp_upload_end.
 */
attn_status dp_upload_begin(dp_engine *engine, uint32_t tenant, uint64_t sequence, uint64_t tokens, dp_upload **upload);

typedef struct dp_upload_chunk dp_upload_chunk;

struct dp_upload_chunk {
    uint32_t layer;
    uint64_t token_offset; /* of the upload; each layer's chunks come in order without gaps */
    uint32_t tokens;
    dp_tensor_view keys;   /* [tokens, heads_kv, head_dim] */
    dp_tensor_view values; /* [tokens, heads_kv, head_dim_v] */
    void (*done)(dp_upload_chunk *chunk, attn_status status);
    bool detained; /* out, as in a layer call: the tensors are not the caller's yet, see dp_upload_keep */
};

/* Starts writing one chunk; one at a time for each upload. `done` as for a layer call. */
attn_status dp_upload_write(dp_upload *upload, dp_upload_chunk *chunk);

/* Makes the tokens visible. ATTN_INVALID_ARGUMENT names the first layer that is not complete. */
attn_status dp_upload_commit(dp_upload *upload, uint64_t *length);

/* Ends an upload and frees it: unless committed the sequence is as it was. A chunk in flight is waited for by the
 * engine. */
void dp_upload_end(dp_upload *upload);

/* As dp_step_keep. */
void dp_upload_keep(dp_upload *upload, dp_keep keep);

/* ------------------------------------------------------------------------------------------- */
/* Exports of stored keys and values */

typedef struct dp_export dp_export;

/*
 * Holds `tokens` committed tokens of a sequence from `position` on (0: all from there on) as they are now; the sequence
 * may be in a step or upload, and may change or be closed meanwhile. The caller ends it with dp_export_end.
 * ATTN_NOT_FOUND; ATTN_INVALID_ARGUMENT: beyond the sequence's length; ATTN_UNAVAILABLE: a rank that holds it is lost.
 */
attn_status dp_export_begin(dp_engine *engine, uint32_t tenant, uint64_t sequence, uint64_t position, uint64_t tokens,
                            dp_export **export);

/* Tokens of the range. */
uint64_t dp_export_tokens(const dp_export *export);

typedef struct dp_export_chunk dp_export_chunk;

struct dp_export_chunk {
    uint32_t layer;
    uint64_t token_offset; /* of the range */
    uint32_t tokens;
    void *keys;   /* [tokens, heads_kv, head_dim] of any alignment: written; the caller's until `done`, as `values` */
    void *values; /* [tokens, heads_kv, head_dim_v] */
    void (*done)(dp_export_chunk *chunk, attn_status status);
    bool detained; /* out: `keys` and `values` may still be written to, see dp_export_keep */
};

/* Starts reading one chunk; one at a time for each export. `done` as for a layer call; a failure there is the last. */
attn_status dp_export_read(dp_export *export, dp_export_chunk *chunk);

/* Ends an export and frees it. A chunk in flight is waited for by the engine. */
void dp_export_end(dp_export *export);

/* As dp_step_keep. */
void dp_export_keep(dp_export *export, dp_keep keep);

#endif
