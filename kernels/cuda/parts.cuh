/*
 * Long parts: where units are few and about alike, each is cut into equal parts, a block a part, and no block has
 * anything else. A part is one partial result, in the slot of its worker's number. Parts count themselves at a ticket
 * of the unit's first worker; the block that comes last merges them, or, where they are many, some blocks do so
 * together.
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
    return merged;
}

/* ------------------------------------------------------------------------------------------- */
/* On the host: how a call's units are cut */

/* What is to be done, as far as the host knows. */
struct work {
    uint64_t units;
    uint64_t least_tiles, most_tiles; /* of a unit; 0, 0: not known */
    uint64_t workers;
    uint32_t rows, warps;             /* of a unit, and of a block's groups */
    uint64_t min_saved;               /* tiles: less is not worth cutting a unit at all */
    uint64_t tile_bytes;              /* of a stage */
    uint64_t chain_ns, long_chain_ns; /* the least that a block takes for a tile, of a cluster's part and a long one */
    uint64_t end_ns;                  /* that a begin and an end take longer than narrow bf16's.. */
    uint64_t long_end_ns;             /* ..and those of long parts besides */
    uint64_t crowded_saves_ns;        /* what clusters save that are crowded */
    bool has_long_parts;              /* is a kernel built for them? */
};

/* In clusters, long parts, or, with one part a unit, shares of the line. */
struct choice {
    bool is_clustered = false;
    bool is_crowded = false; /* there are so many blocks that all wait for the memory */
    uint32_t parts = 1;
    uint64_t ns = 0; /* that it takes, about */
};

/*
 * The times are a model of an H200's: a begin and an end, and between them the longer of what a block takes for its
 * tiles and what the memory takes for all; and as not all blocks end at once, a share of the latter. All constants are
 * fitted to what was measured (docs/kernel-notes.md), for the choice alone.
 */
constexpr uint64_t MEMORY_BYTES_A_US = 4650000, BLOCK_BYTES_A_US = 92000;

/* More blocks than that are in each other's way no more than the memory's own rate says. */
__host__ inline uint64_t crowd(const work &of, uint64_t parts) {
    constexpr uint64_t MANY_BLOCKS = 64;
    return of.units * parts < MANY_BLOCKS ? of.units * parts : MANY_BLOCKS;
}

/* A begin and an end that take `few`, and with many blocks `more`. */
__host__ inline uint64_t ends_ns(const work &of, uint64_t parts, uint64_t few, uint64_t more) {
    return of.end_ns + few + more * crowd(of, parts) / 64;
}

/* All tiles; the last block is late by `late_permille` of that, or `late_ns` if that is less. */
__host__ inline uint64_t tiles_ns(const work &of, uint64_t parts, uint64_t chain_ns, uint64_t late_permille,
                                  uint64_t late_ns) {
    uint64_t load_ns = of.tile_bytes * (1000 + crowd(of, parts) * crowd(of, parts) / 12) / BLOCK_BYTES_A_US;
    uint64_t a_tile = load_ns > chain_ns ? load_ns : chain_ns;
    uint64_t lone = (of.most_tiles + parts - 1) / parts * a_tile;
    uint64_t memory = of.units * of.most_tiles * of.tile_bytes * 1000 / MEMORY_BYTES_A_US;
    uint64_t late = memory * late_permille / 1000;
    memory += late < late_ns ? late : late_ns;
    uint64_t longer = lone > memory ? lone : memory, shorter = lone > memory ? memory : lone;
    bool is_both = chain_ns > load_ns && shorter * 100 > longer * 92; /* neither waits for the other alone */
    return is_both ? longer + longer / 20 : longer;
}

/* Do the blocks of clusters wait for the memory more than for themselves? */
__host__ inline bool is_crowded(const work &of, uint64_t parts) { return of.units * parts * 3 >= of.workers * 2; }

/*
 * Clusters are not evenly spread over the device, so that where time is memory's some end late: those of three and five
 * most, and large ones if there are more than the eight regions of the device can have one of each.
 */
__host__ inline uint64_t cluster_ns(const work &of, uint64_t parts) {
    static constexpr uint64_t LATE_PERMILLE[] = {0, 0, 35, 100, 75, 160, 40, 60, 60};
    bool is_uneven = parts >= 6 && of.units > 8 && of.units < (parts == 8 ? 15 : 16);
    bool is_all = parts == 2 && of.units * 33 >= of.workers * 16; /* of the device */
    uint64_t late = is_uneven ? 220 : is_all ? 20 : LATE_PERMILLE[parts];
    uint64_t saved = is_crowded(of, parts) ? of.crowded_saves_ns : 0;
    uint64_t ends = ends_ns(of, parts, parts % 2 == 0 ? 5200 : 5500, 300) - saved;
    return ends + tiles_ns(of, parts, of.chain_ns, late, 20000);
}

/* Where long parts leave some multiprocessors without work, the others end later apart. */
__host__ inline uint64_t long_parts_ns(const work &of, uint64_t parts) {
    bool is_all = of.units * parts * 16 >= of.workers * 15; /* of the device */
    bool is_joint = are_merged_jointly({0, (uint32_t)parts, 0}, of.rows, of.warps);
    uint64_t a_round = AHEAD * (is_joint ? of.warps : of.warps / of.rows), rounds = (parts + a_round - 1) / a_round;
    uint64_t merge = (rounds - 1) * 400 + (is_joint ? 1000 : 0);
    return of.long_end_ns + ends_ns(of, parts, 5650, 600) + merge +
           tiles_ns(of, parts, of.long_chain_ns, is_all ? 30 : 45, is_all ? 2000 : 4000);
}

/* Of whole tiles; one block merges each unit, however many partials that are. */
__host__ inline uint64_t shares_ns(const work &of) {
    uint64_t tiles = of.units * (of.least_tiles + of.most_tiles) / 2, share = (tiles + of.workers - 1) / of.workers;
    uint64_t rounds = of.most_tiles / share / AHEAD * ((of.rows + 3) / 4); /* of a merge by four warps */
    return 6 * of.end_ns + 7000 + rounds * 500 + share * of.workers * of.tile_bytes * 1022 / MEMORY_BYTES_A_US;
}

__host__ inline void choose_if_faster(choice &best, const choice &other) {
    if (other.ns < best.ns) best = other;
}

/*
 * How to cut a call's units: what takes the shortest. Clusters need units that are alike; long parts are chosen by the
 * longest unit, so that where units are not about alike, shares are.
 */
__host__ inline choice choose(const work &of, const attn_cuda_tuning &tuning) {
    choice best;
    if (of.least_tiles == 0 || tuning.clusters[2] == 0) return best;
    best.ns = shares_ns(of);
    auto is_cut_enough = [&](uint64_t parts) {
        return parts > 1 && parts <= of.least_tiles &&
               (of.most_tiles + parts - 1) / parts + of.min_saved <= of.most_tiles;
    };
    for (uint32_t parts = ATTN_CUDA_MAX_CLUSTER; parts > 1; parts--) {
        bool fits = of.units <= tuning.clusters[parts] && of.least_tiles == of.most_tiles;
        if (fits && is_cut_enough(parts))
            choose_if_faster(best, {true, is_crowded(of, parts), parts, cluster_ns(of, parts)});
    }
    uint32_t most = (uint32_t)(of.workers / of.units), a_round = AHEAD * (of.warps / of.rows);
    const uint32_t candidates[] = {most, most / 2, most / 4, a_round, 2 * a_round};
    for (uint32_t parts : candidates) {
        if (of.has_long_parts && parts <= most && is_cut_enough(parts))
            choose_if_faster(best, {false, false, parts, long_parts_ns(of, parts)});
    }
    return best;
}

} /* namespace parts */

#endif
