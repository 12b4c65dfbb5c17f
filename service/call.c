#include "service/call.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "service/handover.h"
#include "service/log/log.h"
#include "service/server.h"

/* In call.events beside the events: a thread is running the handlers. */
#define RUNNING (1u << 31)

/* Unary calls that take longer are logged. */
#define SLOW_NS INT64_C(1000000000)

/* The retry hint of RESOURCE_EXHAUSTED, and of ABORTED where that says to come back later, in milliseconds. */
#define RETRY_PUSHBACK "100"

/*
 * Replies of more bytes than this are written by a queue's thread: the write costs the rank thread
 * more (a copy into the socket) than the hand-over (6-7 us).
 */
#define DIRECT_REPLY_BYTES ((size_t)64 << 10)

/* ------------------------------------------------------------------------------------------- */
/* Batches */

static call_tag *tag_of(call *call, uint32_t event) { return &call->tags[__builtin_ctz(event)]; }

static void start_batch(call *call, const grpc_op *ops, size_t count, uint32_t event) {
    call_tag *tag = tag_of(call, event);
    atomic_fetch_add_explicit(&call->outstanding, 1, memory_order_relaxed);
    handover_give(tag);
    grpc_call_error error = grpc_call_start_batch(call->grpc, ops, count, tag, NULL);
    if (error == GRPC_CALL_OK) return;
    /* No tag will come: what was asked for has failed. */
    attn_log_line line;
    if (attn_log_begin(&line, ATTN_LOG_ERROR, "batch_refused", call->request)) {
        attn_log_u64(&line, "batch_event", event);
        attn_log_u64(&line, "grpc_call_error", error);
        attn_log_end(&line);
    }
    call_tag_completed(tag, false);
}

static void add_close(call *call, grpc_op *op) {
    *op = (grpc_op){.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    op->data.recv_close_on_server.cancelled = &call->cancel_flag;
}

void call_watch(call *call) {
    call->watched = true;
    grpc_op op;
    add_close(call, &op);
    start_batch(call, &op, 1, CALL_CLOSED);
}

static void add_receive(call *call, grpc_op *op) {
    *op = (grpc_op){.op = GRPC_OP_RECV_MESSAGE};
    op->data.recv_message.recv_message = &call->received;
}

void call_receive(call *call) {
    grpc_op op;
    add_receive(call, &op);
    start_batch(call, &op, 1, CALL_RECEIVED);
}

/* Makes call->sending of the slices, whose references it takes. */
static void load_message(call *call, grpc_slice *slices, size_t count) {
    uint64_t bytes = 0;
    call->sending = grpc_raw_byte_buffer_create(slices, count);
    for (size_t i = 0; i < count; i++) {
        bytes += GRPC_SLICE_LENGTH(slices[i]);
        grpc_slice_unref(slices[i]);
    }
    attn_metrics_sent(server_get_parts(call->server)->metrics, call->rpc->method, bytes);
}

static void unload_message(call *call) {
    if (call->sending == NULL) return;
    grpc_byte_buffer_destroy(call->sending);
    call->sending = NULL;
}

static size_t add_greeting(call *call, grpc_op *ops) {
    if (call->greeted) return 0;
    call->greeted = true;
    ops[0] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    return 1;
}

static void add_message(call *call, grpc_op *op) {
    *op = (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .flags = GRPC_WRITE_NO_COMPRESS};
    op->data.send_message.send_message = call->sending;
}

void call_send(call *call, grpc_slice *slices, size_t count) {
    grpc_op ops[2];
    load_message(call, slices, count);
    size_t used = add_greeting(call, ops);
    add_message(call, &ops[used++]);
    start_batch(call, ops, used, CALL_SENT);
}

void call_send_and_receive(call *call, grpc_slice *slices, size_t count) {
    grpc_op ops[3];
    load_message(call, slices, count);
    size_t used = add_greeting(call, ops);
    add_message(call, &ops[used++]);
    add_receive(call, &ops[used++]);
    call->sends_with_receive = true;
    start_batch(call, ops, used, CALL_RECEIVED);
}

static const grpc_metadata *find_metadata(const call *call, const char *key, bool *twice) {
    const grpc_metadata *found = NULL;
    *twice = false;
    for (size_t i = 0; i < call->metadata.count; i++) {
        const grpc_metadata *entry = &call->metadata.metadata[i];
        if (grpc_slice_str_cmp(entry->key, key) != 0) continue;
        *twice = found != NULL;
        found = entry;
    }
    return found;
}

/* Trailers of a failed call: the retry hint and the client's request id, if it gave one. Returns their number. */
static size_t error_trailers(const call *call, attn_code code, grpc_metadata trailers[2]) {
    size_t count = 0;
    bool twice;
    if (code == ATTN_OK) return 0;
    if (code == ATTN_RESOURCE_EXHAUSTED || (code == ATTN_ABORTED && call->rpc->aborted_may_retry)) {
        trailers[count++] = (grpc_metadata){.key = grpc_slice_from_static_string("grpc-retry-pushback-ms"),
                                            .value = grpc_slice_from_static_string(RETRY_PUSHBACK)};
    }
    const grpc_metadata *id = find_metadata(call, "x-request-id", &twice);
    if (id != NULL) trailers[count++] = (grpc_metadata){.key = id->key, .value = id->value};
    return count;
}

void call_finish(call *call, attn_status status, grpc_slice *slices, size_t count) {
    assert(!call->finished);
    call->finished = true;
    call->code = status.code;
    if (call->closed) {
        for (size_t i = 0; i < count; i++) {
            grpc_slice_unref(slices[i]);
        }
        return;
    }
    grpc_op ops[4];
    grpc_metadata trailers[2];
    grpc_slice details = grpc_empty_slice();
    size_t used = add_greeting(call, ops);
    if (count > 0) {
        load_message(call, slices, count);
        add_message(call, &ops[used++]);
    }
    grpc_op *end = &ops[used++];
    *end = (grpc_op){.op = GRPC_OP_SEND_STATUS_FROM_SERVER};
    end->data.send_status_from_server.status = (grpc_status_code)status.code;
    if (attn_failed(status)) {
        details = grpc_slice_from_copied_string(status.message);
        end->data.send_status_from_server.status_details = &details;
        end->data.send_status_from_server.trailing_metadata_count = error_trailers(call, status.code, trailers);
        end->data.send_status_from_server.trailing_metadata = trailers;
    }
    if (!call->watched) add_close(call, &ops[used++]);
    start_batch(call, ops, used, CALL_FINISHED);
    grpc_slice_unref(details);
}

grpc_slice call_pack(const ProtobufCMessage *message) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    return slice;
}

void call_respond(call *call, const ProtobufCMessage *message) {
    grpc_slice slice = call_pack(message);
    call_finish(call, attn_ok(), &slice, 1);
}

/* ------------------------------------------------------------------------------------------- */
/* Messages in */

void call_drop_payload(call *call) {
    if (call->payload == NULL) return;
    grpc_byte_buffer_destroy(call->payload);
    call->payload = NULL;
}

attn_status call_read(call *call, grpc_byte_buffer *buffer, wire_message *message) {
    if (buffer == NULL) return attn_error(ATTN_INVALID_ARGUMENT, "message: missing");
    if (buffer->type != GRPC_BB_RAW || buffer->data.raw.compression != GRPC_COMPRESS_NONE) {
        return attn_error(ATTN_UNIMPLEMENTED, "message: compressed messages are not accepted");
    }
    grpc_byte_buffer_reader slices;
    if (!grpc_byte_buffer_reader_init(&slices, buffer)) {
        return attn_error(ATTN_INTERNAL, "message: its bytes cannot be read");
    }
    size_t count = buffer->data.raw.slice_buffer.count;
    dp_span *pieces = wire_reader_pieces(&call->reader, count);
    attn_status status;
    if (pieces != NULL) {
        grpc_slice *slice;
        for (size_t i = 0; i < count && grpc_byte_buffer_reader_peek(&slices, &slice); i++) {
            pieces[i] = (dp_span){GRPC_SLICE_START_PTR(*slice), GRPC_SLICE_LENGTH(*slice)};
        }
        status = wire_read(&call->reader, call->rpc->request, pieces, count, message);
    } else {
        status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %zu message pieces", count);
    }
    grpc_byte_buffer_reader_destroy(&slices);
    attn_metrics_received(server_get_parts(call->server)->metrics, call->rpc->method, grpc_byte_buffer_length(buffer));
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* The engine's calls */

void call_engine_begins(call *call) { atomic_fetch_add_explicit(&call->outstanding, 1, memory_order_relaxed); }

void call_engine_refused(call *call) { atomic_fetch_sub_explicit(&call->outstanding, 1, memory_order_relaxed); }

/* A call that is being handled takes the event where it is handled; else a large answer goes to the queue's thread. */
void call_post_from_engine(call *call, size_t bytes_to_send) {
    grpc_call *grpc = call->grpc; /* before the hand-over, which orders what came before it */
    handover_give(tag_of(call, CALL_DONE));
    bool handled = atomic_load_explicit(&call->events, memory_order_relaxed) & RUNNING;
    if (!handled && bytes_to_send > DIRECT_REPLY_BYTES &&
        grpc_call_start_batch(grpc, NULL, 0, tag_of(call, CALL_DONE), NULL) == GRPC_CALL_OK) {
        return;
    }
    call_post(call, CALL_DONE);
}

/* What a lost rank may still use of a call that has ended. */
typedef struct {
    grpc_byte_buffer *message;
    wire_reader reader;
    void *more;
} detained_memory;

static void release_detained(void *context) {
    detained_memory *detained = context;
    grpc_byte_buffer_destroy(detained->message);
    wire_reader_fini(&detained->reader);
    free(detained->more);
    free(detained);
}

dp_keep call_detain(call *call, grpc_byte_buffer **buffer, void *more) {
    detained_memory *detained = malloc(sizeof *detained);
    if (detained != NULL) *detained = (detained_memory){.message = *buffer, .reader = call->reader, .more = more};
    *buffer = NULL;
    wire_reader_init(&call->reader);
    return (dp_keep){.release = detained != NULL ? release_detained : NULL, .context = detained};
}

bool call_has_news(const call *call) {
    return (atomic_load_explicit(&call->events, memory_order_relaxed) & ~RUNNING) != 0;
}

void call_post_notice(call *call) {
    atomic_fetch_add_explicit(&call->outstanding, 1, memory_order_relaxed);
    call_tag *tag = tag_of(call, CALL_NOTICE);
    grpc_call *grpc = call->grpc; /* as above */
    handover_give(tag);
    if (grpc_call_start_batch(grpc, NULL, 0, tag, NULL) != GRPC_CALL_OK) {
        atomic_fetch_sub_explicit(&call->outstanding, 1, memory_order_relaxed);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

call *call_acquire(server *server, uint32_t rpc_index, server_queue *queue) {
    call *call = server_take_free(server, rpc_index);
    if (call == NULL) {
        const rpc *rpc = server_rpc(rpc_index);
        call = calloc(1, sizeof *call);
        if (call == NULL) return NULL;
        if (rpc->state_bytes > 0 && (call->state = calloc(1, rpc->state_bytes)) == NULL) {
            free(call);
            return NULL;
        }
        call->rpc = rpc;
        call->rpc_index = rpc_index;
        call->server = server;
        grpc_metadata_array_init(&call->metadata);
        grpc_call_details_init(&call->details);
        wire_reader_init(&call->reader);
        for (uint32_t i = 0; i < CALL_EVENTS; i++) {
            call->tags[i] = (call_tag){.call = call, .event = 1u << i};
        }
    }
    call->queue = queue;
    atomic_store_explicit(&call->outstanding, 1, memory_order_relaxed); /* CALL_NEW */
    atomic_store_explicit(&call->events, 0, memory_order_release);      /* whoever takes the event sees all this */
    return call;
}

void call_free(call *call) {
    if (call->rpc->dispose != NULL) call->rpc->dispose(call);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_details_destroy(&call->details);
    wire_reader_fini(&call->reader);
    free(call->state);
    free(call);
}

static attn_log_level level_of(attn_code code, bool slow) {
    switch (code) {
    case ATTN_OK: return slow ? ATTN_LOG_WARN : ATTN_LOG_DEBUG;
    case ATTN_INTERNAL: return ATTN_LOG_ERROR;
    case ATTN_UNAVAILABLE:
    case ATTN_RESOURCE_EXHAUSTED: return ATTN_LOG_WARN;
    default: return slow ? ATTN_LOG_WARN : ATTN_LOG_INFO;
    }
}

static void log_end(const call *call, int64_t latency_ns) {
    bool slow = latency_ns > SLOW_NS && !call->rpc->stream_in;
    attn_log_level level = level_of(call->code, slow);
    attn_log_line line;
    if (!attn_log_begin(&line, level, slow ? "call_slow" : "call", call->request)) return;
    bool twice;
    const grpc_metadata *id = find_metadata(call, "x-request-id", &twice);
    attn_log_string(&line, "path", call->rpc->path);
    if (id != NULL) {
        attn_log_bytes(&line, "x_request_id", GRPC_SLICE_START_PTR(id->value), GRPC_SLICE_LENGTH(id->value));
    }
    attn_log_u64(&line, "tenant", call->tenant);
    attn_log_string(&line, "code", attn_code_name(call->code));
    attn_log_bool(&line, "cancelled", call->cancelled);
    attn_log_double(&line, "ms", (double)latency_ns / 1e6);
    attn_log_end(&line);
}

/* What a call left without an answer came to. */
static attn_code code_of_cancelled(const call *call, int64_t now) {
    return now >= call->deadline_ns ? ATTN_DEADLINE_EXCEEDED : ATTN_CANCELLED;
}

/* The call has ended: back to the free list. */
static void recycle(call *call) {
    int64_t now = attn_now_ns();
    if (call->cancelled && (call->code == ATTN_OK || call->code == ATTN_CANCELLED))
        call->code = code_of_cancelled(call, now);
    attn_metrics_call_finished(server_get_parts(call->server)->metrics, call->rpc->method, call->code,
                               now - call->started_ns);
    log_end(call, now - call->started_ns);
    server_call_ends(call->server, call);

    unload_message(call);
    call_drop_payload(call);
    if (call->received != NULL) grpc_byte_buffer_destroy(call->received);
    call->received = NULL;
    grpc_call_unref(call->grpc);
    call->grpc = NULL;
    grpc_call_details_destroy(&call->details);
    grpc_call_details_init(&call->details);
    call->metadata.count = 0;
    wire_reader_trim(&call->reader);
    call->cancelled = call->closed = call->sent_ok = call->received_ok = call->sends_with_receive = call->finished =
        call->watched = call->greeted = false;
    call->cancel_flag = 0;
    call->code = ATTN_OK;
    call->tenant = 0;
    atomic_store_explicit(&call->events, 0, memory_order_relaxed);
    server_put_free(call->server, call);
}

static int64_t deadline_in_ns(gpr_timespec deadline, int64_t now) {
    if (deadline.tv_sec == INT64_MAX) return INT64_MAX;
    gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
    if (left.tv_sec > INT32_MAX) return INT64_MAX;
    return now + left.tv_sec * INT64_C(1000000000) + left.tv_nsec;
}

static attn_status check_credentials(call *call) {
    const attn_auth *auth = server_get_parts(call->server)->auth;
    const char *credentials = NULL;
    size_t size = 0;
    bool twice;
    const grpc_metadata *entry = find_metadata(call, "authorization", &twice);
    if (entry != NULL && !twice) {
        credentials = (const char *)GRPC_SLICE_START_PTR(entry->value);
        size = GRPC_SLICE_LENGTH(entry->value);
    }
    if (call->rpc->admin) return attn_auth_check_admin(auth, credentials, size);
    return attn_auth_check(auth, credentials, size, &call->tenant);
}

/* Whether the call may be made at all: deadline, draining, credentials. */
static attn_status admit(call *call) {
    if (call->deadline_ns <= call->started_ns) {
        return attn_error(ATTN_DEADLINE_EXCEEDED, "the deadline had passed on arrival");
    }
    if (!call->rpc->while_draining && server_draining(call->server)) {
        return attn_error(ATTN_UNAVAILABLE, "the server is draining");
    }
    return call->rpc->open_to_all ? attn_ok() : check_credentials(call);
}

static void answer(call *call) {
    wire_message message;
    attn_status status = call_read(call, call->payload, &message);
    if (!attn_failed(status)) status = call->rpc->answer(call, &message);
    if (attn_failed(status)) call_finish(call, status, NULL, 0);
}

static void begin(call *call) {
    server_arm(call->server, call->rpc_index, call->queue);
    call->started_ns = attn_now_ns();
    bool unknown = call->rpc->request == NULL; /* gRPC tells its deadline elsewhere */
    call->deadline_ns = deadline_in_ns(unknown ? call->details.deadline : call->deadline, call->started_ns);
    call->request = server_call_begins(call->server, call);
    attn_metrics_call_started(server_get_parts(call->server)->metrics, call->rpc->method);
    attn_status status = admit(call);
    if (attn_failed(status)) {
        call_finish(call, status, NULL, 0);
    } else if (call->rpc->answer != NULL) {
        answer(call);
    } else {
        call->rpc->start(call);
    }
}

/* What events mean for any RPC, before its own handler sees them. */
static void note_events(call *call, uint32_t events) {
    if (events & CALL_SENT) {
        unload_message(call);
        call->sent_ok = tag_of(call, CALL_SENT)->ok;
    }
    if (events & CALL_RECEIVED) {
        if (call->sends_with_receive) unload_message(call);
        call->sends_with_receive = false;
        call->received_ok = tag_of(call, CALL_RECEIVED)->ok;
    }
    if (events & CALL_FINISHED) unload_message(call);
    if ((events & CALL_CLOSED) || ((events & CALL_FINISHED) && !call->watched)) {
        call->closed = true;
        call->cancelled = call->cancel_flag != 0;
        if (call->rpc->listed) server_unlist(call->server, call);
    }
}

/* Runs the handlers for `events`. False: the call has ended and is not the caller's any more. */
static bool run(call *call, uint32_t events) {
    if (events & CALL_NEW) {
        if (!tag_of(call, CALL_NEW)->ok) {
            atomic_store_explicit(&call->events, 0, memory_order_relaxed);
            server_put_free(call->server, call);
            return false;
        }
        begin(call);
    } else {
        note_events(call, events);
        if (call->rpc->run != NULL) call->rpc->run(call, events);
    }
    int32_t handled = __builtin_popcount(events);
    if (atomic_fetch_sub_explicit(&call->outstanding, handled, memory_order_acq_rel) > handled) return true;
    assert(call->finished);
    recycle(call);
    return false;
}

void call_post(call *call, uint32_t events) {
    if (atomic_fetch_or_explicit(&call->events, events | RUNNING, memory_order_acq_rel) & RUNNING) return;
    for (;;) {
        uint32_t taken = atomic_exchange_explicit(&call->events, RUNNING, memory_order_acq_rel) & ~RUNNING;
        if (taken != 0 && !run(call, taken)) return;
        uint32_t nothing_new = RUNNING;
        if (atomic_compare_exchange_strong_explicit(&call->events, &nothing_new, 0, memory_order_acq_rel,
                                                    memory_order_relaxed)) {
            return;
        }
    }
}

void call_tag_completed(call_tag *tag, bool ok) {
    handover_take(tag);
    tag->ok = ok;
    call_post(tag->call, tag->event);
}
