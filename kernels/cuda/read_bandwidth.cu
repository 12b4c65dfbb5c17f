#include "kernels/cuda/read_bandwidth.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

struct attn_cuda_reader {
    int device;
    uint4 *memory; /* device; [count] */
    size_t count;
    uint32_t *sink;  /* device */
    uint32_t blocks; /* of THREADS, that read fastest */
    cudaStream_t stream;
    cudaEvent_t begin, end;
};

namespace {

constexpr uint32_t THREADS = 512, LOADS = 8, REPEATS = 9;
constexpr uint32_t LEAST_BLOCKS_AN_SM = 2, MOST_BLOCKS_AN_SM = 32;

/* A block reads LOADS * THREADS neighbours at a time; a warp's loads are of whole lines. */
__global__ void __launch_bounds__(THREADS) read_kernel(const uint4 *memory, size_t count, uint32_t *sink) {
    uint32_t sum = 0;
    size_t step = (size_t)gridDim.x * THREADS * LOADS;
    for (size_t base = (size_t)blockIdx.x * THREADS * LOADS + threadIdx.x; base < count; base += step) {
        uint4 loaded[LOADS];
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++) {
            size_t place = base + (size_t)i * THREADS;
            loaded[i] = place < count ? __ldcs(&memory[place]) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++) {
            sum += loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
        }
    }
    if (sum == 0x9e3779b9u) *sink = sum; /* almost never: it keeps the loads */
}

/* Milliseconds of one read. */
cudaError_t time_read(const attn_cuda_reader *reader, uint32_t blocks, float *ms) {
    cudaError_t error = cudaEventRecord(reader->begin, reader->stream);
    if (error != cudaSuccess) return error;
    read_kernel<<<blocks, THREADS, 0, reader->stream>>>(reader->memory, reader->count, reader->sink);
    error = cudaGetLastError();
    if (error == cudaSuccess) error = cudaEventRecord(reader->end, reader->stream);
    if (error == cudaSuccess) error = cudaEventSynchronize(reader->end);
    if (error == cudaSuccess) error = cudaEventElapsedTime(ms, reader->begin, reader->end);
    return error;
}

cudaError_t median_read(const attn_cuda_reader *reader, uint32_t blocks, float *ms) {
    float times[REPEATS];
    for (float &time : times) {
        cudaError_t error = time_read(reader, blocks, &time);
        if (error != cudaSuccess) return error;
    }
    std::nth_element(times, times + REPEATS / 2, times + REPEATS);
    *ms = times[REPEATS / 2];
    return cudaSuccess;
}

cudaError_t choose_blocks(attn_cuda_reader *reader) {
    int multiprocessors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, reader->device);
    float fastest = 0;
    for (uint32_t an_sm = LEAST_BLOCKS_AN_SM; error == cudaSuccess && an_sm <= MOST_BLOCKS_AN_SM; an_sm *= 2) {
        float ms = 0;
        uint32_t blocks = an_sm * (uint32_t)multiprocessors;
        error = median_read(reader, blocks, &ms);
        if (error != cudaSuccess || (reader->blocks > 0 && ms >= fastest)) continue;
        reader->blocks = blocks;
        fastest = ms;
    }
    return error;
}

cudaError_t allocate(attn_cuda_reader *reader) {
    size_t bytes = reader->count * sizeof(uint4);
    cudaError_t error = cudaMalloc(&reader->memory, bytes);
    if (error == cudaSuccess) error = cudaMalloc(&reader->sink, sizeof *reader->sink);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&reader->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaEventCreate(&reader->begin);
    if (error == cudaSuccess) error = cudaEventCreate(&reader->end);
    if (error == cudaSuccess) error = cudaMemsetAsync(reader->memory, 0x5a, bytes, reader->stream);
    return error;
}

} /* namespace */

extern "C" int attn_cuda_reader_create(int device, size_t bytes, attn_cuda_reader **created) {
    *created = NULL;
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    attn_cuda_reader *reader = (attn_cuda_reader *)calloc(1, sizeof *reader);
    if (reader == NULL) return cudaErrorMemoryAllocation;
    reader->device = device;
    reader->count = bytes / sizeof(uint4);
    error = allocate(reader);
    if (error == cudaSuccess) error = choose_blocks(reader);
    if (error == cudaSuccess) {
        *created = reader;
        return cudaSuccess;
    }
    cudaGetLastError();
    attn_cuda_reader_destroy(reader);
    return error;
}

extern "C" void attn_cuda_reader_destroy(attn_cuda_reader *reader) {
    if (reader == NULL) return;
    cudaSetDevice(reader->device);
    if (reader->begin != NULL) cudaEventDestroy(reader->begin);
    if (reader->end != NULL) cudaEventDestroy(reader->end);
    if (reader->stream != NULL) cudaStreamDestroy(reader->stream);
    cudaFree(reader->sink);
    cudaFree(reader->memory);
    free(reader);
}

extern "C" int attn_cuda_reader_measure(attn_cuda_reader *reader, double *bytes_per_second) {
    float ms = 0;
    cudaError_t error = cudaSetDevice(reader->device);
    if (error == cudaSuccess) error = time_read(reader, reader->blocks, &ms);
    if (error == cudaSuccess) *bytes_per_second = (double)reader->count * sizeof(uint4) / ((double)ms / 1e3);
    return error;
}
