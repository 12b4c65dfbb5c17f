/*
 * Rows that the device reads and writes where they are: in memory of the caller's that was lent to the backend
 * (attn_backend_lend), one sequence's behind the other's. Nothing is copied there by the host, nor from there.
 *
 * On the thread that drives the backend, whose device is the current one.
 */
#ifndef ATTND_KERNELS_CUDA_IN_PLACE_H
#define ATTND_KERNELS_CUDA_IN_PLACE_H

#include <stdbool.h>
#include <stddef.h>

#include "kernels/backend.h"

enum { ATTN_CUDA_BORROWED_MOST = 4 };

/* What is borrowed, pinned. Zero at first. */
typedef struct {
    struct {
        char *host, *device; /* NULL: none */
        size_t bytes;
    } ranges[ATTN_CUDA_BORROWED_MOST];
} attn_cuda_borrowed;

/* Where that cannot be, rows there are copied as all others. */
void attn_cuda_borrow(attn_cuda_borrowed *borrowed, void *memory, size_t bytes);
void attn_cuda_give_back(attn_cuda_borrowed *borrowed, void *memory);
void attn_cuda_give_all_back(attn_cuda_borrowed *borrowed);

/* What the device has `count` bytes at; NULL: they are not all in borrowed memory. */
char *attn_cuda_address(const attn_cuda_borrowed *borrowed, const void *bytes, size_t count);

/* Where a batch's rows begin that can stay; NULL: they cannot, or there are none. */
typedef struct {
    bool ins, outs;                      /* can all rows that come in, all that go out? */
    const char *queries, *keys, *values; /* with `ins` */
    char *device_outs;                   /* with `outs`, as.. */
    float *device_lses;                  /* ..this, if LSE are wanted */
} attn_cuda_rows_in_place;

/* Of a batch of whole sequences, in whose order rows are used. */
attn_cuda_rows_in_place attn_cuda_find_rows(const attn_cuda_borrowed *borrowed, const attn_geometry *geometry,
                                            const attn_batch *batch);

#endif
