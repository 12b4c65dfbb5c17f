/*
 * The CPU backend's threads: `count` workers, of which worker 0 is the calling thread.
 *
 * A task is run by all workers at once, and the call returns when all are done: everything a worker
 * wrote is seen by the caller, and everything the caller wrote before by the workers. Between tasks
 * the threads spin for some microseconds, for the next layer follows soon, and then sleep.
 *
 * Threads: one at a time calls run and destroy.
 */
#ifndef ATTND_KERNELS_CPU_WORKERS_H
#define ATTND_KERNELS_CPU_WORKERS_H

#include <stdint.h>

#include "base/status.h"

typedef struct attn_cpu_workers attn_cpu_workers;

/*
 * Starts count - 1 threads. `cpus` is NULL or the core of each worker; cpus[0] is not used, for the
 * calling thread belongs to its owner. ATTN_INVALID_ARGUMENT: a core that this process may not use.
 * ATTN_RESOURCE_EXHAUSTED: no more threads. Free with attn_cpu_workers_destroy (NULL is fine).
 */
attn_status attn_cpu_workers_create(uint32_t count, const int *cpus, attn_cpu_workers **workers);
void attn_cpu_workers_destroy(attn_cpu_workers *workers);

typedef void (*attn_cpu_task)(void *context, uint32_t worker);

/* Runs task(context, w) for each worker w = 0 .. count - 1, each on its own thread. */
void attn_cpu_workers_run(attn_cpu_workers *workers, attn_cpu_task task, void *context);

/* The same, one after the other on the calling thread: cheaper where there is little to do. */
void attn_cpu_workers_run_alone(attn_cpu_workers *workers, attn_cpu_task task, void *context);

#endif
