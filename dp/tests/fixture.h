/*
 * What the tests of dp have in common: a small engine, tensors with reproducible contents, and calls
 * that wait for their end.
 *
 * A fixture's functions fail the running test if anything but what their name says happens; the
 * try_ ones give the status back.
 */
#ifndef ATTND_DP_TESTS_FIXTURE_H
#define ATTND_DP_TESTS_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "dp/engine.h"

/* A stall limit: longer than any healthy job of these tests, under a sanitizer on a busy machine too. */
#if defined(__SANITIZE_THREAD__)
#define STALL_NS INT64_C(3000000000)
#elif defined(__SANITIZE_ADDRESS__)
#define STALL_NS INT64_C(1000000000)
#else
#define STALL_NS INT64_C(500000000)
#endif

enum { TENANT = 0, OTHER_TENANT = 1, TENANTS = 3 };

/* 3 layers, 4 query heads on 2, 32 wide keys, 40 wide values, fp32, pages of 16; one reference rank of 256 pages. */
dp_config small_config(void);

dp_engine *create_engine(const dp_config *config);

/* Fails unless all pages of all ranks are free and nothing is open; then destroys the engine. */
void destroy_engine(dp_engine *engine);

void assert_no_leak(dp_engine *engine);
uint64_t pages_free(dp_engine *engine);
dp_rank_info rank_info(dp_engine *engine, uint32_t rank);

#define assert_code(expected, status)        assert_code_at(expected, status, NULL, __FILE__, __LINE__)
#define assert_error(expected, status, text) assert_code_at(expected, status, text, __FILE__, __LINE__)
#define assert_ok(status)                    assert_code(ATTN_OK, status)

/* `text`, if not NULL, must be part of the message. */
void assert_code_at(attn_code expected, attn_status status, const char *text, const char *file, int line);

/* ------------------------------------------------------------------------------------------- */
/* Randomness and tensors */

typedef struct {
    uint64_t state;
} dice;

uint64_t dice_next(dice *dice);
uint32_t dice_below(dice *dice, uint32_t limit);

/* `count` elements, uniform in (-2, 2), in the dtype. Freed by the caller. */
void *random_elements(dice *dice, attn_dtype dtype, size_t count);

/* A tensor, in one span or in pieces cut at odd places, each at an odd address, some of them empty. */
typedef struct {
    dp_tensor_view view;
    dp_span *spans;
    char *memory;
} tensor;

tensor whole_tensor(const void *data, size_t size);
tensor cut_tensor(dice *dice, const void *data, size_t size);
void free_tensor(tensor *tensor);

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

uint64_t open_sequence(dp_engine *engine, dp_placement placement, uint32_t rank);
void close_sequence(dp_engine *engine, uint64_t handle);
dp_sequence_info describe(dp_engine *engine, uint64_t handle);
uint64_t fork_sequence(dp_engine *engine, uint64_t parent, uint64_t length);

/* ------------------------------------------------------------------------------------------- */
/* Steps */

/* The tensors of one layer, and what came back. */
typedef struct {
    void *q, *k, *v; /* k and v NULL: a read */
    uint32_t rows;
} layer_rows;

layer_rows random_rows(dice *dice, const attn_geometry *geometry, uint32_t rows, bool read_only);
void free_rows(layer_rows *rows);

/* A layer call that can be waited for. */
typedef struct {
    dp_layer_call call; /* first */
    dp_step *step;      /* by start_call */
    tensor q, k, v;     /* empty after `done` of a detained call: the engine has them */
    bool done;          /* guarded by a lock of the fixture */
    attn_saved_status status;
} waiting_call;

/* Sets a call up; `cuts` NULL: one span a tensor. */
void prepare_call(waiting_call *call, const attn_geometry *geometry, uint32_t layer, const layer_rows *rows,
                  const dp_options *options, dice *cuts);

/* Starts a call of the step. */
attn_status start_call(dp_step *step, waiting_call *call);

/* Waits for `done`: the call's status, valid as long as the call. */
attn_status wait_for_call(waiting_call *call);

/* Calls and chunks that ended detained, and whose tensors the engine has not given back yet. */
uint32_t detained_now(void);
void wait_until_none_is_detained(void);

/* Releases the result and the tensors. */
void free_call(waiting_call *call);

dp_step *begin_step(dp_engine *engine, const uint64_t *sequences, const uint32_t *query_lengths, uint32_t count,
                    bool read_only);
attn_status try_begin_step(dp_engine *engine, const uint64_t *sequences, const uint32_t *query_lengths, uint32_t count,
                           bool read_only, dp_step **step);

/* Runs one layer with rows and options; copies outputs to `out` and `lse` where not NULL. */
attn_status try_layer(dp_step *step, const attn_geometry *geometry, uint32_t layer, const layer_rows *rows,
                      const dp_options *options, dice *cuts, void *out, float *lse);

/* Grows sequences by a step with random rows, all layers, committed. */
void grow_by_step(dp_engine *engine, const attn_geometry *geometry, dice *dice, const uint64_t *sequences,
                  const uint32_t *query_lengths, uint32_t count);

/*
 * Uploads `tokens` random tokens to a sequence, in chunks and spans cut by `cuts`. Equal `contents` give equal
 * tokens, however they are cut.
 */
attn_status try_upload(dp_engine *engine, const attn_geometry *geometry, dice *contents, dice *cuts, uint64_t sequence,
                       uint32_t tokens);

/* Uploads `tokens` tokens: the same for equal seeds. */
void fill(dp_engine *engine, uint64_t handle, uint32_t tokens, uint64_t seed);

/* Of one query row in small_config's geometry. */
enum { OUT_BYTES = 4 * 40 * sizeof(float) };

/* The outputs of a read of all that a sequence holds in layer 0: equal for equal tokens. */
void read_outputs(dp_engine *engine, uint64_t handle, char out[OUT_BYTES]);

/* Writes rows first .. first + tokens - 1 of `rows` as one chunk of a layer, and waits. */
attn_status try_chunk(dp_upload *upload, const attn_geometry *geometry, uint32_t layer, const layer_rows *rows,
                      uint32_t first, uint32_t tokens, dice *cuts);

/* ------------------------------------------------------------------------------------------- */
/* Moves */

/* A move that can be waited for. */
typedef struct {
    dp_move move; /* first */
    bool done;    /* guarded by a lock of the fixture */
    attn_saved_status status;
} waiting_move;

attn_status start_move(dp_engine *engine, waiting_move *waiting, uint64_t handle, uint32_t rank, int64_t step_until_ns);
attn_status start_spread(dp_engine *engine, waiting_move *waiting, uint64_t handle);
bool move_is_done(waiting_move *waiting);

/* Waits for `done`: the move's status, valid as long as the move. */
attn_status wait_for_move(waiting_move *waiting);

/* Starts and waits. */
attn_status try_move(dp_engine *engine, uint64_t handle, uint32_t rank);
attn_status try_spread(dp_engine *engine, uint64_t handle);

/* ------------------------------------------------------------------------------------------- */
/* Loss */

void wait_for_state(dp_engine *engine, uint32_t rank, dp_rank_state state);

/* Restarts a lost rank, and waits until it serves. */
void restart_rank(dp_engine *engine, uint32_t rank);

#endif
