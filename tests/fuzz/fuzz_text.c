/*
 * Text that comes from outside and is neither a message nor a file: the `authorization` metadata, and
 * what ends up in the log. The log's line must be one line of well-formed JSON whatever is in it.
 *
 * Input: the bytes, as they are.
 */
#define _GNU_SOURCE

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "service/auth/auth.h"
#include "service/log/log.h"
#include "tests/fuzz/fuzz.h"

static const attn_config_tenant tenants[] = {
    {.name = "a", .token = "0123456789abcdef"},
    {.name = "b", .token = "fedcba9876543210"},
};

/* ------------------------------------------------------------------------------------------- */
/* Credentials: accepted exactly if the bytes after the scheme are a tenant's token. */

static void check_authorization(const uint8_t *input, size_t size) {
    static attn_auth *auth;
    uint32_t tenant = 99;
    if (auth == NULL) FUZZ_CHECK(attn_auth_create(tenants, 2, NULL, &auth).code == ATTN_OK);
    attn_status status = attn_auth_check(auth, (const char *)input, size, &tenant);
    if (attn_failed(status)) {
        FUZZ_CHECK(status.code == ATTN_UNAUTHENTICATED || status.code == ATTN_PERMISSION_DENIED);
        FUZZ_CHECK(tenant == 99);
    } else {
        FUZZ_CHECK(tenant < 2 && size >= 7 + 16);
        FUZZ_CHECK(memcmp(input + size - 16, tenants[tenant].token, 16) == 0);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* A checker of the JSON that the log writes: one object of texts, numbers and literals. */

static const char *skip_string(const char *at) {
    FUZZ_CHECK(*at == '"');
    for (at++; *at != '"'; at++) {
        FUZZ_CHECK((unsigned char)*at >= 0x20);
        if (*at != '\\') continue;
        at++;
        FUZZ_CHECK(strchr("\"\\nrtu", *at) != NULL && *at != '\0');
        if (*at != 'u') continue;
        for (int i = 0; i < 4; i++) {
            at++;
            FUZZ_CHECK(strchr("0123456789abcdef", *at) != NULL && *at != '\0');
        }
    }
    return at + 1;
}

static const char *skip_value(const char *at) {
    if (*at == '"') return skip_string(at);
    size_t length = strspn(at, "0123456789abcdefghijklmnopqrstuvwxyz-+.");
    FUZZ_CHECK(length > 0);
    return at + length;
}

static void check_json_line(const char *line) {
    FUZZ_CHECK(*line == '{');
    do {
        line = skip_string(line + 1);
        FUZZ_CHECK(*line == ':');
        line = skip_value(line + 1);
    } while (*line == ',');
    FUZZ_CHECK(strcmp(line, "}\n") == 0);
}

static void check_log(const uint8_t *input, size_t size) {
    static int output = -1;
    char written[ATTN_LOG_LINE_BYTES + 1];
    attn_log_line line;
    if (output < 0) {
        output = memfd_create("log", 0);
        FUZZ_CHECK(output >= 0);
        attn_log_set_output(output);
    }
    FUZZ_CHECK(attn_log_begin(&line, ATTN_LOG_INFO, "fuzz", size));
    attn_log_u64(&line, "size", size);
    attn_log_bytes(&line, "bytes", input, size);
    attn_log_bytes(&line, "half", input, size / 2);
    attn_log_end(&line);
    off_t length = lseek(output, 0, SEEK_END);
    FUZZ_CHECK(length > 0 && length <= ATTN_LOG_LINE_BYTES);
    FUZZ_CHECK(pread(output, written, (size_t)length, 0) == length);
    FUZZ_CHECK(memchr(written, '\0', (size_t)length) == NULL);
    written[length] = '\0';
    check_json_line(written);
    FUZZ_CHECK(ftruncate(output, 0) == 0 && lseek(output, 0, SEEK_SET) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    check_authorization(input, size);
    check_log(input, size);
    return 0;
}
