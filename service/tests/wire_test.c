/* The wire scanner: every split, every truncation, every flipped bit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/attnd.pb-c.h"
#include "service/wire.h"

#define DECODE (&attnd__v1__decode_request__descriptor)
#define STREAM (&attnd__v1__decode_stream_request__descriptor)

/* ------------------------------------------------------------------------------------------- */
/* Building messages */

typedef struct {
    uint8_t bytes[4096];
    size_t size;
} buffer;

static void put_varint(buffer *to, uint64_t value) {
    while (value >= 0x80) {
        to->bytes[to->size++] = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    to->bytes[to->size++] = (uint8_t)value;
}

static void put_tag(buffer *to, uint32_t field, uint32_t wire_type) {
    put_varint(to, (uint64_t)field << 3 | wire_type);
}

static void put_bytes(buffer *to, uint32_t field, const void *bytes, size_t size) {
    put_tag(to, field, 2);
    put_varint(to, size);
    memcpy(to->bytes + to->size, bytes, size);
    to->size += size;
}

static void put_raw(buffer *to, const void *bytes, size_t size) {
    memcpy(to->bytes + to->size, bytes, size);
    to->size += size;
}

/* A request with every kind of field, its tensors in the middle. */
static buffer sample(void) {
    uint64_t sequences[3] = {0x1122334455667788, 1, UINT64_MAX};
    uint32_t lengths[3] = {1, 128, 3};
    float sinks[2] = {0.5f, -2.0f};
    Attnd__V1__AttentionOptions options = ATTND__V1__ATTENTION_OPTIONS__INIT;
    options.softmax_scale = 0.125f;
    options.sliding_window = 300;
    options.n_sinks = 2;
    options.sinks = sinks;
    options.return_lse = 1;
    Attnd__V1__DecodeRequest request = ATTND__V1__DECODE_REQUEST__INIT;
    request.step = 0xfedcba9876543210;
    request.layer = 300;
    request.n_sequences = 3;
    request.sequences = sequences;
    request.n_query_lengths = 3;
    request.query_lengths = lengths;
    buffer message = {.size = 0};
    message.size = protobuf_c_message_pack(&request.base, message.bytes);
    uint8_t tensor[40];
    for (size_t i = 0; i < sizeof tensor; i++) {
        tensor[i] = (uint8_t)(i * 7 + 1);
    }
    put_bytes(&message, 16, tensor, 40);
    put_bytes(&message, 17, tensor, 20);
    put_bytes(&message, 18, tensor, 0);
    Attnd__V1__DecodeRequest rest = ATTND__V1__DECODE_REQUEST__INIT;
    rest.options = &options;
    rest.dtype = ATTND__V1__DTYPE__DTYPE_FP16;
    message.size += protobuf_c_message_pack(&rest.base, message.bytes + message.size);
    return message;
}

/* ------------------------------------------------------------------------------------------- */
/* Checking what was read */

static void assert_tensor(const dp_tensor_view *view, const uint8_t *expected, size_t size) {
    size_t at = 0;
    assert_int_equal(view->size, size);
    for (uint32_t i = 0; i < view->count; i++) {
        assert_true(view->spans[i].size > 0);
        assert_memory_equal(view->spans[i].data, expected + at, view->spans[i].size);
        at += view->spans[i].size;
    }
    assert_int_equal(at, size);
}

static void assert_is_sample(const wire_message *message) {
    const Attnd__V1__DecodeRequest *request = (const Attnd__V1__DecodeRequest *)message->message;
    uint8_t tensor[40];
    for (size_t i = 0; i < sizeof tensor; i++) {
        tensor[i] = (uint8_t)(i * 7 + 1);
    }
    assert_int_equal(request->step, 0xfedcba9876543210);
    assert_int_equal(request->layer, 300);
    assert_int_equal(request->n_sequences, 3);
    assert_int_equal(request->sequences[0], 0x1122334455667788);
    assert_int_equal(request->sequences[2], UINT64_MAX);
    assert_int_equal(request->n_query_lengths, 3);
    assert_int_equal(request->query_lengths[1], 128);
    assert_non_null(request->options);
    assert_int_equal(request->options->sliding_window, 300);
    assert_int_equal(request->options->n_sinks, 2);
    assert_true(request->options->sinks[1] == -2.0f);
    assert_true(request->options->return_lse);
    assert_int_equal(request->dtype, ATTND__V1__DTYPE__DTYPE_FP16);
    assert_true(message->present[WIRE_Q] && message->present[WIRE_K] && message->present[WIRE_V]);
    assert_tensor(&message->tensors[WIRE_Q], tensor, 40);
    assert_tensor(&message->tensors[WIRE_K], tensor, 20);
    assert_tensor(&message->tensors[WIRE_V], tensor, 0);
}

/* Every span lies in a piece. */
static void assert_in_bounds(const wire_message *message, const dp_span *pieces, size_t count) {
    for (int t = 0; t < WIRE_TENSORS; t++) {
        size_t total = 0;
        for (uint32_t i = 0; i < message->tensors[t].count; i++) {
            const dp_span *span = &message->tensors[t].spans[i];
            bool inside = false;
            for (size_t p = 0; p < count && !inside; p++) {
                const uint8_t *begin = pieces[p].data;
                const uint8_t *at = span->data;
                inside = at >= begin && at + span->size <= begin + pieces[p].size;
            }
            assert_true(inside);
            total += span->size;
        }
        assert_int_equal(total, message->tensors[t].size);
    }
}

/* Pieces in memory of their own, so that a sanitizer sees a read beyond any of them. */
static dp_span own_piece(const uint8_t *bytes, size_t size) {
    uint8_t *copy = malloc(size > 0 ? size : 1);
    assert_non_null(copy);
    memcpy(copy, bytes, size);
    return (dp_span){copy, size};
}

static void free_piece(dp_span piece) { free((void *)(uintptr_t)piece.data); }

static attn_status read_whole(wire_reader *reader, const ProtobufCMessageDescriptor *descriptor, const buffer *message,
                              wire_message *read) {
    dp_span piece = {message->bytes, message->size};
    return wire_read(reader, descriptor, &piece, 1, read);
}

static void assert_refused(const ProtobufCMessageDescriptor *descriptor, const buffer *message, attn_code code,
                           const char *begins) {
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    attn_status status = read_whole(&reader, descriptor, message, &read);
    assert_int_equal(status.code, code);
    if (strncmp(status.message, begins, strlen(begins)) != 0) assert_string_equal(status.message, begins);
    wire_reader_fini(&reader);
}

/* ------------------------------------------------------------------------------------------- */
/* Tests */

static void test_a_message_in_one_piece(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_int_equal(read_whole(&reader, DECODE, &message, &read).code, ATTN_OK);
    assert_is_sample(&read);
    assert_int_equal(read.tensors[WIRE_Q].count, 1);
    assert_int_equal(read.tensors[WIRE_V].count, 0);
    wire_reader_fini(&reader);
}

static void test_tensors_are_not_copied(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_int_equal(read_whole(&reader, DECODE, &message, &read).code, ATTN_OK);
    dp_span piece = {message.bytes, message.size};
    assert_in_bounds(&read, &piece, 1);
    wire_reader_fini(&reader);
}

static void test_a_message_split_in_two_at_every_byte(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_reader_init(&reader);
    for (size_t split = 0; split <= message.size; split++) {
        dp_span pieces[2] = {own_piece(message.bytes, split), own_piece(message.bytes + split, message.size - split)};
        wire_message read;
        assert_int_equal(wire_read(&reader, DECODE, pieces, 2, &read).code, ATTN_OK);
        assert_is_sample(&read);
        assert_in_bounds(&read, pieces, 2);
        free_piece(pieces[0]);
        free_piece(pieces[1]);
    }
    wire_reader_fini(&reader);
}

static void test_a_message_split_in_three_at_every_pair_of_bytes(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_reader_init(&reader);
    for (size_t first = 0; first <= message.size; first++) {
        for (size_t second = first; second <= message.size; second++) {
            dp_span pieces[3] = {{message.bytes, first},
                                 {message.bytes + first, second - first},
                                 {message.bytes + second, message.size - second}};
            wire_message read;
            assert_int_equal(wire_read(&reader, DECODE, pieces, 3, &read).code, ATTN_OK);
            assert_is_sample(&read);
        }
    }
    wire_reader_fini(&reader);
}

static void test_a_message_in_pieces_of_one_byte_with_empty_ones_between(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_reader_init(&reader);
    dp_span *pieces = wire_reader_pieces(&reader, 2 * message.size);
    assert_non_null(pieces);
    for (size_t i = 0; i < message.size; i++) {
        pieces[2 * i] = (dp_span){NULL, 0};
        pieces[2 * i + 1] = (dp_span){message.bytes + i, 1};
    }
    wire_message read;
    assert_int_equal(wire_read(&reader, DECODE, pieces, 2 * message.size, &read).code, ATTN_OK);
    assert_is_sample(&read);
    assert_int_equal(read.tensors[WIRE_Q].count, 40);
    wire_reader_fini(&reader);
}

static void test_a_message_of_no_bytes_is_the_default(void **unused) {
    (void)unused;
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_non_null(wire_reader_pieces(&reader, 0));
    assert_int_equal(wire_read(&reader, DECODE, NULL, 0, &read).code, ATTN_OK);
    assert_int_equal(((const Attnd__V1__DecodeRequest *)read.message)->n_sequences, 0);
    assert_false(read.present[WIRE_Q]);
    wire_reader_fini(&reader);
}

/* Cut anywhere, a message is refused, but for the cuts between fields, where it is a shorter one. */
static void test_a_message_cut_off_at_every_byte(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_reader_init(&reader);
    unsigned refused = 0;
    for (size_t size = 0; size < message.size; size++) {
        dp_span piece = own_piece(message.bytes, size);
        wire_message read;
        attn_status status = wire_read(&reader, DECODE, &piece, 1, &read);
        if (attn_failed(status)) {
            assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
            assert_non_null(strchr(status.message, ':'));
            refused++;
        } else {
            assert_in_bounds(&read, &piece, 1);
        }
        free_piece(piece);
    }
    assert_true(refused > message.size - 12);
    wire_reader_fini(&reader);
}

static void test_every_flipped_bit_is_refused_or_stays_in_bounds(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_reader_init(&reader);
    for (size_t bit = 0; bit < 8 * message.size; bit++) {
        message.bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        for (size_t split = 0; split < message.size; split += 13) {
            dp_span pieces[2] = {own_piece(message.bytes, split),
                                 own_piece(message.bytes + split, message.size - split)};
            wire_message read;
            attn_status status = wire_read(&reader, DECODE, pieces, 2, &read);
            if (attn_failed(status)) {
                assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
            } else {
                assert_in_bounds(&read, pieces, 2);
            }
            free_piece(pieces[0]);
            free_piece(pieces[1]);
        }
        message.bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    wire_reader_fini(&reader);
}

static void test_pairs_of_flipped_bits_never_lead_out_of_bounds(void **unused) {
    (void)unused;
    wire_reader reader;
    wire_reader_init(&reader);
    uint64_t random = 88172645463325252u;
    for (int round = 0; round < 20000; round++) {
        buffer message = sample();
        for (int flips = 0; flips < 2 + round % 6; flips++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            size_t bit = random % (8 * message.size);
            message.bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
        dp_span piece = {message.bytes, message.size};
        wire_message read;
        attn_status status = wire_read(&reader, DECODE, &piece, 1, &read);
        if (!attn_failed(status)) assert_in_bounds(&read, &piece, 1);
    }
    wire_reader_fini(&reader);
}

static void test_unknown_fields_of_every_wire_type_are_skipped(void **unused) {
    (void)unused;
    buffer message = sample();
    put_tag(&message, 1000, 0);
    put_varint(&message, UINT64_MAX);
    put_tag(&message, 1001, 1);
    put_raw(&message, "12345678", 8);
    put_bytes(&message, 1002, "anything", 8);
    put_tag(&message, 1003, 5);
    put_raw(&message, "1234", 4);
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_int_equal(read_whole(&reader, DECODE, &message, &read).code, ATTN_OK);
    assert_is_sample(&read);
    assert_int_equal(read.message->n_unknown_fields, 0);
    wire_reader_fini(&reader);
}

static void test_repeated_scalars_may_come_unpacked(void **unused) {
    (void)unused;
    buffer message = {.size = 0};
    for (int i = 0; i < 3; i++) {
        put_tag(&message, 4, 0);
        put_varint(&message, 5);
    }
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_int_equal(read_whole(&reader, DECODE, &message, &read).code, ATTN_OK);
    const Attnd__V1__DecodeRequest *request = (const Attnd__V1__DecodeRequest *)read.message;
    assert_int_equal(request->n_query_lengths, 3);
    assert_int_equal(request->query_lengths[2], 5);
    wire_reader_fini(&reader);
}

static void test_a_tensor_given_twice_is_named(void **unused) {
    (void)unused;
    buffer message = sample();
    put_bytes(&message, 17, "x", 1);
    assert_refused(DECODE, &message, ATTN_INVALID_ARGUMENT, "k: given twice");
}

static void test_groups_are_refused(void **unused) {
    (void)unused;
    for (uint32_t wire_type = 3; wire_type <= 7; wire_type += wire_type == 4 ? 2 : 1) {
        buffer message = {.size = 0};
        put_tag(&message, 1000, wire_type);
        assert_refused(DECODE, &message, ATTN_INVALID_ARGUMENT, "field 1000: ");
    }
}

static void test_a_field_of_another_wire_type_is_named(void **unused) {
    (void)unused;
    buffer layer = {.size = 0};
    put_bytes(&layer, 2, "x", 1);
    assert_refused(DECODE, &layer, ATTN_INVALID_ARGUMENT, "layer: malformed");
    buffer query = {.size = 0};
    put_tag(&query, 16, 0);
    put_varint(&query, 1);
    assert_refused(DECODE, &query, ATTN_INVALID_ARGUMENT, "q: malformed");
}

static void test_field_numbers_out_of_range_are_refused(void **unused) {
    (void)unused;
    buffer zero = {.size = 0};
    put_tag(&zero, 0, 0);
    put_varint(&zero, 1);
    assert_refused(DECODE, &zero, ATTN_INVALID_ARGUMENT, "message: ");
    buffer huge = {.size = 0};
    put_varint(&huge, UINT64_MAX - 7);
    put_varint(&huge, 1);
    assert_refused(DECODE, &huge, ATTN_INVALID_ARGUMENT, "message: ");
}

static void test_overlong_varints_are_refused(void **unused) {
    (void)unused;
    buffer message = {.size = 0};
    put_tag(&message, 2, 0);
    put_raw(&message, "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", 11);
    assert_refused(DECODE, &message, ATTN_INVALID_ARGUMENT, "layer: malformed");
}

static void test_overlong_tags_and_lengths_are_refused(void **unused) {
    (void)unused;
    buffer message = {.size = 0};
    put_raw(&message, "\xa8\x80\x80\x80\x80\x00\x01", 7); /* field 5 in six bytes */
    assert_refused(DECODE, &message, ATTN_INVALID_ARGUMENT, "message: malformed: a tag");
    buffer inside = {.size = 0};
    put_bytes(&inside, 5, "\xa8\x80\x80\x80\x80\x00\x01", 7);
    assert_refused(DECODE, &inside, ATTN_INVALID_ARGUMENT, "options: malformed: a tag");
    buffer length = {.size = 0};
    put_raw(&length, "\x82\x01\x81\x80\x80\x80\x80\x00x", 9); /* q, of one byte */
    assert_refused(DECODE, &length, ATTN_INVALID_ARGUMENT, "q: malformed: a tag or a length");
}

static void test_lengths_past_the_end_are_named(void **unused) {
    (void)unused;
    static const struct {
        uint64_t length;
        const char *what;
    } cases[] = {{1, "cut off"},          {0x7fffffff, "cut off"},  {0x80000000, "cut off"},
                 {0xffffffff, "cut off"}, {INT64_MAX, "malformed"}, {UINT64_MAX, "malformed"}};
    static const struct {
        uint32_t number;
        const char *name;
    } fields[] = {{16, "q"}, {3, "sequences"}, {99, "field 99"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (size_t f = 0; f < sizeof fields / sizeof fields[0]; f++) {
            char expected[64];
            buffer message = {.size = 0};
            put_tag(&message, fields[f].number, 2);
            put_varint(&message, cases[i].length);
            snprintf(expected, sizeof expected, "%s: %s", fields[f].name, cases[i].what);
            assert_refused(DECODE, &message, ATTN_INVALID_ARGUMENT, expected);
        }
    }
}

static void test_errors_inside_a_nested_message_name_the_whole_path(void **unused) {
    (void)unused;
    buffer begin = {.size = 0};
    put_bytes(&begin, 1, "1234567", 7); /* fixed64s, but not a multiple of 8 */
    buffer message = {.size = 0};
    put_bytes(&message, 1, begin.bytes, begin.size);
    assert_refused(STREAM, &message, ATTN_INVALID_ARGUMENT, "begin.sequences: malformed");

    buffer options = {.size = 0};
    put_tag(&options, 1, 5);
    put_raw(&options, "12", 2);
    buffer outer = {.size = 0};
    put_bytes(&outer, 3, options.bytes, options.size);
    buffer deep = {.size = 0};
    put_bytes(&deep, 1, outer.bytes, outer.size);
    assert_refused(STREAM, &deep, ATTN_INVALID_ARGUMENT, "begin.options.softmax_scale: cut off");
}

static void test_a_packed_varint_cut_off_is_named(void **unused) {
    (void)unused;
    buffer message = {.size = 0};
    put_bytes(&message, 4, "\x01\x80", 2);
    assert_refused(DECODE, &message, ATTN_INVALID_ARGUMENT, "query_lengths: cut off");
}

static void test_a_header_over_the_limit_is_refused(void **unused) {
    (void)unused;
    size_t size = WIRE_HEADER_LIMIT;
    uint8_t *zeros = calloc(1, size);
    assert_non_null(zeros);
    uint8_t head[WIRE_LENGTH_BYTES];
    dp_span pieces[2] = {{head, wire_put_length(head, 3, size)}, {zeros, size}};
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    attn_status status = wire_read(&reader, DECODE, pieces, 2, &read);
    assert_int_equal(status.code, ATTN_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(status.message, "sequences"));
    wire_reader_fini(&reader);
    free(zeros);
}

/* A tensor is not looked at: it may even lie where there is no memory. */
static void test_nothing_grows_with_the_tensors(void **unused) {
    (void)unused;
    size_t size = (size_t)1 << 30;
    uint8_t head[WIRE_LENGTH_BYTES];
    dp_span pieces[2] = {{head, wire_put_length(head, 16, size)}, {(const void *)(uintptr_t)0x1000, size}};
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_int_equal(wire_read(&reader, DECODE, pieces, 2, &read).code, ATTN_OK);
    assert_int_equal(read.tensors[WIRE_Q].size, size);
    assert_true(read.tensors[WIRE_Q].spans[0].data == pieces[1].data);
    assert_true(reader.header_capacity + reader.arena.total < 16384);
    wire_reader_fini(&reader);
}

static void test_a_reader_allocates_nothing_from_its_second_message_on(void **unused) {
    (void)unused;
    buffer message = sample();
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_int_equal(read_whole(&reader, DECODE, &message, &read).code, ATTN_OK);
    wire_reader before = reader;
    for (int i = 0; i < 100; i++) {
        wire_reader_trim(&reader);
        assert_int_equal(read_whole(&reader, DECODE, &message, &read).code, ATTN_OK);
        assert_is_sample(&read);
    }
    assert_ptr_equal(reader.header, before.header);
    assert_ptr_equal(reader.spans, before.spans);
    assert_ptr_equal(reader.arena.blocks, before.arena.blocks);
    assert_int_equal(reader.arena.total, before.arena.total);
    wire_reader_fini(&reader);
}

static void test_what_an_unusual_message_needed_is_given_back(void **unused) {
    (void)unused;
    size_t size = (size_t)100000 * 8;
    uint8_t *zeros = calloc(1, size);
    assert_non_null(zeros);
    uint8_t head[WIRE_LENGTH_BYTES];
    dp_span pieces[2] = {{head, wire_put_length(head, 3, size)}, {zeros, size}};
    wire_reader reader;
    wire_message read;
    wire_reader_init(&reader);
    assert_int_equal(wire_read(&reader, DECODE, pieces, 2, &read).code, ATTN_OK);
    assert_int_equal(((const Attnd__V1__DecodeRequest *)read.message)->n_sequences, 100000);
    wire_reader_trim(&reader);
    assert_int_equal(reader.header_capacity, 0);
    assert_int_equal(reader.arena.total, 0);
    wire_reader_fini(&reader);
    free(zeros);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_message_in_one_piece),
        cmocka_unit_test(test_tensors_are_not_copied),
        cmocka_unit_test(test_a_message_split_in_two_at_every_byte),
        cmocka_unit_test(test_a_message_split_in_three_at_every_pair_of_bytes),
        cmocka_unit_test(test_a_message_in_pieces_of_one_byte_with_empty_ones_between),
        cmocka_unit_test(test_a_message_of_no_bytes_is_the_default),
        cmocka_unit_test(test_a_message_cut_off_at_every_byte),
        cmocka_unit_test(test_every_flipped_bit_is_refused_or_stays_in_bounds),
        cmocka_unit_test(test_pairs_of_flipped_bits_never_lead_out_of_bounds),
        cmocka_unit_test(test_unknown_fields_of_every_wire_type_are_skipped),
        cmocka_unit_test(test_repeated_scalars_may_come_unpacked),
        cmocka_unit_test(test_a_tensor_given_twice_is_named),
        cmocka_unit_test(test_groups_are_refused),
        cmocka_unit_test(test_a_field_of_another_wire_type_is_named),
        cmocka_unit_test(test_field_numbers_out_of_range_are_refused),
        cmocka_unit_test(test_overlong_varints_are_refused),
        cmocka_unit_test(test_overlong_tags_and_lengths_are_refused),
        cmocka_unit_test(test_lengths_past_the_end_are_named),
        cmocka_unit_test(test_errors_inside_a_nested_message_name_the_whole_path),
        cmocka_unit_test(test_a_packed_varint_cut_off_is_named),
        cmocka_unit_test(test_a_header_over_the_limit_is_refused),
        cmocka_unit_test(test_nothing_grows_with_the_tensors),
        cmocka_unit_test(test_a_reader_allocates_nothing_from_its_second_message_on),
        cmocka_unit_test(test_what_an_unusual_message_needed_is_given_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
