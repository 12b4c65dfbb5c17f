/*
 * One layer on its way through the engine and back as a DecodeResponse: what Decode and DecodeStream
 * have in common. A `layer` is part of a call's state; its thread rules are the call's.
 */
#ifndef ATTND_SERVICE_LAYER_H
#define ATTND_SERVICE_LAYER_H

#include <grpc/slice.h>

#include "dp/engine.h"
#include "proto/attnd.pb-c.h"
#include "service/call.h"

typedef struct {
    dp_layer_call engine; /* must stay first: the engine's callback is given its address */
    call *call;
    bool in_flight; /* CALL_DONE is to come */
    bool return_timing;
    int64_t started_ns;
    attn_saved_status outcome; /* valid after CALL_DONE; its message only on failure */
} layer;

/* Tensors allowed to be absent, or not. */
typedef enum { LAYER_APPENDS, LAYER_READS } layer_kind;

/* `dtype` is the server's or left out. */
attn_status layer_check_dtype(const call *call, Attnd__V1__DType dtype, const char *field);

/* Whether q, k and v are there, or absent, as a layer of this kind needs. Sizes are the engine's to check. */
attn_status layer_check_tensors(const wire_message *message, layer_kind kind);

/* Options as the engine takes them. `sinks` are borrowed. NULL: the defaults. */
dp_options layer_options(const Attnd__V1__AttentionOptions *options);

/*
 * Gives a layer to the engine: CALL_DONE follows unless this fails. The tensors' spans and the sinks
 * must live until then.
 */
attn_status layer_start(layer *layer, call *call, dp_step *step, uint32_t number, const dp_options *options,
                        bool return_timing, const wire_message *message);

/* A step that cannot begin before its sequences are where they are on their way to. Part of a call's state. */
typedef struct {
    dp_wait engine; /* must stay first: the engine's callback is given its address */
    call *call;
    bool in_flight; /* CALL_DONE is to come, and says that the step may be tried again */
} layer_wait;

/* dp_step_begin. The step may have to wait: then it is NULL, and wait->in_flight is set. */
attn_status layer_begin_step(layer_wait *wait, call *call, const dp_step_request *request, dp_step **step);

/* The client is gone: waits no longer. Unless wait->in_flight is still set, because CALL_DONE is on its way. */
void layer_wait_withdraw(layer_wait *wait);

/* Slices of a response at most. */
#define LAYER_SLICES 4

/*
 * After CALL_DONE with success: the response in `slices`, whose references are the caller's; returns
 * their number. The engine's result goes back to its pool when gRPC has let go of them. To be called
 * before the step is ended or left.
 */
size_t layer_response(layer *layer, uint64_t step, grpc_slice slices[LAYER_SLICES]);

/* After CALL_DONE: drops the result, if there is one. */
void layer_drop_result(layer *layer);

/*
 * After CALL_DONE, before the step is ended: if a lost rank may still use what the layer came with, the engine gets
 * the message in `*buffer` and `*sinks` to keep, if they are not NULL; both become NULL.
 */
void layer_detain(layer *layer, dp_step *step, grpc_byte_buffer **buffer, float **sinks);

/* A response without a layer: names the step, and nothing else. */
grpc_slice layer_empty_response(uint64_t step);

#endif
