/*
 * One RPC in progress: what all RPCs have in common.
 *
 * A call is an actor. Whatever happens to it (a message received or sent, the client gone, its layer
 * done) is an event: a bit that is set from any thread with call_post(). The thread that finds
 * nobody at work on the call runs its handlers itself, and goes on until no event is left; a thread
 * that finds somebody at work leaves its bit and goes away. So a call's state needs no lock and no
 * handler ever waits: the rank thread that finishes a layer writes the reply itself, on an idle call
 * without a hand-over.
 *
 * Everything that will come back (a batch started, a layer given to the engine) is counted; when the
 * last has come back after the status is out, or the client is gone, the call returns to its RPC's
 * free list, buffers and all.
 *
 *   armed -> NEW -> start() -> events -> run() ... -> call_finish -> nothing outstanding -> free list
 *
 * Threads: functions below are for the thread that runs the call's handlers, but for call_post and
 * call_post_from_engine.
 */
#ifndef ATTND_SERVICE_CALL_H
#define ATTND_SERVICE_CALL_H

#include <grpc/grpc.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "dp/engine.h"
#include "service/metrics/metrics.h"
#include "service/wire.h"

typedef struct call call;
typedef struct server server;
typedef struct server_queue server_queue;

/* Events: bits of a set. */
enum {
    CALL_NEW = 1u << 0,      /* the armed slot got a call */
    CALL_CLOSED = 1u << 1,   /* the client has our status, or is gone: see call.cancelled */
    CALL_RECEIVED = 1u << 2, /* call_receive: a message, or the end of them: see call.received */
    CALL_SENT = 1u << 3,     /* call_send: the transport took it: see call.sent_ok */
    CALL_FINISHED = 1u << 4, /* call_finish: the status is out */
    CALL_DONE = 1u << 5,     /* the engine is done with what call_engine_begins announced */
    CALL_NOTICE = 1u << 6,   /* the server's state has changed: draining, health */
};

#define CALL_EVENTS 7

typedef struct {
    call *call;
    uint32_t event;
    bool ok;
} call_tag;

/* One RPC of the server: a constant table entry. Either `answer`, or `start` and `run`. */
typedef struct {
    const char *path; /* "/attnd.v1.Attention/Decode" */
    attn_method method;
    const ProtobufCMessageDescriptor *request; /* NULL: the call is never read */
    bool stream_in;                            /* messages come by call_receive; else the message comes with the call */
    bool listed;                               /* gets CALL_NOTICE */
    bool open_to_all;                          /* no credentials asked for */
    bool while_draining;                       /* served while the server is draining */
    bool admin;                                /* asks for the admin token */
    bool background;                           /* a drain does not wait for it */
    bool aborted_may_retry;                    /* ABORTED says that a sequence is busy, and comes with a retry hint */
    uint32_t slots;                            /* calls kept armed on each queue */
    size_t state_bytes;                        /* of call.state */
    /* Unary and immediate: answers with call_respond, or fails. `run`, if any, sees how the answer fared. */
    attn_status (*answer)(call *call, const wire_message *request);
    /* Everything else: `start` once, `run` for every set of events after it. They end with call_finish. */
    void (*start)(call *call);
    void (*run)(call *call, uint32_t events);
    /* Frees what `state` holds when the server ends; NULL: nothing. */
    void (*dispose)(call *call);
} rpc;

struct call {
    const rpc *rpc;
    uint32_t rpc_index;
    server *server;
    server_queue *queue;
    void *state; /* rpc->state_bytes, zero when the call is made, the RPC's to reuse from call to call */

    grpc_call *grpc;
    gpr_timespec deadline;
    grpc_metadata_array metadata;
    grpc_call_details details;  /* of calls to unknown methods */
    grpc_byte_buffer *payload;  /* unary: the request; destroyed by call_drop_payload or at the end */
    grpc_byte_buffer *received; /* streams: what CALL_RECEIVED brought; NULL: the end. The handler takes it */
    wire_reader reader;

    uint32_t tenant;
    uint64_t request; /* number of the call in the log */
    int64_t started_ns;
    int64_t deadline_ns; /* in attn_now_ns(); INT64_MAX: none */
    attn_code code;      /* of the answer */

    bool cancelled;   /* the client went before our status was sent: nothing that is sent will arrive */
    bool closed;      /* CALL_CLOSED has come */
    bool sent_ok;     /* the last call_send succeeded */
    bool received_ok; /* the last call_receive did not fail; at the end it brings no message */
    bool finished;    /* call_finish was called */
    bool watched;     /* RECV_CLOSE is started */
    bool greeted;     /* the initial metadata is sent */
    int cancel_flag;  /* written by gRPC before CALL_CLOSED */

    grpc_byte_buffer *sending;
    bool sends_with_receive; /* `sending` goes out with the receive under way */
    _Atomic uint32_t events;
    _Atomic int32_t outstanding;
    call_tag tags[CALL_EVENTS];
    call *next_free;
    call *previous_listed, *next_listed;
};

/* ------------------------------------------------------------------------------------------- */
/* For RPCs */

/* Destroys the message that came with a unary call: the spans read from it are no longer needed. */
void call_drop_payload(call *call);

/* Reads a message; its parts live until the next read, its spans as long as `buffer`. Counts its bytes. */
attn_status call_read(call *call, grpc_byte_buffer *buffer, wire_message *message);

/* Notices from now on when the client is gone. For calls that wait for something. */
void call_watch(call *call);

/* Asks for the next message: CALL_RECEIVED. One at a time. */
void call_receive(call *call);

/* Sends a message of a stream: CALL_SENT. One at a time. Takes the references to `slices`. */
void call_send(call *call, grpc_slice *slices, size_t count);

/*
 * Both at once, for half the work: CALL_RECEIVED comes when the message is sent and the next one is
 * there; no CALL_SENT. call_finish is fine meanwhile.
 */
void call_send_and_receive(call *call, grpc_slice *slices, size_t count);

/*
 * Ends the call with a status and, if that is OK, up to one last message: CALL_FINISHED comes, and
 * nothing more is sent. Takes the references to `slices`. Nothing is sent if the client is gone.
 */
void call_finish(call *call, attn_status status, grpc_slice *slices, size_t count);

/* The answer of a unary call: packs `message` and finishes the call. */
void call_respond(call *call, const ProtobufCMessage *message);

/* `message` packed into one slice; the caller owns it. */
grpc_slice call_pack(const ProtobufCMessage *message);

/* Something was given to the engine: CALL_DONE will be posted. To be called before it is given. */
void call_engine_begins(call *call);

/* It was not taken after all. */
void call_engine_refused(call *call);

/*
 * CALL_DONE, from the engine's callback. The handlers run on the calling thread, unless so many bytes
 * are to be sent that a queue's thread had better do it.
 */
void call_post_from_engine(call *call, size_t bytes_to_send);

/*
 * What the engine is to keep of a call whose engine call ended `detained`: the message in `*buffer`, which becomes
 * NULL, the reader that holds its spans, which starts afresh, and `more`, which is freed with them; NULL: nothing
 * more. release is NULL if there is no memory for it: then all of that is never freed, which is safe.
 */
dp_keep call_detain(call *call, grpc_byte_buffer **buffer, void *more);

/* Whether an event has come that the handlers have not seen yet: they will run again at once. */
bool call_has_news(const call *call);

/* ------------------------------------------------------------------------------------------- */
/* For the server */

/* A call of `rpc` from its free list, ready to be armed; NULL if there is no memory. */
call *call_acquire(server *server, uint32_t rpc_index, server_queue *queue);

/* Frees the memory of a call that is on a free list. */
void call_free(call *call);

/* Sets events from any thread. The call may be gone when this returns. */
void call_post(call *call, uint32_t events);

/* A completion queue's event. */
void call_tag_completed(call_tag *tag, bool ok);

/* Any thread that knows the call to be listed (see server.c). */
void call_post_notice(call *call);

#endif
