#include <string.h>

#include "kernels/cpu/attend.h"

static bool always(void) { return true; }

#ifdef __x86_64__
static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static bool has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

/* Best first. */
static const struct {
    const attn_cpu_kernels *kernels;
    bool (*supported)(void);
    const char *needs;
} instruction_sets[] = {
#ifdef __x86_64__
    {&attn_cpu_kernels_avx512bf16, has_avx512bf16, "AVX-512 F, BW, DQ, VL and BF16"},
    {&attn_cpu_kernels_avx512, has_avx512, "AVX-512 F, BW, DQ and VL"},
    {&attn_cpu_kernels_avx2, has_avx2, "AVX2, FMA and F16C"},
#endif
    {&attn_cpu_kernels_portable, always, "nothing"},
};

enum { INSTRUCTION_SETS = sizeof instruction_sets / sizeof instruction_sets[0] };

static attn_status find_best(const attn_cpu_kernels **kernels) {
    int best = 0;
    while (!instruction_sets[best].supported())
        best++;
    *kernels = instruction_sets[best].kernels;
    return attn_ok();
}

attn_status attn_cpu_kernels_find(const char *name, const attn_cpu_kernels **kernels) {
    if (name == NULL || strcmp(name, "auto") == 0) return find_best(kernels);
    for (int i = 0; i < INSTRUCTION_SETS; i++) {
        if (strcmp(name, instruction_sets[i].kernels->name) != 0) continue;
        if (!instruction_sets[i].supported()) {
            return attn_error(ATTN_UNAVAILABLE, "isa \"%s\": this machine lacks %s", name, instruction_sets[i].needs);
        }
        *kernels = instruction_sets[i].kernels;
        return attn_ok();
    }
    /* On other processors the x86 names are known, but nothing of theirs is compiled in. */
    if (strcmp(name, "avx512bf16") == 0 || strcmp(name, "avx512") == 0 || strcmp(name, "avx2") == 0) {
        return attn_error(ATTN_UNAVAILABLE, "isa \"%s\": this machine is not an x86-64", name);
    }
    return attn_error(ATTN_INVALID_ARGUMENT,
                      "isa \"%s\" is unknown: it is one of auto, avx512bf16, avx512, avx2, portable", name);
}
