/* What the kernel bench runs on the device besides the decode kernels themselves. All launch on the default stream. */
#ifndef ATTND_KERNELS_CUDA_BENCH_DECODE_DEVICE_H
#define ATTND_KERNELS_CUDA_BENCH_DECODE_DEVICE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/decode.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fills memory with numbers uniform in (-2, 2), each a function of its place and `seed` alone. */
void bench_fill(void *memory, size_t elements, uint32_t dtype, uint64_t seed);

/*
 * Makes the rows of each sequence's last page beyond its length NaN, or (restore) what bench_fill(pool, .., seed) put
 * there.
 */
void bench_poison_tails(const attn_cuda_call *call, int restore, uint64_t seed);

/* Rows `rows[0 .. count - 1]` of the output in float64: out [count, head_dim_v], lse [count]. All device memory. */
void bench_reference(const attn_cuda_call *call, uint32_t query_length, const uint32_t *rows, uint32_t count,
                     double *out, double *lse);

#ifdef __cplusplus
}
#endif

#endif
