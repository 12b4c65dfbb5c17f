#include "service/server.h"

#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <inttypes.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "service/handover.h"
#include "service/log/log.h"
#include "service/rpcs.h"

/* Streams of one connection; more wait in the client. */
#define MAX_CONCURRENT_STREAMS 1024

#define MAX_METADATA_BYTES (16 << 10)

/* How much a connection may send ahead of being read, beside the message asked for. */
#define STREAM_LOOKAHEAD_BYTES (8 << 20)

/*
 * Memory that gRPC may take, in messages of the largest size, and at least. This version of gRPC looks
 * at a message's size when it has all of it; a client that announces 2 GiB and sends them is stopped
 * here, with RESOURCE_EXHAUSTED.
 */
#define MEMORY_MESSAGES 16
#define MEMORY_AT_LEAST ((size_t)256 << 20)

/* Dead clients are noticed after this. */
#define KEEPALIVE_TIME_MS    60000
#define KEEPALIVE_TIMEOUT_MS 20000

/* While draining, streams are told so again and again; those that stay idle from one time to the next are ended. */
#define NOTICE_INTERVAL_NS INT64_C(250000000)

/* Clients may ping this often. */
#define MIN_PING_INTERVAL_MS 5000

static const rpc rpc_unknown;

static const rpc *const rpc_table[] = {
    &rpc_get_server_info,    &rpc_open_sequences, &rpc_fork_sequence, &rpc_truncate_sequence, &rpc_close_sequences,
    &rpc_describe_sequences, &rpc_move_sequence,  &rpc_append_kv,     &rpc_export_kv,         &rpc_decode,
    &rpc_decode_stream,      &rpc_health_check,   &rpc_health_watch,  &rpc_reflection,        &rpc_reflection_v1alpha,
    &rpc_restart_rank,       &rpc_unknown,
};

#define RPCS          (sizeof rpc_table / sizeof rpc_table[0])
#define RPC_UNKNOWN   (RPCS - 1)
#define RPC_OF(index) rpc_table[index]

struct server_queue {
    grpc_completion_queue *cq;
    pthread_t thread;
    bool running;
};

typedef struct {
    pthread_mutex_t lock; /* guards `first` and the links of the calls on the list */
    call *first;
} free_list;

struct server {
    server_parts parts;
    int64_t started_ns;
    grpc_server *grpc;
    void *registered[RPCS]; /* gRPC's handles of the methods */
    server_queue *queues;   /* [parts.config->cq_threads] */
    char *addresses[ATTN_CONFIG_MAX_LISTEN];
    uint32_t address_count;

    free_list free[RPCS];
    _Atomic uint64_t next_request;
    _Atomic int64_t live; /* calls that a drain waits for */
    _Atomic bool healthy;
    _Atomic bool full;
    _Atomic bool draining;
    _Atomic bool closing; /* no more slots are armed */
    bool stopped;

    pthread_mutex_t listed_lock; /* guards the list of calls that get notices */
    call *listed;
};

/* ------------------------------------------------------------------------------------------- */
/* What is not served */

static void answer_unknown(call *call) {
    char *path = grpc_slice_to_c_string(call->details.method);
    call_finish(call, attn_error(ATTN_UNIMPLEMENTED, "there is no method %s", path), NULL, 0);
    gpr_free(path);
}

static const rpc rpc_unknown = {
    .path = "unknown",
    .method = ATTN_METHOD_OTHER,
    .stream_in = true,
    .open_to_all = true,
    .while_draining = true,
    .slots = 2,
    .start = answer_unknown,
};

/* ------------------------------------------------------------------------------------------- */
/* For calls */

const server_parts *server_get_parts(const server *server) { return &server->parts; }

int64_t server_started_ns(const server *server) { return server->started_ns; }

const rpc *server_rpc(uint32_t index) { return RPC_OF(index); }

grpc_completion_queue *server_queue_cq(const server_queue *queue) { return queue->cq; }

void server_arm(server *server, uint32_t rpc_index, server_queue *queue) {
    if (atomic_load_explicit(&server->closing, memory_order_acquire)) return;
    call *call = call_acquire(server, rpc_index, queue);
    if (call == NULL) {
        attn_log_event(ATTN_LOG_ERROR, "no_memory_for_calls", 0);
        return;
    }
    void *tag = &call->tags[__builtin_ctz(CALL_NEW)];
    handover_give(tag);
    grpc_call_error error;
    if (rpc_index == RPC_UNKNOWN) {
        error = grpc_server_request_call(server->grpc, &call->grpc, &call->details, &call->metadata, queue->cq,
                                         queue->cq, tag);
    } else {
        error = grpc_server_request_registered_call(
            server->grpc, server->registered[rpc_index], &call->grpc, &call->deadline, &call->metadata,
            call->rpc->stream_in ? NULL : &call->payload, queue->cq, queue->cq, tag);
    }
    if (error != GRPC_CALL_OK) server_put_free(server, call);
}

uint64_t server_call_begins(server *server, call *call) {
    if (!call->rpc->background) atomic_fetch_add_explicit(&server->live, 1, memory_order_relaxed);
    return atomic_fetch_add_explicit(&server->next_request, 1, memory_order_relaxed) + 1;
}

void server_call_ends(server *server, call *call) {
    if (!call->rpc->background) atomic_fetch_sub_explicit(&server->live, 1, memory_order_relaxed);
}

call *server_take_free(server *server, uint32_t rpc_index) {
    free_list *list = &server->free[rpc_index];
    pthread_mutex_lock(&list->lock);
    call *call = list->first;
    if (call != NULL) list->first = call->next_free;
    pthread_mutex_unlock(&list->lock);
    return call;
}

void server_put_free(server *server, call *call) {
    free_list *list = &server->free[call->rpc_index];
    pthread_mutex_lock(&list->lock);
    call->next_free = list->first;
    list->first = call;
    pthread_mutex_unlock(&list->lock);
}

/* ------------------------------------------------------------------------------------------- */
/* Notices */

void server_list(server *server, call *call) {
    pthread_mutex_lock(&server->listed_lock);
    call->previous_listed = NULL;
    call->next_listed = server->listed;
    if (server->listed != NULL) server->listed->previous_listed = call;
    server->listed = call;
    pthread_mutex_unlock(&server->listed_lock);
}

void server_unlist(server *server, call *call) {
    pthread_mutex_lock(&server->listed_lock);
    if (call->previous_listed != NULL) {
        call->previous_listed->next_listed = call->next_listed;
    } else if (server->listed == call) {
        server->listed = call->next_listed;
    }
    if (call->next_listed != NULL) call->next_listed->previous_listed = call->previous_listed;
    call->previous_listed = call->next_listed = NULL;
    pthread_mutex_unlock(&server->listed_lock);
}

/* A listed call has CALL_CLOSED still to come, so it lives while the lock is held. */
static void notify_listed(server *server) {
    pthread_mutex_lock(&server->listed_lock);
    for (call *call = server->listed; call != NULL; call = call->next_listed) {
        call_post_notice(call);
    }
    pthread_mutex_unlock(&server->listed_lock);
}

void server_set_health(server *server, bool healthy, bool full) {
    bool was_healthy = atomic_exchange(&server->healthy, healthy);
    bool was_full = atomic_exchange(&server->full, full);
    if (was_healthy != healthy || was_full != full) notify_listed(server);
}

bool server_healthy(const server *server) { return atomic_load(&server->healthy) && !server_draining(server); }

bool server_full(const server *server) { return atomic_load(&server->full) && server_healthy(server); }

bool server_draining(const server *server) { return atomic_load_explicit(&server->draining, memory_order_acquire); }

/* ------------------------------------------------------------------------------------------- */
/* Making and starting */

static grpc_arg integer_argument(const char *key, int64_t value) {
    return (grpc_arg){.type = GRPC_ARG_INTEGER,
                      .key = (char *)(uintptr_t)key,
                      .value.integer = value > INT_MAX ? INT_MAX : (int)value};
}

static grpc_resource_quota *create_quota(const attn_config *config) {
    size_t bytes = MEMORY_MESSAGES * (size_t)config->max_message_bytes;
    grpc_resource_quota *quota = grpc_resource_quota_create("attnd");
    grpc_resource_quota_resize(quota, bytes > MEMORY_AT_LEAST ? bytes : MEMORY_AT_LEAST);
    return quota;
}

static grpc_server *create_grpc_server(const attn_config *config) {
    grpc_resource_quota *quota = create_quota(config);
    grpc_arg arguments[] = {
        {.type = GRPC_ARG_POINTER,
         .key = (char *)(uintptr_t)GRPC_ARG_RESOURCE_QUOTA,
         .value.pointer = {quota, grpc_resource_quota_arg_vtable()}},
        integer_argument(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int64_t)config->max_message_bytes),
        integer_argument(GRPC_ARG_MAX_CONCURRENT_STREAMS, MAX_CONCURRENT_STREAMS),
        integer_argument(GRPC_ARG_MAX_METADATA_SIZE, MAX_METADATA_BYTES),
        integer_argument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, STREAM_LOOKAHEAD_BYTES),
        integer_argument(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_TIME_MS),
        integer_argument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS),
        integer_argument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, MIN_PING_INTERVAL_MS),
        integer_argument(GRPC_ARG_ALLOW_REUSEPORT, 0),
        /* Identity only: tensors do not compress, and a small message must not unpack to a huge one. */
        integer_argument(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1u << GRPC_COMPRESS_NONE),
    };
    grpc_channel_args all = {sizeof arguments / sizeof arguments[0], arguments};
    grpc_server *server = grpc_server_create(&all, NULL);
    grpc_resource_quota_unref(quota);
    return server;
}

attn_status server_create(const server_parts *parts, server **created) {
    uint32_t queues = parts->config->cq_threads;
    server *server = calloc(1, sizeof *server);
    if (server == NULL || (server->queues = calloc(queues, sizeof *server->queues)) == NULL) {
        free(server);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a server");
    }
    server->parts = *parts;
    server->started_ns = attn_now_ns();
    atomic_store(&server->healthy, true);
    atomic_store(&server->full, true);
    pthread_mutex_init(&server->listed_lock, NULL);
    for (size_t i = 0; i < RPCS; i++) {
        pthread_mutex_init(&server->free[i].lock, NULL);
    }
    server->grpc = create_grpc_server(parts->config);
    for (size_t i = 0; i < RPC_UNKNOWN; i++) {
        server->registered[i] = grpc_server_register_method(
            server->grpc, RPC_OF(i)->path, NULL,
            RPC_OF(i)->stream_in ? GRPC_SRM_PAYLOAD_NONE : GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
    }
    for (uint32_t i = 0; i < queues; i++) {
        server->queues[i].cq = grpc_completion_queue_create_for_next(NULL);
        grpc_server_register_completion_queue(server->grpc, server->queues[i].cq, NULL);
    }
    *created = server;
    return attn_ok();
}

/* gRPC removes what it finds at a socket's path: make sure that nobody is listening there. */
static bool unix_socket_in_use(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) return false;
    memcpy(address.sun_path, path, strlen(path) + 1);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0) return false;
    bool in_use = connect(probe, (struct sockaddr *)&address, sizeof address) == 0;
    close(probe);
    return in_use;
}

/* The address with the port that was bound: "127.0.0.1:0" becomes "127.0.0.1:40123". */
static char *bound_address(const char *listen, int port) {
    const char *colon = strrchr(listen, ':');
    if (strncmp(listen, "unix:", 5) == 0 || colon == NULL) return strdup(listen);
    char *address = NULL;
    return asprintf(&address, "%.*s:%d", (int)(colon - listen), listen, port) < 0 ? NULL : address;
}

static attn_status bind_address(server *server, const char *listen) {
    const char *path = strncmp(listen, "unix:", 5) == 0 ? listen + 5 : NULL;
    if (path != NULL && unix_socket_in_use(path)) {
        return attn_error(ATTN_UNAVAILABLE, "server.listen: %s: somebody is listening there", listen);
    }
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    int port = grpc_server_add_http2_port(server->grpc, listen, credentials);
    grpc_server_credentials_release(credentials);
    if (port == 0) {
        return attn_error(ATTN_UNAVAILABLE,
                          "server.listen: %s cannot be bound: in use, or not an address of this machine", listen);
    }
    char *address = bound_address(listen, port);
    if (address == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for an address");
    server->addresses[server->address_count++] = address;
    return attn_ok();
}

static void *queue_main(void *context) {
    server_queue *queue = context;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(queue->cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) return NULL;
        if (event.type == GRPC_OP_COMPLETE) call_tag_completed(event.tag, event.success != 0);
    }
}

attn_status server_start(server *server) {
    const attn_config *config = server->parts.config;
    for (uint32_t i = 0; i < config->listen_count; i++) {
        ATTN_TRY(bind_address(server, config->listen[i]));
    }
    grpc_server_start(server->grpc);
    for (uint32_t i = 0; i < config->cq_threads; i++) {
        server_queue *queue = &server->queues[i];
        for (uint32_t j = 0; j < RPCS; j++) {
            for (uint32_t slot = 0; slot < RPC_OF(j)->slots; slot++) {
                server_arm(server, j, queue);
            }
        }
        if (pthread_create(&queue->thread, NULL, queue_main, queue) != 0) {
            return attn_error(ATTN_RESOURCE_EXHAUSTED, "cannot create a completion queue's thread");
        }
        queue->running = true;
    }
    return attn_ok();
}

const char *server_address(const server *server, uint32_t index) {
    return index < server->address_count ? server->addresses[index] : NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Down */

/* Whether a drain has something to wait for: calls, or open steps of which more layers may come. */
static bool work_left(server *server) {
    if (atomic_load_explicit(&server->live, memory_order_relaxed) > 0) return true;
    dp_engine_counts counts;
    dp_engine_count(server->parts.engine, &counts);
    return counts.steps > 0;
}

/* Ends all connections. New calls are refused by gRPC from here on. */
static void shut_down(server *server) {
    atomic_store_explicit(&server->closing, true, memory_order_release);
    grpc_completion_queue *cq = grpc_completion_queue_create_for_next(NULL);
    grpc_server_shutdown_and_notify(server->grpc, cq, server);
    grpc_server_cancel_all_calls(server->grpc);
    grpc_completion_queue_next(cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_completion_queue_shutdown(cq);
    while (grpc_completion_queue_next(cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type != GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(cq);
}

void server_drain(server *server, uint32_t grace_ms, bool (*wait)(void)) {
    int64_t until = attn_now_ns() + (int64_t)grace_ms * 1000000;
    int64_t notice = 0;
    atomic_store_explicit(&server->draining, true, memory_order_release);
    do {
        int64_t now = attn_now_ns();
        if (now >= until) break;
        if (now >= notice) {
            notify_listed(server);
            notice = now + NOTICE_INTERVAL_NS;
        }
    } while (work_left(server) && !wait());
    shut_down(server);
    /* Cancelled calls may still wait for the engine; their queues serve them until the last is gone. */
    while (atomic_load_explicit(&server->live, memory_order_relaxed) > 0) {
        wait();
    }
}

void server_stop(server *server) {
    if (server == NULL || server->stopped) return;
    server->stopped = true;
    if (!atomic_load(&server->closing)) shut_down(server);
    for (uint32_t i = 0; i < server->parts.config->cq_threads; i++) {
        server_queue *queue = &server->queues[i];
        grpc_completion_queue_shutdown(queue->cq);
        if (queue->running) {
            pthread_join(queue->thread, NULL);
        } else {
            queue_main(queue);
        }
    }
}

void server_destroy(server *server) {
    if (server == NULL) return;
    grpc_server_destroy(server->grpc);
    for (uint32_t i = 0; i < server->parts.config->cq_threads; i++) {
        grpc_completion_queue_destroy(server->queues[i].cq);
    }
    for (uint32_t i = 0; i < RPCS; i++) {
        call *call;
        while ((call = server_take_free(server, i)) != NULL) {
            call_free(call);
        }
        pthread_mutex_destroy(&server->free[i].lock);
    }
    for (uint32_t i = 0; i < server->address_count; i++) {
        free(server->addresses[i]);
    }
    pthread_mutex_destroy(&server->listed_lock);
    free(server->queues);
    free(server);
}
