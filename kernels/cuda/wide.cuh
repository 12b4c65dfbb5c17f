/*
 * The wide kernel: up to 64 rows a block (query rows x heads of the group), which are the rows of a warpgroup's
 * products,
 *     S [64 rows x 64 tokens] = Q K^T        O [64 rows x head_dim_v] += P V
 * Q, K and V in shared memory, S, P and O in registers.
 *
 * Two groups (a warpgroup each) take the block's tiles in turn, so that one's products and the other's powers overlap,
 * and keep a maximum, sum and output (m, l, O) each. At the end of a run one gives its state to the other, which ends
 * the run, by itself; they take turns at that, too. What the block's last run leaves to be merged all merge.
 *
 * sm_90a, 16-bit caches, no batch_invariant mode.
 */
#ifndef ATTND_KERNELS_CUDA_WIDE_CUH
#define ATTND_KERNELS_CUDA_WIDE_CUH

#include "kernels/cuda/narrow.cuh"

namespace wide {

using line::ALL_LANES;
using launching::arguments;
using narrow::GROUP_THREADS;
using narrow::softness;
using narrow::WARPS;
using rows::LOG2_E;

constexpr uint32_t ROWS = 64, TOKENS = 64;
constexpr uint32_t STEP = 16; /* what a product sums over */

/* A kernel's shape. */
template <typename KV_, uint32_t DIM_, uint32_t DIM_V_, uint32_t GROUPS_, bool SIMPLE> struct shape {
    using KV = KV_;
    using IO = typename KV::IO;
    static constexpr uint32_t DIM = DIM_, DIM_V = DIM_V_, GROUPS = GROUPS_;
    using stage = produce::stage_shape<KV, DIM, DIM_V, TOKENS, true>;
    using rules = line::rules<TOKENS, SIMPLE, false>;
    static constexpr uint32_t WIDTH = stage::VALUE_CHUNK / KV::BYTES; /* columns of a product with V */
    static_assert(KV::BYTES == 2 && DIM <= 2 * DIM_V, "");
};

constexpr uint32_t MAX_STAGES = 12;

/*
 * What a block has on its way while each group consumes a stage, more or less. With more all blocks get their first
 * tiles late, and some get more of the memory's time than others.
 */
constexpr uint32_t ON_THE_WAY = 96 * 1024;

/* What a block keeps in shared memory, behind the ring. */
template <typename S> struct block_memory {
    alignas(1024) char queries[S::GROUPS][ROWS * S::stage::KEY_BYTES]; /* of a group's run, in columns (layout.cuh) */
    uint2 visible[S::GROUPS][ROWS]; /* tokens that a row sees, from .x to before .y */
    float2 given[ROWS];             /* maxima and sums that one group gives to the other */
    uint64_t full[MAX_STAGES];
    uint64_t empty[MAX_STAGES];
    uint32_t last_arriver[S::GROUPS];
};

/* Who a thread is. */
struct group_place {
    uint32_t group, warp, lane; /* warp: of the group */

    __device__ uint32_t thread() const { return warp * 32 + lane; }

    /* The first or second row that a thread holds. */
    __device__ uint32_t row(uint32_t half) const { return warp * 16 + lane / 4 + half * 8; }
};

/*
 * A consumer warp on its way through the block's share. In local memory, and changed by functions that are not inlined:
 * the registers are the products'.
 */
template <typename S> struct consumer {
    const attn_cuda_call &call;
    const line::cut &cut;
    block_memory<S> &memory;
    rows::workspace work;
    rows::worker by;
    group_place place;
    line::share mine;
    uint32_t parts_left; /* of the share: the last run if that comes first, and the rest */
    uint32_t part_end;
    line::unit unit;
    rows::run run;
    uint32_t runs;       /* of the block up to this one */
    uint32_t tiles_done; /* of the block before the run */
};

/* ------------------------------------------------------------------------------------------- */
/* Queries */

/* Query rows of a unit's block, and all its rows. */
template <typename S> __device__ inline uint32_t count_queries(const line::cut &cut, const line::unit &unit) {
    return S::rules::SIMPLE ? 1 : min(cut.block_queries, unit.of.query_length - unit.block * cut.block_queries);
}

template <typename S> __device__ inline uint32_t count_rows(const line::cut &cut, const line::unit &unit) {
    return count_queries<S>(cut, unit) * cut.group;
}

/* Writes the block's queries to shared memory, zeros where it has fewer rows, and what each row sees. By the group. */
template <typename S> __device__ inline void load_queries(const consumer<S> &own) {
    using T = typename S::stage;
    constexpr uint32_t PIECES = T::KEY_BYTES / 16;
    const line::cut &cut = own.cut;
    const line::unit &unit = own.unit;
    uint32_t group = own.place.group, thread = own.place.thread();
    uint32_t count = count_rows<S>(cut, unit), query_first = unit.block * cut.block_queries;
    size_t first = ((size_t)unit.of.first_query + query_first) * own.call.layer.heads_q + unit.head * cut.group;
    char *queries = own.memory.queries[group];
    ptx::named_barrier<GROUP_THREADS>(group); /* all are done with those of the run before */
#pragma unroll
    for (uint32_t i = 0; i < ROWS * PIECES / GROUP_THREADS; i++) {
        uint32_t index = i * GROUP_THREADS + thread, row = index / PIECES, piece = index % PIECES;
        uint32_t query = S::rules::SIMPLE ? 0 : line::query_of(cut, row);
        size_t at = first + query * own.call.layer.heads_q + row - query * cut.group;
        uint4 loaded = make_uint4(0, 0, 0, 0);
        if (row < count) loaded = __ldg((const uint4 *)own.call.queries + at * PIECES + piece);
        *(uint4 *)(queries + layout::piece_offset(T::KEY_BYTES, ROWS, row, piece)) = loaded;
    }
    if (!S::rules::SIMPLE && thread < ROWS) {
        uint32_t row = thread, query = query_first + line::query_of(cut, row);
        uint2 sees = make_uint2(0, unit.sees.end);
        if (row < count) sees = results::row_visible(unit.of, own.call.window, query);
        own.memory.visible[group][row] = sees;
    }
    ptx::shared_proxy_fence();
    ptx::named_barrier<GROUP_THREADS>(group);
}

/* ------------------------------------------------------------------------------------------- */
/* Products */

/* A lane holds rows lane / 4 and lane / 4 + 8 of the warp's 16; of eight columns, 2 * (lane % 4) and the next. */
template <typename S> struct warp_state {
    float out[S::DIM_V / S::WIDTH][S::WIDTH / 2];
    float maximum[2]; /* of the scores, in units of log2; may lag behind the largest by SLACK */
    float sum[2];     /* of this lane's columns */
};

template <typename S> __device__ inline void clear_state(warp_state<S> &state) {
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = 0; i < S::WIDTH / 2; i++)
            state.out[d][i] = 0.0f;
    }
    state.maximum[0] = state.maximum[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0.0f;
}

template <typename S> __device__ inline void hold_out(warp_state<S> &state) {
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++)
        ptx::hold(state.out[d]);
}

/* Starts scores = Q K^T. */
template <typename S>
__device__ inline void multiply_keys(float (&scores)[TOKENS / 2], uint32_t queries, uint32_t stage) {
    using T = typename S::stage;
    constexpr uint32_t STEP_BYTES = STEP * S::KV::BYTES;
    ptx::matrix<T::KEY_CHUNK> a(queries, 16), b(stage, 16);
#pragma unroll
    for (uint32_t byte = 0; byte < T::KEY_BYTES; byte += STEP_BYTES) {
        uint32_t skip = byte / T::KEY_CHUNK * TOKENS * T::KEY_CHUNK + byte % T::KEY_CHUNK;
        S::KV::multiply_rows(scores, a.at(skip), b.at(skip), byte != 0);
    }
}

/* Starts out += P V. */
template <typename S>
__device__ inline void multiply_values(warp_state<S> &state, const uint32_t (&weights)[S::KV::TERMS][TOKENS / STEP][4],
                                       uint32_t stage) {
    using T = typename S::stage;
    constexpr uint32_t COLUMN_BYTES = TOKENS * T::VALUE_CHUNK;
    ptx::matrix<T::VALUE_CHUNK> b(stage + TOKENS * T::KEY_BYTES, COLUMN_BYTES);
#pragma unroll
    for (uint32_t k = 0; k < TOKENS / STEP; k++) {
#pragma unroll
        for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
            uint32_t skip = d * COLUMN_BYTES + k * STEP * T::VALUE_CHUNK;
#pragma unroll
            for (uint32_t t = 0; t < S::KV::TERMS; t++)
                S::KV::multiply_columns(state.out[d], weights[t][k], b.at(skip));
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* A tile */

constexpr uint32_t NO_TILE = UINT32_MAX;

/* What of a run a group has to know while it consumes its tiles. */
struct tile_run {
    uint32_t number;       /* in the block */
    uint32_t tiles;        /* the group's */
    uint32_t first_number; /* in the block, of the first of them.. */
    uint32_t first;        /* ..and its first token */
    uint32_t given;        /* the last tile of the group that gives its state, in the block; or NO_TILE: it has none */
    uint2 sees, all;       /* tokens that some row sees, and that every row sees */
    softness soft;
};

/* The same as narrow::bend, but without a call, which would have the products wait for each other. */
__device__ inline float bend_score(float score, const softness &soft) {
    float power = ptx::exp2_fast(score * soft.scale * (2.0f * LOG2_E / soft.softcap));
    return soft.softcap * (1.0f - __fdividef(2.0f, power + 1.0f));
}

/* Hides the scores of tokens that a row does not see. */
template <typename S>
__device__ inline void mask_scores(const group_place &own, float (&scores)[TOKENS / 2], const tile_run &run,
                                   const uint2 *visible) {
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint2 sees = make_uint2(0, run.sees.y);
        if (!S::rules::SIMPLE) sees = visible[own.row(half)];
#pragma unroll
        for (uint32_t i = 0; i < TOKENS / 4; i++) {
            uint32_t token = run.first + i / 2 * 8 + own.lane % 4 * 2 + i % 2;
            if (token < sees.x || token >= sees.y) scores[i / 2 * 4 + half * 2 + i % 2] = -INFINITY;
        }
    }
}

__device__ inline bool is_partly_unseen(const tile_run &run) {
    return run.first < run.sees.x || run.first + TOKENS > run.sees.y;
}

/* Zeros values that no row sees, since a weight of 0 does not hide what they may be. By the group. */
template <typename S>
__device__ inline void clear_unseen(const group_place &own, const tile_run &run, uint32_t stage) {
    using T = typename S::stage;
    constexpr uint32_t PIECES = T::VALUE_BYTES / 16;
#pragma unroll 1
    for (uint32_t i = own.thread(); i < TOKENS * PIECES; i += GROUP_THREADS) {
        uint32_t row = i / PIECES, token = run.first + row;
        if (token >= run.sees.x && token < run.sees.y) continue;
        uint32_t at = layout::piece_offset(T::VALUE_BYTES, TOKENS, row, i % PIECES);
        ptx::store_zeros(stage + TOKENS * T::KEY_BYTES + at);
    }
    ptx::shared_proxy_fence();
    ptx::named_barrier<GROUP_THREADS>(own.group);
}

/* Weights are relative to a maximum that moves only when they would exceed 2^SLACK: then the sums have to, too. */
constexpr float SLACK = 8.0f;

/* The largest, or the sum, of a row's scores that the lane holds: as a tree, since what waits for each other is slow. */
template <typename Add> __device__ inline float reduce_row(const float (&scores)[TOKENS / 2], uint32_t half, Add add) {
    float part[TOKENS / 8];
#pragma unroll
    for (uint32_t i = 0; i < TOKENS / 8; i++)
        part[i] = add(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]);
#pragma unroll
    for (uint32_t width = TOKENS / 16; width > 0; width /= 2) {
#pragma unroll
        for (uint32_t i = 0; i < width; i++)
            part[i] = add(part[i], part[i + width]);
    }
    return part[0];
}

/* Moves the maxima for a tile's scores; `factors`: what was summed before is to be multiplied by them. */
template <typename S>
__device__ inline void move_maxima(const float (&scores)[TOKENS / 2], warp_state<S> &state, float (&factors)[2],
                                   float scale_log2) {
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float largest = reduce_row(scores, half, [](float x, float y) { return fmaxf(x, y); });
        largest = ptx::quad_max(largest) * scale_log2;
        float maximum = largest > state.maximum[half] + SLACK ? largest : state.maximum[half];
        factors[half] = maximum == -INFINITY ? 1.0f : ptx::exp2_fast(state.maximum[half] - maximum);
        state.maximum[half] = maximum;
    }
}

/* By a warp: have maxima moved? */
__device__ inline bool have_moved(const float (&factors)[2]) {
    return __any_sync(ALL_LANES, factors[0] != 1.0f || factors[1] != 1.0f);
}

/* Brings what was summed down to the new maxima. */
template <typename S> __device__ inline void rescale(warp_state<S> &state, const float (&factors)[2]) {
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = 0; i < S::WIDTH / 2; i++)
            state.out[d][i] *= factors[i / 2 % 2];
    }
    state.sum[0] *= factors[0];
    state.sum[1] *= factors[1];
}

/* Scores become weights, which are summed and packed. */
template <typename S>
__device__ inline void soften(float (&scores)[TOKENS / 2], warp_state<S> &state,
                              uint32_t (&weights)[S::KV::TERMS][TOKENS / STEP][4], float scale_log2) {
    constexpr uint32_t LAST = S::KV::TERMS - 1;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float base = state.maximum[half] == -INFINITY ? 0.0f : state.maximum[half];
#pragma unroll
        for (uint32_t i = half * 2; i < TOKENS / 2; i += 4) {
            scores[i] = ptx::exp2_fast(fmaf(scores[i], scale_log2, -base));
            scores[i + 1] = ptx::exp2_fast(fmaf(scores[i + 1], scale_log2, -base));
        }
        state.sum[half] += reduce_row(scores, half, [](float x, float y) { return x + y; });
    }
#pragma unroll
    for (uint32_t i = 0; i < TOKENS / 4; i++) {
        uint32_t packed = S::KV::pack(scores[2 * i], scores[2 * i + 1]);
        weights[0][i / 4][i % 4] = packed;
        if (LAST == 1) weights[LAST][i / 4][i % 4] = S::KV::pack_rest(scores[2 * i], scores[2 * i + 1], packed);
    }
}

/* Bends and hides scores of the tile that begins at run.first, and moves the maxima for them. */
template <typename S>
__device__ inline void weigh(const group_place &own, float (&scores)[TOKENS / 2], warp_state<S> &state,
                             float (&factors)[2], const tile_run &run, const uint2 *visible) {
    if (!S::rules::SIMPLE && run.soft.softcap > 0) {
#pragma unroll
        for (uint32_t i = 0; i < TOKENS / 2; i++)
            scores[i] = bend_score(scores[i], run.soft);
    }
    if (run.first < run.all.x || run.first + TOKENS > run.all.y) mask_scores<S>(own, scores, run, visible);
    move_maxima<S>(scores, state, factors, run.soft.scale_log2);
}

/* ------------------------------------------------------------------------------------------- */
/* A run's tiles */

/* Does the group end this run? */
template <typename S> __device__ inline bool is_ender(uint32_t run, uint32_t group) {
    return S::GROUPS == 1 || run % S::GROUPS == group;
}

/*
 * Consumes the group's tiles of a run. Without calls: they would have the products wait for each other. The ring has an
 * even number of stages if there are two groups: so who waits for a stage has consumed what was in it before, and cannot
 * take one filling's barrier for another's. Who gives its state needs its last stage for it.
 */
template <typename S>
__device__ inline void consume_tiles(warp_state<S> &state, block_memory<S> &memory, const produce::ring &ring,
                                     const group_place &own, tile_run run) {
    clear_state(state);
    bool keeps_last = !is_ender<S>(run.number, own.group);
    uint32_t queries = ptx::shared_address(memory.queries[own.group]);
    uint32_t stage = run.first_number % ring.stages, parity = run.first_number / ring.stages % 2;
#pragma unroll 1
    for (; run.tiles > 0; run.tiles--) {
        uint32_t at = ring.memory + stage * S::stage::BYTES;
        ptx::barrier_wait(ring.full + stage * 8, parity);
        __syncwarp();
        float scores[TOKENS / 2], factors[2];
        ptx::warpgroup_fence();
        multiply_keys<S>(scores, queries, at);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>();
        ptx::hold(scores);
        weigh<S>(own, scores, state, factors, run, memory.visible[own.group]);
        if (have_moved(factors)) rescale(state, factors);
        uint32_t weights[S::KV::TERMS][TOKENS / STEP][4];
        soften<S>(scores, state, weights, run.soft.scale_log2);
        if (is_partly_unseen(run)) clear_unseen<S>(own, run, at);
        ptx::warpgroup_fence();
        multiply_values<S>(state, weights, at);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>();
        hold_out(state);
        if (own.lane == 0 && !(keeps_last && run.tiles == 1)) ptx::barrier_arrive(ring.empty + stage * 8);
        run.first += S::GROUPS * TOKENS;
        stage += S::GROUPS;
        if (stage >= ring.stages) {
            stage -= ring.stages;
            parity ^= 1;
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* From group to group */

/* The barrier at which one group waits for the other's state. Two, since the giver may be a run ahead. */
template <typename S> __device__ inline uint32_t hand_over_barrier(const tile_run &run) {
    return S::GROUPS + 1 + run.number % 2;
}

/* Gives the group's state to the other one, each thread to the one in its place: in the stage that it consumed last. */
template <typename S>
__device__ inline void give_state(const group_place &own, block_memory<S> &memory, char *stage,
                                  const warp_state<S> &state, const tile_run &run) {
    static_assert(S::stage::BYTES >= ROWS * S::DIM_V * sizeof(float), "");
    ptx::named_barrier<GROUP_THREADS>(own.group); /* all have consumed it */
    float4 *out = (float4 *)stage + own.thread();
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = 0; i < S::WIDTH / 2; i += 4) {
            out[(d * S::WIDTH / 8 + i / 4) * GROUP_THREADS] =
                make_float4(state.out[d][i], state.out[d][i + 1], state.out[d][i + 2], state.out[d][i + 3]);
        }
    }
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float sum = ptx::quad_sum(state.sum[half]);
        if (own.lane % 4 == 0) memory.given[own.row(half)] = make_float2(state.maximum[half], sum);
    }
    ptx::shared_proxy_fence(); /* it will be filled again */
    ptx::named_barrier_arrive<S::GROUPS * GROUP_THREADS>(hand_over_barrier<S>(run));
}

/* Adds the state that the other group has given. */
template <typename S>
__device__ inline void take_state(const group_place &own, const block_memory<S> &memory, const char *stage,
                                  uint32_t empty, warp_state<S> &state, const tile_run &run) {
    ptx::named_barrier<S::GROUPS * GROUP_THREADS>(hand_over_barrier<S>(run));
    float keep[2], factors[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float2 given = memory.given[own.row(half)];
        float most = fmaxf(state.maximum[half], given.x), sum = own.lane % 4 == 0 ? given.y : 0.0f;
        keep[half] = rows::decay(state.maximum[half], most);
        factors[half] = rows::decay(given.x, most);
        state.maximum[half] = most;
        state.sum[half] = fmaf(sum, factors[half], state.sum[half] * keep[half]);
    }
    const float4 *out = (const float4 *)stage + own.thread();
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = 0; i < S::WIDTH / 2; i += 4) {
            float4 added = out[(d * S::WIDTH / 8 + i / 4) * GROUP_THREADS];
            state.out[d][i] = fmaf(added.x, factors[0], state.out[d][i] * keep[0]);
            state.out[d][i + 1] = fmaf(added.y, factors[0], state.out[d][i + 1] * keep[0]);
            state.out[d][i + 2] = fmaf(added.z, factors[1], state.out[d][i + 2] * keep[1]);
            state.out[d][i + 3] = fmaf(added.w, factors[1], state.out[d][i + 3] * keep[1]);
        }
    }
    __syncwarp();
    if (own.lane == 0) ptx::barrier_arrive(empty);
}

/* ------------------------------------------------------------------------------------------- */
/* Results */

/* Stores a warp's state as partials. Lanes that share a row write 32 bytes of it at a time. */
template <typename S> __device__ inline void store_partial(const consumer<S> &own, const warp_state<S> &state) {
    uint32_t slot = rows::slot_of<typename S::rules>(own.call, own.unit, own.run, own.by);
    uint32_t count = count_rows<S>(own.cut, own.unit);
    if (slot >= own.work.slots) count = 0; /* never, if the host has counted as the device does */
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t row = own.place.row(half);
        float sum = ptx::quad_sum(state.sum[half]);
        if (row >= count) continue;
        size_t at = (size_t)slot * ROWS + row;
        if (own.place.lane % 4 == 0) own.work.states[at] = make_float2(state.maximum[half], sum);
        float *out = own.work.outs + at * S::DIM_V + own.place.lane % 4 * 2;
#pragma unroll
        for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
            for (uint32_t i = half * 2; i < S::WIDTH / 2; i += 4) {
                *(float2 *)(out + d * S::WIDTH + i / 4 * 8) = make_float2(state.out[d][i], state.out[d][i + 1]);
            }
        }
    }
}

/* Writes a warp's rows, which are finished, as rows::write_row does. */
template <typename S> __device__ inline void write_unit(const consumer<S> &own, const warp_state<S> &state) {
    uint32_t count = count_rows<S>(own.cut, own.unit);
    float value_scale = rows::value_scale(own.call, own.unit.head);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t row = own.place.row(half);
        float sum = ptx::quad_sum(state.sum[half]), maximum = state.maximum[half], factor = value_scale;
        if (row >= count) continue;
        results::destination to = rows::destination_of<typename S::rules>(own.call, {own.unit, own.cut, row}, 0);
        if (to.sink != nullptr) {
            float sink = *to.sink * LOG2_E, most = fmaxf(maximum, sink), keep = rows::decay(maximum, most);
            sum = fmaf(sum, keep, rows::decay(sink, most));
            factor *= keep;
            maximum = most;
        }
        factor *= sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
        if (own.place.lane % 4 == 0) results::write_lse(own.call, to, rows::lse_of(maximum, sum));
        size_t at = to.row * S::DIM_V + own.place.lane % 4 * 2;
        bool is_partial = !S::rules::SIMPLE && to.is_partial;
#pragma unroll
        for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
            for (uint32_t i = half * 2; i < S::WIDTH / 2; i += 4) {
                size_t here = at + d * S::WIDTH + i / 4 * 8;
                float first = state.out[d][i] * factor, second = state.out[d][i + 1] * factor;
                if (is_partial) {
                    *(float2 *)(own.call.partial_out + here) = make_float2(first, second);
                } else {
                    *(uint32_t *)((typename S::IO *)own.call.out + here) = S::KV::pack(first, second);
                }
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Runs */

/* Is the run the block's last? */
template <typename S> __device__ inline bool is_last(const consumer<S> &own) {
    return own.parts_left == 0 && own.run.end == own.part_end;
}

/* Finds the next run, and loads the group's queries. False: there is none. */
template <typename S> __device__ __noinline__ bool next_run(consumer<S> &own, tile_run &coming) {
    using L = typename S::rules;
    if (is_last(own)) return false;
    own.tiles_done += own.run.end - own.run.begin;
    own.run.begin = own.run.end;
    while (own.run.begin == own.part_end) {
        bool is_first = own.parts_left-- == 2;
        own.run.begin = is_first ? own.mine.turn : own.mine.begin;
        own.part_end = is_first ? own.mine.end : own.mine.turn;
        if (own.run.begin == own.part_end) continue;
        own.unit = line::unit_at<L>(own.call, own.cut, is_first ? own.mine.at_turn : own.mine.at_begin, own.run.begin);
    }
    if (own.run.begin == own.unit.begin + own.unit.sees.tiles) line::next_unit<L>(own.unit, own.call, own.cut);
    own.run.end = min(own.part_end, own.unit.begin + own.unit.sees.tiles);
    coming.number = own.runs++;

    load_queries<S>(own);
    const line::unit &unit = own.unit;
    uint32_t group = own.place.group;
    uint32_t tiles = own.run.end - own.run.begin;
    uint32_t skipped = (group + own.tiles_done) % S::GROUPS; /* tiles of the run before the group's first */
    coming.tiles = (tiles + S::GROUPS - 1 - skipped) / S::GROUPS;
    coming.first_number = own.tiles_done + skipped;
    coming.first = unit.sees.first_token + (own.run.begin - unit.begin + skipped) * TOKENS;
    coming.given = NO_TILE;
    if (S::GROUPS > 1) {
        uint32_t last = own.tiles_done + tiles - 1;
        if (is_ender<S>(coming.number, last % S::GROUPS)) last = tiles > 1 ? last - 1 : NO_TILE;
        coming.given = last;
    }
    coming.sees = make_uint2(unit.sees.begin, unit.sees.end);
    coming.all = make_uint2(0, unit.sees.end);
    if (!S::rules::SIMPLE) {
        coming.all.x = own.memory.visible[group][count_rows<S>(own.cut, unit) - 1].x;
        coming.all.y = own.memory.visible[group][0].y;
    }
    coming.soft = narrow::softness_of<S>(own.call, unit.head);
    return true;
}

/* ------------------------------------------------------------------------------------------- */
/* Merging */

/*
 * What a warp is to merge: the partials of row `index`, of row index + step, and so on. A row's partials are added up in
 * sections of `length`, and those one after the other: whoever merges, the result is the same to the bit.
 */
struct merge_order {
    uint32_t index, step;
    uint32_t first_worker;
    uint32_t partials, sections, length; /* of a row */
    uint32_t all;                        /* sections, of all rows */
};

constexpr uint32_t MAX_SECTION = 4;

/*
 * Starts to fetch the partials of sections from .. from + count - 1, a row each from `landing` on, each section in the
 * place of a full one. Lane i returns the state of the i-th; one that is not there has seen nothing.
 */
template <typename S>
__device__ inline float2 fetch_partials(const consumer<S> &own, const merge_order &order, uint32_t from, uint32_t count,
                                        uint32_t landing) {
    uint32_t lane = own.place.lane, section = from + lane / order.length, row = section / order.sections;
    uint32_t partial = (section - row * order.sections) * order.length + lane % order.length;
    uint32_t slot = 2 * (order.first_worker + partial) + (partial == 0), at = NO_TILE;
    float2 state = make_float2(-INFINITY, 0.0f);
    count = min(count, order.all - min(order.all, from));
    if (section < from + count && partial < order.partials) {
        at = slot * ROWS + order.index + row * order.step;
        state = __ldcg(own.work.states + at);
    }
    const float *outs = own.work.outs + lane * 4;
    landing += lane * 16;
#pragma unroll 4
    for (uint32_t i = 0; i < count * order.length; i++) {
        uint32_t from_row = __shfl_sync(ALL_LANES, at, i);
        const float *out = outs + (size_t)from_row * S::DIM_V;
#pragma unroll
        for (uint32_t piece = 0; piece < S::DIM_V / 4; piece += 32) {
            bool is_there = from_row != NO_TILE && (S::DIM_V / 4 % 32 == 0 || piece + lane < S::DIM_V / 4);
            if (is_there) ptx::copy_16_bytes(landing + i * S::DIM_V * 4 + piece * 16, out + piece * 4);
        }
    }
    ptx::copies_commit();
    return state;
}

/*
 * Adds up a section, whose states lanes begin .. begin + count - 1 have. Without branches, so that nothing waits for what
 * it does not need: in place of partials that are not there the last one is taken, 0 times.
 */
template <typename S>
__device__ inline rows::row_state<S::DIM_V> add_section(float2 state, uint32_t begin, uint32_t count,
                                                        const float *landing, uint32_t lane) {
    rows::row_state<S::DIM_V> sum = rows::empty_state<S::DIM_V>();
    rows::row<S::DIM_V> outs[MAX_SECTION];
#pragma unroll
    for (uint32_t i = 0; i < MAX_SECTION; i++) {
        uint32_t from = begin + min(i, count - 1);
        outs[i] = rows::load_row<S::DIM_V>(landing + from * S::DIM_V, lane);
        sum.maximum = fmaxf(sum.maximum, __shfl_sync(ALL_LANES, state.x, from));
    }
    float factor = rows::decay(state.x, sum.maximum), weighted = state.y * factor;
#pragma unroll
    for (uint32_t i = 0; i < MAX_SECTION; i++) {
        uint32_t from = begin + min(i, count - 1);
        float of_out = __shfl_sync(ALL_LANES, factor, from), of_sum = __shfl_sync(ALL_LANES, weighted, from);
        rows::add_row(sum.out, 1.0f, outs[i], i < count ? of_out : 0.0f);
        sum.sum += i < count ? of_sum : 0.0f;
    }
    return sum;
}

/*
 * Merges rows index, index + step, .. of a unit that was cut. By a warp, which has `room` for so many rows at `landing`:
 * what it could hold in registers on their way is too little to keep the memory busy.
 */
template <typename S>
__device__ __noinline__ void merge_rows(const consumer<S> &own, uint32_t index, uint32_t step, float *landing,
                                        uint32_t room) {
    uint32_t count = count_rows<S>(own.cut, own.unit);
    if (index >= count) return;
    merge_order order;
    order.index = index;
    order.step = step;
    order.first_worker = own.unit.begin / own.by.tiles_a_worker;
    order.partials = (own.unit.begin + own.unit.sees.tiles - 1) / own.by.tiles_a_worker - order.first_worker + 1;
    order.sections = (order.partials + MAX_SECTION - 1) / MAX_SECTION;
    order.length = (order.partials + order.sections - 1) / order.sections;
    order.all = (count - index + step - 1) / step * order.sections;
    uint32_t batch = room / 2 / order.length, stride = batch * order.length * S::DIM_V, section = 0;
    rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
    float2 next = fetch_partials<S>(own, order, 0, batch, ptx::shared_address(landing));
#pragma unroll 1
    for (uint32_t from = 0, half = 0; from < order.all; from += batch, half ^= 1) {
        float2 state = next;
        next = fetch_partials<S>(own, order, from + batch, batch,
                                 ptx::shared_address(landing + (half ^ 1) * stride));
        ptx::copies_wait<1>();
        __syncwarp();
#pragma unroll 1
        for (uint32_t i = 0; i < min(batch, order.all - from); i++) {
            uint32_t length = min(order.length, order.partials - section * order.length);
            rows::row_state<S::DIM_V> sum =
                add_section<S>(state, i * order.length, length, landing + half * stride, own.place.lane);
            rows::merge_state(merged, sum.out, sum.maximum, sum.sum);
            if (++section < order.sections) continue;
            rows::write_row<typename S::rules, typename S::IO>(own.call, {own.unit, own.cut, index}, merged,
                                                               own.place.lane);
            merged = rows::empty_state<S::DIM_V>();
            section = 0;
            index += step;
        }
        __syncwarp();
    }
}

/*
 * After a run that was cut: is its unit at its end, so that its partials are to be merged? By THREADS threads, one of
 * them the `first`; each group may ask at its own time, and has its own `last_arriver`.
 */
template <typename S, int THREADS>
__device__ inline bool arrive(const consumer<S> &own, uint32_t barrier, bool first, uint32_t &last_arriver) {
    ptx::named_barrier<THREADS>(barrier); /* the partials are written */
    if (first) last_arriver = rows::arrive<typename S::rules>(own.call, own.work, own.unit, own.run, own.by);
    ptx::named_barrier<THREADS>(barrier);
    return last_arriver;
}

/* After a run that was cut, and that others follow. By the group that ends it, in place of its queries. */
template <typename S> __device__ inline void merge_by_group(const consumer<S> &own) {
    constexpr uint32_t ROOM = ROWS / WARPS * S::stage::KEY_BYTES / (S::DIM_V * sizeof(float));
    static_assert(ROOM >= 2 * MAX_SECTION, "");
    const group_place &place = own.place;
    uint32_t &last_arriver = own.memory.last_arriver[place.group];
    if (!arrive<S, GROUP_THREADS>(own, place.group, place.thread() == 0, last_arriver)) return;
    float *landing = (float *)own.memory.queries[place.group] + place.warp * ROOM * S::DIM_V;
    merge_rows<S>(own, place.warp, WARPS, landing, ROOM);
    ptx::named_barrier<GROUP_THREADS>(place.group);
}

/* After the block's last run, if it was cut. By all, in place of the ring, which is `ring_bytes` large. */
template <typename S> __device__ inline void merge_by_all(const consumer<S> &own, char *ring, uint32_t ring_bytes) {
    constexpr uint32_t ALL_WARPS = S::GROUPS * WARPS;
    if (!arrive<S, ALL_WARPS * 32>(own, S::GROUPS, threadIdx.x == 0, own.memory.last_arriver[0])) return;
    uint32_t room = min(ring_bytes / (ALL_WARPS * S::DIM_V * (uint32_t)sizeof(float)), 64);
    uint32_t warp = own.place.group * WARPS + own.place.warp;
    merge_rows<S>(own, warp, ALL_WARPS, (float *)ring + warp * room * S::DIM_V, room);
}

/* ------------------------------------------------------------------------------------------- */
/* A consumer warp */

/* Does a run: consumes the group's tiles, and ends it if that is the group's turn. */
template <typename S>
__device__ inline void do_run(const consumer<S> &own, const tile_run &run, const produce::ring &ring,
                              char *ring_memory, const group_place &place) {
    warp_state<S> state;
    consume_tiles<S>(state, own.memory, ring, place, run);
    bool is_given = S::GROUPS > 1 && run.given != NO_TILE;
    uint32_t stage = is_given ? run.given % ring.stages : 0;
    char *given = ring_memory + stage * S::stage::BYTES;
    if (!is_ender<S>(run.number, place.group)) {
        if (is_given) give_state(place, own.memory, given, state, run);
        return;
    }
    if (is_given) take_state(place, own.memory, given, ring.empty + stage * 8, state, run);
    ptx::wait_for_previous_launch(); /* which may still read what is written from here on */
    if (!rows::is_cut<typename S::rules>(own.call, own.unit, own.run)) {
        write_unit(own, state);
    } else {
        store_partial(own, state);
        if (!is_last(own)) merge_by_group<S>(own);
    }
}

template <typename S>
__device__ inline void consume(consumer<S> &own, const produce::ring &ring, char *ring_memory,
                               const group_place &place) {
    tile_run run;
#pragma unroll 1
    while (next_run<S>(own, run))
        do_run<S>(own, run, ring, ring_memory, place);
    if (rows::is_cut<typename S::rules>(own.call, own.unit, own.run)) {
        merge_by_all<S>(own, ring_memory, ring.stages * S::stage::BYTES);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The kernel */

template <typename S>
__global__ void __launch_bounds__(S::GROUPS *GROUP_THREADS + 32, 1)
    wide_kernel(const __grid_constant__ attn_cuda_call call, const __grid_constant__ arguments with) {
#if __CUDA_ARCH__ >= 900 /* never launched elsewhere */
    extern __shared__ __align__(1024) char shared[];
    block_memory<S> &memory = *(block_memory<S> *)(shared + with.stages * S::stage::BYTES);
    produce::ring ring = {ptx::shared_address(shared), ptx::shared_address(memory.full),
                          ptx::shared_address(memory.empty), with.stages, S::stage::BYTES};
    uint32_t warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    launching::fetch_constants(call, with, warp);
    if (threadIdx.x == S::GROUPS * GROUP_THREADS) {
        launching::prefetch_page_table(call);
        for (uint32_t stage = 0; stage < with.stages; stage++) {
            ptx::barrier_init(ring.full + stage * 8, produce::full_arrivals());
            ptx::barrier_init(ring.empty + stage * 8, WARPS);
        }
        ptx::barrier_init_fence();
    }
    if (with.times != nullptr && threadIdx.x == 0) {
        with.times[blockIdx.x * 4] = ptx::multiprocessor();
        with.times[blockIdx.x * 4 + 1] = ptx::global_time_ns();
    }
    ptx::launch_dependents();
    line::share mine = line::find_share<typename S::rules>(call, with.cut, gridDim.x, blockIdx.x, lane);
    __syncthreads();
    if (mine.begin == mine.end) return;
    if (warp == S::GROUPS * WARPS) {
        produce::fill_ring<typename S::stage, typename S::rules>(call, with.cut, mine, ring, lane);
    } else {
        group_place place = {warp / WARPS, warp % WARPS, lane};
        consumer<S> own = {call,
                           with.cut,
                           memory,
                           rows::view_workspace(with.workspace),
                           {blockIdx.x, mine.tiles_a_worker, line::chunk_shift<typename S::rules>(call)},
                           place,
                           mine};
        own.parts_left = 2;
        if (with.times != nullptr && threadIdx.x == 0) with.times[blockIdx.x * 4 + 2] = ptx::global_time_ns();
        consume<S>(own, ring, shared, place);
        if (with.times != nullptr && threadIdx.x % GROUP_THREADS == 0)
            atomicMax((unsigned long long *)&with.times[blockIdx.x * 4 + 3], ptx::global_time_ns());
    }
#endif
}

/* ------------------------------------------------------------------------------------------- */
/* Launching */

template <typename S>
cudaError_t launch(const attn_cuda_call &call, const attn_cuda_tuning &tuning, const attn_cuda_workspace &workspace,
                   cudaStream_t stream) {
    uint32_t group = call.layer.heads_q / call.layer.heads_kv;
    if (workspace.rows < ROWS || group > ROWS || tuning.blocks_per_sm == 2) return cudaErrorInvalidValue;
    if (tuning.shared_bytes < sizeof(block_memory<S>) + S::GROUPS * S::stage::BYTES) return cudaErrorInvalidValue;
    uint32_t stages = (tuning.shared_bytes - (uint32_t)sizeof(block_memory<S>)) / S::stage::BYTES;
    uint32_t most = tuning.stages != 0 ? tuning.stages : S::GROUPS + (ON_THE_WAY + S::stage::BYTES - 1) / S::stage::BYTES;
    stages = min(min(stages, most), MAX_STAGES) / S::GROUPS * S::GROUPS;
    attn_cuda_workspace slots = workspace;
    slots.rows = ROWS;
    arguments with = {line::make_cut(call.layer, tuning, ROWS, tuning.workers, 1), slots, stages, tuning.times};
    launching::grid size = {tuning.workers, S::GROUPS * GROUP_THREADS + 32, 1,
                            stages * S::stage::BYTES + sizeof(block_memory<S>)};
    return launching::launch_kernel(wide_kernel<S>, size, tuning, call, with, stream);
}

/* Two groups have 168 registers a thread, one has 255, and takes less shared memory: wide heads have one. */
template <typename KV, uint32_t DIM, uint32_t DIM_V>
cudaError_t launch_shape(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                         const attn_cuda_workspace &workspace, cudaStream_t stream) {
    constexpr uint32_t GROUPS = DIM > 128 ? 1 : 2;
    return line::is_simple(call) ? launch<shape<KV, DIM, DIM_V, GROUPS, true>>(call, tuning, workspace, stream)
                                 : launch<shape<KV, DIM, DIM_V, GROUPS, false>>(call, tuning, workspace, stream);
}

template <typename KV>
cudaError_t launch_dims(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                        const attn_cuda_workspace &workspace, cudaStream_t stream) {
    uint32_t dim = call.layer.head_dim, dim_v = call.layer.head_dim_v;
    if (call.batch_invariant) return cudaErrorInvalidValue;
    if (dim == 192 && dim_v == 128) return launch_shape<KV, 192, 128>(call, tuning, workspace, stream);
    if (dim != dim_v) return cudaErrorInvalidValue;
    switch (dim) {
    case 64: return launch_shape<KV, 64, 64>(call, tuning, workspace, stream);
    case 96: return launch_shape<KV, 96, 96>(call, tuning, workspace, stream);
    case 128: return launch_shape<KV, 128, 128>(call, tuning, workspace, stream);
    case 192: return launch_shape<KV, 192, 192>(call, tuning, workspace, stream);
    case 256: return launch_shape<KV, 256, 256>(call, tuning, workspace, stream);
    default: return cudaErrorInvalidValue;
    }
}

} /* namespace wide */

#endif
