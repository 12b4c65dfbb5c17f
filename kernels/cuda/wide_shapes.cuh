/*
 * What the wide kernels (wide.cuh) are compiled for, and what a block keeps in shared memory.
 */
#ifndef ATTND_KERNELS_CUDA_WIDE_SHAPES_CUH
#define ATTND_KERNELS_CUDA_WIDE_SHAPES_CUH

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

/* Of `stages` stages; in a tall block of values, with one more of keys. */
template <typename S> __host__ __device__ inline uint32_t ring_bytes(uint32_t stages) {
    return stages * S::stage::BYTES + (S::TALL ? S::key_stage::BYTES : 0);
}

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

} /* namespace wide */

#endif
