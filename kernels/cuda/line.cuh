/*
 * The line of a call (kernels/split_plan.h) on the device: all tiles of all units, and how the thread blocks cut it.
 *
 *     for each sequence | for each KV head | for each row block | for each tile of TOKENS tokens
 *
 * A unit's tiles are those in which some row of its block sees some token; one that sees nothing has one empty tile,
 * so that its output is somebody's. All of it is derived from the live lengths, by every warp for itself: a lane sums
 * a stretch of sequences, the lanes' sums are scanned. Where all units are alike, a share may be rounded up to cut
 * fewer of them, since a cut unit costs a merge.
 *
 * A worker first does its last run if that is cut off at the share's end, then the rest in order: so units that were
 * cut are merged while others are still being loaded, and not after all.
 *
 * In batch_invariant mode a unit begins and ends at whole chunks of ATTN_CHUNK_TOKENS, with empty tiles where there is
 * nothing to see, and shares are whole chunks.
 */
#ifndef ATTND_KERNELS_CUDA_LINE_CUH
#define ATTND_KERNELS_CUDA_LINE_CUH

#include "kernels/cuda/decode.h"
#include "kernels/cuda/results.cuh"

namespace line {

constexpr uint32_t ALL_LANES = 0xffffffffu;

/* How the rows and the line of a call are cut, besides the kernel's own tile. */
struct cut {
    uint32_t block_queries;
    uint32_t align_tiles, whole_workers, whole_tiles; /* attn_cuda_tuning */
};

/* ------------------------------------------------------------------------------------------- */
/* Sequences */

__device__ inline attn_cuda_sequence sequence_at(const attn_cuda_call &call, uint32_t i) {
    if (call.sequences != nullptr) return call.sequences[i];
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

/* Tiles that a worker takes together. */
template <uint32_t TOKENS> __device__ inline uint32_t tiles_a_chunk(const attn_cuda_call &call) {
    return call.batch_invariant ? ATTN_CHUNK_TOKENS / TOKENS : 1;
}

template <uint32_t TOKENS>
__device__ inline extent extent_of_tokens(const attn_cuda_call &call, uint32_t begin, uint32_t end) {
    uint32_t chunk = tiles_a_chunk<TOKENS>(call), tokens = chunk * TOKENS;
    extent found;
    found.begin = begin;
    found.end = end;
    found.first_token = begin / tokens * tokens;
    uint32_t chunks = (end - found.first_token + tokens - 1) / tokens;
    found.tiles = max(begin < end ? chunks : 1, 1) * chunk;
    return found;
}

__device__ inline uint32_t blocks_of(const attn_cuda_sequence &sequence, const cut &cut) {
    return (sequence.query_length + cut.block_queries - 1) / cut.block_queries;
}

template <uint32_t TOKENS>
__device__ inline extent extent_of_block(const attn_cuda_call &call, const attn_cuda_sequence &sequence,
                                         const cut &cut, uint32_t block) {
    if (call.sequences == nullptr && call.window == 0) return extent_of_tokens<TOKENS>(call, 0, sequence.length);
    uint32_t first = block * cut.block_queries;
    uint32_t last = min(first + cut.block_queries, sequence.query_length) - 1;
    uint32_t begin = results::row_visible(sequence, call.window, first).x;
    uint32_t end = results::row_visible(sequence, call.window, last).y;
    return extent_of_tokens<TOKENS>(call, min(begin, end), end);
}

/* Tiles of one KV head of a sequence. */
template <uint32_t TOKENS>
__device__ inline uint32_t tiles_a_head(const attn_cuda_call &call, const attn_cuda_sequence &sequence,
                                        const cut &cut) {
    uint32_t tiles = 0;
    for (uint32_t block = 0; block < blocks_of(sequence, cut); block++) {
        tiles += extent_of_block<TOKENS>(call, sequence, cut, block).tiles;
    }
    return tiles;
}

template <uint32_t TOKENS>
__device__ inline uint32_t tiles_a_head_at(const attn_cuda_call &call, const cut &cut, uint32_t i) {
    if (call.sequences == nullptr && call.window == 0) {
        return extent_of_tokens<TOKENS>(call, 0, __ldg(&call.lengths[i])).tiles;
    }
    return tiles_a_head<TOKENS>(call, sequence_at(call, i), cut);
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
    uint32_t least, most; /* tiles of a unit, if each sequence has one a head; else least is 0 */
};

__device__ inline uint32_t scan_lanes(uint32_t value, uint32_t lane) {
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t before = __shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += before;
    }
    return value;
}

template <uint32_t TOKENS>
__device__ inline scan scan_batch(const attn_cuda_call &call, const cut &cut, uint32_t lane) {
    scan found;
    found.stretch = (call.batch + 31) / 32;
    found.own = 0;
    found.least = UINT32_MAX;
    found.most = 0;
    uint32_t first = lane * found.stretch;
    for (uint32_t i = first; i < first + found.stretch && i < call.batch; i++) {
        uint32_t tiles = tiles_a_head_at<TOKENS>(call, cut, i);
        found.own += tiles;
        found.least = min(found.least, tiles);
        found.most = max(found.most, tiles);
    }
    if (call.sequences != nullptr) found.least = 0;
    found.through = scan_lanes(found.own, lane);
    return found;
}

/* The sequence in which tile `tile` of the line lies. By a whole warp, the same tile in all lanes. */
template <uint32_t TOKENS>
__device__ inline position locate(const attn_cuda_call &call, const cut &cut, const scan &scan, uint32_t tile,
                                  uint32_t lane) {
    uint32_t heads = call.layer.heads_kv;
    uint32_t owner = __ffs(__ballot_sync(ALL_LANES, tile < scan.through * heads)) - 1;
    position found = {owner * scan.stretch, __shfl_sync(ALL_LANES, (scan.through - scan.own) * heads, owner)};
    if (scan.stretch == 1) return found;
    for (;;) { /* 32 sequences of the stretch at a time */
        uint32_t i = found.sequence + lane;
        uint32_t tiles = i < call.batch ? tiles_a_head_at<TOKENS>(call, cut, i) * heads : 0;
        uint32_t until = scan_lanes(tiles, lane);
        uint32_t holds = __ballot_sync(ALL_LANES, tile < found.begin + until);
        if (holds != 0) {
            owner = __ffs(holds) - 1;
            found.sequence += owner;
            found.begin += __shfl_sync(ALL_LANES, until - tiles, owner);
            return found;
        }
        found.begin += __shfl_sync(ALL_LANES, until, 31);
        found.sequence += 32;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Units */

struct unit {
    uint32_t sequence, head, block;
    uint32_t begin; /* its first tile in the line */
    extent sees;
    attn_cuda_sequence of;
};

template <uint32_t TOKENS>
__device__ inline void load_unit(unit &found, const attn_cuda_call &call, const cut &cut) {
    found.sees = extent_of_block<TOKENS>(call, found.of, cut, found.block);
}

/* The unit of tile `tile`, which lies in the sequence at `place`. */
template <uint32_t TOKENS>
__device__ inline unit unit_at(const attn_cuda_call &call, const cut &cut, const position &place, uint32_t tile) {
    unit found;
    found.sequence = place.sequence;
    found.of = sequence_at(call, place.sequence);
    found.block = 0;
    load_unit<TOKENS>(found, call, cut);
    uint32_t a_head = call.sequences == nullptr ? found.sees.tiles : tiles_a_head<TOKENS>(call, found.of, cut);
    found.head = (tile - place.begin) / a_head;
    found.begin = place.begin + found.head * a_head;
    while (tile >= found.begin + found.sees.tiles) {
        found.begin += found.sees.tiles;
        found.block++;
        load_unit<TOKENS>(found, call, cut);
    }
    return found;
}

/* The unit after. There must be one. */
template <uint32_t TOKENS> __device__ inline void next_unit(unit &found, const attn_cuda_call &call, const cut &cut) {
    found.begin += found.sees.tiles;
    if (call.sequences != nullptr && found.block + 1 < blocks_of(found.of, cut)) {
        found.block++;
        load_unit<TOKENS>(found, call, cut);
        return;
    }
    found.block = 0;
    if (++found.head == call.layer.heads_kv) {
        found.head = 0;
        found.of = sequence_at(call, ++found.sequence);
        load_unit<TOKENS>(found, call, cut);
    } else if (call.sequences != nullptr) {
        load_unit<TOKENS>(found, call, cut);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Shares */

/* A worker's share begin .. end - 1, which it does in the order turn .. end - 1, begin .. turn - 1. */
struct share {
    uint32_t begin, end, turn;
    uint32_t tiles_a_worker;        /* worker w begins at w * this */
    position at_begin, at_turn;
};

/* An equal share, or where all units are alike maybe a larger one that cuts none, or all into equal parts. */
__device__ inline uint32_t choose_share(uint32_t total, uint32_t workers, uint32_t least, uint32_t most,
                                        const cut &cut) {
    uint32_t equal = (total + workers - 1) / workers;
    if (least != most) return equal;
    uint32_t unit = most;
    uint32_t whole = (equal + unit - 1) / unit * unit;
    if (whole <= equal + cut.align_tiles || (whole <= cut.whole_tiles && total / whole >= cut.whole_workers))
        return whole;
    uint32_t parts = unit / equal;
    if (parts < 2) return equal;
    uint32_t aligned = (unit + parts - 1) / parts;
    return aligned <= equal + cut.align_tiles ? aligned : equal;
}

/* By a whole warp; the same in all lanes. */
template <uint32_t TOKENS>
__device__ inline share find_share(const attn_cuda_call &call, const cut &cut, uint32_t workers, uint32_t worker,
                                   uint32_t lane) {
    scan batch = scan_batch<TOKENS>(call, cut, lane);
    uint32_t total = __shfl_sync(ALL_LANES, batch.through, 31) * call.layer.heads_kv;
    uint32_t chunk = tiles_a_chunk<TOKENS>(call);
#if __CUDA_ARCH__ >= 800
    uint32_t least = __reduce_min_sync(ALL_LANES, batch.least), most = __reduce_max_sync(ALL_LANES, batch.most);
#else
    uint32_t least = 0, most = 1;
#endif
    share mine;
    uint32_t tiles = choose_share(total, workers, least, most, cut);
    mine.tiles_a_worker = (tiles + chunk - 1) / chunk * chunk;
    uint64_t begin = (uint64_t)worker * mine.tiles_a_worker;
    mine.begin = begin < total ? (uint32_t)begin : total;
    mine.end = min(total, mine.begin + mine.tiles_a_worker);
    mine.turn = mine.end;
    mine.at_begin = mine.at_turn = {0, 0};
    if (mine.begin == mine.end) return mine;
    mine.at_begin = locate<TOKENS>(call, cut, batch, mine.begin, lane);
    if (call.batch_invariant) return mine;
    mine.at_turn = locate<TOKENS>(call, cut, batch, mine.end - 1, lane);
    unit last = unit_at<TOKENS>(call, cut, mine.at_turn, mine.end - 1);
    if (last.begin > mine.begin && last.begin + last.sees.tiles > mine.end) mine.turn = last.begin;
    return mine;
}

/* The i-th tile that the worker does, in the line. */
__device__ inline uint32_t tile_in_turn(const share &mine, uint32_t i) {
    uint32_t last_run = mine.end - mine.turn;
    return i < last_run ? mine.turn + i : mine.begin + (i - last_run);
}

} /* namespace line */

#endif
