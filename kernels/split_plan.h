/*
 * The split plan: how the work of one decode is cut over workers (CPU threads, thread blocks).
 * Every backend uses this one.
 *
 * THE LINE. All the work of a batch is one line of tiles:
 *
 *     for each sequence i | for each KV head | for each row block | for each tile
 *
 * A row block is up to `block_queries` consecutive query rows of the sequence, with all query heads
 * of the KV head's group; so a partial result is never larger than block_queries * group rows, even
 * at query length 128 with a group of 16. A tile is `tile_tokens` consecutive tokens, aligned to
 * multiples of tile_tokens in the sequence; the first and last tile of a block are cut by its window
 * and its causal mask. In batch_invariant mode a tile is one chunk of ATTN_CHUNK_TOKENS.
 *
 * A (sequence, KV head, row block) is a unit. Its tiles are those in which some row of the block sees
 * some token; a unit that sees nothing has one empty tile, so that every output row belongs to
 * somebody. Worker w of W takes the tiles [w * T / W, (w + 1) * T / W) of the live total T: even
 * shares, whatever the batch. Consecutive tiles of one worker in one unit are a run.
 *
 *     unit            |---- A ----|------ B ------|-- C --|
 *     worker          |-- 0 --|-- 1 --|-- 2 --|-- 3 --|4..|
 *     runs of 1               |A'|B'  |                       A' joins A: head slot; B' leaves B: tail slot
 *     runs of 2                       |B''|                   joins B and leaves it: head slot
 *
 * THE SLOTS. A run that is a whole unit writes its result directly. Any other is a partial: a worker
 * has at most two, the run it joins at its head and the run it leaves at its tail. So the partial
 * buffer is 2 * workers slots, whatever the batch, the lengths or a plan say. Slot 2 * w is worker
 * w's head slot, 2 * w + 1 its tail slot.
 *
 * THE TICKETS. Cut units are at most workers - 1, and each has exactly one worker that starts it:
 * that worker's ticket counts the unit's finished tiles. Who brings it to the unit's live total is
 * the last arriver and merges the partials in split order (attn_run_slots). Counted against the live total, a
 * wrong partition cannot complete a unit early or twice.
 *
 * batch_invariant. Every chunk is a partial of its own, in the slot of its place in the line, so that
 * neither the workers nor the rest of the batch change what is added to what. A line longer than the
 * slots is run in waves of whole units (attn_line_next_wave), each like a line of its own. Slots at
 * least attn_line_min_chunk_slots() are always enough; tokens of the pool / chunk + sequences x
 * KV heads serve the usual batch in one wave.
 *
 * THE PLAN. Where each worker starts is derived from the live lengths in every decode: a prefix sum
 * over the sequences, and a search by each worker. An attn_plan, computed once a step and used for all its
 * layers, is a hint that saves the search. It carries a header that says what it was made for, is
 * checked where it is used, and never gives a loop extent: a start that is not where the live line
 * says the worker starts is derived again.
 *
 * How a backend decodes, on the calling thread unless said otherwise:
 *
 *     ATTN_TRY(attn_line_build(&base->line, batch));
 *     plan = attn_backend_accept_plan(base, plan);                    (kernels/backend.h)
 *     attn_tickets_reset(tickets, workers);
 *     on each worker:
 *         attn_walk_start(&walk, line, worker, plan);
 *         while (attn_walk_next(&walk, &run)) {
 *             ... attend to tokens run.token_begin .. run.token_end - 1, mask rows with attn_row_visible
 *             if (run.whole) ... write the output
 *             else {
 *                 ... write the partial to slot run.slot
 *                 if (attn_run_arrive(&run, tickets)) ... merge the slots of attn_run_slots
 *             }
 *         }
 */
#ifndef ATTND_KERNELS_SPLIT_PLAN_H
#define ATTND_KERNELS_SPLIT_PLAN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/attention.h"

/* ------------------------------------------------------------------------------------------- */
/* The line */

/*
 * Owned by the thread that drives the backend, which alone may init, build, start waves and fini; its
 * workers may read it in between. Init once, build for every decode: the memory is kept and only
 * grows with the largest batch seen.
 */
typedef struct {
    attn_geometry geometry;
    uint32_t tile_tokens;   /* as configured */
    uint32_t block_queries; /* as configured */
    uint32_t workers;

    /* The live batch. */
    const attn_batch *batch; /* borrowed from attn_line_build until the next */
    uint32_t tile;           /* tokens of a tile of this batch: tile_tokens, or ATTN_CHUNK_TOKENS */
    uint64_t *starts;        /* [batch->size + 1] first tile of each sequence; the last entry is the total */
    uint32_t capacity;       /* sequences that `starts` has room for */
    uint64_t begin, end;     /* the tiles of this wave; 0 .. total after attn_line_build */
} attn_line;

/*
 * `tile_tokens` is a multiple of the page size, or divides it; `block_queries` >= 1; `workers` >= 1.
 * Allocates nothing yet. Undo with attn_line_fini, also after a failure.
 */
void attn_line_init(attn_line *line, const attn_geometry *geometry, uint32_t tile_tokens, uint32_t block_queries,
                    uint32_t workers);
void attn_line_fini(attn_line *line);

/*
 * Lays out the line of `batch`, which attn_batch_check has accepted. Allocates only if the batch is
 * the largest so far. ATTN_RESOURCE_EXHAUSTED if that fails.
 */
attn_status attn_line_build(attn_line *line, const attn_batch *batch);

/* All tiles of the batch. */
static inline uint64_t attn_line_total(const attn_line *line) { return line->starts[line->batch->size]; }

/* First tile of worker `worker` in this wave; that of worker `workers` is the wave's end. */
static inline uint64_t attn_line_worker_begin(const attn_line *line, uint32_t worker) {
    return line->begin + worker * (line->end - line->begin) / line->workers;
}

/*
 * batch_invariant: cuts the line into waves of at most `slots` tiles, in whole units. The first call
 * after attn_line_build gives the first wave; false when there are no more:
 *     attn_line_first_wave(line); while (attn_line_next_wave(line, slots)) { ... }
 * A tile at `t` of the line has the slot t - line->begin. `slots` >= attn_line_min_chunk_slots().
 */
void attn_line_first_wave(attn_line *line);
bool attn_line_next_wave(attn_line *line, uint64_t slots);

/* Chunks that one sequence of a pool of `pages` pages can have: what a wave must have room for. */
uint64_t attn_line_min_chunk_slots(const attn_geometry *geometry, uint32_t pages);

/* Is sequence i of the batch read without appending new rows? */
static inline bool attn_batch_is_read(const attn_batch *batch, uint32_t i) {
    return batch->new_keys == NULL || batch->new_keys[i] == NULL;
}

/* The part of sequence i, or NULL if the sequence is whole. */
static inline const attn_part *attn_batch_part(const attn_batch *batch, uint32_t i) {
    return batch->parts != NULL && batch->parts[i].chunk_stride != 0 ? &batch->parts[i] : NULL;
}

/*
 * How many rows of new_keys[i] and new_values[i] this pool is to store: at pool-local tokens
 * lengths[i] - rows and on. 0 for a read, and for a part that none of the new rows falls into.
 */
static inline uint32_t attn_batch_new_rows(const attn_batch *batch, uint32_t i) {
    if (attn_batch_is_read(batch, i)) return 0;
    const attn_part *part = attn_batch_part(batch, i);
    return part ? part->new_count : batch->query_lengths[i];
}

/*
 * The pool-local tokens that query row `query` of sequence i sees: *begin .. *end - 1, by causal
 * mask, window and length; *begin == *end if none. Both grow with `query`.
 */
void attn_row_visible(const attn_batch *batch, uint32_t i, uint32_t query, uint64_t *begin, uint64_t *end);

/* ------------------------------------------------------------------------------------------- */
/* A worker's walk along the line */

/* Some consecutive tiles of one unit, done by one worker. */
typedef struct {
    uint32_t sequence;
    uint32_t head; /* KV head */
    uint32_t block;
    uint32_t query_first, queries; /* the block's query rows */
    uint64_t unit_tiles;           /* live total of the unit */
    uint64_t tile_begin, tile_end; /* of this run, within the unit */
    uint64_t line_tile;            /* of the run's first tile, within the whole line */
    uint64_t token_begin;          /* pool-local tokens that some row of the block sees, in this run.. */
    uint64_t token_end;            /* ..to here, exclusive; equal if none */
    uint64_t first_tile_tokens;    /* pool-local token at which tile 0 of the unit begins, uncut */
    uint64_t unit_begin, unit_end; /* tokens that some row of the block sees, in the unit */
    bool whole;                    /* this run is the whole unit */
    uint32_t slot;                 /* not whole: where its partial goes, 0 .. 2 * workers - 1 */
    uint32_t first_worker;         /* of the unit; it owns the unit's ticket */
    uint32_t last_worker;
} attn_run;

/* Private to split_plan.c; on the worker's stack. */
typedef struct {
    const attn_line *line;
    uint32_t worker;
    uint32_t sequence, head, block;
    uint64_t tile;      /* next, within the unit */
    uint64_t line_tile; /* next, within the line */
    uint64_t line_end;
} attn_walk;

/* Starts worker `worker`'s walk over its share of the wave. `plan` has been accepted, or is NULL. */
void attn_walk_start(attn_walk *walk, const attn_line *line, uint32_t worker, const attn_plan *plan);

/* The next run of the walk; false at its end. */
bool attn_walk_next(attn_walk *walk, attn_run *run);

/*
 * The tokens of tile `tile` (tile_begin .. tile_end - 1) of a run that some row of the block sees:
 * *begin .. *end - 1. In batch_invariant mode the tile is chunk *begin / ATTN_CHUNK_TOKENS, if it is
 * not empty; attn_run_chunk gives it in any case.
 */
void attn_run_tile(const attn_line *line, const attn_run *run, uint64_t tile, uint64_t *begin, uint64_t *end);

/* batch_invariant: the pool-local chunk that tile `tile` of the run is. */
static inline uint64_t attn_run_chunk(const attn_run *run, uint64_t tile) {
    return run->first_tile_tokens / ATTN_CHUNK_TOKENS + tile;
}

/* ------------------------------------------------------------------------------------------- */
/* Tickets */

/* A cache line each: workers hit them at the same time. */
typedef struct {
    _Alignas(64) _Atomic uint64_t tiles_done;
} attn_ticket;

/* Before the workers start; tickets[workers]. */
void attn_tickets_reset(attn_ticket *tickets, uint32_t workers);

/*
 * Says that the run's tiles are done and its partial written. True for exactly one worker, the last
 * to arrive, which then sees all partials of the unit and must merge them. Any worker.
 */
static inline bool attn_run_arrive(const attn_run *run, attn_ticket *tickets) {
    uint64_t tiles = run->tile_end - run->tile_begin;
    uint64_t before = atomic_fetch_add_explicit(&tickets[run->first_worker].tiles_done, tiles, memory_order_acq_rel);
    return before + tiles == run->unit_tiles;
}

/* The slots that hold the run's unit, in split order: slots[line->workers]. Returns their number. */
uint32_t attn_run_slots(const attn_line *line, const attn_run *run, uint32_t *slots);

/* ------------------------------------------------------------------------------------------- */
/* Plans */

#define ATTN_PLAN_MAGIC   0x4e4c5041u /* "APLN" */
#define ATTN_PLAN_VERSION 1

/* Whose plan it is: which rank's, and for which generation (step) of that rank. */
typedef struct {
    uint32_t rank;
    uint64_t generation;
} attn_plan_identity;

typedef struct {
    uint32_t magic;
    uint32_t version;
    uint32_t crc; /* CRC-32 of the whole plan with this field 0 */
    uint32_t workers;
    uint32_t rank;
    uint32_t batch; /* sequences */
    uint32_t tile_tokens;
    uint32_t block_queries;
    uint64_t generation;
    uint64_t geometry; /* hash */
    uint64_t lengths;  /* digest of lengths, query lengths, parts, reads, window, batch_invariant */
} attn_plan_header;

/* Where a worker starts. */
typedef struct {
    uint32_t sequence;
    uint32_t head;
    uint32_t block;
    uint32_t worker;
    uint64_t tile;      /* within the unit */
    uint64_t line_tile; /* within the line */
} attn_plan_start;

/* One block of memory without padding or pointers. */
struct attn_plan {
    attn_plan_header header;
    attn_plan_start starts[]; /* [workers] */
};

/* Bytes of a plan for so many workers. */
size_t attn_plan_bytes(uint32_t workers);

/* Makes `plan` (attn_plan_bytes(line->workers) bytes) the plan of the line as built. */
void attn_plan_fill(attn_plan *plan, const attn_line *line, attn_plan_identity identity);

/* Does a plan fit? The first of these that is wrong, in this order. */
typedef enum {
    ATTN_PLAN_FITS = 0,
    ATTN_PLAN_WRONG_MAGIC,
    ATTN_PLAN_WRONG_VERSION,
    ATTN_PLAN_WRONG_WORKERS,
    ATTN_PLAN_WRONG_CRC,
    ATTN_PLAN_WRONG_RANK,
    ATTN_PLAN_WRONG_GENERATION,
    ATTN_PLAN_WRONG_GEOMETRY,
    ATTN_PLAN_WRONG_TILES,
    ATTN_PLAN_WRONG_BATCH,
    ATTN_PLAN_WRONG_LENGTHS,
} attn_plan_verdict;

/*
 * Compares `plan` with the line as built. Reads no more of the plan than its header before the
 * header's number of workers is known to be the line's.
 */
attn_plan_verdict attn_plan_check(const attn_plan *plan, const attn_line *line, attn_plan_identity identity);

/* "fits", "magic", "version", .. A literal. */
const char *attn_plan_verdict_name(attn_plan_verdict verdict);

/* ------------------------------------------------------------------------------------------- */
/* Plans of a backend, for whoever drives it */

/*
 * Which rank the backend is and which generation (step) it works on: what attn_backend_plan_step
 * writes into plans from now on, and attn_backend_decode demands of them. A new backend is a rank of
 * its own number, different from all others of the process, at generation 0.
 */
void attn_backend_set_identity(attn_backend *backend, attn_plan_identity identity);

/* A plan's memory, fit for `backend`. The caller frees it with attn_plan_destroy. */
attn_status attn_plan_create(const attn_backend *backend, attn_plan **plan);
void attn_plan_destroy(attn_plan *plan);

/*
 * Plans a step: fills `plan` from the lengths of `batch`, for every layer of the step whose batches
 * differ in layer and row pointers only. ATTN_INVALID_ARGUMENT, ATTN_INTERNAL: as attn_backend_decode.
 */
attn_status attn_backend_plan_step(attn_backend *backend, const attn_batch *batch, attn_plan *plan);

/*
 * Where rejected plans are told: `log(context, line)`, from the thread that drives the backend, one
 * line without newline. For the whole process; NULL: nowhere, the default. Set it before backends run.
 */
void attn_set_plan_log(void (*log)(void *context, const char *line), void *context);

#endif
