#define _GNU_SOURCE
#include "dp/rank.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/clock.h"

/* How long the worker looks for a next job before it sleeps: less than a wake-up costs. */
#define SPIN_NS 20000

struct dp_rank {
    dp_rank_config config;
    attn_backend *backend;        /* the executing thread's */
    dp_job *group[DP_MAX_MERGED]; /* the worker's: jobs of the launch that it executes */
    bool spins;                   /* constant: there is another CPU to submit from meanwhile */
    pthread_t thread;
    attn_saved_status start_status; /* of the backend's creation; guarded by lock, as is all up to `stopping` */
    pthread_mutex_t lock;
    pthread_cond_t wake; /* the worker: a job came, the rank got free, or it is to stop */
    pthread_cond_t started_or_not;
    dp_job *head, *tail;
    bool executing; /* some thread drives the backend */
    bool sleeping;  /* the worker waits for `wake` */
    bool started;
    bool stopping;
    atomic_bool lost;
    atomic_uint depth; /* places reserved, and jobs waiting */
};

/* Set where a job must not run on the submitting thread: in workers, and inside such a run. */
static _Thread_local bool executes_already;

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
    atomic_fetch_sub_explicit(&rank->depth, 1, memory_order_relaxed);
    return job;
}

/* Takes the head, and all that may join it. */
static uint32_t queue_take_group(dp_rank *rank) {
    dp_job *first = queue_unlink(rank, NULL);
    uint32_t count = 0;
    uint32_t weight = first->weight;
    rank->group[count++] = first;
    if (first->kind->joins == NULL) return count;
    for (dp_job *before = NULL, *each = rank->head; each != NULL && count < DP_MAX_MERGED;) {
        dp_job *next = each->next;
        if (each->kind == first->kind && weight + each->weight <= rank->config.max_weight &&
            first->kind->joins(first, each)) {
            weight += each->weight;
            rank->group[count++] = queue_unlink(rank, before);
        } else {
            before = each;
        }
        each = next;
    }
    return count;
}

/* ------------------------------------------------------------------------------------------- */
/* The worker */

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* A job that comes right after another is picked up without a wake-up. */
static void spin_for_work(dp_rank *rank) {
    if (!rank->spins) return;
    int64_t end = attn_now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&rank->depth, memory_order_relaxed) > 0) return;
            pause_briefly();
        }
    } while (attn_now_ns() < end);
}

/* Waits for a group to execute; 0: stop. */
static uint32_t worker_next(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    while (!rank->stopping && (rank->head == NULL || rank->executing)) {
        rank->sleeping = true;
        pthread_cond_wait(&rank->wake, &rank->lock);
        rank->sleeping = false;
    }
    uint32_t count = 0;
    if (rank->head != NULL) {
        count = queue_take_group(rank);
        rank->executing = true;
    }
    pthread_mutex_unlock(&rank->lock);
    return count;
}

static void stop_executing(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    rank->executing = false;
    bool wake = rank->sleeping && rank->head != NULL;
    pthread_mutex_unlock(&rank->lock);
    if (wake) pthread_cond_signal(&rank->wake);
}

static attn_status worker_start(dp_rank *rank) {
    char name[16];
    snprintf(name, sizeof name, "rank %u", rank->config.index);
    pthread_setname_np(pthread_self(), name);
    executes_already = true;
    attn_status status = attn_backend_create(&rank->config.backend, &rank->backend);
    pthread_mutex_lock(&rank->lock);
    attn_status_save(&rank->start_status, status);
    rank->started = true;
    pthread_mutex_unlock(&rank->lock);
    pthread_cond_signal(&rank->started_or_not);
    return status;
}

static void *worker_main(void *argument) {
    dp_rank *rank = argument;
    if (attn_failed(worker_start(rank))) return NULL;
    uint32_t count;
    while ((count = worker_next(rank)) > 0) {
        rank->group[0]->kind->run(rank, rank->group, count);
        stop_executing(rank);
        for (uint32_t i = 0; i < count; i++)
            rank->group[i]->kind->finish(rank->group[i]);
        spin_for_work(rank);
    }
    attn_backend_destroy(rank->backend);
    return NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static attn_status wait_until_started(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    while (!rank->started)
        pthread_cond_wait(&rank->started_or_not, &rank->lock);
    pthread_mutex_unlock(&rank->lock);
    if (rank->start_status.code == ATTN_OK) return attn_ok();
    return attn_error(rank->start_status.code, "%s", rank->start_status.message);
}

static void rank_free(dp_rank *rank) {
    pthread_cond_destroy(&rank->started_or_not);
    pthread_cond_destroy(&rank->wake);
    pthread_mutex_destroy(&rank->lock);
    free(rank);
}

attn_status dp_rank_create(const dp_rank_config *config, dp_rank **rank) {
    dp_rank *created = calloc(1, sizeof *created);
    if (created == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for rank %u", config->index);
    created->config = *config;
    created->spins = sysconf(_SC_NPROCESSORS_ONLN) > 1;
    atomic_init(&created->lost, false);
    atomic_init(&created->depth, 0);
    pthread_mutex_init(&created->lock, NULL);
    pthread_cond_init(&created->wake, NULL);
    pthread_cond_init(&created->started_or_not, NULL);
    if (pthread_create(&created->thread, NULL, worker_main, created) != 0) {
        rank_free(created);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no thread for rank %u", config->index);
    }
    attn_status status = wait_until_started(created);
    if (attn_failed(status)) {
        pthread_join(created->thread, NULL);
        rank_free(created);
        return status;
    }
    *rank = created;
    return attn_ok();
}

void dp_rank_stop(dp_rank *rank) {
    pthread_mutex_lock(&rank->lock);
    assert(rank->head == NULL);
    bool stopped = rank->stopping;
    rank->stopping = true;
    pthread_mutex_unlock(&rank->lock);
    if (stopped) return;
    pthread_cond_signal(&rank->wake);
    pthread_join(rank->thread, NULL);
}

void dp_rank_destroy(dp_rank *rank) {
    if (rank == NULL) return;
    dp_rank_stop(rank);
    rank_free(rank);
}

/* ------------------------------------------------------------------------------------------- */
/* Jobs */

static attn_status lost_status(const dp_rank *rank) {
    return attn_error(ATTN_UNAVAILABLE, "rank %u is lost", rank->config.index);
}

attn_status dp_rank_reserve(dp_rank *rank) {
    if (dp_rank_lost(rank)) return lost_status(rank);
    uint32_t depth = atomic_fetch_add_explicit(&rank->depth, 1, memory_order_relaxed);
    if (depth < rank->config.max_queue) return attn_ok();
    dp_rank_unreserve(rank);
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "queue: rank %u has %u calls waiting, and room for no more",
                      rank->config.index, rank->config.max_queue);
}

void dp_rank_unreserve(dp_rank *rank) { atomic_fetch_sub_explicit(&rank->depth, 1, memory_order_relaxed); }

static void run_here(dp_rank *rank, dp_job *job) {
    executes_already = true;
    job->kind->run(rank, &job, 1);
    stop_executing(rank);
    executes_already = false;
    job->kind->finish(job);
}

void dp_rank_submit(dp_rank *rank, dp_job *job) {
    bool wake = false;
    bool here = false;
    pthread_mutex_lock(&rank->lock);
    bool lost = dp_rank_lost(rank);
    if (lost) {
        dp_rank_unreserve(rank);
    } else if (job->small && !executes_already && rank->head == NULL && !rank->executing) {
        dp_rank_unreserve(rank);
        rank->executing = true;
        here = true;
    } else {
        queue_push(rank, job);
        wake = rank->sleeping && !rank->executing;
    }
    pthread_mutex_unlock(&rank->lock);
    if (wake) pthread_cond_signal(&rank->wake);
    if (lost)
        job->kind->drop(job, lost_status(rank));
    else if (here)
        run_here(rank, job);
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

void dp_rank_fail(dp_rank *rank) {
    dp_job *dropped = NULL;
    pthread_mutex_lock(&rank->lock);
    atomic_store(&rank->lost, true);
    while (rank->head != NULL) {
        dp_job *job = queue_unlink(rank, NULL);
        job->next = dropped;
        dropped = job;
    }
    pthread_mutex_unlock(&rank->lock);
    while (dropped != NULL) {
        dp_job *job = dropped;
        dropped = job->next;
        job->kind->drop(job, lost_status(rank));
    }
}

bool dp_rank_lost(const dp_rank *rank) { return atomic_load_explicit(&rank->lost, memory_order_relaxed); }

uint32_t dp_rank_queue_depth(const dp_rank *rank) { return atomic_load_explicit(&rank->depth, memory_order_relaxed); }

uint32_t dp_rank_index(const dp_rank *rank) { return rank->config.index; }

attn_backend *dp_rank_backend(dp_rank *rank) { return rank->backend; }
