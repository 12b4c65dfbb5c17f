/*
 * A run of the narrow kernels (narrow.cuh): how a group consumes its tiles, and what becomes of the rows then: they are
 * written, kept, or merged with those of the unit's other parts.
 */
#ifndef ATTND_KERNELS_CUDA_NARROW_RUNS_CUH
#define ATTND_KERNELS_CUDA_NARROW_RUNS_CUH

#include "kernels/cuda/narrow_tiles.cuh"

namespace narrow {

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
                float *to = &memory.out[warp][row][d * 16 + lane / 4 * FIRST_STEP];
                if (SECOND == 1) {
                    *(float2 *)to = make_float2(state.out[d][b][c], state.out[d][b][c + 2]);
                } else {
                    to[0] = state.out[d][b][c];
                    to[SECOND] = state.out[d][b][c + 2];
                }
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

/* A row of some groups' tiles, from the first of them on: all their warps' states merged. */
template <typename S, uint32_t GROUPS>
__device__ inline rows::row_state<S::DIM_V> merge_groups(const group_memory<S> *groups, uint32_t index, uint32_t lane) {
    constexpr uint32_t COUNT = GROUPS * WARPS;
    rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
    float maxima[COUNT];
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        maxima[i] = groups[i / WARPS].maximum[i % WARPS][index];
        merged.maximum = fmaxf(merged.maximum, maxima[i]);
    }
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        const group_memory<S> &group = groups[i / WARPS];
        float factor = rows::decay(maxima[i], merged.maximum);
        merged.sum = fmaf(group.sum[i % WARPS][index], factor, merged.sum);
        rows::add_row(merged.out, 1.0f, rows::load_row<S::DIM_V>(group.out[i % WARPS][index], lane), factor);
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
        rows::row_state<S::DIM_V> merged = merge_groups<S, S::GROUPS>(memory.group, index, own.lane);
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
        rows::row_state<S::DIM_V> merged = merge_groups<S, S::GROUPS>(memory.group, index, own.lane);
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
        rows::row_state<S::DIM_V> merged = merge_groups<S, 1>(&own.memory, index, own.lane);
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
    if (line::is_batch_invariant<typename S::rules>(own.call)) {
        for (uint32_t index = own.warp; index < count; index += WARPS) {
            rows::merge_chunks_of<typename S::rules, typename S::IO, S::DIM_V, S::ROWS>(
                own.call, own.work, {unit, own.cut, index}, own.by, own.lane);
        }
        return;
    }
#pragma unroll 1
    for (uint32_t index = own.warp; index < count; index += WARPS * rows::TOGETHER) {
        rows::merge_cut_rows<typename S::rules, typename S::IO, S::DIM_V, S::ROWS, WARPS>(
            own.call, own.work, {unit, own.cut, index}, count, own.by, own.lane);
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
        rows::merge_chunks_of<typename S::rules, typename S::IO, S::DIM_V, S::ROWS>(
            own.call, own.work, {unit, own.cut, index}, own.by, own.lane);
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
        rows::row_state<S::DIM_V> merged = merge_groups<S, 1>(&own.memory, index, own.lane);
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
        line::position at = mine.at_begin;
        if (part == 0) at = mine.at_turn;
        line::unit unit = line::unit_at<typename S::rules>(own.call, own.cut, at, begin);
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

} /* namespace narrow */

#endif
