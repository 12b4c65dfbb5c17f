#include "kernels/bench/shapes.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LINE = 512, FIELDS = 7, MAX_BATCH = 1 << 20, MAX_TOKENS = 1 << 30 };

/* ------------------------------------------------------------------------------------------- */
/* Lines */

/* A whole number from 1 to most at *text, up to a separator or the end; *text is moved past the separator. */
static bool parse_number(const char **text, char separator, uint32_t most, uint32_t *number) {
    char *end;
    errno = 0;
    unsigned long value = strtoul(*text, &end, 10);
    if (end == *text || **text == '-' || errno != 0 || value < 1 || value > most) return false;
    if (*end != '\0' && *end != separator) return false;
    *text = *end == '\0' ? end : end + 1;
    *number = (uint32_t)value;
    return true;
}

/* SplitMix64, as a number in [0, 1). */
static double next_random(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (double)((x ^ x >> 31) >> 11) * 0x1p-53;
}

static bool parse_lengths(const char *text, uint32_t *lengths, uint32_t batch) {
    uint32_t first, second = 0, seed = 0;
    const char *colon = strchr(text, ':');
    if (colon == NULL) return false;
    size_t kind = (size_t)(colon - text);
    const char *rest = colon + 1;
    if (!parse_number(&rest, ':', MAX_TOKENS, &first)) return false;
    if (kind == 5 && strncmp(text, "const", kind) == 0) {
        for (uint32_t i = 0; i < batch; i++) {
            lengths[i] = first;
        }
    } else if (kind == 4 && strncmp(text, "skew", kind) == 0) {
        if (!parse_number(&rest, ':', MAX_TOKENS, &second)) return false;
        for (uint32_t i = 0; i < batch; i++) {
            lengths[i] = i == 0 ? first : second;
        }
    } else if (kind == 10 && strncmp(text, "loguniform", kind) == 0) {
        if (!parse_number(&rest, ':', MAX_TOKENS, &second) || !parse_number(&rest, ':', UINT32_MAX, &seed))
            return false;
        if (second < first) return false;
        uint64_t state = seed;
        for (uint32_t i = 0; i < batch; i++) {
            lengths[i] = (uint32_t)(first * pow((double)second / first, next_random(&state)) + 0.5);
        }
    } else {
        return false;
    }
    return *rest == '\0';
}

attn_status attn_shape_parse(attn_shape *shape, const char *line) {
    static const char *const names[] = {"batch", "heads_q", "heads_kv", "head_dim", "page_size"};
    *shape = (attn_shape){0};
    const char *comma = strchr(line, ',');
    size_t length = comma != NULL ? (size_t)(comma - line) : strlen(line);
    if (comma == NULL || length == 0 || length >= sizeof shape->name) {
        return attn_error(ATTN_INVALID_ARGUMENT, "a shape begins with a name of 1 to %zu letters and a comma",
                          sizeof shape->name - 1);
    }
    memcpy(shape->name, line, length);
    uint32_t *const numbers[] = {&shape->batch, &shape->heads_q, &shape->heads_kv, &shape->head_dim, &shape->page_size};
    const char *rest = comma + 1;
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        if (!parse_number(&rest, ',', MAX_BATCH, numbers[i])) {
            return attn_error(ATTN_INVALID_ARGUMENT, "shape %s: %s is not a whole number above 0", shape->name,
                              names[i]);
        }
    }
    shape->lengths = calloc(shape->batch, sizeof *shape->lengths);
    if (shape->lengths == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u lengths", shape->batch);
    if (!parse_lengths(rest, shape->lengths, shape->batch)) {
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "shape %s: seqlens is none of const:N, loguniform:LO:HI:SEED, skew:LONG:SHORT", shape->name);
    }
    return attn_ok();
}

void attn_shape_fini(attn_shape *shape) {
    free(shape->lengths);
    shape->lengths = NULL;
}

/* ------------------------------------------------------------------------------------------- */
/* Files */

static attn_status add_line(attn_shape_list *list, char *line) {
    line[strcspn(line, "\r\n")] = '\0';
    if (line[0] == '\0' || line[0] == '#') return attn_ok();
    attn_shape *grown = realloc(list->shapes, (list->count + 1) * sizeof *grown);
    if (grown == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for shapes");
    list->shapes = grown;
    return attn_shape_parse(&list->shapes[list->count++], line);
}

attn_status attn_shape_list_read(attn_shape_list *list, const char *path) {
    attn_status status = attn_ok();
    *list = (attn_shape_list){0};
    FILE *file = fopen(path, "r");
    if (file == NULL) return attn_error(ATTN_NOT_FOUND, "%s: %s", path, strerror(errno));
    char line[MAX_LINE];
    for (int number = 1; fgets(line, sizeof line, file) != NULL; number++) {
        status = add_line(list, line);
        if (attn_failed(status)) {
            attn_saved_status why;
            attn_status_save(&why, status);
            status = attn_error(why.code, "%s:%d: %s", path, number, why.message);
            break;
        }
    }
    fclose(file);
    return status;
}

void attn_shape_list_fini(attn_shape_list *list) {
    for (uint32_t i = 0; i < list->count; i++) {
        attn_shape_fini(&list->shapes[i]);
    }
    free(list->shapes);
    *list = (attn_shape_list){0};
}
