/* What the echo server and the client of the front bench share. */
#ifndef ATTND_TESTS_BENCH_FRONT_BENCH_H
#define ATTND_TESTS_BENCH_FRONT_BENCH_H

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>

/* The two RPCs that are measured; the echo server answers to attnd's names. */
#define BENCH_DECODE "/attnd.v1.Attention/Decode"
#define BENCH_STREAM "/attnd.v1.Attention/DecodeStream"

/* A broken measurement is worth nothing: say what is wrong and leave. */
#define BENCH_CHECK(condition, ...)                                                                                    \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/*
 * glibc's defaults give the receive buffers back to the kernel after every message and fault them in
 * again, which costs nearly half the throughput at 1 MiB. Before grpc_init(), as attnd does it.
 */
static inline void bench_tune_malloc(void) {
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 16 << 20);
}

#endif
