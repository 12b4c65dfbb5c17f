/*
 * Asks this machine for a CUDA device, without needing one: a build without the CUDA Toolkit, a
 * machine without a driver and a machine without a device all answer, each with its own reason.
 */
#ifndef ATTND_KERNELS_CUDA_PROBE_H
#define ATTND_KERNELS_CUDA_PROBE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Number of devices of compute capability 8.0 and later. Writes one line for people into `text`: the
 * first such device ("NVIDIA H200, compute capability 9.0, 1 device"), or why there is none.
 * Any thread.
 */
int attn_cuda_probe(char *text, size_t text_size);

#ifdef __cplusplus
}
#endif

#endif
