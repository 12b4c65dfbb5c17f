/* Handles: only what was given out, to whom it was given, as long as it is open. */
#include "dp/tests/fixture.h"

#include "dp/handles.h"

static void handle_cipher_is_speck(void **state) {
    (void)state;
    /* The test vector of Speck64/128 in the paper that defines it. */
    uint32_t secret[4] = {0x03020100, 0x0b0a0908, 0x13121110, 0x1b1a1918};
    dp_handle_key key;
    dp_handle_key_expand(&key, secret);
    assert_true(dp_handle_seal(&key, 0x7475432d, 0x3b726574) == 0x8c6fa548454e028bu);
    uint32_t slot, generation;
    dp_handle_unseal(&key, 0x8c6fa548454e028bu, &slot, &generation);
    assert_int_equal(0x7475432d, slot);
    assert_int_equal(0x3b726574, generation);
}

static attn_status look(dp_engine *engine, uint32_t tenant, uint64_t handle) {
    dp_sequence_info info;
    return dp_sequences_describe(engine, tenant, &handle, 1, &info);
}

static void closed_handle_is_not_found_though_its_slot_is_in_use(void **state) {
    (void)state;
    dp_config config = small_config();
    config.max_sequences = 1;
    dp_engine *engine = create_engine(&config);
    uint64_t stale[8];
    for (int i = 0; i < 8; i++) {
        stale[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
        close_sequence(engine, stale[i]);
    }
    uint64_t fresh = open_sequence(engine, DP_LEAST_TOKENS, 0);
    for (int i = 0; i < 8; i++) {
        assert_error(ATTN_NOT_FOUND, look(engine, TENANT, stale[i]), "sequences[0]: unknown, closed or not yours");
        assert_code(ATTN_NOT_FOUND, dp_sequence_truncate(engine, TENANT, stale[i], 0));
        assert_code(ATTN_NOT_FOUND, dp_sequences_close(engine, TENANT, &stale[i], 1));
    }
    assert_ok(look(engine, TENANT, fresh));
    close_sequence(engine, fresh);
    destroy_engine(engine);
}

static void forged_handles_are_not_found(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t real = open_sequence(engine, DP_LEAST_TOKENS, 0);
    for (uint32_t bit = 0; bit < 64; bit++)
        assert_code(ATTN_NOT_FOUND, look(engine, TENANT, real ^ (1ull << bit)));
    for (uint64_t near = 1; near < 1000; near++) {
        assert_code(ATTN_NOT_FOUND, look(engine, TENANT, real + near));
        assert_code(ATTN_NOT_FOUND, look(engine, TENANT, real - near));
        assert_code(ATTN_NOT_FOUND, look(engine, TENANT, near << 32 | (near % 7)));
    }
    assert_code(ATTN_NOT_FOUND, look(engine, TENANT, 0));
    close_sequence(engine, real);
    destroy_engine(engine);
}

static void foreign_handle_answers_as_an_unknown_one_does(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t mine = open_sequence(engine, DP_LEAST_TOKENS, 0);
    const char *text = "unknown, closed or not yours";
    uint64_t handle;
    uint32_t rank;
    dp_upload *upload;
    dp_step *step;
    dp_step_request request = {.tenant = OTHER_TENANT, .sequences = &mine, .count = 1};
    assert_error(ATTN_NOT_FOUND, look(engine, OTHER_TENANT, mine), text);
    assert_error(ATTN_NOT_FOUND, dp_sequences_close(engine, OTHER_TENANT, &mine, 1), text);
    assert_error(ATTN_NOT_FOUND, dp_sequence_truncate(engine, OTHER_TENANT, mine, 0), text);
    assert_error(ATTN_NOT_FOUND, dp_sequence_fork(engine, OTHER_TENANT, mine, 0, &handle, &rank), text);
    assert_error(ATTN_NOT_FOUND, dp_upload_begin(engine, OTHER_TENANT, mine, 1, &upload), text);
    assert_error(ATTN_NOT_FOUND, dp_step_begin(engine, &request, &step), text);
    request.read_only = true;
    assert_error(ATTN_NOT_FOUND, dp_step_begin(engine, &request, &step), text);
    close_sequence(engine, mine);
    destroy_engine(engine);
}

static void handle_of_another_engine_is_not_found(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *before = create_engine(&config);
    uint64_t old = open_sequence(before, DP_LEAST_TOKENS, 0);
    close_sequence(before, old);
    destroy_engine(before);
    dp_engine *after = create_engine(&config);
    uint64_t new = open_sequence(after, DP_LEAST_TOKENS, 0);
    assert_true(old != new);
    assert_code(ATTN_NOT_FOUND, look(after, TENANT, old));
    close_sequence(after, new);
    destroy_engine(after);
}

static void error_names_the_index(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t handles[4];
    for (int i = 0; i < 3; i++)
        handles[i] = open_sequence(engine, DP_LEAST_TOKENS, 0);
    handles[3] = 12345;
    dp_step *step;
    assert_error(ATTN_NOT_FOUND, try_begin_step(engine, handles, NULL, 4, false, &step), "sequences[3]");
    assert_error(ATTN_NOT_FOUND, dp_sequences_close(engine, TENANT, handles, 4), "sequences[3]");
    assert_ok(dp_sequences_close(engine, TENANT, handles, 3));
    destroy_engine(engine);
}

static void step_names_belong_to_their_tenant_and_end_with_the_step(void **state) {
    (void)state;
    dp_config config = small_config();
    dp_engine *engine = create_engine(&config);
    uint64_t sequence = open_sequence(engine, DP_LEAST_TOKENS, 0);
    dp_step *step = begin_step(engine, &sequence, NULL, 1, false);
    uint64_t id = dp_step_id(step);
    dp_step *taken;
    assert_true(id != 0);
    assert_code(ATTN_ABORTED, dp_step_take(engine, TENANT, id, &taken));
    dp_step_put(step);
    assert_code(ATTN_NOT_FOUND, dp_step_take(engine, OTHER_TENANT, id, &taken));
    assert_code(ATTN_NOT_FOUND, dp_step_take(engine, TENANT, id ^ 1, &taken));
    assert_code(ATTN_NOT_FOUND, dp_step_take(engine, TENANT, sequence, &taken));
    assert_code(ATTN_NOT_FOUND, look(engine, TENANT, id));
    assert_ok(dp_step_take(engine, TENANT, id, &taken));
    assert_ptr_equal(step, taken);
    dp_step_end(taken);
    assert_code(ATTN_NOT_FOUND, dp_step_take(engine, TENANT, id, &taken));
    step = begin_step(engine, &sequence, NULL, 1, false);
    assert_true(dp_step_id(step) != id);
    assert_code(ATTN_NOT_FOUND, dp_step_take(engine, TENANT, id, &taken));
    dp_step_end(step);
    close_sequence(engine, sequence);
    destroy_engine(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(handle_cipher_is_speck),
        cmocka_unit_test(closed_handle_is_not_found_though_its_slot_is_in_use),
        cmocka_unit_test(forged_handles_are_not_found),
        cmocka_unit_test(foreign_handle_answers_as_an_unknown_one_does),
        cmocka_unit_test(handle_of_another_engine_is_not_found),
        cmocka_unit_test(error_names_the_index),
        cmocka_unit_test(step_names_belong_to_their_tenant_and_end_with_the_step),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
