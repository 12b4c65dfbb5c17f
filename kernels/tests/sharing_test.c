/* The split of a batch with shared prefixes (kernels/prefixes.h): what is read together, what alone, and when at all.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/prefixes.h"

enum { SEQUENCES = 4, HEADS = 2, DIM = 32, PAGE = 128, CHUNK = ATTN_CHUNK_TOKENS, CHUNK_PAGES = CHUNK / PAGE };

static const attn_geometry geometry = {1, HEADS, 1, DIM, DIM, ATTN_FP32, PAGE, 0};

/* Sequences 0, 2 and 3 share two chunks, of 1,200 tokens each; sequence 1 is another one. All have 3 new rows. */
typedef struct {
    uint32_t lengths[SEQUENCES], query_lengths[SEQUENCES], page_offsets[SEQUENCES + 1], pages[SEQUENCES * 10];
    float queries[SEQUENCES][3 * HEADS * DIM], outs[SEQUENCES][3 * HEADS * DIM], lses[SEQUENCES][3 * HEADS];
    const void *query_rows[SEQUENCES];
    void *out_rows[SEQUENCES];
    float *lse_rows[SEQUENCES];
    uint32_t members[3];
    attn_prefix prefix;
    attn_batch batch;
} example;

static void example_init(example *e) {
    memset(e, 0, sizeof *e);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        e->lengths[i] = 1203;
        e->query_lengths[i] = 3;
        e->page_offsets[i + 1] = e->page_offsets[i] + 10;
        e->query_rows[i] = e->queries[i];
        e->out_rows[i] = e->outs[i];
        e->lse_rows[i] = e->lses[i];
        for (uint32_t n = 0; n < 3 * HEADS * DIM; n++)
            e->queries[i][n] = (float)(1000 * i + n);
    }
    memcpy(e->members, (uint32_t[]){2, 0, 3}, sizeof e->members);
    e->prefix = (attn_prefix){.members = e->members, .count = 3, .tokens = 2 * CHUNK};
    e->batch = (attn_batch){
        .size = SEQUENCES,
        .lengths = e->lengths,
        .query_lengths = e->query_lengths,
        .page_offsets = e->page_offsets,
        .pages = e->pages,
        .queries = e->query_rows,
        .new_keys = e->query_rows,
        .new_values = e->query_rows,
        .outs = e->out_rows,
        .lses = e->lse_rows,
        .prefixes = &e->prefix,
        .prefix_count = 1,
        .scale = 1,
    };
}

static bool splits(attn_sharing *sharing, const attn_batch *batch) {
    bool shares = false;
    assert_int_equal(attn_sharing_split(sharing, batch, &shares).code, ATTN_OK);
    return shares;
}

static void members_become_one_read_of_the_prefix_and_a_part_each(void **state) {
    (void)state;
    example e;
    attn_sharing sharing;
    example_init(&e);
    attn_sharing_init(&sharing, &geometry, 32, 32);
    assert_true(splits(&sharing, &e.batch));

    const attn_batch *shared = &sharing.shared, *own = &sharing.own;
    assert_int_equal(shared->size, 1);
    assert_int_equal(shared->lengths[0], 2 * CHUNK);
    assert_int_equal(shared->query_lengths[0], 9);
    assert_int_equal(shared->page_offsets[0], 20);
    assert_null(shared->new_keys);
    assert_int_equal(shared->parts[0].total_length, 2 * CHUNK);
    const float *rows = shared->queries[0];
    assert_memory_equal(rows, e.queries[2], sizeof e.queries[2]);
    assert_memory_equal(rows + 3 * HEADS * DIM, e.queries[0], sizeof e.queries[0]);
    assert_memory_equal(rows + 6 * HEADS * DIM, e.queries[3], sizeof e.queries[3]);

    assert_int_equal(own->size, SEQUENCES);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        bool is_member = i != 1;
        assert_int_equal(own->lengths[i], is_member ? 1203 - 2 * CHUNK : 1203);
        assert_int_equal(own->page_offsets[i], 10 * i + (is_member ? 2 * CHUNK_PAGES : 0));
        assert_int_equal(own->parts[i].chunk_stride, is_member);
        assert_int_equal(own->parts[i].chunk_first, is_member ? 2 : 0);
        assert_int_equal(own->parts[i].total_length, is_member ? 1203 : 0);
        assert_int_equal(own->parts[i].new_count, is_member ? 3 : 0);
    }
    assert_int_equal(own->prefix_count, 0);
    attn_sharing_fini(&sharing);
}

/* 60 x 3 query rows, in reads of 120 each. */
static void rows_beyond_what_a_sequence_may_have_become_further_reads(void **state) {
    (void)state;
    static attn_sharing sharing;
    enum { MEMBERS = 60, ROWS = 3 };
    static uint32_t lengths[MEMBERS], query_lengths[MEMBERS], page_offsets[MEMBERS + 1], members[MEMBERS];
    static float queries[MEMBERS][ROWS * HEADS * DIM];
    static const void *query_rows[MEMBERS];
    for (uint32_t i = 0; i < MEMBERS; i++) {
        lengths[i] = CHUNK;
        query_lengths[i] = ROWS;
        members[i] = i;
        query_rows[i] = queries[i];
        queries[i][0] = (float)i;
    }
    attn_prefix prefix = {.members = members, .count = MEMBERS, .tokens = CHUNK};
    attn_batch batch = {.size = MEMBERS,
                        .lengths = lengths,
                        .query_lengths = query_lengths,
                        .page_offsets = page_offsets,
                        .queries = query_rows,
                        .prefixes = &prefix,
                        .prefix_count = 1,
                        .scale = 1};
    attn_sharing_init(&sharing, &geometry, 10, 32); /* whole row blocks: reads of 120 rows */
    assert_true(splits(&sharing, &batch));
    assert_int_equal(sharing.shared.size, 2);
    assert_int_equal(sharing.shared.query_lengths[0], 120);
    assert_int_equal(sharing.shared.query_lengths[1], 60);
    const float *second = sharing.shared.queries[1];
    assert_true(second[0] == 40.0f && second[ROWS * HEADS * DIM] == 41.0f);
    assert_ptr_equal(sharing.shared.partials[1].lse, sharing.shared.partials[0].lse + (size_t)120 * HEADS);
    assert_ptr_equal(sharing.members[40].prefix.lse, sharing.shared.partials[1].lse);
    attn_sharing_fini(&sharing);
}

static void merging_weighs_prefix_and_own_by_their_lse(void **state) {
    (void)state;
    example e;
    attn_sharing sharing;
    example_init(&e);
    attn_sharing_init(&sharing, &geometry, 32, 32);
    assert_true(splits(&sharing, &e.batch));
    for (uint32_t m = 0; m < sharing.member_count; m++) {
        const attn_partial *own = &sharing.own.partials[sharing.members[m].sequence];
        for (uint32_t n = 0; n < 3 * HEADS * DIM; n++) {
            sharing.members[m].prefix.out[n] = 1.0f + (float)m;
            own->out[n] = 3.0f + (float)m;
        }
        for (uint32_t n = 0; n < 3 * HEADS; n++)
            sharing.members[m].prefix.lse[n] = own->lse[n] = 5.0f;
    }
    attn_sharing_merge(&sharing, 1, 3);
    assert_true(e.outs[0][0] == 3.0f && e.outs[3][3 * HEADS * DIM - 1] == 4.0f);
    assert_true(e.lses[0][5] > 5.693f && e.lses[0][5] < 5.694f); /* 5 + log 2 */
    assert_true(e.outs[2][0] == 0.0f);                           /* member 0, not merged yet */
    attn_sharing_merge(&sharing, 0, 1);
    assert_true(e.outs[2][0] == 2.0f);
    assert_true(e.outs[1][0] == 0.0f); /* no member */
    attn_sharing_fini(&sharing);
}

/*
 * Two members take 32 for a token each, the time of its read, and together as much: for 1,024 tokens 32,768 are saved,
 * and 12 rows x 128 tokens spent on merging.
 */
static void prefixes_that_save_little_are_left_alone(void **state) {
    (void)state;
    example e;
    attn_sharing sharing;
    example_init(&e);
    attn_sharing_init(&sharing, &geometry, 32, 32);
    e.prefix.count = 2;
    for (uint32_t i = 0; i < SEQUENCES; i++)
        e.lengths[i] = 2928; /* 31,232 of 2 x 32 x 2,928: a sixth */
    assert_true(splits(&sharing, &e.batch));
    for (uint32_t i = 0; i < SEQUENCES; i++)
        e.lengths[i]++;
    assert_false(splits(&sharing, &e.batch));
    attn_sharing_fini(&sharing);
}

/* Each fills its row blocks by itself, or has rows that take longer than reads do. */
static void members_with_rows_enough_for_their_reads_are_left_alone(void **state) {
    (void)state;
    example e;
    attn_sharing sharing;
    example_init(&e);
    attn_sharing_init(&sharing, &geometry, 3, 32);
    assert_false(splits(&sharing, &e.batch));
    attn_sharing_fini(&sharing);
    attn_sharing_init(&sharing, &geometry, 9, 32);
    assert_true(splits(&sharing, &e.batch));
    attn_sharing_fini(&sharing);
    attn_sharing_init(&sharing, &geometry, 9, 6);
    assert_false(splits(&sharing, &e.batch));
    attn_sharing_fini(&sharing);
}

static void windows_and_batch_invariance_share_nothing(void **state) {
    (void)state;
    example e;
    attn_sharing sharing;
    example_init(&e);
    attn_sharing_init(&sharing, &geometry, 32, 32);
    e.batch.window = 2000;
    assert_false(splits(&sharing, &e.batch));
    e.batch.window = 0;
    e.batch.batch_invariant = true;
    assert_false(splits(&sharing, &e.batch));
    e.batch.batch_invariant = false;
    e.batch.prefix_count = 0;
    assert_false(splits(&sharing, &e.batch));
    assert_null(sharing.memory);
    attn_sharing_fini(&sharing);
}

static void memory_is_kept_for_the_next_split(void **state) {
    (void)state;
    example e;
    attn_sharing sharing;
    example_init(&e);
    attn_sharing_init(&sharing, &geometry, 32, 32);
    assert_true(splits(&sharing, &e.batch));
    const void *memory = sharing.memory;
    e.prefix.count = 2;
    assert_true(splits(&sharing, &e.batch));
    e.prefix.count = 3;
    assert_true(splits(&sharing, &e.batch));
    assert_ptr_equal(sharing.memory, memory);
    attn_sharing_fini(&sharing);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(members_become_one_read_of_the_prefix_and_a_part_each),
        cmocka_unit_test(rows_beyond_what_a_sequence_may_have_become_further_reads),
        cmocka_unit_test(merging_weighs_prefix_and_own_by_their_lse),
        cmocka_unit_test(prefixes_that_save_little_are_left_alone),
        cmocka_unit_test(members_with_rows_enough_for_their_reads_are_left_alone),
        cmocka_unit_test(windows_and_batch_invariance_share_nothing),
        cmocka_unit_test(memory_is_kept_for_the_next_split),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
