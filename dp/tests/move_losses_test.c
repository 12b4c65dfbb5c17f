/*
 * Moves and lost ranks: a rank that is lost, hangs or restarts while a sequence is on its way. The sequence is where
 * it was, no page is left behind, no new pool is touched, and a backend that comes back late finds its rows there.
 *
 * The linker puts this file's attn_backend_export and attn_backend_append in front of the real ones (--wrap), so that
 * a test can have something happen right before a move's n-th read or write, and hold the writes. Elsewhere ranks are
 * made to hang by dp_engine_stall_rank, which holds them right before their backend, with everything in hand.
 */
#define _GNU_SOURCE
#include "dp/tests/fixture.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/clock.h"
#include "dp/state.h"

#define MS INT64_C(1000000)

/* From the stall's discovery on, the promise of dp/engine.h. */
#define PROMISED_NS (1000 * MS)

/* ------------------------------------------------------------------------------------------- */
/* In front of the backends */

/* What happens before the n-th call from now on. */
typedef struct {
    atomic_uint calls_left; /* up to that one; 0: it was, or nothing is to happen */
    void (*act)(dp_engine *engine);
    dp_engine *engine;
} ambush;

static ambush at_read, at_write;
static atomic_bool writes_are_held;
static atomic_uint writes_held, writes_returned;

static void lay(ambush *ambush, uint32_t calls, void (*act)(dp_engine *engine), dp_engine *engine) {
    ambush->act = act;
    ambush->engine = engine;
    atomic_store(&ambush->calls_left, calls);
}

static void pass(ambush *ambush) {
    if (atomic_load(&ambush->calls_left) == 0) return;
    if (atomic_fetch_sub(&ambush->calls_left, 1) == 1) ambush->act(ambush->engine);
}

attn_status __real_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values);
attn_status __wrap_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values);
attn_status __real_attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, const void *keys,
                                       const void *values);
attn_status __wrap_attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, const void *keys,
                                       const void *values);

attn_status __wrap_attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, void *keys,
                                       void *values) {
    pass(&at_read);
    return __real_attn_backend_export(backend, layer, pages, page_count, position, tokens, keys, values);
}

attn_status __wrap_attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages,
                                       uint32_t page_count, uint64_t position, uint32_t tokens, const void *keys,
                                       const void *values) {
    pass(&at_write);
    atomic_fetch_add(&writes_held, 1);
    while (atomic_load(&writes_are_held))
        usleep(200);
    atomic_fetch_sub(&writes_held, 1);
    attn_status status = __real_attn_backend_append(backend, layer, pages, page_count, position, tokens, keys, values);
    atomic_fetch_add(&writes_returned, 1);
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* A sequence with something to lose */

/* Chunks of a spread one on three ranks: home, 1, 2; a whole one goes in one chunk a layer. */
enum { TOKENS = 1300, PAGES = (TOKENS + 15) / 16, LAYERS = 3, SPREAD_CHUNKS = 2 * LAYERS };

typedef struct {
    dp_engine *engine;
    uint64_t handle; /* of TOKENS tokens, on rank 0 */
    char outputs[OUT_BYTES];
} home;

static home make_home(int64_t stall_ns) {
    dp_config config = small_config();
    config.ranks = 3;
    config.backend = "cpu";
    config.rank_stall_ns = stall_ns;
    home made = {.engine = create_engine(&config)};
    made.handle = open_sequence(made.engine, DP_EXPLICIT, 0);
    fill(made.engine, made.handle, TOKENS, 1);
    read_outputs(made.engine, made.handle, made.outputs);
    return made;
}

static void assert_outputs(const home *home, uint64_t handle) {
    char outputs[OUT_BYTES];
    read_outputs(home->engine, handle, outputs);
    assert_memory_equal(home->outputs, outputs, OUT_BYTES);
}

/* Nothing of the sequence, and of the move, is on the rank. */
static void assert_nothing_on(const home *home, uint32_t rank) {
    dp_rank_info info = rank_info(home->engine, rank);
    assert_int_equal(info.pages_total, info.pages_free);
    assert_int_equal(0, info.sequences + info.tokens + info.tokens_in_flight);
}

/* The sequence is where it was, as it was, and goes on; no rank but `lost` holds anything of it. */
static void assert_stayed(const home *home, uint32_t lost) {
    dp_sequence_info info = describe(home->engine, home->handle);
    assert_int_equal(0, info.rank);
    assert_false(info.spread);
    assert_false(info.busy);
    assert_int_equal(TOKENS, info.length);
    assert_int_equal(0, info.shared_pages);
    assert_int_equal(256 - PAGES, rank_info(home->engine, 0).pages_free);
    for (uint32_t r = 1; r < 3; r++) {
        if (r != lost) assert_nothing_on(home, r);
    }
    assert_outputs(home, home->handle);
}

static void assert_counts(const home *home, uint64_t moves, uint64_t failed) {
    dp_engine_counts counts;
    dp_engine_count(home->engine, &counts);
    assert_int_equal(moves, counts.moves);
    assert_int_equal(failed, counts.moves_failed);
}

/* Moves once more, now that all ranks serve: to rank 1, bit by bit. */
static void move_after_all(const home *home) {
    assert_ok(try_move(home->engine, home->handle, 1));
    assert_int_equal(1, describe(home->engine, home->handle).rank);
    assert_outputs(home, home->handle);
    assert_nothing_on(home, 0);
}

static void leave(home *home) {
    close_sequence(home->engine, home->handle);
    destroy_engine(home->engine);
}

/* ------------------------------------------------------------------------------------------- */
/* Ranks that are lost on the way */

static void lose_rank_0(dp_engine *engine) { dp_engine_fail_rank(engine, 0); }
static void lose_rank_1(dp_engine *engine) { dp_engine_fail_rank(engine, 1); }

static const char where_it_was[] = "rank 1 was lost on the way; the sequence is where it was";
static const char gone[] = "sequence: rank 0, which held it, was lost";

static void target_that_is_lost_leaves_the_sequence_at_home(void **state) {
    (void)state;
    ambush *ambushes[] = {&at_read, &at_write}; /* while it waits for rows, and while it writes them */
    for (int i = 0; i < 2; i++) {
        home home = make_home(0);
        lay(ambushes[i], 2, lose_rank_1, home.engine);
        assert_error(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1), where_it_was);
        assert_counts(&home, 0, 1);
        assert_stayed(&home, 1);
        assert_error(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1), "dp_rank: rank 1 is lost; choose");
        restart_rank(home.engine, 1);
        assert_stayed(&home, 3);
        move_after_all(&home);
        assert_counts(&home, 1, 1);
        leave(&home);
    }
}

static void source_that_is_lost_takes_the_sequence_along_and_leaves_no_page(void **state) {
    (void)state;
    ambush *ambushes[] = {&at_read, &at_write};
    for (int i = 0; i < 2; i++) {
        home home = make_home(0);
        lay(ambushes[i], 2, lose_rank_0, home.engine);
        assert_error(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1), gone);
        assert_counts(&home, 0, 1);
        assert_nothing_on(&home, 1);
        assert_false(describe(home.engine, home.handle).busy);
        restart_rank(home.engine, 0);
        assert_nothing_on(&home, 0);
        assert_error(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1), gone);
        leave(&home);
    }
}

static void spreading_over_a_rank_that_is_lost_leaves_the_sequence_whole(void **state) {
    (void)state;
    for (uint32_t calls = 1; calls <= SPREAD_CHUNKS; calls++) {
        home home = make_home(0);
        lay(&at_write, calls, lose_rank_1, home.engine);
        assert_error(ATTN_UNAVAILABLE, try_spread(home.engine, home.handle), "spread: rank 1 was lost on the way");
        assert_stayed(&home, 1);
        restart_rank(home.engine, 1);
        assert_stayed(&home, 3);
        assert_ok(try_spread(home.engine, home.handle));
        assert_true(describe(home.engine, home.handle).spread);
        leave(&home);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Ranks that hang on the way */

/* Until no run that was abandoned has the engine's memory any more. */
static void wait_until_all_are_back(dp_engine *engine) {
    while (atomic_load(&engine->references) > 1)
        usleep(200);
}

static void move_ends_at_once_when_a_rank_hangs(void **state) {
    (void)state;
    for (uint32_t hanging = 0; hanging < 2; hanging++) { /* the source's read, or the target's write */
        home home = make_home(STALL_NS);
        int64_t started_ns = attn_now_ns();
        dp_engine_stall_rank(home.engine, hanging);
        assert_error(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1), hanging == 0 ? gone : where_it_was);
        assert_true(attn_now_ns() - started_ns < STALL_NS + PROMISED_NS);
        assert_int_equal(2, atomic_load(&home.engine->references));
        assert_int_equal(1, rank_info(home.engine, hanging).stalls);
        restart_rank(home.engine, hanging); /* while the old one hangs still */
        if (hanging == 0) {
            assert_nothing_on(&home, 0);
            assert_nothing_on(&home, 1);
        } else {
            assert_stayed(&home, 3);
            move_after_all(&home);
        }
        dp_engine_release_rank(home.engine, hanging);
        wait_until_all_are_back(home.engine);
        if (hanging == 1) assert_outputs(&home, home.handle);
        leave(&home);
    }
}

static void spreading_ends_at_once_when_a_rank_hangs(void **state) {
    (void)state;
    home home = make_home(STALL_NS);
    dp_engine_stall_rank(home.engine, 2);
    assert_error(ATTN_UNAVAILABLE, try_spread(home.engine, home.handle), "spread: rank 2 was lost on the way");
    assert_stayed(&home, 2);
    dp_engine_release_rank(home.engine, 2);
    wait_until_all_are_back(home.engine);
    assert_stayed(&home, 2);
    leave(&home);
}

/* ------------------------------------------------------------------------------------------- */
/* Ranks that are lost and serve again before the move ends */

static uint64_t newcomer; /* a sequence in the new pool */

static void lose_and_restart(dp_engine *engine, uint32_t rank) {
    dp_engine_fail_rank(engine, rank);
    restart_rank(engine, rank);
    newcomer = open_sequence(engine, DP_EXPLICIT, rank);
    fill(engine, newcomer, TOKENS, 1);
}

static void restart_rank_0(dp_engine *engine) { lose_and_restart(engine, 0); }
static void restart_rank_1(dp_engine *engine) { lose_and_restart(engine, 1); }

/* The newcomer has all of its pages, and its tokens. */
static void assert_newcomer_unharmed(const home *home, uint32_t rank) {
    dp_rank_info info = rank_info(home->engine, rank);
    assert_int_equal(256 - PAGES, info.pages_free);
    assert_int_equal(TOKENS, info.tokens);
    assert_int_equal(0, info.tokens_in_flight);
    assert_int_equal(1, info.sequences);
    assert_int_equal(0, describe(home->engine, newcomer).shared_pages);
    assert_outputs(home, newcomer);
}

static void move_over_a_restart_of_its_target_fails_and_spares_the_new_pool(void **state) {
    (void)state;
    for (uint32_t calls = 1; calls <= LAYERS; calls++) {
        home home = make_home(0);
        lay(&at_read, calls, restart_rank_1, home.engine);
        assert_error(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1), where_it_was);
        assert_stayed(&home, 1);
        assert_newcomer_unharmed(&home, 1);
        close_sequence(home.engine, newcomer);
        move_after_all(&home);
        leave(&home);
    }
}

/* All rows have come when the move finds that the rank they came from is another. */
static void move_over_a_restart_of_its_source_fails_and_spares_the_new_pool(void **state) {
    (void)state;
    home home = make_home(0);
    lay(&at_write, LAYERS, restart_rank_0, home.engine);
    assert_error(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1), gone);
    assert_nothing_on(&home, 1);
    assert_newcomer_unharmed(&home, 0);
    close_sequence(home.engine, home.handle);
    assert_newcomer_unharmed(&home, 0);
    close_sequence(home.engine, newcomer);
    destroy_engine(home.engine);
}

/* All of rank 1's rows have been written, to a pool that is no more, when rank 2's last ones are. */
static void spreading_over_a_restart_fails_and_spares_the_new_pool(void **state) {
    (void)state;
    home home = make_home(0);
    lay(&at_write, SPREAD_CHUNKS, restart_rank_1, home.engine);
    assert_error(ATTN_UNAVAILABLE, try_spread(home.engine, home.handle), "spread: rank 1 was lost on the way");
    assert_stayed(&home, 1);
    assert_newcomer_unharmed(&home, 1);
    close_sequence(home.engine, newcomer);
    leave(&home);
}

/* ------------------------------------------------------------------------------------------- */
/* Who waits */

typedef struct {
    dp_wait wait; /* first */
    atomic_int readies;
} counted_wait;

static void count_ready(dp_wait *wait) { atomic_fetch_add(&((counted_wait *)wait)->readies, 1); }

static void step_that_waits_goes_on_when_the_move_ends_by_a_loss(void **state) {
    (void)state;
    for (uint32_t hanging = 0; hanging < 2; hanging++) {
        home home = make_home(STALL_NS);
        waiting_move move;
        counted_wait waiting = {.wait = {.ready = count_ready}};
        dp_step_request request = {.tenant = TENANT, .sequences = &home.handle, .count = 1, .wait = &waiting.wait};
        dp_step *step;
        dp_engine_stall_rank(home.engine, hanging);
        assert_ok(start_move(home.engine, &move, home.handle, 1, 0));
        assert_ok(dp_step_begin(home.engine, &request, &step));
        assert_null(step);
        assert_code(ATTN_UNAVAILABLE, wait_for_move(&move));
        assert_int_equal(1, atomic_load(&waiting.readies));
        attn_status status = dp_step_begin(home.engine, &request, &step);
        if (hanging == 0) {
            assert_error(ATTN_UNAVAILABLE, status, "sequences[0]: rank 0, which held it, was lost");
        } else {
            assert_ok(status);
            assert_non_null(step);
            dp_step_end(step);
        }
        dp_engine_release_rank(home.engine, hanging);
        wait_until_all_are_back(home.engine);
        leave(&home);
    }
}

static void move_that_waits_for_a_step_ends_with_it_when_its_rank_is_lost(void **state) {
    (void)state;
    home home = make_home(0);
    dice dice = {1};
    const attn_geometry *geometry = &home.engine->config.geometry;
    waiting_move move;
    dp_step *step = begin_step(home.engine, &home.handle, NULL, 1, false);
    assert_ok(start_move(home.engine, &move, home.handle, 1, INT64_MAX));
    dp_engine_fail_rank(home.engine, 0);
    assert_false(move_is_done(&move));
    layer_rows row = random_rows(&dice, geometry, 1, false);
    assert_error(ATTN_UNAVAILABLE, try_layer(step, geometry, 0, &row, NULL, NULL, NULL, NULL), "rank 0 is lost");
    dp_step_end(step);
    assert_error(ATTN_UNAVAILABLE, wait_for_move(&move), gone);
    assert_counts(&home, 0, 0); /* it never set out */
    free_rows(&row);
    restart_rank(home.engine, 0);
    leave(&home);
}

/* ------------------------------------------------------------------------------------------- */
/* The engine's own moves */

static dp_config balancing_config(double factor, uint64_t spread_above) {
    dp_config config = small_config();
    config.ranks = 2;
    config.backend = "cpu";
    config.rebalance_factor = factor;
    config.spread_above_tokens = spread_above;
    return config;
}

static void wait_until_balanced(dp_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    while (engine->moves.balancing)
        pthread_cond_wait(&engine->moves.balanced, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
}

static void lost_sequences_do_not_keep_others_from_being_moved(void **state) {
    (void)state;
    for (int spreads = 0; spreads < 2; spreads++) {
        dp_config config = balancing_config(spreads ? 0 : 1.5, spreads ? 1000 : 0);
        dp_engine *engine = create_engine(&config);
        uint64_t old = open_sequence(engine, DP_EXPLICIT, 0); /* the best choice, if it were there */
        fill(engine, old, 1600, 1);
        dp_engine_fail_rank(engine, 0);
        restart_rank(engine, 0);
        uint64_t fresh[2];
        for (int i = 0; i < 2; i++) {
            fresh[i] = open_sequence(engine, DP_EXPLICIT, 0);
            fill(engine, fresh[i], spreads ? 1100 - 200 * (uint32_t)i : 1500, 1);
        }
        dp_engine_reap(engine);
        wait_until_balanced(engine);
        dp_engine_counts counts;
        dp_engine_count(engine, &counts);
        assert_int_equal(1, counts.moves);
        assert_int_equal(0, counts.moves_failed);
        if (spreads)
            assert_true(describe(engine, fresh[0]).spread);
        else
            assert_int_equal(rank_info(engine, 0).tokens, rank_info(engine, 1).tokens);
        assert_int_equal(0, describe(engine, old).rank);
        assert_ok(dp_sequences_close(engine, TENANT, (uint64_t[]){old, fresh[0], fresh[1]}, 3));
        destroy_engine(engine);
    }
}

static void engine_can_be_destroyed_while_its_own_move_hangs(void **state) {
    (void)state;
    dp_config config = balancing_config(1.5, 0);
    config.rank_stall_ns = STALL_NS;
    dp_engine *engine = create_engine(&config);
    for (int i = 0; i < 2; i++)
        fill(engine, open_sequence(engine, DP_EXPLICIT, 0), 1500, 1);
    atomic_store(&writes_are_held, true);
    dp_engine_reap(engine);
    while (atomic_load(&writes_held) == 0)
        usleep(200);
    uint32_t returned = atomic_load(&writes_returned);
    int64_t started_ns = attn_now_ns();
    dp_engine_destroy(engine); /* with its sequences */
    assert_true(attn_now_ns() - started_ns < STALL_NS + PROMISED_NS);
    assert_int_equal(returned, atomic_load(&writes_returned));
    atomic_store(&writes_are_held, false);
    while (atomic_load(&writes_returned) == returned)
        usleep(200);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(target_that_is_lost_leaves_the_sequence_at_home),
        cmocka_unit_test(source_that_is_lost_takes_the_sequence_along_and_leaves_no_page),
        cmocka_unit_test(spreading_over_a_rank_that_is_lost_leaves_the_sequence_whole),
        cmocka_unit_test(move_ends_at_once_when_a_rank_hangs),
        cmocka_unit_test(spreading_ends_at_once_when_a_rank_hangs),
        cmocka_unit_test(move_over_a_restart_of_its_target_fails_and_spares_the_new_pool),
        cmocka_unit_test(move_over_a_restart_of_its_source_fails_and_spares_the_new_pool),
        cmocka_unit_test(spreading_over_a_restart_fails_and_spares_the_new_pool),
        cmocka_unit_test(step_that_waits_goes_on_when_the_move_ends_by_a_loss),
        cmocka_unit_test(move_that_waits_for_a_step_ends_with_it_when_its_rank_is_lost),
        cmocka_unit_test(lost_sequences_do_not_keep_others_from_being_moved),
        cmocka_unit_test(engine_can_be_destroyed_while_its_own_move_hangs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
