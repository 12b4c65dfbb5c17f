/*
 * Memory of which a call takes what it needs: what is uploaded, what comes back, what stays on the device.
 *
 * What a call puts into an arena is laid out twice by the same function: with no memory, which measures, and in
 * earnest.
 */
#ifndef ATTND_KERNELS_CUDA_BACKEND_ARENA_H
#define ATTND_KERNELS_CUDA_BACKEND_ARENA_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

/*
 * Pinned memory, and what the device sees of it: device memory with the same layout, or the same memory; or device
 * memory alone. Only grows.
 */
typedef enum { ARENA_COPIED, ARENA_SHARED, ARENA_DEVICE } arena_kind;

typedef struct {
    char *host, *device;
    size_t bytes;
    arena_kind kind;
} arena;

/* Waits for the device where it has to grow. False: there is no memory, and the arena is empty, or the device has
 * failed, as *status says. */
bool attn_cuda_arena_reserve(arena *memory, size_t bytes, attn_status *status);

/* Frees what it has; it may grow again. */
void attn_cuda_arena_fini(arena *memory);

/* Something in an arena. */
typedef struct {
    void *host, *device;
} place;

/* Lays out what an arena holds. Without one, which measures, the places are NULL, and only `used` counts. */
typedef struct {
    const arena *memory;
    size_t used;
} carver;

place attn_cuda_carve(carver *from, size_t bytes);

#endif
