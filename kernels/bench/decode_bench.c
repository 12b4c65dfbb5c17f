/*
 * decode: times attn_backend_decode over the shapes of a file, against the plain read bandwidth of
 * the same machine in the same minutes. See the help text below for what is measured and how.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/attention.h"
#include "kernels/bench/shapes.h"
#include "kernels/bench/yardstick.h"
#include "kernels/dtype.h"

static const char help_text[] =
    "decode: times one layer's decode attention for each shape of a file.\n"
    "\n"
    "  --shapes FILE           shape file: name,batch,heads_q,heads_kv,head_dim,page_size,seqlens (required)\n"
    "  --backend KIND          cpu (default), cuda or reference\n"
    "  --threads N             workers of cpu, and threads of the plain read (default 2)\n"
    "  --dtype NAME            bf16 (default), fp16, fp32: KV, queries and outputs\n"
    "  --isa NAME              auto (default), avx512bf16, avx512, avx2, portable\n"
    "  --seconds-per-shape S   time for each shape (default 3), with at least 7 measurements\n"
    "  --filter TEXT           only shapes whose name contains TEXT\n"
    "  --pool-gib G            most memory for the KV pool (default 6); larger shapes are skipped, on stderr\n"
    "  --query-length N        query rows a sequence (default 1)\n"
    "  --batch-invariant       fixed chunks and merge order\n"
    "  --help                  this text\n"
    "\n"
    "Prints CSV: name,us,gbps,share_of_read,err,launches,device_us,device_share_of_read\n"
    "  us             median time of a decode: partition, attention, merge; nothing is appended. On cuda from\n"
    "                 the host's memory to the host's memory: staging, copies both ways and waiting included\n"
    "  gbps           live bytes of K, V, queries and outputs / us, in 10^9 bytes a second\n"
    "  share_of_read  gbps / plain read, the median of reads between the decodes, in turn: a vectorised loop\n"
    "                 with the same number of threads over a huge-page buffer of 1 GiB; on cuda a plain\n"
    "                 kernel over 4 GiB of the device's memory, by the device's clock\n"
    "  err            ||out - ref|| / ||ref|| against attention in float64 on the stored values; of up to 3\n"
    "                 sequences and 2 KV heads of the batch, with all their query heads\n"
    "  launches       of kernels, by one decode; 0 on a CPU\n"
    "  device_us      median time of a decode's kernels, by the device's clock: from the end of the rows'\n"
    "                 upload to the end of the last kernel, gaps included; of decodes of their own, since\n"
    "                 measuring it adds to us; nan on a CPU\n"
    "  device_share_of_read  share_of_read with device_us in place of us; nan on a CPU\n"
    "\n"
    "Caches are cold: every decode takes the next of several page tables, with the pool's pages permuted at\n"
    "random, over at least 1 GiB (a larger shape has the pool to itself). Inputs are uniform in -2 .. 2.\n"
    "Exit status 1 if an err is above 2.5e-3 (bf16), 4e-4 (fp16), 2e-6 (fp32), 2 for bad arguments.\n";

#define GIB                ((size_t)1 << 30)
#define COLD_BYTES         GIB
#define LEAST_READ_BYTES   ((size_t)64 << 20)
#define LEAST_MEASUREMENTS 7
#define MOST_MEASUREMENTS  20000
#define RANDOM_ELEMENTS    ((size_t)1 << 22)

typedef struct {
    const char *shapes;
    const char *backend;
    const char *isa;
    const char *filter;
    attn_dtype dtype;
    uint32_t threads;
    uint32_t query_length;
    double seconds;
    double pool_gib;
    bool batch_invariant;
} options;

/* A shape set up: a pool full of random rows and page tables over it. */
typedef struct {
    const attn_shape *shape;
    attn_geometry geometry;
    attn_backend *backend;
    char *random; /* [RANDOM_ELEMENTS] in dtype: keys, values and queries are slices of it */
    uint32_t pool_pages;
    uint32_t sets;          /* page tables of the whole batch, each over its own pages */
    uint32_t *pages;        /* [sets * pages of the batch]: the pool's pages, permuted */
    uint32_t *page_offsets; /* [batch + 1] */
    uint32_t *query_lengths;
    const void **queries; /* [batch] */
    void **outs;          /* [batch] slices of out_rows */
    char *out_rows;
    double *times, *device_times; /* [MOST_MEASUREMENTS] us */
    double *reads;                /* [MOST_MEASUREMENTS] GB/s */
} bench;

/* ------------------------------------------------------------------------------------------- */
/* Inputs */

static uint64_t next_random(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* `elements` random elements, another slice for every index. */
static const char *random_slice(const bench *b, uint64_t index, size_t elements) {
    uint64_t state = index;
    size_t first = next_random(&state) % (RANDOM_ELEMENTS - elements) / 8 * 8;
    return b->random + first * attn_dtype_bytes(b->geometry.dtype);
}

static const char *page_keys(const bench *b, uint32_t page) {
    const attn_geometry *g = &b->geometry;
    return random_slice(b, 2 * (uint64_t)page, (size_t)g->page_size * g->heads_kv * g->head_dim);
}

static const char *page_values(const bench *b, uint32_t page) {
    const attn_geometry *g = &b->geometry;
    return random_slice(b, 2 * (uint64_t)page + 1, (size_t)g->page_size * g->heads_kv * g->head_dim_v);
}

static attn_status fill_random(bench *b) {
    float values[1024];
    size_t element = attn_dtype_bytes(b->geometry.dtype);
    uint64_t state = 42;
    b->random = malloc(RANDOM_ELEMENTS * element);
    if (b->random == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for random inputs");
    for (size_t first = 0; first < RANDOM_ELEMENTS; first += 1024) {
        for (int i = 0; i < 1024; i++) {
            values[i] = (float)((double)(next_random(&state) >> 11) * 0x1p-51 - 2.0);
        }
        attn_elements_from_floats(b->geometry.dtype, values, b->random + first * element, 1024);
    }
    return attn_ok();
}

static attn_status fill_pool(bench *b) {
    for (uint32_t page = 0; page < b->pool_pages; page++) {
        ATTN_TRY(attn_backend_append(b->backend, 0, &page, 1, 0, b->geometry.page_size, page_keys(b, page),
                                     page_values(b, page)));
    }
    return attn_ok();
}

static uint32_t batch_pages(const attn_shape *shape) {
    uint64_t pages = 0;
    for (uint32_t i = 0; i < shape->batch; i++) {
        pages += (shape->lengths[i] + shape->page_size - 1) / shape->page_size;
    }
    return pages < UINT32_MAX ? (uint32_t)pages : UINT32_MAX;
}

static void permute_pages(bench *b) {
    uint64_t state = 7;
    for (uint32_t i = 0; i < b->pool_pages; i++) {
        b->pages[i] = i;
    }
    for (uint32_t left = b->pool_pages; left > 1; left--) {
        uint32_t j = (uint32_t)(next_random(&state) % left), kept = b->pages[left - 1];
        b->pages[left - 1] = b->pages[j];
        b->pages[j] = kept;
    }
}

static attn_status allocate_batch(bench *b, uint32_t query_length) {
    const attn_geometry *g = &b->geometry;
    uint32_t batch = b->shape->batch;
    size_t out_bytes = query_length * attn_out_row_bytes(g);
    b->pages = malloc(b->pool_pages * sizeof *b->pages);
    b->page_offsets = malloc((batch + 1) * sizeof *b->page_offsets);
    b->query_lengths = malloc(batch * sizeof *b->query_lengths);
    b->queries = malloc(batch * sizeof *b->queries);
    b->outs = malloc(batch * sizeof *b->outs);
    b->out_rows = malloc(batch * out_bytes);
    b->times = malloc(MOST_MEASUREMENTS * sizeof *b->times);
    b->device_times = malloc(MOST_MEASUREMENTS * sizeof *b->device_times);
    b->reads = malloc(MOST_MEASUREMENTS * sizeof *b->reads);
    if (!b->pages || !b->page_offsets || !b->query_lengths || !b->queries || !b->outs || !b->out_rows || !b->times ||
        !b->device_times || !b->reads) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a batch of %u", batch);
    }
    b->page_offsets[0] = 0;
    for (uint32_t i = 0; i < batch; i++) {
        uint32_t pages = (b->shape->lengths[i] + g->page_size - 1) / g->page_size;
        b->page_offsets[i + 1] = b->page_offsets[i] + pages;
        b->query_lengths[i] = query_length;
        b->queries[i] = random_slice(b, ~(uint64_t)i, (size_t)query_length * g->heads_q * g->head_dim);
        b->outs[i] = b->out_rows + i * out_bytes;
    }
    return attn_ok();
}

static attn_status set_up(bench *b, const attn_shape *shape, const options *options) {
    *b = (bench){.shape = shape};
    b->geometry = (attn_geometry){.layers = 1,
                                  .heads_q = shape->heads_q,
                                  .heads_kv = shape->heads_kv,
                                  .head_dim = shape->head_dim,
                                  .head_dim_v = shape->head_dim,
                                  .dtype = options->dtype,
                                  .page_size = shape->page_size};
    ATTN_TRY(attn_geometry_check(&b->geometry));
    size_t page_bytes = attn_page_bytes(&b->geometry), most = (size_t)(options->pool_gib * (double)GIB);
    uint32_t needed = batch_pages(shape);
    if (needed == 0) return attn_error(ATTN_INVALID_ARGUMENT, "%s: a batch without tokens", shape->name);
    if (needed > most / page_bytes) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "needs %.1f GiB of KV, --pool-gib is %g",
                          (double)needed * (double)page_bytes / (double)GIB, options->pool_gib);
    }
    size_t wanted = COLD_BYTES < most ? COLD_BYTES : most;
    b->sets = wanted / page_bytes > needed ? (uint32_t)(wanted / page_bytes / needed) : 1;
    b->pool_pages = needed * b->sets;
    ATTN_TRY(fill_random(b));
    ATTN_TRY(allocate_batch(b, options->query_length));
    permute_pages(b);
    attn_backend_config config = {.kind = options->backend,
                                  .geometry = b->geometry,
                                  .pages = b->pool_pages,
                                  .workers = options->threads,
                                  .isa = options->isa};
    ATTN_TRY(attn_backend_create(&config, &b->backend));
    return fill_pool(b);
}

static void tear_down(bench *b) {
    attn_backend_destroy(b->backend);
    free(b->random);
    free(b->pages);
    free(b->page_offsets);
    free(b->query_lengths);
    free(b->queries);
    free(b->outs);
    free(b->out_rows);
    free(b->times);
    free(b->device_times);
    free(b->reads);
}

/* ------------------------------------------------------------------------------------------- */
/* The oracle */

typedef struct {
    double difference; /* sums of squares */
    double norm;
} error_sum;

static double load_element(attn_dtype dtype, const char *elements, size_t index) {
    float value;
    size_t bytes = attn_dtype_bytes(dtype);
    attn_elements_to_floats(dtype, elements + index * bytes, &value, 1);
    return value;
}

/* Attention of one query row in float64, from the rows that the pool was filled with. Reads: no causal mask. */
static void attend_exactly(const bench *b, const uint32_t *pages, uint32_t length, const char *query, uint32_t head,
                           float scale, double *scores, double *out) {
    const attn_geometry *g = &b->geometry;
    double row[256], largest = -INFINITY, total = 0;
    for (uint32_t c = 0; c < g->head_dim; c++) {
        row[c] = load_element(g->dtype, query, c);
    }
    for (uint32_t t = 0; t < length; t++) {
        const char *keys = page_keys(b, pages[t / g->page_size]);
        size_t first = ((size_t)(t % g->page_size) * g->heads_kv + head) * g->head_dim;
        scores[t] = 0;
        for (uint32_t c = 0; c < g->head_dim; c++) {
            scores[t] += row[c] * load_element(g->dtype, keys, first + c);
        }
        scores[t] *= scale;
        if (scores[t] > largest) largest = scores[t];
    }
    memset(out, 0, g->head_dim_v * sizeof *out);
    for (uint32_t t = 0; t < length; t++) {
        const char *values = page_values(b, pages[t / g->page_size]);
        size_t first = ((size_t)(t % g->page_size) * g->heads_kv + head) * g->head_dim_v;
        double weight = exp(scores[t] - largest);
        total += weight;
        for (uint32_t c = 0; c < g->head_dim_v; c++) {
            out[c] += weight * load_element(g->dtype, values, first + c);
        }
    }
    for (uint32_t c = 0; c < g->head_dim_v; c++) {
        out[c] /= total;
    }
}

/* Adds the error of all query heads of KV head `head` in sequence i, first query row. */
static void add_error(const bench *b, const uint32_t *pages, uint32_t i, uint32_t head, float scale, double *scores,
                      error_sum *sum) {
    const attn_geometry *g = &b->geometry;
    uint32_t group = g->heads_q / g->heads_kv;
    size_t element = attn_dtype_bytes(g->dtype);
    double exact[256];
    for (uint32_t j = head * group; j < (head + 1) * group; j++) {
        const char *query = (const char *)b->queries[i] + j * g->head_dim * element;
        attend_exactly(b, pages + b->page_offsets[i], b->shape->lengths[i], query, head, scale, scores, exact);
        for (uint32_t c = 0; c < g->head_dim_v; c++) {
            double difference = load_element(g->dtype, b->outs[i], j * g->head_dim_v + c) - exact[c];
            sum->difference += difference * difference;
            sum->norm += exact[c] * exact[c];
        }
    }
}

/* Of the outputs now in b->outs, made with page table `set`. */
static attn_status measure_error(const bench *b, uint32_t set, float scale, double *error) {
    uint32_t batch = b->shape->batch, heads = b->geometry.heads_kv, longest = 1;
    for (uint32_t i = 0; i < batch; i++) {
        if (b->shape->lengths[i] > longest) longest = b->shape->lengths[i];
    }
    double *scores = malloc(longest * sizeof *scores);
    if (scores == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u scores", longest);
    const uint32_t *pages = b->pages + (size_t)set * b->page_offsets[batch];
    uint32_t sequences[] = {0, batch / 2, batch - 1};
    error_sum sum = {0};
    for (uint32_t s = 0; s < 3; s++) {
        if (s > 0 && sequences[s] == sequences[s - 1]) continue;
        add_error(b, pages, sequences[s], 0, scale, scores, &sum);
        if (heads > 1) add_error(b, pages, sequences[s], heads - 1, scale, scores, &sum);
    }
    free(scores);
    *error = sqrt(sum.difference / sum.norm);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Measuring */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t count) {
    qsort(values, count, sizeof *values, compare_doubles);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

static size_t live_bytes(const bench *b) {
    const attn_geometry *g = &b->geometry;
    size_t bytes = 0;
    for (uint32_t i = 0; i < b->shape->batch; i++) {
        bytes += b->shape->lengths[i] * (attn_key_row_bytes(g) + attn_value_row_bytes(g));
        bytes += b->query_lengths[i] * (attn_query_row_bytes(g) + attn_out_row_bytes(g));
    }
    return bytes;
}

typedef struct {
    float scale;
    bool batch_invariant;
    uint32_t set; /* of page tables: the next decode's */
} sequence_of_calls;

/* Decodes with the next page table. */
static attn_status decode_once(const bench *b, sequence_of_calls *calls, bool device_time, double *us,
                               attn_timing *timing) {
    uint32_t batch = b->shape->batch;
    attn_batch call = {
        .size = batch,
        .lengths = b->shape->lengths,
        .query_lengths = b->query_lengths,
        .page_offsets = b->page_offsets,
        .pages = b->pages + (size_t)calls->set * b->page_offsets[batch],
        .queries = b->queries,
        .outs = b->outs,
        .scale = calls->scale,
        .batch_invariant = calls->batch_invariant,
        .device_time = device_time,
    };
    int64_t start = attn_now_ns();
    ATTN_TRY(attn_backend_decode(b->backend, &call, NULL, timing));
    *us = (double)(attn_now_ns() - start) / 1e3;
    calls->set = (calls->set + 1) % b->sets;
    return attn_ok();
}

typedef struct {
    double us;
    double gbps;
    double share;
    double error;
    uint32_t launches;
    double device_us;
    double device_share;
} result;

/* Decodes and plain reads in turn, and on a device a decode with its clock after each. */
static attn_status take_times(bench *b, sequence_of_calls *calls, double seconds, attn_yardstick *yardstick,
                              bool on_device, size_t *count) {
    size_t bytes = live_bytes(b), read_bytes = bytes > LEAST_READ_BYTES ? bytes : LEAST_READ_BYTES;
    int64_t deadline = attn_now_ns() + (int64_t)(seconds * 1e9);
    attn_timing timing;
    double us;
    for (*count = 0; *count < LEAST_MEASUREMENTS || (*count < MOST_MEASUREMENTS && attn_now_ns() < deadline);
         ++*count) {
        ATTN_TRY(decode_once(b, calls, false, &b->times[*count], &timing));
        ATTN_TRY(attn_yardstick_measure(yardstick, read_bytes, &b->reads[*count]));
        if (!on_device) continue;
        ATTN_TRY(decode_once(b, calls, true, &us, &timing));
        b->device_times[*count] = (double)timing.device_ns / 1e3;
    }
    return attn_ok();
}

static attn_status measure(bench *b, const options *options, attn_yardstick *yardstick, result *result) {
    sequence_of_calls calls = {.scale = 1.0f / sqrtf((float)b->geometry.head_dim),
                               .batch_invariant = options->batch_invariant};
    attn_timing timing;
    size_t count;
    double us;
    ATTN_TRY(decode_once(b, &calls, false, &us, &timing)); /* warms threads and buffers, not the caches */
    ATTN_TRY(measure_error(b, 0, calls.scale, &result->error));
    bool on_device = timing.launches > 0;
    ATTN_TRY(take_times(b, &calls, options->seconds, yardstick, on_device, &count));
    double kilobytes = (double)live_bytes(b) / 1e3, read_gbps = median(b->reads, count);
    result->us = median(b->times, count);
    result->gbps = kilobytes / result->us;
    result->share = result->gbps / read_gbps;
    result->launches = timing.launches;
    result->device_us = on_device ? median(b->device_times, count) : (double)NAN;
    result->device_share = kilobytes / result->device_us / read_gbps;
    return attn_ok();
}

static double error_bound(attn_dtype dtype) {
    switch (dtype) {
    case ATTN_BF16: return 2.5e-3;
    case ATTN_FP16: return 4e-4;
    case ATTN_FP32: return 2e-6;
    case ATTN_FP8_E4M3: break; /* no dtype of outputs */
    }
    return 0;
}

/* Runs one shape and prints its line; false if its error is too large. */
static attn_status run_shape(const attn_shape *shape, const options *options, attn_yardstick *yardstick, bool *good) {
    bench b;
    result result = {0};
    attn_status status = set_up(&b, shape, options);
    if (status.code == ATTN_RESOURCE_EXHAUSTED) {
        fprintf(stderr, "skipped: %s: %s\n", shape->name, status.message);
        status = attn_ok();
        goto cleanup;
    }
    if (attn_failed(status) || b.backend == NULL) goto cleanup;
    ATTN_TRY_GOTO(status, measure(&b, options, yardstick, &result), cleanup);
    printf("%s,%.1f,%.2f,%.3f,%.2e,%u,%.1f,%.3f\n", shape->name, result.us, result.gbps, result.share, result.error,
           result.launches, result.device_us, result.device_share);
    fflush(stdout);
    if (!(result.error <= error_bound(options->dtype))) *good = false;
cleanup:
    tear_down(&b);
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* The command line */

static bool parse_dtype(const char *name, attn_dtype *dtype) {
    for (attn_dtype candidate = ATTN_BF16; candidate <= ATTN_FP32; candidate++) {
        if (strcmp(name, attn_dtype_name(candidate)) == 0) {
            *dtype = candidate;
            return true;
        }
    }
    return false;
}

static bool parse_count(const char *text, uint32_t most, uint32_t *count) {
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (end == text || *end != '\0' || value < 1 || value > most) return false;
    *count = (uint32_t)value;
    return true;
}

static bool parse_positive(const char *text, double *number) {
    char *end;
    *number = strtod(text, &end);
    return end != text && *end == '\0' && *number > 0 && isfinite(*number);
}

/* False, with a line on stderr, if the arguments are wrong. */
static bool parse_options(int argc, char **argv, options *options) {
    static const struct option names[] = {
        {"shapes", required_argument, NULL, 's'},
        {"backend", required_argument, NULL, 'b'},
        {"threads", required_argument, NULL, 't'},
        {"dtype", required_argument, NULL, 'd'},
        {"isa", required_argument, NULL, 'i'},
        {"seconds-per-shape", required_argument, NULL, 'S'},
        {"filter", required_argument, NULL, 'f'},
        {"pool-gib", required_argument, NULL, 'p'},
        {"query-length", required_argument, NULL, 'q'},
        {"batch-invariant", no_argument, NULL, 'B'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int name;
    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        bool good = true;
        switch (name) {
        case 's': options->shapes = optarg; break;
        case 'b': options->backend = optarg; break;
        case 't': good = parse_count(optarg, 1024, &options->threads); break;
        case 'd': good = parse_dtype(optarg, &options->dtype); break;
        case 'i': options->isa = optarg; break;
        case 'S': good = parse_positive(optarg, &options->seconds); break;
        case 'f': options->filter = optarg; break;
        case 'p': good = parse_positive(optarg, &options->pool_gib); break;
        case 'q': good = parse_count(optarg, ATTN_MAX_QUERY_LENGTH, &options->query_length); break;
        case 'B': options->batch_invariant = true; break;
        case 'h': fputs(help_text, stdout); exit(0);
        default: return false;
        }
        if (!good) {
            fprintf(stderr, "decode: a bad value: %s; see --help\n", optarg);
            return false;
        }
    }
    if (options->shapes == NULL) fputs("decode: --shapes FILE is missing; see --help\n", stderr);
    if (optind < argc) fprintf(stderr, "decode: what is %s? see --help\n", argv[optind]);
    return options->shapes != NULL && optind == argc;
}

int main(int argc, char **argv) {
    options options = {.backend = "cpu",
                       .isa = "auto",
                       .dtype = ATTN_BF16,
                       .threads = 2,
                       .query_length = 1,
                       .seconds = 3,
                       .pool_gib = 6};
    if (!parse_options(argc, argv, &options)) return 2;
    attn_shape_list list;
    attn_yardstick *yardstick = NULL;
    bool good = true;
    attn_status status = attn_shape_list_read(&list, options.shapes);
    if (attn_failed(status)) goto cleanup;
    ATTN_TRY_GOTO(status, attn_yardstick_create(options.backend, options.threads, &yardstick), cleanup);
    puts("name,us,gbps,share_of_read,err,launches,device_us,device_share_of_read");
    for (uint32_t i = 0; i < list.count; i++) {
        if (options.filter != NULL && strstr(list.shapes[i].name, options.filter) == NULL) continue;
        ATTN_TRY_GOTO(status, run_shape(&list.shapes[i], &options, yardstick, &good), cleanup);
    }
cleanup:
    if (attn_failed(status)) fprintf(stderr, "decode: %s: %s\n", attn_code_name(status.code), status.message);
    attn_yardstick_destroy(yardstick);
    attn_shape_list_fini(&list);
    if (attn_failed(status)) return 2;
    return good ? 0 : 1;
}
