#include <stdio.h>

#include "kernels/cuda/probe.h"

int attn_cuda_probe(char *text, size_t text_size) {
    snprintf(text, text_size, "built without the CUDA Toolkit");
    return 0;
}
