/*
 * Every RPC of a real server: small, in this process, called over a unix socket.
 *
 * Input: records of one byte method, one byte flags, two bytes length, and a request message.
 * Records of a stream's method go to the same stream until one says otherwise. What a fuzzer
 * cannot guess it is given, where the flags say so: handles below 64 become those of open sequences, a
 * step becomes the one that the server named last, and tensors get the size that fits.
 *
 * What must hold: every call ends, none with INTERNAL or UNKNOWN, and when everything is closed
 * again every page is free. Arithmetic is not checked here.
 */
#define _GNU_SOURCE

#include <string.h>
#include <time.h>
#include <unistd.h>

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>

#include "proto/attnd.pb-c.h"
#include "service/server.h"
#include "tests/fuzz/fuzz.h"

/* Flags of a record. */
enum {
    KNOWN_HANDLES = 1, /* put in handles and steps that exist */
    FIT_TENSORS = 2,   /* give the tensors their right size */
    NEW_STREAM = 4,    /* do not go on with the open stream */
    CANCEL = 8,        /* end the stream that was open by cancelling it */
    SHORT_DEADLINE = 16,
};

enum { DECODE, DECODE_STREAM, APPEND_KV, OPEN, FORK, TRUNCATE, CLOSE, DESCRIBE, INFO, HEALTH, MOVE, METHODS };

static const struct {
    const char *path;
    const ProtobufCMessageDescriptor *request; /* NULL: sent as it is */
} methods[METHODS] = {
    [DECODE] = {"/attnd.v1.Attention/Decode", &attnd__v1__decode_request__descriptor},
    [DECODE_STREAM] = {"/attnd.v1.Attention/DecodeStream", &attnd__v1__decode_stream_request__descriptor},
    [APPEND_KV] = {"/attnd.v1.Attention/AppendKv", &attnd__v1__append_kv_request__descriptor},
    [OPEN] = {"/attnd.v1.Attention/OpenSequences", &attnd__v1__open_sequences_request__descriptor},
    [FORK] = {"/attnd.v1.Attention/ForkSequence", &attnd__v1__fork_sequence_request__descriptor},
    [TRUNCATE] = {"/attnd.v1.Attention/TruncateSequence", &attnd__v1__truncate_sequence_request__descriptor},
    [CLOSE] = {"/attnd.v1.Attention/CloseSequences", &attnd__v1__close_sequences_request__descriptor},
    [DESCRIBE] = {"/attnd.v1.Attention/DescribeSequences", &attnd__v1__describe_sequences_request__descriptor},
    [INFO] = {"/attnd.v1.Attention/GetServerInfo", NULL},
    [HEALTH] = {"/grpc.health.v1.Health/Check", NULL},
    [MOVE] = {"/attnd.v1.Attention/MoveSequence", &attnd__v1__move_sequence_request__descriptor},
};

/* A query row is 2 heads * 32 * 2 bytes, a key or value row half of it. */
#define CONFIG                                                                                                         \
    "geometry: {layers: 2, heads_q: 2, heads_kv: 1, head_dim: 32, dtype: bf16, page_size: 16}\n"                       \
    "ranks: {count: 2, backend: cpu, threads: 1, pages: 8}\n"                                                          \
    "limits: {max_batch: 8, max_sequences: 16, max_sequence_tokens: 2000, max_queue: 4, max_message_mb: 1}\n"          \
    "log: {level: 'off'}\n"

#define QUERY_ROW_BYTES 128
#define KEY_ROW_BYTES   64
#define RANKS           2
#define PAGES           8
#define HANDLES_MAX     512
#define TENSOR_MAX      (64 << 10)
#define RECORDS_MAX     32
#define PATIENCE_S      20

/* ------------------------------------------------------------------------------------------- */
/* The server */

static dp_engine *engine;
static server *served;
static grpc_channel *channel;
static grpc_completion_queue *queue;

static void no_rank(void *context, uint32_t rank, attn_metrics_rank *values) {
    (void)context;
    (void)rank;
    memset(values, 0, sizeof(*values));
}

static void no_totals(void *context, attn_metrics_totals *values) {
    (void)context;
    memset(values, 0, sizeof(*values));
}

static bool is_serving(void *context) {
    (void)context;
    return true;
}

static void must(attn_status status) {
    if (!attn_failed(status)) return;
    fprintf(stderr, "set-up: %s\n", status.message);
    abort();
}

static void connect_to(const char *address) {
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    channel = grpc_channel_create(address, credentials, NULL);
    grpc_channel_credentials_release(credentials);
    queue = grpc_completion_queue_create_for_next(NULL);
}

static void start_server(void) {
    static attn_config config;
    static server_parts parts;
    char folder[] = "/tmp/attnd-fuzz-XXXXXX";
    char yaml[1024];
    FUZZ_CHECK(mkdtemp(folder) != NULL);
    int length =
        snprintf(yaml, sizeof(yaml), "server: {listen: ['unix:%s/socket'], cq_threads: 1}\n%s", folder, CONFIG);
    must(attn_config_parse(yaml, (size_t)length, "fuzz", &config));
    attn_log_set_level(config.log_level);
    dp_config engine_config = {
        .geometry = config.geometry,
        .backend = config.backend,
        .ranks = config.ranks,
        .workers_per_rank = config.threads,
        .pages_per_rank = config.pages,
        .max_sequences = config.max_sequences,
        .max_batch = config.max_batch,
        .max_sequence_tokens = config.max_sequence_tokens,
        .max_queue = config.max_queue,
        .tenants = 1,
    };
    attn_metrics_source source = {.ranks = 0,
                                  .rank = no_rank,
                                  .totals = no_totals,
                                  .serving = is_serving,
                                  .version = "",
                                  .backend = "",
                                  .instance = ""};
    parts = (server_parts){.config = &config, .backend = "cpu", .instance = "fuzz"};
    must(dp_engine_create(&engine_config, &engine));
    must(attn_auth_create(NULL, 0, NULL, (attn_auth **)(uintptr_t)&parts.auth));
    must(attn_metrics_create(&source, &parts.metrics));
    parts.engine = engine;
    grpc_init();
    must(server_create(&parts, &served));
    must(server_start(served));
    connect_to(config.listen[0]);
}

/* ------------------------------------------------------------------------------------------- */
/* What the server has told */

static uint64_t handles[HANDLES_MAX];
static size_t handle_count;
static uint64_t last_step;
static uint64_t steps[RECORDS_MAX];
static size_t step_count;

static void note_handle(uint64_t handle) {
    if (handle_count < HANDLES_MAX) handles[handle_count++] = handle;
}

static void note_response(int method, const uint8_t *bytes, size_t size) {
    if (method == OPEN) {
        Attnd__V1__OpenSequencesResponse *message = attnd__v1__open_sequences_response__unpack(NULL, size, bytes);
        FUZZ_CHECK(message != NULL);
        for (size_t i = 0; i < message->n_sequences; i++) {
            note_handle(message->sequences[i]);
        }
        attnd__v1__open_sequences_response__free_unpacked(message, NULL);
    } else if (method == FORK) {
        Attnd__V1__ForkSequenceResponse *message = attnd__v1__fork_sequence_response__unpack(NULL, size, bytes);
        FUZZ_CHECK(message != NULL);
        note_handle(message->sequence);
        attnd__v1__fork_sequence_response__free_unpacked(message, NULL);
    } else if (method == DECODE || method == DECODE_STREAM) {
        Attnd__V1__DecodeResponse *message = attnd__v1__decode_response__unpack(NULL, size, bytes);
        FUZZ_CHECK(message != NULL);
        if (message->step != 0) last_step = message->step;
        if (message->step != 0 && method == DECODE && step_count < RECORDS_MAX) steps[step_count++] = message->step;
        attnd__v1__decode_response__free_unpacked(message, NULL);
    }
}

static void note_buffer(int method, grpc_byte_buffer *buffer) {
    grpc_byte_buffer_reader reader;
    if (buffer == NULL) return;
    FUZZ_CHECK(grpc_byte_buffer_reader_init(&reader, buffer));
    grpc_slice whole = grpc_byte_buffer_reader_readall(&reader);
    note_response(method, GRPC_SLICE_START_PTR(whole), GRPC_SLICE_LENGTH(whole));
    grpc_slice_unref(whole);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);
}

/* ------------------------------------------------------------------------------------------- */
/* Making a message meaningful */

static uint64_t known_handle(uint64_t value) {
    return value < 64 && handle_count > 0 ? handles[value % handle_count] : value;
}

static void put_known_handles(uint64_t *values, size_t count) {
    for (size_t i = 0; i < count; i++) {
        values[i] = known_handle(values[i]);
    }
}

static void put_known(int method, ProtobufCMessage *message) {
    if (method == DECODE) {
        Attnd__V1__DecodeRequest *request = (Attnd__V1__DecodeRequest *)message;
        put_known_handles(request->sequences, request->n_sequences);
        if (request->step != 0) request->step = last_step;
    } else if (method == DECODE_STREAM) {
        Attnd__V1__StepBegin *begin = ((Attnd__V1__DecodeStreamRequest *)message)->begin;
        if (begin != NULL) put_known_handles(begin->sequences, begin->n_sequences);
    } else if (method == APPEND_KV) {
        Attnd__V1__AppendKvBegin *begin = ((Attnd__V1__AppendKvRequest *)message)->begin;
        if (begin != NULL) begin->sequence = known_handle(begin->sequence);
    } else if (method == FORK) {
        put_known_handles(&((Attnd__V1__ForkSequenceRequest *)message)->sequence, 1);
    } else if (method == TRUNCATE) {
        put_known_handles(&((Attnd__V1__TruncateSequenceRequest *)message)->sequence, 1);
    } else if (method == CLOSE) {
        Attnd__V1__CloseSequencesRequest *request = (Attnd__V1__CloseSequencesRequest *)message;
        put_known_handles(request->sequences, request->n_sequences);
    } else if (method == DESCRIBE) {
        Attnd__V1__DescribeSequencesRequest *request = (Attnd__V1__DescribeSequencesRequest *)message;
        put_known_handles(request->sequences, request->n_sequences);
    } else if (method == MOVE) {
        put_known_handles(&((Attnd__V1__MoveSequenceRequest *)message)->sequence, 1);
    }
}

static void fit(ProtobufCBinaryData *tensor, bool present, uint64_t rows, size_t row_bytes) {
    uint64_t size = rows * row_bytes;
    if (!present || size == tensor->len || size > TENSOR_MAX) return;
    tensor->data = realloc(tensor->data, size + 1);
    if (size > tensor->len) memset(tensor->data + tensor->len, 0x3c, size - tensor->len);
    tensor->len = size;
}

static uint64_t rows_of(size_t sequences, const uint32_t *query_lengths, size_t n_query_lengths) {
    uint64_t rows = 0;
    for (size_t i = 0; i < n_query_lengths; i++) {
        rows += query_lengths[i];
    }
    return n_query_lengths > 0 ? rows : sequences;
}

/* `rows` is that of the step that is open, if the message does not begin one. */
static void fit_tensors(int method, ProtobufCMessage *message, uint64_t *rows) {
    if (method == DECODE) {
        Attnd__V1__DecodeRequest *request = (Attnd__V1__DecodeRequest *)message;
        if (request->n_sequences > 0) {
            *rows = rows_of(request->n_sequences, request->query_lengths, request->n_query_lengths);
        }
        fit(&request->q, request->q_place_case != 0, *rows, QUERY_ROW_BYTES);
        fit(&request->k, request->k_place_case != 0, *rows, KEY_ROW_BYTES);
        fit(&request->v, request->v_place_case != 0, *rows, KEY_ROW_BYTES);
    } else if (method == DECODE_STREAM) {
        Attnd__V1__DecodeStreamRequest *request = (Attnd__V1__DecodeStreamRequest *)message;
        const Attnd__V1__StepBegin *begin = request->begin;
        if (begin != NULL) *rows = rows_of(begin->n_sequences, begin->query_lengths, begin->n_query_lengths);
        fit(&request->q, request->q_place_case != 0, *rows, QUERY_ROW_BYTES);
        fit(&request->k, request->k_place_case != 0, *rows, KEY_ROW_BYTES);
        fit(&request->v, request->v_place_case != 0, *rows, KEY_ROW_BYTES);
    } else if (method == APPEND_KV) {
        Attnd__V1__AppendKvRequest *request = (Attnd__V1__AppendKvRequest *)message;
        fit(&request->k, request->k_place_case != 0, request->tokens, KEY_ROW_BYTES);
        fit(&request->v, request->v_place_case != 0, request->tokens, KEY_ROW_BYTES);
    }
}

/* The message to send: as it is, or unpacked, completed and packed again. */
static grpc_byte_buffer *make_request(int method, int flags, const uint8_t *bytes, size_t size) {
    static uint64_t rows; /* of the step that was begun last */
    ProtobufCMessage *message = NULL;
    if ((flags & (KNOWN_HANDLES | FIT_TENSORS)) != 0 && methods[method].request != NULL) {
        message = protobuf_c_message_unpack(methods[method].request, NULL, size, bytes);
    }
    if (message == NULL) {
        grpc_slice slice = grpc_slice_from_copied_buffer((const char *)bytes, size);
        grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
        grpc_slice_unref(slice);
        return buffer;
    }
    if ((flags & KNOWN_HANDLES) != 0) put_known(method, message);
    if ((flags & FIT_TENSORS) != 0) fit_tensors(method, message, &rows);
    grpc_slice slice = grpc_slice_malloc_large(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    protobuf_c_message_free_unpacked(message, NULL);
    return buffer;
}

/* ------------------------------------------------------------------------------------------- */
/* Calls */

typedef struct {
    grpc_call *call; /* NULL: none */
    int method;
    bool greeted; /* the initial metadata is out */
    grpc_byte_buffer *response;
    grpc_metadata_array initial, trailing;
    grpc_status_code status;
    grpc_slice details;
} client_call;

/* Starts a batch and waits for it. False if it failed. */
static bool run_batch(client_call *call, const grpc_op *operations, size_t count) {
    FUZZ_CHECK(grpc_call_start_batch(call->call, operations, count, call, NULL) == GRPC_CALL_OK);
    gpr_timespec limit = gpr_time_add(gpr_now(GPR_CLOCK_REALTIME), gpr_time_from_seconds(PATIENCE_S, GPR_TIMESPAN));
    grpc_event event = grpc_completion_queue_next(queue, limit, NULL);
    FUZZ_CHECK(event.type == GRPC_OP_COMPLETE); /* else a call hangs */
    FUZZ_CHECK(event.tag == call);
    return event.success != 0;
}

static void open_call(client_call *call, int method, int flags) {
    gpr_timespec deadline = gpr_inf_future(GPR_CLOCK_REALTIME);
    if ((flags & SHORT_DEADLINE) != 0) {
        deadline = gpr_time_add(gpr_now(GPR_CLOCK_REALTIME), gpr_time_from_micros(500, GPR_TIMESPAN));
    } else if (method == MOVE) { /* it may wait for a step, which nobody here ends meanwhile */
        deadline = gpr_time_add(gpr_now(GPR_CLOCK_REALTIME), gpr_time_from_millis(5, GPR_TIMESPAN));
    }
    *call = (client_call){.method = method};
    call->call = grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, queue,
                                          grpc_slice_from_static_string(methods[method].path), NULL, deadline, NULL);
    grpc_metadata_array_init(&call->initial);
    grpc_metadata_array_init(&call->trailing);
}

static grpc_op receive_status(client_call *call) {
    return (grpc_op){.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                     .data.recv_status_on_client = {.trailing_metadata = &call->trailing,
                                                    .status = &call->status,
                                                    .status_details = &call->details}};
}

static void end_call(client_call *call) {
    if (call->status == GRPC_STATUS_INTERNAL || call->status == GRPC_STATUS_UNKNOWN) {
        char *details = grpc_slice_to_c_string(call->details);
        fprintf(stderr, "%s: status %d: %s\n", methods[call->method].path, call->status, details);
        abort();
    }
    grpc_metadata_array_destroy(&call->initial);
    grpc_metadata_array_destroy(&call->trailing);
    grpc_slice_unref(call->details);
    grpc_call_unref(call->call);
    call->call = NULL;
}

static void run_unary(int method, int flags, grpc_byte_buffer *request) {
    client_call call;
    open_call(&call, method, flags);
    grpc_op operations[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA, .data.recv_initial_metadata.recv_initial_metadata = &call.initial},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call.response},
        receive_status(&call),
    };
    run_batch(&call, operations, 6);
    FUZZ_CHECK(call.status != GRPC_STATUS_OK || call.response != NULL);
    if (call.status == GRPC_STATUS_OK) {
        note_buffer(method, call.response);
    } else if (call.response != NULL) {
        grpc_byte_buffer_destroy(call.response);
    }
    end_call(&call);
}

/* Ends the open stream, if there is one, and takes what still comes. */
static void end_stream(client_call *stream, int flags) {
    if (stream->call == NULL) return;
    if ((flags & CANCEL) != 0) grpc_call_cancel(stream->call, NULL);
    bool upload = stream->method == APPEND_KV;
    grpc_op operations[4] = {{.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, receive_status(stream)};
    size_t count = 2;
    if (upload) {
        operations[count++] =
            (grpc_op){.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &stream->response};
        operations[count++] = (grpc_op){.op = GRPC_OP_RECV_INITIAL_METADATA,
                                        .data.recv_initial_metadata.recv_initial_metadata = &stream->initial};
    }
    run_batch(stream, operations, count);
    if (stream->response != NULL) grpc_byte_buffer_destroy(stream->response);
    end_call(stream);
}

/* One message; a DecodeStream answers each, or ends. */
static void send_on_stream(client_call *stream, int flags, grpc_byte_buffer *request) {
    grpc_op operations[4] = {{.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request}};
    size_t count = 1;
    bool answered = stream->method == DECODE_STREAM;
    if (!stream->greeted) operations[count++] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    if (answered) {
        operations[count++] =
            (grpc_op){.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &stream->response};
        if (!stream->greeted) {
            operations[count++] = (grpc_op){.op = GRPC_OP_RECV_INITIAL_METADATA,
                                            .data.recv_initial_metadata.recv_initial_metadata = &stream->initial};
        }
    }
    stream->greeted = true;
    bool alive = run_batch(stream, operations, count);
    bool has_answer = stream->response != NULL;
    note_buffer(stream->method, stream->response);
    stream->response = NULL;
    if (!alive || (answered && !has_answer)) end_stream(stream, flags);
}

static void run_record(client_call *stream, int method, int flags, const uint8_t *bytes, size_t size) {
    grpc_byte_buffer *request = make_request(method, flags, bytes, size);
    if (method == DECODE_STREAM || method == APPEND_KV) {
        if (stream->call != NULL && (stream->method != method || (flags & NEW_STREAM) != 0)) end_stream(stream, flags);
        if (stream->call == NULL) open_call(stream, method, flags);
        send_on_stream(stream, flags, request);
    } else {
        run_unary(method, flags, request);
    }
    grpc_byte_buffer_destroy(request);
}

/* ------------------------------------------------------------------------------------------- */
/* Afterwards */

static bool all_is_free(void) {
    dp_engine_counts counts;
    dp_engine_count(engine, &counts);
    if (counts.sequences != 0 || counts.steps != 0) return false;
    for (uint32_t rank = 0; rank < RANKS; rank++) {
        dp_rank_info info;
        dp_engine_rank_info(engine, rank, &info);
        FUZZ_CHECK(info.pages_total == PAGES && info.state == DP_RANK_SERVING);
        if (info.pages_free != PAGES || info.tokens != 0 || info.tokens_in_flight != 0) return false;
    }
    return true;
}

/* Steps that nobody took further, and the sequences; a call that was cut off may still be at work on them. */
static void close_everything(void) {
    struct timespec pause = {.tv_nsec = 200000};
    for (int tries = 0; tries < PATIENCE_S * 5000; tries++) {
        for (size_t i = 0; i < step_count; i++) {
            dp_step *step;
            if (!attn_failed(dp_step_take(engine, 0, steps[i], &step))) dp_step_end(step);
        }
        for (size_t i = 0; i < handle_count; i++) {
            (void)dp_sequences_close(engine, 0, &handles[i], 1);
        }
        if (all_is_free()) return;
        nanosleep(&pause, NULL);
    }
    FUZZ_CHECK(all_is_free());
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    client_call stream = {0};
    int flags = 0;
    if (served == NULL) start_server();
    handle_count = step_count = 0;
    last_step = 0;
    for (int record = 0; record < RECORDS_MAX && size >= 4; record++) {
        int method = input[0] % METHODS;
        size_t length = (size_t)(input[2] | input[3] << 8);
        flags = input[1];
        input += 4;
        size -= 4;
        if (length > size) length = size;
        /* Handles of calls that are cut off would be lost: let opening and forking take its time. */
        if (method == OPEN || method == FORK || method == DECODE) flags &= ~SHORT_DEADLINE;
        run_record(&stream, method, flags, input, length);
        input += length;
        size -= length;
    }
    end_stream(&stream, flags);
    close_everything();
    return 0;
}
