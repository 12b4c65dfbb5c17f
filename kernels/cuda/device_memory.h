/*
 * Device memory. In checked builds (`bazel build --config=checked`) every piece is exactly as large as asked for and
 * lies between two guards, whose bytes attn_cuda_check_guards compares with what was written there at first: so a store
 * outside any piece is found, and which one it was next to. In other builds these are cudaMalloc and cudaFree.
 *
 * Threads: any; pieces are kept in one list.
 */
#ifndef ATTND_KERNELS_CUDA_DEVICE_MEMORY_H
#define ATTND_KERNELS_CUDA_DEVICE_MEMORY_H

#include <driver_types.h>
#include <stddef.h>

#ifdef ATTN_CUDA_CHECKED
enum { ATTN_CUDA_IS_CHECKED = 1 };
#else
enum { ATTN_CUDA_IS_CHECKED = 0 };
#endif

/* `name`: a literal, for attn_cuda_check_guards. */
cudaError_t attn_cuda_allocate(void **memory, size_t bytes, const char *name);

/* NULL: does nothing. */
void attn_cuda_free(void *memory);

/*
 * Compares the guards of all pieces of the current device with what they were: the name of a piece whose guard differs,
 * or NULL. The device must be idle. In other than checked builds NULL, at once.
 */
const char *attn_cuda_check_guards(void);

#endif
