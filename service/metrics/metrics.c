#define _POSIX_C_SOURCE 200809L

#include "service/metrics/metrics.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <microhttpd.h>

#define CODES             17 /* gRPC's status codes, 0 .. 16 */
#define CACHE_LINE        64
#define HTTP_CONNECTIONS  32
#define HTTP_IDLE_SECONDS 30
#define NS_PER_SECOND     1000000000.0

/* Upper bounds of the latency buckets. A last one without a bound follows. */
static const int64_t bucket_bounds_ns[] = {
    10000,    25000,    50000,    100000,    250000,    500000,    1000000,    2500000,    5000000,
    10000000, 25000000, 50000000, 100000000, 250000000, 500000000, 1000000000, 2500000000, 10000000000,
};

#define BUCKETS (sizeof(bucket_bounds_ns) / sizeof(bucket_bounds_ns[0]))

typedef struct {
    _Atomic uint64_t counts[BUCKETS + 1]; /* each bucket's own, not cumulative */
    _Atomic uint64_t sum_ns;
} histogram;

typedef struct {
    _Alignas(CACHE_LINE) _Atomic int64_t in_flight;
    _Atomic uint64_t received_bytes;
    _Atomic uint64_t sent_bytes;
    _Atomic uint64_t codes[CODES];
    histogram latency;
    histogram layer;
} method_counters;

struct attn_metrics {
    method_counters methods[ATTN_METHOD_COUNT];
    attn_metrics_source source;
    struct MHD_Daemon *http; /* NULL unless listening */
    double start_time;       /* seconds since 1970 */
};

static const char *const method_names[ATTN_METHOD_COUNT] = {
    [ATTN_METHOD_GET_SERVER_INFO] = "GetServerInfo",
    [ATTN_METHOD_OPEN_SEQUENCES] = "OpenSequences",
    [ATTN_METHOD_FORK_SEQUENCE] = "ForkSequence",
    [ATTN_METHOD_TRUNCATE_SEQUENCE] = "TruncateSequence",
    [ATTN_METHOD_CLOSE_SEQUENCES] = "CloseSequences",
    [ATTN_METHOD_DESCRIBE_SEQUENCES] = "DescribeSequences",
    [ATTN_METHOD_MOVE_SEQUENCE] = "MoveSequence",
    [ATTN_METHOD_APPEND_KV] = "AppendKv",
    [ATTN_METHOD_EXPORT_KV] = "ExportKv",
    [ATTN_METHOD_DECODE] = "Decode",
    [ATTN_METHOD_DECODE_STREAM] = "DecodeStream",
    [ATTN_METHOD_RESTART_RANK] = "RestartRank",
    [ATTN_METHOD_OTHER] = "other",
};

const char *attn_method_name(attn_method method) { return method_names[method]; }

/* ------------------------------------------------------------------------------------------- */
/* Counting */

static void add(_Atomic uint64_t *counter, uint64_t amount) {
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

static uint64_t value_of(_Atomic uint64_t *counter) { return atomic_load_explicit(counter, memory_order_relaxed); }

static void observe(histogram *observed, int64_t latency_ns) {
    size_t bucket = 0;
    if (latency_ns < 0) latency_ns = 0;
    while (bucket < BUCKETS && latency_ns > bucket_bounds_ns[bucket]) {
        bucket++;
    }
    add(&observed->counts[bucket], 1);
    add(&observed->sum_ns, (uint64_t)latency_ns);
}

void attn_metrics_call_started(attn_metrics *metrics, attn_method method) {
    atomic_fetch_add_explicit(&metrics->methods[method].in_flight, 1, memory_order_relaxed);
}

void attn_metrics_call_finished(attn_metrics *metrics, attn_method method, attn_code code, int64_t latency_ns) {
    method_counters *counters = &metrics->methods[method];
    assert((unsigned)code < CODES);
    atomic_fetch_sub_explicit(&counters->in_flight, 1, memory_order_relaxed);
    add(&counters->codes[code], 1);
    observe(&counters->latency, latency_ns);
}

void attn_metrics_layer(attn_metrics *metrics, attn_method method, int64_t latency_ns) {
    observe(&metrics->methods[method].layer, latency_ns);
}

void attn_metrics_received(attn_metrics *metrics, attn_method method, uint64_t bytes) {
    add(&metrics->methods[method].received_bytes, bytes);
}

void attn_metrics_sent(attn_metrics *metrics, attn_method method, uint64_t bytes) {
    add(&metrics->methods[method].sent_bytes, bytes);
}

/* ------------------------------------------------------------------------------------------- */
/* Text */

static void write_family(FILE *text, const char *name, const char *type, const char *help) {
    fprintf(text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* A label's value: backslash, quote and newline are escaped. */
static void write_label(FILE *text, const char *name, const char *value) {
    fprintf(text, "%s=\"", name);
    for (; *value != '\0'; value++) {
        switch (*value) {
        case '\\': fputs("\\\\", text); break;
        case '"': fputs("\\\"", text); break;
        case '\n': fputs("\\n", text); break;
        default: fputc(*value, text);
        }
    }
    fputc('"', text);
}

static void write_build_info(FILE *text, const attn_metrics *metrics) {
    write_family(text, "attnd_build_info", "gauge", "Constant 1; what is running.");
    fputs("attnd_build_info{", text);
    write_label(text, "version", metrics->source.version);
    fputc(',', text);
    write_label(text, "backend", metrics->source.backend);
    fputc(',', text);
    write_label(text, "instance_id", metrics->source.instance);
    fputs("} 1\n", text);
    write_family(text, "process_start_time_seconds", "gauge", "When the server started, in seconds since 1970.");
    fprintf(text, "process_start_time_seconds %.3f\n", metrics->start_time);
    write_family(text, "attnd_serving", "gauge", "1 while new calls are accepted, 0 while draining.");
    fprintf(text, "attnd_serving %d\n", metrics->source.serving(metrics->source.context));
}

static void write_totals(FILE *text, const attn_metrics *metrics) {
    attn_metrics_totals totals = {0};
    metrics->source.totals(metrics->source.context, &totals);
    write_family(text, "attnd_sequences", "gauge", "Sequences open now.");
    fprintf(text, "attnd_sequences %" PRIu64 "\n", totals.sequences);
    write_family(text, "attnd_steps_open", "gauge", "Steps open now.");
    fprintf(text, "attnd_steps_open %" PRIu64 "\n", totals.steps);
    write_family(text, "attnd_steps_committed_total", "counter", "Steps whose sequences have grown.");
    fprintf(text, "attnd_steps_committed_total %" PRIu64 "\n", totals.steps_committed);
    write_family(text, "attnd_steps_aborted_total", "counter", "Steps that ended before their last layer.");
    fprintf(text, "attnd_steps_aborted_total %" PRIu64 "\n", totals.steps_aborted);
    write_family(text, "attnd_moves_total", "counter", "Sequences moved to another rank, or spread.");
    fprintf(text, "attnd_moves_total %" PRIu64 "\n", totals.moves);
    write_family(text, "attnd_moves_failed_total", "counter", "Moves that left their sequence where it was.");
    fprintf(text, "attnd_moves_failed_total %" PRIu64 "\n", totals.moves_failed);
    write_family(text, "attnd_moved_tokens_total", "counter", "Tokens of the sequences moved.");
    fprintf(text, "attnd_moved_tokens_total %" PRIu64 "\n", totals.moved_tokens);
    write_family(text, "attnd_moved_bytes_total", "counter", "Key and value bytes copied between ranks by moves.");
    fprintf(text, "attnd_moved_bytes_total %" PRIu64 "\n", totals.moved_bytes);
    write_family(text, "attnd_moves_direct_total", "counter", "Moves whose pages went from device to device.");
    fprintf(text, "attnd_moves_direct_total %" PRIu64 "\n", totals.moves_direct);
}

/* One series a rank: where in attn_metrics_rank its value is. */
typedef struct {
    const char *name;
    const char *type;
    const char *help;
    size_t offset;
} rank_family;

static const rank_family rank_families[] = {
    {"attnd_rank_state", "gauge", "1: serving, 2: lost, 3: restarting.", offsetof(attn_metrics_rank, state)},
    {"attnd_rank_sequences", "gauge", "Sequences and parts of spread ones on the rank.",
     offsetof(attn_metrics_rank, sequences)},
    {"attnd_rank_tokens", "gauge", "KV cache tokens held, shared pages counted for every sequence.",
     offsetof(attn_metrics_rank, tokens)},
    {"attnd_rank_tokens_in_flight", "gauge", "KV cache tokens of steps under way.",
     offsetof(attn_metrics_rank, tokens_in_flight)},
    {"attnd_rank_pages", "gauge", "Pages of the rank's pool.", offsetof(attn_metrics_rank, pages_total)},
    {"attnd_rank_pages_free", "gauge", "Pages free.", offsetof(attn_metrics_rank, pages_free)},
    {"attnd_rank_queue_depth", "gauge", "Calls waiting for the rank.", offsetof(attn_metrics_rank, queue_depth)},
    {"attnd_rank_calls_total", "counter", "Layer calls run.", offsetof(attn_metrics_rank, calls)},
    {"attnd_rank_launches_total", "counter", "Backend launches: fewer than calls where calls were merged.",
     offsetof(attn_metrics_rank, launches)},
    {"attnd_plan_rejected_total", "counter", "Plans that did not fit their batch and were not used.",
     offsetof(attn_metrics_rank, plans_rejected)},
    {"attnd_rank_prefix_tokens_shared_total", "counter",
     "Tokens, counted for every layer, that need not be read since forks of a prompt are decoded together.",
     offsetof(attn_metrics_rank, prefix_tokens_shared)},
    {"attnd_rank_lost_total", "counter", "Times the rank was lost.", offsetof(attn_metrics_rank, losses)},
    {"attnd_rank_stalls_total", "counter", "Times it was lost because it had work and did not move.",
     offsetof(attn_metrics_rank, stalls)},
    {"attnd_rank_restarts_total", "counter", "Times it served again with a new backend.",
     offsetof(attn_metrics_rank, restarts)},
};

static void write_degraded(FILE *text, const attn_metrics_rank *values, uint32_t ranks) {
    bool degraded = false;
    for (uint32_t rank = 0; rank < ranks; rank++) {
        degraded |= !values[rank].serving;
    }
    write_family(text, "attnd_degraded", "gauge", "1 while a rank does not serve.");
    fprintf(text, "attnd_degraded %d\n", degraded);
}

static void write_ranks(FILE *text, const attn_metrics *metrics, const attn_metrics_rank *values) {
    uint32_t ranks = metrics->source.ranks;
    write_degraded(text, values, ranks);
    write_family(text, "attnd_rank_up", "gauge", "1 while the rank serves, 0 while it is lost.");
    for (uint32_t rank = 0; rank < ranks; rank++) {
        fprintf(text, "attnd_rank_up{rank=\"%u\"} %d\n", rank, values[rank].serving);
    }
    for (size_t i = 0; i < sizeof(rank_families) / sizeof(rank_families[0]); i++) {
        const rank_family *family = &rank_families[i];
        write_family(text, family->name, family->type, family->help);
        for (uint32_t rank = 0; rank < ranks; rank++) {
            uint64_t value;
            memcpy(&value, (const char *)&values[rank] + family->offset, sizeof(value));
            fprintf(text, "%s{rank=\"%u\"} %" PRIu64 "\n", family->name, rank, value);
        }
    }
    write_family(text, "attnd_rank_busy_seconds_total", "counter", "Time in which the backend was at work.");
    for (uint32_t rank = 0; rank < ranks; rank++) {
        fprintf(text, "attnd_rank_busy_seconds_total{rank=\"%u\"} %.9f\n", rank,
                (double)values[rank].busy_ns / NS_PER_SECOND);
    }
    write_family(text, "attnd_rank_tensor_bytes_total", "counter",
                 "Request tensor bytes: read where they had arrived, or gathered by a copy.");
    for (uint32_t rank = 0; rank < ranks; rank++) {
        fprintf(text, "attnd_rank_tensor_bytes_total{rank=\"%u\",place=\"in_place\"} %" PRIu64 "\n", rank,
                values[rank].bytes_in_place);
        fprintf(text, "attnd_rank_tensor_bytes_total{rank=\"%u\",place=\"gathered\"} %" PRIu64 "\n", rank,
                values[rank].bytes_gathered);
    }
}

static void write_rpc_codes(FILE *text, attn_metrics *metrics) {
    write_family(text, "attnd_calls_total", "counter", "Calls ended, by method and gRPC status code.");
    for (int method = 0; method < ATTN_METHOD_COUNT; method++) {
        for (int code = 0; code < CODES; code++) {
            uint64_t calls = value_of(&metrics->methods[method].codes[code]);
            if (calls == 0 && code != ATTN_OK) continue;
            fprintf(text, "attnd_calls_total{method=\"%s\",code=\"%s\"} %" PRIu64 "\n", method_names[method],
                    attn_code_name((attn_code)code), calls);
        }
    }
}

static void write_histogram(FILE *text, const char *name, const char *method, histogram *observed) {
    uint64_t cumulative = 0;
    for (size_t bucket = 0; bucket < BUCKETS; bucket++) {
        cumulative += value_of(&observed->counts[bucket]);
        fprintf(text, "%s_bucket{method=\"%s\",le=\"%g\"} %" PRIu64 "\n", name, method,
                (double)bucket_bounds_ns[bucket] / NS_PER_SECOND, cumulative);
    }
    cumulative += value_of(&observed->counts[BUCKETS]);
    fprintf(text, "%s_bucket{method=\"%s\",le=\"+Inf\"} %" PRIu64 "\n", name, method, cumulative);
    fprintf(text, "%s_sum{method=\"%s\"} %.9f\n", name, method, (double)value_of(&observed->sum_ns) / NS_PER_SECOND);
    fprintf(text, "%s_count{method=\"%s\"} %" PRIu64 "\n", name, method, cumulative);
}

static void write_rpcs(FILE *text, attn_metrics *metrics) {
    write_rpc_codes(text, metrics);
    write_family(text, "attnd_calls_in_flight", "gauge", "Calls under way.");
    for (int method = 0; method < ATTN_METHOD_COUNT; method++) {
        fprintf(text, "attnd_calls_in_flight{method=\"%s\"} %" PRId64 "\n", method_names[method],
                atomic_load_explicit(&metrics->methods[method].in_flight, memory_order_relaxed));
    }
    write_family(text, "attnd_received_bytes_total", "counter", "Bytes of request messages.");
    for (int method = 0; method < ATTN_METHOD_COUNT; method++) {
        fprintf(text, "attnd_received_bytes_total{method=\"%s\"} %" PRIu64 "\n", method_names[method],
                value_of(&metrics->methods[method].received_bytes));
    }
    write_family(text, "attnd_sent_bytes_total", "counter", "Bytes of response messages.");
    for (int method = 0; method < ATTN_METHOD_COUNT; method++) {
        fprintf(text, "attnd_sent_bytes_total{method=\"%s\"} %" PRIu64 "\n", method_names[method],
                value_of(&metrics->methods[method].sent_bytes));
    }
    write_family(text, "attnd_call_seconds", "histogram", "Duration of calls; of a stream, of the whole of it.");
    for (int method = 0; method < ATTN_METHOD_COUNT; method++) {
        write_histogram(text, "attnd_call_seconds", method_names[method], &metrics->methods[method].latency);
    }
    write_family(text, "attnd_layer_seconds", "histogram", "From a layer's message to its answer.");
    for (int method = ATTN_METHOD_DECODE; method <= ATTN_METHOD_DECODE_STREAM; method++) {
        write_histogram(text, "attnd_layer_seconds", method_names[method], &metrics->methods[method].layer);
    }
}

char *attn_metrics_render(attn_metrics *metrics, size_t *size) {
    char *page = NULL;
    bool complete = false;
    uint32_t ranks = metrics->source.ranks;
    attn_metrics_rank *values = calloc(ranks > 0 ? ranks : 1, sizeof(*values));
    FILE *text = open_memstream(&page, size);
    if (values == NULL || text == NULL) goto cleanup;
    for (uint32_t rank = 0; rank < ranks; rank++) {
        metrics->source.rank(metrics->source.context, rank, &values[rank]);
    }
    write_build_info(text, metrics);
    write_totals(text, metrics);
    write_ranks(text, metrics, values);
    write_rpcs(text, metrics);
    complete = !ferror(text);
cleanup:
    if (text != NULL && fclose(text) != 0) complete = false;
    if (!complete) {
        free(page);
        page = NULL;
    }
    free(values);
    return page;
}

/* ------------------------------------------------------------------------------------------- */
/* HTTP */

/* `body` is a literal (MHD_RESPMEM_PERSISTENT) or freed by the response (MHD_RESPMEM_MUST_FREE). */
static enum MHD_Result answer(struct MHD_Connection *connection, unsigned status, const char *type, const char *body,
                              size_t size, enum MHD_ResponseMemoryMode mode) {
    struct MHD_Response *response = MHD_create_response_from_buffer(size, (void *)(uintptr_t)body, mode);
    if (response == NULL) {
        if (mode == MHD_RESPMEM_MUST_FREE) free((void *)(uintptr_t)body);
        return MHD_NO;
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    if (status == MHD_HTTP_METHOD_NOT_ALLOWED) MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
    enum MHD_Result result = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result answer_line(struct MHD_Connection *connection, unsigned status, const char *line) {
    return answer(connection, status, "text/plain; charset=utf-8", line, strlen(line), MHD_RESPMEM_PERSISTENT);
}

static enum MHD_Result handle(void *context, struct MHD_Connection *connection, const char *path, const char *method,
                              const char *version, const char *upload, size_t *upload_size, void **request) {
    attn_metrics *metrics = context;
    (void)version;
    (void)upload;
    (void)upload_size;
    (void)request;
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0) {
        return answer_line(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "GET and HEAD only\n");
    }
    if (strcmp(path, "/healthz") == 0) return answer_line(connection, MHD_HTTP_OK, "alive\n");
    if (strcmp(path, "/readyz") == 0) {
        bool serving = metrics->source.serving(metrics->source.context);
        return serving ? answer_line(connection, MHD_HTTP_OK, "serving\n")
                       : answer_line(connection, MHD_HTTP_SERVICE_UNAVAILABLE, "not serving\n");
    }
    if (strcmp(path, "/metrics") == 0) {
        size_t size;
        char *page = attn_metrics_render(metrics, &size);
        if (page == NULL) return answer_line(connection, MHD_HTTP_INTERNAL_SERVER_ERROR, "no memory\n");
        return answer(connection, MHD_HTTP_OK, "text/plain; version=0.0.4; charset=utf-8", page, size,
                      MHD_RESPMEM_MUST_FREE);
    }
    return answer_line(connection, MHD_HTTP_NOT_FOUND, "here are /metrics, /healthz and /readyz\n");
}

/* A numeric IPv4 or IPv6 address with a port; false if it is neither. */
static bool parse_address(const char *address, uint16_t port, struct sockaddr_storage *storage) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    memset(storage, 0, sizeof(*storage));
    if (inet_pton(AF_INET, address, &v4.sin_addr) == 1) {
        memcpy(storage, &v4, sizeof(v4));
        return true;
    }
    if (inet_pton(AF_INET6, address, &v6.sin6_addr) == 1) {
        memcpy(storage, &v6, sizeof(v6));
        return true;
    }
    return false;
}

attn_status attn_metrics_listen(attn_metrics *metrics, const char *address, uint16_t port, uint16_t *bound_port) {
    struct sockaddr_storage storage;
    if (!parse_address(address, port, &storage)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "metrics.address: '%s' is not a numeric IPv4 or IPv6 address",
                          address);
    }
    unsigned flags = MHD_USE_AUTO | MHD_USE_INTERNAL_POLLING_THREAD;
    if (storage.ss_family == AF_INET6) flags |= MHD_USE_IPv6;
    metrics->http = MHD_start_daemon(flags, port, NULL, NULL, handle, metrics, MHD_OPTION_SOCK_ADDR,
                                     (struct sockaddr *)&storage, MHD_OPTION_CONNECTION_LIMIT, HTTP_CONNECTIONS,
                                     MHD_OPTION_CONNECTION_TIMEOUT, HTTP_IDLE_SECONDS, MHD_OPTION_END);
    if (metrics->http == NULL) {
        return attn_error(ATTN_UNAVAILABLE, "metrics.port: cannot listen on %s port %u: %s", address, port,
                          strerror(errno));
    }
    *bound_port = MHD_get_daemon_info(metrics->http, MHD_DAEMON_INFO_BIND_PORT)->port;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */

attn_status attn_metrics_create(const attn_metrics_source *source, attn_metrics **metrics) {
    attn_metrics *created = aligned_alloc(CACHE_LINE, sizeof(*created));
    struct timespec now;
    if (created == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the metrics");
    memset(created, 0, sizeof(*created));
    clock_gettime(CLOCK_REALTIME, &now);
    created->source = *source;
    created->start_time = (double)now.tv_sec + (double)now.tv_nsec / NS_PER_SECOND;
    *metrics = created;
    return attn_ok();
}

void attn_metrics_destroy(attn_metrics *metrics) {
    if (metrics == NULL) return;
    if (metrics->http != NULL) MHD_stop_daemon(metrics->http);
    free(metrics);
}
