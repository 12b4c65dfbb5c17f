/*
 * The producer: one warp of a block walks the block's share of the line and keeps a ring of stages filled. A stage is
 * a tile of TOKENS tokens of one KV head: blocks of tokens as they lie in the pool (layout.cuh), keys and values, one
 * after the other. From sm_90 on a block of a page is a bulk copy; before, the warp's lanes copy 16 bytes at a time.
 *
 * A tile that new rows belong to is stored to the pool by its producer before it is copied. Several blocks may hold
 * tiles of the same tokens (row blocks of one sequence), and a tall block has two producers (wide.cuh): all write the
 * same bytes.
 */
#ifndef ATTND_KERNELS_CUDA_PRODUCE_CUH
#define ATTND_KERNELS_CUDA_PRODUCE_CUH

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/layout.cuh"
#include "kernels/cuda/line.cuh"

namespace produce {

using layout::PIECE_BYTES;
using line::ALL_LANES;

/* The ring: addresses in the shared window. */
struct ring {
    uint32_t memory;
    uint32_t full, empty; /* barriers, 8 bytes a stage */
    uint32_t stages;
    uint32_t stage_bytes;
};

/* Arrivals that a `full` barrier is made for. */
__device__ constexpr uint32_t full_arrivals() {
#if __CUDA_ARCH__ >= 900
    return 1;
#else
    return 32;
#endif
}

/* A stage and the parity of its filling, as they go round; of who fills it, the other parity. */
struct ring_place {
    uint32_t stage, parity;

    __device__ void advance(const ring &ring) {
        if (++stage == ring.stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* What a stage is filled from. */
template <uint32_t TOKENS> struct tile_source {
    static constexpr uint32_t MAX_BLOCKS = TOKENS / 16;
    uint32_t pages[MAX_BLOCKS];  /* of its blocks of tokens; not looked at before they are needed */
    uint32_t first_block;        /* of the sequence */
    uint32_t tokens;             /* live ones of the tile; 0: nothing to copy */
    uint32_t new_begin, new_end; /* rows of the tile that are new.. */
    uint32_t first_new;          /* ..and the first of them among all new rows */
    uint32_t head;
};

/* A lane's place in the line: the sequence it is in. */
struct lane_walk {
    line::position at;
    attn_cuda_sequence sequence;
    uint32_t tiles; /* of the sequence */
};

template <typename L>
__device__ inline void enter_sequence(lane_walk &walk, const attn_cuda_call &call, const line::cut &cut) {
    walk.sequence = line::sequence_at<L>(call, walk.at.sequence);
    uint32_t a_head = L::SIMPLE ? line::extent_of_sequence<L>(call, cut, walk.sequence.length).tiles
                                : line::tiles_a_head<L>(call, cut, walk.at.sequence);
    walk.tiles = a_head * call.layer.heads_kv;
}

/* Fills in all but the head: tile `within` of a row block that sees `sees`. */
template <uint32_t TOKENS>
__device__ inline void find_source(tile_source<TOKENS> &source, const attn_cuda_call &call, const line::cut &cut,
                                   const attn_cuda_sequence &sequence, const line::extent &sees, uint32_t within) {
    uint32_t first = sees.first_token + within * TOKENS;
    bool is_seen = first < sees.end && first + TOKENS > sees.begin;
    source.tokens = is_seen ? min(TOKENS, sees.end - first) : 0;

    const uint32_t *table = call.page_table + sequence.page_offset;
    source.first_block = first >> cut.block_shift;
#pragma unroll
    for (uint32_t i = 0; i < tile_source<TOKENS>::MAX_BLOCKS; i++) {
        source.pages[i] = 0;
        if (i > 0 && i << cut.block_shift >= TOKENS) continue; /* known of the launch */
        if (i << cut.block_shift < source.tokens) {
            source.pages[i] = __ldg(&table[(source.first_block + i) >> (cut.page_shift - cut.block_shift)]);
        }
    }
    uint32_t old_rows = sequence.length - sequence.new_rows;
    source.new_begin = min(max(first, old_rows) - first, source.tokens);
    source.new_end = sequence.new_rows > 0 ? source.tokens : source.new_begin;
    source.first_new = sequence.first_new + first + source.new_begin - old_rows;
}

template <typename L>
__device__ inline tile_source<L::TOKENS> locate_tile(const attn_cuda_call &call, const line::cut &cut, lane_walk &walk,
                                                     uint32_t tile) {
    constexpr uint32_t TOKENS = L::TOKENS;
    while (tile - walk.at.begin >= walk.tiles) {
        walk.at.begin += walk.tiles;
        walk.at.sequence++;
        enter_sequence<L>(walk, call, cut);
    }
    const attn_cuda_sequence &sequence = walk.sequence;
    tile_source<TOKENS> source;
    uint32_t within = tile - walk.at.begin;
    line::extent sees = line::extent_of_block<L>(call, sequence, cut, 0);
    uint32_t a_head = L::SIMPLE ? sees.tiles : walk.tiles / call.layer.heads_kv;
    source.head = L::SIMPLE ? line::divide(within, a_head) : within / a_head;
    within -= source.head * a_head;
    if (!L::SIMPLE && line::are_blocks_alike(call, sequence)) within %= sees.tiles;
    for (uint32_t block = 1; !L::SIMPLE && within >= sees.tiles; block++) {
        within -= sees.tiles;
        sees = line::extent_of_block<L>(call, sequence, cut, block);
    }
    find_source(source, call, cut, sequence, sees, within);
    return source;
}

/* Does a tile lead outside the pool? Then says so. */
template <uint32_t TOKENS>
__device__ inline bool is_outside(const attn_cuda_call &call, const tile_source<TOKENS> &source) {
    bool outside = false;
#pragma unroll
    for (uint32_t i = 0; i < tile_source<TOKENS>::MAX_BLOCKS; i++) {
        outside |= source.pages[i] >= call.layer.pages;
    }
    if (outside) *call.status = 1;
    return outside;
}

/* A block of tokens of the tile, in the pool. */
__device__ inline char *find_block(const attn_cuda_call &call, const line::cut &cut, uint32_t page, uint32_t head,
                                   uint32_t block) {
    uint32_t in_page = block & ((1u << (cut.page_shift - cut.block_shift)) - 1);
    return call.layer.memory + ((size_t)page * call.layer.heads_kv + head) * call.layer.tile_bytes +
           in_page * cut.block_bytes;
}

/* ------------------------------------------------------------------------------------------- */
/* New rows */

/* New rows that go to rows begin .. end - 1 of a block of tokens in the pool. */
struct new_rows {
    char *block;
    uint32_t begin, end;
    size_t first; /* among all new rows x heads */
    uint32_t head;
};

/* Stores them, a piece a lane. By the whole warp; not inlined, since it has to be done once a sequence. */
template <typename KV>
__device__ __noinline__ void store_rows(const attn_cuda_call &call, uint32_t block_tokens, new_rows rows,
                                        uint32_t lane) {
    const attn_cuda_layer &layer = call.layer;
    uint32_t key_bytes = layer.head_dim * KV::BYTES, value_bytes = layer.head_dim_v * KV::BYTES;
    uint32_t key_pieces = key_bytes / PIECE_BYTES, pieces = key_pieces + value_bytes / PIECE_BYTES;
    for (uint32_t row = rows.begin; row < rows.end; row++) {
        size_t new_row = rows.first + (size_t)(row - rows.begin) * layer.heads_kv;
        for (uint32_t piece = lane; piece < pieces; piece += 32) {
            bool is_value = piece >= key_pieces;
            uint32_t of_row = is_value ? piece - key_pieces : piece;
            const float *scales = is_value ? layer.value_scales : layer.key_scales;
            uint4 stored = KV::load_new(layer, is_value ? call.values : call.keys,
                                        new_row * (is_value ? layer.head_dim_v : layer.head_dim), of_row,
                                        scales != nullptr ? scales[rows.head] : 1.0f);
            uint32_t at = layout::piece_offset(is_value ? value_bytes : key_bytes, block_tokens, row, of_row);
            *(uint4 *)(rows.block + (is_value ? block_tokens * key_bytes : 0) + at) = stored;
        }
    }
}

/* Stores the new rows of the tiles that the lanes have found, before any of them is copied. */
template <typename KV, uint32_t TOKENS>
__device__ inline void store_new_rows(const attn_cuda_call &call, const line::cut &cut,
                                      const tile_source<TOKENS> &source, uint32_t lane) {
    uint32_t owners = __ballot_sync(ALL_LANES, source.new_begin < source.new_end);
    if (owners == 0) return;
    for (; owners != 0; owners &= owners - 1) {
        uint32_t owner = __ffs(owners) - 1;
        uint32_t begin = __shfl_sync(ALL_LANES, source.new_begin, owner);
        uint32_t end = __shfl_sync(ALL_LANES, source.new_end, owner);
        uint32_t first_new = __shfl_sync(ALL_LANES, source.first_new, owner);
        uint32_t head = __shfl_sync(ALL_LANES, source.head, owner);
        uint32_t first_block = __shfl_sync(ALL_LANES, source.first_block, owner);
#pragma unroll
        for (uint32_t b = 0; b < tile_source<TOKENS>::MAX_BLOCKS; b++) {
            uint32_t page = __shfl_sync(ALL_LANES, source.pages[b], owner);
            uint32_t block_begin = b << cut.block_shift, block_end = (b + 1) << cut.block_shift;
            uint32_t from = max(begin, block_begin), to = min(end, block_end);
            if (from >= to || page >= call.layer.pages) continue;
            char *block = find_block(call, cut, page, head, first_block + b);
            size_t first = ((size_t)first_new + from - begin) * call.layer.heads_kv + head;
            store_rows<KV>(call, 1u << cut.block_shift, {block, from - block_begin, to - block_begin, first, head},
                           lane);
        }
    }
#if __CUDA_ARCH__ >= 900
    ptx::async_proxy_fence();
#endif
    __syncwarp();
}

/* ------------------------------------------------------------------------------------------- */
/* Filling a stage */

/* What a stage has of its tile. */
enum class content { ALL, KEYS, VALUES };

/*
 * The geometry of a stage. GATHERED: one block of TOKENS tokens, whatever a page holds; else blocks of as many tokens
 * as in the pool. What has only keys, or only values, is gathered. SHARERS: blocks of a cluster that have the same
 * tiles; each copies some columns of a tile to all of them. APART: values have barriers of their own, so many bytes
 * behind those of keys; 0: they have them together.
 */
template <typename KV_, uint32_t DIM, uint32_t DIM_V, uint32_t TOKENS_, bool GATHERED_, content HAS = content::ALL,
          uint32_t SHARERS_ = 1, uint32_t APART_ = 0>
struct stage_shape {
    using KV = KV_;
    static constexpr uint32_t TOKENS = TOKENS_, SHARERS = SHARERS_, APART = APART_;
    static_assert(SHARERS == 1 || HAS != content::ALL, "");
    static constexpr bool GATHERED = GATHERED_;
    static constexpr bool HAS_KEYS = HAS != content::VALUES, HAS_VALUES = HAS != content::KEYS;
    static_assert(GATHERED || (HAS_KEYS && HAS_VALUES), "");
    static constexpr uint32_t KEY_BYTES = DIM * KV::BYTES, VALUE_BYTES = DIM_V * KV::BYTES;
    static constexpr uint32_t KEY_CHUNK = layout::chunk_bytes(KEY_BYTES),
                              VALUE_CHUNK = layout::chunk_bytes(VALUE_BYTES);
    static constexpr uint32_t ROW_BYTES = (HAS_KEYS ? KEY_BYTES : 0) + (HAS_VALUES ? VALUE_BYTES : 0);
    static constexpr uint32_t VALUES_AT = HAS_KEYS ? TOKENS * KEY_BYTES : 0; /* in a gathered stage */
    static constexpr uint32_t BYTES = TOKENS * ROW_BYTES;
};

/* Where a block of tokens that begins at row `row` of the tile goes in a stage. */
struct block_place {
    uint32_t keys, values;             /* first row of the first chunk */
    uint32_t key_stride, value_stride; /* from chunk to chunk */
};

template <typename S> __device__ inline block_place place_block(uint32_t stage, uint32_t row, uint32_t block_tokens) {
    if (S::GATHERED) {
        return {stage + row * S::KEY_CHUNK, stage + S::VALUES_AT + row * S::VALUE_CHUNK, S::TOKENS * S::KEY_CHUNK,
                S::TOKENS * S::VALUE_CHUNK};
    }
    uint32_t keys = stage + row * (S::KEY_BYTES + S::VALUE_BYTES);
    return {keys, keys + block_tokens * S::KEY_BYTES, block_tokens * S::KEY_CHUNK, block_tokens * S::VALUE_CHUNK};
}

/*
 * Starts the bulk copies of some columns of a block's rows, to all sharers: those that are this one's to copy.
 * `number`: of the block, in the tile.
 */
template <typename S, uint32_t CHUNKS>
__device__ inline void copy_shared_columns(uint32_t to, uint32_t stride, const char *from, uint32_t from_stride,
                                           uint32_t bytes, uint32_t number, uint32_t full, uint64_t policy) {
#pragma unroll
    for (uint32_t c = 0; c < CHUNKS; c++) {
        if ((number * CHUNKS + c) % S::SHARERS != blockIdx.x % S::SHARERS) continue;
        ptx::bulk_copy_to_blocks(to + c * stride, from + c * from_stride, bytes, full, (1u << S::SHARERS) - 1, policy);
    }
}

/* Starts bulk copies of the first `rows` rows of a block, the tile's `number`-th. By one thread. */
template <typename S>
__device__ inline void copy_block(const block_place &to, const char *from, uint32_t block_tokens, uint32_t rows,
                                  uint32_t number, uint32_t full, uint64_t policy) {
    if constexpr (S::SHARERS > 1) {
        constexpr uint32_t CHUNK = S::HAS_KEYS ? S::KEY_CHUNK : S::VALUE_CHUNK;
        uint32_t skipped = S::HAS_KEYS ? 0 : block_tokens * S::KEY_BYTES;
        copy_shared_columns<S, S::ROW_BYTES / CHUNK>(S::HAS_KEYS ? to.keys : to.values,
                                                     S::HAS_KEYS ? to.key_stride : to.value_stride, from + skipped,
                                                     block_tokens * CHUNK, rows * CHUNK, number, full, policy);
        return;
    }
    constexpr bool HAS_ALL = S::HAS_KEYS && S::HAS_VALUES && S::APART == 0;
    if (HAS_ALL && rows == block_tokens && (!S::GATHERED || block_tokens == S::TOKENS)) {
        ptx::bulk_copy(to.keys, from, rows * (S::KEY_BYTES + S::VALUE_BYTES), full, policy);
        return;
    }
    const char *values = from + block_tokens * S::KEY_BYTES;
#pragma unroll
    for (uint32_t c = 0; S::HAS_KEYS && c < S::KEY_BYTES / S::KEY_CHUNK; c++) {
        ptx::bulk_copy(to.keys + c * to.key_stride, from + c * block_tokens * S::KEY_CHUNK, rows * S::KEY_CHUNK, full,
                       policy);
    }
#pragma unroll
    for (uint32_t c = 0; S::HAS_VALUES && c < S::VALUE_BYTES / S::VALUE_CHUNK; c++) {
        ptx::bulk_copy(to.values + c * to.value_stride, values + c * block_tokens * S::VALUE_CHUNK,
                       rows * S::VALUE_CHUNK, full + S::APART, policy);
    }
}

/* Says how many tokens' bytes will arrive at a stage. By one thread. */
template <typename S> __device__ inline void expect_tokens(uint32_t full, uint32_t tokens) {
    if constexpr (S::APART != 0) {
        ptx::barrier_arrive_expect(full, tokens * S::KEY_BYTES);
        ptx::barrier_arrive_expect(full + S::APART, tokens * S::VALUE_BYTES);
    } else {
        ptx::barrier_arrive_expect(full, tokens * S::ROW_BYTES);
    }
}

/* Nothing is copied. */
template <typename S> __device__ inline void expect_nothing(uint32_t full) {
    ptx::barrier_arrive(full);
    if (S::APART != 0) ptx::barrier_arrive(full + S::APART);
}

/* Starts the bulk copies of a tile. By the lane that found it. */
template <typename S>
__device__ inline void fill_stage(const attn_cuda_call &call, const line::cut &cut,
                                  const tile_source<S::TOKENS> &source, uint32_t stage, uint32_t full,
                                  uint64_t policy) {
    if (source.tokens == 0 || is_outside<S::TOKENS>(call, source)) {
        expect_nothing<S>(full);
        return;
    }
    expect_tokens<S>(full, source.tokens);
    uint32_t block_tokens = 1u << cut.block_shift;
#pragma unroll
    for (uint32_t i = 0; i < tile_source<S::TOKENS>::MAX_BLOCKS; i++) {
        uint32_t row = i << cut.block_shift;
        if (row >= source.tokens) break;
        const char *from = find_block(call, cut, source.pages[i], source.head, source.first_block + i);
        copy_block<S>(place_block<S>(stage, row, block_tokens), from, block_tokens,
                      min(block_tokens, source.tokens - row), i, full, policy);
    }
}

/*
 * The same by the whole warp, of the tile that lane `owner` has found: a lane a block. Where a page is small a tile has
 * many, and one lane that starts one copy after the other would not keep up.
 */
template <typename S>
__device__ inline void fill_stage_by_lanes(const attn_cuda_call &call, const line::cut &cut,
                                           const tile_source<S::TOKENS> &source, uint32_t owner, uint32_t stage,
                                           uint32_t full, uint64_t policy, uint32_t lane) {
    uint32_t tokens = __shfl_sync(ALL_LANES, source.tokens, owner), row = lane << cut.block_shift, page = 0;
    uint32_t head = __shfl_sync(ALL_LANES, source.head, owner);
    uint32_t first_block = __shfl_sync(ALL_LANES, source.first_block, owner);
#pragma unroll
    for (uint32_t b = 0; b < tile_source<S::TOKENS>::MAX_BLOCKS; b++) {
        uint32_t found = __shfl_sync(ALL_LANES, source.pages[b], owner);
        if (lane == b) page = found;
    }
    bool is_live = row < tokens;
    if (__any_sync(ALL_LANES, is_live && page >= call.layer.pages)) {
        *call.status = 1;
        tokens = 0;
    }
    if (lane == 0 && tokens == 0) expect_nothing<S>(full);
    if (lane == 0 && tokens > 0) expect_tokens<S>(full, tokens);
    __syncwarp();
    if (!is_live || tokens == 0) return;
    uint32_t block_tokens = 1u << cut.block_shift;
    copy_block<S>(place_block<S>(stage, row, block_tokens), find_block(call, cut, page, head, first_block + lane),
                  block_tokens, min(block_tokens, tokens - row), lane, full, policy);
}

/* Starts the copies of a block's first `rows` rows, of its keys or of its values. By one thread. */
template <uint32_t ROW_BYTES, uint32_t CHUNK>
__device__ inline void copy_columns(uint32_t to, const char *from, uint32_t block_tokens, uint32_t rows, uint32_t full,
                                    uint64_t policy) {
    ptx::barrier_arrive_expect(full, rows * ROW_BYTES);
    if (rows == block_tokens) {
        ptx::bulk_copy(to, from, rows * ROW_BYTES, full, policy);
        return;
    }
#pragma unroll
    for (uint32_t c = 0; c < ROW_BYTES / CHUNK && rows > 0; c++) {
        uint32_t at = c * block_tokens * CHUNK;
        ptx::bulk_copy(to + at, from + at, rows * CHUNK, full, policy);
    }
}

/*
 * Fills a stage of which values have barriers of their own, with the tile that lane `owner` has found, as it is emptied
 * (parity `parity`): keys of a tile that is one block are asked for as soon as those before them have been consumed. By
 * the whole warp.
 */
template <typename S>
__device__ inline void
fill_stage_apart(const attn_cuda_call &call, const line::cut &cut, const tile_source<S::TOKENS> &source, uint32_t owner,
                 uint32_t stage, uint32_t full, uint32_t empty, uint32_t parity, uint64_t policy, uint32_t lane) {
    if (cut.block_shift < 6) {
        ptx::barrier_wait(empty, parity);
        ptx::barrier_wait(empty + S::APART, parity);
        fill_stage_by_lanes<S>(call, cut, source, owner, stage, full, policy, lane);
        return;
    }
    static_assert(S::TOKENS == 64, "a block of 1 << 6 tokens, or more, is a tile");
    if (lane != owner) return;
    uint32_t tokens = is_outside<S::TOKENS>(call, source) ? 0 : source.tokens;
    const char *keys = find_block(call, cut, source.pages[0], source.head, source.first_block);
    const char *values = keys + S::TOKENS * S::KEY_BYTES;
    ptx::barrier_wait(empty, parity);
    copy_columns<S::KEY_BYTES, S::KEY_CHUNK>(stage, keys, S::TOKENS, tokens, full, policy);
    ptx::barrier_wait(empty + S::APART, parity);
    copy_columns<S::VALUE_BYTES, S::VALUE_CHUNK>(stage + S::VALUES_AT, values, S::TOKENS, tokens, full + S::APART,
                                                 policy);
}

/* In pieces of 16 bytes, by the whole warp, of the tile that lane `owner` has found. */
template <typename S>
__device__ inline void fill_stage_in_pieces(const attn_cuda_call &call, const line::cut &cut,
                                            const tile_source<S::TOKENS> &source, uint32_t owner, uint32_t stage,
                                            uint32_t full, uint32_t lane) {
    uint32_t head = __shfl_sync(ALL_LANES, source.head, owner);
    uint32_t first_block = __shfl_sync(ALL_LANES, source.first_block, owner);
    uint32_t outside = lane == owner ? is_outside<S::TOKENS>(call, source) : 0;
    uint32_t tokens = __shfl_sync(ALL_LANES, source.tokens, owner);
    if (__shfl_sync(ALL_LANES, outside, owner)) tokens = 0;
    uint32_t block_tokens = 1u << cut.block_shift;
#pragma unroll
    for (uint32_t b = 0; b < tile_source<S::TOKENS>::MAX_BLOCKS; b++) {
        uint32_t page = __shfl_sync(ALL_LANES, source.pages[b], owner);
        if (b * block_tokens >= tokens) continue;
        const char *from = find_block(call, cut, page, head, first_block + b);
        uint32_t rows = min(block_tokens, tokens - b * block_tokens);
        block_place to = place_block<S>(stage, b * block_tokens, block_tokens);
        constexpr uint32_t KEY_PIECES = S::KEY_CHUNK / PIECE_BYTES, VALUE_PIECES = S::VALUE_CHUNK / PIECE_BYTES;
        for (uint32_t c = 0; c < S::KEY_BYTES / S::KEY_CHUNK; c++) {
            const char *chunk = from + c * block_tokens * S::KEY_CHUNK;
            for (uint32_t i = lane; i < rows * KEY_PIECES; i += 32) {
                ptx::copy_16_bytes(to.keys + c * to.key_stride + i * PIECE_BYTES, chunk + i * PIECE_BYTES);
            }
        }
        for (uint32_t c = 0; c < S::VALUE_BYTES / S::VALUE_CHUNK; c++) {
            const char *chunk = from + block_tokens * (S::KEY_BYTES + c * S::VALUE_CHUNK);
            for (uint32_t i = lane; i < rows * VALUE_PIECES; i += 32) {
                ptx::copy_16_bytes(to.values + c * to.value_stride + i * PIECE_BYTES, chunk + i * PIECE_BYTES);
            }
        }
    }
    ptx::barrier_arrive_after_copies(full);
}

/* ------------------------------------------------------------------------------------------- */
/* The warp's work */

/* The tiles of a share, as a lane finds some of them, one after the other. */
struct share_walk {
    lane_walk walk;
    bool has_entered, in_last_run;
};

/* The i-th tile that the worker does, which comes after the lane's last one; nothing if there is none. */
template <typename L>
__device__ inline tile_source<L::TOKENS> find_tile(const attn_cuda_call &call, const line::cut &cut,
                                                   const line::share &mine, share_walk &along, uint32_t i) {
    if (i >= mine.end - mine.begin) return {};
    bool is_of_last_run = i < mine.end - mine.turn;
    if (!along.has_entered || (along.in_last_run && !is_of_last_run)) {
        along.has_entered = true;
        along.in_last_run = is_of_last_run;
        along.walk.at = is_of_last_run ? mine.at_turn : mine.at_begin;
        enter_sequence<L>(along.walk, call, cut);
    }
    return locate_tile<L>(call, cut, along.walk, line::tile_in_turn(mine, i));
}

/*
 * Of a simple call: moves from a place in the line to the sequence that a tile behind it belongs to. `length`,
 * `head_tiles`: the sequence's, and how many tiles each of its heads has.
 */
template <typename L>
__device__ inline void find_sequence(line::position &at, uint32_t &length, uint32_t &head_tiles,
                                     const attn_cuda_call &call, const line::cut &cut, uint32_t tile) {
#pragma unroll 1
    for (;;) {
        length = __ldg(&call.lengths[at.sequence]);
        head_tiles = line::extent_of_sequence<L>(call, cut, length).tiles;
        uint32_t tiles = head_tiles * call.layer.heads_kv;
        if (tile - at.begin < tiles) break;
        at.begin += tiles;
        at.sequence++;
    }
    __syncwarp();
}

/* The page of a simple call's token. */
__device__ inline uint32_t load_page(const attn_cuda_call &call, const line::cut &cut, uint32_t sequence,
                                     uint32_t token) {
    uint32_t offset =
        call.page_offsets != nullptr ? __ldg(&call.page_offsets[sequence]) : sequence * call.page_table_stride;
    return __ldg(&call.page_table[offset + (token >> cut.page_shift)]);
}

/*
 * Starts the copies of a share's first tiles, as many as the ring has stages, and returns how many. A lane finds a
 * block of one of them and copies it, so that no lane has more to do than one page's: until the first copies are
 * started nothing else of a launch is under way. Of simple calls; tiles that new rows belong to, and those after, are
 * left.
 */
template <typename S, typename L>
__device__ inline uint32_t fill_first_stages(const attn_cuda_call &call, const line::cut &cut, const line::share &mine,
                                             const ring &ring, uint64_t policy, uint32_t lane) {
    static_assert(L::SIMPLE && (L::TOKENS == 64 || L::TOKENS == 128), "");
    constexpr uint32_t TOKEN_SHIFT = L::TOKENS == 64 ? 6 : 7;
    bool turns = mine.turn != mine.end;
    uint32_t begin = turns ? mine.turn : mine.begin, count = min(ring.stages, mine.end - begin);
    uint32_t tile_shift = TOKEN_SHIFT - cut.block_shift, stage = lane >> tile_shift; /* log2 of a tile's blocks */
    count = min(count, 32u >> tile_shift);
    uint32_t tile = begin + min(stage, count - 1);
    line::position at = mine.at_begin;
    if (turns) at = mine.at_turn;
    uint32_t length, unit;
    find_sequence<L>(at, length, unit, call, cut, tile);
    uint32_t within = tile - at.begin, head = line::divide(within, unit);
    uint32_t first = (within - head * unit) << TOKEN_SHIFT,
             tokens = first < length ? min(L::TOKENS, length - first) : 0;
    uint32_t has_new = __ballot_sync(ALL_LANES, call.keys != nullptr && tokens > 0 && first + tokens == length);
    if (has_new != 0) count = min(count, (uint32_t)(__ffs(has_new) - 1) >> tile_shift);

    uint32_t block = lane & ((1u << tile_shift) - 1), row = block << cut.block_shift, page = 0;
    bool is_live = stage < count && row < tokens;
    if (is_live) page = load_page(call, cut, at.sequence, first + row);
    uint32_t outside = __ballot_sync(ALL_LANES, page >= call.layer.pages), tile_lanes = (1u << (1u << tile_shift)) - 1;
    if (outside != 0) {
        *call.status = 1;
        if (outside >> (lane - block) & tile_lanes) tokens = 0;
    }
    uint32_t full = ring.full + stage * 8;
    if (block == 0 && stage < count) {
        if (tokens == 0) {
            expect_nothing<S>(full);
        } else {
            expect_tokens<S>(full, tokens);
        }
    }
    __syncwarp();
    if (is_live && tokens > 0) {
        uint32_t block_tokens = 1u << cut.block_shift;
        copy_block<S>(place_block<S>(ring.memory + stage * ring.stage_bytes, row, block_tokens),
                      find_block(call, cut, page, head, (first + row) >> cut.block_shift), block_tokens,
                      min(block_tokens, tokens - row), block, full, policy);
    }
    __syncwarp();
    return count;
}

/*
 * The lanes find 32 tiles at a time. The next 32 are found while these are being copied, so that page table entries are
 * there before they are needed; but not before the ring has been filled, which is what a launch waits for at its begin.
 * FIRST_BY_LANES: what it is filled with is found and copied by fill_first_stages(); the share is not empty.
 */
template <typename S, typename L, bool FIRST_BY_LANES = false>
__device__ inline void fill_ring(const attn_cuda_call &call, const line::cut &cut, const line::share &mine,
                                 const ring &ring, uint32_t lane) {
    static_assert(S::APART == 0, "fill_ring_apart");
    uint32_t count = mine.end - mine.begin, done = 0;
    share_walk along = {{}, false, true};
    tile_source<S::TOKENS> source = {}, next = {};
    ring_place place = {0, 1};
#if __CUDA_ARCH__ >= 900
    uint64_t policy = ptx::evict_first_policy();
    if constexpr (FIRST_BY_LANES) {
        done = fill_first_stages<S, L>(call, cut, mine, ring, policy, lane);
        count -= done;
        if (count == 0) return;
        place = {done, 1};
        if (done == ring.stages) place = {0, 0};
    }
#endif
    uint32_t looks_at = min(ring.stages, 31u); /* the one of 32 tiles before which the next 32 are found */
#pragma unroll 1
    for (uint32_t base = 0; base < count + 32; base += 32) {
        bool is_first = base == 0; /* nothing is there to be copied */
        uint32_t end = is_first ? 32 : min(32u, count + 32 - base);
#pragma unroll 1
        for (uint32_t j = is_first ? looks_at : 0; j < end; j++) {
            if (j == looks_at) {
                next = find_tile<L>(call, cut, mine, along, done + base + lane);
                store_new_rows<typename S::KV, S::TOKENS>(call, cut, next, lane);
                if (is_first) break;
            }
            uint32_t stage = ring.memory + place.stage * ring.stage_bytes;
#if __CUDA_ARCH__ >= 900
            if (cut.block_shift < 6) {
                ptx::barrier_wait(ring.empty + place.stage * 8, place.parity);
                fill_stage_by_lanes<S>(call, cut, source, j, stage, ring.full + place.stage * 8, policy, lane);
            } else if (lane == j) {
                ptx::barrier_wait(ring.empty + place.stage * 8, place.parity);
                fill_stage<S>(call, cut, source, stage, ring.full + place.stage * 8, policy);
            }
            __syncwarp();
#else
            ptx::barrier_wait(ring.empty + place.stage * 8, place.parity);
            fill_stage_in_pieces<S>(call, cut, source, j, stage, ring.full + place.stage * 8, lane);
#endif
            place.advance(ring);
        }
        source = next;
    }
}

/* The same of a part of a unit, if that is all that the worker has (line::find_block_part). From sm_90 on. */
template <typename S, typename L>
__device__ inline void fill_ring_from_unit(const attn_cuda_call &call, const line::cut &cut, const line::part &part,
                                           const ring &ring, uint32_t lane) {
    uint32_t count = part.mine.end - part.mine.begin;
    uint64_t policy = ptx::evict_first_policy();
    ring_place place = {0, 1};
#pragma unroll 1
    for (uint32_t base = 0; base < count; base += 32) {
        tile_source<S::TOKENS> source = {};
        source.head = part.unit.head;
        uint32_t tile = part.mine.begin + base + lane;
        if (base + lane < count) find_source(source, call, cut, part.unit.of, part.unit.sees, tile);
        store_new_rows<typename S::KV, S::TOKENS>(call, cut, source, lane);
        uint32_t found = min(32u, count - base);
#pragma unroll 1
        for (uint32_t j = 0; j < found; j++) {
            uint32_t stage = ring.memory + place.stage * ring.stage_bytes, full = ring.full + place.stage * 8;
            if (cut.block_shift < 6) {
                ptx::barrier_wait(ring.empty + place.stage * 8, place.parity);
                fill_stage_by_lanes<S>(call, cut, source, j, stage, full, policy, lane);
            } else if (lane == j) {
                ptx::barrier_wait(ring.empty + place.stage * 8, place.parity);
                fill_stage<S>(call, cut, source, stage, full, policy);
            }
            __syncwarp();
            place.advance(ring);
        }
    }
}

/* A part's `i`-th tile, if that is all that the worker has (line::find_part); nothing if there is none. */
template <uint32_t TOKENS>
__device__ inline tile_source<TOKENS> find_tile_of_part(const attn_cuda_call &call, const line::cut &cut,
                                                        const line::part &part, uint32_t i) {
    tile_source<TOKENS> source = {};
    source.head = part.unit.head;
    uint32_t tile = part.mine.begin + i;
    if (tile < part.mine.end) find_source(source, call, cut, part.unit.of, part.unit.sees, tile - part.unit.begin);
    return source;
}

/*
 * Fills a ring of which values have barriers of their own with such a part. `source`: what the lanes have found of its
 * first 32 tiles, a tile each; the next 32 are found when fill_ring() would. From sm_90 on.
 */
template <typename S>
__device__ inline void fill_ring_apart(const attn_cuda_call &call, const line::cut &cut, const line::part &part,
                                       const ring &ring, tile_source<S::TOKENS> source, uint32_t lane) {
    uint32_t count = part.mine.end - part.mine.begin, looks_at = min(ring.stages, 31u);
    uint64_t policy = ptx::evict_first_policy();
    ring_place place = {0, 1};
    tile_source<S::TOKENS> next = {};
    store_new_rows<typename S::KV, S::TOKENS>(call, cut, source, lane);
#pragma unroll 1
    for (uint32_t i = 0; i < count; i++) {
        if (i % 32 == looks_at) {
            next = find_tile_of_part<S::TOKENS>(call, cut, part, i - looks_at + 32 + lane);
            store_new_rows<typename S::KV, S::TOKENS>(call, cut, next, lane);
        }
        fill_stage_apart<S>(call, cut, source, i % 32, ring.memory + place.stage * ring.stage_bytes,
                            ring.full + place.stage * 8, ring.empty + place.stage * 8, place.parity, policy, lane);
        __syncwarp();
        place.advance(ring);
        if (i % 32 == 31) source = next;
    }
}

} /* namespace produce */

#endif
