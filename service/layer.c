#include "service/layer.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "base/clock.h"
#include "service/handover.h"
#include "service/server.h"

/* The proto's element types are the engine's, number for number. */
_Static_assert((int)ATTND__V1__DTYPE__DTYPE_BF16 == (int)ATTN_BF16, "dtype");
_Static_assert((int)ATTND__V1__DTYPE__DTYPE_FP16 == (int)ATTN_FP16, "dtype");
_Static_assert((int)ATTND__V1__DTYPE__DTYPE_FP32 == (int)ATTN_FP32, "dtype");
_Static_assert((int)ATTND__V1__DTYPE__DTYPE_FP8_E4M3 == (int)ATTN_FP8_E4M3, "dtype");

attn_status layer_check_dtype(const call *call, Attnd__V1__DType dtype, const char *field) {
    attn_dtype served = server_get_parts(call->server)->config->geometry.dtype;
    if (dtype == ATTND__V1__DTYPE__DTYPE_UNSPECIFIED || (int)dtype == (int)served) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "%s: %d, but this server computes in %s (%d)", field, (int)dtype,
                      attn_dtype_name(served), (int)served);
}

attn_status layer_check_tensors(const wire_message *message, layer_kind kind) {
    static const char *const names[WIRE_TENSORS] = {"q", "k", "v"};
    if (!message->present[WIRE_Q]) return attn_error(ATTN_INVALID_ARGUMENT, "q: missing");
    for (int i = WIRE_K; i <= WIRE_V; i++) {
        if (kind == LAYER_APPENDS && !message->present[i]) {
            return attn_error(ATTN_INVALID_ARGUMENT, "%s: missing; a step that appends needs k and v", names[i]);
        }
        if (kind == LAYER_READS && message->present[i]) {
            return attn_error(ATTN_INVALID_ARGUMENT, "%s: given, but the step is read-only", names[i]);
        }
    }
    return attn_ok();
}

dp_options layer_options(const Attnd__V1__AttentionOptions *options) {
    if (options == NULL) return (dp_options){0};
    return (dp_options){
        .scale = options->softmax_scale,
        .softcap = options->softcap,
        .window = options->sliding_window,
        .sinks = options->sinks,
        .sink_count = (uint32_t)options->n_sinks,
        .return_lse = options->return_lse != 0,
        .batch_invariant = options->batch_invariant != 0,
    };
}

static void layer_done(dp_layer_call *engine_call, attn_status status) {
    layer *layer = (void *)engine_call;
    if (attn_failed(status)) {
        attn_status_save(&layer->outcome, status);
    } else {
        layer->outcome.code = ATTN_OK;
    }
    call_post_from_engine(layer->call, engine_call->result != NULL ? engine_call->result->out_size : 0);
}

attn_status layer_start(layer *layer, call *call, dp_step *step, uint32_t number, const dp_options *options,
                        bool return_timing, const wire_message *message) {
    layer->call = call;
    layer->return_timing = return_timing;
    layer->started_ns = attn_now_ns();
    layer->engine = (dp_layer_call){
        .layer = number,
        .options = *options,
        .queries = message->tensors[WIRE_Q],
        .new_keys = message->tensors[WIRE_K],
        .new_values = message->tensors[WIRE_V],
        .deadline_ns = call->deadline_ns,
        .device_time = return_timing,
        .done = layer_done,
    };
    call_engine_begins(call);
    attn_status status = dp_step_layer(step, &layer->engine);
    if (attn_failed(status)) {
        call_engine_refused(call);
        return status;
    }
    layer->in_flight = true;
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* Steps that wait */

static void wait_ready(dp_wait *wait) { call_post_from_engine(((layer_wait *)(void *)wait)->call, 0); }

attn_status layer_begin_step(layer_wait *wait, call *call, const dp_step_request *request, dp_step **step) {
    dp_step_request waiting = *request;
    waiting.wait = &wait->engine;
    wait->engine.ready = wait_ready;
    wait->call = call;
    call_engine_begins(call);
    attn_status status = dp_step_begin(server_get_parts(call->server)->engine, &waiting, step);
    wait->in_flight = !attn_failed(status) && *step == NULL;
    if (!wait->in_flight) call_engine_refused(call);
    return status;
}

void layer_wait_withdraw(layer_wait *wait) {
    if (!dp_wait_withdraw(server_get_parts(wait->call->server)->engine, &wait->engine)) return;
    call_engine_refused(wait->call);
    wait->in_flight = false;
}

/* ------------------------------------------------------------------------------------------- */
/* Responses */

static void release_result(void *result) {
    handover_take(result);
    dp_result_release(result);
}

/* A result that two slices share: out and lse. */
typedef struct {
    dp_result *result;
    _Atomic int slices;
} shared_result;

static void release_shared(void *context) {
    shared_result *shared = context;
    handover_take(shared);
    if (atomic_fetch_sub_explicit(&shared->slices, 1, memory_order_acq_rel) > 1) return;
    dp_result_release(shared->result);
    free(shared);
}

static void fill_timing(const dp_rank_timing *timing, Attnd__V1__RankTiming *message) {
    attnd__v1__rank_timing__init(message);
    message->rank = timing->rank;
    message->sequences = timing->sequences;
    message->tokens = timing->tokens;
    message->queue_us = timing->queue_us;
    message->copy_in_us = timing->copy_in_us;
    message->plan_us = timing->plan_us;
    message->attention_us = timing->attention_us;
    message->combine_us = timing->combine_us;
    message->copy_out_us = timing->copy_out_us;
    message->merged_calls = timing->merged_calls;
    message->device_us = timing->device_us;
}

/* The fields before `out`, and the tag and length of `out`. Short ones live in the slice itself, without memory. */
static grpc_slice head_slice(const layer *layer, uint64_t step) {
    Attnd__V1__DecodeResponse response = ATTND__V1__DECODE_RESPONSE__INIT;
    Attnd__V1__RankTiming timing[DP_MAX_RANKS];
    Attnd__V1__RankTiming *timing_list[DP_MAX_RANKS];
    response.step = step;
    response.layer = layer->engine.layer;
    response.committed = layer->engine.committed;
    if (layer->return_timing) {
        response.n_timing = layer->engine.timing_count;
        response.timing = timing_list;
        for (uint32_t i = 0; i < layer->engine.timing_count; i++) {
            fill_timing(&layer->engine.timing[i], &timing[i]);
            timing_list[i] = &timing[i];
        }
    }
    uint8_t tag[WIRE_LENGTH_BYTES];
    size_t tag_size = wire_put_length(tag, 16, layer->engine.result->out_size);
    size_t size = protobuf_c_message_get_packed_size(&response.base);
    grpc_slice slice = grpc_slice_malloc(size + tag_size);
    uint8_t *bytes = GRPC_SLICE_START_PTR(slice);
    protobuf_c_message_pack(&response.base, bytes);
    for (size_t i = 0; i < tag_size; i++) {
        bytes[size + i] = tag[i];
    }
    return slice;
}

/* The result is gRPC's once its slices are made: nothing here may touch it after handover_give. */
size_t layer_response(layer *layer, uint64_t step, grpc_slice slices[LAYER_SLICES]) {
    dp_result *result = layer->engine.result;
    slices[0] = head_slice(layer, step);
    layer->engine.result = NULL;
    shared_result *shared = result->lse != NULL ? malloc(sizeof *shared) : NULL;
    if (shared == NULL) {
        slices[1] = grpc_slice_new_with_user_data(result->out, result->out_size, release_result, result);
        handover_give(result);
        return 2;
    }
    *shared = (shared_result){.result = result, .slices = 2};
    uint8_t tag[WIRE_LENGTH_BYTES];
    slices[1] = grpc_slice_new_with_user_data(result->out, result->out_size, release_shared, shared);
    slices[2] = grpc_slice_from_copied_buffer((const char *)tag, wire_put_length(tag, 17, result->lse_size));
    slices[3] = grpc_slice_new_with_user_data(result->lse, result->lse_size, release_shared, shared);
    handover_give(shared);
    return 4;
}

void layer_drop_result(layer *layer) {
    if (layer->engine.result == NULL) return;
    dp_result_release(layer->engine.result);
    layer->engine.result = NULL;
}

void layer_detain(layer *layer, dp_step *step, grpc_byte_buffer **buffer, float **sinks) {
    if (!layer->engine.detained) return;
    layer->engine.detained = false;
    dp_step_keep(step, call_detain(layer->call, buffer, sinks != NULL ? *sinks : NULL));
    if (sinks != NULL) *sinks = NULL;
}

grpc_slice layer_empty_response(uint64_t step) {
    Attnd__V1__DecodeResponse response = ATTND__V1__DECODE_RESPONSE__INIT;
    response.step = step;
    return call_pack(&response.base);
}
