/*
 * The front bench's client: a closed loop of Decode calls or DecodeStream messages, on the gRPC C
 * core, with as little of its own as possible. The same program loads attnd and the echo server.
 *
 *   client ADDRESS attnd|echo
 *
 * Against attnd it first opens sequences and gives each a context of one token. Then, for every line
 * on standard input,
 *   unary|stream PAYLOAD IN_FLIGHT SECONDS
 * it keeps IN_FLIGHT calls (or streams, with one message each) under way with queries of PAYLOAD
 * bytes for so long, and prints
 *   CALLS SECONDS P50_US P90_US P99_US
 *
 * With one token of context the output of a query is that token's value, whatever the query: the
 * first answer of every slot is compared with it, bit by bit. The echo server's must be as long.
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

#define HEADS_Q       16
#define HEADS_KV      1
#define HEAD_DIM      256
#define ELEMENT_BYTES 2
#define QUERY_BYTES   (HEADS_Q * HEAD_DIM * ELEMENT_BYTES)  /* a row: 8 KiB */
#define VALUE_BYTES   (HEADS_KV * HEAD_DIM * ELEMENT_BYTES) /* a row: 512 bytes */
#define SEQUENCES_MAX 256                                   /* 2 MiB of queries */
#define IN_FLIGHT_MAX 64
#define WARM_UP_NS    30000000
#define LATENCIES_MAX (1 << 22)

static grpc_channel *channel;
static grpc_completion_queue *queue;
static bool against_attnd;
static uint64_t handles[SEQUENCES_MAX];
static uint8_t values[SEQUENCES_MAX][VALUE_BYTES]; /* the one token's value of each sequence */

/* ------------------------------------------------------------------------------------------- */
/* One load: the same request over and over */

typedef struct {
    bool stream;
    size_t payload;
    uint32_t sequences;
    grpc_slice first_head; /* of a stream's first message, with its begin; of every unary request */
    grpc_slice next_head;
    grpc_slice query;
    int64_t measure_from, measure_to;
    uint64_t calls; /* within the measured time */
    uint64_t latency_count;
    int running; /* slots that have not ended */
} load;

typedef struct {
    load *load;
    grpc_call *call;
    grpc_byte_buffer *response;
    grpc_metadata_array initial, trailing;
    grpc_status_code status;
    grpc_slice details;
    int64_t started_ns;
    bool begun;   /* streams: the begin is out */
    bool closing; /* streams: the last batch is on its way */
    bool checked; /* one answer was looked into */
} slot;

static float *latencies_us; /* [LATENCIES_MAX] */

static grpc_byte_buffer *next_request(slot *slot) {
    load *load = slot->load;
    bool first = !load->stream || !slot->begun;
    grpc_slice slices[2] = {first ? load->first_head : load->next_head, load->query};
    slot->begun = true;
    return grpc_raw_byte_buffer_create(slices, 2);
}

static void start(slot *slot, const grpc_op *operations, size_t count) {
    grpc_call_error error = grpc_call_start_batch(slot->call, operations, count, slot, NULL);
    BENCH_CHECK(error == GRPC_CALL_OK, "grpc_call_start_batch: %s", grpc_call_error_to_string(error));
}

static void create_call(slot *slot, const char *method) {
    slot->call =
        grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, queue, grpc_slice_from_static_string(method),
                                 NULL, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    slot->begun = slot->closing = false;
    slot->response = NULL;
    grpc_metadata_array_init(&slot->initial);
    grpc_metadata_array_init(&slot->trailing);
}

static void destroy_call(slot *slot) {
    grpc_metadata_array_destroy(&slot->initial);
    grpc_metadata_array_destroy(&slot->trailing);
    grpc_slice_unref(slot->details);
    grpc_call_unref(slot->call);
}

static grpc_op receive_status(slot *slot) {
    return (grpc_op){.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                     .data.recv_status_on_client = {.trailing_metadata = &slot->trailing,
                                                    .status = &slot->status,
                                                    .status_details = &slot->details}};
}

static void start_unary(slot *slot, const char *method, grpc_byte_buffer *request) {
    create_call(slot, method);
    grpc_op operations[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA, .data.recv_initial_metadata.recv_initial_metadata = &slot->initial},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &slot->response},
        receive_status(slot),
    };
    slot->started_ns = attn_now_ns();
    start(slot, operations, 6);
    grpc_byte_buffer_destroy(request);
}

/* A message out and one in; with the first, the metadata. */
static void start_exchange(slot *slot) {
    bool first = !slot->begun;
    grpc_byte_buffer *request = next_request(slot);
    grpc_op operations[4] = {
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &slot->response},
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
        {.op = GRPC_OP_RECV_INITIAL_METADATA, .data.recv_initial_metadata.recv_initial_metadata = &slot->initial},
    };
    slot->started_ns = attn_now_ns();
    start(slot, operations, first ? 4 : 2);
    grpc_byte_buffer_destroy(request);
}

static void start_closing(slot *slot) {
    grpc_op operations[2] = {{.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, receive_status(slot)};
    slot->closing = true;
    start(slot, operations, 2);
}

/* ------------------------------------------------------------------------------------------- */
/* Answers */

static void check_status(const slot *slot) {
    if (slot->status == GRPC_STATUS_OK) return;
    char *details = grpc_slice_to_c_string(slot->details);
    BENCH_CHECK(false, "status %d: %s", slot->status, details);
}

/* out[sequence][head] is the value's row of the head's KV head. */
static void check_outputs(const load *load, grpc_byte_buffer *response) {
    Attnd__V1__DecodeResponse *message = bench_unpack(&attnd__v1__decode_response__descriptor, response);
    BENCH_CHECK(message->out.len == load->payload, "%zu bytes of out", message->out.len);
    for (uint32_t i = 0; i < load->sequences; i++) {
        for (int head = 0; head < HEADS_Q; head++) {
            const uint8_t *out = message->out.data + (size_t)i * QUERY_BYTES + (size_t)head * HEAD_DIM * ELEMENT_BYTES;
            const uint8_t *value = values[i] + head / (HEADS_Q / HEADS_KV) * HEAD_DIM * ELEMENT_BYTES;
            BENCH_CHECK(memcmp(out, value, HEAD_DIM * ELEMENT_BYTES) == 0, "wrong output for sequence %u head %d", i,
                        head);
        }
    }
    protobuf_c_message_free_unpacked(&message->base, NULL);
}

static void take_response(slot *slot) {
    load *load = slot->load;
    int64_t now = attn_now_ns();
    BENCH_CHECK(slot->response != NULL, "no answer");
    BENCH_CHECK(grpc_byte_buffer_length(slot->response) >= load->payload, "a short answer");
    if (!slot->checked && against_attnd) check_outputs(load, slot->response);
    slot->checked = true;
    grpc_byte_buffer_destroy(slot->response);
    slot->response = NULL;
    if (now < load->measure_from || now >= load->measure_to) return;
    load->calls++;
    if (load->latency_count < LATENCIES_MAX) {
        latencies_us[load->latency_count++] = (float)(now - slot->started_ns) / 1000.0f;
    }
}

static bool time_is_up(const load *load) { return attn_now_ns() >= load->measure_to; }

static void unary_completed(slot *slot) {
    check_status(slot);
    take_response(slot);
    destroy_call(slot);
    if (time_is_up(slot->load)) {
        slot->load->running--;
    } else {
        start_unary(slot, BENCH_DECODE, next_request(slot));
    }
}

static void stream_completed(slot *slot, bool ok) {
    if (slot->closing) {
        check_status(slot);
        destroy_call(slot);
        slot->load->running--;
        return;
    }
    if (!ok || slot->response == NULL) { /* the server ended it: learn why */
        start_closing(slot);
        return;
    }
    take_response(slot);
    if (time_is_up(slot->load)) {
        start_closing(slot);
    } else {
        start_exchange(slot);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Runs */

static int compare_floats(const void *one, const void *other) {
    float difference = *(const float *)one - *(const float *)other;
    return difference < 0 ? -1 : difference > 0;
}

static double percentile(uint64_t count, double share) {
    return count == 0 ? NAN : latencies_us[(uint64_t)((double)(count - 1) * share)];
}

/* Queries that mean something: small numbers, all different. */
static grpc_slice make_query(size_t size) {
    grpc_slice slice = grpc_slice_malloc_large(size);
    uint8_t *bytes = GRPC_SLICE_START_PTR(slice);
    for (size_t i = 0; i < size; i += 2) {
        bytes[i] = (uint8_t)(i * 37 >> 3);
        bytes[i + 1] = 0x3e; /* bf16 0.12 .. 0.25 */
    }
    return slice;
}

static void make_heads(load *load) {
    Attnd__V1__DecodeRequest unary;
    Attnd__V1__StepBegin begin;
    Attnd__V1__DecodeStreamRequest first, next;
    attnd__v1__decode_request__init(&unary);
    attnd__v1__step_begin__init(&begin);
    attnd__v1__decode_stream_request__init(&first);
    attnd__v1__decode_stream_request__init(&next);
    unary.sequences = begin.sequences = handles;
    unary.n_sequences = begin.n_sequences = load->sequences;
    begin.read_only = true;
    first.begin = &begin;
    load->first_head = bench_head_slice(load->stream ? &first.base : &unary.base, 16, load->payload);
    load->next_head = bench_head_slice(&next.base, 16, load->payload);
}

static void run_load(load *load, int in_flight, double seconds) {
    static slot slots[IN_FLIGHT_MAX];
    make_heads(load);
    load->query = make_query(load->payload);
    load->measure_from = attn_now_ns() + WARM_UP_NS;
    load->measure_to = load->measure_from + (int64_t)(seconds * 1e9);
    load->running = in_flight;
    for (int i = 0; i < in_flight; i++) {
        slots[i] = (slot){.load = load};
        if (load->stream) {
            create_call(&slots[i], BENCH_STREAM);
            start_exchange(&slots[i]);
        } else {
            start_unary(&slots[i], BENCH_DECODE, next_request(&slots[i]));
        }
    }
    while (load->running > 0) {
        grpc_event event = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        BENCH_CHECK(event.type == GRPC_OP_COMPLETE, "the queue ended");
        if (load->stream) {
            stream_completed(event.tag, event.success != 0);
        } else {
            unary_completed(event.tag);
        }
    }
    grpc_slice_unref(load->first_head);
    grpc_slice_unref(load->next_head);
    grpc_slice_unref(load->query);
}

/* The next word of the line that strtok() is at; `line` the first time. */
static const char *word(char *line) {
    const char *found = strtok(line, " \n");
    BENCH_CHECK(found != NULL, "a line is unary|stream PAYLOAD IN_FLIGHT SECONDS");
    return found;
}

static void run_line(char *line) {
    bool stream = strcmp(word(line), "stream") == 0;
    size_t payload = strtoul(word(NULL), NULL, 10);
    int in_flight = (int)strtol(word(NULL), NULL, 10);
    double seconds = strtod(word(NULL), NULL);
    BENCH_CHECK(in_flight >= 1 && in_flight <= IN_FLIGHT_MAX, "in flight: 1 .. %d", IN_FLIGHT_MAX);
    BENCH_CHECK(payload % QUERY_BYTES == 0 && payload / QUERY_BYTES <= SEQUENCES_MAX && payload > 0,
                "payload: a multiple of %d, %d times it at most", QUERY_BYTES, SEQUENCES_MAX);
    load load = {
        .stream = stream,
        .payload = payload,
        .sequences = (uint32_t)(payload / QUERY_BYTES),
    };
    run_load(&load, in_flight, seconds);
    qsort(latencies_us, load.latency_count, sizeof(*latencies_us), compare_floats);
    printf("%llu %.3f %.2f %.2f %.2f\n", (unsigned long long)load.calls, seconds, percentile(load.latency_count, 0.5),
           percentile(load.latency_count, 0.9), percentile(load.latency_count, 0.99));
    fflush(stdout);
}

/* ------------------------------------------------------------------------------------------- */
/* Sequences with one token each */

static grpc_byte_buffer *call_once(const char *method, grpc_byte_buffer *request) {
    slot slot = {0};
    start_unary(&slot, method, request);
    grpc_event event = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    BENCH_CHECK(event.type == GRPC_OP_COMPLETE && event.tag == &slot, "%s did not come back", method);
    check_status(&slot);
    destroy_call(&slot);
    return slot.response;
}

static void open_sequences(void) {
    Attnd__V1__OpenSequencesRequest request;
    attnd__v1__open_sequences_request__init(&request);
    request.count = SEQUENCES_MAX;
    grpc_byte_buffer *answer = call_once("/attnd.v1.Attention/OpenSequences", bench_pack(&request.base));
    Attnd__V1__OpenSequencesResponse *response = bench_unpack(&attnd__v1__open_sequences_response__descriptor, answer);
    BENCH_CHECK(response->n_sequences == SEQUENCES_MAX, "%zu sequences", response->n_sequences);
    memcpy(handles, response->sequences, sizeof(handles));
    protobuf_c_message_free_unpacked(&response->base, NULL);
    grpc_byte_buffer_destroy(answer);
}

static void append_one_token(void) {
    static uint8_t queries[SEQUENCES_MAX * QUERY_BYTES], keys[SEQUENCES_MAX * VALUE_BYTES];
    Attnd__V1__DecodeRequest request;
    attnd__v1__decode_request__init(&request);
    for (size_t i = 0; i < sizeof(values); i += 2) {
        values[i / VALUE_BYTES][i % VALUE_BYTES] = (uint8_t)(i * 2654435761u >> 13);
        values[i / VALUE_BYTES][i % VALUE_BYTES + 1] = 0x3f; /* bf16 0.5 .. 2 */
    }
    request.sequences = handles;
    request.n_sequences = SEQUENCES_MAX;
    request.q_place_case = ATTND__V1__DECODE_REQUEST__Q_PLACE_Q;
    request.q = (ProtobufCBinaryData){sizeof(queries), queries};
    request.k_place_case = ATTND__V1__DECODE_REQUEST__K_PLACE_K;
    request.k = (ProtobufCBinaryData){sizeof(keys), keys};
    request.v_place_case = ATTND__V1__DECODE_REQUEST__V_PLACE_V;
    request.v = (ProtobufCBinaryData){sizeof(values), values[0]};
    grpc_byte_buffer *answer = call_once(BENCH_DECODE, bench_pack(&request.base));
    Attnd__V1__DecodeResponse *response = bench_unpack(&attnd__v1__decode_response__descriptor, answer);
    BENCH_CHECK(response->committed, "the step has more layers: attnd must serve one");
    protobuf_c_message_free_unpacked(&response->base, NULL);
    grpc_byte_buffer_destroy(answer);
}

/* ------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    char line[128];
    BENCH_CHECK(argc == 3, "usage: client ADDRESS attnd|echo");
    against_attnd = strcmp(argv[2], "attnd") == 0;
    bench_tune_malloc();
    grpc_init();
    grpc_arg arguments[] = {
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, {.integer = -1}},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, {.integer = 8 << 20}},
    };
    grpc_channel_args all = {sizeof(arguments) / sizeof(arguments[0]), arguments};
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    channel = grpc_channel_create(argv[1], credentials, &all);
    grpc_channel_credentials_release(credentials);
    queue = grpc_completion_queue_create_for_next(NULL);
    latencies_us = malloc(LATENCIES_MAX * sizeof(*latencies_us));
    BENCH_CHECK(latencies_us != NULL, "no memory");
    if (against_attnd) {
        open_sequences();
        append_one_token();
    }
    while (fgets(line, sizeof(line), stdin) != NULL) {
        run_line(line);
    }
    return 0;
}
