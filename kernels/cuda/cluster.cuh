/*
 * Clusters: thread blocks that can write to each other's shared memory (sm_90 and later). Where all units are alike,
 * and there are about as many clusters as units, a cluster does a unit, each block an equal part of its tiles; the
 * others send what they have found to the first block, which adds it up and writes the result. That is one trip through
 * the multiprocessors' network, where the workspace takes three to memory and back.
 *
 * A block finds its part as that of a long one (parts.cuh), from the length of one sequence. If units are not alike
 * after all, the longest decides how long the launch takes.
 */
#ifndef ATTND_KERNELS_CUDA_CLUSTER_CUH
#define ATTND_KERNELS_CUDA_CLUSTER_CUH

#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/rows.cuh"

namespace cluster {

using line::ALL_LANES;

/* Where the first block gets the others' parts, and which one this block's is. */
struct inbox {
    float *outs;      /* [parts - 1, rows, columns] not normalised, in shared memory; every block has the same room */
    float2 *states;   /* [parts - 1, rows] maximum in units of log2, and sum */
    uint32_t barrier; /* counts the bytes that have come */
    uint32_t part, parts;
    uint32_t rows;
};

__host__ __device__ inline uint32_t inbox_bytes(uint32_t parts, uint32_t rows, uint32_t columns) {
    return (parts - 1) * rows * (columns * (uint32_t)sizeof(float) + (uint32_t)sizeof(float2));
}

/* Makes the barrier that counts an inbox's bytes. By one thread, before cluster_arrive. */
__device__ inline void open_inbox(uint32_t barrier, uint32_t bytes) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_arrive_expect(barrier, bytes);
}

__device__ inline inbox view_inbox(char *memory, uint32_t barrier, uint32_t part, uint32_t parts, uint32_t rows,
                                   uint32_t columns) {
    float *outs = (float *)memory;
    return {outs, (float2 *)(outs + (parts - 1) * rows * columns), barrier, part, parts, rows};
}

/* Sends a row to slot `slot` of block `block`'s inbox. By a warp. */
template <uint32_t COLUMNS>
__device__ inline void send_row_to(const inbox &own, uint32_t block, uint32_t slot,
                                   const rows::row_state<COLUMNS> &sent, uint32_t lane) {
    using word = typename rows::words<rows::row<COLUMNS>::WIDTH>::type;
    uint32_t barrier = ptx::address_in_cluster(own.barrier, block);
    uint32_t out = ptx::address_in_cluster(ptx::shared_address(own.outs + slot * COLUMNS), block);
    uint32_t state = ptx::address_in_cluster(ptx::shared_address(own.states + slot), block);
#pragma unroll
    for (uint32_t p = 0; p < rows::row<COLUMNS>::PARTS; p++) {
        ptx::store_in_cluster(out + (p * 32 + lane) * (uint32_t)sizeof(word), *(const word *)sent.out.parts[p],
                              barrier);
    }
    if (lane == 0) ptx::store_in_cluster(state, make_float2(sent.maximum, sent.sum), barrier);
}

/* Sends row `index` of this block's part to the first block. By a warp. */
template <uint32_t COLUMNS>
__device__ inline void send_row(const inbox &to, uint32_t index, const rows::row_state<COLUMNS> &sent, uint32_t lane) {
    send_row_to(to, 0, (to.part - 1) * to.rows + index, sent, lane);
}

/* Adds the others' rows `index` to the first block's own, in the order of the parts, once all are there. By a warp. */
template <uint32_t COLUMNS>
__device__ inline void receive_row(const inbox &from, uint32_t index, rows::row_state<COLUMNS> &own, uint32_t lane) {
    ptx::barrier_wait(from.barrier, 0);
#pragma unroll 1
    for (uint32_t slot = index; slot < (from.parts - 1) * from.rows; slot += from.rows) {
        float2 state = from.states[slot];
        rows::merge_state(own, rows::load_row<COLUMNS>(from.outs + slot * COLUMNS, lane), state.x, state.y);
    }
}

} /* namespace cluster */

#endif
