/* GetServerInfo, RestartRank. */
#include <stdlib.h>

#include "base/clock.h"
#include "proto/attnd.pb-c.h"
#include "service/rpcs.h"
#include "service/server.h"

static void fill_geometry(const attn_geometry *geometry, Attnd__V1__Geometry *message) {
    message->layers = geometry->layers;
    message->heads_q = geometry->heads_q;
    message->heads_kv = geometry->heads_kv;
    message->head_dim = geometry->head_dim;
    message->head_dim_v = geometry->head_dim_v;
    message->dtype = (Attnd__V1__DType)geometry->dtype;
    message->page_size = geometry->page_size;
    message->kv_dtype = (Attnd__V1__DType)attn_kv_dtype(geometry);
}

static void fill_limits(const attn_config *config, Attnd__V1__Limits *message) {
    message->message_bytes = config->max_message_bytes;
    message->batch = config->max_batch;
    message->query_length = ATTN_MAX_QUERY_LENGTH;
    message->sequences = config->max_sequences;
    message->sequence_tokens = config->max_sequence_tokens;
    message->step_idle_ms = config->step_idle_ms;
}

/* The proto's states are the engine's, number for number. */
_Static_assert((int)ATTND__V1__RANK_STATE__RANK_STATE_SERVING == (int)DP_RANK_SERVING, "state");
_Static_assert((int)ATTND__V1__RANK_STATE__RANK_STATE_LOST == (int)DP_RANK_LOST, "state");
_Static_assert((int)ATTND__V1__RANK_STATE__RANK_STATE_RESTARTING == (int)DP_RANK_RESTARTING, "state");

/* The message borrows from `info`. */
static void fill_rank(uint32_t rank, dp_rank_info *info, Attnd__V1__RankInfo *message) {
    attnd__v1__rank_info__init(message);
    message->rank = rank;
    message->state = (Attnd__V1__RankState)info->state;
    message->device = (char *)(uintptr_t)info->device;
    message->sequences = info->sequences;
    message->tokens = info->tokens;
    message->tokens_in_flight = info->tokens_in_flight;
    message->pages_total = info->pages_total;
    message->pages_free = info->pages_free;
    message->queue_depth = info->queue_depth;
    message->calls = info->calls;
    message->losses = info->losses;
    message->stalls = info->stalls;
    message->restarts = info->restarts;
    message->last_error = info->last_error;
    message->process = info->process;
}

static attn_status answer_get_server_info(call *call, const wire_message *message) {
    (void)message;
    const server_parts *parts = server_get_parts(call->server);
    dp_rank_info infos[DP_MAX_RANKS];
    Attnd__V1__RankInfo ranks[DP_MAX_RANKS];
    Attnd__V1__RankInfo *rank_list[DP_MAX_RANKS];
    Attnd__V1__Geometry geometry = ATTND__V1__GEOMETRY__INIT;
    Attnd__V1__Limits limits = ATTND__V1__LIMITS__INIT;
    Attnd__V1__GetServerInfoResponse response = ATTND__V1__GET_SERVER_INFO_RESPONSE__INIT;

    response.n_ranks = dp_engine_ranks(parts->engine);
    response.ranks = rank_list;
    for (uint32_t i = 0; i < response.n_ranks; i++) {
        dp_engine_rank_info(parts->engine, i, &infos[i]);
        fill_rank(i, &infos[i], &ranks[i]);
        rank_list[i] = &ranks[i];
        response.degraded |= infos[i].state != DP_RANK_SERVING;
        if (i == 0) response.backend_detail = ranks[i].device;
    }
    fill_geometry(&parts->config->geometry, &geometry);
    fill_limits(parts->config, &limits);
    response.version = SERVER_VERSION;
    response.instance = (char *)(uintptr_t)parts->instance;
    response.backend = (char *)(uintptr_t)parts->backend;
    response.geometry = &geometry;
    response.limits = &limits;
    response.uptime_ms = (uint64_t)((attn_now_ns() - server_started_ns(call->server)) / 1000000);
    response.draining = server_draining(call->server);
    call_respond(call, &response.base);
    return attn_ok();
}

static attn_status answer_restart_rank(call *call, const wire_message *message) {
    const Attnd__V1__RestartRankRequest *request = (const Attnd__V1__RestartRankRequest *)message->message;
    dp_engine *engine = server_get_parts(call->server)->engine;
    ATTN_TRY(dp_engine_restart_rank(engine, request->rank));
    dp_rank_info info;
    Attnd__V1__RankInfo rank;
    Attnd__V1__RestartRankResponse response = ATTND__V1__RESTART_RANK_RESPONSE__INIT;
    dp_engine_rank_info(engine, request->rank, &info);
    fill_rank(request->rank, &info, &rank);
    response.rank = &rank;
    call_respond(call, &response.base);
    return attn_ok();
}

const rpc rpc_restart_rank = {
    .path = "/attnd.v1.Attention/RestartRank",
    .method = ATTN_METHOD_RESTART_RANK,
    .request = &attnd__v1__restart_rank_request__descriptor,
    .admin = true,
    .slots = 1,
    .answer = answer_restart_rank,
};

const rpc rpc_get_server_info = {
    .path = "/attnd.v1.Attention/GetServerInfo",
    .method = ATTN_METHOD_GET_SERVER_INFO,
    .request = &attnd__v1__get_server_info_request__descriptor,
    .while_draining = true,
    .slots = 2,
    .answer = answer_get_server_info,
};
