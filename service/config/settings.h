/*
 * The table of settings: private to service/config. One row gives a setting its key, its flag, its
 * default, its bounds and its help text; flags, YAML keys, checks and --help all come from here.
 */
#ifndef ATTND_SERVICE_CONFIG_SETTINGS_H
#define ATTND_SERVICE_CONFIG_SETTINGS_H

#include <stddef.h>
#include <stdint.h>

#include "service/config/config.h"

typedef enum {
    ATTN_SETTING_U32,
    ATTN_SETTING_U64,
    ATTN_SETTING_MEBIBYTES, /* a uint64_t of bytes */
    ATTN_SETTING_BOOL,
    ATTN_SETTING_CHOICE, /* a string, one of `choices` */
    ATTN_SETTING_PATH,
    ATTN_SETTING_IP_ADDRESS,
    ATTN_SETTING_METRICS_PORT,
    ATTN_SETTING_DTYPE,
    ATTN_SETTING_KV_DTYPE,
    ATTN_SETTING_SCALE,  /* a float, above 0 */
    ATTN_SETTING_FACTOR, /* a float, 0 or above 1 */
    ATTN_SETTING_LOG_LEVEL,
    ATTN_SETTING_LISTEN, /* appended to the list */
} attn_setting_kind;

typedef struct {
    const char *section; /* of the YAML file; NULL: a flag only */
    const char *key;
    const char *flag;    /* without the dashes */
    const char *value;   /* what --help calls the value */
    const char *initial; /* the default, parsed like any value; NULL: left zero */
    const char *help;
    attn_setting_kind kind;
    size_t offset; /* in attn_config */
    uint64_t least, most;
    uint64_t multiple_of;       /* 0: any */
    const char *const *choices; /* NULL-terminated; NULL: any */
} attn_setting;

#define ATTN_SETTINGS_MAX 40

extern const attn_setting attn_settings[];
extern const size_t attn_settings_count;

/*
 * Parses `text` and stores it. `place` begins the message of an error: "--head-dim", or the file and
 * the key path. Strings are copied.
 */
attn_status attn_setting_apply(const attn_setting *setting, const char *place, const char *text, attn_config *config);

/* A number as every setting has it. */
attn_status attn_setting_number(const char *place, const char *text, uint64_t least, uint64_t most, uint64_t *value);

/* A scale as every setting and file has it: finite and above 0. */
attn_status attn_setting_scale(const char *place, const char *text, float *value);

/* A zeroed block that lives as long as the configuration; NULL if there is no memory. */
void *attn_config_allocate(attn_config *config, size_t size);

/* A copy of `text` that lives as long. */
attn_status attn_config_copy(attn_config *config, const char *text, const char **copy);

#endif
