/*
 * The merge of partial results, row by row: what attn_combine (kernels/attention.h) is made of, for
 * backends whose partials and outputs are laid out their own way.
 *
 * Arithmetic, the same on every machine, thread and build: the weights in double, by own exp and log
 * of plain IEEE operations; the sum over partials in float, in the order given, without fused
 * multiply-adds. A partial with lse = -inf is skipped, so leaving it out gives the same bits. A single
 * partial without a sink comes out as it went in, rounded to the dtype.
 */
#ifndef ATTND_KERNELS_COMBINE_H
#define ATTND_KERNELS_COMBINE_H

#include "kernels/attention.h"

/*
 * Merges row `row` of `count` partials: their lse[row] and out[row * head_dim_v ..], and the sink, if
 * `sink` is not NULL. Writes head_dim_v elements to `out` (any alignment; must not overlap the
 * partials) and, if `lse` is not NULL, the LSE. No partials at all: like one that is empty.
 * Any thread; allocates nothing. head_dim_v is at most 256.
 */
void attn_combine_row(const attn_partial *partials, uint32_t count, size_t row, uint32_t head_dim_v, const float *sink,
                      attn_dtype dtype, void *out, float *lse);

#endif
