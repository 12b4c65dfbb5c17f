#define _GNU_SOURCE
#include "kernels/cpu/workers.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/pause.h"

/* How long to spin before sleeping: less than a sleep and a wake-up cost. */
#define SPIN_NS 50000

typedef struct {
    attn_cpu_workers *workers;
    uint32_t index;
    pthread_t thread;
} worker_thread;

struct attn_cpu_workers {
    uint32_t count;
    uint32_t started;       /* threads */
    worker_thread *threads; /* [count]; 0 is not used */

    /* The task of the current round: written by the caller before `round` grows, read by workers after. */
    attn_cpu_task task;
    void *context;
    bool stop;

    _Alignas(64) _Atomic uint32_t round;   /* tasks begun */
    _Alignas(64) _Atomic uint32_t pending; /* workers, other than the caller, that have not finished it */
    _Atomic uint32_t sleepers;             /* threads that wait in `changed`, the caller included */
    pthread_mutex_t mutex;                 /* guards nothing but the wait */
    pthread_cond_t changed;                /* round grew, or pending became 0 */
};

/* ------------------------------------------------------------------------------------------- */
/* Waiting */

typedef bool (*condition)(attn_cpu_workers *workers, uint32_t round);

static bool round_begun(attn_cpu_workers *workers, uint32_t round) {
    return atomic_load_explicit(&workers->round, memory_order_seq_cst) != round;
}

static bool round_done(attn_cpu_workers *workers, uint32_t round) {
    (void)round;
    return atomic_load_explicit(&workers->pending, memory_order_seq_cst) == 0;
}

/* A sleeper counts itself before it looks again; who changes the condition looks for sleepers after. */
static void wait_for(attn_cpu_workers *workers, condition is_met, uint32_t round) {
    int64_t deadline = attn_now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (is_met(workers, round)) return;
            attn_pause();
        }
    } while (attn_now_ns() < deadline);

    pthread_mutex_lock(&workers->mutex);
    atomic_fetch_add(&workers->sleepers, 1);
    while (!is_met(workers, round)) {
        pthread_cond_wait(&workers->changed, &workers->mutex);
    }
    atomic_fetch_sub(&workers->sleepers, 1);
    pthread_mutex_unlock(&workers->mutex);
}

static void wake_sleepers(attn_cpu_workers *workers) {
    if (atomic_load(&workers->sleepers) == 0) return;
    pthread_mutex_lock(&workers->mutex);
    pthread_cond_broadcast(&workers->changed);
    pthread_mutex_unlock(&workers->mutex);
}

/* ------------------------------------------------------------------------------------------- */
/* Threads */

static void *run_worker(void *argument) {
    worker_thread *self = argument;
    attn_cpu_workers *workers = self->workers;
    for (uint32_t round = 0;; round++) {
        wait_for(workers, round_begun, round);
        if (workers->stop) return NULL;
        workers->task(workers->context, self->index);
        if (atomic_fetch_sub(&workers->pending, 1) == 1) wake_sleepers(workers);
    }
}

static attn_status start_thread(attn_cpu_workers *workers, uint32_t index, const int *cpus) {
    worker_thread *worker = &workers->threads[index];
    *worker = (worker_thread){.workers = workers, .index = index};
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    if (cpus != NULL) {
        cpu_set_t set;
        CPU_ZERO(&set);
        if (cpus[index] >= 0 && cpus[index] < CPU_SETSIZE) CPU_SET(cpus[index], &set);
        pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
    }
    int error = pthread_create(&worker->thread, &attributes, run_worker, worker);
    pthread_attr_destroy(&attributes);
    if (error == 0) {
        workers->started++;
        return attn_ok();
    }
    if (cpus != NULL) {
        return attn_error(ATTN_INVALID_ARGUMENT, "worker %u cannot run on core %d: %s", index, cpus[index],
                          strerror(error));
    }
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "cannot start worker thread %u: %s", index, strerror(error));
}

static void begin_round(attn_cpu_workers *workers, attn_cpu_task task, void *context) {
    workers->task = task;
    workers->context = context;
    atomic_store(&workers->pending, workers->started);
    atomic_fetch_add(&workers->round, 1);
    wake_sleepers(workers);
}

attn_status attn_cpu_workers_create(uint32_t count, const int *cpus, attn_cpu_workers **created) {
    attn_status status = attn_ok();
    *created = NULL;
    attn_cpu_workers *workers = aligned_alloc(64, sizeof *workers);
    if (workers == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u workers", count);
    memset(workers, 0, sizeof *workers);
    workers->count = count;
    pthread_mutex_init(&workers->mutex, NULL);
    pthread_cond_init(&workers->changed, NULL);
    workers->threads = calloc(count, sizeof *workers->threads);
    if (workers->threads == NULL) {
        status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u workers", count);
        goto cleanup;
    }
    for (uint32_t index = 1; index < count; index++) {
        ATTN_TRY_GOTO(status, start_thread(workers, index, cpus), cleanup);
    }
    *created = workers;
    return status;
cleanup:
    attn_cpu_workers_destroy(workers);
    return status;
}

void attn_cpu_workers_destroy(attn_cpu_workers *workers) {
    if (workers == NULL) return;
    workers->stop = true;
    begin_round(workers, NULL, NULL);
    for (uint32_t index = 1; index <= workers->started; index++) {
        pthread_join(workers->threads[index].thread, NULL);
    }
    free(workers->threads);
    pthread_cond_destroy(&workers->changed);
    pthread_mutex_destroy(&workers->mutex);
    free(workers);
}

void attn_cpu_workers_run(attn_cpu_workers *workers, attn_cpu_task task, void *context) {
    begin_round(workers, task, context);
    task(context, 0);
    wait_for(workers, round_done, 0);
}

void attn_cpu_workers_run_alone(attn_cpu_workers *workers, attn_cpu_task task, void *context) {
    for (uint32_t worker = 0; worker < workers->count; worker++) {
        task(context, worker);
    }
}
