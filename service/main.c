/*
 * attnd: puts the parts together, and takes them apart again.
 *
 *   configuration -> engine (ranks, pools) -> credentials, metrics -> gRPC server -> ready
 *   SIGTERM or SIGINT -> drain -> server down -> engine down -> exit 0
 *
 * Exit status: 0 after a drain, --help and --version; 1 if it cannot serve; 2 if the configuration is
 * wrong. The main thread waits for signals, looks at the ranks several times a second, and once a second has idle steps
 * and sequences reaped.
 */
#include <errno.h>
#include <grpc/grpc.h>
#include <grpc/support/log.h>
#include <inttypes.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/clock.h"
#include "dp/engine.h"
#include "kernels/isolated.h"
#include "service/auth/auth.h"
#include "service/config/config.h"
#include "service/log/log.h"
#include "service/metrics/metrics.h"
#include "service/server.h"

#define EXIT_BAD_CONFIG 2

#define REAP_INTERVAL_NS INT64_C(1000000000)
#define LOOK_INTERVAL_NS INT64_C(200000000)
#define DRAIN_POLL_NS    5000000

typedef struct {
    attn_config config;
    const char *backend;
    char instance[17];
    dp_engine *engine;
    attn_auth *auth;
    attn_metrics *metrics;
    server *server;
    uint16_t metrics_port;
    int64_t reaped_ns;
    uint64_t losses[DP_MAX_RANKS];   /* of ranks, that the log has told of */
    uint64_t restarts[DP_MAX_RANKS]; /* likewise */
    uint64_t failed_restarts[DP_MAX_RANKS];
} daemon_state;

/* The one there is: signal waits and callbacks find it here. Owned by the main thread. */
static daemon_state attnd;

/* ------------------------------------------------------------------------------------------- */
/* The process */

#if defined(__SANITIZE_THREAD__)
/* gRPC's libraries are not instrumented; see handover.h. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "ignore_noninstrumented_modules=1"; }
#endif

/*
 * gRPC receives into slices of up to 64 KiB and frees them call by call. glibc would give that memory
 * back to the kernel and fault it in again for every large message.
 */
static void tune_allocator(void) {
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 16 << 20);
}

/* gRPC's own messages become lines of our log. */
static void log_from_grpc(gpr_log_func_args *message) {
    attn_log_line line;
    attn_log_level level = message->severity == GPR_LOG_SEVERITY_ERROR ? ATTN_LOG_WARN : ATTN_LOG_DEBUG;
    if (!attn_log_begin(&line, level, "grpc", 0)) return;
    attn_log_string(&line, "file", message->file);
    attn_log_i64(&line, "line", message->line);
    attn_log_string(&line, "text", message->message);
    attn_log_end(&line);
}

static sigset_t awaited_signals(void) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGUSR1);
    return signals;
}

/* Threads made from here on never see these signals: the main thread takes them one by one. */
static void block_signals(void) {
    sigset_t signals = awaited_signals();
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* Waits for a signal; 0 after `timeout_ns` without one. *value is what was sent with it. */
static int wait_for_signal(int64_t timeout_ns, int *value) {
    sigset_t signals = awaited_signals();
    struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    siginfo_t info = {0};
    int signal = sigtimedwait(&signals, &info, &timeout);
    *value = info.si_value.sival_int;
    return signal > 0 ? signal : 0;
}

static void log_failure(const char *event, attn_status status) {
    attn_log_line line;
    if (!attn_log_begin(&line, ATTN_LOG_ERROR, event, 0)) return;
    attn_log_status(&line, status);
    attn_log_end(&line);
}

/* Any thread of the engine's. A client that leaves has cancelled its move: no failure. */
static void log_move(void *context, const dp_move_record *record) {
    (void)context;
    attn_log_line line;
    bool failed = attn_failed(record->status);
    attn_log_level level = failed && record->status.code != ATTN_CANCELLED ? ATTN_LOG_WARN : ATTN_LOG_INFO;
    if (!attn_log_begin(&line, level, failed ? "move_failed" : "sequence_moved", 0)) return;
    attn_log_hex(&line, "sequence", record->sequence);
    attn_log_string(&line, "why", record->is_asked_for ? "asked" : record->spread ? "outgrown" : "uneven");
    attn_log_u64(&line, "from", record->from);
    if (record->spread)
        attn_log_bool(&line, "spread", true);
    else
        attn_log_u64(&line, "to", record->to);
    attn_log_u64(&line, "tokens", record->tokens);
    attn_log_u64(&line, "bytes", record->bytes);
    attn_log_string(&line, "path", record->direct ? "direct" : "host");
    attn_log_double(&line, "ms", (double)record->took_ns / 1e6);
    if (failed) attn_log_status(&line, record->status);
    attn_log_end(&line);
}

/* ------------------------------------------------------------------------------------------- */
/* The engine */

/* [tenants] pages and sequences allowed, in one array; NULL if nobody has a quota or there is no memory. */
static uint64_t *tenant_quotas(const attn_config *config) {
    uint64_t *quotas = calloc(2 * (size_t)config->tenant_count + 1, sizeof *quotas);
    for (uint32_t i = 0; quotas != NULL && i < config->tenant_count; i++) {
        quotas[i] = config->tenants[i].max_pages;
        quotas[config->tenant_count + i] = config->tenants[i].max_sequences;
    }
    return quotas;
}

/* With cuda an error of one device costs a process all that it has on any. */
static bool is_isolated(const char *backend) {
    if (strcmp(attnd.config.isolated, "auto") != 0) return strcmp(attnd.config.isolated, "true") == 0;
    return strcmp(backend, "cuda") == 0 && attnd.config.ranks > 1;
}

static attn_status create_engine_on(const char *backend) {
    const attn_config *config = &attnd.config;
    uint64_t *quotas = tenant_quotas(config);
    if (quotas == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the tenants");
    dp_config engine = {
        .geometry = config->geometry,
        .k_scales = config->k_scales,
        .v_scales = config->v_scales,
        .backend = backend,
        .isa = config->isa,
        .ranks = config->ranks,
        .workers_per_rank = config->threads,
        .pin_cpus = config->pin_cpus,
        .isolated = is_isolated(backend),
        .pages_per_rank = config->pages,
        .max_sequences = config->max_sequences,
        .max_batch = config->max_batch,
        .max_sequence_tokens = config->max_sequence_tokens,
        .max_queue = config->max_queue,
        .tenants = attn_auth_tenants(attnd.auth),
        .tenant_max_pages = config->tenant_count > 0 ? quotas : NULL,
        .tenant_max_sequences = config->tenant_count > 0 ? quotas + config->tenant_count : NULL,
        .step_idle_ns = (int64_t)config->step_idle_ms * 1000000,
        .sequence_idle_ns = (int64_t)config->sequence_idle_ms * 1000000,
        .rebalance_factor = config->rebalance_factor,
        .spread_above_tokens = config->spread_above_tokens,
        .direct_move_bytes = config->direct_move_bytes,
        .rank_stall_ns = (int64_t)config->rank_stall_ms * 1000000,
        .rank_restart_ns = (int64_t)config->rank_restart_backoff_ms * 1000000,
        .moved = log_move,
    };
    attn_status status = dp_engine_create(&engine, &attnd.engine);
    free(quotas);
    if (!attn_failed(status)) attnd.backend = backend;
    return status;
}

/* "auto" is cuda where that works, and else cpu; the log says which and why. */
static attn_status create_engine(void) {
    const char *wanted = attnd.config.backend;
    if (strcmp(wanted, "auto") != 0) return create_engine_on(wanted);
    attn_status status = create_engine_on("cuda");
    attn_log_line line;
    if (attn_log_begin(&line, ATTN_LOG_INFO, "backend_chosen", 0)) {
        attn_log_string(&line, "backend", attn_failed(status) ? "cpu" : "cuda");
        if (attn_failed(status)) attn_log_string(&line, "no_cuda", status.message);
        attn_log_end(&line);
    }
    return attn_failed(status) ? create_engine_on("cpu") : status;
}

/* ------------------------------------------------------------------------------------------- */
/* Metrics */

static void rank_metrics(void *context, uint32_t rank, attn_metrics_rank *values) {
    (void)context;
    dp_rank_info info;
    dp_engine_rank_info(attnd.engine, rank, &info);
    *values = (attn_metrics_rank){
        .serving = info.state == DP_RANK_SERVING,
        .state = info.state,
        .sequences = info.sequences,
        .tokens = info.tokens,
        .tokens_in_flight = info.tokens_in_flight,
        .pages_total = info.pages_total,
        .pages_free = info.pages_free,
        .queue_depth = info.queue_depth,
        .calls = info.calls,
        .launches = info.launches,
        .plans_rejected = info.plans_rejected,
        .prefix_tokens_shared = info.prefix_tokens_shared,
        .losses = info.losses,
        .stalls = info.stalls,
        .restarts = info.restarts,
        .busy_ns = info.busy_ns,
        .bytes_in_place = info.bytes_in_place,
        .bytes_gathered = info.bytes_gathered,
    };
}

static void total_metrics(void *context, attn_metrics_totals *values) {
    (void)context;
    dp_engine_counts counts;
    dp_engine_count(attnd.engine, &counts);
    *values = (attn_metrics_totals){
        .sequences = counts.sequences,
        .steps = counts.steps,
        .steps_committed = counts.steps_committed,
        .steps_aborted = counts.steps_aborted,
        .moves = counts.moves,
        .moves_failed = counts.moves_failed,
        .moved_tokens = counts.moved_tokens,
        .moved_bytes = counts.moved_bytes,
        .moves_direct = counts.moves_direct,
    };
}

static bool is_serving(void *context) {
    (void)context;
    return attnd.server != NULL && server_healthy(attnd.server);
}

static attn_status create_metrics(void) {
    attn_metrics_source source = {
        .ranks = dp_engine_ranks(attnd.engine),
        .rank = rank_metrics,
        .totals = total_metrics,
        .serving = is_serving,
        .version = SERVER_VERSION,
        .backend = attnd.backend,
        .instance = attnd.instance,
    };
    return attn_metrics_create(&source, &attnd.metrics);
}

/* ------------------------------------------------------------------------------------------- */
/* Ready */

/* Written under another name first: whoever sees the file sees all of it. */
static attn_status write_ready_file(const char *path) {
    char *temporary = NULL;
    if (asprintf(&temporary, "%s.%ld", path, (long)getpid()) < 0) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a file name");
    }
    attn_status status = attn_ok();
    FILE *file = fopen(temporary, "w");
    if (file != NULL) {
        const char *address;
        for (uint32_t i = 0; (address = server_address(attnd.server, i)) != NULL; i++) {
            fprintf(file, "%s\n", address);
        }
        if (attnd.config.metrics) fprintf(file, "metrics %s:%u\n", attnd.config.metrics_address, attnd.metrics_port);
    }
    if (file == NULL || fclose(file) != 0 || rename(temporary, path) != 0) {
        status = attn_error(ATTN_UNAVAILABLE, "server.ready_file: %s: %s", path, strerror(errno));
    }
    free(temporary);
    return status;
}

/* One line for the log, and one for the person who started us. */
static void say_ready(void) {
    dp_rank_info info;
    dp_engine_rank_info(attnd.engine, 0, &info);
    attn_log_line line;
    if (attn_log_begin(&line, ATTN_LOG_INFO, "ready", 0)) {
        char addresses[1024] = "";
        const char *address;
        for (uint32_t i = 0; (address = server_address(attnd.server, i)) != NULL; i++) {
            size_t used = strlen(addresses);
            snprintf(addresses + used, sizeof addresses - used, "%s%s", i > 0 ? "," : "", address);
        }
        attn_log_string(&line, "addresses", addresses);
        attn_log_string(&line, "version", SERVER_VERSION);
        attn_log_string(&line, "instance", attnd.instance);
        attn_log_string(&line, "backend", attnd.backend);
        attn_log_string(&line, "device", info.device);
        attn_log_bool(&line, "isolated", info.process != 0);
        attn_log_u64(&line, "ranks", dp_engine_ranks(attnd.engine));
        attn_log_u64(&line, "pages_per_rank", info.pages_total);
        if (attnd.config.metrics) attn_log_u64(&line, "metrics_port", attnd.metrics_port);
        attn_log_end(&line);
    }
    const char *first = server_address(attnd.server, 0);
    bool is_unix = strncmp(first, "unix:", 5) == 0;
    printf("attnd %s is ready (%s, ranks: %u). Call it: grpcurl -plaintext %s%s attnd.v1.Attention/GetServerInfo\n",
           SERVER_VERSION, attnd.backend, dp_engine_ranks(attnd.engine), is_unix ? "-unix " : "",
           is_unix ? first + 5 : first);
    fflush(stdout);
}

/* ------------------------------------------------------------------------------------------- */
/* Running */

static void reap_if_due(void) {
    int64_t now = attn_now_ns();
    if (now - attnd.reaped_ns < REAP_INTERVAL_NS) return;
    attnd.reaped_ns = now;
    dp_engine_reap(attnd.engine);
}

static void log_rank(attn_log_level level, const char *event, uint32_t rank, const dp_rank_info *info) {
    attn_log_line line;
    if (!attn_log_begin(&line, level, event, 0)) return;
    attn_log_u64(&line, "rank", rank);
    attn_log_string(&line, "device", info->device);
    attn_log_string(&line, "error", info->last_error);
    attn_log_u64(&line, "losses", info->losses);
    attn_log_u64(&line, "sequences", info->sequences);
    attn_log_end(&line);
}

/* Says which ranks have been lost, could not be restarted, and have come back, since the last look. */
static void log_changes(uint32_t rank, const dp_rank_info *info) {
    if (info->losses > attnd.losses[rank]) log_rank(ATTN_LOG_ERROR, "rank_lost", rank, info);
    if (info->failed_restarts > attnd.failed_restarts[rank]) {
        log_rank(ATTN_LOG_WARN, "rank_restart_failed", rank, info);
    }
    if (info->restarts > attnd.restarts[rank]) log_rank(ATTN_LOG_WARN, "rank_restarted", rank, info);
    attnd.losses[rank] = info->losses;
    attnd.restarts[rank] = info->restarts;
    attnd.failed_restarts[rank] = info->failed_restarts;
}

/* The server is healthy while enough ranks are. */
static void check_ranks(void) {
    uint32_t ranks = dp_engine_ranks(attnd.engine), serving = 0;
    for (uint32_t i = 0; i < ranks; i++) {
        dp_rank_info info;
        dp_engine_rank_info(attnd.engine, i, &info);
        log_changes(i, &info);
        if (info.state == DP_RANK_SERVING) serving++;
    }
    server_set_health(attnd.server, serving >= attnd.config.min_serving_ranks, serving == ranks);
}

/* SIGUSR1 in test builds, if --test-faults is given. */
static void make_fault(int value) {
#ifndef ATTN_RELEASE
    enum { FAIL, STALL, RELEASE, BREAK };
    uint32_t rank = (uint32_t)value % 256;
    if (!attnd.config.test_faults || rank >= dp_engine_ranks(attnd.engine)) return;
    switch (value / 256) {
    case FAIL: dp_engine_fail_rank(attnd.engine, rank); break;
    case STALL: dp_engine_stall_rank(attnd.engine, rank); break;
    case RELEASE: dp_engine_release_rank(attnd.engine, rank); break;
    case BREAK: dp_engine_break_rank(attnd.engine, rank); break;
    }
    attn_log_event(ATTN_LOG_INFO, "fault_made", 0); /* who sent the signal waits for this */
#else
    (void)value;
#endif
}

static void run_until_told_to_stop(void) {
    for (;;) {
        int value;
        int signal = wait_for_signal(LOOK_INTERVAL_NS, &value);
        if (signal == SIGTERM || signal == SIGINT) return;
        if (signal == SIGUSR1) make_fault(value);
        reap_if_due();
        check_ranks();
    }
}

/* While draining; a second signal cuts the grace period short. */
static bool wait_in_drain(void) {
    int value;
    int signal = wait_for_signal(DRAIN_POLL_NS, &value);
    reap_if_due();
    return signal == SIGTERM || signal == SIGINT;
}

static attn_status make_instance(void) {
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) {
        return attn_error(ATTN_INTERNAL, "no random bytes: %s", strerror(errno));
    }
    snprintf(attnd.instance, sizeof attnd.instance, "%016" PRIx64, random);
    return attn_ok();
}

static attn_status start(void) {
    const attn_config *config = &attnd.config;
    ATTN_TRY(make_instance());
    ATTN_TRY(attn_auth_create(config->tenants, config->tenant_count, config->admin_token, &attnd.auth));
    ATTN_TRY(create_engine());
    ATTN_TRY(create_metrics());
    server_parts parts = {
        .config = config,
        .engine = attnd.engine,
        .auth = attnd.auth,
        .metrics = attnd.metrics,
        .backend = attnd.backend,
        .instance = attnd.instance,
    };
    ATTN_TRY(server_create(&parts, &attnd.server));
    ATTN_TRY(server_start(attnd.server));
    if (config->metrics) {
        ATTN_TRY(
            attn_metrics_listen(attnd.metrics, config->metrics_address, config->metrics_port, &attnd.metrics_port));
    }
    return config->ready_file != NULL ? write_ready_file(config->ready_file) : attn_ok();
}

static int serve(void) {
    grpc_init();
    gpr_set_log_function(log_from_grpc);
    attn_status status = start();
    if (attn_failed(status)) {
        log_failure("cannot_serve", status);
    } else {
        say_ready();
        attnd.reaped_ns = attn_now_ns();
        run_until_told_to_stop();
        attn_log_event(ATTN_LOG_INFO, "draining", 0);
        server_drain(attnd.server, attnd.config.grace_ms, wait_in_drain);
        attn_log_event(ATTN_LOG_INFO, "drained", 0);
    }
    /* Calls count in the metrics until the server has stopped, and their HTTP thread asks the server until it is gone.
     */
    server_stop(attnd.server);
    attn_metrics_destroy(attnd.metrics);
    server_destroy(attnd.server);
    dp_engine_destroy(attnd.engine);
    attn_auth_destroy(attnd.auth);
    grpc_shutdown_blocking();
    return attn_failed(status) ? EXIT_FAILURE : EXIT_SUCCESS;
}

static int print_help(void) {
    char *help = attn_config_help();
    if (help == NULL) return EXIT_FAILURE;
    fputs(help, stdout);
    free(help);
    return EXIT_SUCCESS;
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    attn_config_action action;
    attn_status status = attn_config_read(argc, argv, &attnd.config, &action);
    if (attn_failed(status)) {
        fprintf(stderr, "attnd: %s\n", status.message);
        return EXIT_BAD_CONFIG;
    }
    if (action == ATTN_CONFIG_HELP) return print_help();
    if (action == ATTN_CONFIG_VERSION) {
        printf("attnd %s\n", SERVER_VERSION);
        return EXIT_SUCCESS;
    }
    tune_allocator();
    block_signals();
    attn_log_set_level(attnd.config.log_level);
    int exit_status = serve();
    attn_config_fini(&attnd.config);
    return exit_status;
}
