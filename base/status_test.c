#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <string.h>

#include "base/status.h"

static void success_has_an_empty_message(void **state) {
    (void)state;
    assert_false(attn_failed(attn_ok()));
    assert_string_equal(attn_ok().message, "");
}

static void an_error_may_quote_the_last_error(void **state) {
    (void)state;
    attn_status inner = attn_error(ATTN_INVALID_ARGUMENT, "field %d", 7);
    attn_status outer = attn_error(ATTN_INTERNAL, "layer 3: %s", inner.message);
    assert_int_equal(outer.code, ATTN_INTERNAL);
    assert_string_equal(outer.message, "layer 3: field 7");
}

static void long_messages_are_cut_and_terminated(void **state) {
    (void)state;
    char text[2 * ATTN_STATUS_MESSAGE_BYTES];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    assert_int_equal(strlen(attn_error(ATTN_INTERNAL, "%s", text).message), ATTN_STATUS_MESSAGE_BYTES - 1);
}

static void *fail_elsewhere(void *unused) {
    (void)unused;
    attn_error(ATTN_INTERNAL, "another thread's");
    return NULL;
}

static void threads_do_not_share_messages(void **state) {
    (void)state;
    attn_status status = attn_error(ATTN_NOT_FOUND, "mine");
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
    pthread_join(thread, NULL);
    assert_string_equal(status.message, "mine");
}

static void a_saved_status_outlives_the_next_error(void **state) {
    (void)state;
    attn_saved_status saved;
    attn_status_save(&saved, attn_error(ATTN_ABORTED, "first"));
    attn_error(ATTN_INTERNAL, "second");
    assert_int_equal(attn_status_view(&saved).code, ATTN_ABORTED);
    assert_string_equal(attn_status_view(&saved).message, "first");
}

static attn_status fail_if(bool fail) { return fail ? attn_error(ATTN_UNAVAILABLE, "asked to") : attn_ok(); }

static attn_status try_both(bool first, bool second, int *reached) {
    attn_status status;
    ATTN_TRY(fail_if(first));
    *reached = 1;
    ATTN_TRY_GOTO(status, fail_if(second), done);
    *reached = 2;
done:
    return status;
}

static void try_stops_at_the_first_failure(void **state) {
    (void)state;
    int reached = 0;
    assert_int_equal(try_both(true, false, &reached).code, ATTN_UNAVAILABLE);
    assert_int_equal(reached, 0);
    assert_int_equal(try_both(false, true, &reached).code, ATTN_UNAVAILABLE);
    assert_int_equal(reached, 1);
    assert_int_equal(try_both(false, false, &reached).code, ATTN_OK);
    assert_int_equal(reached, 2);
}

static void every_code_has_its_grpc_name(void **state) {
    (void)state;
    assert_string_equal(attn_code_name(ATTN_OK), "OK");
    assert_string_equal(attn_code_name(ATTN_RESOURCE_EXHAUSTED), "RESOURCE_EXHAUSTED");
    assert_string_equal(attn_code_name(ATTN_UNAUTHENTICATED), "UNAUTHENTICATED");
    assert_string_equal(attn_code_name((attn_code)99), "UNKNOWN");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(success_has_an_empty_message),           cmocka_unit_test(an_error_may_quote_the_last_error),
        cmocka_unit_test(long_messages_are_cut_and_terminated),   cmocka_unit_test(threads_do_not_share_messages),
        cmocka_unit_test(a_saved_status_outlives_the_next_error), cmocka_unit_test(try_stops_at_the_first_failure),
        cmocka_unit_test(every_code_has_its_grpc_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
