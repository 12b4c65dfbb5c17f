/*
 * Shared prefixes: a batch that says which leading pages its sequences share has the outputs that it has without saying
 * so, on every backend, whether the backend makes use of it or not; bit for bit where it must not. A hint that is not
 * true is refused.
 *
 * The cuda backend has two ways (kernels/cuda/side_by_side.h) and chooses the second for the large batch alone; with
 * ATTND_TEST_OWN_WORKERS=52 it takes it for all.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/tests/backend_fixture.h"

enum { MAX_SEQUENCES = 48, MAX_PREFIXES = 2, POOL_PAGES = 1300, CHUNK = ATTN_CHUNK_TOKENS };

static const decode_options plain_options = {.scale = 0.125f};

/* One query head a KV head: where it takes many query rows until sharing saves nothing. */
static const attn_geometry narrow_geometry = {LAYERS, 2, 2, 64, 64, ATTN_BF16, 16, 0};

/* ------------------------------------------------------------------------------------------- */
/* A family: sequences in one pool, some of which are forks of others, and what a batch of them says of that */

typedef struct {
    test_pool pool;
    test_sequence sequences[MAX_SEQUENCES];
    test_sequence *pointers[MAX_SEQUENCES];
    uint32_t count;
    attn_prefix prefixes[MAX_PREFIXES];
    uint32_t members[MAX_PREFIXES][MAX_SEQUENCES];
    uint32_t prefix_count;
} family;

static family f;

static void open_family(const backend_row *row, const attn_geometry *geometry) {
    memset(&f, 0, sizeof f);
    pool_open(&f.pool, row, geometry, pool_pages_for(geometry, POOL_PAGES * 16), 3, 11);
}

static void close_family(void) {
    for (uint32_t i = 0; i < f.count; i++)
        sequence_fini(&f.sequences[i]);
    pool_close(&f.pool);
}

static uint32_t add_sequence(sequence_spec spec) {
    f.pointers[f.count] = &f.sequences[f.count];
    sequence_init(&f.sequences[f.count], &f.pool, spec);
    return f.count++;
}

static uint32_t add_fork(uint32_t parent, uint32_t shared, sequence_spec spec) {
    f.pointers[f.count] = &f.sequences[f.count];
    sequence_make_fork(&f.sequences[f.count], &f.pool, &f.sequences[parent], shared, spec);
    return f.count++;
}

/* Says that some sequences share `tokens` tokens. */
static void add_prefix(uint32_t tokens, const uint32_t *members, uint32_t count) {
    uint32_t *kept = f.members[f.prefix_count];
    memcpy(kept, members, count * sizeof *members);
    f.prefixes[f.prefix_count++] = (attn_prefix){.members = kept, .count = count, .tokens = tokens};
}

static void init_batch(test_batch *batch, const decode_options *options) {
    test_batch_init(batch, f.pointers, f.count, options);
    batch->batch.prefixes = f.prefixes;
    batch->batch.prefix_count = f.prefix_count;
}

static void decode_family(const decode_options *options) {
    test_batch batch;
    init_batch(&batch, options);
    decode_batch(&f.pool, &batch, NULL);
    test_batch_fini(&batch);
}

static void assert_outputs_right(const decode_options *options, const char *what) {
    for (uint32_t i = 0; i < f.count; i++) {
        if (f.sequences[i].part.chunk_stride != 0) continue;
        decode_errors errors = sequence_errors(&f.pool, &f.sequences[i], options, 400000);
        assert_errors_within_bounds(&errors, f.pool.geometry.dtype, what);
    }
}

static void check_family(const decode_options *options, const char *what) {
    decode_family(options);
    assert_outputs_right(options, what);
}

/* Four that share 1,024 tokens, of 0, 37, 200 and 600 more, and between them one that shares nothing. */
static void open_four(const backend_row *row, const attn_geometry *geometry, uint32_t query_length) {
    open_family(row, geometry);
    add_sequence((sequence_spec){.stored = 2 * CHUNK, .query_length = query_length});
    add_sequence((sequence_spec){.stored = 70, .query_length = query_length});
    add_fork(0, 2 * CHUNK, (sequence_spec){.stored = 2 * CHUNK + 37, .query_length = query_length});
    add_fork(0, 2 * CHUNK, (sequence_spec){.stored = 2 * CHUNK + 200, .query_length = query_length});
    add_fork(0, 2 * CHUNK, (sequence_spec){.stored = 2 * CHUNK + 600, .query_length = query_length});
    add_prefix(2 * CHUNK, (uint32_t[]){0, 2, 3, 4}, 4);
}

/* ------------------------------------------------------------------------------------------- */
/* Outputs */

static void outputs_are_right_whatever_the_dtype_the_group_and_the_queries(void **state) {
    static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_FP16, ATTN_FP32};
    static const uint32_t groups[] = {1, 3, 4, 8}, query_lengths[] = {1, 4};
    for (uint32_t n = 0; n < 3 * 4 * 2; n += FIXTURE_SANITIZED ? 5 : 1) {
        uint32_t group = groups[n / 3 % 4], query_length = query_lengths[n / 12];
        attn_geometry geometry = {.layers = LAYERS,
                                  .heads_q = 2 * group,
                                  .heads_kv = 2,
                                  .head_dim = 64,
                                  .head_dim_v = group == 4 ? 40 : 64,
                                  .dtype = dtypes[n % 3],
                                  .page_size = group == 8 ? 64 : 16};
        char what[64];
        snprintf(what, sizeof what, "%s, group %u, %u query rows", attn_dtype_name(geometry.dtype), group,
                 query_length);
        open_four(*state, &geometry, query_length);
        check_family(&plain_options, what);
        close_family();
    }
}

static void outputs_are_right_with_softcap_and_sinks(void **state) {
    static const float sinks[8] = {0.5f, -3.0f, 4.0f, 20.0f, -INFINITY, 0.0f, 1.0f, 2.0f};
    static const decode_options options[] = {{.scale = 0.125f, .softcap = 5},
                                             {.scale = 0.125f, .sinks = sinks},
                                             {.scale = 0.3f, .softcap = 30, .sinks = sinks},
                                             {.scale = 0.125f, .no_lse = true}};
    for (uint32_t query_length = 1; query_length <= 2; query_length++) {
        open_four(*state, &plain_geometry, query_length);
        for (uint32_t n = 0; n < sizeof options / sizeof *options; n++)
            check_family(&options[n], "softcap and sinks");
        close_family();
    }
}

static void outputs_are_right_with_several_prefixes_of_other_members(void **state) {
    open_family(*state, &narrow_geometry);
    for (uint32_t n = 0; n < 2; n++)
        add_sequence((sequence_spec){.stored = (2 - n) * CHUNK + 9, .query_length = 1 + n});
    add_sequence((sequence_spec){.stored = 1000, .query_length = 1});
    for (uint32_t n = 0; n < 4; n++) {
        uint32_t shared = (2 - n % 2) * CHUNK;
        add_fork(n % 2, shared, (sequence_spec){.stored = shared + 16 * n, .query_length = 1 + n});
    }
    add_prefix(2 * CHUNK, (uint32_t[]){5, 0, 3}, 3);
    add_prefix(CHUNK, (uint32_t[]){1, 4, 6}, 3);
    check_family(&plain_options, "two prefixes");
    close_family();
}

static void outputs_are_right_where_members_have_nothing_but_the_prefix(void **state) {
    open_family(*state, &narrow_geometry);
    add_sequence((sequence_spec){.stored = CHUNK, .query_length = 3});
    add_fork(0, CHUNK, (sequence_spec){.stored = CHUNK, .query_length = 1});
    add_fork(0, CHUNK, (sequence_spec){.stored = CHUNK, .query_length = 2, .read = true});
    add_fork(0, CHUNK, (sequence_spec){.stored = CHUNK, .query_length = 1, .read = true});
    add_prefix(CHUNK, (uint32_t[]){0, 1, 2, 3}, 4);
    check_family(&plain_options, "nothing but the prefix");
    close_family();
}

/* Reads only: new_keys may then be NULL altogether. */
static void outputs_are_right_of_reads(void **state) {
    open_family(*state, &narrow_geometry);
    add_sequence((sequence_spec){.stored = CHUNK + 1, .query_length = 3, .read = true});
    add_fork(0, CHUNK, (sequence_spec){.stored = CHUNK + 90, .query_length = 1, .read = true});
    add_prefix(CHUNK, (uint32_t[]){1, 0}, 2);
    test_batch batch;
    init_batch(&batch, &plain_options);
    batch.batch.new_keys = batch.batch.new_values = NULL;
    decode_batch(&f.pool, &batch, NULL);
    test_batch_fini(&batch);
    assert_outputs_right(&plain_options, "reads");
    close_family();
}

/* So many rows, and tokens of their own, that the cuda backend attends to both at once. */
static void outputs_are_right_of_a_large_batch(void **state) {
    enum { MEMBERS = 32, SHARED = 4096 };
    static const attn_geometry geometry = {LAYERS, 16, 4, 128, 128, ATTN_BF16, 32, 0};
    uint32_t members[MEMBERS];
    if (FIXTURE_SANITIZED) skip();
    open_family(*state, &geometry);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        sequence_spec spec = {.stored = SHARED + 200 + 5 * i, .query_length = 1};
        members[i] = i;
        if (i == 0)
            add_sequence(spec);
        else
            add_fork(0, SHARED, spec);
    }
    add_prefix(SHARED, members, MEMBERS);
    check_family(&(decode_options){.scale = 0.088f}, "a large batch");
    close_family();
}

/* Their query rows are more than one sequence may have. */
static void outputs_are_right_of_many_members(void **state) {
    enum { MEMBERS = 40 };
    uint32_t members[MEMBERS];
    open_family(*state, &narrow_geometry);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        sequence_spec spec = {.stored = CHUNK + i, .query_length = 1 + i % 6};
        members[i] = i;
        if (i == 0)
            add_sequence(spec);
        else
            add_fork(0, CHUNK, spec);
    }
    add_prefix(CHUNK, members, MEMBERS);
    check_family(&plain_options, "many members");
    close_family();
}

static void outputs_are_right_of_members_with_the_most_query_rows(void **state) {
    open_family(*state, &plain_geometry);
    add_sequence((sequence_spec){.stored = CHUNK, .query_length = ATTN_MAX_QUERY_LENGTH});
    for (uint32_t n = 0; n < 3; n++)
        add_fork(0, CHUNK, (sequence_spec){.stored = CHUNK, .query_length = n == 1 ? ATTN_MAX_QUERY_LENGTH : 1});
    add_prefix(CHUNK, (uint32_t[]){0, 1, 2, 3}, 4);
    check_family(&plain_options, "long queries");
    close_family();
}

static void outputs_are_right_of_awkward_inputs(void **state) {
    for (uint32_t inputs = 0; inputs < INPUT_KINDS; inputs++) {
        open_family(*state, &narrow_geometry);
        sequence_spec spec = {.stored = CHUNK + 40, .query_length = 1, .inputs = (test_inputs)inputs};
        add_sequence(spec);
        add_fork(0, CHUNK, spec);
        add_fork(0, CHUNK, spec);
        add_prefix(CHUNK, (uint32_t[]){0, 1, 2}, 3);
        check_family(&plain_options, "awkward inputs");
        close_family();
    }
}

/* Where the hint saves next to nothing. */
static void outputs_are_right_of_members_with_much_of_their_own(void **state) {
    open_family(*state, &plain_geometry);
    add_sequence((sequence_spec){.stored = CHUNK + 3000, .query_length = 1});
    add_fork(0, CHUNK, (sequence_spec){.stored = CHUNK + 2500, .query_length = 1});
    add_prefix(CHUNK, (uint32_t[]){0, 1}, 2);
    check_family(&plain_options, "much of their own");
    close_family();
}

/* Two parts of one sequence stand in for those of two ranks. */
static void outputs_are_right_beside_parts_of_spread_sequences(void **state) {
    test_sequence whole;
    const attn_geometry *g = &plain_geometry;
    open_four(*state, g, 1);
    sequence_init(&whole, &f.pool, (sequence_spec){.stored = 1300, .query_length = 2});
    for (uint32_t n = 0; n < 2; n++) {
        f.pointers[f.count] = &f.sequences[f.count];
        sequence_make_part(&f.sequences[f.count++], &f.pool, &whole, n, 2, false);
    }
    check_family(&plain_options, "beside parts");
    const attn_partial partials[2] = {f.sequences[5].partial, f.sequences[6].partial};
    attn_combine(partials, 2, 2, g->heads_q, g->head_dim_v, NULL, g->dtype, whole.out, whole.lse);
    decode_errors errors = sequence_errors(&f.pool, &whole, &plain_options, 400000);
    assert_errors_within_bounds(&errors, g->dtype, "parts beside prefixes");
    sequence_fini(&whole);
    close_family();
}

/* With hints, without, with others: nothing of one decode is left over in the next. */
static void decodes_with_and_without_prefixes_may_take_turns(void **state) {
    open_four(*state, &plain_geometry, 1);
    for (uint32_t n = 0; n < 6; n++) {
        f.prefix_count = n % 3 != 1;
        f.prefixes[0].count = n % 3 == 2 ? 2 : 4;
        check_family(&plain_options, "in turn");
    }
    close_family();
}

/* The cpu backend rounds otherwise where it merges: by that it shows that it does. */
static void a_prefix_that_is_worth_it_is_read_together(void **state) {
    attn_geometry geometry = plain_geometry;
    geometry.dtype = ATTN_FP32;
    open_four(*state, &geometry, 1);
    decode_family(&plain_options);
    size_t bytes = sequence_out_bytes(&f.sequences[2], &geometry);
    unsigned char *shared = malloc(bytes);
    assert_non_null(shared);
    memcpy(shared, f.sequences[2].out, bytes);
    f.prefix_count = 0;
    decode_family(&plain_options);
    assert_memory_not_equal(f.sequences[2].out, shared, bytes);
    free(shared);
    close_family();
}

/* The plan of a step is of its lengths: one with prefixes may be offered it, and need not look at it. */
static void a_plan_of_the_step_may_be_offered_with_prefixes(void **state) {
    open_four(*state, &plain_geometry, 1);
    test_batch batch;
    attn_plan *plan;
    init_batch(&batch, &plain_options);
    assert_int_equal(attn_plan_create(f.pool.backend, &plan).code, ATTN_OK);
    assert_int_equal(attn_backend_plan_step(f.pool.backend, &batch.batch, plan).code, ATTN_OK);
    decode_batch(&f.pool, &batch, plan);
    assert_outputs_right(&plain_options, "with a plan");
    assert_int_equal(attn_backend_plans_rejected(f.pool.backend), 0);
    attn_plan_destroy(plan);
    test_batch_fini(&batch);
    close_family();
}

/* ------------------------------------------------------------------------------------------- */
/* Where the hint must not change a bit */

static unsigned char *copy_outputs(size_t *bytes) {
    *bytes = 0;
    for (uint32_t i = 0; i < f.count; i++)
        *bytes += sequence_out_bytes(&f.sequences[i], &f.pool.geometry);
    unsigned char *copy = malloc(*bytes + 1), *end = copy;
    assert_non_null(copy);
    for (uint32_t i = 0; i < f.count; i++) {
        memcpy(end, f.sequences[i].out, sequence_out_bytes(&f.sequences[i], &f.pool.geometry));
        end += sequence_out_bytes(&f.sequences[i], &f.pool.geometry);
    }
    return copy;
}

static void check_same_bits(const backend_row *row, const decode_options *options) {
    size_t bytes;
    open_four(row, &plain_geometry, 2);
    decode_family(options);
    unsigned char *with = copy_outputs(&bytes);
    f.prefix_count = 0;
    decode_family(options);
    unsigned char *without = copy_outputs(&bytes);
    assert_memory_equal(with, without, bytes);
    assert_outputs_right(options, "with the hint ignored");
    free(with);
    free(without);
    close_family();
}

static void batch_invariant_outputs_are_the_same_bits_with_prefixes(void **state) {
    check_same_bits(*state, &(decode_options){.scale = 0.125f, .batch_invariant = true});
}

static void windows_are_as_without_prefixes(void **state) {
    check_same_bits(*state, &(decode_options){.scale = 0.125f, .window = 100});
    check_same_bits(*state, &(decode_options){.scale = 0.125f, .window = 900});
}

/* ------------------------------------------------------------------------------------------- */
/* Hints that are not true */

static void assert_prefix_refused(const char *text) {
    test_batch batch;
    init_batch(&batch, &plain_options);
    attn_status status = attn_backend_decode(f.pool.backend, &batch.batch, NULL, NULL);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    if (!strstr(status.message, text)) fail_msg("\"%s\" where \"%s\" was expected", status.message, text);
    test_batch_fini(&batch);
}

static void prefixes_that_are_not_there_are_refused(void **state) {
    open_four(*state, &plain_geometry, 1);
    test_batch batch;
    init_batch(&batch, &plain_options);
    batch.batch.prefixes = NULL;
    attn_status status = attn_backend_decode(f.pool.backend, &batch.batch, NULL, NULL);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(status.message, "prefixes: none"));
    test_batch_fini(&batch);
    close_family();
}

static void a_member_outside_the_batch_is_refused(void **state) {
    open_four(*state, &plain_geometry, 1);
    f.members[0][2] = 5;
    assert_prefix_refused("prefix 0: member 2 is sequence 5 of a batch of 5");
    f.members[0][2] = UINT32_MAX;
    assert_prefix_refused("prefix 0: member 2 is sequence 4294967295");
    close_family();
}

static void a_sequence_that_is_a_member_twice_is_refused(void **state) {
    open_four(*state, &plain_geometry, 1);
    f.members[0][3] = 2;
    assert_prefix_refused("prefix 0: member 3 (sequence 2) is a member already");
    f.members[0][3] = 4;
    f.prefixes[0].count = 3;
    add_prefix(CHUNK, (uint32_t[]){4, 3}, 2);
    assert_prefix_refused("prefix 1: member 1 (sequence 3) is a member already");
    close_family();
}

static void a_part_as_a_member_is_refused(void **state) {
    test_sequence whole;
    open_four(*state, &plain_geometry, 1);
    sequence_init(&whole, &f.pool, (sequence_spec){.stored = 1300, .query_length = 1});
    f.pointers[f.count] = &f.sequences[f.count];
    sequence_make_part(&f.sequences[f.count++], &f.pool, &whole, 0, 2, false);
    f.members[0][1] = 5;
    assert_prefix_refused("prefix 0: member 1 (sequence 5) is a part");
    sequence_fini(&whole);
    close_family();
}

static void a_prefix_of_fewer_than_two_members_is_refused(void **state) {
    open_four(*state, &plain_geometry, 1);
    f.prefixes[0].count = 1;
    assert_prefix_refused("prefix 0: shared by 1 sequences");
    f.prefixes[0].count = 0;
    assert_prefix_refused("prefix 0: shared by 0 sequences");
    close_family();
}

static void a_prefix_that_is_not_of_whole_chunks_is_refused(void **state) {
    static const uint32_t tokens[] = {0, 16, CHUNK - 16, CHUNK + 1};
    open_four(*state, &plain_geometry, 1);
    for (uint32_t n = 0; n < sizeof tokens / sizeof *tokens; n++) {
        f.prefixes[0].tokens = tokens[n];
        assert_prefix_refused("a multiple of 512");
    }
    close_family();
}

/* The new rows are no part of it, and of a read everything is. */
static void a_prefix_longer_than_what_a_member_has_stored_is_refused(void **state) {
    open_family(*state, &plain_geometry);
    add_sequence((sequence_spec){.stored = CHUNK, .query_length = 1, .read = true});
    add_fork(0, CHUNK - 16, (sequence_spec){.stored = CHUNK - 1, .query_length = 1});
    add_prefix(CHUNK, (uint32_t[]){0, 1}, 2);
    assert_prefix_refused("prefix 0: member 1 (sequence 1) has 511 tokens without its new rows, not 512");
    f.prefixes[0].tokens = 2 * CHUNK;
    assert_prefix_refused("prefix 0: member 0 (sequence 0) has 512 tokens");
    close_family();
}

static void a_member_with_other_pages_is_refused(void **state) {
    open_four(*state, &plain_geometry, 1);
    uint32_t last = CHUNK / 16 - 1, page = f.sequences[3].pages[last];
    f.sequences[3].pages[last] = f.sequences[3].pages[last + 1];
    assert_prefix_refused("prefix 0: member 2 (sequence 3) has other pages than member 0 (sequence 0)");
    f.sequences[3].pages[last] = page;
    check_family(&plain_options, "with the page as it was");
    close_family();
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    const struct CMUnitTest tests[] = {
        ON_EVERY_BACKEND(outputs_are_right_whatever_the_dtype_the_group_and_the_queries),
        ON_EVERY_BACKEND(outputs_are_right_with_softcap_and_sinks),
        ON_EVERY_BACKEND(outputs_are_right_with_several_prefixes_of_other_members),
        ON_EVERY_BACKEND(outputs_are_right_where_members_have_nothing_but_the_prefix),
        ON_EVERY_BACKEND(outputs_are_right_of_reads),
        ON_EVERY_BACKEND(outputs_are_right_of_a_large_batch),
        ON_EVERY_BACKEND(outputs_are_right_of_many_members),
        ON_EVERY_BACKEND(outputs_are_right_of_members_with_the_most_query_rows),
        ON_EVERY_BACKEND(outputs_are_right_of_awkward_inputs),
        ON_EVERY_BACKEND(outputs_are_right_of_members_with_much_of_their_own),
        ON_EVERY_BACKEND(outputs_are_right_beside_parts_of_spread_sequences),
        ON_EVERY_BACKEND(decodes_with_and_without_prefixes_may_take_turns),
        ON_BACKEND(a_prefix_that_is_worth_it_is_read_together, "cpu portable", 1),
        ON_EVERY_BACKEND(a_plan_of_the_step_may_be_offered_with_prefixes),
        ON_EVERY_BACKEND(batch_invariant_outputs_are_the_same_bits_with_prefixes),
        ON_EVERY_BACKEND(windows_are_as_without_prefixes),
        ON_EVERY_BACKEND(prefixes_that_are_not_there_are_refused),
        ON_EVERY_BACKEND(a_member_outside_the_batch_is_refused),
        ON_EVERY_BACKEND(a_sequence_that_is_a_member_twice_is_refused),
        ON_EVERY_BACKEND(a_part_as_a_member_is_refused),
        ON_EVERY_BACKEND(a_prefix_of_fewer_than_two_members_is_refused),
        ON_EVERY_BACKEND(a_prefix_that_is_not_of_whole_chunks_is_refused),
        ON_EVERY_BACKEND(a_prefix_longer_than_what_a_member_has_stored_is_refused),
        ON_EVERY_BACKEND(a_member_with_other_pages_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
