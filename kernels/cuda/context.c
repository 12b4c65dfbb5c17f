#include "kernels/cuda/context.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>

enum { DEVICES_MOST = 64 };

/* Guarded by the lock. */
typedef struct {
    uint32_t users; /* whoever resets the device among them */
    bool broken;
} context;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static context contexts[DEVICES_MOST];

/* ------------------------------------------------------------------------------------------- */
/* The current device */

/*
 * What every call of the context fails with; cudaSuccess: nothing is wrong with it. The thread's last error, which
 * later launches would be taken for, is forgotten.
 */
static cudaError_t find_error(void) {
    cudaError_t error = cudaStreamQuery(cudaStreamLegacy);
    cudaGetLastError();
    return error == cudaErrorNotReady ? cudaSuccess : error;
}

/* What a context fails with is told by cudaSetDevice, too, which has made it the current one then. */
static bool make_current(int device) {
    int current = -1;
    cudaSetDevice(device);
    cudaGetLastError();
    cudaGetDevice(&current);
    return current == device;
}

/* The error that is left. What the reset itself returns may be the error that it has done away with. */
static cudaError_t reset(int device) {
    if (!make_current(device)) return cudaErrorDevicesUnavailable;
    cudaDeviceReset();
    cudaError_t error = cudaSetDevice(device);
    return error == cudaSuccess ? find_error() : error;
}

/* ------------------------------------------------------------------------------------------- */

/* By the only user of a broken context: nobody enters meanwhile. The error that is left. */
static cudaError_t mend(int device) {
    cudaError_t error = reset(device);
    cudaGetLastError();
    pthread_mutex_lock(&lock);
    contexts[device].broken = error != cudaSuccess;
    pthread_mutex_unlock(&lock);
    return error;
}

static void count_out(int device) {
    pthread_mutex_lock(&lock);
    contexts[device].users--;
    pthread_mutex_unlock(&lock);
}

bool attn_cuda_context_is_broken(void) { return find_error() != cudaSuccess; }

attn_status attn_cuda_context_enter(int device) {
    if (device >= DEVICES_MOST) {
        return attn_error(ATTN_UNAVAILABLE, "cuda: device %d: only %d are used", device, DEVICES_MOST);
    }
    pthread_mutex_lock(&lock);
    uint32_t others = contexts[device].users;
    bool broken = contexts[device].broken, enters = !broken || others == 0;
    if (enters) contexts[device].users++;
    pthread_mutex_unlock(&lock);
    if (!enters) {
        return attn_error(ATTN_UNAVAILABLE,
                          "cuda: device %d has failed, and is only reset when nobody has anything there: %u have",
                          device, others);
    }
    cudaError_t error = broken ? mend(device) : cudaSuccess;
    if (error != cudaSuccess) {
        count_out(device);
        return attn_error(ATTN_UNAVAILABLE,
                          "cuda: device %d has failed, and a reset did not help (%s): it takes another process", device,
                          cudaGetErrorString(error));
    }
    make_current(device);
    return attn_ok();
}

void attn_cuda_context_leave(int device) {
    bool broken = make_current(device) && attn_cuda_context_is_broken();
    pthread_mutex_lock(&lock);
    context *left = &contexts[device];
    if (broken) left->broken = true;
    bool mends = left->broken && left->users == 1;
    if (!mends) left->users--;
    pthread_mutex_unlock(&lock);
    if (!mends) return;
    mend(device);
    count_out(device);
}
