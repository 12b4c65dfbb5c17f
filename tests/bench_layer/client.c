/*
 * The layer bench's client: one layer call of one DecodeStream at a time, on the gRPC C core, with as little of its
 * own as possible.
 *
 *   client ADDRESS
 *
 * It does what each line on standard input says, and answers on standard output:
 *   open BATCH CONTEXT      opens sequences and uploads CONTEXT tokens of every layer to each
 *                           -> prefilled DONE BATCH, after each sequence
 *   run SECONDS CALLS       steps of one token a sequence, for so long and for so many layer calls at least
 *                           -> plain CALL_US, for a call that did not ask the server for its timing, or
 *                              timed CALL_US QUEUE COPY_IN PLAN ATTENTION COMBINE COPY_OUT DEVICE, microseconds, of the
 *                              rank that took longest; then: end
 *   close                   closes the sequences -> closed
 *
 * A call lasts from before the request is handed to gRPC to its whole response being there. Steps are announced by a
 * message of their own, every other one with the server's timing. Between steps the sequences are cut back to CONTEXT
 * tokens now and then.
 *
 * All value rows are the same, so every output is that row, whatever the scores: the first answer after `open` is
 * compared with it.
 */
#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>

#include "base/clock.h"
#include "proto/attnd.pb-c.h"
#include "tests/bench_front/bench.h"
#include "tests/bench_front/messages.h"

#define METHOD(name)     "/attnd.v1.Attention/" name
#define CHUNK_BYTES      ((size_t)2 << 20) /* of an upload: keys and values */
#define GROWTH_TOKENS    64                /* beyond CONTEXT, before it is cut back: run.py counts on it */
#define WARM_UP_STEPS    4
#define FIELD_Q          16
#define FIELD_K          17
#define FIELD_V          18
#define OUT_TOLERANCE    (1.0f / 64) /* relative; of an output whose rows are all equal */
#define STREAM_SLICES    6
#define TIMING_PARTS     7
#define FIRST_CAPACITY   4096
#define LOOK_AHEAD_BYTES (8 << 20)

/* Only one is under way at a time. */
typedef struct {
    grpc_call *call;
    grpc_metadata_array initial, trailing;
    grpc_status_code status;
    grpc_slice details;
    grpc_byte_buffer *response;
    bool begun; /* the metadata are out */
} rpc;

typedef struct {
    uint32_t layers;
    uint32_t heads_q, heads_kv;
    uint32_t head_dim, head_dim_v;
    Attnd__V1__DType dtype;
} geometry;

/* Rows of one upload's chunk, and of one step. */
typedef struct {
    uint32_t tokens;
    grpc_slice keys, values;
} kv_rows;

typedef struct {
    double call_us;
    bool timed;
    float parts[TIMING_PARTS]; /* as `run` prints them */
} sample;

static grpc_channel *channel;
static grpc_completion_queue *queue;
static geometry model;

static struct {
    uint64_t *handles; /* [count] */
    uint32_t count;
    uint32_t context, length; /* of each */
    bool checked;             /* an output was looked into */
    rpc stream;               /* from the first step on */
    grpc_slice queries;
    kv_rows new_rows;
} batch;

static struct {
    sample *items; /* [capacity] */
    size_t count, capacity;
} samples;

/* ------------------------------------------------------------------------------------------- */
/* Calls */

static void rpc_create(rpc *made, const char *method) {
    *made = (rpc){.details = grpc_empty_slice()};
    made->call =
        grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, queue, grpc_slice_from_static_string(method),
                                 NULL, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    grpc_metadata_array_init(&made->initial);
    grpc_metadata_array_init(&made->trailing);
}

static void rpc_destroy(rpc *ended) {
    grpc_metadata_array_destroy(&ended->initial);
    grpc_metadata_array_destroy(&ended->trailing);
    grpc_slice_unref(ended->details);
    grpc_call_unref(ended->call);
    *ended = (rpc){0};
}

/* Runs one batch of operations to its end; false if it failed, as the call then has. */
static bool rpc_run(rpc *on, const grpc_op *operations, size_t count) {
    grpc_call_error error = grpc_call_start_batch(on->call, operations, count, on, NULL);
    BENCH_CHECK(error == GRPC_CALL_OK, "grpc_call_start_batch: %s", grpc_call_error_to_string(error));
    grpc_event event = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    BENCH_CHECK(event.type == GRPC_OP_COMPLETE && event.tag == on, "the queue ended");
    return event.success != 0;
}

static grpc_op send_message(grpc_byte_buffer *request) {
    return (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request};
}

static grpc_op receive_message(rpc *on) {
    return (grpc_op){.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &on->response};
}

static grpc_op receive_metadata(rpc *on) {
    return (grpc_op){.op = GRPC_OP_RECV_INITIAL_METADATA,
                     .data.recv_initial_metadata.recv_initial_metadata = &on->initial};
}

static grpc_op receive_status(rpc *on) {
    return (grpc_op){.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                     .data.recv_status_on_client = {
                         .trailing_metadata = &on->trailing, .status = &on->status, .status_details = &on->details}};
}

static void check_status(const rpc *ended, const char *what) {
    if (ended->status == GRPC_STATUS_OK) return;
    char *details = grpc_slice_to_c_string(ended->details);
    BENCH_CHECK(false, "%s: status %d: %s", what, ended->status, details);
}

/* The response of a unary call; the caller frees it. */
static void *call_once(const char *method, const ProtobufCMessage *request,
                       const ProtobufCMessageDescriptor *response) {
    rpc unary;
    grpc_byte_buffer *packed = bench_pack(request);
    rpc_create(&unary, method);
    grpc_op operations[] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                            send_message(packed),
                            {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                            receive_metadata(&unary),
                            receive_message(&unary),
                            receive_status(&unary)};
    rpc_run(&unary, operations, sizeof operations / sizeof operations[0]);
    grpc_byte_buffer_destroy(packed);
    check_status(&unary, method);
    void *message = bench_unpack(response, unary.response);
    grpc_byte_buffer_destroy(unary.response);
    rpc_destroy(&unary);
    return message;
}

/* ------------------------------------------------------------------------------------------- */
/* Tensors */

static size_t element_bytes(void) { return model.dtype == ATTND__V1__DTYPE__DTYPE_FP32 ? 4 : 2; }

/* +-2^-exponent, which every dtype has; exponent 0 .. 14. */
static void put_element(uint8_t *bytes, bool negative, uint32_t exponent) {
    uint32_t bits = (127 - exponent) << 23 | (negative ? 1u << 31 : 0);
    if (model.dtype == ATTND__V1__DTYPE__DTYPE_FP16) bits = ((15 - exponent) << 10 | (negative ? 1u << 15 : 0)) << 16;
    if (model.dtype != ATTND__V1__DTYPE__DTYPE_FP32) bits >>= 16;
    memcpy(bytes, &bits, element_bytes());
}

static float get_element(const uint8_t *bytes) {
    uint32_t bits = 0;
    float value;
    memcpy(&bits, bytes, element_bytes());
    if (model.dtype == ATTND__V1__DTYPE__DTYPE_FP16) {
        float magnitude = ldexpf(1.0f + (float)(bits & 0x3ff) / 1024.0f, (int)(bits >> 10 & 31) - 15);
        return bits >> 15 ? -magnitude : magnitude;
    }
    if (model.dtype == ATTND__V1__DTYPE__DTYPE_BF16) bits <<= 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* `rows` rows of `elements`; all different, or all equal. */
static grpc_slice make_rows(uint32_t rows, uint32_t elements, bool equal) {
    size_t element = element_bytes();
    grpc_slice slice = grpc_slice_malloc_large((size_t)rows * elements * element);
    uint8_t *bytes = GRPC_SLICE_START_PTR(slice);
    for (size_t i = 0; i < (size_t)rows * elements; i++) {
        uint32_t random = mix((uint32_t)(equal ? i % elements : i) + 1);
        put_element(bytes + i * element, random & 1, 1 + (random >> 1) % 3);
    }
    return slice;
}

static kv_rows make_kv_rows(uint32_t tokens) {
    return (kv_rows){.tokens = tokens,
                     .keys = make_rows(tokens, model.heads_kv * model.head_dim, false),
                     .values = make_rows(tokens, model.heads_kv * model.head_dim_v, true)};
}

static void free_kv_rows(kv_rows *rows) {
    grpc_slice_unref(rows->keys);
    grpc_slice_unref(rows->values);
}

/* The tag and length before a tensor that is not the first. */
static grpc_slice field_slice(uint32_t field, size_t size) {
    Attnd__V1__GetServerInfoRequest nothing = ATTND__V1__GET_SERVER_INFO_REQUEST__INIT;
    return bench_head_slice(&nothing.base, field, size);
}

/* A message with tensors behind it. The caller destroys the buffer. */
static grpc_byte_buffer *message_with_tensors(const ProtobufCMessage *message, const grpc_slice *tensors,
                                              const uint32_t *fields, size_t count) {
    grpc_slice slices[STREAM_SLICES];
    for (size_t i = 0; i < count; i++) {
        size_t size = GRPC_SLICE_LENGTH(tensors[i]);
        slices[2 * i] = i == 0 ? bench_head_slice(message, fields[i], size) : field_slice(fields[i], size);
        slices[2 * i + 1] = tensors[i];
    }
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(slices, 2 * count);
    for (size_t i = 0; i < count; i++)
        grpc_slice_unref(slices[2 * i]);
    return buffer;
}

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

static void learn_geometry(void) {
    Attnd__V1__GetServerInfoRequest request = ATTND__V1__GET_SERVER_INFO_REQUEST__INIT;
    Attnd__V1__GetServerInfoResponse *response =
        call_once(METHOD("GetServerInfo"), &request.base, &attnd__v1__get_server_info_response__descriptor);
    const Attnd__V1__Geometry *g = response->geometry;
    model = (geometry){.layers = g->layers,
                       .heads_q = g->heads_q,
                       .heads_kv = g->heads_kv,
                       .head_dim = g->head_dim,
                       .head_dim_v = g->head_dim_v,
                       .dtype = g->dtype};
    protobuf_c_message_free_unpacked(&response->base, NULL);
}

static void open_sequences(void) {
    Attnd__V1__OpenSequencesRequest request = ATTND__V1__OPEN_SEQUENCES_REQUEST__INIT;
    request.count = batch.count;
    Attnd__V1__OpenSequencesResponse *response =
        call_once(METHOD("OpenSequences"), &request.base, &attnd__v1__open_sequences_response__descriptor);
    BENCH_CHECK(response->n_sequences == batch.count, "%zu sequences", response->n_sequences);
    batch.handles = malloc(batch.count * sizeof *batch.handles);
    BENCH_CHECK(batch.handles != NULL, "no memory");
    memcpy(batch.handles, response->sequences, batch.count * sizeof *batch.handles);
    protobuf_c_message_free_unpacked(&response->base, NULL);
}

/* One message of an upload; false if the call has failed. */
static bool send_upload(rpc *upload, grpc_byte_buffer *request) {
    grpc_op operations[] = {send_message(request), {.op = GRPC_OP_SEND_INITIAL_METADATA}};
    bool good = rpc_run(upload, operations, upload->begun ? 1 : 2);
    upload->begun = true;
    grpc_byte_buffer_destroy(request);
    return good;
}

static void end_upload(rpc *upload) {
    grpc_op operations[] = {{.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                            receive_metadata(upload),
                            receive_message(upload),
                            receive_status(upload)};
    rpc_run(upload, operations, sizeof operations / sizeof operations[0]);
    check_status(upload, METHOD("AppendKv"));
    grpc_byte_buffer_destroy(upload->response);
    rpc_destroy(upload);
}

/* All tokens of all layers of one sequence, chunk by chunk. */
static void upload_sequence(uint64_t handle, const kv_rows *chunk) {
    static const uint32_t fields[] = {FIELD_K, FIELD_V};
    Attnd__V1__AppendKvBegin begin = ATTND__V1__APPEND_KV_BEGIN__INIT;
    Attnd__V1__AppendKvRequest request;
    rpc upload;
    attnd__v1__append_kv_request__init(&request);
    rpc_create(&upload, METHOD("AppendKv"));
    begin.sequence = handle;
    begin.tokens = batch.context;
    request.begin = &begin;
    bool good = send_upload(&upload, bench_pack(&request.base));
    request.begin = NULL;
    for (uint32_t layer = 0; layer < model.layers; layer++) {
        for (uint32_t first = 0; good && first < batch.context; first += chunk->tokens) {
            uint32_t left = batch.context - first;
            request.layer = layer;
            request.token_offset = first;
            request.tokens = left < chunk->tokens ? left : chunk->tokens;
            size_t key = GRPC_SLICE_LENGTH(chunk->keys) / chunk->tokens;
            size_t value = GRPC_SLICE_LENGTH(chunk->values) / chunk->tokens;
            grpc_slice tensors[] = {grpc_slice_sub_no_ref(chunk->keys, 0, request.tokens * key),
                                    grpc_slice_sub_no_ref(chunk->values, 0, request.tokens * value)};
            good = send_upload(&upload, message_with_tensors(&request.base, tensors, fields, 2));
        }
    }
    end_upload(&upload);
}

static void open_batch(uint32_t count, uint32_t context) {
    BENCH_CHECK(batch.count == 0 && count > 0, "a batch is open, or none was asked for");
    batch.count = count;
    batch.context = batch.length = context;
    batch.checked = false;
    batch.queries = make_rows(count, model.heads_q * model.head_dim, false);
    batch.new_rows = make_kv_rows(count);
    open_sequences();
    size_t token = (size_t)model.heads_kv * (model.head_dim + model.head_dim_v) * element_bytes();
    kv_rows chunk = make_kv_rows((uint32_t)(CHUNK_BYTES / token));
    for (uint32_t i = 0; i < count; i++) {
        if (context > 0) upload_sequence(batch.handles[i], &chunk);
        printf("prefilled %u %u\n", i + 1, count);
        fflush(stdout);
    }
    free_kv_rows(&chunk);
}

static void cut_back(void) {
    for (uint32_t i = 0; i < batch.count; i++) {
        Attnd__V1__TruncateSequenceRequest request = ATTND__V1__TRUNCATE_SEQUENCE_REQUEST__INIT;
        request.sequence = batch.handles[i];
        request.length = batch.context;
        Attnd__V1__TruncateSequenceResponse *response =
            call_once(METHOD("TruncateSequence"), &request.base, &attnd__v1__truncate_sequence_response__descriptor);
        protobuf_c_message_free_unpacked(&response->base, NULL);
    }
    batch.length = batch.context;
}

static void end_stream(void) {
    rpc *stream = &batch.stream;
    if (stream->call == NULL) return;
    grpc_op operations[] = {{.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, receive_status(stream)};
    rpc_run(stream, operations, sizeof operations / sizeof operations[0]);
    check_status(stream, METHOD("DecodeStream"));
    rpc_destroy(stream);
}

static void close_batch(void) {
    Attnd__V1__CloseSequencesRequest request = ATTND__V1__CLOSE_SEQUENCES_REQUEST__INIT;
    end_stream();
    request.sequences = batch.handles;
    request.n_sequences = batch.count;
    Attnd__V1__CloseSequencesResponse *response =
        call_once(METHOD("CloseSequences"), &request.base, &attnd__v1__close_sequences_response__descriptor);
    protobuf_c_message_free_unpacked(&response->base, NULL);
    free(batch.handles);
    free_kv_rows(&batch.new_rows);
    grpc_slice_unref(batch.queries);
    batch.count = 0;
    puts("closed");
}

/* ------------------------------------------------------------------------------------------- */
/* Steps */

/* A message out, the answer in, which the caller destroys. */
static grpc_byte_buffer *exchange(grpc_byte_buffer *request) {
    rpc *stream = &batch.stream;
    if (stream->call == NULL) rpc_create(stream, METHOD("DecodeStream"));
    grpc_op operations[] = {send_message(request),
                            receive_message(stream),
                            {.op = GRPC_OP_SEND_INITIAL_METADATA},
                            receive_metadata(stream)};
    bool good = rpc_run(stream, operations, stream->begun ? 2 : 4);
    stream->begun = true;
    grpc_byte_buffer *response = stream->response;
    stream->response = NULL;
    if (!good || response == NULL) end_stream();
    BENCH_CHECK(response != NULL, "no answer");
    return response;
}

static void begin_step(bool timed) {
    Attnd__V1__AttentionOptions options = ATTND__V1__ATTENTION_OPTIONS__INIT;
    Attnd__V1__StepBegin begin = ATTND__V1__STEP_BEGIN__INIT;
    Attnd__V1__DecodeStreamRequest message;
    attnd__v1__decode_stream_request__init(&message);
    options.return_timing = timed;
    begin.sequences = batch.handles;
    begin.n_sequences = batch.count;
    begin.options = &options;
    message.begin = &begin;
    grpc_byte_buffer *request = bench_pack(&message.base);
    grpc_byte_buffer_destroy(exchange(request));
    grpc_byte_buffer_destroy(request);
}

static void check_outputs(const Attnd__V1__DecodeResponse *response) {
    size_t element = element_bytes(), row = (size_t)model.heads_q * model.head_dim_v;
    BENCH_CHECK(response->out.len == batch.count * row * element, "%zu bytes of out", response->out.len);
    const uint8_t *values = GRPC_SLICE_START_PTR(batch.new_rows.values);
    for (size_t i = 0; i < batch.count * row; i++) {
        size_t head = i % row / model.head_dim_v / (model.heads_q / model.heads_kv);
        float want = get_element(values + (head * model.head_dim_v + i % model.head_dim_v) * element);
        float got = get_element(response->out.data + i * element);
        BENCH_CHECK(fabsf(got - want) <= OUT_TOLERANCE * fabsf(want), "output element %zu is %g, not %g", i,
                    (double)got, (double)want);
    }
    batch.checked = true;
}

/* Of the rank that took longest. */
static void take_timing(sample *taken, const Attnd__V1__DecodeResponse *response) {
    float longest = -1;
    for (size_t r = 0; r < response->n_timing; r++) {
        const Attnd__V1__RankTiming *t = response->timing[r];
        float parts[TIMING_PARTS] = {t->queue_us,   t->copy_in_us,  t->plan_us,  t->attention_us,
                                     t->combine_us, t->copy_out_us, t->device_us};
        float total = 0;
        for (int i = 0; i < TIMING_PARTS - 1; i++)
            total += parts[i];
        if (total <= longest) continue;
        longest = total;
        memcpy(taken->parts, parts, sizeof parts);
    }
    BENCH_CHECK(!taken->timed || longest >= 0, "an answer without the timing asked for");
}

static sample *next_sample(void) {
    if (samples.count == samples.capacity) {
        samples.capacity = samples.capacity == 0 ? FIRST_CAPACITY : 2 * samples.capacity;
        samples.items = realloc(samples.items, samples.capacity * sizeof *samples.items);
        BENCH_CHECK(samples.items != NULL, "no memory");
    }
    return &samples.items[samples.count++];
}

static void run_layer(uint32_t layer, bool timed) {
    static const uint32_t fields[] = {FIELD_Q, FIELD_K, FIELD_V};
    const grpc_slice tensors[] = {batch.queries, batch.new_rows.keys, batch.new_rows.values};
    Attnd__V1__DecodeStreamRequest message;
    attnd__v1__decode_stream_request__init(&message);
    message.layer = layer;
    grpc_byte_buffer *request = message_with_tensors(&message.base, tensors, fields, 3);
    int64_t start = attn_now_ns();
    grpc_byte_buffer *answer = exchange(request);
    int64_t end = attn_now_ns();
    grpc_byte_buffer_destroy(request);
    sample *taken = next_sample();
    *taken = (sample){.call_us = (double)(end - start) / 1e3, .timed = timed};
    if (timed || !batch.checked) {
        Attnd__V1__DecodeResponse *response = bench_unpack(&attnd__v1__decode_response__descriptor, answer);
        take_timing(taken, response);
        if (!batch.checked) check_outputs(response);
        protobuf_c_message_free_unpacked(&response->base, NULL);
    }
    grpc_byte_buffer_destroy(answer);
}

static void run_step(bool timed) {
    if (batch.length >= batch.context + GROWTH_TOKENS) cut_back();
    begin_step(timed);
    for (uint32_t layer = 0; layer < model.layers; layer++)
        run_layer(layer, timed);
    batch.length++;
}

static void print_samples(void) {
    for (size_t i = 0; i < samples.count; i++) {
        const sample *s = &samples.items[i];
        printf("%s %.2f", s->timed ? "timed" : "plain", s->call_us);
        for (int part = 0; s->timed && part < TIMING_PARTS; part++)
            printf(" %.2f", (double)s->parts[part]);
        putchar('\n');
    }
    puts("end");
}

static void run(double seconds, size_t calls) {
    BENCH_CHECK(batch.count > 0, "no batch is open");
    for (int step = 0; step < WARM_UP_STEPS; step++)
        run_step(step % 2);
    samples.count = 0;
    int64_t deadline = attn_now_ns() + (int64_t)(seconds * 1e9);
    for (uint64_t step = 0; step % 2 != 0 || samples.count < calls || attn_now_ns() < deadline; step++)
        run_step(step % 2);
    print_samples();
}

/* ------------------------------------------------------------------------------------------- */

/* The next number of the line that strtok() is at. */
static double number(void) {
    const char *word = strtok(NULL, " \n");
    BENCH_CHECK(word != NULL, "a line is open BATCH CONTEXT, run SECONDS CALLS or close");
    return strtod(word, NULL);
}

static void obey(char *line) {
    const char *verb = strtok(line, " \n");
    if (verb != NULL && strcmp(verb, "open") == 0) {
        uint32_t count = (uint32_t)number();
        open_batch(count, (uint32_t)number());
    } else if (verb != NULL && strcmp(verb, "run") == 0) {
        double seconds = number();
        run(seconds, (size_t)number());
    } else {
        BENCH_CHECK(verb != NULL && strcmp(verb, "close") == 0, "what is this line?");
        close_batch();
    }
    fflush(stdout);
}

int main(int argc, char **argv) {
    char line[128];
    BENCH_CHECK(argc == 2, "usage: client ADDRESS");
    bench_tune_malloc();
    grpc_init();
    grpc_arg arguments[] = {
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, {.integer = -1}},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, {.integer = LOOK_AHEAD_BYTES}},
    };
    grpc_channel_args all = {sizeof arguments / sizeof arguments[0], arguments};
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    channel = grpc_channel_create(argv[1], credentials, &all);
    grpc_channel_credentials_release(credentials);
    queue = grpc_completion_queue_create_for_next(NULL);
    learn_geometry();
    while (fgets(line, sizeof line, stdin) != NULL)
        obey(line);
    return 0;
}
