/*
 * Whole pages of the pool (launch.h), all layers, in one piece and back: as a channel sends them.
 */
#ifndef ATTND_KERNELS_CUDA_PAGES_H
#define ATTND_KERNELS_CUDA_PAGES_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Where pages are. Device memory; sizes are multiples of 16 bytes. */
typedef struct {
    char *pool;         /* layer 0, page 0 */
    size_t layer_bytes; /* from layer to layer */
    size_t page_bytes;  /* of a page in a layer: its KV heads' tiles */
    uint32_t layers;
    const uint32_t *pages; /* [count] */
    uint32_t count;
} attn_cuda_pages;

/*
 * Copies the pages to `packed` [count, layers, page_bytes], or from there. On a cudaStream_t; a cudaError_t, 0 if none.
 */
int attn_cuda_pack_pages(const attn_cuda_pages *from, void *packed, void *stream);
int attn_cuda_unpack_pages(const attn_cuda_pages *to, const void *packed, void *stream);

#ifdef __cplusplus
}
#endif

#endif
