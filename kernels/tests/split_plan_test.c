/* The split plan by itself: every tile once, two slots a worker, one last arriver, hints never obeyed blindly. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/backend.h"
#include "kernels/split_plan.h"

enum { MAX_BATCH = 1000, MAX_WORKERS = 200, MAX_RUNS = 200000 };

static uint64_t random_state;

static uint32_t below(uint32_t limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % limit);
}

static const attn_geometry geometry = {1, 8, 2, 64, 64, ATTN_BF16, 16, 0};

static uint32_t lengths[MAX_BATCH], query_lengths[MAX_BATCH];
static const void *new_keys[MAX_BATCH];
static attn_part parts[MAX_BATCH];
static attn_batch batch;

static uint32_t random_length(void) {
    static const uint32_t edges[] = {0, 1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 4096};
    return below(2) ? edges[below(12)] : below(6000);
}

/* How many of `total` tokens the part holds. */
static uint32_t tokens_of_part(const attn_part *part, uint64_t total) {
    uint32_t tokens = 0;
    for (uint64_t chunk = part->chunk_first; chunk * ATTN_CHUNK_TOKENS < total; chunk += part->chunk_stride) {
        uint64_t rest = total - chunk * ATTN_CHUNK_TOKENS;
        tokens += (uint32_t)(rest < ATTN_CHUNK_TOKENS ? rest : ATTN_CHUNK_TOKENS);
    }
    return tokens;
}

static void make_random_sequence(uint32_t i) {
    query_lengths[i] = below(3) ? 1 : 1 + below(ATTN_MAX_QUERY_LENGTH);
    new_keys[i] = below(3) ? lengths : NULL; /* any pointer: nothing is read through it */
    uint64_t total = random_length();
    if (new_keys[i]) total += query_lengths[i];
    lengths[i] = (uint32_t)total;
    parts[i] = (attn_part){0};
    if (below(4) == 0) {
        parts[i].chunk_stride = 1 + below(4);
        parts[i].chunk_first = below(parts[i].chunk_stride);
        parts[i].total_length = total;
        lengths[i] = tokens_of_part(&parts[i], total);
    }
}

static void make_random_batch(uint64_t seed, uint32_t size) {
    random_state = seed * 2654435761u + 1;
    static const uint32_t windows[] = {0, 0, 1, 16, 100, 1000};
    batch = (attn_batch){.size = size,
                         .lengths = lengths,
                         .query_lengths = query_lengths,
                         .new_keys = new_keys,
                         .parts = parts,
                         .window = windows[below(6)],
                         .batch_invariant = below(3) == 0};
    for (uint32_t i = 0; i < size; i++) {
        make_random_sequence(i);
    }
}

static void make_line(attn_line *line, uint32_t workers) {
    static const uint32_t tiles[] = {16, 64, 128, 256}, blocks[] = {1, 4, 16, 128};
    attn_line_init(line, &geometry, tiles[below(4)], blocks[below(4)], workers);
    assert_int_equal(attn_line_build(line, &batch).code, ATTN_OK);
}

/* By the definition in attention.h, one token at a time. */
static bool sees(uint32_t i, uint32_t query, uint64_t local) {
    const attn_part *part = attn_batch_part(&batch, i);
    int64_t total = (int64_t)(part ? part->total_length : lengths[i]);
    int64_t position = new_keys[i] ? total - query_lengths[i] + query : total - 1;
    int64_t token = (int64_t)local;
    if (part) {
        uint64_t chunk = part->chunk_first + local / ATTN_CHUNK_TOKENS * part->chunk_stride;
        token = (int64_t)(chunk * ATTN_CHUNK_TOKENS + local % ATTN_CHUNK_TOKENS);
    }
    return token <= position && (batch.window == 0 || token > position - batch.window);
}

static void a_row_sees_what_the_mathematics_says(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 60; seed++) {
        make_random_batch(seed, 3);
        for (uint32_t i = 0; i < batch.size; i++) {
            uint32_t query = below(query_lengths[i]);
            uint64_t begin, end;
            attn_row_visible(&batch, i, query, &begin, &end);
            assert_true(begin <= end && end <= lengths[i]);
            for (uint64_t token = 0; token < lengths[i]; token++) {
                assert_int_equal(sees(i, query, token), token >= begin && token < end);
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* All runs of a line */

typedef struct {
    attn_run run;
    uint32_t worker;
} worker_run;

static worker_run *runs;
static uint32_t run_count;

static int allocate_runs(void **state) {
    (void)state;
    runs = malloc(MAX_RUNS * sizeof *runs);
    return runs == NULL;
}

static int free_runs(void **state) {
    (void)state;
    free(runs);
    return 0;
}

static void walk_all(const attn_line *line, const attn_plan *plan) {
    run_count = 0;
    for (uint32_t worker = 0; worker < line->workers; worker++) {
        attn_walk walk;
        attn_walk_start(&walk, line, worker, plan);
        while (run_count < MAX_RUNS && attn_walk_next(&walk, &runs[run_count].run)) {
            runs[run_count++].worker = worker;
        }
    }
    assert_true(run_count < MAX_RUNS);
}

/* The runs, one after the other, are the wave's units one after the other, in full. */
static void assert_runs_tile_the_wave(const attn_line *line) {
    uint64_t line_tile = line->begin, tile = 0;
    for (uint32_t n = 0; n < run_count; n++) {
        const attn_run *run = &runs[n].run;
        assert_int_equal(run->line_tile, line_tile);
        assert_int_equal(run->tile_begin, tile);
        assert_true(run->tile_end > run->tile_begin && run->tile_end <= run->unit_tiles);
        assert_int_equal(run->whole, run->tile_end - run->tile_begin == run->unit_tiles);
        line_tile += run->tile_end - run->tile_begin;
        tile = run->tile_end == run->unit_tiles ? 0 : run->tile_end;
        if (n == 0) continue;
        const attn_run *before = &runs[n - 1].run;
        bool same_unit = before->sequence == run->sequence && before->head == run->head && before->block == run->block;
        assert_int_equal(same_unit, run->tile_begin != 0);
    }
    assert_int_equal(line_tile, line->end);
    assert_int_equal(tile, 0);
}

/* Each row's visible tokens are covered once: the tiles of a unit do not overlap and leave out nothing. */
static void assert_runs_cover_what_rows_see(const attn_line *line) {
    for (uint32_t n = 0; n < run_count; n++) {
        const attn_run *run = &runs[n].run;
        uint64_t first_begin, last_end, unused, expected = run->token_begin;
        for (uint64_t tile = run->tile_begin; tile < run->tile_end; tile++) {
            uint64_t begin, end;
            attn_run_tile(line, run, tile, &begin, &end);
            assert_true(begin <= end && end <= lengths[run->sequence]);
            if (begin == end) continue;
            assert_int_equal(begin, expected);
            assert_int_equal(begin / line->tile, (end - 1) / line->tile);
            assert_int_equal(begin / line->tile, run->first_tile_tokens / line->tile + tile);
            expected = end;
        }
        assert_int_equal(expected, run->token_end);
        attn_row_visible(&batch, run->sequence, run->query_first, &first_begin, &unused);
        attn_row_visible(&batch, run->sequence, run->query_first + run->queries - 1, &unused, &last_end);
        if (run->tile_begin == 0 && last_end > first_begin) assert_true(run->token_begin <= first_begin);
        if (run->tile_end == run->unit_tiles && last_end > first_begin) assert_int_equal(run->token_end, last_end);
        if (run->tile_begin > 0) assert_true(run->token_begin >= runs[n - 1].run.token_end);
    }
}

static void assert_shares_are_even(const attn_line *line) {
    uint64_t share = (line->end - line->begin) / line->workers;
    for (uint32_t w = 0; w < line->workers; w++) {
        uint64_t tiles = attn_line_worker_begin(line, w + 1) - attn_line_worker_begin(line, w);
        assert_true(tiles == share || tiles == share + 1);
    }
}

static void every_tile_belongs_to_exactly_one_run(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 300; seed++) {
        attn_line line;
        make_random_batch(seed, 1 + (uint32_t)seed % 20);
        make_line(&line, 1 + below(seed % 5 == 0 ? MAX_WORKERS : 8));
        walk_all(&line, NULL);
        assert_runs_tile_the_wave(&line);
        assert_runs_cover_what_rows_see(&line);
        assert_shares_are_even(&line);
        attn_line_fini(&line);
    }
}

static void row_blocks_are_all_rows_of_all_heads_once(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 40; seed++) {
        static uint8_t seen[20][2][ATTN_MAX_QUERY_LENGTH];
        attn_line line;
        memset(seen, 0, sizeof seen);
        make_random_batch(seed, 20);
        make_line(&line, 7);
        walk_all(&line, NULL);
        for (uint32_t n = 0; n < run_count; n++) {
            const attn_run *run = &runs[n].run;
            assert_true(run->queries <= line.block_queries);
            for (uint32_t q = 0; q < run->queries && run->tile_begin == 0; q++) {
                seen[run->sequence][run->head][run->query_first + q]++;
            }
        }
        for (uint32_t i = 0; i < 20; i++) {
            for (uint32_t q = 0; q < ATTN_MAX_QUERY_LENGTH; q++) {
                assert_int_equal(seen[i][0][q], q < query_lengths[i]);
                assert_int_equal(seen[i][1][q], q < query_lengths[i]);
            }
        }
        attn_line_fini(&line);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Slots and tickets */

static void partials_have_two_slots_a_worker_of_their_own(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 300; seed++) {
        uint8_t used[2 * MAX_WORKERS] = {0};
        attn_line line;
        make_random_batch(seed, 1 + (uint32_t)seed % 10);
        make_line(&line, 1 + below(MAX_WORKERS));
        walk_all(&line, NULL);
        for (uint32_t n = 0; n < run_count; n++) {
            if (runs[n].run.whole) continue;
            assert_true(runs[n].run.slot < 2 * line.workers);
            assert_int_equal(runs[n].run.slot / 2, runs[n].worker);
            assert_int_equal(used[runs[n].run.slot]++, 0);
        }
        attn_line_fini(&line);
    }
}

/* The slots of the unit that begins at run n, taken from the runs themselves. */
static uint32_t slots_from_runs(uint32_t n, uint32_t *slots) {
    uint32_t count = 0;
    do {
        slots[count++] = runs[n++].run.slot;
    } while (n < run_count && runs[n].run.tile_begin != 0);
    return count;
}

static void slots_are_listed_in_split_order(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 300; seed++) {
        attn_line line;
        make_random_batch(seed, 1 + (uint32_t)seed % 10);
        make_line(&line, 1 + below(MAX_WORKERS));
        walk_all(&line, NULL);
        for (uint32_t n = 0, first = 0; n < run_count; n++) {
            uint32_t slots[MAX_WORKERS], expected[MAX_WORKERS];
            if (runs[n].run.tile_begin == 0) first = n;
            if (runs[n].run.whole) continue;
            uint32_t count = slots_from_runs(first, expected);
            assert_int_equal(attn_run_slots(&line, &runs[n].run, slots), count);
            assert_memory_equal(slots, expected, count * sizeof *slots);
        }
        attn_line_fini(&line);
    }
}

static void shuffle_runs(void) {
    for (uint32_t n = run_count; n > 1; n--) {
        uint32_t other = below(n);
        worker_run swap = runs[n - 1];
        runs[n - 1] = runs[other];
        runs[other] = swap;
    }
}

static uint32_t count_cut_units(void) {
    uint32_t cut = 0;
    for (uint32_t n = 0; n < run_count; n++) {
        cut += !runs[n].run.whole && runs[n].run.tile_begin == 0;
    }
    return cut;
}

static void exactly_one_run_of_a_cut_unit_arrives_last(void **state) {
    (void)state;
    static attn_ticket tickets[MAX_WORKERS];
    for (uint64_t seed = 0; seed < 300; seed++) {
        attn_line line;
        uint32_t last_arrivers = 0;
        make_random_batch(seed, 1 + (uint32_t)seed % 10);
        make_line(&line, 1 + below(MAX_WORKERS));
        walk_all(&line, NULL);
        uint32_t cut_units = count_cut_units();
        assert_true(cut_units < line.workers);
        attn_tickets_reset(tickets, line.workers);
        shuffle_runs();
        for (uint32_t n = 0; n < run_count; n++) {
            if (!runs[n].run.whole) last_arrivers += attn_run_arrive(&runs[n].run, tickets);
        }
        assert_int_equal(last_arrivers, cut_units);
        attn_line_fini(&line);
    }
}

static void a_wrong_partition_completes_no_unit_early_or_twice(void **state) {
    (void)state;
    attn_ticket tickets[1];
    attn_run run = {.unit_tiles = 10, .tile_begin = 0, .tile_end = 6};
    attn_tickets_reset(tickets, 1);
    assert_false(attn_run_arrive(&run, tickets)); /* 6 of 10 */
    assert_false(attn_run_arrive(&run, tickets)); /* the same tiles again: 12 */
    run.tile_end = 4;
    assert_false(attn_run_arrive(&run, tickets));
    assert_false(attn_run_arrive(&run, tickets));
}

/* ------------------------------------------------------------------------------------------- */
/* Waves */

static void waves_are_whole_units_that_fit_the_slots(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 200; seed++) {
        attn_line line;
        make_random_batch(seed, 1 + (uint32_t)seed % 30);
        batch.batch_invariant = true;
        make_line(&line, 1 + below(8));
        uint64_t slots = attn_line_min_chunk_slots(&geometry, 6500 / 16) + below(40), done = 0;
        attn_line_first_wave(&line);
        while (attn_line_next_wave(&line, slots)) {
            assert_int_equal(line.begin, done);
            assert_true(line.end - line.begin <= slots);
            walk_all(&line, NULL);
            assert_runs_tile_the_wave(&line);
            assert_runs_cover_what_rows_see(&line);
            done = line.end;
        }
        assert_int_equal(done, attn_line_total(&line));
        attn_line_fini(&line);
    }
}

static void a_part_in_chunks_has_every_chunk_seen_or_not(void **state) {
    (void)state;
    batch = (attn_batch){.size = 1,
                         .lengths = lengths,
                         .query_lengths = query_lengths,
                         .new_keys = new_keys,
                         .parts = parts,
                         .window = 100,
                         .batch_invariant = true};
    lengths[0] = 3 * ATTN_CHUNK_TOKENS + 5;
    query_lengths[0] = 1;
    new_keys[0] = NULL;
    parts[0] = (attn_part){.chunk_first = 1, .chunk_stride = 2, .total_length = 7 * ATTN_CHUNK_TOKENS + 5};
    attn_line line;
    attn_line_init(&line, &geometry, 64, 1, 1);
    assert_int_equal(attn_line_build(&line, &batch).code, ATTN_OK);
    walk_all(&line, NULL);
    assert_int_equal(run_count, geometry.heads_kv);
    assert_int_equal(runs[0].run.unit_tiles, 4);
    for (uint64_t tile = 0; tile < 4; tile++) {
        uint64_t begin, end;
        attn_run_tile(&line, &runs[0].run, tile, &begin, &end);
        assert_int_equal(attn_run_chunk(&runs[0].run, tile), tile);
        assert_int_equal(end - begin,
                         tile == 3 ? 5 : 0); /* the window of 100 reaches into the chunk before, not ours */
    }
    attn_line_fini(&line);
}

/* ------------------------------------------------------------------------------------------- */
/* Plans */

static attn_plan *plan_of(const attn_line *line, attn_plan_identity identity) {
    attn_plan *plan = malloc(attn_plan_bytes(line->workers));
    assert_non_null(plan);
    attn_plan_fill(plan, line, identity);
    return plan;
}

static const attn_plan_identity identity = {3, 41};

static void a_plan_fits_the_batch_it_was_made_for(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 50; seed++) {
        attn_line line;
        make_random_batch(seed, 1 + below(20));
        make_line(&line, 1 + below(MAX_WORKERS));
        attn_plan *plan = plan_of(&line, identity);
        assert_int_equal(attn_plan_check(plan, &line, identity), ATTN_PLAN_FITS);
        free(plan);
        attn_line_fini(&line);
    }
}

static void assert_same_runs_with(const attn_line *line, const attn_plan *plan) {
    static worker_run expected[4096];
    walk_all(line, NULL);
    uint32_t count = run_count;
    assert_true(count <= 4096);
    memcpy(expected, runs, count * sizeof *runs);
    walk_all(line, plan);
    assert_int_equal(run_count, count);
    assert_memory_equal(runs, expected, count * sizeof *runs);
}

static void a_plan_changes_no_run(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 100; seed++) {
        attn_line line;
        make_random_batch(seed, 1 + below(8));
        make_line(&line, 1 + below(20));
        attn_plan *plan = plan_of(&line, identity);
        assert_same_runs_with(&line, plan);
        free(plan);
        attn_line_fini(&line);
    }
}

static void corrupt(attn_plan_start *start) {
    static const uint32_t bad[] = {0, 1, 2, 0x7fffffff, 0xffffffff, 2147480000};
    switch (below(5)) {
    case 0: start->sequence = bad[below(6)]; break;
    case 1: start->head = bad[below(6)]; break;
    case 2: start->block = bad[below(6)]; break;
    case 3: start->tile = below(2) ? UINT64_MAX : bad[below(6)]; break;
    default: start->line_tile = below(2) ? UINT64_MAX : bad[below(6)]; break;
    }
}

/* As if they had got past the check: a crafted CRC, or memory overwritten after it. */
static void wrong_hints_of_an_accepted_plan_change_no_run(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 400; seed++) {
        attn_line line;
        make_random_batch(seed, 1 + below(8));
        make_line(&line, 1 + below(20));
        attn_plan *plan = plan_of(&line, identity);
        for (uint32_t n = 0; n < 1 + seed % 4; n++) {
            corrupt(&plan->starts[below(line.workers)]);
        }
        assert_same_runs_with(&line, plan);
        free(plan);
        attn_line_fini(&line);
    }
}

static void every_flipped_bit_of_a_plan_is_noticed(void **state) {
    (void)state;
    attn_line line;
    make_random_batch(5, 5);
    make_line(&line, 4);
    attn_plan *plan = plan_of(&line, identity);
    unsigned char *bytes = (unsigned char *)plan;
    for (size_t bit = 0; bit < 8 * attn_plan_bytes(line.workers); bit++) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        assert_int_not_equal(attn_plan_check(plan, &line, identity), ATTN_PLAN_FITS);
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    assert_int_equal(attn_plan_check(plan, &line, identity), ATTN_PLAN_FITS);
    free(plan);
    attn_line_fini(&line);
}

static void assert_verdict(const attn_plan *plan, const attn_line *line, attn_plan_identity expected_identity,
                           attn_plan_verdict verdict) {
    assert_string_equal(attn_plan_verdict_name(attn_plan_check(plan, line, expected_identity)),
                        attn_plan_verdict_name(verdict));
}

static void a_stale_plan_is_told_by_what_is_stale(void **state) {
    (void)state;
    attn_line line;
    make_random_batch(9, 5);
    batch.batch_invariant = false;
    attn_line_init(&line, &geometry, 64, 16, 4);
    assert_int_equal(attn_line_build(&line, &batch).code, ATTN_OK);
    attn_plan *plan = plan_of(&line, identity);
    assert_verdict(plan, &line, (attn_plan_identity){2, 41}, ATTN_PLAN_WRONG_RANK);
    assert_verdict(plan, &line, (attn_plan_identity){3, 42}, ATTN_PLAN_WRONG_GENERATION);

    lengths[2]++;
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_LENGTHS);
    lengths[2]--;
    query_lengths[4]++;
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_LENGTHS);
    query_lengths[4]--;
    batch.window += 1;
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_LENGTHS);
    batch.window -= 1;
    assert_verdict(plan, &line, identity, ATTN_PLAN_FITS);

    batch.size = 4;
    assert_int_equal(attn_line_build(&line, &batch).code, ATTN_OK);
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_BATCH);
    batch.size = 5;
    batch.batch_invariant = true;
    assert_int_equal(attn_line_build(&line, &batch).code, ATTN_OK);
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_TILES);
    line.workers = 3;
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_WORKERS);
    free(plan);
    attn_line_fini(&line);
}

static void a_plan_of_another_geometry_is_told(void **state) {
    (void)state;
    attn_line line, other;
    attn_geometry other_geometry = geometry;
    other_geometry.head_dim_v = 128;
    make_random_batch(9, 5);
    attn_line_init(&line, &geometry, 64, 16, 4);
    attn_line_init(&other, &other_geometry, 64, 16, 4);
    assert_int_equal(attn_line_build(&line, &batch).code, ATTN_OK);
    assert_int_equal(attn_line_build(&other, &batch).code, ATTN_OK);
    attn_plan *plan = plan_of(&other, identity);
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_GEOMETRY);
    free(plan);
    attn_line_fini(&line);
    attn_line_fini(&other);
}

static void memory_that_is_no_plan_is_told(void **state) {
    (void)state;
    attn_line line;
    make_random_batch(9, 5);
    make_line(&line, 2);
    attn_plan *plan = calloc(1, attn_plan_bytes(2));
    assert_non_null(plan);
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_MAGIC);
    attn_plan_fill(plan, &line, identity);
    plan->header.version++;
    assert_verdict(plan, &line, identity, ATTN_PLAN_WRONG_VERSION);
    free(plan);
    attn_line_fini(&line);
}

static void an_empty_line_has_no_runs(void **state) {
    (void)state;
    attn_line line;
    make_random_batch(1, 0);
    make_line(&line, 3);
    walk_all(&line, NULL);
    assert_int_equal(run_count, 0);
    attn_line_fini(&line);
}

static void empty_sequences_have_one_empty_tile_a_unit(void **state) {
    (void)state;
    attn_line line;
    make_random_batch(1, 5);
    for (uint32_t i = 0; i < 5; i++) {
        lengths[i] = 0;
        query_lengths[i] = 1;
        new_keys[i] = NULL;
        parts[i] = (attn_part){0};
    }
    make_line(&line, 3);
    walk_all(&line, NULL);
    assert_int_equal(run_count, 5 * geometry.heads_kv);
    for (uint32_t n = 0; n < run_count; n++) {
        assert_true(runs[n].run.whole && runs[n].run.token_begin == runs[n].run.token_end);
    }
    attn_line_fini(&line);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_row_sees_what_the_mathematics_says),
        cmocka_unit_test(every_tile_belongs_to_exactly_one_run),
        cmocka_unit_test(row_blocks_are_all_rows_of_all_heads_once),
        cmocka_unit_test(partials_have_two_slots_a_worker_of_their_own),
        cmocka_unit_test(slots_are_listed_in_split_order),
        cmocka_unit_test(exactly_one_run_of_a_cut_unit_arrives_last),
        cmocka_unit_test(a_wrong_partition_completes_no_unit_early_or_twice),
        cmocka_unit_test(waves_are_whole_units_that_fit_the_slots),
        cmocka_unit_test(a_part_in_chunks_has_every_chunk_seen_or_not),
        cmocka_unit_test(a_plan_fits_the_batch_it_was_made_for),
        cmocka_unit_test(a_plan_changes_no_run),
        cmocka_unit_test(wrong_hints_of_an_accepted_plan_change_no_run),
        cmocka_unit_test(every_flipped_bit_of_a_plan_is_noticed),
        cmocka_unit_test(a_stale_plan_is_told_by_what_is_stale),
        cmocka_unit_test(a_plan_of_another_geometry_is_told),
        cmocka_unit_test(memory_that_is_no_plan_is_told),
        cmocka_unit_test(an_empty_line_has_no_runs),
        cmocka_unit_test(empty_sequences_have_one_empty_tile_a_unit),
    };
    return cmocka_run_group_tests(tests, allocate_runs, free_runs);
}
