#define VECTOR_DOT_BF16
#include "kernels/cpu/vector_avx512.h"

#include "kernels/cpu/attend.inc"

const attn_cpu_kernels attn_cpu_kernels_avx512bf16 = {
    .name = "avx512bf16",
    .bf16_queries = true,
    .attend = run_attend,
    .exp2 = run_exp2,
};
