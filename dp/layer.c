/*
 * What a rank does with a layer: the parts of one or more steps become one launch of its backend.
 *
 * The tables of a batch were made when its step began. What changes with every layer is where the rows
 * are: in place in the request if a sequence's rows lie in one span, else gathered to the rank's
 * staging memory. Outputs are written where the caller will read them. A launch of one part uses the
 * part's tables as they are; for more, they are laid end to end in the rank's scratch memory. So are the prefixes that
 * sequences of a part share, which are then joined where two parts have the same.
 *
 * Launches overlap (rank.h): two in flight are about different steps, for a step's next layer comes when the one before
 * is done. Neither reads what the other writes: those are slots that no other step sees, in pages that were copied
 * before if they had two holders.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "dp/prefixes.h"
#include "dp/state.h"
#include "dp/tensors.h"
#include "kernels/pipeline.h"

/* In scratch memory from start to complete. */
typedef struct {
    dp_worker *worker;
    attn_backend *backend; /* that has started it */
    dp_engine_rank *owner;
    const dp_engine *engine;
    dp_layer_part *parts[DP_MAX_MERGED];
    uint32_t count;
    uint32_t size; /* sequences of all parts */
    uint32_t rows;
    uint32_t pages;
    uint32_t prefix_count;
    uint64_t tokens_shared;
    bool spread;
    bool wants_lse;
    bool device_time;
    size_t staged; /* bytes of staging memory in use */
    uint64_t bytes_in_place;
    uint64_t bytes_gathered;
    int64_t begin_ns;
    attn_batch batch;
    /* The batch's arrays, to be written. */
    const void **queries, **new_keys, **new_values;
    void **outs;
    float **lses;
    uint32_t *lengths, *query_lengths, *page_offsets, *page_table;
    attn_part *attn_parts;
    attn_partial *partials;
    attn_prefix *prefixes;
    uint32_t *members; /* of the prefixes, of several parts.. */
    uint32_t *joined;  /* ..and once the prefixes are joined */
} launch;

void dp_layer_part_fail(dp_layer_part *part, attn_status status) {
    part->failed = true;
    attn_status_save(&part->failure, status);
}

static dp_layer_part *part_of(dp_job *job) { return (dp_layer_part *)job; }

static dp_rank_timing *timing_of(const dp_layer_part *part) { return &part->step->timing[part - part->step->parts]; }

static float microseconds(int64_t nanoseconds) { return (float)nanoseconds / 1000.0f; }

/* ------------------------------------------------------------------------------------------- */
/* Which parts run */

static attn_status may_start(const dp_worker *worker, const dp_step *step, int64_t now) {
    if (dp_worker_retired(worker)) return dp_rank_lost_status(dp_worker_rank(worker));
    if (atomic_load_explicit(&step->cancelled, memory_order_relaxed)) {
        return attn_error(ATTN_CANCELLED, "the call was cancelled");
    }
    if (now > step->input.deadline_ns) return attn_error(ATTN_DEADLINE_EXCEEDED, "the deadline passed in the queue");
    if (atomic_load_explicit(&step->failed, memory_order_relaxed)) {
        return attn_error(ATTN_CANCELLED, "another rank failed");
    }
    return attn_ok();
}

/* Copy on write. The first layer is the first to write, and it runs once. */
static attn_status copy_shared_pages(dp_worker *worker, const dp_layer_part *part) {
    if (part->step->read_only || part->step->input.layer != 0) return attn_ok();
    for (uint32_t i = 0; i < part->batch->copy_count; i++) {
        const dp_page_copy *copy = &part->batch->copies[i];
        ATTN_TRY(attn_backend_copy_page(dp_worker_backend(worker), copy->from, copy->to));
    }
    return attn_ok();
}

/* Whether backends make use of shared prefixes at all. */
static bool may_share(const dp_options *options) { return options->window == 0 && !options->batch_invariant; }

static void add_part(launch *launch, dp_layer_part *part) {
    launch->parts[launch->count++] = part;
    launch->size += part->batch->size;
    launch->rows += part->batch->rows;
    launch->pages += part->batch->page_offsets[part->batch->size];
    if (may_share(&part->step->input.options)) {
        launch->prefix_count += part->batch->prefix_count;
        launch->tokens_shared += part->batch->tokens_shared;
    }
    launch->spread |= part->batch->parts != NULL;
    launch->wants_lse |= part->step->input.options.return_lse;
    launch->device_time |= part->step->input.device_time;
}

static void select_parts(launch *launch, dp_job *const *jobs, uint32_t count) {
    int64_t now = attn_now_ns();
    for (uint32_t i = 0; i < count; i++) {
        dp_layer_part *part = part_of(jobs[i]);
        attn_status status = may_start(launch->worker, part->step, now);
        if (!attn_failed(status)) status = copy_shared_pages(launch->worker, part);
        if (attn_failed(status)) {
            dp_layer_part_fail(part, status);
            continue;
        }
        *timing_of(part) = (dp_rank_timing){.rank = part->batch->rank,
                                            .sequences = part->batch->size,
                                            .tokens = part->batch->tokens,
                                            .queue_us = microseconds(now - part->step->admitted_ns)};
        add_part(launch, part);
    }
}

static void fail_parts(const launch *launch, attn_status status) {
    for (uint32_t i = 0; i < launch->count; i++)
        dp_layer_part_fail(launch->parts[i], status);
}

/* ------------------------------------------------------------------------------------------- */
/* The launch's arrays */

bool dp_scratch_reserve(void **memory, size_t *held, size_t size) {
    if (size <= *held) return true;
    size_t grown = *held < 4096 ? 4096 : *held;
    while (grown < size)
        grown *= 2;
    free(*memory);
    *held = 0;
    *memory = malloc(grown);
    if (*memory == NULL) return false;
    *held = grown;
    return true;
}

/* The next `count` entries of `size` bytes behind `*used`; NULL with no memory behind it, which only measures. */
static void *carve(char *base, size_t *used, size_t count, size_t size) {
    void *carved = base == NULL ? NULL : base + *used;
    *used += (count * size + 15) / 16 * 16;
    return carved;
}

/* Lays out the launch's arrays; returns the bytes that they need. */
static size_t carve_arrays(launch *launch, char *base) {
    size_t used = 0, size = launch->size;
    launch->queries = carve(base, &used, size, sizeof *launch->queries);
    launch->new_keys = carve(base, &used, size, sizeof *launch->new_keys);
    launch->new_values = carve(base, &used, size, sizeof *launch->new_values);
    launch->outs = carve(base, &used, size, sizeof *launch->outs);
    launch->lses = carve(base, &used, size, sizeof *launch->lses);
    if (launch->count == 1) return used; /* it uses its part's tables */
    launch->lengths = carve(base, &used, size, sizeof *launch->lengths);
    launch->query_lengths = carve(base, &used, size, sizeof *launch->query_lengths);
    launch->page_offsets = carve(base, &used, size + 1, sizeof *launch->page_offsets);
    launch->page_table = carve(base, &used, launch->pages, sizeof *launch->page_table);
    launch->prefixes = carve(base, &used, launch->prefix_count, sizeof *launch->prefixes);
    launch->members = carve(base, &used, launch->prefix_count > 0 ? size : 0, sizeof *launch->members);
    launch->joined = carve(base, &used, launch->prefix_count > 0 ? size : 0, sizeof *launch->joined);
    if (!launch->spread) return used;
    launch->attn_parts = carve(base, &used, size, sizeof *launch->attn_parts);
    launch->partials = carve(base, &used, size, sizeof *launch->partials);
    return used;
}

static attn_status reserve_arrays(launch *launch) {
    dp_scratch *scratch = dp_worker_scratch(launch->worker);
    size_t size = carve_arrays(launch, NULL);
    if (!dp_scratch_reserve(&scratch->arrays, &scratch->arrays_size, size)) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a launch of %u sequences", launch->size);
    }
    carve_arrays(launch, scratch->arrays);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Rows */

/* Where `size` bytes at `offset` of a tensor are: in place if in one piece, else gathered. NULL: no memory. */
static const void *take_rows(launch *launch, dp_tensor_reader *reader, size_t offset, size_t size) {
    size_t available;
    const void *rows = dp_tensor_reader_seek(reader, offset, &available);
    if (available >= size) {
        launch->bytes_in_place += size;
        return rows;
    }
    dp_scratch *scratch = dp_worker_scratch(launch->worker);
    if (launch->staged == 0) {
        /* Once, for the worst case: pointers into it must stay. Memory not needed is not touched. */
        const dp_engine *engine = launch->engine;
        size_t worst = launch->rows * (engine->query_row_bytes + engine->key_row_bytes + engine->value_row_bytes);
        if (!dp_scratch_reserve(&scratch->staging, &scratch->staging_size, worst)) return NULL;
    }
    char *gathered = (char *)scratch->staging + launch->staged;
    dp_tensor_reader_copy(reader, offset, size, gathered);
    launch->staged += size;
    launch->bytes_gathered += size;
    return gathered;
}

typedef struct {
    dp_tensor_reader queries, keys, values;
} row_readers;

/* The new rows that a part's rank stores. For a part that stores none any pointer will do, but not NULL: see
 * attn_batch. */
static bool take_new_rows(launch *launch, const dp_batch *batch, uint32_t i, uint32_t to, row_readers *readers) {
    const dp_engine *engine = launch->engine;
    size_t row = batch->first_rows[i];
    size_t rows = batch->query_lengths[i];
    if (batch->parts != NULL && batch->parts[i].chunk_stride > 0) {
        row += batch->parts[i].new_first;
        rows = batch->parts[i].new_count;
    }
    if (rows == 0) {
        launch->new_keys[to] = launch->queries[to];
        launch->new_values[to] = launch->queries[to];
        return true;
    }
    launch->new_keys[to] = take_rows(launch, &readers->keys, row * engine->key_row_bytes, rows * engine->key_row_bytes);
    launch->new_values[to] =
        take_rows(launch, &readers->values, row * engine->value_row_bytes, rows * engine->value_row_bytes);
    return launch->new_keys[to] != NULL && launch->new_values[to] != NULL;
}

/* Sets the row pointers of sequence `i` of a part, which is sequence `to` of the launch. */
static bool take_sequence(launch *launch, const dp_layer_part *part, uint32_t i, uint32_t to, row_readers *readers) {
    const dp_engine *engine = launch->engine;
    const dp_step *step = part->step;
    const dp_batch *batch = part->batch;
    size_t row = batch->first_rows[i];
    launch->queries[to] = take_rows(launch, &readers->queries, row * engine->query_row_bytes,
                                    batch->query_lengths[i] * engine->query_row_bytes);
    if (launch->queries[to] == NULL) return false;
    launch->outs[to] = (char *)step->result->out + row * engine->out_row_bytes;
    launch->lses[to] = step->result->lse == NULL ? NULL : step->result->lse + row * engine->config.geometry.heads_q;
    launch->new_keys[to] = NULL;
    launch->new_values[to] = NULL;
    return step->read_only || take_new_rows(launch, batch, i, to, readers);
}

static attn_status take_part(launch *launch, const dp_layer_part *part, uint32_t first) {
    int64_t start = attn_now_ns();
    const dp_layer_call *call = &part->step->input;
    row_readers readers;
    dp_tensor_reader_init(&readers.queries, &call->queries);
    dp_tensor_reader_init(&readers.keys, &call->new_keys);
    dp_tensor_reader_init(&readers.values, &call->new_values);
    for (uint32_t i = 0; i < part->batch->size; i++) {
        if (!take_sequence(launch, part, i, first + i, &readers)) {
            return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory to gather the rows of %u sequences", launch->size);
        }
    }
    timing_of(part)->copy_in_us = microseconds(attn_now_ns() - start);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Tables */

/* One part: its tables as they are. */
static void use_tables(launch *launch, const dp_batch *batch) {
    launch->lengths = batch->lengths;
    launch->query_lengths = batch->query_lengths;
    launch->page_offsets = batch->page_offsets;
    launch->page_table = batch->pages;
    launch->attn_parts = batch->parts;
    launch->partials = batch->partials;
    launch->prefixes = batch->prefixes;
}

/* The prefixes of one of several parts, whose first sequence is sequence `first` of the launch. Returns their number.
 */
static uint32_t append_prefixes(launch *launch, const dp_batch *batch, uint32_t first, uint32_t prefix) {
    uint32_t *members = launch->members + first; /* a part has no more members than sequences */
    for (uint32_t p = 0; p < batch->prefix_count; p++) {
        const attn_prefix *from = &batch->prefixes[p];
        for (uint32_t m = 0; m < from->count; m++)
            members[m] = first + from->members[m];
        launch->prefixes[prefix + p] = (attn_prefix){.members = members, .count = from->count, .tokens = from->tokens};
        members += from->count;
    }
    return batch->prefix_count;
}

/* Forks of one prompt may have been decoded by calls of their own. */
static void join_prefixes(launch *launch) {
    dp_launch_prefixes prefixes = {
        .prefixes = launch->prefixes,
        .count = launch->prefix_count,
        .page_offsets = launch->page_offsets,
        .pages = launch->page_table,
        .page_size = launch->engine->config.geometry.page_size,
        .members = launch->joined,
    };
    launch->tokens_shared += dp_prefixes_join(&prefixes);
    launch->prefix_count = prefixes.count;
}

/* One of several parts: its tables behind those of the parts before it. */
static void append_tables(launch *launch, const dp_batch *batch, uint32_t first) {
    uint32_t page = first == 0 ? 0 : launch->page_offsets[first];
    memcpy(launch->lengths + first, batch->lengths, batch->size * sizeof *batch->lengths);
    memcpy(launch->query_lengths + first, batch->query_lengths, batch->size * sizeof *batch->query_lengths);
    for (uint32_t i = 0; i <= batch->size; i++)
        launch->page_offsets[first + i] = page + batch->page_offsets[i];
    uint32_t pages = batch->page_offsets[batch->size];
    if (pages > 0) memcpy(launch->page_table + page, batch->pages, pages * sizeof *batch->pages);
    if (!launch->spread) return;
    for (uint32_t i = 0; i < batch->size; i++) {
        bool has_parts = batch->parts != NULL;
        launch->attn_parts[first + i] = has_parts ? batch->parts[i] : (attn_part){0};
        launch->partials[first + i] = has_parts ? batch->partials[i] : (attn_partial){0};
    }
}

static attn_status assemble(launch *launch) {
    ATTN_TRY(reserve_arrays(launch));
    uint32_t first = 0, prefixes = 0;
    for (uint32_t p = 0; p < launch->count; p++) {
        const dp_layer_part *part = launch->parts[p];
        if (launch->count == 1)
            use_tables(launch, part->batch);
        else
            append_tables(launch, part->batch, first);
        if (launch->count > 1 && launch->prefix_count > 0)
            prefixes += append_prefixes(launch, part->batch, first, prefixes);
        ATTN_TRY(take_part(launch, part, first));
        first += part->batch->size;
    }
    if (launch->count > 1 && launch->prefix_count > 1) join_prefixes(launch);
    const dp_step *step = launch->parts[0]->step;
    const dp_options *options = &step->input.options;
    launch->batch = (attn_batch){
        .layer = step->input.layer,
        .size = launch->size,
        .lengths = launch->lengths,
        .query_lengths = launch->query_lengths,
        .page_offsets = launch->page_offsets,
        .pages = launch->page_table,
        .queries = launch->queries,
        .new_keys = launch->new_keys,
        .new_values = launch->new_values,
        .outs = launch->outs,
        .lses = launch->wants_lse ? launch->lses : NULL,
        .parts = launch->spread ? launch->attn_parts : NULL,
        .partials = launch->spread ? launch->partials : NULL,
        .prefixes = launch->prefix_count > 0 ? launch->prefixes : NULL,
        .prefix_count = launch->prefix_count,
        .scale = step->scale,
        .softcap = options->softcap,
        .window = options->window,
        .sinks = options->sink_count > 0 ? options->sinks : NULL,
        .batch_invariant = options->batch_invariant,
        .device_time = launch->device_time,
    };
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* The launch */

static void note_timing(const launch *launch, const attn_timing *timing) {
    for (uint32_t i = 0; i < launch->count; i++) {
        dp_rank_timing *noted = timing_of(launch->parts[i]);
        noted->plan_us = microseconds(timing->plan_ns);
        noted->attention_us = microseconds(timing->attention_ns);
        noted->combine_us = microseconds(timing->combine_ns);
        noted->merged_calls = launch->count;
        noted->device_us = microseconds(timing->device_ns);
    }
}

/* Time that launches share is counted once. */
static void count_busy(dp_rank_counters *counters, int64_t begin_ns) {
    int64_t now = attn_now_ns(), before = atomic_exchange(&counters->busy_until_ns, now);
    if (begin_ns < before) begin_ns = before;
    if (begin_ns < now) dp_count(&counters->busy_ns, (uint64_t)(now - begin_ns));
}

static void count_launch(const launch *launch) {
    dp_rank_counters *counters = &launch->owner->counters;
    count_busy(counters, launch->begin_ns);
    dp_count(&counters->launches, 1);
    dp_count(&counters->calls, launch->count);
    dp_count(&counters->bytes_in_place, launch->bytes_in_place);
    dp_count(&counters->bytes_gathered, launch->bytes_gathered);
    dp_count(&counters->prefix_tokens_shared, launch->tokens_shared);
}

static attn_status decode_starts(launch *launch) {
    ATTN_TRY(assemble(launch));
    launch->begin_ns = attn_now_ns();
    launch->backend = dp_worker_backend(launch->worker);
    attn_status status = attn_backend_start(launch->backend, &launch->batch, NULL);
    if (attn_failed(status)) count_launch(launch);
    return status;
}

/* NULL: there is no memory. */
static launch *take_launch(dp_worker *worker, const dp_engine *engine) {
    dp_scratch *scratch = dp_worker_scratch(worker);
    if (!dp_scratch_reserve(&scratch->launch, &scratch->launch_size, sizeof(launch))) return NULL;
    launch *taken = scratch->launch;
    taken->worker = worker;
    taken->owner = &engine->ranks[dp_worker_rank(worker)];
    taken->engine = engine;
    taken->count = taken->size = taken->rows = taken->pages = taken->prefix_count = 0;
    taken->tokens_shared = 0;
    taken->spread = taken->wants_lse = taken->device_time = false;
    taken->staged = taken->bytes_in_place = taken->bytes_gathered = 0;
    return taken;
}

static attn_status layer_start(dp_worker *worker, dp_job *const *jobs, uint32_t count, bool *in_flight) {
    launch *launch = take_launch(worker, part_of(jobs[0])->step->engine);
    if (launch == NULL) {
        attn_status status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a launch of %u calls", count);
        for (uint32_t i = 0; i < count; i++)
            dp_layer_part_fail(part_of(jobs[i]), status);
        return status;
    }
    select_parts(launch, jobs, count);
    if (launch->count == 0) return attn_ok();
    attn_status status = decode_starts(launch);
    *in_flight = !attn_failed(status);
    if (attn_failed(status)) fail_parts(launch, status);
    return status;
}

static attn_status layer_complete(dp_worker *worker, dp_job *const *jobs, uint32_t count) {
    (void)jobs;
    (void)count;
    const launch *launch = dp_worker_scratch(worker)->launch;
    attn_timing timing = {0};
    attn_status status = attn_backend_finish(launch->backend, &timing);
    count_launch(launch);
    note_timing(launch, &timing);
    if (attn_failed(status)) fail_parts(launch, status);
    return status;
}

static void layer_finish(dp_job *job) { dp_layer_part_finish(part_of(job)); }

static void layer_drop(dp_job *job, attn_status status) {
    dp_layer_part_fail(part_of(job), status);
    dp_layer_part_finish(part_of(job));
}

static void layer_abandon(dp_job *job, attn_status status) { dp_layer_part_abandon(part_of(job), status); }

static void layer_reclaim(dp_job *job) { dp_layer_part_reclaim(part_of(job)); }

static bool same_sinks(const dp_options *left, const dp_options *right) {
    if (left->sink_count != right->sink_count) return false;
    return left->sink_count == 0 || memcmp(left->sinks, right->sinks, left->sink_count * sizeof *left->sinks) == 0;
}

static bool layer_joins(const dp_job *first_job, const dp_job *job) {
    const dp_layer_part *part = (const dp_layer_part *)first_job, *other_part = (const dp_layer_part *)job;
    if (part->alone || other_part->alone) return false;
    const dp_step *first = part->step;
    const dp_step *other = other_part->step;
    const dp_options *left = &first->input.options;
    const dp_options *right = &other->input.options;
    return first->input.layer == other->input.layer && first->read_only == other->read_only &&
           first->scale == other->scale && left->softcap == right->softcap && left->window == right->window &&
           left->batch_invariant == right->batch_invariant && same_sinks(left, right);
}

const dp_job_kind dp_layer_job_kind = {
    .start = layer_start,
    .complete = layer_complete,
    .finish = layer_finish,
    .drop = layer_drop,
    .abandon = layer_abandon,
    .reclaim = layer_reclaim,
    .joins = layer_joins,
};
