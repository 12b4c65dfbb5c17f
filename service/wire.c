#include "service/wire.h"

#include <inttypes.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bytes of a varint at most. */
#define VARINT_BYTES 10
#define PREFIX_BYTES 5 /* a tag or a length, as other parsers have it, protobuf-c among them */

/* How deep messages may nest; the proto's own depth is 3. */
#define DEPTH_LIMIT 8

/* What a reader keeps between messages. */
#define KEPT_HEADER_BYTES (64u << 10)
#define KEPT_ARENA_BYTES  (256u << 10)
#define KEPT_PIECES       4096u

/* ------------------------------------------------------------------------------------------- */
/* Arena: protobuf-c's allocator. Blocks in a list, the newest first; only it has room. */

#define ARENA_FIRST_BLOCK 4096u

/* A header of WIRE_HEADER_LIMIT bytes unpacks to at most about 30 times its size (tags without values). */
#define ARENA_LIMIT (64u << 20)

struct wire_block {
    struct wire_block *next;
    size_t capacity;
    size_t used;
    alignas(max_align_t) uint8_t bytes[];
};

static struct wire_block *arena_add_block(wire_arena *arena, size_t size) {
    size_t capacity = arena->blocks == NULL ? ARENA_FIRST_BLOCK : 2 * arena->blocks->capacity;
    if (capacity < size) capacity = size;
    if (capacity > ARENA_LIMIT - arena->total) return NULL;
    struct wire_block *block = malloc(sizeof *block + capacity);
    if (block == NULL) return NULL;
    *block = (struct wire_block){.next = arena->blocks, .capacity = capacity};
    arena->blocks = block;
    arena->total += capacity;
    return block;
}

static void *arena_allocate(void *context, size_t size) {
    wire_arena *arena = context;
    if (size > ARENA_LIMIT) return NULL;
    size = (size + alignof(max_align_t) - 1) & ~(alignof(max_align_t) - 1);
    struct wire_block *block = arena->blocks;
    if (block == NULL || block->capacity - block->used < size) block = arena_add_block(arena, size);
    if (block == NULL) return NULL;
    void *memory = block->bytes + block->used;
    block->used += size;
    return memory;
}

static void arena_free_piece(void *context, void *memory) {
    (void)context;
    (void)memory;
}

static void arena_free_blocks(wire_arena *arena) {
    struct wire_block *block = arena->blocks;
    while (block != NULL) {
        struct wire_block *next = block->next;
        free(block);
        block = next;
    }
    *arena = (wire_arena){0};
}

/* Everything allocated becomes invalid. The newest block, the largest, stays for reuse. */
static void arena_reset(wire_arena *arena) {
    struct wire_block *newest = arena->blocks;
    if (newest == NULL) return;
    arena->blocks = newest->next;
    arena_free_blocks(arena);
    newest->next = NULL;
    newest->used = 0;
    arena->blocks = newest;
    arena->total = newest->capacity;
}

/* ------------------------------------------------------------------------------------------- */
/* Reader */

void wire_reader_init(wire_reader *reader) { *reader = (wire_reader){0}; }

void wire_reader_fini(wire_reader *reader) {
    free(reader->header);
    free(reader->spans);
    free(reader->pieces);
    arena_free_blocks(&reader->arena);
    *reader = (wire_reader){0};
}

void wire_reader_trim(wire_reader *reader) {
    arena_reset(&reader->arena);
    if (reader->arena.total > KEPT_ARENA_BYTES) arena_free_blocks(&reader->arena);
    if (reader->header_capacity > KEPT_HEADER_BYTES) {
        free(reader->header);
        reader->header = NULL;
        reader->header_capacity = 0;
    }
    if (reader->span_capacity > KEPT_PIECES) {
        free(reader->spans);
        reader->spans = NULL;
        reader->span_capacity = 0;
    }
    if (reader->piece_capacity > KEPT_PIECES) {
        free(reader->pieces);
        reader->pieces = NULL;
        reader->piece_capacity = 0;
    }
}

/* Makes *spans hold `count`, contents lost. False if there is no memory. */
static bool reserve_spans(dp_span **spans, size_t *capacity, size_t count) {
    if (count <= *capacity && *spans != NULL) return true;
    size_t wanted = count < 64 ? 64 : count + count / 2;
    dp_span *grown = malloc(wanted * sizeof *grown);
    if (grown == NULL) return false;
    free(*spans);
    *spans = grown;
    *capacity = wanted;
    return true;
}

dp_span *wire_reader_pieces(wire_reader *reader, size_t count) {
    return reserve_spans(&reader->pieces, &reader->piece_capacity, count) ? reader->pieces : NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Field paths, for messages */

typedef struct field_path {
    const struct field_path *parent; /* NULL: top level */
    const char *name;                /* NULL: not a known field */
    uint32_t number;
} field_path;

#define PATH_BYTES 128

static size_t path_print(const field_path *path, char *to, size_t size) {
    size_t used = 0;
    if (path->parent != NULL) {
        used = path_print(path->parent, to, size);
        if (used + 1 < size) to[used++] = '.';
    }
    int printed = path->name != NULL ? snprintf(to + used, size - used, "%s", path->name)
                                     : snprintf(to + used, size - used, "field %" PRIu32, path->number);
    used += printed > 0 ? (size_t)printed : 0;
    return used < size ? used : size - 1;
}

/* INVALID_ARGUMENT "<path>: <what>". */
static attn_status field_error(const field_path *path, const char *what) {
    char name[PATH_BYTES];
    path_print(path, name, sizeof name);
    return attn_error(ATTN_INVALID_ARGUMENT, "%s: %s", name, what);
}

/* ------------------------------------------------------------------------------------------- */
/* Cursor: a place in the pieces */

typedef struct {
    const uint8_t *at, *end; /* in the current piece; at == end only where remaining == 0 */
    const dp_span *next;     /* the piece after it */
    size_t remaining;        /* bytes of the message from `at` on, in all pieces */
} cursor;

static void cursor_enter_piece(cursor *in) {
    while (in->at == in->end && in->remaining > 0) {
        if (in->next->size > 0) {
            in->at = in->next->data;
            in->end = in->at + in->next->size;
        }
        in->next++;
    }
}

static cursor cursor_over(const dp_span *pieces, size_t count) {
    cursor in = {.next = pieces};
    for (size_t i = 0; i < count; i++) {
        in.remaining += pieces[i].size;
    }
    cursor_enter_piece(&in);
    return in;
}

/* Bytes of `size` that lie in the current piece. */
static size_t cursor_run(const cursor *in, size_t size) {
    size_t run = (size_t)(in->end - in->at);
    return run < size ? run : size;
}

/* `size` is at most cursor_run(). */
static void cursor_advance(cursor *in, size_t size) {
    in->at += size;
    in->remaining -= size;
    cursor_enter_piece(in);
}

/* `size` is at most in->remaining, here and below. */
static void cursor_skip(cursor *in, size_t size) {
    while (size > 0) {
        size_t run = cursor_run(in, size);
        cursor_advance(in, run);
        size -= run;
    }
}

static void cursor_copy(cursor *in, uint8_t *to, size_t size) {
    while (size > 0) {
        size_t run = cursor_run(in, size);
        memcpy(to, in->at, run);
        cursor_advance(in, run);
        to += run;
        size -= run;
    }
}

/* NULL, or what is wrong with the varint. */
static const char *cursor_varint(cursor *in, uint64_t *value) {
    uint64_t bits = 0;
    for (unsigned i = 0; i < VARINT_BYTES; i++) {
        if (in->remaining == 0) return "cut off: the message ends within a varint";
        uint8_t byte = *in->at;
        cursor_advance(in, 1);
        bits |= (uint64_t)(byte & 0x7f) << (7 * i);
        if ((byte & 0x80) == 0) {
            *value = bits;
            return NULL;
        }
    }
    return "malformed: a varint of more than 10 bytes";
}

/* The same of a tag or a length. */
static const char *cursor_prefix(cursor *in, uint64_t *value) {
    size_t before = in->remaining;
    const char *wrong = cursor_varint(in, value);
    if (wrong != NULL || before - in->remaining <= PREFIX_BYTES) return wrong;
    return "malformed: a tag or a length of more than 5 bytes";
}

/* ------------------------------------------------------------------------------------------- */
/* Header: the fields that are not tensors, encoded anew, contiguous */

static size_t put_varint(uint8_t *to, uint64_t value) {
    size_t used = 0;
    while (value >= 0x80) {
        to[used++] = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    to[used++] = (uint8_t)value;
    return used;
}

size_t wire_put_length(uint8_t *to, uint32_t field, uint64_t length) {
    size_t used = put_varint(to, (uint64_t)field << 3 | PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED);
    return used + put_varint(to + used, length);
}

/* Room for `size` more bytes. */
static attn_status header_reserve(wire_reader *reader, const field_path *path, size_t size) {
    size_t wanted = reader->header_size + size; /* no overflow: both are bounded by memory that exists */
    if (wanted > WIRE_HEADER_LIMIT) {
        char name[PATH_BYTES];
        path_print(path, name, sizeof name);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "%s: the fields that are not tensors exceed %u bytes", name,
                          WIRE_HEADER_LIMIT);
    }
    if (wanted <= reader->header_capacity) return attn_ok();
    size_t capacity = reader->header_capacity == 0 ? 512 : 2 * reader->header_capacity;
    if (capacity < wanted) capacity = wanted;
    uint8_t *grown = realloc(reader->header, capacity);
    if (grown == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a message header");
    reader->header = grown;
    reader->header_capacity = capacity;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Scan */

typedef struct {
    wire_reader *reader;   /* NULL: check only */
    wire_message *message; /* likewise */
    size_t spans_used;
} scan_target;

static attn_status scan_message(scan_target *target, cursor *in, const ProtobufCMessageDescriptor *descriptor,
                                const field_path *parent, unsigned depth);

/* The wire type of one value of a field. */
static uint32_t value_wire_type(ProtobufCType type) {
    switch (type) {
    case PROTOBUF_C_TYPE_SFIXED32:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_FLOAT: return PROTOBUF_C_WIRE_TYPE_32BIT;
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_DOUBLE: return PROTOBUF_C_WIRE_TYPE_64BIT;
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE: return PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED;
    default: return PROTOBUF_C_WIRE_TYPE_VARINT;
    }
}

static bool is_packed(const ProtobufCFieldDescriptor *field, uint32_t wire_type) {
    return field->label == PROTOBUF_C_LABEL_REPEATED && wire_type == PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED &&
           value_wire_type(field->type) != PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED;
}

/* Checks the `size` contiguous bytes of a packed repeated field. */
static attn_status check_packed(const ProtobufCFieldDescriptor *field, const uint8_t *bytes, size_t size,
                                const field_path *path) {
    uint32_t wire_type = value_wire_type(field->type);
    if (wire_type == PROTOBUF_C_WIRE_TYPE_32BIT || wire_type == PROTOBUF_C_WIRE_TYPE_64BIT) {
        size_t each = wire_type == PROTOBUF_C_WIRE_TYPE_32BIT ? 4 : 8;
        return size % each == 0 ? attn_ok()
                                : field_error(path, "malformed: the packed length is not a multiple of the value size");
    }
    dp_span piece = {bytes, size};
    cursor in = cursor_over(&piece, 1);
    while (in.remaining > 0) {
        uint64_t value;
        const char *wrong = cursor_varint(&in, &value);
        if (wrong != NULL) return field_error(path, wrong);
    }
    return attn_ok();
}

/* Checks the contents of a length-delimited field that lies in one piece. */
static attn_status check_contents(const ProtobufCFieldDescriptor *field, const uint8_t *bytes, size_t size,
                                  const field_path *path, unsigned depth) {
    if (is_packed(field, PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED)) return check_packed(field, bytes, size, path);
    if (field->type != PROTOBUF_C_TYPE_MESSAGE) return attn_ok();
    dp_span piece = {bytes, size};
    cursor in = cursor_over(&piece, 1);
    return scan_message(&(scan_target){0}, &in, field->descriptor, path, depth + 1);
}

static bool is_tensor(const scan_target *target, const ProtobufCFieldDescriptor *field) {
    return target->message != NULL && field->type == PROTOBUF_C_TYPE_BYTES && field->id >= WIRE_TENSOR_FIELD &&
           field->id < WIRE_TENSOR_FIELD + WIRE_TENSORS;
}

static attn_status take_tensor(scan_target *target, cursor *in, size_t size, const field_path *path) {
    uint32_t index = path->number - WIRE_TENSOR_FIELD;
    if (target->message->present[index]) return field_error(path, "given twice");
    target->message->present[index] = true;
    dp_tensor_view *view = &target->message->tensors[index];
    *view = (dp_tensor_view){.spans = target->reader->spans + target->spans_used, .size = size};
    while (size > 0) {
        size_t run = cursor_run(in, size);
        target->reader->spans[target->spans_used++] = (dp_span){in->at, run};
        view->count++;
        cursor_advance(in, run);
        size -= run;
    }
    return attn_ok();
}

/* Copies a length-delimited field to the header, or skips it, and checks what is in it. */
static attn_status take_contents(scan_target *target, cursor *in, const ProtobufCFieldDescriptor *field, size_t size,
                                 const field_path *path, unsigned depth) {
    if (target->reader == NULL) {
        /* Inside a header everything lies in one piece. */
        ATTN_TRY(check_contents(field, in->at, size, path, depth));
        cursor_skip(in, size);
        return attn_ok();
    }
    wire_reader *reader = target->reader;
    ATTN_TRY(header_reserve(reader, path, WIRE_LENGTH_BYTES + size));
    reader->header_size += wire_put_length(reader->header + reader->header_size, field->id, size);
    uint8_t *contents = reader->header + reader->header_size;
    cursor_copy(in, contents, size);
    reader->header_size += size;
    return check_contents(field, contents, size, path, depth);
}

static attn_status scan_length_delimited(scan_target *target, cursor *in, const ProtobufCFieldDescriptor *field,
                                         const field_path *path, unsigned depth) {
    uint64_t size;
    const char *wrong = cursor_prefix(in, &size);
    if (wrong != NULL) return field_error(path, wrong);
    if (size > in->remaining) {
        char name[PATH_BYTES];
        path_print(path, name, sizeof name);
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: cut off: a length of %" PRIu64 " bytes with %zu left", name, size,
                          in->remaining);
    }
    if (field == NULL) {
        cursor_skip(in, (size_t)size);
        return attn_ok();
    }
    if (is_tensor(target, field)) return take_tensor(target, in, (size_t)size, path);
    return take_contents(target, in, field, (size_t)size, path, depth);
}

/* Reads a value that is not length-delimited and copies it to the header. */
static attn_status scan_scalar(scan_target *target, cursor *in, const ProtobufCFieldDescriptor *field,
                               uint32_t wire_type, const field_path *path) {
    uint8_t bytes[VARINT_BYTES];
    size_t size;
    if (wire_type == PROTOBUF_C_WIRE_TYPE_VARINT) {
        uint64_t value;
        const char *wrong = cursor_varint(in, &value);
        if (wrong != NULL) return field_error(path, wrong);
        size = put_varint(bytes, value);
    } else {
        size = wire_type == PROTOBUF_C_WIRE_TYPE_32BIT ? 4 : 8;
        if (size > in->remaining) return field_error(path, "cut off: the message ends within a value");
        cursor_copy(in, bytes, size);
    }
    if (field == NULL || target->reader == NULL) return attn_ok();
    wire_reader *reader = target->reader;
    ATTN_TRY(header_reserve(reader, path, WIRE_LENGTH_BYTES + size));
    reader->header_size += put_varint(reader->header + reader->header_size, (uint64_t)field->id << 3 | wire_type);
    memcpy(reader->header + reader->header_size, bytes, size);
    reader->header_size += size;
    return attn_ok();
}

static attn_status scan_field(scan_target *target, cursor *in, const ProtobufCMessageDescriptor *descriptor,
                              const field_path *parent, unsigned depth) {
    static const field_path tag_path = {.name = "message"};
    uint64_t tag;
    const char *wrong = cursor_prefix(in, &tag);
    if (wrong != NULL) return field_error(parent != NULL ? parent : &tag_path, wrong);
    uint32_t wire_type = (uint32_t)(tag & 7);
    if (tag >> 3 == 0 || tag > UINT32_MAX) {
        return field_error(parent != NULL ? parent : &tag_path, "malformed: a field number out of range");
    }
    field_path path = {.parent = parent, .number = (uint32_t)(tag >> 3)};
    const ProtobufCFieldDescriptor *field = protobuf_c_message_descriptor_get_field(descriptor, path.number);
    if (field != NULL) {
        path.name = field->name;
        if (wire_type != value_wire_type(field->type) && !is_packed(field, wire_type)) {
            return field_error(&path, "malformed: another wire type than the field's");
        }
    }
    switch (wire_type) {
    case PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED: return scan_length_delimited(target, in, field, &path, depth);
    case PROTOBUF_C_WIRE_TYPE_VARINT:
    case PROTOBUF_C_WIRE_TYPE_32BIT:
    case PROTOBUF_C_WIRE_TYPE_64BIT: return scan_scalar(target, in, field, wire_type, &path);
    default: return field_error(&path, "malformed: groups and unknown wire types are not accepted");
    }
}

static attn_status scan_message(scan_target *target, cursor *in, const ProtobufCMessageDescriptor *descriptor,
                                const field_path *parent, unsigned depth) {
    if (depth > DEPTH_LIMIT) return field_error(parent, "nested too deeply");
    while (in->remaining > 0) {
        ATTN_TRY(scan_field(target, in, descriptor, parent, depth));
    }
    return attn_ok();
}

attn_status wire_read(wire_reader *reader, const ProtobufCMessageDescriptor *descriptor, const dp_span *pieces,
                      size_t count, wire_message *message) {
    *message = (wire_message){0};
    reader->header_size = 0;
    arena_reset(&reader->arena);
    /* Tensors do not overlap: each piece border adds one span at most. */
    if (!reserve_spans(&reader->spans, &reader->span_capacity, count + WIRE_TENSORS)) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %zu message pieces", count);
    }
    scan_target target = {.reader = reader, .message = message};
    cursor in = cursor_over(pieces, count);
    ATTN_TRY(scan_message(&target, &in, descriptor, NULL, 0));

    ProtobufCAllocator allocator = {arena_allocate, arena_free_piece, &reader->arena};
    static const uint8_t nothing[1];
    message->message = protobuf_c_message_unpack(descriptor, &allocator, reader->header_size,
                                                 reader->header != NULL ? reader->header : nothing);
    if (message->message == NULL) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "message: its fields need more than %u bytes unpacked", ARENA_LIMIT);
    }
    return attn_ok();
}
