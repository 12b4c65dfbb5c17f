#define _POSIX_C_SOURCE 200809L

/*
 * The reference backend: float64, one thread, one obvious loop. It is the oracle that the others are
 * held against, so it shares nothing with them but the interface: no split plan (a plan offered to it
 * is checked, counted and logged like everywhere), and in default mode no partials and no combine.
 *
 * The pool: keys [page][layer][head][slot][head_dim] and values likewise, in the geometry's kv_dtype.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/backend.h"
#include "kernels/combine.h"
#include "kernels/dtype.h"

enum { MAX_HEAD_DIM = 256, TILE_TOKENS = 128, BLOCK_QUERIES = 1 };

typedef struct {
    attn_backend base;
    unsigned char *keys;
    unsigned char *values;
    double *scores;         /* [tokens of the pool] of the row at work */
    float *chunk_outs;      /* [chunks of the pool, head_dim_v] batch_invariant: the row's partials */
    float *chunk_lses;      /* [chunks of the pool] */
    attn_partial *partials; /* [chunks of the pool] views of these */
} reference_backend;

static reference_backend *of(attn_backend *backend) { return (reference_backend *)backend; }

/* ------------------------------------------------------------------------------------------- */
/* The pool */

static unsigned char *key_at(const reference_backend *self, uint32_t layer, uint32_t head, uint32_t page,
                             uint32_t slot) {
    const attn_geometry *g = &self->base.geometry;
    size_t row = (((size_t)page * g->layers + layer) * g->heads_kv + head) * g->page_size + slot;
    return self->keys + row * g->head_dim * attn_dtype_bytes(attn_kv_dtype(g));
}

static unsigned char *value_at(const reference_backend *self, uint32_t layer, uint32_t head, uint32_t page,
                               uint32_t slot) {
    const attn_geometry *g = &self->base.geometry;
    size_t row = (((size_t)page * g->layers + layer) * g->heads_kv + head) * g->page_size + slot;
    return self->values + row * g->head_dim_v * attn_dtype_bytes(attn_kv_dtype(g));
}

/* One row of one head to its place in the pool. */
static void store(const attn_geometry *g, const unsigned char *row, uint32_t count, float scale, unsigned char *place) {
    if (attn_kv_dtype(g) == ATTN_FP8_E4M3) {
        attn_elements_to_e4m3(g->dtype, row, scale, place, count);
    } else {
        memcpy(place, row, count * attn_dtype_bytes(g->dtype));
    }
}

static attn_status reference_append(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                    uint32_t tokens, const void *keys, const void *values) {
    const reference_backend *self = of(backend);
    const attn_geometry *g = &backend->geometry;
    size_t key_bytes = g->head_dim * attn_dtype_bytes(g->dtype),
           value_bytes = g->head_dim_v * attn_dtype_bytes(g->dtype);
    const unsigned char *key = keys, *value = values;
    for (uint64_t token = position; token < position + tokens; token++) {
        uint32_t page = pages[token / g->page_size], slot = (uint32_t)(token % g->page_size);
        for (uint32_t head = 0; head < g->heads_kv; head++) {
            attn_scale scale = attn_backend_scale(backend, layer, head);
            store(g, key, g->head_dim, scale.key, key_at(self, layer, head, page, slot));
            store(g, value, g->head_dim_v, scale.value, value_at(self, layer, head, page, slot));
            key += key_bytes;
            value += value_bytes;
        }
    }
    return attn_ok();
}

/* The other way round. */
static void load(const attn_geometry *g, const unsigned char *place, uint32_t count, float scale, unsigned char *row) {
    if (attn_kv_dtype(g) == ATTN_FP8_E4M3) {
        attn_elements_from_e4m3(g->dtype, place, scale, row, count);
    } else {
        memcpy(row, place, count * attn_dtype_bytes(g->dtype));
    }
}

static attn_status reference_export(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                    uint32_t tokens, void *keys, void *values) {
    const reference_backend *self = of(backend);
    const attn_geometry *g = &backend->geometry;
    size_t key_bytes = g->head_dim * attn_dtype_bytes(g->dtype),
           value_bytes = g->head_dim_v * attn_dtype_bytes(g->dtype);
    unsigned char *key = keys, *value = values;
    for (uint64_t token = position; token < position + tokens; token++) {
        uint32_t page = pages[token / g->page_size], slot = (uint32_t)(token % g->page_size);
        for (uint32_t head = 0; head < g->heads_kv; head++) {
            attn_scale scale = attn_backend_scale(backend, layer, head);
            load(g, key_at(self, layer, head, page, slot), g->head_dim, scale.key, key);
            load(g, value_at(self, layer, head, page, slot), g->head_dim_v, scale.value, value);
            key += key_bytes;
            value += value_bytes;
        }
    }
    return attn_ok();
}

static void reference_copy_page(attn_backend *backend, uint32_t from, uint32_t to) {
    const reference_backend *self = of(backend);
    const attn_geometry *g = &backend->geometry;
    size_t rows = (size_t)g->page_size * g->layers * g->heads_kv, element = attn_dtype_bytes(attn_kv_dtype(g));
    memcpy(key_at(self, 0, 0, to, 0), key_at(self, 0, 0, from, 0), rows * g->head_dim * element);
    memcpy(value_at(self, 0, 0, to, 0), value_at(self, 0, 0, from, 0), rows * g->head_dim_v * element);
}

static void reference_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots) {
    const reference_backend *self = of(backend);
    const attn_geometry *g = &backend->geometry;
    size_t element = attn_dtype_bytes(attn_kv_dtype(g));
    for (uint32_t layer = 0; layer < g->layers; layer++) {
        for (uint32_t head = 0; head < g->heads_kv; head++) { /* all bits set is NaN in every dtype */
            memset(key_at(self, layer, head, page, first_slot), 0xff, slots * g->head_dim * element);
            memset(value_at(self, layer, head, page, first_slot), 0xff, slots * g->head_dim_v * element);
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* One row: query row `query` of sequence `sequence`, query head `head` */

typedef struct {
    const attn_batch *batch;
    uint32_t sequence, query, head;
} row_name;

static void load_query(const reference_backend *self, row_name row, float *elements) {
    const attn_geometry *g = &self->base.geometry;
    const unsigned char *rows = row.batch->queries[row.sequence];
    size_t offset = ((size_t)row.query * g->heads_q + row.head) * g->head_dim * attn_dtype_bytes(g->dtype);
    attn_elements_to_floats(g->dtype, rows + offset, elements, g->head_dim);
}

static double score_of(const attn_batch *batch, const float *query, const float *key, uint32_t head_dim,
                       double key_scale) {
    double dot = 0;
    for (uint32_t d = 0; d < head_dim; d++) {
        dot += (double)query[d] * key[d];
    }
    double score = dot * key_scale * batch->scale;
    return batch->softcap > 0 ? batch->softcap * tanh(score / batch->softcap) : score;
}

static uint32_t kv_head_of(const reference_backend *self, row_name row) {
    return row.head / (self->base.geometry.heads_q / self->base.geometry.heads_kv);
}

/* scores[begin .. end - 1], and the largest of them. */
static double score_tokens(reference_backend *self, row_name row, uint64_t begin, uint64_t end) {
    const attn_geometry *g = &self->base.geometry;
    const uint32_t *pages = row.batch->pages + row.batch->page_offsets[row.sequence];
    float query[MAX_HEAD_DIM], key[MAX_HEAD_DIM];
    uint32_t layer = row.batch->layer, head = kv_head_of(self, row);
    double key_scale = attn_backend_scale(&self->base, layer, head).key, largest = -INFINITY;
    load_query(self, row, query);
    for (uint64_t t = begin; t < end; t++) {
        const unsigned char *stored = key_at(self, layer, head, pages[t / g->page_size], (uint32_t)(t % g->page_size));
        attn_elements_to_floats(attn_kv_dtype(g), stored, key, g->head_dim);
        self->scores[t] = score_of(row.batch, query, key, g->head_dim, key_scale);
        largest = fmax(largest, self->scores[t]);
    }
    return largest;
}

/*
 * Attends to pool-local tokens begin .. end - 1 and to `sink`, if that is not NULL.
 * Writes out[head_dim_v], which must be zero, and returns the LSE.
 */
static double attend(reference_backend *self, row_name row, uint64_t begin, uint64_t end, const float *sink,
                     double *out) {
    const attn_geometry *g = &self->base.geometry;
    const uint32_t *pages = row.batch->pages + row.batch->page_offsets[row.sequence];
    float value[MAX_HEAD_DIM];
    uint32_t layer = row.batch->layer, head = kv_head_of(self, row);
    double value_scale = attn_backend_scale(&self->base, layer, head).value;
    double largest = score_tokens(self, row, begin, end);
    if (sink) largest = fmax(largest, *sink);
    if (largest == -INFINITY) return -INFINITY;

    double sum = sink ? exp(*sink - largest) : 0;
    for (uint64_t t = begin; t < end; t++) {
        const unsigned char *stored =
            value_at(self, layer, head, pages[t / g->page_size], (uint32_t)(t % g->page_size));
        attn_elements_to_floats(attn_kv_dtype(g), stored, value, g->head_dim_v);
        double weight = exp(self->scores[t] - largest);
        sum += weight;
        for (uint32_t e = 0; e < g->head_dim_v; e++) {
            out[e] += weight * value[e];
        }
    }
    for (uint32_t e = 0; e < g->head_dim_v; e++) {
        out[e] = out[e] / sum * value_scale;
    }
    return largest + log(sum);
}

static float attend_to_floats(reference_backend *self, row_name row, uint64_t begin, uint64_t end, const float *sink,
                              float *out) {
    double exact[MAX_HEAD_DIM] = {0};
    double lse = attend(self, row, begin, end, sink, exact);
    for (uint32_t e = 0; e < self->base.geometry.head_dim_v; e++) {
        out[e] = (float)exact[e];
    }
    return (float)lse;
}

/* Where a row's results go. */
static unsigned char *out_of(const reference_backend *self, row_name row) {
    const attn_geometry *g = &self->base.geometry;
    size_t index = (size_t)row.query * g->heads_q + row.head;
    return (unsigned char *)row.batch->outs[row.sequence] + index * g->head_dim_v * attn_dtype_bytes(g->dtype);
}

static float *lse_of(const reference_backend *self, row_name row) {
    if (!row.batch->lses || !row.batch->lses[row.sequence]) return NULL;
    return row.batch->lses[row.sequence] + (size_t)row.query * self->base.geometry.heads_q + row.head;
}

static void decode_whole(reference_backend *self, row_name row) {
    const attn_geometry *g = &self->base.geometry;
    const float *sink = row.batch->sinks ? &row.batch->sinks[row.head] : NULL;
    float out[MAX_HEAD_DIM];
    uint64_t begin, end;
    attn_row_visible(row.batch, row.sequence, row.query, &begin, &end);
    float lse = attend_to_floats(self, row, begin, end, sink, out);
    attn_elements_from_floats(g->dtype, out, out_of(self, row), g->head_dim_v);
    if (lse_of(self, row)) *lse_of(self, row) = lse;
}

static void decode_part(reference_backend *self, row_name row) {
    const attn_geometry *g = &self->base.geometry;
    const attn_partial *partial = &row.batch->partials[row.sequence];
    size_t index = (size_t)row.query * g->heads_q + row.head;
    uint64_t begin, end;
    attn_row_visible(row.batch, row.sequence, row.query, &begin, &end);
    partial->lse[index] = attend_to_floats(self, row, begin, end, NULL, partial->out + index * g->head_dim_v);
}

/* The row's partial of one chunk. */
static float attend_to_chunk(reference_backend *self, row_name row, uint32_t chunk, float *out) {
    uint64_t chunk_begin = (uint64_t)chunk * ATTN_CHUNK_TOKENS, chunk_end = chunk_begin + ATTN_CHUNK_TOKENS;
    uint64_t begin, end;
    attn_row_visible(row.batch, row.sequence, row.query, &begin, &end);
    if (begin < chunk_begin) begin = chunk_begin;
    if (end > chunk_end) end = chunk_end;
    return attend_to_floats(self, row, begin, end > begin ? end : begin, NULL, out);
}

static uint32_t chunks_of(row_name row) {
    return (row.batch->lengths[row.sequence] + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS;
}

static void decode_part_chunks(reference_backend *self, row_name row) {
    const attn_geometry *g = &self->base.geometry;
    const attn_partial *partial = &row.batch->partials[row.sequence];
    size_t rows = (size_t)row.batch->query_lengths[row.sequence] * g->heads_q;
    for (uint32_t chunk = 0; chunk < chunks_of(row); chunk++) {
        size_t index = chunk * rows + (size_t)row.query * g->heads_q + row.head;
        partial->lse[index] = attend_to_chunk(self, row, chunk, partial->out + index * g->head_dim_v);
    }
}

static void decode_whole_chunks(reference_backend *self, row_name row) {
    const attn_geometry *g = &self->base.geometry;
    const float *sink = row.batch->sinks ? &row.batch->sinks[row.head] : NULL;
    for (uint32_t chunk = 0; chunk < chunks_of(row); chunk++) {
        self->chunk_lses[chunk] = attend_to_chunk(self, row, chunk, self->chunk_outs + (size_t)chunk * g->head_dim_v);
    }
    attn_combine_row(self->partials, chunks_of(row), 0, g->head_dim_v, sink, g->dtype, out_of(self, row),
                     lse_of(self, row));
}

/* ------------------------------------------------------------------------------------------- */
/* The batch */

static void decode_row(reference_backend *self, row_name row) {
    bool is_part = attn_batch_part(row.batch, row.sequence) != NULL;
    if (row.batch->batch_invariant) {
        (is_part ? decode_part_chunks : decode_whole_chunks)(self, row);
    } else {
        (is_part ? decode_part : decode_whole)(self, row);
    }
}

static void append_new_rows(attn_backend *backend, const attn_batch *batch) {
    for (uint32_t i = 0; i < batch->size; i++) {
        uint32_t rows = attn_batch_new_rows(batch, i);
        if (rows == 0) continue;
        reference_append(backend, batch->layer, batch->pages + batch->page_offsets[i], batch->lengths[i] - rows, rows,
                         batch->new_keys[i], batch->new_values[i]);
    }
}

static attn_status reference_decode(attn_backend *backend, const attn_batch *batch, const attn_plan *plan,
                                    attn_timing *timing) {
    int64_t start = attn_now_ns();
    ATTN_TRY(attn_line_build(&backend->line, batch));
    (void)attn_backend_accept_plan(backend, plan); /* one worker starts at the start */
    int64_t planned = attn_now_ns();
    append_new_rows(backend, batch);
    for (uint32_t i = 0; i < batch->size; i++) {
        for (uint32_t query = 0; query < batch->query_lengths[i]; query++) {
            for (uint32_t head = 0; head < backend->geometry.heads_q; head++) {
                decode_row(of(backend), (row_name){batch, i, query, head});
            }
        }
    }
    timing->plan_ns = planned - start;
    timing->attention_ns = attn_now_ns() - planned;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static void reference_destroy(attn_backend *backend) {
    reference_backend *self = of(backend);
    free(self->keys);
    free(self->values);
    free(self->scores);
    free(self->chunk_outs);
    free(self->chunk_lses);
    free(self->partials);
    attn_backend_fini(backend);
    free(self);
}

static bool allocate(reference_backend *self) {
    const attn_geometry *g = &self->base.geometry;
    size_t tokens = (size_t)self->base.pages * g->page_size;
    size_t chunks = attn_line_min_chunk_slots(g, self->base.pages);
    size_t rows = tokens * g->layers, head_bytes = (size_t)g->heads_kv * attn_dtype_bytes(attn_kv_dtype(g));
    self->keys = calloc(rows, head_bytes * g->head_dim);
    self->values = calloc(rows, head_bytes * g->head_dim_v);
    self->scores = calloc(tokens, sizeof *self->scores);
    self->chunk_outs = calloc(chunks, g->head_dim_v * sizeof *self->chunk_outs);
    self->chunk_lses = calloc(chunks, sizeof *self->chunk_lses);
    self->partials = calloc(chunks, sizeof *self->partials);
    if (!self->keys || !self->values || !self->scores || !self->chunk_outs || !self->chunk_lses || !self->partials) {
        return false;
    }
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        self->partials[chunk] = (attn_partial){self->chunk_outs + chunk * g->head_dim_v, self->chunk_lses + chunk};
    }
    return true;
}

static attn_status reference_create(const attn_backend_config *config, attn_backend **backend) {
    size_t bytes = attn_page_bytes(&config->geometry) * config->pages;
    reference_backend *self = calloc(1, sizeof *self);
    if (!self) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a reference backend");
    attn_backend_init(&self->base, &attn_reference_backend_ops, config, TILE_TOKENS, BLOCK_QUERIES, 1);
    snprintf(self->base.description, sizeof self->base.description, "reference: float64, 1 worker");
    if (!allocate(self) || attn_failed(attn_backend_keep_scales(&self->base, config))) {
        reference_destroy(&self->base);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a pool of %zu bytes", bytes);
    }
    *backend = &self->base;
    return attn_ok();
}

const attn_backend_ops attn_reference_backend_ops = {
    .kind = "reference",
    .stores_fp8 = true,
    .create = reference_create,
    .destroy = reference_destroy,
    .append = reference_append,
    .export = reference_export,
    .decode = reference_decode,
    .copy_page = reference_copy_page,
    .poison = reference_poison,
};
