/*
 * Finished rows: the states of several warps merged, written out or left as partial results, and the merge of a
 * unit that was cut. A warp has a row at a time, spread over its lanes.
 */
#ifndef ATTND_KERNELS_CUDA_ROWS_CUH
#define ATTND_KERNELS_CUDA_ROWS_CUH

#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/line.cuh"
#include "kernels/cuda/results.cuh"

namespace rows {

using line::ALL_LANES;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

/* ------------------------------------------------------------------------------------------- */
/* The workspace */

struct workspace {
    uint32_t *tickets;       /* [slots] tiles done of the unit that the slot's worker, or chunk, begins */
    uint64_t *joint_tickets; /* [slots / 2] of units that are merged jointly (joint.cuh), by worker */
    float2 *states;          /* [slots, rows] maximum in units of log2, and sum; batch_invariant: LSE, and nothing */
    float *outs;             /* [slots, rows, head_dim_v] not normalised; batch_invariant: normalised */
    uint32_t slots;
};

__host__ __device__ inline size_t round_up(size_t bytes) { return (bytes + 127) / 128 * 128; }

/* Of all that a workspace is viewed as. */
__host__ inline size_t workspace_bytes(uint32_t slots, uint32_t rows, uint32_t columns) {
    size_t all = (size_t)slots * rows;
    return round_up(slots * sizeof(uint32_t)) + round_up(slots / 2 * sizeof(uint64_t)) +
           round_up(all * sizeof(float2)) + all * columns * sizeof(float);
}

__host__ __device__ inline workspace view_workspace(const attn_cuda_workspace &from) {
    char *memory = (char *)from.memory;
    workspace view;
    view.slots = from.slots;
    view.tickets = (uint32_t *)memory;
    memory += round_up(from.slots * sizeof(uint32_t));
    view.joint_tickets = (uint64_t *)memory;
    memory += round_up(from.slots / 2 * sizeof(uint64_t));
    view.states = (float2 *)memory;
    view.outs = (float *)(memory + round_up((size_t)from.slots * from.rows * sizeof(float2)));
    return view;
}

/* ------------------------------------------------------------------------------------------- */
/* A row of COLUMNS floats: part p, element e of a lane is column (p * 32 + lane) * WIDTH + e */

template <uint32_t COLUMNS> struct row {
    static constexpr uint32_t WIDTH = COLUMNS % 128 == 0 ? 4 : COLUMNS % 64 == 0 ? 2 : 1;
    static constexpr uint32_t PARTS = COLUMNS / (32 * WIDTH);
    float parts[PARTS][WIDTH];
};

template <uint32_t WIDTH> struct words;
template <> struct words<1> { using type = float; };
template <> struct words<2> { using type = float2; };
template <> struct words<4> { using type = float4; };

template <uint32_t COLUMNS> __device__ inline row<COLUMNS> load_row(const float *from, uint32_t lane) {
    using word = typename words<row<COLUMNS>::WIDTH>::type;
    row<COLUMNS> loaded;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
        *(word *)loaded.parts[p] = ((const word *)from)[p * 32 + lane];
    }
    return loaded;
}

/* Past the L1 cache: what other multiprocessors have written. */
template <uint32_t COLUMNS> __device__ inline row<COLUMNS> load_row_of_others(const float *from, uint32_t lane) {
    using word = typename words<row<COLUMNS>::WIDTH>::type;
    row<COLUMNS> loaded;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
        *(word *)loaded.parts[p] = __ldcg((const word *)from + p * 32 + lane);
    }
    return loaded;
}

template <uint32_t COLUMNS> __device__ inline void store_row(float *to, const row<COLUMNS> &stored, uint32_t lane) {
    using word = typename words<row<COLUMNS>::WIDTH>::type;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
        ((word *)to)[p * 32 + lane] = *(const word *)stored.parts[p];
    }
}

/* The same, into lines of the L2 cache that are the last to be evicted. */
template <uint32_t COLUMNS>
__device__ inline void store_row_to_stay(float *to, const row<COLUMNS> &stored, uint32_t lane) {
    using word = typename words<row<COLUMNS>::WIDTH>::type;
    uint64_t policy = ptx::evict_last_policy();
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
        ptx::store_with_policy((word *)to + p * 32 + lane, *(const word *)stored.parts[p], policy);
    }
}

template <uint32_t COLUMNS> __device__ inline void clear_row(row<COLUMNS> &cleared) {
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
#pragma unroll
        for (uint32_t e = 0; e < row<COLUMNS>::WIDTH; e++) {
            cleared.parts[p][e] = 0.0f;
        }
    }
}

/* sum = sum * keep + added * factor */
template <uint32_t COLUMNS>
__device__ inline void add_row(row<COLUMNS> &sum, float keep, const row<COLUMNS> &added, float factor) {
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
#pragma unroll
        for (uint32_t e = 0; e < row<COLUMNS>::WIDTH; e++) {
            sum.parts[p][e] = fmaf(added.parts[p][e], factor, sum.parts[p][e] * keep);
        }
    }
}

template <uint32_t COLUMNS> __device__ inline void scale_row(row<COLUMNS> &scaled, float factor) {
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
#pragma unroll
        for (uint32_t e = 0; e < row<COLUMNS>::WIDTH; e++) {
            scaled.parts[p][e] *= factor;
        }
    }
}

template <typename IO, uint32_t COLUMNS>
__device__ inline void write_elements(IO *to, const row<COLUMNS> &written, uint32_t dtype, uint32_t lane) {
    constexpr uint32_t WIDTH = row<COLUMNS>::WIDTH;
    struct alignas(sizeof(IO) * WIDTH) elements {
        IO of[WIDTH];
    };
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
        elements packed;
#pragma unroll
        for (uint32_t e = 0; e < WIDTH; e++) {
            packed.of[e] = results::from_float<IO>(written.parts[p][e], dtype);
        }
        ((elements *)to)[p * 32 + lane] = packed;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Rows sent */

/*
 * A row that says by itself that it is there: what is sent are its floats inverted, bit by bit, to memory that holds
 * zeros; 0 would be a NaN with all bits set, which no arithmetic makes. Who reads it makes its words 0 again. So
 * neither has to wait for a count, or for a launch's end. mail.cuh sends partial results so.
 */
__device__ inline uint32_t sent(float number) { return ~__float_as_uint(number); }

__device__ inline void send(uint32_t *to, float number) { ptx::store_relaxed(to, sent(number)); }

/* A lane's words of a row, as they lie in memory. */
template <uint32_t COLUMNS> struct row_words {
    using row = rows::row<COLUMNS>;
    uint32_t parts[row::PARTS][row::WIDTH];
};

template <uint32_t COLUMNS>
__device__ inline void store_words(uint32_t *to, const row_words<COLUMNS> &words, uint32_t lane) {
    constexpr uint32_t WIDTH = row<COLUMNS>::WIDTH;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
        uint32_t *at = to + (p * 32 + lane) * WIDTH;
        const uint32_t(&part)[WIDTH] = words.parts[p];
        if constexpr (WIDTH == 4)
            ptx::store_relaxed(at, make_uint4(part[0], part[1], part[2], part[3]));
        else if constexpr (WIDTH == 2)
            ptx::store_relaxed(at, make_uint2(part[0], part[1]));
        else
            ptx::store_relaxed(at, part[0]);
    }
}

template <uint32_t COLUMNS>
__device__ inline void load_words(row_words<COLUMNS> &words, const uint32_t *from, uint32_t lane) {
    constexpr uint32_t WIDTH = row<COLUMNS>::WIDTH;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
        const uint32_t *at = from + (p * 32 + lane) * WIDTH;
        uint32_t(&part)[WIDTH] = words.parts[p];
        if constexpr (WIDTH == 4) {
            uint4 loaded = ptx::load_relaxed_4(at);
            part[0] = loaded.x, part[1] = loaded.y, part[2] = loaded.z, part[3] = loaded.w;
        } else if constexpr (WIDTH == 2) {
            uint2 loaded = ptx::load_relaxed_2(at);
            part[0] = loaded.x, part[1] = loaded.y;
        } else {
            part[0] = ptx::load_relaxed_1(at);
        }
    }
}

/* Have all of the lane's words come? */
template <uint32_t COLUMNS> __device__ inline bool have_come(const row_words<COLUMNS> &words) {
    bool are_there = true;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
#pragma unroll
        for (uint32_t e = 0; e < row<COLUMNS>::WIDTH; e++)
            are_there = are_there && words.parts[p][e] != 0;
    }
    return are_there;
}

template <uint32_t COLUMNS> __device__ inline void send_row(uint32_t *to, const row<COLUMNS> &written, uint32_t lane) {
    row_words<COLUMNS> words;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
#pragma unroll
        for (uint32_t e = 0; e < row<COLUMNS>::WIDTH; e++)
            words.parts[p][e] = sent(written.parts[p][e]);
    }
    store_words<COLUMNS>(to, words, lane);
}

template <uint32_t COLUMNS> __device__ inline void clear_words(uint32_t *to, uint32_t lane) {
    row_words<COLUMNS> zeros = {};
    store_words<COLUMNS>(to, zeros, lane);
}

/* The row of some words; `inverted`: all bits set if it was sent, 0 if it was stored. */
template <uint32_t COLUMNS>
__device__ inline row<COLUMNS> row_of_words(const row_words<COLUMNS> &words, uint32_t inverted) {
    row<COLUMNS> received;
#pragma unroll
    for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
#pragma unroll
        for (uint32_t e = 0; e < row<COLUMNS>::WIDTH; e++)
            received.parts[p][e] = __uint_as_float(words.parts[p][e] ^ inverted);
    }
    return received;
}

/* ------------------------------------------------------------------------------------------- */
/* States */

/* A row that is not finished: not normalised, relative to 2^maximum. */
template <uint32_t COLUMNS> struct row_state {
    row<COLUMNS> out;
    float maximum, sum;
};

/* A power of two of x <= 0, or of what -inf - -inf comes to where nothing has been seen: 0. */
__device__ inline float decay(float x, float maximum) {
    return maximum == -INFINITY ? 0.0f : ptx::exp2_fast(x - maximum);
}

template <uint32_t COLUMNS> __device__ inline row_state<COLUMNS> empty_state() {
    row_state<COLUMNS> state;
    clear_row(state.out);
    state.maximum = -INFINITY;
    state.sum = 0.0f;
    return state;
}

template <uint32_t COLUMNS>
__device__ inline void merge_state(row_state<COLUMNS> &into, const row<COLUMNS> &out, float maximum, float sum) {
    float most = fmaxf(into.maximum, maximum);
    float keep = decay(into.maximum, most), factor = decay(maximum, most);
    add_row(into.out, keep, out, factor);
    into.sum = fmaf(sum, factor, into.sum * keep);
    into.maximum = most;
}

/* What the row's LSE is, and its outputs are divided by: 1 where nothing was seen. */
__device__ inline float lse_of(float maximum, float sum) {
    return sum == 0.0f ? -INFINITY : (maximum + __log2f(sum)) * LN_2;
}

__device__ inline float normaliser(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

/* 1 unless the cache is fp8. */
__device__ inline float value_scale(const attn_cuda_call &call, uint32_t head) {
    return call.layer.value_scales != nullptr ? call.layer.value_scales[head] : 1.0f;
}

/* ------------------------------------------------------------------------------------------- */
/* Writing */

/* A row of the call: row `index` of a unit's block. */
struct place {
    const line::unit &unit;
    const line::cut &cut;
    uint32_t index;
};

template <typename L>
__device__ inline results::destination destination_of(const attn_cuda_call &call, const place &at, uint32_t chunk) {
    uint32_t query = L::SIMPLE ? 0 : line::query_of(at.cut, at.index);
    return results::find_destination(call, at.unit.of, at.unit.block * at.cut.block_queries + query,
                                     at.unit.head * at.cut.group + at.index - query * at.cut.group, chunk);
}

/* Are the unit's results merged with what its rows have apart, of the prefix, or of their own tokens? Here, or later?
 */
__device__ inline bool is_sharing(const attn_cuda_call &call, const line::unit &unit) {
    return unit.sequence < call.sharing;
}

template <typename L> __device__ inline bool adds_shared(const attn_cuda_call &call, const line::unit &unit) {
    return is_sharing(call, unit) && (!L::LEAVES || call.shared_out != nullptr);
}

/* Where a finished row goes: if its results are merged later, to the partial rows. */
template <typename L>
__device__ inline results::destination final_destination_of(const attn_cuda_call &call, const place &at) {
    results::destination to = destination_of<L>(call, at, 0);
    if (!L::LEAVES || !is_sharing(call, at.unit)) return to;
    if (call.shared_out == nullptr) {
        to.is_partial = true;
        to.sink = nullptr;
    } else if (!L::SIMPLE && at.unit.of.is_prefix) { /* with which its sequences' rows are complete */
        uint32_t row = at.index - line::query_of(at.cut, at.index) * at.cut.group;
        to.is_partial = false;
        to.sink = call.sinks != nullptr ? &call.sinks[at.unit.head * at.cut.group + row] : nullptr;
    }
    return to;
}

/* Adds what the row has apart, in units of log2; its sum is 1, since it is normalised. */
template <uint32_t COLUMNS>
__device__ inline void add_shared(const attn_cuda_call &call, size_t row, row_state<COLUMNS> &state, uint32_t lane) {
    merge_state(state, load_row_of_others<COLUMNS>(call.shared_out + row * COLUMNS, lane),
                __ldcg(&call.shared_lse[row]) * LOG2_E, 1.0f);
}

/* Writes a finished row, adding the sink; its outputs are to be multiplied by `scale`. */
template <typename L, typename IO, uint32_t COLUMNS>
__device__ inline void write_row_to(const attn_cuda_call &call, const results::destination &to,
                                    row_state<COLUMNS> &state, float scale, uint32_t lane) {
    if (to.sink != nullptr) {
        float sink = *to.sink * LOG2_E, most = fmaxf(state.maximum, sink);
        float keep = decay(state.maximum, most);
        scale_row(state.out, keep);
        state.sum = fmaf(state.sum, keep, decay(sink, most));
        state.maximum = most;
    }
    scale_row(state.out, normaliser(state.sum) * scale);
    if (L::SENDS && call.sends_rows && to.is_partial) {
        send_row((uint32_t *)call.partial_out + to.row * COLUMNS, state.out, lane);
        if (lane == 0) send((uint32_t *)call.partial_lse + to.row, lse_of(state.maximum, state.sum));
        return;
    }
    if (L::LEAVES && to.is_partial) {
        store_row(call.partial_out + to.row * COLUMNS, state.out, lane);
    } else {
        write_elements((IO *)call.out + to.row * COLUMNS, state.out, call.layer.dtype, lane);
    }
    if (lane == 0) results::write_lse(call, to, lse_of(state.maximum, state.sum));
}

/* Writes a finished row, adding what it has apart and the sink. */
template <typename L, typename IO, uint32_t COLUMNS>
__device__ inline void write_row(const attn_cuda_call &call, const place &at, row_state<COLUMNS> &state,
                                 uint32_t lane) {
    results::destination to = final_destination_of<L>(call, at);
    float scale = value_scale(call, at.unit.head);
    if (adds_shared<L>(call, at.unit)) {
        scale_row(state.out, scale);
        scale = 1.0f;
        add_shared(call, to.row, state, lane);
    }
    write_row_to<L, IO>(call, to, state, scale, lane);
}

/* ------------------------------------------------------------------------------------------- */
/* Merging a unit that was cut */

/* Partials of a row that a warp has on their way. */
template <uint32_t COLUMNS> constexpr uint32_t AHEAD = COLUMNS <= 128 ? 8 : 4;

/* Adds AHEAD partials of a row, of which lane i has the state of partial i % AHEAD. By a warp. */
template <uint32_t COLUMNS>
__device__ inline void add_partials(row_state<COLUMNS> &merged, const row<COLUMNS> (&coming)[AHEAD<COLUMNS>],
                                    float2 state) {
    constexpr uint32_t COUNT = AHEAD<COLUMNS>;
    float most = state.x;
#pragma unroll
    for (uint32_t step = COUNT / 2; step > 0; step /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
    most = fmaxf(most, merged.maximum);
    float keep = decay(merged.maximum, most), factor = decay(state.x, most), sum = state.y * factor;
#pragma unroll
    for (uint32_t step = COUNT / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    merged.sum = fmaf(merged.sum, keep, sum);
    merged.maximum = most;
    scale_row(merged.out, keep);
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++)
        add_row(merged.out, 1.0f, coming[i], __shfl_sync(ALL_LANES, factor, i));
}

/*
 * Merges partials begin .. end - 1 of a row; row_of(i) is where among all rows of the workspace the i-th is. Their
 * states are loaded beside them, so that a round takes as long as one load.
 */
template <uint32_t COLUMNS, typename ROW_OF>
__device__ inline row_state<COLUMNS> merge_stored_partials(const workspace &work, ROW_OF row_of, uint32_t begin,
                                                           uint32_t end, uint32_t lane) {
    constexpr uint32_t COUNT = AHEAD<COLUMNS>;
    row_state<COLUMNS> merged = empty_state<COLUMNS>();
#pragma unroll 1
    for (uint32_t base = begin; base < end; base += COUNT) {
        row<COLUMNS> coming[COUNT];
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) {
            clear_row(coming[i]); /* or the compiler keeps registers for what it might be, in all loops around */
            if (base + i < end) {
                coming[i] = load_row_of_others<COLUMNS>(work.outs + row_of(base + i) * COLUMNS, lane);
            }
        }
        float2 state = make_float2(-INFINITY, 0.0f);
        if (base + lane % COUNT < end) state = __ldcg(work.states + row_of(base + lane % COUNT));
        add_partials(merged, coming, state);
    }
    return merged;
}

/* Of `count` partials; ROWS rows a slot. Partial i is slot 2 * (first + i), but the first is its worker's tail slot. */
template <typename L, typename IO, uint32_t COLUMNS, uint32_t ROWS>
__device__ inline void merge_partials(const attn_cuda_call &call, const workspace &work, const place &at,
                                      uint32_t first, uint32_t count, uint32_t lane) {
    auto row_of = [&](uint32_t i) { return (size_t)(2 * (first + i) + (i == 0)) * ROWS + at.index; };
    row_state<COLUMNS> merged = merge_stored_partials<COLUMNS>(work, row_of, 0, count, lane);
    write_row<L, IO>(call, at, merged, lane);
}

/* The double of lane `from`. */
__device__ inline double shuffle(double value, uint32_t from) { return __shfl_sync(ALL_LANES, value, from); }

/* A row's chunks in the workspace, from the first one's slot on. */
template <uint32_t COLUMNS, uint32_t ROWS> struct stored_row {
    const float *outs;
    const float2 *states;

    __device__ float lse_of(uint32_t chunk) const { return __ldcg(&states[(size_t)chunk * ROWS]).x; }
    __device__ row<COLUMNS> load(uint32_t chunk, uint32_t lane) const {
        return load_row_of_others<COLUMNS>(outs + (size_t)chunk * ROWS * COLUMNS, lane);
    }
};

/*
 * batch_invariant: of `count` chunks, to the bit as attn_combine_row does it. The lanes compute the exponentials of 32
 * chunks, all add them in order. FROM: like stored_row.
 */
template <typename IO, uint32_t COLUMNS, typename FROM>
__device__ __noinline__ void merge_chunks(const attn_cuda_call &call, FROM from, results::destination to,
                                          uint32_t count, uint32_t lane) {
    constexpr uint32_t AHEAD = COLUMNS <= 128 ? 8 : 4; /* chunks whose rows are on their way; divides 32 */
    row<COLUMNS> coming[AHEAD];
    auto load = [&](uint32_t first) {
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            clear_row(coming[i]); /* likewise */
            if (first + i < count) coming[i] = from.load(first + i, lane);
        }
    };
    auto lse_of = [&](uint32_t c) { return c < count ? from.lse_of(c) : -INFINITY; };
    load(0);

    float lse = lse_of(lane), largest = fmaxf(to.sink != nullptr ? *to.sink : -INFINITY, lse);
#pragma unroll 4
    for (uint32_t c = lane + 32; c < count; c += 32) {
        largest = fmaxf(largest, from.lse_of(c));
    }
    for (uint32_t step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
    }
    results::row_weights weights;
    weights.largest = largest;
    weights.total = 0.0;
    weights.any = to.sink != nullptr && *to.sink != -INFINITY;
    if (weights.any) weights.total = attn_fixed_exp(*to.sink - weights.largest);
    double power = results::power_of(weights, lse);
#pragma unroll 1
    for (uint32_t base = 0;;) {
        weights.any |= __any_sync(ALL_LANES, lse != -INFINITY);
#pragma unroll 4
        for (uint32_t i = 0; i < min(32u, count - base); i++)
            weights.total += shuffle(power, i); /* of a chunk without tokens 0, which changes no sum */
        base += 32;
        if (base >= count) break;
        lse = lse_of(base + lane);
        power = results::power_of(weights, lse);
    }

    row<COLUMNS> sum;
    clear_row(sum);
    float weight = 0.0f;
    uint32_t seen = 0;
#pragma unroll 1
    for (uint32_t first = 0; weights.any;) {
        if (first % 32 == 0) {
            if (count > 32) {
                lse = lse_of(first + lane);
                power = results::power_of(weights, lse);
            }
            weight = (float)(power / weights.total);
            seen = __ballot_sync(ALL_LANES, lse != -INFINITY);
        }
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            float factor = __shfl_sync(ALL_LANES, weight, first % 32 + i);
            if (!(seen >> (first % 32 + i) & 1)) continue;
            scale_row(coming[i], factor);
#pragma unroll
            for (uint32_t p = 0; p < row<COLUMNS>::PARTS; p++) {
#pragma unroll
                for (uint32_t e = 0; e < row<COLUMNS>::WIDTH; e++)
                    sum.parts[p][e] += coming[i].parts[p][e];
            }
        }
        first += AHEAD;
        if (first >= count) break;
        load(first);
    }
    write_elements((IO *)call.out + to.row * COLUMNS, sum, call.layer.dtype, lane);
    if (lane == 0) results::write_lse(call, to, results::merged_lse(weights));
}

/* What a unit's only chunk is to be multiplied by, and what its LSE becomes, where there is a sink. */
static __device__ __noinline__ float2 weigh_with_sink(float lse, const float *sink) {
    results::row_weights weights = results::weigh(1, sink, [&](uint32_t) { return lse; });
    return make_float2(results::weight_of(weights, lse), results::merged_lse(weights));
}

/* batch_invariant: writes a row that has only one chunk, normalised, to the bit as merge_chunks would. */
template <typename L, typename IO, uint32_t COLUMNS>
__device__ inline void write_only_chunk(const attn_cuda_call &call, const place &at, row<COLUMNS> &out, float lse,
                                        uint32_t lane) {
    results::destination to = destination_of<L>(call, at, 0);
    if (to.sink != nullptr) {
        float2 weighed = weigh_with_sink(lse, to.sink);
        scale_row(out, weighed.x);
        lse = weighed.y;
    }
    row<COLUMNS> sum;
    clear_row(sum);
    add_row(sum, 1.0f, out, 1.0f); /* -0 becomes 0 */
    write_elements((IO *)call.out + to.row * COLUMNS, sum, call.layer.dtype, lane);
    if (lane == 0) results::write_lse(call, to, lse);
}

/* ------------------------------------------------------------------------------------------- */
/* Runs */

/* Some consecutive tiles of one unit, done by one worker. In batch_invariant mode, one chunk. */
struct run {
    uint32_t begin, end; /* in the line */
};

/* What a run leaves behind besides finished rows. STAYS: in the L2 cache, since what is evicted costs memory's time. */
template <uint32_t COLUMNS, uint32_t ROWS, bool STAYS = false>
__device__ inline void store_partial(const workspace &work, uint32_t slot, uint32_t index, const row<COLUMNS> &out,
                                     float2 state, uint32_t lane) {
    ptx::require(slot < work.slots && index < ROWS);
    if (slot >= work.slots) return; /* never, if the host has counted as the device does */
    float *to = work.outs + ((size_t)slot * ROWS + index) * COLUMNS;
    if constexpr (STAYS) {
        store_row_to_stay(to, out, lane);
    } else {
        store_row(to, out, lane);
    }
    if (lane == 0) work.states[(size_t)slot * ROWS + index] = state;
}

/* Who does the run, and how the line was cut. */
struct worker {
    uint32_t number;
    uint32_t tiles_a_worker; /* 0: the worker has a part of a unit that has workers of its own */
    uint32_t chunk_shift;    /* line.cuh */
};

/* A chunk's slot, or its worker's head or tail slot. */
template <typename L>
__device__ inline uint32_t slot_of(const attn_cuda_call &call, const line::unit &unit, const run &done,
                                   const worker &by) {
    if (line::is_batch_invariant<L>(call)) return done.begin >> by.chunk_shift;
    return 2 * by.number + (done.begin == unit.begin);
}

/* The ticket that counts a unit's tiles: of its first chunk, or of the worker that begins it. */
template <typename L>
__device__ inline uint32_t ticket_of(const attn_cuda_call &call, const line::unit &unit, const worker &by) {
    return line::is_batch_invariant<L>(call) ? unit.begin >> by.chunk_shift
                                             : line::divide(unit.begin, by.tiles_a_worker);
}

/* batch_invariant: has the unit no other chunk, so that nothing is to be merged? */
template <typename L> __device__ inline bool is_only_chunk(const attn_cuda_call &call, const line::unit &unit) {
    return unit.of.chunk_stride == 0 && unit.sees.tiles >> line::chunk_shift<L>(call) == 1;
}

/* Delivers a row of a run: to where it ends if the run is a whole unit or a part's chunk, else as a partial. */
template <typename L, typename IO, uint32_t COLUMNS, uint32_t ROWS>
__device__ inline void deliver_row(const attn_cuda_call &call, const workspace &work, const place &at, const run &done,
                                   const worker &by, row_state<COLUMNS> &state, uint32_t lane) {
    if (!line::is_batch_invariant<L>(call)) {
        if (done.end - done.begin == at.unit.sees.tiles) {
            write_row<L, IO>(call, at, state, lane);
        } else {
            store_partial<COLUMNS, ROWS>(work, slot_of<L>(call, at.unit, done, by), at.index, state.out,
                                         make_float2(state.maximum, state.sum), lane);
        }
        return;
    }
    scale_row(state.out, normaliser(state.sum) * value_scale(call, at.unit.head));
    float lse = lse_of(state.maximum, state.sum);
    if (is_only_chunk<L>(call, at.unit)) {
        write_only_chunk<L, IO>(call, at, state.out, lse, lane);
        return;
    }
    if (at.unit.of.chunk_stride == 0) {
        store_partial<COLUMNS, ROWS>(work, slot_of<L>(call, at.unit, done, by), at.index, state.out,
                                     make_float2(lse, 0.0f), lane);
        return;
    }
    uint32_t chunk = (at.unit.sees.first_token + (done.begin - at.unit.begin) * L::TOKENS) / ATTN_CHUNK_TOKENS;
    if (chunk * ATTN_CHUNK_TOKENS >= at.unit.of.length) return; /* a part without any token */
    results::destination to = destination_of<L>(call, at, chunk);
    store_row(call.partial_out + to.row * COLUMNS, state.out, lane);
    if (lane == 0) results::write_lse(call, to, lse);
}

/* Has the run left partials that somebody must merge? */
template <typename L>
__device__ inline bool is_cut(const attn_cuda_call &call, const line::unit &unit, const run &done) {
    if (line::is_batch_invariant<L>(call)) return unit.of.chunk_stride == 0 && !is_only_chunk<L>(call, unit);
    return done.end - done.begin != unit.sees.tiles;
}

/* Takes a ticket for the run's tiles: is it the unit's last? By one thread, after all have met at a barrier. */
template <typename L>
__device__ inline bool arrive(const attn_cuda_call &call, const workspace &work, const line::unit &unit,
                              const run &done, const worker &by) {
    uint32_t *ticket = &work.tickets[ticket_of<L>(call, unit, by)];
    ptx::require(ticket_of<L>(call, unit, by) < work.slots);
    uint32_t tiles = done.end - done.begin;
    bool last = ptx::atomic_add_acquire_release(ticket, tiles) + tiles == unit.sees.tiles;
    if (last) *ticket = 0; /* for the next launch */
    return last;
}

/* Row `index` of a unit's chunks in the workspace. */
template <uint32_t COLUMNS, uint32_t ROWS>
__device__ inline stored_row<COLUMNS, ROWS> find_stored(const workspace &work, const line::unit &unit, uint32_t index,
                                                        const worker &by) {
    size_t first = (size_t)(unit.begin >> by.chunk_shift) * ROWS + index;
    return {work.outs + first * COLUMNS, work.states + first};
}

/* batch_invariant: the last to arrive merges the unit's row. */
template <typename L, typename IO, uint32_t COLUMNS, uint32_t ROWS>
__device__ inline void merge_chunks_of(const attn_cuda_call &call, const workspace &work, const place &at,
                                       const worker &by, uint32_t lane) {
    merge_chunks<IO, COLUMNS>(call, find_stored<COLUMNS, ROWS>(work, at.unit, at.index, by),
                              destination_of<L>(call, at, 0), at.unit.sees.tiles >> by.chunk_shift, lane);
}

/* Rows of a unit that a warp merges at the same time, so that they take as long as one. */
constexpr uint32_t TOGETHER = 2;

/*
 * Otherwise it merges row `at.index`, the STEP-th after it, .. (TOGETHER at most) of the unit's `count`. As
 * merge_partials() does it, to the bit, and from the same slots, but a load's address is another's and a constant: this
 * is code that a block may have to fetch at a launch's very end.
 */
template <typename L, typename IO, uint32_t COLUMNS, uint32_t ROWS, uint32_t STEP>
__device__ inline void merge_cut_rows(const attn_cuda_call &call, const workspace &work, const place &at,
                                      uint32_t count, const worker &by, uint32_t lane) {
    constexpr uint32_t COUNT = AHEAD<COLUMNS>, A_SLOT = 2 * ROWS; /* rows from a worker's slot to the next one's */
    uint32_t first = line::divide(at.unit.begin, by.tiles_a_worker), share = by.tiles_a_worker;
    uint32_t before = at.unit.begin - first * share; /* tiles of the first worker's */
    int32_t left = (int32_t)line::divide(before + at.unit.sees.tiles + share - 1, share);
    size_t begin = (size_t)first * A_SLOT + at.index;
    const float *outs = work.outs + begin * COLUMNS + lane * row<COLUMNS>::WIDTH;
    const float2 *states = work.states + begin + lane % COUNT * A_SLOT;
    uint32_t tail = ROWS; /* the first partial is in its worker's tail slot */
    row_state<COLUMNS> merged[TOGETHER];
#pragma unroll
    for (uint32_t r = 0; r < TOGETHER; r++)
        merged[r] = empty_state<COLUMNS>();
#pragma unroll 1
    for (; left > 0; left -= COUNT) {
        asm volatile("" : "+l"(outs)); /* or the compiler keeps a pointer for each partial */
        const float *head = outs + tail * COLUMNS;
        row<COLUMNS> coming[TOGETHER][COUNT];
        float2 state[TOGETHER];
#pragma unroll
        for (uint32_t r = 0; r < TOGETHER; r++) {
            bool is_row = r == 0 || at.index + r * STEP < count;
            state[r] = make_float2(-INFINITY, 0.0f);
            if (is_row && (int32_t)(lane % COUNT) < left)
                state[r] = __ldcg(states + r * STEP + (lane % COUNT == 0 ? tail : 0));
#pragma unroll
            for (uint32_t i = 0; i < COUNT; i++) {
                clear_row(coming[r][i]); /* as in merge_stored_partials */
                const float *from = i == 0 ? head : outs + i * A_SLOT * COLUMNS;
                if (is_row && (int32_t)i < left)
                    coming[r][i] = load_row_of_others<COLUMNS>(from + r * STEP * COLUMNS, 0);
            }
        }
#pragma unroll
        for (uint32_t r = 0; r < TOGETHER; r++)
            add_partials(merged[r], coming[r], state[r]);
        outs += COUNT * A_SLOT * COLUMNS;
        states += COUNT * A_SLOT;
        tail = 0;
    }
#pragma unroll 1
    for (uint32_t r = 0; r < TOGETHER && at.index + r * STEP < count; r++) {
        write_row<L, IO>(call, {at.unit, at.cut, at.index + r * STEP}, merged[0], lane);
#pragma unroll
        for (uint32_t next = 1; next < TOGETHER; next++)
            merged[next - 1] = merged[next];
    }
}

} /* namespace rows */

#endif
