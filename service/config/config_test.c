#define _POSIX_C_SOURCE 200809L

#include "service/config/config.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define EXAMPLE "service/config/attnd.example.yaml"

/* Reads flags given as a NULL-terminated list; flags[0] stands for the program. */
static attn_status read_flags(const char *const *flags, attn_config *config, attn_config_action *action) {
    int count = 0;
    while (flags[count] != NULL) {
        count++;
    }
    return attn_config_read(count, (char *const *)(uintptr_t)flags, config, action);
}

static attn_config must_read(const char *const *flags) {
    attn_config config;
    attn_config_action action;
    attn_status status = read_flags(flags, &config, &action);
    if (attn_failed(status)) fail_msg("%s", status.message);
    assert_int_equal(action, ATTN_CONFIG_RUN);
    return config;
}

static attn_config must_parse(const char *yaml) {
    attn_config config;
    attn_status status = attn_config_parse(yaml, strlen(yaml), "t.yaml", &config);
    if (attn_failed(status)) fail_msg("%s", status.message);
    return config;
}

static void assert_flags_refused(const char *const *flags, const char *message) {
    attn_config config;
    attn_config_action action;
    attn_status status = read_flags(flags, &config, &action);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    assert_string_equal(status.message, message);
}

static void assert_refused(const char *yaml, const char *message) {
    attn_config config;
    attn_status status = attn_config_parse(yaml, strlen(yaml), "t.yaml", &config);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    assert_string_equal(status.message, message);
}

/* ------------------------------------------------------------------------------------------- */

static void without_flags_the_defaults_are_a_complete_loopback_server(void **state) {
    static const char *const none[] = {"attnd", NULL};
    attn_config config = must_read(none);
    (void)state;
    assert_int_equal(config.listen_count, 1);
    assert_string_equal(config.listen[0], "127.0.0.1:7400");
    assert_string_equal(config.backend, "auto");
    assert_string_equal(config.isolated, "auto");
    assert_string_equal(config.isa, "auto");
    assert_int_equal(config.ranks, 1);
    assert_in_range(config.threads, 1, 1024);
    assert_in_range(config.cq_threads, 1, 2);
    assert_int_equal(config.geometry.layers, 16);
    assert_int_equal(config.geometry.head_dim_v, config.geometry.head_dim);
    assert_int_equal(attn_kv_dtype(&config.geometry), ATTN_BF16);
    assert_true(config.k_scale == 1 && config.v_scale == 1);
    assert_true(config.k_scales == NULL && config.v_scales == NULL);
    assert_int_equal(attn_geometry_check(&config.geometry).code, ATTN_OK);
    assert_int_equal(config.pages, 512); /* of 2 MiB: 1 GiB */
    assert_int_equal(config.max_message_bytes, 64 << 20);
    assert_int_equal(config.tenant_count, 0);
    assert_false(config.metrics);
    assert_int_equal(config.log_level, ATTN_LOG_INFO);
    assert_null(config.ready_file);
    assert_false(config.test_faults);
    assert_int_equal(config.rank_stall_ms, 10000);
    assert_int_equal(config.rank_restart_backoff_ms, 1000);
    assert_int_equal(config.min_serving_ranks, 1);
    assert_null(config.admin_token);
    attn_config_fini(&config);
}

static void the_example_file_is_the_defaults(void **state) {
    static const char *const none[] = {"attnd", NULL};
    static const char *const example[] = {"attnd", "--config", EXAMPLE, NULL};
    attn_config defaults = must_read(none);
    attn_config read = must_read(example);
    (void)state;
    assert_int_equal(read.listen_count, defaults.listen_count);
    assert_string_equal(read.listen[0], defaults.listen[0]);
    assert_string_equal(read.metrics_address, defaults.metrics_address);
    /* What is left, the pointers aside, is the same byte for byte. */
    read.listen[0] = defaults.listen[0];
    read.metrics_address = defaults.metrics_address;
    void *read_owned = read.owned;
    read.owned = defaults.owned;
    assert_memory_equal(&read, &defaults, sizeof(read));
    read.owned = read_owned;
    attn_config_fini(&read);
    attn_config_fini(&defaults);
}

static void every_key_of_the_file_arrives(void **state) {
    (void)state;
    attn_config config =
        must_parse("server: {listen: ['0.0.0.0:1', 'unix:/s'], cq_threads: 3, grace_ms: 4, ready_file: /r}\n"
                   "geometry: {layers: 2, heads_q: 12, heads_kv: 3, head_dim: 40, head_dim_v: 48,\n"
                   "           dtype: fp32, page_size: 128}\n"
                   "ranks: {count: 5, backend: reference, isa: avx2, threads: 6, pin_cpus: true, pages: 7,\n"
                   "        isolated: true, rebalance_factor: 1.5, spread_above_tokens: 8000}\n"
                   "limits: {max_batch: 8, max_sequences: 9, max_sequence_tokens: 10, max_queue: 11,\n"
                   "         max_message_mb: 12, step_idle_ms: 13, sequence_idle_ms: 14}\n"
                   "metrics: {port: 15, address: '::1'}\n"
                   "log: {level: error}\n");
    assert_int_equal(config.listen_count, 2);
    assert_string_equal(config.listen[0], "0.0.0.0:1");
    assert_string_equal(config.listen[1], "unix:/s");
    assert_int_equal(config.cq_threads, 3);
    assert_int_equal(config.grace_ms, 4);
    assert_string_equal(config.ready_file, "/r");
    assert_int_equal(config.geometry.layers, 2);
    assert_int_equal(config.geometry.heads_q, 12);
    assert_int_equal(config.geometry.heads_kv, 3);
    assert_int_equal(config.geometry.head_dim, 40);
    assert_int_equal(config.geometry.head_dim_v, 48);
    assert_int_equal(config.geometry.dtype, ATTN_FP32);
    assert_int_equal(config.geometry.page_size, 128);
    assert_int_equal(config.ranks, 5);
    assert_string_equal(config.backend, "reference");
    assert_string_equal(config.isa, "avx2");
    assert_int_equal(config.threads, 6);
    assert_true(config.pin_cpus);
    assert_int_equal(config.pages, 7);
    assert_string_equal(config.isolated, "true");
    assert_true(config.rebalance_factor == 1.5f);
    assert_int_equal(config.spread_above_tokens, 8000);
    assert_int_equal(config.max_batch, 8);
    assert_int_equal(config.max_sequences, 9);
    assert_int_equal(config.max_sequence_tokens, 10);
    assert_int_equal(config.max_queue, 11);
    assert_int_equal(config.max_message_bytes, 12 << 20);
    assert_int_equal(config.step_idle_ms, 13);
    assert_int_equal(config.sequence_idle_ms, 14);
    assert_true(config.metrics);
    assert_int_equal(config.metrics_port, 15);
    assert_string_equal(config.metrics_address, "::1");
    assert_int_equal(config.log_level, ATTN_LOG_ERROR);
    attn_config_fini(&config);
}

static void flags_win_over_the_file(void **state) {
    char path[] = "/tmp/attnd_config_test_XXXXXX";
    static const char yaml[] = "server: {listen: ['127.0.0.1:1', '127.0.0.1:2']}\nranks: {count: 3, pages: 70}\n";
    const char *const flags[] = {"attnd",      "--ranks", "2",        "--listen", "unix:/a",
                                 "--config",   path,      "--listen", "[::1]:3",  "--metrics-port=0",
                                 "--pin-cpus", "true",    NULL};
    int file = mkstemp(path);
    (void)state;
    assert_int_equal(write(file, yaml, sizeof(yaml) - 1), sizeof(yaml) - 1);
    close(file);
    attn_config config = must_read(flags);
    unlink(path);
    assert_int_equal(config.ranks, 2);
    assert_int_equal(config.pages, 70);
    assert_int_equal(config.listen_count, 2);
    assert_string_equal(config.listen[0], "unix:/a");
    assert_string_equal(config.listen[1], "[::1]:3");
    assert_true(config.metrics);
    assert_int_equal(config.metrics_port, 0);
    assert_true(config.pin_cpus);
    attn_config_fini(&config);
}

static void help_and_version_are_found_among_other_flags(void **state) {
    static const char *const help[] = {"attnd", "--ranks", "2", "--help", NULL};
    static const char *const version[] = {"attnd", "--version", NULL};
    attn_config config;
    attn_config_action action;
    (void)state;
    assert_int_equal(read_flags(help, &config, &action).code, ATTN_OK);
    assert_int_equal(action, ATTN_CONFIG_HELP);
    assert_int_equal(read_flags(version, &config, &action).code, ATTN_OK);
    assert_int_equal(action, ATTN_CONFIG_VERSION);
}

static void help_names_every_flag_within_the_width_of_a_terminal(void **state) {
    static const char *const flags[] = {"--listen ",         "--backend ",           "--isa ",
                                        "--ranks ",          "--threads ",           "--head-dim-v ",
                                        "--page-size ",      "--max-queue ",         "--metrics-port ",
                                        "--config ",         "--version ",           "--help ",
                                        "--ready-file ",     "--grace-ms ",          "--cq-threads ",
                                        "--kv-dtype ",       "--k-scale ",           "--v-scale ",
                                        "--kv-scales-file ", "--rebalance-factor X", "--spread-above-tokens N"};
    char *help = attn_config_help();
    (void)state;
    assert_non_null(help);
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
        if (strstr(help, flags[i]) == NULL) fail_msg("no %s", flags[i]);
    }
    for (const char *line = help; *line != '\0'; line += strcspn(line, "\n") + 1) {
        assert_in_range(strcspn(line, "\n"), 0, 105);
    }
    free(help);
}

static void wrong_flags_are_refused_by_name(void **state) {
    (void)state;
    assert_flags_refused((const char *const[]){"attnd", "--nope", NULL}, "--nope: no such flag; see --help");
    assert_flags_refused((const char *const[]){"attnd", "--ranks", NULL}, "--ranks: a value is missing");
    assert_flags_refused((const char *const[]){"attnd", "word", NULL}, "'word' is not a flag; see --help");
    assert_flags_refused((const char *const[]){"attnd", "--", "word", NULL}, "'word' is not a flag; see --help");
    assert_flags_refused((const char *const[]){"attnd", "--head-dim", "33", NULL},
                         "--head-dim: 33 is not a multiple of 8");
    assert_flags_refused((const char *const[]){"attnd", "--ranks=65", NULL}, "--ranks: 65 is not within 1 .. 64");
    assert_flags_refused((const char *const[]){"attnd", "--ranks", " 2", NULL}, "--ranks: ' 2' is not a whole number");
    assert_flags_refused((const char *const[]){"attnd", "--ranks", "", NULL}, "--ranks: '' is not a whole number");
    assert_flags_refused((const char *const[]){"attnd", "--layers", "99999999999999999999", NULL},
                         "--layers: 99999999999999999999 is not within 1 .. 4096");
    assert_flags_refused((const char *const[]){"attnd", "--config", "/no/such", NULL},
                         "--config: cannot open '/no/such': No such file or directory");
    assert_flags_refused((const char *const[]){"attnd", "--config", "/", NULL},
                         "--config: cannot read '/': Is a directory");
    assert_flags_refused((const char *const[]){"attnd", "--metrics-address", "localhost", NULL},
                         "--metrics-address: 'localhost' is not a numeric IPv4 or IPv6 address");
}

static void unknown_keys_are_refused_with_their_path_and_the_known_ones(void **state) {
    (void)state;
    assert_refused("geometry:\n  layers: 2\n  hed_dim: 64\n",
                   "t.yaml: geometry.hed_dim: unknown key; here are: layers, heads_q, heads_kv, head_dim, "
                   "head_dim_v, dtype, kv_dtype, k_scale, v_scale, kv_scales_file, page_size");
    assert_refused("sever: {}\n",
                   "t.yaml: sever: unknown key; here are: server, geometry, ranks, limits, auth, metrics, log");
    assert_refused("auth: {tenants: [{name: a, token: 0123456789abcdef}, {nam: b}]}\n",
                   "t.yaml: auth.tenants[1].nam: unknown key; here are: name, token, token_file, max_pages, "
                   "max_sequences");
}

static void wrong_values_are_refused_with_their_path(void **state) {
    (void)state;
    assert_refused("geometry: {head_dim: 33}", "t.yaml: geometry.head_dim: 33 is not a multiple of 8");
    assert_refused("geometry: {dtype: int8}", "t.yaml: geometry.dtype: 'int8' is none of bf16, fp16, fp32");
    assert_refused("geometry: {kv_dtype: fp8}", "t.yaml: geometry.kv_dtype: 'fp8' is none of auto, fp8_e4m3");
    assert_refused("geometry: {k_scale: 0}", "t.yaml: geometry.k_scale: '0' is not a finite number above 0");
    assert_refused("geometry: {v_scale: nan}", "t.yaml: geometry.v_scale: 'nan' is not a finite number above 0");
    assert_refused("geometry: {v_scale: 1e99}", "t.yaml: geometry.v_scale: '1e99' is not a finite number above 0");
    assert_refused("geometry: {v_scale: 1 2}", "t.yaml: geometry.v_scale: '1 2' is not a finite number above 0");
    assert_refused("geometry: {v_scale: ''}", "t.yaml: geometry.v_scale: '' is not a finite number above 0");
    assert_refused("ranks: {rebalance_factor: 1}",
                   "t.yaml: ranks.rebalance_factor: '1' is neither 0 nor a finite number above 1");
    assert_refused("ranks: {rebalance_factor: -2}",
                   "t.yaml: ranks.rebalance_factor: '-2' is neither 0 nor a finite number above 1");
    assert_refused("ranks: {rebalance_factor: 1e99}",
                   "t.yaml: ranks.rebalance_factor: '1e99' is neither 0 nor a finite number above 1");
    assert_refused("ranks: {rebalance_factor: ''}",
                   "t.yaml: ranks.rebalance_factor: '' is neither 0 nor a finite number above 1");
    assert_refused("ranks: {spread_above_tokens: x}", "t.yaml: ranks.spread_above_tokens: 'x' is not a whole number");
    assert_refused("geometry: {page_size: 48}", "t.yaml: geometry.page_size: '48' is none of 16, 32, 64, 128");
    assert_refused("ranks: {count: -1}", "t.yaml: ranks.count: '-1' is not a whole number");
    assert_refused("ranks: {count: 2.5}", "t.yaml: ranks.count: '2.5' is not a whole number");
    assert_refused("ranks: {count: }", "t.yaml: ranks.count: '' is not a whole number");
    assert_refused("ranks: {pin_cpus: 1}", "t.yaml: ranks.pin_cpus: '1' is none of true, false");
    assert_refused("log: {level: loud}", "t.yaml: log.level: 'loud' is none of debug, info, warn, error, off");
    assert_refused("metrics: {port: 65536}", "t.yaml: metrics.port: 65536 is not within 0 .. 65535");
    assert_refused("metrics: {port: on}", "t.yaml: metrics.port: 'on' is neither a port nor off");
    assert_refused("server: {ready_file: ''}", "t.yaml: server.ready_file: the path is empty");
}

static void wrong_structure_is_refused_with_its_path_and_line(void **state) {
    (void)state;
    assert_refused("geometry:\n  layers: [1]\n",
                   "t.yaml: geometry.layers: expected a single value, found a list (line 2)");
    assert_refused("geometry:\n  layers: {a: 1}\n",
                   "t.yaml: geometry.layers: expected a single value, found keys with values (line 2)");
    assert_refused("server: {listen: a}", "t.yaml: server.listen: expected a list, found a single value (line 1)");
    assert_refused("geometry: 3", "t.yaml: geometry: expected keys with values, found a single value (line 1)");
    assert_refused("- 1", "t.yaml: expected keys with values, found a list");
    assert_refused("ranks:\n  count: 1\n  count: 2\n", "t.yaml: ranks.count: given twice");
    assert_refused("ranks: {count: &a 1, pages: *a}", "t.yaml: ranks.pages: YAML alias unsupported (line 1)");
}

static void text_that_is_not_yaml_is_refused(void **state) {
    attn_config config;
    (void)state;
    static const char *const broken[] = {"ranks: {count: 1", "\t", "ranks: 'x", "ranks: \xff", "ranks: {\x01: 1}"};
    for (size_t i = 0; i < sizeof(broken) / sizeof(broken[0]); i++) {
        attn_status status = attn_config_parse(broken[i], strlen(broken[i]), "t.yaml", &config);
        assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
        assert_true(strncmp(status.message, "t.yaml: ", 8) == 0);
    }
}

static void an_empty_file_is_the_defaults(void **state) {
    (void)state;
    static const char *const empty[] = {"", "\n", "# nothing\n", "{}", "ranks: {}\n"};
    for (size_t i = 0; i < sizeof(empty) / sizeof(empty[0]); i++) {
        attn_config config = must_parse(empty[i]);
        assert_int_equal(config.listen_count, 1);
        attn_config_fini(&config);
    }
}

static void settings_that_contradict_each_other_are_refused(void **state) {
    (void)state;
    assert_refused("geometry: {heads_q: 30}",
                   "geometry.heads_q is 30: it must be a multiple of heads_kv (8), at most 4096");
    assert_refused("geometry: {heads_q: 34, heads_kv: 2}",
                   "geometry.heads_q is 34: at most 16 query heads may share one of the 2 KV heads");
    assert_refused("geometry: {dtype: fp32, kv_dtype: fp8_e4m3}",
                   "geometry.kv_dtype is fp8_e4m3: with dtype fp32 it must be the same");
    assert_refused("geometry: {k_scale: 0.5}",
                   "geometry.k_scale: scales are for kv_dtype fp8_e4m3; this cache is bf16");
    assert_refused("geometry: {v_scale: 0.5}",
                   "geometry.v_scale: scales are for kv_dtype fp8_e4m3; this cache is bf16");
    assert_refused("geometry: {dtype: fp16, kv_scales_file: /no/such}",
                   "geometry.kv_scales_file: scales are for kv_dtype fp8_e4m3; this cache is fp16");
    assert_refused("ranks: {count: 2, min_serving_ranks: 0}",
                   "t.yaml: ranks.min_serving_ranks: 0 is not within 1 .. 64");
    assert_flags_refused((const char *const[]){"attnd", "--ranks", "2", "--min-serving-ranks", "3", NULL},
                         "ranks.min_serving_ranks: 3 is above ranks.count (2)");
}

static void addresses_are_checked(void **state) {
    static const char *const good[] = {"0.0.0.0:0", "localhost:65535", "[::]:7400", "unix:/run/attnd.sock"};
    static const char *const bad[] = {"localhost", ":7400", "host:",         "host:port", "host:65536",    "::1:7400",
                                      "[::1]",     "[]:1",  "unix:relative", "unix:",     "dns:///host:1", "a b:1"};
    attn_config config;
    attn_config_action action;
    (void)state;
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        const char *const flags[] = {"attnd", "--listen", good[i], NULL};
        config = must_read(flags);
        assert_string_equal(config.listen[0], good[i]);
        attn_config_fini(&config);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        const char *const flags[] = {"attnd", "--listen", bad[i], NULL};
        attn_status status = read_flags(flags, &config, &action);
        if (status.code != ATTN_INVALID_ARGUMENT) fail_msg("%s was taken", bad[i]);
        assert_true(strncmp(status.message, "--listen: ", 10) == 0);
    }
}

/* ------------------------------------------------------------------------------------------- */

#define FP8 "geometry: {layers: 3, heads_q: 4, heads_kv: 2, kv_dtype: fp8_e4m3, k_scale: 0.5, v_scale: 0.25"

static void an_fp8_cache_has_the_scales_of_its_settings(void **state) {
    (void)state;
    attn_config config = must_parse(FP8 "}");
    assert_int_equal(config.geometry.kv_dtype, ATTN_FP8_E4M3);
    for (int i = 0; i < 3 * 2; i++) {
        assert_true(config.k_scales[i] == 0.5f && config.v_scales[i] == 0.25f);
    }
    attn_config_fini(&config);
    config = must_read((const char *const[]){"attnd", "--kv-dtype", "fp8_e4m3", "--k-scale=1.5e-2", NULL});
    assert_true(config.k_scales[0] == 1.5e-2f && config.v_scales[16 * 8 - 1] == 1);
    assert_int_equal(config.pages, 1024); /* of 1 MiB: 1 GiB */
    attn_config_fini(&config);
}

static char scales_path[64]; /* of the last file of scales */

/* A configuration with a file of scales, which is gone again afterwards. */
static attn_status parse_with_scales(const char *scales, size_t size, attn_config *config) {
    char yaml[256];
    strcpy(scales_path, "/tmp/attnd_config_test_XXXXXX");
    int file = mkstemp(scales_path);
    assert_int_equal(write(file, scales, size), size);
    close(file);
    snprintf(yaml, sizeof(yaml), FP8 ", kv_scales_file: %s}", scales_path);
    attn_status status = attn_config_parse(yaml, strlen(yaml), "t.yaml", config);
    unlink(scales_path);
    return status;
}

static void a_file_of_scales_wins_where_it_has_them(void **state) {
    static const char scales[] = "# scales\r\n\n2 v 3 4 # of the last layer\n0\tk 1e-2\n";
    static const float k[] = {1e-2f, 1e-2f, 0.5f, 0.5f, 0.5f, 0.5f}, v[] = {0.25f, 0.25f, 0.25f, 0.25f, 3, 4};
    attn_config config;
    (void)state;
    assert_string_equal(parse_with_scales(scales, sizeof(scales) - 1, &config).message, "");
    assert_memory_equal(config.k_scales, k, sizeof(k));
    assert_memory_equal(config.v_scales, v, sizeof(v));
    attn_config_fini(&config);
    assert_string_equal(parse_with_scales("", 0, &config).message, "");
    assert_true(config.k_scales[0] == 0.5f);
    attn_config_fini(&config);
}

/* `message` is what follows the file's name. */
static void assert_scales_refused(const char *scales, const char *message) {
    attn_config config;
    char expected[256];
    attn_status status = parse_with_scales(scales, strlen(scales), &config);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    snprintf(expected, sizeof(expected), "geometry.kv_scales_file: %s:%s", scales_path, message);
    assert_string_equal(status.message, expected);
}

static void wrong_scales_are_refused_by_their_line(void **state) {
    (void)state;
    assert_scales_refused("0 k 1\n3 k 1\n", "2: 3 is not within 0 .. 2");
    assert_scales_refused("k 1\n", "1: 'k' is not a whole number");
    assert_scales_refused("0\n", "1: after the layer comes k or v, not ''");
    assert_scales_refused("0 q 1\n", "1: after the layer comes k or v, not 'q'");
    assert_scales_refused("0 k", "1: 0 scales; it must be one, or one for each of the 2 KV heads");
    assert_scales_refused("\n0 k 1 2 3", "2: 3 scales; it must be one, or one for each of the 2 KV heads");
    assert_scales_refused("0 k 1 x", "1: 'x' is not a finite number above 0");
    assert_scales_refused("0 k -1", "1: '-1' is not a finite number above 0");
    assert_scales_refused("0 k 1\n0 v 1\n0 k 1\n", "3: layer 0 has its k scales already");
    attn_config config;
    attn_status status = parse_with_scales("0 k 1\0", 6, &config);
    assert_int_equal(status.code, ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(status.message, "is not text"));
    assert_refused(FP8 ", kv_scales_file: /no/such}",
                   "geometry.kv_scales_file: cannot open '/no/such': No such file or directory");
}

static void tenants_have_names_tokens_and_quotas(void **state) {
    char path[] = "/tmp/attnd_config_test_XXXXXX";
    char yaml[256];
    int file = mkstemp(path);
    (void)state;
    assert_int_equal(write(file, "token-from-a-file\r\nmore\n", 24), 24);
    close(file);
    snprintf(yaml, sizeof(yaml),
             "auth:\n  tenants:\n  - {name: a, token: 0123456789abcdef, max_pages: 10, max_sequences: 20}\n"
             "  - name: b\n    token_file: %s\n",
             path);
    attn_config config = must_parse(yaml);
    unlink(path);
    assert_int_equal(config.tenant_count, 2);
    assert_string_equal(config.tenants[0].name, "a");
    assert_string_equal(config.tenants[0].token, "0123456789abcdef");
    assert_int_equal(config.tenants[0].max_pages, 10);
    assert_int_equal(config.tenants[0].max_sequences, 20);
    assert_string_equal(config.tenants[1].name, "b");
    assert_string_equal(config.tenants[1].token, "token-from-a-file");
    assert_int_equal(config.tenants[1].max_pages, 0);
    attn_config_fini(&config);
}

static void wrong_tenants_are_refused_and_tokens_not_repeated(void **state) {
    (void)state;
    assert_refused("auth: {tenants: [{token: 0123456789abcdef}]}", "t.yaml: auth.tenants[0].name: is missing");
    assert_refused("auth: {tenants: [{name: a}]}",
                   "t.yaml: auth.tenants[0].token: exactly one of token and token_file is needed");
    assert_refused("auth: {tenants: [{name: a, token: 0123456789abcdef, token_file: /x}]}",
                   "t.yaml: auth.tenants[0].token: exactly one of token and token_file is needed");
    assert_refused("auth: {tenants: [{name: a, token: secret}]}",
                   "t.yaml: auth.tenants[0].token: a token has 16 to 4096 bytes, this one 6");
    assert_refused("auth: {tenants: [{name: a, token: 'secret with spaces'}]}",
                   "t.yaml: auth.tenants[0].token: a token has printable ASCII characters only, and no spaces");
    assert_refused("auth: {tenants: [{name: a, token_file: /no/such}]}",
                   "t.yaml: auth.tenants[0].token_file: cannot open '/no/such': No such file or directory");
    assert_refused("auth: {tenants: [{name: a, token: 0123456789abcdef}, {name: a, token: 0123456789abcdeg}]}",
                   "t.yaml: auth.tenants[1].name: 'a' is also that of tenants[0]");
    assert_refused("auth: {tenants: [{name: a, token: 0123456789abcdef}, {name: b, token: 0123456789abcdef}]}",
                   "t.yaml: auth.tenants[1].token: is also that of tenants[0]");
    assert_refused("auth: {tenants: [{name: a, token: 0123456789abcdef, max_pages: x}]}",
                   "t.yaml: auth.tenants[0].max_pages: 'x' is not a whole number");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_flags_the_defaults_are_a_complete_loopback_server),
        cmocka_unit_test(the_example_file_is_the_defaults),
        cmocka_unit_test(every_key_of_the_file_arrives),
        cmocka_unit_test(flags_win_over_the_file),
        cmocka_unit_test(help_and_version_are_found_among_other_flags),
        cmocka_unit_test(help_names_every_flag_within_the_width_of_a_terminal),
        cmocka_unit_test(wrong_flags_are_refused_by_name),
        cmocka_unit_test(unknown_keys_are_refused_with_their_path_and_the_known_ones),
        cmocka_unit_test(wrong_values_are_refused_with_their_path),
        cmocka_unit_test(wrong_structure_is_refused_with_its_path_and_line),
        cmocka_unit_test(text_that_is_not_yaml_is_refused),
        cmocka_unit_test(an_empty_file_is_the_defaults),
        cmocka_unit_test(settings_that_contradict_each_other_are_refused),
        cmocka_unit_test(addresses_are_checked),
        cmocka_unit_test(an_fp8_cache_has_the_scales_of_its_settings),
        cmocka_unit_test(a_file_of_scales_wins_where_it_has_them),
        cmocka_unit_test(wrong_scales_are_refused_by_their_line),
        cmocka_unit_test(tenants_have_names_tokens_and_quotas),
        cmocka_unit_test(wrong_tenants_are_refused_and_tokens_not_repeated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
