/*
 * ExportKv: stored keys and values of a range of a sequence's tokens, in chunks, layer after layer.
 *
 * While a chunk is on its way to the client the next one is read; a client that does not read costs those two.
 *
 *   engine -> ready -> call_send -> SENT
 */
#include <stdlib.h>
#include <string.h>

#include "proto/attnd.pb-c.h"
#include "service/layer.h"
#include "service/rpcs.h"
#include "service/server.h"

#define CHUNK_BYTES  ((size_t)1 << 20) /* of keys and values in a message, if that is a token or more */
#define CHUNK_SLICES 4

typedef struct {
    dp_export_chunk chunk; /* must stay first: the engine's callback is given its address */
    call *call;
    dp_export *export;
    bool in_flight;            /* CALL_DONE is to come */
    grpc_slice keys, values;   /* of the chunk in flight, or of the one that waits */
    attn_saved_status outcome; /* of the chunk last read, or not */
    bool ready;                /* a chunk waits to be sent */
    bool sending;
    bool broken;           /* a send has failed: CALL_CLOSED is on its way */
    bool ended;            /* all chunks are read */
    bool failed;           /* the call ends with `outcome`, once what is being sent is sent */
    uint32_t next_layer;   /* of the next chunk.. */
    uint64_t next_offset;  /* ..and where it begins */
    uint32_t chunk_tokens; /* of a chunk at most */
} export_state;

static const attn_geometry *geometry_of(const call *call) { return &server_get_parts(call->server)->config->geometry; }

static void drop_chunk(export_state *state) {
    grpc_slice_unref(state->keys);
    grpc_slice_unref(state->values);
    state->keys = state->values = grpc_empty_slice();
}

static void finish(call *call, attn_status status) {
    export_state *state = call->state;
    if (state->export != NULL) dp_export_end(state->export);
    state->export = NULL;
    drop_chunk(state);
    call_finish(call, status, NULL, 0);
}

/* ------------------------------------------------------------------------------------------- */
/* Chunks */

static size_t chunk_bytes(const call *call, uint32_t tokens) {
    return tokens * (attn_key_row_bytes(geometry_of(call)) + attn_value_row_bytes(geometry_of(call)));
}

static void chunk_done(dp_export_chunk *chunk, attn_status status) {
    export_state *state = (void *)chunk;
    size_t bytes = chunk_bytes(state->call, chunk->tokens);
    if (attn_failed(status)) {
        attn_status_save(&state->outcome, status);
    } else {
        state->outcome.code = ATTN_OK;
    }
    call_post_from_engine(state->call, bytes);
}

/* Gives the next chunk to the engine. There is one. */
static attn_status read_chunk(call *call) {
    export_state *state = call->state;
    uint64_t left = dp_export_tokens(state->export) - state->next_offset;
    uint32_t tokens = left < state->chunk_tokens ? (uint32_t)left : state->chunk_tokens;
    state->keys = grpc_slice_malloc(tokens * attn_key_row_bytes(geometry_of(call)));
    state->values = grpc_slice_malloc(tokens * attn_value_row_bytes(geometry_of(call)));
    state->chunk = (dp_export_chunk){
        .layer = state->next_layer,
        .token_offset = state->next_offset,
        .tokens = tokens,
        .keys = GRPC_SLICE_START_PTR(state->keys),
        .values = GRPC_SLICE_START_PTR(state->values),
        .done = chunk_done,
    };
    call_engine_begins(call);
    attn_status status = dp_export_read(state->export, &state->chunk);
    if (attn_failed(status)) {
        call_engine_refused(call);
        return status;
    }
    state->in_flight = true;
    return attn_ok();
}

/* After the chunk has been read: where the next one begins. */
static void go_on(call *call) {
    export_state *state = call->state;
    state->next_offset += state->chunk.tokens;
    if (state->next_offset < dp_export_tokens(state->export)) return;
    state->next_offset = 0;
    state->next_layer++;
    state->ended = state->next_layer == geometry_of(call)->layers;
}

static void describe_range(const call *call, Attnd__V1__ExportKvResponse *response) {
    attnd__v1__export_kv_response__init(response);
    response->total = dp_export_tokens(((const export_state *)call->state)->export);
    response->dtype = (Attnd__V1__DType)geometry_of(call)->dtype;
}

/* A slice of a packed message, if there is one, and the tag and length of a field that goes on in the next slice. */
static grpc_slice head_of(const ProtobufCMessage *message, uint32_t field, size_t length) {
    uint8_t tag[WIRE_LENGTH_BYTES];
    size_t tag_size = wire_put_length(tag, field, length);
    size_t size = message != NULL ? protobuf_c_message_get_packed_size(message) : 0;
    grpc_slice slice = grpc_slice_malloc(size + tag_size);
    uint8_t *bytes = GRPC_SLICE_START_PTR(slice);
    if (message != NULL) protobuf_c_message_pack(message, bytes);
    memcpy(bytes + size, tag, tag_size);
    return slice;
}

static void send_chunk(call *call) {
    export_state *state = call->state;
    Attnd__V1__ExportKvResponse response;
    describe_range(call, &response);
    response.layer = state->chunk.layer;
    response.token_offset = state->chunk.token_offset;
    response.tokens = state->chunk.tokens;
    grpc_slice slices[CHUNK_SLICES] = {
        head_of(&response.base, 17, GRPC_SLICE_LENGTH(state->keys)),
        state->keys,
        head_of(NULL, 18, GRPC_SLICE_LENGTH(state->values)),
        state->values,
    };
    state->keys = state->values = grpc_empty_slice();
    state->ready = false;
    state->sending = true;
    call_send(call, slices, CHUNK_SLICES);
}

/* ------------------------------------------------------------------------------------------- */
/* The stream */

/* Sends what is ready, and reads the next chunk meanwhile; or ends. With nothing in flight. */
static void advance(call *call) {
    export_state *state = call->state;
    if (state->ready && !state->sending) send_chunk(call);
    if (!state->ready && !state->ended && !state->failed) {
        attn_status status = read_chunk(call);
        state->failed = attn_failed(status);
        if (state->failed) attn_status_save(&state->outcome, status);
    }
    if (state->sending || state->in_flight) return;
    if (state->failed) {
        finish(call, attn_status_view(&state->outcome));
    } else if (state->ended) {
        finish(call, attn_ok());
    }
}

/* The slices that a lost rank may still write to. */
typedef struct {
    grpc_slice keys, values;
} detained_slices;

static void release_slices(void *context) {
    detained_slices *slices = context;
    grpc_slice_unref(slices->keys);
    grpc_slice_unref(slices->values);
    free(slices);
}

/* Has the engine keep the chunk's slices. Without memory for that they are never freed, which is safe. */
static void detain_chunk(export_state *state) {
    detained_slices *slices = malloc(sizeof *slices);
    if (slices != NULL) {
        *slices = (detained_slices){.keys = state->keys, .values = state->values};
        dp_export_keep(state->export, (dp_keep){.release = release_slices, .context = slices});
    }
    state->keys = state->values = grpc_empty_slice();
}

static void note_done(call *call) {
    export_state *state = call->state;
    state->in_flight = false;
    if (state->chunk.detained) detain_chunk(state);
    state->failed = state->outcome.code != ATTN_OK;
    state->ready = !state->failed;
    if (state->ready) go_on(call);
}

static void export_run(call *call, uint32_t events) {
    export_state *state = call->state;
    if (call->finished) return;
    if (events & CALL_SENT) {
        state->sending = false;
        state->broken |= !call->sent_ok;
    }
    if (events & CALL_DONE) note_done(call);
    if (state->in_flight) return;
    if (call->closed) {
        finish(call, attn_error(ATTN_CANCELLED, "the client is gone"));
    } else if (!state->broken) {
        advance(call);
    }
}

/* An empty range: what it is, and nothing else. */
static void answer_empty(call *call) {
    export_state *state = call->state;
    Attnd__V1__ExportKvResponse response;
    describe_range(call, &response);
    grpc_slice slice = call_pack(&response.base);
    dp_export_end(state->export);
    state->export = NULL;
    call_finish(call, attn_ok(), &slice, 1);
}

static attn_status begin(call *call) {
    export_state *state = call->state;
    wire_message message;
    ATTN_TRY(call_read(call, call->payload, &message));
    const Attnd__V1__ExportKvRequest *request = (const Attnd__V1__ExportKvRequest *)message.message;
    size_t row_bytes = chunk_bytes(call, 1);
    state->chunk_tokens = CHUNK_BYTES > row_bytes ? (uint32_t)(CHUNK_BYTES / row_bytes) : 1;
    return dp_export_begin(server_get_parts(call->server)->engine, call->tenant, request->sequence, request->position,
                           request->tokens, &state->export);
}

static void export_start(call *call) {
    export_state *state = call->state;
    *state = (export_state){.call = call, .keys = grpc_empty_slice(), .values = grpc_empty_slice()};
    attn_status status = begin(call);
    if (attn_failed(status)) {
        finish(call, status);
    } else if (dp_export_tokens(state->export) == 0) {
        answer_empty(call);
    } else {
        call_watch(call);
        advance(call);
    }
}

const rpc rpc_export_kv = {
    .path = "/attnd.v1.Attention/ExportKv",
    .method = ATTN_METHOD_EXPORT_KV,
    .request = &attnd__v1__export_kv_request__descriptor,
    .slots = 4,
    .state_bytes = sizeof(export_state),
    .start = export_start,
    .run = export_run,
};
