/*
 * OpenSequences, ForkSequence, TruncateSequence, CloseSequences, DescribeSequences.
 *
 * A sequence whose handle did not reach the client is nobody's: it is closed again.
 */
#include <stdlib.h>

#include "proto/attnd.pb-c.h"
#include "service/rpcs.h"
#include "service/server.h"

static dp_engine *engine_of(const call *call) { return server_get_parts(call->server)->engine; }

/* The proto's placements are the engine's, number for number. */
_Static_assert((int)ATTND__V1__PLACEMENT__PLACEMENT_LEAST_TOKENS == (int)DP_LEAST_TOKENS, "placement");
_Static_assert((int)ATTND__V1__PLACEMENT__PLACEMENT_ROUND_ROBIN == (int)DP_ROUND_ROBIN, "placement");
_Static_assert((int)ATTND__V1__PLACEMENT__PLACEMENT_EXPLICIT == (int)DP_EXPLICIT, "placement");
_Static_assert((int)ATTND__V1__PLACEMENT__PLACEMENT_SPREAD == (int)DP_SPREAD, "placement");

/* The sequences that an answer names, from when they are made until it has arrived or is lost. */
typedef struct {
    uint64_t *handles; /* count long */
    uint32_t count;
} made_sequences;

static attn_status take_room(call *call, uint32_t count) {
    made_sequences *made = call->state;
    made->handles = calloc(count, sizeof *made->handles);
    if (made->handles == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u handles", count);
    made->count = count;
    return attn_ok();
}

static void drop_room(call *call) {
    made_sequences *made = call->state;
    free(made->handles);
    *made = (made_sequences){0};
}

/* One by one: some may have been closed for being idle. */
static void close_made(call *call) {
    const made_sequences *made = call->state;
    for (uint32_t i = 0; i < made->count; i++) {
        (void)dp_sequences_close(engine_of(call), call->tenant, &made->handles[i], 1);
    }
}

static void run_answered(call *call, uint32_t events) {
    if (!(events & CALL_FINISHED)) return;
    if (call->cancelled) close_made(call);
    drop_room(call);
}

static attn_status answer_open(call *call, const wire_message *message) {
    const Attnd__V1__OpenSequencesRequest *request = (const Attnd__V1__OpenSequencesRequest *)message->message;
    uint32_t limit = server_get_parts(call->server)->config->max_sequences;
    if (request->count < 1 || request->count > limit) {
        return attn_error(ATTN_INVALID_ARGUMENT, "count: %u is not 1 to %u", request->count, limit);
    }
    if ((int)request->placement < DP_LEAST_TOKENS || (int)request->placement > DP_SPREAD) {
        return attn_error(ATTN_INVALID_ARGUMENT, "placement: %d is unknown", (int)request->placement);
    }
    made_sequences *made = call->state;
    uint32_t *ranks = calloc(request->count, sizeof *ranks);
    attn_status status = ranks != NULL ? take_room(call, request->count)
                                       : attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u ranks", request->count);
    if (!attn_failed(status)) {
        status = dp_sequences_open(engine_of(call), call->tenant, request->count, (dp_placement)request->placement,
                                   request->dp_rank, made->handles, ranks);
    }
    if (attn_failed(status)) {
        drop_room(call);
    } else {
        Attnd__V1__OpenSequencesResponse response = ATTND__V1__OPEN_SEQUENCES_RESPONSE__INIT;
        response.sequences = made->handles;
        response.dp_ranks = ranks;
        response.n_sequences = response.n_dp_ranks = request->count;
        call_respond(call, &response.base);
    }
    free(ranks);
    return status;
}

static attn_status answer_fork(call *call, const wire_message *message) {
    const Attnd__V1__ForkSequenceRequest *request = (const Attnd__V1__ForkSequenceRequest *)message->message;
    made_sequences *made = call->state;
    Attnd__V1__ForkSequenceResponse response = ATTND__V1__FORK_SEQUENCE_RESPONSE__INIT;
    ATTN_TRY(take_room(call, 1));
    attn_status status = dp_sequence_fork(engine_of(call), call->tenant, request->sequence, request->length,
                                          made->handles, &response.dp_rank);
    if (attn_failed(status)) {
        drop_room(call);
        return status;
    }
    response.sequence = made->handles[0];
    call_respond(call, &response.base);
    return status;
}

static attn_status answer_truncate(call *call, const wire_message *message) {
    const Attnd__V1__TruncateSequenceRequest *request = (const Attnd__V1__TruncateSequenceRequest *)message->message;
    ATTN_TRY(dp_sequence_truncate(engine_of(call), call->tenant, request->sequence, request->length));
    Attnd__V1__TruncateSequenceResponse response = ATTND__V1__TRUNCATE_SEQUENCE_RESPONSE__INIT;
    response.length = request->length;
    call_respond(call, &response.base);
    return attn_ok();
}

static attn_status answer_close(call *call, const wire_message *message) {
    const Attnd__V1__CloseSequencesRequest *request = (const Attnd__V1__CloseSequencesRequest *)message->message;
    if (request->n_sequences > 0) { /* closing nothing is fine */
        ATTN_TRY(dp_sequences_close(engine_of(call), call->tenant, request->sequences, (uint32_t)request->n_sequences));
    }
    Attnd__V1__CloseSequencesResponse response = ATTND__V1__CLOSE_SEQUENCES_RESPONSE__INIT;
    call_respond(call, &response.base);
    return attn_ok();
}

static void fill_info(const dp_sequence_info *info, Attnd__V1__SequenceInfo *message) {
    attnd__v1__sequence_info__init(message);
    message->sequence = info->handle;
    message->length = info->length;
    message->dp_rank = info->rank;
    message->spread = info->spread;
    message->pages = info->pages;
    message->shared_pages = info->shared_pages;
    message->busy = info->busy;
}

static attn_status answer_describe(call *call, const wire_message *message) {
    const Attnd__V1__DescribeSequencesRequest *request = (const Attnd__V1__DescribeSequencesRequest *)message->message;
    Attnd__V1__DescribeSequencesResponse response = ATTND__V1__DESCRIBE_SEQUENCES_RESPONSE__INIT;
    size_t count = request->n_sequences;
    attn_status status;
    dp_sequence_info *infos = calloc(count + 1, sizeof *infos);
    Attnd__V1__SequenceInfo *messages = calloc(count + 1, sizeof *messages);
    response.sequences = calloc(count + 1, sizeof(Attnd__V1__SequenceInfo *));
    if (infos == NULL || messages == NULL || response.sequences == NULL) {
        status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %zu descriptions", count);
        goto cleanup;
    }
    ATTN_TRY_GOTO(status,
                  dp_sequences_describe(engine_of(call), call->tenant, request->sequences, (uint32_t)count, infos),
                  cleanup);
    for (size_t i = 0; i < count; i++) {
        fill_info(&infos[i], &messages[i]);
        response.sequences[i] = &messages[i];
    }
    response.n_sequences = count;
    call_respond(call, &response.base);
cleanup:
    free(infos);
    free(messages);
    free(response.sequences);
    return status;
}

const rpc rpc_open_sequences = {
    .path = "/attnd.v1.Attention/OpenSequences",
    .method = ATTN_METHOD_OPEN_SEQUENCES,
    .request = &attnd__v1__open_sequences_request__descriptor,
    .slots = 4,
    .state_bytes = sizeof(made_sequences),
    .answer = answer_open,
    .run = run_answered,
};

const rpc rpc_fork_sequence = {
    .path = "/attnd.v1.Attention/ForkSequence",
    .method = ATTN_METHOD_FORK_SEQUENCE,
    .request = &attnd__v1__fork_sequence_request__descriptor,
    .slots = 4,
    .state_bytes = sizeof(made_sequences),
    .answer = answer_fork,
    .run = run_answered,
};

const rpc rpc_truncate_sequence = {
    .path = "/attnd.v1.Attention/TruncateSequence",
    .method = ATTN_METHOD_TRUNCATE_SEQUENCE,
    .request = &attnd__v1__truncate_sequence_request__descriptor,
    .aborted_may_retry = true,
    .slots = 4,
    .answer = answer_truncate,
};

/* Served while draining: it takes nothing. */
const rpc rpc_close_sequences = {
    .path = "/attnd.v1.Attention/CloseSequences",
    .method = ATTN_METHOD_CLOSE_SEQUENCES,
    .request = &attnd__v1__close_sequences_request__descriptor,
    .aborted_may_retry = true,
    .while_draining = true,
    .slots = 4,
    .answer = answer_close,
};

const rpc rpc_describe_sequences = {
    .path = "/attnd.v1.Attention/DescribeSequences",
    .method = ATTN_METHOD_DESCRIBE_SEQUENCES,
    .request = &attnd__v1__describe_sequences_request__descriptor,
    .slots = 4,
    .answer = answer_describe,
};
