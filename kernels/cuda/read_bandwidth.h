/*
 * The yardstick of a GPU: how fast a plain kernel reads the device's memory and does nothing with it.
 *
 * Loads of 16 bytes, eight of them under way in each thread, past the L2 cache's keeping, over a buffer many times as
 * large as that cache. How many thread blocks read fastest is found out at creation. Timed by the device's own events,
 * so the launch is not in it.
 */
#ifndef ATTND_KERNELS_CUDA_READ_BANDWIDTH_H
#define ATTND_KERNELS_CUDA_READ_BANDWIDTH_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_cuda_reader attn_cuda_reader;

/*
 * Takes `bytes` of the device's memory (a few GiB; rounded down to 16) and measures for some 0.1 s. Returns a
 * cudaError_t, 0 if none; after a failure *reader is NULL. Free with _destroy; NULL is fine.
 */
int attn_cuda_reader_create(int device, size_t bytes, attn_cuda_reader **reader);
void attn_cuda_reader_destroy(attn_cuda_reader *reader);

/* Reads the buffer once, which also leaves nothing else in the L2 cache. Returns a cudaError_t. */
int attn_cuda_reader_measure(attn_cuda_reader *reader, double *bytes_per_second);

#ifdef __cplusplus
}
#endif

#endif
