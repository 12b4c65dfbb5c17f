/*
 * The line of a call (kernels/split_plan.h) on the device: all tiles of all units, and how the thread blocks cut it.
 *
 *     for each sequence | for each KV head | for each row block | for each tile of TOKENS tokens
 *
 * A unit's tiles are those in which some row of its block sees some token; one that sees nothing has one empty tile,
 * so that its output is somebody's. All of it is derived from the live lengths, by every warp for itself: a lane sums
 * a stretch of sequences, the lanes' sums are scanned. Where all units are alike, a share may be rounded up to cut
 * fewer of them, since a cut unit costs a merge. Where they are not, a unit may count more tiles than it has, for what
 * its begin and end cost: those are empty, after its last.
 *
 * A worker first does its last run if that is cut off at the share's end, then the rest in order: so units that were
 * cut are merged while others are still being loaded, and not after all.
 *
 * In batch_invariant mode a unit begins and ends at whole chunks of ATTN_CHUNK_TOKENS, with empty tiles where there is
 * nothing to see, and shares are whole chunks; a part's units have all of its chunks, seen or not.
 */
#ifndef ATTND_KERNELS_CUDA_LINE_CUH
#define ATTND_KERNELS_CUDA_LINE_CUH

#include "kernels/cuda/decode.h"
#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/layout.cuh"
#include "kernels/cuda/results.cuh"

namespace line {

constexpr uint32_t ALL_LANES = 0xffffffffu;

/*
 * How the rows and the line of a call are cut, besides the kernel's own tile; and what the host divides once, so that
 * no thread has to.
 */
struct cut {
    uint32_t group;         /* query heads a KV head */
    uint32_t group_inverse; /* row / group is row * this >> 16, for rows of a block */
    uint32_t block_queries;
    uint32_t weighs_ends;     /* do units count rules::ENDS_TILES more, and rules::LEAST_TILES at least? */
    uint64_t workers_inverse; /* tiles / workers is tiles * this >> 40 */
    uint32_t page_shift;      /* log2 of tokens of a page.. */
    uint32_t block_shift;     /* ..and of a block of it (layout.cuh) */
    uint32_t block_bytes;
    uint32_t align_tiles;   /* attn_cuda_tuning */
    uint32_t parts;         /* workers that each unit has by itself, if it has; 1: shares are cut as they come */
    uint32_t parts_inverse; /* worker / parts is worker * this >> 16 */
};

__host__ inline uint32_t log2_of(uint32_t power) {
    uint32_t shift = 0;
    while (1u << shift < power)
        shift++;
    return shift;
}

/* Of a kernel whose blocks have `rows` rows, and a launch of so many workers that may cut each unit into `parts`. */
__host__ inline cut make_cut(const attn_cuda_layer &layer, const attn_cuda_tuning &tuning, uint32_t rows,
                             uint32_t workers, uint32_t parts) {
    cut made;
    made.group = layer.heads_q / layer.heads_kv;
    made.group_inverse = (65536 + made.group - 1) / made.group;
    made.block_queries = rows / made.group;
    made.weighs_ends = 0;
    made.workers_inverse = ((1ull << 40) + workers - 1) / workers;
    made.page_shift = log2_of(layer.page_size);
    made.block_shift = log2_of(layout::block_tokens(layer.page_size));
    made.block_bytes = layer.tile_bytes >> (made.page_shift - made.block_shift);
    made.align_tiles = tuning.align_tiles;
    made.parts = parts;
    made.parts_inverse = (65536 + parts - 1) / parts;
    return made;
}

/* The query of row `row` of a block. */
__device__ inline uint32_t query_of(const cut &cut, uint32_t row) { return row * cut.group_inverse >> 16; }

/*
 * n / d, if that is below 2^20: by a reciprocal, which is wrong by one at most. Half of what the compiler makes of a
 * division by what it does not know; for what is on the way to a launch's first copies.
 */
__device__ inline uint32_t divide(uint32_t n, uint32_t d) {
    uint32_t quotient = __float2uint_rz(__uint2float_rn(n) * ptx::reciprocal(__uint2float_rn(d)));
    int32_t left = (int32_t)(n - quotient * d);
    if (left < 0) return quotient - 1;
    return left >= (int32_t)d ? quotient + 1 : quotient;
}

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

/*
 * What a kernel is compiled for. A simple call (is_simple) is what almost all decodes are; its kernels have no code for
 * anything else, since what code a launch has to fetch, and the branches in it, are microseconds.
 */
template <uint32_t TOKENS_, bool SIMPLE_, bool INVARIANT_ = !SIMPLE_, bool LEAVES_ = !SIMPLE_, uint32_t ENDS_TILES_ = 0,
          uint32_t LEAST_TILES_ = 1>
struct rules {
    static constexpr uint32_t TOKENS = TOKENS_; /* of a tile */
    static constexpr bool SIMPLE = SIMPLE_;
    static constexpr bool INVARIANT = INVARIANT_;   /* can batch_invariant mode; simple ones do nothing else */
    static constexpr bool LEAVES = LEAVES_;         /* can leave results to be merged by a launch that comes after.. */
    static constexpr bool SENDS = LEAVES && SIMPLE; /* ..or is at work beside it (rows.cuh) */
    static constexpr uint32_t ENDS_TILES = ENDS_TILES_, LEAST_TILES = LEAST_TILES_;
    static constexpr bool WEIGHS_ENDS = ENDS_TILES > 0 || LEAST_TILES > 1; /* if cut::weighs_ends */
    static_assert(TOKENS == 64 || TOKENS == 128, "");
    static_assert(!WEIGHS_ENDS || (SIMPLE && !INVARIANT), "");
};

__host__ __device__ inline bool is_simple(const attn_cuda_call &call) {
    return call.sequences == nullptr && call.window == 0 && call.softcap == 0;
}

/* Are the results of the sequences that share something merged with what they share by a launch that comes after? */
__host__ __device__ inline bool leaves_results(const attn_cuda_call &call) {
    return call.sharing > 0 && call.shared_out == nullptr;
}

template <typename L> __device__ inline bool is_batch_invariant(const attn_cuda_call &call) {
    return L::INVARIANT && (L::SIMPLE || call.batch_invariant);
}

template <typename L> __device__ inline attn_cuda_sequence sequence_at(const attn_cuda_call &call, uint32_t i) {
    if (!L::SIMPLE && call.sequences != nullptr) return call.sequences[i];
    attn_cuda_sequence sequence = {};
    sequence.length = __ldg(&call.lengths[i]);
    sequence.query_length = 1;
    sequence.is_read = 1;
    sequence.page_offset = call.page_offsets != nullptr ? __ldg(&call.page_offsets[i]) : i * call.page_table_stride;
    sequence.first_query = i;
    sequence.first_out = i;
    sequence.new_rows = call.keys != nullptr;
    sequence.first_new = i;
    sequence.total_length = sequence.length;
    return sequence;
}

/* What a row block sees: tokens begin .. end - 1 by some row, all_begin .. all_end - 1 by every row; and its tiles. */
struct extent {
    uint32_t begin, end;
    uint32_t first_token; /* of its first tile */
    uint32_t tiles;
};

/* log2 of the tiles that a worker takes together. */
template <typename L> __device__ inline uint32_t chunk_shift(const attn_cuda_call &call) {
    return is_batch_invariant<L>(call) ? (L::TOKENS == 64 ? 3 : 2) : 0;
}

template <typename L>
__device__ inline extent extent_of_tokens(const attn_cuda_call &call, uint32_t begin, uint32_t end) {
    uint32_t shift = chunk_shift<L>(call), token_shift = shift + (L::TOKENS == 64 ? 6 : 7);
    extent found;
    found.begin = begin;
    found.end = end;
    found.first_token = begin >> token_shift << token_shift;
    uint32_t chunks = (end - found.first_token + (1u << token_shift) - 1) >> token_shift;
    found.tiles = max(begin < end ? chunks : 1, 1) << shift;
    return found;
}

/* Of the unit of a simple call: extent_of_tokens(0, length), and what units count besides. */
template <typename L>
__device__ inline extent extent_of_sequence(const attn_cuda_call &call, const cut &cut, uint32_t length) {
    uint32_t shift = chunk_shift<L>(call), token_shift = shift + (L::TOKENS == 64 ? 6 : 7);
    bool weighs_ends = L::WEIGHS_ENDS && cut.weighs_ends;
    uint32_t ends = weighs_ends ? L::ENDS_TILES : 0, least = weighs_ends ? L::LEAST_TILES : 1;
    static_assert(L::ENDS_TILES < L::LEAST_TILES, "or one without tokens would count fewer");
    extent found;
    found.begin = 0;
    found.end = length;
    found.first_token = 0;
    found.tiles = max(((length + (1u << token_shift) - 1) >> token_shift) + ends, least) << shift;
    return found;
}

__device__ inline uint32_t blocks_of(const attn_cuda_sequence &sequence, const cut &cut) {
    if (sequence.query_length <= cut.block_queries) return 1;
    return (sequence.query_length + cut.block_queries - 1) / cut.block_queries;
}

/* Do all of a sequence's row blocks see the same, whichever their rows are? */
__device__ inline bool are_blocks_alike(const attn_cuda_call &call, const attn_cuda_sequence &sequence) {
    return sequence.is_read && sequence.chunk_stride == 0 && call.window == 0;
}

template <typename L>
__device__ inline extent extent_of_block(const attn_cuda_call &call, const attn_cuda_sequence &sequence, const cut &cut,
                                         uint32_t block) {
    if (L::SIMPLE) return extent_of_sequence<L>(call, cut, sequence.length);
    uint32_t first = block * cut.block_queries;
    uint32_t last = min(first + cut.block_queries, sequence.query_length) - 1;
    uint32_t begin = results::row_visible(sequence, call.window, first).x;
    uint32_t end = results::row_visible(sequence, call.window, last).y;
    bool has_all_chunks = is_batch_invariant<L>(call) && sequence.chunk_stride != 0;
    extent found =
        extent_of_tokens<L>(call, has_all_chunks ? 0 : min(begin, end), has_all_chunks ? sequence.length : end);
    found.begin = min(begin, end);
    found.end = end;
    return found;
}

/* Tiles of one KV head of sequence i. */
template <typename L>
__device__ __noinline__ uint32_t count_tiles_a_head(const attn_cuda_call &call, const cut &cut, uint32_t i) {
    attn_cuda_sequence sequence = sequence_at<L>(call, i);
    if (are_blocks_alike(call, sequence)) {
        return blocks_of(sequence, cut) * extent_of_block<L>(call, sequence, cut, 0).tiles;
    }
    uint32_t tiles = 0;
    for (uint32_t block = 0; block < blocks_of(sequence, cut); block++) {
        tiles += extent_of_block<L>(call, sequence, cut, block).tiles;
    }
    return tiles;
}

template <typename L> __device__ inline uint32_t tiles_a_head(const attn_cuda_call &call, const cut &cut, uint32_t i) {
    if (L::SIMPLE) return extent_of_sequence<L>(call, cut, __ldg(&call.lengths[i])).tiles;
    return count_tiles_a_head<L>(call, cut, i);
}

/* ------------------------------------------------------------------------------------------- */
/* Places in the line */

/* A sequence, and its first tile in the line. */
struct position {
    uint32_t sequence, begin;
};

/* A warp's scan of the batch: lane l has the tiles a head of a stretch of sequences, and of all up to there. */
struct scan {
    uint32_t stretch;
    uint32_t own, through;
    /* Tiles of a unit. Where a sequence has several that are not alike least is 0, and most is not. */
    uint32_t least, most;
    uint32_t most_blocks; /* of a sequence */
};

__device__ inline uint32_t scan_lanes(uint32_t value, uint32_t lane) {
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t before = __shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += before;
    }
    return value;
}

template <typename L> __device__ inline scan scan_batch(const attn_cuda_call &call, const cut &cut, uint32_t lane) {
    scan found;
    found.stretch = (call.batch + 31) / 32;
    found.own = 0;
    found.least = UINT32_MAX;
    found.most = L::SIMPLE ? 0 : 1;
    found.most_blocks = 1;
    uint32_t first = lane * found.stretch;
    if (!L::SIMPLE && call.sequences != nullptr) { /* else one would be waited for after the other */
        for (uint32_t i = first + 1; i < first + found.stretch && i < call.batch; i++)
            ptx::prefetch_l2(&call.sequences[i]);
    }
    for (uint32_t i = first; i < first + found.stretch && i < call.batch; i++) {
        uint32_t tiles = tiles_a_head<L>(call, cut, i), unit = tiles;
        found.own += tiles;
        if (!L::SIMPLE) {
            attn_cuda_sequence sequence = sequence_at<L>(call, i);
            uint32_t blocks = blocks_of(sequence, cut);
            found.most_blocks = max(found.most_blocks, blocks);
            if (blocks > 1) unit = are_blocks_alike(call, sequence) ? tiles / blocks : 0;
        }
        found.least = min(found.least, unit);
        found.most = max(found.most, unit);
    }
    found.through = scan_lanes(found.own, lane);
    return found;
}

/* The sequence of a stretch that begins at `found` in which the tile lies: 32 sequences at a time. */
template <typename L>
__device__ inline position locate_in_stretch(const attn_cuda_call &call, const cut &cut, position found, uint32_t tile,
                                             uint32_t lane) {
    for (;;) {
        uint32_t i = found.sequence + lane;
        uint32_t tiles = i < call.batch ? tiles_a_head<L>(call, cut, i) * call.layer.heads_kv : 0;
        uint32_t until = scan_lanes(tiles, lane);
        uint32_t holds = __ballot_sync(ALL_LANES, tile < found.begin + until);
        if (holds != 0) {
            uint32_t owner = __ffs(holds) - 1;
            found.sequence += owner;
            found.begin += __shfl_sync(ALL_LANES, until - tiles, owner);
            return found;
        }
        found.begin += __shfl_sync(ALL_LANES, until, 31);
        found.sequence += 32;
    }
}

/* The sequence in which tile `tile` of the line lies. By a whole warp, the same tile in all lanes. */
template <typename L>
__device__ inline position locate(const attn_cuda_call &call, const cut &cut, const scan &scan, uint32_t tile,
                                  uint32_t lane) {
    uint32_t heads = call.layer.heads_kv;
    uint32_t owner = __ffs(__ballot_sync(ALL_LANES, tile < scan.through * heads)) - 1;
    position found = {owner * scan.stretch, __shfl_sync(ALL_LANES, (scan.through - scan.own) * heads, owner)};
    return scan.stretch == 1 ? found : locate_in_stretch<L>(call, cut, found, tile, lane);
}

/* ------------------------------------------------------------------------------------------- */
/* Units */

struct unit {
    uint32_t sequence, head, block;
    uint32_t begin; /* its first tile in the line */
    extent sees;
    attn_cuda_sequence of;
};

template <typename L> __device__ inline void load_unit(unit &found, const attn_cuda_call &call, const cut &cut) {
    found.sees = extent_of_block<L>(call, found.of, cut, found.block);
}

/* The unit of tile `tile`, which lies in the sequence at `place`. */
template <typename L>
__device__ inline unit unit_at(const attn_cuda_call &call, const cut &cut, const position &place, uint32_t tile) {
    unit found;
    found.sequence = place.sequence;
    found.of = sequence_at<L>(call, place.sequence);
    found.block = 0;
    load_unit<L>(found, call, cut);
    uint32_t a_head = L::SIMPLE ? found.sees.tiles : tiles_a_head<L>(call, cut, place.sequence);
    found.head = L::SIMPLE ? divide(tile - place.begin, a_head) : (tile - place.begin) / a_head;
    found.begin = place.begin + found.head * a_head;
    if (!L::SIMPLE && are_blocks_alike(call, found.of)) {
        found.block = (tile - found.begin) / found.sees.tiles;
        found.begin += found.block * found.sees.tiles;
    }
    while (!L::SIMPLE && tile >= found.begin + found.sees.tiles) {
        found.begin += found.sees.tiles;
        found.block++;
        load_unit<L>(found, call, cut);
    }
    return found;
}

/* The unit after. There must be one. */
template <typename L> __device__ inline void next_unit(unit &found, const attn_cuda_call &call, const cut &cut) {
    found.begin += found.sees.tiles;
    bool is_last_block = L::SIMPLE || found.block + 1 == blocks_of(found.of, cut);
    found.block = is_last_block ? 0 : found.block + 1;
    bool is_last_head = is_last_block && found.head + 1 == call.layer.heads_kv;
    if (is_last_block) found.head = is_last_head ? 0 : found.head + 1;
    if (is_last_head) found.of = sequence_at<L>(call, ++found.sequence);
    if (is_last_head || !L::SIMPLE) load_unit<L>(found, call, cut);
}

/* ------------------------------------------------------------------------------------------- */
/* Shares */

/* A share of fewer tiles is not worth the time that it takes to find its last run's begin. */
constexpr uint32_t TURN_TILES = 24;

/* A worker's share begin .. end - 1, which it does in the order turn .. end - 1, begin .. turn - 1. */
struct share {
    uint32_t begin, end, turn;
    uint32_t tiles_a_worker; /* worker w begins at w * this */
    bool is_part;            /* of a unit that has workers of its own (struct part, or wide.cuh) */
    position at_begin, at_turn;
};

/* An equal share, or where all units are alike maybe a larger one that cuts none, or all into equal parts. */
template <typename L>
__device__ inline uint32_t choose_share(uint32_t total, uint32_t workers, uint32_t least, uint32_t most,
                                        const cut &cut) {
    uint32_t equal = (uint32_t)((total + workers - 1) * cut.workers_inverse >> 40);
    if (least != most) return equal;
    auto divided = [](uint32_t n, uint32_t d) { return L::SIMPLE ? divide(n, d) : n / d; };
    uint32_t unit = most, whole = equal <= unit ? unit : divided(equal + unit - 1, unit) * unit;
    if (whole <= equal + cut.align_tiles) return whole;
    if (unit < 2 * equal) return equal;
    uint32_t parts = divided(unit, equal), aligned = divided(unit + parts - 1, parts);
    return aligned <= equal + cut.align_tiles ? aligned : equal;
}

/* Which of its unit's parts a worker has. */
__device__ inline uint32_t part_of(const cut &cut, uint32_t worker) {
    return worker - (worker * cut.parts_inverse >> 16) * cut.parts;
}

/* The share of a worker where units are alike and each has its own workers: an equal part of its tiles. */
__device__ inline void take_part(share &mine, uint32_t worker, uint32_t total, uint32_t unit, const cut &cut) {
    uint32_t first = (worker * cut.parts_inverse >> 16) * unit, part = part_of(cut, worker);
    auto begin_of = [&](uint32_t p) {
        return p == cut.parts ? unit : (uint32_t)((uint64_t)p * unit * cut.parts_inverse >> 16);
    };
    mine.is_part = true;
    mine.begin = min(total, first + begin_of(part));
    mine.end = min(total, first + begin_of(part + 1));
    mine.turn = mine.end;
}

/*
 * Where the share begins, and whether its last run is cut off, so that it comes first. `unit`: tiles of a unit where
 * all are alike, one a head, and need not be looked for, else 0.
 */
template <typename L>
__device__ inline void locate_share(share &mine, const attn_cuda_call &call, const cut &cut, const scan &batch,
                                    uint32_t unit, uint32_t lane) {
    bool may_turn = !mine.is_part && !is_batch_invariant<L>(call) && mine.tiles_a_worker >= TURN_TILES;
    if (unit != 0) {
        uint32_t a_sequence = unit * call.layer.heads_kv, last = (mine.end - 1) / unit * unit;
        uint32_t first = mine.begin / a_sequence, turn = last / a_sequence;
        mine.at_begin = {first, first * a_sequence};
        mine.at_turn = {turn, turn * a_sequence};
        if (may_turn && last > mine.begin && last + unit > mine.end) mine.turn = last;
        return;
    }
    mine.at_begin = locate<L>(call, cut, batch, mine.begin, lane);
    if (!may_turn) return;
    mine.at_turn = locate<L>(call, cut, batch, mine.end - 1, lane);
    line::unit last = unit_at<L>(call, cut, mine.at_turn, mine.end - 1);
    if (last.begin > mine.begin && last.begin + last.sees.tiles > mine.end) mine.turn = last.begin;
}

/*
 * By a whole warp; the same in all lanes. MAY_PART: units that are alike are cut into equal parts, each for workers of
 * its own, if the launch says so.
 */
template <typename L, bool MAY_PART = false>
__device__ inline share find_share(const attn_cuda_call &call, const cut &cut, uint32_t workers, uint32_t worker,
                                   uint32_t lane) {
    scan batch = scan_batch<L>(call, cut, lane);
    uint32_t total = __shfl_sync(ALL_LANES, batch.through, 31) * call.layer.heads_kv;
    uint32_t chunk = (1u << chunk_shift<L>(call)) - 1;
#if __CUDA_ARCH__ >= 800
    uint32_t least = __reduce_min_sync(ALL_LANES, batch.least), most = __reduce_max_sync(ALL_LANES, batch.most);
    uint32_t most_blocks = L::SIMPLE ? 1 : __reduce_max_sync(ALL_LANES, batch.most_blocks);
#else
    uint32_t least = 0, most = 1, most_blocks = 1;
#endif
    share mine;
    uint32_t tiles = choose_share<L>(total, workers, least, most, cut);
    mine.tiles_a_worker = (tiles + chunk) & ~chunk;
    uint64_t begin = (uint64_t)worker * mine.tiles_a_worker;
    mine.begin = begin < total ? (uint32_t)begin : total;
    mine.end = min(total, mine.begin + mine.tiles_a_worker);
    mine.turn = mine.end;
    mine.is_part = false;
    if (MAY_PART && cut.parts > 1 && least == most && most >= cut.parts && total * cut.parts <= workers * most) {
        take_part(mine, worker, total, most, cut);
    }
    mine.at_begin = mine.at_turn = {0, 0};
    if (mine.begin == mine.end) return mine;
    locate_share<L>(mine, call, cut, batch, !L::SIMPLE && least == most && most_blocks == 1 ? most : 0, lane);
    return mine;
}

/* ------------------------------------------------------------------------------------------- */
/* Shares of simple calls */

/*
 * What find_share() does takes 1.5 us from a launch's begin on, before which no tile can be asked for. For simple calls
 * it is done in half of that: a lane's lengths are loaded at once, before barriers are made; where all units are alike
 * nothing is looked for; and both ends of the share are looked for at the same time, by other lanes.
 */

/* So many of a lane's lengths are loaded together: all, of 128 sequences. */
constexpr uint32_t LENGTHS_AT_ONCE = 4;

struct some_lengths {
    uint32_t of[LENGTHS_AT_ONCE];
};

/* Those of sequences `first` .. `end` - 1, or as many of them; the last one again for those that there are not. */
__device__ inline some_lengths load_lengths(const attn_cuda_call &call, uint32_t first, uint32_t end) {
    some_lengths loaded;
#pragma unroll
    for (uint32_t i = 0; i < LENGTHS_AT_ONCE; i++)
        loaded.of[i] = __ldg(&call.lengths[min(first + i, end - 1)]);
    return loaded;
}

/* The first of a lane's: for find_simple_share(). */
__device__ inline some_lengths load_first_lengths(const attn_cuda_call &call, uint32_t lane) {
    uint32_t stretch = (call.batch + 31) / 32, first = min(lane * stretch, call.batch - 1);
    return load_lengths(call, first, min(first + stretch, call.batch));
}

/* The same as scan_batch(), but for what is summed over lanes; least and most are of all sequences. */
template <typename L>
__device__ inline scan measure_batch(const attn_cuda_call &call, const cut &cut, some_lengths lengths, uint32_t lane) {
    scan found;
    found.stretch = (call.batch + 31) / 32;
    found.own = found.through = 0;
    found.most_blocks = 1;
    uint32_t least = UINT32_MAX, most = 0;
    uint32_t first = lane * found.stretch, end = min(first + found.stretch, call.batch);
#pragma unroll 1
    while (first < end) {
#pragma unroll
        for (uint32_t i = 0; i < LENGTHS_AT_ONCE; i++) {
            uint32_t tiles = extent_of_sequence<L>(call, cut, lengths.of[i]).tiles;
            least = min(least, tiles);
            most = max(most, tiles);
            if (first + i < end) found.own += tiles;
        }
        first += LENGTHS_AT_ONCE;
        if (first < end) lengths = load_lengths(call, first, end);
    }
#if __CUDA_ARCH__ >= 800
    least = __reduce_min_sync(ALL_LANES, least);
    most = __reduce_max_sync(ALL_LANES, most);
#endif
    found.least = least;
    found.most = most;
    return found;
}

/* Where a tile is, and the tiles of its sequence's units. */
struct tile_position {
    position at;
    uint32_t unit;
};

/* By a whole warp: even lanes look for `first`, odd ones for `last`, two tiles of the line. Units are not alike. */
template <typename L>
__device__ inline tile_position locate_ends(const attn_cuda_call &call, const cut &cut, const scan &scan,
                                            uint32_t first, uint32_t last, uint32_t lane) {
    uint32_t heads = call.layer.heads_kv;
    uint32_t has_first = __ballot_sync(ALL_LANES, first < scan.through * heads);
    uint32_t has_last = __ballot_sync(ALL_LANES, last < scan.through * heads);
    uint32_t owner = __ffs(lane % 2 == 0 ? has_first : has_last) - 1, tile = lane % 2 == 0 ? first : last;
    tile_position found;
    found.at = {owner * scan.stretch, __shfl_sync(ALL_LANES, (scan.through - scan.own) * heads, owner)};
#pragma unroll 1
    for (;;) {
        found.unit = tiles_a_head<L>(call, cut, found.at.sequence);
        if (tile - found.at.begin < found.unit * heads) break;
        found.at.begin += found.unit * heads;
        found.at.sequence++;
    }
    __syncwarp();
    return found;
}

/* find_share() for simple calls, with load_first_lengths(). */
template <typename L>
__device__ inline share find_simple_share(const attn_cuda_call &call, const cut &cut, const some_lengths &lengths,
                                          uint32_t workers, uint32_t worker, uint32_t lane) {
    static_assert(L::SIMPLE, "");
    scan batch = measure_batch<L>(call, cut, lengths, lane);
    bool are_alike = batch.least == batch.most;
    uint32_t heads = call.layer.heads_kv, total = batch.most * call.batch * heads;
    if (!are_alike) {
        batch.through = scan_lanes(batch.own, lane);
        total = __shfl_sync(ALL_LANES, batch.through, 31) * heads;
    }
    uint32_t chunk = (1u << chunk_shift<L>(call)) - 1;
    share mine;
    mine.tiles_a_worker = (choose_share<L>(total, workers, batch.least, batch.most, cut) + chunk) & ~chunk;
    uint64_t begin = (uint64_t)worker * mine.tiles_a_worker;
    mine.begin = begin < total ? (uint32_t)begin : total;
    mine.end = min(total, mine.begin + mine.tiles_a_worker);
    mine.turn = mine.end;
    mine.is_part = false;
    mine.at_begin = mine.at_turn = {0, 0};
    if (mine.begin == mine.end) return mine;

    uint32_t tile = lane % 2 == 0 ? mine.begin : mine.end - 1;
    tile_position found;
    if (are_alike) {
        uint32_t a_sequence = batch.most * heads, sequence = divide(tile, a_sequence);
        found = {{sequence, sequence * a_sequence}, batch.most};
    } else {
        found = locate_ends<L>(call, cut, batch, mine.begin, mine.end - 1, lane);
    }
    mine.at_begin = {__shfl_sync(ALL_LANES, found.at.sequence, 0), __shfl_sync(ALL_LANES, found.at.begin, 0)};
    if (is_batch_invariant<L>(call) || mine.tiles_a_worker < TURN_TILES) return mine;
    mine.at_turn = {__shfl_sync(ALL_LANES, found.at.sequence, 1), __shfl_sync(ALL_LANES, found.at.begin, 1)};
    uint32_t head = divide(tile - found.at.begin, found.unit);
    uint32_t last = __shfl_sync(ALL_LANES, found.at.begin + head * found.unit, 1);
    uint32_t last_tiles = __shfl_sync(ALL_LANES, found.unit, 1);
    if (last > mine.begin && last + last_tiles > mine.end) mine.turn = last;
    return mine;
}

/* ------------------------------------------------------------------------------------------- */
/* Parts */

/*
 * A worker's equal part of a unit, where all units are cut into as many parts, whatever their lengths (cluster.cuh,
 * parts.cuh).
 */
struct part {
    line::unit unit;
    share mine; /* in the line of the unit's sequence alone; maybe no tile */
};

/* The length of the sequence that a worker has a part of: for find_part(). */
__device__ inline uint32_t load_length_of_part(const attn_cuda_call &call, const cut &cut, uint32_t worker) {
    return __ldg(&call.lengths[divide(worker * cut.parts_inverse >> 16, call.layer.heads_kv)]);
}

/* By any thread. Only for simple calls. */
template <typename L>
__device__ inline part find_part(const attn_cuda_call &call, const cut &cut, uint32_t length, uint32_t worker) {
    static_assert(L::SIMPLE, "");
    uint32_t heads = call.layer.heads_kv, number = worker * cut.parts_inverse >> 16,
             which = worker - number * cut.parts;
    part found;
    found.unit.sequence = divide(number, heads);
    found.unit.head = number - found.unit.sequence * heads;
    found.unit.block = 0;
    found.unit.of = sequence_at<L>(call, found.unit.sequence);
    found.unit.of.length = found.unit.of.total_length = length;
    load_unit<L>(found.unit, call, cut);
    uint32_t tiles = found.unit.sees.tiles;
    found.unit.begin = found.unit.head * tiles;
    /* p / parts of the tiles, as the launch has parts * units workers */
    uint64_t units = call.batch * heads;
    auto begin_of = [&](uint32_t p) { return (uint32_t)(units * (p * tiles) * cut.workers_inverse >> 40); };
    found.mine.is_part = true;
    found.mine.begin = found.unit.begin + begin_of(which);
    found.mine.end = found.unit.begin + begin_of(which + 1);
    found.mine.turn = found.mine.end;
    found.mine.tiles_a_worker = 0;
    found.mine.at_begin = found.mine.at_turn = {found.unit.sequence, 0};
    return found;
}

/*
 * The same of calls that are not simple, whose sequences have `blocks` row blocks or fewer; what is not there has no
 * tile. A unit of fewer tiles than parts has a tile in each of the first ones.
 */
template <typename L>
__device__ inline part find_block_part(const attn_cuda_call &call, const cut &cut, uint32_t blocks, uint32_t worker) {
    uint32_t unit = worker * cut.parts_inverse >> 16, which = worker - unit * cut.parts;
    uint32_t a_sequence = blocks * call.layer.heads_kv;
    part found;
    found.unit.sequence = unit / a_sequence;
    unit -= found.unit.sequence * a_sequence;
    found.unit.head = unit / blocks;
    found.unit.block = unit - found.unit.head * blocks;
    found.unit.begin = 0;
    found.unit.of = sequence_at<L>(call, found.unit.sequence);
    load_unit<L>(found.unit, call, cut);
    uint32_t tiles = found.unit.block < blocks_of(found.unit.of, cut) ? found.unit.sees.tiles : 0;
    auto begin_of = [&](uint32_t p) {
        if (tiles < cut.parts) return min(p, tiles);
        return p == cut.parts ? tiles : (uint32_t)((uint64_t)p * tiles * cut.parts_inverse >> 16);
    };
    found.mine.is_part = true;
    found.mine.begin = begin_of(which);
    found.mine.end = begin_of(which + 1);
    found.mine.turn = found.mine.end;
    found.mine.tiles_a_worker = 0;
    found.mine.at_begin = found.mine.at_turn = {found.unit.sequence, 0};
    return found;
}

/* The i-th tile that the worker does, in the line. */
__device__ inline uint32_t tile_in_turn(const share &mine, uint32_t i) {
    uint32_t last_run = mine.end - mine.turn;
    return i < last_run ? mine.turn + i : mine.begin + (i - last_run);
}

} /* namespace line */

#endif
