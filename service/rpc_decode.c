/*
 * Decode: one layer of one step, unary.
 *
 * Between calls a step belongs to nobody: a call takes it by name, runs its layer, and puts it back
 * before the answer leaves, so that the next layer's call finds it. A step whose sequences are on their way
 * to another rank waits for them. A layer refused leaves the step where it was; a layer that failed,
 * or whose answer did not reach its client, ends it.
 */
#include "base/clock.h"
#include "service/layer.h"
#include "service/rpcs.h"
#include "service/server.h"

typedef struct {
    layer layer;
    layer_wait wait;
    wire_message message; /* lives as long as the call's payload */
    dp_step *step;
    bool reads;         /* the step is read-only and lives for this call only */
    uint64_t left_open; /* the step that the answer leaves open, by name; 0: none, or there is no answer yet */
} decode_state;

static dp_engine *engine_of(const call *call) { return server_get_parts(call->server)->engine; }

static const uint32_t *query_lengths_of(const Attnd__V1__DecodeRequest *request) {
    return request->n_query_lengths > 0 ? request->query_lengths : NULL;
}

static attn_status check_query_lengths(const Attnd__V1__DecodeRequest *request) {
    if (request->n_query_lengths == 0 || request->n_query_lengths == request->n_sequences) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "query_lengths: %zu for %zu sequences", request->n_query_lengths,
                      request->n_sequences);
}

/* A new step, or a read-only one. It may have to wait: then there is none. */
static attn_status begin_step(call *call, const Attnd__V1__DecodeRequest *request) {
    decode_state *state = call->state;
    if (server_draining(call->server)) return attn_error(ATTN_UNAVAILABLE, "the server is draining");
    dp_step_request step = {
        .tenant = call->tenant,
        .sequences = request->sequences,
        .query_lengths = query_lengths_of(request),
        .count = (uint32_t)request->n_sequences,
        .read_only = state->reads,
    };
    return layer_begin_step(&state->wait, call, &step, &state->step);
}

/* An open step, by name. */
static attn_status take_step(call *call, const Attnd__V1__DecodeRequest *request) {
    decode_state *state = call->state;
    ATTN_TRY(dp_step_take(engine_of(call), call->tenant, request->step, &state->step));
    if (request->n_sequences == 0) return attn_ok();
    attn_status status =
        dp_step_matches(state->step, request->sequences, query_lengths_of(request), (uint32_t)request->n_sequences);
    if (attn_failed(status)) dp_step_put(state->step);
    return status;
}

/* Leaves a layer in flight, or the step waiting, or fails. */
static attn_status start_layer(call *call) {
    decode_state *state = call->state;
    const wire_message *message = &state->message;
    const Attnd__V1__DecodeRequest *request = (const Attnd__V1__DecodeRequest *)message->message;
    bool begins = request->step == 0;
    state->reads = begins && !message->present[WIRE_K] && !message->present[WIRE_V];
    ATTN_TRY(layer_check_dtype(call, request->dtype, "dtype"));
    ATTN_TRY(check_query_lengths(request));
    ATTN_TRY(layer_check_tensors(message, state->reads ? LAYER_READS : LAYER_APPENDS));
    ATTN_TRY(begins ? begin_step(call, request) : take_step(call, request));
    if (state->wait.in_flight) return attn_ok();

    dp_options options = layer_options(request->options);
    attn_status status = layer_start(&state->layer, call, state->step, request->layer, &options,
                                     request->options != NULL && request->options->return_timing, message);
    if (!attn_failed(status)) return status;
    if (begins) {
        dp_step_end(state->step);
    } else {
        dp_step_put(state->step);
    }
    return status;
}

static attn_status abort_step(call *call) {
    const wire_message *message = &((decode_state *)call->state)->message;
    const Attnd__V1__DecodeRequest *request = (const Attnd__V1__DecodeRequest *)message->message;
    dp_step *step;
    if (message->present[WIRE_Q] || message->present[WIRE_K] || message->present[WIRE_V]) {
        return attn_error(ATTN_INVALID_ARGUMENT, "abort: given with tensors");
    }
    if (request->step == 0) return attn_error(ATTN_INVALID_ARGUMENT, "step: missing; abort needs one");
    ATTN_TRY(dp_step_take(engine_of(call), call->tenant, request->step, &step));
    dp_step_end(step);
    grpc_slice slice = layer_empty_response(request->step);
    call_finish(call, attn_ok(), &slice, 1);
    return attn_ok();
}

/* Finishes a call that has failed; watches one that has something in flight. */
static void go_on(call *call, attn_status status) {
    const decode_state *state = call->state;
    if (attn_failed(status)) {
        call_finish(call, status, NULL, 0);
    } else if ((state->layer.in_flight || state->wait.in_flight) && !call->watched && !call_has_news(call)) {
        call_watch(call);
    }
}

static void decode_start(call *call) {
    decode_state *state = call->state;
    state->layer.in_flight = state->wait.in_flight = false;
    state->left_open = 0;
    attn_status status = call_read(call, call->payload, &state->message);
    if (!attn_failed(status)) {
        const Attnd__V1__DecodeRequest *request = (const Attnd__V1__DecodeRequest *)state->message.message;
        status = request->abort ? abort_step(call) : start_layer(call);
    }
    go_on(call, status);
}

/* The step waits: for a move to end, or no longer, because the client is gone. */
static void run_waiting(call *call, uint32_t events) {
    decode_state *state = call->state;
    if (events & CALL_DONE) {
        state->wait.in_flight = false;
    } else if (events & CALL_CLOSED) {
        layer_wait_withdraw(&state->wait);
    }
    if (state->wait.in_flight) return;
    go_on(call, call->closed ? attn_error(ATTN_CANCELLED, "the client is gone") : start_layer(call));
}

static void layer_succeeded(call *call) {
    decode_state *state = call->state;
    grpc_slice slices[LAYER_SLICES];
    size_t count = layer_response(&state->layer, state->reads ? 0 : dp_step_id(state->step), slices);
    if (state->reads || state->layer.engine.committed || call->cancelled) {
        dp_step_end(state->step);
    } else {
        state->left_open = dp_step_id(state->step);
        dp_step_put(state->step);
    }
    attn_metrics_layer(server_get_parts(call->server)->metrics, call->rpc->method,
                       attn_now_ns() - state->layer.started_ns);
    call_finish(call, attn_ok(), slices, count);
}

/* The answer has not arrived: without it no further layer of the step can come, unless one has. */
static void end_unanswered(call *call) {
    decode_state *state = call->state;
    uint64_t id = state->left_open;
    state->left_open = 0;
    dp_step *step;
    if (id == 0 || attn_failed(dp_step_take(engine_of(call), call->tenant, id, &step))) return;
    if (dp_step_next_layer(step) == state->layer.engine.layer + 1) {
        dp_step_end(step);
    } else {
        dp_step_put(step);
    }
}

static void decode_run(call *call, uint32_t events) {
    decode_state *state = call->state;
    if (call->finished) {
        if (call->cancelled) end_unanswered(call);
        return;
    }
    if (state->wait.in_flight) {
        run_waiting(call, events);
        return;
    }
    if ((events & CALL_CLOSED) && call->cancelled && state->layer.in_flight && !(events & CALL_DONE)) {
        dp_layer_cancel(state->step);
    }
    if (!(events & CALL_DONE)) return;
    state->layer.in_flight = false;
    layer_detain(&state->layer, state->step, &call->payload, NULL);
    call_drop_payload(call);
    if (state->layer.outcome.code == ATTN_OK) {
        layer_succeeded(call);
    } else {
        dp_step_end(state->step);
        call_finish(call, attn_status_view(&state->layer.outcome), NULL, 0);
    }
}

/* Served while draining, for steps that are open. */
const rpc rpc_decode = {
    .path = "/attnd.v1.Attention/Decode",
    .method = ATTN_METHOD_DECODE,
    .request = &attnd__v1__decode_request__descriptor,
    .while_draining = true,
    .slots = 32,
    .state_bytes = sizeof(decode_state),
    .start = decode_start,
    .run = decode_run,
};
