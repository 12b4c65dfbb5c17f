/*
 * Result buffers: blocks of memory for outputs and partial results, used again and again.
 *
 * Sizes are rounded up to powers of two; each size class has a list of free blocks. In steady state
 * taking and releasing a block is a push and a pop under the class's lock. The pool lives as long
 * as it is open or any of its blocks is out: a result may outlive the engine.
 *
 * Threads: all functions from any thread.
 */
#ifndef ATTND_DP_RESULTS_H
#define ATTND_DP_RESULTS_H

#include <stddef.h>

#include "dp/engine.h"

typedef struct dp_results dp_results;

/* NULL: no memory. */
dp_results *dp_results_create(void);

/* Closes the pool: frees it, now or when the last block is released. */
void dp_results_close(dp_results *results);

/* A result with room for `out_size` and `lse_size` bytes, at multiples of 64; `lse` is set only if not 0. NULL: no
 * memory. */
dp_result *dp_results_take(dp_results *results, size_t out_size, size_t lse_size);

#endif
