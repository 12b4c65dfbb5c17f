#include "kernels/cpu/tests/emulated.h"

#ifdef __x86_64__
#define VECTOR_DOT_BF16
#define VECTOR_DOT_BF16_EMULATED
#include "kernels/cpu/vector_avx512.h"
#else
#include "kernels/cpu/vector_portable.h"
#endif

#include "kernels/cpu/attend.inc"

const attn_cpu_kernels attn_cpu_kernels_emulated = {
    .name = "emulated",
    .bf16_queries = true,
    .attend = run_attend,
    .to_floats = run_to_floats,
    .from_floats = run_from_floats,
    .exp2 = run_exp2,
};
