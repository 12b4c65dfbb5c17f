/*
 * engine: times layer calls of the engine, below gRPC, on one rank and on several. See the help text below.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "dp/engine.h"
#include "kernels/isolated.h"

static const char help_text[] =
    "engine: times decode layers of the engine (dp/engine.h), below gRPC, on one rank and on several.\n"
    "\n"
    "  --mode whole            each rank holds BATCH whole sequences; a step has all of them (default)\n"
    "         spread           one sequence a step, on one rank and then spread over all\n"
    "         forks            BATCH sequences of which the first PREFIX tokens are the same: uploaded to each, and\n"
    "                          then forked from one\n"
    "  --backend KIND          cpu (default), cuda or reference\n"
    "  --ranks N               the most ranks (default 2); whole and spread run with 1, 2, 4 .. up to N\n"
    "  --workers N             CPU threads a rank (default 1)\n"
    "  --isolated              each rank in a process of its own\n"
    "  --batch N               sequences a rank (default 64)\n"
    "  --tokens N              tokens a sequence, without the new one of each step (default 4096)\n"
    "  --prefix N              of them, those that forks share (default 0)\n"
    "  --layers N              of a step, one after another (default 1)\n"
    "  --in-flight N           so many steps at a time, each going on by itself from layer to layer, with a share of "
    "the\n"
    "                          sequences (spread: one each; default 1)\n"
    "  --heads-q N --heads-kv N --head-dim N   (default 32, 8, 128)\n"
    "  --dtype NAME            bf16 (default), fp16, fp32\n"
    "  --seconds S             of measurements a row (default 3), with at least 20 steps\n"
    "  --help                  this text\n"
    "\n"
    "Prints CSV: mode,ranks,sequences,tokens,layers,in_flight,p50_us,p99_us,tokens_per_s,device_us,ratio\n"
    "  p50_us, p99_us  from dp_step_layer to its callback; keys and values are appended\n"
    "  tokens_per_s    of one layer: rows of all layers of the steps in flight / the time from the first's call to "
    "the\n"
    "                  last one's callback; the steps begin before that, together\n"
    "  device_us       median of the slowest rank's time on the device's clock, of one call; 0 on a CPU\n"
    "  ratio           whole: tokens_per_s over that of one rank; spread, forks: p50_us over the first row's\n"
    "Exit status 1 if something fails, 2 for bad arguments.\n";

#define RANDOM_ELEMENTS ((size_t)1 << 22)
#define CHUNK_TOKENS    512u
#define LEAST_STEPS     20
#define MOST_CALLS      400000
#define MOST_IN_FLIGHT  16

typedef enum { MODE_WHOLE, MODE_SPREAD, MODE_FORKS } bench_mode;

typedef struct {
    bench_mode mode;
    const char *backend;
    uint32_t ranks, workers, batch, in_flight;
    uint64_t tokens, prefix;
    attn_geometry geometry;
    double seconds;
    bool isolated;
} options;

/* An engine with sequences, and what calls of it need. */
typedef struct {
    const options *chosen;
    dp_engine *engine;
    uint32_t ranks;
    uint64_t *sequences; /* [count] */
    uint32_t count;
    char *random;                 /* [RANDOM_ELEMENTS] in dtype: all rows are slices of it */
    double *times, *device_times; /* of calls: [MOST_CALLS] each */
} bench;

static void fail(const char *what, attn_status status) {
    fprintf(stderr, "engine: %s: %s\n", what, status.message);
    exit(1);
}

static void check(const char *what, attn_status status) {
    if (attn_failed(status)) fail(what, status);
}

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (memory == NULL) fail("memory", attn_error(ATTN_RESOURCE_EXHAUSTED, "no %zu bytes", bytes));
    return memory;
}

/* ------------------------------------------------------------------------------------------- */
/* Rows */

static uint64_t next_random(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Elements of either sign between 0.5 and 2: of the dtype's bits, all of the mantissa and the lowest of the exponent.
 */
static void fill_random(bench *b) {
    attn_dtype dtype = b->chosen->geometry.dtype;
    size_t bytes = RANDOM_ELEMENTS * attn_dtype_bytes(dtype);
    uint64_t state = 42;
    b->random = allocate(bytes);
    for (size_t i = 0; i < bytes / sizeof(uint64_t); i++) {
        uint64_t bits = next_random(&state);
        if (dtype == ATTN_BF16) bits = (bits & 0x80ff80ff80ff80ffu) + 0x3f003f003f003f00u;
        if (dtype == ATTN_FP16) bits = (bits & 0x87ff87ff87ff87ffu) + 0x3800380038003800u;
        if (dtype == ATTN_FP32) bits = (bits & 0x80ffffff80ffffffu) + 0x3f0000003f000000u;
        memcpy(b->random + i * sizeof bits, &bits, sizeof bits);
    }
}

/* A span of random bytes, another one for every index. */
static dp_span random_span(const bench *b, uint64_t index, size_t bytes) {
    size_t all = RANDOM_ELEMENTS * attn_dtype_bytes(b->chosen->geometry.dtype);
    if (bytes > all / 2) fail("rows", attn_error(ATTN_INVALID_ARGUMENT, "a step of %zu bytes is too large", bytes));
    return (dp_span){b->random + next_random(&index) % (all - bytes) / 64 * 64, bytes};
}

static dp_tensor_view view(const dp_span *span) { return (dp_tensor_view){span, 1, span->size}; }

/* ------------------------------------------------------------------------------------------- */
/* Waiting for callbacks */

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done;
    attn_saved_status status;
} waiter;

/* For a chunk, or for all steps in flight. */
static waiter pending = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void finish(attn_status status) {
    pthread_mutex_lock(&pending.lock);
    attn_status_save(&pending.status, status);
    pending.done = true;
    pthread_cond_signal(&pending.changed);
    pthread_mutex_unlock(&pending.lock);
}

static void wait_for(const char *what) {
    pthread_mutex_lock(&pending.lock);
    while (!pending.done)
        pthread_cond_wait(&pending.changed, &pending.lock);
    pending.done = false;
    pthread_mutex_unlock(&pending.lock);
    check(what, attn_status_view(&pending.status));
}

static void chunk_done(dp_upload_chunk *chunk, attn_status status) {
    (void)chunk;
    finish(status);
}

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

/* Room for so many tokens and a new one, in whole chunks. */
static uint64_t room_for(uint64_t tokens) { return (tokens / ATTN_CHUNK_TOKENS + 1) * ATTN_CHUNK_TOKENS; }

static void create_engine(bench *b, uint32_t ranks, uint64_t tokens_a_rank) {
    const options *chosen = b->chosen;
    uint64_t pages = tokens_a_rank / chosen->geometry.page_size;
    dp_config config = {
        .geometry = chosen->geometry,
        .backend = chosen->backend,
        .ranks = ranks,
        .workers_per_rank = chosen->workers,
        .isolated = chosen->isolated,
        .pages_per_rank = (uint32_t)pages,
        .max_sequences = ranks * chosen->batch + 2,
        .max_batch = ranks * chosen->batch,
        .max_sequence_tokens = room_for(chosen->tokens),
        .max_queue = 64,
        .tenants = 1,
    };
    b->ranks = ranks;
    check("engine", dp_engine_create(&config, &b->engine));
}

static uint64_t open_sequence(bench *b, dp_placement placement, uint32_t rank) {
    uint64_t handle = 0;
    uint32_t where = 0;
    check("open", dp_sequences_open(b->engine, 0, 1, placement, rank, &handle, &where));
    return handle;
}

static void upload_layer(bench *b, dp_upload *upload, uint32_t layer, uint64_t tokens, uint64_t seed) {
    const attn_geometry *g = &b->chosen->geometry;
    for (uint64_t first = 0; first < tokens; first += CHUNK_TOKENS) {
        uint32_t count = tokens - first < CHUNK_TOKENS ? (uint32_t)(tokens - first) : CHUNK_TOKENS;
        dp_span keys = random_span(b, seed + 2 * first, count * attn_key_row_bytes(g));
        dp_span values = random_span(b, seed + 2 * first + 1, count * attn_value_row_bytes(g));
        dp_upload_chunk chunk = {.layer = layer,
                                 .token_offset = first,
                                 .tokens = count,
                                 .keys = view(&keys),
                                 .values = view(&values),
                                 .done = chunk_done};
        check("chunk", dp_upload_write(upload, &chunk));
        wait_for("chunk");
    }
}

static void upload(bench *b, uint64_t sequence, uint64_t tokens, uint64_t seed) {
    const attn_geometry *g = &b->chosen->geometry;
    dp_upload *upload = NULL;
    uint64_t length = 0;
    check("upload", dp_upload_begin(b->engine, 0, sequence, tokens, &upload));
    for (uint32_t layer = 0; layer < g->layers; layer++)
        upload_layer(b, upload, layer, tokens, seed + layer);
    check("upload", dp_upload_commit(upload, &length));
    dp_upload_end(upload);
}

static void open_whole(bench *b, uint32_t ranks) {
    const options *chosen = b->chosen;
    create_engine(b, ranks, chosen->batch * room_for(chosen->tokens));
    b->count = ranks * chosen->batch;
    for (uint32_t i = 0; i < b->count; i++) {
        b->sequences[i] = open_sequence(b, DP_EXPLICIT, i % ranks);
        upload(b, b->sequences[i], chosen->tokens, i);
    }
}

static void open_spread(bench *b, uint32_t ranks) {
    const options *chosen = b->chosen;
    create_engine(b, ranks, chosen->in_flight * room_for(chosen->tokens / ranks + ATTN_CHUNK_TOKENS));
    b->count = chosen->in_flight;
    for (uint32_t i = 0; i < b->count; i++) {
        b->sequences[i] = open_sequence(b, ranks > 1 ? DP_SPREAD : DP_LEAST_TOKENS, 0);
        upload(b, b->sequences[i], chosen->tokens, 7 + i);
    }
}

static void open_forks(bench *b, bool are_forks) {
    const options *chosen = b->chosen;
    create_engine(b, 1, (chosen->batch + 1) * room_for(chosen->tokens));
    b->count = chosen->batch;
    uint64_t parent = open_sequence(b, DP_LEAST_TOKENS, 0);
    if (chosen->prefix > 0) upload(b, parent, chosen->prefix, 7);
    for (uint32_t i = 0; i < b->count; i++) {
        uint32_t rank = 0;
        if (are_forks) {
            check("fork", dp_sequence_fork(b->engine, 0, parent, chosen->prefix, &b->sequences[i], &rank));
        } else {
            b->sequences[i] = open_sequence(b, DP_LEAST_TOKENS, 0);
            if (chosen->prefix > 0) upload(b, b->sequences[i], chosen->prefix, 7);
        }
        if (chosen->tokens > chosen->prefix) upload(b, b->sequences[i], chosen->tokens - chosen->prefix, 1000 + i);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Steps */

static double slowest_device_us(const dp_layer_call *call) {
    float slowest = 0;
    for (uint32_t i = 0; i < call->timing_count; i++) {
        if (call->timing[i].device_us > slowest) slowest = call->timing[i].device_us;
    }
    return slowest;
}

/* Steps of all layers with a new token for each sequence, at the same time. */
typedef struct round round;

/* A step. Its owner's, then the callbacks'. */
typedef struct {
    dp_layer_call call; /* first */
    round *round;
    dp_step *step;
    uint32_t first, count; /* sequences */
    dp_span queries, keys, values;
    int64_t start_ns;
    uint64_t seed;
} runner;

struct round {
    bench *b;
    runner runners[MOST_IN_FLIGHT];
    pthread_mutex_t lock; /* guards all below */
    uint32_t running;
    uint32_t calls; /* made in this round and those before it, whose times are kept */
};

static void call_layer(runner *run) {
    const bench *b = run->round->b;
    const attn_geometry *g = &b->chosen->geometry;
    run->queries = random_span(b, run->seed++, run->count * attn_query_row_bytes(g));
    run->keys = random_span(b, run->seed++, run->count * attn_key_row_bytes(g));
    run->values = random_span(b, run->seed++, run->count * attn_value_row_bytes(g));
    run->call.queries = view(&run->queries);
    run->call.new_keys = view(&run->keys);
    run->call.new_values = view(&run->values);
    run->start_ns = attn_now_ns();
    check("layer", dp_step_layer(run->step, &run->call));
}

static void layer_done(dp_layer_call *call, attn_status status) {
    runner *run = (runner *)call;
    round *of = run->round;
    check("layer", status);
    double us = (double)(attn_now_ns() - run->start_ns) / 1e3;
    pthread_mutex_lock(&of->lock);
    of->b->times[of->calls] = us;
    of->b->device_times[of->calls++] = slowest_device_us(call);
    bool was_last_layer = call->committed, was_last_step = was_last_layer && --of->running == 0;
    pthread_mutex_unlock(&of->lock);
    dp_result_release(call->result);
    if (!was_last_layer) {
        call->layer++;
        call_layer(run);
    } else if (was_last_step) {
        finish(attn_ok()); /* the call may be gone */
    }
}

static void begin_step(bench *b, runner *run) {
    dp_step_request request = {.sequences = b->sequences + run->first, .count = run->count};
    check("step", dp_step_begin(b->engine, &request, &run->step));
}

/* The round's tokens are taken off again. Returns the microseconds in which the layers ran. */
static double run_round(round *of, uint64_t number, bool device_time) {
    bench *b = of->b;
    uint32_t steps = b->chosen->in_flight;
    for (uint32_t i = 0; i < steps; i++) {
        uint32_t first = i * b->count / steps, end = (i + 1) * b->count / steps;
        of->runners[i] = (runner){.call = {.deadline_ns = INT64_MAX, .device_time = device_time, .done = layer_done},
                                  .round = of,
                                  .first = first,
                                  .count = end - first,
                                  .seed = (number * steps + i) * 1000};
        begin_step(b, &of->runners[i]);
    }
    of->running = steps;
    int64_t start = attn_now_ns();
    for (uint32_t i = 0; i < steps; i++)
        call_layer(&of->runners[i]);
    wait_for("layer");
    double us = (double)(attn_now_ns() - start) / 1e3;
    for (uint32_t i = 0; i < steps; i++)
        dp_step_end(of->runners[i].step);
    for (uint32_t i = 0; i < b->count; i++)
        check("truncate", dp_sequence_truncate(b->engine, 0, b->sequences[i], b->chosen->tokens));
    return us;
}

static int compare(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return a < b ? -1 : a > b;
}

static double percentile(double *times, uint32_t count, uint32_t percent) {
    qsort(times, count, sizeof *times, compare);
    return times[(uint64_t)count * percent / 100];
}

typedef struct {
    double p50, p99, tokens_per_s, device;
} figures;

static figures measure(bench *b) {
    const options *chosen = b->chosen;
    uint32_t layers = chosen->geometry.layers, calls_a_round = layers * chosen->in_flight, rounds = 0;
    round round = {.b = b, .lock = PTHREAD_MUTEX_INITIALIZER};
    figures found = {0};
    for (uint32_t i = 0; i < LEAST_STEPS; i++) {
        round.calls = 0;
        run_round(&round, i, false);
    }
    round.calls = 0;
    for (uint32_t i = 0; i < LEAST_STEPS && round.calls + calls_a_round <= MOST_CALLS; i++)
        run_round(&round, i, true);
    found.device = percentile(b->device_times, round.calls, 50);
    int64_t end = attn_now_ns() + (int64_t)(chosen->seconds * 1e9);
    double sum = 0;
    round.calls = 0;
    for (; round.calls + calls_a_round <= MOST_CALLS && (rounds < LEAST_STEPS || attn_now_ns() < end); rounds++)
        sum += run_round(&round, rounds, false);
    found.p50 = percentile(b->times, round.calls, 50);
    found.p99 = percentile(b->times, round.calls, 99);
    found.tokens_per_s = (double)b->count * layers * rounds / sum * 1e6;
    return found;
}

/* Measures and closes the engine. `base`: what the ratio is to, set by the first row. */
static void report(bench *b, const char *name, double *base) {
    figures found = measure(b);
    double figure = b->chosen->mode == MODE_WHOLE ? found.tokens_per_s : found.p50;
    if (*base == 0) *base = figure;
    printf("%s,%u,%u,%llu,%u,%u,%.1f,%.1f,%.0f,%.1f,%.3f\n", name, b->ranks, b->count,
           (unsigned long long)b->chosen->tokens, b->chosen->geometry.layers, b->chosen->in_flight, found.p50,
           found.p99, found.tokens_per_s, found.device, figure / *base);
    fflush(stdout);
    check("close", dp_sequences_close(b->engine, 0, b->sequences, b->count));
    dp_engine_destroy(b->engine);
}

static void run(const options *chosen) {
    bench b = {.chosen = chosen};
    double base = 0;
    fill_random(&b);
    b.sequences = allocate((size_t)chosen->ranks * chosen->batch * sizeof *b.sequences);
    b.times = allocate(MOST_CALLS * sizeof *b.times);
    b.device_times = allocate(MOST_CALLS * sizeof *b.device_times);
    printf("mode,ranks,sequences,tokens,layers,in_flight,p50_us,p99_us,tokens_per_s,device_us,ratio\n");
    if (chosen->mode == MODE_FORKS) {
        open_forks(&b, false);
        report(&b, "uploaded", &base);
        open_forks(&b, true);
        report(&b, "forked", &base);
    }
    for (uint32_t ranks = 1; chosen->mode != MODE_FORKS && ranks <= chosen->ranks; ranks *= 2) {
        (chosen->mode == MODE_WHOLE ? open_whole : open_spread)(&b, ranks);
        report(&b, chosen->mode == MODE_WHOLE ? "whole" : "spread", &base);
    }
    free(b.sequences);
    free(b.times);
    free(b.device_times);
    free(b.random);
}

/* ------------------------------------------------------------------------------------------- */
/* Options */

static bool parse_mode(bench_mode *mode, const char *name) {
    static const char *const names[] = {"whole", "spread", "forks"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *mode = (bench_mode)i;
        return true;
    }
    return false;
}

static bool parse_dtype(attn_dtype *dtype, const char *name) {
    for (attn_dtype each = ATTN_BF16; each <= ATTN_FP32; each++) {
        if (strcmp(name, attn_dtype_name(each)) != 0) continue;
        *dtype = each;
        return true;
    }
    return false;
}

static bool parse_number(uint64_t *number, const char *text) {
    char *end;
    *number = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && *end == '\0';
}

static bool parse_seconds(double *seconds, const char *text) {
    char *end;
    *seconds = strtod(text, &end);
    return end != text && *end == '\0' && *seconds > 0;
}

static bool parse_options(options *chosen, int argc, char **argv) {
    static const struct option names[] = {
        {"mode", 1, NULL, 'm'},     {"backend", 1, NULL, 'b'},   {"ranks", 1, NULL, 'r'},    {"workers", 1, NULL, 'w'},
        {"batch", 1, NULL, 'n'},    {"tokens", 1, NULL, 't'},    {"prefix", 1, NULL, 'p'},   {"heads-q", 1, NULL, 'q'},
        {"heads-kv", 1, NULL, 'k'}, {"head-dim", 1, NULL, 'd'},  {"dtype", 1, NULL, 'y'},    {"seconds", 1, NULL, 's'},
        {"layers", 1, NULL, 'l'},   {"in-flight", 1, NULL, 'i'}, {"isolated", 0, NULL, 'o'}, {"help", 0, NULL, 'h'},
        {NULL, 0, NULL, 0}};
    attn_geometry *g = &chosen->geometry;
    bool good = true;
    for (int option; good && (option = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        uint64_t number = 0;
        bool is_number = strchr("oh?", option) == NULL && parse_number(&number, optarg);
        switch (option) {
        case 'm': good = parse_mode(&chosen->mode, optarg); break;
        case 'b': chosen->backend = optarg; break;
        case 'y': good = parse_dtype(&g->dtype, optarg); break;
        case 's': good = parse_seconds(&chosen->seconds, optarg); break;
        case 'r': good = is_number && (chosen->ranks = (uint32_t)number) > 0; break;
        case 'w': good = is_number && (chosen->workers = (uint32_t)number) > 0; break;
        case 'n': good = is_number && (chosen->batch = (uint32_t)number) > 0; break;
        case 't': good = is_number && (chosen->tokens = number) > 0; break;
        case 'p':
            good = is_number;
            chosen->prefix = number;
            break;
        case 'l': good = is_number && (g->layers = (uint32_t)number) > 0; break;
        case 'i': good = is_number && (chosen->in_flight = (uint32_t)number) > 0; break;
        case 'q':
            good = is_number;
            g->heads_q = (uint32_t)number;
            break;
        case 'k':
            good = is_number;
            g->heads_kv = (uint32_t)number;
            break;
        case 'd':
            good = is_number;
            g->head_dim = g->head_dim_v = (uint32_t)number;
            break;
        case 'o': chosen->isolated = true; break;
        case 'h': fputs(help_text, stdout); exit(0);
        default: return false;
        }
    }
    if (!good || optind != argc || chosen->prefix > chosen->tokens) return false;
    if (chosen->mode == MODE_SPREAD) chosen->batch = chosen->in_flight;
    return chosen->in_flight <= MOST_IN_FLIGHT && chosen->in_flight <= chosen->batch &&
           chosen->in_flight * chosen->geometry.layers <= MOST_CALLS;
}

int main(int argc, char **argv) {
    attn_isolated_main(argc, argv);
    options chosen = {.backend = "cpu",
                      .ranks = 2,
                      .workers = 1,
                      .batch = 64,
                      .in_flight = 1,
                      .tokens = 4096,
                      .seconds = 3,
                      .geometry = {.layers = 1,
                                   .heads_q = 32,
                                   .heads_kv = 8,
                                   .head_dim = 128,
                                   .head_dim_v = 128,
                                   .dtype = ATTN_BF16,
                                   .page_size = 64}};
    if (!parse_options(&chosen, argc, argv)) {
        fputs(help_text, stderr);
        return 2;
    }
    run(&chosen);
    return 0;
}
