#include "kernels/cpu/vector_avx2.h"

#include "kernels/cpu/attend.inc"

const attn_cpu_kernels attn_cpu_kernels_avx2 = {
    .name = "avx2",
    .bf16_queries = false,
    .attend = run_attend,
    .exp2 = run_exp2,
};
