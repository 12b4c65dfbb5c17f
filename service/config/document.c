#include "service/config/document.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cyaml/cyaml.h>

#define MAX_SECTIONS 8
#define PATH_BYTES   160

/* ------------------------------------------------------------------------------------------- */
/* The schema, made from the table */

typedef struct {
    cyaml_schema_value_t text;
    cyaml_schema_field_t tenant_fields[6];
    cyaml_schema_value_t tenant;
    cyaml_schema_field_t fields[MAX_SECTIONS][ATTN_SETTINGS_MAX + 1];
    cyaml_schema_field_t sections[MAX_SECTIONS + 1];
    cyaml_schema_value_t document;
} schema;

static cyaml_schema_value_t text_value(void) {
    return (cyaml_schema_value_t){
        .type = CYAML_STRING,
        .flags = CYAML_FLAG_POINTER | CYAML_FLAG_OPTIONAL,
        .data_size = sizeof(char),
        .string = {.min = 0, .max = CYAML_UNLIMITED},
    };
}

static cyaml_schema_field_t text_field(const char *key, size_t offset) {
    return (cyaml_schema_field_t){.key = key, .data_offset = (uint32_t)offset, .value = text_value()};
}

static cyaml_schema_field_t list_field(const char *key, size_t offset, size_t count_offset, size_t entry_size,
                                       const cyaml_schema_value_t *entry) {
    return (cyaml_schema_field_t){
        .key = key,
        .data_offset = (uint32_t)offset,
        .count_offset = (uint32_t)count_offset,
        .count_size = sizeof(uint32_t),
        .value = {.type = CYAML_SEQUENCE,
                  .flags = CYAML_FLAG_POINTER | CYAML_FLAG_OPTIONAL,
                  .data_size = (uint32_t)entry_size,
                  .sequence = {.entry = entry, .min = 0, .max = CYAML_UNLIMITED}},
    };
}

/* The fields of a section, a new one if need be; the fields' end is a NULL key. */
static cyaml_schema_field_t *section_fields(schema *made, const char *name) {
    size_t i = 0;
    while (made->sections[i].key != NULL && strcmp(made->sections[i].key, name) != 0) {
        i++;
    }
    made->sections[i] = (cyaml_schema_field_t){
        .key = name,
        .value = {.type = CYAML_MAPPING,
                  .flags = CYAML_FLAG_OPTIONAL,
                  .data_size = sizeof(attn_document),
                  .mapping = {.fields = made->fields[i]}},
    };
    return made->fields[i];
}

static void add_field(schema *made, const char *section, cyaml_schema_field_t field) {
    cyaml_schema_field_t *fields = section_fields(made, section);
    while (fields->key != NULL) {
        fields++;
    }
    *fields = field;
}

/* Sections are mappings inside the one struct, so every field's offset is that in attn_document. */
static void make_schema(schema *made) {
    memset(made, 0, sizeof(*made));
    made->text = text_value();
    made->tenant_fields[0] = text_field("name", offsetof(attn_document_tenant, name));
    made->tenant_fields[1] = text_field("token", offsetof(attn_document_tenant, token));
    made->tenant_fields[2] = text_field("token_file", offsetof(attn_document_tenant, token_file));
    made->tenant_fields[3] = text_field("max_pages", offsetof(attn_document_tenant, max_pages));
    made->tenant_fields[4] = text_field("max_sequences", offsetof(attn_document_tenant, max_sequences));
    made->tenant = (cyaml_schema_value_t){
        .type = CYAML_MAPPING,
        .data_size = sizeof(attn_document_tenant),
        .mapping = {.fields = made->tenant_fields},
    };
    for (size_t i = 0; i < attn_settings_count; i++) {
        const attn_setting *setting = &attn_settings[i];
        if (setting->section == NULL) continue;
        if (setting->kind == ATTN_SETTING_LISTEN) {
            add_field(made, setting->section,
                      list_field(setting->key, offsetof(attn_document, listen), offsetof(attn_document, listen_count),
                                 sizeof(char *), &made->text));
        } else {
            add_field(made, setting->section,
                      text_field(setting->key, offsetof(attn_document, values) + i * sizeof(char *)));
        }
    }
    add_field(made, "auth",
              list_field("tenants", offsetof(attn_document, tenants), offsetof(attn_document, tenant_count),
                         sizeof(attn_document_tenant), &made->tenant));
    made->document = (cyaml_schema_value_t){
        .type = CYAML_MAPPING,
        .flags = CYAML_FLAG_POINTER,
        .data_size = sizeof(attn_document),
        .mapping = {.fields = made->sections},
    };
}

/* ------------------------------------------------------------------------------------------- */
/* Errors: libcyaml logs what is wrong and then, from the inside out, where */

typedef struct {
    char problem[200]; /* in our words */
    char key[64];      /* unknown key, to be appended to the path */
    char path[PATH_BYTES];
    unsigned long line; /* 0: not known */
    bool twice;
} complaint;

/* Puts "name." or "name" in front of the path, or joins an index to the name that comes next. */
static void prepend_to_path(complaint *about, const char *name) {
    char path[PATH_BYTES];
    const char *join = about->path[0] == '\0' || about->path[0] == '[' ? "" : ".";
    snprintf(path, sizeof(path), "%.60s%s%.90s", name, join, about->path);
    memcpy(about->path, path, sizeof(path));
}

static const char *event_words(const char *event) {
    if (strcmp(event, "STRING") == 0 || strcmp(event, "SCALAR") == 0) return "a single value";
    if (strcmp(event, "SEQUENCE") == 0 || strcmp(event, "SEQUENCE_START") == 0) return "a list";
    if (strcmp(event, "MAPPING") == 0 || strcmp(event, "MAPPING_START") == 0) return "keys with values";
    return event;
}

/* What follows `prefix` in the text; NULL if it begins otherwise. */
static const char *behind(const char *text, const char *prefix) {
    size_t length = strlen(prefix);
    return strncmp(text, prefix, length) == 0 ? text + length : NULL;
}

/* The line in "..(line: 3, column: 5)"; the first told is where the problem is. */
static void note_line(complaint *about, const char *text) {
    const char *number = strstr(text, "(line: ");
    if (about->line == 0 && number != NULL) about->line = strtoul(number + 7, NULL, 10);
}

/* "Expecting STRING, got event: MAPPING_START" */
static void note_wrong_event(complaint *about, const char *wanted, const char *got) {
    char first[32];
    snprintf(first, sizeof(first), "%.*s", (int)strcspn(wanted, ","), wanted);
    snprintf(about->problem, sizeof(about->problem), "expected %s, found %s", event_words(first), event_words(got));
}

static void note_message(complaint *about, const char *message) {
    char name[64];
    const char *rest, *got;
    if ((rest = behind(message, "  in mapping field '")) != NULL) {
        snprintf(name, sizeof(name), "%.*s", (int)strcspn(rest, "'"), rest);
        prepend_to_path(about, name);
        note_line(about, rest);
    } else if ((rest = behind(message, "  in sequence entry '")) != NULL) {
        snprintf(name, sizeof(name), "[%lu]", strtoul(rest, NULL, 10) - 1); /* it counts from 1 */
        prepend_to_path(about, name);
        note_line(about, rest);
    } else if ((rest = behind(message, "Load: Unexpected key: ")) != NULL) {
        snprintf(about->key, sizeof(about->key), "%.*s", (int)strcspn(rest, "\n"), rest);
        snprintf(about->problem, sizeof(about->problem), "unknown key");
    } else if ((rest = behind(message, "Load: Expecting ")) != NULL && (got = strstr(rest, ", got event: ")) != NULL) {
        snprintf(name, sizeof(name), "%.*s", (int)strcspn(got + 13, "\n"), got + 13);
        note_wrong_event(about, rest, name);
    } else if (behind(message, "Load: Mapping field already seen") != NULL) {
        snprintf(about->problem, sizeof(about->problem), "given twice");
        about->twice = true;
    } else if ((rest = behind(message, "Load: libyaml: ")) != NULL) {
        snprintf(about->problem, sizeof(about->problem), "not well-formed YAML: %.*s", (int)strcspn(rest, "\n"), rest);
    }
}

static void note_log(cyaml_log_t level, void *context, const char *format, va_list arguments) {
    char message[256];
    (void)level;
    vsnprintf(message, sizeof(message), format, arguments);
    note_message(context, message);
}

/* The keys of the section (or, for an empty path, the sections) that `path` names, as a list. */
static void list_keys(const schema *made, const char *path, char *list, size_t size) {
    const cyaml_schema_field_t *fields = made->sections;
    list[0] = '\0';
    for (size_t i = 0; made->sections[i].key != NULL; i++) {
        if (strcmp(made->sections[i].key, path) == 0) fields = made->fields[i];
    }
    if (strncmp(path, "auth.tenants[", 13) == 0) fields = made->tenant_fields;
    for (; fields->key != NULL; fields++) {
        size_t used = strlen(list);
        snprintf(list + used, size - used, "%s%s", used == 0 ? "" : ", ", fields->key);
    }
}

static attn_status explain(const schema *made, const complaint *about, cyaml_err_t error, const char *name) {
    char where[32] = "";
    char keys[200];
    const char *problem = about->problem[0] != '\0' ? about->problem : cyaml_strerror(error);
    if (error == CYAML_ERR_OOM) return attn_error(ATTN_RESOURCE_EXHAUSTED, "%s: no memory to read it", name);
    if (about->key[0] != '\0') {
        list_keys(made, about->path, keys, sizeof(keys));
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: %s%s%s: %s; here are: %s", name, about->path,
                          about->path[0] != '\0' ? "." : "", about->key, problem, keys);
    }
    /* Of a key libcyaml knows where the one before it ended: no help. */
    if (about->line != 0 && !about->twice) snprintf(where, sizeof(where), " (line %lu)", about->line);
    return attn_error(ATTN_INVALID_ARGUMENT, "%s: %s%s%s%s", name, about->path, about->path[0] != '\0' ? ": " : "",
                      problem, where);
}

/* ------------------------------------------------------------------------------------------- */

static cyaml_config_t reader(complaint *about) {
    return (cyaml_config_t){
        .log_fn = about != NULL ? note_log : NULL,
        .log_ctx = about,
        .log_level = CYAML_LOG_ERROR,
        .mem_fn = cyaml_mem,
        .flags = CYAML_CFG_NO_ALIAS, /* a configuration has no use for them, and they can explode */
    };
}

attn_status attn_document_load(const char *yaml, size_t size, const char *name, attn_document **document) {
    schema made;
    complaint about = {0};
    cyaml_config_t config = reader(&about);
    *document = NULL;
    make_schema(&made);
    cyaml_err_t error =
        cyaml_load_data((const uint8_t *)yaml, size, &config, &made.document, (cyaml_data_t **)document, NULL);
    if (error != CYAML_OK) return explain(&made, &about, error, name);
    return attn_ok();
}

void attn_document_free(attn_document *document) {
    schema made;
    cyaml_config_t config = reader(NULL);
    make_schema(&made);
    cyaml_free(&config, &made.document, document, 0);
}
