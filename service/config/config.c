#define _GNU_SOURCE

#include "service/config/config.h"

#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "service/config/document.h"
#include "service/config/scales.h"
#include "service/config/settings.h"

#define FILE_BYTES_MAX      (1 << 20)
#define SCALES_BYTES_MAX    (4 << 20)
#define PLACE_BYTES         256
#define TOKEN_BYTES_MIN     16
#define TOKEN_BYTES_MAX     4096
#define DEFAULT_POOL_BYTES  ((uint64_t)1 << 30)
#define DEFAULT_PAGES_LEAST 64

/* ------------------------------------------------------------------------------------------- */
/* Defaults */

static attn_status set_defaults(attn_config *config) {
    memset(config, 0, sizeof(*config));
    for (size_t i = 0; i < attn_settings_count; i++) {
        const attn_setting *setting = &attn_settings[i];
        if (setting->initial != NULL) ATTN_TRY(attn_setting_apply(setting, setting->flag, setting->initial, config));
    }
    return attn_ok();
}

static uint32_t usable_cores(void) {
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof(cores), &cores) != 0) return 1;
    return (uint32_t)CPU_COUNT(&cores);
}

/* ------------------------------------------------------------------------------------------- */
/* The file */

/* A whole file, terminated, which the caller frees; or NULL and why in *status. `place` begins the messages. */
static char *read_file(const char *place, const char *path, size_t most, size_t *size, attn_status *status) {
    FILE *file = fopen(path, "rbe");
    char *read = malloc(most + 2);
    char *bytes = NULL;
    *status = attn_ok();
    if (file == NULL) {
        *status = attn_error(ATTN_INVALID_ARGUMENT, "%s: cannot open '%s': %s", place, path, strerror(errno));
        goto cleanup;
    }
    if (read == NULL) {
        *status = attn_error(ATTN_RESOURCE_EXHAUSTED, "%s: no memory to read '%s'", place, path);
        goto cleanup;
    }
    *size = fread(read, 1, most + 1, file);
    if (ferror(file)) {
        *status = attn_error(ATTN_INVALID_ARGUMENT, "%s: cannot read '%s': %s", place, path, strerror(errno));
    } else if (*size > most) {
        *status = attn_error(ATTN_INVALID_ARGUMENT, "%s: '%s' is larger than %zu bytes", place, path, most);
    } else {
        read[*size] = '\0';
        bytes = read;
        read = NULL;
    }
cleanup:
    free(read);
    if (file != NULL) fclose(file);
    return bytes;
}

static attn_status check_token(const char *place, const char *token) {
    size_t length = strlen(token);
    if (length < TOKEN_BYTES_MIN || length > TOKEN_BYTES_MAX) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: a token has %d to %d bytes, this one %zu", place, TOKEN_BYTES_MIN,
                          TOKEN_BYTES_MAX, length);
    }
    for (size_t i = 0; i < length; i++) {
        if (token[i] <= ' ' || token[i] > '~') {
            return attn_error(ATTN_INVALID_ARGUMENT, "%s: a token has printable ASCII characters only, and no spaces",
                              place);
        }
    }
    return attn_ok();
}

/* The first line of the file. */
static attn_status read_token_file(attn_config *config, const char *place, const char *path, const char **token) {
    attn_status status;
    size_t size = 0;
    char *bytes = read_file(place, path, TOKEN_BYTES_MAX + 2, &size, &status);
    if (bytes == NULL) return status;
    bytes[strcspn(bytes, "\r\n")] = '\0';
    status = attn_config_copy(config, bytes, token);
    explicit_bzero(bytes, size);
    free(bytes);
    return status;
}

/* After the tenants, whose tokens it differs from. */
static attn_status complete_admin(attn_config *config) {
    static const char place[] = "auth.admin_token_file";
    if (config->admin_token_file == NULL) return attn_ok();
    ATTN_TRY(read_token_file(config, place, config->admin_token_file, &config->admin_token));
    ATTN_TRY(check_token(place, config->admin_token));
    for (uint32_t i = 0; i < config->tenant_count; i++) {
        if (strcmp(config->admin_token, config->tenants[i].token) == 0) {
            return attn_error(ATTN_INVALID_ARGUMENT, "%s: the token is also that of auth.tenants[%u]", place, i);
        }
    }
    return attn_ok();
}

/* "file: auth.tenants[3].key" */
static const char *tenant_place(char place[PLACE_BYTES], const char *name, uint32_t index, const char *key) {
    snprintf(place, PLACE_BYTES, "%.128s: auth.tenants[%u].%s", name, index, key);
    return place;
}

static attn_status apply_tenant(attn_config *config, const char *name, uint32_t index, const attn_document_tenant *from,
                                attn_config_tenant *tenant) {
    char place[PLACE_BYTES];
    if (from->name == NULL || from->name[0] == '\0') {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: is missing", tenant_place(place, name, index, "name"));
    }
    if ((from->token == NULL) == (from->token_file == NULL)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: exactly one of token and token_file is needed",
                          tenant_place(place, name, index, "token"));
    }
    ATTN_TRY(attn_config_copy(config, from->name, &tenant->name));
    if (from->token_file != NULL) {
        tenant_place(place, name, index, "token_file");
        ATTN_TRY(read_token_file(config, place, from->token_file, &tenant->token));
    } else {
        tenant_place(place, name, index, "token");
        ATTN_TRY(attn_config_copy(config, from->token, &tenant->token));
    }
    ATTN_TRY(check_token(place, tenant->token));
    if (from->max_pages != NULL) {
        tenant_place(place, name, index, "max_pages");
        ATTN_TRY(attn_setting_number(place, from->max_pages, 0, UINT64_MAX, &tenant->max_pages));
    }
    if (from->max_sequences != NULL) {
        tenant_place(place, name, index, "max_sequences");
        ATTN_TRY(attn_setting_number(place, from->max_sequences, 0, UINT64_MAX, &tenant->max_sequences));
    }
    return attn_ok();
}

static attn_status apply_tenants(attn_config *config, const char *name, const attn_document *document) {
    char place[PLACE_BYTES];
    uint32_t count = document->tenant_count;
    if (count == 0) return attn_ok();
    if (count > ATTN_CONFIG_MAX_TENANTS) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: auth.tenants: %u are too many, at most %d", name, count,
                          ATTN_CONFIG_MAX_TENANTS);
    }
    attn_config_tenant *tenants = attn_config_allocate(config, count * sizeof(*tenants));
    if (tenants == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the configuration");
    for (uint32_t i = 0; i < count; i++) {
        ATTN_TRY(apply_tenant(config, name, i, &document->tenants[i], &tenants[i]));
        for (uint32_t j = 0; j < i; j++) {
            if (strcmp(tenants[i].name, tenants[j].name) == 0) {
                return attn_error(ATTN_INVALID_ARGUMENT, "%s: '%.40s' is also that of tenants[%u]",
                                  tenant_place(place, name, i, "name"), tenants[i].name, j);
            }
            if (strcmp(tenants[i].token, tenants[j].token) == 0) {
                return attn_error(ATTN_INVALID_ARGUMENT, "%s: is also that of tenants[%u]",
                                  tenant_place(place, name, i, "token"), j);
            }
        }
    }
    config->tenants = tenants;
    config->tenant_count = count;
    return attn_ok();
}

static attn_status apply_document(attn_config *config, const char *name, const attn_document *document) {
    for (size_t i = 0; i < attn_settings_count; i++) {
        const attn_setting *setting = &attn_settings[i];
        char place[PLACE_BYTES];
        if (setting->section == NULL) continue;
        snprintf(place, sizeof(place), "%.128s: %s.%s", name, setting->section, setting->key);
        if (setting->kind == ATTN_SETTING_LISTEN && document->listen_count > 0) {
            config->listen_count = 0;
            for (uint32_t j = 0; j < document->listen_count; j++) {
                ATTN_TRY(attn_setting_apply(setting, place, document->listen[j], config));
            }
        }
        if (document->values[i] != NULL) {
            ATTN_TRY(attn_setting_apply(setting, place, document->values[i], config));
        }
    }
    return apply_tenants(config, name, document);
}

static attn_status apply_yaml(attn_config *config, const char *yaml, size_t size, const char *name) {
    attn_document *document = NULL;
    ATTN_TRY(attn_document_load(yaml, size, name, &document));
    if (document == NULL) return attn_ok();
    attn_status status = apply_document(config, name, document);
    for (uint32_t i = 0; i < document->tenant_count; i++) {
        if (document->tenants[i].token != NULL) {
            explicit_bzero(document->tenants[i].token, strlen(document->tenants[i].token));
        }
    }
    attn_document_free(document);
    return status;
}

static attn_status apply_file(attn_config *config, const char *path) {
    attn_status status;
    size_t size = 0;
    char *yaml = read_file("--config", path, FILE_BYTES_MAX, &size, &status);
    if (yaml == NULL) return status;
    status = apply_yaml(config, yaml, size, path);
    explicit_bzero(yaml, size);
    free(yaml);
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* The whole */

static attn_status read_scales(const attn_config *config, float *k_scales, float *v_scales) {
    attn_status status;
    char place[PLACE_BYTES];
    size_t size = 0;
    char *text = read_file("geometry.kv_scales_file", config->kv_scales_file, SCALES_BYTES_MAX, &size, &status);
    if (text == NULL) return status;
    snprintf(place, sizeof(place), "geometry.kv_scales_file: %.200s", config->kv_scales_file);
    status = attn_scales_read(text, size, place, &config->geometry, k_scales, v_scales);
    free(text);
    return status;
}

/* Scales where nothing is scaled are somebody's mistake. */
static attn_status refuse_scales(const attn_config *config) {
    const char *given = NULL;
    if (config->v_scale != 1) given = "v_scale";
    if (config->k_scale != 1) given = "k_scale";
    if (config->kv_scales_file != NULL) given = "kv_scales_file";
    if (given == NULL) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "geometry.%s: scales are for kv_dtype fp8_e4m3; this cache is %s", given,
                      attn_dtype_name(attn_kv_dtype(&config->geometry)));
}

static attn_status complete_scales(attn_config *config) {
    if (attn_kv_dtype(&config->geometry) != ATTN_FP8_E4M3) return refuse_scales(config);
    size_t count = (size_t)config->geometry.layers * config->geometry.heads_kv;
    float *k_scales = attn_config_allocate(config, count * sizeof(*k_scales));
    float *v_scales = attn_config_allocate(config, count * sizeof(*v_scales));
    if (k_scales == NULL || v_scales == NULL) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the configuration");
    }
    if (config->kv_scales_file != NULL) ATTN_TRY(read_scales(config, k_scales, v_scales));
    for (size_t i = 0; i < count; i++) {
        if (k_scales[i] == 0) k_scales[i] = config->k_scale;
        if (v_scales[i] == 0) v_scales[i] = config->v_scale;
    }
    config->k_scales = k_scales;
    config->v_scales = v_scales;
    return attn_ok();
}

/* The defaults that depend on other settings, and what must hold between settings. */
static attn_status complete(attn_config *config) {
    uint32_t cores = usable_cores();
    if (config->geometry.head_dim_v == 0) config->geometry.head_dim_v = config->geometry.head_dim;
    ATTN_TRY(attn_geometry_check(&config->geometry));
    ATTN_TRY(complete_scales(config));
    if (config->pages == 0) {
        uint64_t fit = DEFAULT_POOL_BYTES / attn_page_bytes(&config->geometry);
        config->pages = fit > DEFAULT_PAGES_LEAST ? (uint32_t)fit : DEFAULT_PAGES_LEAST;
    }
    if (config->threads == 0) config->threads = config->ranks > 0 ? cores / config->ranks : cores;
    if (config->threads == 0) config->threads = 1;
    if (config->cq_threads == 0) config->cq_threads = cores < 4 ? 1 : 2;
    if (config->min_serving_ranks > config->ranks) {
        return attn_error(ATTN_INVALID_ARGUMENT, "ranks.min_serving_ranks: %u is above ranks.count (%u)",
                          config->min_serving_ranks, config->ranks);
    }
    return complete_admin(config);
}

attn_status attn_config_parse(const char *yaml, size_t size, const char *name, attn_config *config) {
    attn_status status;
    ATTN_TRY_GOTO(status, set_defaults(config), failed);
    ATTN_TRY_GOTO(status, apply_yaml(config, yaml, size, name), failed);
    ATTN_TRY_GOTO(status, complete(config), failed);
    return status;
failed:
    attn_config_fini(config);
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* Flags */

enum { OPTION_HELP = 256, OPTION_VERSION, OPTION_CONFIG, OPTION_SETTINGS };

/* Long options: help, version, config, and one a setting, numbered by its row. */
static void make_options(struct option options[ATTN_SETTINGS_MAX + 4]) {
    size_t used = 0;
    options[used++] = (struct option){"help", no_argument, NULL, OPTION_HELP};
    options[used++] = (struct option){"version", no_argument, NULL, OPTION_VERSION};
    options[used++] = (struct option){"config", required_argument, NULL, OPTION_CONFIG};
    for (size_t i = 0; i < attn_settings_count; i++) {
        options[used++] = (struct option){attn_settings[i].flag, required_argument, NULL, OPTION_SETTINGS + (int)i};
    }
    options[used] = (struct option){0};
}

/* The next option's number, or -1 at the end; *status says what is wrong with it, if anything. */
static int next_option(int argc, char *const *argv, const struct option *options, attn_status *status) {
    /* '-': in order, other words as option 1. ':': a missing value is told from an unknown flag. */
    int option = getopt_long(argc, argv, "-:", options, NULL);
    switch (option) {
    case 1: *status = attn_error(ATTN_INVALID_ARGUMENT, "'%.60s' is not a flag; see --help", optarg); break;
    case ':': *status = attn_error(ATTN_INVALID_ARGUMENT, "%.60s: a value is missing", argv[optind - 1]); break;
    case '?': *status = attn_error(ATTN_INVALID_ARGUMENT, "%.60s: no such flag; see --help", argv[optind - 1]); break;
    default: *status = attn_ok();
    }
    return option;
}

/* First pass: everything that is no setting. */
static attn_status find_action(int argc, char *const *argv, const struct option *options, const char **file,
                               attn_config_action *action) {
    attn_status status;
    int option;
    *file = NULL;
    *action = ATTN_CONFIG_RUN;
    optind = 0; /* glibc: start afresh */
    while ((option = next_option(argc, argv, options, &status)) != -1) {
        if (attn_failed(status)) return status;
        if (option == OPTION_CONFIG) *file = optarg;
        if (option == OPTION_HELP || option == OPTION_VERSION) {
            *action = option == OPTION_HELP ? ATTN_CONFIG_HELP : ATTN_CONFIG_VERSION;
            return attn_ok();
        }
    }
    if (optind < argc) return attn_error(ATTN_INVALID_ARGUMENT, "'%.60s' is not a flag; see --help", argv[optind]);
    return attn_ok();
}

/* Second pass: the settings. */
static attn_status apply_flags(int argc, char *const *argv, const struct option *options, attn_config *config) {
    attn_status status;
    int option;
    bool listening = false;
    optind = 0;
    while ((option = next_option(argc, argv, options, &status)) != -1) {
        if (option < OPTION_SETTINGS) continue;
        const attn_setting *setting = &attn_settings[option - OPTION_SETTINGS];
        char place[PLACE_BYTES];
        if (setting->kind == ATTN_SETTING_LISTEN && !listening) {
            listening = true;
            config->listen_count = 0;
        }
        snprintf(place, sizeof(place), "--%s", setting->flag);
        ATTN_TRY(attn_setting_apply(setting, place, optarg, config));
    }
    return attn_ok();
}

attn_status attn_config_read(int argc, char *const *argv, attn_config *config, attn_config_action *action) {
    struct option options[ATTN_SETTINGS_MAX + 4];
    const char *file;
    attn_status status;
    opterr = 0;
    make_options(options);
    ATTN_TRY(find_action(argc, argv, options, &file, action));
    if (*action != ATTN_CONFIG_RUN) return attn_ok();
    ATTN_TRY_GOTO(status, set_defaults(config), failed);
    if (file != NULL) ATTN_TRY_GOTO(status, apply_file(config, file), failed);
    ATTN_TRY_GOTO(status, apply_flags(argc, argv, options, config), failed);
    ATTN_TRY_GOTO(status, complete(config), failed);
    return status;
failed:
    attn_config_fini(config);
    return status;
}
