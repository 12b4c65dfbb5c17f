/*
 * Shared prefixes: which sequences of a batch begin with the same pages is found, and that forks are read together
 * changes no output.
 */
#define _GNU_SOURCE
#include "dp/prefixes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dp/state.h"
#include "dp/tests/fixture.h"

/* ------------------------------------------------------------------------------------------- */
/* Batches by hand: a table is a word, each letter a chunk of its own 32 pages */

enum { MAX_SIZE = 3000, MAX_PAGES = 400000, CHUNK_PAGES = ATTN_CHUNK_TOKENS / 16 };

static const attn_geometry geometry = {.page_size = 16};

static struct {
    dp_batch batch;
    uint32_t lengths[MAX_SIZE], query_lengths[MAX_SIZE], page_offsets[MAX_SIZE + 1], pages[MAX_PAGES];
    attn_part parts[MAX_SIZE];
    attn_prefix prefixes[MAX_SIZE / 2];
    uint32_t scratch[16 * MAX_SIZE];
} hand;

static void start_batch(void) {
    hand.batch = (dp_batch){
        .lengths = hand.lengths,
        .query_lengths = hand.query_lengths,
        .page_offsets = hand.page_offsets,
        .pages = hand.pages,
        .prefixes = hand.prefixes,
        .prefix_scratch = hand.scratch,
    };
}

/* A sequence of whole chunks, each named by a number, and `more` committed tokens in a page that nobody else has. */
static void add_chunks(const uint32_t *chunks, uint32_t count, uint32_t more, uint32_t query_length) {
    assert_true(hand.batch.size < MAX_SIZE);
    uint32_t i = hand.batch.size++, *page = &hand.pages[hand.page_offsets[i]];
    assert_true(hand.page_offsets[i] + (count + 1) * CHUNK_PAGES < MAX_PAGES);
    hand.lengths[i] = count * ATTN_CHUNK_TOKENS + more + query_length;
    hand.query_lengths[i] = query_length;
    for (uint32_t c = 0; c < count; c++) {
        for (uint32_t p = 0; p < CHUNK_PAGES; p++)
            *page++ = chunks[c] * CHUNK_PAGES + p;
    }
    for (uint32_t p = 0; p < (more + query_length + 15) / 16; p++)
        *page++ = 0x40000000u + i * 64 + p;
    hand.page_offsets[i + 1] = (uint32_t)(page - hand.pages);
}

static void add_word(const char *word) {
    uint32_t chunks[16] = {0}, count = (uint32_t)strlen(word);
    for (uint32_t c = 0; c < count; c++)
        chunks[c] = (uint32_t)word[c];
    add_chunks(chunks, count, 17, 1);
}

static void find(bool read_only) {
    assert_true(dp_prefixes_scratch(hand.batch.size) <= sizeof hand.scratch / sizeof *hand.scratch);
    dp_prefixes_find(&hand.batch, &geometry, read_only);
}

static void find_in(const char *const *words, uint32_t count) {
    start_batch();
    for (uint32_t i = 0; i < count; i++)
        add_word(words[i]);
    find(false);
}

/* A prefix of a launch: whose it is, a bit a sequence. */
typedef struct {
    uint32_t chunks, mask;
} shared_by;

static struct {
    uint32_t members[2][64];
    dp_launch_prefixes launch;
} joining;

/* In a batch of these words. Returns the chunks that are saved more. */
static uint32_t join(const char *const *words, uint32_t count, const shared_by *prefixes, uint32_t prefix_count) {
    uint32_t *members = joining.members[0];
    start_batch();
    for (uint32_t i = 0; i < count; i++)
        add_word(words[i]);
    for (uint32_t p = 0; p < prefix_count; p++) {
        hand.prefixes[p] = (attn_prefix){.members = members, .tokens = prefixes[p].chunks * ATTN_CHUNK_TOKENS};
        for (uint32_t i = 0; i < count; i++) {
            if (prefixes[p].mask >> i & 1) members[hand.prefixes[p].count++] = i;
        }
        members += hand.prefixes[p].count;
    }
    joining.launch = (dp_launch_prefixes){.prefixes = hand.prefixes,
                                          .count = prefix_count,
                                          .page_offsets = hand.page_offsets,
                                          .pages = hand.pages,
                                          .page_size = geometry.page_size,
                                          .members = joining.members[1]};
    uint64_t saved = dp_prefixes_join(&joining.launch);
    hand.batch.prefix_count = joining.launch.count;
    assert_int_equal(0, saved % ATTN_CHUNK_TOKENS);
    return (uint32_t)(saved / ATTN_CHUNK_TOKENS);
}

/* Fails unless exactly the sequences of `mask` share so many chunks. */
static void assert_prefix(uint32_t mask, uint32_t chunks) {
    for (uint32_t p = 0; p < hand.batch.prefix_count; p++) {
        const attn_prefix *prefix = &hand.batch.prefixes[p];
        uint32_t members = 0;
        for (uint32_t m = 0; m < prefix->count; m++)
            members |= 1u << prefix->members[m];
        if (members == mask && prefix->tokens == chunks * ATTN_CHUNK_TOKENS) return;
    }
    fail_msg("no prefix of sequences %#x and %u chunks", mask, chunks);
}

static void assert_found(uint32_t prefixes, uint32_t chunks_saved) {
    assert_int_equal(prefixes, hand.batch.prefix_count);
    assert_int_equal(chunks_saved * ATTN_CHUNK_TOKENS, hand.batch.tokens_shared);
}

static void sequences_that_share_no_chunk_have_no_prefix(void **state) {
    (void)state;
    find_in((const char *const[]){"A", "BA", "CB", "", "DAB"}, 5);
    assert_found(0, 0);
    find_in(NULL, 0);
    assert_found(0, 0);
}

static void sequences_share_the_chunks_up_to_where_they_differ(void **state) {
    (void)state;
    find_in((const char *const[]){"ABCD", "ABE", "X", "AB", "ABCF"}, 5);
    assert_found(1, 6);
    assert_prefix(0x1b, 2);
}

static void families_have_a_prefix_each(void **state) {
    (void)state;
    find_in((const char *const[]){"AB", "Q", "AB", "QR", "QRS", "Z"}, 6);
    assert_found(2, 2 + 2);
    assert_prefix(0x05, 2);
    assert_prefix(0x1a, 1);
}

static void what_saves_most_is_taken_of_forks_of_forks(void **state) {
    (void)state;
    find_in((const char *const[]){"ABC", "AD", "ABC"}, 3);
    assert_found(1, 3);
    assert_prefix(0x5, 3);
    find_in((const char *const[]){"AB", "A", "AC", "AB", "AD"}, 5);
    assert_found(1, 4);
    assert_prefix(0x1f, 1);
    find_in((const char *const[]){"ABC", "ADE", "ABC", "ADE", "AF"}, 5);
    assert_found(2, 6);
    assert_prefix(0x05, 3);
    assert_prefix(0x0a, 3);
    /* One that is less alike does not spoil it for the others. */
    find_in((const char *const[]){"AZ", "ABCDEF", "ABCDEF", "ABCDEG", "ABCDE"}, 5);
    assert_found(1, 15);
    assert_prefix(0x1e, 5);
}

static void new_rows_are_no_part_of_a_prefix_but_all_of_a_read_is(void **state) {
    (void)state;
    uint32_t chunks[] = {1, 2};
    for (uint32_t n = 0; n < 3; n++) {
        start_batch();
        add_chunks(chunks, 2, 0, 1);
        add_chunks(chunks, 2, 0, 1);
        hand.lengths[1] -= n; /* its last chunk then ends with new rows */
        find(n == 2);
        assert_prefix(0x3, n == 0 ? 2 : 1);
    }
    start_batch();
    add_chunks(chunks, 2, 0, 0);
    add_chunks(chunks, 2, 0, 0);
    hand.query_lengths[0] = hand.query_lengths[1] = 5;
    find(true);
    assert_prefix(0x3, 2);
}

static void prefixes_of_two_batches_become_one_where_they_are_the_same(void **state) {
    (void)state;
    static const char *const words[] = {"AB", "AB", "Q", "AB", "AB", "Q", "Q", "AB", "AB"};
    assert_int_equal(2 + 2, join(words, 9, (const shared_by[]){{2, 0x3}, {2, 0x18}, {1, 0x60}, {2, 0x180}}, 4));
    assert_int_equal(2, hand.batch.prefix_count);
    assert_prefix(0x19b, 2);
    assert_prefix(0x60, 1);
    assert_int_equal(0, join(words, 9, (const shared_by[]){{2, 0x3}}, 1));
    assert_prefix(0x3, 2);
    assert_int_equal(0, join(words, 9, NULL, 0));
    assert_int_equal(0, hand.batch.prefix_count);
}

static void prefixes_that_save_more_apart_stay_apart(void **state) {
    (void)state;
    static const char *const words[] = {"ABCD", "ABCD", "ABCD", "AB", "AB", "AX", "AX", "YB", "YB"};
    /* As one they were as long as the shorter: 4 * 2 against 2 * 4 + 2. With one member less it is as much. */
    assert_int_equal(0, join(words, 9, (const shared_by[]){{4, 0x7}, {2, 0x18}}, 2));
    assert_int_equal(2, hand.batch.prefix_count);
    assert_prefix(0x7, 4);
    assert_prefix(0x18, 2);
    assert_int_equal(0, join(words, 9, (const shared_by[]){{4, 0x3}, {2, 0x18}}, 2));
    assert_int_equal(1, hand.batch.prefix_count);
    assert_prefix(0x1b, 2);
    /* Other pages, in the second chunk or in the first. */
    assert_int_equal(0, join(words, 9, (const shared_by[]){{2, 0x18}, {2, 0x60}, {2, 0x180}}, 3));
    assert_int_equal(3, hand.batch.prefix_count);
    assert_int_equal(1, join(words, 9, (const shared_by[]){{1, 0x18}, {1, 0x60}, {2, 0x180}}, 3));
    assert_prefix(0x78, 1);
    assert_prefix(0x180, 2);
}

static void parts_of_spread_sequences_share_nothing(void **state) {
    (void)state;
    start_batch();
    for (uint32_t i = 0; i < 4; i++)
        add_word("AB");
    memset(hand.parts, 0, sizeof hand.parts);
    hand.parts[1].chunk_stride = 2;
    hand.batch.parts = hand.parts;
    find(false);
    assert_prefix(0xd, 2);
    assert_int_equal(1, hand.batch.prefix_count);
}

/* Prefixes must be true and disjoint; they must save as much as it does to take all that begin alike. */
static void check_found(void) {
    static bool taken[MAX_SIZE];
    const dp_batch *batch = &hand.batch;
    uint64_t saved = 0;
    memset(taken, 0, sizeof taken);
    for (uint32_t p = 0; p < batch->prefix_count; p++) {
        const attn_prefix *prefix = &batch->prefixes[p];
        const uint32_t *pages = &batch->pages[batch->page_offsets[prefix->members[0]]];
        assert_true(prefix->count >= 2 && prefix->tokens > 0 && prefix->tokens % ATTN_CHUNK_TOKENS == 0);
        for (uint32_t m = 0; m < prefix->count; m++) {
            uint32_t i = prefix->members[m];
            assert_false(taken[i]);
            taken[i] = true;
            assert_true(prefix->tokens <= batch->lengths[i] - batch->query_lengths[i]);
            assert_memory_equal(pages, &batch->pages[batch->page_offsets[i]],
                                prefix->tokens / 16 * sizeof *batch->pages);
        }
        saved += (uint64_t)(prefix->count - 1) * prefix->tokens;
    }
    assert_int_equal(saved, batch->tokens_shared);
}

/* Words over few letters, so that many begin alike: any letter follows from all before it, as pages do. */
static void prefixes_found_in_random_families_are_true_and_save_enough(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 300; seed++) {
        dice dice = {seed};
        uint32_t firsts[4] = {0}, by_first_chunk = 0, size = 1 + dice_below(&dice, 60);
        start_batch();
        for (uint32_t i = 0; i < size; i++) {
            uint32_t chunks[6] = {0}, count = dice_below(&dice, 7), path = 1;
            for (uint32_t c = 0; c < count; c++) {
                path = 4 * path + dice_below(&dice, c == 0 ? 4 : 2);
                chunks[c] = path;
            }
            if (count > 0) firsts[chunks[0] % 4]++;
            add_chunks(chunks, count, dice_below(&dice, 30), 1);
        }
        find(false);
        check_found();
        for (uint32_t n = 0; n < 4; n++)
            by_first_chunk += firsts[n] > 0 ? firsts[n] - 1 : 0;
        assert_true(hand.batch.tokens_shared >= (uint64_t)by_first_chunk * ATTN_CHUNK_TOKENS);
    }
}

static void large_batches_are_found_whole(void **state) {
    (void)state;
    start_batch();
    for (uint32_t i = 0; i < 2048; i++)
        add_chunks((uint32_t[]){7 + i % 2, 100 + i}, 2, 0, 1);
    find(false);
    check_found();
    assert_found(2, 2046);
}

/* ------------------------------------------------------------------------------------------- */
/* Engines: one with forks, and one in which every sequence was uploaded */

enum { FAMILY = 6, PROMPT = 1100, MAX_ROWS = 16, SHARED_CHUNKS = 3 * 2 };

/* Chunks: 2, 2, 2, 2, 1, 1. The four save more than the six. */
static const uint32_t fork_at[FAMILY] = {PROMPT, PROMPT, 1024, 1030, PROMPT, 600};
static const uint32_t cut_to[FAMILY] = {PROMPT, PROMPT, 1024, 1030, 540, 600};

typedef struct {
    dp_engine *engine;
    uint64_t handles[FAMILY];
    float out[MAX_ROWS * 4 * 40], lse[MAX_ROWS * 4];
} house;

static uint64_t upload_prompt(dp_engine *engine, const attn_geometry *of) {
    dice contents = {3}, cuts = {4};
    uint64_t handle = open_sequence(engine, DP_LEAST_TOKENS, 0);
    assert_ok(try_upload(engine, of, &contents, &cuts, handle, PROMPT));
    return handle;
}

static void house_init(house *house, const dp_config *config, bool forked) {
    house->engine = create_engine(config);
    for (uint32_t i = 0; i < FAMILY; i++) {
        bool forks = forked && i > 0;
        house->handles[i] = forks ? fork_sequence(house->engine, house->handles[0], fork_at[i])
                                  : upload_prompt(house->engine, &config->geometry);
        assert_ok(dp_sequence_truncate(house->engine, TENANT, house->handles[i], cut_to[i]));
    }
}

static void house_fini(house *house) {
    assert_ok(dp_sequences_close(house->engine, TENANT, house->handles, FAMILY));
    destroy_engine(house->engine);
}

/* Runs a step of the whole family with equal rows in both houses; bound 0: the outputs must be the same bits. */
static void step_both(house *houses, const attn_geometry *of, const uint32_t *query_lengths, bool read_only,
                      const dp_options *options, double bound, uint64_t seed) {
    dp_step *steps[2];
    for (int h = 0; h < 2; h++)
        steps[h] = begin_step(houses[h].engine, houses[h].handles, query_lengths, FAMILY, read_only);
    uint32_t rows = dp_step_tokens(steps[0]);
    assert_true(rows <= MAX_ROWS);
    dice dice = {seed};
    for (uint32_t layer = 0; layer < of->layers; layer++) {
        layer_rows tensors = random_rows(&dice, of, rows, read_only);
        for (int h = 0; h < 2; h++)
            assert_ok(try_layer(steps[h], of, layer, &tensors, options, NULL, houses[h].out, houses[h].lse));
        double error = 0, norm = 0;
        for (size_t n = 0; n < (size_t)rows * 4 * 40; n++) {
            double difference = (double)houses[0].out[n] - houses[1].out[n];
            error += difference * difference;
            norm += (double)houses[1].out[n] * houses[1].out[n];
        }
        for (size_t n = 0; n < (size_t)rows * 4; n++)
            assert_true(fabs((double)houses[0].lse[n] - houses[1].lse[n]) <= 1e-4);
        assert_true(norm > 0 && sqrt(error / norm) <= bound);
        free_rows(&tensors);
    }
    for (int h = 0; h < 2; h++)
        dp_step_end(steps[h]);
}

static uint64_t tokens_shared(const house *house) { return rank_info(house->engine, 0).prefix_tokens_shared; }

static void check_forks(const char *backend, uint32_t workers) {
    static house houses[2];
    static const uint32_t speculative[FAMILY] = {3, 1, 2, 4, 1, 5};
    static const float sinks[4] = {1, -1, 0.5f, 3};
    const dp_options plain = {.return_lse = true},
                     capped = {.return_lse = true, .softcap = 4, .sinks = sinks, .sink_count = 4};
    dp_config config = small_config();
    config.backend = backend;
    config.workers_per_rank = workers;
    config.pages_per_rank = 1024;
    for (int h = 0; h < 2; h++)
        house_init(&houses[h], &config, h == 0);
    uint64_t in_a_step = (uint64_t)SHARED_CHUNKS * ATTN_CHUNK_TOKENS * config.geometry.layers;
    step_both(houses, &config.geometry, NULL, false, &plain, 2e-6, 1); /* each copies its partial page */
    assert_int_equal(in_a_step, tokens_shared(&houses[0]));
    step_both(houses, &config.geometry, speculative, false, &capped, 2e-6, 2);
    step_both(houses, &config.geometry, NULL, true, &plain, 2e-6, 3);
    step_both(houses, &config.geometry, speculative, true, &capped, 2e-6, 4);
    assert_int_equal(4 * in_a_step, tokens_shared(&houses[0]));
    assert_int_equal(0, tokens_shared(&houses[1]));
    for (int h = 0; h < 2; h++)
        house_fini(&houses[h]);
}

static void forks_have_the_outputs_of_sequences_of_their_own(void **state) {
    (void)state;
    check_forks("reference", 1);
    check_forks("cpu", 1);
    check_forks("cpu", 3);
}

static void batch_invariant_bits_and_windows_do_not_know_of_forks(void **state) {
    (void)state;
    static house houses[2];
    dp_config config = small_config();
    config.backend = "cpu";
    config.pages_per_rank = 1024;
    for (int h = 0; h < 2; h++)
        house_init(&houses[h], &config, h == 0);
    step_both(houses, &config.geometry, NULL, true, &(dp_options){.return_lse = true, .batch_invariant = true}, 0, 1);
    step_both(houses, &config.geometry, NULL, true, &(dp_options){.return_lse = true, .window = 700}, 0, 2);
    assert_int_equal(0, tokens_shared(&houses[0]));
    for (int h = 0; h < 2; h++)
        house_fini(&houses[h]);
}

/* A call of two sequences with rows of a seed. */
typedef struct {
    dp_step *step;
    layer_rows rows;
    waiting_call call;
} pair_call;

static void start_pair(pair_call *pair, dp_engine *engine, const attn_geometry *of, const uint64_t *handles,
                       uint64_t seed) {
    static const dp_options options = {0};
    dice dice = {seed};
    pair->step = begin_step(engine, handles, NULL, 2, true);
    pair->rows = random_rows(&dice, of, 2, true);
    prepare_call(&pair->call, of, 0, &pair->rows, &options, NULL);
    assert_ok(start_call(pair->step, &pair->call));
}

static void finish_pair(pair_call *pair, float out[2 * 4 * 40]) {
    assert_ok(wait_for_call(&pair->call));
    memcpy(out, pair->call.call.result->out, 2 * 4 * 40 * sizeof *out);
    free_call(&pair->call);
    free_rows(&pair->rows);
    dp_step_end(pair->step);
}

/* A rank that hangs with a call makes those behind it one launch. */
static void forks_in_calls_of_one_launch_are_read_together(void **state) {
    (void)state;
    static house house;
    static float outs[3][2][2 * 4 * 40];
    dp_config config = small_config();
    config.backend = "cpu";
    config.pages_per_rank = 1024;
    house_init(&house, &config, true);
    house.engine->small_bytes = 0; /* all calls go through the queue */
    uint64_t alone[2] = {open_sequence(house.engine, DP_LEAST_TOKENS, 0),
                         open_sequence(house.engine, DP_LEAST_TOKENS, 0)};
    pair_call first, pairs[2];
    for (uint32_t merged = 0; merged < 2; merged++) {
        uint64_t before = tokens_shared(&house), launches = rank_info(house.engine, 0).launches;
        if (merged) {
            dp_engine_stall_rank(house.engine, 0);
            start_pair(&first, house.engine, &config.geometry, alone, 1);
            while (rank_info(house.engine, 0).queue_depth > 0)
                usleep(200);
        }
        for (uint32_t p = 0; p < 2; p++) {
            start_pair(&pairs[p], house.engine, &config.geometry, &house.handles[2 * p], 2 + p);
            if (!merged) finish_pair(&pairs[p], outs[merged][p]);
        }
        if (merged) {
            dp_engine_release_rank(house.engine, 0);
            finish_pair(&first, outs[2][0]);
            for (uint32_t p = 0; p < 2; p++)
                finish_pair(&pairs[p], outs[merged][p]);
        }
        assert_int_equal(2, rank_info(house.engine, 0).launches - launches);
        assert_int_equal((merged ? 3 : 2) * 2 * ATTN_CHUNK_TOKENS, tokens_shared(&house) - before);
    }
    for (size_t n = 0; n < sizeof outs[0] / sizeof(float); n++)
        assert_true(fabsf((&outs[0][0][0])[n] - (&outs[1][0][0])[n]) <= 2e-6f);
    assert_ok(dp_sequences_close(house.engine, TENANT, alone, 2));
    house_fini(&house);
}

/* Each rank's batch has prefixes of its own; spread sequences are beside them. */
static void forks_on_several_ranks_share_on_each(void **state) {
    (void)state;
    dp_config config = small_config();
    config.ranks = 2;
    config.pages_per_rank = 1024;
    dp_engine *engine = create_engine(&config);
    uint64_t handles[6];
    for (uint32_t r = 0; r < 2; r++) {
        dice contents = {r + 1}, cuts = {r};
        handles[2 * r] = open_sequence(engine, DP_EXPLICIT, r);
        assert_ok(try_upload(engine, &config.geometry, &contents, &cuts, handles[2 * r], 700));
        handles[2 * r + 1] = fork_sequence(engine, handles[2 * r], 600);
    }
    dice contents = {9}, cuts = {9};
    handles[4] = open_sequence(engine, DP_SPREAD, 0);
    assert_ok(try_upload(engine, &config.geometry, &contents, &cuts, handles[4], 1200));
    handles[5] = fork_sequence(engine, handles[4], 1200);
    dice dice = {1};
    grow_by_step(engine, &config.geometry, &dice, handles, NULL, 6);
    for (uint32_t r = 0; r < 2; r++)
        assert_int_equal(ATTN_CHUNK_TOKENS * config.geometry.layers, rank_info(engine, r).prefix_tokens_shared);
    assert_ok(dp_sequences_close(engine, TENANT, handles, 6));
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sequences_that_share_no_chunk_have_no_prefix),
        cmocka_unit_test(sequences_share_the_chunks_up_to_where_they_differ),
        cmocka_unit_test(families_have_a_prefix_each),
        cmocka_unit_test(what_saves_most_is_taken_of_forks_of_forks),
        cmocka_unit_test(new_rows_are_no_part_of_a_prefix_but_all_of_a_read_is),
        cmocka_unit_test(prefixes_of_two_batches_become_one_where_they_are_the_same),
        cmocka_unit_test(prefixes_that_save_more_apart_stay_apart),
        cmocka_unit_test(parts_of_spread_sequences_share_nothing),
        cmocka_unit_test(prefixes_found_in_random_families_are_true_and_save_enough),
        cmocka_unit_test(large_batches_are_found_whole),
        cmocka_unit_test(forks_have_the_outputs_of_sequences_of_their_own),
        cmocka_unit_test(batch_invariant_bits_and_windows_do_not_know_of_forks),
        cmocka_unit_test(forks_in_calls_of_one_launch_are_read_together),
        cmocka_unit_test(forks_on_several_ranks_share_on_each),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
