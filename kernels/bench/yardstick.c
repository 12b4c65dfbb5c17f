#include "kernels/bench/yardstick.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/bench/read_bandwidth.h"
#ifdef ATTN_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "kernels/cuda/read_bandwidth.h"
#endif

#define HOST_BYTES   ((size_t)1 << 30)
#define DEVICE_BYTES ((size_t)4 << 30)

struct attn_yardstick {
    attn_read_bandwidth *host; /* or NULL */
#ifdef ATTN_HAVE_CUDA
    attn_cuda_reader *device; /* or NULL */
#endif
};

#ifdef ATTN_HAVE_CUDA
static attn_status device_status(int error) {
    if (error == cudaSuccess) return attn_ok();
    attn_code code = error == cudaErrorMemoryAllocation ? ATTN_RESOURCE_EXHAUSTED : ATTN_UNAVAILABLE;
    return attn_error(code, "cuda: plain read: %s", cudaGetErrorString((cudaError_t)error));
}
#endif

static attn_status create_reader(attn_yardstick *yardstick, const char *backend, uint32_t threads) {
#ifdef ATTN_HAVE_CUDA
    if (strcmp(backend, "cuda") == 0) {
        return device_status(attn_cuda_reader_create(0, DEVICE_BYTES, &yardstick->device));
    }
#endif
    (void)backend;
    return attn_read_bandwidth_create(HOST_BYTES, threads, &yardstick->host);
}

attn_status attn_yardstick_create(const char *backend, uint32_t threads, attn_yardstick **created) {
    *created = calloc(1, sizeof **created);
    if (*created == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a yardstick");
    attn_status status = create_reader(*created, backend, threads);
    if (attn_failed(status)) {
        attn_yardstick_destroy(*created);
        *created = NULL;
    }
    return status;
}

void attn_yardstick_destroy(attn_yardstick *yardstick) {
    if (yardstick == NULL) return;
    attn_read_bandwidth_destroy(yardstick->host);
#ifdef ATTN_HAVE_CUDA
    attn_cuda_reader_destroy(yardstick->device);
#endif
    free(yardstick);
}

attn_status attn_yardstick_measure(attn_yardstick *yardstick, size_t bytes, double *gbps) {
#ifdef ATTN_HAVE_CUDA
    if (yardstick->device != NULL) {
        ATTN_TRY(device_status(attn_cuda_reader_measure(yardstick->device, gbps)));
        *gbps /= 1e9;
        return attn_ok();
    }
#endif
    *gbps = attn_read_bandwidth_measure(yardstick->host, bytes);
    return attn_ok();
}
