/* What the Hopper bench runs on the device besides the decode kernel itself. All launch on the default stream. */
#ifndef ATTND_KERNELS_CUDA_BENCH_HOPPER_DEVICE_H
#define ATTND_KERNELS_CUDA_BENCH_HOPPER_DEVICE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/decode_hopper.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fills memory with bf16 numbers uniform in (-2, 2), each a function of its place and `seed` alone. */
void bench_fill(void *memory, size_t elements, uint64_t seed);

/*
 * Makes the rows of each sequence's last page beyond its length NaN, or (restore) what bench_fill(pool, .., seed) put
 * there. page_size is at most ATTN_HOPPER_TILE_TOKENS.
 */
void bench_poison_tails(const attn_hopper_decode *decode, int restore, uint64_t seed);

/* Rows `rows[0 .. count - 1]` of the output in float64: out [count, 128], lse [count]. All device memory. */
void bench_reference(const attn_hopper_decode *decode, const uint32_t *rows, uint32_t count, double *out, double *lse);

/* Reads memory once, 16 bytes a load; `sink` is a word of device memory. `blocks` of 512 threads. */
void bench_read(const void *memory, size_t bytes, uint32_t blocks, uint32_t *sink);

#ifdef __cplusplus
}
#endif

#endif
