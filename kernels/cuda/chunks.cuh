/*
 * batch_invariant for simple calls: where a block leaves its chunks, and how a unit's chunks become its rows.
 *
 * What is written to the workspace costs several times its bytes, so a block keeps the chunks of a unit that it has all
 * of in shared memory, where they fit. The groups take chunks in turn; who ends a unit's last chunk merges it. A group
 * delivers a chunk only after the other has posted the one before, so all that came before is there, and what has been
 * merged may be overwritten.
 *
 * Of a unit that is cut, a block counts its chunks once, after its last; the last block to arrive merges, or, where the
 * unit is long, its blocks do so together (joint.cuh), each some columns of a row. However it is divided, an element is
 * the sum of its chunks in their order.
 */
#ifndef ATTND_KERNELS_CUDA_CHUNKS_CUH
#define ATTND_KERNELS_CUDA_CHUNKS_CUH

#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/joint.cuh"
#include "kernels/cuda/line.cuh"
#include "kernels/cuda/rows.cuh"

namespace chunks {

using line::ALL_LANES;

/* A unit of no more chunks is merged by one block: to wait for the others would take longer. */
constexpr uint32_t MAX_ALONE = 16;

/* The chunks that a block keeps, in shared memory. */
struct kept {
    float *outs; /* [slots, rows, columns] */
    float *lses; /* [slots, rows] */
    uint32_t slots, rows;
};

__host__ __device__ inline uint32_t kept_bytes(uint32_t rows, uint32_t columns) {
    return rows * (columns + 1) * (uint32_t)sizeof(float);
}

__device__ inline kept view_kept(char *memory, uint32_t slots, uint32_t rows, uint32_t columns) {
    float *outs = (float *)memory;
    return {outs, outs + slots * rows * columns, slots, rows};
}

/* A row's chunks, kept: from the first one on. */
template <uint32_t COLUMNS> struct kept_row {
    const float *outs, *lses;
    uint32_t rows;

    __device__ float lse_of(uint32_t chunk) const { return lses[chunk * rows]; }
    __device__ rows::row<COLUMNS> load(uint32_t chunk, uint32_t lane) const {
        return rows::load_row<COLUMNS>(outs + chunk * rows * COLUMNS, lane);
    }
};

/* What a block does with a unit's chunks. */
struct unit_plan {
    uint32_t count;
    bool is_only, is_kept; /* the unit has one chunk; all of it is here and kept */
};

__device__ inline unit_plan plan_unit(const line::unit &unit, const line::share &mine, const rows::worker &by,
                                      uint32_t slots) {
    uint32_t end = unit.begin + unit.sees.tiles, count = unit.sees.tiles >> by.chunk_shift;
    return {count, count == 1, unit.begin >= mine.begin && end <= mine.end && count <= slots};
}

/* ------------------------------------------------------------------------------------------- */
/* Units that are cut */

/* Those who merge a unit; not `is_joint`: the last block to arrive does. */
struct party {
    joint::party of;
    bool is_joint;
};

__device__ inline party party_of(const rows::workspace &work, const line::unit &unit, const rows::worker &by) {
    uint32_t first = unit.begin >> by.chunk_shift, count = unit.sees.tiles >> by.chunk_shift;
    party found = {joint::party_of(work, unit, by), false};
    found.of.ticket = work.joint_tickets + first / 2; /* which no other unit of several chunks has */
    found.is_joint = found.of.members > 1 && count > MAX_ALONE;
    return found;
}

/*
 * Counts all of a block's tiles of a unit. Returns 0 if it has nothing to merge; the bit of the member that it is, if
 * its own part; else it merges all: as the last of those who do not wait for each other, or because a member has given
 * its part up (what others merge, too, is the same to the bit). By one thread, after all have met at a barrier.
 */
template <typename L>
__device__ inline uint32_t arrive(const attn_cuda_call &call, const rows::workspace &work, const party &among,
                                  const line::unit &unit, const line::share &mine, const rows::worker &by,
                                  uint32_t patience_ns) {
    rows::run done = {max(mine.begin, unit.begin), min(mine.end, unit.begin + unit.sees.tiles)};
    if (!among.is_joint) return rows::arrive<L>(call, work, unit, done, by);
    ptx::require(among.of.ticket < work.joint_tickets + work.slots / 2);
    return joint::arrive(among.of, done.end - done.begin, patience_ns);
}

/* ------------------------------------------------------------------------------------------- */
/* Delivering */

/* Delivers a row of a chunk: to where it ends if the unit has no other, else as a partial. */
template <typename L, typename IO, uint32_t COLUMNS, uint32_t ROWS>
__device__ inline void deliver_row(const attn_cuda_call &call, const rows::workspace &work, const kept &keeps,
                                   const unit_plan &plan, const rows::place &at, const rows::run &done,
                                   const rows::worker &by, rows::row_state<COLUMNS> &state, uint32_t lane) {
    rows::scale_row(state.out, rows::normaliser(state.sum) * rows::value_scale(call, at.unit.head));
    float lse = rows::lse_of(state.maximum, state.sum);
    if (plan.is_only) return rows::write_only_chunk<L, IO>(call, at, state.out, lse, lane);
    if (plan.is_kept) {
        uint32_t place = ((done.begin - at.unit.begin) >> by.chunk_shift) * keeps.rows + at.index;
        rows::store_row(keeps.outs + place * COLUMNS, state.out, lane);
        if (lane == 0) keeps.lses[place] = lse;
        return;
    }
    rows::store_partial<COLUMNS, ROWS, true>(work, done.begin >> by.chunk_shift, at.index, state.out,
                                             make_float2(lse, 0.0f), lane);
}

/* ------------------------------------------------------------------------------------------- */
/* Merging a row, or some of its columns, by all of a block's consumers */

/* In shared memory. */
template <uint32_t THREADS> struct scratch {
    double powers[THREADS];
    float weights[THREADS];
    float largest[THREADS / 32];
    uint32_t seen[THREADS / 32];
    uint32_t merged; /* chunks::arrive */
};

/* Some columns of a row's chunks in the workspace. */
template <uint32_t COLUMNS, uint32_t ROWS> struct columns {
    rows::stored_row<COLUMNS, ROWS> of;
    uint32_t count;
    uint32_t begin, width; /* multiples of 4 */
};

/* Starts the copies of chunks base .. base + live - 1, to [live, width]. */
template <uint32_t THREADS, uint32_t COLUMNS, uint32_t ROWS>
__device__ inline void copy_columns(const columns<COLUMNS, ROWS> &from, uint32_t base, uint32_t live, float *to,
                                    uint32_t thread) {
    uint32_t pieces = from.width / 4, step = THREADS / pieces, chunk = thread / pieces, piece = thread % pieces;
    if (chunk >= step) return; /* pieces need not divide THREADS */
    const float *out = from.of.outs + from.begin + piece * 4;
    for (; chunk < live; chunk += step) {
        ptx::copy_16_bytes(ptx::shared_address(to + chunk * from.width + piece * 4),
                           out + (size_t)(base + chunk) * ROWS * COLUMNS);
    }
}

/*
 * Merges them, as rows::merge_chunks does. `staged`: shared memory for `room` chunks' columns, THREADS at most. By
 * THREADS threads, which meet at barrier `barrier`.
 */
template <typename IO, uint32_t THREADS, uint32_t COLUMNS, uint32_t ROWS>
__device__ __noinline__ void merge_columns(const attn_cuda_call &call, columns<COLUMNS, ROWS> from,
                                           results::destination to, scratch<THREADS> &memory, float *staged,
                                           uint32_t room, uint32_t barrier, uint32_t thread) {
    uint32_t lane = thread % 32, count = from.count;
    auto lse_of = [&](uint32_t c) { return c < count ? from.of.lse_of(c) : -INFINITY; };
    copy_columns<THREADS>(from, 0, min(room, count), staged, thread);

    float lse = lse_of(thread), largest = lse;
    bool any = lse != -INFINITY;
    for (uint32_t c = thread + THREADS; c < count; c += THREADS) {
        float other = lse_of(c);
        largest = fmaxf(largest, other);
        any |= other != -INFINITY;
    }
    for (uint32_t step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
    }
    any = __any_sync(ALL_LANES, any);
    if (lane == 0) {
        memory.largest[thread / 32] = largest;
        memory.seen[thread / 32] = any;
    }
    ptx::named_barrier<THREADS>(barrier);
    largest = to.sink != nullptr ? *to.sink : -INFINITY;
    results::row_weights weights = {};
    weights.any = to.sink != nullptr && *to.sink != -INFINITY;
#pragma unroll
    for (uint32_t w = 0; w < THREADS / 32; w++) {
        largest = fmaxf(largest, memory.largest[w]);
        weights.any |= memory.seen[w] != 0;
    }
    weights.largest = largest;
    if (to.sink != nullptr && *to.sink != -INFINITY) weights.total = attn_fixed_exp(*to.sink - weights.largest);

    double power = results::power_of(weights, lse);
#pragma unroll 1
    for (uint32_t base = 0;;) {
        memory.powers[thread] = power;
        ptx::named_barrier<THREADS>(barrier);
        uint32_t live = min(THREADS, count - base);
#pragma unroll 16
        for (uint32_t i = 0; i < live; i++)
            weights.total += memory.powers[i]; /* of a chunk without tokens 0, which changes no sum */
        base += THREADS;
        if (base >= count) break;
        ptx::named_barrier<THREADS>(barrier);
        lse = lse_of(base + thread);
        power = results::power_of(weights, lse);
    }

    float sum = 0.0f;
#pragma unroll 1
    for (uint32_t base = 0;;) {
        uint32_t live = min(room, count - base);
        if (count > room) {
            lse = lse_of(base + thread);
            power = results::power_of(weights, lse);
        }
        memory.weights[thread] = lse == -INFINITY ? -1.0f : (float)(power / weights.total);
        ptx::copies_commit();
        ptx::copies_wait<0>();
        ptx::named_barrier<THREADS>(barrier);
        if (thread < from.width && weights.any) {
#pragma unroll 16
            for (uint32_t i = 0; i < live; i++) {
                float weight = memory.weights[i], product = staged[i * from.width + thread] * weight;
                sum += weight < 0.0f ? 0.0f : product; /* a sum from 0 on is never -0: 0 does not change it */
            }
        }
        ptx::named_barrier<THREADS>(barrier);
        base += room;
        if (base >= count) break;
        copy_columns<THREADS>(from, base, min(room, count - base), staged, thread);
    }
    if (thread < from.width) {
        ((IO *)call.out)[to.row * COLUMNS + from.begin + thread] = results::from_float<IO>(sum, call.layer.dtype);
    }
    if (thread == 0 && from.begin == 0) results::write_lse(call, to, results::merged_lse(weights));
}

} /* namespace chunks */

#endif
