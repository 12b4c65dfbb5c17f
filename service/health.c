/*
 * grpc.health.v1: Check, and Watch, which tells a state when it is asked for and again when it has
 * changed. The service "attnd.v1.Attention/full" serves while every rank does; the others while enough do. A watcher
 * has one message on its way at most; what changes meanwhile is told as the latest state when that is out.
 */
#include <string.h>

#include "proto/health.pb-c.h"
#include "service/rpcs.h"
#include "service/server.h"

typedef Grpc__Health__V1__HealthCheckRequest request_message;
typedef Grpc__Health__V1__HealthCheckResponse response_message;
typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus health;

#define HEALTH(name) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##name

/* What a service's health is about. */
typedef enum { SUBJECT_NONE, SUBJECT_SERVER, SUBJECT_ALL_RANKS } subject;

static subject subject_of(const char *service) {
    if (service[0] == '\0' || strcmp(service, "attnd.v1.Attention") == 0) return SUBJECT_SERVER;
    return strcmp(service, "attnd.v1.Attention/full") == 0 ? SUBJECT_ALL_RANKS : SUBJECT_NONE;
}

static health health_now(const call *call, subject about) {
    if (about == SUBJECT_NONE) return HEALTH(SERVICE_UNKNOWN);
    bool serves = about == SUBJECT_ALL_RANKS ? server_full(call->server) : server_healthy(call->server);
    return serves ? HEALTH(SERVING) : HEALTH(NOT_SERVING);
}

static attn_status answer_check(call *call, const wire_message *message) {
    const request_message *request = (const request_message *)message->message;
    subject about = subject_of(request->service);
    if (about == SUBJECT_NONE) return attn_error(ATTN_NOT_FOUND, "service: not served here");
    response_message response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = health_now(call, about);
    call_respond(call, &response.base);
    return attn_ok();
}

const rpc rpc_health_check = {
    .path = "/grpc.health.v1.Health/Check",
    .method = ATTN_METHOD_OTHER,
    .request = &grpc__health__v1__health_check_request__descriptor,
    .open_to_all = true,
    .while_draining = true,
    .slots = 2,
    .answer = answer_check,
};

typedef struct {
    subject about;
    bool sending;
    health told;
} watch_state;

static void watch_tell(call *call) {
    watch_state *state = call->state;
    health now = health_now(call, state->about);
    if (state->sending || now == state->told) return;
    response_message response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = now;
    state->told = now;
    state->sending = true;
    grpc_slice slice = call_pack(&response.base);
    call_send(call, &slice, 1);
}

static void watch_start(call *call) {
    wire_message message;
    attn_status status = call_read(call, call->payload, &message);
    if (attn_failed(status)) {
        call_finish(call, status, NULL, 0);
        return;
    }
    watch_state *state = call->state;
    state->about = subject_of(((const request_message *)message.message)->service);
    state->sending = false;
    state->told = HEALTH(UNKNOWN);
    call_watch(call);
    server_list(call->server, call);
    watch_tell(call);
}

static void watch_run(call *call, uint32_t events) {
    if (call->finished) return;
    watch_state *state = call->state;
    if (events & CALL_SENT) state->sending = false;
    if (call->closed) {
        call_finish(call, attn_error(ATTN_CANCELLED, "the watcher is gone"), NULL, 0);
        return;
    }
    watch_tell(call);
    if (server_draining(call->server) && !state->sending) {
        call_finish(call, attn_error(ATTN_UNAVAILABLE, "the server is draining"), NULL, 0);
    }
}

const rpc rpc_health_watch = {
    .path = "/grpc.health.v1.Health/Watch",
    .method = ATTN_METHOD_OTHER,
    .request = &grpc__health__v1__health_check_request__descriptor,
    .listed = true,
    .open_to_all = true,
    .while_draining = true,
    .slots = 2,
    .state_bytes = sizeof(watch_state),
    .start = watch_start,
    .run = watch_run,
};
