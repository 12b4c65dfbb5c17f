/*
 * The inner kernels of the CPU backend: attention of some query rows to some tokens of one KV head.
 *
 * They are written once, in attend.inc, over a small vector type (vector_*.h), and compiled once for
 * each instruction set, in a translation unit of its own (attend_*.c). attn_cpu_kernels_find picks
 * one at run time.
 *
 * ARITHMETIC of one query row, the same whatever other rows are computed with it and however the
 * tokens lie in pages:
 *   - the tokens in tiles of 64, aligned to multiples of 64 of the sequence's tokens in this pool;
 *   - a score is one chain of float32 multiply-adds over the dimensions, in order;
 *   - softmax is online, a tile at a time, in base 2: maximum m, sum l;
 *   - out = out * 2^(m_old - m) + (sum over the tile of p v, one chain from 0 in token order): the
 *     two levels keep the rounding error of long sequences down.
 * With VDPBF16PS a score is one chain of its steps, each two dimensions: products exact, sums rounded
 * to float32, subnormals taken as zero.
 *
 * Tokens that a row does not see are not read by it for a value: their scores are replaced, not
 * multiplied away, and value rows that no row of the batch sees are not read at all.
 */
#ifndef ATTND_KERNELS_CPU_ATTEND_H
#define ATTND_KERNELS_CPU_ATTEND_H

#include "kernels/attention.h"
#include "kernels/cpu/pool.h"

#define ATTN_CPU_TILE_TOKENS 64
#define ATTN_CPU_MAX_ROWS    64 /* query rows of one job: queries x group */

/* The tokens that a query row sees, pool-local: begin .. end - 1. */
typedef struct {
    uint64_t begin, end;
} attn_cpu_visible;

/* Some consecutive tokens of one sequence and KV head. */
typedef struct {
    uint32_t layer;
    uint32_t head;
    const uint32_t *pages; /* the sequence's table */
    uint64_t begin, end;   /* pool-local tokens */
} attn_cpu_span;

/* One call of a kernel. Everything is borrowed for the call. */
typedef struct {
    const attn_cpu_pool *pool;
    attn_cpu_span span;
    const attn_cpu_span *next; /* what this worker attends to afterwards, to prefetch; or NULL */

    uint32_t rows; /* 1 .. ATTN_CPU_MAX_ROWS */
    /*
     * [head_dim / 2, rows, 2]: pairs of dimensions, for each pair those of all rows. float32; bf16 as they
     * are, if the pool is bf16 and kernels->bf16_queries. 4-byte aligned.
     */
    const void *queries;
    const attn_cpu_visible *visible; /* [rows] */
    float scale;
    float softcap;

    /* Results: the normalised output and its LSE. Nothing seen: 0 and -inf. */
    float *out; /* [rows, pool->value_stride]; columns beyond head_dim_v are undefined */
    float *lse; /* [rows] */
} attn_cpu_job;

typedef struct {
    const char *name;
    bool bf16_queries; /* with bf16 pools, jobs hand over their queries unconverted */
    /* False if a page index led out of the pool: nothing of the results is then valid. */
    bool (*attend)(const attn_cpu_job *job);
    /* As attn_elements_to_floats and _from_floats, bit for bit; count is a multiple of 8. */
    void (*to_floats)(attn_dtype dtype, const void *source, float *destination, size_t count);
    void (*from_floats)(attn_dtype dtype, const float *source, void *destination, size_t count);
    /* y[i] = 2^x[i] for x[i] <= 0, for tests. count is a multiple of 16. */
    void (*exp2)(const float *x, float *y, size_t count);
} attn_cpu_kernels;

/*
 * The kernels of an instruction set: "auto" or NULL (the best that this machine has), "avx512bf16",
 * "avx512", "avx2", "portable". ATTN_INVALID_ARGUMENT: no such name. ATTN_UNAVAILABLE: this machine
 * lacks it. The result lives for ever.
 */
attn_status attn_cpu_kernels_find(const char *name, const attn_cpu_kernels **kernels);

extern const attn_cpu_kernels attn_cpu_kernels_portable;
#ifdef __x86_64__
extern const attn_cpu_kernels attn_cpu_kernels_avx2;
extern const attn_cpu_kernels attn_cpu_kernels_avx512;
extern const attn_cpu_kernels attn_cpu_kernels_avx512bf16;
#endif

#endif
