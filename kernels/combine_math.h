/*
 * The exponential and the logarithm of combine.h: plain IEEE operations in double, so that the CPU's compilers
 * and nvcc make the same bits of them. Neither fuses multiply-adds: both are told not to.
 */
#ifndef ATTND_KERNELS_COMBINE_MATH_H
#define ATTND_KERNELS_COMBINE_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ATTN_COMBINE_INLINE static __host__ __device__ inline
#else
#define ATTN_COMBINE_INLINE static inline
#endif

/*
 * exp(x) for x <= 0, and NaN for NaN: 2^k * e^r with |r| <= ln 2 / 2, e^r by its Taylor polynomial.
 * Within 1e-15 relative, and 0 below e^-700.
 */
ATTN_COMBINE_INLINE double attn_fixed_exp(double x) {
    const double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
    const double factorial_reciprocals[] = {
        1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
        1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    double within = x >= -700.0 && x <= 0.0 ? x : 0.0; /* no branches: so several can be computed at once */
    double k = (double)(int64_t)(within * 0x1.71547652b82fep+0 - 0.5);
    double r = (within - k * ln2_high) - k * ln2_low;
    double sum = factorial_reciprocals[13];
    for (int n = 12; n >= 0; n--) {
        sum = sum * r + factorial_reciprocals[n];
    }
    uint64_t bits = (uint64_t)(1023 + (int64_t)k) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return x < -700.0 ? 0.0 : x <= 0.0 ? sum * power : (double)NAN;
}

/* log(x) for normal x >= 1, and NaN for NaN: k ln 2 + 2 atanh((m - 1) / (m + 1)) with m in [1/sqrt 2, sqrt 2). */
ATTN_COMBINE_INLINE double attn_fixed_log(double x) {
    if (!(x >= 1.0 && x <= 0x1p1000)) return (double)NAN;
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

#endif
