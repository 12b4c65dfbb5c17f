/*
 * The gRPC server: completion queues and their threads, the table of RPCs, listening addresses,
 * health, and the way down.
 *
 * Each queue has one thread and its own armed slots of every RPC. All calls' work runs on these
 * threads or on the engine's (see call.h). Calls are kept on free lists, one for each RPC.
 *
 * Draining (server_drain): health says NOT_SERVING, new work is refused with UNAVAILABLE, steps and
 * uploads that are open may finish, idle streams are ended. When nothing is left, or after the grace
 * period, what remains is cancelled and the server is down.
 *
 * Threads: server_create, _start, _drain, _stop and _destroy belong to one thread; the rest is for any.
 */
#ifndef ATTND_SERVICE_SERVER_H
#define ATTND_SERVICE_SERVER_H

#include <grpc/grpc.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "dp/engine.h"
#include "service/auth/auth.h"
#include "service/call.h"
#include "service/config/config.h"
#include "service/metrics/metrics.h"

#define SERVER_VERSION "0.1.0"

/* What a server is made of. Borrowed; all of it outlives the server. */
typedef struct {
    const attn_config *config;
    dp_engine *engine;
    const attn_auth *auth;
    attn_metrics *metrics;
    const char *backend;  /* the one in use */
    const char *instance; /* random, new at every start */
} server_parts;

/* Between grpc_init() and grpc_shutdown(). */
attn_status server_create(const server_parts *parts, server **server);

/* Binds the addresses and serves. ATTN_UNAVAILABLE: an address cannot be bound; it is named. */
attn_status server_start(server *server);

/* The i-th address bound, with its real port; NULL beyond the last. Valid as long as the server. */
const char *server_address(const server *server, uint32_t index);

/*
 * What health answers: whether enough ranks serve, and whether all do (`full`); watchers are told of changes.
 * Draining is never healthy, and what is not healthy is not full.
 */
void server_set_health(server *server, bool healthy, bool full);
bool server_healthy(const server *server);
bool server_full(const server *server);
bool server_draining(const server *server);

/*
 * Stops serving: returns when all calls have ended. `wait` is called while there is something to wait
 * for; it sleeps a moment, and returns true to cut the grace period short.
 */
void server_drain(server *server, uint32_t grace_ms, bool (*wait)(void));

/* Ends what a drain has left, the queues and their threads. NULL, and twice, is fine. */
void server_stop(server *server);

/* Frees a server that was stopped. NULL is fine. */
void server_destroy(server *server);

/* ------------------------------------------------------------------------------------------- */
/* For calls */

const server_parts *server_get_parts(const server *server);

/* attn_now_ns() at the start. */
int64_t server_started_ns(const server *server);

const rpc *server_rpc(uint32_t index);

/* Puts one more slot of an RPC on a queue, so that the next call of it finds one. */
void server_arm(server *server, uint32_t rpc_index, server_queue *queue);

/* A number for a call, and the count of calls in progress. */
uint64_t server_call_begins(server *server, call *call);
void server_call_ends(server *server, call *call);

/* Free list of an RPC. server_take_free: NULL if it is empty. */
call *server_take_free(server *server, uint32_t rpc_index);
void server_put_free(server *server, call *call);

grpc_completion_queue *server_queue_cq(const server_queue *queue);

/* Adds a call to those that get CALL_NOTICE; after server_unlist none is on its way any more but those counted. */
void server_list(server *server, call *call);
void server_unlist(server *server, call *call);

#endif
