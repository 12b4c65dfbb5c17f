/*
 * MoveSequence: a sequence moves to another rank, or is spread over all.
 *
 * The engine copies its rows chunk by chunk; the call waits for the end, and cancels the move if its client goes.
 */
#include "base/clock.h"
#include "proto/attnd.pb-c.h"
#include "service/rpcs.h"
#include "service/server.h"

/* How long a move waits for a step or upload of its sequence to end, before it is refused. */
#define PATIENCE_NS INT64_C(2000000000)

typedef struct {
    dp_move move; /* must stay first: the engine's callback is given its address */
    call *call;
    bool in_flight;            /* CALL_DONE is to come */
    attn_saved_status outcome; /* valid after CALL_DONE */
} move_state;

static void move_done(dp_move *move, attn_status status) {
    move_state *state = (void *)move;
    attn_status_save(&state->outcome, status);
    call_post_from_engine(state->call, 0);
}

static attn_status start_move(call *call) {
    move_state *state = call->state;
    wire_message message;
    ATTN_TRY(call_read(call, call->payload, &message));
    const Attnd__V1__MoveSequenceRequest *request = (const Attnd__V1__MoveSequenceRequest *)message.message;
    state->call = call;
    state->move = (dp_move){
        .sequence = request->sequence,
        .rank = request->dp_rank,
        .spread = request->spread != 0,
        .step_until_ns = attn_now_ns() + PATIENCE_NS,
        .done = move_done,
    };
    call_engine_begins(call);
    attn_status status = dp_sequence_move(server_get_parts(call->server)->engine, call->tenant, &state->move);
    state->in_flight = !attn_failed(status);
    if (attn_failed(status)) call_engine_refused(call);
    return status;
}

static void move_start(call *call) {
    attn_status status = start_move(call);
    if (attn_failed(status)) {
        call_finish(call, status, NULL, 0);
    } else if (!call_has_news(call)) {
        call_watch(call);
    }
}

static void respond(call *call) {
    const move_state *state = call->state;
    Attnd__V1__MoveSequenceResponse response = ATTND__V1__MOVE_SEQUENCE_RESPONSE__INIT;
    response.tokens = state->move.tokens;
    response.bytes = state->move.bytes;
    call_respond(call, &response.base);
}

static void move_run(call *call, uint32_t events) {
    move_state *state = call->state;
    if (events & CALL_DONE) {
        state->in_flight = false;
        if (state->outcome.code == ATTN_OK) {
            respond(call);
        } else {
            call_finish(call, attn_status_view(&state->outcome), NULL, 0);
        }
    } else if ((events & CALL_CLOSED) && state->in_flight) {
        dp_move_cancel(server_get_parts(call->server)->engine, &state->move);
    }
}

const rpc rpc_move_sequence = {
    .path = "/attnd.v1.Attention/MoveSequence",
    .method = ATTN_METHOD_MOVE_SEQUENCE,
    .request = &attnd__v1__move_sequence_request__descriptor,
    .aborted_may_retry = true,
    .slots = 4,
    .state_bytes = sizeof(move_state),
    .start = move_start,
    .run = move_run,
};
