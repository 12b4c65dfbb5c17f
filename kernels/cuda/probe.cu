#include "kernels/cuda/probe.h"

#include <cuda_runtime_api.h>
#include <stdio.h>

extern "C" int attn_cuda_probe(char *text, size_t text_size) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError(); /* clears it: a machine without a device is not a fault */
        snprintf(text, text_size, "no CUDA device: %s", cudaGetErrorString(error));
        return 0;
    }
    int usable = 0;
    for (int device = 0; device < count; device++) {
        cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, device) != cudaSuccess || properties.major < 8) continue;
        if (usable++ == 0)
            snprintf(text, text_size, "%s, compute capability %d.%d, %d device%s", properties.name, properties.major,
                     properties.minor, count, count == 1 ? "" : "s");
    }
    if (usable == 0) snprintf(text, text_size, "%d CUDA device(s), none of compute capability 8.0 or later", count);
    return usable;
}
