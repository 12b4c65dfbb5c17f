/*
 * Moves: a sequence's pages are taken elsewhere under the engine's lock, filled without it, and made its own under it.
 *
 *   dp_sequence_move -> [ waits for a step to end -> ] sets out -> transfer -> arrives, or stays where it was -> done
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "dp/state.h"
#include "dp/transfer.h"

typedef enum {
    TRAVEL_WAITS,    /* for its sequence to be busy no more */
    TRAVEL_SETS_OUT, /* its sequence is busy with it */
    TRAVEL_IS_OVER,  /* before it began: nothing is to be done, or nothing can be */
} travel_stage;

struct dp_travel {
    dp_transfer transfer; /* first */
    dp_engine *engine;
    dp_move *move;
    uint32_t tenant;
    travel_stage stage;
    dp_sequence *sequence; /* from setting out on */
    dp_place place;        /* likewise */
    dp_move_record record; /* likewise */
    int64_t began_ns;      /* likewise */
    attn_saved_status outcome;
    dp_travel *next; /* that waits, or sets out; guarded by the engine's lock in the list of those that wait */
};

/* ------------------------------------------------------------------------------------------- */
/* Calls that wait for a move to end */

void dp_wait_begin(dp_engine *engine, dp_wait *wait) {
    dp_moves *moves = &engine->moves;
    wait->listed = true;
    wait->previous = NULL;
    wait->next = moves->waits;
    if (moves->waits != NULL) moves->waits->previous = wait;
    moves->waits = wait;
}

bool dp_wait_withdraw(dp_engine *engine, dp_wait *wait) {
    pthread_mutex_lock(&engine->lock);
    bool listed = wait->listed;
    if (listed) {
        if (wait->previous != NULL)
            wait->previous->next = wait->next;
        else
            engine->moves.waits = wait->next;
        if (wait->next != NULL) wait->next->previous = wait->previous;
        wait->listed = false;
    }
    pthread_mutex_unlock(&engine->lock);
    return listed;
}

/* Takes all that wait off the list. With the lock held. */
static dp_wait *take_waits(dp_engine *engine) {
    dp_wait *taken = engine->moves.waits;
    for (dp_wait *wait = taken; wait != NULL; wait = wait->next)
        wait->listed = false;
    engine->moves.waits = NULL;
    return taken;
}

static void wake(dp_wait *waits) {
    while (waits != NULL) {
        dp_wait *wait = waits;
        waits = wait->next;
        wait->ready(wait);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Whether a sequence may move: with the lock held */

/* The first rank of those that the sequence is to live on that is lost; false: none is. */
static bool target_lost(const dp_travel *travel, uint32_t *rank) {
    const dp_sequences *table = &travel->engine->sequences;
    for (uint32_t r = 0; r < table->ranks; r++) {
        if (!table->loads[r].lost || !(travel->move->spread || r == travel->move->rank)) continue;
        *rank = r;
        return true;
    }
    return false;
}

static attn_status check_target(const dp_travel *travel) {
    uint32_t ranks = travel->engine->config.ranks, lost;
    if (!travel->move->spread && travel->move->rank >= ranks) {
        return attn_error(ATTN_INVALID_ARGUMENT, "dp_rank: %u; this server has ranks 0 .. %u", travel->move->rank,
                          ranks - 1);
    }
    if (!target_lost(travel, &lost)) return attn_ok();
    if (travel->move->spread) {
        return attn_error(ATTN_UNAVAILABLE,
                          "spread: needs rank %u, which is lost; move it to a rank, or wait until that serves again",
                          lost);
    }
    return attn_error(ATTN_UNAVAILABLE, "dp_rank: rank %u is lost; choose another, or wait until it serves again",
                      lost);
}

static bool is_there(const dp_travel *travel, const dp_sequence *sequence) {
    if (sequence->moving) return false;
    return travel->move->spread ? travel->engine->config.ranks == 1 : travel->move->rank == sequence->home;
}

/* Sets the travel's stage, and its sequence and place where it sets out. */
static attn_status admit(dp_travel *travel, int64_t now) {
    dp_sequences *table = &travel->engine->sequences;
    const dp_move *move = travel->move;
    travel->stage = TRAVEL_IS_OVER;
    if (atomic_load(&move->cancelled)) return attn_error(ATTN_CANCELLED, "the move was cancelled");
    dp_sequence *sequence = dp_sequences_find(table, travel->tenant, move->sequence);
    if (sequence == NULL) return attn_error(ATTN_NOT_FOUND, "sequence: unknown, closed or not yours");
    ATTN_TRY(check_target(travel));
    ATTN_TRY(dp_sequence_holds(table, sequence));
    if (sequence->stripes > 1) {
        return attn_error(ATTN_FAILED_PRECONDITION, "sequence: spread over all ranks; only a whole one can be moved");
    }
    if (is_there(travel, sequence)) return attn_ok();
    if (sequence->busy && move->step_until_ns > now) {
        travel->stage = TRAVEL_WAITS;
        return attn_ok();
    }
    if (sequence->busy) return attn_error(ATTN_ABORTED, "sequence: %s right now", dp_sequence_busy_with(sequence));
    uint32_t home = move->spread ? sequence->home : move->rank;
    ATTN_TRY(dp_sequence_move_begin(table, sequence, home, move->spread, &travel->place));
    travel->sequence = sequence;
    travel->record = (dp_move_record){
        .sequence = move->sequence,
        .from = sequence->home,
        .to = home,
        .spread = move->spread,
        .is_asked_for = move != &travel->engine->moves.balance,
        .tokens = sequence->length,
    };
    travel->began_ns = now;
    travel->stage = TRAVEL_SETS_OUT;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* The way */

static attn_status outcome_of(const dp_travel *travel) {
    return travel->outcome.code == ATTN_OK ? attn_ok() : attn_status_view(&travel->outcome);
}

/* The last that is done with a travel; if the move is the engine's own, the engine may be gone afterwards. */
static void finish(dp_travel *travel) {
    travel->move->done(travel->move, outcome_of(travel));
    free(travel);
}

/* Whether all ranks have served from setting out to now. With the lock held. */
static attn_status check_losses(const dp_travel *travel) {
    const dp_sequences *table = &travel->engine->sequences;
    uint32_t lost;
    ATTN_TRY(dp_sequence_holds(table, travel->sequence));
    if (!dp_place_lost(table, &travel->place, &lost)) return attn_ok();
    return attn_error(
        ATTN_UNAVAILABLE,
        "%s: rank %u was lost on the way; the sequence is where it was: choose another, or try again later",
        travel->move->spread ? "spread" : "dp_rank", lost);
}

/* A loss is told in the move's words, not in those of the rank that has ended the transfer. With the lock held. */
static void note_losses(dp_travel *travel) {
    if (travel->outcome.code != ATTN_OK && travel->outcome.code != ATTN_UNAVAILABLE) return;
    dp_engine_note_ranks(travel->engine);
    attn_status status = check_losses(travel);
    if (attn_failed(status)) attn_status_save(&travel->outcome, status);
}

/* The sequence lives where it went, if all went well, or where it was. With the lock held. */
static void settle(dp_travel *travel) {
    dp_engine *engine = travel->engine;
    if (travel->record.is_asked_for) travel->sequence->used_ns = attn_now_ns();
    note_losses(travel);
    if (travel->outcome.code != ATTN_OK) {
        dp_sequence_move_cancel(&engine->sequences, travel->sequence, &travel->place);
        engine->moves.failed++;
        return;
    }
    dp_sequence_move_commit(&engine->sequences, travel->sequence, &travel->place);
    travel->move->tokens = travel->sequence->length;
    travel->move->bytes = travel->transfer.bytes;
    engine->moves.succeeded++;
    engine->moves.tokens += travel->move->tokens;
    engine->moves.bytes += travel->move->bytes;
}

/* Tells whoever keeps a record. Without the lock. */
static void tell(dp_travel *travel) {
    const dp_config *config = &travel->engine->config;
    dp_move_record *record = &travel->record;
    if (config->moved == NULL) return;
    record->direct = travel->transfer.direct;
    record->bytes = travel->transfer.bytes;
    record->took_ns = attn_now_ns() - travel->began_ns;
    record->status = outcome_of(travel);
    config->moved(config->moved_context, record);
}

static void transfer_done(dp_transfer *transfer, attn_status status) {
    dp_travel *travel = (dp_travel *)transfer;
    dp_engine *engine = travel->engine;
    if (attn_failed(status)) attn_status_save(&travel->outcome, status);
    pthread_mutex_lock(&engine->lock);
    settle(travel);
    dp_wait *waits = take_waits(engine);
    pthread_mutex_unlock(&engine->lock);
    tell(travel);
    wake(waits);
    dp_moves_resume(engine);
    finish(travel);
}

static void set_out(dp_travel *travel) {
    travel->transfer = (dp_transfer){
        .engine = travel->engine,
        .from = travel->sequence,
        .to = &travel->place,
        .cancelled = &travel->move->cancelled,
        .done = transfer_done,
    };
    attn_status status = dp_transfer_start(&travel->transfer);
    if (attn_failed(status)) transfer_done(&travel->transfer, status);
}

/* ------------------------------------------------------------------------------------------- */
/* Those that wait */

/* Behind those that wait already. With the lock held. */
static void append(dp_engine *engine, dp_travel *travel) {
    dp_travel **link = &engine->moves.waiting;
    while (*link != NULL)
        link = &(*link)->next;
    *link = travel;
    atomic_store(&engine->moves.any_waiting, true);
}

/* Takes those off the list that wait no more. */
static dp_travel *take_ready(dp_engine *engine) {
    dp_travel *ready = NULL;
    dp_travel **last = &ready;
    int64_t now = attn_now_ns();
    pthread_mutex_lock(&engine->lock);
    dp_engine_note_ranks(engine);
    for (dp_travel **link = &engine->moves.waiting; *link != NULL;) {
        dp_travel *travel = *link;
        attn_status status = admit(travel, now);
        if (attn_failed(status)) attn_status_save(&travel->outcome, status);
        if (travel->stage == TRAVEL_WAITS) {
            link = &travel->next;
            continue;
        }
        *link = travel->next;
        travel->next = NULL;
        *last = travel;
        last = &travel->next;
    }
    atomic_store(&engine->moves.any_waiting, engine->moves.waiting != NULL);
    pthread_mutex_unlock(&engine->lock);
    return ready;
}

void dp_moves_resume(dp_engine *engine) {
    if (!atomic_load(&engine->moves.any_waiting)) return;
    dp_travel *ready = take_ready(engine);
    while (ready != NULL) {
        dp_travel *travel = ready;
        ready = travel->next;
        if (travel->stage == TRAVEL_SETS_OUT)
            set_out(travel);
        else
            finish(travel);
    }
}

/* ------------------------------------------------------------------------------------------- */

attn_status dp_sequence_move(dp_engine *engine, uint32_t tenant, dp_move *move) {
    dp_travel *travel = calloc(1, sizeof *travel);
    if (travel == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a move");
    travel->engine = engine;
    travel->move = move;
    travel->tenant = tenant;
    move->tokens = move->bytes = 0;
    pthread_mutex_lock(&engine->lock);
    dp_engine_note_ranks(engine);
    attn_status status = admit(travel, attn_now_ns());
    travel_stage stage = travel->stage; /* a travel that waits may be over as soon as the lock is free */
    if (stage == TRAVEL_WAITS) append(engine, travel);
    pthread_mutex_unlock(&engine->lock);
    if (attn_failed(status)) {
        free(travel);
        return status;
    }
    if (stage == TRAVEL_SETS_OUT) set_out(travel);
    if (stage == TRAVEL_IS_OVER) finish(travel);
    return attn_ok();
}

void dp_move_cancel(dp_engine *engine, dp_move *move) {
    atomic_store(&move->cancelled, true);
    dp_moves_resume(engine);
}
