/*
 * Request messages without copies: from the bytes of a protobuf message, in as many pieces as the
 * transport has them, to the unpacked message and views of its tensors.
 *
 * A tensor is a top-level `bytes` field numbered 16, 17 or 18 (q, k, v). It is never touched: its
 * view is a list of spans into the pieces it came in. All other fields, small by nature, are copied
 * into one contiguous header, checked, and unpacked by protobuf-c. In a message of this many bytes
 *
 *   pieces   |08 03 12 08 .. .. .. ..|.. .. 82 01 80 80 04 q q q|q q q q q q q|q q q q 8a 01 ..|
 *   header    08 03 12 08 .. .. .. .. .. ..
 *   q                                                      ^----- ^------------ ^------
 *
 * the payload may be split over the pieces at any byte.
 *
 * Stricter than protobuf where a client must be wrong: a tensor that comes twice, groups, field
 * number 0, a known field with another wire type than its own, varints of more than ten bytes, and
 * lengths past the end are all refused. Unknown fields are skipped, and not kept. Errors are
 * ATTN_INVALID_ARGUMENT and name the field ("begin.sequences: .."); ATTN_RESOURCE_EXHAUSTED if the
 * fields that are not tensors are larger than WIRE_HEADER_LIMIT together.
 *
 * Memory: a wire_reader keeps what one message needs and uses it again for the next, so that a
 * connection's steady state allocates nothing. Nothing in it grows with the tensors' size, but the
 * list of spans with the number of pieces.
 *
 * Threads: a reader and what it has read belong to one thread at a time.
 */
#ifndef ATTND_SERVICE_WIRE_H
#define ATTND_SERVICE_WIRE_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "dp/engine.h"

#define WIRE_TENSORS 3

/* Field numbers less WIRE_TENSOR_FIELD. */
enum { WIRE_Q = 0, WIRE_K = 1, WIRE_V = 2 };

#define WIRE_TENSOR_FIELD 16

/* Bytes of one message that are not tensors. */
#define WIRE_HEADER_LIMIT (1u << 20)

/* Memory that is given out piece by piece and taken back as a whole; see wire.c. */
typedef struct {
    struct wire_block *blocks;
    size_t total;
} wire_arena;

typedef struct {
    uint8_t *header;
    size_t header_size, header_capacity;
    dp_span *spans;
    size_t span_capacity;
    dp_span *pieces;
    size_t piece_capacity;
    wire_arena arena;
} wire_reader;

/* What was read. Valid until the reader's next use; the spans as long as the pieces. */
typedef struct {
    const ProtobufCMessage *message; /* of the type asked for, less its tensors */
    dp_tensor_view tensors[WIRE_TENSORS];
    bool present[WIRE_TENSORS]; /* a tensor may be present and empty */
} wire_message;

/* Allocates nothing. */
void wire_reader_init(wire_reader *reader);

void wire_reader_fini(wire_reader *reader);

/* Done with the last message: gives back what an unusually large one needed and keeps the rest for the next. */
void wire_reader_trim(wire_reader *reader);

/* Room for `count` pieces, for the caller of wire_read to fill. NULL if there is no memory. */
dp_span *wire_reader_pieces(wire_reader *reader, size_t count);

/*
 * Reads a message of type `descriptor` from `count` pieces; empty pieces are fine. On failure
 * *message is unspecified and the reader may be used again.
 */
attn_status wire_read(wire_reader *reader, const ProtobufCMessageDescriptor *descriptor, const dp_span *pieces,
                      size_t count, wire_message *message);

/* Most bytes that wire_put_length writes. */
#define WIRE_LENGTH_BYTES 15

/* Writes the tag of a length-delimited field and its length; returns the bytes written. */
size_t wire_put_length(uint8_t *to, uint32_t field, uint64_t length);

#endif
