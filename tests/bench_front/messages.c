#include "tests/bench_front/messages.h"

#include <grpc/byte_buffer_reader.h>

#include "tests/bench_front/bench.h"

enum { MOST_TAG_BYTES = 5, MOST_LENGTH_BYTES = 10 };

static size_t put_varint(uint8_t *bytes, uint64_t value) {
    size_t used = 0;
    for (; value >= 0x80; value >>= 7) {
        bytes[used++] = (uint8_t)(value | 0x80);
    }
    bytes[used++] = (uint8_t)value;
    return used;
}

grpc_slice bench_head_slice(const ProtobufCMessage *message, uint32_t field, size_t size) {
    size_t used = protobuf_c_message_get_packed_size(message);
    grpc_slice slice = grpc_slice_malloc_large(used + MOST_TAG_BYTES + MOST_LENGTH_BYTES);
    uint8_t *bytes = GRPC_SLICE_START_PTR(slice);
    protobuf_c_message_pack(message, bytes);
    if (field != 0) {
        used += put_varint(bytes + used, (uint64_t)field << 3 | 2);
        used += put_varint(bytes + used, size);
    }
    grpc_slice head = grpc_slice_sub(slice, 0, used);
    grpc_slice_unref(slice);
    return head;
}

grpc_byte_buffer *bench_pack(const ProtobufCMessage *message) {
    grpc_slice slice = bench_head_slice(message, 0, 0);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

void *bench_unpack(const ProtobufCMessageDescriptor *descriptor, grpc_byte_buffer *buffer) {
    grpc_byte_buffer_reader reader;
    BENCH_CHECK(grpc_byte_buffer_reader_init(&reader, buffer), "a broken message");
    grpc_slice whole = grpc_byte_buffer_reader_readall(&reader);
    void *message = protobuf_c_message_unpack(descriptor, NULL, GRPC_SLICE_LENGTH(whole), GRPC_SLICE_START_PTR(whole));
    BENCH_CHECK(message != NULL, "not a %s", descriptor->name);
    grpc_slice_unref(whole);
    grpc_byte_buffer_reader_destroy(&reader);
    return message;
}
