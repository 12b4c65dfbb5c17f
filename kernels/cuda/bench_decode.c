/*
 * Times the Hopper decode kernel on a file of shapes and checks every one against a float64 reference.
 *
 *     bench_hopper SHAPES PEERS [--pool-mib N] [--check] [--shape NAME] [--tuning NAME]
 *
 * Measured: a CUDA graph of 10 to 64 launches, each over other pages of a pool of 12 GiB in random order, so that the
 * L2 cache is cold; the median of 21 replays, divided by the launches. Bytes are the live K and V, Q and O. The
 * plain-read bandwidth is measured in the same run and all shares are of that; a peer's time counts as a share of the
 * read bandwidth of its own run, so a ratio above 1 is faster than the peer whatever the machine's memory.
 *
 * Checked, per shape and tuning: 256 output rows spread over the batch, with all rows of the last pages beyond the
 * lengths NaN and all unused page table entries 2147480000; every output row written; three runs bitwise equal.
 * --check only does that, on a pool just as large as the shape.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/bench/shapes.h"
#include "kernels/cuda/bench_hopper_device.h"
#include "kernels/cuda/decode_hopper.h"

enum { REPLAYS = 21, CHECKED_ROWS = 256, MIN_LAUNCHES = 10, MAX_LAUNCHES = 64, MAX_PEERS = 128 };

static const uint32_t UNUSED_ENTRY = 2147480000u;
static const uint64_t POOL_SEED = 1, QUERY_SEED = 2;
static const double MAX_OUT_ERROR = 2.5e-3, MAX_LSE_ERROR = 1e-4;
static const size_t COLD_BYTES = (size_t)768 << 20; /* read between two uses of a page: many times the L2 cache */

/* A failed CUDA call ends the bench. */
static void cuda_check(int error, const char *what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "bench_hopper: %s: %s\n", what, cudaGetErrorString((cudaError_t)error));
    exit(1);
}
#define CUDA(call) cuda_check((int)(call), #call)

static void *host_allocate(size_t bytes) {
    void *memory = malloc(bytes == 0 ? 1 : bytes);
    if (memory == NULL) {
        fprintf(stderr, "bench_hopper: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return memory;
}

static void *device_allocate(size_t bytes) {
    void *memory = NULL;
    CUDA(cudaMalloc(&memory, bytes));
    return memory;
}

/* ------------------------------------------------------------------------------------------- */
/* Peers */

typedef struct {
    char name[64];
    double bytes_us, fa3_us, best_us;
} peer;

typedef struct {
    peer rows[MAX_PEERS];
    int count;
} peer_list;

static void read_peers(peer_list *peers, const char *path) {
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        fprintf(stderr, "bench_hopper: cannot open %s\n", path);
        exit(1);
    }
    char line[512];
    while (peers->count < MAX_PEERS && fgets(line, sizeof line, file) != NULL) {
        peer *row = &peers->rows[peers->count];
        if (sscanf(line, "%63[^#,],%lf,%lf,%lf", row->name, &row->bytes_us, &row->fa3_us, &row->best_us) == 4)
            peers->count++;
    }
    fclose(file);
}

static const peer *find_peer(const peer_list *peers, const char *name) {
    for (int i = 0; i < peers->count; i++) {
        if (strcmp(peers->rows[i].name, name) == 0) return &peers->rows[i];
    }
    return NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Tunings */

typedef struct {
    const char *name;
    uint32_t blocks_per_sm;
    uint32_t stages;
    uint32_t align_tiles, whole_workers, whole_tiles;
    int overlap_launches;
} tuning_row;

static const tuning_row TUNINGS[] = {
    {"equal", 1, 6, 0, 0, 0, 0},
    {"aligned", 1, 6, 4, 0, 0, 0},
    {"aligned_stages_4", 1, 4, 4, 0, 0, 0},
    {"aligned_stages_3", 1, 3, 4, 0, 0, 0},
    {"whole_stages_3", 1, 3, 4, 60, 32, 0},
    {"two_blocks", 2, 3, 4, 0, 0, 0},
    {"overlap_stages_3", 1, 3, 4, 0, 0, 1},
    {"two_blocks_overlap", 2, 3, 4, 0, 0, 1},
};
enum { TUNING_COUNT = sizeof TUNINGS / sizeof TUNINGS[0] };

/* ------------------------------------------------------------------------------------------- */
/* A shape on the device */

typedef struct {
    void *pool; /* borrowed */
    size_t pool_bytes;
    uint32_t multiprocessors;
    double read_gbps;
} device_state;

typedef struct {
    attn_hopper_decode decode; /* with set 0's page table */
    uint32_t *lengths;         /* device */
    uint32_t *page_tables;     /* device [sets, batch, stride] */
    void *queries, *out;
    float *lse;
    uint32_t sets;
    double bytes;
} loaded_shape;

static uint64_t next_random(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint32_t *random_permutation(uint32_t count) {
    uint32_t *permutation = host_allocate((size_t)count * sizeof *permutation);
    uint64_t state = 7;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t j = (uint32_t)(next_random(&state) % (i + 1));
        permutation[i] = permutation[j];
        permutation[j] = i;
    }
    return permutation;
}

static uint32_t pages_of(const attn_shape *shape, uint32_t sequence) {
    return (shape->lengths[sequence] + shape->page_size - 1) / shape->page_size;
}

/* Deals random pages of the pool to `sets` batches, one after the other. */
static void deal_pages(loaded_shape *loaded, const attn_shape *shape, uint32_t stride) {
    uint32_t *permutation = random_permutation(loaded->decode.pool_pages);
    size_t entries = (size_t)loaded->sets * shape->batch * stride;
    uint32_t *tables = host_allocate(entries * sizeof *tables);
    uint32_t next = 0;
    for (size_t row = 0; row < (size_t)loaded->sets * shape->batch; row++) {
        uint32_t used = pages_of(shape, (uint32_t)(row % shape->batch));
        for (uint32_t i = 0; i < stride; i++) {
            tables[row * stride + i] = i < used ? permutation[next++] : UNUSED_ENTRY;
        }
    }
    loaded->page_tables = device_allocate(entries * sizeof *tables);
    CUDA(cudaMemcpy(loaded->page_tables, tables, entries * sizeof *tables, cudaMemcpyHostToDevice));
    free(tables);
    free(permutation);
}

/* False if the pool is too small for the shape. */
static bool load_shape(loaded_shape *loaded, const attn_shape *shape, const device_state *device) {
    *loaded = (loaded_shape){0};
    attn_hopper_decode *decode = &loaded->decode;
    uint64_t pages = 0, tokens = 0;
    uint32_t stride = 1;
    for (uint32_t i = 0; i < shape->batch; i++) {
        uint32_t used = pages_of(shape, i);
        pages += used;
        tokens += shape->lengths[i];
        if (used > stride) stride = used;
    }
    decode->pool_pages = (uint32_t)(device->pool_bytes / (attn_hopper_tile_bytes(shape->page_size) * shape->heads_kv));
    if (pages > decode->pool_pages) return false;

    uint64_t sets = pages == 0 ? 1 : decode->pool_pages / pages;
    loaded->sets = sets < MAX_LAUNCHES ? (uint32_t)sets : MAX_LAUNCHES;
    size_t rows = (size_t)shape->batch * shape->heads_q;
    size_t row_bytes = ATTN_HOPPER_HEAD_DIM * 2;
    loaded->bytes = (double)tokens * shape->heads_kv * 2.0 * (double)row_bytes + 2.0 * (double)(rows * row_bytes);
    loaded->lengths = device_allocate(shape->batch * sizeof(uint32_t));
    loaded->queries = device_allocate(rows * row_bytes);
    loaded->out = device_allocate(rows * row_bytes);
    loaded->lse = device_allocate(rows * sizeof(float));
    CUDA(cudaMemcpy(loaded->lengths, shape->lengths, shape->batch * sizeof(uint32_t), cudaMemcpyHostToDevice));
    bench_fill(loaded->queries, rows * ATTN_HOPPER_HEAD_DIM, QUERY_SEED);
    deal_pages(loaded, shape, stride);

    decode->pool = device->pool;
    decode->page_size = shape->page_size;
    decode->heads_kv = shape->heads_kv;
    decode->group = shape->heads_q / shape->heads_kv;
    decode->batch = shape->batch;
    decode->lengths = loaded->lengths;
    decode->page_table = loaded->page_tables;
    decode->page_table_stride = stride;
    decode->queries = loaded->queries;
    decode->out = loaded->out;
    decode->lse = loaded->lse;
    decode->scale = 1.0f / sqrtf((float)ATTN_HOPPER_HEAD_DIM);
    return true;
}

static void unload_shape(loaded_shape *loaded) {
    CUDA(cudaFree(loaded->lengths));
    CUDA(cudaFree(loaded->page_tables));
    CUDA(cudaFree(loaded->queries));
    CUDA(cudaFree(loaded->out));
    CUDA(cudaFree(loaded->lse));
}

/* ------------------------------------------------------------------------------------------- */
/* Checking */

typedef struct {
    double out_error; /* ||out - ref|| / ||ref|| over the checked rows; NaN if a row was not written */
    double lse_error;
    bool repeats; /* three runs bitwise equal */
} check_result;

static float bf16_to_float(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* Runs the kernel once on poisoned outputs and copies them to the host. */
static void run_once(const attn_hopper_decode *decode, const attn_hopper_tuning *tuning, size_t rows, uint16_t *out,
                     float *lse) {
    size_t out_bytes = rows * ATTN_HOPPER_HEAD_DIM * 2;
    CUDA(cudaMemset(decode->out, 0xff, out_bytes));
    CUDA(cudaMemset(decode->lse, 0xff, rows * sizeof(float)));
    CUDA(attn_hopper_decode_launch(decode, tuning, NULL));
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(out, decode->out, out_bytes, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(lse, decode->lse, rows * sizeof(float), cudaMemcpyDeviceToHost));
    uint32_t status;
    CUDA(cudaMemcpy(&status, decode->workspace, sizeof status, cudaMemcpyDeviceToHost));
    if (status != 0) {
        fprintf(stderr, "bench_hopper: the kernel met a page index outside the pool\n");
        exit(1);
    }
}

/* The float64 reference of some rows of set 0. */
typedef struct {
    uint32_t rows[CHECKED_ROWS];
    uint32_t count;
    double out[CHECKED_ROWS * ATTN_HOPPER_HEAD_DIM];
    double lse[CHECKED_ROWS];
} reference;

static void compute_reference(reference *expected, const attn_hopper_decode *decode) {
    uint32_t rows = decode->batch * decode->heads_kv * decode->group;
    expected->count = rows < CHECKED_ROWS ? rows : CHECKED_ROWS;
    for (uint32_t i = 0; i < expected->count; i++) {
        expected->rows[i] = (uint32_t)(((uint64_t)i * rows + rows / 2) / expected->count % rows);
    }
    uint32_t *device_rows = device_allocate(expected->count * sizeof *device_rows);
    double *out = device_allocate(expected->count * ATTN_HOPPER_HEAD_DIM * sizeof *out);
    double *lse = device_allocate(expected->count * sizeof *lse);
    CUDA(cudaMemcpy(device_rows, expected->rows, expected->count * sizeof *device_rows, cudaMemcpyHostToDevice));
    bench_reference(decode, device_rows, expected->count, out, lse);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(expected->out, out, expected->count * ATTN_HOPPER_HEAD_DIM * sizeof *out, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(expected->lse, lse, expected->count * sizeof *lse, cudaMemcpyDeviceToHost));
    CUDA(cudaFree(device_rows));
    CUDA(cudaFree(out));
    CUDA(cudaFree(lse));
}

static check_result check_shape(const attn_hopper_decode *decode, const attn_hopper_tuning *tuning,
                                const reference *expected) {
    size_t rows = (size_t)decode->batch * decode->heads_kv * decode->group;
    size_t elements = rows * ATTN_HOPPER_HEAD_DIM;
    uint16_t *out = host_allocate(elements * sizeof *out), *again = host_allocate(elements * sizeof *again);
    float *lse = host_allocate(rows * sizeof *lse), *lse_again = host_allocate(rows * sizeof *lse_again);
    check_result result = {0.0, 0.0, true};
    run_once(decode, tuning, rows, out, lse);
    for (int i = 0; i < 2; i++) {
        run_once(decode, tuning, rows, again, lse_again);
        result.repeats = result.repeats && memcmp(out, again, elements * sizeof *out) == 0 &&
                         memcmp(lse, lse_again, rows * sizeof *lse) == 0;
    }
    double difference = 0.0, norm = 0.0;
    for (uint32_t i = 0; i < expected->count; i++) {
        for (size_t d = 0; d < ATTN_HOPPER_HEAD_DIM; d++) {
            double want = expected->out[i * ATTN_HOPPER_HEAD_DIM + d];
            double got = bf16_to_float(out[(size_t)expected->rows[i] * ATTN_HOPPER_HEAD_DIM + d]);
            difference += (got - want) * (got - want);
            norm += want * want;
        }
        double wrong = fabs((double)lse[expected->rows[i]] - expected->lse[i]);
        if (!(wrong <= result.lse_error)) result.lse_error = wrong;
    }
    result.out_error = sqrt(difference / norm);
    for (size_t i = 0; i < elements; i++) {
        if (isnan(bf16_to_float(out[i]))) result.out_error = NAN;
    }
    free(out);
    free(again);
    free(lse);
    free(lse_again);
    return result;
}

/* ------------------------------------------------------------------------------------------- */
/* Timing */

static int compare_floats(const void *left, const void *right) {
    float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

/* Median milliseconds of replays of a graph. */
static float time_graph(cudaGraphExec_t graph, cudaStream_t stream) {
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    float times[REPLAYS];
    for (int i = -2; i < REPLAYS; i++) {
        CUDA(cudaEventRecord(begin, stream));
        CUDA(cudaGraphLaunch(graph, stream));
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        if (i >= 0) CUDA(cudaEventElapsedTime(&times[i], begin, end));
    }
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    qsort(times, REPLAYS, sizeof times[0], compare_floats);
    return times[REPLAYS / 2];
}

/* Microseconds of one decode. */
static double time_shape(const loaded_shape *loaded, const attn_hopper_decode *decode,
                         const attn_hopper_tuning *tuning) {
    double wanted = (double)COLD_BYTES / loaded->bytes + 1.0;
    uint32_t launches = wanted < MIN_LAUNCHES ? MIN_LAUNCHES : wanted > MAX_LAUNCHES ? MAX_LAUNCHES : (uint32_t)wanted;
    if (launches > loaded->sets && loaded->sets > MIN_LAUNCHES) launches = loaded->sets;
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (uint32_t i = 0; i < launches; i++) {
        attn_hopper_decode launch = *decode;
        launch.page_table += (size_t)(i % loaded->sets) * decode->batch * decode->page_table_stride;
        CUDA(attn_hopper_decode_launch(&launch, tuning, stream));
    }
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&executable, graph, 0));
    double us = time_graph(executable, stream) * 1000.0 / launches;
    CUDA(cudaGraphExecDestroy(executable));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    return us;
}

/* Plain-read bandwidth in GB/s: the best of some grids, each the median of several reads. */
static double measure_read(const device_state *device) {
    uint32_t *sink = device_allocate(sizeof *sink);
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    double best = 0.0;
    for (uint32_t per_sm = 2; per_sm <= 32; per_sm *= 2) {
        float times[9];
        for (int i = 0; i < 9; i++) {
            CUDA(cudaEventRecord(begin, NULL));
            bench_read(device->pool, device->pool_bytes, per_sm * device->multiprocessors, sink);
            CUDA(cudaEventRecord(end, NULL));
            CUDA(cudaEventSynchronize(end));
            CUDA(cudaEventElapsedTime(&times[i], begin, end));
        }
        qsort(times, 9, sizeof times[0], compare_floats);
        double gbps = (double)device->pool_bytes / times[4] / 1e6;
        if (gbps > best) best = gbps;
    }
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    CUDA(cudaFree(sink));
    return best;
}

/* ------------------------------------------------------------------------------------------- */
/* The bench */

typedef struct {
    const char *shapes_path, *peers_path;
    const char *only_shape, *only_tuning;
    size_t pool_mib;
    bool check_only;
} options;

/* Sums of logarithms of the ratios of one tuning. */
typedef struct {
    double fa3, best;
    int count;
} geometric_mean;

static bool parse_options(options *chosen, int argc, char **argv) {
    if (argc < 3) return false;
    *chosen = (options){.shapes_path = argv[1], .peers_path = argv[2], .pool_mib = 12288};
    for (int i = 3; i < argc; i++) {
        if (strcmp(argv[i], "--check") == 0) {
            chosen->check_only = true;
        } else if (i + 1 < argc && strcmp(argv[i], "--pool-mib") == 0) {
            chosen->pool_mib = strtoul(argv[++i], NULL, 10);
        } else if (i + 1 < argc && strcmp(argv[i], "--shape") == 0) {
            chosen->only_shape = argv[++i];
        } else if (i + 1 < argc && strcmp(argv[i], "--tuning") == 0) {
            chosen->only_tuning = argv[++i];
        } else {
            return false;
        }
    }
    return chosen->pool_mib > 0;
}

static void print_row(const device_state *device, const peer_list *peers, const tuning_row *row, const char *name,
                      double bytes, double us, const check_result *checked, geometric_mean *mean) {
    double bytes_us = bytes / device->read_gbps / 1e3;
    double share = us > 0.0 ? bytes_us / us : 0.0;
    printf("%s,%s,%.2f,%.2f,%.0f,%.3f,%.2e,%.1e,%s", row->name, name, us, bytes_us, us > 0.0 ? bytes / us / 1e3 : 0.0,
           share, checked->out_error, checked->lse_error, checked->repeats ? "yes" : "NO");
    const peer *other = find_peer(peers, name);
    if (other == NULL || us <= 0.0) {
        printf(",,,,\n");
        return;
    }
    double fa3 = share * other->fa3_us / other->bytes_us, best = share * other->best_us / other->bytes_us;
    printf(",%.2f,%.2f,%.3f,%.3f\n", other->fa3_us, other->best_us, fa3, best);
    mean->fa3 += log(fa3);
    mean->best += log(best);
    mean->count++;
}

/* Checks and times one shape with every tuning. False if a check failed. */
static bool bench_shape(const options *chosen, device_state *device, const peer_list *peers, const attn_shape *shape,
                        geometric_mean *means) {
    static reference expected;
    loaded_shape loaded;
    if (shape->head_dim != ATTN_HOPPER_HEAD_DIM || !load_shape(&loaded, shape, device)) {
        printf("# %s: not run: head_dim %u, or a pool too small\n", shape->name, shape->head_dim);
        return true;
    }
    bool good = true;
    bench_poison_tails(&loaded.decode, false, POOL_SEED);
    CUDA(cudaDeviceSynchronize());
    compute_reference(&expected, &loaded.decode);
    check_result checked[TUNING_COUNT];
    for (int pass = 0; pass < 2; pass++) {
        for (int t = 0; t < TUNING_COUNT; t++) {
            const tuning_row *row = &TUNINGS[t];
            if (chosen->only_tuning != NULL && strcmp(chosen->only_tuning, row->name) != 0) continue;
            if (row->blocks_per_sm == 2 && loaded.decode.group > 8) continue;
            attn_hopper_tuning tuning = {device->multiprocessors * row->blocks_per_sm,
                                         row->blocks_per_sm,
                                         row->stages,
                                         row->align_tiles,
                                         row->whole_workers,
                                         row->whole_tiles,
                                         row->overlap_launches};
            attn_hopper_decode decode = loaded.decode;
            size_t workspace_bytes = attn_hopper_workspace_bytes(tuning.workers, decode.group);
            decode.workspace = device_allocate(workspace_bytes);
            CUDA(cudaMemset(decode.workspace, 0, workspace_bytes));
            if (pass == 0) {
                checked[t] = check_shape(&decode, &tuning, &expected);
                good = good && checked[t].out_error <= MAX_OUT_ERROR && checked[t].lse_error <= MAX_LSE_ERROR &&
                       checked[t].repeats;
            } else {
                double us = chosen->check_only ? 0.0 : time_shape(&loaded, &decode, &tuning);
                print_row(device, peers, row, shape->name, loaded.bytes, us, &checked[t], &means[t]);
            }
            CUDA(cudaFree(decode.workspace));
        }
        if (pass == 0) bench_poison_tails(&loaded.decode, true, POOL_SEED);
        CUDA(cudaDeviceSynchronize());
    }
    fflush(stdout);
    unload_shape(&loaded);
    return good;
}

int main(int argc, char **argv) {
    options chosen;
    if (!parse_options(&chosen, argc, argv)) {
        fprintf(stderr, "usage: bench_hopper SHAPES PEERS [--pool-mib N] [--check] [--shape NAME] [--tuning NAME]\n");
        return 2;
    }
    static peer_list peers;
    read_peers(&peers, chosen.peers_path);
    attn_shape_list shapes;
    attn_status status = attn_shape_list_read(&shapes, chosen.shapes_path);
    if (attn_failed(status)) {
        fprintf(stderr, "bench_hopper: %s\n", status.message);
        attn_shape_list_fini(&shapes);
        return 1;
    }
    struct cudaDeviceProp properties;
    CUDA(cudaGetDeviceProperties(&properties, 0));
    device_state device = {.pool_bytes = chosen.pool_mib << 20,
                           .multiprocessors = (uint32_t)properties.multiProcessorCount};
    device.pool = device_allocate(device.pool_bytes);
    bench_fill(device.pool, device.pool_bytes / 2, POOL_SEED);
    CUDA(cudaDeviceSynchronize());
    device.read_gbps = chosen.check_only ? 1.0 : measure_read(&device);
    int driver = 0;
    CUDA(cudaDriverGetVersion(&driver));
    printf("# %s, %u multiprocessors, CUDA driver API %d, read bandwidth %.0f GB/s, pool %zu MiB\n", properties.name,
           device.multiprocessors, driver, device.read_gbps, chosen.pool_mib);
    printf(
        "tuning,name,us,bytes_us,gbps,share_of_read,err,lse_err,repeats,fa3_per_layer_us,best_per_layer_us,ratio_fa3,"
        "ratio_best\n");
    geometric_mean means[TUNING_COUNT] = {{0}};
    bool good = true;
    for (uint32_t i = 0; i < shapes.count; i++) {
        const attn_shape *shape = &shapes.shapes[i];
        if (chosen.only_shape != NULL && strcmp(chosen.only_shape, shape->name) != 0) continue;
        good = bench_shape(&chosen, &device, &peers, shape, means) && good;
    }
    for (int t = 0; t < TUNING_COUNT; t++) {
        if (means[t].count == 0) continue;
        printf("# %s: geometric mean of %d shapes: %.3f of FA3 per layer, %.3f of the best peer per layer\n",
               TUNINGS[t].name, means[t].count, exp(means[t].fa3 / means[t].count),
               exp(means[t].best / means[t].count));
    }
    if (!chosen.check_only) printf("# read bandwidth after all: %.0f GB/s\n", measure_read(&device));
    if (!good) printf("# FAILED: an error above its limit, or runs that differ\n");
    CUDA(cudaFree(device.pool));
    attn_shape_list_fini(&shapes);
    return good ? 0 : 1;
}
