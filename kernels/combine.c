#include "kernels/combine.h"

#include <math.h>
#include <string.h>

#include "kernels/dtype.h"

enum { MAX_HEAD_DIM_V = 256 };

/*
 * exp(x) for x <= 0, and NaN for NaN: 2^k * e^r with |r| <= ln 2 / 2, e^r by its Taylor polynomial.
 * Within 1e-15 relative, and 0 below e^-700.
 */
static double fixed_exp(double x) {
    static const double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
    static const double factorial_reciprocals[] = {
        1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
        1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    if (x < -700.0) return 0.0;
    if (!(x <= 0.0)) return NAN;
    double k = (double)(int64_t)(x * 0x1.71547652b82fep+0 - 0.5);
    double r = (x - k * ln2_high) - k * ln2_low;
    double sum = factorial_reciprocals[13];
    for (int n = 12; n >= 0; n--) {
        sum = sum * r + factorial_reciprocals[n];
    }
    uint64_t bits = (uint64_t)(1023 + (int64_t)k) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* log(x) for normal x >= 1, and NaN for NaN: k ln 2 + 2 atanh((m - 1) / (m + 1)) with m in [1/sqrt 2, sqrt 2). */
static double fixed_log(double x) {
    if (!(x >= 1.0 && x <= 0x1p1000)) return NAN;
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int64_t k = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffff) | (uint64_t)1023 << 52;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 0x1.6a09e667f3bcdp+0) {
        m *= 0.5;
        k++;
    }
    double s = (m - 1.0) / (m + 1.0), square = s * s, sum = 0.0;
    for (int n = 23; n > 0; n -= 2) {
        sum = sum * square + 1.0 / n;
    }
    return (double)k * 0x1.62e42fefa39efp-1 + 2.0 * s * sum;
}

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
    if (any) total = fixed_exp(*sink - largest);
    for (uint32_t c = 0; c < count; c++) {
        if (partials[c].lse[row] == -INFINITY) continue;
        any = true;
        total += fixed_exp(partials[c].lse[row] - largest);
    }
    if (!any) {
        write_empty(head_dim_v, dtype, out, lse);
        return;
    }
    for (uint32_t c = 0; c < count; c++) {
        if (partials[c].lse[row] == -INFINITY) continue;
        float weight = (float)(fixed_exp(partials[c].lse[row] - largest) / total);
        const float *partial = partials[c].out + row * head_dim_v;
        for (uint32_t e = 0; e < head_dim_v; e++) {
            sum_out[e] += weight * partial[e];
        }
    }
    attn_elements_from_floats(dtype, sum_out, out, head_dim_v);
    if (lse) *lse = (float)(largest + fixed_log(total));
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
