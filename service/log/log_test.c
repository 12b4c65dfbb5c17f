#define _POSIX_C_SOURCE 200809L

#include "service/log/log.h"

#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* What was written to the log since the last call, as a text. Every test starts with an empty one. */
static char captured[1 << 20];
static int capture_file;

static const char *take_output(void) {
    off_t size = lseek(capture_file, 0, SEEK_END);
    assert_in_range(size, 0, sizeof(captured) - 1);
    assert_int_equal(pread(capture_file, captured, (size_t)size, 0), size);
    captured[size] = '\0';
    assert_int_equal(ftruncate(capture_file, 0), 0);
    return captured;
}

static int start(void **state) {
    char path[] = "/tmp/attnd_log_test_XXXXXX";
    (void)state;
    int created = mkstemp(path);
    capture_file = open(path, O_RDWR | O_APPEND);
    close(created);
    unlink(path);
    attn_log_set_output(capture_file);
    attn_log_set_level(ATTN_LOG_INFO);
    return capture_file < 0;
}

static int stop(void **state) {
    (void)state;
    attn_log_set_output(STDERR_FILENO);
    return close(capture_file);
}

/* The part of a line behind its time. */
static const char *behind_time(const char *line) {
    static const char form[] = "{\"time\":\"0000-00-00T00:00:00.000000Z\",";
    for (size_t i = 0; i < sizeof(form) - 1; i++) {
        if (form[i] == '0') {
            assert_in_range(line[i], '0', '9');
        } else {
            assert_int_equal(line[i], form[i]);
        }
    }
    return line + sizeof(form) - 1;
}

static void every_field_type_comes_out_as_json(void **state) {
    attn_log_line line;
    (void)state;
    assert_true(attn_log_begin(&line, ATTN_LOG_WARN, "all_types", 0x2f));
    attn_log_string(&line, "string", "text");
    attn_log_string(&line, "nothing", NULL);
    attn_log_bytes(&line, "bytes", "abcdef", 3);
    attn_log_u64(&line, "unsigned", UINT64_MAX);
    attn_log_i64(&line, "signed", INT64_MIN);
    attn_log_hex(&line, "handle", 0xfeedULL << 48);
    attn_log_double(&line, "double", 0.25);
    attn_log_double(&line, "infinite", -INFINITY);
    attn_log_bool(&line, "yes", true);
    attn_log_status(&line, attn_error(ATTN_NOT_FOUND, "sequences[%d]: unknown handle", 3));
    attn_log_end(&line);
    assert_string_equal(
        behind_time(take_output()),
        "\"level\":\"warn\",\"event\":\"all_types\",\"request\":\"2f\",\"string\":\"text\",\"nothing\":null,"
        "\"bytes\":\"abc\",\"unsigned\":18446744073709551615,\"signed\":-9223372036854775808,"
        "\"handle\":\"feed000000000000\",\"double\":0.25,\"infinite\":null,\"yes\":true,"
        "\"code\":\"NOT_FOUND\",\"message\":\"sequences[3]: unknown handle\"}\n");
}

static void request_zero_is_left_out(void **state) {
    (void)state;
    attn_log_event(ATTN_LOG_INFO, "started", 0);
    assert_string_equal(behind_time(take_output()), "\"level\":\"info\",\"event\":\"started\"}\n");
}

static void levels_below_the_limit_write_nothing(void **state) {
    attn_log_line line;
    (void)state;
    assert_false(attn_log_enabled(ATTN_LOG_DEBUG));
    assert_false(attn_log_begin(&line, ATTN_LOG_DEBUG, "quiet", 0));
    attn_log_event(ATTN_LOG_DEBUG, "quiet", 0);
    attn_log_set_level(ATTN_LOG_OFF);
    attn_log_event(ATTN_LOG_ERROR, "quiet", 0);
    attn_log_event(ATTN_LOG_OFF, "quiet", 0);
    assert_string_equal(take_output(), "");
    attn_log_set_level(ATTN_LOG_DEBUG);
    attn_log_event(ATTN_LOG_DEBUG, "heard", 0);
    assert_string_equal(behind_time(take_output()), "\"level\":\"debug\",\"event\":\"heard\"}\n");
}

static void assert_escaped(const char *value, size_t size, const char *expected) {
    attn_log_line line;
    char want[256];
    assert_true(attn_log_begin(&line, ATTN_LOG_INFO, "e", 0));
    attn_log_bytes(&line, "v", value, size);
    attn_log_end(&line);
    snprintf(want, sizeof(want), "\"level\":\"info\",\"event\":\"e\",\"v\":\"%s\"}\n", expected);
    assert_string_equal(behind_time(take_output()), want);
}

static void control_characters_and_quotes_are_escaped(void **state) {
    (void)state;
    assert_escaped("a\"b\\c\nd\re\tf", 11, "a\\\"b\\\\c\\nd\\re\\tf");
    assert_escaped("\0\x1f\x7f", 3, "\\u0000\\u001f\\u007f");
}

static void well_formed_utf8_passes_and_other_bytes_are_replaced(void **state) {
    (void)state;
    assert_escaped("\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 9, "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
    assert_escaped("\xff", 1, "\xef\xbf\xbd");
    assert_escaped("\xc3", 1, "\xef\xbf\xbd");                                                 /* cut short */
    assert_escaped("\xc0\xaf", 2, "\xef\xbf\xbd\xef\xbf\xbd");                                 /* overlong */
    assert_escaped("\xed\xa0\x80", 3, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");                 /* surrogate */
    assert_escaped("\xf4\x90\x80\x80", 4, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"); /* above U+10FFFF */
}

static void a_field_that_does_not_fit_is_left_out_whole(void **state) {
    attn_log_line line;
    static char big[ATTN_LOG_LINE_BYTES];
    (void)state;
    memset(big, '\n', sizeof(big));
    assert_true(attn_log_begin(&line, ATTN_LOG_INFO, "big", 0));
    attn_log_bytes(&line, "big", big, sizeof(big));
    attn_log_u64(&line, "small", 1);
    attn_log_end(&line);
    assert_string_equal(behind_time(take_output()),
                        "\"level\":\"info\",\"event\":\"big\",\"small\":1,\"truncated\":true}\n");
}

static void lines_of_every_length_up_to_the_limit_end_properly(void **state) {
    static char filler[ATTN_LOG_LINE_BYTES];
    (void)state;
    memset(filler, 'x', sizeof(filler));
    for (size_t size = ATTN_LOG_LINE_BYTES - 200; size < ATTN_LOG_LINE_BYTES; size++) {
        attn_log_line line;
        assert_true(attn_log_begin(&line, ATTN_LOG_INFO, "filled", 0));
        attn_log_bytes(&line, "filler", filler, size);
        attn_log_end(&line);
        const char *text = take_output();
        size_t length = strlen(text);
        assert_in_range(length, 1, ATTN_LOG_LINE_BYTES);
        assert_string_equal(text + length - 2, "}\n");
        assert_true(strstr(text, "x\"}\n") != NULL || strstr(text, ",\"truncated\":true}\n") != NULL);
    }
}

#define WRITERS          4
#define LINES_PER_WRITER 500

static void *write_lines(void *argument) {
    for (int i = 0; i < LINES_PER_WRITER; i++) {
        attn_log_line line;
        if (!attn_log_begin(&line, ATTN_LOG_INFO, "busy", 0)) continue;
        attn_log_string(&line, "writer", argument);
        attn_log_end(&line);
    }
    return NULL;
}

static void lines_of_several_threads_do_not_mix(void **state) {
    pthread_t threads[WRITERS];
    char *names[WRITERS] = {"a", "b", "c", "d"};
    int seen[WRITERS] = {0};
    (void)state;
    for (int i = 0; i < WRITERS; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, write_lines, names[i]), 0);
    }
    for (int i = 0; i < WRITERS; i++) {
        pthread_join(threads[i], NULL);
    }
    take_output();
    for (char *line = strtok(captured, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        char writer = '?';
        assert_int_equal(sscanf(behind_time(line), "\"level\":\"info\",\"event\":\"busy\",\"writer\":\"%c\"}", &writer),
                         1);
        assert_in_range(writer, 'a', 'd');
        seen[writer - 'a']++;
    }
    for (int i = 0; i < WRITERS; i++) {
        assert_int_equal(seen[i], LINES_PER_WRITER);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(every_field_type_comes_out_as_json, start, stop),
        cmocka_unit_test_setup_teardown(request_zero_is_left_out, start, stop),
        cmocka_unit_test_setup_teardown(levels_below_the_limit_write_nothing, start, stop),
        cmocka_unit_test_setup_teardown(control_characters_and_quotes_are_escaped, start, stop),
        cmocka_unit_test_setup_teardown(well_formed_utf8_passes_and_other_bytes_are_replaced, start, stop),
        cmocka_unit_test_setup_teardown(a_field_that_does_not_fit_is_left_out_whole, start, stop),
        cmocka_unit_test_setup_teardown(lines_of_every_length_up_to_the_limit_end_properly, start, stop),
        cmocka_unit_test_setup_teardown(lines_of_several_threads_do_not_mix, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
