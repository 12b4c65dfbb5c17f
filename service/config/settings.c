#define _POSIX_C_SOURCE 200809L

#include "service/config/settings.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

static const char *const backend_choices[] = {"auto", "cpu", "reference", "cuda", NULL};
static const char *const isa_choices[] = {"auto", "avx512bf16", "avx512", "avx2", "portable", NULL};
static const char *const isolated_choices[] = {"auto", "true", "false", NULL};
static const char *const page_size_choices[] = {"16", "32", "64", "128", NULL};
static const char *const dtype_choices[] = {"bf16", "fp16", "fp32", NULL};
static const char *const kv_dtype_choices[] = {"auto", "fp8_e4m3", NULL};
static const char *const level_choices[] = {"debug", "info", "warn", "error", "off", NULL};

#define AT(member) offsetof(attn_config, member)

const attn_setting attn_settings[] = {
    {"server", "listen", "listen", "ADDRESS", "127.0.0.1:7400",
     "Where to listen: HOST:PORT (port 0: any free one) or unix:/PATH. May be given several times.",
     ATTN_SETTING_LISTEN, .offset = AT(listen)},
    {"server", "cq_threads", "cq-threads", "N", NULL,
     "Completion queues, with one thread each. Default: 2, or 1 where fewer than 4 cores are usable.", ATTN_SETTING_U32,
     AT(cq_threads), 1, 64, 0, NULL},
    {"server", "grace_ms", "grace-ms", "MS", "10000", "How long a shutdown waits for calls in flight.",
     ATTN_SETTING_U32, AT(grace_ms), 0, 3600000, 0, NULL},
    {"server", "ready_file", "ready-file", "PATH", NULL,
     "Written once the server serves: one address it listens on a line.", ATTN_SETTING_PATH, .offset = AT(ready_file)},

    {"geometry", "layers", "layers", "N", "16", "Layers of the model.", ATTN_SETTING_U32, AT(geometry.layers), 1, 4096,
     0, NULL},
    {"geometry", "heads_q", "heads-q", "N", "32", "Query heads: a multiple of the KV heads, 16 times them at most.",
     ATTN_SETTING_U32, AT(geometry.heads_q), 1, 4096, 0, NULL},
    {"geometry", "heads_kv", "heads-kv", "N", "8", "KV heads.", ATTN_SETTING_U32, AT(geometry.heads_kv), 1, 4096, 0,
     NULL},
    {"geometry", "head_dim", "head-dim", "N", "64", "Width of a head of q and k: 32 .. 256, a multiple of 8.",
     ATTN_SETTING_U32, AT(geometry.head_dim), 32, 256, 8, NULL},
    {"geometry", "head_dim_v", "head-dim-v", "N", NULL, "Width of a head of v and out. Default: as head_dim.",
     ATTN_SETTING_U32, AT(geometry.head_dim_v), 32, 256, 8, NULL},
    {"geometry", "dtype", "dtype", "TYPE", "bf16", "Of q, k, v and out: bf16, fp16 or fp32.", ATTN_SETTING_DTYPE,
     .offset = AT(geometry.dtype)},
    {"geometry", "kv_dtype", "kv-dtype", "TYPE", "auto",
     "What keys and values are stored as: auto (dtype) or, with bf16 and fp16, fp8_e4m3.", ATTN_SETTING_KV_DTYPE,
     .offset = AT(geometry.kv_dtype)},
    {"geometry", "k_scale", "k-scale", "X", "1", "fp8_e4m3: keys are stored as key / X.", ATTN_SETTING_SCALE,
     .offset = AT(k_scale)},
    {"geometry", "v_scale", "v-scale", "X", "1", "fp8_e4m3: values are stored as value / X.", ATTN_SETTING_SCALE,
     .offset = AT(v_scale)},
    {"geometry", "kv_scales_file", "kv-scales-file", "PATH", NULL,
     "fp8_e4m3: scales by layer and KV head, instead of the two above where it has them. A line: LAYER k|v SCALE.., "
     "one scale or one for each KV head.",
     ATTN_SETTING_PATH, .offset = AT(kv_scales_file)},
    {"geometry", "page_size", "page-size", "N", "64", "Tokens a page: 16, 32, 64 or 128.", ATTN_SETTING_U32,
     AT(geometry.page_size), 16, 128, 0, page_size_choices},

    {"ranks", "count", "ranks", "N", "1", "Data-parallel ranks.", ATTN_SETTING_U32, AT(ranks), 1, 64, 0, NULL},
    {"ranks", "backend", "backend", "NAME", "auto", "auto, cpu, reference or cuda.", ATTN_SETTING_CHOICE,
     .offset = AT(backend), .choices = backend_choices},
    {"ranks", "isa", "isa", "NAME", "auto", "Of the cpu backend: auto, avx512bf16, avx512, avx2 or portable.",
     ATTN_SETTING_CHOICE, .offset = AT(isa), .choices = isa_choices},
    {"ranks", "threads", "threads", "N", NULL, "CPU threads a rank. Default: the usable cores over the ranks.",
     ATTN_SETTING_U32, AT(threads), 1, 1024, 0, NULL},
    {"ranks", "pin_cpus", "pin-cpus", "BOOL", "false", "Pin the threads of rank r to cores r * threads and up.",
     ATTN_SETTING_BOOL, .offset = AT(pin_cpus)},
    {"ranks", "isolated", "isolated", "WHEN", "auto",
     "Each rank in a process of its own, so that what breaks one, or its GPU, leaves the others alone: true, false, or "
     "auto: with cuda and more than one rank.",
     ATTN_SETTING_CHOICE, .offset = AT(isolated), .choices = isolated_choices},
    {"ranks", "pages", "pages", "N", NULL, "Pages of a rank's KV cache. Default: as many as fit 1 GiB, at least 64.",
     ATTN_SETTING_U32, AT(pages), 1, 1u << 30, 0, NULL},
    {"ranks", "rebalance_factor", "rebalance-factor", "X", "0",
     "Where one rank holds more than X times the tokens of another, sequences are moved, one at a time, until it does "
     "not. 0: never; else above 1, such as 1.5.",
     ATTN_SETTING_FACTOR, .offset = AT(rebalance_factor)},
    {"ranks", "spread_above_tokens", "spread-above-tokens", "N", "0",
     "A sequence longer than this is spread over all ranks, a second later or so. 0: never.", ATTN_SETTING_U64,
     AT(spread_above_tokens), 0, 1u << 30, 0, NULL},
    {"ranks", "direct_move_bytes", "direct-move-bytes", "N", "268435456",
     "A sequence of so many bytes of keys and values or more moves from GPU to GPU (NCCL), if both ranks have one of "
     "their own; else through the host's memory. 0: never.",
     ATTN_SETTING_U64, AT(direct_move_bytes), 0, UINT64_MAX, 0, NULL},
    {"ranks", "rank_stall_ms", "rank-stall-ms", "MS", "10000",
     "A rank that has work and does not move for so long is lost, as if its device had failed. 0: never.",
     ATTN_SETTING_U32, AT(rank_stall_ms), 0, 3600000, 0, NULL},
    {"ranks", "rank_restart_backoff_ms", "rank-restart-backoff-ms", "MS", "1000",
     "A lost rank is restarted, empty, after so long; after twice that for each loss in a row, up to a minute. "
     "0: only by RestartRank.",
     ATTN_SETTING_U32, AT(rank_restart_backoff_ms), 0, 60000, 0, NULL},
    {"ranks", "min_serving_ranks", "min-serving-ranks", "N", "1", "While fewer ranks serve, health says NOT_SERVING.",
     ATTN_SETTING_U32, AT(min_serving_ranks), 1, 64, 0, NULL},

    {"limits", "max_batch", "max-batch", "N", "1024", "Sequences a step.", ATTN_SETTING_U32, AT(max_batch), 1, 65536, 0,
     NULL},
    {"limits", "max_sequences", "max-sequences", "N", "16384", "Sequences open at once, of all tenants.",
     ATTN_SETTING_U32, AT(max_sequences), 1, 1u << 24, 0, NULL},
    {"limits", "max_sequence_tokens", "max-sequence-tokens", "N", "1048576", "Length of one sequence.",
     ATTN_SETTING_U64, AT(max_sequence_tokens), 1, 1u << 30, 0, NULL},
    {"limits", "max_queue", "max-queue", "N", "256", "Calls waiting for one rank; more are refused.", ATTN_SETTING_U32,
     AT(max_queue), 1, 1u << 20, 0, NULL},
    {"limits", "max_message_mb", "max-message-mb", "MIB", "64", "Size of one request message, in MiB.",
     ATTN_SETTING_MEBIBYTES, AT(max_message_bytes), 1, 2047, 0, NULL},
    {"limits", "step_idle_ms", "step-idle-ms", "MS", "10000",
     "A unary step whose next layer does not come for so long is aborted. 0: never.", ATTN_SETTING_U32,
     AT(step_idle_ms), 0, 86400000, 0, NULL},
    {"limits", "sequence_idle_ms", "sequence-idle-ms", "MS", "0",
     "A sequence not used for so long is closed. 0: never.", ATTN_SETTING_U32, AT(sequence_idle_ms), 0, UINT32_MAX, 0,
     NULL},

    {"auth", "admin_token_file", "admin-token-file", "PATH", NULL,
     "Whoever sends the token in its first line may call RestartRank. Default: nobody may.", ATTN_SETTING_PATH,
     .offset = AT(admin_token_file)},

    {"metrics", "port", "metrics-port", "PORT", "off",
     "Serve /metrics, /healthz and /readyz over HTTP on this port; 0: any free one; off: do not. The usual one is "
     "7401.",
     ATTN_SETTING_METRICS_PORT, .offset = AT(metrics_port)},
    {"metrics", "address", "metrics-address", "IP", "127.0.0.1", "The address for it.", ATTN_SETTING_IP_ADDRESS,
     .offset = AT(metrics_address)},

    {"log", "level", "log-level", "LEVEL", "info", "debug, info, warn, error or off.", ATTN_SETTING_LOG_LEVEL,
     .offset = AT(log_level)},

#ifndef ATTN_RELEASE
    {NULL, NULL, "test-faults", "BOOL", "false",
     "Test aid: SIGUSR1 with the value 256 * ACTION + RANK fails (0), stalls (1) or releases (2) a rank, or breaks "
     "its device (3). Release builds do not have it.",
     ATTN_SETTING_BOOL, .offset = AT(test_faults)},
#endif
};

const size_t attn_settings_count = sizeof(attn_settings) / sizeof(attn_settings[0]);

_Static_assert(sizeof(attn_settings) / sizeof(attn_settings[0]) <= ATTN_SETTINGS_MAX, "raise ATTN_SETTINGS_MAX");

/* ------------------------------------------------------------------------------------------- */
/* What a configuration owns: a list of blocks, freed together. */

typedef struct block {
    struct block *next;
    size_t size;
    max_align_t bytes[];
} block;

void *attn_config_allocate(attn_config *config, size_t size) {
    block *allocated = calloc(1, sizeof(*allocated) + size);
    if (allocated == NULL) return NULL;
    allocated->size = size;
    allocated->next = config->owned;
    config->owned = allocated;
    return allocated->bytes;
}

attn_status attn_config_copy(attn_config *config, const char *text, const char **copy) {
    size_t size = strlen(text) + 1;
    char *bytes = attn_config_allocate(config, size);
    if (bytes == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the configuration");
    memcpy(bytes, text, size);
    *copy = bytes;
    return attn_ok();
}

void attn_config_fini(attn_config *config) {
    for (block *owned = config->owned, *next; owned != NULL; owned = next) {
        volatile unsigned char *bytes = (volatile unsigned char *)owned->bytes;
        next = owned->next;
        for (size_t i = 0; i < owned->size; i++) {
            bytes[i] = 0; /* tokens do not stay in freed memory */
        }
        free(owned);
    }
    config->owned = NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Values */

attn_status attn_setting_number(const char *place, const char *text, uint64_t least, uint64_t most, uint64_t *value) {
    char *end;
    if (text[0] == '\0' || strspn(text, "0123456789") != strlen(text)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.40s' is not a whole number", place, text);
    }
    errno = 0;
    uint64_t parsed = strtoull(text, &end, 10);
    if (errno != 0 || parsed < least || parsed > most) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: %.40s is not within %" PRIu64 " .. %" PRIu64, place, text, least,
                          most);
    }
    *value = parsed;
    return attn_ok();
}

attn_status attn_setting_scale(const char *place, const char *text, float *value) {
    char *end;
    float parsed = strtof(text, &end);
    bool is_plain = text[0] != '\0' && strspn(text, "0123456789.eE+-") == strlen(text);
    if (!is_plain || *end != '\0' || !isfinite(parsed) || parsed <= 0) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.40s' is not a finite number above 0", place, text);
    }
    *value = parsed;
    return attn_ok();
}

/* The index of `text` in a NULL-terminated list. */
static attn_status parse_choice(const char *place, const char *text, const char *const *choices, size_t *index) {
    char list[128] = "";
    for (size_t i = 0; choices[i] != NULL; i++) {
        if (strcmp(choices[i], text) == 0) {
            *index = i;
            return attn_ok();
        }
        size_t used = strlen(list);
        snprintf(list + used, sizeof(list) - used, "%s%s", i == 0 ? "" : ", ", choices[i]);
    }
    return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.40s' is none of %s", place, text, list);
}

static attn_status parse_number(const attn_setting *setting, const char *place, const char *text, uint64_t *value) {
    size_t index = 0;
    if (setting->choices != NULL) ATTN_TRY(parse_choice(place, text, setting->choices, &index));
    ATTN_TRY(attn_setting_number(place, text, setting->least, setting->most, value));
    if (setting->multiple_of != 0 && *value % setting->multiple_of != 0) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: %" PRIu64 " is not a multiple of %" PRIu64, place, *value,
                          setting->multiple_of);
    }
    return attn_ok();
}

static attn_status parse_bool(const char *place, const char *text, bool *value) {
    static const char *const choices[] = {"true", "false", NULL};
    size_t index = 0;
    ATTN_TRY(parse_choice(place, text, choices, &index));
    *value = index == 0;
    return attn_ok();
}

static attn_status check_unix_path(const char *place, const char *path) {
    struct sockaddr_un address;
    if (path[0] != '/') {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: the path in 'unix:%.40s' is not absolute", place, path);
    }
    if (strlen(path) >= sizeof(address.sun_path)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: the path of a unix socket has at most %zu bytes", place,
                          sizeof(address.sun_path) - 1);
    }
    return attn_ok();
}

static attn_status check_listen(const char *place, const char *text) {
    static const char unix_scheme[] = "unix:";
    uint64_t port = 0;
    if (strncmp(text, unix_scheme, strlen(unix_scheme)) == 0) return check_unix_path(place, text + strlen(unix_scheme));
    const char *colon = strrchr(text, ':');
    bool bare_v6 = colon != NULL && text[0] != '[' && memchr(text, ':', (size_t)(colon - text)) != NULL;
    bool open_v6 = colon != NULL && text[0] == '[' && (colon - text < 3 || colon[-1] != ']');
    if (colon == NULL || colon == text || bare_v6 || open_v6 || strpbrk(text, " \t\n/") != NULL) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.60s' is not HOST:PORT, [IPV6]:PORT or unix:/PATH", place,
                          text);
    }
    return attn_setting_number(place, colon + 1, 0, 65535, &port);
}

static attn_status apply_listen(const char *place, const char *text, attn_config *config) {
    ATTN_TRY(check_listen(place, text));
    if (config->listen_count == ATTN_CONFIG_MAX_LISTEN) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: more than %d addresses", place, ATTN_CONFIG_MAX_LISTEN);
    }
    ATTN_TRY(attn_config_copy(config, text, &config->listen[config->listen_count]));
    config->listen_count++;
    return attn_ok();
}

static attn_status apply_metrics_port(const char *place, const char *text, attn_config *config) {
    uint64_t port = 0;
    config->metrics = strcmp(text, "off") != 0;
    if (!config->metrics) return attn_ok();
    if (strspn(text, "0123456789") != strlen(text)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.40s' is neither a port nor off", place, text);
    }
    ATTN_TRY(attn_setting_number(place, text, 0, 65535, &port));
    config->metrics_port = (uint16_t)port;
    return attn_ok();
}

static attn_status apply_factor(const char *place, const char *text, float *value) {
    float parsed = 0;
    bool is_off = strcmp(text, "0") == 0;
    if (!is_off && (attn_failed(attn_setting_scale(place, text, &parsed)) || parsed <= 1)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.40s' is neither 0 nor a finite number above 1", place, text);
    }
    *value = parsed;
    return attn_ok();
}

static attn_status check_ip_address(const char *place, const char *text) {
    struct in6_addr address;
    if (inet_pton(AF_INET, text, &address) == 1 || inet_pton(AF_INET6, text, &address) == 1) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.60s' is not a numeric IPv4 or IPv6 address", place, text);
}

attn_status attn_setting_apply(const attn_setting *setting, const char *place, const char *text, attn_config *config) {
    void *target = (char *)config + setting->offset;
    uint64_t number = 0;
    size_t index = 0;
    switch (setting->kind) {
    case ATTN_SETTING_U32:
        ATTN_TRY(parse_number(setting, place, text, &number));
        *(uint32_t *)target = (uint32_t)number;
        return attn_ok();
    case ATTN_SETTING_U64: return parse_number(setting, place, text, target);
    case ATTN_SETTING_MEBIBYTES:
        ATTN_TRY(parse_number(setting, place, text, &number));
        *(uint64_t *)target = number << 20;
        return attn_ok();
    case ATTN_SETTING_BOOL: return parse_bool(place, text, target);
    case ATTN_SETTING_CHOICE:
        ATTN_TRY(parse_choice(place, text, setting->choices, &index));
        *(const char **)target = setting->choices[index];
        return attn_ok();
    case ATTN_SETTING_PATH:
        if (text[0] == '\0') return attn_error(ATTN_INVALID_ARGUMENT, "%s: the path is empty", place);
        return attn_config_copy(config, text, target);
    case ATTN_SETTING_IP_ADDRESS:
        ATTN_TRY(check_ip_address(place, text));
        return attn_config_copy(config, text, target);
    case ATTN_SETTING_METRICS_PORT: return apply_metrics_port(place, text, config);
    case ATTN_SETTING_DTYPE:
        ATTN_TRY(parse_choice(place, text, dtype_choices, &index));
        *(attn_dtype *)target = (attn_dtype)(ATTN_BF16 + index);
        return attn_ok();
    case ATTN_SETTING_KV_DTYPE:
        ATTN_TRY(parse_choice(place, text, kv_dtype_choices, &index));
        *(attn_dtype *)target = index == 0 ? (attn_dtype)0 : ATTN_FP8_E4M3;
        return attn_ok();
    case ATTN_SETTING_SCALE: return attn_setting_scale(place, text, target);
    case ATTN_SETTING_FACTOR: return apply_factor(place, text, target);
    case ATTN_SETTING_LOG_LEVEL:
        ATTN_TRY(parse_choice(place, text, level_choices, &index));
        *(attn_log_level *)target = (attn_log_level)(ATTN_LOG_DEBUG + index);
        return attn_ok();
    case ATTN_SETTING_LISTEN: return apply_listen(place, text, config);
    }
    return attn_error(ATTN_INTERNAL, "%s: a setting of no kind", place);
}

/* ------------------------------------------------------------------------------------------- */
/* Help */

#define HELP_COLUMN 28
#define HELP_WIDTH  100

/* Words of `text` from the help column on, wrapped. The cursor is at `column` of the first line. */
static void write_wrapped(FILE *out, size_t column, const char *text) {
    while (*text != '\0') {
        size_t word = strcspn(text, " ");
        if (column < HELP_COLUMN) {
            fprintf(out, "%*s", (int)(HELP_COLUMN - column), "");
            column = HELP_COLUMN;
        } else if (column + 1 + word > HELP_WIDTH || column == SIZE_MAX) {
            fprintf(out, "\n%*s", HELP_COLUMN, "");
            column = HELP_COLUMN;
        } else if (column > HELP_COLUMN) {
            fputc(' ', out);
            column++;
        }
        fprintf(out, "%.*s", (int)word, text);
        column += word;
        text += word;
        text += strspn(text, " ");
    }
    fputc('\n', out);
}

static void write_flag(FILE *out, const char *flag, const char *value, const char *help, const char *initial) {
    char text[512];
    int column = fprintf(out, "  --%s%s%s", flag, value[0] == '\0' ? "" : " ", value);
    if (column >= HELP_COLUMN) {
        fputc('\n', out);
        column = 0;
    }
    snprintf(text, sizeof(text), initial == NULL ? "%s" : "%s [%s]", help, initial);
    write_wrapped(out, (size_t)column, text);
}

char *attn_config_help(void) {
    char *help = NULL;
    size_t size;
    const char *section = "";
    FILE *out = open_memstream(&help, &size);
    if (out == NULL) return NULL;
    fputs("Usage: attnd [--config FILE] [FLAGS]\n\n"
          "Attention compute as a remote service: keeps the paged KV cache of a model and runs its decode\n"
          "attention over data-parallel ranks, for frontends that call it over gRPC.\n\n"
          "With no flags it listens on 127.0.0.1:7400 and runs one rank on this machine's CPU.\n"
          "Flags win over the file. The groups below are the file's sections, and a flag's key there is its\n"
          "name with underscores (but --ranks: ranks.count; --metrics-port: metrics.port; --log-level: log.level).\n\n",
          out);
    write_flag(out, "config", "FILE", "Settings as YAML; service/config/attnd.example.yaml shows all of them.", NULL);
    write_flag(out, "help", "", "This text.", NULL);
    write_flag(out, "version", "", "The version.", NULL);
    for (size_t i = 0; i < attn_settings_count; i++) {
        const attn_setting *setting = &attn_settings[i];
        const char *own_section = setting->section != NULL ? setting->section : "(flag only)";
        if (strcmp(own_section, section) != 0) {
            section = own_section;
            fprintf(out, "\n%s%s\n", section, setting->section != NULL ? ":" : "");
        }
        write_flag(out, setting->flag, setting->value, setting->help, setting->initial);
    }
    fputs("\nauth, in the file only: `tenants`, a list of name, token or token_file, max_pages, max_sequences.\n"
          "Without it no credentials are asked for.\n\n"
          "Signals: SIGTERM and SIGINT drain and end the server.\n",
          out);
    if (fclose(out) != 0) {
        free(help);
        return NULL;
    }
    return help;
}
