/*
 * Channels: what arrives is bitwise what was sent, neither side waits longer than it was told to, and a broken channel
 * leaves its backends as they were. Between two CUDA devices (ATTND_TEST_BACKEND=cuda, on a machine with two); on other
 * machines and backends that there is none, and why.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "base/clock.h"
#include "kernels/attention.h"
#include "kernels/channel.h"
#include "kernels/isolated.h"

enum { PAGES = 600, PAGE_SIZE = 64, SENT = 500 };
static const int64_t SECOND = 1000000000;

/* 500 pages are 62.5 MiB a layer: more than a channel sends at once. */
static const attn_geometry geometry = {.layers = 2,
                                       .heads_q = 8,
                                       .heads_kv = 4,
                                       .head_dim = 128,
                                       .head_dim_v = 128,
                                       .dtype = ATTN_BF16,
                                       .page_size = PAGE_SIZE};

static attn_backend *open_backend(const char *kind, uint32_t device) {
    attn_backend_config config = {.kind = kind,
                                  .geometry = geometry,
                                  .pages = PAGES,
                                  .workers = 1,
                                  .device = device,
                                  .isolated = getenv("ATTND_TEST_ISOLATED") != NULL};
    attn_backend *backend = NULL;
    attn_status status = attn_backend_create(&config, &backend);
    if (attn_failed(status)) print_message("no %s backend: %s\n", kind, status.message);
    return backend;
}

static attn_status create_channel(attn_backend *first, attn_backend *second, attn_channel **channel) {
    attn_channel_end ends[2] = {attn_channel_end_of(first), attn_channel_end_of(second)};
    return attn_channel_create(&ends[0], &ends[1], channel);
}

/* Two backends on devices of their own; false: this machine or run has none, and the test is to be skipped. */
static bool open_pair(attn_backend *pair[2]) {
    const char *only = getenv("ATTND_TEST_BACKEND");
    if (only == NULL || strcmp(only, "cuda") != 0) return false;
    pair[0] = open_backend("cuda", 0);
    pair[1] = open_backend("cuda", 1);
    if (pair[0] == NULL || pair[1] == NULL) return false;
    attn_channel *channel = NULL;
    attn_status status = create_channel(pair[0], pair[1], &channel);
    attn_channel_destroy(channel);
    if (attn_failed(status)) print_message("%s\n", status.message);
    return !attn_failed(status);
}

static void close_pair(attn_backend *pair[2]) {
    attn_backend_destroy(pair[0]);
    attn_backend_destroy(pair[1]);
}

static uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Pages in an order of its own. */
static void fill_table(uint32_t *pages, uint32_t first) {
    for (uint32_t i = 0; i < SENT; i++)
        pages[i] = (first + i * 7) % PAGES; /* 7 and 600 have no common divisor */
}

static size_t rows_bytes(void) { return (size_t)SENT * PAGE_SIZE * attn_key_row_bytes(&geometry); }

/* Fills both layers of a table with the rows of a seed, or compares them with those: bitwise. */
static void write_rows(attn_backend *backend, const uint32_t *pages, uint64_t seed) {
    char *rows = malloc(2 * rows_bytes());
    assert_non_null(rows);
    for (uint32_t layer = 0; layer < geometry.layers; layer++) {
        for (size_t i = 0; i < 2 * rows_bytes(); i += 8) {
            uint64_t bits = next_random(&seed) & 0x7fff7f7f7fff7f7fu; /* no NaN */
            memcpy(rows + i, &bits, 8);
        }
        attn_status status =
            attn_backend_append(backend, layer, pages, SENT, 0, SENT * PAGE_SIZE, rows, rows + rows_bytes());
        assert_int_equal(ATTN_OK, status.code);
    }
    free(rows);
}

static void assert_same_rows(attn_backend *first, const uint32_t *first_pages, attn_backend *second,
                             const uint32_t *second_pages) {
    char *rows[2] = {malloc(2 * rows_bytes()), malloc(2 * rows_bytes())};
    for (uint32_t layer = 0; layer < geometry.layers; layer++) {
        for (int i = 0; i < 2; i++) {
            attn_status status = attn_backend_export(i ? second : first, layer, i ? second_pages : first_pages, SENT, 0,
                                                     SENT * PAGE_SIZE, rows[i], rows[i] + rows_bytes());
            assert_int_equal(ATTN_OK, status.code);
        }
        assert_memory_equal(rows[0], rows[1], 2 * rows_bytes());
    }
    free(rows[0]);
    free(rows[1]);
}

/* ------------------------------------------------------------------------------------------- */
/* The two sides, a thread each */

typedef struct {
    attn_channel *channel;
    attn_backend *own;
    const uint32_t *pages;
    uint32_t count;
    bool sends;
    int64_t timeout_ns;
    attn_code code; /* out */
} side;

static void *run_side(void *argument) {
    side *own = argument;
    attn_status status = own->sends
                             ? attn_channel_send(own->channel, own->own, own->pages, own->count, own->timeout_ns)
                             : attn_channel_receive(own->channel, own->own, own->pages, own->count, own->timeout_ns);
    if (attn_failed(status)) print_message("%s: %s\n", own->sends ? "send" : "receive", status.message);
    own->code = status.code;
    return NULL;
}

static void run_both(side *first, side *second) {
    pthread_t thread;
    assert_int_equal(0, pthread_create(&thread, NULL, run_side, second));
    run_side(first);
    pthread_join(thread, NULL);
}

static void send_between(attn_channel *channel, attn_backend *from, const uint32_t *from_pages, attn_backend *to,
                         const uint32_t *to_pages) {
    side sender = {channel, from, from_pages, SENT, true, 20 * SECOND, ATTN_INTERNAL};
    side receiver = {channel, to, to_pages, SENT, false, 20 * SECOND, ATTN_INTERNAL};
    run_both(&sender, &receiver);
    assert_int_equal(ATTN_OK, sender.code);
    assert_int_equal(ATTN_OK, receiver.code);
}

/* ------------------------------------------------------------------------------------------- */

static void pages_arrive_as_they_were_sent_both_ways(void **state) {
    (void)state;
    attn_backend *pair[2] = {NULL, NULL};
    if (!open_pair(pair)) skip();
    uint32_t tables[3][SENT];
    for (uint32_t i = 0; i < 3; i++)
        fill_table(tables[i], 11 * i);
    attn_channel *channel = NULL;
    assert_int_equal(ATTN_OK, create_channel(pair[0], pair[1], &channel).code);
    write_rows(pair[0], tables[0], 1);
    send_between(channel, pair[0], tables[0], pair[1], tables[1]);
    assert_same_rows(pair[0], tables[0], pair[1], tables[1]);
    write_rows(pair[1], tables[1], 2);
    send_between(channel, pair[1], tables[1], pair[0], tables[2]);
    assert_same_rows(pair[1], tables[1], pair[0], tables[2]);
    int64_t start = attn_now_ns();
    for (int i = 0; i < 10; i++)
        send_between(channel, pair[0], tables[2], pair[1], tables[0]);
    print_message("%.0f GB/s\n", 10.0 * SENT * (double)attn_page_bytes(&geometry) / (double)(attn_now_ns() - start));
    attn_channel_destroy(channel);
    close_pair(pair);
}

static void a_side_that_nobody_meets_gives_up_in_time(void **state) {
    (void)state;
    attn_backend *pair[2] = {NULL, NULL};
    if (!open_pair(pair)) skip();
    uint32_t table[SENT], other[SENT];
    fill_table(table, 0);
    fill_table(other, 5);
    for (int sends = 0; sends < 2; sends++) {
        attn_channel *channel = NULL;
        assert_int_equal(ATTN_OK, create_channel(pair[0], pair[1], &channel).code);
        side alone = {channel, pair[0], table, SENT, sends, SECOND / 2, ATTN_OK};
        int64_t start = attn_now_ns();
        run_side(&alone);
        assert_int_equal(ATTN_UNAVAILABLE, alone.code);
        assert_in_range(attn_now_ns() - start, SECOND / 2, 3 * SECOND);
        side late = {channel, pair[1], table, SENT, !sends, 20 * SECOND, ATTN_OK};
        start = attn_now_ns();
        run_side(&late);
        assert_int_equal(ATTN_UNAVAILABLE, late.code);
        assert_in_range(attn_now_ns() - start, 0, SECOND);
        attn_channel_destroy(channel);
    }
    /* The backends are as good as before, and so is another channel. */
    attn_channel *channel = NULL;
    assert_int_equal(ATTN_OK, create_channel(pair[0], pair[1], &channel).code);
    write_rows(pair[0], table, 3);
    send_between(channel, pair[0], table, pair[1], other);
    assert_same_rows(pair[0], table, pair[1], other);
    attn_channel_destroy(channel);
    close_pair(pair);
}

static void *break_soon(void *argument) {
    nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
    attn_channel_break(argument, "nobody will come");
    return NULL;
}

static void a_side_that_waits_in_vain_can_be_told_so(void **state) {
    (void)state;
    attn_backend *pair[2] = {NULL, NULL};
    if (!open_pair(pair)) skip();
    uint32_t table[SENT];
    fill_table(table, 0);
    attn_channel *channel = NULL;
    assert_int_equal(ATTN_OK, create_channel(pair[0], pair[1], &channel).code);
    pthread_t thread;
    assert_int_equal(0, pthread_create(&thread, NULL, break_soon, channel));
    int64_t start = attn_now_ns();
    attn_status status = attn_channel_send(channel, pair[0], table, SENT, 20 * SECOND);
    assert_int_equal(ATTN_UNAVAILABLE, status.code);
    assert_non_null(strstr(status.message, "nobody will come"));
    assert_in_range(attn_now_ns() - start, SECOND / 10, 3 * SECOND);
    pthread_join(thread, NULL);
    attn_channel_destroy(channel);
    close_pair(pair);
}

static void a_connected_side_that_is_left_alone_gives_up_in_time(void **state) {
    (void)state;
    attn_backend *pair[2] = {NULL, NULL};
    if (!open_pair(pair)) skip();
    uint32_t table[SENT];
    fill_table(table, 0);
    attn_channel *channel = NULL;
    assert_int_equal(ATTN_OK, create_channel(pair[0], pair[1], &channel).code);
    send_between(channel, pair[0], table, pair[1], table);
    side alone = {channel, pair[1], table, SENT, false, SECOND / 2, ATTN_OK};
    int64_t start = attn_now_ns();
    run_side(&alone);
    assert_int_equal(ATTN_UNAVAILABLE, alone.code);
    assert_in_range(attn_now_ns() - start, SECOND / 2, 3 * SECOND);
    attn_channel_destroy(channel);
    close_pair(pair);
}

static void pages_outside_the_pool_and_strangers_are_refused(void **state) {
    (void)state;
    attn_backend *pair[2] = {NULL, NULL};
    if (!open_pair(pair)) skip();
    attn_backend *stranger = open_backend("cuda", 0);
    assert_non_null(stranger);
    uint32_t table[SENT];
    fill_table(table, 0);
    attn_channel *channel = NULL;
    assert_int_equal(ATTN_OK, create_channel(pair[0], pair[1], &channel).code);
    assert_int_equal(ATTN_INTERNAL, attn_channel_send(channel, stranger, table, 1, SECOND).code);
    table[3] = PAGES;
    assert_int_equal(ATTN_INTERNAL, attn_channel_send(channel, pair[0], table, 4, SECOND).code);
    assert_int_equal(ATTN_INTERNAL, attn_channel_receive(channel, pair[1], table, 4, SECOND).code);
    assert_int_equal(ATTN_OK, attn_channel_receive(channel, pair[1], table, 0, SECOND).code);
    attn_channel_destroy(channel);
    attn_backend_destroy(stranger);
    close_pair(pair);
}

static void two_ends_on_one_device_have_no_channel(void **state) {
    (void)state;
    attn_backend *pair[2] = {NULL, NULL};
    if (!open_pair(pair)) skip();
    attn_backend *neighbour = open_backend("cuda", 0);
    attn_channel *channel = NULL;
    attn_status status = create_channel(pair[0], neighbour, &channel);
    assert_int_equal(ATTN_UNAVAILABLE, status.code);
    assert_non_null(strstr(status.message, "both ends are on device 0"));
    assert_null(channel);
    attn_backend_destroy(neighbour);
    close_pair(pair);
}

static void backends_of_the_host_have_no_channel(void **state) {
    (void)state;
    static const char *const kinds[] = {"reference", "cpu"};
    for (int k = 0; k < 2; k++) {
        attn_backend *pair[2] = {open_backend(kinds[k], 0), open_backend(kinds[k], 1)};
        attn_channel *channel = NULL;
        attn_status status = create_channel(pair[0], pair[1], &channel);
        assert_int_equal(ATTN_UNAVAILABLE, status.code);
        assert_non_null(strstr(status.message, "have no channels"));
        assert_false(attn_backend_kind_has_channels(kinds[k]));
        assert_null(channel);
        close_pair(pair);
    }
}

static void backends_of_two_kinds_have_no_channel(void **state) {
    (void)state;
    attn_backend *pair[2] = {open_backend("reference", 0), open_backend("cpu", 0)};
    attn_channel *channel = NULL;
    assert_int_equal(ATTN_UNAVAILABLE, create_channel(pair[0], pair[1], &channel).code);
    assert_null(channel);
    attn_channel_destroy(channel);
    close_pair(pair);
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_arrive_as_they_were_sent_both_ways),
        cmocka_unit_test(a_side_that_nobody_meets_gives_up_in_time),
        cmocka_unit_test(a_side_that_waits_in_vain_can_be_told_so),
        cmocka_unit_test(a_connected_side_that_is_left_alone_gives_up_in_time),
        cmocka_unit_test(pages_outside_the_pool_and_strangers_are_refused),
        cmocka_unit_test(two_ends_on_one_device_have_no_channel),
        cmocka_unit_test(backends_of_the_host_have_no_channel),
        cmocka_unit_test(backends_of_two_kinds_have_no_channel),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
