/*
 * Times the decode kernels on a file of shapes and checks every one against a float64 reference.
 *
 *     bench_decode SHAPES PEERS [--pool-mib N] [--check] [--runs N] [--times] [--shape NAME] [--tuning NAME]
 *                  [--dtype bf16|fp16|fp8] [--head-dim N] [--head-dim-v N] [--query-length N] [--batch-invariant]
 *                  [--prefix N] [--own-on N]
 *
 * --prefix N: the sequences of a shape share their first N tokens, whole pages, which are read once (side_by_side.h);
 * the time is of both launches. --own-on N: their other tokens on N multiprocessors beside it, or after it if N is 0,
 * instead of as attn_cuda_choose_own_workers() says.
 *
 * Measured: a CUDA graph of 10 to 64 launches, each over other pages of a pool of 12 GiB in random order, so that the
 * L2 cache is cold; the median of 21 replays, divided by the launches. Bytes are the live K and V, Q and O. The
 * plain-read bandwidth is measured before and after each row, since it moves by some tenths of a percent while the
 * bench runs, and the row's share is of the mean of both; a peer's time counts as a share of the read bandwidth of its
 * own run, so a ratio above 1 is faster than the peer whatever the machine's memory.
 *
 * Checked, per shape and tuning: 256 output rows spread over the batch, with all rows of the last pages beyond the
 * lengths NaN and all unused page table entries 2147480000; every output row written; N runs (3) bitwise equal.
 * --check only does that, on a pool just as large as the shape.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/attention.h"
#include "kernels/bench/shapes.h"
#include "kernels/cuda/bench_decode_device.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/read_bandwidth.h"
#include "kernels/cuda/side_by_side.h"

enum { REPLAYS = 21, CHECKED_ROWS = 256, MIN_LAUNCHES = 10, MAX_LAUNCHES = 64, MAX_PEERS = 128 };

static const uint32_t UNUSED_ENTRY = 2147480000u;
static const uint64_t POOL_SEED = 1, QUERY_SEED = 2;
static const double MAX_OUT_ERROR = 2.5e-3, MAX_FP8_ERROR = 4e-3, MAX_LSE_ERROR = 1e-4;
static const size_t COLD_BYTES = (size_t)768 << 20; /* read between two uses of a page: many times the L2 cache */

/* A failed CUDA call ends the bench. */
static void cuda_check(int error, const char *what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "bench_decode: %s: %s\n", what, cudaGetErrorString((cudaError_t)error));
    exit(1);
}
#define CUDA(call) cuda_check((int)(call), #call)

static void *host_allocate(size_t bytes) {
    void *memory = malloc(bytes == 0 ? 1 : bytes);
    if (memory == NULL) {
        fprintf(stderr, "bench_decode: no memory for %zu bytes\n", bytes);
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

/* A line of a name and its numbers; what follows them is not read. False for any other: a comment, a heading. */
static bool read_peer(peer *row, const char *line) {
    double *const numbers[] = {&row->bytes_us, &row->fa3_us, &row->best_us};
    size_t name_length = strcspn(line, "#,");
    if (name_length == 0 || name_length >= sizeof row->name) return false;
    memcpy(row->name, line, name_length);
    row->name[name_length] = '\0';
    const char *at = line + name_length;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (*at != ',') return false;
        char *end;
        *numbers[i] = strtod(at + 1, &end);
        if (end == at + 1) return false;
        at = end;
    }
    return true;
}

static void read_peers(peer_list *peers, const char *path) {
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        fprintf(stderr, "bench_decode: cannot open %s\n", path);
        exit(1);
    }
    char line[512];
    while (peers->count < MAX_PEERS && fgets(line, sizeof line, file) != NULL) {
        if (read_peer(&peers->rows[peers->count], line)) peers->count++;
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
    uint32_t align_tiles;
    int overlap_launches;
    int clusters;
    uint32_t patience_ns;
} tuning_row;

static const tuning_row TUNINGS[] = {
    {"best", 0, 0, 4, 0, 1, ATTN_CUDA_PATIENCE_NS},       {"alone", 0, 0, 4, 0, 1, 0},
    {"overlap", 0, 0, 4, 1, 1, ATTN_CUDA_PATIENCE_NS},    {"one_block", 1, 0, 4, 0, 0, ATTN_CUDA_PATIENCE_NS},
    {"two_blocks", 2, 0, 4, 0, 0, ATTN_CUDA_PATIENCE_NS},
};
enum { TUNING_COUNT = sizeof TUNINGS / sizeof TUNINGS[0] };

/* ------------------------------------------------------------------------------------------- */
/* A shape on the device */

typedef struct {
    void *pool; /* borrowed */
    size_t pool_bytes;
    uint32_t *status; /* device */
    uint32_t multiprocessors;
    uint32_t shared_bytes;    /* that a block may have */
    attn_cuda_reader *reader; /* NULL: nothing is timed */
} device_state;

typedef struct {
    attn_cuda_call call; /* with set 0's page table */
    uint32_t query_length;
    attn_cuda_expected expected;
    uint32_t *lengths; /* device */
    attn_cuda_sequence *sequences;
    uint32_t *page_tables; /* device [sets, batch, stride] */
    void *queries, *out;
    float *lse;
    uint32_t sets;
    double bytes;
    /* Where a prefix is shared: how that is launched, with set 0's page table; and what of it is on the device. */
    uint32_t prefix;
    attn_cuda_forks forks;
    uint32_t *own_lengths, *own_offsets;
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
    uint32_t *permutation = random_permutation(loaded->call.layer.pages);
    size_t entries = (size_t)loaded->sets * shape->batch * stride;
    uint32_t *tables = host_allocate(entries * sizeof *tables);
    uint32_t next = 0;
    for (size_t row = 0; row < (size_t)loaded->sets * shape->batch; row++) {
        uint32_t used = pages_of(shape, (uint32_t)(row % shape->batch));
        uint32_t shared = row % shape->batch > 0 ? loaded->prefix / shape->page_size : 0;
        for (uint32_t i = 0; i < stride; i++) {
            tables[row * stride + i] = i < shared ? tables[row / shape->batch * shape->batch * stride + i]
                                       : i < used ? permutation[next++]
                                                  : UNUSED_ENTRY;
        }
    }
    loaded->page_tables = device_allocate(entries * sizeof *tables);
    CUDA(cudaMemcpy(loaded->page_tables, tables, entries * sizeof *tables, cudaMemcpyHostToDevice));
    free(tables);
    free(permutation);
}

/* What every shape is changed to, and how the pool stores it. */
typedef struct {
    uint32_t dtype, kv_dtype, element_bytes;
    uint32_t head_dim, head_dim_v; /* 0: the shape's */
    uint32_t query_length;
    uint32_t batch_invariant;
    uint32_t prefix; /* tokens that all sequences of a shape share */
} variant;

static attn_cuda_layer describe_layer(const attn_shape *shape, const variant *form, const device_state *device) {
    uint32_t dim = form->head_dim ? form->head_dim : shape->head_dim;
    attn_cuda_layer layer = {.memory = device->pool,
                             .page_size = shape->page_size,
                             .heads_q = shape->heads_q,
                             .heads_kv = shape->heads_kv,
                             .head_dim = dim,
                             .head_dim_v = form->head_dim_v ? form->head_dim_v : dim,
                             .dtype = form->dtype,
                             .kv_dtype = form->kv_dtype,
                             .element_bytes = form->element_bytes};
    layer.tile_bytes = shape->page_size * (layer.head_dim + layer.head_dim_v) * layer.element_bytes;
    layer.pages = (uint32_t)(device->pool_bytes / ((size_t)layer.tile_bytes * layer.heads_kv));
    return layer;
}

/* Sequences of several query rows, all of them at their ends. */
static void load_sequences(loaded_shape *loaded, const attn_shape *shape, uint32_t stride) {
    size_t bytes = shape->batch * sizeof(attn_cuda_sequence);
    attn_cuda_sequence *sequences = host_allocate(bytes);
    for (uint32_t i = 0; i < shape->batch; i++) {
        sequences[i] = (attn_cuda_sequence){.length = shape->lengths[i],
                                            .query_length = loaded->query_length,
                                            .page_offset = i * stride,
                                            .first_query = i * loaded->query_length,
                                            .first_out = i * loaded->query_length,
                                            .total_length = shape->lengths[i]};
    }
    loaded->sequences = device_allocate(bytes);
    CUDA(cudaMemcpy(loaded->sequences, sequences, bytes, cudaMemcpyHostToDevice));
    free(sequences);
}

/* The prefix as a sequence of its own, and the others without it. After all else of the shape. */
static void load_forks(loaded_shape *loaded, const attn_shape *shape) {
    const attn_cuda_call *call = &loaded->call;
    const attn_cuda_expected *expected = &loaded->expected;
    uint64_t own_tiles = 0;
    uint32_t prefix = loaded->prefix, batch = shape->batch;
    size_t rows = (size_t)batch * shape->heads_q, bytes = batch * sizeof(uint32_t);
    attn_cuda_sequence shared = {
        .length = prefix, .query_length = batch, .is_read = 1, .is_prefix = 1, .total_length = prefix};
    loaded->sequences = device_allocate(sizeof shared);
    CUDA(cudaMemcpy(loaded->sequences, &shared, sizeof shared, cudaMemcpyHostToDevice));
    uint32_t *lengths = host_allocate(bytes), *offsets = host_allocate(bytes);
    for (uint32_t i = 0; i < batch; i++) {
        lengths[i] = shape->lengths[i] - prefix;
        own_tiles += attn_cuda_own_tiles(lengths[i]);
        offsets[i] = i * call->page_table_stride + prefix / shape->page_size;
    }
    loaded->own_lengths = device_allocate(bytes);
    loaded->own_offsets = device_allocate(bytes);
    CUDA(cudaMemcpy(loaded->own_lengths, lengths, bytes, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(loaded->own_offsets, offsets, bytes, cudaMemcpyHostToDevice));
    free(lengths);
    free(offsets);
    attn_cuda_forks *forks = &loaded->forks;
    *forks = (attn_cuda_forks){.own = *call,
                               .prefixes = *call,
                               .own_expected = {1, expected->shortest - prefix, expected->longest - prefix},
                               .prefixes_expected = {batch, prefix, prefix},
                               .least_queries = batch,
                               .sharing = batch,
                               .own_tiles = own_tiles};
    forks->own.lengths = loaded->own_lengths;
    forks->own.page_offsets = loaded->own_offsets;
    forks->prefixes.batch = 1;
    forks->prefixes.sequences = loaded->sequences;
    forks->apart_out = device_allocate(rows * call->layer.head_dim_v * sizeof(float));
    forks->apart_lse = device_allocate(rows * sizeof(float));
}

/* False if the pool is too small for the shape, or no kernel is built for it. */
static bool load_shape(loaded_shape *loaded, const attn_shape *shape, const variant *form, const device_state *device) {
    *loaded = (loaded_shape){.query_length = form->query_length,
                             .prefix = form->prefix,
                             .expected = {.most_queries = form->query_length, .shortest = UINT32_MAX}};
    attn_cuda_call *call = &loaded->call;
    uint64_t pages = 0, tokens = 0;
    uint32_t stride = 1;
    for (uint32_t i = 0; i < shape->batch; i++) {
        uint32_t used = pages_of(shape, i);
        pages += used;
        tokens += shape->lengths[i];
        if (used > stride) stride = used;
        if (shape->lengths[i] < loaded->expected.shortest) loaded->expected.shortest = shape->lengths[i];
        if (shape->lengths[i] > loaded->expected.longest) loaded->expected.longest = shape->lengths[i];
    }
    call->layer = describe_layer(shape, form, device);
    uint32_t prefix = form->prefix, shared = prefix / shape->page_size;
    pages -= (uint64_t)(shape->batch - 1) * shared;
    tokens -= (uint64_t)(shape->batch - 1) * prefix;
    bool is_long_enough = loaded->expected.shortest >= form->query_length && loaded->expected.shortest > prefix;
    if (prefix % shape->page_size != 0) return false;
    if (pages > call->layer.pages || !is_long_enough || !attn_cuda_decode_fits(&call->layer)) return false;

    uint64_t sets = pages == 0 ? 1 : call->layer.pages / pages;
    loaded->sets = sets < MAX_LAUNCHES ? (uint32_t)sets : MAX_LAUNCHES;
    size_t rows = (size_t)shape->batch * shape->heads_q * form->query_length;
    size_t query_elements = rows * call->layer.head_dim, out_elements = rows * call->layer.head_dim_v;
    uint32_t token_bytes = call->layer.tile_bytes / shape->page_size * shape->heads_kv;
    loaded->bytes = (double)tokens * (double)token_bytes + 2.0 * (double)(query_elements + out_elements);
    loaded->lengths = device_allocate(shape->batch * sizeof(uint32_t));
    loaded->queries = device_allocate(query_elements * 2);
    loaded->out = device_allocate(out_elements * 2);
    loaded->lse = device_allocate(rows * sizeof(float));
    CUDA(cudaMemcpy(loaded->lengths, shape->lengths, shape->batch * sizeof(uint32_t), cudaMemcpyHostToDevice));
    bench_fill(loaded->queries, query_elements, form->dtype, QUERY_SEED);
    deal_pages(loaded, shape, stride);
    if (form->query_length > 1) load_sequences(loaded, shape, stride);

    call->batch = shape->batch;
    call->lengths = loaded->lengths;
    call->sequences = loaded->sequences;
    call->page_table = loaded->page_tables;
    call->page_table_stride = stride;
    call->queries = loaded->queries;
    call->out = loaded->out;
    call->lse = loaded->lse;
    call->status = device->status;
    call->scale = 1.0f / sqrtf((float)call->layer.head_dim);
    call->batch_invariant = form->batch_invariant;
    if (prefix > 0) load_forks(loaded, shape);
    return true;
}

static void unload_shape(loaded_shape *loaded) {
    CUDA(cudaFree(loaded->sequences));
    CUDA(cudaFree(loaded->own_lengths));
    CUDA(cudaFree(loaded->own_offsets));
    CUDA(cudaFree(loaded->forks.apart_out));
    CUDA(cudaFree(loaded->forks.apart_lse));
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
    bool repeats; /* all runs bitwise equal */
} check_result;

/* A launch: a shape, how it is run, and what it works in. */
typedef struct {
    const loaded_shape *loaded;
    attn_cuda_tuning tuning;
    attn_cuda_workspace workspace;
    uint32_t own_workers; /* where a prefix is shared: side_by_side.h */
} launcher;

static int launch(const launcher *with, const attn_cuda_call *call, cudaStream_t stream) {
    if (with->loaded->prefix > 0) {
        attn_cuda_forks forks = with->loaded->forks;
        forks.own.page_table = forks.prefixes.page_table = call->page_table;
        return attn_cuda_launch_forks(&forks, &with->tuning, with->own_workers, &with->workspace, stream);
    }
    return attn_cuda_decode_launch(call, &with->tuning, &with->workspace, &with->loaded->expected, stream);
}

static size_t rows_of(const attn_cuda_call *call, uint32_t query_length) {
    return (size_t)call->batch * query_length * call->layer.heads_q;
}

static float float_of(uint16_t bits, uint32_t dtype) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    if (dtype == ATTN_BF16) return value;
    uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent == 0    ? ldexpf((float)mantissa, -24)
                 : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                  : ldexpf((float)(mantissa + 1024), (int)exponent - 25);
    return bits >> 15 ? -size : size;
}

/* Runs the kernel once on poisoned outputs and copies them to the host. */
static void run_once(const launcher *with, size_t rows, uint16_t *out, float *lse) {
    const attn_cuda_call *call = &with->loaded->call;
    size_t out_bytes = rows * call->layer.head_dim_v * 2;
    CUDA(cudaMemset(call->out, 0xff, out_bytes));
    CUDA(cudaMemset(call->lse, 0xff, rows * sizeof(float)));
    CUDA(launch(with, call, NULL));
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(out, call->out, out_bytes, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(lse, call->lse, rows * sizeof(float), cudaMemcpyDeviceToHost));
    uint32_t status;
    CUDA(cudaMemcpy(&status, call->status, sizeof status, cudaMemcpyDeviceToHost));
    if (status != 0) {
        fprintf(stderr, "bench_decode: the kernel met a page index outside the pool\n");
        exit(1);
    }
}

/* The float64 reference of some rows of set 0. */
typedef struct {
    uint32_t rows[CHECKED_ROWS];
    uint32_t count;
    double out[CHECKED_ROWS * 256];
    double lse[CHECKED_ROWS];
} reference;

static void compute_reference(reference *expected, const loaded_shape *loaded) {
    const attn_cuda_call *call = &loaded->call;
    size_t rows = rows_of(call, loaded->query_length), dim = call->layer.head_dim_v;
    expected->count = rows < CHECKED_ROWS ? (uint32_t)rows : CHECKED_ROWS;
    for (uint32_t i = 0; i < expected->count; i++) {
        expected->rows[i] = (uint32_t)(((uint64_t)i * rows + rows / 2) / expected->count % rows);
    }
    uint32_t *device_rows = device_allocate(expected->count * sizeof *device_rows);
    double *out = device_allocate(expected->count * dim * sizeof *out);
    double *lse = device_allocate(expected->count * sizeof *lse);
    CUDA(cudaMemcpy(device_rows, expected->rows, expected->count * sizeof *device_rows, cudaMemcpyHostToDevice));
    bench_reference(call, loaded->query_length, device_rows, expected->count, out, lse);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(expected->out, out, expected->count * dim * sizeof *out, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(expected->lse, lse, expected->count * sizeof *lse, cudaMemcpyDeviceToHost));
    CUDA(cudaFree(device_rows));
    CUDA(cudaFree(out));
    CUDA(cudaFree(lse));
}

static check_result check_shape(const launcher *with, const reference *expected, uint32_t runs) {
    const attn_cuda_call *call = &with->loaded->call;
    size_t rows = rows_of(call, with->loaded->query_length), dim = call->layer.head_dim_v, elements = rows * dim;
    uint16_t *out = host_allocate(elements * sizeof *out), *again = host_allocate(elements * sizeof *again);
    float *lse = host_allocate(rows * sizeof *lse), *lse_again = host_allocate(rows * sizeof *lse_again);
    check_result result = {0.0, 0.0, true};
    run_once(with, rows, out, lse);
    for (uint32_t i = 1; i < runs; i++) {
        run_once(with, rows, again, lse_again);
        result.repeats = result.repeats && memcmp(out, again, elements * sizeof *out) == 0 &&
                         memcmp(lse, lse_again, rows * sizeof *lse) == 0;
    }
    double difference = 0.0, norm = 0.0;
    for (uint32_t i = 0; i < expected->count; i++) {
        for (size_t d = 0; d < dim; d++) {
            double want = expected->out[i * dim + d];
            double got = float_of(out[(size_t)expected->rows[i] * dim + d], call->layer.dtype);
            difference += (got - want) * (got - want);
            norm += want * want;
        }
        double wrong = fabs((double)lse[expected->rows[i]] - expected->lse[i]);
        if (!(wrong <= result.lse_error)) result.lse_error = wrong;
    }
    result.out_error = sqrt(difference / norm);
    for (size_t i = 0; i < elements; i++) {
        if (isnan(float_of(out[i], call->layer.dtype))) result.out_error = NAN;
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
static double time_shape(const launcher *with) {
    const loaded_shape *loaded = with->loaded;
    double wanted = (double)COLD_BYTES / loaded->bytes + 1.0;
    uint32_t launches = wanted < MIN_LAUNCHES ? MIN_LAUNCHES : wanted > MAX_LAUNCHES ? MAX_LAUNCHES : (uint32_t)wanted;
    if (launches > loaded->sets && loaded->sets > MIN_LAUNCHES) launches = loaded->sets;
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (uint32_t i = 0; i < launches; i++) {
        attn_cuda_call call = loaded->call;
        call.page_table += (size_t)(i % loaded->sets) * call.batch * call.page_table_stride;
        CUDA(launch(with, &call, stream));
    }
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&executable, graph, 0));
    double us = time_graph(executable, stream) * 1000.0 / launches;
    CUDA(cudaGraphExecDestroy(executable));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    return us;
}

/* Plain-read bandwidth in GB/s: the median of some reads. */
static double measure_read(const device_state *device) {
    double rate;
    float gbps[9];
    for (int i = 0; i < 9; i++) {
        CUDA(attn_cuda_reader_measure(device->reader, &rate));
        gbps[i] = (float)(rate / 1e9);
    }
    qsort(gbps, 9, sizeof gbps[0], compare_floats);
    return gbps[4];
}

/* When the thread blocks of one launch began and ended, after the device's clock; a line a block. */
static void print_times(const launcher *with) {
    uint32_t workers = 2 * with->tuning.workers; /* at most */
    size_t bytes = (size_t)workers * 4 * sizeof(uint64_t);
    uint64_t *times = host_allocate(bytes);
    launcher timed = *with;
    timed.tuning.times = device_allocate(bytes);
    for (uint32_t i = 0; i < 3; i++) {
        attn_cuda_call call = with->loaded->call;
        call.page_table += (size_t)(i % with->loaded->sets) * call.batch * call.page_table_stride;
        CUDA(cudaMemset(timed.tuning.times, 0, bytes));
        CUDA(launch(&timed, &call, NULL));
    }
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(times, timed.tuning.times, bytes, cudaMemcpyDeviceToHost));
    uint64_t first = UINT64_MAX;
    for (uint32_t w = 0; w < workers; w++) {
        if (times[w * 4 + 1] != 0 && times[w * 4 + 1] < first) first = times[w * 4 + 1];
    }
    for (uint32_t w = 0; w < workers; w++) {
        if (times[w * 4 + 1] == 0) continue; /* there is no such block */
        printf("# block %u on %llu: %llu %llu %llu\n", w, (unsigned long long)times[w * 4],
               (unsigned long long)(times[w * 4 + 1] - first), (unsigned long long)(times[w * 4 + 2] - first),
               (unsigned long long)(times[w * 4 + 3] - first));
    }
    CUDA(cudaFree(timed.tuning.times));
    free(times);
}

/* ------------------------------------------------------------------------------------------- */
/* The bench */

typedef struct {
    const char *shapes_path, *peers_path;
    const char *only_shape, *only_tuning;
    size_t pool_mib;
    uint32_t runs; /* compared with one another */
    bool check_only, times;
    long own_on; /* --own-on, or -1 */
    variant form;
} options;

/* Sums of logarithms of the ratios of one tuning. */
typedef struct {
    double fa3, best;
    int count;
} geometric_mean;

static bool parse_dtype(variant *form, const char *name) {
    form->dtype = strcmp(name, "fp16") == 0 ? ATTN_FP16 : ATTN_BF16;
    form->kv_dtype = strcmp(name, "fp8") == 0 ? ATTN_FP8_E4M3 : form->dtype;
    form->element_bytes = form->kv_dtype == ATTN_FP8_E4M3 ? 1 : 2;
    return strcmp(name, "bf16") == 0 || strcmp(name, "fp16") == 0 || strcmp(name, "fp8") == 0;
}

static bool parse_options(options *chosen, int argc, char **argv) {
    if (argc < 3) return false;
    *chosen = (options){.shapes_path = argv[1],
                        .peers_path = argv[2],
                        .pool_mib = 12288,
                        .runs = 3,
                        .own_on = -1,
                        .form = {.dtype = ATTN_BF16, .kv_dtype = ATTN_BF16, .element_bytes = 2, .query_length = 1}};
    for (int i = 3; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--check") == 0) {
            chosen->check_only = true;
            continue;
        }
        if (strcmp(argv[i], "--times") == 0) {
            chosen->times = true;
            continue;
        }
        if (strcmp(argv[i], "--batch-invariant") == 0) {
            chosen->form.batch_invariant = 1;
            continue;
        }
        if (value == NULL) return false;
        if (strcmp(argv[i], "--pool-mib") == 0) {
            chosen->pool_mib = strtoul(value, NULL, 10);
        } else if (strcmp(argv[i], "--runs") == 0) {
            chosen->runs = (uint32_t)strtoul(value, NULL, 10);
        } else if (strcmp(argv[i], "--shape") == 0) {
            chosen->only_shape = value;
        } else if (strcmp(argv[i], "--tuning") == 0) {
            chosen->only_tuning = value;
        } else if (strcmp(argv[i], "--head-dim") == 0) {
            chosen->form.head_dim = (uint32_t)strtoul(value, NULL, 10);
        } else if (strcmp(argv[i], "--head-dim-v") == 0) {
            chosen->form.head_dim_v = (uint32_t)strtoul(value, NULL, 10);
        } else if (strcmp(argv[i], "--query-length") == 0) {
            chosen->form.query_length = (uint32_t)strtoul(value, NULL, 10);
        } else if (strcmp(argv[i], "--prefix") == 0) {
            chosen->form.prefix = (uint32_t)strtoul(value, NULL, 10);
        } else if (strcmp(argv[i], "--own-on") == 0) {
            chosen->own_on = strtol(value, NULL, 10);
        } else if (strcmp(argv[i], "--dtype") != 0 || !parse_dtype(&chosen->form, value)) {
            return false;
        }
        i++;
    }
    if (chosen->form.prefix > 0 && (chosen->form.query_length > 1 || chosen->form.batch_invariant)) return false;
    return chosen->pool_mib > 0 && chosen->form.query_length > 0;
}

/* What was measured of a row: nothing if it was only checked. */
typedef struct {
    double us, read_gbps;
} timing;

static timing time_row(const device_state *device, const launcher *with) {
    double before = measure_read(device), us = time_shape(with);
    return (timing){us, (before + measure_read(device)) / 2};
}

static void print_row(const peer_list *peers, const tuning_row *row, const char *name, double bytes,
                      const timing *timed, const check_result *checked, geometric_mean *mean) {
    double us = timed->us, bytes_us = us > 0.0 ? bytes / timed->read_gbps / 1e3 : 0.0;
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

static launcher prepare(const options *chosen, const loaded_shape *loaded, const tuning_row *row,
                        const device_state *device) {
    launcher with = {.loaded = loaded};
    const attn_cuda_layer *layer = &loaded->call.layer;
    with.tuning = (attn_cuda_tuning){.is_hopper = 1,
                                     .workers = device->multiprocessors,
                                     .blocks_per_sm = row->blocks_per_sm,
                                     .shared_bytes = device->shared_bytes,
                                     .stages = row->stages,
                                     .align_tiles = row->align_tiles,
                                     .overlap_launches = row->overlap_launches,
                                     .patience_ns = row->patience_ns};
    if (row->clusters) CUDA(attn_cuda_find_clusters(&with.tuning));
    if (loaded->prefix > 0) with.own_workers = attn_cuda_choose_own_workers(&loaded->forks, &with.tuning);
    if (chosen->own_on >= 0) with.own_workers = (uint32_t)chosen->own_on;
    with.workspace.rows = loaded->call.batch_invariant ? 16 : 64;
    with.workspace.slots = 4 * with.tuning.workers;
    if (loaded->call.batch_invariant) with.workspace.slots = 1 << 16;
    size_t bytes = attn_cuda_workspace_bytes(with.workspace.slots, with.workspace.rows, layer->head_dim_v);
    with.workspace.memory = device_allocate(bytes);
    CUDA(cudaMemset(with.workspace.memory, 0, bytes));
    return with;
}

/* Checks and times one shape with every tuning. False if a check failed. */
static bool bench_shape(const options *chosen, device_state *device, const peer_list *peers, const attn_shape *shape,
                        geometric_mean *means) {
    static reference expected;
    loaded_shape loaded;
    if (!load_shape(&loaded, shape, &chosen->form, device)) {
        printf("# %s: not run: no kernel for it, a pool too small, or fewer tokens than queries\n", shape->name);
        return true;
    }
    bool good = true;
    double most = chosen->form.kv_dtype == ATTN_FP8_E4M3 ? MAX_FP8_ERROR : MAX_OUT_ERROR;
    bench_poison_tails(&loaded.call, false, POOL_SEED);
    CUDA(cudaDeviceSynchronize());
    compute_reference(&expected, &loaded);
    check_result checked[TUNING_COUNT];
    for (int pass = 0; pass < 2; pass++) {
        for (int t = 0; t < TUNING_COUNT; t++) {
            const tuning_row *row = &TUNINGS[t];
            if (chosen->only_tuning != NULL && strcmp(chosen->only_tuning, row->name) != 0) continue;
            launcher with = prepare(chosen, &loaded, row, device);
            int error = launch(&with, &loaded.call, NULL);
            if (error == cudaErrorInvalidValue) { /* the tuning is not built for this shape */
                CUDA(cudaFree(with.workspace.memory));
                continue;
            }
            CUDA(error);
            if (pass == 0) {
                checked[t] = check_shape(&with, &expected, chosen->runs);
                good =
                    good && checked[t].out_error <= most && checked[t].lse_error <= MAX_LSE_ERROR && checked[t].repeats;
            } else {
                timing timed = {0};
                if (!chosen->check_only) timed = time_row(device, &with);
                print_row(peers, row, shape->name, loaded.bytes, &timed, &checked[t], &means[t]);
                if (loaded.prefix > 0)
                    printf("# own tokens on %u multiprocessors (0: after the prefix)\n", with.own_workers);
                if (chosen->times) print_times(&with);
            }
            CUDA(cudaFree(with.workspace.memory));
        }
        if (pass == 0) bench_poison_tails(&loaded.call, true, POOL_SEED);
        CUDA(cudaDeviceSynchronize());
    }
    fflush(stdout);
    unload_shape(&loaded);
    return good;
}

int main(int argc, char **argv) {
    options chosen;
    if (!parse_options(&chosen, argc, argv)) {
        fprintf(stderr,
                "usage: bench_decode SHAPES PEERS [--pool-mib N] [--check] [--runs N] [--times] [--shape NAME]\n"
                "       [--tuning NAME] [--dtype bf16|fp16|fp8] [--head-dim N] [--head-dim-v N] [--query-length N] "
                "[--batch-invariant]\n"
                "       [--prefix N] [--own-on N]\n");
        return 2;
    }
    static peer_list peers;
    read_peers(&peers, chosen.peers_path);
    attn_shape_list shapes;
    attn_status status = attn_shape_list_read(&shapes, chosen.shapes_path);
    if (attn_failed(status)) {
        fprintf(stderr, "bench_decode: %s\n", status.message);
        attn_shape_list_fini(&shapes);
        return 1;
    }
    struct cudaDeviceProp properties;
    CUDA(cudaGetDeviceProperties(&properties, 0));
    device_state device = {.pool_bytes = chosen.pool_mib << 20,
                           .multiprocessors = (uint32_t)properties.multiProcessorCount};
    device.pool = device_allocate(device.pool_bytes);
    device.shared_bytes = (uint32_t)properties.sharedMemPerBlockOptin;
    device.status = device_allocate(sizeof *device.status);
    CUDA(cudaMemset(device.status, 0, sizeof *device.status));
    bench_fill(device.pool, device.pool_bytes / chosen.form.element_bytes, chosen.form.kv_dtype, POOL_SEED);
    CUDA(cudaDeviceSynchronize());
    if (!chosen.check_only) CUDA(attn_cuda_reader_create(0, (size_t)4 << 30, &device.reader));
    int driver = 0;
    CUDA(cudaDriverGetVersion(&driver));
    printf("# %s, %u multiprocessors, CUDA driver API %d, pool %zu MiB\n", properties.name, device.multiprocessors,
           driver, chosen.pool_mib);
    if (!chosen.check_only) printf("# read bandwidth before all: %.0f GB/s\n", measure_read(&device));
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
    attn_cuda_reader_destroy(device.reader);
    CUDA(cudaFree(device.pool));
    attn_shape_list_fini(&shapes);
    return good ? 0 : 1;
}
