#include "kernels/combine.h"

#include <math.h>
#include <string.h>

#include "kernels/combine_math.h"
#include "kernels/dtype.h"

enum { MAX_HEAD_DIM_V = 256 };

/* The largest LSE, the sink's included; -inf if there is nothing. NaN is passed over here and caught by the weights. */
static float largest_lse(const attn_partial *partials, uint32_t count, size_t row, const float *sink) {
    float largest = sink ? *sink : -INFINITY;
    for (uint32_t c = 0; c < count; c++) {
        if (partials[c].lse[row] > largest || isnan(largest)) largest = partials[c].lse[row];
    }
    return largest;
}

static void write_empty(uint32_t head_dim_v, attn_dtype dtype, void *out, float *lse) {
    memset(out, 0, head_dim_v * attn_dtype_bytes(dtype));
    if (lse) *lse = -INFINITY;
}

void attn_combine_row(const attn_partial *partials, uint32_t count, size_t row, uint32_t head_dim_v, const float *sink,
                      attn_dtype dtype, void *out, float *lse) {
    float sum_out[MAX_HEAD_DIM_V] = {0};
    double largest = largest_lse(partials, count, row, sink);
    double total = 0.0;
    bool any = sink != NULL && *sink != -INFINITY;
    if (any) total = attn_fixed_exp(*sink - largest);
    for (uint32_t c = 0; c < count; c++) {
        if (partials[c].lse[row] == -INFINITY) continue;
        any = true;
        total += attn_fixed_exp(partials[c].lse[row] - largest);
    }
    if (!any) {
        write_empty(head_dim_v, dtype, out, lse);
        return;
    }
    for (uint32_t c = 0; c < count; c++) {
        if (partials[c].lse[row] == -INFINITY) continue;
        float weight = (float)(attn_fixed_exp(partials[c].lse[row] - largest) / total);
        const float *partial = partials[c].out + row * head_dim_v;
        for (uint32_t e = 0; e < head_dim_v; e++) {
            sum_out[e] += weight * partial[e];
        }
    }
    attn_elements_from_floats(dtype, sum_out, out, head_dim_v);
    if (lse) *lse = (float)(largest + attn_fixed_log(total));
}

void attn_combine(const attn_partial *partials, uint32_t count, uint32_t query_length, uint32_t heads_q,
                  uint32_t head_dim_v, const float *sinks, attn_dtype dtype, void *out, float *lse) {
    unsigned char *out_bytes = out;
    size_t row_bytes = head_dim_v * attn_dtype_bytes(dtype);
    for (size_t row = 0; row < (size_t)query_length * heads_q; row++) {
        const float *sink = sinks ? &sinks[row % heads_q] : NULL;
        attn_combine_row(partials, count, row, head_dim_v, sink, dtype, out_bytes + row * row_bytes,
                         lse ? &lse[row] : NULL);
    }
}
