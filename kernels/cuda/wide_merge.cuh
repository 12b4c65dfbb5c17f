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

/* Are what rows have apart words that the launch before sends (rows.cuh)? */
template <typename S> __device__ inline bool are_sent(const block_place<S> &block) {
    return S::IN_PARTS && block.call.sends_rows;
}

/*
 * By the four lanes that have a row, of a unit in parts that is one part: what was sent for it becomes what would have
 * been stored. The launch that has sent it is over.
 */
template <typename S> __device__ inline void invert_sent(const attn_cuda_call &call, size_t row, uint32_t lane) {
    uint32_t *words = (uint32_t *)call.shared_out + row * S::DIM_V, *lse = (uint32_t *)call.shared_lse + row;
    for (uint32_t i = lane % 4; i < S::DIM_V; i += 4)
        __stcg(words + i, ~__ldcg(words + i));
    if (lane % 4 == 0) __stcg(lse, ~__ldcg(lse));
}

/* After it has been read: room for the next launch's words. */
template <typename S> __device__ inline void clear_sent(const attn_cuda_call &call, size_t row, uint32_t lane) {
    uint32_t *words = (uint32_t *)call.shared_out + row * S::DIM_V;
    for (uint32_t i = lane % 4; i < S::DIM_V; i += 4)
        words[i] = 0;
    if (lane % 4 == 0) ((uint32_t *)call.shared_lse)[row] = 0;
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

/* The same if it may have been sent. */
template <typename S>
__device__ inline void add_sent(const block_place<S> &block, size_t row, bool is_row, warp_state<S> &state,
                                uint32_t half, float &maximum, float &sum, uint32_t lane) {
    bool is_received = are_sent(block) && is_row;
    if (is_received) invert_sent<S>(block.call, row, lane);
    __syncwarp();
    add_shared<S>(block.call, row, state, half, maximum, sum, lane);
    __syncwarp();
    if (is_received) clear_sent<S>(block.call, row, lane);
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
        if (rows::adds_shared<typename S::rules>(block.call, found.unit)) {
            if constexpr (S::IN_PARTS)
                add_sent<S>(block, to.row, is_row, state, half, maximum, sum, own.lane);
            else
                add_shared<S>(block.call, to.row, state, half, maximum, sum, own.lane);
        }
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

/*
 * What a warp merges of a unit in parts, which are few: rows `first`, `first` + `step`, .. All partials of all of them
 * are copied to where the ring was; each row's are merged where the first of them is; and what the row has apart is
 * added when it is there, and the row written. The loops are short and mostly not unrolled, since this is code that is
 * fetched while all wait for it.
 */
template <typename S> struct staged_rows {
    static constexpr uint32_t MOST = 32; /* partials: of a warp, a lane each */
    static_assert(S::ROWS / (S::GROUPS * WARPS) + joint::MAX_MEMBERS <= MOST, "ceil(rows / (parts * warps)) * parts");
    static constexpr uint32_t BYTES = S::GROUPS * WARPS * MOST * S::DIM_V * sizeof(float); /* of all warps */
    float *outs;                                                                           /* [rows, parts, DIM_V] */
    float2 state;                /* of partial `lane`; then of its row */
    uint32_t first_of_row;       /* the first partial of that row */
    uint32_t parts;              /* of a row */
    uint32_t first, step, count; /* rows */

    __device__ float *out(uint32_t row, uint32_t part) const { return outs + (row * parts + part) * S::DIM_V; }

    __device__ float2 state_of(uint32_t row) const {
        return make_float2(__shfl_sync(ALL_LANES, state.x, row * parts), __shfl_sync(ALL_LANES, state.y, row * parts));
    }
};

/* Where the block's ring was, which nobody needs any more. */
template <typename S> __device__ inline float *ring_of(const block_place<S> &block) {
    return (float *)((char *)&block.memory - ring_bytes<S>(block.with.stages));
}

/*
 * Starts to copy the partials of a warp's rows, and to load their states: one load of all lanes, since loads to the
 * same register wait for each other.
 */
template <typename S>
__device__ inline void stage_partials(staged_rows<S> &rows, const unit_partials<S::ROWS> &of, uint32_t lane) {
    constexpr uint32_t PIECES = S::DIM_V / 4;
    uint32_t number = line::divide(lane, rows.parts), part = lane - number * rows.parts;
    rows.first_of_row = number * rows.parts;
    rows.state = make_float2(-INFINITY, 0.0f);
    if (number < rows.count) rows.state = __ldcg(of.states + of.place(part) + rows.first + number * rows.step);
    uint32_t to = ptx::shared_address(rows.outs) + lane * 16;
#pragma unroll 1
    for (uint32_t index = rows.first, left = rows.count; left > 0; left--, index += rows.step) {
        const float *from = of.outs + (size_t)index * S::DIM_V + lane * 4;
#pragma unroll 4
        for (uint32_t i = 0; i < rows.parts; i++, to += S::DIM_V * sizeof(float)) {
            if (PIECES == 32 || lane < PIECES) ptx::copy_16_bytes(to, from + (size_t)of.place(i) * S::DIM_V);
        }
    }
    ptx::copies_commit();
}

/* Merges them, each row where its first partial is. */
template <typename S> __device__ inline void merge_staged(staged_rows<S> &rows, uint32_t lane) {
    ptx::copies_wait<0>();
    __syncwarp();
    float most = -INFINITY, sum = 0.0f;
#pragma unroll 1
    for (uint32_t part = 0; part < rows.parts; part++)
        most = fmaxf(most, __shfl_sync(ALL_LANES, rows.state.x, rows.first_of_row + part));
    float factor = rows::decay(rows.state.x, most), weighed = rows.state.y * factor;
#pragma unroll 1
    for (uint32_t part = 0; part < rows.parts; part++)
        sum += __shfl_sync(ALL_LANES, weighed, rows.first_of_row + part);
    rows.state = make_float2(most, sum);
#pragma unroll 1
    for (uint32_t number = 0; number < rows.count; number++) {
        rows::row<S::DIM_V> out;
        rows::clear_row(out);
#pragma unroll 4
        for (uint32_t part = 0; part < rows.parts; part++) {
            float weight = __shfl_sync(ALL_LANES, factor, number * rows.parts + part);
            rows::add_row(out, 1.0f, rows::load_row<S::DIM_V>(rows.out(number, part), lane), weight);
        }
        rows::store_row(rows.out(number, 0), out, lane);
    }
}

/* What some of a warp's rows have apart, of what the launch before has found. */
template <typename S> struct rows_apart {
    static constexpr uint32_t COUNT = 4; /* at once */
    const uint32_t *rows, *lses;
    uint64_t row;      /* of row `lane`: where it is */
    uint32_t inverted; /* rows::row_of_words; 0: that launch is over */
    rows::row_words<S::DIM_V> words[COUNT];
    uint32_t lse; /* of row `lane` */
};

/* Loads those of rows `base` + i that are set in `missing`, bit i. */
template <typename S>
__device__ inline void load_apart(rows_apart<S> &apart, uint32_t base, uint32_t missing, uint32_t lane) {
#pragma unroll
    for (uint32_t r = 0; r < apart.COUNT; r++) {
        uint64_t at = __shfl_sync(ALL_LANES, apart.row, base + r);
        if (missing >> r & 1) rows::load_words<S::DIM_V>(apart.words[r], apart.rows + at * S::DIM_V, lane);
    }
    bool is_own = lane - base < apart.COUNT && (missing >> (lane - base) & 1) != 0;
    if (is_own) apart.lse = ptx::load_relaxed_1(apart.lses + apart.row);
}

/* Which of them have not come? */
template <typename S>
__device__ inline uint32_t find_missing(const rows_apart<S> &apart, uint32_t base, uint32_t missing, uint32_t lane) {
    if (apart.inverted == 0) return 0;
    uint32_t missing_lses = __ballot_sync(ALL_LANES, apart.lse == 0) >> base, still = 0;
#pragma unroll
    for (uint32_t r = 0; r < apart.COUNT; r++) {
        if (!__all_sync(ALL_LANES, rows::have_come<S::DIM_V>(apart.words[r]))) still |= 1u << r;
    }
    return missing & (still | missing_lses);
}

/* Writes row `number`, which has apart what is in words[0]. */
template <typename S>
__device__ inline void write_staged(const attn_cuda_call &call, const staged_rows<S> &rows, const rows_apart<S> &apart,
                                    const results::destination &first, uint32_t number, bool is_apart, uint32_t lane) {
    results::destination to = first;
    to.row = __shfl_sync(ALL_LANES, apart.row, number);
    to.sink = (const float *)__shfl_sync(ALL_LANES, (uint64_t)first.sink, number);
    float2 state = rows.state_of(number);
    rows::row_state<S::DIM_V> row = {rows::load_row<S::DIM_V>(rows.out(number, 0), lane), state.x, state.y};
    if (is_apart) {
        float lse = __uint_as_float(__shfl_sync(ALL_LANES, apart.lse, number) ^ apart.inverted);
        rows::merge_state(row, rows::row_of_words<S::DIM_V>(apart.words[0], apart.inverted), lse * LOG2_E, 1.0f);
    }
    rows::write_row_to<typename S::rules, typename S::IO>(call, to, row, 1.0f, lane);
    if (apart.inverted == 0) return;
    rows::clear_words<S::DIM_V>((uint32_t *)apart.rows + to.row * S::DIM_V, lane); /* for the next launch's */
    if (lane == 0) ptx::store_relaxed((uint32_t *)apart.lses + to.row, 0u);
}

/*
 * The same as merge_rows, of a unit in parts: rows first, first + step, .. By a warp, number `warp` of the block.
 *
 * What rows have apart is what the launch before finds, which may still be at work. If it sends it (rows::send_row) a
 * warp waits for its own rows' words alone. It cannot wait in vain: this launch's blocks start when all of that one's
 * run or have ended, and those wait for nobody here. All the same the blocks end only when that launch has, so that who
 * comes after this launch comes after both.
 */
template <typename S>
__device__ inline void merge_rows_of_parts(const block_place<S> &block, const found_run &found, uint32_t first,
                                           uint32_t step, uint32_t warp, uint32_t lane) {
    static_assert(S::KV::BYTES == 2, "no scales");
    using L = typename S::rules;
    if (first >= found.rows) return;
    rows::workspace work = workspace_of<S>(block.with);
    size_t first_row = (size_t)2 * found.first_worker * S::ROWS;
    unit_partials<S::ROWS> of = {work.outs + first_row * S::DIM_V, work.states + first_row, found.workers};
    staged_rows<S> rows = {};
    rows.outs = ring_of(block) + warp * (staged_rows<S>::MOST * S::DIM_V);
    rows.parts = found.workers;
    rows.first = first;
    rows.step = step;
    rows.count = (found.rows - first + step - 1) / step;
    __syncwarp(); /* others' rows, maybe, have been there */
    stage_partials(rows, of, lane);

    bool is_apart = rows::adds_shared<L>(block.call, found.unit), is_sent = is_apart && are_sent<S>(block);
    uint32_t index = first + min(lane, rows.count - 1) * step;
    results::destination own =
        rows::final_destination_of<L>(block.call, {found.unit, block.with.cut, rows_before<S>() + index});
    rows_apart<S> apart;
    apart.rows = (const uint32_t *)block.call.shared_out;
    apart.lses = (const uint32_t *)block.call.shared_lse;
    apart.row = own.row;
    apart.inverted = is_sent ? ~0u : 0;
    apart.lse = 0;
    if (!is_sent) {
        merge_staged(rows, lane);
        ptx::wait_for_previous_launch(); /* where they come from, or which may still read what is written */
    }
#pragma unroll 1
    for (uint32_t base = 0; base < rows.count; base += apart.COUNT) {
        uint32_t here = min(rows.count - base, apart.COUNT), missing = is_apart ? (1u << here) - 1 : 0;
        bool is_merged = !is_sent || base > 0;
#pragma unroll 1
        while (missing != 0) {
            load_apart(apart, base, missing, lane);
            if (!is_merged) merge_staged(rows, lane);
            is_merged = true;
            missing = find_missing(apart, base, missing, lane);
        }
#pragma unroll 1
        for (uint32_t r = 0; r < here; r++) {
            write_staged(block.call, rows, apart, own, base + r, is_apart, lane);
#pragma unroll
            for (uint32_t next = 1; next < apart.COUNT; next++)
                apart.words[next - 1] = apart.words[next];
        }
    }
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
            merge_rows_of_parts(block, found, first, step, warp, lane);
        else if constexpr (S::TALL)
            merge_rows<S, two_rows>(copy, found, first, step, lane);
        else
            merge_few_rows<S>(copy, found, first, step, lane);
    }
}

} /* namespace wide */

#endif
