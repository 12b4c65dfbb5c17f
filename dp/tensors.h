/*
 * Reading tensors that came in pieces.
 *
 * A tensor view is a list of spans. A reader walks it once, front to back, and gives each run of bytes
 * in place where it lies in one span; where it does not, the caller copies it.
 *
 * Threads: a reader belongs to one thread; the view is only read.
 */
#ifndef ATTND_DP_TENSORS_H
#define ATTND_DP_TENSORS_H

#include "dp/engine.h"

typedef struct {
    const dp_span *span; /* the one that holds byte `start` */
    const dp_span *end;
    size_t start; /* offset in the tensor of the span's first byte */
} dp_tensor_reader;

/* ATTN_INVALID_ARGUMENT, naming the field, unless the spans hold exactly `size` bytes, and `size` is `expected`. */
attn_status dp_tensor_check(const dp_tensor_view *view, const char *field, size_t expected);

void dp_tensor_reader_init(dp_tensor_reader *reader, const dp_tensor_view *view);

/*
 * Moves to `offset`, which is not before an earlier one and is inside the tensor. Returns where its byte
 * is, and in `*available` how many bytes follow in the same span, that one included.
 */
const void *dp_tensor_reader_seek(dp_tensor_reader *reader, size_t offset, size_t *available);

/* Copies `size` bytes from `offset` on, over as many spans as it takes. The reader may stay behind. */
void dp_tensor_reader_copy(dp_tensor_reader *reader, size_t offset, size_t size, void *to);

#endif
