/* Test aid: a real error of a device. Release builds do not have it. */
#ifndef ATTND_KERNELS_CUDA_FAULT_H
#define ATTND_KERNELS_CUDA_FAULT_H

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Launches a kernel that writes where no memory is: once it has run, every call of this process on the current device
 * fails. A cudaError_t, of the launch.
 */
int attn_cuda_write_nowhere(void *stream);

#ifdef __cplusplus
}
#endif

#endif
