/* What happens to isolated backends, and to their processes: see kernels/isolated.h. Decodes as such are tested by
 * kernels/tests with ATTND_TEST_ISOLATED. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/attention.h"
#include "kernels/faults.h"
#include "kernels/isolated.h"
#include "kernels/pipeline.h"

enum { HEADS_Q = 4, HEADS_KV = 2, DIM = 64, PAGE = 16, PAGES = 64, LARGE = 512 };

static const attn_geometry geometry = {.layers = 1,
                                       .heads_q = HEADS_Q,
                                       .heads_kv = HEADS_KV,
                                       .head_dim = DIM,
                                       .head_dim_v = DIM,
                                       .dtype = ATTN_FP32,
                                       .page_size = PAGE};

static attn_backend_config isolated_config(void) {
    return (attn_backend_config){.kind = "reference", .geometry = geometry, .pages = PAGES, .isolated = true};
}

static attn_backend *open_backend(void) {
    attn_backend_config config = isolated_config();
    attn_backend *backend = NULL;
    attn_status status = attn_backend_create(&config, &backend);
    assert_string_equal("", status.message);
    return backend;
}

static pid_t process_of(const attn_backend *backend) { return (pid_t)attn_backend_process(backend); }

static bool is_alive(pid_t process) { return kill(process, 0) == 0; }

static void sleep_ms(long ms) { nanosleep(&(struct timespec){.tv_nsec = ms * 1000000}, NULL); }

static void assert_ends(pid_t process) {
    for (int i = 0; i < 1000 && is_alive(process); i++)
        sleep_ms(10);
    assert_false(is_alive(process));
}

/* `size` sequences of one query row that read all the pool's tokens. */
typedef struct {
    attn_batch batch;
    uint32_t lengths[LARGE], query_lengths[LARGE], page_offsets[LARGE + 1], pages[LARGE * PAGES];
    const void *queries[LARGE];
    void *outs[LARGE];
    float query[HEADS_Q * DIM], out[LARGE][HEADS_Q * DIM];
} read_batch;

static read_batch reads;
static float rows[PAGES * PAGE * HEADS_KV * DIM];

static const attn_batch *reads_of(uint32_t size) {
    for (uint32_t i = 0; i < size; i++) {
        reads.lengths[i] = PAGES * PAGE - i;
        reads.query_lengths[i] = 1;
        reads.page_offsets[i + 1] = (i + 1) * PAGES;
        for (uint32_t p = 0; p < PAGES; p++)
            reads.pages[i * PAGES + p] = p;
        reads.queries[i] = reads.query;
        reads.outs[i] = reads.out[i];
    }
    for (size_t i = 0; i < sizeof reads.query / sizeof *reads.query; i++)
        reads.query[i] = (float)(i % 7) - 3;
    memset(reads.out, 0xff, sizeof reads.out);
    reads.batch = (attn_batch){.size = size,
                               .lengths = reads.lengths,
                               .query_lengths = reads.query_lengths,
                               .page_offsets = reads.page_offsets,
                               .pages = reads.pages,
                               .queries = reads.queries,
                               .outs = reads.outs,
                               .scale = 0.125f};
    return &reads.batch;
}

static attn_status append_all(attn_backend *backend) {
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        rows[i] = (float)(i * 2654435761u >> 16 & 0xff) / 128 - 1;
    reads_of(1);
    return attn_backend_append(backend, 0, reads.pages, PAGES, 0, PAGES * PAGE, rows, rows);
}

static void assert_serves(attn_backend *backend) {
    assert_int_equal(ATTN_OK, append_all(backend).code);
    assert_int_equal(ATTN_OK, attn_backend_decode(backend, reads_of(1), NULL, NULL).code);
}

static void assert_says(attn_status status, const char *what) {
    assert_int_equal(ATTN_UNAVAILABLE, status.code);
    assert_non_null(strstr(status.message, what));
}

/* ------------------------------------------------------------------------------------------- */

static void outputs_are_those_of_the_same_backend_here(void **state) {
    (void)state;
    static float expected[LARGE][HEADS_Q * DIM];
    attn_backend_config config = isolated_config();
    config.isolated = false;
    attn_backend *here = NULL, *there = open_backend();
    assert_int_equal(ATTN_OK, attn_backend_create(&config, &here).code);
    assert_int_equal(ATTN_OK, append_all(here).code);
    assert_int_equal(ATTN_OK, append_all(there).code);
    for (uint32_t size = 1; size <= LARGE; size *= 8) { /* what both have mapped grows */
        assert_int_equal(ATTN_OK, attn_backend_decode(here, reads_of(size), NULL, NULL).code);
        memcpy(expected, reads.out, sizeof expected);
        assert_int_equal(ATTN_OK, attn_backend_decode(there, reads_of(size), NULL, NULL).code);
        assert_memory_equal(expected, reads.out, sizeof expected);
    }
    attn_backend_destroy(here);
    attn_backend_destroy(there);
}

static void every_call_after_the_end_of_the_process_says_how_it_ended(void **state) {
    (void)state;
    attn_backend *backend = open_backend();
    assert_serves(backend);
    assert_int_equal(0, kill(process_of(backend), SIGSEGV));
    attn_status status = attn_backend_decode(backend, reads_of(1), NULL, NULL);
    assert_says(status, "of this backend ");
    assert_says(append_all(backend), "of this backend ");
    assert_says(attn_backend_export(backend, 0, reads.pages, PAGES, 0, 1, rows, rows), "of this backend ");
    for (int i = 0; i < 100; i++) /* more than wait for answers */
        assert_int_equal(ATTN_OK, attn_backend_copy_page(backend, 0, 1).code);
    attn_backend_destroy(backend);
    backend = open_backend();
    assert_serves(backend);
    attn_backend_destroy(backend);
}

static void the_signal_that_ended_it_is_named(void **state) {
    (void)state;
    attn_backend *backend = open_backend();
    assert_int_equal(0, kill(process_of(backend), SIGKILL));
    assert_says(attn_backend_decode(backend, reads_of(1), NULL, NULL), "was ended by signal 9 (KILL)");
    attn_backend_destroy(backend);
}

static void a_decode_s_outcome_outlives_whatever_comes_behind_it(void **state) {
    (void)state;
    attn_backend *backend = open_backend();
    assert_serves(backend);
    attn_backend_break(backend);
    assert_int_equal(ATTN_OK, attn_backend_start(backend, reads_of(1), NULL).code);
    for (int i = 0; i < 100; i++)
        assert_int_equal(ATTN_OK, attn_backend_copy_page(backend, 0, 1).code);
    assert_says(attn_backend_finish(backend, NULL), "the device is broken");
    attn_backend_destroy(backend);
}

static void *give_up_soon(void *backend) {
    sleep_ms(50);
    attn_backend_give_up(backend);
    return NULL;
}

static void who_gives_up_a_hanging_process_ends_the_call_that_it_is_in(void **state) {
    (void)state;
    attn_backend *backend = open_backend();
    pid_t process = process_of(backend);
    pthread_t other;
    assert_serves(backend);
    assert_int_equal(0, kill(process, SIGSTOP));
    assert_int_equal(0, pthread_create(&other, NULL, give_up_soon, backend));
    assert_int_equal(ATTN_OK, attn_backend_start(backend, reads_of(1), NULL).code);
    assert_says(attn_backend_finish(backend, NULL), "was ended by signal 9 (KILL)");
    assert_true(attn_backend_has_ended(backend));
    pthread_join(other, NULL);
    attn_backend_destroy(backend);
    assert_false(is_alive(process));
}

static void a_backend_is_destroyed_with_its_process(void **state) {
    (void)state;
    attn_backend *backend = open_backend();
    pid_t process = process_of(backend);
    assert_true(is_alive(process));
    attn_backend_destroy(backend);
    assert_false(is_alive(process));
}

static void a_process_that_hangs_does_not_hold_up_the_destruction(void **state) {
    (void)state;
    attn_backend *backend = open_backend();
    pid_t process = process_of(backend);
    assert_int_equal(0, kill(process, SIGSTOP));
    attn_backend_destroy(backend);
    assert_false(is_alive(process));
}

static void one_that_breaks_leaves_the_others_alone(void **state) {
    (void)state;
    attn_backend *first = open_backend(), *second = open_backend();
    assert_serves(first);
    assert_serves(second);
    attn_backend_break(first);
    assert_says(attn_backend_decode(first, reads_of(1), NULL, NULL), "the device is broken");
    assert_serves(second);
    assert_int_equal(0, kill(process_of(first), SIGKILL));
    assert_serves(second);
    attn_backend_destroy(first);
    assert_serves(second);
    attn_backend_destroy(second);
}

static void errors_of_creation_come_through(void **state) {
    (void)state;
    attn_backend *backend = NULL;
    attn_backend_config config = isolated_config();
    config.kind = "cpu";
    config.isa = "vax";
    attn_status status = attn_backend_create(&config, &backend);
    assert_int_equal(ATTN_INVALID_ARGUMENT, status.code);
    assert_non_null(strstr(status.message, "vax"));
    assert_null(backend);
}

static void signals_that_a_terminal_sends_to_all_do_not_end_it(void **state) {
    (void)state;
    attn_backend *backend = open_backend();
    assert_serves(backend); /* it has come so far as to ignore them */
    assert_int_equal(0, kill(process_of(backend), SIGINT));
    assert_int_equal(0, kill(process_of(backend), SIGTERM));
    assert_serves(backend);
    attn_backend_destroy(backend);
}

/* The parent: opens a backend, tells its process and waits to be killed. */
static int be_a_parent(void) {
    attn_backend_config config = isolated_config();
    attn_backend *backend = NULL;
    if (attn_failed(attn_backend_create(&config, &backend))) return EXIT_FAILURE;
    printf("%u\n", attn_backend_process(backend));
    fflush(stdout);
    for (;;)
        pause();
}

static void it_ends_with_its_parent_whatever_ends_that(void **state) {
    (void)state;
    char told[200] = "";
    FILE *parent = popen("exec /proc/$PPID/exe parent & echo $!; wait", "r");
    assert_non_null(parent);
    assert_non_null(fgets(told, sizeof told, parent));
    pid_t killed = (pid_t)strtol(told, NULL, 10);
    assert_non_null(fgets(told, sizeof told, parent));
    pid_t process = (pid_t)strtol(told, NULL, 10);
    assert_true(is_alive(process));
    assert_int_equal(0, kill(killed, SIGKILL));
    assert_ends(process);
    pclose(parent);
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    if (argc == 2 && strcmp(argv[1], "parent") == 0) return be_a_parent();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(outputs_are_those_of_the_same_backend_here),
        cmocka_unit_test(every_call_after_the_end_of_the_process_says_how_it_ended),
        cmocka_unit_test(the_signal_that_ended_it_is_named),
        cmocka_unit_test(a_decode_s_outcome_outlives_whatever_comes_behind_it),
        cmocka_unit_test(who_gives_up_a_hanging_process_ends_the_call_that_it_is_in),
        cmocka_unit_test(a_backend_is_destroyed_with_its_process),
        cmocka_unit_test(a_process_that_hangs_does_not_hold_up_the_destruction),
        cmocka_unit_test(one_that_breaks_leaves_the_others_alone),
        cmocka_unit_test(errors_of_creation_come_through),
        cmocka_unit_test(signals_that_a_terminal_sends_to_all_do_not_end_it),
        cmocka_unit_test(it_ends_with_its_parent_whatever_ends_that),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
