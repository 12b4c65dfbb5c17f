/* Making backends, and their end: the pool, workspaces, streams and flights. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/backend/state.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/probe.h"

/* Builds that take every device for one from before Hopper, to try the kernels for those (.bazelrc). */
#ifdef ATTN_CUDA_GENERIC
#define HOPPER_MAJOR 0
#else
#define HOPPER_MAJOR 9
#endif

#define BLOCKS_AN_SM 2
#define COPIERS_MOST 6

/* batch_invariant: of partial results of a wave, at least one sequence's. */
#define SLOT_BYTES_MOST ((size_t)256 << 20)

/* ------------------------------------------------------------------------------------------- */
/* The pool */

/* The least head_dim that decode.h has a kernel for. */
static uint32_t padded_dim(uint32_t dim) {
    static const uint32_t built[] = {64, 96, 128, 192};
    for (size_t i = 0; i < sizeof built / sizeof *built; i++) {
        if (dim <= built[i]) return built[i];
    }
    return 256;
}

/*
 * The dims that kernels work with: columns of zeros behind the geometry's change neither scores nor outputs. Float32
 * has no tensor cores, and stays as it is.
 */
static void pad_dims(attn_cuda_layer *layer) {
    if (layer->dtype == ATTN_FP32) return;
    layer->head_dim = padded_dim(layer->head_dim);
    layer->head_dim_v = padded_dim(layer->head_dim_v);
    if (layer->head_dim == 192 && layer->head_dim_v <= 128) {
        layer->head_dim_v = 128;
    } else if (layer->head_dim > layer->head_dim_v) {
        layer->head_dim_v = layer->head_dim;
    } else {
        layer->head_dim = layer->head_dim_v;
    }
}

static attn_status allocate_pool(cuda_backend *self, const attn_backend_config *config) {
    const attn_geometry *geometry = &config->geometry;
    uint32_t element = (uint32_t)attn_dtype_bytes(attn_kv_dtype(geometry));
    self->layer = (attn_cuda_layer){
        .pages = config->pages,
        .page_size = geometry->page_size,
        .heads_q = geometry->heads_q,
        .heads_kv = geometry->heads_kv,
        .head_dim = geometry->head_dim,
        .head_dim_v = geometry->head_dim_v,
        .dtype = geometry->dtype,
        .kv_dtype = attn_kv_dtype(geometry),
        .element_bytes = element,
    };
    pad_dims(&self->layer);
    self->layer.tile_bytes =
        attn_cuda_tile_bytes(geometry->page_size, self->layer.head_dim, self->layer.head_dim_v, element);
    size_t bytes;
    if (__builtin_mul_overflow((size_t)self->layer.tile_bytes * geometry->heads_kv, (size_t)config->pages,
                               &self->layer_bytes) ||
        __builtin_mul_overflow(self->layer_bytes, (size_t)geometry->layers, &bytes)) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "a KV pool of %u pages of %zu bytes is more than an address space",
                          config->pages, attn_page_bytes(geometry));
    }
    cudaError_t error = attn_cuda_allocate((void **)&self->layer.memory, bytes, "KV pool");
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError();
    size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return attn_error(ATTN_RESOURCE_EXHAUSTED,
                      "no device memory for a KV pool of %.1f MiB (%u pages of %zu bytes); %.1f MiB are free: %s",
                      (double)bytes / (1 << 20), config->pages, attn_page_bytes(geometry),
                      (double)free_bytes / (1 << 20), cudaGetErrorString(error));
}

/* ------------------------------------------------------------------------------------------- */
/* Workspaces and scales */

/* Of partial results: batch_invariant needs those of the longest sequence at least, others two a worker. */
static uint64_t count_slots(const cuda_backend *self, size_t slot_bytes) {
    const attn_geometry *geometry = &self->base.geometry;
    uint64_t least = attn_line_min_chunk_slots(geometry, self->base.pages), slots = 2 * self->base.line.workers;
    uint64_t usual = (uint64_t)self->base.pages * geometry->page_size / ATTN_CHUNK_TOKENS * geometry->heads_kv;
    if (usual > SLOT_BYTES_MOST / slot_bytes) usual = SLOT_BYTES_MOST / slot_bytes;
    if (slots < least) slots = least;
    return slots < usual ? usual : slots;
}

static attn_status partials_status(cudaError_t error, size_t bytes) {
    if (error == cudaSuccess) return attn_ok();
    cudaGetLastError();
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "no device memory for partial results: %zu MiB: %s", bytes >> 20,
                      cudaGetErrorString(error));
}

static attn_status allocate_slots(cuda_backend *self) {
    size_t slot_bytes = ATTN_CUDA_MAX_ROWS * self->layer.head_dim_v * sizeof(float);
    self->slots = count_slots(self, slot_bytes);
    cudaError_t error = attn_cuda_allocate((void **)&self->slot_out, self->slots * slot_bytes, "partial outputs");
    if (error == cudaSuccess) {
        size_t lse_bytes = self->slots * ATTN_CUDA_MAX_ROWS * sizeof(float);
        error = attn_cuda_allocate((void **)&self->slot_lse, lse_bytes, "partial LSE");
    }
    return partials_status(error, self->slots * slot_bytes);
}

static attn_status allocate_workspace(attn_cuda_workspace *workspace, uint64_t slots, uint32_t rows,
                                      uint32_t head_dim_v) {
    *workspace = (attn_cuda_workspace){.slots = (uint32_t)slots, .rows = rows};
    size_t bytes = attn_cuda_workspace_bytes(workspace->slots, rows, head_dim_v);
    cudaError_t error = attn_cuda_allocate(&workspace->memory, bytes, "partial results");
    if (error == cudaSuccess) error = cudaMemset(workspace->memory, 0, bytes);
    return partials_status(error, bytes);
}

static attn_status allocate_workspaces(cuda_backend *self) {
    uint32_t dim = self->layer.head_dim_v, rows = attn_cuda_narrow_rows(&self->base.geometry);
    ATTN_TRY(allocate_workspace(&self->runs, 4 * self->tuning.workers, 64, dim));
    return allocate_workspace(&self->chunks, count_slots(self, rows * dim * sizeof(float)), rows, dim);
}

static attn_status upload_scales(cuda_backend *self, const attn_backend_config *config) {
    if (attn_kv_dtype(&config->geometry) != ATTN_FP8_E4M3) return attn_ok();
    size_t count = (size_t)config->geometry.layers * config->geometry.heads_kv;
    ATTN_TRY(attn_backend_keep_scales(&self->base, config));
    float *scales = calloc(2 * count, sizeof *scales);
    if (scales == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for scales");
    for (size_t i = 0; i < count; i++) {
        attn_scale scale = attn_backend_scale(&self->base, (uint32_t)(i / config->geometry.heads_kv),
                                              (uint32_t)(i % config->geometry.heads_kv));
        scales[i] = scale.key;
        scales[count + i] = scale.value;
    }
    cudaError_t error = attn_cuda_allocate((void **)&self->scales, 2 * count * sizeof *scales, "scales");
    if (error == cudaSuccess) {
        error = cudaMemcpy(self->scales, scales, 2 * count * sizeof *scales, cudaMemcpyHostToDevice);
    }
    free(scales);
    return attn_cuda_status(error, "upload of the scales");
}

/* ------------------------------------------------------------------------------------------- */
/* Flights */

static attn_status flight_init(flight *made, uint32_t *status) {
    made->down.kind = ARENA_SHARED;
    made->rows.kind = ARENA_DEVICE;
    made->status = status;
    *status = 0;
    CUDA_TRY(cudaEventCreateWithFlags(&made->uploaded, cudaEventDisableTiming));
    CUDA_TRY(cudaEventCreateWithFlags(&made->ended, cudaEventDisableTiming));
    CUDA_TRY(cudaEventCreate(&made->kernels_begin));
    CUDA_TRY(cudaEventCreate(&made->kernels_end));
    return attn_ok();
}

/* Also after a flight_init that has failed, or that there was none of. */
static void flight_fini(flight *made) {
    if (made->uploaded) cudaEventDestroy(made->uploaded);
    if (made->ended) cudaEventDestroy(made->ended);
    if (made->kernels_begin) cudaEventDestroy(made->kernels_begin);
    if (made->kernels_end) cudaEventDestroy(made->kernels_end);
    attn_cuda_arena_fini(&made->up);
    attn_cuda_arena_fini(&made->rows);
    attn_cuda_arena_fini(&made->down);
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static void destroy_stream(cudaStream_t stream) {
    if (!stream) return;
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
}

void attn_cuda_destroy(attn_backend *backend) {
    cuda_backend *self = attn_cuda_of(backend);
    cudaSetDevice(self->device);
    destroy_stream(self->uploads);
    destroy_stream(self->stream);
    for (uint32_t i = 0; i < FLIGHTS; i++)
        flight_fini(&self->flights[i]);
    attn_cuda_arena_fini(&self->apart);
    attn_cuda_give_all_back(&self->borrowed);
    attn_cpu_workers_destroy(self->copiers);
    attn_cuda_free(self->layer.memory);
    attn_cuda_free(self->slot_out);
    attn_cuda_free(self->slot_lse);
    attn_cuda_free(self->runs.memory);
    attn_cuda_free(self->chunks.memory);
    attn_cuda_free(self->scales);
    cudaFreeHost(self->statuses);
    attn_cuda_context_leave(self->device);
    attn_backend_fini(backend);
    free(self);
}

/* Device `rank`; where there are more ranks than devices, they share them in turn. */
static attn_status find_device(uint32_t rank, int *device, struct cudaDeviceProp *properties) {
    char why[160];
    int count = 0;
    if (attn_cuda_probe(why, sizeof why) == 0) return attn_error(ATTN_UNAVAILABLE, "cuda: %s", why);
    CUDA_TRY(cudaGetDeviceCount(&count));
    *device = (int)(rank % (uint32_t)count);
    CUDA_TRY(cudaGetDeviceProperties(properties, *device));
    if (properties->major < 8) {
        return attn_error(ATTN_UNAVAILABLE, "cuda: device %d is %.80s of compute capability %d.%d; 8.0 is needed",
                          *device, properties->name, properties->major, properties->minor);
    }
    return attn_ok();
}

/* Has the device room for the kernels' shared memory? The widest need 130 KB. */
static bool has_room(const attn_cuda_layer *layer, const struct cudaDeviceProp *properties) {
    return properties->sharedMemPerBlockOptin >= 160 * 1024 || (layer->head_dim <= 128 && layer->head_dim_v <= 128);
}

/* Of the workers that it may have, some copy rows: a few do it as fast as memory allows. */
static attn_status start_copiers(cuda_backend *self, const attn_backend_config *config) {
    uint32_t count = config->workers < COPIERS_MOST ? config->workers : COPIERS_MOST;
    return count > 1 ? attn_cpu_workers_create(count, NULL, &self->copiers) : attn_ok();
}

/* For tests of forks, whose small batches the rule puts one after the other: ATTND_TEST_OWN_WORKERS. */
static int find_own_workers(void) {
#ifndef ATTN_RELEASE
    const char *wanted = getenv("ATTND_TEST_OWN_WORKERS");
    if (wanted != NULL) return (int)strtoul(wanted, NULL, 10);
#endif
    return -1;
}

/* The first use of a device in a process makes a context there, for which memory has to be left. */
static attn_status use_device(int device) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaErrorMemoryAllocation) return attn_cuda_status(error, "cudaSetDevice");
    cudaGetLastError();
    return attn_error(ATTN_RESOURCE_EXHAUSTED,
                      "cuda: device %d has no memory left for a context: other processes hold it; nvidia-smi lists "
                      "them, and CUDA_VISIBLE_DEVICES chooses another device",
                      device);
}

static attn_status allocate(cuda_backend *self, const attn_backend_config *config,
                            const struct cudaDeviceProp *properties) {
    ATTN_TRY(use_device(self->device));
    CUDA_TRY(attn_cuda_prepare()); /* every time: a context that was reset knows nothing of it */
    ATTN_TRY(start_copiers(self, config));
    ATTN_TRY(allocate_pool(self, config));
    self->apart.kind = ARENA_DEVICE;
    self->own_workers = find_own_workers();
    CUDA_TRY(cudaMallocHost((void **)&self->statuses, FLIGHTS * sizeof *self->statuses));
    for (uint32_t i = 0; i < FLIGHTS; i++)
        ATTN_TRY(flight_init(&self->flights[i], &self->statuses[i]));
    self->is_fast = attn_cuda_decode_fits(&self->layer) && has_room(&self->layer, properties);
    if (!self->is_fast && attn_kv_dtype(&config->geometry) == ATTN_FP8_E4M3) {
        return attn_error(ATTN_UNAVAILABLE,
                          "cuda: kv_dtype fp8_e4m3 with head_dim %u needs %u KiB of shared memory a block",
                          config->geometry.head_dim, 160);
    }
    self->tuning = (attn_cuda_tuning){.is_hopper = properties->major == HOPPER_MAJOR,
                                      .workers = (uint32_t)properties->multiProcessorCount,
                                      .shared_bytes = (uint32_t)properties->sharedMemPerBlockOptin,
                                      .align_tiles = 4,
                                      .patience_ns = ATTN_CUDA_PATIENCE_NS};
    if (self->is_fast && self->tuning.is_hopper) CUDA_TRY(attn_cuda_find_clusters(&self->tuning));
    ATTN_TRY(upload_scales(self, config));
    ATTN_TRY(self->is_fast ? allocate_workspaces(self) : allocate_slots(self));
    CUDA_TRY(cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking));
    CUDA_TRY(cudaStreamCreateWithFlags(&self->uploads, cudaStreamNonBlocking));
    return attn_ok();
}

attn_status attn_cuda_create(const attn_backend_config *config, attn_backend **backend) {
    struct cudaDeviceProp properties = {0};
    int device = 0;
    ATTN_TRY(find_device(config->device, &device, &properties));
    cuda_backend *self = calloc(1, sizeof *self);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a cuda backend");
    attn_status status = attn_cuda_context_enter(device);
    if (attn_failed(status)) {
        free(self);
        return status;
    }
    self->device = device;
    uint32_t workers = BLOCKS_AN_SM * (uint32_t)properties.multiProcessorCount;
    attn_backend_init(&self->base, &attn_cuda_backend_ops, config, ATTN_CUDA_TILE_TOKENS,
                      attn_cuda_narrow_rows(&config->geometry) / attn_cuda_group(&config->geometry), workers);
    status = allocate(self, config, &properties);
    if (attn_failed(status)) {
        attn_cuda_destroy(&self->base);
        return status;
    }
    snprintf(self->base.description, sizeof self->base.description, "cuda %d, %.80s, sm_%d%d, %s", device,
             properties.name, properties.major, properties.minor,
             self->is_fast ? "tensor cores, one launch" : "kernels for any geometry");
    *backend = &self->base;
    return status;
}
