#define _GNU_SOURCE /* mmap flags */
#include "kernels/bench/read_bandwidth.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "kernels/cpu/workers.h"

#define HUGE_PAGE ((size_t)2 << 20)

enum { STREAM = 4096, STREAMS = 4, LINE = 64 };

struct attn_read_bandwidth {
    char *memory; /* owned; the buffer is the part from the first huge page border on */
    size_t mapped;
    char *buffer;
    size_t share; /* bytes of one thread's part of the buffer */
    uint32_t threads;
    size_t offset; /* of the next read, in every share */
    size_t count;  /* bytes of the current read, by thread */
    attn_cpu_workers *workers;
    _Atomic uint64_t sink; /* what was read, so that it has to be */
};

typedef uint64_t line_words __attribute__((vector_size(LINE), may_alias));

/* Reads count bytes (a multiple of STREAM * STREAMS). One copy for each vector width. */
#define READ_LOOP(memory, count, sum)                                                                                  \
    do {                                                                                                               \
        line_words a = {0}, b = {0}, c = {0}, d = {0};                                                                 \
        for (const char *page = (memory); page < (memory) + (count); page += STREAM * STREAMS) {                       \
            for (const char *line = page; line < page + STREAM; line += LINE) {                                        \
                a |= *(const line_words *)line;                                                                        \
                b |= *(const line_words *)(line + STREAM);                                                             \
                c |= *(const line_words *)(line + 2 * STREAM);                                                         \
                d |= *(const line_words *)(line + 3 * STREAM);                                                         \
            }                                                                                                          \
        }                                                                                                              \
        a |= b | c | d;                                                                                                \
        for (int i = 0; i < LINE / 8; i++)                                                                             \
            (sum) |= a[i];                                                                                             \
    } while (0)

#ifdef __x86_64__
__attribute__((target("avx512f"))) static uint64_t read_avx512(const char *memory, size_t count) {
    uint64_t sum = 0;
    READ_LOOP(memory, count, sum);
    return sum;
}

__attribute__((target("avx2"))) static uint64_t read_avx2(const char *memory, size_t count) {
    uint64_t sum = 0;
    READ_LOOP(memory, count, sum);
    return sum;
}
#endif

static uint64_t read_portable(const char *memory, size_t count) {
    uint64_t sum = 0;
    READ_LOOP(memory, count, sum);
    return sum;
}

static uint64_t read_memory(const char *memory, size_t count) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return read_avx512(memory, count);
    if (__builtin_cpu_supports("avx2")) return read_avx2(memory, count);
#endif
    return read_portable(memory, count);
}

static void read_share(void *context, uint32_t worker) {
    attn_read_bandwidth *reader = context;
    const char *share = reader->buffer + worker * reader->share;
    size_t first = reader->offset, to_end = reader->share - first;
    size_t count = reader->count < to_end ? reader->count : to_end;
    uint64_t sum = read_memory(share + first, count);
    if (count < reader->count) sum |= read_memory(share, reader->count - count);
    atomic_fetch_or_explicit(&reader->sink, sum, memory_order_relaxed);
}

attn_status attn_read_bandwidth_create(size_t bytes, uint32_t threads, attn_read_bandwidth **created) {
    attn_status status;
    *created = NULL;
    attn_read_bandwidth *reader = calloc(1, sizeof *reader);
    if (reader == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory");
    reader->threads = threads;
    reader->share = (bytes / threads + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    reader->mapped = reader->share * threads + HUGE_PAGE;
    void *memory = mmap(NULL, reader->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a read buffer of %zu MiB", reader->mapped >> 20);
        goto cleanup;
    }
    madvise(memory, reader->mapped, MADV_HUGEPAGE);
    reader->memory = memory;
    reader->buffer = (char *)(((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    memset(reader->buffer, 1, reader->share * threads);
    ATTN_TRY_GOTO(status, attn_cpu_workers_create(threads, NULL, &reader->workers), cleanup);
    *created = reader;
    return status;
cleanup:
    attn_read_bandwidth_destroy(reader);
    return status;
}

void attn_read_bandwidth_destroy(attn_read_bandwidth *reader) {
    if (reader == NULL) return;
    attn_cpu_workers_destroy(reader->workers);
    if (reader->memory != NULL) munmap(reader->memory, reader->mapped);
    free(reader);
}

double attn_read_bandwidth_measure(attn_read_bandwidth *reader, size_t bytes) {
    const size_t step = STREAM * STREAMS;
    reader->count = (bytes / reader->threads + step - 1) / step * step;
    if (reader->count > reader->share) reader->count = reader->share;
    int64_t start = attn_now_ns();
    attn_cpu_workers_run(reader->workers, read_share, reader);
    int64_t elapsed = attn_now_ns() - start;
    reader->offset = (reader->offset + reader->count) % reader->share;
    return (double)reader->count * reader->threads / (double)elapsed;
}
