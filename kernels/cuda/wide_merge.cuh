/*
 * What becomes of a run's rows in the wide kernels (wide.cuh): they are written, or stored as partial results, and
 * those of a unit that was cut are merged.
 */
#ifndef ATTND_KERNELS_CUDA_WIDE_MERGE_CUH
#define ATTND_KERNELS_CUDA_WIDE_MERGE_CUH

#include "kernels/cuda/wide_tiles.cuh"

namespace wide {

/* ------------------------------------------------------------------------------------------- */
/* Results */

/* Stores a row of floats that four lanes share: a lane has two columns of every eight. */
template <typename S>
__device__ inline void store_floats(const warp_state<S> &state, uint32_t half, float factor, float *row,
                                    uint32_t lane) {
    float *out = row + lane % 4 * 2;
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = half * 2; i < S::WIDTH / 2; i += 4)
            *(float2 *)(out + d * S::WIDTH + i / 4 * 8) =
                make_float2(state.out[d][i] * factor, state.out[d][i + 1] * factor);
    }
}

/* Word i of lane j of four becomes word j of lane i. */
__device__ inline void transpose_words(uint32_t (&words)[4], uint32_t lane) {
#pragma unroll
    for (uint32_t step = 2; step > 0; step /= 2) {
#pragma unroll
        for (uint32_t low = 0; low < 4; low++) {
            if (low & step) continue;
            uint32_t high = low + step, given = lane & step ? words[low] : words[high];
            uint32_t taken = __shfl_xor_sync(ALL_LANES, given, step);
            words[low] = lane & step ? taken : words[low];
            words[high] = lane & step ? words[high] : taken;
        }
    }
}

/* Writes a row of outputs, 64 bytes at a time, 16 a lane: two columns of every eight would be 4. By whole warps. */
template <typename S>
__device__ inline void write_outputs(const warp_state<S> &state, uint32_t half, float factor, typename S::IO *row,
                                     bool is_row, uint32_t lane) {
    uint4 *out = (uint4 *)row + lane % 4;
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = 0; i < S::WIDTH / 2; i += 16) {
            uint32_t words[4];
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                const float *columns = &state.out[d][i + j * 4 + half * 2];
                words[j] = S::KV::pack(columns[0] * factor, columns[1] * factor);
            }
            transpose_words(words, lane);
            if (is_row) out[d * S::WIDTH / 8 + i / 4] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

/*
 * The workspace, of a cluster's block: as if its rows, and those of the other clusters' blocks in its place, were all
 * that there are. Its tickets are others than those of a launch without clusters, which may be at work beside it, and
 * its partials lie behind that one's.
 */
template <typename S> __device__ inline rows::workspace workspace_of(const arguments &with) {
    rows::workspace work = rows::view_workspace(with.workspace);
    if constexpr (S::HAS_OWN_PARTIALS) {
        uint32_t workers = count_workers<S>(), first = blockIdx.x % S::CLUSTER * workers;
        size_t skipped = (size_t)2 * first * S::ROWS;
        work.tickets += work.slots / 2 + first;
        work.joint_tickets += work.slots / 4 + first;
        work.states = (float2 *)((char *)work.states + with.beside) + skipped;
        work.outs = (float *)((char *)work.outs + with.beside) + skipped * S::DIM_V;
    }
    return work;
}

/* Stores a warp's state as partials. */
template <typename S>
__device__ inline void store_partial(const block_place<S> &block, const group_place &own, const found_run &found,
                                     const warp_state<S> &state) {
    rows::workspace work = workspace_of<S>(block.with);
    uint32_t slot = rows::slot_of<typename S::rules>(block.call, found.unit, found.run, found.by), count = found.rows;
    if ((slot + 1) * S::ROWS > work.slots * GROUP_ROWS)
        count = 0; /* never, if the host has counted as the device does */
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t row = row_of<S>(own, half);
        float sum = ptx::quad_sum(state.sum[half]);
        if (row >= count) continue;
        size_t at = (size_t)slot * S::ROWS + row;
        if (own.lane % 4 == 0) work.states[at] = make_float2(state.maximum[half], sum);
        store_floats(state, half, 1.0f, work.outs + at * S::DIM_V, own.lane);
    }
}

/* Adds what a row has apart, as rows::add_shared does; `sum` and `maximum`: the row's. */
template <typename S>
__device__ inline void add_shared(const attn_cuda_call &call, size_t row, warp_state<S> &state, uint32_t half,
                                  float &maximum, float &sum, uint32_t lane) {
    float shared = __ldcg(&call.shared_lse[row]) * LOG2_E, most = fmaxf(maximum, shared);
    float keep = rows::decay(maximum, most), factor = rows::decay(shared, most);
    const float *out = call.shared_out + row * S::DIM_V + lane % 4 * 2;
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = half * 2; i < S::WIDTH / 2; i += 4) {
            float2 added = __ldcg((const float2 *)(out + d * S::WIDTH + i / 4 * 8));
            state.out[d][i] = fmaf(added.x, factor, state.out[d][i] * keep);
            state.out[d][i + 1] = fmaf(added.y, factor, state.out[d][i + 1] * keep);
        }
    }
    sum = fmaf(sum, keep, factor);
    maximum = most;
}

/* Writes a warp's rows, which are finished, as rows::write_row does. */
template <typename S>
__device__ inline void write_unit(const block_place<S> &block, const group_place &own, const found_run &found,
                                  warp_state<S> &state) {
    static_assert(S::KV::BYTES == 2, "no scales");
    if (S::CLUSTER > 1 && found.rows == 0) return;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t row = row_of<S>(own, half);
        bool is_row = row < found.rows;
        float sum = ptx::quad_sum(state.sum[half]), maximum = state.maximum[half], factor = 1.0f;
        results::destination to = rows::final_destination_of<typename S::rules>(
            block.call, {found.unit, block.with.cut, rows_before<S>() + min(row, found.rows - 1)});
        if (rows::adds_shared<typename S::rules>(block.call, found.unit))
            add_shared<S>(block.call, to.row, state, half, maximum, sum, own.lane);
        if (to.sink != nullptr) {
            float sink = *to.sink * LOG2_E, most = fmaxf(maximum, sink), keep = rows::decay(maximum, most);
            sum = fmaf(sum, keep, rows::decay(sink, most));
            factor *= keep;
            maximum = most;
        }
        factor *= sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
        if (is_row && own.lane % 4 == 0) results::write_lse(block.call, to, rows::lse_of(maximum, sum));
        if (!S::rules::LEAVES || !to.is_partial) {
            write_outputs(state, half, factor, (typename S::IO *)block.call.out + to.row * S::DIM_V, is_row, own.lane);
        } else if (is_row) {
            store_floats(state, half, factor, block.call.partial_out + to.row * S::DIM_V, own.lane);
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Merging */

/*
 * Where the partials of a unit's rows are: those of the first row. Partial i is in slot 2 * (first worker + i), but the
 * first is in its worker's tail slot.
 */
template <uint32_t ROWS> struct unit_partials {
    const float *outs;
    const float2 *states;
    uint32_t count;

    /* Rows from the first partial's place to this one's. */
    static __device__ uint32_t place(uint32_t i) { return 2 * ROWS * i + (i == 0 ? ROWS : 0); }
};

/*
 * Rows that a warp merges at a time, and partials of each that are on their way: one row alone would be all waiting,
 * and more registers would be missing where this is called. The partials divide 32.
 */
template <uint32_t ROWS_, uint32_t AHEAD_> struct merge_shape {
    static constexpr uint32_t ROWS = ROWS_, AHEAD = AHEAD_;
};
template <typename S> using many_rows = merge_shape<S::DIM_V <= 128 ? 4 : 2, 2>;

/* Where the members of a joint merge leave a warp two rows of a tall block, with all partials on their way. */
using two_rows = merge_shape<2, 8>;

/* A lane's part of some rows that are being merged; those that are not there are the last one again. */
template <typename S, typename M> struct merged_rows {
    static constexpr uint32_t COUNT = M::ROWS, AHEAD = M::AHEAD;
    uint32_t indices[COUNT];
    rows::row_state<S::DIM_V> rows[COUNT];
    rows::row<S::DIM_V> coming[AHEAD][COUNT];
    float2 states[COUNT]; /* of partial base + lane, for a base that is a multiple of 32 */
    float factors[COUNT];
};

template <typename S, typename M>
__device__ inline void load_partial(merged_rows<S, M> &own, const unit_partials<S::ROWS> &of, uint32_t ahead,
                                    uint32_t i, uint32_t lane) {
    const float *outs = of.outs + (size_t)of.place(i) * S::DIM_V;
#pragma unroll
    for (uint32_t r = 0; r < own.COUNT; r++) {
        rows::clear_row(own.coming[ahead][r]); /* as in rows::merge_stored_partials */
        if (i < of.count)
            own.coming[ahead][r] = rows::load_row_of_others<S::DIM_V>(outs + own.indices[r] * S::DIM_V, lane);
    }
}

/* Loads the lane's states; of a partial that is not there, nothing has been seen. */
template <typename S, typename M>
__device__ inline void load_states(merged_rows<S, M> &own, const unit_partials<S::ROWS> &of, uint32_t i) {
#pragma unroll
    for (uint32_t r = 0; r < own.COUNT; r++) {
        own.states[r] = make_float2(-INFINITY, 0.0f);
        if (i < of.count) own.states[r] = __ldcg(of.states + of.place(i) + own.indices[r]);
    }
}

template <typename S, typename M> __device__ inline void find_factors(merged_rows<S, M> &own) {
#pragma unroll
    for (uint32_t r = 0; r < own.COUNT; r++)
        own.factors[r] = rows::decay(own.states[r].x, own.rows[r].maximum);
}

/* Finds maxima and sums of the rows, and leaves the states and factors of their first partials. */
template <typename S, typename M>
__device__ inline void total_rows(merged_rows<S, M> &own, const unit_partials<S::ROWS> &of, uint32_t lane) {
    uint32_t last = (of.count - 1) / 32 * 32;
#pragma unroll 1
    for (uint32_t base = last + 32; base > 0; base -= 32) {
        load_states(own, of, base - 32 + lane);
#pragma unroll
        for (uint32_t r = 0; r < own.COUNT; r++)
            own.rows[r].maximum = fmaxf(own.rows[r].maximum, own.states[r].x);
    }
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) {
#pragma unroll
        for (uint32_t r = 0; r < own.COUNT; r++)
            own.rows[r].maximum = fmaxf(own.rows[r].maximum, __shfl_xor_sync(ALL_LANES, own.rows[r].maximum, step));
    }
#pragma unroll 1
    for (uint32_t base = last + 32; base > 0; base -= 32) {
        if (last != 0) load_states(own, of, base - 32 + lane);
        find_factors(own);
#pragma unroll
        for (uint32_t r = 0; r < own.COUNT; r++)
            own.rows[r].sum = fmaf(own.states[r].y, own.factors[r], own.rows[r].sum);
    }
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) {
#pragma unroll
        for (uint32_t r = 0; r < own.COUNT; r++)
            own.rows[r].sum += __shfl_xor_sync(ALL_LANES, own.rows[r].sum, step);
    }
}

/* Adds the partials of the rows, in their order. */
template <typename S, typename M>
__device__ inline void add_partials(merged_rows<S, M> &own, const unit_partials<S::ROWS> &of, uint32_t lane) {
#pragma unroll 1
    for (uint32_t i = 0; i < of.count; i += M::AHEAD) {
        if (i > 0 && i % 32 == 0) {
            load_states(own, of, i + lane);
            find_factors(own);
        }
#pragma unroll
        for (uint32_t a = 0; a < M::AHEAD; a++) {
#pragma unroll
            for (uint32_t r = 0; r < own.COUNT; r++) {
                float factor = __shfl_sync(ALL_LANES, own.factors[r], i % 32 + a);
                if (i + a < of.count) rows::add_row(own.rows[r].out, 1.0f, own.coming[a][r], factor);
            }
            load_partial(own, of, a, i + a + M::AHEAD, lane);
        }
    }
}

/* Those who merge a unit (joint.cuh): of one in parts, all that have one. */
template <typename S> __device__ inline joint::party party_of(const rows::workspace &work, const found_run &found) {
    if (!S::TALL || found.by.tiles_a_worker != 0) return joint::party_of(work, found.unit, found.by);
    return {work.joint_tickets + found.first_worker, found.unit.sees.tiles, found.workers,
            found.by.number - found.first_worker};
}

/*
 * Merges rows index, index + step, .. of a unit that was cut. By a warp. Not inlined: the registers of what calls it
 * are the products'.
 */
template <typename S, typename M>
__device__ __noinline__ void merge_rows(const block_place<S> &block, const found_run &found, uint32_t index,
                                        uint32_t step, uint32_t lane) {
    using L = typename S::rules;
    rows::workspace work = workspace_of<S>(block.with);
    uint32_t first = found.first_worker, end = first + found.workers, count = found.rows;
    if (!S::TALL) {
        first = found.unit.begin / found.by.tiles_a_worker;
        end = (found.unit.begin + found.unit.sees.tiles - 1) / found.by.tiles_a_worker + 1;
    }
    size_t first_row = (size_t)2 * first * S::ROWS;
    unit_partials<S::ROWS> of = {work.outs + first_row * S::DIM_V, work.states + first_row, end - first};
#pragma unroll 1
    for (; index < count; index += M::ROWS * step) {
        merged_rows<S, M> own;
#pragma unroll
        for (uint32_t r = 0; r < own.COUNT; r++) {
            own.indices[r] = min(index + r * step, count - 1);
            own.rows[r] = rows::empty_state<S::DIM_V>();
        }
#pragma unroll
        for (uint32_t a = 0; a < M::AHEAD; a++)
            load_partial(own, of, a, a, lane);
        total_rows(own, of, lane);
        add_partials(own, of, lane);
#pragma unroll
        for (uint32_t r = 0; r < own.COUNT; r++) {
            rows::place at = {found.unit, block.with.cut, rows_before<S>() + own.indices[r]};
            if (index + r * step < count) rows::write_row<L, typename S::IO>(block.call, at, own.rows[r], lane);
        }
    }
}

/* A row that is to be merged, on its way: its first partials. */
template <typename S> struct coming_row {
    static constexpr uint32_t EARLY = 8;
    rows::row<S::DIM_V> partials[EARLY];
    float2 state; /* of partial `lane` */
};

template <typename S>
__device__ inline void load_coming(coming_row<S> &row, const unit_partials<S::ROWS> &of, uint32_t index,
                                   uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < row.EARLY; i++) {
        rows::clear_row(row.partials[i]); /* as in rows::merge_stored_partials */
        const float *from = of.outs + (size_t)(of.place(i) + index) * S::DIM_V;
        if (i < of.count) row.partials[i] = rows::load_row_of_others<S::DIM_V>(from, lane);
    }
    row.state = make_float2(-INFINITY, 0.0f);
    if (lane < of.count) row.state = __ldcg(of.states + of.place(lane) + index);
}

template <typename S>
__device__ inline rows::row_state<S::DIM_V> merge_coming(const coming_row<S> &row, const unit_partials<S::ROWS> &of,
                                                         uint32_t index, uint32_t lane) {
    rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
    merged.maximum = row.state.x;
    for (uint32_t step = 16; step > 0; step /= 2)
        merged.maximum = fmaxf(merged.maximum, __shfl_xor_sync(ALL_LANES, merged.maximum, step));
    float factor = rows::decay(row.state.x, merged.maximum);
    merged.sum = row.state.y * factor;
    for (uint32_t step = 16; step > 0; step /= 2)
        merged.sum += __shfl_xor_sync(ALL_LANES, merged.sum, step);
#pragma unroll
    for (uint32_t i = 0; i < row.EARLY; i++)
        rows::add_row(merged.out, 1.0f, row.partials[i], __shfl_sync(ALL_LANES, factor, i));
#pragma unroll 1
    for (uint32_t i = row.EARLY; i < of.count; i++) {
        const float *from = of.outs + (size_t)(of.place(i) + index) * S::DIM_V;
        rows::row<S::DIM_V> partial = rows::load_row_of_others<S::DIM_V>(from, lane);
        rows::add_row(merged.out, 1.0f, partial, __shfl_sync(ALL_LANES, factor, i));
    }
    return merged;
}

/* Where merged rows wait for what they have apart: where the queries were, which nobody needs any more. */
template <typename S> struct kept_rows {
    block_memory<S> &memory;

    static_assert(sizeof(memory.queries) >= S::ROWS * S::DIM_V * sizeof(float) && S::GROUPS > 1, "");

    __device__ float *out(uint32_t index) const { return (float *)memory.queries + index * S::DIM_V; }
    __device__ float2 &state(uint32_t index) const { return (float2 &)memory.visible[0][index]; }
};

/* Adds what rows have apart, and writes them: rows index, index + step, .. By the warp that has kept them. */
template <typename S>
__device__ inline void finish_kept(const block_place<S> &block, const found_run &found, uint32_t index, uint32_t step,
                                   uint32_t lane) {
    constexpr uint32_t COUNT = 4; /* at once */
    kept_rows<S> kept = {block.memory};
    __syncwarp();
#pragma unroll 1
    for (; index < found.rows; index += COUNT * step) {
        results::destination to[COUNT];
        rows::row<S::DIM_V> apart[COUNT];
        float lses[COUNT];
#pragma unroll
        for (uint32_t r = 0; r < COUNT; r++) {
            uint32_t row = min(index + r * step, found.rows - 1);
            rows::place at = {found.unit, block.with.cut, rows_before<S>() + row};
            to[r] = rows::final_destination_of<typename S::rules>(block.call, at);
        }
        ptx::wait_for_previous_launch(); /* where they come from */
#pragma unroll
        for (uint32_t r = 0; r < COUNT; r++) {
            apart[r] = rows::load_row_of_others<S::DIM_V>(block.call.shared_out + to[r].row * S::DIM_V, lane);
            lses[r] = __ldcg(&block.call.shared_lse[to[r].row]);
        }
#pragma unroll
        for (uint32_t r = 0; r < COUNT; r++) {
            uint32_t row = index + r * step;
            if (row >= found.rows) break;
            float2 state = kept.state(row);
            rows::row_state<S::DIM_V> merged = {rows::load_row<S::DIM_V>(kept.out(row), lane), state.x, state.y};
            rows::merge_state(merged, apart[r], lses[r] * LOG2_E, 1.0f);
            rows::write_row_to<typename S::rules, typename S::IO>(block.call, to[r], merged, 1.0f, lane);
        }
    }
}

/*
 * The same as merge_rows, of a unit in parts, which are few: a row after the other, the next one on its way, in code
 * that is short, since it is fetched while all wait for it. Rows that have something apart are merged before that is
 * there.
 */
template <typename S>
__device__ __noinline__ void merge_rows_in_turn(const block_place<S> &block, const found_run &found, uint32_t first,
                                                uint32_t step, uint32_t lane) {
    static_assert(S::KV::BYTES == 2 && joint::MAX_MEMBERS <= 32, "no scales, and a lane a partial");
    rows::workspace work = workspace_of<S>(block.with);
    size_t first_row = (size_t)2 * found.first_worker * S::ROWS;
    unit_partials<S::ROWS> of = {work.outs + first_row * S::DIM_V, work.states + first_row, found.workers};
    bool is_apart = rows::adds_shared<typename S::rules>(block.call, found.unit), has_now = false;
    kept_rows<S> kept = {block.memory};
    coming_row<S> now, next;
    if (!is_apart) ptx::wait_for_previous_launch();
#pragma unroll 1
    for (uint32_t index = first;; index += step) {
        bool has_next = index < found.rows;
        if (has_next) load_coming(next, of, index, lane);
        if (has_now) {
            uint32_t row = index - step;
            rows::row_state<S::DIM_V> merged = merge_coming(now, of, row, lane);
            if (is_apart) {
                rows::store_row(kept.out(row), merged.out, lane);
                if (lane == 0) kept.state(row) = make_float2(merged.maximum, merged.sum);
            } else {
                rows::place at = {found.unit, block.with.cut, rows_before<S>() + row};
                rows::write_row_to<typename S::rules, typename S::IO>(
                    block.call, rows::final_destination_of<typename S::rules>(block.call, at), merged, 1.0f, lane);
            }
        }
        if (!has_next) break;
        now = next;
        has_now = true;
    }
    if (is_apart) finish_kept(block, found, first, step, lane);
}

/* Merges rows index, index + step, .. of a unit, as few as others leave of it. By a warp. Not inlined, likewise. */
template <typename S>
__device__ __noinline__ void merge_few_rows(const block_place<S> &block, const found_run &found, uint32_t index,
                                            uint32_t step, uint32_t lane) {
    using L = typename S::rules;
    rows::workspace work = rows::view_workspace(block.with.workspace);
#pragma unroll 1
    for (; index < found.rows; index += step) {
        rows::place at = {found.unit, block.with.cut, index};
        uint32_t first = found.unit.begin / found.by.tiles_a_worker;
        uint32_t last = (found.unit.begin + found.unit.sees.tiles - 1) / found.by.tiles_a_worker;
        rows::merge_partials<L, typename S::IO, S::DIM_V, S::ROWS>(block.call, work, at, first, last - first + 1, lane);
    }
}

/*
 * After a run that was cut: merges what is now to be merged of its unit. By WARP_COUNT warps, which meet at barrier
 * `barrier`; `warp`: which of them.
 */
template <typename S, uint32_t WARP_COUNT>
__device__ inline void merge_unit(const block_place<S> &block, const found_run &found, uint32_t barrier, uint32_t warp,
                                  uint32_t lane) {
    rows::workspace work = workspace_of<S>(block.with);
    joint::party party = party_of<S>(work, found);
    uint32_t &merged = block.memory.merged[barrier % S::GROUPS];
    ptx::named_barrier<WARP_COUNT * 32>(barrier); /* the partials are written */
    if (warp == 0 && lane == 0) {
        if (S::IN_PARTS || party.members > 1)
            merged = joint::arrive(party, found.run.end - found.run.begin, block.with.patience_ns);
        else
            merged = rows::arrive<typename S::rules>(block.call, work, found.unit, found.run, found.by);
    }
    __syncwarp(); /* the barrier counts whole warps */
    ptx::named_barrier<WARP_COUNT * 32>(barrier);
    ptx::named_barrier<WARP_COUNT * 32>(barrier); /* for racecheck, which does not see that the first one orders */
    block_place<S> copy = block;                  /* what is passed by its address is in memory */
    uint32_t members = merged;
    if (S::HAS_OWN_PARTIALS && !S::IN_PARTS) ptx::wait_for_previous_launch(); /* end_run */
    if constexpr (!S::IN_PARTS) {
        if (party.members <= 1 && members != 0) merge_rows<S, many_rows<S>>(copy, found, warp, WARP_COUNT, lane);
        if (party.members <= 1) return;
    }
    for (; members != 0; members &= members - 1) {
        uint32_t first = __ffs(members) - 1 + party.members * warp, step = party.members * WARP_COUNT;
        if constexpr (S::IN_PARTS)
            merge_rows_in_turn(copy, found, first, step, lane);
        else if constexpr (S::TALL)
            merge_rows<S, two_rows>(copy, found, first, step, lane);
        else
            merge_few_rows<S>(copy, found, first, step, lane);
    }
}

} /* namespace wide */

#endif
