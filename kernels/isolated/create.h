/* ATTN_COMMAND_CREATE: what is in the rows region, there and back. */
#ifndef ATTND_KERNELS_ISOLATED_CREATE_H
#define ATTND_KERNELS_ISOLATED_CREATE_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/attention.h"

enum { ATTN_KIND_BYTES = 16, ATTN_ISA_BYTES = 32 };

/* An attn_backend_config; behind it, as far as there are any: cpus [workers], k_scales and v_scales [layers, heads_kv].
 */
typedef struct {
    char kind[ATTN_KIND_BYTES];
    char isa[ATTN_ISA_BYTES]; /* "": none */
    attn_geometry geometry;
    uint32_t pages, workers, device;
    bool has_cpus, has_k_scales, has_v_scales;
} attn_create_request;

/* What the parent's side has to be like. */
typedef struct {
    uint32_t tile_tokens, block_queries, workers; /* of the backend's line */
    uint32_t depth;
    int device; /* of a kind with channels */
    char description[160];
} attn_create_reply;

#endif
