/*
 * How a call's units are cut, where that is not as shares of the line come (line.cuh): into the parts of clusters
 * (cluster.cuh), a cluster a unit, or into long parts (parts.cuh), as many for each unit. Chosen on the host, before a
 * launch, from what it expects of the lengths; the kernels are right whatever they are.
 *
 * The choice is what takes the shortest by a model of an H200's times: a begin and an end; between them the longer of
 * what a block takes for its tiles and what the memory takes for all; and, as not all blocks end at once, a share of
 * the latter. All constants are fitted to what was measured (docs/kernel-notes.md), for the choice alone.
 *
 * Threads: stateless.
 */
#ifndef ATTND_KERNELS_CUDA_CUTTING_H
#define ATTND_KERNELS_CUDA_CUTTING_H

#include <stdbool.h>

#include "kernels/cuda/decode.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The units of a call, as far as the host knows, and what the kernels for them take. Times are ns. */
typedef struct {
    uint64_t units;                   /* sequences x KV heads; one row block each */
    uint64_t least_tiles, most_tiles; /* of a unit; 0, 0: not known */
    uint64_t workers;                 /* multiprocessors */
    uint64_t min_saved_tiles;         /* less is not worth cutting a unit at all */
    uint64_t tile_bytes;
    /* Merges of long parts. Warps of a block, by a row; partials that a warp has on their way. */
    uint32_t rows, warps, partials_ahead;
    uint32_t joint_from;              /* parts: with so many, and more, several blocks merge a unit */
    uint32_t most_parts;              /* of a unit, if they are long: more would take longer to merge than they save */
    uint64_t chain_ns, long_chain_ns; /* the least that a block takes for a tile, of a cluster's part and a long one */
    uint64_t end_ns;                  /* that a begin and an end take longer than narrow bf16's.. */
    uint64_t long_end_ns;             /* ..and those of long parts besides */
    uint64_t crowded_saves_ns;        /* what clusters save that are crowded */
} attn_cuda_units;

typedef struct {
    uint32_t parts; /* of each unit: of a cluster, if is_clustered, else long ones; 1: units are not cut, shares are */
    bool is_clustered;
    bool is_crowded; /* clusters are so many that all their blocks wait for the memory */
    uint64_t ns;     /* that it takes, about */
} attn_cuda_cutting;

/*
 * Clusters need units that are expected to be alike, to a tile, and as many clusters as the device runs at once; long
 * parts are chosen by the longest unit. Where tuning->clusters is empty, or lengths are not known: shares.
 */
attn_cuda_cutting attn_cuda_choose_cutting(const attn_cuda_units *units, const attn_cuda_tuning *tuning);

#ifdef __cplusplus
}
#endif

#endif
