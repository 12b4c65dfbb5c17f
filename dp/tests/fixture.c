#define _GNU_SOURCE
#include "dp/tests/fixture.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dp/state.h"

static pthread_mutex_t calls_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t calls_changed = PTHREAD_COND_INITIALIZER;

dp_config small_config(void) {
    return (dp_config){
        .geometry = {.layers = 3,
                     .heads_q = 4,
                     .heads_kv = 2,
                     .head_dim = 32,
                     .head_dim_v = 40,
                     .dtype = ATTN_FP32,
                     .page_size = 16},
        .backend = "reference",
        .ranks = 1,
        .workers_per_rank = 1,
        .pages_per_rank = 256,
        .max_sequences = 64,
        .max_batch = 32,
        .max_sequence_tokens = 8192,
        .max_queue = 64,
        .tenants = TENANTS,
    };
}

dp_engine *create_engine(const dp_config *config) {
    dp_engine *engine;
    assert_ok(dp_engine_create(config, &engine));
    /* The reference backend calls nothing small, but the path is to be tested. */
    if (!config->pin_cpus) engine->small_bytes = 256 * 1024;
    return engine;
}

void assert_no_leak(dp_engine *engine) {
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    assert_int_equal(0, counts.sequences);
    assert_int_equal(0, counts.steps);
    for (uint32_t r = 0; r < dp_engine_ranks(engine); r++) {
        dp_rank_info info = rank_info(engine, r);
        assert_int_equal(info.pages_total, info.pages_free);
        assert_int_equal(0, info.sequences);
        assert_int_equal(0, info.tokens);
        assert_int_equal(0, info.tokens_in_flight);
        assert_int_equal(0, info.queue_depth);
    }
}

void destroy_engine(dp_engine *engine) {
    assert_no_leak(engine);
    dp_engine_destroy(engine);
}

dp_rank_info rank_info(dp_engine *engine, uint32_t rank) {
    dp_rank_info info;
    dp_engine_rank_info(engine, rank, &info);
    return info;
}

uint64_t pages_free(dp_engine *engine) {
    uint64_t free = 0;
    for (uint32_t r = 0; r < dp_engine_ranks(engine); r++)
        free += rank_info(engine, r).pages_free;
    return free;
}

void assert_code_at(attn_code expected, attn_status status, const char *text, const char *file, int line) {
    bool as_expected = status.code == expected && (text == NULL || strstr(status.message, text) != NULL);
    if (as_expected) return;
    print_error("%s: \"%s\" where %s%s%s was expected\n", attn_code_name(status.code), status.message,
                attn_code_name(expected), text == NULL ? "" : " with ", text == NULL ? "" : text);
    _fail(file, line);
}

/* ------------------------------------------------------------------------------------------- */

/* Arithmetic on what is the calling thread's alone: much of a test's time under ThreadSanitizer, if that looked on. */
#define UNWATCHED __attribute__((no_sanitize("thread")))

UNWATCHED uint64_t dice_next(dice *dice) {
    uint64_t z = dice->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint32_t dice_below(dice *dice, uint32_t limit) { return (uint32_t)(dice_next(dice) >> 32) % limit; }

UNWATCHED static float random_value(dice *dice) {
    return (float)(dice_next(dice) >> 40) / (float)(1 << 24) * 4.0f - 2.0f;
}

UNWATCHED static void fill_floats(dice *dice, float *elements, size_t count) {
    for (size_t i = 0; i < count; i++)
        elements[i] = random_value(dice);
}

/* Cut, not rounded: any values will do. */
UNWATCHED static void fill_bf16(dice *dice, uint16_t *elements, size_t count) {
    for (size_t i = 0; i < count; i++) {
        float value = random_value(dice);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        elements[i] = (uint16_t)(bits >> 16);
    }
}

void *random_elements(dice *dice, attn_dtype dtype, size_t count) {
    assert_true(dtype == ATTN_FP32 || dtype == ATTN_BF16);
    void *elements = malloc(count * attn_dtype_bytes(dtype) + 1);
    assert_non_null(elements);
    if (dtype == ATTN_BF16)
        fill_bf16(dice, elements, count);
    else
        fill_floats(dice, elements, count);
    return elements;
}

tensor whole_tensor(const void *data, size_t size) {
    tensor made = {0};
    if (size == 0) return made;
    made.spans = malloc(sizeof *made.spans);
    made.memory = malloc(size);
    memcpy(made.memory, data, size);
    made.spans[0] = (dp_span){made.memory, size};
    made.view = (dp_tensor_view){made.spans, 1, size};
    return made;
}

tensor cut_tensor(dice *dice, const void *data, size_t size) {
    tensor made = {0};
    if (size == 0) return made;
    uint32_t pieces = 1 + dice_below(dice, 12);
    made.spans = calloc(pieces, sizeof *made.spans);
    made.memory = malloc(size + 4 * pieces);
    size_t at = 0, place = 0;
    for (uint32_t i = 0; i < pieces; i++) {
        size_t left = size - at;
        size_t piece = i + 1 == pieces ? left : dice_below(dice, 4) == 0 ? 0 : dice_next(dice) % (left + 1) / 2;
        place += 1 + dice_below(dice, 3);
        memcpy(made.memory + place, (const char *)data + at, piece);
        made.spans[i] = (dp_span){made.memory + place, piece};
        at += piece;
        place += piece;
    }
    made.view = (dp_tensor_view){made.spans, pieces, size};
    return made;
}

void free_tensor(tensor *tensor) {
    free(tensor->spans);
    free(tensor->memory);
    memset(tensor, 0, sizeof *tensor);
}

/* ------------------------------------------------------------------------------------------- */

uint64_t open_sequence(dp_engine *engine, dp_placement placement, uint32_t rank) {
    uint64_t handle;
    uint32_t where;
    assert_ok(dp_sequences_open(engine, TENANT, 1, placement, rank, &handle, &where));
    return handle;
}

void close_sequence(dp_engine *engine, uint64_t handle) { assert_ok(dp_sequences_close(engine, TENANT, &handle, 1)); }

dp_sequence_info describe(dp_engine *engine, uint64_t handle) {
    dp_sequence_info info;
    assert_ok(dp_sequences_describe(engine, TENANT, &handle, 1, &info));
    return info;
}

uint64_t fork_sequence(dp_engine *engine, uint64_t parent, uint64_t length) {
    uint64_t handle;
    uint32_t rank;
    assert_ok(dp_sequence_fork(engine, TENANT, parent, length, &handle, &rank));
    return handle;
}

/* ------------------------------------------------------------------------------------------- */

layer_rows random_rows(dice *dice, const attn_geometry *geometry, uint32_t rows, bool read_only) {
    layer_rows made = {.rows = rows};
    made.q = random_elements(dice, geometry->dtype, (size_t)rows * geometry->heads_q * geometry->head_dim);
    if (read_only) return made;
    made.k = random_elements(dice, geometry->dtype, (size_t)rows * geometry->heads_kv * geometry->head_dim);
    made.v = random_elements(dice, geometry->dtype, (size_t)rows * geometry->heads_kv * geometry->head_dim_v);
    return made;
}

void free_rows(layer_rows *rows) {
    free(rows->q);
    free(rows->k);
    free(rows->v);
    memset(rows, 0, sizeof *rows);
}

/* Tensors that a lost rank may still use, and the engine keeps. */
typedef struct {
    tensor tensors[3];
} detained_tensors;

static uint32_t detained; /* guarded by calls_lock */

static void free_detained(void *context) {
    detained_tensors *kept = context;
    for (int i = 0; i < 3; i++)
        free_tensor(&kept->tensors[i]);
    free(kept);
    pthread_mutex_lock(&calls_lock);
    detained--;
    pthread_cond_broadcast(&calls_changed);
    pthread_mutex_unlock(&calls_lock);
}

/* Takes the tensors from their owner. */
static dp_keep detain(tensor *first, tensor *second, tensor *third) {
    detained_tensors *kept = calloc(1, sizeof *kept);
    assert_non_null(kept);
    tensor *from[3] = {first, second, third};
    for (int i = 0; i < 3; i++) {
        if (from[i] == NULL) continue;
        kept->tensors[i] = *from[i];
        *from[i] = (tensor){0};
    }
    pthread_mutex_lock(&calls_lock);
    detained++;
    pthread_mutex_unlock(&calls_lock);
    return (dp_keep){.release = free_detained, .context = kept};
}

uint32_t detained_now(void) {
    pthread_mutex_lock(&calls_lock);
    uint32_t now = detained;
    pthread_mutex_unlock(&calls_lock);
    return now;
}

void wait_until_none_is_detained(void) {
    pthread_mutex_lock(&calls_lock);
    while (detained > 0)
        pthread_cond_wait(&calls_changed, &calls_lock);
    pthread_mutex_unlock(&calls_lock);
}

static void call_done(dp_layer_call *call, attn_status status) {
    waiting_call *waiting = (waiting_call *)call;
    if (call->detained) dp_step_keep(waiting->step, detain(&waiting->q, &waiting->k, &waiting->v));
    pthread_mutex_lock(&calls_lock);
    attn_status_save(&waiting->status, status);
    waiting->done = true;
    pthread_cond_broadcast(&calls_changed);
    pthread_mutex_unlock(&calls_lock);
}

static tensor make_tensor(dice *cuts, const void *data, size_t size) {
    return cuts == NULL ? whole_tensor(data, size) : cut_tensor(cuts, data, size);
}

void prepare_call(waiting_call *call, const attn_geometry *geometry, uint32_t layer, const layer_rows *rows,
                  const dp_options *options, dice *cuts) {
    memset(call, 0, sizeof *call);
    call->q = make_tensor(cuts, rows->q, rows->rows * attn_query_row_bytes(geometry));
    call->k = make_tensor(cuts, rows->k, rows->k == NULL ? 0 : rows->rows * attn_key_row_bytes(geometry));
    call->v = make_tensor(cuts, rows->v, rows->v == NULL ? 0 : rows->rows * attn_value_row_bytes(geometry));
    call->call.layer = layer;
    if (options != NULL) call->call.options = *options;
    call->call.queries = call->q.view;
    call->call.new_keys = call->k.view;
    call->call.new_values = call->v.view;
    call->call.deadline_ns = INT64_MAX;
    call->call.done = call_done;
}

attn_status start_call(dp_step *step, waiting_call *call) {
    call->step = step;
    return dp_step_layer(step, &call->call);
}

attn_status wait_for_call(waiting_call *call) {
    pthread_mutex_lock(&calls_lock);
    while (!call->done)
        pthread_cond_wait(&calls_changed, &calls_lock);
    pthread_mutex_unlock(&calls_lock);
    return attn_status_view(&call->status);
}

void free_call(waiting_call *call) {
    dp_result_release(call->call.result);
    call->call.result = NULL;
    free_tensor(&call->q);
    free_tensor(&call->k);
    free_tensor(&call->v);
}

attn_status try_begin_step(dp_engine *engine, const uint64_t *sequences, const uint32_t *query_lengths, uint32_t count,
                           bool read_only, dp_step **step) {
    dp_step_request request = {.tenant = TENANT,
                               .sequences = sequences,
                               .query_lengths = query_lengths,
                               .count = count,
                               .read_only = read_only};
    return dp_step_begin(engine, &request, step);
}

dp_step *begin_step(dp_engine *engine, const uint64_t *sequences, const uint32_t *query_lengths, uint32_t count,
                    bool read_only) {
    dp_step *step;
    assert_ok(try_begin_step(engine, sequences, query_lengths, count, read_only, &step));
    return step;
}

attn_status try_layer(dp_step *step, const attn_geometry *geometry, uint32_t layer, const layer_rows *rows,
                      const dp_options *options, dice *cuts, void *out, float *lse) {
    waiting_call call;
    prepare_call(&call, geometry, layer, rows, options, cuts);
    attn_status status = start_call(step, &call);
    if (!attn_failed(status)) {
        status = wait_for_call(&call);
        if (attn_failed(status)) {
            assert_null(call.call.result);
            status = attn_error(status.code, "%s", status.message);
        } else {
            const dp_result *result = call.call.result;
            assert_int_equal(rows->rows * attn_out_row_bytes(geometry), result->out_size);
            if (out != NULL) memcpy(out, result->out, result->out_size);
            if (lse != NULL) memcpy(lse, result->lse, result->lse_size);
        }
    }
    free_call(&call);
    return status;
}

void grow_by_step(dp_engine *engine, const attn_geometry *geometry, dice *dice, const uint64_t *sequences,
                  const uint32_t *query_lengths, uint32_t count) {
    dp_step *step = begin_step(engine, sequences, query_lengths, count, false);
    for (uint32_t layer = 0; layer < geometry->layers; layer++) {
        layer_rows rows = random_rows(dice, geometry, dp_step_tokens(step), false);
        assert_ok(try_layer(step, geometry, layer, &rows, NULL, dice, NULL, NULL));
        free_rows(&rows);
    }
    assert_int_equal(geometry->layers, dp_step_next_layer(step));
    dp_step_end(step);
}

/* ------------------------------------------------------------------------------------------- */

typedef struct {
    dp_upload_chunk chunk; /* first */
    dp_upload *upload;
    tensor keys, values;
    bool done;
    attn_saved_status status;
} waiting_chunk;

static void chunk_done(dp_upload_chunk *chunk, attn_status status) {
    waiting_chunk *waiting = (waiting_chunk *)chunk;
    if (chunk->detained) dp_upload_keep(waiting->upload, detain(&waiting->keys, &waiting->values, NULL));
    pthread_mutex_lock(&calls_lock);
    attn_status_save(&waiting->status, status);
    waiting->done = true;
    pthread_cond_broadcast(&calls_changed);
    pthread_mutex_unlock(&calls_lock);
}

attn_status try_chunk(dp_upload *upload, const attn_geometry *geometry, uint32_t layer, const layer_rows *rows,
                      uint32_t first, uint32_t tokens, dice *cuts) {
    size_t key_bytes = attn_key_row_bytes(geometry), value_bytes = attn_value_row_bytes(geometry);
    tensor keys = make_tensor(cuts, (char *)rows->k + first * key_bytes, tokens * key_bytes);
    tensor values = make_tensor(cuts, (char *)rows->v + first * value_bytes, tokens * value_bytes);
    waiting_chunk waiting = {.chunk = {.layer = layer,
                                       .token_offset = first,
                                       .tokens = tokens,
                                       .keys = keys.view,
                                       .values = values.view,
                                       .done = chunk_done},
                             .upload = upload,
                             .keys = keys,
                             .values = values};
    attn_status status = dp_upload_write(upload, &waiting.chunk);
    if (!attn_failed(status)) {
        pthread_mutex_lock(&calls_lock);
        while (!waiting.done)
            pthread_cond_wait(&calls_changed, &calls_lock);
        pthread_mutex_unlock(&calls_lock);
        if (waiting.status.code != ATTN_OK) status = attn_error(waiting.status.code, "%s", waiting.status.message);
    }
    free_tensor(&waiting.keys);
    free_tensor(&waiting.values);
    return status;
}

static attn_status upload_layer(dp_upload *upload, const attn_geometry *geometry, dice *contents, dice *cuts,
                                uint32_t layer, uint32_t tokens) {
    layer_rows rows = random_rows(contents, geometry, tokens, false);
    attn_status status = attn_ok();
    for (uint32_t first = 0; first < tokens && !attn_failed(status);) {
        uint32_t left = tokens - first;
        uint32_t chunk = 1 + dice_below(cuts, left);
        status = try_chunk(upload, geometry, layer, &rows, first, chunk, cuts);
        first += chunk;
    }
    free_rows(&rows);
    return status;
}

attn_status try_upload(dp_engine *engine, const attn_geometry *geometry, dice *contents, dice *cuts, uint64_t sequence,
                       uint32_t tokens) {
    dp_upload *upload;
    ATTN_TRY(dp_upload_begin(engine, TENANT, sequence, tokens, &upload));
    attn_status status = attn_ok();
    for (uint32_t layer = 0; layer < geometry->layers && !attn_failed(status); layer++) {
        status = upload_layer(upload, geometry, contents, cuts, layer, tokens);
    }
    uint64_t length;
    if (!attn_failed(status)) status = dp_upload_commit(upload, &length);
    dp_upload_end(upload);
    return status;
}

void fill(dp_engine *engine, uint64_t handle, uint32_t tokens, uint64_t seed) {
    dice contents = {seed}, cuts = {seed};
    assert_ok(try_upload(engine, &engine->config.geometry, &contents, &cuts, handle, tokens));
}

void read_outputs(dp_engine *engine, uint64_t handle, char out[OUT_BYTES]) {
    dice dice = {3};
    const attn_geometry *geometry = &engine->config.geometry;
    dp_step *step = begin_step(engine, &handle, NULL, 1, true);
    layer_rows rows = random_rows(&dice, geometry, 1, true);
    assert_ok(try_layer(step, geometry, 0, &rows, NULL, NULL, out, NULL));
    free_rows(&rows);
    dp_step_end(step);
}

/* ------------------------------------------------------------------------------------------- */
/* Moves */

static void move_done(dp_move *move, attn_status status) {
    waiting_move *waiting = (waiting_move *)move;
    pthread_mutex_lock(&calls_lock);
    attn_status_save(&waiting->status, status);
    waiting->done = true;
    pthread_cond_broadcast(&calls_changed);
    pthread_mutex_unlock(&calls_lock);
}

attn_status start_move(dp_engine *engine, waiting_move *waiting, uint64_t handle, uint32_t rank,
                       int64_t step_until_ns) {
    *waiting =
        (waiting_move){.move = {.sequence = handle, .rank = rank, .step_until_ns = step_until_ns, .done = move_done}};
    return dp_sequence_move(engine, TENANT, &waiting->move);
}

attn_status start_spread(dp_engine *engine, waiting_move *waiting, uint64_t handle) {
    *waiting = (waiting_move){.move = {.sequence = handle, .spread = true, .done = move_done}};
    return dp_sequence_move(engine, TENANT, &waiting->move);
}

bool move_is_done(waiting_move *waiting) {
    pthread_mutex_lock(&calls_lock);
    bool done = waiting->done;
    pthread_mutex_unlock(&calls_lock);
    return done;
}

attn_status wait_for_move(waiting_move *waiting) {
    pthread_mutex_lock(&calls_lock);
    while (!waiting->done)
        pthread_cond_wait(&calls_changed, &calls_lock);
    pthread_mutex_unlock(&calls_lock);
    return attn_status_view(&waiting->status);
}

/* wait_for_move for a move that does not outlive it. */
static attn_status end_of_move(waiting_move *waiting) {
    attn_status status = wait_for_move(waiting);
    return attn_failed(status) ? attn_error(status.code, "%s", status.message) : status;
}

attn_status try_move(dp_engine *engine, uint64_t handle, uint32_t rank) {
    waiting_move waiting;
    ATTN_TRY(start_move(engine, &waiting, handle, rank, 0));
    return end_of_move(&waiting);
}

attn_status try_spread(dp_engine *engine, uint64_t handle) {
    waiting_move waiting;
    ATTN_TRY(start_spread(engine, &waiting, handle));
    return end_of_move(&waiting);
}

/* ------------------------------------------------------------------------------------------- */
/* Loss */

void wait_for_state(dp_engine *engine, uint32_t rank, dp_rank_state state) {
    while (rank_info(engine, rank).state != state)
        usleep(200);
}

void restart_rank(dp_engine *engine, uint32_t rank) {
    assert_ok(dp_engine_restart_rank(engine, rank));
    wait_for_state(engine, rank, DP_RANK_SERVING);
}
