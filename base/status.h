/*
 * attn_status: how every attnd function that can fail says so.
 *
 * A status is two words, returned by value: a code and, unless the code is ATTN_OK, a message that
 * says what is wrong and what to do. Success allocates nothing and touches no memory.
 *
 * The message lives in the calling thread's buffer and is valid until that thread makes its next
 * failing status: whoever keeps a status, or hands it to another thread, copies it first with
 * attn_status_save(). Literal messages live for ever.
 *
 * The codes are gRPC's, number for number, so that the service passes them through.
 */
#ifndef ATTND_BASE_STATUS_H
#define ATTND_BASE_STATUS_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

typedef enum {
    ATTN_OK = 0,
    ATTN_CANCELLED = 1,
    ATTN_INVALID_ARGUMENT = 3,
    ATTN_DEADLINE_EXCEEDED = 4,
    ATTN_NOT_FOUND = 5,
    ATTN_PERMISSION_DENIED = 7,
    ATTN_RESOURCE_EXHAUSTED = 8,
    ATTN_FAILED_PRECONDITION = 9,
    ATTN_ABORTED = 10,
    ATTN_UNIMPLEMENTED = 12,
    ATTN_INTERNAL = 13,
    ATTN_UNAVAILABLE = 14,
    ATTN_UNAUTHENTICATED = 16,
} attn_code;

/* Longest message kept, including the final zero; longer ones are cut. */
#define ATTN_STATUS_MESSAGE_BYTES 320

typedef struct {
    attn_code code;
    const char *message; /* never NULL; "" if the code is ATTN_OK */
} attn_status;

/* A status with its own message: what a struct keeps when a status must outlive its thread's buffer. */
typedef struct {
    attn_code code;
    char message[ATTN_STATUS_MESSAGE_BYTES];
} attn_saved_status;

static inline attn_status attn_ok(void) { return (attn_status){ATTN_OK, ""}; }

static inline bool attn_failed(attn_status status) { return status.code != ATTN_OK; }

/* A failing status whose message is printed into this thread's buffer. `code` is not ATTN_OK. */
attn_status attn_error(attn_code code, const char *format, ...) __attribute__((format(printf, 2, 3)));
attn_status attn_verror(attn_code code, const char *format, va_list arguments) __attribute__((format(printf, 2, 0)));

/* Copies `status` into `*saved`. */
void attn_status_save(attn_saved_status *saved, attn_status status);

/* Borrows `*saved`: valid as long as it is. */
static inline attn_status attn_status_view(const attn_saved_status *saved) {
    return (attn_status){saved->code, saved->message};
}

/* "INVALID_ARGUMENT" and so on: the name gRPC gives the code. A literal. */
const char *attn_code_name(attn_code code);

/* Returns from the calling function with the status of `expression` if that failed. */
#define ATTN_TRY(expression)                                                                                           \
    do {                                                                                                               \
        attn_status attn_try_status_ = (expression);                                                                   \
        if (attn_failed(attn_try_status_)) return attn_try_status_;                                                    \
    } while (0)

/* Sets `status` to that of `expression` and goes to `label` if that failed. */
#define ATTN_TRY_GOTO(status, expression, label)                                                                       \
    do {                                                                                                               \
        (status) = (expression);                                                                                       \
        if (attn_failed(status)) goto label;                                                                           \
    } while (0)

#endif
