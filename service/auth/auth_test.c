#include "service/auth/auth.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static const attn_config_tenant tenants[] = {
    {.name = "red", .token = "red-token-0123456789"},
    {.name = "blue", .token = "blue-token-0123456789"},
    {.name = "long", .token = "0123456789012345678901234567890123456789012345678901234567890123456789"},
};

#define UNTOUCHED 77

/* The code of a check; the tenant must be `expected` and stays UNTOUCHED where the check fails. */
static void assert_check(const attn_auth *auth, const char *authorization, attn_code code, uint32_t expected) {
    uint32_t tenant = UNTOUCHED;
    attn_status status =
        attn_auth_check(auth, authorization, authorization == NULL ? 0 : strlen(authorization), &tenant);
    assert_int_equal(status.code, code);
    assert_int_equal(tenant, expected);
}

static int create_three(void **state) {
    attn_auth *auth;
    if (attn_failed(attn_auth_create(tenants, 3, "admin-token-0123456789", &auth))) return 1;
    *state = auth;
    return 0;
}

static int create_open(void **state) {
    attn_auth *auth;
    if (attn_failed(attn_auth_create(NULL, 0, NULL, &auth))) return 1;
    *state = auth;
    return 0;
}

static int destroy(void **state) {
    attn_auth_destroy(*state);
    return 0;
}

static void each_token_is_its_own_tenant(void **state) {
    assert_int_equal(attn_auth_tenants(*state), 3);
    assert_check(*state, "Bearer red-token-0123456789", ATTN_OK, 0);
    assert_check(*state, "Bearer blue-token-0123456789", ATTN_OK, 1);
    assert_check(*state, "Bearer 0123456789012345678901234567890123456789012345678901234567890123456789", ATTN_OK, 2);
}

static void the_scheme_may_be_in_any_case_and_be_followed_by_spaces(void **state) {
    assert_check(*state, "bearer red-token-0123456789", ATTN_OK, 0);
    assert_check(*state, "BEARER   red-token-0123456789", ATTN_OK, 0);
}

static void missing_or_malformed_credentials_are_unauthenticated(void **state) {
    static const char *const malformed[] = {NULL,
                                            "",
                                            "Bearer",
                                            "Bearer ",
                                            "Bearer    ",
                                            "Basic cmVkOnJlZA==",
                                            "red-token-0123456789",
                                            "Bearer\tred-token-0123456789"};
    for (size_t i = 0; i < sizeof(malformed) / sizeof(malformed[0]); i++) {
        assert_check(*state, malformed[i], ATTN_UNAUTHENTICATED, UNTOUCHED);
    }
}

static void wrong_tokens_are_denied(void **state) {
    static const char *const wrong[] = {"Bearer x",
                                        "Bearer red-token-012345678",
                                        "Bearer red-token-01234567890",
                                        "Bearer RED-TOKEN-0123456789",
                                        "Bearer red-token-0123456789 ",
                                        "Bearer red-token-0123456789,blue-token-0123456789"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_check(*state, wrong[i], ATTN_PERMISSION_DENIED, UNTOUCHED);
    }
}

static void the_value_need_not_be_terminated(void **state) {
    static const char value[] = "Bearer red-token-0123456789 and more bytes that are not part of it";
    uint32_t tenant = UNTOUCHED;
    assert_int_equal(attn_auth_check(*state, value, strlen("Bearer red-token-0123456789"), &tenant).code, ATTN_OK);
    assert_int_equal(tenant, 0);
}

static void refusals_do_not_repeat_what_was_sent(void **state) {
    static const char value[] = "Bearer my-secret";
    uint32_t tenant;
    attn_status status = attn_auth_check(*state, value, strlen(value), &tenant);
    assert_null(strstr(status.message, "my-secret"));
}

static void without_tenants_everybody_is_tenant_zero(void **state) {
    assert_int_equal(attn_auth_tenants(*state), 1);
    assert_check(*state, NULL, ATTN_OK, 0);
    assert_check(*state, "Bearer anything", ATTN_OK, 0);
    assert_check(*state, "nonsense", ATTN_OK, 0);
}

static attn_code admin_code(const attn_auth *auth, const char *authorization) {
    return attn_auth_check_admin(auth, authorization, authorization == NULL ? 0 : strlen(authorization)).code;
}

static void only_the_admin_token_administers(void **state) {
    assert_int_equal(admin_code(*state, "Bearer admin-token-0123456789"), ATTN_OK);
    assert_int_equal(admin_code(*state, "Bearer red-token-0123456789"), ATTN_PERMISSION_DENIED);
    assert_int_equal(admin_code(*state, "Bearer admin-token-012345678"), ATTN_PERMISSION_DENIED);
    assert_int_equal(admin_code(*state, NULL), ATTN_UNAUTHENTICATED);
    assert_int_equal(admin_code(*state, "admin-token-0123456789"), ATTN_UNAUTHENTICATED);
    assert_check(*state, "Bearer admin-token-0123456789", ATTN_PERMISSION_DENIED, UNTOUCHED); /* it is no tenant's */
}

static void without_an_admin_token_nobody_administers(void **state) {
    assert_int_equal(admin_code(*state, NULL), ATTN_PERMISSION_DENIED);
    assert_int_equal(admin_code(*state, "Bearer admin-token-0123456789"), ATTN_PERMISSION_DENIED);
    assert_int_equal(admin_code(*state, "Bearer "), ATTN_PERMISSION_DENIED);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(each_token_is_its_own_tenant, create_three, destroy),
        cmocka_unit_test_setup_teardown(the_scheme_may_be_in_any_case_and_be_followed_by_spaces, create_three, destroy),
        cmocka_unit_test_setup_teardown(missing_or_malformed_credentials_are_unauthenticated, create_three, destroy),
        cmocka_unit_test_setup_teardown(wrong_tokens_are_denied, create_three, destroy),
        cmocka_unit_test_setup_teardown(the_value_need_not_be_terminated, create_three, destroy),
        cmocka_unit_test_setup_teardown(refusals_do_not_repeat_what_was_sent, create_three, destroy),
        cmocka_unit_test_setup_teardown(only_the_admin_token_administers, create_three, destroy),
        cmocka_unit_test_setup_teardown(without_an_admin_token_nobody_administers, create_open, destroy),
        cmocka_unit_test_setup_teardown(without_tenants_everybody_is_tenant_zero, create_open, destroy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
