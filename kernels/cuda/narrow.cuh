/*
 * The narrow kernel: 8 or 16 rows a block (query rows x heads of the group). Four warps, a group, take 16 tokens each
 * of 64 of a stage and keep their own maximum, sum and output (m, l, O), so that no barrier is needed per tile. With a
 * token's keys as the rows of the matrix product,
 *     S^T [16 tokens x 8 rows] = K Q^T        O^T [head_dim_v x 8 rows] += V^T P^T
 * only the query rows are padded. At the end of a run (the block's tiles of one unit) the four states are merged
 * through shared memory. Two groups take turns run by run: while one ends its run, the other has its queries and
 * consumes. Of a part of a unit that a cluster has (cluster.cuh), or all multiprocessors (parts.cuh), they take tiles
 * in turn, and merge all their warps' states.
 *
 * In files: narrow_tiles.cuh, shapes and what a warp does with a tile; narrow_runs.cuh, a run and what becomes of its
 * rows; here the kernel, and its launch.
 */
#ifndef ATTND_KERNELS_CUDA_NARROW_CUH
#define ATTND_KERNELS_CUDA_NARROW_CUH

#include "kernels/cuda/narrow_runs.cuh"

namespace narrow {

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
    /* What the share follows from is asked for first: it is on its way while barriers are made. */
    line::some_lengths lengths = {};
    if constexpr (S::HAS_PART) {
        lengths.of[0] = line::load_length_of_part(call, with.cut, blockIdx.x);
    } else if constexpr (S::rules::SIMPLE) {
        lengths = line::load_first_lengths(call, lane);
    }
    if (warp == 0) launching::prefetch_page_table(call, lane);
    if (threadIdx.x == S::GROUPS * GROUP_THREADS) {
#pragma unroll 1
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
        part = line::find_part<typename S::rules>(call, with.cut, lengths.of[0], blockIdx.x);
        mine = part.mine;
    } else if constexpr (S::rules::SIMPLE) {
        mine = line::find_simple_share<typename S::rules>(call, with.cut, lengths, gridDim.x, blockIdx.x, lane);
    } else {
        mine = line::find_share<typename S::rules>(call, with.cut, gridDim.x, blockIdx.x, lane);
    }
    /* The warp that made the barriers need not wait for those that wait at them. */
    constexpr uint32_t THREADS = S::GROUPS * GROUP_THREADS + 32, ALL_BEGIN = S::GROUPS + 1;
    __syncwarp();
    if (warp == S::GROUPS * WARPS) {
        ptx::named_barrier_arrive<THREADS>(ALL_BEGIN);
    } else {
        ptx::named_barrier<THREADS>(ALL_BEGIN);
    }
    if (!S::HAS_PART && mine.begin == mine.end) return; /* of a part without tiles others wait for the end */
    if (warp == S::GROUPS * WARPS) {
        constexpr bool FIRST_BY_LANES = S::rules::SIMPLE && !S::HAS_PART;
        produce::fill_ring<typename S::stage, typename S::rules, FIRST_BY_LANES>(call, with.cut, mine, ring, lane);
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
    if (call.sends_rows) return cudaErrorInvalidValue; /* no other kernel does */
    is_simple = is_simple && !leaves;                  /* other simple kernels cannot */
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
