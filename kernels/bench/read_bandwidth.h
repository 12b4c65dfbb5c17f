/*
 * The yardstick: how fast the same number of threads can read the same kind of memory and do nothing
 * with it. A plain vectorised loop over a buffer of its own, in huge pages, larger than any cache.
 *
 * Each thread reads its share in strides of several 4 KiB pages at once: the processor's prefetchers
 * follow one stream a page, so this is faster than one stream, and the faster yardstick is the honest
 * one.
 */
#ifndef ATTND_KERNELS_BENCH_READ_BANDWIDTH_H
#define ATTND_KERNELS_BENCH_READ_BANDWIDTH_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct attn_read_bandwidth attn_read_bandwidth;

/* Makes and touches a buffer of `bytes` (rounded to 2 MiB a thread). Free with _destroy; NULL is fine. */
attn_status attn_read_bandwidth_create(size_t bytes, uint32_t threads, attn_read_bandwidth **reader);
void attn_read_bandwidth_destroy(attn_read_bandwidth *reader);

/*
 * Reads at least `bytes`, going on where the last call ended and round at the end, and returns GB/s
 * (10^9). The time includes handing the work to the threads, as a decode's does.
 */
double attn_read_bandwidth_measure(attn_read_bandwidth *reader, size_t bytes);

#endif
