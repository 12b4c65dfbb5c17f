/*
 * The wide kernel: up to 64 or 128 rows a block (query rows x heads of the group), 64 of which are the rows of a
 * warpgroup's products,
 *     S [64 rows x tile's tokens] = Q K^T        O [64 rows x head_dim_v] += P V
 * Q, K and V in shared memory, S, P and O in registers.
 *
 * Blocks of 64 rows: two groups (a warpgroup each) take the block's tiles of 64 tokens in turn, so that one's products
 * and the other's powers overlap, and keep a maximum, sum and output (m, l, O) each. At the end of a run one gives its
 * state to the other, which ends the run, by itself; they take turns at that, too. What the block's last run leaves to
 * be merged all merge.
 *
 * Blocks of 128 rows, the tall ones: each group has 64 of the rows, and consumes every tile, of 128 tokens. For where
 * rows are many and what they read comes from the L2 cache: a tile is loaded half as often, and is the longer stretch
 * of work. Whatever a run leaves to be merged both groups merge. Keys and values have rings of their own, since where a
 * weight has one term a group has the next tile's scores computed beside this tile's product with the values. The
 * groups take turns at that: one computes powers while the tensor cores have the other's products.
 *
 * Tall blocks of which a sequence has whole pairs are in clusters of two, and a cluster is a worker, whose units have
 * 256 rows, half of them each block's. Each tile is loaded once for both: a block's producers copy half of its columns,
 * to both, as soon as both are done with the stage. Else the blocks have nothing to do with each other: each leaves
 * partials of its own rows, and merges them.
 *
 * Where all units are expected to be alike, and few, tall blocks or clusters have a part of a unit each, and nothing
 * else: a kernel of its own, whose warps find the part without a look at the rest of the batch (line::find_block_part),
 * and which merges rows with as little code, since that is fetched while all wait for it.
 *
 * Where runs change the groups have no time to wait for a memory that is busy with tiles. So a warp of its own, the
 * scout, is ahead of them: it finds out what they have to know of a run, and loads its queries.
 *
 * sm_90a, 16-bit caches, no batch_invariant mode.
 */
#ifndef ATTND_KERNELS_CUDA_WIDE_CUH
#define ATTND_KERNELS_CUDA_WIDE_CUH

#include "kernels/cuda/joint.cuh"
#include "kernels/cuda/narrow.cuh"

namespace wide {

using launching::arguments;
using line::ALL_LANES;
using narrow::GROUP_THREADS;
using narrow::softness;
using narrow::WARPS;
using rows::LOG2_E;

constexpr uint32_t GROUP_ROWS = 64, TALL_ROWS = 128;
constexpr uint32_t STEP = 16; /* what a product sums over */

constexpr uint32_t MAX_STAGES = 12;

/*
 * A kernel's shape. TWINS: twins.cuh, where values have barriers of their own, behind those of keys. CLUSTER: blocks
 * that are a worker together. IN_PARTS: of tall blocks.
 */
template <typename KV_, uint32_t DIM_, uint32_t DIM_V_, uint32_t GROUPS_, bool SIMPLE, bool TALL_ = false,
          bool TWINS_ = false, uint32_t CLUSTER_ = 1, bool IN_PARTS_ = false>
struct shape {
    using KV = KV_;
    using IO = typename KV::IO;
    static constexpr bool TALL = TALL_, TWINS = TWINS_, IN_PARTS = IN_PARTS_;
    static constexpr bool HAS_OWN_PARTIALS = CLUSTER_ > 1 || IN_PARTS; /* workspace_of */
    static constexpr uint32_t DIM = DIM_, DIM_V = DIM_V_, GROUPS = GROUPS_, CLUSTER = CLUSTER_;
    static constexpr uint32_t ROWS = TALL ? TALL_ROWS : GROUP_ROWS, TOKENS = TALL ? 128 : 64;
    static constexpr uint32_t UNIT_ROWS = ROWS * CLUSTER;
    static constexpr bool BENDS = !SIMPLE && !TALL;      /* can softcap */
    static constexpr uint32_t TURNS = TALL ? 1 : GROUPS; /* of how many tiles a group consumes one */
    static constexpr uint32_t TERMS = TALL ? KV::TALL_TERMS : TWINS ? 1 : KV::TERMS; /* of a weight, in a row */
    static_assert(!TALL || GROUPS * GROUP_ROWS == TALL_ROWS, "");
    static_assert(TALL || (CLUSTER == 1 && !IN_PARTS), "");
    using stage = produce::stage_shape<KV, DIM, DIM_V, TOKENS, true, produce::content::ALL, 1,
                                       TWINS ? MAX_STAGES * sizeof(uint64_t) : 0>;
    using key_stage = produce::stage_shape<KV, DIM, DIM_V, TOKENS, true, produce::content::KEYS, CLUSTER>; /* tall */
    using value_stage = produce::stage_shape<KV, DIM, DIM_V, TOKENS, true, produce::content::VALUES, CLUSTER>;
    using rules = line::rules<TOKENS, SIMPLE, false>;
    /* Columns of a product with V. */
    static constexpr uint32_t WIDTH = TALL && DIM_V == 128 ? DIM_V : stage::VALUE_CHUNK / KV::BYTES;
    static_assert(KV::BYTES == 2 && DIM <= 2 * DIM_V, "");
};

/* Of values, in a tall block, which has one stage more of keys. */
constexpr uint32_t MAX_TALL_STAGES = (MAX_STAGES - 1) / 2;

/*
 * What a block has on its way while each group consumes a stage, more or less. With more all blocks get their first
 * tiles late, and some get more of the memory's time than others.
 */
constexpr uint32_t ON_THE_WAY = 96 * 1024;

/* A merge is as long as that many tokens' tiles, so shares may be larger by so many to cut no unit (line.cuh). */
constexpr uint32_t ALIGN_TOKENS = 768;

constexpr uint32_t NO_TILE = UINT32_MAX;

/* A run, as the scout has found it; without tiles: the block has none. */
struct found_run {
    line::unit unit;
    rows::run run;
    rows::worker by;
    uint32_t rows;         /* of the unit's block */
    uint32_t tiles_before; /* of the block, done in runs before this one */
    uint32_t given;        /* the last tile of the group that gives its state, in the block; or NO_TILE: it has none */
    uint32_t given_parity; /* of the barrier at which that is waited for */
    uint32_t is_cut, is_last;
    uint32_t first_worker, workers; /* that leave partials of the unit, if it is cut; of tall blocks */
    uint2 all;                      /* tokens that every row sees */
    softness soft;
};

/*
 * What a block keeps in shared memory, behind the ring. Run i of the block is in slot i % GROUPS, until all groups are
 * done with it: so none is more than a run ahead of the other. At the barriers of a slot all threads arrive, not one of
 * a warp after __syncwarp: of what is passed on so compute-sanitizer's racecheck would know nothing.
 */
template <typename S> struct block_memory {
    alignas(1024) char queries[S::GROUPS][S::ROWS * S::stage::KEY_BYTES]; /* of a run, in columns (layout.cuh) */
    uint2 visible[S::GROUPS][S::ROWS]; /* tokens that a row of a run sees, from .x to before .y */
    found_run runs[S::GROUPS];
    float2 given[S::TALL ? 1 : GROUP_ROWS]; /* maxima and sums that one group gives to the other */
    uint32_t merged[S::GROUPS];             /* of a unit that was cut: what is to be merged (joint.cuh) */
    uint64_t full[MAX_STAGES];
    uint64_t empty[MAX_STAGES];
    uint64_t found[S::GROUPS]; /* the slot has a run.. */
    uint64_t done[S::GROUPS];  /* ..with which the groups are done */
    uint64_t given_away[S::GROUPS];
};

/* Who a thread is. */
struct group_place {
    uint32_t group, warp, lane; /* warp: of the group */

    __device__ uint32_t thread() const { return warp * 32 + lane; }

    /* The first or second row that a thread holds, of its group's.. */
    __device__ uint32_t group_row(uint32_t half) const { return warp * 16 + lane / 4 + half * 8; }
};

/* ..and of the block's. */
template <typename S> __device__ inline uint32_t row_of(const group_place &own, uint32_t half) {
    return (S::TALL ? own.group * GROUP_ROWS : 0) + own.group_row(half);
}

/* The number of the block's worker, and how many workers there are. */
template <typename S> __device__ inline uint32_t worker_number() { return blockIdx.x / S::CLUSTER; }
template <typename S> __device__ inline uint32_t count_workers() { return gridDim.x / S::CLUSTER; }

/* Rows of a unit that other blocks of the cluster have, before this one's. */
template <typename S> __device__ inline uint32_t rows_before() {
    return S::CLUSTER > 1 ? blockIdx.x % S::CLUSTER * S::ROWS : 0;
}

/* Does the group end this run? */
template <typename S> __device__ inline bool is_ender(uint32_t run, uint32_t group) {
    return S::TURNS == 1 || run % S::GROUPS == group;
}

/* A tall block's. */
struct rings {
    produce::ring keys, values;
};

/* What a launch passes to a block, and where it works. */
template <typename S> struct block_place {
    const attn_cuda_call &call;
    const arguments &with;
    block_memory<S> &memory;
};

/* ------------------------------------------------------------------------------------------- */
/* The scout */

/* On its way through the block's share. */
struct scout {
    line::share mine;
    uint32_t parts_left; /* of the share: the last run if that comes first, and the rest */
    uint32_t part_end;
    line::unit unit;
    rows::run run;
    uint32_t tiles_done; /* of the block before the run */
    uint32_t runs;       /* of the block up to this one */
    uint32_t gave;       /* bit i: the parity of given_away[i] */
};

/* Is the run the block's last? */
__device__ inline bool is_last(const scout &own) { return own.parts_left == 0 && own.run.end == own.part_end; }

/* Goes on to the next run, which there must be. */
template <typename S>
__device__ inline void find_next_run(scout &own, const attn_cuda_call &call, const line::cut &cut) {
    using L = typename S::rules;
    own.tiles_done += own.run.end - own.run.begin;
    own.run.begin = own.run.end;
    while (own.run.begin == own.part_end) {
        bool is_first = own.parts_left-- == 2;
        own.run.begin = is_first ? own.mine.turn : own.mine.begin;
        own.part_end = is_first ? own.mine.end : own.mine.turn;
        if (own.run.begin == own.part_end) continue;
        own.unit = line::unit_at<L>(call, cut, is_first ? own.mine.at_turn : own.mine.at_begin, own.run.begin);
    }
    if (own.run.begin == own.unit.begin + own.unit.sees.tiles) line::next_unit<L>(own.unit, call, cut);
    own.run.end = min(own.part_end, own.unit.begin + own.unit.sees.tiles);
    own.runs++;
}

/* Rows of a unit's block; in a cluster maybe none. */
template <typename S> __device__ inline uint32_t count_rows(const line::cut &cut, const line::unit &unit) {
    if (S::rules::SIMPLE) return cut.group;
    uint32_t count = min(cut.block_queries, unit.of.query_length - unit.block * cut.block_queries) * cut.group;
    if (S::CLUSTER == 1) return count;
    return count > rows_before<S>() ? min(count - rows_before<S>(), S::ROWS) : 0;
}

/*
 * Starts to copy the queries of a unit's block, rows `first_row` to before `end_row`, to shared memory: zeros where it
 * has fewer. By THREADS threads.
 */
template <typename S, uint32_t THREADS>
__device__ inline void copy_queries(const attn_cuda_call &call, const line::cut &cut, const line::unit &unit,
                                    uint32_t queries, uint32_t first_row, uint32_t end_row, uint32_t thread) {
    constexpr uint32_t KEY_BYTES = S::stage::KEY_BYTES, PIECES = KEY_BYTES / layout::PIECE_BYTES;
    uint32_t count = count_rows<S>(cut, unit), between_queries = call.layer.heads_q - cut.group;
    size_t query_row = (size_t)unit.of.first_query + unit.block * cut.block_queries;
    size_t first = query_row * call.layer.heads_q + unit.head * cut.group;
    const char *from = (const char *)call.queries + first * KEY_BYTES;
#pragma unroll 4
    for (uint32_t i = first_row * PIECES + thread; i < end_row * PIECES; i += THREADS) {
        uint32_t row = i / PIECES, piece = i % PIECES, of_unit = rows_before<S>() + row, skipped = 0;
        if (!S::rules::SIMPLE) skipped = line::query_of(cut, of_unit) * between_queries;
        uint32_t to = queries + layout::piece_offset(KEY_BYTES, S::ROWS, row, piece);
        if (row < count) {
            ptx::copy_16_bytes(to, from + (size_t)(of_unit + skipped) * KEY_BYTES + piece * layout::PIECE_BYTES);
        } else {
            ptx::store_zeros(to);
        }
    }
    ptx::copies_commit();
}

/* Writes down what each row of a unit's block sees. */
template <typename S>
__device__ inline void write_visible(const attn_cuda_call &call, const line::cut &cut, const line::unit &unit,
                                     uint2 *visible, uint32_t lane) {
    uint32_t count = count_rows<S>(cut, unit);
    for (uint32_t row = lane; row < S::ROWS; row += 32) {
        uint32_t query = unit.block * cut.block_queries + line::query_of(cut, rows_before<S>() + row);
        visible[row] = row < count ? results::row_visible(unit.of, call.window, query) : make_uint2(0, unit.sees.end);
    }
    __syncwarp();
}

/* Which workers leave partials of a run's unit. */
template <typename S>
__device__ inline void find_workers(found_run &found, const line::share &mine, const line::cut &cut) {
    const line::unit &unit = found.unit;
    if (mine.is_part) {
        found.by.tiles_a_worker = 0;
        found.first_worker = worker_number<S>() - line::part_of(cut, worker_number<S>());
        found.workers = S::IN_PARTS ? min(cut.parts, unit.sees.tiles) : cut.parts;
    } else {
        found.first_worker = unit.begin / mine.tiles_a_worker;
        found.workers = (unit.begin + unit.sees.tiles - 1) / mine.tiles_a_worker + 1 - found.first_worker;
    }
}

/* Describes the run that the scout is at. */
template <typename S>
__device__ inline found_run describe_run(scout &own, const attn_cuda_call &call, const line::cut &cut,
                                         const uint2 *visible) {
    using L = typename S::rules;
    found_run found;
    uint32_t number = own.runs - 1, tiles = own.run.end - own.run.begin;
    found.unit = own.unit;
    found.run = own.run;
    found.by = {worker_number<S>(), own.mine.tiles_a_worker, line::chunk_shift<L>(call)};
    if (S::TALL) find_workers<S>(found, own.mine, cut);
    found.rows = count_rows<S>(cut, own.unit);
    found.tiles_before = own.tiles_done;
    found.given = NO_TILE;
    found.given_parity = own.gave >> number % S::GROUPS & 1;
    if (S::TURNS > 1) {
        uint32_t last = own.tiles_done + tiles - 1;
        if (is_ender<S>(number, last % S::GROUPS)) last = tiles > 1 ? last - 1 : NO_TILE;
        found.given = last;
        if (last != NO_TILE) own.gave ^= 1u << number % S::GROUPS;
    }
    found.is_cut = rows::is_cut<L>(call, own.unit, own.run);
    found.is_last = is_last(own);
    found.all = make_uint2(0, own.unit.sees.end);
    if (!L::SIMPLE && (S::CLUSTER == 1 || found.rows > 0))
        found.all = make_uint2(visible[found.rows - 1].x, visible[0].y);
    found.soft = narrow::softness_of<S>(call, own.unit.head);
    return found;
}

/* The same if the worker has nothing but a part of a unit, whose queries the groups load. */
template <typename S>
__device__ inline void find_only_run(const block_place<S> &block, const line::part &part, uint32_t lane) {
    scout own = {part.mine};
    own.part_end = part.mine.end;
    own.unit = part.unit;
    own.run = {part.mine.begin, part.mine.end};
    own.runs = 1;
    uint2 *visible = block.memory.visible[0];
    if (!S::rules::SIMPLE) write_visible<S>(block.call, block.with.cut, own.unit, visible, lane);
    found_run found = describe_run<S>(own, block.call, block.with.cut, visible);
    if (lane == 0) block.memory.runs[0] = found;
    ptx::barrier_arrive(ptx::shared_address(&block.memory.found[0]));
}

/* Do the groups load the queries of this run? All wait for the first ones, and 256 threads are faster than 32. */
template <typename S> __device__ inline bool are_loaded_by_groups(uint32_t run) { return S::TALL && run == 0; }

/* The warp's work. */
template <typename S>
__device__ inline void find_runs(const block_place<S> &block, const line::share &mine, uint32_t lane) {
    block_memory<S> &memory = block.memory;
    scout own = {mine};
    own.parts_left = 2;
    if (mine.begin == mine.end) { /* nothing to do, which the groups are told */
        if (lane == 0) memory.runs[0].run = {0, 0};
        ptx::barrier_arrive(ptx::shared_address(&memory.found[0]));
        return;
    }
#pragma unroll 1
    while (!is_last(own)) {
        find_next_run<S>(own, block.call, block.with.cut);
        uint32_t number = own.runs - 1, slot = number % S::GROUPS;
        ptx::barrier_wait(ptx::shared_address(&memory.done[slot]), number / S::GROUPS % 2 ^ 1);
        if (!are_loaded_by_groups<S>(number)) {
            copy_queries<S, 32>(block.call, block.with.cut, own.unit, ptx::shared_address(memory.queries[slot]), 0,
                                S::ROWS, lane);
        }
        uint2 *visible = memory.visible[slot];
        if (!S::rules::SIMPLE) write_visible<S>(block.call, block.with.cut, own.unit, visible, lane);
        found_run found = describe_run<S>(own, block.call, block.with.cut, visible);
        if (lane == 0) memory.runs[slot] = found;
        ptx::copies_wait<0>();
        ptx::shared_proxy_fence();
        ptx::barrier_arrive(ptx::shared_address(&memory.found[slot]));
    }
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
        ptx::warpgroup_fence();
        multiply_keys<S>(scores, queries, at);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>();
        ptx::hold(scores);
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
    uint32_t next = keys.wait(), current;
    if (own.group == 1) pass_turn<S>(own);
    take_turn<S>(own);
    ptx::warpgroup_fence();
    multiply_keys<S>(scores, queries, next);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>();
    ptx::hold(scores);
    if (own.group == 0 || run.tiles > 1) pass_turn<S>(own);
    keys.pass(own.lane);
    weigh<S>(own, scores, state, factors, run, visible);
    raise_scores<S>(scores, state, run.soft.scale_log2);
    pack_weights<S>(scores, weights);
#pragma unroll 1
    for (; run.tiles > 1; run.tiles--) {
        current = wait_for_values<S>(own, values, run);
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
    current = wait_for_values<S>(own, values, run);
    ptx::warpgroup_fence();
    multiply_values<S>(state, weights, current);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>();
    hold_out(state);
    values.pass(own.lane);
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
        ptx::warpgroup_fence();
        multiply_keys<S>(scores, queries, at);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>();
        ptx::hold(scores);
        keys.pass(own.lane);
        weigh<S>(own, scores, state, factors, run, visible);
        if (have_moved(factors)) rescale(state, factors);
        soften<S>(scores, state, weights, run.soft.scale_log2);
        at = wait_for_values<S>(own, values, run);
        ptx::warpgroup_fence();
        multiply_values<S>(state, weights, at);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>();
        hold_out(state);
        values.pass(own.lane);
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

/* ------------------------------------------------------------------------------------------- */
/* A consumer warp */

/* Ends a run whose state the group has. */
template <typename S>
__device__ inline void end_run(const block_place<S> &block, const group_place &own, const found_run &found,
                               warp_state<S> &state) {
    bool is_apart =
        S::HAS_OWN_PARTIALS && found.is_cut && block.with.beside != 0; /* and nobody reads it but this launch */
    if (!is_apart) ptx::wait_for_previous_launch(); /* which may still read what is written from here on */
    if (!found.is_cut) {
        write_unit(block, own, found, state);
    } else {
        store_partial(block, own, found, state);
        if (S::TALL)
            merge_unit<S, S::GROUPS * WARPS>(block, found, S::GROUPS, own.group * WARPS + own.warp, own.lane);
        else if (!found.is_last)
            merge_unit<S, WARPS>(block, found, own.group, own.warp, own.lane);
    }
}

/* Does a run of a tall block, whose groups give each other nothing. */
template <typename S>
__device__ inline void do_run(const block_place<S> &block, const group_place &own, uint32_t number, const rings &from,
                              char *) {
    warp_state<S> state;
    consume_tall(state, block, number, from, own);
    end_run(block, own, block.memory.runs[number % S::GROUPS], state);
}

/* Does a run: consumes the group's tiles, and ends it if that is the group's turn. */
template <typename S>
__device__ inline void do_run(const block_place<S> &block, const group_place &own, uint32_t number,
                              const produce::ring &ring, char *ring_memory) {
    uint32_t slot = number % S::GROUPS;
    const found_run &found = block.memory.runs[slot];
    bool ends = is_ender<S>(number, own.group);
    warp_state<S> state;
    consume_tiles<S>(state, ptx::shared_address(block.memory.queries[slot]), block.memory.visible[slot], ring, own,
                     tiles_of_group<S>(found, own.group), !ends);
    bool is_given = S::TURNS > 1 && found.given != NO_TILE;
    uint32_t stage = is_given ? found.given % ring.stages : 0;
    char *given = ring_memory + stage * S::stage::BYTES;
    if (!ends) {
        if (is_given) give_state(own, block.memory, slot, given, state);
        return;
    }
    if (is_given) take_state(own, block.memory, slot, given, ring.empty + stage * 8, state);
    end_run(block, own, found, state);
}

/* Does the only run of a block that has a part of a unit. */
template <typename S>
__device__ inline void consume_part(const block_place<S> &block, const group_place &own, const line::part &part,
                                    const rings &from) {
    load_first_queries(block, own, part.unit);
    ptx::barrier_wait(ptx::shared_address(&block.memory.found[0]), 0);
    __syncwarp();
    do_run(block, own, 0, from, nullptr);
}

/* RING: a produce::ring, or a tall block's rings. */
template <typename S, typename RING>
__device__ inline void consume(const block_place<S> &block, const group_place &own, const RING &ring,
                               char *ring_memory) {
    const block_memory<S> &memory = block.memory;
    uint32_t number = 0, slot = 0;
#pragma unroll 1
    for (bool is_last = false; !is_last; number++) {
        slot = number % S::GROUPS;
        ptx::barrier_wait(ptx::shared_address(&memory.found[slot]), number / S::GROUPS % 2);
        __syncwarp();
        if (memory.runs[slot].run.begin == memory.runs[slot].run.end) return;
        do_run<S>(block, own, number, ring, ring_memory);
        is_last = memory.runs[slot].is_last;
        ptx::barrier_arrive(ptx::shared_address(&memory.done[slot]));
    }
    const found_run &found = memory.runs[slot];
    /* The last run's unit all warps merge. */
    if (found.is_cut && !S::TALL) {
        merge_unit<S, S::GROUPS * WARPS>(block, found, S::GROUPS, own.group * WARPS + own.warp, own.lane);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The kernel */

/*
 * The groups, and one more: the producer, or that of keys, the scout, in tall blocks the producer of values, and idle
 * warps, as registers are a whole group's to give.
 */
template <typename S> constexpr uint32_t block_threads() { return (S::GROUPS + 1) * GROUP_THREADS; }

/* Registers of a thread, if there are two groups: at first, in the products' groups, and in the other one. */
constexpr uint32_t FIRST_REGISTERS = 168, MORE_REGISTERS = 208, LESS_REGISTERS = 88;
static_assert(2 * MORE_REGISTERS + LESS_REGISTERS <= 3 * FIRST_REGISTERS, "");

/* Of `stages` stages; in a tall block of values, with one more of keys. */
template <typename S> __host__ __device__ inline uint32_t ring_bytes(uint32_t stages) {
    return stages * S::stage::BYTES + (S::TALL ? S::key_stage::BYTES : 0);
}

template <typename S> __host__ __device__ inline uint32_t ring_barriers(uint32_t stages) {
    return S::TALL ? 2 * stages + 1 : stages;
}

template <typename S>
__device__ inline rings view_rings(const char *shared, const block_memory<S> &memory, uint32_t stages) {
    uint32_t at = ptx::shared_address(shared), full = ptx::shared_address(memory.full);
    uint32_t empty = ptx::shared_address(memory.empty), keys = stages + 1;
    return {{at, full, empty, keys, S::key_stage::BYTES},
            {at + keys * S::key_stage::BYTES, full + keys * 8, empty + keys * 8, stages, S::value_stage::BYTES}};
}

/* What the producers do. `warp`: of those that are in no group. */
template <typename S>
__device__ inline void fill_rings(const block_place<S> &block, const line::part &part, const char *shared,
                                  uint32_t warp, uint32_t lane) {
    using L = typename S::rules;
    rings of = view_rings(shared, block.memory, block.with.stages);
    if (warp == 0)
        produce::fill_ring_from_unit<typename S::key_stage, L>(block.call, block.with.cut, part, of.keys, lane);
    else
        produce::fill_ring_from_unit<typename S::value_stage, L>(block.call, block.with.cut, part, of.values, lane);
}

template <typename S>
__device__ inline void fill_rings(const block_place<S> &block, const line::share &mine, const char *shared,
                                  const produce::ring &ring, uint32_t warp, uint32_t lane) {
    using L = typename S::rules;
    if constexpr (S::TALL) {
        rings of = view_rings(shared, block.memory, block.with.stages);
        if (warp == 0)
            produce::fill_ring<typename S::key_stage, L>(block.call, block.with.cut, mine, of.keys, lane);
        else
            produce::fill_ring<typename S::value_stage, L>(block.call, block.with.cut, mine, of.values, lane);
    } else {
        produce::fill_ring<typename S::stage, L>(block.call, block.with.cut, mine, ring, lane);
    }
}

template <typename S>
__global__ void __launch_bounds__(block_threads<S>(), 1)
    wide_kernel(const __grid_constant__ attn_cuda_call call, const __grid_constant__ arguments with) {
#if __CUDA_ARCH__ >= 900 /* never launched elsewhere */
    extern __shared__ __align__(1024) char shared[];
    block_memory<S> &memory = *(block_memory<S> *)(shared + ring_bytes<S>(with.stages));
    produce::ring ring = {ptx::shared_address(shared), ptx::shared_address(memory.full),
                          ptx::shared_address(memory.empty), with.stages, S::stage::BYTES};
    uint32_t warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    launching::fetch_constants(call, with, warp);
    if (threadIdx.x == S::GROUPS * GROUP_THREADS) {
        launching::prefetch_page_table(call);
        for (uint32_t stage = 0; stage < ring_barriers<S>(with.stages); stage++) {
            ptx::barrier_init(ring.full + stage * 8, produce::full_arrivals());
            ptx::barrier_init(ring.empty + stage * 8, S::GROUPS / S::TURNS * WARPS * S::CLUSTER);
        }
        for (uint32_t slot = 0; slot < S::GROUPS; slot++) {
            ptx::barrier_init(ptx::shared_address(&memory.found[slot]), 32);
            ptx::barrier_init(ptx::shared_address(&memory.done[slot]), S::GROUPS * GROUP_THREADS);
            ptx::barrier_init(ptx::shared_address(&memory.given_away[slot]), GROUP_THREADS);
        }
        ptx::barrier_init_fence();
    }
    if (with.times != nullptr && threadIdx.x == 0) {
        with.times[blockIdx.x * 4] = ptx::multiprocessor();
        with.times[blockIdx.x * 4 + 1] = ptx::global_time_ns();
    }
    ptx::launch_dependents();
    if (S::CLUSTER > 1) ptx::cluster_arrive_relaxed(); /* the barriers are there */
    line::part part;
    if constexpr (S::IN_PARTS)
        part = line::find_block_part<typename S::rules>(call, with.cut, with.unit_blocks, worker_number<S>());
    __syncthreads();
    if constexpr (S::IN_PARTS) {
        if (part.mine.begin == part.mine.end) return;
    }
    block_place<S> block = {call, with, memory};
    if (warp >= S::GROUPS * WARPS) {
        if (S::GROUPS == 2) ptx::give_registers<LESS_REGISTERS>();
        if (warp > S::GROUPS * WARPS + (S::TALL ? 2 : 1))
            return; /* nor do those look for the share that need not: it takes long */
        if constexpr (S::IN_PARTS) {
            if (warp != S::GROUPS * WARPS + 1) {
                if (S::CLUSTER > 1) ptx::cluster_wait();
                fill_rings(block, part, shared, warp - S::GROUPS * WARPS, lane);
            } else {
                if (with.times != nullptr && lane == 0) with.times[blockIdx.x * 4 + 2] = ptx::global_time_ns();
                find_only_run<S>(block, part, lane);
            }
        } else {
            line::share mine = line::find_share<typename S::rules, S::TALL>(call, with.cut, count_workers<S>(),
                                                                            worker_number<S>(), lane);
            if (warp != S::GROUPS * WARPS + 1) {
                if (mine.begin == mine.end) return;
                if (S::CLUSTER > 1) ptx::cluster_wait();
                fill_rings(block, mine, shared, ring, warp - S::GROUPS * WARPS, lane);
            } else {
                if (with.times != nullptr && lane == 0) with.times[blockIdx.x * 4 + 2] = ptx::global_time_ns();
                find_runs<S>(block, mine, lane);
            }
        }
    } else {
        if (S::GROUPS == 2) ptx::take_registers<MORE_REGISTERS>();
        group_place own = {warp / WARPS, warp % WARPS, lane};
        if (S::CLUSTER > 1) ptx::cluster_wait();
        if constexpr (S::IN_PARTS)
            consume_part(block, own, part, view_rings(shared, memory, with.stages));
        else if constexpr (S::TALL)
            consume(block, own, view_rings(shared, memory, with.stages), shared);
        else
            consume(block, own, ring, shared);
        if (with.times != nullptr && threadIdx.x % GROUP_THREADS == 0)
            atomicMax((unsigned long long *)&with.times[blockIdx.x * 4 + 3], ptx::global_time_ns());
        if (S::CLUSTER > 1) { /* the others may still arrive at this one's barriers */
            ptx::cluster_arrive_relaxed();
            ptx::cluster_wait();
        }
    }
#endif
}

/* ------------------------------------------------------------------------------------------- */
/* Launching */

/* Workers of a launch, each a cluster or a block. */
template <typename S> uint32_t count_launched(const attn_cuda_tuning &tuning) {
    return S::CLUSTER == 1 ? tuning.workers : min(tuning.workers / S::CLUSTER, tuning.clusters[S::CLUSTER]);
}

/* Row blocks of a sequence, at most. */
template <typename S> uint32_t count_blocks(const attn_cuda_call &call, const attn_cuda_expected &expected) {
    uint32_t block_queries = S::UNIT_ROWS / (call.layer.heads_q / call.layer.heads_kv);
    return (expected.most_queries + block_queries - 1) / block_queries;
}

/*
 * The workers of each unit, where all are alike: then all that there are have equal parts. Else a share that is no part
 * of a unit has workers wait for others that are at another unit. 1: shares are cut as they come.
 */
template <typename S>
uint32_t choose_parts(const attn_cuda_call &call, const attn_cuda_tuning &tuning, const attn_cuda_expected &expected) {
    uint64_t units = (uint64_t)call.batch * call.layer.heads_kv * count_blocks<S>(call, expected);
    uint64_t tiles = (expected.longest + S::TOKENS - 1) / S::TOKENS, parts = count_launched<S>(tuning) / units;
    if (!S::TALL || expected.shortest != expected.longest || parts > joint::MAX_MEMBERS || parts > tiles) return 1;
    return max((uint32_t)parts, 1u);
}

/*
 * Bytes of the workspace's partials that the launch before may be at work in, if the others are enough for this one.
 * Else 0: then it waits for that one before it stores any.
 */
inline uint32_t bytes_beside(const attn_cuda_workspace &workspace, const attn_cuda_tuning &tuning, uint32_t columns) {
    constexpr size_t MAX_BESIDE_ROWS = ATTN_CUDA_MAX_BESIDE_ROWS;
    if (tuning.beside == 0) return 0;
    size_t column_bytes = columns * sizeof(float), state_bytes = workspace.slots * MAX_BESIDE_ROWS * sizeof(float2);
    size_t taken = state_bytes + 2 * tuning.beside * MAX_BESIDE_ROWS * column_bytes;
    size_t needed = (size_t)workspace.slots * GROUP_ROWS * sizeof(float2) + /* before the first output */
                    2 * tuning.workers * TALL_ROWS * column_bytes;
    size_t all = (size_t)workspace.slots * GROUP_ROWS * (sizeof(float2) + column_bytes);
    return taken + needed <= all ? (uint32_t)rows::round_up(taken) : 0;
}

template <typename S>
cudaError_t launch(const attn_cuda_call &call, const attn_cuda_tuning &tuning, const attn_cuda_workspace &workspace,
                   const attn_cuda_expected &expected, cudaStream_t stream) {
    uint32_t group = call.layer.heads_q / call.layer.heads_kv;
    if (workspace.rows < GROUP_ROWS || group > GROUP_ROWS || tuning.blocks_per_sm == 2) return cudaErrorInvalidValue;
    if (workspace.slots * GROUP_ROWS < 2 * tuning.workers * S::ROWS) return cudaErrorInvalidValue;
    uint32_t besides = (uint32_t)sizeof(block_memory<S>) + ring_bytes<S>(0);
    uint32_t least = S::TALL ? 1 : S::GROUPS;
    if (tuning.shared_bytes < besides + least * S::stage::BYTES) return cudaErrorInvalidValue;
    uint32_t stages = (tuning.shared_bytes - besides) / S::stage::BYTES;
    uint32_t most = S::GROUPS + (ON_THE_WAY + S::stage::BYTES - 1) / S::stage::BYTES;
    if (tuning.stages != 0) most = tuning.stages;
    stages = min(min(stages, most), S::TALL ? MAX_TALL_STAGES : MAX_STAGES) / least * least;
    attn_cuda_workspace slots = workspace;
    slots.rows = GROUP_ROWS;
    uint32_t workers = count_launched<S>(tuning), parts = choose_parts<S>(call, tuning, expected);
    if (S::IN_PARTS) workers = parts * call.batch * call.layer.heads_kv * count_blocks<S>(call, expected);
    arguments with = {line::make_cut(call.layer, tuning, S::UNIT_ROWS, workers, parts),
                      slots,
                      stages,
                      tuning.patience_ns,
                      tuning.times,
                      0,
                      S::HAS_OWN_PARTIALS ? bytes_beside(workspace, tuning, call.layer.head_dim_v) : 0,
                      count_blocks<S>(call, expected)};
    with.cut.align_tiles = max(tuning.align_tiles, ALIGN_TOKENS / S::TOKENS);
    launching::grid size = {workers * S::CLUSTER, block_threads<S>(), S::CLUSTER, besides + stages * S::stage::BYTES};
    return launching::launch_kernel(wide_kernel<S>, size, tuning, call, with, stream);
}

constexpr uint32_t TALL_CLUSTER = 2; /* blocks */

/* Do the rows of a sequence fill the blocks of clusters, which the device has? */
template <typename S>
bool are_whole_clusters(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                        const attn_cuda_expected &expected) {
    uint32_t rows = expected.most_queries * (call.layer.heads_q / call.layer.heads_kv);
    return count_launched<S>(tuning) > 0 && (rows + S::ROWS - 1) / S::ROWS % S::CLUSTER == 0;
}

/* Blocks in clusters if they are in pairs, and in parts if all units are expected to be alike. */
template <typename KV, uint32_t DIM, uint32_t DIM_V>
cudaError_t launch_tall(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                        const attn_cuda_workspace &workspace, const attn_cuda_expected &expected, cudaStream_t stream) {
    using single = shape<KV, DIM, DIM_V, 2, false, true>;
    using single_part = shape<KV, DIM, DIM_V, 2, false, true, false, 1, true>;
    using pair = shape<KV, DIM, DIM_V, 2, false, true, false, TALL_CLUSTER>;
    using pair_part = shape<KV, DIM, DIM_V, 2, false, true, false, TALL_CLUSTER, true>;
    if (are_whole_clusters<pair>(call, tuning, expected)) {
        if (choose_parts<pair>(call, tuning, expected) > 1)
            return launch<pair_part>(call, tuning, workspace, expected, stream);
        return launch<pair>(call, tuning, workspace, expected, stream);
    }
    if (choose_parts<single>(call, tuning, expected) > 1)
        return launch<single_part>(call, tuning, workspace, expected, stream);
    return launch<single>(call, tuning, workspace, expected, stream);
}

/*
 * Two groups have 168 registers a thread, one has 255, and takes less shared memory: wide heads have one, and no tall
 * blocks. Simple calls have a query row a sequence, so they come here only with more than 16 heads a group, which one
 * kind of model has.
 */
template <typename KV, uint32_t DIM, uint32_t DIM_V>
cudaError_t launch_shape(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                         const attn_cuda_workspace &workspace, const attn_cuda_expected &expected, uint32_t rows,
                         cudaStream_t stream) {
    constexpr uint32_t GROUPS = DIM > 128 ? 1 : 2;
    if constexpr (GROUPS == 2) {
        if (rows > GROUP_ROWS && call.softcap == 0)
            return launch_tall<KV, DIM, DIM_V>(call, tuning, workspace, expected, stream);
    }
    if constexpr (DIM == 128) {
        if (line::is_simple(call) && !line::leaves_results(call))
            return launch<shape<KV, DIM, DIM_V, GROUPS, true>>(call, tuning, workspace, expected, stream);
    }
    return launch<shape<KV, DIM, DIM_V, GROUPS, false>>(call, tuning, workspace, expected, stream);
}

template <typename KV>
cudaError_t launch_dims(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                        const attn_cuda_workspace &workspace, const attn_cuda_expected &expected, uint32_t rows,
                        cudaStream_t stream) {
    uint32_t dim = call.layer.head_dim, dim_v = call.layer.head_dim_v;
    if (call.batch_invariant) return cudaErrorInvalidValue;
    if (dim == 192 && dim_v == 128) return launch_shape<KV, 192, 128>(call, tuning, workspace, expected, rows, stream);
    if (dim != dim_v) return cudaErrorInvalidValue;
    switch (dim) {
    case 64: return launch_shape<KV, 64, 64>(call, tuning, workspace, expected, rows, stream);
    case 96: return launch_shape<KV, 96, 96>(call, tuning, workspace, expected, rows, stream);
    case 128: return launch_shape<KV, 128, 128>(call, tuning, workspace, expected, rows, stream);
    case 192: return launch_shape<KV, 192, 192>(call, tuning, workspace, expected, rows, stream);
    case 256: return launch_shape<KV, 256, 256>(call, tuning, workspace, expected, rows, stream);
    default: return cudaErrorInvalidValue;
    }
}

} /* namespace wide */

#endif
