/*
 * Partition and recombination: however sequences are placed, requests are cut and batches are mixed,
 * the outputs are those of one rank, in request order.
 */
#include "dp/tests/fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQUENCES = 8, MAX_ROWS = SEQUENCES * ATTN_MAX_QUERY_LENGTH, MIXED = -1 };

/* One of several engines that are driven by the same script. */
typedef struct {
    attn_geometry geometry;
    dp_engine *engine;
    uint64_t handles[SEQUENCES];
    bool alone; /* runs every sequence of a batch in a step of its own */
    char *out;  /* of the last layer run, in request order */
    float *lse;
} machine;

typedef struct {
    uint32_t count;
    uint32_t sequences[SEQUENCES];
    uint32_t query_lengths[SEQUENCES];
    uint32_t rows;
    bool read_only;
    dp_options options;
    float sinks[16];
} script_step;

static void machine_init(machine *machine, const dp_config *config, int placement) {
    static const dp_placement mixed[] = {DP_LEAST_TOKENS, DP_SPREAD, DP_ROUND_ROBIN, DP_EXPLICIT, DP_SPREAD};
    memset(machine, 0, sizeof *machine);
    machine->geometry = config->geometry;
    machine->engine = create_engine(config);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        dp_placement where = placement == MIXED ? mixed[i % 5] : (dp_placement)placement;
        machine->handles[i] = open_sequence(machine->engine, where, i % config->ranks);
    }
    machine->out = malloc(MAX_ROWS * attn_out_row_bytes(&machine->geometry));
    machine->lse = malloc(MAX_ROWS * machine->geometry.heads_q * sizeof(float));
}

static void machine_fini(machine *machine) {
    assert_ok(dp_sequences_close(machine->engine, TENANT, machine->handles, SEQUENCES));
    destroy_engine(machine->engine);
    free(machine->out);
    free(machine->lse);
}

/* The same random tokens for every machine. */
static void upload_to_all(machine *machines, uint32_t count, uint32_t sequence, uint32_t tokens, dice *script) {
    uint64_t contents = dice_next(script);
    if (tokens == 0) return;
    for (uint32_t m = 0; m < count; m++) {
        dice same = {contents}, cuts = {contents ^ m};
        machine *each = &machines[m];
        assert_ok(try_upload(each->engine, &each->geometry, &same, &cuts, each->handles[sequence], tokens));
    }
}

/* ------------------------------------------------------------------------------------------- */

static script_step roll_step(dice *dice, const attn_geometry *geometry, bool batch_invariant) {
    script_step step = {0};
    uint32_t order[SEQUENCES];
    for (uint32_t i = 0; i < SEQUENCES; i++)
        order[i] = i;
    step.count = 1 + dice_below(dice, SEQUENCES);
    step.read_only = dice_below(dice, 4) == 0;
    for (uint32_t i = 0; i < step.count; i++) {
        uint32_t other = i + dice_below(dice, SEQUENCES - i);
        uint32_t picked = order[other];
        order[other] = order[i];
        step.sequences[i] = picked;
        uint32_t kind = dice_below(dice, 8);
        step.query_lengths[i] = kind < 5 ? 1 : kind < 7 ? 1 + dice_below(dice, 8) : 1 + dice_below(dice, 16);
        step.rows += step.query_lengths[i];
    }
    step.options.return_lse = true;
    step.options.batch_invariant = batch_invariant;
    if (dice_below(dice, 3) == 0) step.options.window = 1 + dice_below(dice, 900);
    if (dice_below(dice, 3) == 0) step.options.softcap = 5.0f;
    if (dice_below(dice, 3) == 0) step.options.scale = 0.3f;
    if (dice_below(dice, 3) == 0) {
        for (uint32_t h = 0; h < geometry->heads_q; h++)
            step.sinks[h] = (float)dice_below(dice, 100) / 25.0f - 2.0f;
        step.options.sink_count = geometry->heads_q;
    }
    return step;
}

/* Runs sequences first .. first + count - 1 of the script's step as one step; rows of all layers are given. */
static void run_part(machine *machine, const script_step *script, uint32_t first, uint32_t count, uint32_t row,
                     const layer_rows *layers, dice *cuts) {
    const attn_geometry *geometry = &machine->geometry;
    uint64_t handles[SEQUENCES];
    for (uint32_t i = 0; i < count; i++)
        handles[i] = machine->handles[script->sequences[first + i]];
    dp_step *step = begin_step(machine->engine, handles, script->query_lengths + first, count, script->read_only);
    dp_options options = script->options;
    options.sinks = script->sinks;
    for (uint32_t layer = 0; layer < geometry->layers; layer++) {
        const layer_rows *all = &layers[layer];
        layer_rows rows = {.rows = dp_step_tokens(step)};
        rows.q = (char *)all->q + row * attn_query_row_bytes(geometry);
        if (!script->read_only) {
            rows.k = (char *)all->k + row * attn_key_row_bytes(geometry);
            rows.v = (char *)all->v + row * attn_value_row_bytes(geometry);
        }
        assert_ok(try_layer(step, geometry, layer, &rows, &options, cuts,
                            machine->out + row * attn_out_row_bytes(geometry), machine->lse + row * geometry->heads_q));
    }
    dp_step_end(step);
}

static void run_step(machine *machine, const script_step *script, const layer_rows *layers, uint64_t seed) {
    dice cuts = {seed};
    if (!machine->alone) {
        run_part(machine, script, 0, script->count, 0, layers, &cuts);
        return;
    }
    for (uint32_t i = 0, row = 0; i < script->count; i++) {
        run_part(machine, script, i, 1, row, layers, &cuts);
        row += script->query_lengths[i];
    }
}

static void run_on_all(machine *machines, uint32_t count, const script_step *script, dice *dice) {
    const attn_geometry *geometry = &machines[0].geometry;
    layer_rows layers[4] = {0};
    assert_true(geometry->layers <= 4);
    for (uint32_t layer = 0; layer < geometry->layers; layer++) {
        layers[layer] = random_rows(dice, geometry, script->rows, script->read_only);
    }
    for (uint32_t m = 0; m < count; m++)
        run_step(&machines[m], script, layers, dice_next(dice));
    for (uint32_t layer = 0; layer < geometry->layers; layer++)
        free_rows(&layers[layer]);
}

/* ||left - right|| / ||right|| over fp32 outputs, and the largest difference of LSEs. */
static void assert_close(const machine *left, const machine *right, uint32_t rows, double bound) {
    size_t outs = (size_t)rows * left->geometry.heads_q * left->geometry.head_dim_v;
    size_t lses = (size_t)rows * left->geometry.heads_q;
    const float *left_out = (const float *)(const void *)left->out;
    const float *right_out = (const float *)(const void *)right->out;
    double error = 0, norm = 1e-30, lse_error = 0;
    for (size_t i = 0; i < outs; i++) {
        error += ((double)left_out[i] - right_out[i]) * ((double)left_out[i] - right_out[i]);
        norm += (double)right_out[i] * right_out[i];
    }
    for (size_t i = 0; i < lses; i++) {
        if (isinf(left->lse[i]) && left->lse[i] == right->lse[i]) continue;
        double difference = fabs((double)left->lse[i] - right->lse[i]);
        if (!(difference <= lse_error)) lse_error = difference;
    }
    if (sqrt(error / norm) <= bound && lse_error <= 1e-4) return;
    fail_msg("outputs differ by %g, LSEs by %g", sqrt(error / norm), lse_error);
}

static void assert_same_bits(const machine *left, const machine *right, uint32_t rows) {
    assert_memory_equal(right->out, left->out, rows * attn_out_row_bytes(&left->geometry));
    assert_memory_equal(right->lse, left->lse, rows * left->geometry.heads_q * sizeof(float));
}

/* Lengths where something begins or ends: pages, chunks, turns of the stripes. */
static uint32_t roll_length(dice *dice, uint32_t i) {
    static const uint32_t edges[] = {0, 1, 15, 16, 17, 511, 512, 513, 1023, 1025};
    return dice_below(dice, 3) > 0 ? edges[(i + dice_below(dice, 10)) % 10] : dice_below(dice, 1400);
}

/* ------------------------------------------------------------------------------------------- */

static void check_against_oracle(const char *backend, uint32_t ranks, int placement, uint32_t steps) {
    dp_config config = small_config();
    config.geometry.layers = 2;
    config.pages_per_rank = 2048;
    machine machines[2];
    machine_init(&machines[0], &config, DP_LEAST_TOKENS);
    config.backend = backend;
    config.ranks = ranks;
    machine_init(&machines[1], &config, placement);
    dice dice = {ranks * 100 + (uint32_t)placement};
    for (uint32_t i = 0; i < SEQUENCES; i++)
        upload_to_all(machines, 2, i, roll_length(&dice, i), &dice);
    for (uint32_t s = 0; s < steps; s++) {
        script_step script = roll_step(&dice, &config.geometry, false);
        run_on_all(machines, 2, &script, &dice);
        assert_close(&machines[1], &machines[0], script.rows, 2e-6);
    }
    machine_fini(&machines[0]);
    machine_fini(&machines[1]);
}

static void outputs_are_those_of_one_rank_wherever_sequences_live(void **state) {
    (void)state;
    for (uint32_t ranks = 1; ranks <= 4; ranks++) {
        check_against_oracle("reference", ranks, DP_LEAST_TOKENS, 2);
        check_against_oracle("reference", ranks, DP_ROUND_ROBIN, 2);
        check_against_oracle("reference", ranks, DP_EXPLICIT, 2);
    }
}

static void outputs_of_spread_sequences_are_those_of_whole_ones(void **state) {
    (void)state;
    for (uint32_t ranks = 1; ranks <= 4; ranks++)
        check_against_oracle("reference", ranks, DP_SPREAD, 3);
}

static void steps_may_mix_whole_and_spread_sequences(void **state) {
    (void)state;
    for (uint32_t ranks = 2; ranks <= 4; ranks++)
        check_against_oracle("reference", ranks, MIXED, 4);
}

static void cpu_backend_gives_the_reference_outputs(void **state) {
    (void)state;
    for (uint32_t ranks = 1; ranks <= 4; ranks++)
        check_against_oracle("cpu", ranks, MIXED, 5);
}

/* ------------------------------------------------------------------------------------------- */

/* A sequence's outputs are the same bits alone, in any batch, on 1 to 4 ranks, whole and spread. */
static void check_batch_invariance(const char *backend, uint32_t batches) {
    enum { MACHINES = 9 };
    dp_config config = small_config();
    config.backend = backend;
    config.geometry.layers = 1;
    config.geometry.dtype = ATTN_BF16;
    config.pages_per_rank = 4096;
    config.max_sequence_tokens = 65536;
    machine machines[MACHINES];
    uint32_t m = 0;
    machine_init(&machines[m], &config, DP_LEAST_TOKENS);
    machines[m++].alone = true;
    for (config.ranks = 1; config.ranks <= 4; config.ranks++)
        machine_init(&machines[m++], &config, DP_ROUND_ROBIN);
    for (config.ranks = 2; config.ranks <= 4; config.ranks++)
        machine_init(&machines[m++], &config, DP_SPREAD);
    config.ranks = 3;
    machine_init(&machines[m++], &config, MIXED);
    assert_int_equal(MACHINES, m);
    dice dice = {20};
    for (uint32_t i = 0; i < SEQUENCES; i++)
        upload_to_all(machines, MACHINES, i, roll_length(&dice, i), &dice);
    for (uint32_t b = 0; b < batches; b++) {
        script_step script = roll_step(&dice, &config.geometry, true);
        run_on_all(machines, MACHINES, &script, &dice);
        for (m = 1; m < MACHINES; m++)
            assert_same_bits(&machines[m], &machines[0], script.rows);
    }
    for (m = 0; m < MACHINES; m++)
        machine_fini(&machines[m]);
}

static void batch_invariant_bits_do_not_depend_on_batch_ranks_or_spreading(void **state) {
    (void)state;
    check_batch_invariance("cpu", 200);
}

static void batch_invariant_bits_of_the_reference_do_not_either(void **state) {
    (void)state;
    check_batch_invariance("reference", 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(outputs_are_those_of_one_rank_wherever_sequences_live),
        cmocka_unit_test(outputs_of_spread_sequences_are_those_of_whole_ones),
        cmocka_unit_test(steps_may_mix_whole_and_spread_sequences),
        cmocka_unit_test(cpu_backend_gives_the_reference_outputs),
        cmocka_unit_test(batch_invariant_bits_do_not_depend_on_batch_ranks_or_spreading),
        cmocka_unit_test(batch_invariant_bits_of_the_reference_do_not_either),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
