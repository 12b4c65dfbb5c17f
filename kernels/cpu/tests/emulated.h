/* The avx512bf16 kernels with their one BF16 instruction emulated, to be tested where only AVX-512 is. */
#ifndef ATTND_KERNELS_CPU_TESTS_EMULATED_H
#define ATTND_KERNELS_CPU_TESTS_EMULATED_H

#include "kernels/cpu/attend.h"

extern const attn_cpu_kernels attn_cpu_kernels_emulated;

#endif
