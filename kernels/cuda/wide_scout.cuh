/*
 * The scout of the wide kernels (wide.cuh): a warp that is ahead of the groups, finds out what they have to know of a
 * run, and loads its queries.
 */
#ifndef ATTND_KERNELS_CUDA_WIDE_SCOUT_CUH
#define ATTND_KERNELS_CUDA_WIDE_SCOUT_CUH

#include "kernels/cuda/wide_shapes.cuh"

namespace wide {

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

} /* namespace wide */

#endif
