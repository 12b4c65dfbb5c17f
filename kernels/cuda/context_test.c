/* Contexts over a CUDA runtime of the test's own: who may enter, and when which device is reset. */
#include "kernels/cuda/context.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* ------------------------------------------------------------------------------------------- */
/* The runtime */

enum { DEVICES = 2 };

static struct {
    pthread_mutex_t lock; /* guards all */
    cudaError_t error[DEVICES];
    uint32_t resets[DEVICES];
    uint32_t useless_resets; /* to come */
    bool unreachable[DEVICES];
    bool busy; /* streams have work */
} runtime = {.lock = PTHREAD_MUTEX_INITIALIZER};

static _Thread_local int current;
static _Thread_local cudaError_t last_error;

static cudaError_t answer(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

static cudaError_t error_of(int device) {
    pthread_mutex_lock(&runtime.lock);
    cudaError_t error = runtime.error[device];
    pthread_mutex_unlock(&runtime.lock);
    return error;
}

cudaError_t cudaSetDevice(int device) {
    if (runtime.unreachable[device]) return answer(cudaErrorDevicesUnavailable);
    current = device;
    return answer(error_of(device));
}

cudaError_t cudaGetDevice(int *device) {
    *device = current;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    (void)stream;
    cudaError_t error = error_of(current);
    return answer(error == cudaSuccess && runtime.busy ? cudaErrorNotReady : error);
}

cudaError_t cudaDeviceReset(void) {
    pthread_mutex_lock(&runtime.lock);
    cudaError_t error = runtime.error[current];
    runtime.resets[current]++;
    if (runtime.useless_resets > 0)
        runtime.useless_resets--;
    else
        runtime.error[current] = cudaSuccess;
    pthread_mutex_unlock(&runtime.lock);
    return answer(error); /* of what it has done away with */
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorIllegalAddress ? "illegal" : "other"; }

/* ------------------------------------------------------------------------------------------- */

static void break_device(int device) {
    pthread_mutex_lock(&runtime.lock);
    runtime.error[device] = cudaErrorIllegalAddress;
    pthread_mutex_unlock(&runtime.lock);
}

static void enter(int device) {
    attn_status status = attn_cuda_context_enter(device);
    assert_string_equal("", status.message);
    assert_int_equal(device, current);
}

static void leave(int device) {
    attn_cuda_context_leave(device);
    assert_int_equal(cudaSuccess, last_error);
}

static void assert_refused(int device, const char *why) {
    attn_status status = attn_cuda_context_enter(device);
    assert_int_equal(ATTN_UNAVAILABLE, status.code);
    assert_non_null(strstr(status.message, why));
}

static void assert_resets(uint32_t first, uint32_t second) {
    assert_int_equal(first, runtime.resets[0]);
    assert_int_equal(second, runtime.resets[1]);
    memset(runtime.resets, 0, sizeof runtime.resets);
}

static void whole_devices_are_never_reset(void **state) {
    (void)state;
    for (int busy = 0; busy < 2; busy++) {
        runtime.busy = busy;
        enter(0);
        enter(0);
        enter(1);
        assert_false(attn_cuda_context_is_broken());
        leave(0);
        leave(1);
        leave(0);
        enter(0);
        leave(0);
    }
    runtime.busy = false;
    assert_resets(0, 0);
}

static void the_last_one_resets_a_broken_device(void **state) {
    (void)state;
    for (int device = 0; device < DEVICES; device++) {
        enter(0);
        enter(1);
        enter(device);
        enter(device);
        break_device(device);
        leave(device);
        assert_refused(device, "only reset when nobody has anything there: 2 have");
        leave(device);
        assert_refused(device, "1 have");
        assert_resets(0, 0);
        leave(device);
        assert_resets(device == 0, device == 1);
        enter(device);
        assert_false(attn_cuda_context_is_broken());
        leave(0);
        leave(1);
        assert_resets(0, 0);
    }
}

/* Nobody has told yet that it is broken: the one that comes finds out. */
static void who_enters_a_broken_device_unawares_can_leave_it(void **state) {
    (void)state;
    enter(0);
    break_device(0);
    enter(0);
    assert_true(attn_cuda_context_is_broken());
    leave(0);
    assert_refused(0, "1 have");
    leave(0);
    assert_resets(1, 0);
    enter(0);
    leave(0);
    assert_resets(0, 0);
}

static void a_reset_that_does_not_help_is_tried_again(void **state) {
    (void)state;
    enter(1);
    break_device(1);
    runtime.useless_resets = 2;
    leave(1);
    assert_resets(0, 1);
    assert_refused(1, "a reset did not help (illegal");
    assert_resets(0, 1);
    enter(1);
    assert_resets(0, 1);
    leave(1);
    assert_resets(0, 0);
}

static void a_device_that_cannot_be_made_the_current_one_has_no_other_reset(void **state) {
    (void)state;
    enter(0);
    enter(1);
    break_device(1);
    leave(1);
    assert_resets(0, 1);
    enter(1);
    break_device(0);
    break_device(1);
    runtime.unreachable[1] = true;
    current = 0;
    leave(1);
    assert_resets(0, 0);
    runtime.unreachable[1] = false;
    leave(0);
    assert_resets(1, 0);
    enter(1);
    leave(1);
    assert_resets(0, 1);
}

static void *come_and_go(void *context) {
    for (int i = 0; i < 2000; i++) {
        if (attn_failed(attn_cuda_context_enter(0))) continue;
        if (i % 7 == *(int *)context) break_device(0);
        attn_cuda_context_leave(0);
    }
    return NULL;
}

static void many_threads_end_with_a_whole_device(void **state) {
    (void)state;
    pthread_t threads[4];
    int numbers[4] = {0, 1, 2, 3};
    for (int i = 0; i < 4; i++)
        assert_int_equal(0, pthread_create(&threads[i], NULL, come_and_go, &numbers[i]));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    assert_true(runtime.resets[0] > 0);
    runtime.resets[0] = 0;
    enter(0);
    assert_false(attn_cuda_context_is_broken());
    leave(0);
    assert_resets(0, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whole_devices_are_never_reset),
        cmocka_unit_test(the_last_one_resets_a_broken_device),
        cmocka_unit_test(who_enters_a_broken_device_unawares_can_leave_it),
        cmocka_unit_test(a_reset_that_does_not_help_is_tried_again),
        cmocka_unit_test(a_device_that_cannot_be_made_the_current_one_has_no_other_reset),
        cmocka_unit_test(many_threads_end_with_a_whole_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
