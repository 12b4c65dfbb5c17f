/*
 * Twins: the wide kernel for simple calls of 17 to 32 rows a unit (query heads of the group), which are half of a
 * product's. In the product with the values each row has a twin: it takes the weights as they are rounded, its twin
 * takes what was rounded off, and what the row comes to is the sum of both. So a tile is one product with the values
 * instead of two.
 *
 *     row of a warp's 16    0 .. 7: eight rows of the unit    8 .. 15: their twins
 *
 * A lane holds a row and its twin, so that both have their weights from the same scores, of which only the row's count,
 * and the sum is its own. The unit's row `8 * warp + r` is row `16 * warp + r` of a product.
 *
 * A block has one part of a unit, and its two groups take the part's tiles in turn. The group that does not have the
 * last one gives its rows to the other, which sends the sums on to the blocks that merge them, some rows each: to
 * another of the cluster, if parts are a cluster's (cluster.cuh), or by way of memory if they are long ones (parts.cuh,
 * mail.cuh).
 */
#ifndef ATTND_KERNELS_CUDA_TWINS_CUH
#define ATTND_KERNELS_CUDA_TWINS_CUH

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/mail.cuh"
#include "kernels/cuda/parts.cuh"
#include "kernels/cuda/wide.cuh"

namespace twins {

using launching::arguments;
using line::ALL_LANES;
using narrow::GROUP_THREADS;
using narrow::WARPS;
using wide::group_place;

constexpr uint32_t GROUPS = 2, ALL_WARPS = GROUPS * WARPS, THREADS = GROUPS * GROUP_THREADS;
constexpr uint32_t MAX_ROWS = mail::ROWS, BOTH = 2 * MAX_ROWS; /* of a unit, and with their twins */
constexpr uint32_t MAX_STAGES = wide::MAX_STAGES;

template <typename KV, uint32_t DIM> using shape = wide::shape<KV, DIM, DIM, GROUPS, true, false, true>;

/* What a block keeps in shared memory, behind the ring and before the inbox. */
template <typename S> struct block_memory {
    alignas(1024) char queries[BOTH * S::stage::KEY_BYTES];
    float2 given[MAX_ROWS];        /* maxima and sums that one group gives to the other */
    float2 slices[ALL_WARPS];      /* the same of what a warp has merged */
    uint64_t full[2 * MAX_STAGES]; /* of keys, and of values */
    uint64_t empty[2 * MAX_STAGES];
    uint64_t rows_given;       /* one group has given its rows to the other */
    uint64_t received;         /* in a cluster: the rows that the block merges are there */
    mail::agreement agreement; /* long parts: whether they are still the block's */
};

/*
 * Long parts: what warps have merged of a row, behind the block's memory. Not in the ring: the group that has given its
 * rows looks for others' before the ring is free.
 */
template <typename S> struct merged_slices { float rows[ALL_WARPS][S::DIM_V]; };

/* Who a warp is, and where it works. */
template <typename S> struct context {
    const attn_cuda_call &call;
    const arguments &with;
    block_memory<S> &memory;
    char *ring;
    const line::part &part;
    group_place own;

    __device__ uint32_t warp() const { return own.group * WARPS + own.warp; } /* of the groups' */
    __device__ uint32_t thread() const { return own.group * GROUP_THREADS + own.thread(); }
    __device__ uint32_t rows() const { return with.cut.group; }
    __device__ uint32_t tiles() const { return part.mine.end - part.mine.begin; }
    __device__ uint32_t row() const { return own.warp * 8 + own.lane / 4; } /* the lane's, of the unit */
    __device__ bool has_last_tile() const { return own.group != tiles() % GROUPS; }
};

/* Barriers between groups, and with the producer's warp. */
enum barrier : uint32_t { ALL_GROUPS = GROUPS, ROWS_SENT };

/* ------------------------------------------------------------------------------------------- */
/* A part's tiles */

/* Copies the unit's queries to shared memory; a twin's row is not looked at. By all groups. */
template <typename S> __device__ inline void copy_queries(const context<S> &block) {
    constexpr uint32_t KEY_BYTES = S::stage::KEY_BYTES, PIECES = KEY_BYTES / layout::PIECE_BYTES;
    const line::unit &unit = block.part.unit;
    size_t first = (size_t)unit.of.first_query * block.call.layer.heads_q + unit.head * block.rows();
    const char *from = (const char *)block.call.queries + first * KEY_BYTES;
    uint32_t queries = ptx::shared_address(block.memory.queries);
#pragma unroll
    for (uint32_t i = block.thread(); i < MAX_ROWS * PIECES; i += THREADS) {
        uint32_t row = i / PIECES, piece = i % PIECES;
        uint32_t to = queries + layout::piece_offset(KEY_BYTES, BOTH, row + row / 8 * 8, piece);
        if (row < block.rows()) {
            ptx::copy_16_bytes(to, from + (size_t)row * KEY_BYTES + piece * layout::PIECE_BYTES);
        } else {
            ptx::store_zeros(to);
        }
    }
    ptx::copies_commit();
    ptx::copies_wait<0>();
    ptx::shared_proxy_fence();
    ptx::named_barrier<THREADS>(ALL_GROUPS);
}

/* Every second tile of the part, from the group's number on. */
template <typename S> __device__ inline wide::tile_run tiles_of_group(const context<S> &block) {
    const line::unit &unit = block.part.unit;
    uint32_t group = block.own.group;
    wide::tile_run run;
    run.tiles = (block.tiles() + GROUPS - 1 - group) / GROUPS;
    run.first_number = group;
    run.first = unit.sees.first_token + (block.part.mine.begin - unit.begin + group) * S::TOKENS;
    run.sees = make_uint2(unit.sees.begin, unit.sees.end);
    run.all = make_uint2(0, unit.sees.end);
    run.soft = narrow::softness_of<S>(block.call, unit.head);
    return run;
}

/* A lane's state is as in wide_tiles.cuh; its row is the first of its two, whose maximum and sum are the twin's, too.
 */
template <typename S> using lane_state = wide::warp_state<S>;
constexpr uint32_t OWN = 0;

/* Hides the row's scores of tokens beyond the last. */
template <typename S>
__device__ inline void mask_scores(wide::tile_scores<S> &scores, const wide::tile_run &run, uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < S::TOKENS / 4; i++) {
        uint32_t token = run.first + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (token >= run.sees.y) scores[i / 2 * 4 + i % 2] = -INFINITY;
    }
}

/* Moves the row's maximum for a tile's scores, and brings down to it what was summed before. */
template <typename S>
__device__ inline void move_maximum(const wide::tile_scores<S> &scores, lane_state<S> &state, float scale_log2) {
    float largest = wide::reduce_row(scores, OWN, [](float x, float y) { return fmaxf(x, y); });
    largest = ptx::quad_max(largest) * scale_log2;
    float maximum = largest > state.maximum[OWN] + wide::SLACK<S> ? largest : state.maximum[OWN];
    float factor = maximum == -INFINITY ? 1.0f : ptx::exp2_fast(state.maximum[OWN] - maximum);
    state.maximum[OWN] = maximum;
    if (!__any_sync(ALL_LANES, factor != 1.0f)) return;
    const float factors[2] = {factor, factor};
    wide::rescale_out(state, factors);
    state.sum[OWN] *= factor;
}

/* The row's scores become weights, which are summed; its twin takes what is rounded off. */
template <typename S>
__device__ inline void soften(wide::tile_scores<S> &scores, lane_state<S> &state, wide::tile_weights<S> &weights,
                              float scale_log2) {
    float base = state.maximum[OWN] == -INFINITY ? 0.0f : state.maximum[OWN];
#pragma unroll
    for (uint32_t i = 0; i < S::TOKENS / 8; i++) {
        float &low = scores[4 * i], &high = scores[4 * i + 1];
        low = ptx::exp2_fast(fmaf(low, scale_log2, -base));
        high = ptx::exp2_fast(fmaf(high, scale_log2, -base));
        uint32_t packed = S::KV::pack(low, high);
        weights[0][i / 2][i % 2 * 2] = packed;
        weights[0][i / 2][i % 2 * 2 + 1] = S::KV::pack_rest(low, high, packed);
    }
    state.sum[OWN] += wide::reduce_row(scores, OWN, [](float x, float y) { return x + y; });
}

/*
 * Consumes the group's tiles, as wide::consume_tiles does; but a tile's values are waited for when they are needed, and
 * its keys are given back when they are not needed any more.
 */
template <typename S>
__device__ inline void consume_tiles(lane_state<S> &state, const context<S> &block, const produce::ring &ring) {
    const group_place &own = block.own;
    wide::tile_run run = tiles_of_group(block);
    uint32_t queries = ptx::shared_address(block.memory.queries), stage = run.first_number, parity = 0;
    wide::clear_state(state);
#pragma unroll 1
    for (; run.tiles > 0; run.tiles--) {
        uint32_t at = ring.memory + stage * S::stage::BYTES;
        ptx::barrier_wait(ring.full + stage * 8, parity);
        __syncwarp();
        wide::tile_scores<S> scores;
        wide::find_scores<S>(scores, queries, at);
        if (own.lane == 0) ptx::barrier_arrive(ring.empty + stage * 8);
        if (wide::is_partly_unseen<S>(run)) mask_scores<S>(scores, run, own.lane);
        move_maximum<S>(scores, state, run.soft.scale_log2);
        wide::tile_weights<S> weights;
        soften<S>(scores, state, weights, run.soft.scale_log2);
        uint32_t values = at + S::stage::VALUES_AT;
        ptx::barrier_wait(ring.full + stage * 8 + S::stage::APART, parity);
        __syncwarp();
        if (wide::is_partly_unseen<S>(run)) wide::clear_unseen<S>(own, run, values);
        ptx::warpgroup_fence();
        wide::multiply_values<S>(state, weights, values);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>();
        wide::hold_out(state);
        if (own.lane == 0) ptx::barrier_arrive(ring.empty + stage * 8 + S::stage::APART);
        run.first += GROUPS * S::TOKENS;
        stage += GROUPS;
        if (stage >= ring.stages) {
            stage -= ring.stages;
            parity ^= 1;
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* A part's rows */

/* Of a row that four lanes share: of every eight columns 2 * (lane % 4) and the next. */
template <typename S> struct lane_row {
    float2 pairs[S::DIM_V / 8];
    float maximum, sum;
};

/* A row and its twin are added. */
template <typename S> __device__ inline lane_row<S> join_twins(const lane_state<S> &state) {
    lane_row<S> row;
#pragma unroll
    for (uint32_t i = 0; i < S::DIM_V / 8; i++) {
        const float *out = &state.out[i * 8 / S::WIDTH][i * 8 % S::WIDTH / 2];
        row.pairs[i] = make_float2(out[0] + out[2], out[1] + out[3]);
    }
    row.maximum = state.maximum[OWN];
    row.sum = ptx::quad_sum(state.sum[OWN]);
    return row;
}

/* Where one group gives a thread's part of a row to the other: in the stage that it had last, or one without a tile. */
template <typename S> __device__ inline float4 *find_given(const context<S> &block) {
    uint32_t stages = block.with.stages, stage = (block.tiles() + stages - GROUPS) % stages;
    static_assert(S::stage::BYTES >= MAX_ROWS * S::DIM_V * sizeof(float), "");
    return (float4 *)(block.ring + stage * S::stage::BYTES) + block.own.thread();
}

/* Gives the group's rows to the other one, each thread to the one in its place. */
template <typename S> __device__ inline void give_rows(const context<S> &block, const lane_row<S> &row) {
    ptx::named_barrier<GROUP_THREADS>(block.own.group); /* all have consumed the stage */
    float4 *to = find_given(block);
#pragma unroll
    for (uint32_t i = 0; i < S::DIM_V / 8; i += 2)
        to[i / 2 * GROUP_THREADS] = make_float4(row.pairs[i].x, row.pairs[i].y, row.pairs[i + 1].x, row.pairs[i + 1].y);
    if (block.own.lane % 4 == 0) block.memory.given[block.row()] = make_float2(row.maximum, row.sum);
    ptx::barrier_arrive(ptx::shared_address(&block.memory.rows_given));
}

/* Adds the rows that the other group has given, once they are there. */
template <typename S> __device__ inline void take_rows(const context<S> &block, lane_row<S> &row) {
    ptx::barrier_wait(ptx::shared_address(&block.memory.rows_given), 0);
    const float4 *from = find_given(block);
    float2 given = block.memory.given[block.row()];
    float most = fmaxf(row.maximum, given.x);
    float keep = rows::decay(row.maximum, most), factor = rows::decay(given.x, most);
#pragma unroll
    for (uint32_t i = 0; i < S::DIM_V / 8; i += 2) {
        float4 added = from[i / 2 * GROUP_THREADS];
        row.pairs[i].x = fmaf(added.x, factor, row.pairs[i].x * keep);
        row.pairs[i].y = fmaf(added.y, factor, row.pairs[i].y * keep);
        row.pairs[i + 1].x = fmaf(added.z, factor, row.pairs[i + 1].x * keep);
        row.pairs[i + 1].y = fmaf(added.w, factor, row.pairs[i + 1].y * keep);
    }
    row.sum = fmaf(given.y, factor, row.sum * keep);
    row.maximum = most;
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

/* Sends the part's rows to the blocks that merge them. By the group that has them. */
template <typename S>
__device__ inline void send_in_cluster(const context<S> &block, const cluster::inbox &inbox, const lane_row<S> &row) {
    uint32_t index = block.row();
    if (index >= block.rows()) return;
    uint32_t to = index / inbox.rows, slot = inbox.part * inbox.rows + index - to * inbox.rows;
    uint32_t barrier = ptx::address_in_cluster(inbox.barrier, to);
    uint32_t out = ptx::address_in_cluster(ptx::shared_address(inbox.outs + slot * S::DIM_V), to);
    uint32_t state = ptx::address_in_cluster(ptx::shared_address(inbox.states + slot), to);
    out += block.own.lane % 4 * (uint32_t)sizeof(float2);
    if (block.own.lane % 4 == 0) ptx::store_in_cluster(state, make_float2(row.maximum, row.sum), barrier);
#pragma unroll
    for (uint32_t i = 0; i < S::DIM_V / 8; i++)
        ptx::store_in_cluster(out + i * 8 * (uint32_t)sizeof(float), row.pairs[i], barrier);
}

/* Merges the rows that are the block's. By all groups. */
template <typename S> __device__ inline void merge_in_cluster(const context<S> &block, const cluster::inbox &inbox) {
    uint32_t count = count_own(block.rows(), inbox.rows, inbox.part);
    if (count == 0) return; /* nobody sends anything */
    ptx::barrier_wait(inbox.barrier, 0);
    for (uint32_t index = block.warp(); index < count; index += ALL_WARPS) {
        rows::row_state<S::DIM_V> merged = merge_received<S::DIM_V>(inbox, index, block.own.lane);
        write_row(block, inbox.part * inbox.rows + index, merged);
    }
}

/* The part's rows, which the group has that had its last tile; then what is the block's is merged, by all groups. */
template <typename S> __device__ inline void finish_in_cluster(const context<S> &block, const lane_row<S> &row) {
    cluster::inbox inbox = view_inbox(block);
    if (block.has_last_tile()) {
        ptx::cluster_wait(); /* all inboxes are open */
        send_in_cluster(block, inbox, row);
    }
    merge_in_cluster(block, inbox);
}

/* ------------------------------------------------------------------------------------------- */
/* Long parts */

/* Who merges a unit's long parts, some rows each. */
struct party {
    parts::place of;
    uint32_t members, each;
};

template <typename S> __device__ inline party party_of(const context<S> &block) {
    parts::place of = parts::place_of(block.with.cut, blockIdx.x);
    uint32_t members = min(of.count, mail::MAX_MEMBERS);
    return {of, members, rows_each(block.rows(), members)};
}

template <typename S> __device__ inline mail::room view_room(const arguments &with) {
    return mail::view_room(with.mail, with.workspace.slots, S::DIM_V);
}

__device__ inline mail::count count_of(const arguments &with, const parts::place &of) {
    rows::workspace work = rows::view_workspace(with.workspace);
    ptx::require(of.first < work.slots / 2);
    return {work.joint_tickets + of.first, of.count};
}

/* Sends the part's rows. Lanes exchange in pairs, so that each sends four columns at once. By a group. */
template <typename S> __device__ inline void send_by_mail(const context<S> &block, const lane_row<S> &row) {
    mail::room room = view_room<S>(block.with);
    uint32_t index = block.row(), lane = block.own.lane;
    bool is_row = index < block.rows(), is_odd = lane % 2;
    uint32_t column =
        lane % 4 * 2 + (is_odd ? 8 - 2 : 0); /* the first lane has the first eight's, the other the next */
    uint32_t *to = room.rows + mail::row_of(blockIdx.x, index) * S::DIM_V + column;
    if (is_row && lane % 4 == 0) mail::send_state(room, blockIdx.x, index, row.maximum, row.sum);
#pragma unroll
    for (uint32_t i = 0; i < S::DIM_V / 8; i += 2) {
        float2 first = row.pairs[i], second = row.pairs[i + 1], other;
        other.x = __shfl_xor_sync(ALL_LANES, is_odd ? first.x : second.x, 1);
        other.y = __shfl_xor_sync(ALL_LANES, is_odd ? first.y : second.y, 1);
        float4 four = is_odd ? make_float4(other.x, other.y, second.x, second.y)
                             : make_float4(first.x, first.y, other.x, other.y);
        if (is_row) mail::send(to + i * 8, four);
    }
}

/* Where a member has few rows, several warps have one, each a slice of the parts. */
__device__ inline uint32_t count_slices(uint32_t rows) { return ALL_WARPS / min(rows, ALL_WARPS); }

/* Merges the rows that are the block's, if they still are when all their words should have come. By all groups. */
template <typename S>
__device__ inline void merge_own(const context<S> &block, const party &with, const mail::patience &patience) {
    uint32_t first = with.of.own * with.each, count = count_own(block.rows(), with.each, with.of.own);
    if (count == 0) return;
    merged_slices<S> &memory = *(merged_slices<S> *)(&block.memory + 1);
    mail::room room = view_room<S>(block.with);
    uint32_t warp = block.warp(), lane = block.own.lane, at_once = min(count, ALL_WARPS);
    uint32_t slices = count_slices(count), slice = warp / at_once;
    rows::row_state<S::DIM_V> merged = rows::empty_state<S::DIM_V>();
#pragma unroll 1
    for (uint32_t index = warp % at_once; slice < slices && index < count; index += at_once) {
        if (!mail::merge_slice(merged, room, with.of, first + index, slice, slices, patience, lane)) break;
        if (slices == 1) write_row(block, first + index, merged);
    }
    if (slice > 0) {
        rows::store_row(memory.rows[warp], merged.out, lane);
        if (lane == 0) block.memory.slices[warp] = make_float2(merged.maximum, merged.sum);
    }
    __syncwarp(); /* the barrier counts whole warps */
    ptx::named_barrier<THREADS>(ALL_GROUPS);
    ptx::named_barrier<THREADS>(ALL_GROUPS); /* for racecheck, which does not see that the first one orders */
    if (slice >= slices || mail::has_given_up(patience.own)) return;
    if (slices > 1 && slice == 0) {
#pragma unroll
        for (uint32_t s = 1; s < ALL_WARPS; s++) {
            if (s >= slices) break;
            uint32_t other = warp + s * at_once;
            float2 state = block.memory.slices[other];
            rows::merge_state(merged, rows::load_row<S::DIM_V>(memory.rows[other], lane), state.x, state.y);
        }
        write_row(block, first + warp, merged);
    }
    for (uint32_t index = warp % at_once; index < count; index += at_once)
        mail::clear_slice<S::DIM_V>(room, with.of, first + index, slice, slices, lane);
}

/* Merges the rows of a member that has given up, to the bit as it would have done. By a warp. */
template <typename S>
__device__ inline void merge_besides(const context<S> &block, const party &with, uint32_t member,
                                     const mail::patience &endless) {
    uint32_t first = member * with.each, end = first + count_own(block.rows(), with.each, member);
    uint32_t slices = count_slices(end - first), lane = block.own.lane;
    mail::room room = view_room<S>(block.with);
#pragma unroll 1
    for (uint32_t row = first; row < end; row++) {
        rows::row_state<S::DIM_V> merged, other;
        mail::merge_slice(merged, room, with.of, row, 0, slices, endless, lane);
#pragma unroll 1
        for (uint32_t s = 1; s < slices; s++) {
            mail::merge_slice(other, room, with.of, row, s, slices, endless, lane);
            rows::merge_state(merged, other.out, other.maximum, other.sum);
        }
        write_row(block, row, merged);
        mail::clear_slice<S::DIM_V>(room, with.of, row, 0, 1, lane);
    }
}

/* The part's rows, which the group has that had its last tile; then what is the block's is merged, by all groups. */
template <typename S> __device__ inline void finish_long_part(const context<S> &block, const lane_row<S> &row) {
    party with = party_of(block);
    if (block.has_last_tile()) {
        send_by_mail(block, row);
        ptx::named_barrier_arrive<GROUP_THREADS + 32>(ROWS_SENT);
    }
    uint32_t tries = mail::tries_in(block.with.patience_ns);
    if (with.of.own < with.members)
        merge_own(block, with, {block.memory.agreement, count_of(block.with, with.of), with.of.own, tries, false});
}

/* Counts the part once its rows are sent. By the producer's warp, which has nothing else to do then. */
template <typename S> __device__ inline void count_part(const context<S> &block) {
    party with = party_of(block);
    mail::count count = count_of(block.with, with.of);
    uint32_t besides = 0;
    ptx::named_barrier<GROUP_THREADS + 32>(ROWS_SENT);
    if (block.own.lane == 0) {
        besides = mail::arrive(count);
        mail::note_arrival(block.memory.agreement);
    }
#pragma unroll 1
    for (besides = __shfl_sync(ALL_LANES, besides, 0); besides != 0; besides &= besides - 1)
        merge_besides(block, with, __ffs(besides) - 1, {block.memory.agreement, count, 0, 0, true});
}

/* ------------------------------------------------------------------------------------------- */
/* The kernel */

template <typename S, bool CLUSTERED>
__device__ inline void do_part(const context<S> &block, const produce::ring &ring) {
    copy_queries(block);
    lane_state<S> state;
    consume_tiles(state, block, ring);
    lane_row<S> row = join_twins<S>(state);
    if (block.has_last_tile()) {
        take_rows(block, row);
    } else {
        give_rows(block, row);
    }
    ptx::wait_for_previous_launch(); /* which may still read what is written from here on */
    if constexpr (CLUSTERED) {
        finish_in_cluster(block, row);
    } else {
        finish_long_part(block, row);
    }
}

/* The groups, and the producer's warp. */
constexpr uint32_t BLOCK_THREADS = THREADS + 32;

template <typename S, bool CLUSTERED>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    twins_kernel(const __grid_constant__ attn_cuda_call call, const __grid_constant__ arguments with) {
#if __CUDA_ARCH__ >= 900                                                     /* never launched elsewhere */
    uint32_t length = line::load_length_of_part(call, with.cut, blockIdx.x); /* what all else waits for */
    extern __shared__ __align__(1024) char shared[];
    block_memory<S> &memory = *(block_memory<S> *)(shared + with.stages * S::stage::BYTES);
    produce::ring ring = {ptx::shared_address(shared), ptx::shared_address(memory.full),
                          ptx::shared_address(memory.empty), with.stages, S::stage::BYTES};
    uint32_t warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == THREADS) launching::prefetch_page_table(call);
    if (threadIdx.x == 0) { /* while the producer finds its first tiles */
        for (uint32_t stage = 0; stage < with.stages; stage++) {
            ptx::barrier_init(ring.full + stage * 8, produce::full_arrivals());
            ptx::barrier_init(ring.full + stage * 8 + S::stage::APART, produce::full_arrivals());
            ptx::barrier_init(ring.empty + stage * 8, WARPS);
            ptx::barrier_init(ring.empty + stage * 8 + S::stage::APART, WARPS);
        }
        ptx::barrier_init(ptx::shared_address(&memory.rows_given), GROUP_THREADS);
        if (CLUSTERED) {
            uint32_t parts = with.cut.parts, each = rows_each(with.cut.group, parts);
            uint32_t count = count_own(with.cut.group, each, line::part_of(with.cut, blockIdx.x));
            cluster::open_inbox(ptx::shared_address(&memory.received),
                                cluster::inbox_bytes(parts + 1, count, S::DIM_V));
        } else {
            mail::open_agreement(memory.agreement);
        }
        ptx::barrier_init_fence();
    }
    if (CLUSTERED) ptx::cluster_arrive();
    if (with.times != nullptr && threadIdx.x == 0) {
        with.times[blockIdx.x * 4] = ptx::multiprocessor();
        with.times[blockIdx.x * 4 + 1] = ptx::global_time_ns();
    }
    ptx::launch_dependents();
    line::part part = line::find_part<typename S::rules>(call, with.cut, length, blockIdx.x);
    produce::tile_source<S::TOKENS> first_tiles = {};
    if (warp == ALL_WARPS) first_tiles = produce::find_tile_of_part<S::TOKENS>(call, with.cut, part, lane);
    __syncthreads();
    context<S> block = {call, with, memory, shared, part, {warp / WARPS, warp % WARPS, lane}};
    if (warp == ALL_WARPS) {
        produce::fill_ring_apart<typename S::stage>(call, with.cut, part, ring, first_tiles, lane);
        if (!CLUSTERED) count_part(block);
    } else {
        if (with.times != nullptr && threadIdx.x == 0) with.times[blockIdx.x * 4 + 2] = ptx::global_time_ns();
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
    of.rows = MAX_ROWS / mail::MAX_MEMBERS;
    of.warps = ALL_WARPS;
    of.partials_ahead = parts::AHEAD;
    of.joint_from = parts::first_merged_jointly(of.rows, of.warps);
    of.most_parts = mail::AHEAD * ALL_WARPS / of.rows; /* a member reads all of them: in one round */
    of.chain_ns = of.long_chain_ns = 520;
    of.end_ns = 400;
    of.long_end_ns = 200;
    of.crowded_saves_ns = 0;
    return attn_cuda_choose_cutting(&of, &tuning);
}

template <typename S, bool CLUSTERED>
cudaError_t launch(const attn_cuda_call &call, const attn_cuda_tuning &tuning, const attn_cuda_workspace &workspace,
                   uint32_t parts, cudaStream_t stream) {
    uint32_t group = call.layer.heads_q / call.layer.heads_kv, workers = call.batch * call.layer.heads_kv * parts;
    if (workspace.rows < mail::ROWS || workspace.slots < 2 * workers || tuning.blocks_per_sm == 2)
        return cudaErrorInvalidValue;
    uint32_t besides = (uint32_t)sizeof(block_memory<S>);
    if (!CLUSTERED) besides += (uint32_t)sizeof(merged_slices<S>);
    if (CLUSTERED) besides += cluster::inbox_bytes(parts + 1, rows_each(group, parts), S::DIM_V);
    if (tuning.shared_bytes < besides) return cudaErrorInvalidValue;
    uint32_t most = tuning.stages != 0 ? tuning.stages : CLUSTERED ? 6 : 4;
    uint32_t stages = min((tuning.shared_bytes - besides) / S::stage::BYTES, most) / GROUPS * GROUPS;
    if (stages == 0) return cudaErrorInvalidValue;
    arguments with = {line::make_cut(call.layer, tuning, MAX_ROWS, workers, parts),
                      workspace,
                      stages,
                      tuning.patience_ns,
                      tuning.times,
                      0,
                      0,
                      0,
                      mail::find_room(workspace, S::DIM_V)};
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
