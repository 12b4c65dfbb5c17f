/*
 * Evening out the load of the ranks, by moves of the engine's own, one after another. dp_engine_reap in dp/engine.h
 * says what is moved, and when.
 *
 * It comes to rest. A move takes a sequence of three quarters of the difference between two ranks at most, so that
 * afterwards they differ by no more than half as much the other way round; to go back, the sequence would have to be
 * three quarters of that at most, which is less than it is.
 */
#define _GNU_SOURCE
#include <stddef.h>

#include "dp/state.h"

/* A smaller difference is not worth a move, whatever the ratio. */
#define LEAST_DIFFERENCE 1024

/* What is to be moved. */
typedef struct {
    uint32_t tenant;
    uint64_t handle;
    uint32_t rank;
    bool spread;
} choice;

/* ------------------------------------------------------------------------------------------- */
/* The choice: with the engine's lock held */

static uint64_t load_of(const dp_sequences *table, uint32_t rank) {
    return table->loads[rank].tokens + table->loads[rank].tokens_in_flight;
}

static bool may_move(const dp_sequences *table, const dp_sequence *sequence) {
    uint32_t lost;
    return sequence->open && !sequence->busy && sequence->stripes == 1 && sequence->length > 0 &&
           !dp_sequence_lost(table, sequence, &lost);
}

static bool any_lost(const dp_sequences *table) {
    for (uint32_t r = 0; r < table->ranks; r++) {
        if (table->loads[r].lost) return true;
    }
    return false;
}

/* Whether the other ranks have pages for their parts of a sequence that is to be spread. */
static bool fits_spread(const dp_sequences *table, const dp_sequence *sequence) {
    for (uint32_t j = 1; j < table->ranks; j++) {
        uint64_t tokens = dp_part_length(sequence->length, j, table->ranks);
        uint32_t rank = dp_sequence_rank(table, sequence, j);
        if (dp_pages_for(&table->geometry, tokens) > table->pools[rank].free) return false;
    }
    return true;
}

/* The longest sequence that has outgrown its rank. A sequence of one chunk would stay there all the same. */
static const dp_sequence *choose_to_spread(const dp_sequences *table, uint64_t above) {
    const dp_sequence *longest = NULL;
    uint64_t length = above > ATTN_CHUNK_TOKENS ? above : ATTN_CHUNK_TOKENS;
    if (table->ranks == 1 || any_lost(table)) return NULL;
    for (uint32_t i = 0; i < table->capacity; i++) {
        const dp_sequence *sequence = &table->slots[i];
        if (!may_move(table, sequence) || sequence->length <= length || !fits_spread(table, sequence)) continue;
        longest = sequence;
        length = sequence->length;
    }
    return longest;
}

/* The serving ranks with the most and the fewest tokens. False: none serves. */
static bool find_extremes(const dp_sequences *table, uint32_t *most, uint32_t *least) {
    bool found = false;
    for (uint32_t r = 0; r < table->ranks; r++) {
        if (table->loads[r].lost) continue;
        if (!found || load_of(table, r) > load_of(table, *most)) *most = r;
        if (!found || load_of(table, r) < load_of(table, *least)) *least = r;
        found = true;
    }
    return found;
}

/* How far apart two ranks are that differ by `difference` tokens once `tokens` have gone from the one to the other. */
static uint64_t difference_after(uint64_t difference, uint64_t tokens) {
    return difference > 2 * tokens ? difference - 2 * tokens : 2 * tokens - difference;
}

/* The sequence of rank `most` that best makes up for `difference` on rank `least`. */
static const dp_sequence *choose_between(const dp_sequences *table, uint32_t most, uint32_t least,
                                         uint64_t difference) {
    const dp_sequence *best = NULL;
    for (uint32_t i = 0; i < table->capacity; i++) {
        const dp_sequence *sequence = &table->slots[i];
        if (!may_move(table, sequence) || sequence->home != most) continue;
        if (sequence->length > difference - difference / 4) continue;
        if (dp_pages_for(&table->geometry, sequence->length) > table->pools[least].free) continue;
        if (best == NULL ||
            difference_after(difference, sequence->length) < difference_after(difference, best->length)) {
            best = sequence;
        }
    }
    return best;
}

static const dp_sequence *choose_to_even(const dp_sequences *table, double factor, uint32_t *rank) {
    uint32_t most = 0, least = 0;
    if (!find_extremes(table, &most, &least)) return NULL;
    uint64_t difference = load_of(table, most) - load_of(table, least);
    if (difference <= LEAST_DIFFERENCE) return NULL;
    if ((double)load_of(table, most) <= factor * (double)load_of(table, least)) return NULL;
    *rank = least;
    return choose_between(table, most, least, difference);
}

static bool choose(dp_engine *engine, choice *chosen) {
    const dp_config *config = &engine->config;
    const dp_sequences *table = &engine->sequences;
    const dp_sequence *sequence = NULL;
    *chosen = (choice){0};
    dp_engine_note_ranks(engine);
    if (config->spread_above_tokens > 0) sequence = choose_to_spread(table, config->spread_above_tokens);
    chosen->spread = sequence != NULL;
    if (sequence == NULL && config->rebalance_factor > 0) {
        sequence = choose_to_even(table, config->rebalance_factor, &chosen->rank);
    }
    if (sequence == NULL) return false;
    chosen->tenant = sequence->tenant;
    chosen->handle = dp_sequence_handle(table, sequence);
    return true;
}

/* ------------------------------------------------------------------------------------------- */
/* One after another */

static void balance_done(dp_move *move, attn_status status);

/* The next move, if one is worth it. */
static bool prepare_next(dp_engine *engine, uint32_t *tenant) {
    choice chosen;
    pthread_mutex_lock(&engine->lock);
    bool found = !engine->moves.closing && choose(engine, &chosen);
    if (found) {
        *tenant = chosen.tenant;
        engine->moves.balance = (dp_move){
            .sequence = chosen.handle,
            .rank = chosen.rank,
            .spread = chosen.spread,
            .done = balance_done,
        };
    }
    pthread_mutex_unlock(&engine->lock);
    return found;
}

/* The engine may be gone afterwards. */
static void rest(dp_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    engine->moves.balancing = false;
    pthread_cond_broadcast(&engine->moves.balanced);
    pthread_mutex_unlock(&engine->lock);
}

/* A sequence that is in a step again, or gone, since it was chosen is another time's. */
static void go_on(dp_engine *engine) {
    uint32_t tenant = 0;
    if (!prepare_next(engine, &tenant) || attn_failed(dp_sequence_move(engine, tenant, &engine->moves.balance))) {
        rest(engine);
    }
}

static void balance_done(dp_move *move, attn_status status) {
    dp_engine *engine = (dp_engine *)(void *)((char *)move - offsetof(dp_engine, moves.balance));
    if (attn_failed(status))
        rest(engine);
    else
        go_on(engine);
}

void dp_engine_balance(dp_engine *engine) {
    if (engine->config.rebalance_factor == 0 && engine->config.spread_above_tokens == 0) return;
    pthread_mutex_lock(&engine->lock);
    bool begins = !engine->moves.balancing && !engine->moves.closing;
    if (begins) engine->moves.balancing = true;
    pthread_mutex_unlock(&engine->lock);
    if (begins) go_on(engine);
}

void dp_moves_init(dp_moves *moves) {
    *moves = (dp_moves){0};
    atomic_init(&moves->any_waiting, false);
    pthread_cond_init(&moves->balanced, NULL);
}

void dp_moves_fini(dp_engine *engine) {
    dp_moves *moves = &engine->moves;
    pthread_mutex_lock(&engine->lock);
    moves->closing = true;
    if (moves->balancing) atomic_store(&moves->balance.cancelled, true);
    while (moves->balancing)
        pthread_cond_wait(&moves->balanced, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
    pthread_cond_destroy(&moves->balanced);
}
