#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>

#include "kernels/cuda/probe.h"

static void probe_answers_with_a_reason(void **state) {
    (void)state;
    char text[128] = "";
    int devices = attn_cuda_probe(text, sizeof text);
    assert_true(devices >= 0);
    assert_true(strlen(text) > 0);
    if (devices == 0) assert_non_null(strstr(text, "CUDA"));
    if (devices > 0) assert_non_null(strstr(text, "compute capability"));
}

static void probe_cuts_its_text_to_the_buffer(void **state) {
    (void)state;
    char text[8];
    memset(text, 'x', sizeof text);
    attn_cuda_probe(text, sizeof text);
    assert_non_null(memchr(text, 0, sizeof text));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(probe_answers_with_a_reason),
        cmocka_unit_test(probe_cuts_its_text_to_the_buffer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
