/*
 * Twins: the wide kernel for simple calls of 17 to 32 rows a unit (query heads of the group), which are half of a
 * product's. Rows 32 .. 63 of the products hold the same queries again: their scores are the same, and where the first
 * 32 rows take the weights as they are rounded, these take what was rounded off. So a tile is one product with the
 * values instead of two, and what a row comes to is the sum of its own and its twin's.
 *
 * A block has one part of a unit, and its two groups take the part's tiles in turn. Parts are those of a cluster, whose
 * blocks send each other their rows, some of which each merges (cluster.cuh); or long ones, which are merged by way of
 * memory and jointly (parts.cuh, joint.cuh).
 */
#ifndef ATTND_KERNELS_CUDA_TWINS_CUH
#define ATTND_KERNELS_CUDA_TWINS_CUH

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/joint.cuh"
#include "kernels/cuda/parts.cuh"
#include "kernels/cuda/wide.cuh"

namespace twins {

using launching::arguments;
using line::ALL_LANES;
using narrow::GROUP_THREADS;
using narrow::WARPS;
using wide::group_place;

constexpr uint32_t GROUPS = 2, ALL_WARPS = GROUPS * WARPS, THREADS = GROUPS * GROUP_THREADS;
constexpr uint32_t MAX_ROWS = 32, BOTH = 2 * MAX_ROWS; /* of a unit, and with their twins */
constexpr uint32_t MAX_STAGES = wide::MAX_STAGES;

template <typename KV, uint32_t DIM> using shape = wide::shape<KV, DIM, DIM, GROUPS, true, false, true>;

/* What a block keeps in shared memory, behind the ring and before the inbox. */
template <typename S> struct block_memory {
    alignas(1024) char queries[BOTH * S::stage::KEY_BYTES];
    float2 states[GROUPS][MAX_ROWS]; /* maxima and sums of the groups' rows.. */
    float2 slices[ALL_WARPS];        /* ..and of what a warp has merged */
    uint64_t full[MAX_STAGES];
    uint64_t empty[MAX_STAGES];
    uint64_t received; /* the rows that the block merges are there */
    uint32_t merged;   /* members whose rows the block merges */
};

/* The groups' outputs, and what warps have merged of a row, in the ring, when it is not needed any more. */
template <typename S> struct spread_rows {
    static constexpr uint32_t STRIDE = S::DIM_V + 4; /* keeps rows off each other's banks */
    float outs[GROUPS][BOTH][STRIDE];
    float slices[ALL_WARPS][STRIDE];
};

/* Who a warp is, and where it works. */
template <typename S> struct context {
    const attn_cuda_call &call;
    const arguments &with;
    block_memory<S> &memory;
    spread_rows<S> &spread;
    const line::part &part;
    group_place own;

    __device__ uint32_t warp() const { return own.group * WARPS + own.warp; } /* of the groups' */
    __device__ uint32_t rows() const { return with.cut.group; }
};

/* ------------------------------------------------------------------------------------------- */
/* A part's tiles */

/* Copies the unit's queries, twice, to shared memory: zeros where it has fewer rows. By all groups. */
template <typename S> __device__ inline void copy_queries(const context<S> &block) {
    constexpr uint32_t KEY_BYTES = S::stage::KEY_BYTES, PIECES = KEY_BYTES / layout::PIECE_BYTES;
    const line::unit &unit = block.part.unit;
    size_t first = (size_t)unit.of.first_query * block.call.layer.heads_q + unit.head * block.rows();
    const char *from = (const char *)block.call.queries + first * KEY_BYTES;
    uint32_t queries = ptx::shared_address(block.memory.queries), thread = block.warp() * 32 + block.own.lane;
#pragma unroll
    for (uint32_t i = thread; i < BOTH * PIECES; i += THREADS) {
        uint32_t row = i / PIECES % MAX_ROWS, piece = i % PIECES;
        uint32_t to = queries + layout::piece_offset(KEY_BYTES, BOTH, i / PIECES, piece);
        if (row < block.rows()) {
            ptx::copy_16_bytes(to, from + (size_t)row * KEY_BYTES + piece * layout::PIECE_BYTES);
        } else {
            ptx::store_zeros(to);
        }
    }
    ptx::copies_commit();
    ptx::copies_wait<0>();
    ptx::shared_proxy_fence();
    ptx::named_barrier<THREADS>(GROUPS);
}

/* Every second tile of the part, from the group's number on. */
template <typename S> __device__ inline wide::tile_run tiles_of_group(const context<S> &block) {
    const line::unit &unit = block.part.unit;
    uint32_t tiles = block.part.mine.end - block.part.mine.begin, group = block.own.group;
    wide::tile_run run;
    run.tiles = (tiles + GROUPS - 1 - group) / GROUPS;
    run.first_number = group;
    run.first = unit.sees.first_token + (block.part.mine.begin - unit.begin + group) * S::TOKENS;
    run.sees = make_uint2(unit.sees.begin, unit.sees.end);
    run.all = make_uint2(0, unit.sees.end);
    run.soft = narrow::softness_of<S>(block.call, unit.head);
    return run;
}

/* Lays a warp's state down where all can read it. */
template <typename S> __device__ inline void spread_state(const context<S> &block, const wide::warp_state<S> &state) {
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t row = block.own.group_row(half);
        float sum = ptx::quad_sum(state.sum[half]);
        wide::store_floats(state, half, 1.0f, block.spread.outs[block.own.group][row], block.own.lane);
        if (row < MAX_ROWS && block.own.lane % 4 == 0)
            block.memory.states[block.own.group][row] = make_float2(state.maximum[half], sum);
    }
}

/* A row of the block's part: of both groups, each row's and its twin's. */
template <typename S> __device__ inline rows::row_state<S::DIM_V> merge_groups(const context<S> &block, uint32_t row) {
    rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
    float2 states[GROUPS];
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        states[g] = block.memory.states[g][row];
        merged.maximum = fmaxf(merged.maximum, states[g].x);
    }
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        float factor = rows::decay(states[g].x, merged.maximum);
        const auto &outs = block.spread.outs[g];
        rows::row<S::DIM_V> out = rows::load_row<S::DIM_V>(outs[row], block.own.lane);
        rows::add_row(out, 1.0f, rows::load_row<S::DIM_V>(outs[row + MAX_ROWS], block.own.lane), 1.0f);
        rows::add_row(merged.out, 1.0f, out, factor);
        merged.sum = fmaf(states[g].y, factor, merged.sum);
    }
    return merged;
}

template <typename S>
__device__ inline void write_row(const context<S> &block, uint32_t row, rows::row_state<S::DIM_V> &state) {
    rows::write_row<typename S::rules, typename S::IO>(block.call, {block.part.unit, block.with.cut, row}, state,
                                                       block.own.lane);
}

/* ------------------------------------------------------------------------------------------- */
/* Parts of a cluster */

__host__ __device__ inline uint32_t rows_each(uint32_t rows, uint32_t blocks) { return (rows + blocks - 1) / blocks; }

/* The rows that a block of the cluster merges are in its own inbox, which has room for all blocks' parts. */
template <typename S> __device__ inline cluster::inbox view_inbox(const context<S> &block) {
    uint32_t parts = block.with.cut.parts, each = rows_each(block.rows(), parts);
    return cluster::view_inbox((char *)(&block.memory + 1), ptx::shared_address(&block.memory.received),
                               line::part_of(block.with.cut, blockIdx.x), parts + 1, each, S::DIM_V);
}

/* Rows that block `part` of the cluster merges. */
__device__ inline uint32_t count_own(uint32_t rows, uint32_t each, uint32_t part) {
    return rows > part * each ? min(each, rows - part * each) : 0;
}

/* A row of all parts, at once: clusters are small. */
template <uint32_t COLUMNS>
__device__ inline rows::row_state<COLUMNS> merge_received(const cluster::inbox &from, uint32_t index, uint32_t lane) {
    rows::row_state<COLUMNS> merged = rows::empty_state<COLUMNS>();
    uint32_t parts = from.parts - 1;
    float2 states[ATTN_CUDA_MAX_CLUSTER];
#pragma unroll
    for (uint32_t p = 0; p < ATTN_CUDA_MAX_CLUSTER; p++) {
        states[p] = p < parts ? from.states[p * from.rows + index] : make_float2(-INFINITY, 0.0f);
        merged.maximum = fmaxf(merged.maximum, states[p].x);
    }
#pragma unroll
    for (uint32_t p = 0; p < ATTN_CUDA_MAX_CLUSTER; p++) {
        if (p >= parts) break;
        float factor = rows::decay(states[p].x, merged.maximum);
        rows::add_row(merged.out, 1.0f, rows::load_row<COLUMNS>(from.outs + (p * from.rows + index) * COLUMNS, lane),
                      factor);
        merged.sum = fmaf(states[p].y, factor, merged.sum);
    }
    return merged;
}

/* Sends the part's rows to the blocks that merge them, and merges the block's own. By all groups. */
template <typename S> __device__ inline void finish_in_cluster(const context<S> &block) {
    cluster::inbox inbox = view_inbox(block);
    ptx::cluster_wait(); /* all inboxes are open */
    for (uint32_t row = block.warp(); row < block.rows(); row += ALL_WARPS) {
        rows::row_state<S::DIM_V> merged = merge_groups(block, row);
        uint32_t to = row / inbox.rows;
        cluster::send_row_to(inbox, to, inbox.part * inbox.rows + row - to * inbox.rows, merged, block.own.lane);
    }
    uint32_t count = count_own(block.rows(), inbox.rows, inbox.part);
    if (count == 0) return; /* nobody sends anything */
    ptx::barrier_wait(inbox.barrier, 0);
    for (uint32_t index = block.warp(); index < count; index += ALL_WARPS) {
        rows::row_state<S::DIM_V> merged = merge_received<S::DIM_V>(inbox, index, block.own.lane);
        write_row(block, inbox.part * inbox.rows + index, merged);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Long parts */

/* Merges a member's rows; if they are few, several warps have one, each a slice of the parts. By all groups. */
template <typename S>
__device__ inline void merge_long_parts(const context<S> &block, const rows::workspace &work, const parts::place &of,
                                        uint32_t first, uint32_t count) {
    uint32_t warp = block.warp(), at_once = min(count, ALL_WARPS), slices = ALL_WARPS / at_once;
    uint32_t slice = warp / at_once;
#pragma unroll 1
    for (uint32_t index = warp % at_once; index < count; index += at_once) {
        rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
        if (slice < slices) {
            merged = parts::merge_slice<S::DIM_V, MAX_ROWS>(work, of, first + index, slice, slices, block.own.lane);
        }
        if (slices > 1) {
            if (slice > 0) {
                rows::store_row(block.spread.slices[warp], merged.out, block.own.lane);
                if (block.own.lane == 0) block.memory.slices[warp] = make_float2(merged.maximum, merged.sum);
            }
            __syncwarp(); /* the barrier counts whole warps */
            ptx::named_barrier<THREADS>(GROUPS);
        }
        if (slice > 0) break;
#pragma unroll
        for (uint32_t s = 1; s < ALL_WARPS; s++) {
            if (s >= slices) break;
            uint32_t other = warp + s * at_once;
            float2 state = block.memory.slices[other];
            rows::merge_state(merged, rows::load_row<S::DIM_V>(block.spread.slices[other], block.own.lane), state.x,
                              state.y);
        }
        write_row(block, first + index, merged);
    }
    if (slices > 1) ptx::named_barrier<THREADS>(GROUPS); /* the slices may be overwritten */
}

/* Leaves the part's rows as a partial result, and merges what is now to be merged of the unit. By all groups. */
template <typename S> __device__ inline void finish_long_part(const context<S> &block) {
    rows::workspace work = rows::view_workspace(block.with.workspace);
    parts::place of = parts::place_of(block.with.cut, blockIdx.x);
    uint32_t members = min(of.count, joint::MAX_MEMBERS), each = rows_each(block.rows(), members);
#pragma unroll
    for (uint32_t n = 0; n < MAX_ROWS / ALL_WARPS; n++) {
        uint32_t row = block.warp() + n * ALL_WARPS;
        if (row >= block.rows()) break;
        rows::row_state<S::DIM_V> merged = merge_groups(block, row);
        rows::store_partial<S::DIM_V, MAX_ROWS>(work, blockIdx.x, row, merged.out,
                                                make_float2(merged.maximum, merged.sum), block.own.lane);
    }
    ptx::named_barrier<THREADS>(GROUPS); /* the partials are written */
    if (block.warp() == 0 && block.own.lane == 0)
        block.memory.merged = parts::arrive_jointly(work, of, members, block.with.patience_ns);
    __syncwarp(); /* the barrier counts whole warps */
    ptx::named_barrier<THREADS>(GROUPS);
    ptx::named_barrier<THREADS>(GROUPS); /* for racecheck, which does not see that the first one orders */
#pragma unroll 1
    for (uint32_t merged = block.memory.merged; merged != 0; merged &= merged - 1) {
        uint32_t member = __ffs(merged) - 1, count = count_own(block.rows(), each, member);
        if (count > 0) merge_long_parts(block, work, of, member * each, count);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The kernel */

template <typename S, bool CLUSTERED>
__device__ inline void do_part(const context<S> &block, const produce::ring &ring) {
    copy_queries(block);
    wide::warp_state<S> state;
    uint32_t queries = ptx::shared_address(block.memory.queries);
    wide::consume_tiles<S>(state, queries, nullptr, ring, block.own, tiles_of_group(block), false);
    ptx::named_barrier<THREADS>(GROUPS); /* the ring has been read */
    spread_state(block, state);
    ptx::named_barrier<THREADS>(GROUPS);
    ptx::wait_for_previous_launch(); /* which may still read what is written from here on */
    if constexpr (CLUSTERED) {
        finish_in_cluster(block);
    } else {
        finish_long_part(block);
    }
}

/* The groups, and one more, of which one warp is the producer. */
constexpr uint32_t BLOCK_THREADS = THREADS + GROUP_THREADS;

template <typename S, bool CLUSTERED>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    twins_kernel(const __grid_constant__ attn_cuda_call call, const __grid_constant__ arguments with) {
#if __CUDA_ARCH__ >= 900 /* never launched elsewhere */
    extern __shared__ __align__(1024) char shared[];
    block_memory<S> &memory = *(block_memory<S> *)(shared + with.stages * S::stage::BYTES);
    produce::ring ring = {ptx::shared_address(shared), ptx::shared_address(memory.full),
                          ptx::shared_address(memory.empty), with.stages, S::stage::BYTES};
    uint32_t warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    launching::fetch_constants(call, with, warp);
    if (threadIdx.x == THREADS) {
        launching::prefetch_page_table(call);
        for (uint32_t stage = 0; stage < with.stages; stage++) {
            ptx::barrier_init(ring.full + stage * 8, produce::full_arrivals());
            ptx::barrier_init(ring.empty + stage * 8, WARPS);
        }
        if (CLUSTERED) {
            uint32_t parts = with.cut.parts, each = rows_each(with.cut.group, parts);
            uint32_t count = count_own(with.cut.group, each, line::part_of(with.cut, blockIdx.x));
            cluster::open_inbox(ptx::shared_address(&memory.received),
                                cluster::inbox_bytes(parts + 1, count, S::DIM_V));
        }
        ptx::barrier_init_fence();
    }
    if (CLUSTERED) ptx::cluster_arrive();
    if (with.times != nullptr && threadIdx.x == 0) {
        with.times[blockIdx.x * 4] = ptx::multiprocessor();
        with.times[blockIdx.x * 4 + 1] = ptx::global_time_ns();
    }
    ptx::launch_dependents();
    line::part part = line::find_part<typename S::rules>(call, with.cut, blockIdx.x);
    __syncthreads();
    if (warp >= ALL_WARPS) {
        ptx::give_registers<wide::LESS_REGISTERS>();
        if (warp > ALL_WARPS) return;
        produce::fill_ring<typename S::stage, typename S::rules>(call, with.cut, part.mine, ring, lane);
    } else {
        ptx::take_registers<wide::MORE_REGISTERS>();
        if (with.times != nullptr && threadIdx.x == 0) with.times[blockIdx.x * 4 + 2] = ptx::global_time_ns();
        context<S> block = {call, with, memory, *(spread_rows<S> *)shared, part, {warp / WARPS, warp % WARPS, lane}};
        do_part<S, CLUSTERED>(block, ring);
        if (with.times != nullptr && threadIdx.x % GROUP_THREADS == 0)
            atomicMax((unsigned long long *)&with.times[blockIdx.x * 4 + 3], ptx::global_time_ns());
    }
#endif
}

/* ------------------------------------------------------------------------------------------- */
/* Launching */

/* Is the call one for twins, if its units are cut at all? */
inline bool fits(const attn_cuda_call &call) {
    uint32_t group = call.layer.heads_q / call.layer.heads_kv;
    return line::is_simple(call) && !call.batch_invariant && group <= MAX_ROWS;
}

/* How the units are cut; one part a unit: not by this kernel. */
template <typename S>
attn_cuda_cutting choose_cutting(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                                 const attn_cuda_expected &expected) {
    attn_cuda_units of;
    of.units = (uint64_t)call.batch * call.layer.heads_kv;
    of.least_tiles = (expected.shortest + S::TOKENS - 1) / S::TOKENS;
    of.most_tiles = (expected.longest + S::TOKENS - 1) / S::TOKENS;
    of.workers = tuning.workers;
    of.min_saved_tiles = 2;
    of.tile_bytes = S::stage::BYTES;
    of.rows = MAX_ROWS / joint::MAX_MEMBERS;
    of.warps = ALL_WARPS;
    of.partials_ahead = parts::AHEAD;
    of.joint_from = parts::first_merged_jointly(of.rows, of.warps);
    of.chain_ns = of.long_chain_ns = 580;
    of.end_ns = 500;
    of.long_end_ns = 900;
    of.crowded_saves_ns = 0;
    return attn_cuda_choose_cutting(&of, &tuning);
}

template <typename S, bool CLUSTERED>
cudaError_t launch(const attn_cuda_call &call, const attn_cuda_tuning &tuning, const attn_cuda_workspace &workspace,
                   uint32_t parts, cudaStream_t stream) {
    uint32_t group = call.layer.heads_q / call.layer.heads_kv, workers = call.batch * call.layer.heads_kv * parts;
    if (workspace.rows < MAX_ROWS || workspace.slots < 2 * workers || tuning.blocks_per_sm == 2)
        return cudaErrorInvalidValue;
    uint32_t besides = (uint32_t)sizeof(block_memory<S>);
    if (CLUSTERED) besides += cluster::inbox_bytes(parts + 1, rows_each(group, parts), S::DIM_V);
    if (tuning.shared_bytes < besides) return cudaErrorInvalidValue;
    uint32_t most = tuning.stages != 0 ? tuning.stages : CLUSTERED ? 6 : 4;
    uint32_t stages = min((tuning.shared_bytes - besides) / S::stage::BYTES, most) / GROUPS * GROUPS;
    if (stages * S::stage::BYTES < sizeof(spread_rows<S>)) return cudaErrorInvalidValue;
    arguments with = {line::make_cut(call.layer, tuning, MAX_ROWS, workers, parts),
                      workspace,
                      stages,
                      tuning.patience_ns,
                      tuning.times,
                      0,
                      0,
                      0};
    launching::grid size = {workers, BLOCK_THREADS, CLUSTERED ? parts : 1, stages * S::stage::BYTES + besides};
    return launching::launch_kernel(twins_kernel<S, CLUSTERED>, size, tuning, call, with, stream);
}

/*
 * Launches a wide call: as twins where that is built (bf16, head_dim 128) and expected to be faster; else as wide.cuh
 * does.
 */
template <typename KV>
cudaError_t launch_dims(const attn_cuda_call &call, const attn_cuda_tuning &tuning,
                        const attn_cuda_workspace &workspace, const attn_cuda_expected &expected, uint32_t rows,
                        cudaStream_t stream) {
    using S = shape<KV, 128>;
    attn_cuda_cutting chosen = {1, false, false, 0};
    if (call.layer.head_dim == S::DIM && call.layer.head_dim_v == S::DIM_V && fits(call))
        chosen = choose_cutting<S>(call, tuning, expected);
    if (chosen.is_clustered) return launch<S, true>(call, tuning, workspace, chosen.parts, stream);
    if (chosen.parts > 1) return launch<S, false>(call, tuning, workspace, chosen.parts, stream);
    return wide::launch_dims<KV>(call, tuning, workspace, expected, rows, stream);
}

} /* namespace twins */

#endif
