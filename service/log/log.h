/*
 * Structured logging: one JSON object a line, to stderr.
 *
 *   {"time":"2026-01-02T03:04:05.678901Z","level":"info","event":"rank_lost","request":"2f","rank":3}
 *
 * An event has a name in snake_case and typed fields, never prose with values in it, and never
 * tensor data or credentials. `request` is the call's number where there is a call.
 *
 *   attn_log_line line;
 *   if (attn_log_begin(&line, ATTN_LOG_INFO, "sequence_closed", request)) {
 *       attn_log_u64(&line, "pages", pages);
 *       attn_log_string(&line, "reason", "idle");
 *       attn_log_end(&line);
 *   }
 *
 * A line is built on the caller's stack and written with one write(): no allocation, no lock, and
 * lines of several threads do not mix. What does not fit into ATTN_LOG_LINE_BYTES is left out and
 * the line says "truncated":true; it is valid JSON whatever the values hold (bytes that are not
 * UTF-8 come out as U+FFFD). A line that cannot be written is lost.
 *
 * Any thread may log.
 */
#ifndef ATTND_SERVICE_LOG_LOG_H
#define ATTND_SERVICE_LOG_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef enum {
    ATTN_LOG_DEBUG,
    ATTN_LOG_INFO,
    ATTN_LOG_WARN,
    ATTN_LOG_ERROR,
    ATTN_LOG_OFF, /* as a limit only: nothing is written */
} attn_log_level;

#define ATTN_LOG_LINE_BYTES 2048

/* A line being built. Touch it with the functions below only. */
typedef struct {
    size_t used;
    bool truncated;
    char bytes[ATTN_LOG_LINE_BYTES];
} attn_log_line;

/* Lines below `level` are dropped. Default ATTN_LOG_INFO. */
void attn_log_set_level(attn_log_level level);

/* Where lines go instead of stderr: an open file descriptor, which stays the caller's. For tests. */
void attn_log_set_output(int file_descriptor);

/* "debug", "info", "warn", "error", "off". A literal. */
const char *attn_log_level_name(attn_log_level level);

/* Whether lines of this level are written. Cheap enough for the decode path. */
bool attn_log_enabled(attn_log_level level);

/*
 * Starts a line; false if its level is not written, then nothing more is to be done. `event` is a
 * literal. `request` 0: the event belongs to no call.
 */
bool attn_log_begin(attn_log_line *line, attn_log_level level, const char *event, uint64_t request);

/* Fields. `key` is a literal, not one of time, level, event, request, truncated. */
void attn_log_string(attn_log_line *line, const char *key, const char *value); /* NULL: null */
void attn_log_bytes(attn_log_line *line, const char *key, const void *value, size_t size);
void attn_log_u64(attn_log_line *line, const char *key, uint64_t value);
void attn_log_i64(attn_log_line *line, const char *key, int64_t value);
void attn_log_hex(attn_log_line *line, const char *key, uint64_t value); /* a handle or a step: a string of hex */
void attn_log_double(attn_log_line *line, const char *key, double value);
void attn_log_bool(attn_log_line *line, const char *key, bool value);
/* Two fields, "code" and "message". */
void attn_log_status(attn_log_line *line, attn_status status);

/* Writes the line. */
void attn_log_end(attn_log_line *line);

/* A line with no fields of its own. */
void attn_log_event(attn_log_level level, const char *event, uint64_t request);

#endif
