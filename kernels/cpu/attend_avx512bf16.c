#define VECTOR_DOT_BF16
#include "kernels/cpu/vector_avx512.h"

#include "kernels/cpu/attend.inc"

const attn_cpu_kernels attn_cpu_kernels_avx512bf16 = {
    .name = "avx512bf16",
    .bf16_queries = true,
    .attend = run_attend,
    .to_floats = run_to_floats,
    .from_floats = run_from_floats,
    .exp2 = run_exp2,
};
