#define _GNU_SOURCE
#include "dp/rank.h"

#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/pause.h"
#include "kernels/faults.h"
#include "kernels/isolated.h"
#include "kernels/pipeline.h"

/*
 * How long the worker looks for a next job before it sleeps: less than a wake-up costs. One with a device, whose call
 * may be over before that of another rank on which the next layer waits, looks as long as such calls are apart.
 */
#define SPIN_NS            20000
#define SPIN_FOR_DEVICE_NS 200000

#define NOT_SERVING 0 /* no epoch has this number */

/* Jobs that run as one. Set when they are taken, and then constant until they have ended. */
typedef struct {
    dp_job *jobs[DP_MAX_MERGED];
    uint32_t count;
    dp_scratch scratch;    /* the executing thread's */
    bool abandoned;        /* guarded by the rank's lock: the rank was lost before they had ended; for good */
    atomic_uint unsettled; /* abandoned: the run, until it comes back, and who abandons, until that is done */
} job_group;

/* Guarded by the rank's lock unless it says otherwise. Freed with the last reference. */
struct dp_worker {
    dp_rank *rank;           /* referenced; constant */
    pthread_t thread;        /* joined by dp_rank_destroy, or detached before */
    atomic_uint references;  /* its thread; the rank while it is starting; a submitter that executes; who abandons */
    attn_backend *backend;   /* the executing thread's, once started */
    uint32_t depth;          /* groups that the backend takes; constant, once started */
    bool started;            /* with.. */
    attn_saved_status start; /* ..this outcome */
    job_group groups[DP_MAX_IN_FLIGHT];
    uint32_t oldest;        /* group; from it on there are.. */
    uint32_t in_flight;     /* ..so many that have begun and not ended */
    bool lent;              /* ..and that one is a submitter's, whose thread executes */
    job_group *called_for;  /* the executing thread's */
    bool sleeping;          /* its thread waits for `wake` */
    bool calling_back;      /* its thread ran a group, and calls what that is for */
    atomic_bool retired;    /* the rank was lost; read by any thread */
    uint64_t stalled_until; /* test aid: hangs before calls of the backend until the rank's `releases` are as many */
    bool breaks;            /* test aid: its device is to break before the next call of the backend */
};

struct dp_rank {
    dp_rank_config config;  /* with its own copies; constant, as is.. */
    bool spins;             /* ..this: there is another CPU to submit from meanwhile */
    atomic_uint references; /* until dp_rank_destroy; of every worker */
    atomic_uint serving;    /* the epoch; NOT_SERVING while lost */
    atomic_uint depth;      /* places reserved, and jobs waiting */
    atomic_uint waiting;    /* jobs waiting; changed with the lock held */
    pthread_mutex_t lock;   /* guards all below, and the workers */
    pthread_cond_t wake;    /* workers' threads: a job came, nobody executes any more, or one is retired or installed */
    pthread_cond_t started_or_not;
    pthread_cond_t called_back; /* no worker is calling back any more */
    uint32_t calling_back;      /* workers, retired ones too */
    pthread_cond_t released;    /* test aid: `releases` has grown */
    uint64_t releases;
    dp_job *head, *tail;
    dp_worker *worker;   /* in office; NULL while lost */
    dp_worker *starting; /* NULL: none */
    int64_t moved_ns;    /* when a job was last begun or ended, or came to an idle rank */
    dp_rank_record record;
};

/* Set where a job must not run on the submitting thread: in workers, and inside such a run. */
static _Thread_local bool executes_already;

/* ------------------------------------------------------------------------------------------- */
/* References */

static void config_free(dp_rank_config *config) {
    free((void *)(uintptr_t)config->backend.kind);
    free((void *)(uintptr_t)config->backend.isa);
    free((void *)(uintptr_t)config->backend.cpus);
    free((void *)(uintptr_t)config->backend.k_scales);
    free((void *)(uintptr_t)config->backend.v_scales);
}

static void rank_unreference(dp_rank *rank) {
    if (atomic_fetch_sub_explicit(&rank->references, 1, memory_order_acq_rel) != 1) return;
    config_free(&rank->config);
    pthread_cond_destroy(&rank->released);
    pthread_cond_destroy(&rank->wake);
    pthread_cond_destroy(&rank->started_or_not);
    pthread_cond_destroy(&rank->called_back);
    pthread_mutex_destroy(&rank->lock);
    free(rank);
}

/* The last one is a thread that has driven the backend: nobody else does any more. */
static void worker_unreference(dp_worker *worker) {
    if (atomic_fetch_sub_explicit(&worker->references, 1, memory_order_acq_rel) != 1) return;
    attn_backend_destroy(worker->backend);
    for (uint32_t i = 0; i < DP_MAX_IN_FLIGHT; i++) {
        free(worker->groups[i].scratch.launch);
        free(worker->groups[i].scratch.arrays);
        free(worker->groups[i].scratch.staging);
    }
    rank_unreference(worker->rank);
    free(worker);
}

/* ------------------------------------------------------------------------------------------- */
/* The queue: with the lock held */

static void queue_push(dp_rank *rank, dp_job *job) {
    job->next = NULL;
    job->waiting = true;
    if (rank->tail == NULL)
        rank->head = job;
    else
        rank->tail->next = job;
    rank->tail = job;
    atomic_fetch_add_explicit(&rank->waiting, 1, memory_order_relaxed);
}

/* Unlinks the job after `before`, or the head if that is NULL. */
static dp_job *queue_unlink(dp_rank *rank, dp_job *before) {
    dp_job *job = before == NULL ? rank->head : before->next;
    if (before == NULL)
        rank->head = job->next;
    else
        before->next = job->next;
    if (rank->tail == job) rank->tail = before;
    job->waiting = false;
    atomic_fetch_sub_explicit(&rank->waiting, 1, memory_order_relaxed);
    atomic_fetch_sub_explicit(&rank->depth, 1, memory_order_relaxed);
    return job;
}

/* Takes the head, and all that may join it. */
static void queue_take_group(dp_rank *rank, job_group *group) {
    dp_job *first = queue_unlink(rank, NULL);
    uint32_t count = 0;
    uint32_t weight = first->weight;
    group->jobs[count++] = first;
    for (dp_job *before = NULL, *each = rank->head;
         first->kind->joins != NULL && each != NULL && count < DP_MAX_MERGED;) {
        dp_job *next = each->next;
        if (each->kind == first->kind && weight + each->weight <= rank->config.max_weight &&
            first->kind->joins(first, each)) {
            weight += each->weight;
            group->jobs[count++] = queue_unlink(rank, before);
        } else {
            before = each;
        }
        each = next;
    }
    group->count = count;
}

/* ------------------------------------------------------------------------------------------- */
/* Loss */

attn_status dp_rank_lost_status(uint32_t index) {
    return attn_error(
        ATTN_UNAVAILABLE,
        "rank %u is lost, with the sequences on it: close them, open others and append their tokens again", index);
}

/* What is left to do for a loss once the lock is released. */
typedef struct {
    dp_worker *abandoned; /* referenced; NULL: it had nothing in flight */
    dp_job *dropped;
} fallout;

/* With the lock held and a worker in office, which is retired. */
static fallout lose(dp_rank *rank, attn_status why) {
    dp_worker *worker = rank->worker;
    fallout left = {0};
    attn_status_save(&rank->record.last_error, why);
    rank->record.losses++;
    rank->record.plans_rejected += attn_backend_plans_rejected(worker->backend);
    attn_backend_give_up(worker->backend);
    rank->worker = NULL;
    atomic_store(&rank->serving, NOT_SERVING);
    atomic_store(&worker->retired, true);
    for (uint32_t i = 0; i < worker->in_flight; i++) {
        job_group *group = &worker->groups[(worker->oldest + i) % DP_MAX_IN_FLIGHT];
        group->abandoned = true;
        atomic_store(&group->unsettled, 2);
    }
    if (worker->in_flight > 0) {
        atomic_fetch_add(&worker->references, 1);
        left.abandoned = worker;
    }
    while (rank->head != NULL) {
        dp_job *job = queue_unlink(rank, NULL);
        job->next = left.dropped;
        left.dropped = job;
    }
    pthread_detach(worker->thread);
    pthread_cond_broadcast(&rank->wake);
    return left;
}

/* Of the two who have to do with abandoned jobs, the one that is done last reclaims them. */
static void settle_abandoned(job_group *group) {
    if (atomic_fetch_sub(&group->unsettled, 1) != 1) return;
    for (uint32_t i = 0; i < group->count; i++)
        group->jobs[i]->kind->reclaim(group->jobs[i]);
}

static void abandon(job_group *group, attn_status status) {
    for (uint32_t i = 0; i < group->count; i++)
        group->jobs[i]->kind->abandon(group->jobs[i], status);
    settle_abandoned(group);
}

/* The callbacks of a loss start no job on this thread: it may be the one that watches the ranks. */
static void clear_up(dp_rank *rank, fallout left) {
    uint32_t index = rank->config.index;
    bool executed_already = executes_already;
    executes_already = true;
    if (left.abandoned != NULL) {
        for (uint32_t i = 0; i < DP_MAX_IN_FLIGHT; i++) {
            if (left.abandoned->groups[i].abandoned) abandon(&left.abandoned->groups[i], dp_rank_lost_status(index));
        }
        worker_unreference(left.abandoned);
    }
    while (left.dropped != NULL) {
        dp_job *job = left.dropped;
        left.dropped = job->next;
        job->kind->drop(job, dp_rank_lost_status(index));
    }
    executes_already = executed_already;
}

void dp_rank_fence(dp_rank *rank, attn_status why) {
    fallout left = {0};
    pthread_mutex_lock(&rank->lock);
    if (rank->worker != NULL) left = lose(rank, why);
    pthread_mutex_unlock(&rank->lock);
    clear_up(rank, left);
}

/* With the lock held: for how long there has been work and nothing has moved. */
static int64_t stalled_for(const dp_rank *rank, int64_t now) {
    bool has_work = rank->worker != NULL && (rank->worker->in_flight > 0 || rank->head != NULL);
    return has_work ? now - rank->moved_ns : 0;
}

bool dp_rank_fence_stalled(dp_rank *rank, int64_t now, int64_t stall_ns) {
    fallout left = {0};
    pthread_mutex_lock(&rank->lock);
    int64_t stalled_ns = stalled_for(rank, now);
    bool stalled = stalled_ns > stall_ns;
    if (stalled) {
        rank->record.stalls++;
        left = lose(rank, attn_error(ATTN_UNAVAILABLE, "stalled: it has had work, and nothing has moved for %lld ms",
                                     (long long)(stalled_ns / 1000000)));
    }
    pthread_mutex_unlock(&rank->lock);
    clear_up(rank, left);
    return stalled;
}

/* ------------------------------------------------------------------------------------------- */
/* Executing */

/* With the lock held: the worker's next group, in flight from now on, for the caller to fill. */
static job_group *begin_group(dp_rank *rank, dp_worker *worker) {
    rank->moved_ns = attn_now_ns();
    return &worker->groups[(worker->oldest + worker->in_flight++) % DP_MAX_IN_FLIGHT];
}

/* With the lock held. A submitter's callbacks are part of its call. */
static void begin_calling_back(dp_worker *worker) {
    if (!pthread_equal(pthread_self(), worker->thread)) return;
    worker->calling_back = true;
    worker->rank->calling_back++;
}

/* With the lock held, on the worker's thread. */
static void end_calling_back(dp_worker *worker) {
    if (!worker->calling_back) return;
    worker->calling_back = false;
    if (--worker->rank->calling_back == 0) pthread_cond_signal(&worker->rank->called_back);
}

/* The group is the oldest, or the youngest that did not get off. False: its jobs were abandoned while they ran. */
static bool end_group(dp_worker *worker, job_group *group, attn_status outcome, fallout *left) {
    dp_rank *rank = worker->rank;
    pthread_mutex_lock(&rank->lock);
    if (group == &worker->groups[worker->oldest]) worker->oldest = (worker->oldest + 1) % DP_MAX_IN_FLIGHT;
    worker->in_flight--;
    worker->lent = false;
    bool in_office = rank->worker == worker;
    bool wake = false;
    if (in_office) {
        rank->moved_ns = attn_now_ns();
        if (outcome.code == ATTN_UNAVAILABLE) *left = lose(rank, outcome);
        wake = worker->sleeping && rank->head != NULL;
    }
    bool abandoned = group->abandoned;
    if (!abandoned) begin_calling_back(worker);
    pthread_mutex_unlock(&rank->lock);
    if (wake) pthread_cond_broadcast(&rank->wake);
    return !abandoned;
}

/* The group's place may be another's as soon as it has ended. */
static void conclude(dp_worker *worker, job_group *group, attn_status outcome) {
    fallout left = {0};
    dp_job *jobs[DP_MAX_MERGED];
    uint32_t count = group->count;
    memcpy(jobs, group->jobs, count * sizeof *jobs);
    if (end_group(worker, group, outcome, &left)) {
        for (uint32_t i = 0; i < count; i++)
            jobs[i]->kind->finish(jobs[i]);
    } else {
        settle_abandoned(group);
    }
    clear_up(worker->rank, left);
}

/* Runs the group, or starts it. True: it is to be completed. */
static bool run_or_start(dp_worker *worker, job_group *group) {
    const dp_job_kind *kind = group->jobs[0]->kind;
    bool in_flight = false;
    worker->called_for = group;
    attn_status outcome = kind->start != NULL ? kind->start(worker, group->jobs, group->count, &in_flight)
                                              : kind->run(worker, group->jobs, group->count);
    if (!in_flight) conclude(worker, group, outcome);
    return in_flight;
}

static void complete(dp_worker *worker, job_group *group) {
    worker->called_for = group;
    conclude(worker, group, group->jobs[0]->kind->complete(worker, group->jobs, group->count));
}

/* ------------------------------------------------------------------------------------------- */
/* The worker */

static bool has_waiting(const dp_rank *rank) { return atomic_load_explicit(&rank->waiting, memory_order_relaxed) > 0; }

/* A job that comes right after another is picked up without a wake-up. */
static void spin_for_work(const dp_worker *worker) {
    const dp_rank *rank = worker->rank;
    if (!rank->spins) return;
    int64_t end = attn_now_ns() + (worker->depth > 1 ? SPIN_FOR_DEVICE_NS : SPIN_NS);
    do {
        for (int i = 0; i < 16; i++) {
            if (has_waiting(rank)) return;
            attn_pause();
        }
    } while (attn_now_ns() < end);
}

/*
 * With a group in flight and room for another: looks for a job to come and for the group to end, as long as that takes.
 * The thread would not sleep if it waited for the device either. True: the group has ended.
 */
static bool spin_for_work_or_end(dp_worker *worker) {
    const dp_rank *rank = worker->rank;
    while (!has_waiting(rank) && !dp_worker_retired(worker)) {
        if (attn_backend_has_ended(worker->backend)) return true;
        if (!rank->spins) sched_yield();
        for (int i = 0; i < 16 && !has_waiting(rank); i++)
            attn_pause();
    }
    return false;
}

/* With the lock held: may the head of the queue begin on the worker's thread? */
static bool may_begin(const dp_rank *rank, const dp_worker *worker) {
    if (rank->worker != worker || rank->head == NULL || worker->lent) return false;
    return worker->in_flight == 0 || (worker->in_flight < worker->depth && rank->head->kind->start != NULL);
}

typedef enum { WORKER_BEGINS, WORKER_COMPLETES, WORKER_LOOKS_ABOUT, WORKER_RETIRES } worker_act;

/* With the lock held: what the worker's thread does now, that has `started` groups in flight. It waits only with none.
 */
static worker_act next_act(dp_worker *worker, uint32_t started) {
    dp_rank *rank = worker->rank;
    while (!may_begin(rank, worker)) {
        bool retired = atomic_load(&worker->retired);
        if (started == 0 && retired) return WORKER_RETIRES;
        if (started > 0) {
            bool is_blocked = retired || started == worker->depth || rank->head != NULL;
            return is_blocked ? WORKER_COMPLETES : WORKER_LOOKS_ABOUT;
        }
        worker->sleeping = true;
        pthread_cond_wait(&rank->wake, &rank->lock);
        worker->sleeping = false;
    }
    return WORKER_BEGINS;
}

/* Decides what to do, and on which group. */
static worker_act worker_next(dp_worker *worker, uint32_t started, job_group **group) {
    dp_rank *rank = worker->rank;
    pthread_mutex_lock(&rank->lock);
    end_calling_back(worker);
    worker_act act = next_act(worker, started);
    if (act == WORKER_BEGINS) {
        *group = begin_group(rank, worker);
        queue_take_group(rank, *group);
    } else {
        *group = &worker->groups[worker->oldest];
    }
    pthread_mutex_unlock(&rank->lock);
    return act;
}

/* Until the worker is retired, and all that it has started is completed. */
static void worker_work(dp_worker *worker) {
    uint32_t started = 0;
    job_group *group;
    for (;;) {
        worker_act act = worker_next(worker, started, &group);
        if (act == WORKER_RETIRES) return;
        if (act == WORKER_LOOKS_ABOUT && spin_for_work_or_end(worker)) act = WORKER_COMPLETES;
        if (act == WORKER_LOOKS_ABOUT) continue;
        if (act == WORKER_COMPLETES) {
            complete(worker, group);
            started--;
        } else if (run_or_start(worker, group)) {
            started++;
        }
        if (started == 0) spin_for_work(worker);
    }
}

static bool worker_creates_backend(dp_worker *worker) {
    dp_rank *rank = worker->rank;
    attn_status status = attn_backend_create(&rank->config.backend, &worker->backend);
    uint32_t depth = attn_failed(status) ? 1 : attn_backend_depth(worker->backend);
    worker->depth = depth < DP_MAX_IN_FLIGHT ? depth : DP_MAX_IN_FLIGHT;
    pthread_mutex_lock(&rank->lock);
    attn_status_save(&worker->start, status);
    worker->started = true;
    pthread_mutex_unlock(&rank->lock);
    pthread_cond_signal(&rank->started_or_not);
    return !attn_failed(status);
}

static void *worker_main(void *argument) {
    dp_worker *worker = argument;
    char name[16];
    snprintf(name, sizeof name, "rank %u", worker->rank->config.index);
    pthread_setname_np(pthread_self(), name);
    executes_already = true;
    if (worker_creates_backend(worker)) worker_work(worker);
    worker_unreference(worker);
    return NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Starting */

attn_status dp_rank_start(dp_rank *rank) {
    uint32_t index = rank->config.index;
    dp_worker *made = calloc(1, sizeof *made);
    if (made == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for rank %u", index);
    made->rank = rank;
    atomic_fetch_add(&rank->references, 1);
    atomic_init(&made->references, 2); /* its thread's, the rank's */
    pthread_mutex_lock(&rank->lock);
    bool has_thread = pthread_create(&made->thread, NULL, worker_main, made) == 0;
    if (has_thread) rank->starting = made;
    pthread_mutex_unlock(&rank->lock);
    if (has_thread) return attn_ok();
    atomic_store(&made->references, 1);
    worker_unreference(made);
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "no thread for rank %u", index);
}

dp_start_state dp_rank_look_at_start(dp_rank *rank) {
    dp_start_state state = DP_START_NONE;
    pthread_mutex_lock(&rank->lock);
    dp_worker *worker = rank->starting;
    if (worker != NULL) {
        state = !worker->started ? DP_START_RUNNING : worker->start.code == ATTN_OK ? DP_START_READY : DP_START_FAILED;
    }
    if (state == DP_START_FAILED) {
        rank->record.last_error = worker->start;
        if (rank->record.losses > 0) rank->record.failed_restarts++;
        rank->starting = NULL;
    }
    pthread_mutex_unlock(&rank->lock);
    if (state == DP_START_FAILED) {
        pthread_detach(worker->thread);
        worker_unreference(worker);
    }
    return state;
}

void dp_rank_install(dp_rank *rank, uint32_t epoch) {
    pthread_mutex_lock(&rank->lock);
    dp_worker *worker = rank->starting;
    assert(rank->worker == NULL && worker != NULL && worker->started);
    rank->starting = NULL;
    rank->worker = worker;
    rank->moved_ns = attn_now_ns();
    if (rank->record.losses > 0) rank->record.restarts++;
    atomic_store(&rank->serving, epoch);
    pthread_mutex_unlock(&rank->lock);
    worker_unreference(worker);
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

/* A copy of `size` bytes; NULL of NULL. *missing: there is no memory for one. */
static void *copy_bytes(const void *bytes, size_t size, bool *missing) {
    if (bytes == NULL) return NULL;
    void *copy = malloc(size);
    if (copy == NULL)
        *missing = true;
    else
        memcpy(copy, bytes, size);
    return copy;
}

static bool copy_config(dp_rank_config *copy, const dp_rank_config *config) {
    const attn_backend_config *from = &config->backend;
    size_t scales = (size_t)from->geometry.layers * from->geometry.heads_kv * sizeof(float);
    bool missing = false;
    *copy = *config;
    copy->backend.kind = copy_bytes(from->kind, strlen(from->kind) + 1, &missing);
    copy->backend.isa = copy_bytes(from->isa, from->isa == NULL ? 0 : strlen(from->isa) + 1, &missing);
    copy->backend.cpus = copy_bytes(from->cpus, from->workers * sizeof *from->cpus, &missing);
    copy->backend.k_scales = copy_bytes(from->k_scales, scales, &missing);
    copy->backend.v_scales = copy_bytes(from->v_scales, scales, &missing);
    return !missing;
}

attn_status dp_rank_create(const dp_rank_config *config, dp_rank **rank) {
    dp_rank *created = calloc(1, sizeof *created);
    if (created == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for rank %u", config->index);
    created->spins = sysconf(_SC_NPROCESSORS_ONLN) > 1;
    atomic_init(&created->references, 1);
    atomic_init(&created->serving, NOT_SERVING);
    atomic_init(&created->depth, 0);
    atomic_init(&created->waiting, 0);
    pthread_mutex_init(&created->lock, NULL);
    pthread_cond_init(&created->wake, NULL);
    pthread_cond_init(&created->started_or_not, NULL);
    pthread_cond_init(&created->called_back, NULL);
    pthread_cond_init(&created->released, NULL);
    attn_status status = copy_config(&created->config, config)
                             ? dp_rank_start(created)
                             : attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for rank %u", config->index);
    if (attn_failed(status)) {
        rank_unreference(created);
        return status;
    }
    *rank = created;
    return attn_ok();
}

attn_status dp_rank_await(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    while (!rank->starting->started)
        pthread_cond_wait(&rank->started_or_not, &rank->lock);
    pthread_mutex_unlock(&rank->lock);
    if (dp_rank_look_at_start(rank) == DP_START_FAILED) {
        const attn_saved_status *error = &rank->record.last_error;
        return attn_error(error->code, "%s", error->message);
    }
    dp_rank_install(rank, 1);
    return attn_ok();
}

static void wait_for_callbacks(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    while (rank->calling_back > 0)
        pthread_cond_wait(&rank->called_back, &rank->lock);
    pthread_mutex_unlock(&rank->lock);
}

void dp_rank_stop(dp_rank *rank) {
    pthread_t thread;
    pthread_mutex_lock(&rank->lock);
    assert(rank->head == NULL);
    dp_worker *worker = rank->worker;
    dp_worker *starting = rank->starting;
    rank->worker = rank->starting = NULL;
    if (worker != NULL) {
        thread = worker->thread;
        atomic_store(&worker->retired, true);
    }
    if (starting != NULL) {
        atomic_store(&starting->retired, true);
        pthread_detach(starting->thread);
    }
    pthread_mutex_unlock(&rank->lock);
    pthread_cond_broadcast(&rank->wake);
    if (worker != NULL) pthread_join(thread, NULL);
    if (starting != NULL) worker_unreference(starting);
    wait_for_callbacks(rank);
}

void dp_rank_destroy(dp_rank *rank) {
    if (rank == NULL) return;
    dp_rank_stop(rank);
    rank_unreference(rank);
}

/* ------------------------------------------------------------------------------------------- */
/* Jobs */

attn_status dp_rank_reserve(dp_rank *rank, uint32_t epoch) {
    if (atomic_load_explicit(&rank->serving, memory_order_relaxed) != epoch) {
        return dp_rank_lost_status(rank->config.index);
    }
    uint32_t depth = atomic_fetch_add_explicit(&rank->depth, 1, memory_order_relaxed);
    if (depth < rank->config.max_queue) return attn_ok();
    dp_rank_unreserve(rank);
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "queue: rank %u has %u calls waiting, and room for no more",
                      rank->config.index, rank->config.max_queue);
}

void dp_rank_unreserve(dp_rank *rank) { atomic_fetch_sub_explicit(&rank->depth, 1, memory_order_relaxed); }

/* With the lock held: a worker that hangs for a test must not take the submitting thread along. */
static bool hangs(const dp_rank *rank, const dp_worker *worker) { return worker->stalled_until > rank->releases; }

static bool may_run_here(const dp_rank *rank, const dp_job *job) {
    return job->small && !executes_already && rank->head == NULL && rank->worker->in_flight == 0 &&
           !hangs(rank, rank->worker);
}

static void run_here(dp_worker *worker, job_group *group) {
    executes_already = true;
    if (run_or_start(worker, group)) complete(worker, group);
    executes_already = false;
    worker_unreference(worker);
}

/* With the lock held. The group that is to run on this thread, its worker referenced; or NULL. *wake: the worker's own
 * thread is. */
static job_group *enqueue(dp_rank *rank, dp_job *job, bool *wake) {
    dp_worker *worker = rank->worker;
    if (may_run_here(rank, job)) {
        dp_rank_unreserve(rank);
        job_group *group = begin_group(rank, worker);
        group->jobs[0] = job;
        group->count = 1;
        worker->lent = true;
        atomic_fetch_add(&worker->references, 1);
        return group;
    }
    if (rank->head == NULL && worker->in_flight == 0) rank->moved_ns = attn_now_ns();
    queue_push(rank, job);
    *wake = worker->sleeping && !worker->lent;
    return NULL;
}

void dp_rank_submit(dp_rank *rank, dp_job *job) {
    job_group *here = NULL;
    bool wake = false;
    pthread_mutex_lock(&rank->lock);
    dp_worker *worker = rank->worker;
    bool refused = atomic_load(&rank->serving) != job->epoch;
    if (refused) {
        dp_rank_unreserve(rank);
    } else {
        here = enqueue(rank, job, &wake);
    }
    pthread_mutex_unlock(&rank->lock);
    if (wake) pthread_cond_broadcast(&rank->wake);
    if (refused)
        job->kind->drop(job, dp_rank_lost_status(rank->config.index));
    else if (here != NULL)
        run_here(worker, here);
}

bool dp_rank_withdraw(dp_rank *rank, dp_job *job) {
    pthread_mutex_lock(&rank->lock);
    bool waiting = job->waiting;
    if (waiting) {
        dp_job *before = NULL;
        for (dp_job *each = rank->head; each != job; each = each->next)
            before = each;
        queue_unlink(rank, before);
    }
    pthread_mutex_unlock(&rank->lock);
    return waiting;
}

/* ------------------------------------------------------------------------------------------- */
/* Looking at it */

bool dp_rank_lost(const dp_rank *rank) {
    return atomic_load_explicit(&rank->serving, memory_order_relaxed) == NOT_SERVING;
}

uint32_t dp_rank_queue_depth(const dp_rank *rank) { return atomic_load_explicit(&rank->depth, memory_order_relaxed); }

void dp_rank_read_record(dp_rank *rank, dp_rank_record *record) {
    pthread_mutex_lock(&rank->lock);
    *record = rank->record;
    record->lost = rank->worker == NULL;
    record->starting = rank->starting != NULL;
    record->process = rank->worker == NULL ? 0 : attn_backend_process(rank->worker->backend);
    if (rank->worker != NULL) record->plans_rejected += attn_backend_plans_rejected(rank->worker->backend);
    pthread_mutex_unlock(&rank->lock);
}

const char *dp_rank_device(const dp_rank *rank) { return attn_backend_describe(rank->worker->backend); }

uint64_t dp_rank_small_bytes(const dp_rank *rank) { return attn_backend_small_bytes(rank->worker->backend); }

bool dp_rank_overlaps(const dp_rank *rank) { return rank->worker->depth > 1; }

/* ------------------------------------------------------------------------------------------- */
/* For `run`, `start` and `complete` */

uint32_t dp_worker_rank(const dp_worker *worker) { return worker->rank->config.index; }

dp_scratch *dp_worker_scratch(dp_worker *worker) { return &worker->called_for->scratch; }

bool dp_worker_retired(const dp_worker *worker) { return atomic_load_explicit(&worker->retired, memory_order_relaxed); }

#ifndef ATTN_RELEASE
void dp_rank_stall(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    if (rank->worker != NULL) rank->worker->stalled_until = rank->releases + 1;
    pthread_mutex_unlock(&rank->lock);
}

void dp_rank_release(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    rank->releases++;
    pthread_mutex_unlock(&rank->lock);
    pthread_cond_broadcast(&rank->released);
}

void dp_rank_break(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    if (rank->worker != NULL) rank->worker->breaks = true;
    pthread_mutex_unlock(&rank->lock);
}

static void hang_if_stalled(dp_worker *worker) {
    dp_rank *rank = worker->rank;
    pthread_mutex_lock(&rank->lock);
    while (hangs(rank, worker))
        pthread_cond_wait(&rank->released, &rank->lock);
    pthread_mutex_unlock(&rank->lock);
}

static void break_if_told(dp_worker *worker) {
    pthread_mutex_lock(&worker->rank->lock);
    bool breaks = worker->breaks;
    worker->breaks = false;
    pthread_mutex_unlock(&worker->rank->lock);
    if (breaks) attn_backend_break(worker->backend);
}
#endif

attn_backend *dp_worker_backend(dp_worker *worker) {
#ifndef ATTN_RELEASE
    hang_if_stalled(worker);
    break_if_told(worker);
#endif
    return worker->backend;
}
