/*
 * The narrow kernel: 8 or 16 rows a block (query rows x heads of the group). Four warps, a group, take 16 tokens each
 * of 64 of a stage and keep their own maximum, sum and output (m, l, O), so that no barrier is needed per tile. With a
 * token's keys as the rows of the matrix product,
 *     S^T [16 tokens x 8 rows] = K Q^T        O^T [head_dim_v x 8 rows] += V^T P^T
 * only the query rows are padded. At the end of a run (the block's tiles of one unit) the four states are merged
 * through shared memory. Two groups take turns run by run: while one ends its run, the other has its queries and
 * consumes. Of a part of a unit that a cluster has (cluster.cuh), or all multiprocessors (parts.cuh), they take tiles
 * in turn, and merge all their warps' states.
 */
#ifndef ATTND_KERNELS_CUDA_NARROW_CUH
#define ATTND_KERNELS_CUDA_NARROW_CUH

#include <type_traits>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cutting.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/launching.cuh"
#include "kernels/cuda/parts.cuh"
#include "kernels/cuda/produce.cuh"
#include "kernels/cuda/rows.cuh"

namespace narrow {

using launching::arguments;
using line::ALL_LANES;
using rows::LOG2_E;

constexpr uint32_t WARPS = 4; /* of a group */
constexpr uint32_t GROUP_THREADS = WARPS * 32;

/*
 * What a block has: a share of the line; or one of the equal parts into which each unit is cut, of a cluster
 * (cluster.cuh), or a long one (parts.cuh).
 */
enum class cuts { SHARES, CLUSTERS, LONG_PARTS };

/* Tokens of a tile. A stage should be worth the time that a tile's chain of products and powers takes. */
template <typename KV, uint32_t DIM, uint32_t DIM_V>
constexpr uint32_t USUAL_TOKENS = 64 * (DIM + DIM_V) * KV::BYTES <= 16384 ? 128 : 64;

/*
 * The same where all wait for the memory, and that chain is only to be short after the last byte: fp8's is long, since
 * its numbers are widened first. But no less than 16 KiB.
 */
template <typename KV, uint32_t DIM, uint32_t DIM_V>
constexpr uint32_t FINE_TOKENS = KV::BYTES == 1 && 64 * (DIM + DIM_V) >= 16384 ? 64 : USUAL_TOKENS<KV, DIM, DIM_V>;

/* A kernel's shape. BLOCKS: 8-row blocks of queries. */
template <typename KV_, uint32_t DIM_, uint32_t DIM_V_, uint32_t BLOCKS_, uint32_t GROUPS_, uint32_t BLOCKS_PER_SM_,
          bool SIMPLE, bool INVARIANT = !SIMPLE, cuts CUTS = cuts::SHARES,
          uint32_t TOKENS_ = USUAL_TOKENS<KV_, DIM_, DIM_V_>, bool LEAVES = false>
struct shape {
    using KV = KV_;
    using IO = typename KV::IO;
    static constexpr uint32_t DIM = DIM_, DIM_V = DIM_V_, BLOCKS = BLOCKS_, GROUPS = GROUPS_;
    static constexpr uint32_t BLOCKS_PER_SM = BLOCKS_PER_SM_;
    static constexpr uint32_t ROWS = BLOCKS * 8;
    static constexpr uint32_t TOKENS = TOKENS_;
    static constexpr uint32_t SLICES = TOKENS / 64; /* of 16 tokens, that a warp has of a tile */
    using stage = produce::stage_shape<KV, DIM, DIM_V, TOKENS, false>;
    /*
     * What units of different lengths count: two tiles at least, since a group takes longer from one run to the next
     * than for a tile; in fp8, where it takes longer still, one more than they have.
     */
    static constexpr bool WEIGHS_ENDS =
        SIMPLE && !INVARIANT && !LEAVES && CUTS == cuts::SHARES && BLOCKS == 1 && GROUPS == 2;
    static constexpr uint32_t ENDS_TILES = WEIGHS_ENDS && KV::BYTES == 1 ? 1 : 0, LEAST_TILES = WEIGHS_ENDS ? 2 : 1;
    using rules = line::rules<TOKENS, SIMPLE, INVARIANT, !SIMPLE || LEAVES, ENDS_TILES, LEAST_TILES>;
    static constexpr bool CLUSTERED = CUTS == cuts::CLUSTERS, HAS_PART = CUTS != cuts::SHARES;
    static constexpr bool KEEPS_CHUNKS = SIMPLE && INVARIANT; /* chunks.cuh */
};

/* What a block keeps in shared memory, behind the ring. */
template <typename S> struct alignas(16) group_memory {
    float out[WARPS][S::ROWS][S::DIM_V + 4]; /* + 4: keeps the four states' rows off each other's banks */
    float maximum[WARPS][S::ROWS];           /* of the scores, in units of log2 */
    float sum[WARPS][S::ROWS];
    uint2 visible[WARPS][S::ROWS]; /* tokens that a row sees, from .x to before .y; a warp has its own copy */
    uint64_t turn;                 /* the group has consumed its run: the next one's begins */
    uint64_t posted;               /* batch_invariant: the group has ended its chunk */
    uint32_t last_arriver;
};

constexpr uint32_t MAX_STAGES = 12;

template <typename S> struct alignas(16) block_memory {
    group_memory<S> group[S::GROUPS];
    uint64_t full[MAX_STAGES];
    uint64_t empty[MAX_STAGES];
    uint64_t received; /* the other blocks of the cluster have sent their parts */
};

/* ------------------------------------------------------------------------------------------- */
/* A warp's state */

/* A lane holds query columns 2 * (lane % 4) and the next of each 8-row block. */
template <typename S> struct warp_state {
    float out[S::DIM_V / 16][S::BLOCKS][4];
    float maximum[S::BLOCKS][2]; /* of the scores before scale_log2 */
    float sum[S::BLOCKS][2];     /* of the tokens of this lane's rows */
};

/* What the rows of a unit's block are, to a lane: queries as the right-hand matrix, and what its columns see. */
template <typename S> struct warp_rows {
    uint32_t queries[S::BLOCKS][S::DIM / 8];
    float factor[S::BLOCKS][2];  /* fp8: a power of two, of its columns */
    uint32_t all_begin, all_end; /* what every row sees */
};

/* How scores become powers of two: scale_log2 * score, of a score that softcap has bent if it is not 0. */
struct softness {
    float scale, softcap, scale_log2;
};

template <typename S> __device__ inline softness softness_of(const attn_cuda_call &call, uint32_t head) {
    softness soft;
    soft.scale = call.scale;
    if (S::KV::BYTES == 1 && call.layer.key_scales != nullptr) soft.scale *= call.layer.key_scales[head];
    soft.softcap = S::rules::SIMPLE ? 0 : call.softcap;
    soft.scale_log2 = soft.softcap > 0 ? LOG2_E : soft.scale * LOG2_E;
    return soft;
}

/* tanh by one power: exact to a few units of 2^-24, absolutely. Not inlined: few calls have a softcap. */
static __device__ __noinline__ float bend(float score, const softness &soft) {
    float power = ptx::exp2_fast(score * soft.scale * (2.0f * LOG2_E / soft.softcap));
    return soft.softcap * (1.0f - 2.0f / (power + 1.0f));
}

template <typename S> __device__ inline void clear_state(warp_state<S> &state) {
#pragma unroll
    for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
        for (uint32_t d = 0; d < S::DIM_V / 16; d++) {
            state.out[d][b][0] = state.out[d][b][1] = state.out[d][b][2] = state.out[d][b][3] = 0.0f;
        }
        state.maximum[b][0] = state.maximum[b][1] = -INFINITY;
        state.sum[b][0] = state.sum[b][1] = 0.0f;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Queries */

/* Pairs of a row as the products' right-hand operand: pair i of a lane belongs to step i / 2, half i % 2. */
template <typename S>
__device__ inline void load_row_pairs(uint32_t (&pairs)[S::DIM / 8], const uint32_t *row, uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < S::DIM / 8; i++) {
        /* fp8: ldmatrix gives a lane four consecutive bytes, so a step's dims are 4 t .. 4 t + 3. */
        uint32_t pair = S::KV::BYTES == 1 ? i / 2 * 8 + lane % 4 * 2 + i % 2 : i * 4 + lane % 4;
        pairs[i] = __ldg(&row[pair]);
    }
}

/*
 * Makes fp16 pairs of pairs of either dtype: bf16 is brought into fp16's range with a power of two, the same for the
 * four lanes of a row. Returns its inverse.
 */
template <uint32_t COUNT> __device__ inline float narrow_to_fp16(uint32_t (&pairs)[COUNT], bool is_fp16) {
    if (is_fp16) return 1.0f;
    float largest = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        float2 pair = elements::fp8::unpack(pairs[i], false);
        largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 30u), 224u);
    float down = __uint_as_float((254u - exponent) << 23), up = __uint_as_float(exponent << 23);
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        float2 pair = elements::fp8::unpack(pairs[i], false);
        pairs[i] = ptx::pack_fp16(pair.x * down, pair.y * down);
    }
    return up;
}

template <typename S>
__device__ inline void load_rows(warp_rows<S> &mine, uint2 *visible, const attn_cuda_call &call, const line::cut &cut,
                                 const line::unit &unit, uint32_t lane) {
    uint32_t query_first = unit.block * cut.block_queries;
    uint32_t queries = S::rules::SIMPLE ? 1 : min(cut.block_queries, unit.of.query_length - query_first),
             rows = queries * cut.group;
    mine.all_begin = 0;
    mine.all_end = unit.sees.end;
    if (!S::rules::SIMPLE) {
        uint2 first = results::row_visible(unit.of, call.window, query_first);
        uint2 last = results::row_visible(unit.of, call.window, query_first + queries - 1);
        mine.all_begin = last.x;
        mine.all_end = first.y;
    }
#pragma unroll
    for (uint32_t b = 0; b < S::BLOCKS; b++) {
        uint32_t row = b * 8 + lane / 4, query = S::rules::SIMPLE ? 0 : line::query_of(cut, row);
        size_t at = ((size_t)unit.of.first_query + query_first + query) * call.layer.heads_q + unit.head * cut.group +
                    row - query * cut.group;
        if (row < rows) {
            load_row_pairs<S>(mine.queries[b], (const uint32_t *)call.queries + at * (S::DIM / 2), lane);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < S::DIM / 8; i++)
                mine.queries[b][i] = 0;
        }
        if (S::KV::BYTES == 1) {
            float factor = narrow_to_fp16(mine.queries[b], call.layer.dtype == ATTN_FP16);
            mine.factor[b][0] = __shfl_sync(ALL_LANES, factor, lane % 4 * 8);
            mine.factor[b][1] = __shfl_sync(ALL_LANES, factor, lane % 4 * 8 + 4);
        }
    }
    if (lane < S::ROWS) {
        uint2 sees = make_uint2(0, unit.sees.end);
        if (!S::rules::SIMPLE && lane < rows) {
            sees = results::row_visible(unit.of, call.window, query_first + line::query_of(cut, lane));
        }
        visible[lane] = sees;
    }
    __syncwarp();
}

/* ------------------------------------------------------------------------------------------- */
/* Products */

/* Where a warp finds its 16 tokens of a slice. */
struct slice_place {
    uint32_t keys, values;             /* the first chunk of the first row */
    uint32_t key_stride, value_stride; /* from chunk to chunk */
};

template <typename S>
__device__ inline slice_place place_slice(uint32_t stage, uint32_t slice, uint32_t block_tokens, uint32_t warp) {
    using T = typename S::stage;
    uint32_t token = slice * 64 + warp * 16, row = token & (block_tokens - 1);
    produce::block_place at = produce::place_block<T>(stage, token - row, block_tokens);
    return {at.keys + row * T::KEY_CHUNK, at.values + row * T::VALUE_CHUNK, at.key_stride, at.value_stride};
}

/* scores[16 tokens x 8 rows] of each block = K Q^T. */
template <typename S>
__device__ inline void multiply_keys(float (&scores)[S::BLOCKS][4], const warp_rows<S> &mine, const slice_place &at,
                                     uint32_t lane) {
    using KV = typename S::KV;
    using T = typename S::stage;
    constexpr uint32_t PIECES = T::KEY_CHUNK / 16;
    constexpr uint32_t STEP_PIECES = 2; /* of a ldmatrix: two steps of fp8, one of 16 bits */
    float sums[S::BLOCKS][2][4] = {};   /* two: the products of one sum wait for each other */
    uint32_t row = lane % 16, row_at = at.keys + row * T::KEY_CHUNK, xored = layout::swizzle(T::KEY_CHUNK, row);
#pragma unroll
    for (uint32_t p = 0; p < T::KEY_BYTES / 16; p += STEP_PIECES) {
        uint32_t loaded[4];
        ptx::load_matrices(loaded, row_at + p / PIECES * at.key_stride + ((p % PIECES + lane / 16) ^ xored) * 16);
        if (KV::BYTES == 2) {
#pragma unroll
            for (uint32_t b = 0; b < S::BLOCKS; b++)
                KV::multiply(sums[b][p / 2 % 2], loaded, mine.queries[b][p], mine.queries[b][p + 1]);
        } else {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t first = loaded[2 * half], second = loaded[2 * half + 1];
                uint32_t a[4] = {ptx::widen_e4m3(first), ptx::widen_e4m3(second), ptx::widen_e4m3_high(first),
                                 ptx::widen_e4m3_high(second)};
#pragma unroll
                for (uint32_t b = 0; b < S::BLOCKS; b++) {
                    uint32_t step = p + half;
                    KV::multiply(sums[b][half], a, mine.queries[b][2 * step], mine.queries[b][2 * step + 1]);
                }
            }
        }
    }
#pragma unroll
    for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            scores[b][i] = sums[b][0][i] + sums[b][1][i];
    }
}

/*
 * out[head_dim_v x 8 rows] += V^T P^T. `keep`: masks of a lane's pairs of tokens, since a weight of 0 does not hide
 * what a row that nobody sees may hold. In fp8, row i of a step's 16 rows is dim 2 i, row i + 8 dim 2 i + 1.
 */
template <typename S, bool MASKED>
__device__ inline void multiply_values(warp_state<S> &state, const uint32_t (&weights)[S::KV::TERMS][S::BLOCKS][2],
                                       const slice_place &at, const uint32_t (&keep)[2], uint32_t lane) {
    using KV = typename S::KV;
    using T = typename S::stage;
    constexpr uint32_t PIECES = T::VALUE_CHUNK / 16;
    bool is_bytes = KV::BYTES == 1;
    uint32_t row = lane % 8 + (is_bytes ? lane / 8 % 2 : lane / 16) * 8;
    uint32_t piece_of_lane = is_bytes ? lane / 16 : lane / 8 % 2;
    uint32_t row_at = at.values + row * T::VALUE_CHUNK, xored = layout::swizzle(T::VALUE_CHUNK, row);
#pragma unroll
    for (uint32_t p = 0; p < T::VALUE_BYTES / 16; p += 2) {
        uint32_t loaded[4];
        ptx::load_matrices_transposed(loaded, row_at + p / PIECES * at.value_stride +
                                                  ((p % PIECES + piece_of_lane) ^ xored) * 16);
        if (MASKED) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                loaded[i] &= keep[is_bytes ? i % 2 : i / 2];
        }
        if (!is_bytes) {
#pragma unroll
            for (uint32_t t = 0; t < KV::TERMS; t++) {
#pragma unroll
                for (uint32_t b = 0; b < S::BLOCKS; b++)
                    KV::multiply(state.out[p / 2][b], loaded, weights[t][b][0], weights[t][b][1]);
            }
        } else {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t first = __byte_perm(loaded[2 * half], 0, 0x3120);
                uint32_t second = __byte_perm(loaded[2 * half + 1], 0, 0x3120);
                uint32_t a[4] = {ptx::widen_e4m3(first), ptx::widen_e4m3_high(first), ptx::widen_e4m3(second),
                                 ptx::widen_e4m3_high(second)};
#pragma unroll
                for (uint32_t b = 0; b < S::BLOCKS; b++)
                    KV::multiply(state.out[p + half][b], a, weights[0][b][0], weights[0][b][1]);
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* A tile */

/* Hides the scores of tokens that a row does not see. `first`: the slice's first token. */
template <typename S>
__device__ inline void mask_scores(float (&scores)[S::BLOCKS][4], const uint2 *visible, uint32_t first, uint32_t lane) {
#pragma unroll
    for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t token = first + lane / 4 + i / 2 * 8;
            uint2 sees = visible[b * 8 + lane % 4 * 2 + i % 2];
            if (token < sees.x || token >= sees.y) scores[b][i] = -INFINITY;
        }
    }
}

/* Of a lane's pairs of tokens of a slice, those that some row sees. */
__device__ inline void find_kept(uint32_t (&keep)[2], const line::extent &sees, uint32_t first, uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t token = first + lane % 4 * 2 + i * 8;
        keep[i] = (token >= sees.begin && token < sees.end ? 0xffffu : 0) |
                  (token + 1 >= sees.begin && token + 1 < sees.end ? 0xffff0000u : 0);
    }
}

/*
 * Scores become weights relative to the new maximum, and what was summed before is brought down to it.
 * MASKED: a row may have seen nothing at all.
 */
template <typename S, bool MASKED>
__device__ inline void soften(float (&scores)[S::SLICES][S::BLOCKS][4], warp_state<S> &state, float scale_log2) {
    bool moved = false;
    float factors[S::BLOCKS][2];
#pragma unroll
    for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            float largest = fmaxf(scores[0][b][c], scores[0][b][c + 2]);
#pragma unroll
            for (uint32_t j = 1; j < S::SLICES; j++)
                largest = fmaxf(largest, fmaxf(scores[j][b][c], scores[j][b][c + 2]));
            float maximum = fmaxf(state.maximum[b][c], ptx::column_max(largest));
            float base = MASKED && maximum == -INFINITY ? 0.0f : maximum;
            float factor = ptx::exp2_fast((state.maximum[b][c] - base) * scale_log2);
            float sum = 0.0f;
#pragma unroll
            for (uint32_t j = 0; j < S::SLICES; j++) {
#pragma unroll
                for (uint32_t i = c; i < 4; i += 2) {
                    scores[j][b][i] = ptx::exp2_fast((scores[j][b][i] - base) * scale_log2);
                    sum += scores[j][b][i];
                }
            }
            state.maximum[b][c] = maximum;
            state.sum[b][c] = fmaf(state.sum[b][c], factor, sum);
            factors[b][c] = factor;
            moved |= factor != 1.0f;
        }
    }
    if (!__any_sync(ALL_LANES, moved)) return;
#pragma unroll
    for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
        for (uint32_t d = 0; d < S::DIM_V / 16; d++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                state.out[d][b][i] *= factors[b][i % 2];
        }
    }
}

/* Attends to the warp's slices of a stage whose first token is `first`. */
template <typename S, bool MASKED>
__device__ inline void attend(warp_state<S> &state, const warp_rows<S> &mine, const uint2 *visible,
                              const line::extent &sees, uint32_t stage, uint32_t block_tokens, uint32_t first,
                              const softness &soft, uint32_t warp, uint32_t lane) {
    float scores[S::SLICES][S::BLOCKS][4];
#pragma unroll
    for (uint32_t j = 0; j < S::SLICES; j++) {
        multiply_keys<S>(scores[j], mine, place_slice<S>(stage, j, block_tokens, warp), lane);
        if (S::KV::BYTES == 1 || (!S::rules::SIMPLE && soft.softcap > 0)) {
#pragma unroll
            for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    if (S::KV::BYTES == 1) scores[j][b][i] *= mine.factor[b][i % 2];
                    if (!S::rules::SIMPLE && soft.softcap > 0) scores[j][b][i] = bend(scores[j][b][i], soft);
                }
            }
        }
        if (MASKED) mask_scores<S>(scores[j], visible, first + j * 64 + warp * 16, lane);
    }
    soften<S, MASKED>(scores, state, soft.scale_log2);
#pragma unroll
    for (uint32_t j = 0; j < S::SLICES; j++) {
        uint32_t weights[S::KV::TERMS][S::BLOCKS][2];
#pragma unroll
        for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                float low = scores[j][b][2 * half], high = scores[j][b][2 * half + 1];
                uint32_t packed = S::KV::pack(low, high);
                weights[0][b][half] = ptx::transpose_matrix(packed);
                if (S::KV::TERMS == 2) {
                    weights[S::KV::TERMS - 1][b][half] = ptx::transpose_matrix(S::KV::pack_rest(low, high, packed));
                }
            }
        }
        uint32_t keep[2] = {ALL_LANES, ALL_LANES};
        if (MASKED) find_kept(keep, sees, first + j * 64 + warp * 16, lane);
        multiply_values<S, MASKED>(state, weights, place_slice<S>(stage, j, block_tokens, warp), keep, lane);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* A run */

/* Lays a warp's state down in shared memory, the maximum in units of log2. */
template <typename S>
__device__ inline void store_state(group_memory<S> &memory, const warp_state<S> &state, float scale_log2, uint32_t warp,
                                   uint32_t lane) {
    constexpr uint32_t FIRST_STEP = S::KV::BYTES == 1 ? 2 : 1, SECOND = S::KV::BYTES == 1 ? 1 : 8;
#pragma unroll
    for (uint32_t b = 0; b < S::BLOCKS; b++) {
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            uint32_t row = b * 8 + lane % 4 * 2 + c;
            float sum = ptx::column_sum(state.sum[b][c]);
            if (lane < 4) {
                memory.maximum[warp][row] = state.maximum[b][c] * scale_log2;
                memory.sum[warp][row] = sum;
            }
#pragma unroll
            for (uint32_t d = 0; d < S::DIM_V / 16; d++) {
                uint32_t column = d * 16 + lane / 4 * FIRST_STEP;
                memory.out[warp][row][column] = state.out[d][b][c];
                memory.out[warp][row][column + SECOND] = state.out[d][b][c + 2];
            }
        }
    }
}

/* What a group's functions have in common. */
template <typename S> struct group_context {
    const attn_cuda_call &call;
    const line::cut &cut;
    const rows::workspace &work;
    group_memory<S> &memory;
    rows::worker by;
    uint32_t group, warp, lane;
};

/* A row of a group's tiles: the warps' states merged. */
template <typename S>
__device__ inline rows::row_state<S::DIM_V> merge_warps(const group_memory<S> &memory, uint32_t index, uint32_t lane) {
    rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
#pragma unroll
    for (uint32_t w = 0; w < WARPS; w++) {
        rows::merge_state(merged, rows::load_row<S::DIM_V>(memory.out[w][index], lane), memory.maximum[w][index],
                          memory.sum[w][index]);
    }
    return merged;
}

/* A row of a block's part of a unit: all warps' states merged. */
template <typename S>
__device__ inline rows::row_state<S::DIM_V> merge_groups(const block_memory<S> &memory, uint32_t index, uint32_t lane) {
    rows::row_state<S::DIM_V> merged = merge_warps<S>(memory.group[0], index, lane);
#pragma unroll
    for (uint32_t g = 1; g < S::GROUPS; g++) {
        rows::row_state<S::DIM_V> added = merge_warps<S>(memory.group[g], index, lane);
        rows::merge_state(merged, added.out, added.maximum, added.sum);
    }
    return merged;
}

/* Ends a part of a cluster's unit. By all groups. */
template <typename S>
__device__ inline void finish_part(const group_context<S> &own, const block_memory<S> &memory, const line::unit &unit,
                                   const cluster::inbox &inbox) {
    ptx::named_barrier<S::GROUPS * GROUP_THREADS>(S::GROUPS);
    ptx::cluster_wait(); /* the first block's inbox is open */
    for (uint32_t index = own.group * WARPS + own.warp; index < inbox.rows; index += S::GROUPS * WARPS) {
        rows::row_state<S::DIM_V> merged = merge_groups<S>(memory, index, own.lane);
        if (inbox.part != 0) {
            cluster::send_row(inbox, index, merged, own.lane);
            continue;
        }
        cluster::receive_row(inbox, index, merged, own.lane);
        rows::write_row<typename S::rules, typename S::IO>(own.call, {unit, own.cut, index}, merged, own.lane);
    }
}

/*
 * Merges `count` rows of a unit, from row `first` on, all of whose parts are there. Several warps have a row, each a
 * slice of its parts; what that comes to they lay down where the warps' states were, and one adds it up. By all groups.
 */
template <typename S>
__device__ inline void merge_long_parts(const group_context<S> &own, block_memory<S> &memory, const line::unit &unit,
                                        const parts::place &of, uint32_t first, uint32_t count) {
    constexpr uint32_t ALL_WARPS = S::GROUPS * WARPS;
    static_assert(S::ROWS <= ALL_WARPS, "a row has a warp, or several");
    uint32_t warp = own.group * WARPS + own.warp, slices = ALL_WARPS / count;
    uint32_t index = first + warp % count, slice = warp / count;
    rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
    if (slice < slices) {
        merged = parts::merge_slice<S::DIM_V, S::ROWS>(own.work, of, index, slice, slices, own.lane);
    }
    if (slice > 0 && slice < slices) {
        group_memory<S> &group = memory.group[slice / WARPS];
        rows::store_row(group.out[slice % WARPS][index], merged.out, own.lane);
        if (own.lane == 0) {
            group.maximum[slice % WARPS][index] = merged.maximum;
            group.sum[slice % WARPS][index] = merged.sum;
        }
    }
    __syncwarp(); /* the barrier counts whole warps */
    if (slices > 1) ptx::named_barrier<S::GROUPS * GROUP_THREADS>(S::GROUPS);
    if (slice > 0) return;
#pragma unroll
    for (uint32_t s = 1; s < ALL_WARPS; s++) {
        const group_memory<S> &group = memory.group[s / WARPS];
        if (s >= slices) break;
        rows::merge_state(merged, rows::load_row<S::DIM_V>(group.out[s % WARPS][index], own.lane),
                          group.maximum[s % WARPS][index], group.sum[s % WARPS][index]);
    }
    rows::write_row<typename S::rules, typename S::IO>(own.call, {unit, own.cut, index}, merged, own.lane);
}

/* Ends a long part of a unit, and merges what is now to be merged of it. By all groups. */
template <typename S>
__device__ inline void finish_long_part(const group_context<S> &own, block_memory<S> &memory, const line::unit &unit,
                                        uint32_t patience_ns) {
    constexpr uint32_t THREADS = S::GROUPS * GROUP_THREADS, ALL_WARPS = S::GROUPS * WARPS;
    uint32_t rows = own.cut.group;
    parts::place of = parts::place_of(own.cut, own.by.number);
    bool is_joint = parts::are_merged_jointly(of, rows, ALL_WARPS);
    ptx::named_barrier<THREADS>(S::GROUPS);
    for (uint32_t index = own.group * WARPS + own.warp; index < rows; index += ALL_WARPS) {
        rows::row_state<S::DIM_V> merged = merge_groups<S>(memory, index, own.lane);
        rows::store_partial<S::DIM_V, S::ROWS>(own.work, own.by.number, index, merged.out,
                                               make_float2(merged.maximum, merged.sum), own.lane);
    }
    ptx::named_barrier<THREADS>(S::GROUPS); /* the partials are written, and the states read */
    uint32_t &arrived = memory.group[0].last_arriver;
    if (own.group == 0 && own.warp == 0 && own.lane == 0) {
        arrived = is_joint ? parts::arrive_jointly(own.work, of, rows, patience_ns) : parts::arrive(own.work, of);
    }
    __syncwarp(); /* the barrier counts whole warps */
    ptx::named_barrier<THREADS>(S::GROUPS);
    ptx::named_barrier<THREADS>(S::GROUPS); /* for racecheck, which does not see that the first one orders */
    uint32_t rows_each = is_joint ? 1 : rows;
#pragma unroll 1
    for (uint32_t members = arrived; members != 0; members &= members - 1) {
        merge_long_parts<S>(own, memory, unit, of, (__ffs(members) - 1) * rows_each, rows_each);
    }
}

/* Ends a run: merges the warps' states and delivers the rows; who brings the unit to its end merges what was cut. */
template <typename S>
__device__ inline void finish_run(const group_context<S> &own, const line::unit &unit, const rows::run &done) {
    uint32_t query_first = unit.block * own.cut.block_queries;
    uint32_t queries = S::rules::SIMPLE ? 1 : min(own.cut.block_queries, unit.of.query_length - query_first);
    uint32_t count = queries * own.cut.group;
    ptx::named_barrier<GROUP_THREADS>(own.group);
    for (uint32_t index = own.warp; index < count; index += WARPS) {
        rows::row_state<S::DIM_V> merged = merge_warps<S>(own.memory, index, own.lane);
        rows::place at = {unit, own.cut, index};
        rows::deliver_row<typename S::rules, typename S::IO, S::DIM_V, S::ROWS>(own.call, own.work, at, done, own.by,
                                                                                merged, own.lane);
    }
    ptx::named_barrier<GROUP_THREADS>(own.group); /* the states may be overwritten; the partials are written */
    if (!rows::is_cut<typename S::rules>(own.call, unit, done)) return;

    if (own.warp == 0 && own.lane == 0)
        own.memory.last_arriver = rows::arrive<typename S::rules>(own.call, own.work, unit, done, own.by);
    __syncwarp(); /* the barrier counts whole warps */
    ptx::named_barrier<GROUP_THREADS>(own.group);
    if (!own.memory.last_arriver) return;
    for (uint32_t index = own.warp; index < count; index += WARPS) {
        rows::merge_row<typename S::rules, typename S::IO, S::DIM_V, S::ROWS>(own.call, own.work,
                                                                              {unit, own.cut, index}, own.by, own.lane);
    }
}

/* What else the groups of a block that keeps chunks have in common. */
template <typename S> struct chunk_context {
    const line::share &mine;
    block_memory<S> &memory;
    chunks::kept keeps;
    float *staged; /* the ring, when it is not needed any more */
    uint32_t staged_bytes;
    uint32_t patience_ns;
};

/* Merges row `slot`, `slot` + `slots`, .. of a unit whose chunks are in the workspace. By a warp. */
template <typename S>
__device__ inline void merge_stored(const group_context<S> &own, const line::unit &unit, uint32_t slot,
                                    uint32_t slots) {
    for (uint32_t index = slot; index < own.cut.group; index += slots) {
        rows::merge_row<typename S::rules, typename S::IO, S::DIM_V, S::ROWS>(own.call, own.work,
                                                                              {unit, own.cut, index}, own.by, own.lane);
    }
}

/* After the block's last chunk of a unit that it does not end with: merges it, if all of it is there. By a group. */
template <typename S>
__device__ inline void end_unit(const group_context<S> &own, const chunk_context<S> &with, const line::unit &unit,
                                const chunks::unit_plan &plan) {
    using L = typename S::rules;
    if (plan.is_kept) {
        for (uint32_t index = own.warp; index < own.cut.group; index += WARPS) {
            chunks::kept_row<S::DIM_V> from = {with.keeps.outs + index * S::DIM_V, with.keeps.lses + index,
                                               with.keeps.rows};
            rows::merge_chunks<typename S::IO, S::DIM_V>(
                own.call, from, rows::destination_of<L>(own.call, {unit, own.cut, index}, 0), plan.count, own.lane);
        }
        return;
    }
    if (own.warp == 0 && own.lane == 0) {
        chunks::party party = chunks::party_of(own.work, unit, own.by);
        own.memory.last_arriver =
            chunks::arrive<L>(own.call, own.work, party, unit, with.mine, own.by, with.patience_ns) != 0;
    }
    __syncwarp(); /* the barrier counts whole warps */
    ptx::named_barrier<GROUP_THREADS>(own.group);
    if (own.memory.last_arriver) merge_stored<S>(own, unit, own.warp, WARPS);
}

/* Ends a chunk, the block's `number`-th run. */
template <typename S>
__device__ inline void finish_chunk(const group_context<S> &own, const chunk_context<S> &with, const line::unit &unit,
                                    const rows::run &done, uint32_t number) {
    chunks::unit_plan plan = chunks::plan_unit(unit, with.mine, own.by, with.keeps.slots);
    static_assert(S::GROUPS == 2, "a group waits for the other");
    uint32_t end = min(with.mine.end, unit.begin + unit.sees.tiles), before = number - 1;
    ptx::named_barrier<GROUP_THREADS>(own.group);
    if (number > 0) {
        const group_memory<S> &other = with.memory.group[before % S::GROUPS];
        ptx::barrier_wait(ptx::shared_address(&other.posted), before / S::GROUPS % 2);
    }
    for (uint32_t index = own.warp; index < own.cut.group; index += WARPS) {
        rows::row_state<S::DIM_V> merged = merge_warps<S>(own.memory, index, own.lane);
        chunks::deliver_row<typename S::rules, typename S::IO, S::DIM_V, S::ROWS>(
            own.call, own.work, with.keeps, plan, {unit, own.cut, index}, done, own.by, merged, own.lane);
    }
    ptx::named_barrier<GROUP_THREADS>(own.group); /* the states may be overwritten; the partials are written */
    bool is_ended = done.end == end && !plan.is_only;
    if (is_ended && (plan.is_kept || end != with.mine.end)) end_unit<S>(own, with, unit, plan);
    __syncwarp(); /* what all lanes have written, and read */
    if (own.lane == 0) ptx::barrier_arrive(ptx::shared_address(&own.memory.posted));
}

/* Merges what is a member's part of a unit: some columns of a row, or some rows. By all groups. */
template <typename S>
__device__ inline void merge_part(const group_context<S> &own, const chunk_context<S> &with, const line::unit &unit,
                                  uint32_t member, uint32_t members) {
    constexpr uint32_t THREADS = S::GROUPS * GROUP_THREADS, PIECES = S::DIM_V / 8, MAX_PARTS = S::DIM_V / 32;
    uint32_t warp = own.group * WARPS + own.warp, rows = own.cut.group;
    if (members < rows) return merge_stored<S>(own, unit, member * THREADS / 32 + warp, members * THREADS / 32);
    uint32_t parts = min(members / rows, MAX_PARTS), index = member / parts, part = member % parts;
    if (index >= rows) return;
    uint32_t begin = PIECES * part / parts * 8, end = PIECES * (part + 1) / parts * 8;
    chunks::columns<S::DIM_V, S::ROWS> from = {rows::find_stored<S::DIM_V, S::ROWS>(own.work, unit, index, own.by),
                                               unit.sees.tiles >> own.by.chunk_shift, begin, end - begin};
    uint32_t room = min(THREADS, with.staged_bytes / (from.width * (uint32_t)sizeof(float)));
    chunks::scratch<THREADS> &scratch = *(chunks::scratch<THREADS> *)with.memory.group[0].out;
    chunks::merge_columns<typename S::IO, THREADS>(
        own.call, from, rows::destination_of<typename S::rules>(own.call, {unit, own.cut, index}, 0), scratch,
        with.staged, room, S::GROUPS, warp * 32 + own.lane);
}

/* After the share's last chunk, if others have chunks of its unit: the merge, or a part of it. By all groups. */
template <typename S>
__device__ inline void finish_share(const group_context<S> &own, const chunk_context<S> &with, const line::unit &unit) {
    constexpr uint32_t THREADS = S::GROUPS * GROUP_THREADS;
    static_assert(sizeof(chunks::scratch<THREADS>) <= sizeof(with.memory.group[0].out), "");
    chunks::unit_plan plan = chunks::plan_unit(unit, with.mine, own.by, with.keeps.slots);
    if (plan.is_only || plan.is_kept) return;
    ptx::wait_for_previous_launch(); /* a group may have had no run */
    chunks::party party = chunks::party_of(own.work, unit, own.by);
    chunks::scratch<THREADS> &scratch = *(chunks::scratch<THREADS> *)with.memory.group[0].out;
    ptx::named_barrier<THREADS>(S::GROUPS); /* the partials are written, and the states read */
    if (own.group == 0 && own.warp == 0 && own.lane == 0) {
        scratch.merged =
            chunks::arrive<typename S::rules>(own.call, own.work, party, unit, with.mine, own.by, with.patience_ns);
    }
    __syncwarp();
    ptx::named_barrier<THREADS>(S::GROUPS);
    ptx::named_barrier<THREADS>(S::GROUPS); /* for racecheck, which does not see that the first one orders */
    uint32_t merged = scratch.merged, warp = own.group * WARPS + own.warp;
    if (merged == 0) return;
    bool is_member = party.is_joint && party.of.own < party.of.members;
    if (is_member && merged == 1u << party.of.own) {
        merge_part<S>(own, with, unit, party.of.own, party.of.members);
    } else {
        merge_stored<S>(own, unit, warp, THREADS / 32);
    }
}

/*
 * Consumes a run, whose first stage is the `done_before`-th of the block: each `step`-th of its tiles. With step 2, in
 * an even number of stages, each stage is always the same group's.
 */
template <typename S>
__device__ inline void do_run(const group_context<S> &own, const line::unit &unit, const rows::run &run,
                              const produce::ring &ring, uint32_t done_before, uint32_t turn_before, uint32_t parity,
                              uint32_t step) {
    warp_rows<S> mine;
    uint2 *visible = own.memory.visible[own.warp];
    load_rows<S>(mine, visible, own.call, own.cut, unit, own.lane);
    softness soft = softness_of<S>(own.call, unit.head);
    warp_state<S> state;
    clear_state(state);
    uint32_t block_tokens = 1u << own.cut.block_shift;
    produce::ring_place at = {done_before % ring.stages, done_before / ring.stages % 2};
    /* A stage's barrier tells only the last two fillings apart: those before this run's must be over. */
    if (turn_before != 0) ptx::barrier_wait(turn_before, parity);
    uint32_t first = unit.sees.first_token + (run.begin - unit.begin) * S::TOKENS;
#pragma unroll 1
    for (uint32_t tile = run.begin; tile < run.end; tile += step, first += step * S::TOKENS) {
        uint32_t stage = ring.memory + at.stage * ring.stage_bytes;
        ptx::barrier_wait(ring.full + at.stage * 8, at.parity);
        uint32_t from = first + own.warp * 16, to = from + (S::SLICES - 1) * 64 + 16; /* the warp's, more or less */
        if (from >= mine.all_begin && to <= mine.all_end) {
            attend<S, false>(state, mine, visible, unit.sees, stage, block_tokens, first, soft, own.warp, own.lane);
        } else if (from < unit.sees.end && to > unit.sees.begin) {
            attend<S, true>(state, mine, visible, unit.sees, stage, block_tokens, first, soft, own.warp, own.lane);
        }
        __syncwarp();
        if (own.lane == 0) ptx::barrier_arrive(ring.empty + at.stage * 8);
        at.advance(ring);
        if (step > 1) at.advance(ring);
    }
    if (S::GROUPS > 1 && own.lane == 0) ptx::barrier_arrive(ptx::shared_address(&own.memory.turn));
    store_state<S>(own.memory, state, soft.scale_log2, own.warp, own.lane);
}

/* A block's part of a unit: the groups take its tiles in turn. */
template <typename S>
__device__ inline void do_part(const group_context<S> &own, const line::part &part, block_memory<S> &memory,
                               const produce::ring &ring, const cluster::inbox &inbox, uint32_t patience_ns) {
    rows::run run = {part.mine.begin + own.group, part.mine.end};
    do_run<S>(own, part.unit, run, ring, own.group, 0, 0, S::GROUPS);
    ptx::wait_for_previous_launch(); /* which may still read what is written from here on */
    if constexpr (S::CLUSTERED) {
        finish_part<S>(own, memory, part.unit, inbox);
    } else {
        finish_long_part<S>(own, memory, part.unit, patience_ns);
    }
}

/* A consumer warp: its group's of the worker's runs, every GROUPS-th. */
template <typename S>
__device__ inline void consume(const group_context<S> &own, const line::share &mine, block_memory<S> &memory,
                               const produce::ring &ring, const chunk_context<S> &with) {
    uint32_t before = ptx::shared_address(&memory.group[(own.group + S::GROUPS - 1) % S::GROUPS].turn);
    uint32_t number = 0, tiles_done = 0;
#pragma unroll 1
    for (uint32_t part = 0; part < 2; part++) {
        uint32_t begin = part == 0 ? mine.turn : mine.begin, end = part == 0 ? mine.end : mine.turn;
        if (begin == end) continue;
        line::unit unit =
            line::unit_at<typename S::rules>(own.call, own.cut, part == 0 ? mine.at_turn : mine.at_begin, begin);
        rows::run run;
#pragma unroll 1
        for (run.begin = begin; run.begin < end; run.begin = run.end, number++) {
            if (run.begin == unit.begin + unit.sees.tiles) line::next_unit<typename S::rules>(unit, own.call, own.cut);
            run.end = min(end, unit.begin + unit.sees.tiles);
            if (line::is_batch_invariant<typename S::rules>(own.call))
                run.end = min(run.end, run.begin + (1u << own.by.chunk_shift));
            if (number % S::GROUPS == own.group) {
                bool waits = S::GROUPS > 1 && number > 0;
                do_run<S>(own, unit, run, ring, tiles_done, waits ? before : 0, (number - 1) / S::GROUPS % 2, 1);
                /* The launch before may still read what is written from here on. */
                if (number < S::GROUPS) ptx::wait_for_previous_launch();
                if constexpr (S::KEEPS_CHUNKS) {
                    finish_chunk<S>(own, with, unit, run, number);
                } else {
                    finish_run<S>(own, unit, run);
                }
            }
            tiles_done += run.end - run.begin;
        }
        if constexpr (S::KEEPS_CHUNKS) finish_share<S>(own, with, unit);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The kernel */

template <typename S>
__global__ void __launch_bounds__(S::GROUPS *GROUP_THREADS + 32, S::BLOCKS_PER_SM)
    narrow_kernel(const __grid_constant__ attn_cuda_call call, const __grid_constant__ arguments with) {
#if __CUDA_ARCH__ < 900
    if (S::rules::SIMPLE) { /* never launched there, and need not be compiled */
        __trap();
        return;
    }
#endif
    extern __shared__ __align__(1024) char shared[];
    block_memory<S> &memory = *(block_memory<S> *)(shared + with.stages * S::stage::BYTES);
    produce::ring ring = {ptx::shared_address(shared), ptx::shared_address(memory.full),
                          ptx::shared_address(memory.empty), with.stages, S::stage::BYTES};
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    launching::fetch_constants(call, with, warp);
    if (threadIdx.x == S::GROUPS * GROUP_THREADS) {
        launching::prefetch_page_table(call);
        for (uint32_t stage = 0; stage < with.stages; stage++) {
            ptx::barrier_init(ring.full + stage * 8, produce::full_arrivals());
            ptx::barrier_init(ring.empty + stage * 8, WARPS);
        }
        for (uint32_t group = 0; group < S::GROUPS; group++) {
            ptx::barrier_init(ptx::shared_address(&memory.group[group].turn), WARPS);
            if (S::KEEPS_CHUNKS) ptx::barrier_init(ptx::shared_address(&memory.group[group].posted), WARPS);
        }
        if (S::CLUSTERED) {
            cluster::open_inbox(ptx::shared_address(&memory.received),
                                cluster::inbox_bytes(with.cut.parts, with.cut.group, S::DIM_V));
        }
        ptx::barrier_init_fence();
    }
    if (S::CLUSTERED) ptx::cluster_arrive();
    if (with.times != nullptr && threadIdx.x == 0) {
        with.times[blockIdx.x * 4] = ptx::multiprocessor();
        with.times[blockIdx.x * 4 + 1] = ptx::global_time_ns();
    }
    ptx::launch_dependents();
    line::share mine;
    line::part part;
    if constexpr (S::HAS_PART) {
        part = line::find_part<typename S::rules>(call, with.cut, blockIdx.x);
        mine = part.mine;
    } else {
        mine = line::find_share<typename S::rules>(call, with.cut, gridDim.x, blockIdx.x, lane);
    }
    __syncthreads();
    if (!S::HAS_PART && mine.begin == mine.end) return; /* of a part without tiles others wait for the end */
    if (warp == S::GROUPS * WARPS) {
        produce::fill_ring<typename S::stage, typename S::rules>(call, with.cut, mine, ring, lane);
    } else {
        rows::workspace work = rows::view_workspace(with.workspace);
        group_context<S> own = {call,
                                with.cut,
                                work,
                                memory.group[warp / WARPS],
                                {blockIdx.x, mine.tiles_a_worker, line::chunk_shift<typename S::rules>(call)},
                                warp / WARPS,
                                warp % WARPS,
                                lane};
        if (with.times != nullptr && threadIdx.x == 0) with.times[blockIdx.x * 4 + 2] = ptx::global_time_ns();
        cluster::inbox inbox = {};
        if (S::CLUSTERED) {
            inbox = cluster::view_inbox((char *)(&memory + 1), ptx::shared_address(&memory.received),
                                        line::part_of(with.cut, blockIdx.x), with.cut.parts, with.cut.group, S::DIM_V);
        }
        chunk_context<S> keeping = {
            mine,
            memory,
            chunks::view_kept((char *)(&memory + 1), with.chunk_slots, with.cut.group, S::DIM_V),
            (float *)shared,
            with.stages * S::stage::BYTES,
            with.patience_ns};
        if constexpr (S::HAS_PART) {
            do_part<S>(own, part, memory, ring, inbox, with.patience_ns);
        } else {
            consume<S>(own, mine, memory, ring, keeping);
        }
        if (with.times != nullptr && threadIdx.x % GROUP_THREADS == 0)
            atomicMax((unsigned long long *)&with.times[blockIdx.x * 4 + 3], ptx::global_time_ns());
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Launching */

/*
 * Launches blocks of the shape; each unit is cut into `parts` if it is for clusters or long parts, else that is 1.
 * `weighs_ends`: line::cut.
 */
template <typename S>
cudaError_t launch(const attn_cuda_call &call, const attn_cuda_tuning &tuning, const attn_cuda_workspace &workspace,
                   uint32_t parts, cudaStream_t stream, bool weighs_ends = false) {
    uint32_t group = call.layer.heads_q / call.layer.heads_kv;
    uint32_t workers = parts == 1 ? tuning.workers * S::BLOCKS_PER_SM : call.batch * call.layer.heads_kv * parts;
    if (workspace.rows < S::ROWS || S::ROWS < group) return cudaErrorInvalidValue;
    if (!call.batch_invariant && workspace.slots < 2 * workers) return cudaErrorInvalidValue;
    uint32_t in_cluster = S::CLUSTERED ? parts : 1;
    uint32_t besides = (uint32_t)sizeof(block_memory<S>) + cluster::inbox_bytes(in_cluster, group, S::DIM_V);
    uint32_t room = tuning.shared_bytes / S::BLOCKS_PER_SM - (S::BLOCKS_PER_SM - 1) * 1024;
    if (room < besides) return cudaErrorInvalidValue;
    uint32_t most = tuning.stages != 0 ? tuning.stages : (96 * 1024 + S::stage::BYTES - 1) / S::stage::BYTES;
    if (S::HAS_PART) most += most % S::GROUPS; /* do_run */
    uint32_t stages = min(min((room - besides) / S::stage::BYTES, most), MAX_STAGES);
    if (S::HAS_PART) stages -= stages % S::GROUPS;
    if (stages == 0) return cudaErrorInvalidValue;
    uint32_t left = room - besides - stages * S::stage::BYTES, a_chunk = chunks::kept_bytes(group, S::DIM_V);
    uint32_t chunk_slots = S::KEEPS_CHUNKS ? left / a_chunk : 0;
    attn_cuda_workspace slots = workspace;
    slots.rows = S::ROWS;
    arguments with = {line::make_cut(call.layer, tuning, S::ROWS, workers, parts),
                      slots,
                      stages,
                      tuning.patience_ns,
                      tuning.times,
                      chunk_slots,
                      0,
                      0};
    with.cut.weighs_ends = weighs_ends;
    launching::grid size = {workers, S::GROUPS * GROUP_THREADS + 32, in_cluster,
                            stages * S::stage::BYTES + besides + chunk_slots * a_chunk};
    if (in_cluster == 1 && tuning.leaves_pairs && tuning.is_hopper && workers % 2 == 0) {
        size.cluster = 2;
        size.shared_bytes = tuning.shared_bytes; /* or both may be on one multiprocessor */
    }
    return launching::launch_kernel(narrow_kernel<S>, size, tuning, call, with, stream);
}

/* Head dims that have kernels for clusters, for long parts, and for batch_invariant calls that are simple. */
template <uint32_t DIM, uint32_t DIM_V> constexpr bool IS_COMMON = DIM == DIM_V && (DIM == 64 || DIM == 128);

/* Two groups have 168 registers a thread, one has 255: what does not fit the former has one. */
template <typename KV, uint32_t DIM, uint32_t DIM_V> struct shapes {
    static constexpr uint32_t GROUPS = DIM_V > 128 ? 1 : 2;
    using simple = shape<KV, DIM, DIM_V, 1, GROUPS, 1, true>;
    using clustered = shape<KV, DIM, DIM_V, 1, GROUPS, 1, true, false, cuts::CLUSTERS>;
    static constexpr uint32_t FINE = FINE_TOKENS<KV, DIM, DIM_V>;
    using fine_clustered = shape<KV, DIM, DIM_V, 1, GROUPS, 1, true, false, cuts::CLUSTERS, FINE>;
    using long_parts = shape<KV, DIM, DIM_V, 1, GROUPS, 1, true, false, cuts::LONG_PARTS, FINE>;
    using invariant = shape<KV, DIM, DIM_V, 1, GROUPS, 1, true, true>;
    using leaving = shape<KV, DIM, DIM_V, 1, GROUPS, 1, true, false, cuts::SHARES, USUAL_TOKENS<KV, DIM, DIM_V>, true>;
    using general = shape<KV, DIM, DIM_V, 1, GROUPS, 1, false>;
    using simple_two_blocks = shape<KV, DIM, DIM_V, 1, 1, 2, true>; /* an SM */
    using simple_16_rows = shape<KV, DIM, DIM_V, 2, 1, 1, true>;
    using general_16_rows = shape<KV, DIM, DIM_V, 2, 1, 1, false>;
};

/* Tiles of a unit if all are expected to have as many; else 0. */
template <typename S> uint32_t expected_tiles(const attn_cuda_expected &expected) {
    uint32_t least = (expected.shortest + S::TOKENS - 1) / S::TOKENS;
    uint32_t most = (expected.longest + S::TOKENS - 1) / S::TOKENS;
    return least == most ? most : 0;
}

/* Are units expected to be of different lengths, so that some workers have many and others one? */
template <typename S> bool are_uneven(const attn_cuda_expected &expected) {
    return (expected.shortest + S::TOKENS - 1) / S::TOKENS != (expected.longest + S::TOKENS - 1) / S::TOKENS;
}

/* What a launch of the narrow kernel is expected to have to do. */
template <typename S>
attn_cuda_units expected_units(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                               const attn_cuda_expected &expected) {
    constexpr bool IS_FP8 = S::KV::BYTES == 1,
                   HAS_FINE_TILES = FINE_TOKENS<typename S::KV, S::DIM, S::DIM_V> < S::TOKENS;
    attn_cuda_units of;
    of.units = (uint64_t)call.batch * call.layer.heads_kv;
    of.least_tiles = (expected.shortest + S::TOKENS - 1) / S::TOKENS;
    of.most_tiles = (expected.longest + S::TOKENS - 1) / S::TOKENS;
    of.workers = tuning.workers;
    of.min_saved_tiles = 256 / S::TOKENS;
    of.tile_bytes = S::stage::BYTES;
    of.rows = call.layer.heads_q / call.layer.heads_kv;
    of.warps = S::GROUPS * WARPS;
    of.partials_ahead = parts::AHEAD;
    of.joint_from = parts::first_merged_jointly(of.rows, of.warps);
    of.most_parts = tuning.workers;
    of.chain_ns = IS_FP8 ? 585 * S::stage::BYTES / 32768 : 0;
    of.long_chain_ns = HAS_FINE_TILES ? 706 * S::stage::BYTES / 32768 : of.chain_ns; /* as two tiles */
    of.end_ns = IS_FP8 ? 300 : 0;
    of.long_end_ns = 0;
    of.crowded_saves_ns = HAS_FINE_TILES ? 150 : 0;
    return of;
}

/*
 * Are two blocks an SM better, with a group of consumers each? Where there is about a unit for each, or the units are
 * so short that little else than their ends is to be done.
 */
template <typename S>
bool prefers_two_blocks(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                        const attn_cuda_expected &expected) {
    constexpr uint32_t SHORT_TILES = 8;
    uint32_t units = call.batch * call.layer.heads_kv, tiles = expected_tiles<S>(expected);
    if (tuning.blocks_per_sm != 0 || tiles == 0) return tuning.blocks_per_sm == 2;
    bool is_one_each = units * 2 > tuning.workers * 3 && units <= tuning.workers * 2;
    return is_one_each || (tiles <= SHORT_TILES && units > tuning.workers * 2);
}

/* The kernel that does the call with the least code. Before sm_90 all calls have the one that can do everything. */
template <typename KV, uint32_t DIM, uint32_t DIM_V>
cudaError_t launch_shape(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                         const attn_cuda_workspace &workspace, const attn_cuda_expected &expected, uint32_t rows,
                         cudaStream_t stream) {
    using built = shapes<KV, DIM, DIM_V>;
    bool is_simple = line::is_simple(call) && tuning.is_hopper, leaves = line::leaves_results(call);
    if constexpr (IS_COMMON<DIM, DIM_V> && KV::BYTES == 2) {
        bool is_built = is_simple && leaves && rows <= 8 && !call.batch_invariant;
        if (is_built) return launch<typename built::leaving>(call, tuning, workspace, 1, stream);
    }
    is_simple = is_simple && !leaves; /* other simple kernels cannot */
    bool is_decode = is_simple && !call.batch_invariant;
    if (rows > 8) {
        if (is_decode) return launch<typename built::simple_16_rows>(call, tuning, workspace, 1, stream);
        return launch<typename built::general_16_rows>(call, tuning, workspace, 1, stream);
    }
    if constexpr (DIM == 128 && DIM_V == 128 && KV::BYTES == 2) {
        using two = typename built::simple_two_blocks;
        bool is_better = is_decode && prefers_two_blocks<two>(call, tuning, expected);
        if (is_better) return launch<two>(call, tuning, workspace, 1, stream);
    }
    if (tuning.blocks_per_sm == 2) return cudaErrorInvalidValue;
    if constexpr (IS_COMMON<DIM, DIM_V>) {
        attn_cuda_cutting chosen = {1, false, false, 0};
        if (is_decode) {
            attn_cuda_units units = expected_units<typename built::simple>(call, tuning, expected);
            chosen = attn_cuda_choose_cutting(&units, &tuning);
        }
        if (chosen.is_clustered && chosen.is_crowded)
            return launch<typename built::fine_clustered>(call, tuning, workspace, chosen.parts, stream);
        if (!chosen.is_clustered && chosen.parts > 1)
            return launch<typename built::long_parts>(call, tuning, workspace, chosen.parts, stream);
        if (chosen.is_clustered)
            return launch<typename built::clustered>(call, tuning, workspace, chosen.parts, stream);
        if (is_simple && call.batch_invariant) {
            return launch<typename built::invariant>(call, tuning, workspace, 1, stream);
        }
    }
    if (is_decode) {
        return launch<typename built::simple>(call, tuning, workspace, 1, stream,
                                              are_uneven<typename built::simple>(expected));
    }
    return launch<typename built::general>(call, tuning, workspace, 1, stream);
}

/* attn_cuda_find_clusters. All shapes fill a multiprocessor, so it is the same for each. */
inline cudaError_t find_clusters(attn_cuda_tuning &tuning) {
    using S = shapes<elements::bf16, 128, 128>::clustered;
    for (uint32_t parts = 2; parts <= ATTN_CUDA_MAX_CLUSTER; parts++) {
        launching::grid size = {parts, S::GROUPS * GROUP_THREADS + 32, parts, tuning.shared_bytes};
        cudaError_t error = launching::allow_shared_memory(narrow_kernel<S>, size.shared_bytes);
        cudaLaunchAttribute attributes[2];
        cudaLaunchConfig_t config;
        launching::describe_launch(config, attributes, size, false, NULL);
        int clusters = 0;
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, narrow_kernel<S>, &config);
        if (error != cudaSuccess) return error;
        tuning.clusters[parts] = (uint32_t)clusters;
    }
    return cudaSuccess;
}

/* `rows`: a block's, 8 or 16. */
template <typename KV>
cudaError_t launch_dims(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                        const attn_cuda_workspace &workspace, const attn_cuda_expected &expected, uint32_t rows,
                        cudaStream_t stream) {
    uint32_t dim = call.layer.head_dim, dim_v = call.layer.head_dim_v;
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

} /* namespace narrow */

#endif
