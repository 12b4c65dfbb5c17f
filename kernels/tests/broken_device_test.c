/*
 * A device that breaks: every call of its backends ends, and once all of them are gone another backend there is as good
 * as the first. Isolated backends leave each other alone. With cuda it breaks in earnest (ATTND_TEST_BACKEND=cuda): no
 * driver that we know of gives CUDA back to the process in which it was, so that a test ends there and those after it
 * are skipped, but for isolated ones.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/attention.h"
#include "kernels/faults.h"
#include "kernels/isolated.h"

enum { PAGES = 8, PAGE_SIZE = 16, TOKENS = 100, HEADS_Q = 8, HEADS_KV = 2, DIM = 64 };

typedef struct {
    const char *kind;
    attn_dtype dtype; /* cuda: with bf16 the fast kernels, with fp32 those for any geometry */
    bool isolated;
} subject;

/* The isolated ones first: a process in which CUDA has failed can be a parent still, but why ask for more than that. */
static const subject subjects[] = {
    {"cpu", ATTN_BF16, true},  {"cuda", ATTN_BF16, true}, {"cuda", ATTN_FP32, true},  {"reference", ATTN_FP32, false},
    {"cpu", ATTN_FP32, false}, {"cpu", ATTN_BF16, false}, {"cuda", ATTN_BF16, false}, {"cuda", ATTN_FP32, false}};

static const uint32_t table[PAGES] = {3, 1, 4, 0, 5, 2, 6, 7};

/* Rows with bits of their own that are small numbers in both dtypes. */
static uint32_t rows[(TOKENS + 1) * HEADS_KV * DIM];

static attn_status try_open(const subject *subject, uint32_t device, attn_backend **backend) {
    attn_backend_config config = {.kind = subject->kind,
                                  .geometry = {.layers = 1,
                                               .heads_q = HEADS_Q,
                                               .heads_kv = HEADS_KV,
                                               .head_dim = DIM,
                                               .head_dim_v = DIM,
                                               .dtype = subject->dtype,
                                               .page_size = PAGE_SIZE},
                                  .pages = PAGES,
                                  .workers = 1,
                                  .device = device,
                                  .isolated = subject->isolated};
    return attn_backend_create(&config, backend);
}

static attn_status append(attn_backend *backend) {
    return attn_backend_append(backend, 0, table, PAGES, 0, TOKENS, rows, rows);
}

/* A decode of the appended tokens; its outputs are `out`. */
static attn_status decode(attn_backend *backend, float out[HEADS_Q * DIM]) {
    const uint32_t length = TOKENS, queries = 1, offsets[] = {0, PAGES};
    const void *query = rows, *none = NULL;
    void *to = out;
    float lse[HEADS_Q], *lses = lse;
    const attn_batch batch = {.size = 1,
                              .lengths = &length,
                              .query_lengths = &queries,
                              .page_offsets = offsets,
                              .pages = table,
                              .queries = &query,
                              .new_keys = &none,
                              .new_values = &none,
                              .outs = &to,
                              .lses = &lses,
                              .scale = 0.125f};
    return attn_backend_decode(backend, &batch, NULL, NULL);
}

/* Skips the test where this machine or run has no such backend. */
static attn_backend *open_backend(const subject *subject, uint32_t device) {
    const char *only = getenv("ATTND_TEST_BACKEND");
    attn_backend *backend = NULL;
    if (only != NULL && strcmp(only, subject->kind) != 0) skip();
    attn_status status = try_open(subject, device, &backend);
    if (status.code == ATTN_UNAVAILABLE) {
        print_message("skipped: %s\n", status.message);
        skip();
    }
    assert_string_equal("", status.message);
    return backend;
}

/* Where a device was broken. False: CUDA is gone for this process, and says so. */
static bool opens_again(const subject *subject, attn_backend **backend) {
    attn_status status = try_open(subject, 0, backend);
    if (strcmp(subject->kind, "cuda") == 0 && !subject->isolated && attn_failed(status)) {
        assert_int_equal(ATTN_UNAVAILABLE, status.code);
        assert_non_null(strstr(status.message, "it takes another process"));
        print_message("ends here: %s\n", status.message);
        return false;
    }
    assert_string_equal("", status.message);
    return true;
}

static void assert_good(attn_backend *backend, const float expected[HEADS_Q * DIM]) {
    float out[HEADS_Q * DIM] = {0};
    assert_int_equal(ATTN_OK, append(backend).code);
    attn_status status = decode(backend, out);
    assert_string_equal("", status.message);
    assert_memory_equal(expected, out, sizeof out);
}

static void assert_broken(attn_backend *backend) {
    float out[HEADS_Q * DIM];
    assert_int_equal(ATTN_UNAVAILABLE, decode(backend, out).code);
    assert_int_equal(ATTN_UNAVAILABLE, append(backend).code);
    assert_int_equal(ATTN_UNAVAILABLE,
                     attn_backend_export(backend, 0, table, PAGES, 0, TOKENS, rows, rows + TOKENS).code);
    assert_int_equal(ATTN_UNAVAILABLE, decode(backend, out).code);
}

static void every_call_of_a_broken_device_ends_and_the_next_backend_is_good(void **state) {
    const subject *subject = *state;
    attn_backend *backend = open_backend(subject, 0);
    float expected[HEADS_Q * DIM] = {0};
    assert_int_equal(ATTN_OK, append(backend).code);
    assert_int_equal(ATTN_OK, decode(backend, expected).code);
    for (int i = 0; i < 3; i++) {
        attn_backend_break(backend);
        assert_broken(backend);
        attn_backend_destroy(backend);
        if (!opens_again(subject, &backend)) return;
        assert_good(backend, expected);
    }
    attn_backend_destroy(backend);
}

static void a_backend_that_breaks_before_its_first_call_can_be_destroyed(void **state) {
    const subject *subject = *state;
    attn_backend *backend = open_backend(subject, 0);
    attn_backend_break(backend);
    attn_backend_destroy(backend);
    if (!opens_again(subject, &backend)) return;
    assert_int_equal(ATTN_OK, append(backend).code);
    attn_backend_destroy(backend);
}

static void a_broken_device_is_not_used_again_before_all_have_left_it(void **state) {
    const subject *subject = *state;
    attn_backend *first = open_backend(subject, 0), *second = open_backend(subject, 0), *third = NULL;
    float expected[HEADS_Q * DIM] = {0};
    assert_int_equal(ATTN_OK, append(second).code);
    assert_int_equal(ATTN_OK, decode(second, expected).code);
    attn_backend_break(first);
    assert_broken(first);
    assert_broken(second);
    attn_backend_destroy(first);
    attn_status status = try_open(subject, 0, &third);
    assert_int_equal(ATTN_UNAVAILABLE, status.code);
    assert_non_null(strstr(status.message, "only reset when nobody has anything there: 1 have"));
    assert_null(third);
    assert_broken(second);
    attn_backend_destroy(second);
    if (!opens_again(subject, &third)) return;
    assert_good(third, expected);
    attn_backend_destroy(third);
}

/* On one device if there is only one. */
static void isolated_backends_go_on(void **state) {
    const subject *subject = *state;
    for (uint32_t device = 0; device < 2; device++) {
        attn_backend *broken = open_backend(subject, 0), *other = open_backend(subject, device);
        float expected[HEADS_Q * DIM] = {0};
        assert_int_equal(ATTN_OK, append(other).code);
        assert_int_equal(ATTN_OK, decode(other, expected).code);
        attn_backend_break(broken);
        assert_broken(broken);
        assert_good(other, expected);
        attn_backend_destroy(broken);
        assert_good(other, expected);
        assert_int_equal(ATTN_OK, try_open(subject, 0, &broken).code);
        assert_good(broken, expected);
        attn_backend_destroy(broken);
        assert_good(other, expected);
        attn_backend_destroy(other);
    }
}

#define ON(test, row)                                                                                                  \
    { #test " " #row, test, NULL, NULL, (void *)&subjects[row] }

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        rows[i] = 0x3e803e80u + (uint32_t)(i * 2654435761u >> 20 & 0x3f) * 0x10001u;
    const struct CMUnitTest tests[] = {
        ON(isolated_backends_go_on, 0),
        ON(isolated_backends_go_on, 1),
        ON(isolated_backends_go_on, 2),
        ON(every_call_of_a_broken_device_ends_and_the_next_backend_is_good, 0),
        ON(every_call_of_a_broken_device_ends_and_the_next_backend_is_good, 1),
        ON(every_call_of_a_broken_device_ends_and_the_next_backend_is_good, 2),
        ON(every_call_of_a_broken_device_ends_and_the_next_backend_is_good, 3),
        ON(every_call_of_a_broken_device_ends_and_the_next_backend_is_good, 4),
        ON(every_call_of_a_broken_device_ends_and_the_next_backend_is_good, 5),
        ON(a_backend_that_breaks_before_its_first_call_can_be_destroyed, 2),
        ON(a_backend_that_breaks_before_its_first_call_can_be_destroyed, 4),
        ON(a_broken_device_is_not_used_again_before_all_have_left_it, 6),
        ON(every_call_of_a_broken_device_ends_and_the_next_backend_is_good, 7),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
