/*
 * The server's metrics, served as Prometheus text over HTTP, with the liveness and readiness pages
 * that orchestrators ask for.
 *
 *   GET /metrics   text format 0.0.4
 *   GET /healthz   200 while the process can answer at all
 *   GET /readyz    200 while attn_metrics_source.serving says so, else 503
 *
 * Two kinds of values: what the service counts itself, call by call, in here (relaxed atomics, a cache line
 * per method, no lock, no allocation), and what others know (ranks, sequences, steps), asked for by
 * callback when somebody scrapes. Between scrapes nothing is polled.
 *
 * docs/operations.md lists the series. This module knows nothing of dp: the source's structs are
 * filled by whoever creates it.
 *
 * Any thread may call the counting functions. Create, listen and destroy belong to one thread.
 */
#ifndef ATTND_SERVICE_METRICS_METRICS_H
#define ATTND_SERVICE_METRICS_METRICS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct attn_metrics attn_metrics;

/* The RPCs of the Attention service, and one for all others (health, reflection, unknown). */
typedef enum {
    ATTN_METHOD_GET_SERVER_INFO,
    ATTN_METHOD_OPEN_SEQUENCES,
    ATTN_METHOD_FORK_SEQUENCE,
    ATTN_METHOD_TRUNCATE_SEQUENCE,
    ATTN_METHOD_CLOSE_SEQUENCES,
    ATTN_METHOD_DESCRIBE_SEQUENCES,
    ATTN_METHOD_MOVE_SEQUENCE,
    ATTN_METHOD_APPEND_KV,
    ATTN_METHOD_EXPORT_KV,
    ATTN_METHOD_DECODE,
    ATTN_METHOD_DECODE_STREAM,
    ATTN_METHOD_RESTART_RANK,
    ATTN_METHOD_OTHER,
    ATTN_METHOD_COUNT,
} attn_method;

/* "Decode" and so on. A literal. */
const char *attn_method_name(attn_method method);

/* One rank's values at the time of a scrape. */
typedef struct {
    bool serving;       /* false: lost */
    uint64_t state;     /* a RankState of proto/attnd.proto */
    uint64_t sequences; /* gauges */
    uint64_t tokens;
    uint64_t tokens_in_flight;
    uint64_t pages_total;
    uint64_t pages_free;
    uint64_t queue_depth;
    uint64_t calls; /* counters since start */
    uint64_t launches;
    uint64_t plans_rejected;
    uint64_t prefix_tokens_shared; /* counted for every layer */
    uint64_t losses;
    uint64_t stalls;
    uint64_t restarts;
    int64_t busy_ns;
    uint64_t bytes_in_place; /* tensor bytes the rank read where they had arrived.. */
    uint64_t bytes_gathered; /* ..and those it had to copy together first */
} attn_metrics_rank;

/* The whole server's. */
typedef struct {
    uint64_t sequences;       /* open now */
    uint64_t steps;           /* open now */
    uint64_t steps_committed; /* since start */
    uint64_t steps_aborted;
    uint64_t moves; /* of sequences to other ranks */
    uint64_t moves_failed;
    uint64_t moved_tokens; /* by the moves that succeeded */
    uint64_t moved_bytes;
    uint64_t moves_direct;
} attn_metrics_totals;

/* Where values come from at a scrape. The callbacks run on the HTTP thread and must not block for long. */
typedef struct {
    void *context;
    uint32_t ranks;
    void (*rank)(void *context, uint32_t rank, attn_metrics_rank *values);
    void (*totals)(void *context, attn_metrics_totals *values);
    bool (*serving)(void *context); /* what the health service answers; false also while draining */
    const char *version;            /* these three for attnd_build_info; borrowed */
    const char *backend;
    const char *instance;
} attn_metrics_source;

/* Creates the counters, all 0. `source` is copied; what it points to must live as long. */
attn_status attn_metrics_create(const attn_metrics_source *source, attn_metrics **metrics);

/* Stops the HTTP thread, if any, and frees. NULL is fine. */
void attn_metrics_destroy(attn_metrics *metrics);

/*
 * Starts one HTTP thread on a numeric address; `port` 0 takes any free one. *bound_port is the port
 * it listens on. ATTN_UNAVAILABLE: the address cannot be bound.
 */
attn_status attn_metrics_listen(attn_metrics *metrics, const char *address, uint16_t port, uint16_t *bound_port);

/* A call began: counted as in flight. */
void attn_metrics_call_started(attn_metrics *metrics, attn_method method);

/*
 * A call ended with a status and took so long: in flight no more, counted by method and code, its
 * latency by method. Of a stream the latency is that of the whole call; see attn_metrics_layer.
 */
void attn_metrics_call_finished(attn_metrics *metrics, attn_method method, attn_code code, int64_t latency_ns);

/* One layer of a Decode or DecodeStream was answered so long after its message was there. */
void attn_metrics_layer(attn_metrics *metrics, attn_method method, int64_t latency_ns);

/* Message bytes of a method, as they were on the wire after HTTP/2. */
void attn_metrics_received(attn_metrics *metrics, attn_method method, uint64_t bytes);
void attn_metrics_sent(attn_metrics *metrics, attn_method method, uint64_t bytes);

/* The page /metrics shows now. The caller frees it; NULL if there is no memory. */
char *attn_metrics_render(attn_metrics *metrics, size_t *size);

#endif
