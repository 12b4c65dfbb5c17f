#define _POSIX_C_SOURCE 200809L

#include "service/config/scales.h"

#include <stdio.h>
#include <string.h>

#include "service/config/settings.h"

#define BLANKS "\t\r "

/* The words of a line, one after another; NULL at its end. */
static char *next_word(char **rest) { return strtok_r(NULL, BLANKS, rest); }

/* The rest of a line: one scale, or heads_kv of them, to `scales`. */
static attn_status read_heads(char **rest, const char *place, uint32_t heads_kv, float *scales) {
    uint32_t count = 0;
    for (char *word; (word = next_word(rest)) != NULL; count++) {
        float scale;
        ATTN_TRY(attn_setting_scale(place, word, &scale));
        if (count < heads_kv) scales[count] = scale;
    }
    if (count == heads_kv) return attn_ok();
    if (count != 1) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: %u scales; it must be one, or one for each of the %u KV heads",
                          place, count, heads_kv);
    }
    for (uint32_t head = 1; head < heads_kv; head++) {
        scales[head] = scales[0];
    }
    return attn_ok();
}

static attn_status read_line(char *line, const char *place, const attn_geometry *geometry, float *k_scales,
                             float *v_scales) {
    char *rest;
    line[strcspn(line, "#")] = '\0';
    const char *number = strtok_r(line, BLANKS, &rest);
    if (number == NULL) return attn_ok();
    uint64_t layer;
    ATTN_TRY(attn_setting_number(place, number, 0, geometry->layers - 1, &layer));
    const char *which = next_word(&rest);
    if (which == NULL || (strcmp(which, "k") != 0 && strcmp(which, "v") != 0)) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: after the layer comes k or v, not '%.40s'", place,
                          which != NULL ? which : "");
    }
    float *scales = (which[0] == 'k' ? k_scales : v_scales) + layer * geometry->heads_kv;
    if (scales[0] != 0) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: layer %u has its %s scales already", place, (unsigned)layer,
                          which);
    }
    return read_heads(&rest, place, geometry->heads_kv, scales);
}

attn_status attn_scales_read(char *text, size_t size, const char *place, const attn_geometry *geometry, float *k_scales,
                             float *v_scales) {
    if (strlen(text) != size) return attn_error(ATTN_INVALID_ARGUMENT, "%s: is not text", place);
    unsigned line_number = 1;
    for (char *line = text, *end; line != NULL; line = end, line_number++) {
        char line_place[256];
        end = strchr(line, '\n');
        if (end != NULL) *end++ = '\0';
        snprintf(line_place, sizeof(line_place), "%.200s:%u", place, line_number);
        ATTN_TRY(read_line(line, line_place, geometry, k_scales, v_scales));
    }
    return attn_ok();
}
