#include "kernels/cpu/vector_avx2.h"

#include "kernels/cpu/attend.inc"

const attn_cpu_kernels attn_cpu_kernels_avx2 = {
    .name = "avx2",
    .bf16_queries = false,
    .attend = run_attend,
    .to_floats = run_to_floats,
    .from_floats = run_from_floats,
    .exp2 = run_exp2,
};
