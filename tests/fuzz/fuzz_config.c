#define _GNU_SOURCE

/*
 * The configuration file. Whatever the text, it is either refused with a message that names the file
 * or a key, or it becomes a configuration that keeps every promise of config.h. Files it
 * names are not there to be read: token_file is cut out of the input.
 */
#include <string.h>

#include "service/config/config.h"
#include "tests/fuzz/fuzz.h"

static void check_promises(const attn_config *config) {
    FUZZ_CHECK(config->listen_count >= 1 && config->listen_count <= ATTN_CONFIG_MAX_LISTEN);
    for (uint32_t i = 0; i < config->listen_count; i++) {
        FUZZ_CHECK(strchr(config->listen[i], ':') != NULL);
    }
    FUZZ_CHECK(config->cq_threads >= 1);
    FUZZ_CHECK(attn_geometry_check(&config->geometry).code == ATTN_OK);
    FUZZ_CHECK(config->ranks >= 1 && config->ranks <= 64 && config->threads >= 1 && config->pages >= 1);
    FUZZ_CHECK(config->backend[0] != '\0' && config->isa[0] != '\0' && config->metrics_address[0] != '\0');
    FUZZ_CHECK(config->max_batch >= 1 && config->max_sequences >= 1 && config->max_queue >= 1);
    FUZZ_CHECK(config->max_message_bytes >= 1 << 20 && config->max_message_bytes < (uint64_t)1 << 31);
    FUZZ_CHECK(config->tenant_count <= ATTN_CONFIG_MAX_TENANTS);
    for (uint32_t i = 0; i < config->tenant_count; i++) {
        FUZZ_CHECK(config->tenants[i].name[0] != '\0' && strlen(config->tenants[i].token) >= 16);
    }
    FUZZ_CHECK(!config->test_faults && config->min_serving_ranks <= config->ranks);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    static const char token_file[] = "token_file";
    attn_config config;
    if (memmem(input, size, token_file, sizeof(token_file) - 1) != NULL) return 0;
    attn_status status = attn_config_parse((const char *)input, size, "f.yaml", &config);
    if (attn_failed(status)) {
        FUZZ_CHECK(status.code == ATTN_INVALID_ARGUMENT);
        FUZZ_CHECK(strncmp(status.message, "f.yaml: ", 8) == 0 || strncmp(status.message, "geometry.", 9) == 0);
        return 0;
    }
    check_promises(&config);
    attn_config_fini(&config);
    return 0;
}
