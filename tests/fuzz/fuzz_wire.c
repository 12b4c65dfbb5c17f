/*
 * The wire scanner, with every request message.
 *
 * Input: one byte chooses the message type, one says how many cuts follow, then a position of two
 * bytes for each, then the message. The message is read twice: in one piece, and cut into pieces that
 * lie in memory of their own, so that a read past any piece's end is found. What must hold:
 *   - where it is cut makes no difference, to the result or to the error
 *   - what the scanner accepts, protobuf-c accepts, and both see the same message and tensors
 *   - spans lie within the pieces and make up the tensor's size
 */
#include <stdlib.h>
#include <string.h>

#include "proto/attnd.pb-c.h"
#include "proto/health.pb-c.h"
#include "proto/reflection.pb-c.h"
#include "service/wire.h"
#include "tests/fuzz/fuzz.h"

#define CUTS_MAX 15

static const ProtobufCMessageDescriptor *const types[] = {
    &attnd__v1__decode_request__descriptor,
    &attnd__v1__decode_stream_request__descriptor,
    &attnd__v1__append_kv_request__descriptor,
    &attnd__v1__get_server_info_request__descriptor,
    &attnd__v1__open_sequences_request__descriptor,
    &attnd__v1__fork_sequence_request__descriptor,
    &attnd__v1__truncate_sequence_request__descriptor,
    &attnd__v1__close_sequences_request__descriptor,
    &attnd__v1__describe_sequences_request__descriptor,
    &grpc__health__v1__health_check_request__descriptor,
    &grpc__reflection__v1__server_reflection_request__descriptor,
};

#define TYPES (sizeof(types) / sizeof(types[0]))

/* ------------------------------------------------------------------------------------------- */

static uint8_t *gather(const dp_tensor_view *tensor) {
    uint8_t *bytes = malloc(tensor->size + 1);
    size_t used = 0;
    for (uint32_t i = 0; i < tensor->count; i++) {
        memcpy(bytes + used, tensor->spans[i].data, tensor->spans[i].size);
        used += tensor->spans[i].size;
    }
    FUZZ_CHECK(used == tensor->size);
    return bytes;
}

static void check_same_tensor(const dp_tensor_view *tensor, const uint8_t *bytes, size_t size) {
    uint8_t *gathered = gather(tensor);
    FUZZ_CHECK(tensor->size == size);
    FUZZ_CHECK(size == 0 || memcmp(gathered, bytes, size) == 0);
    free(gathered);
}

static uint8_t *pack(const ProtobufCMessage *message, size_t *size) {
    *size = protobuf_c_message_get_packed_size(message);
    uint8_t *packed = malloc(*size + 1);
    FUZZ_CHECK(protobuf_c_message_pack(message, packed) == *size);
    return packed;
}

static void check_same_fields(const ProtobufCMessage *one, const ProtobufCMessage *other) {
    size_t one_size, other_size;
    uint8_t *one_packed = pack(one, &one_size);
    uint8_t *other_packed = pack(other, &other_size);
    FUZZ_CHECK(one_size == other_size);
    FUZZ_CHECK(memcmp(one_packed, other_packed, one_size) == 0);
    free(one_packed);
    free(other_packed);
}

/* ------------------------------------------------------------------------------------------- */
/* Against protobuf-c */

/* Takes the tensors out of a message that protobuf-c unpacked, comparing them with the scanner's views. */
static void take_out_tensors(ProtobufCMessage *unpacked, const wire_message *read) {
    for (int i = 0; i < WIRE_TENSORS; i++) {
        const ProtobufCFieldDescriptor *field =
            protobuf_c_message_descriptor_get_field(unpacked->descriptor, WIRE_TENSOR_FIELD + (unsigned)i);
        if (field == NULL || field->type != PROTOBUF_C_TYPE_BYTES) {
            FUZZ_CHECK(!read->present[i]);
            continue;
        }
        /* A oneof of one: the case is the field's number if it is there. */
        uint32_t *which = (uint32_t *)((char *)unpacked + field->quantifier_offset);
        ProtobufCBinaryData *bytes = (ProtobufCBinaryData *)((char *)unpacked + field->offset);
        FUZZ_CHECK(read->present[i] == (*which == field->id));
        if (!read->present[i]) continue;
        check_same_tensor(&read->tensors[i], bytes->data, bytes->len);
        free(bytes->data);
        memset(bytes, 0, sizeof(*bytes));
        *which = 0;
    }
}

/* The scanner keeps no unknown fields at the top level. */
static void drop_unknown_fields(ProtobufCMessage *unpacked) {
    for (unsigned i = 0; i < unpacked->n_unknown_fields; i++) {
        free(unpacked->unknown_fields[i].data);
    }
    free(unpacked->unknown_fields);
    unpacked->unknown_fields = NULL;
    unpacked->n_unknown_fields = 0;
}

static void check_against_protobuf_c(const ProtobufCMessageDescriptor *type, const uint8_t *bytes, size_t size,
                                     const wire_message *read) {
    ProtobufCMessage *unpacked = protobuf_c_message_unpack(type, NULL, size, bytes);
    FUZZ_CHECK(unpacked != NULL);
    take_out_tensors(unpacked, read);
    drop_unknown_fields(unpacked);
    check_same_fields(read->message, unpacked);
    protobuf_c_message_free_unpacked(unpacked, NULL);
}

/* ------------------------------------------------------------------------------------------- */
/* Cut into pieces */

typedef struct {
    dp_span spans[CUTS_MAX + 1];
    size_t count;
} cut_message;

static cut_message cut(const uint8_t *bytes, size_t size, const uint8_t *cuts, size_t cut_count) {
    cut_message made = {0};
    size_t from = 0;
    for (size_t i = 0; i <= cut_count; i++) {
        size_t to = i < cut_count ? (size_t)(cuts[2 * i] | cuts[2 * i + 1] << 8) % (size + 1) : size;
        if (to < from) to = from; /* an empty piece */
        uint8_t *piece = malloc(to - from > 0 ? to - from : 1);
        if (to > from) memcpy(piece, bytes + from, to - from);
        made.spans[made.count++] = (dp_span){piece, to - from};
        from = to;
    }
    return made;
}

static void free_pieces(cut_message *made) {
    for (size_t i = 0; i < made->count; i++) {
        free((void *)(uintptr_t)made->spans[i].data);
    }
}

static void check_spans_lie_within_pieces(const wire_message *read, const cut_message *made) {
    for (int i = 0; i < WIRE_TENSORS; i++) {
        for (uint32_t j = 0; j < read->tensors[i].count; j++) {
            const dp_span *span = &read->tensors[i].spans[j];
            bool within = false;
            for (size_t k = 0; k < made->count; k++) {
                const char *piece = made->spans[k].data;
                const char *start = span->data;
                within |= start >= piece && start + span->size <= piece + made->spans[k].size;
            }
            FUZZ_CHECK(within && span->size > 0);
        }
    }
}

static void check_same_result(const wire_message *one, const wire_message *other) {
    for (int i = 0; i < WIRE_TENSORS; i++) {
        FUZZ_CHECK(one->present[i] == other->present[i]);
        uint8_t *bytes = gather(&other->tensors[i]);
        check_same_tensor(&one->tensors[i], bytes, other->tensors[i].size);
        free(bytes);
    }
    check_same_fields(one->message, other->message);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    static wire_reader whole_reader, cut_reader; /* kept from input to input, as a connection's are */
    wire_message whole_read, cut_read;
    attn_saved_status whole_status;
    if (size < 2) return 0;
    const ProtobufCMessageDescriptor *type = types[input[0] % TYPES];
    size_t cuts = input[1] % (CUTS_MAX + 1);
    if (size < 2 + 2 * cuts) return 0;
    const uint8_t *bytes = input + 2 + 2 * cuts;
    size -= 2 + 2 * cuts;

    cut_message whole = cut(bytes, size, NULL, 0);
    cut_message pieces = cut(bytes, size, input + 2, cuts);
    attn_status_save(&whole_status, wire_read(&whole_reader, type, whole.spans, whole.count, &whole_read));
    attn_status cut_status = wire_read(&cut_reader, type, pieces.spans, pieces.count, &cut_read);

    FUZZ_CHECK(whole_status.code == cut_status.code);
    FUZZ_CHECK(whole_status.code == ATTN_OK || strcmp(whole_status.message, cut_status.message) == 0);
    if (whole_status.code == ATTN_OK) {
        check_spans_lie_within_pieces(&cut_read, &pieces);
        check_same_result(&cut_read, &whole_read);
        check_against_protobuf_c(type, bytes, size, &whole_read);
    }
    wire_reader_trim(&whole_reader);
    wire_reader_trim(&cut_reader);
    free_pieces(&whole);
    free_pieces(&pieces);
    return 0;
}
