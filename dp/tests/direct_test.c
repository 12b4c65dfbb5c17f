/*
 * Direct moves: a sequence whose pages go over a channel is what it was, and where the channel fails it moves all the
 * same, through the host's memory.
 *
 * CPU backends have no channels. The linker puts this file's in front of the real ones (--wrap): two threads that meet,
 * of which the receiving one copies the pages while the other waits. What NCCL does is tested in kernels/tests and, on
 * a machine with two GPUs, by tests/e2e/test_server_moves.py.
 */
#define _GNU_SOURCE
#include "dp/tests/fixture.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "dp/state.h"
#include "kernels/channel.h"

#define MS INT64_C(1000000)

enum { TOKENS = 1300 };

/* ------------------------------------------------------------------------------------------- */
/* Channels between CPU backends */

struct attn_channel {
    bool offered, taken, broken; /* guarded by `lock`, as are the pages */
    attn_backend *from;
    const uint32_t *pages;
    uint32_t count;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static atomic_uint created, received;
static atomic_bool creation_fails, sending_fails;

bool __wrap_attn_backend_kind_has_channels(const char *kind);
attn_channel_end __wrap_attn_channel_end_of(attn_backend *backend);
attn_status __wrap_attn_channel_create(const attn_channel_end *first, const attn_channel_end *second,
                                       attn_channel **channel);
void __wrap_attn_channel_break(attn_channel *channel, const char *why);
void __wrap_attn_channel_destroy(attn_channel *channel);
attn_status __wrap_attn_channel_send(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                     int64_t timeout_ns);
attn_status __wrap_attn_channel_receive(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                        int64_t timeout_ns);

bool __wrap_attn_backend_kind_has_channels(const char *kind) {
    (void)kind;
    return true;
}

attn_channel_end __wrap_attn_channel_end_of(attn_backend *backend) { return (attn_channel_end){.backend = backend}; }

attn_status __wrap_attn_channel_create(const attn_channel_end *first, const attn_channel_end *second,
                                       attn_channel **channel) {
    assert_ptr_not_equal(first->backend, second->backend);
    if (atomic_load(&creation_fails)) return attn_error(ATTN_UNAVAILABLE, "no channel today");
    atomic_fetch_add(&created, 1);
    *channel = calloc(1, sizeof **channel);
    return attn_ok();
}

void __wrap_attn_channel_break(attn_channel *channel, const char *why) {
    (void)why;
    pthread_mutex_lock(&lock);
    channel->broken = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void __wrap_attn_channel_destroy(attn_channel *channel) {
    if (channel == NULL) return;
    atomic_fetch_sub(&created, 1);
    free(channel);
}

/* With the lock held: until *happened, or in vain. */
static attn_status wait_for(attn_channel *channel, const bool *happened, int64_t timeout_ns) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_ns / 1000000000 + 1;
    while (!*happened && !channel->broken) {
        if (pthread_cond_timedwait(&changed, &lock, &until) != 0) channel->broken = true;
    }
    return *happened ? attn_ok() : attn_error(ATTN_UNAVAILABLE, "the channel is broken");
}

attn_status __wrap_attn_channel_send(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                     int64_t timeout_ns) {
    if (atomic_load(&sending_fails)) return attn_error(ATTN_UNAVAILABLE, "it broke");
    pthread_mutex_lock(&lock);
    channel->from = own;
    channel->pages = pages;
    channel->count = count;
    channel->offered = true;
    pthread_cond_broadcast(&changed);
    attn_status status = wait_for(channel, &channel->taken, timeout_ns);
    pthread_mutex_unlock(&lock);
    return status;
}

static void copy_layer(attn_channel *channel, attn_backend *to, const uint32_t *pages, uint32_t layer) {
    const attn_geometry *geometry = attn_backend_geometry(to);
    uint32_t tokens = channel->count * geometry->page_size;
    char *keys = malloc(tokens * attn_key_row_bytes(geometry)),
         *values = malloc(tokens * attn_value_row_bytes(geometry));
    attn_status status =
        attn_backend_export(channel->from, layer, channel->pages, channel->count, 0, tokens, keys, values);
    assert_int_equal(ATTN_OK, status.code);
    status = attn_backend_append(to, layer, pages, channel->count, 0, tokens, keys, values);
    assert_int_equal(ATTN_OK, status.code);
    free(keys);
    free(values);
}

attn_status __wrap_attn_channel_receive(attn_channel *channel, attn_backend *own, const uint32_t *pages, uint32_t count,
                                        int64_t timeout_ns) {
    pthread_mutex_lock(&lock);
    attn_status status = wait_for(channel, &channel->offered, timeout_ns);
    if (!attn_failed(status)) {
        assert_int_equal(channel->count, count);
        for (uint32_t layer = 0; layer < attn_backend_geometry(own)->layers; layer++)
            copy_layer(channel, own, pages, layer);
        atomic_fetch_add(&received, 1);
        channel->taken = true;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* ------------------------------------------------------------------------------------------- */

/* Moves that the engine has told of, by the way they went. */
static atomic_uint told_direct, told_by_host;

static void count_told(void *context, const dp_move_record *record) {
    (void)context;
    atomic_fetch_add(record->direct ? &told_direct : &told_by_host, 1);
}

typedef struct {
    dp_engine *engine;
    uint64_t handle; /* of TOKENS tokens, on rank 0 */
    char outputs[OUT_BYTES];
} home;

static home make_home(uint64_t direct_move_bytes, int64_t stall_ns) {
    dp_config config = small_config();
    config.ranks = 3;
    config.backend = "cpu";
    config.rank_stall_ns = stall_ns;
    config.direct_move_bytes = direct_move_bytes;
    config.moved = count_told;
    home made = {.engine = create_engine(&config)};
    made.handle = open_sequence(made.engine, DP_EXPLICIT, 0);
    fill(made.engine, made.handle, TOKENS, 1);
    read_outputs(made.engine, made.handle, made.outputs);
    atomic_store(&received, 0);
    atomic_store(&told_direct, 0);
    atomic_store(&told_by_host, 0);
    atomic_store(&creation_fails, false);
    atomic_store(&sending_fails, false);
    return made;
}

static void assert_at(const home *home, uint32_t rank) {
    char outputs[OUT_BYTES];
    dp_sequence_info info = describe(home->engine, home->handle);
    assert_int_equal(rank, info.rank);
    assert_int_equal(TOKENS, info.length);
    assert_false(info.busy);
    read_outputs(home->engine, home->handle, outputs);
    assert_memory_equal(home->outputs, outputs, OUT_BYTES);
}

/* No channel is left, nor any page. */
static void leave(home *home) {
    close_sequence(home->engine, home->handle);
    destroy_engine(home->engine);
    assert_int_equal(0, atomic_load(&created));
}

static void a_sequence_goes_over_the_channel_and_is_what_it_was(void **state) {
    (void)state;
    home home = make_home(1, 0);
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t rank = (i + 1) % 3;
        assert_ok(try_move(home.engine, home.handle, rank));
        assert_int_equal(i + 1, atomic_load(&received));
        assert_at(&home, rank);
    }
    size_t row = home.engine->key_row_bytes + home.engine->value_row_bytes;
    dp_engine_counts counts;
    dp_engine_count(home.engine, &counts);
    assert_int_equal(4 * TOKENS * 3 * row, counts.moved_bytes);
    assert_int_equal(4, counts.moves_direct);
    assert_int_equal(4, atomic_load(&told_direct));
    assert_int_equal(0, atomic_load(&told_by_host));
    leave(&home);
}

static void small_sequences_and_spreading_go_through_the_host(void **state) {
    (void)state;
    home home = make_home(UINT64_C(1) << 30, 0);
    assert_ok(try_move(home.engine, home.handle, 1));
    assert_int_equal(0, atomic_load(&received));
    assert_at(&home, 1);
    leave(&home);
    home = make_home(0, 0);
    assert_ok(try_move(home.engine, home.handle, 2));
    assert_int_equal(0, atomic_load(&received));
    leave(&home);
    home = make_home(1, 0);
    waiting_move spreading;
    assert_ok(start_spread(home.engine, &spreading, home.handle));
    assert_ok(wait_for_move(&spreading));
    assert_int_equal(0, atomic_load(&received));
    leave(&home);
}

static void a_channel_that_cannot_be_is_done_without(void **state) {
    (void)state;
    home home = make_home(1, 0);
    atomic_store(&creation_fails, true);
    assert_ok(try_move(home.engine, home.handle, 1));
    assert_int_equal(0, atomic_load(&received));
    assert_at(&home, 1);
    leave(&home);
}

static void a_channel_that_breaks_is_done_without(void **state) {
    (void)state;
    home home = make_home(1, 0);
    atomic_store(&sending_fails, true);
    assert_ok(try_move(home.engine, home.handle, 2));
    assert_int_equal(0, atomic_load(&received));
    assert_at(&home, 2);
    atomic_store(&sending_fails, false);
    assert_ok(try_move(home.engine, home.handle, 0));
    assert_int_equal(1, atomic_load(&received));
    assert_int_equal(1, atomic_load(&told_by_host));
    assert_int_equal(1, atomic_load(&told_direct));
    leave(&home);
}

/* One goes over the channel, the other does not wait for it. */
static void moves_in_opposite_directions_both_end(void **state) {
    (void)state;
    home home = make_home(1, 0);
    uint64_t other = open_sequence(home.engine, DP_EXPLICIT, 1);
    fill(home.engine, other, TOKENS, 2);
    for (uint32_t i = 0; i < 20; i++) {
        waiting_move there, back;
        assert_ok(start_move(home.engine, &there, home.handle, (i + 1) % 2, 0));
        assert_ok(start_move(home.engine, &back, other, i % 2, 0));
        assert_ok(wait_for_move(&there));
        assert_ok(wait_for_move(&back));
        assert_at(&home, (i + 1) % 2);
    }
    assert_true(atomic_load(&received) >= 20);
    close_sequence(home.engine, other);
    leave(&home);
}

static void move_with_a_rank_that_hangs(uint32_t hanging) {
    home home = make_home(1, STALL_NS);
    dp_engine_stall_rank(home.engine, hanging);
    int64_t start = attn_now_ns();
    assert_code(ATTN_UNAVAILABLE, try_move(home.engine, home.handle, 1));
    assert_true(attn_now_ns() - start < STALL_NS + 2000 * MS);
    wait_for_state(home.engine, hanging, DP_RANK_LOST);
    if (hanging == 1) assert_at(&home, 0);
    dp_engine_release_rank(home.engine, hanging);
    restart_rank(home.engine, hanging);
    if (hanging == 1) {
        assert_ok(try_move(home.engine, home.handle, 1));
        assert_at(&home, 1);
    }
    leave(&home);
}

static void a_target_that_hangs_ends_the_move(void **state) {
    (void)state;
    move_with_a_rank_that_hangs(1);
}

static void a_source_that_hangs_ends_the_move(void **state) {
    (void)state;
    move_with_a_rank_that_hangs(0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_sequence_goes_over_the_channel_and_is_what_it_was),
        cmocka_unit_test(small_sequences_and_spreading_go_through_the_host),
        cmocka_unit_test(a_channel_that_cannot_be_is_done_without),
        cmocka_unit_test(a_channel_that_breaks_is_done_without),
        cmocka_unit_test(moves_in_opposite_directions_both_end),
        cmocka_unit_test(a_target_that_hangs_ends_the_move),
        cmocka_unit_test(a_source_that_hangs_ends_the_move),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
