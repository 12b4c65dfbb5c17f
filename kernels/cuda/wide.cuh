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
 * In files: wide_shapes.cuh, what a kernel is compiled for; wide_scout.cuh; wide_tiles.cuh, what a group does with
 * tiles; wide_merge.cuh, what becomes of rows; here the kernel, and its launch.
 *
 * sm_90a, 16-bit caches, no batch_invariant mode.
 */
#ifndef ATTND_KERNELS_CUDA_WIDE_CUH
#define ATTND_KERNELS_CUDA_WIDE_CUH

#include "kernels/cuda/wide_merge.cuh"

namespace wide {

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
    if (S::CLUSTER > 1) ptx::cluster_arrive(); /* the barriers are there */
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
        if (S::IN_PARTS) ptx::wait_for_previous_launch(); /* who comes after this launch comes after both */
        if (S::CLUSTER > 1) {                             /* the others may still arrive at this one's barriers */
            ptx::cluster_arrive();
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
    if constexpr (S::IN_PARTS) {
        if (ring_bytes<S>(stages) < staged_rows<S>::BYTES) return cudaErrorInvalidValue;
    }
    bool receives_rows = S::IN_PARTS && with.beside != 0;
    if (call.sends_rows && !receives_rows) return cudaErrorInvalidValue;
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
