/*
 * Long parts: where units are few and about alike, each is cut into equal parts, a block a part, and no block has
 * anything else (cutting.h says when). A part is one partial result, in the slot of its worker's number. Parts count
 * themselves at a ticket of the unit's first worker; the block that comes last merges them, or, where they are many,
 * some blocks do so together.
 *
 * Unlike clusters (cluster.cuh) long parts can have all of the device at work, at half a microsecond more for a merge
 * by way of memory. Unlike shares of the line they are equal to a tile, a block finds its own without a look at any
 * other sequence, and ends it with all its warps. A launch is in as many parts as the host has chosen, whatever the
 * live lengths are: if units are not alike after all, the longest decides how long it takes.
 */
#ifndef ATTND_KERNELS_CUDA_PARTS_CUH
#define ATTND_KERNELS_CUDA_PARTS_CUH

#include "kernels/cuda/decode.h"
#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/joint.cuh"
#include "kernels/cuda/rows.cuh"

namespace parts {

using line::ALL_LANES;

/* The parts of a unit, each the share of one worker; and which of them a worker has. */
struct place {
    uint32_t first; /* worker */
    uint32_t count, own;
};

__device__ inline place place_of(const line::cut &cut, uint32_t worker) {
    uint32_t own = line::part_of(cut, worker);
    return {worker - own, cut.parts, own};
}

constexpr uint32_t AHEAD = 8; /* partials of a row that a warp has on their way */

/*
 * Would one block with so many warps take so long for all rows of a unit that it is better to wait for others? Then a
 * block a row merges it (joint.cuh).
 */
__host__ __device__ inline bool are_merged_jointly(const place &of, uint32_t rows, uint32_t warps) {
    constexpr uint32_t MAX_ROUNDS = 2; /* of loads */
    return rows > 1 && of.count >= rows && of.count > MAX_ROUNDS * AHEAD * (warps / rows);
}

/* With how many parts that begins: for cutting.h. */
__host__ inline uint32_t first_merged_jointly(uint32_t rows, uint32_t warps) {
    constexpr uint32_t NEVER = 1024;
    uint32_t parts = 1;
    while (parts < NEVER && !are_merged_jointly({0, parts, 0}, rows, warps))
        parts++;
    return parts;
}

/* A part's partial is written: is it the unit's last? By one thread, after all have met at a barrier. */
__device__ inline bool arrive(const rows::workspace &work, const place &of) {
    uint32_t *ticket = &work.tickets[of.first];
    ptx::require(of.first < work.slots);
    bool is_last = ptx::atomic_add_acquire_release(ticket, 1) + 1 == of.count;
    if (is_last) *ticket = 0; /* for the next launch */
    return is_last;
}

/* The same where each of the first workers merges a row: returns the rows that this one is to merge, a bit each. */
__device__ inline uint32_t arrive_jointly(const rows::workspace &work, const place &of, uint32_t rows,
                                          uint32_t patience_ns) {
    ptx::require(of.first < work.slots / 2);
    return joint::arrive({work.joint_tickets + of.first, of.count, rows, of.own}, 1, patience_ns);
}

/* Adds AHEAD partials of a row, of which lane i has the state of partial i % AHEAD. By a warp. */
template <uint32_t COLUMNS>
__device__ inline void add_partials(rows::row_state<COLUMNS> &merged, const rows::row<COLUMNS> (&coming)[AHEAD],
                                    float2 state) {
    float most = state.x;
#pragma unroll
    for (uint32_t step = AHEAD / 2; step > 0; step /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
    most = fmaxf(most, merged.maximum);
    float keep = rows::decay(merged.maximum, most), factor = rows::decay(state.x, most), sum = state.y * factor;
#pragma unroll
    for (uint32_t step = AHEAD / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    merged.sum = fmaf(merged.sum, keep, sum);
    merged.maximum = most;
    rows::scale_row(merged.out, keep);
#pragma unroll
    for (uint32_t i = 0; i < AHEAD; i++)
        rows::add_row(merged.out, 1.0f, coming[i], __shfl_sync(ALL_LANES, factor, i));
}

/* Merges slice `slice` of `slices` of a row's partials, AHEAD at a time. By a warp. */
template <uint32_t COLUMNS, uint32_t ROWS>
__device__ inline rows::row_state<COLUMNS> merge_slice(const rows::workspace &work, const place &of, uint32_t index,
                                                       uint32_t slice, uint32_t slices, uint32_t lane) {
    uint32_t begin = of.count * slice / slices, end = of.count * (slice + 1) / slices;
    size_t first_row = (size_t)of.first * ROWS + index;
    const float *outs = work.outs + first_row * COLUMNS;
    const float2 *states = work.states + first_row;
    rows::row_state<COLUMNS> merged = rows::empty_state<COLUMNS>();
#pragma unroll 1
    for (uint32_t base = begin; base < end; base += AHEAD) {
        rows::row<COLUMNS> coming[AHEAD];
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            rows::clear_row(coming[i]); /* as in rows::merge_partials */
            if (base + i < end) {
                coming[i] = rows::load_row_of_others<COLUMNS>(outs + (size_t)(base + i) * ROWS * COLUMNS, lane);
            }
        }
        float2 state = make_float2(-INFINITY, 0.0f);
        if (base + lane % AHEAD < end) state = __ldcg(states + (size_t)(base + lane % AHEAD) * ROWS);
        add_partials(merged, coming, state);
    }
    return merged;
}

} /* namespace parts */

#endif
