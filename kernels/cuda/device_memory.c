#include "kernels/cuda/device_memory.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_BYTES = 64 * 1024, GUARD_BYTE = 0xc5 };

typedef struct piece piece;
struct piece {
    piece *next;
    char *memory; /* between the guards */
    size_t bytes;
    int device;
    const char *name;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static piece *pieces;

static void keep(piece *added) {
    pthread_mutex_lock(&lock);
    added->next = pieces;
    pieces = added;
    pthread_mutex_unlock(&lock);
}

/* The piece at `memory`, no longer in the list. */
static piece *take(const void *memory) {
    pthread_mutex_lock(&lock);
    piece **at = &pieces;
    while (*at != NULL && (*at)->memory != memory)
        at = &(*at)->next;
    piece *found = *at;
    if (found != NULL) *at = found->next;
    pthread_mutex_unlock(&lock);
    return found;
}

static cudaError_t allocate_guarded(void **memory, size_t bytes, const char *name) {
    piece *added = calloc(1, sizeof *added);
    char *whole = NULL;
    if (added == NULL) return cudaErrorMemoryAllocation;
    cudaError_t error = cudaMalloc((void **)&whole, bytes + 2 * (size_t)GUARD_BYTES);
    if (error == cudaSuccess) error = cudaMemset(whole, GUARD_BYTE, GUARD_BYTES);
    if (error == cudaSuccess) error = cudaMemset(whole + GUARD_BYTES + bytes, GUARD_BYTE, GUARD_BYTES);
    if (error == cudaSuccess) error = cudaGetDevice(&added->device);
    if (error != cudaSuccess) {
        cudaFree(whole);
        free(added);
        return error;
    }
    added->memory = whole + GUARD_BYTES;
    added->bytes = bytes;
    added->name = name;
    keep(added);
    *memory = added->memory;
    return cudaSuccess;
}

cudaError_t attn_cuda_allocate(void **memory, size_t bytes, const char *name) {
    return ATTN_CUDA_IS_CHECKED ? allocate_guarded(memory, bytes, name) : cudaMalloc(memory, bytes);
}

void attn_cuda_free(void *memory) {
    if (!ATTN_CUDA_IS_CHECKED) {
        cudaFree(memory);
        return;
    }
    if (memory == NULL) return;
    piece *found = take(memory);
    if (found != NULL) cudaFree(found->memory - GUARD_BYTES);
    free(found);
}

static bool is_whole(const char *guard) {
    static _Thread_local unsigned char copy[GUARD_BYTES];
    if (cudaMemcpy(copy, guard, GUARD_BYTES, cudaMemcpyDeviceToHost) != cudaSuccess) return false;
    for (size_t i = 0; i < GUARD_BYTES; i++) {
        if (copy[i] != GUARD_BYTE) return false;
    }
    return true;
}

const char *attn_cuda_check_guards(void) {
    if (!ATTN_CUDA_IS_CHECKED) return NULL;
    int device = 0;
    const char *name = NULL;
    cudaGetDevice(&device);
    pthread_mutex_lock(&lock);
    for (const piece *checked = pieces; checked != NULL && name == NULL; checked = checked->next) {
        if (checked->device != device) continue;
        bool is_good = is_whole(checked->memory - GUARD_BYTES) && is_whole(checked->memory + checked->bytes);
        if (!is_good) name = checked->name;
    }
    pthread_mutex_unlock(&lock);
    return name;
}
