/*
 * AppendKv: keys and values of prefilled tokens, in chunks, visible when all are there.
 *
 * One chunk is with the engine at a time; the next message is received meanwhile.
 */
#include "proto/attnd.pb-c.h"
#include "service/layer.h"
#include "service/rpcs.h"
#include "service/server.h"

typedef struct {
    dp_upload_chunk chunk; /* must stay first: the engine's callback is given its address */
    call *call;
    dp_upload *upload; /* NULL before `begin` */
    bool in_flight;
    attn_saved_status outcome; /* of the chunk, valid after CALL_DONE */

    bool receiving;
    bool ended;
    bool broken; /* a receive has failed: CALL_CLOSED is on its way */
    grpc_byte_buffer *next;
    grpc_byte_buffer *current;
} append_state;

static void drop(grpc_byte_buffer **buffer) {
    if (*buffer != NULL) grpc_byte_buffer_destroy(*buffer);
    *buffer = NULL;
}

static void finish(call *call, attn_status status) {
    append_state *state = call->state;
    if (state->upload != NULL) dp_upload_end(state->upload);
    state->upload = NULL;
    drop(&state->current);
    drop(&state->next);
    call_finish(call, status, NULL, 0);
}

/* ------------------------------------------------------------------------------------------- */
/* Messages */

static attn_status begin_upload(call *call, const Attnd__V1__AppendKvBegin *begin) {
    append_state *state = call->state;
    if (state->upload != NULL)
        return attn_error(ATTN_INVALID_ARGUMENT, "begin: given again; it belongs in the first message");
    ATTN_TRY(layer_check_dtype(call, begin->dtype, "begin.dtype"));
    return dp_upload_begin(server_get_parts(call->server)->engine, call->tenant, begin->sequence, begin->tokens,
                           &state->upload);
}

static void chunk_done(dp_upload_chunk *chunk, attn_status status) {
    append_state *state = (void *)chunk;
    if (attn_failed(status)) {
        attn_status_save(&state->outcome, status);
    } else {
        state->outcome.code = ATTN_OK;
    }
    call_post_from_engine(state->call, 0);
}

static attn_status write_chunk(call *call, const wire_message *message) {
    append_state *state = call->state;
    const Attnd__V1__AppendKvRequest *request = (const Attnd__V1__AppendKvRequest *)message->message;
    if (!message->present[WIRE_K]) return attn_error(ATTN_INVALID_ARGUMENT, "k: missing");
    if (!message->present[WIRE_V]) return attn_error(ATTN_INVALID_ARGUMENT, "v: missing");
    state->chunk = (dp_upload_chunk){
        .layer = request->layer,
        .token_offset = request->token_offset,
        .tokens = request->tokens,
        .keys = message->tensors[WIRE_K],
        .values = message->tensors[WIRE_V],
        .done = chunk_done,
    };
    call_engine_begins(call);
    attn_status status = dp_upload_write(state->upload, &state->chunk);
    if (attn_failed(status)) {
        call_engine_refused(call);
    } else {
        state->in_flight = true;
    }
    return status;
}

/* Leaves a chunk in flight, or nothing to do, or fails. */
static attn_status handle_message(call *call) {
    append_state *state = call->state;
    wire_message message;
    ATTN_TRY(call_read(call, state->current, &message));
    const Attnd__V1__AppendKvRequest *request = (const Attnd__V1__AppendKvRequest *)message.message;
    if (request->begin != NULL) ATTN_TRY(begin_upload(call, request->begin));
    if (state->upload == NULL) return attn_error(ATTN_INVALID_ARGUMENT, "begin: missing in the first message");
    if (request->tokens > 0) return write_chunk(call, &message);
    if (message.present[WIRE_K] || message.present[WIRE_V]) {
        return attn_error(ATTN_INVALID_ARGUMENT, "tokens: 0, but k or v is given");
    }
    return attn_ok();
}

static void commit(call *call) {
    append_state *state = call->state;
    Attnd__V1__AppendKvResponse response = ATTND__V1__APPEND_KV_RESPONSE__INIT;
    attn_status status = state->upload != NULL ? dp_upload_commit(state->upload, &response.length)
                                               : attn_error(ATTN_INVALID_ARGUMENT, "begin: missing");
    if (attn_failed(status)) {
        finish(call, status);
        return;
    }
    dp_upload_end(state->upload);
    state->upload = NULL;
    call_respond(call, &response.base);
}

/* ------------------------------------------------------------------------------------------- */
/* The stream */

/* Messages, until one is in flight or there are none. */
static void advance(call *call) {
    append_state *state = call->state;
    if (state->next != NULL) {
        state->current = state->next;
        state->next = NULL;
        attn_status status = handle_message(call);
        if (attn_failed(status)) {
            finish(call, status);
            return;
        }
        if (!state->in_flight) drop(&state->current);
    } else if (state->ended) {
        commit(call);
    }
}

static void receive_more(call *call) {
    append_state *state = call->state;
    if (call->finished || state->receiving || state->next != NULL || state->ended || call_has_news(call)) return;
    state->receiving = true;
    call_receive(call);
}

static void append_run(call *call, uint32_t events) {
    append_state *state = call->state;
    if (call->finished) return;
    if (events & CALL_RECEIVED) {
        state->receiving = false;
        state->next = call->received;
        call->received = NULL;
        state->ended = state->next == NULL;
        state->broken |= !call->received_ok;
    }
    if (events & CALL_DONE) {
        state->in_flight = false;
        if (state->chunk.detained) dp_upload_keep(state->upload, call_detain(call, &state->current, NULL));
        drop(&state->current);
    }
    if (state->in_flight) {
        if (!call->closed) receive_more(call);
        return;
    }
    if (call->closed) {
        finish(call, attn_error(ATTN_CANCELLED, "the client is gone"));
    } else if ((events & CALL_DONE) && state->outcome.code != ATTN_OK) {
        finish(call, attn_status_view(&state->outcome));
    } else if (!state->broken) {
        advance(call);
        receive_more(call);
    }
}

static void append_start(call *call) {
    append_state *state = call->state;
    *state = (append_state){.call = call};
    call_watch(call);
    receive_more(call);
}

const rpc rpc_append_kv = {
    .path = "/attnd.v1.Attention/AppendKv",
    .method = ATTN_METHOD_APPEND_KV,
    .request = &attnd__v1__append_kv_request__descriptor,
    .aborted_may_retry = true,
    .stream_in = true,
    .slots = 4,
    .state_bytes = sizeof(append_state),
    .start = append_start,
    .run = append_run,
};
