#include "kernels/cuda/in_place.h"

#include <cuda_runtime_api.h>
#include <stdint.h>

/* ------------------------------------------------------------------------------------------- */
/* Borrowed memory */

void attn_cuda_borrow(attn_cuda_borrowed *borrowed, void *memory, size_t bytes) {
    uint32_t i = 0;
    while (i < ATTN_CUDA_BORROWED_MOST && borrowed->ranges[i].host != NULL)
        i++;
    if (i == ATTN_CUDA_BORROWED_MOST) return;
    void *device = NULL;
    cudaError_t error = cudaHostRegister(memory, bytes, cudaHostRegisterDefault);
    if (error == cudaSuccess) error = cudaHostGetDevicePointer(&device, memory, 0);
    if (error != cudaSuccess) {
        cudaGetLastError(); /* not a later launch's */
        return;
    }
    borrowed->ranges[i].host = memory;
    borrowed->ranges[i].device = device;
    borrowed->ranges[i].bytes = bytes;
}

void attn_cuda_give_back(attn_cuda_borrowed *borrowed, void *memory) {
    for (uint32_t i = 0; i < ATTN_CUDA_BORROWED_MOST; i++) {
        if (memory == NULL || borrowed->ranges[i].host != memory) continue;
        cudaHostUnregister(memory);
        borrowed->ranges[i].host = NULL;
    }
}

void attn_cuda_give_all_back(attn_cuda_borrowed *borrowed) {
    for (uint32_t i = 0; i < ATTN_CUDA_BORROWED_MOST; i++)
        attn_cuda_give_back(borrowed, borrowed->ranges[i].host);
}

char *attn_cuda_address(const attn_cuda_borrowed *borrowed, const void *bytes, size_t count) {
    const char *begin = bytes;
    for (uint32_t i = 0; i < ATTN_CUDA_BORROWED_MOST; i++) {
        const char *host = borrowed->ranges[i].host;
        if (host == NULL || begin < host || begin > host + borrowed->ranges[i].bytes) continue;
        size_t offset = (size_t)(begin - host);
        if (count <= borrowed->ranges[i].bytes - offset) return borrowed->ranges[i].device + offset;
    }
    return NULL;
}

static bool has_any(const attn_cuda_borrowed *borrowed) {
    for (uint32_t i = 0; i < ATTN_CUDA_BORROWED_MOST; i++) {
        if (borrowed->ranges[i].host != NULL) return true;
    }
    return false;
}

/* ------------------------------------------------------------------------------------------- */
/* A batch's rows */

/* Rows of one kind, as far as they lie one behind the other. */
typedef struct {
    const char *begin, *end; /* NULL: none yet */
} stretch;

/* False: the rows are not right behind those before. */
static bool goes_on(stretch *rows, const void *next, size_t bytes) {
    if (rows->begin == NULL) rows->begin = rows->end = next;
    if (next == NULL || next != rows->end) return false;
    rows->end += bytes;
    return true;
}

/* NULL: not borrowed; where there are no rows, anything else. */
static char *address_of(const attn_cuda_borrowed *borrowed, const stretch *rows) {
    static char nothing;
    return rows->begin == NULL ? &nothing : attn_cuda_address(borrowed, rows->begin, (size_t)(rows->end - rows->begin));
}

static void find_ins(const attn_cuda_borrowed *borrowed, const attn_geometry *geometry, const attn_batch *batch,
                     attn_cuda_rows_in_place *found) {
    stretch queries = {0}, keys = {0}, values = {0};
    for (uint32_t i = 0; i < batch->size; i++) {
        size_t rows = batch->query_lengths[i], new_rows = attn_batch_new_rows(batch, i);
        if (!goes_on(&queries, batch->queries[i], rows * attn_query_row_bytes(geometry))) return;
        if (new_rows == 0) continue;
        if (!goes_on(&keys, batch->new_keys[i], new_rows * attn_key_row_bytes(geometry))) return;
        if (!goes_on(&values, batch->new_values[i], new_rows * attn_value_row_bytes(geometry))) return;
    }
    found->ins = address_of(borrowed, &queries) && address_of(borrowed, &keys) && address_of(borrowed, &values);
    found->queries = queries.begin;
    found->keys = keys.begin;
    found->values = values.begin;
}

static void find_outs(const attn_cuda_borrowed *borrowed, const attn_geometry *geometry, const attn_batch *batch,
                      attn_cuda_rows_in_place *found) {
    stretch outs = {0}, lses = {0};
    for (uint32_t i = 0; i < batch->size; i++) {
        size_t rows = batch->query_lengths[i];
        if (!goes_on(&outs, batch->outs[i], rows * attn_out_row_bytes(geometry))) return;
        if (batch->lses == NULL) continue;
        if (!goes_on(&lses, batch->lses[i], rows * geometry->heads_q * sizeof(float))) return;
    }
    found->device_outs = address_of(borrowed, &outs);
    char *device_lses = address_of(borrowed, &lses);
    found->outs = found->device_outs != NULL && device_lses != NULL;
    found->device_lses = lses.begin == NULL ? NULL : (float *)(void *)device_lses;
}

attn_cuda_rows_in_place attn_cuda_find_rows(const attn_cuda_borrowed *borrowed, const attn_geometry *geometry,
                                            const attn_batch *batch) {
    attn_cuda_rows_in_place found = {0};
    if (!has_any(borrowed)) return found;
    find_ins(borrowed, geometry, batch, &found);
    find_outs(borrowed, geometry, batch, &found);
    return found;
}
