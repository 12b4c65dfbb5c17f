/* Appending and exporting rows of one sequence. */
#include "kernels/cuda/backend/state.h"
#include "kernels/cuda/backend/upload.h"
#include "kernels/cuda/export.h"

/* Where `tokens` tokens of a page table are, as the kernels take it: page * page_size + slot. */
static void fill_places(const cuda_backend *self, uint32_t *places, const uint32_t *pages, uint64_t position,
                        uint32_t tokens) {
    uint32_t page_size = self->base.geometry.page_size;
    for (uint32_t t = 0; t < tokens; t++) {
        uint64_t token = position + t;
        places[t] = pages[token / page_size] * page_size + (uint32_t)(token % page_size);
    }
}

/* Need key and value rows, of so many heads in all, not be copied? */
static bool stays(const cuda_backend *self, const void *keys, const void *values, size_t rows) {
    row_bytes row = attn_cuda_host_row(self);
    return attn_cuda_has_rows_as_they_are(self) && attn_cuda_address(&self->borrowed, keys, rows * row.key) &&
           attn_cuda_address(&self->borrowed, values, rows * row.value);
}

attn_status attn_cuda_append_rows(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                  uint32_t tokens, const void *keys, const void *values) {
    cuda_backend *self = attn_cuda_of(backend);
    flight *only = &self->flights[0];
    size_t rows = (size_t)tokens * backend->geometry.heads_kv;
    row_bytes there = attn_cuda_device_row(self), here = attn_cuda_host_row(self);
    place at, key, value;
    attn_status status;
    bool stay = stays(self, keys, values, rows);
    cudaSetDevice(self->device);
    for (int earnest = 0; earnest < 2; earnest++) {
        carver from = {.memory = earnest ? &only->up : NULL}, apart = {.memory = earnest ? &only->rows : NULL};
        at = attn_cuda_carve(&from, tokens * sizeof(uint32_t));
        key = attn_cuda_carve(stay ? &apart : &from, rows * there.key);
        value = attn_cuda_carve(stay ? &apart : &from, rows * there.value);
        if (earnest) continue;
        if (!attn_cuda_arena_reserve(&only->up, from.used, &status) ||
            !attn_cuda_arena_reserve(&only->rows, apart.used, &status)) {
            return status;
        }
    }
    fill_places(self, at.host, pages, position, tokens);
    if (stay) {
        ATTN_TRY(attn_cuda_upload(at, (uint32_t *)at.host + tokens, self->stream));
        ATTN_TRY(attn_cuda_upload_rows(keys, key, rows * here.key, self->stream));
        ATTN_TRY(attn_cuda_upload_rows(values, value, rows * here.value, self->stream));
    } else {
        attn_cuda_copy_rows(key.host, there.key, keys, here.key, rows);
        attn_cuda_copy_rows(value.host, there.value, values, here.value, rows);
        ATTN_TRY(attn_cuda_upload(at, (char *)value.host + rows * there.value, self->stream));
    }
    attn_cuda_layer to = attn_cuda_layer_at(self, layer);
    CUDA_TRY(attn_cuda_append(&to, at.device, key.device, value.device, tokens, only->status, self->stream));
    CUDA_TRY(cudaEventRecord(only->ended, self->stream));
    return attn_cuda_settle(self, only);
}

attn_status attn_cuda_export_rows(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                  uint32_t tokens, void *keys, void *values) {
    cuda_backend *self = attn_cuda_of(backend);
    flight *only = &self->flights[0];
    size_t rows = (size_t)tokens * backend->geometry.heads_kv;
    row_bytes there = attn_cuda_device_row(self), here = attn_cuda_host_row(self);
    place at, key, value;
    attn_status status;
    bool stay = stays(self, keys, values, rows);
    cudaSetDevice(self->device);
    for (int earnest = 0; earnest < 2; earnest++) {
        carver up = {.memory = earnest ? &only->up : NULL}, down = {.memory = earnest ? &only->down : NULL};
        at = attn_cuda_carve(&up, tokens * sizeof(uint32_t));
        key = attn_cuda_carve(&down, rows * there.key);
        value = attn_cuda_carve(&down, rows * there.value);
        if (stay) {
            key.device = attn_cuda_address(&self->borrowed, keys, rows * here.key);
            value.device = attn_cuda_address(&self->borrowed, values, rows * here.value);
        }
        if (earnest) continue;
        if (!attn_cuda_arena_reserve(&only->up, up.used, &status) ||
            !attn_cuda_arena_reserve(&only->down, down.used, &status)) {
            return status;
        }
    }
    fill_places(self, at.host, pages, position, tokens);
    ATTN_TRY(attn_cuda_upload(at, (uint32_t *)at.host + tokens, self->stream));
    attn_cuda_layer from = attn_cuda_layer_at(self, layer);
    CUDA_TRY(attn_cuda_export(&from, at.device, key.device, value.device, tokens, only->status, self->stream));
    CUDA_TRY(cudaEventRecord(only->ended, self->stream));
    ATTN_TRY(attn_cuda_settle(self, only));
    if (stay) return attn_ok();
    attn_cuda_copy_rows(keys, here.key, key.host, there.key, rows);
    attn_cuda_copy_rows(values, here.value, value.host, there.value, rows);
    return attn_ok();
}
