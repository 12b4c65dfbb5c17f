/*
 * How a group of the wide kernels (wide.cuh) consumes tiles: products, powers, a run's tiles in blocks of 64 rows and
 * in tall ones, and what groups give each other.
 */
#ifndef ATTND_KERNELS_CUDA_WIDE_TILES_CUH
#define ATTND_KERNELS_CUDA_WIDE_TILES_CUH

#include "kernels/cuda/wide_scout.cuh"

namespace wide {

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

/* The group's scores of a tile: of token 8 * i + lane % 4 * 2 + e, row group_row(half), is [4 * i + 2 * half + e]. */
template <typename S> using tile_scores = float[S::TOKENS / 2];

/*
 * Of a shared-memory address, what a product's descriptor has room for: in a cluster the bits above say which block's
 * it is, which is always this one.
 */
template <typename S> __device__ inline uint32_t address_in_block(uint32_t address) {
    return S::CLUSTER > 1 ? address & 0x3ffff : address;
}

/* Starts scores = Q K^T. `queries`: the group's first row. */
template <typename S> __device__ inline void multiply_keys(tile_scores<S> &scores, uint32_t queries, uint32_t stage) {
    using T = typename S::stage;
    constexpr uint32_t STEP_BYTES = STEP * S::KV::BYTES;
    ptx::matrix<T::KEY_CHUNK> a(address_in_block<S>(queries), 16), b(address_in_block<S>(stage), 16);
#pragma unroll
    for (uint32_t byte = 0; byte < T::KEY_BYTES; byte += STEP_BYTES) {
        uint32_t column = byte / T::KEY_CHUNK * T::KEY_CHUNK, within = byte % T::KEY_CHUNK;
        S::KV::multiply_rows(scores, a.at(column * S::ROWS + within), b.at(column * S::TOKENS + within), byte != 0);
    }
}

/* The same, waited for. */
template <typename S> __device__ inline void find_scores(tile_scores<S> &scores, uint32_t queries, uint32_t stage) {
    ptx::warpgroup_fence();
    multiply_keys<S>(scores, queries, stage);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>();
    ptx::hold(scores);
}

/* Of STEP tokens each, as a product takes them. */
template <typename S> using tile_weights = uint32_t[S::TERMS][S::TOKENS / STEP][4];

/* Starts out += P V. `values`: where they begin in their stage. */
template <typename S>
__device__ inline void multiply_values(warp_state<S> &state, const tile_weights<S> &weights, uint32_t values) {
    using T = typename S::stage;
    constexpr uint32_t COLUMN_BYTES = S::TOKENS * T::VALUE_CHUNK;
    ptx::matrix<T::VALUE_CHUNK> b(address_in_block<S>(values), COLUMN_BYTES);
#pragma unroll
    for (uint32_t k = 0; k < S::TOKENS / STEP; k++) {
#pragma unroll
        for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
            uint32_t skip = d * COLUMN_BYTES + k * STEP * T::VALUE_CHUNK;
#pragma unroll
            for (uint32_t t = 0; t < S::TERMS; t++)
                S::KV::multiply_columns(state.out[d], weights[t][k], b.at(skip));
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* A tile */

/* What of a run a group has to know while it consumes its tiles. */
struct tile_run {
    uint32_t tiles;        /* the group's */
    uint32_t first_number; /* in the block, of the first of them.. */
    uint32_t first;        /* ..and its first token */
    uint2 sees, all;       /* tokens that some row sees, and that every row sees */
    softness soft;
};

template <typename S> __device__ inline tile_run tiles_of_group(const found_run &found, uint32_t group) {
    const line::unit &unit = found.unit;
    uint32_t tiles = found.run.end - found.run.begin;
    uint32_t skipped = (group + found.tiles_before) % S::TURNS; /* tiles of the run before the group's first */
    tile_run run;
    run.tiles = (tiles + S::TURNS - 1 - skipped) / S::TURNS;
    run.first_number = found.tiles_before + skipped;
    run.first = unit.sees.first_token + (found.run.begin - unit.begin + skipped) * S::TOKENS;
    run.sees = make_uint2(unit.sees.begin, unit.sees.end);
    run.all = found.all;
    run.soft = found.soft;
    return run;
}

/* The same as narrow::bend, but without a call, which would have the products wait for each other. */
__device__ inline float bend_score(float score, const softness &soft) {
    float power = ptx::exp2_fast(score * soft.scale * (2.0f * LOG2_E / soft.softcap));
    return soft.softcap * (1.0f - __fdividef(2.0f, power + 1.0f));
}

/* Hides the scores of tokens that a row does not see. */
template <typename S>
__device__ inline void mask_scores(const group_place &own, tile_scores<S> &scores, const tile_run &run,
                                   const uint2 *visible) {
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint2 sees = make_uint2(0, run.sees.y);
        if (!S::rules::SIMPLE) sees = visible[row_of<S>(own, half)];
#pragma unroll
        for (uint32_t i = 0; i < S::TOKENS / 4; i++) {
            uint32_t token = run.first + i / 2 * 8 + own.lane % 4 * 2 + i % 2;
            if (token < sees.x || token >= sees.y) scores[i / 2 * 4 + half * 2 + i % 2] = -INFINITY;
        }
    }
}

template <typename S> __device__ inline bool is_partly_unseen(const tile_run &run) {
    return run.first < run.sees.x || run.first + S::TOKENS > run.sees.y;
}

/* Zeros values that no row sees, since a weight of 0 does not hide what they may be. By all who consume the tile. */
template <typename S>
__device__ inline void clear_unseen(const group_place &own, const tile_run &run, uint32_t values) {
    using T = typename S::stage;
    constexpr uint32_t PIECES = T::VALUE_BYTES / 16, THREADS = S::GROUPS / S::TURNS * GROUP_THREADS;
    uint32_t first = (S::TALL ? own.group * GROUP_THREADS : 0) + own.thread();
#pragma unroll 1
    for (uint32_t i = first; i < S::TOKENS * PIECES; i += THREADS) {
        uint32_t row = i / PIECES, token = run.first + row;
        if (token >= run.sees.x && token < run.sees.y) continue;
        uint32_t at = layout::piece_offset(T::VALUE_BYTES, S::TOKENS, row, i % PIECES);
        ptx::store_zeros(values + at);
    }
    ptx::shared_proxy_fence();
    ptx::named_barrier<THREADS>(S::TALL ? S::GROUPS : own.group);
}

/*
 * Weights are relative to a maximum that moves only when they would exceed 2^SLACK: then the sums have to, too. Where
 * weights are rounded, it moves at once: so the largest are 1, or near to it, and a row that is nearly all one token's
 * has no error by it.
 */
template <typename S> constexpr float SLACK = S::TERMS == 1 && !S::TWINS ? 0.0f : 8.0f;

/* The largest, or the sum, of a row's scores of the lane: as a tree, since what waits for each other is slow; but not
 * a wide one, which would take registers. */
template <uint32_t COUNT, typename Add>
__device__ inline float reduce_row(const float (&scores)[COUNT], uint32_t half, Add add) {
    constexpr uint32_t WIDTH = 8;
    float part[WIDTH];
#pragma unroll
    for (uint32_t i = 0; i < COUNT / 4; i++) {
        float pair = add(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]);
        part[i % WIDTH] = i < WIDTH ? pair : add(part[i % WIDTH], pair);
    }
#pragma unroll
    for (uint32_t width = WIDTH / 2; width > 0; width /= 2) {
#pragma unroll
        for (uint32_t i = 0; i < width; i++)
            part[i] = add(part[i], part[i + width]);
    }
    return part[0];
}

/* Moves the maxima for a tile's scores; `factors`: what was summed before is to be multiplied by them. */
template <typename S>
__device__ inline void move_maxima(const tile_scores<S> &scores, warp_state<S> &state, float (&factors)[2],
                                   float scale_log2) {
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float largest = reduce_row(scores, half, [](float x, float y) { return fmaxf(x, y); });
        largest = ptx::quad_max(largest) * scale_log2;
        float maximum = largest > state.maximum[half] + SLACK<S> ? largest : state.maximum[half];
        factors[half] = maximum == -INFINITY ? 1.0f : ptx::exp2_fast(state.maximum[half] - maximum);
        state.maximum[half] = maximum;
    }
}

/* By a warp: have maxima moved? */
__device__ inline bool have_moved(const float (&factors)[2]) {
    return __any_sync(ALL_LANES, factors[0] != 1.0f || factors[1] != 1.0f);
}

/* Brings what was summed down to the new maxima: outputs, and sums. */
template <typename S> __device__ inline void rescale_out(warp_state<S> &state, const float (&factors)[2]) {
#pragma unroll
    for (uint32_t d = 0; d < S::DIM_V / S::WIDTH; d++) {
#pragma unroll
        for (uint32_t i = 0; i < S::WIDTH / 2; i++)
            state.out[d][i] *= factors[i / 2 % 2];
    }
}

template <typename S> __device__ inline void rescale_sums(warp_state<S> &state, const float (&factors)[2]) {
    state.sum[0] *= factors[0];
    state.sum[1] *= factors[1];
}

template <typename S> __device__ inline void rescale(warp_state<S> &state, const float (&factors)[2]) {
    rescale_out(state, factors);
    rescale_sums(state, factors);
}

/* Scores become weights, which are summed. */
template <typename S>
__device__ inline void raise_scores(tile_scores<S> &scores, warp_state<S> &state, float scale_log2) {
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float base = state.maximum[half] == -INFINITY ? 0.0f : state.maximum[half];
#pragma unroll
        for (uint32_t i = half * 2; i < S::TOKENS / 2; i += 4) {
            scores[i] = ptx::exp2_fast(fmaf(scores[i], scale_log2, -base));
            scores[i + 1] = ptx::exp2_fast(fmaf(scores[i + 1], scale_log2, -base));
        }
        state.sum[half] += reduce_row(scores, half, [](float x, float y) { return x + y; });
    }
}

template <typename S> __device__ inline void pack_weights(const tile_scores<S> &scores, tile_weights<S> &weights) {
    constexpr uint32_t LAST = S::TERMS - 1;
#pragma unroll
    for (uint32_t i = 0; i < S::TOKENS / 4; i++) {
        uint32_t packed = S::KV::pack(scores[2 * i], scores[2 * i + 1]);
        weights[0][i / 4][i % 4] = packed;
        if (LAST == 1) weights[LAST][i / 4][i % 4] = S::KV::pack_rest(scores[2 * i], scores[2 * i + 1], packed);
    }
}

template <typename S>
__device__ inline void soften(tile_scores<S> &scores, warp_state<S> &state, tile_weights<S> &weights,
                              float scale_log2) {
    raise_scores<S>(scores, state, scale_log2);
    pack_weights<S>(scores, weights);
}

/* Bends and hides scores of the tile that begins at run.first, and moves the maxima for them. */
template <typename S>
__device__ inline void weigh(const group_place &own, tile_scores<S> &scores, warp_state<S> &state, float (&factors)[2],
                             const tile_run &run, const uint2 *visible) {
    if (S::BENDS && run.soft.softcap > 0) {
#pragma unroll
        for (uint32_t i = 0; i < S::TOKENS / 2; i++)
            scores[i] = bend_score(scores[i], run.soft);
    }
    if (run.first < run.all.x || run.first + S::TOKENS > run.all.y) mask_scores<S>(own, scores, run, visible);
    move_maxima<S>(scores, state, factors, run.soft.scale_log2);
}

/* ------------------------------------------------------------------------------------------- */
/* A run's tiles */

/*
 * Consumes the group's tiles of a run. Without calls: they would have the products wait for each other. The ring has an
 * even number of stages if there are two groups: so who waits for a stage has consumed what was in it before, and
 * cannot take one filling's barrier for another's. Who gives its state needs its last stage for it: keeps_last.
 */
template <typename S>
__device__ inline void consume_tiles(warp_state<S> &state, uint32_t queries, const uint2 *visible,
                                     const produce::ring &ring, const group_place &own, tile_run run, bool keeps_last) {
    clear_state(state);
    uint32_t stage = run.first_number % ring.stages, parity = run.first_number / ring.stages % 2;
#pragma unroll 1
    for (; run.tiles > 0; run.tiles--) {
        uint32_t at = ring.memory + stage * S::stage::BYTES;
        ptx::barrier_wait(ring.full + stage * 8, parity);
        __syncwarp();
        tile_scores<S> scores;
        float factors[2];
        find_scores<S>(scores, queries, at);
        weigh<S>(own, scores, state, factors, run, visible);
        if (have_moved(factors)) rescale(state, factors);
        tile_weights<S> weights;
        soften<S>(scores, state, weights, run.soft.scale_log2);
        uint32_t values = at + S::stage::VALUES_AT;
        if (is_partly_unseen<S>(run)) clear_unseen<S>(own, run, values);
        ptx::warpgroup_fence();
        multiply_values<S>(state, weights, values);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>();
        hold_out(state);
        if (own.lane == 0 && !(keeps_last && run.tiles == 1)) ptx::barrier_arrive(ring.empty + stage * 8);
        run.first += S::TURNS * S::TOKENS;
        stage += S::TURNS;
        if (stage >= ring.stages) {
            stage -= ring.stages;
            parity ^= 1;
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* A run's tiles, in a tall block */

/* Where a group is in a ring, as who consumes it. CLUSTER: blocks that wait for it to be done with a stage. */
template <uint32_t CLUSTER> struct tall_ring {
    const produce::ring &of;
    produce::ring_place at;
    uint32_t empty; /* the barriers, of the block that this lane tells */

    __device__ tall_ring(const produce::ring &of, uint32_t number, uint32_t lane)
        : of(of), at{number % of.stages, number / of.stages % 2}, empty(of.empty) {
        if (CLUSTER > 1) empty = ptx::address_in_cluster(of.empty, lane % CLUSTER);
    }

    /* Waits for the next stage to be filled, and returns where it is. */
    __device__ uint32_t wait() const {
        ptx::barrier_wait(of.full + at.stage * 8, at.parity);
        __syncwarp();
        return of.memory + at.stage * of.stage_bytes;
    }

    /* The group is done with it. By all warps. */
    __device__ void pass(uint32_t lane) {
        if (CLUSTER == 1) {
            if (lane == 0) ptx::barrier_arrive(of.empty + at.stage * 8);
        } else if (lane < CLUSTER) {
            ptx::barrier_arrive_in_cluster(empty + at.stage * 8);
        }
        at.advance(of);
    }
};

template <typename S> using tall_ring_of = tall_ring<S::CLUSTER>;

/* Where the groups take turns: the barrier at which a group waits for its own. */
template <typename S> __device__ inline uint32_t turn_barrier(uint32_t group) { return S::GROUPS + 1 + group; }

template <typename S> __device__ inline void take_turn(const group_place &own) {
    ptx::named_barrier<S::GROUPS * GROUP_THREADS>(turn_barrier<S>(own.group));
}

template <typename S> __device__ inline void pass_turn(const group_place &own) {
    ptx::named_barrier_arrive<S::GROUPS * GROUP_THREADS>(turn_barrier<S>(own.group ^ 1));
}

/* Waits for a tile's values, of which those that nobody sees become zeros. */
template <typename S>
__device__ inline uint32_t wait_for_values(const group_place &own, const tall_ring_of<S> &values, const tile_run &run) {
    uint32_t at = values.wait();
    if (is_partly_unseen<S>(run)) clear_unseen<S>(own, run, at);
    return at;
}

/* Adds the products of a tile's weights and values, and waits for them. */
template <typename S>
__device__ inline void add_values(warp_state<S> &state, const tile_weights<S> &weights, tall_ring_of<S> &values,
                                  const group_place &own, const tile_run &run) {
    uint32_t at = wait_for_values<S>(own, values, run);
    ptx::warpgroup_fence();
    multiply_values<S>(state, weights, at);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>();
    hold_out(state);
    values.pass(own.lane);
}

/*
 * Consumes a run's tiles, the scores of each beside the product of the weights and values of the one before. Group 0
 * has the first turn. A turn is passed when the scores are there, and not when the products are started: else both
 * groups would have their scores computed at half the speed, and then both compute powers. After a group's last turn
 * nobody waits for the other's: so each run begins alike.
 */
template <typename S>
__device__ inline void consume_overlapped(warp_state<S> &state, uint32_t queries, tall_ring_of<S> keys,
                                          tall_ring_of<S> values, const uint2 *visible, const group_place &own,
                                          tile_run run) {
    tile_scores<S> scores;
    tile_weights<S> weights;
    float factors[2];
    uint32_t next = keys.wait();
    if (own.group == 1) pass_turn<S>(own);
    take_turn<S>(own);
    find_scores<S>(scores, queries, next);
    if (own.group == 0 || run.tiles > 1) pass_turn<S>(own);
    keys.pass(own.lane);
    weigh<S>(own, scores, state, factors, run, visible);
    raise_scores<S>(scores, state, run.soft.scale_log2);
    pack_weights<S>(scores, weights);
#pragma unroll 1
    for (; run.tiles > 1; run.tiles--) {
        uint32_t current = wait_for_values<S>(own, values, run);
        next = keys.wait();
        take_turn<S>(own);
        ptx::warpgroup_fence();
        multiply_keys<S>(scores, queries, next);
        ptx::warpgroup_commit();
        multiply_values<S>(state, weights, current);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<1>();
        ptx::hold(scores);
        if (own.group == 0 || run.tiles > 2) pass_turn<S>(own);
        keys.pass(own.lane);
        run.first += S::TOKENS;
        weigh<S>(own, scores, state, factors, run, visible);
        rescale_sums(state, factors);
        raise_scores<S>(scores, state, run.soft.scale_log2);
        ptx::warpgroup_wait<0>();
        hold_out(state);
        values.pass(own.lane);
        if (have_moved(factors)) rescale_out(state, factors);
        pack_weights<S>(scores, weights);
    }
    add_values<S>(state, weights, values, own, run);
}

/* The same one thing after the other: weights in two terms leave no registers for a second tile's scores. */
template <typename S>
__device__ inline void consume_in_order(warp_state<S> &state, uint32_t queries, tall_ring_of<S> keys,
                                        tall_ring_of<S> values, const uint2 *visible, const group_place &own,
                                        tile_run run) {
#pragma unroll 1
    for (; run.tiles > 0; run.tiles--, run.first += S::TOKENS) {
        tile_scores<S> scores;
        tile_weights<S> weights;
        float factors[2];
        uint32_t at = keys.wait();
        find_scores<S>(scores, queries, at);
        keys.pass(own.lane);
        weigh<S>(own, scores, state, factors, run, visible);
        if (have_moved(factors)) rescale(state, factors);
        soften<S>(scores, state, weights, run.soft.scale_log2);
        add_values<S>(state, weights, values, own, run);
    }
}

/* Loads the group's queries of a block's first run, of `unit`. By the group. */
template <typename S>
__device__ inline void load_first_queries(const block_place<S> &block, const group_place &own, const line::unit &unit) {
    copy_queries<S, GROUP_THREADS>(block.call, block.with.cut, unit, ptx::shared_address(block.memory.queries[0]),
                                   own.group * GROUP_ROWS, (own.group + 1) * GROUP_ROWS, own.thread());
    ptx::copies_wait<0>();
    ptx::shared_proxy_fence();
    ptx::named_barrier<GROUP_THREADS>(own.group);
}

/* Consumes the tiles of the block's run `number`. */
template <typename S>
__device__ inline void consume_tall(warp_state<S> &state, const block_place<S> &block, uint32_t number,
                                    const rings &from, const group_place &own) {
    uint32_t slot = number % S::GROUPS;
    tile_run run = tiles_of_group<S>(block.memory.runs[slot], own.group);
    if (!S::IN_PARTS && are_loaded_by_groups<S>(number)) load_first_queries(block, own, block.memory.runs[0].unit);
    clear_state(state);
    uint32_t queries = ptx::shared_address(block.memory.queries[slot]) + own.group * GROUP_ROWS * S::stage::KEY_CHUNK;
    tall_ring_of<S> keys(from.keys, run.first_number, own.lane), values(from.values, run.first_number, own.lane);
    const uint2 *visible = block.memory.visible[slot];
    if constexpr (S::TERMS == 1)
        consume_overlapped<S>(state, queries, keys, values, visible, own, run);
    else
        consume_in_order<S>(state, queries, keys, values, visible, own, run);
}

/* ------------------------------------------------------------------------------------------- */
/* From group to group */

/* Gives the group's state to the other one, each thread to the one in its place: in the stage that it consumed last. */
template <typename S>
__device__ inline void give_state(const group_place &own, block_memory<S> &memory, uint32_t slot, char *stage,
                                  const warp_state<S> &state) {
    static_assert(S::stage::BYTES >= GROUP_ROWS * S::DIM_V * sizeof(float), "");
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
        if (own.lane % 4 == 0) memory.given[own.group_row(half)] = make_float2(state.maximum[half], sum);
    }
    ptx::shared_proxy_fence(); /* it will be filled again */
    ptx::barrier_arrive(ptx::shared_address(&memory.given_away[slot]));
}

/* Adds the state that the other group has given. */
template <typename S>
__device__ inline void take_state(const group_place &own, const block_memory<S> &memory, uint32_t slot,
                                  const char *stage, uint32_t empty, warp_state<S> &state) {
    ptx::barrier_wait(ptx::shared_address(&memory.given_away[slot]), memory.runs[slot].given_parity);
    __syncwarp();
    float keep[2], factors[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float2 given = memory.given[own.group_row(half)];
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

} /* namespace wide */

#endif
