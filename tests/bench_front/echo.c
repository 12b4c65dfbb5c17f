/*
 * The least a gRPC C core server can do with a message: send the same buffer back. What attnd's
 * front is measured against.
 *
 *   echo [--write] ADDRESS..      host:port (port 0: any free one) or unix:/path
 *
 * With --write it answers with as many bytes of its own, written for every answer into a buffer that is
 * used again and again: the least that a server can do whose answer is not its input. It reads nothing
 * of the message.
 *
 * Prints one line for each address it listens on and serves until its standard input ends. One
 * completion queue with one thread, which is the fastest set-up for this on two cores.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>

#include "tests/bench_front/bench.h"

#define ARMED 64 /* calls of each RPC that can arrive at once */

typedef struct echo_call echo_call;

/* What a completion is about. */
typedef struct {
    echo_call *call;
    void (*completed)(echo_call *call, bool ok);
} event;

struct echo_call {
    grpc_call *grpc;
    grpc_metadata_array metadata;
    gpr_timespec deadline;
    grpc_byte_buffer *message;
    bool stream;
    int cancelled;
    event arrived, received, sent, finished, closed;
    bool is_finished, is_closed;
};

static grpc_server *server;
static grpc_completion_queue *queue;
static void *decode_method, *stream_method;

static void arm(echo_call *call);

static void start(echo_call *call, const grpc_op *operations, size_t count, event *tag) {
    grpc_call_error error = grpc_call_start_batch(call->grpc, operations, count, tag, NULL);
    BENCH_CHECK(error == GRPC_CALL_OK, "grpc_call_start_batch: %s", grpc_call_error_to_string(error));
}

/* The call's end: everything that was started has come back. The slot waits for the next call. */
static void rearm(echo_call *call) {
    grpc_call_unref(call->grpc);
    arm(call);
}

static grpc_op status_operation(void) {
    return (grpc_op){.op = GRPC_OP_SEND_STATUS_FROM_SERVER, .data.send_status_from_server.status = GRPC_STATUS_OK};
}

/* ------------------------------------------------------------------------------------------- */
/* --write: answers of its own */

typedef struct answer {
    struct answer *next; /* on the free list */
    size_t capacity;
    char bytes[];
} answer;

static bool writes;
static pthread_mutex_t answers_lock = PTHREAD_MUTEX_INITIALIZER;
static answer *free_answers; /* guarded by answers_lock; the last one used is the first */

static answer *take_answer(size_t size) {
    pthread_mutex_lock(&answers_lock);
    answer **place = &free_answers;
    while (*place != NULL && (*place)->capacity < size)
        place = &(*place)->next;
    answer *taken = *place;
    if (taken != NULL) *place = taken->next;
    pthread_mutex_unlock(&answers_lock);
    if (taken != NULL) return taken;
    taken = malloc(sizeof *taken + size);
    BENCH_CHECK(taken != NULL, "no memory");
    taken->capacity = size;
    return taken;
}

static void release_answer(void *context) {
    answer *released = context;
    pthread_mutex_lock(&answers_lock);
    released->next = free_answers;
    free_answers = released;
    pthread_mutex_unlock(&answers_lock);
}

/* Replaces a message by one of the same length whose bytes were written just now. */
static void write_answer(grpc_byte_buffer **message) {
    static const char row[512] = {1};
    size_t size = grpc_byte_buffer_length(*message);
    answer *written = take_answer(size);
    for (size_t done = 0; done < size; done += sizeof row)
        memcpy(written->bytes + done, row, size - done < sizeof row ? size - done : sizeof row);
    grpc_slice slice = grpc_slice_new_with_user_data(written->bytes, size, release_answer, written);
    grpc_byte_buffer_destroy(*message);
    *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
}

/* ------------------------------------------------------------------------------------------- */
/* Unary: everything in one batch */

static void unary_finished(echo_call *call, bool ok) {
    (void)ok;
    grpc_byte_buffer_destroy(call->message);
    call->message = NULL;
    rearm(call);
}

static void unary_arrived(echo_call *call) {
    if (writes) write_answer(&call->message);
    grpc_op operations[4] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = call->message},
        status_operation(),
        {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &call->cancelled},
    };
    call->finished.completed = unary_finished;
    start(call, operations, 4, &call->finished);
}

/* ------------------------------------------------------------------------------------------- */
/* Streams: each message goes back before the next is asked for */

static void stream_ended(echo_call *call) {
    if (call->is_finished && call->is_closed) rearm(call);
}

static void stream_finished(echo_call *call, bool ok) {
    (void)ok;
    call->is_finished = true;
    stream_ended(call);
}

static void stream_closed(echo_call *call, bool ok) {
    (void)ok;
    call->is_closed = true;
    stream_ended(call);
}

static void stream_receive(echo_call *call) {
    grpc_op operation = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->message};
    start(call, &operation, 1, &call->received);
}

static void stream_received(echo_call *call, bool ok) {
    grpc_op operation = status_operation();
    if (ok && call->message != NULL) {
        if (writes) write_answer(&call->message);
        operation = (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = call->message};
        start(call, &operation, 1, &call->sent);
    } else {
        start(call, &operation, 1, &call->finished);
    }
}

static void stream_sent(echo_call *call, bool ok) {
    (void)ok;
    grpc_byte_buffer_destroy(call->message);
    call->message = NULL;
    stream_receive(call);
}

static void greeted(echo_call *call, bool ok) {
    (void)call;
    (void)ok;
}

static void stream_arrived(echo_call *call) {
    static event greeting = {.completed = greeted};
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &call->cancelled};
    grpc_op metadata = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    call->received.completed = stream_received;
    call->sent.completed = stream_sent;
    call->finished.completed = stream_finished;
    call->closed.completed = stream_closed;
    call->is_finished = call->is_closed = false;
    start(call, &close, 1, &call->closed);
    start(call, &metadata, 1, &greeting);
    stream_receive(call);
}

/* ------------------------------------------------------------------------------------------- */

static void call_arrived(echo_call *call, bool ok) {
    if (!ok) return; /* the server is going down */
    if (call->stream) {
        stream_arrived(call);
    } else {
        unary_arrived(call);
    }
}

static void arm(echo_call *call) {
    call->arrived.completed = call_arrived;
    grpc_metadata_array_destroy(&call->metadata);
    grpc_metadata_array_init(&call->metadata);
    grpc_call_error error = grpc_server_request_registered_call(
        server, call->stream ? stream_method : decode_method, &call->grpc, &call->deadline, &call->metadata,
        call->stream ? NULL : &call->message, queue, queue, &call->arrived);
    BENCH_CHECK(error == GRPC_CALL_OK, "request_registered_call: %s", grpc_call_error_to_string(error));
}

static void arm_slots(void) {
    static echo_call calls[2 * ARMED];
    for (int i = 0; i < 2 * ARMED; i++) {
        echo_call *call = &calls[i];
        call->stream = i >= ARMED;
        call->arrived.call = call->received.call = call->sent.call = call->finished.call = call->closed.call = call;
        grpc_metadata_array_init(&call->metadata);
        arm(call);
    }
}

static void *serve(void *context) {
    (void)context;
    for (;;) {
        grpc_event happened = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        if (happened.type == GRPC_QUEUE_SHUTDOWN) return NULL;
        event *tag = happened.tag;
        tag->completed(tag->call, happened.success != 0);
    }
}

static void listen_on(const char *address) {
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    int port = grpc_server_add_http2_port(server, address, credentials);
    BENCH_CHECK(port != 0, "cannot listen on %s", address);
    grpc_server_credentials_release(credentials);
    if (strncmp(address, "unix:", 5) == 0) {
        printf("%s\n", address);
    } else {
        printf("%.*s:%d\n", (int)(strrchr(address, ':') - address), address, port);
    }
}

int main(int argc, char **argv) {
    pthread_t thread;
    char byte;
    writes = argc > 1 && strcmp(argv[1], "--write") == 0;
    int first = writes ? 2 : 1;
    BENCH_CHECK(argc > first, "usage: echo [--write] ADDRESS..");
    bench_tune_malloc();
    grpc_init();
    grpc_arg arguments[] = {
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, {.integer = -1}},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, {.integer = 8 << 20}},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_ALLOW_REUSEPORT, {.integer = 0}},
    };
    grpc_channel_args all = {sizeof(arguments) / sizeof(arguments[0]), arguments};
    server = grpc_server_create(&all, NULL);
    decode_method =
        grpc_server_register_method(server, BENCH_DECODE, NULL, GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
    stream_method = grpc_server_register_method(server, BENCH_STREAM, NULL, GRPC_SRM_PAYLOAD_NONE, 0);
    queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(server, queue, NULL);
    for (int i = first; i < argc; i++) {
        listen_on(argv[i]);
    }
    grpc_server_start(server);
    arm_slots();
    fflush(stdout);
    BENCH_CHECK(pthread_create(&thread, NULL, serve, NULL) == 0, "no thread");
    while (read(STDIN_FILENO, &byte, 1) > 0) {
    }
    _exit(0);
}
