#define _POSIX_C_SOURCE 200809L

#include "service/log/log.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/*
 * A line always keeps room for its end: what is appended goes up to LIMIT, and the rest of the
 * buffer is for one of the two tails. A field is appended whole or taken back whole.
 */
static const char whole_tail[] = "}\n";
static const char truncated_tail[] = ",\"truncated\":true}\n";

#define LIMIT (ATTN_LOG_LINE_BYTES - sizeof(truncated_tail))

static atomic_int lowest_level = ATTN_LOG_INFO;
static atomic_int output = STDERR_FILENO;

void attn_log_set_level(attn_log_level level) {
    atomic_store_explicit(&lowest_level, (int)level, memory_order_relaxed);
}

void attn_log_set_output(int file_descriptor) { atomic_store_explicit(&output, file_descriptor, memory_order_relaxed); }

const char *attn_log_level_name(attn_log_level level) {
    switch (level) {
    case ATTN_LOG_DEBUG: return "debug";
    case ATTN_LOG_INFO: return "info";
    case ATTN_LOG_WARN: return "warn";
    case ATTN_LOG_ERROR: return "error";
    case ATTN_LOG_OFF: return "off";
    }
    return "off";
}

bool attn_log_enabled(attn_log_level level) {
    return (int)level >= atomic_load_explicit(&lowest_level, memory_order_relaxed) && level < ATTN_LOG_OFF;
}

/* ------------------------------------------------------------------------------------------- */
/* Appending. Each returns false, having written part of it or nothing, if there is no room. */

static bool append(attn_log_line *line, const char *bytes, size_t size) {
    if (size > LIMIT - line->used) return false;
    memcpy(line->bytes + line->used, bytes, size);
    line->used += size;
    return true;
}

static bool append_text(attn_log_line *line, const char *text) { return append(line, text, strlen(text)); }

/*
 * The length of the well-formed UTF-8 sequence at `bytes` (RFC 3629: no overlong forms, no
 * surrogates, nothing above U+10FFFF), or 0.
 */
static size_t utf8_length(const unsigned char *bytes, size_t size) {
    unsigned char lead = bytes[0];
    unsigned char lowest = 0x80, highest = 0xbf; /* of the second byte */
    size_t length;
    if (lead < 0x80) return 1;
    if (lead >= 0xc2 && lead <= 0xdf) {
        length = 2;
    } else if (lead >= 0xe0 && lead <= 0xef) {
        length = 3;
        if (lead == 0xe0) lowest = 0xa0;
        if (lead == 0xed) highest = 0x9f;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
        length = 4;
        if (lead == 0xf0) lowest = 0x90;
        if (lead == 0xf4) highest = 0x8f;
    } else {
        return 0;
    }
    if (size < length || bytes[1] < lowest || bytes[1] > highest) return 0;
    for (size_t i = 2; i < length; i++) {
        if (bytes[i] < 0x80 || bytes[i] > 0xbf) return 0;
    }
    return length;
}

/* The escape of a character that JSON does not allow as it is, a literal or in `room`; else NULL. */
static const char *escape(unsigned char character, char room[8]) {
    switch (character) {
    case '"': return "\\\"";
    case '\\': return "\\\\";
    case '\n': return "\\n";
    case '\r': return "\\r";
    case '\t': return "\\t";
    default: break;
    }
    if (character >= 0x20 && character != 0x7f) return NULL;
    snprintf(room, 8, "\\u%04x", character);
    return room;
}

static bool append_quoted(attn_log_line *line, const void *value, size_t size) {
    const unsigned char *bytes = value;
    if (!append(line, "\"", 1)) return false;
    for (size_t i = 0; i < size;) {
        char room[8];
        const char *escaped = escape(bytes[i], room);
        size_t length = utf8_length(bytes + i, size - i);
        bool appended;
        if (length == 0) {
            appended = append_text(line, "\xef\xbf\xbd");
            length = 1;
        } else if (escaped != NULL) {
            appended = append_text(line, escaped);
        } else {
            appended = append(line, (const char *)bytes + i, length);
        }
        if (!appended) return false;
        i += length;
    }
    return append(line, "\"", 1);
}

static bool append_key(attn_log_line *line, const char *key) {
    return append(line, ",\"", 2) && append_text(line, key) && append(line, "\":", 2);
}

/* Takes the line back to `start` unless the field that began there was appended whole. */
static void finish_field(attn_log_line *line, size_t start, bool appended) {
    if (appended) return;
    line->used = start;
    line->truncated = true;
}

static void append_literal_field(attn_log_line *line, const char *key, const char *literal) {
    size_t start = line->used;
    finish_field(line, start, append_key(line, key) && append_text(line, literal));
}

/* ------------------------------------------------------------------------------------------- */
/* Lines */

static bool append_time(attn_log_line *line) {
    struct timespec now;
    struct tm utc;
    char text[64];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    int length = snprintf(text, sizeof(text), "{\"time\":\"%04d-%02d-%02dT%02d:%02d:%02d.%06ldZ\"", utc.tm_year + 1900,
                          utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec, now.tv_nsec / 1000);
    return append(line, text, (size_t)length);
}

bool attn_log_begin(attn_log_line *line, attn_log_level level, const char *event, uint64_t request) {
    if (!attn_log_enabled(level)) return false;
    line->used = 0;
    line->truncated = false;
    append_time(line);
    attn_log_string(line, "level", attn_log_level_name(level));
    attn_log_string(line, "event", event);
    if (request != 0) attn_log_hex(line, "request", request);
    return true;
}

void attn_log_bytes(attn_log_line *line, const char *key, const void *value, size_t size) {
    size_t start = line->used;
    finish_field(line, start, append_key(line, key) && append_quoted(line, value, size));
}

void attn_log_string(attn_log_line *line, const char *key, const char *value) {
    if (value == NULL) {
        append_literal_field(line, key, "null");
    } else {
        attn_log_bytes(line, key, value, strlen(value));
    }
}

void attn_log_u64(attn_log_line *line, const char *key, uint64_t value) {
    char text[32];
    snprintf(text, sizeof(text), "%" PRIu64, value);
    append_literal_field(line, key, text);
}

void attn_log_i64(attn_log_line *line, const char *key, int64_t value) {
    char text[32];
    snprintf(text, sizeof(text), "%" PRId64, value);
    append_literal_field(line, key, text);
}

void attn_log_hex(attn_log_line *line, const char *key, uint64_t value) {
    char text[32];
    snprintf(text, sizeof(text), "\"%" PRIx64 "\"", value);
    append_literal_field(line, key, text);
}

void attn_log_double(attn_log_line *line, const char *key, double value) {
    char text[32];
    snprintf(text, sizeof(text), "%.6g", value);
    append_literal_field(line, key, isfinite(value) ? text : "null");
}

void attn_log_bool(attn_log_line *line, const char *key, bool value) {
    append_literal_field(line, key, value ? "true" : "false");
}

void attn_log_status(attn_log_line *line, attn_status status) {
    attn_log_string(line, "code", attn_code_name(status.code));
    attn_log_string(line, "message", status.message);
}

void attn_log_end(attn_log_line *line) {
    const char *tail = line->truncated ? truncated_tail : whole_tail;
    size_t tail_size = strlen(tail);
    size_t written = 0;
    memcpy(line->bytes + line->used, tail, tail_size);
    line->used += tail_size;
    while (written < line->used) {
        ssize_t result =
            write(atomic_load_explicit(&output, memory_order_relaxed), line->bytes + written, line->used - written);
        if (result < 0 && errno == EINTR) continue;
        if (result <= 0) return;
        written += (size_t)result;
    }
}

void attn_log_event(attn_log_level level, const char *event, uint64_t request) {
    attn_log_line line;
    if (attn_log_begin(&line, level, event, request)) attn_log_end(&line);
}
