#include "base/status.h"

#include <assert.h>
#include <stdio.h>

static _Thread_local char last_message[ATTN_STATUS_MESSAGE_BYTES];

attn_status attn_verror(attn_code code, const char *format, va_list arguments) {
    assert(code != ATTN_OK);
    /* Printed aside first: an argument may itself be this thread's last message. */
    char message[ATTN_STATUS_MESSAGE_BYTES];
    vsnprintf(message, sizeof message, format, arguments);
    snprintf(last_message, sizeof last_message, "%s", message);
    return (attn_status){code, last_message};
}

attn_status attn_error(attn_code code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    attn_status status = attn_verror(code, format, arguments);
    va_end(arguments);
    return status;
}

void attn_status_save(attn_saved_status *saved, attn_status status) {
    saved->code = status.code;
    snprintf(saved->message, sizeof saved->message, "%s", status.message);
}

const char *attn_code_name(attn_code code) {
    switch (code) {
    case ATTN_OK: return "OK";
    case ATTN_CANCELLED: return "CANCELLED";
    case ATTN_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case ATTN_DEADLINE_EXCEEDED: return "DEADLINE_EXCEEDED";
    case ATTN_NOT_FOUND: return "NOT_FOUND";
    case ATTN_PERMISSION_DENIED: return "PERMISSION_DENIED";
    case ATTN_RESOURCE_EXHAUSTED: return "RESOURCE_EXHAUSTED";
    case ATTN_FAILED_PRECONDITION: return "FAILED_PRECONDITION";
    case ATTN_ABORTED: return "ABORTED";
    case ATTN_UNIMPLEMENTED: return "UNIMPLEMENTED";
    case ATTN_INTERNAL: return "INTERNAL";
    case ATTN_UNAVAILABLE: return "UNAVAILABLE";
    case ATTN_UNAUTHENTICATED: return "UNAUTHENTICATED";
    }
    return "UNKNOWN";
}
