/*
 * A rank: one backend, one worker thread, one bounded queue of jobs.
 *
 * A job is embedded in whatever needs the rank; its kind says how to run it. The rank takes the job
 * at the head of its queue, and with it those further back that may join the launch, and runs
 * them as one. At any time one thread executes: the worker, or a submitter that found the rank idle
 * and runs its own small job at once, which saves two thread switches. Only the executing
 * thread touches the backend and the rank's scratch memory.
 *
 * A lost rank stays lost: jobs waiting are dropped, and so are those that come later.
 *
 * Threads: every function from any thread, unless it says otherwise.
 */
#ifndef ATTND_DP_RANK_H
#define ATTND_DP_RANK_H

#include "dp/engine.h"

typedef struct dp_rank dp_rank;
typedef struct dp_job dp_job;

/* Jobs that may run as one launch, at most. */
#define DP_MAX_MERGED 64

typedef struct {
    /* Runs jobs[count] as one, on the executing thread. What it finds out it leaves in the jobs. */
    void (*run)(dp_rank *rank, dp_job *const *jobs, uint32_t count);
    /* Called once for each job that has run, after the rank is free for others. The job may be gone afterwards. */
    void (*finish)(dp_job *job);
    /* Called instead of both if the job will not run. */
    void (*drop)(dp_job *job, attn_status status);
    /* May `job` run in one launch with `first`, of the same kind? NULL: never. */
    bool (*joins)(const dp_job *first, const dp_job *job);
} dp_job_kind;

struct dp_job {
    const dp_job_kind *kind;
    uint32_t weight; /* sequences: those of one launch are max_weight at most, unless the first has more */
    bool small;      /* worth running on the submitting thread */
    dp_job *next;    /* guarded by the rank's lock, as is.. */
    bool waiting;    /* ..this: it is in the queue */
};

typedef struct {
    attn_backend_config backend;
    uint32_t index;
    uint32_t max_queue;  /* jobs waiting */
    uint32_t max_weight; /* of a launch */
} dp_rank_config;

/* Starts the worker, which creates the backend. Fails as attn_backend_create does. */
attn_status dp_rank_create(const dp_rank_config *config, dp_rank **rank);

/*
 * Stops the worker, which frees the backend. No job may be there. Ranks whose workers submit jobs to each other are
 * all stopped before one is destroyed: a worker may still be on its way out of dp_rank_submit when the job is done.
 */
void dp_rank_stop(dp_rank *rank);

/* Stops the rank, unless that is done, and frees it. NULL is fine. */
void dp_rank_destroy(dp_rank *rank);

/*
 * Reserves a place in the queue for one job, to be submitted or unreserved. ATTN_RESOURCE_EXHAUSTED:
 * the queue is full. ATTN_UNAVAILABLE: the rank is lost.
 */
attn_status dp_rank_reserve(dp_rank *rank);
void dp_rank_unreserve(dp_rank *rank);

/* Hands over a job, for which a place was reserved. Its `finish` or `drop` may come before this returns. */
void dp_rank_submit(dp_rank *rank, dp_job *job);

/* Takes a job back if it is still waiting; neither `finish` nor `drop` will come then. */
bool dp_rank_withdraw(dp_rank *rank, dp_job *job);

/* Marks the rank lost and drops what waits. */
void dp_rank_fail(dp_rank *rank);

bool dp_rank_lost(const dp_rank *rank);
uint32_t dp_rank_queue_depth(const dp_rank *rank);

/* For `run` only. */
uint32_t dp_rank_index(const dp_rank *rank);
attn_backend *dp_rank_backend(dp_rank *rank);

#endif
