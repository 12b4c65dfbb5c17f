/*
 * What a backend's decode is measured against: a plain read of the memory that it reads. For cpu and reference that is
 * the host's (read_bandwidth.h), for cuda the device's (kernels/cuda/read_bandwidth.h).
 */
#ifndef ATTND_KERNELS_BENCH_YARDSTICK_H
#define ATTND_KERNELS_BENCH_YARDSTICK_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct attn_yardstick attn_yardstick;

/*
 * `threads` read the host's memory. Free with _destroy; NULL is fine. ATTN_RESOURCE_EXHAUSTED: no memory for the
 * buffer, 1 GiB of the host's or 4 GiB of the device's. ATTN_UNAVAILABLE: no device, or it failed.
 */
attn_status attn_yardstick_create(const char *backend, uint32_t threads, attn_yardstick **yardstick);
void attn_yardstick_destroy(attn_yardstick *yardstick);

/*
 * GB/s (10^9) of one plain read: of at least `bytes` of the host's memory, or of the whole buffer on the device, where
 * a short read says little.
 */
attn_status attn_yardstick_measure(attn_yardstick *yardstick, size_t bytes, double *gbps);

#endif
