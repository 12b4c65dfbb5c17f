/*
 * The engine's own state, shared by the modules that implement dp/engine.h and by nothing else.
 *
 * Locks: `lock` guards the tables (sequences, pages, loads, quotas, steps) for short critical sections; it
 * is never held while a backend works or a callback runs. A layer call takes it only to commit or to
 * abort. A rank's own lock is never held together with it.
 */
#ifndef ATTND_DP_STATE_H
#define ATTND_DP_STATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/clock.h"
#include "dp/collective.h"
#include "dp/engine.h"
#include "dp/partition.h"
#include "dp/rank.h"
#include "dp/results.h"
#include "dp/sequences.h"
#include "dp/watchdog.h"

/* ------------------------------------------------------------------------------------------- */
/* Ranks */

/* What a rank has done since start. Written by its executing thread, read by any. */
typedef struct {
    atomic_uint_fast64_t calls;
    atomic_uint_fast64_t launches;
    atomic_uint_fast64_t busy_ns;
    atomic_int_fast64_t busy_until_ns; /* what was before is in busy_ns */
    atomic_uint_fast64_t bytes_in_place;
    atomic_uint_fast64_t bytes_gathered;
    atomic_uint_fast64_t prefix_tokens_shared;
} dp_rank_counters;

typedef struct {
    dp_rank *rank;
    dp_rank_counters counters;
    char *device;
} dp_engine_rank;

/* ------------------------------------------------------------------------------------------- */
/* Steps */

/*
 * Where a step is. One layer is in flight at most. From the states before the line a step goes on; the
 * others are final. Whoever moves it there (a compare-and-swap) gives back or commits what it holds.
 */
typedef enum {
    DP_STEP_OPEN,
    DP_STEP_RUNNING,       /* a layer is in flight */
    DP_STEP_RUNNING_ENDED, /* ..and the step has been ended meanwhile */
    /* --- */
    DP_STEP_COMMITTED,
    DP_STEP_ABORTED,
} dp_step_state;

/*
 * One rank's part of the layer in flight. Owned by the step's owner, then by the rank, until it has arrived. If the
 * rank is lost meanwhile the part arrives without it (dp_job_kind.abandon): it and the step's memory are then the
 * abandoned run's too, by a reference to the step, and nobody looks any more at what that run finds out.
 */
typedef struct {
    dp_job job; /* first: a job is its part */
    dp_step *step;
    dp_batch *batch;
    bool alone; /* it is much: not to be merged with others into a launch */
    bool failed;
    attn_saved_status failure;
} dp_layer_part;

struct dp_step {
    dp_engine *engine;
    uint32_t slot;
    /* Guarded by the engine's lock. */
    uint32_t generation;
    bool registered; /* can be found by its name */
    bool owned;      /* taken by a caller */
    uint32_t next_free;
    /* Constant while the step is there. */
    uint64_t id;
    uint32_t tenant;
    bool read_only;
    uint32_t count;
    uint32_t tokens;
    dp_sequence **sequences; /* [count], as the next two; there is room for `capacity` */
    uint64_t *handles;
    uint32_t *query_lengths;
    uint32_t capacity;
    dp_partition partition;
    /* Any thread. */
    atomic_int state;
    atomic_uint references; /* the open step; each layer in flight; whoever cancels; runs abandoned */
    atomic_int_fast64_t used_ns;
    atomic_bool cancelled; /* of the layer in flight, as are all below */
    atomic_bool failed;
    atomic_bool detained; /* a part of it was abandoned: see dp_layer_call.detained */
    dp_gather gather;
    /* Owned by the caller; while a layer is in flight constant. */
    uint32_t next_layer;
    dp_layer_call *call;
    dp_layer_call input; /* a copy of it: what ranks look at, also when the call has come back without them */
    dp_keep keep;        /* until the last reference is gone */
    dp_result *result;
    dp_result *partials; /* memory of the spread sequences' partial results, or NULL */
    float scale;
    int64_t admitted_ns;
    attn_saved_status failure; /* written by the first to set `failed` */
    dp_layer_part *parts;      /* [ranks], one a batch of the partition */
    dp_rank_timing *timing;    /* [ranks] likewise */
};

/* Steps by slot. All of it guarded by the engine's lock. */
typedef struct {
    dp_handle_key key;
    dp_step **slots; /* [count]; steps are kept for use again */
    uint32_t count;
    uint32_t capacity;
    uint32_t first_free; /* slot; UINT32_MAX: none */
    uint64_t open;
    uint64_t committed;
    uint64_t aborted;
} dp_steps;

/* ------------------------------------------------------------------------------------------- */
/* Moves */

typedef struct dp_travel dp_travel; /* a move under way: move.c */

/* Guarded by the engine's lock, but for the hint, and for the engine's own move while that is under way. */
typedef struct {
    dp_travel *waiting;      /* for their sequence to be busy no more; first come, first moved */
    atomic_bool any_waiting; /* a hint: is worth taking the lock for */
    dp_wait *waits;          /* calls that wait for a move to end */
    uint64_t succeeded, failed;
    uint64_t tokens, bytes; /* of those that succeeded */
    bool balancing;         /* `balance` is under way */
    bool closing;           /* no more balancing */
    pthread_cond_t balanced;
    dp_move balance; /* the engine's own move */
} dp_moves;

void dp_moves_init(dp_moves *moves);

/* Cancels the engine's own move, and waits for its end. */
void dp_moves_fini(dp_engine *engine);

/*
 * Starts the waiting moves whose sequence is busy no more, and ends those that have waited for long enough. Without the
 * lock, after sequences have ceased to be busy, and now and then.
 */
void dp_moves_resume(dp_engine *engine);

/* Lets a call wait for a move to end. With the lock held, while one is under way. */
void dp_wait_begin(dp_engine *engine, dp_wait *wait);

/* Starts the move that is most worth it, if one is, unless one of the engine's own is under way: rebalance.c. */
void dp_engine_balance(dp_engine *engine);

/* An export of `tokens` of a sequence from `first` on. With the lock held. ATTN_RESOURCE_EXHAUSTED: no memory. */
attn_status dp_export_hold(dp_engine *engine, const dp_sequence *sequence, uint64_t first, uint64_t tokens,
                           dp_export **export);

/* An upload of `tokens` from position 0 on into pages that nobody else writes to and that the caller keeps. */
attn_status dp_upload_into(dp_engine *engine, const dp_place *place, uint64_t tokens, dp_upload **upload);

/* As dp_upload_write, unchecked: chunks in any order, with gaps. */
attn_status dp_upload_write_anywhere(dp_upload *upload, dp_upload_chunk *chunk);

/* ------------------------------------------------------------------------------------------- */

struct dp_engine {
    dp_config config;       /* without its pointers */
    atomic_uint references; /* until dp_engine_destroy; runs abandoned */
    char backend[32];
    char isa[32];
    size_t query_row_bytes, key_row_bytes, value_row_bytes, out_row_bytes;
    uint64_t small_bytes;  /* a layer that reads no more may run on the submitting thread */
    uint64_t alone_bytes;  /* a part of a layer that reads as much, prefixes unshared, is not merged with others */
    dp_engine_rank *ranks; /* [config.ranks] */
    dp_results *results;
    dp_watchdog *watchdog;
    pthread_mutex_t lock;
    dp_sequences sequences;  /* guarded by lock */
    dp_steps steps;          /* guarded by lock */
    dp_moves moves;          /* guarded by lock */
    uint32_t turn;           /* of round-robin placement; guarded by lock */
    atomic_bool direct_busy; /* a direct transfer is under way: dp/direct.h */
    atomic_uint_fast64_t moves_direct;
};

attn_status dp_steps_init(dp_steps *steps);
void dp_steps_fini(dp_steps *steps);

/* Aborts the steps that have been idle since before `before`. */
void dp_steps_reap(dp_engine *engine, int64_t before);

/* An abandoned run keeps the engine's memory, also beyond dp_engine_destroy, until it lets go of it. */
void dp_engine_hold(dp_engine *engine);
void dp_engine_let_go(dp_engine *engine);

/* Calls keep.release, if there is one, and forgets it. Without the lock. */
void dp_keep_release(dp_keep *keep);

/* Copies which ranks are lost, and which have no page free, into the table's loads. With the lock held. */
void dp_engine_note_ranks(dp_engine *engine);

/* The kind of a layer part's job; see layer.c. */
extern const dp_job_kind dp_layer_job_kind;

/* Completes one part of a layer: the last one completes the layer. */
void dp_layer_part_finish(dp_layer_part *part);

/* dp_job_kind.abandon and .reclaim of a part. */
void dp_layer_part_abandon(dp_layer_part *part, attn_status status);
void dp_layer_part_reclaim(dp_layer_part *part);

/* Marks a part as failed. */
void dp_layer_part_fail(dp_layer_part *part, attn_status status);

/* Memory of at least `size` bytes in `*memory`, kept for next time; false: there is none. What was in it is lost. */
bool dp_scratch_reserve(void **memory, size_t *held, size_t size);

static inline void dp_count(atomic_uint_fast64_t *counter, uint64_t amount) {
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

#endif
