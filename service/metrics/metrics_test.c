#define _POSIX_C_SOURCE 200809L

#include "service/metrics/metrics.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

/* ------------------------------------------------------------------------------------------- */
/* A source with made-up values */

static bool serving;

static void fake_rank(void *context, uint32_t rank, attn_metrics_rank *values) {
    (void)context;
    *values = (attn_metrics_rank){
        .serving = rank != 1,
        .state = rank + 1,
        .sequences = 10 + rank,
        .tokens = 20 + rank,
        .tokens_in_flight = 30 + rank,
        .pages_total = 40 + rank,
        .pages_free = 50 + rank,
        .queue_depth = 60 + rank,
        .calls = 70 + rank,
        .launches = 80 + rank,
        .plans_rejected = 90 + rank,
        .prefix_tokens_shared = 150 + rank,
        .losses = 120 + rank,
        .stalls = 130 + rank,
        .restarts = 140 + rank,
        .busy_ns = 1500000000,
        .bytes_in_place = 5000000000 + rank,
        .bytes_gathered = 110 + rank,
    };
}

static void fake_totals(void *context, attn_metrics_totals *values) {
    (void)context;
    *values = (attn_metrics_totals){.sequences = 1,
                                    .steps = 2,
                                    .steps_committed = 3,
                                    .steps_aborted = 4,
                                    .moves = 5,
                                    .moves_failed = 6,
                                    .moved_tokens = 7,
                                    .moved_bytes = 8,
                                    .moves_direct = 9};
}

static bool fake_serving(void *context) {
    (void)context;
    return serving;
}

static const attn_metrics_source source = {
    .ranks = 2,
    .rank = fake_rank,
    .totals = fake_totals,
    .serving = fake_serving,
    .version = "1.2\"3\\4\n5",
    .backend = "cpu",
    .instance = "cafe",
};

static int create(void **state) {
    attn_metrics *metrics;
    serving = true;
    if (attn_failed(attn_metrics_create(&source, &metrics))) return 1;
    *state = metrics;
    return 0;
}

static int destroy(void **state) {
    attn_metrics_destroy(*state);
    return 0;
}

/* ------------------------------------------------------------------------------------------- */

/* Whether the page has this very line. */
static bool has_line(const char *page, const char *line) {
    size_t length = strlen(line);
    for (const char *at = strstr(page, line); at != NULL; at = strstr(at + 1, line)) {
        if ((at == page || at[-1] == '\n') && at[length] == '\n') return true;
    }
    return false;
}

static void assert_lines(attn_metrics *metrics, const char *const *lines, size_t count) {
    size_t size;
    char *page = attn_metrics_render(metrics, &size);
    assert_non_null(page);
    assert_int_equal(strlen(page), size);
    for (size_t i = 0; i < count; i++) {
        if (!has_line(page, lines[i])) fail_msg("no line '%s' in:\n%s", lines[i], page);
    }
    free(page);
}

#define LINES(lines) lines, sizeof(lines) / sizeof((lines)[0])

static void ranks_and_totals_come_from_the_source(void **state) {
    static const char *const lines[] = {
        "attnd_rank_up{rank=\"0\"} 1",
        "attnd_rank_up{rank=\"1\"} 0",
        "attnd_degraded 1",
        "attnd_rank_state{rank=\"0\"} 1",
        "attnd_rank_state{rank=\"1\"} 2",
        "attnd_rank_lost_total{rank=\"1\"} 121",
        "attnd_rank_stalls_total{rank=\"1\"} 131",
        "attnd_rank_restarts_total{rank=\"1\"} 141",
        "attnd_rank_sequences{rank=\"1\"} 11",
        "attnd_rank_tokens{rank=\"1\"} 21",
        "attnd_rank_tokens_in_flight{rank=\"1\"} 31",
        "attnd_rank_pages{rank=\"1\"} 41",
        "attnd_rank_pages_free{rank=\"1\"} 51",
        "attnd_rank_queue_depth{rank=\"1\"} 61",
        "attnd_rank_calls_total{rank=\"1\"} 71",
        "attnd_rank_launches_total{rank=\"1\"} 81",
        "attnd_plan_rejected_total{rank=\"1\"} 91",
        "attnd_rank_prefix_tokens_shared_total{rank=\"1\"} 151",
        "attnd_rank_busy_seconds_total{rank=\"0\"} 1.500000000",
        "attnd_rank_tensor_bytes_total{rank=\"1\",place=\"in_place\"} 5000000001",
        "attnd_rank_tensor_bytes_total{rank=\"0\",place=\"gathered\"} 110",
        "attnd_sequences 1",
        "attnd_steps_open 2",
        "attnd_steps_committed_total 3",
        "attnd_steps_aborted_total 4",
        "attnd_moves_total 5",
        "attnd_moves_failed_total 6",
        "attnd_moved_tokens_total 7",
        "attnd_moved_bytes_total 8",
        "attnd_moves_direct_total 9",
        "attnd_serving 1",
        "attnd_build_info{version=\"1.2\\\"3\\\\4\\n5\",backend=\"cpu\",instance_id=\"cafe\"} 1",
    };
    assert_lines(*state, LINES(lines));
}

static void calls_are_counted_by_method_and_code(void **state) {
    static const char *const lines[] = {
        "attnd_calls_total{method=\"Decode\",code=\"OK\"} 2",
        "attnd_calls_total{method=\"Decode\",code=\"NOT_FOUND\"} 1",
        "attnd_calls_total{method=\"AppendKv\",code=\"OK\"} 0",
        "attnd_calls_in_flight{method=\"Decode\"} 1",
        "attnd_calls_in_flight{method=\"AppendKv\"} 0",
        "attnd_received_bytes_total{method=\"Decode\"} 300",
        "attnd_sent_bytes_total{method=\"Decode\"} 7",
    };
    for (int i = 0; i < 4; i++) {
        attn_metrics_call_started(*state, ATTN_METHOD_DECODE);
    }
    attn_metrics_call_finished(*state, ATTN_METHOD_DECODE, ATTN_OK, 1000);
    attn_metrics_call_finished(*state, ATTN_METHOD_DECODE, ATTN_OK, 1000);
    attn_metrics_call_finished(*state, ATTN_METHOD_DECODE, ATTN_NOT_FOUND, 1000);
    attn_metrics_received(*state, ATTN_METHOD_DECODE, 100);
    attn_metrics_received(*state, ATTN_METHOD_DECODE, 200);
    attn_metrics_sent(*state, ATTN_METHOD_DECODE, 7);
    assert_lines(*state, LINES(lines));
}

static void a_latency_falls_into_the_first_bucket_that_holds_it(void **state) {
    static const char *const lines[] = {
        "attnd_call_seconds_bucket{method=\"Decode\",le=\"1e-05\"} 2", /* -1 ns and 10 us exactly */
        "attnd_call_seconds_bucket{method=\"Decode\",le=\"2.5e-05\"} 3",
        "attnd_call_seconds_bucket{method=\"Decode\",le=\"2.5\"} 3",
        "attnd_call_seconds_bucket{method=\"Decode\",le=\"10\"} 3",
        "attnd_call_seconds_bucket{method=\"Decode\",le=\"+Inf\"} 4",
        "attnd_call_seconds_sum{method=\"Decode\"} 11.000020001",
        "attnd_call_seconds_count{method=\"Decode\"} 4",
        "attnd_layer_seconds_bucket{method=\"DecodeStream\",le=\"0.00025\"} 1",
        "attnd_layer_seconds_bucket{method=\"DecodeStream\",le=\"0.0001\"} 0",
    };
    attn_metrics_call_finished(*state, ATTN_METHOD_DECODE, ATTN_OK, -1);
    attn_metrics_call_finished(*state, ATTN_METHOD_DECODE, ATTN_OK, 10000);
    attn_metrics_call_finished(*state, ATTN_METHOD_DECODE, ATTN_OK, 10001);
    attn_metrics_call_finished(*state, ATTN_METHOD_DECODE, ATTN_OK, 11000000000);
    attn_metrics_layer(*state, ATTN_METHOD_DECODE_STREAM, 100001);
    assert_lines(*state, LINES(lines));
}

static void every_family_is_declared_once_and_before_its_samples(void **state) {
    size_t size;
    char *page = attn_metrics_render(*state, &size);
    char family[128] = "";
    for (char *line = page, *end; *line != '\0'; line = end + 1) {
        end = strchr(line, '\n');
        assert_non_null(end);
        if (strncmp(line, "# TYPE ", 7) == 0) {
            char declaration[160];
            assert_int_equal(sscanf(line, "# TYPE %127s", family), 1);
            snprintf(declaration, sizeof(declaration), "\n# TYPE %s ", family);
            char *first = strstr(page, declaration);
            assert_non_null(first);
            assert_null(strstr(first + 1, declaration));
        } else if (line[0] != '#') {
            assert_true(strncmp(line, family, strlen(family)) == 0);
        }
    }
    free(page);
}

#define COUNTERS         4
#define CALLS_PER_THREAD 20000

static void *count_calls(void *metrics) {
    for (int i = 0; i < CALLS_PER_THREAD; i++) {
        attn_metrics_call_started(metrics, ATTN_METHOD_DECODE);
        attn_metrics_received(metrics, ATTN_METHOD_DECODE, 3);
        attn_metrics_call_finished(metrics, ATTN_METHOD_DECODE, ATTN_OK, i);
    }
    return NULL;
}

static void counts_of_several_threads_and_a_scraper_add_up(void **state) {
    static const char *const lines[] = {
        "attnd_calls_total{method=\"Decode\",code=\"OK\"} 80000",
        "attnd_calls_in_flight{method=\"Decode\"} 0",
        "attnd_received_bytes_total{method=\"Decode\"} 240000",
        "attnd_call_seconds_count{method=\"Decode\"} 80000",
    };
    pthread_t threads[COUNTERS];
    for (int i = 0; i < COUNTERS; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, count_calls, *state), 0);
    }
    for (int i = 0; i < 20; i++) {
        size_t size;
        free(attn_metrics_render(*state, &size));
    }
    for (int i = 0; i < COUNTERS; i++) {
        pthread_join(threads[i], NULL);
    }
    assert_lines(*state, LINES(lines));
}

/* ------------------------------------------------------------------------------------------- */
/* HTTP */

/* Sends a request line and reads until the server closes. The answer is this function's own buffer. */
static const char *http(uint16_t port, const char *request_line) {
    static char reply[1 << 17];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    char request[256];
    size_t used = 0;
    ssize_t received;
    int connection = socket(AF_INET, SOCK_STREAM, 0);
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    assert_int_equal(connect(connection, (struct sockaddr *)&address, sizeof(address)), 0);
    int length =
        snprintf(request, sizeof(request), "%s HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n", request_line);
    assert_int_equal(send(connection, request, (size_t)length, 0), length);
    while ((received = recv(connection, reply + used, sizeof(reply) - 1 - used, 0)) > 0) {
        used += (size_t)received;
    }
    reply[used] = '\0';
    close(connection);
    return reply;
}

static void assert_reply(uint16_t port, const char *request_line, const char *status, const char *contains) {
    const char *reply = http(port, request_line);
    char start[64];
    snprintf(start, sizeof(start), "HTTP/1.1 %s ", status);
    if (strncmp(reply, start, strlen(start)) != 0) fail_msg("%s: %s", request_line, reply);
    if (strstr(reply, contains) == NULL) fail_msg("%s: no '%s' in %s", request_line, contains, reply);
}

static void http_serves_metrics_liveness_and_readiness(void **state) {
    uint16_t port = 0;
    assert_int_equal(attn_metrics_listen(*state, "127.0.0.1", 0, &port).code, ATTN_OK);
    assert_int_not_equal(port, 0);
    assert_reply(port, "GET /metrics", "200", "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n");
    assert_reply(port, "GET /metrics", "200", "\nattnd_serving 1\n");
    assert_reply(port, "GET /healthz", "200", "alive\n");
    assert_reply(port, "GET /readyz", "200", "serving\n");
    serving = false;
    assert_reply(port, "GET /readyz", "503", "not serving\n");
    assert_reply(port, "GET /healthz", "200", "alive\n");
    assert_reply(port, "GET /metrics", "200", "\nattnd_serving 0\n");
}

static void other_paths_and_methods_are_refused(void **state) {
    uint16_t port = 0;
    assert_int_equal(attn_metrics_listen(*state, "127.0.0.1", 0, &port).code, ATTN_OK);
    assert_reply(port, "GET /", "404", "/metrics");
    assert_reply(port, "GET /metrics/../../etc/passwd", "404", "/metrics");
    assert_reply(port, "DELETE /metrics", "405", "Allow: GET, HEAD");
    assert_reply(port, "HEAD /metrics", "200", "Content-Length: ");
}

static void a_bad_or_taken_address_is_refused(void **state) {
    attn_metrics *second;
    uint16_t port = 0, other = 0;
    assert_int_equal(attn_metrics_listen(*state, "localhost", 0, &port).code, ATTN_INVALID_ARGUMENT);
    assert_int_equal(attn_metrics_listen(*state, "127.0.0.1", 0, &port).code, ATTN_OK);
    assert_int_equal(attn_metrics_create(&source, &second).code, ATTN_OK);
    assert_int_equal(attn_metrics_listen(second, "127.0.0.1", port, &other).code, ATTN_UNAVAILABLE);
    attn_metrics_destroy(second);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(ranks_and_totals_come_from_the_source, create, destroy),
        cmocka_unit_test_setup_teardown(calls_are_counted_by_method_and_code, create, destroy),
        cmocka_unit_test_setup_teardown(a_latency_falls_into_the_first_bucket_that_holds_it, create, destroy),
        cmocka_unit_test_setup_teardown(every_family_is_declared_once_and_before_its_samples, create, destroy),
        cmocka_unit_test_setup_teardown(counts_of_several_threads_and_a_scraper_add_up, create, destroy),
        cmocka_unit_test_setup_teardown(http_serves_metrics_liveness_and_readiness, create, destroy),
        cmocka_unit_test_setup_teardown(other_paths_and_methods_are_refused, create, destroy),
        cmocka_unit_test_setup_teardown(a_bad_or_taken_address_is_refused, create, destroy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
