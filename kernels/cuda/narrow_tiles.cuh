/*
 * What the narrow kernels (narrow.cuh) are compiled for, what a block keeps in shared memory, and how a warp consumes a
 * tile: queries, products, powers.
 */
#ifndef ATTND_KERNELS_CUDA_NARROW_TILES_CUH
#define ATTND_KERNELS_CUDA_NARROW_TILES_CUH

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

} /* namespace narrow */

#endif
