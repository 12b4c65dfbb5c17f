/*
 * Shape files: what the decode bench runs. CSV, one shape a line; lines that begin with # and empty
 * lines are skipped:
 *
 *     name,batch,heads_q,heads_kv,head_dim,page_size,seqlens
 *
 * seqlens gives the length of each of the batch's sequences:
 *     const:N             N tokens each
 *     loguniform:LO:HI:S  random, their logarithm uniform between those of LO and HI; seed S
 *     skew:LONG:SHORT     one of LONG tokens, the others of SHORT
 */
#ifndef ATTND_KERNELS_BENCH_SHAPES_H
#define ATTND_KERNELS_BENCH_SHAPES_H

#include <stdint.h>

#include "base/status.h"

typedef struct {
    char name[64];
    uint32_t batch;
    uint32_t heads_q;
    uint32_t heads_kv;
    uint32_t head_dim;
    uint32_t page_size;
    uint32_t *lengths; /* [batch], owned */
} attn_shape;

typedef struct {
    attn_shape *shapes; /* owned */
    uint32_t count;
} attn_shape_list;

/*
 * Parses one line, without its newline, that is neither empty nor a comment. ATTN_INVALID_ARGUMENT:
 * says which field. Free with attn_shape_fini, also after a failure.
 */
attn_status attn_shape_parse(attn_shape *shape, const char *line);
void attn_shape_fini(attn_shape *shape);

/*
 * Reads a file. ATTN_NOT_FOUND: it cannot be opened. ATTN_INVALID_ARGUMENT: names file and line. Free
 * with attn_shape_list_fini, also after a failure.
 */
attn_status attn_shape_list_read(attn_shape_list *list, const char *path);
void attn_shape_list_fini(attn_shape_list *list);

#endif
