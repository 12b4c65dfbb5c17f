/*
 * DecodeStream: steps announced once, one message a layer each way, in order.
 *
 * A stream holds at most one message that waits (next), one that is worked on (current), one response
 * that waits (ready) and one on its way out. Whoever does not read his responses is not read from
 * either, and costs that much and no more. The next message is asked for while a layer is in flight.
 *
 * A step whose sequences are on their way to another rank waits for them, as the current message.
 *
 *   RECEIVED -> next -> current -> engine -> ready -> call_send -> SENT
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "service/layer.h"
#include "service/rpcs.h"
#include "service/server.h"

typedef struct {
    layer layer;
    layer_wait wait; /* of a step that is to begin */
    dp_step *step;   /* the open one, or NULL */
    bool read_only;
    dp_options options; /* of the step */
    bool return_timing;
    float *sinks; /* options.sinks, copied: [sink_capacity], kept from step to step */
    size_t sink_capacity;

    bool receiving;
    bool ended; /* the client has sent its last message */
    grpc_byte_buffer *next;
    grpc_byte_buffer *current;
    wire_message message; /* `current`, read */
    bool sending;
    size_t ready_count;
    grpc_slice ready[LAYER_SLICES];

    uint32_t idle_notices; /* CALL_NOTICE since the last message */
    bool broken;           /* a send or receive has failed: CALL_CLOSED is on its way */
    bool failed;           /* the stream ends with `failure` */
    attn_saved_status failure;
} stream_state;

static void fail(stream_state *state, attn_status status) {
    if (state->failed) return;
    state->failed = true;
    attn_status_save(&state->failure, status);
}

/* ------------------------------------------------------------------------------------------- */
/* Steps */

static void end_step(stream_state *state) {
    if (state->step != NULL) dp_step_end(state->step);
    state->step = NULL;
}

/* The step's options outlive the message that brought them. */
static attn_status keep_options(stream_state *state, const Attnd__V1__AttentionOptions *options) {
    state->options = layer_options(options);
    state->return_timing = options != NULL && options->return_timing;
    size_t count = state->options.sink_count;
    if (options == NULL || count == 0) return attn_ok();
    if (count > state->sink_capacity) {
        float *sinks = realloc(state->sinks, count * sizeof *sinks);
        if (sinks == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %zu sinks", count);
        state->sinks = sinks;
        state->sink_capacity = count;
    }
    memcpy(state->sinks, options->sinks, count * sizeof *state->sinks);
    state->options.sinks = state->sinks;
    return attn_ok();
}

/* The step may have to wait: then there is none. */
static attn_status begin_step(call *call, const Attnd__V1__StepBegin *begin) {
    stream_state *state = call->state;
    if (state->step != NULL && !state->read_only) {
        return attn_error(ATTN_INVALID_ARGUMENT, "begin: a step is open; its last layer or abort must come first");
    }
    if (server_draining(call->server)) return attn_error(ATTN_UNAVAILABLE, "the server is draining");
    ATTN_TRY(layer_check_dtype(call, begin->dtype, "begin.dtype"));
    if (begin->n_query_lengths > 0 && begin->n_query_lengths != begin->n_sequences) {
        return attn_error(ATTN_INVALID_ARGUMENT, "begin.query_lengths: %zu for %zu sequences", begin->n_query_lengths,
                          begin->n_sequences);
    }
    end_step(state);
    ATTN_TRY(keep_options(state, begin->options));
    state->read_only = begin->read_only != 0;
    dp_step_request step = {
        .tenant = call->tenant,
        .sequences = begin->sequences,
        .query_lengths = begin->n_query_lengths > 0 ? begin->query_lengths : NULL,
        .count = (uint32_t)begin->n_sequences,
        .read_only = state->read_only,
    };
    return layer_begin_step(&state->wait, call, &step, &state->step);
}

/* Name of the open step on the wire. */
static uint64_t step_name(const stream_state *state) {
    return state->step == NULL || state->read_only ? 0 : dp_step_id(state->step);
}

/* ------------------------------------------------------------------------------------------- */
/* Messages */

static void answer_without_layer(stream_state *state) {
    state->ready[0] = layer_empty_response(step_name(state));
    state->ready_count = 1;
}

static attn_status handle_abort(stream_state *state, const wire_message *message) {
    const Attnd__V1__DecodeStreamRequest *request = (const Attnd__V1__DecodeStreamRequest *)message->message;
    if (request->begin != NULL) return attn_error(ATTN_INVALID_ARGUMENT, "abort: given with begin");
    if (message->present[WIRE_Q] || message->present[WIRE_K] || message->present[WIRE_V]) {
        return attn_error(ATTN_INVALID_ARGUMENT, "abort: given with tensors");
    }
    end_step(state);
    answer_without_layer(state);
    return attn_ok();
}

static attn_status handle_layer(call *call, const wire_message *message) {
    stream_state *state = call->state;
    const Attnd__V1__DecodeStreamRequest *request = (const Attnd__V1__DecodeStreamRequest *)message->message;
    ATTN_TRY(layer_check_tensors(message, state->read_only ? LAYER_READS : LAYER_APPENDS));
    if (request->options == NULL) {
        return layer_start(&state->layer, call, state->step, request->layer, &state->options, state->return_timing,
                           message);
    }
    dp_options options = layer_options(request->options);
    return layer_start(&state->layer, call, state->step, request->layer, &options, request->options->return_timing != 0,
                       message);
}

/* What is to come back from the engine before the stream goes on. */
static bool is_in_flight(const stream_state *state) { return state->layer.in_flight || state->wait.in_flight; }

/* Leaves a layer in flight, a step waiting or an answer ready, or fails. */
static attn_status handle_message(call *call) {
    stream_state *state = call->state;
    const wire_message *message = &state->message;
    const Attnd__V1__DecodeStreamRequest *request = (const Attnd__V1__DecodeStreamRequest *)message->message;
    if (request->abort) return handle_abort(state, message);
    if (request->begin != NULL) ATTN_TRY(begin_step(call, request->begin));
    if (state->wait.in_flight) return attn_ok();
    if (state->step == NULL) return attn_error(ATTN_INVALID_ARGUMENT, "begin: missing; no step is open on this stream");
    if (message->present[WIRE_Q] || message->present[WIRE_K] || message->present[WIRE_V]) {
        return handle_layer(call, message);
    }
    answer_without_layer(state);
    return attn_ok();
}

static void drop_current(stream_state *state) {
    if (state->current != NULL) grpc_byte_buffer_destroy(state->current);
    state->current = NULL;
}

static void take_next(call *call) {
    stream_state *state = call->state;
    state->current = state->next;
    state->next = NULL;
    attn_status status = call_read(call, state->current, &state->message);
    if (!attn_failed(status)) status = handle_message(call);
    if (attn_failed(status)) fail(state, status);
    if (!is_in_flight(state)) drop_current(state);
}

/* A move has ended: the step that waited for it may begin, or waits again. */
static void begin_again(call *call) {
    stream_state *state = call->state;
    state->wait.in_flight = false;
    if (call->closed) return;
    attn_status status = handle_message(call);
    if (attn_failed(status)) fail(state, status);
    if (!is_in_flight(state)) drop_current(state);
}

static void layer_done(call *call) {
    stream_state *state = call->state;
    state->layer.in_flight = false;
    layer_detain(&state->layer, state->step, &state->current, &state->sinks);
    if (state->sinks == NULL) state->sink_capacity = 0;
    drop_current(state);
    if (state->layer.outcome.code != ATTN_OK) {
        fail(state, attn_status_view(&state->layer.outcome));
        return;
    }
    if (call->closed) {
        layer_drop_result(&state->layer);
        return;
    }
    state->ready_count = layer_response(&state->layer, step_name(state), state->ready);
    if (state->layer.engine.committed) end_step(state);
    attn_metrics_layer(server_get_parts(call->server)->metrics, call->rpc->method,
                       attn_now_ns() - state->layer.started_ns);
}

/* ------------------------------------------------------------------------------------------- */
/* The stream */

static void finish(call *call, attn_status status) {
    stream_state *state = call->state;
    for (size_t i = 0; i < state->ready_count; i++) {
        grpc_slice_unref(state->ready[i]);
    }
    state->ready_count = 0;
    end_step(state);
    drop_current(state);
    if (state->next != NULL) grpc_byte_buffer_destroy(state->next);
    state->next = NULL;
    call_finish(call, status, NULL, 0);
}

static bool wants_to_receive(const call *call) {
    const stream_state *state = call->state;
    return !call->finished && !state->receiving && state->next == NULL && !state->ended && !state->failed;
}

/* The next message is asked for with the response, if it has not been before. */
static void send_ready(call *call) {
    stream_state *state = call->state;
    if (state->ready_count == 0 || state->sending) return;
    size_t count = state->ready_count;
    state->ready_count = 0;
    if (wants_to_receive(call)) {
        state->receiving = true;
        call_send_and_receive(call, state->ready, count);
    } else {
        state->sending = true;
        call_send(call, state->ready, count);
    }
}

/* When the server drains: a stream that has nothing to lose, and had a moment to end by itself. */
static bool may_be_ended(const call *call) {
    const stream_state *state = call->state;
    return state->idle_notices > 1 && server_draining(call->server) && (state->step == NULL || state->read_only);
}

/* With nothing in flight, waiting or being sent: the next message, or the end. */
static void advance(call *call) {
    stream_state *state = call->state;
    if (state->failed) {
        if (!state->sending) finish(call, attn_status_view(&state->failure));
    } else if (state->next != NULL) {
        take_next(call);
        if (!is_in_flight(state)) {
            send_ready(call);
            if (state->failed) advance(call);
        }
    } else if (state->ended) {
        if (!state->sending) finish(call, attn_ok());
    } else if (may_be_ended(call)) {
        if (!state->sending) finish(call, attn_error(ATTN_UNAVAILABLE, "the server is draining"));
    }
}

static void receive_more(call *call) {
    stream_state *state = call->state;
    if (!wants_to_receive(call) || call_has_news(call)) return;
    state->receiving = true;
    call_receive(call);
}

static void note_events(call *call, uint32_t events) {
    stream_state *state = call->state;
    if (events & CALL_SENT) {
        state->sending = false;
        state->broken |= !call->sent_ok;
    }
    if (events & CALL_NOTICE) state->idle_notices++;
    if (events & CALL_RECEIVED) {
        state->idle_notices = 0;
        state->receiving = false;
        state->next = call->received;
        call->received = NULL;
        state->ended = state->next == NULL;
        state->broken |= !call->received_ok;
    }
    if ((events & CALL_DONE) && state->wait.in_flight)
        begin_again(call);
    else if (events & CALL_DONE)
        layer_done(call);
}

/* The client is gone: what is in flight is cut short, and the call ends when it has come back. */
static void run_closed(call *call, uint32_t events) {
    stream_state *state = call->state;
    if ((events & CALL_CLOSED) && state->wait.in_flight) layer_wait_withdraw(&state->wait);
    if (!is_in_flight(state)) {
        finish(call, attn_error(ATTN_CANCELLED, "the client is gone"));
    } else if ((events & CALL_CLOSED) && state->layer.in_flight) {
        dp_layer_cancel(state->step);
    }
}

static void stream_run(call *call, uint32_t events) {
    stream_state *state = call->state;
    if (call->finished) return;
    note_events(call, events);
    if (call->closed) {
        run_closed(call, events);
        return;
    }
    if (state->broken) return;
    send_ready(call);
    if (!is_in_flight(state) && state->ready_count == 0) advance(call);
    receive_more(call);
}

static void stream_start(call *call) {
    stream_state *state = call->state;
    float *sinks = state->sinks;
    size_t sink_capacity = state->sink_capacity;
    *state = (stream_state){.sinks = sinks, .sink_capacity = sink_capacity};
    call_watch(call);
    server_list(call->server, call);
    receive_more(call);
}

static void stream_dispose(call *call) { free(((stream_state *)call->state)->sinks); }

const rpc rpc_decode_stream = {
    .path = "/attnd.v1.Attention/DecodeStream",
    .method = ATTN_METHOD_DECODE_STREAM,
    .request = &attnd__v1__decode_stream_request__descriptor,
    .stream_in = true,
    .listed = true,
    .slots = 8,
    .state_bytes = sizeof(stream_state),
    .start = stream_start,
    .run = stream_run,
    .dispose = stream_dispose,
};
