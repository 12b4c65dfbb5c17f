/* Between protobuf-c messages and gRPC byte buffers, for the benches' clients. A failure ends the program. */
#ifndef ATTND_TESTS_BENCH_FRONT_MESSAGES_H
#define ATTND_TESTS_BENCH_FRONT_MESSAGES_H

#include <stddef.h>
#include <stdint.h>

#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <protobuf-c/protobuf-c.h>

/*
 * `message`, and behind it the tag and length of a bytes field of `size` bytes: what comes before a large tensor that
 * is a slice of its own. `field` 0: the message alone.
 */
grpc_slice bench_head_slice(const ProtobufCMessage *message, uint32_t field, size_t size);

/* The whole message. The caller destroys the buffer. */
grpc_byte_buffer *bench_pack(const ProtobufCMessage *message);

/* The caller frees it with protobuf_c_message_free_unpacked; the buffer remains his. */
void *bench_unpack(const ProtobufCMessageDescriptor *descriptor, grpc_byte_buffer *buffer);

#endif
