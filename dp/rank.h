/*
 * A rank: a bounded queue of jobs, and the worker that runs them: one backend, one thread.
 *
 * A job is embedded in whatever needs the rank; its kind says how to run it. The worker takes the job
 * at the head of the queue, and with it those further back that may join the launch, and runs
 * them as one, a group. At any time one thread executes: the worker's, or a submitter that found the rank idle
 * and runs its own small job at once, which saves two thread switches. Only the executing
 * thread touches the backend and the worker's scratch memory.
 *
 * Overlap. A group of a kind that has `start` and `complete` is in flight between the two. While it is, and as long as
 * the backend takes more (attn_backend_depth), the worker starts the group behind it, if that is of such a kind: the
 * host gets one launch ready while the device is at another. Groups are completed in the order in which they were
 * started. A job of any other kind begins when nothing is in flight, and runs by itself; so nobody overtakes it.
 *
 * Loss. A rank is lost when its device says so (a run gives ATTN_UNAVAILABLE), when it hangs
 * (dp_rank_fence_stalled) or when a test wants it (dp_rank_fence). The worker is retired at once: jobs
 * that wait are dropped, jobs that run are abandoned, which ends what they are for without waiting
 * for the backend. A retired worker frees its backend and itself when the backend has come back;
 * one that never does is never freed. One with a process of its own comes back: that is killed
 * (attn_backend_give_up). (A submitter that hangs in its own job stays there: small jobs
 * are those of backends that compute on that very thread, and wait for no device.)
 *
 * Restart. dp_rank_start makes another worker beside the queue, dp_rank_install puts it in office with a
 * new epoch. The pages of an epoch are gone with its worker: a job says which epoch's pages it is
 * about, and is refused or dropped in any other.
 *
 *     serving (epoch e) -- loss --> lost -- dp_rank_start --> lost, starting -- dp_rank_install --> serving (epoch e')
 *
 * A rank's memory lives until dp_rank_destroy, and until its last worker is gone.
 *
 * Threads: every function from any thread, unless it says otherwise. Start, install and destroy belong to one thread.
 */
#ifndef ATTND_DP_RANK_H
#define ATTND_DP_RANK_H

#include "dp/engine.h"

typedef struct dp_rank dp_rank;
typedef struct dp_worker dp_worker;
typedef struct dp_job dp_job;

/* Jobs that may run as one launch, at most. */
#define DP_MAX_MERGED 64

/* Groups in flight, at most. */
#define DP_MAX_IN_FLIGHT 2

typedef struct {
    /*
     * Runs jobs[count] as one, on the executing thread. What it finds out it leaves in the jobs.
     * ATTN_UNAVAILABLE: the device is gone, and the rank is lost; its message becomes the rank's last error.
     */
    attn_status (*run)(dp_worker *worker, dp_job *const *jobs, uint32_t count);
    /*
     * A kind that overlaps has these two instead, on the executing thread. `start` has the backend begin with
     * jobs[count], and sets *in_flight; then, after groups that were started before, comes `complete`, whose status is
     * the outcome. Where `start` leaves *in_flight false, it is as if `run` had returned its status.
     */
    attn_status (*start)(dp_worker *worker, dp_job *const *jobs, uint32_t count, bool *in_flight);
    attn_status (*complete)(dp_worker *worker, dp_job *const *jobs, uint32_t count);
    /* Called once for each job that has run, after the rank is free for others. The job may be gone afterwards. */
    void (*finish)(dp_job *job);
    /* Called instead of both if the job will not run. */
    void (*drop)(dp_job *job, attn_status status);
    /*
     * Called instead of `finish` if the rank is lost while the job runs: what the job is for ends now, with `status`.
     * The run may go on to use the job's memory, and all that it leads to, until..
     */
    void (*abandon)(dp_job *job, attn_status status);
    /* ..this, which is called once after `abandon` when the run (or `complete`) has come back; never if it hangs for
     * ever. */
    void (*reclaim)(dp_job *job);
    /* May `job` run in one launch with `first`, of the same kind? NULL: never. */
    bool (*joins)(const dp_job *first, const dp_job *job);
} dp_job_kind;

struct dp_job {
    const dp_job_kind *kind;
    uint32_t weight; /* sequences: those of one launch are max_weight at most, unless the first has more */
    uint32_t epoch;  /* of the rank, in which the job's pages were taken */
    bool small;      /* worth running on the submitting thread */
    dp_job *next;    /* guarded by the rank's lock, as is.. */
    bool waiting;    /* ..this: it is in the queue */
};

typedef struct {
    attn_backend_config backend; /* what it points to is copied */
    uint32_t index;
    uint32_t max_queue;  /* jobs waiting */
    uint32_t max_weight; /* of a launch */
} dp_rank_config;

/* Makes a rank, and starts its first worker, so that ranks create their backends at the same time. */
attn_status dp_rank_create(const dp_rank_config *config, dp_rank **rank);

/*
 * To be called once after that: waits until the worker has created its backend and is in office, epoch 1. Fails as
 * attn_backend_create does; the rank is then to be destroyed.
 */
attn_status dp_rank_await(dp_rank *rank);

/*
 * Stops the worker in office, and the one that is starting, and waits until all workers, retired ones too, have come
 * out of their jobs' callbacks. Runs that were abandoned are left alone: all they still do is to reclaim. No job may be
 * waiting; groups in flight are completed. Ranks whose workers submit jobs to each other are all stopped before one is
 * destroyed: a worker may still be on its way out of dp_rank_submit when the job is done.
 */
void dp_rank_stop(dp_rank *rank);

/* Stops the rank, unless that is done, and lets go of it. NULL is fine. */
void dp_rank_destroy(dp_rank *rank);

/* ------------------------------------------------------------------------------------------- */
/* Jobs */

/*
 * Reserves a place in the queue for one job about pages of `epoch`, to be submitted or unreserved.
 * ATTN_RESOURCE_EXHAUSTED: the queue is full. ATTN_UNAVAILABLE: the rank is lost, or was since that epoch.
 */
attn_status dp_rank_reserve(dp_rank *rank, uint32_t epoch);
void dp_rank_unreserve(dp_rank *rank);

/* Hands over a job, for which a place was reserved. Its `finish`, `drop` or `abandon` may come before this returns. */
void dp_rank_submit(dp_rank *rank, dp_job *job);

/* Takes a job back if it is still waiting; nothing of its kind will be called then. */
bool dp_rank_withdraw(dp_rank *rank, dp_job *job);

/* ------------------------------------------------------------------------------------------- */
/* Loss and restart */

/* What calls on a lost rank end with. */
attn_status dp_rank_lost_status(uint32_t index);

/* Gives the rank up, for the reason in `why`. A lost rank stays as it is. */
void dp_rank_fence(dp_rank *rank, attn_status why);

/* Gives the rank up if it has had work, and nothing has moved, for longer than `stall_ns`. True: it was. */
bool dp_rank_fence_stalled(dp_rank *rank, int64_t now, int64_t stall_ns);

typedef enum {
    DP_START_NONE,
    DP_START_RUNNING, /* the new worker is creating its backend */
    DP_START_READY,   /* to be installed */
    DP_START_FAILED,  /* dp_rank_last_error says why; told once, then DP_START_NONE */
} dp_start_state;

/* Starts a new worker for a lost rank that has none. ATTN_RESOURCE_EXHAUSTED: no memory or thread. */
attn_status dp_rank_start(dp_rank *rank);

/* How far that is. For the thread that started it. */
dp_start_state dp_rank_look_at_start(dp_rank *rank);

/* DP_START_READY: the rank serves again, from here on with pages of `epoch`, above all earlier ones. */
void dp_rank_install(dp_rank *rank, uint32_t epoch);

#ifndef ATTN_RELEASE
/* Test aid: the worker in office hangs from the next call of its backend on, but for those that complete what is in
 * flight, until the rank is released. */
void dp_rank_stall(dp_rank *rank);

/* Lets go of all workers that hang so. */
void dp_rank_release(dp_rank *rank);

/* Test aid: the device of the worker in office breaks right before the next call of its backend. */
void dp_rank_break(dp_rank *rank);
#endif

/* ------------------------------------------------------------------------------------------- */
/* Looking at it */

bool dp_rank_lost(const dp_rank *rank);
uint32_t dp_rank_queue_depth(const dp_rank *rank);

/* Since creation. */
typedef struct {
    bool lost;
    bool starting; /* a new worker is creating its backend, or about to be installed */
    uint64_t losses;
    uint64_t stalls; /* losses because the rank hung */
    uint64_t restarts;
    uint64_t failed_restarts;
    uint64_t plans_rejected;
    uint32_t process;             /* attn_backend_process of the worker in office; 0: or there is none */
    attn_saved_status last_error; /* why it was lost last, or why its last start failed; ATTN_OK: never */
} dp_rank_record;

void dp_rank_read_record(dp_rank *rank, dp_rank_record *record);

/* Of the worker in office, right after dp_rank_await. */
const char *dp_rank_device(const dp_rank *rank);
uint64_t dp_rank_small_bytes(const dp_rank *rank);
bool dp_rank_overlaps(const dp_rank *rank); /* more than one group is in flight at a time, if there are as many */

/* ------------------------------------------------------------------------------------------- */
/* For `run`, `start` and `complete` only */

/* Memory that a worker's launches use again and again. */
typedef struct {
    void *launch; /* what `start` leaves for `complete` */
    size_t launch_size;
    void *arrays; /* pointers a sequence, and merged batches' tables */
    size_t arrays_size;
    void *staging; /* rows gathered */
    size_t staging_size;
} dp_scratch;

uint32_t dp_worker_rank(const dp_worker *worker);

/* Of the group that is called for: each group in flight has its own, from `start` to `complete`. */
dp_scratch *dp_worker_scratch(dp_worker *worker);

/* The rank has been lost since: the jobs are abandoned, and nothing that is done for them matters any more. */
bool dp_worker_retired(const dp_worker *worker);

/* The backend, to be called now. In test builds a stalled rank hangs here. */
attn_backend *dp_worker_backend(dp_worker *worker);

#endif
