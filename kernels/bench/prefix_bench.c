/*
 * prefix: times attn_backend_decode for sequences that share their leading pages, told so and not told so, in turn. See
 * the help text below for what is measured and how.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/attention.h"
#include "kernels/bench/yardstick.h"
#include "kernels/dtype.h"

static const char help_text[] =
    "prefix: times one layer's decode attention for sequences that share a prefix, with and without the hint.\n"
    "\n"
    "  --backend KIND       cpu (default), cuda or reference\n"
    "  --threads N          workers of cpu, and threads of the plain read (default 2)\n"
    "  --isa NAME           auto (default), avx512bf16, avx512, avx2, portable\n"
    "  --dtype NAME         bf16 (default), fp16, fp32: KV, queries and outputs\n"
    "  --sequences N        that share the prefix (default 64; cpu and reference: 16)\n"
    "  --prefix N           tokens of the prefix, a multiple of 512 (default 16384; cpu and reference: 4096)\n"
    "  --own N              further tokens of each sequence (default 512; cpu and reference: 128)\n"
    "  --query-length N     query rows a sequence (default 1)\n"
    "  --heads-q N          query heads (default 32)\n"
    "  --heads-kv N         KV heads (default 8)\n"
    "  --head-dim N         of keys and values (default 128)\n"
    "  --page-size N        tokens of a page (default 64)\n"
    "  --seconds S          time for the measurement (default 3), with at least 7 decodes of each kind\n"
    "  --help               this text\n"
    "\n"
    "Prints CSV: sequences,prefix,own,query_length,us_apart,us_shared,speedup,device_us_apart,device_us_shared,\n"
    "            mb_apart,mb_shared,floor_us,err\n"
    "  us_apart, us_shared  median time of a decode without and with the hint. On cuda from the host's memory to\n"
    "                 the host's memory; a backend may find the hint not worth it\n"
    "  speedup        us_apart / us_shared\n"
    "  device_us_..   the same by the device's clock, from decodes of their own; nan on a CPU\n"
    "  mb_apart       10^6 bytes of K, V, queries and outputs if each sequence reads the prefix for itself\n"
    "  mb_shared      the same if the prefix is read once: the least that can be read\n"
    "  floor_us       mb_shared at the plain read's bandwidth, measured between the decodes (see decode --help)\n"
    "  err            ||shared - apart|| / ||apart|| of the outputs\n"
    "\n"
    "Caches are cold: every decode takes the next of several page tables, with the pool's pages permuted at\n"
    "random, over at least 1 GiB. Inputs are uniform in -2 .. 2.\n"
    "Exit status 1 if err is above 5e-3 (bf16), 8e-4 (fp16), 4e-6 (fp32), 2 for bad arguments.\n";

#define COLD_BYTES         ((size_t)1 << 30)
#define LEAST_MEASUREMENTS 7
#define MOST_MEASUREMENTS  5000
#define RANDOM_ELEMENTS    ((size_t)1 << 22)

typedef struct {
    const char *backend;
    const char *isa;
    uint32_t threads;
    uint32_t sequences, prefix, own; /* 0: the backend's default */
    uint32_t query_length;
    double seconds;
    attn_geometry geometry;
} options;

enum { APART, SHARED, KINDS };

typedef struct {
    const options *options;
    attn_geometry geometry;
    attn_backend *backend;
    char *random; /* [RANDOM_ELEMENTS] in dtype: keys, values and queries are slices of it */
    uint32_t prefix_pages, own_pages;
    uint32_t sets;          /* of page tables, each over its own pages */
    uint32_t set;           /* the next decode's */
    uint32_t *pool;         /* [pool_pages] permuted */
    uint32_t pool_pages;    /* [sets] times prefix_pages + sequences * own_pages */
    uint32_t *pages;        /* [sequences, prefix_pages + own_pages] the tables of a decode */
    uint32_t *page_offsets; /* [sequences + 1] */
    uint32_t *lengths, *query_lengths, *members;
    const void **queries;
    void **outs[KINDS];
    char *out_rows[KINDS];
    double *times[KINDS], *device_times[KINDS]; /* [MOST_MEASUREMENTS] us */
    double *reads;                              /* [MOST_MEASUREMENTS] GB/s */
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

static void fill_random(bench *b) {
    float values[1024];
    uint64_t state = 42;
    for (size_t first = 0; first < RANDOM_ELEMENTS; first += 1024) {
        for (int i = 0; i < 1024; i++)
            values[i] = (float)((double)(next_random(&state) >> 11) * 0x1p-51 - 2.0);
        attn_elements_from_floats(b->geometry.dtype, values, b->random + first * attn_dtype_bytes(b->geometry.dtype),
                                  1024);
    }
}

static void permute_pool(bench *b) {
    uint64_t state = 7;
    for (uint32_t i = 0; i < b->pool_pages; i++) {
        uint32_t j = (uint32_t)(next_random(&state) % (i + 1));
        b->pool[i] = b->pool[j];
        b->pool[j] = i;
    }
}

static attn_status fill_pool(bench *b) {
    const attn_geometry *g = &b->geometry;
    size_t elements = (size_t)g->page_size * g->heads_kv * g->head_dim;
    for (uint32_t page = 0; page < b->pool_pages; page++) {
        ATTN_TRY(attn_backend_append(b->backend, 0, &page, 1, 0, g->page_size,
                                     random_slice(b, 2 * (uint64_t)page, elements),
                                     random_slice(b, 2 * (uint64_t)page + 1, elements)));
    }
    return attn_ok();
}

static attn_status allocate(bench *b) {
    const options *o = b->options;
    uint32_t n = o->sequences;
    bool complete = true;
    b->random = malloc(RANDOM_ELEMENTS * attn_dtype_bytes(b->geometry.dtype));
    b->pool = malloc(b->pool_pages * sizeof *b->pool);
    b->pages = malloc((size_t)n * (b->prefix_pages + b->own_pages) * sizeof *b->pages);
    b->page_offsets = malloc((n + (size_t)1) * sizeof *b->page_offsets);
    b->lengths = malloc(n * sizeof *b->lengths);
    b->query_lengths = malloc(n * sizeof *b->query_lengths);
    b->members = malloc(n * sizeof *b->members);
    b->queries = malloc(n * sizeof *b->queries);
    b->reads = malloc(MOST_MEASUREMENTS * sizeof *b->reads);
    for (int kind = 0; kind < KINDS; kind++) {
        b->outs[kind] = malloc(n * sizeof *b->outs[kind]);
        b->out_rows[kind] = malloc(n * o->query_length * attn_out_row_bytes(&b->geometry));
        b->times[kind] = malloc(MOST_MEASUREMENTS * sizeof *b->times[kind]);
        b->device_times[kind] = malloc(MOST_MEASUREMENTS * sizeof *b->device_times[kind]);
        complete &= b->outs[kind] && b->out_rows[kind] && b->times[kind] && b->device_times[kind];
    }
    complete &= b->random && b->pool && b->pages && b->page_offsets && b->lengths && b->query_lengths && b->members &&
                b->queries && b->reads;
    return complete ? attn_ok() : attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u sequences", n);
}

static void describe_sequences(bench *b) {
    const options *o = b->options;
    size_t out_bytes = o->query_length * attn_out_row_bytes(&b->geometry);
    size_t query_elements = (size_t)o->query_length * b->geometry.heads_q * b->geometry.head_dim;
    b->page_offsets[0] = 0;
    for (uint32_t i = 0; i < o->sequences; i++) {
        b->page_offsets[i + 1] = b->page_offsets[i] + b->prefix_pages + b->own_pages;
        b->lengths[i] = o->prefix + o->own;
        b->query_lengths[i] = o->query_length;
        b->members[i] = i;
        b->queries[i] = random_slice(b, ~(uint64_t)i, query_elements);
        for (int kind = 0; kind < KINDS; kind++)
            b->outs[kind][i] = b->out_rows[kind] + i * out_bytes;
    }
}

static attn_status set_up(bench *b, const options *options) {
    *b = (bench){.options = options, .geometry = options->geometry};
    uint32_t page_size = b->geometry.page_size;
    ATTN_TRY(attn_geometry_check(&b->geometry));
    b->prefix_pages = options->prefix / page_size;
    b->own_pages = (options->own + page_size - 1) / page_size;
    size_t needed = b->prefix_pages + (size_t)options->sequences * b->own_pages;
    size_t set_bytes = needed * attn_page_bytes(&b->geometry);
    b->sets = set_bytes < COLD_BYTES ? (uint32_t)(COLD_BYTES / set_bytes) : 1;
    b->pool_pages = (uint32_t)(needed * b->sets);
    ATTN_TRY(allocate(b));
    fill_random(b);
    permute_pool(b);
    describe_sequences(b);
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
    free(b->pool);
    free(b->pages);
    free(b->page_offsets);
    free(b->lengths);
    free(b->query_lengths);
    free(b->members);
    free(b->queries);
    free(b->reads);
    for (int kind = 0; kind < KINDS; kind++) {
        free(b->outs[kind]);
        free(b->out_rows[kind]);
        free(b->times[kind]);
        free(b->device_times[kind]);
    }
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

static double megabytes(const bench *b, uint32_t readers_of_prefix) {
    const options *o = b->options;
    const attn_geometry *g = &b->geometry;
    uint64_t tokens = (uint64_t)readers_of_prefix * o->prefix + (uint64_t)o->sequences * o->own;
    uint64_t rows = (uint64_t)o->sequences * o->query_length;
    return (double)(tokens * (attn_key_row_bytes(g) + attn_value_row_bytes(g)) +
                    rows * (attn_query_row_bytes(g) + attn_out_row_bytes(g))) /
           1e6;
}

/* The tables of set `set`: the prefix's pages in all of them, then each sequence's own. */
static void fill_tables(bench *b, uint32_t set) {
    uint32_t *page = b->pages;
    const uint32_t *prefix = b->pool + (size_t)set * (b->pool_pages / b->sets), *own = prefix + b->prefix_pages;
    for (uint32_t i = 0; i < b->options->sequences; i++) {
        memcpy(page, prefix, b->prefix_pages * sizeof *page);
        memcpy(page + b->prefix_pages, own, b->own_pages * sizeof *page);
        page += b->prefix_pages + b->own_pages;
        own += b->own_pages;
    }
}

/* Decodes with the tables as they are. */
static attn_status decode_once(bench *b, int kind, bool device_time, double *us, attn_timing *timing) {
    const options *o = b->options;
    const attn_prefix prefix = {.members = b->members, .count = o->sequences, .tokens = o->prefix};
    attn_batch call = {
        .size = o->sequences,
        .lengths = b->lengths,
        .query_lengths = b->query_lengths,
        .page_offsets = b->page_offsets,
        .pages = b->pages,
        .queries = b->queries,
        .outs = b->outs[kind],
        .prefixes = kind == SHARED ? &prefix : NULL,
        .prefix_count = kind == SHARED,
        .scale = 1.0f / sqrtf((float)b->geometry.head_dim),
        .device_time = device_time,
    };
    int64_t start = attn_now_ns();
    ATTN_TRY(attn_backend_decode(b->backend, &call, NULL, timing));
    *us = (double)(attn_now_ns() - start) / 1e3;
    return attn_ok();
}

static void next_set(bench *b) {
    fill_tables(b, b->set);
    b->set = (b->set + 1) % b->sets;
}

/* One decode of a kind, and on a device one more with its clock, over fresh tables each. */
static attn_status take_time(bench *b, int kind, size_t n) {
    attn_timing timing;
    double us;
    next_set(b);
    ATTN_TRY(decode_once(b, kind, false, &b->times[kind][n], &timing));
    b->device_times[kind][n] = (double)NAN;
    if (timing.launches == 0) return attn_ok();
    next_set(b);
    ATTN_TRY(decode_once(b, kind, true, &us, &timing));
    b->device_times[kind][n] = (double)timing.device_ns / 1e3;
    return attn_ok();
}

static attn_status take_times(bench *b, attn_yardstick *yardstick, size_t *count) {
    int64_t deadline = attn_now_ns() + (int64_t)(b->options->seconds * 1e9);
    for (*count = 0; *count < LEAST_MEASUREMENTS || (*count < MOST_MEASUREMENTS && attn_now_ns() < deadline);
         ++*count) {
        int first = *count % 2 ? SHARED : APART; /* neither always comes right after the plain read */
        ATTN_TRY(take_time(b, first, *count));
        ATTN_TRY(take_time(b, first == APART ? SHARED : APART, *count));
        ATTN_TRY(attn_yardstick_measure(yardstick, (size_t)64 << 20, &b->reads[*count]));
    }
    return attn_ok();
}

/* Decodes both kinds over the same tables, which also warms threads and buffers. */
static attn_status compare(bench *b, double *error) {
    attn_timing timing;
    double us, difference = 0, norm = 0;
    next_set(b);
    for (int kind = 0; kind < KINDS; kind++)
        ATTN_TRY(decode_once(b, kind, false, &us, &timing));
    size_t rows = (size_t)b->options->sequences * b->options->query_length * b->geometry.heads_q;
    size_t row_bytes = b->geometry.head_dim_v * attn_dtype_bytes(b->geometry.dtype);
    for (size_t row = 0; row < rows; row++) {
        float apart[256], shared[256];
        attn_elements_to_floats(b->geometry.dtype, b->out_rows[APART] + row * row_bytes, apart, b->geometry.head_dim_v);
        attn_elements_to_floats(b->geometry.dtype, b->out_rows[SHARED] + row * row_bytes, shared,
                                b->geometry.head_dim_v);
        for (uint32_t c = 0; c < b->geometry.head_dim_v; c++) {
            double off = (double)shared[c] - apart[c];
            difference += off * off;
            norm += (double)apart[c] * apart[c];
        }
    }
    *error = sqrt(difference / norm);
    return attn_ok();
}

static attn_status measure(bench *b, attn_yardstick *yardstick, double *error) {
    const options *o = b->options;
    size_t count;
    ATTN_TRY(compare(b, error));
    ATTN_TRY(take_times(b, yardstick, &count));
    double apart = median(b->times[APART], count), shared = median(b->times[SHARED], count);
    double mb_apart = megabytes(b, o->sequences), mb_shared = megabytes(b, 1);
    printf("%u,%u,%u,%u,%.1f,%.1f,%.2f,%.1f,%.1f,%.1f,%.1f,%.1f,%.2e\n", o->sequences, o->prefix, o->own,
           o->query_length, apart, shared, apart / shared, median(b->device_times[APART], count),
           median(b->device_times[SHARED], count), mb_apart, mb_shared, mb_shared * 1e3 / median(b->reads, count),
           *error);
    return attn_ok();
}

static double error_bound(attn_dtype dtype) {
    switch (dtype) {
    case ATTN_BF16: return 5e-3;
    case ATTN_FP16: return 8e-4;
    case ATTN_FP32: return 4e-6;
    case ATTN_FP8_E4M3: break; /* no dtype of outputs */
    }
    return 0;
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

static void fill_defaults(options *options) {
    bool on_device = strcmp(options->backend, "cuda") == 0;
    if (options->sequences == 0) options->sequences = on_device ? 64 : 16;
    if (options->prefix == 0) options->prefix = on_device ? 16384 : 4096;
    if (options->own == 0) options->own = on_device ? 512 : 128;
    options->geometry.head_dim_v = options->geometry.head_dim;
}

/* False, with a line on stderr, if the arguments are wrong. */
static bool parse_options(int argc, char **argv, options *options) {
    static const struct option names[] = {
        {"backend", required_argument, NULL, 'b'},
        {"threads", required_argument, NULL, 't'},
        {"isa", required_argument, NULL, 'i'},
        {"dtype", required_argument, NULL, 'd'},
        {"sequences", required_argument, NULL, 'n'},
        {"prefix", required_argument, NULL, 'p'},
        {"own", required_argument, NULL, 'o'},
        {"query-length", required_argument, NULL, 'q'},
        {"heads-q", required_argument, NULL, 'H'},
        {"heads-kv", required_argument, NULL, 'G'},
        {"head-dim", required_argument, NULL, 'D'},
        {"page-size", required_argument, NULL, 'P'},
        {"seconds", required_argument, NULL, 'S'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    enum { MOST_TOKENS = 1 << 22 };
    int name;
    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        bool good = true;
        switch (name) {
        case 'b': options->backend = optarg; break;
        case 't': good = parse_count(optarg, 1024, &options->threads); break;
        case 'i': options->isa = optarg; break;
        case 'd': good = parse_dtype(optarg, &options->geometry.dtype); break;
        case 'n': good = parse_count(optarg, 65536, &options->sequences) && options->sequences > 1; break;
        case 'p':
            good = parse_count(optarg, MOST_TOKENS, &options->prefix) && options->prefix % ATTN_CHUNK_TOKENS == 0;
            break;
        case 'o': good = parse_count(optarg, MOST_TOKENS, &options->own); break;
        case 'q': good = parse_count(optarg, ATTN_MAX_QUERY_LENGTH, &options->query_length); break;
        case 'H': good = parse_count(optarg, 4096, &options->geometry.heads_q); break;
        case 'G': good = parse_count(optarg, 4096, &options->geometry.heads_kv); break;
        case 'D': good = parse_count(optarg, 256, &options->geometry.head_dim); break;
        case 'P': good = parse_count(optarg, 128, &options->geometry.page_size); break;
        case 'S': good = parse_positive(optarg, &options->seconds); break;
        case 'h': fputs(help_text, stdout); exit(0);
        default: return false;
        }
        if (!good) {
            fprintf(stderr, "prefix: a bad value: %s; see --help\n", optarg);
            return false;
        }
    }
    if (optind < argc) fprintf(stderr, "prefix: what is %s? see --help\n", argv[optind]);
    fill_defaults(options);
    return optind == argc;
}

int main(int argc, char **argv) {
    options options = {
        .backend = "cpu",
        .isa = "auto",
        .threads = 2,
        .query_length = 1,
        .seconds = 3,
        .geometry = {.layers = 1, .heads_q = 32, .heads_kv = 8, .head_dim = 128, .dtype = ATTN_BF16, .page_size = 64},
    };
    if (!parse_options(argc, argv, &options)) return 2;
    bench b = {0};
    attn_yardstick *yardstick = NULL;
    double error = 0;
    attn_status status = set_up(&b, &options);
    if (attn_failed(status)) goto cleanup;
    ATTN_TRY_GOTO(status, attn_yardstick_create(options.backend, options.threads, &yardstick), cleanup);
    puts("sequences,prefix,own,query_length,us_apart,us_shared,speedup,device_us_apart,device_us_shared,"
         "mb_apart,mb_shared,floor_us,err");
    ATTN_TRY_GOTO(status, measure(&b, yardstick, &error), cleanup);
cleanup:
    if (attn_failed(status)) fprintf(stderr, "prefix: %s: %s\n", attn_code_name(status.code), status.message);
    attn_yardstick_destroy(yardstick);
    tear_down(&b);
    if (attn_failed(status)) return 2;
    return error <= error_bound(options.geometry.dtype) ? 0 : 1;
}
