#include "kernels/tests/backend_fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/dtype.h"

const backend_row backend_rows[BACKEND_ROWS] = {
    {"reference", NULL, 6000000, 0},
    {"cpu", "portable", 150000000, 0},
    {"cpu", "avx2", 1000000000, 0},
    {"cpu", "avx512", 1000000000, 0},
    {"cpu", "avx512bf16", 1000000000, 0},
    {"cuda", NULL, 1000000000, 0},
    {"reference", NULL, 6000000, ATTN_FP8_E4M3},
    {"cpu", "portable", 150000000, ATTN_FP8_E4M3},
    {"cpu", "auto", 1000000000, ATTN_FP8_E4M3},
    {"cuda", NULL, 1000000000, ATTN_FP8_E4M3},
};

const attn_geometry plain_geometry = {.layers = LAYERS,
                                      .heads_q = 8,
                                      .heads_kv = 2,
                                      .head_dim = 64,
                                      .head_dim_v = 64,
                                      .dtype = ATTN_BF16,
                                      .page_size = 16};

/* Arithmetic on what is the calling thread's alone: most of a test's time under ThreadSanitizer, if that looked on. */
#define UNWATCHED __attribute__((no_sanitize("thread")))

/* ------------------------------------------------------------------------------------------- */
/* Random numbers: splitmix64 */

UNWATCHED uint64_t random_next(test_random *random) {
    uint64_t z = random->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint32_t random_below(test_random *random, uint32_t limit) { return (uint32_t)(random_next(random) % limit); }

UNWATCHED float random_uniform(test_random *random, float low, float high) {
    return low + (high - low) * ((float)(random_next(random) >> 40) * 0x1p-24f);
}

/* ------------------------------------------------------------------------------------------- */
/* Memory that is there */

static void *allocate(size_t count, size_t bytes) {
    void *memory = calloc(count ? count : 1, bytes ? bytes : 1);
    assert_non_null(memory);
    return memory;
}

/* Rows at an odd address. */
static unsigned char *allocate_rows(size_t bytes) { return (unsigned char *)allocate(bytes + 1, 1) + 1; }

static void free_rows(unsigned char *rows) {
    if (rows) free(rows - 1);
}

/* ------------------------------------------------------------------------------------------- */
/* The pool */

uint32_t pool_pages_for(const attn_geometry *geometry, uint64_t tokens) {
    return (uint32_t)((tokens + geometry->page_size - 1) / geometry->page_size);
}

/*
 * Under TSan one row with workers says what the others would: they differ in arithmetic only. ATTND_TEST_BACKEND names
 * the one kind that is wanted, where the others have been tested elsewhere.
 */
static bool is_row_of_this_build(const backend_row *row) {
    const char *kind = getenv("ATTND_TEST_BACKEND");
    if (kind && strcmp(row->kind, kind) != 0) return false;
#ifdef __SANITIZE_THREAD__
    return row->isa && strcmp(row->isa, "portable") == 0 && !row->kv_dtype;
#else
    (void)row;
    return true;
#endif
}

static bool is_fp8(const test_pool *pool) { return attn_kv_dtype(&pool->geometry) == ATTN_FP8_E4M3; }

static float *random_scales(test_pool *pool) {
    uint32_t count = pool->geometry.layers * pool->geometry.heads_kv;
    float *scales = allocate(count, sizeof *scales);
    for (uint32_t n = 0; n < count; n++) {
        scales[n] = random_uniform(&pool->random, 0.004f, 0.06f);
    }
    return scales;
}

/* The geometry as the row has it, and scales if they are wanted. */
static void pool_shape(test_pool *pool, const backend_row *row, const attn_geometry *geometry) {
    pool->geometry = *geometry;
    if (!geometry->kv_dtype && geometry->dtype != ATTN_FP32) pool->geometry.kv_dtype = row->kv_dtype;
    if (!is_fp8(pool)) return;
    pool->k_scales = random_scales(pool);
    pool->v_scales = random_scales(pool);
}

static float *copy_of_scales(const test_pool *pool, const float *scales) {
    size_t bytes = (size_t)pool->geometry.layers * pool->geometry.heads_kv * sizeof *scales;
    return scales ? memcpy(allocate(1, bytes), scales, bytes) : NULL;
}

/* The backend gets scales of its own, which are gone afterwards: it has to keep them. */
static attn_status create_backend(test_pool *pool, const backend_row *row, uint32_t pages, uint32_t workers) {
    float *k_scales = copy_of_scales(pool, pool->k_scales), *v_scales = copy_of_scales(pool, pool->v_scales);
    attn_backend_config config = {.kind = row->kind,
                                  .geometry = pool->geometry,
                                  .pages = pages,
                                  .workers = workers,
                                  .isa = row->isa,
                                  .k_scales = k_scales,
                                  .v_scales = v_scales,
                                  .isolated = getenv("ATTND_TEST_ISOLATED") != NULL};
    attn_status status = attn_backend_create(&config, &pool->backend);
    free(k_scales);
    free(v_scales);
    return status;
}

void pool_open(test_pool *pool, const backend_row *row, const attn_geometry *geometry, uint32_t pages, uint32_t workers,
               uint64_t seed) {
    memset(pool, 0, sizeof *pool);
    if (!is_row_of_this_build(row)) {
        print_message("skipped: a row that this run does not test\n");
        skip();
    }
    pool->random.state = seed;
    pool_shape(pool, row, geometry);
    attn_status status = create_backend(pool, row, pages, workers);
    if (status.code == ATTN_UNAVAILABLE) {
        print_message("skipped: %s\n", status.message);
        pool_close(pool);
        skip();
    }
    assert_string_equal(status.message, "");
    pool->pages = pages;
    pool->free_pages = allocate(pages, sizeof *pool->free_pages);
    for (uint32_t page = 0; page < pages; page++) {
        assert_int_equal(attn_backend_poison(pool->backend, page, 0, geometry->page_size).code, ATTN_OK);
        uint32_t place = random_below(&pool->random, page + 1);
        pool->free_pages[page] = pool->free_pages[place];
        pool->free_pages[place] = page;
    }
    pool->free_count = pages;
}

void pool_close(test_pool *pool) {
    attn_backend_destroy(pool->backend);
    free(pool->free_pages);
    free(pool->k_scales);
    free(pool->v_scales);
    memset(pool, 0, sizeof *pool);
}

void pool_meant_row(const test_pool *pool, const float *scales, uint32_t head, const unsigned char *row, uint32_t count,
                    double *meant) {
    float elements[256];
    attn_elements_to_floats(pool->geometry.dtype, row, elements, count);
    if (!is_fp8(pool)) {
        for (uint32_t n = 0; n < count; n++)
            meant[n] = elements[n];
        return;
    }
    float scale = scales[LAYER * pool->geometry.heads_kv + head];
    for (uint32_t n = 0; n < count; n++)
        meant[n] = (double)attn_e4m3_to_float(attn_float_to_e4m3(elements[n] / scale)) * scale;
}

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

UNWATCHED static void fill_random_row(test_random *random, test_inputs inputs, float *row, size_t count) {
    for (size_t n = 0; n < count; n++) {
        row[n] = random_uniform(random, -2, 2);
        if (inputs == INPUTS_HUGE) row[n] = roundf(8 * row[n]);
    }
}

static void make_queries(test_sequence *sequence, test_pool *pool) {
    const attn_geometry *g = &pool->geometry;
    size_t count = (size_t)g->heads_q * g->head_dim;
    float *row = allocate(count, sizeof *row);
    sequence->queries = allocate_rows(sequence->spec.query_length * attn_query_row_bytes(g));
    for (uint32_t r = 0; r < sequence->spec.query_length; r++) {
        fill_random_row(&pool->random, sequence->spec.inputs, row, count);
        attn_elements_from_floats(g->dtype, row, sequence->queries + r * attn_query_row_bytes(g), count);
    }
    free(row);
}

static void make_keys_and_values(test_sequence *sequence, test_pool *pool) {
    const attn_geometry *g = &pool->geometry;
    size_t key_count = (size_t)g->heads_kv * g->head_dim, value_count = (size_t)g->heads_kv * g->head_dim_v;
    float *row = allocate(key_count + value_count, sizeof *row);
    uint32_t dominant = sequence->length ? random_below(&pool->random, sequence->length) : 0;
    sequence->keys = allocate_rows(sequence->length * attn_key_row_bytes(g));
    sequence->values = allocate_rows(sequence->length * attn_value_row_bytes(g));
    for (uint32_t t = 0; t < sequence->length; t++) {
        if (t == 0 || sequence->spec.inputs != INPUTS_EQUAL) {
            fill_random_row(&pool->random, sequence->spec.inputs, row, key_count);
        }
        for (size_t n = 0; n < key_count && sequence->spec.inputs == INPUTS_DOMINANT && t == dominant; n++) {
            row[n] *= 16;
        }
        fill_random_row(&pool->random, INPUTS_UNIFORM, row + key_count, value_count);
        attn_elements_from_floats(g->dtype, row, sequence->keys + t * attn_key_row_bytes(g), key_count);
        attn_elements_from_floats(g->dtype, row + key_count, sequence->values + t * attn_value_row_bytes(g),
                                  value_count);
    }
    free(row);
}

/* A page table for `length` tokens, and up to three unused entries. */
static void take_pages(test_sequence *sequence, test_pool *pool) {
    sequence->page_count = pool_pages_for(&pool->geometry, sequence->length);
    sequence->table_size = sequence->page_count + random_below(&pool->random, 4);
    sequence->pages = allocate(sequence->table_size, sizeof *sequence->pages);
    assert_true(sequence->page_count <= pool->free_count);
    for (uint32_t p = 0; p < sequence->table_size; p++) {
        sequence->pages[p] = p < sequence->page_count ? pool->free_pages[--pool->free_count] : UNUSED_PAGE_ENTRY;
    }
}

/* Uploads rows to positions of the sequence, in pieces that start and end anywhere. */
static void append_in_pieces(const test_sequence *sequence, test_pool *pool, uint32_t position, uint32_t tokens,
                             const unsigned char *keys, const unsigned char *values) {
    const attn_geometry *g = &pool->geometry;
    for (uint32_t done = 0; done < tokens;) {
        uint32_t piece = 1 + random_below(&pool->random, 3000);
        if (piece > tokens - done) piece = tokens - done;
        attn_status status =
            attn_backend_append(pool->backend, LAYER, sequence->pages, sequence->page_count, position + done, piece,
                                keys + done * attn_key_row_bytes(g), values + done * attn_value_row_bytes(g));
        assert_string_equal(status.message, "");
        done += piece;
    }
}

size_t sequence_out_bytes(const test_sequence *sequence, const attn_geometry *geometry) {
    return sequence->spec.query_length * attn_out_row_bytes(geometry);
}

size_t sequence_lse_bytes(const test_sequence *sequence, const attn_geometry *geometry) {
    return (size_t)sequence->spec.query_length * geometry->heads_q * sizeof(float);
}

/* All of a sequence but what is in the pool: rows, a page table, room for outputs. */
static void prepare_sequence(test_sequence *sequence, test_pool *pool, sequence_spec spec) {
    memset(sequence, 0, sizeof *sequence);
    sequence->spec = spec;
    sequence->length = spec.stored + (spec.read ? 0 : spec.query_length);
    sequence->key_row_bytes = attn_key_row_bytes(&pool->geometry);
    sequence->value_row_bytes = attn_value_row_bytes(&pool->geometry);
    make_queries(sequence, pool);
    make_keys_and_values(sequence, pool);
    take_pages(sequence, pool);
    sequence->out = allocate_rows(sequence_out_bytes(sequence, &pool->geometry));
    sequence->lse = allocate(sequence_lse_bytes(sequence, &pool->geometry), 1);
}

void sequence_init(test_sequence *sequence, test_pool *pool, sequence_spec spec) {
    prepare_sequence(sequence, pool, spec);
    append_in_pieces(sequence, pool, 0, spec.stored, sequence->keys, sequence->values);
}

void sequence_make_fork(test_sequence *fork, test_pool *pool, const test_sequence *parent, uint32_t shared,
                        sequence_spec spec) {
    assert_true(shared % pool->geometry.page_size == 0 && shared <= spec.stored && shared <= parent->spec.stored);
    prepare_sequence(fork, pool, spec);
    for (uint32_t p = 0; p < shared / pool->geometry.page_size; p++) {
        pool->free_pages[pool->free_count++] = fork->pages[p];
        fork->pages[p] = parent->pages[p];
    }
    memcpy(fork->keys, parent->keys, shared * fork->key_row_bytes);
    memcpy(fork->values, parent->values, shared * fork->value_row_bytes);
    append_in_pieces(fork, pool, shared, spec.stored - shared, fork->keys + shared * fork->key_row_bytes,
                     fork->values + shared * fork->value_row_bytes);
}

void sequence_fini(test_sequence *sequence) {
    free_rows(sequence->queries);
    free_rows(sequence->keys);
    free_rows(sequence->values);
    free_rows(sequence->out);
    free(sequence->lse);
    free(sequence->pages);
    free(sequence->partial.out);
    free(sequence->partial.lse);
    memset(sequence, 0, sizeof *sequence);
}

/* ------------------------------------------------------------------------------------------- */
/* Parts */

/* How many of the first `total` tokens of a sequence are in the part. */
static uint32_t tokens_in_part(const attn_part *part, uint32_t total) {
    uint32_t tokens = 0;
    for (uint32_t chunk = part->chunk_first; chunk * ATTN_CHUNK_TOKENS < total; chunk += part->chunk_stride) {
        uint32_t rest = total - chunk * ATTN_CHUNK_TOKENS;
        tokens += rest < ATTN_CHUNK_TOKENS ? rest : ATTN_CHUNK_TOKENS;
    }
    return tokens;
}

/* Position in the whole sequence of a token of the part. */
static uint32_t position_in_whole(const attn_part *part, uint32_t token) {
    uint32_t chunk = part->chunk_first + token / ATTN_CHUNK_TOKENS * part->chunk_stride;
    return chunk * ATTN_CHUNK_TOKENS + token % ATTN_CHUNK_TOKENS;
}

static void upload_part(const test_sequence *part, test_pool *pool, const test_sequence *whole, uint32_t stored) {
    const attn_geometry *g = &pool->geometry;
    for (uint32_t token = 0; token < stored; token += ATTN_CHUNK_TOKENS) {
        uint32_t tokens = stored - token < ATTN_CHUNK_TOKENS ? stored - token : ATTN_CHUNK_TOKENS;
        size_t position = position_in_whole(&part->part, token);
        append_in_pieces(part, pool, token, tokens, whole->keys + position * attn_key_row_bytes(g),
                         whole->values + position * attn_value_row_bytes(g));
    }
}

void sequence_make_part(test_sequence *part, test_pool *pool, const test_sequence *whole, uint32_t index,
                        uint32_t count, bool chunked) {
    const attn_geometry *g = &pool->geometry;
    memset(part, 0, sizeof *part);
    part->spec = whole->spec;
    part->part = (attn_part){.chunk_first = index, .chunk_stride = count, .total_length = whole->length};
    part->length = tokens_in_part(&part->part, whole->length);
    uint32_t stored = tokens_in_part(&part->part, whole->spec.stored);
    part->part.new_count = part->length - stored;
    size_t first = part->part.new_count ? position_in_whole(&part->part, stored) : whole->spec.stored;
    part->part.new_first = (uint32_t)(first - whole->spec.stored);
    part->part_keys = whole->keys + first * attn_key_row_bytes(g);
    part->part_values = whole->values + first * attn_value_row_bytes(g);
    part->queries = allocate_rows(whole->spec.query_length * attn_query_row_bytes(g));
    memcpy(part->queries, whole->queries, whole->spec.query_length * attn_query_row_bytes(g));
    take_pages(part, pool);
    upload_part(part, pool, whole, stored);

    size_t partials = chunked ? (part->length + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS : 1;
    size_t rows = (size_t)whole->spec.query_length * g->heads_q;
    part->partial.out = allocate(partials * rows * g->head_dim_v, sizeof(float));
    part->partial.lse = allocate(partials * rows, sizeof(float));
}

/* ------------------------------------------------------------------------------------------- */
/* Batches */

static void allocate_batch(test_batch *batch, uint32_t count, uint32_t table_entries) {
    batch->lengths = allocate(count, sizeof *batch->lengths);
    batch->query_lengths = allocate(count, sizeof *batch->query_lengths);
    batch->page_offsets = allocate(count + 1, sizeof *batch->page_offsets);
    batch->pages = allocate(table_entries, sizeof *batch->pages);
    batch->queries = allocate(count, sizeof *batch->queries);
    batch->new_keys = allocate(count, sizeof *batch->new_keys);
    batch->new_values = allocate(count, sizeof *batch->new_values);
    batch->outs = allocate(count, sizeof *batch->outs);
    batch->lses = allocate(count, sizeof *batch->lses);
    batch->parts = allocate(count, sizeof *batch->parts);
    batch->partials = allocate(count, sizeof *batch->partials);
}

static void put_new_rows(test_batch *batch, uint32_t i, const test_sequence *sequence) {
    if (sequence->spec.read) return;
    if (sequence->part.chunk_stride) {
        batch->new_keys[i] = sequence->part_keys;
        batch->new_values[i] = sequence->part_values;
        return;
    }
    size_t stored = sequence->spec.stored;
    batch->new_keys[i] = sequence->keys + stored * sequence->key_row_bytes;
    batch->new_values[i] = sequence->values + stored * sequence->value_row_bytes;
}

void test_batch_init(test_batch *batch, test_sequence *const *sequences, uint32_t count,
                     const decode_options *options) {
    uint32_t table_entries = 0;
    bool has_parts = false;
    memset(batch, 0, sizeof *batch);
    for (uint32_t i = 0; i < count; i++) {
        table_entries += sequences[i]->table_size;
    }
    allocate_batch(batch, count, table_entries);
    for (uint32_t i = 0, entry = 0; i < count; i++) {
        const test_sequence *sequence = sequences[i];
        batch->lengths[i] = sequence->length;
        batch->query_lengths[i] = sequence->spec.query_length;
        batch->page_offsets[i] = entry;
        memcpy(batch->pages + entry, sequence->pages, sequence->table_size * sizeof *batch->pages);
        entry += sequence->table_size;
        batch->page_offsets[i + 1] = entry;
        batch->queries[i] = sequence->queries;
        batch->outs[i] = sequence->out;
        batch->lses[i] = sequence->lse;
        batch->parts[i] = sequence->part;
        batch->partials[i] = sequence->partial;
        has_parts |= sequence->part.chunk_stride != 0;
        put_new_rows(batch, i, sequence);
    }
    batch->batch = (attn_batch){
        .layer = LAYER,
        .size = count,
        .lengths = batch->lengths,
        .query_lengths = batch->query_lengths,
        .page_offsets = batch->page_offsets,
        .pages = batch->pages,
        .queries = batch->queries,
        .new_keys = batch->new_keys,
        .new_values = batch->new_values,
        .outs = batch->outs,
        .lses = options->no_lse ? NULL : batch->lses,
        .parts = has_parts ? batch->parts : NULL,
        .partials = has_parts ? batch->partials : NULL,
        .scale = options->scale,
        .softcap = options->softcap,
        .window = options->window,
        .sinks = options->sinks,
        .batch_invariant = options->batch_invariant,
    };
}

void test_batch_fini(test_batch *batch) {
    free(batch->lengths);
    free(batch->query_lengths);
    free(batch->page_offsets);
    free(batch->pages);
    free(batch->queries);
    free(batch->new_keys);
    free(batch->new_values);
    free(batch->outs);
    free(batch->lses);
    free(batch->parts);
    free(batch->partials);
    memset(batch, 0, sizeof *batch);
}

static void fill_outputs_with_garbage(const test_pool *pool, const test_batch *batch) {
    const attn_geometry *g = &pool->geometry;
    for (uint32_t i = 0; i < batch->batch.size; i++) {
        if (batch->parts[i].chunk_stride) continue;
        memset(batch->outs[i], 0xa5, batch->query_lengths[i] * attn_out_row_bytes(g));
        memset(batch->lses[i], 0xa5, (size_t)batch->query_lengths[i] * g->heads_q * sizeof(float));
    }
}

void decode_batch(test_pool *pool, test_batch *batch, const attn_plan *plan) {
    attn_timing timing = {.plan_ns = -1, .attention_ns = -1, .combine_ns = -1};
    fill_outputs_with_garbage(pool, batch);
    attn_status status = attn_backend_decode(pool->backend, &batch->batch, plan, &timing);
    assert_string_equal(status.message, "");
    assert_int_equal(status.code, ATTN_OK);
    assert_true(timing.plan_ns >= 0 && timing.attention_ns >= 0 && timing.combine_ns >= 0);
}

void decode_sequences(test_pool *pool, test_sequence *const *sequences, uint32_t count, const decode_options *options) {
    test_batch batch;
    test_batch_init(&batch, sequences, count, options);
    decode_batch(pool, &batch, NULL);
    test_batch_fini(&batch);
}

/* ------------------------------------------------------------------------------------------- */
/* The oracle */

/* One KV head of a sequence, as it is meant. */
typedef struct {
    uint32_t head;
    bool loaded;
    double *keys, *values; /* [length, head_dim], [length, head_dim_v] */
    double *scores;        /* [length] */
    double *out;           /* [head_dim_v] */
} oracle;

static void oracle_load(oracle *self, const test_pool *pool, const test_sequence *sequence, uint32_t head) {
    const attn_geometry *g = &pool->geometry;
    if (self->loaded && self->head == head) return;
    size_t element = attn_dtype_bytes(g->dtype);
    for (uint32_t t = 0; t < sequence->length; t++) {
        const unsigned char *key = sequence->keys + t * attn_key_row_bytes(g) + head * g->head_dim * element;
        const unsigned char *value = sequence->values + t * attn_value_row_bytes(g) + head * g->head_dim_v * element;
        pool_meant_row(pool, pool->k_scales, head, key, g->head_dim, self->keys + (size_t)t * g->head_dim);
        pool_meant_row(pool, pool->v_scales, head, value, g->head_dim_v, self->values + (size_t)t * g->head_dim_v);
    }
    self->head = head;
    self->loaded = true;
}

/* The definition in attention.h, for one row. Returns the LSE. */
UNWATCHED static double oracle_attend(oracle *self, const attn_geometry *g, const test_sequence *sequence,
                                      const decode_options *options, uint32_t query, uint32_t head_q,
                                      decode_errors *errors) {
    float elements[256];
    size_t index = (size_t)query * g->heads_q + head_q;
    attn_elements_to_floats(g->dtype, sequence->queries + index * g->head_dim * attn_dtype_bytes(g->dtype), elements,
                            g->head_dim);
    int64_t length = sequence->length;
    int64_t position = sequence->spec.read ? length - 1 : length - sequence->spec.query_length + query;
    int64_t first = options->window && position - options->window + 1 > 0 ? position - options->window + 1 : 0;
    double largest = options->sinks ? options->sinks[head_q] : -INFINITY;
    for (int64_t t = first; t <= position; t++) {
        double dot = 0;
        for (uint32_t d = 0; d < g->head_dim; d++) {
            dot += elements[d] * self->keys[(size_t)t * g->head_dim + d];
        }
        double score = dot * options->scale;
        if (options->softcap > 0) score = options->softcap * tanh(score / options->softcap);
        self->scores[t] = score;
        largest = fmax(largest, score);
        errors->largest_score = fmax(errors->largest_score, fabs(dot * options->scale));
    }
    memset(self->out, 0, g->head_dim_v * sizeof *self->out);
    if (largest == -INFINITY) return -INFINITY;
    double sum = options->sinks ? exp(options->sinks[head_q] - largest) : 0;
    for (int64_t t = first; t <= position; t++) {
        double weight = exp(self->scores[t] - largest);
        sum += weight;
        for (uint32_t e = 0; e < g->head_dim_v; e++) {
            self->out[e] += weight * self->values[(size_t)t * g->head_dim_v + e];
        }
    }
    for (uint32_t e = 0; e < g->head_dim_v; e++) {
        self->out[e] /= sum;
    }
    return largest + log(sum);
}

typedef struct {
    double difference, expected; /* squared norms */
} norms;

static void compare_row(const oracle *self, const attn_geometry *g, const test_sequence *sequence, size_t index,
                        norms *sums) {
    float out[256];
    attn_elements_to_floats(g->dtype, sequence->out + index * g->head_dim_v * attn_dtype_bytes(g->dtype), out,
                            g->head_dim_v);
    for (uint32_t e = 0; e < g->head_dim_v; e++) {
        double difference = out[e] - self->out[e];
        sums->difference += difference * difference;
        sums->expected += self->out[e] * self->out[e];
    }
}

static void compare_lse(float lse, double expected, decode_errors *errors) {
    if (expected == -INFINITY) {
        assert_true(lse == -INFINITY);
        return;
    }
    double error = fabs(lse - expected);
    errors->lse = isnan(error) ? INFINITY : fmax(errors->lse, error);
    errors->largest_lse = fmax(errors->largest_lse, fabs(expected));
}

decode_errors sequence_errors(test_pool *pool, const test_sequence *sequence, const decode_options *options,
                              uint64_t max_work) {
    const attn_geometry *g = &pool->geometry;
    decode_errors errors = {.of_fp8 = is_fp8(pool)};
    norms sums = {0};
    oracle self = {.keys = allocate((size_t)sequence->length * g->head_dim, sizeof(double)),
                   .values = allocate((size_t)sequence->length * g->head_dim_v, sizeof(double)),
                   .scores = allocate(sequence->length, sizeof(double)),
                   .out = allocate(g->head_dim_v, sizeof(double))};
    uint32_t rows = sequence->spec.query_length * g->heads_q;
    uint64_t row_work = 1 + (uint64_t)sequence->length * (g->head_dim + g->head_dim_v);
    uint64_t wanted = max_work / row_work < 2 ? 2 : max_work / row_work;
    uint32_t stride = wanted >= rows ? 1 : (uint32_t)(rows / wanted) | 1;
    for (uint32_t n = 0; n < rows + stride - 1; n += stride) { /* every stride-th, and the last */
        uint32_t row = n < rows ? n : rows - 1; /* numbered [heads_q, query_length]: KV head by KV head */
        uint32_t query = row % sequence->spec.query_length, head_q = row / sequence->spec.query_length;
        size_t index = (size_t)query * g->heads_q + head_q;
        oracle_load(&self, pool, sequence, head_q / (g->heads_q / g->heads_kv));
        double lse = oracle_attend(&self, g, sequence, options, query, head_q, &errors);
        compare_row(&self, g, sequence, index, &sums);
        if (!options->no_lse) compare_lse(sequence->lse[index], lse, &errors);
    }
    free(self.keys);
    free(self.values);
    free(self.scores);
    free(self.out);
    if (sums.expected > 0) {
        errors.out = sqrt(sums.difference / sums.expected);
    } else if (sums.difference != 0) { /* NaN, too */
        errors.out = INFINITY;
    }
    if (isnan(errors.out)) errors.out = INFINITY;
    return errors;
}

/*
 * The bounds. bf16 is the project's promise. fp16 keeps three bits more: an eighth of that. fp32 is
 * held to float arithmetic. Over keys and values in fp8 there is room for one more rounding of that kind. Scores are
 * float32 in every backend, so a score of s is off by up to ulp(s) = |s| 2^-23 and its weight by as much, relatively:
 * that is what the second term grants, and it counts only where logits are huge. An LSE is a float32 and cannot be
 * nearer than half its ulp.
 */
void assert_errors_within_bounds(const decode_errors *errors, attn_dtype dtype, const char *what) {
    double relative = dtype == ATTN_BF16 ? 2.5e-3 : dtype == ATTN_FP16 ? 2.5e-3 / 8 : 1e-6;
    if (errors->of_fp8) relative *= 1.6;
    double out_bound = relative + errors->largest_score * 0x1p-23;
    double lse_bound = 1e-4 + errors->largest_lse * 0x1p-23;
    if (errors->out <= out_bound && errors->lse <= lse_bound) return;
    fail_msg("%s: out is off by %.3g (bound %.3g), LSE by %.3g (bound %.3g), largest score %.3g", what, errors->out,
             out_bound, errors->lse, lse_bound, errors->largest_score);
}
