#define _GNU_SOURCE
#include "dp/direct.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/channel.h"

/* How long one side waits for the other, at most; never longer than half of the stall limit. */
#define TIMEOUT_NS INT64_C(3000000000)

typedef struct dp_direct dp_direct;

/* A rank's side. Constant but for what its jobs find. */
typedef struct {
    dp_job job; /* first: a job is its side */
    dp_direct *direct;
    uint32_t rank;
    bool sends;
    uint32_t *pages;      /* [page_count] */
    attn_channel_end end; /* what the rank has said of its backend */
} direct_side;

struct dp_direct {
    dp_engine *engine;
    dp_transfer *transfer; /* until it has ended */
    void (*ended)(dp_transfer *transfer, attn_status status);
    direct_side sides[2];
    uint32_t page_count;
    int64_t timeout_ns;
    attn_channel *channel; /* NULL: the ranks are still saying what their backends are */
    dp_gather gather;
    atomic_uint users; /* the transfer, and runs that were abandoned */
    atomic_bool failed;
    attn_saved_status failure; /* written by the first to set `failed` */
};

static void let_go(dp_direct *direct) {
    if (atomic_fetch_sub_explicit(&direct->users, 1, memory_order_acq_rel) > 1) return;
    attn_channel_destroy(direct->channel);
    free(direct->sides[0].pages);
    free(direct->sides[1].pages);
    free(direct);
}

static void fail(dp_direct *direct, attn_status status) {
    if (!atomic_exchange(&direct->failed, true)) attn_status_save(&direct->failure, status);
    if (direct->channel != NULL) attn_channel_break(direct->channel, "its other rank has failed");
}

static void end(dp_direct *direct) {
    dp_transfer *transfer = direct->transfer;
    attn_saved_status failure = {0};
    bool has_failed = atomic_load(&direct->failed);
    if (has_failed) failure = direct->failure;
    void (*ended)(dp_transfer *, attn_status) = direct->ended;
    atomic_store(&direct->engine->direct_busy, false);
    let_go(direct);
    ended(transfer, has_failed ? attn_status_view(&failure) : attn_ok());
}

/* Submits both sides' jobs; or says why not, and has submitted none. */
static attn_status submit(dp_direct *direct) {
    dp_engine_rank *ranks = direct->engine->ranks;
    direct_side *first = &direct->sides[0], *second = &direct->sides[1];
    ATTN_TRY(dp_rank_reserve(ranks[first->rank].rank, first->job.epoch));
    attn_status status = dp_rank_reserve(ranks[second->rank].rank, second->job.epoch);
    if (attn_failed(status)) {
        dp_rank_unreserve(ranks[first->rank].rank);
        return status;
    }
    dp_gather_init(&direct->gather, 2);
    dp_rank_submit(ranks[first->rank].rank, &first->job);
    dp_rank_submit(ranks[second->rank].rank, &second->job);
    return attn_ok();
}

/* Both have said what their backends are: they meet on the channel. */
static attn_status connect_sides(dp_direct *direct) {
    if (atomic_load(direct->transfer->cancelled)) return attn_error(ATTN_CANCELLED, "the move was cancelled");
    ATTN_TRY(attn_channel_create(&direct->sides[0].end, &direct->sides[1].end, &direct->channel));
    return submit(direct);
}

static void side_arrives(dp_direct *direct) {
    if (!dp_gather_arrive(&direct->gather)) return;
    bool goes_on = direct->channel == NULL && !atomic_load(&direct->failed);
    if (goes_on) {
        attn_status status = connect_sides(direct);
        if (!attn_failed(status)) return;
        fail(direct, status);
    }
    end(direct);
}

/* ------------------------------------------------------------------------------------------- */
/* The jobs */

/* A broken channel is no lost device: that shows at the next call of the backend. */
static attn_status direct_run(dp_worker *worker, dp_job *const *jobs, uint32_t count) {
    (void)count;
    direct_side *side = (direct_side *)jobs[0];
    dp_direct *direct = side->direct;
    if (direct->channel == NULL) {
        side->end = attn_channel_end_of(dp_worker_backend(worker));
        return attn_ok();
    }
    int64_t start = attn_now_ns();
    attn_status status = (side->sends ? attn_channel_send : attn_channel_receive)(
        direct->channel, dp_worker_backend(worker), side->pages, direct->page_count, direct->timeout_ns);
    dp_count(&direct->engine->ranks[side->rank].counters.busy_ns, (uint64_t)(attn_now_ns() - start));
    if (attn_failed(status)) fail(direct, status);
    return attn_ok();
}

static void direct_finish(dp_job *job) { side_arrives(((direct_side *)job)->direct); }

static void direct_drop(dp_job *job, attn_status status) {
    dp_direct *direct = ((direct_side *)job)->direct;
    fail(direct, status);
    side_arrives(direct);
}

static void direct_abandon(dp_job *job, attn_status status) {
    dp_direct *direct = ((direct_side *)job)->direct;
    dp_engine_hold(direct->engine);
    atomic_fetch_add(&direct->users, 1);
    fail(direct, status);
    side_arrives(direct);
}

static void direct_reclaim(dp_job *job) {
    dp_direct *direct = ((direct_side *)job)->direct;
    dp_engine *engine = direct->engine;
    let_go(direct);
    dp_engine_let_go(engine);
}

static const dp_job_kind direct_job_kind = {
    .run = direct_run,
    .finish = direct_finish,
    .drop = direct_drop,
    .abandon = direct_abandon,
    .reclaim = direct_reclaim,
};

/* ------------------------------------------------------------------------------------------- */

static bool make_side(dp_direct *direct, bool sends, uint32_t rank, const dp_part *part) {
    direct_side *side = &direct->sides[sends ? 0 : 1];
    *side = (direct_side){.job = {.kind = &direct_job_kind, .weight = 1, .epoch = part->epoch},
                          .direct = direct,
                          .rank = rank,
                          .sends = sends};
    side->pages = malloc(direct->page_count * sizeof *side->pages);
    if (side->pages == NULL) return false;
    memcpy(side->pages, part->pages, direct->page_count * sizeof *side->pages);
    return true;
}

/* NULL: there is no memory for one. */
static dp_direct *make_direct(dp_transfer *transfer, void (*ended)(dp_transfer *, attn_status)) {
    dp_direct *made = calloc(1, sizeof *made);
    if (made == NULL) return NULL;
    int64_t stall_ns = transfer->engine->config.rank_stall_ns;
    made->engine = transfer->engine;
    made->transfer = transfer;
    made->ended = ended;
    made->page_count = dp_pages_for(&transfer->engine->config.geometry, transfer->from->length);
    made->timeout_ns = stall_ns > 0 && stall_ns / 2 < TIMEOUT_NS ? stall_ns / 2 : TIMEOUT_NS;
    atomic_init(&made->users, 1);
    atomic_init(&made->failed, false);
    if (make_side(made, true, transfer->from->home, &transfer->from->parts[0]) &&
        make_side(made, false, transfer->to->home, &transfer->to->parts[0])) {
        return made;
    }
    free(made->sides[0].pages);
    free(made);
    return NULL;
}

static bool is_worth_it(const dp_transfer *transfer) {
    const dp_engine *engine = transfer->engine;
    uint64_t bytes =
        transfer->from->length * engine->config.geometry.layers * (engine->key_row_bytes + engine->value_row_bytes);
    return engine->config.direct_move_bytes > 0 && bytes >= engine->config.direct_move_bytes;
}

bool dp_direct_start(dp_transfer *transfer, void (*ended)(dp_transfer *transfer, attn_status status)) {
    dp_engine *engine = transfer->engine;
    if (transfer->to->stripes > 1 || transfer->from->length == 0 || !is_worth_it(transfer)) return false;
    if (!attn_backend_kind_has_channels(engine->backend)) return false;
    if (atomic_exchange(&engine->direct_busy, true)) return false;
    dp_direct *direct = make_direct(transfer, ended);
    if (direct == NULL || attn_failed(submit(direct))) {
        atomic_store(&engine->direct_busy, false);
        if (direct != NULL) let_go(direct);
        return false;
    }
    return true;
}
