#include "kernels/cpu/vector_avx512.h"

#include "kernels/cpu/attend.inc"

const attn_cpu_kernels attn_cpu_kernels_avx512 = {
    .name = "avx512",
    .bf16_queries = false,
    .attend = run_attend,
    .exp2 = run_exp2,
};
