#include "dp/tensors.h"

#include <assert.h>
#include <string.h>

attn_status dp_tensor_check(const dp_tensor_view *view, const char *field, size_t expected) {
    size_t held = 0;
    for (uint32_t i = 0; i < view->count; i++)
        held += view->spans[i].size;
    if (held != view->size) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: its pieces hold %zu bytes, and it claims %zu", field, held,
                          view->size);
    }
    if (view->size != expected) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: %zu bytes where the shape takes %zu", field, view->size,
                          expected);
    }
    return attn_ok();
}

void dp_tensor_reader_init(dp_tensor_reader *reader, const dp_tensor_view *view) {
    /* An empty view has no spans, and nothing may be added to NULL. */
    *reader = (dp_tensor_reader){.span = view->spans, .end = view->count > 0 ? view->spans + view->count : view->spans};
}

const void *dp_tensor_reader_seek(dp_tensor_reader *reader, size_t offset, size_t *available) {
    while (offset - reader->start >= reader->span->size) {
        reader->start += reader->span->size;
        reader->span++;
        assert(reader->span < reader->end);
    }
    size_t skip = offset - reader->start;
    *available = reader->span->size - skip;
    return (const char *)reader->span->data + skip;
}

void dp_tensor_reader_copy(dp_tensor_reader *reader, size_t offset, size_t size, void *to) {
    char *next = to;
    while (size > 0) {
        size_t available;
        const void *from = dp_tensor_reader_seek(reader, offset, &available);
        size_t piece = available < size ? available : size;
        memcpy(next, from, piece);
        next += piece;
        offset += piece;
        size -= piece;
    }
}
