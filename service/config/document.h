/*
 * A configuration file as it was read: texts by setting. Private to service/config.
 *
 * The structure (sections, keys, lists) is checked by libcyaml with a schema made from the table of
 * settings; the values stay texts, because the table checks them as it checks flags.
 */
#ifndef ATTND_SERVICE_CONFIG_DOCUMENT_H
#define ATTND_SERVICE_CONFIG_DOCUMENT_H

#include "base/status.h"
#include "service/config/settings.h"

typedef struct {
    char *name, *token, *token_file, *max_pages, *max_sequences; /* NULL: not given */
} attn_document_tenant;

typedef struct {
    char *values[ATTN_SETTINGS_MAX]; /* by row of attn_settings; NULL: not given */
    char **listen;
    uint32_t listen_count;
    attn_document_tenant *tenants;
    uint32_t tenant_count;
} attn_document;

/*
 * Reads YAML text. *document is NULL if the text is empty; else the caller frees it with
 * attn_document_free. `name` begins the messages.
 */
attn_status attn_document_load(const char *yaml, size_t size, const char *name, attn_document **document);

void attn_document_free(attn_document *document);

#endif
