/*
 * One warp of a block is its producer: it walks the block's share of the line and keeps a ring of 32 KB stages filled
 * with bulk copies. Four warps, a group, consume: each takes 16 of a stage's 64 tokens and keeps its own maximum, sum
 * and output (m, l, O), so that no barrier is needed per tile. There are two groups. Up to 8 query heads a KV head
 * they take turns run by run: while one ends its run, the other has its queries and consumes. Of more query heads,
 * each group has half, and both go over every tile. With a token's keys as the rows of the matrix product,
 *     S^T [16 tokens x 8 queries] = K Q^T        O^T [128 x 8 queries] += V^T P^T
 * only the query rows are padded, to 8, 16 or 32. At the end of a run (the block's tiles of one unit) the
 * four states are merged through shared memory. A run that is a whole unit is written out; any other is a partial, of
 * which a block has two at most, and who brings the unit's ticket to its live number of tiles merges them in order.
 */
#include "kernels/cuda/decode_hopper.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda/decode_hopper.cuh"

/* Other architectures are compiled too, with a kernel that traps: what only its body uses is unused there. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#pragma nv_diag_suppress 177
#endif

namespace {

constexpr uint32_t HEAD_DIM = ATTN_HOPPER_HEAD_DIM;
constexpr uint32_t TILE_TOKENS = ATTN_HOPPER_TILE_TOKENS;
constexpr uint32_t ROW_BYTES = HEAD_DIM * 2;
constexpr uint32_t HALF_STAGE_BYTES = TILE_TOKENS * ROW_BYTES; /* keys; the values follow */
constexpr uint32_t STAGE_BYTES = 2 * HALF_STAGE_BYTES;
constexpr uint32_t CONSUMER_WARPS = TILE_TOKENS / 16; /* of a group */
constexpr uint32_t CONSUMERS = CONSUMER_WARPS * 32;
constexpr uint32_t OUT_STRIDE = HEAD_DIM + 4; /* floats: keeps the four states' rows off each other's banks */
constexpr uint32_t ALL_LANES = 0xffffffffu;

/* What the groups of consumers divide among them: the block's runs, or the query heads. */
enum class division { RUNS, HEADS };
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

/* ------------------------------------------------------------------------------------------- */
/* Memory */

/* What a block keeps in shared memory, behind the ring. */
template <uint32_t ROWS> struct group_memory {
    float out[CONSUMER_WARPS][ROWS][OUT_STRIDE];
    float maximum[CONSUMER_WARPS][ROWS]; /* of the scores, in units of log2 */
    float sum[CONSUMER_WARPS][ROWS];
    uint64_t turn; /* the group has consumed its run: the next one's begins */
    uint32_t last_arriver;
};

template <uint32_t ROWS, uint32_t STAGES, uint32_t GROUPS> struct block_memory {
    group_memory<ROWS> group[GROUPS];
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
};

/* The workspace: a status word, a ticket a worker, two partials a worker. */
constexpr uint32_t WORKSPACE_HEADER_BYTES = 128;

struct workspace_view {
    uint32_t *status;
    uint32_t *tickets; /* [workers, 2] tiles done of the cut unit that the worker starts; a ticket a group */
    float *out;        /* [2 * workers, rows, HEAD_DIM] not normalised */
    float2 *state;     /* [2 * workers, rows] maximum and sum */
};

__host__ __device__ constexpr uint32_t padded_rows(uint32_t group) { return group <= 8 ? 8 : group <= 16 ? 16 : 32; }

__host__ __device__ constexpr size_t tickets_bytes(uint32_t workers) { return ((size_t)workers * 8 + 127) / 128 * 128; }

__device__ inline workspace_view view_workspace(void *workspace, uint32_t workers, uint32_t rows) {
    char *bytes = (char *)workspace;
    workspace_view view;
    view.status = (uint32_t *)bytes;
    view.tickets = (uint32_t *)(bytes + WORKSPACE_HEADER_BYTES);
    view.out = (float *)(bytes + WORKSPACE_HEADER_BYTES + tickets_bytes(workers));
    view.state = (float2 *)(view.out + (size_t)2 * workers * rows * HEAD_DIM);
    return view;
}

/* ------------------------------------------------------------------------------------------- */
/* The line and its cut */

/* An empty sequence has one empty tile a head, so that its output is somebody's. */
__device__ inline uint32_t sequence_tiles(uint32_t length) {
    return length == 0 ? 1 : (length + TILE_TOKENS - 1) / TILE_TOKENS;
}

/* A worker's share, and where its first tile lies. The same in all lanes. */
struct share {
    uint32_t begin, end;     /* of the line */
    uint32_t tiles_a_worker; /* worker w begins at w * this */
    uint32_t sequence;       /* of tile `begin` */
    uint32_t sequence_begin; /* that sequence's first tile in the line */
};

/* When an equal share is rounded up; attn_hopper_tuning says what the fields mean. */
struct share_policy {
    uint32_t align_tiles, whole_workers, whole_tiles;
};

/* Tiles a worker: an equal share, or where all units are alike maybe a larger one that cuts none, or all into equal
 * parts. */
__device__ inline uint32_t choose_share(uint32_t total, uint32_t workers, uint32_t least, uint32_t most,
                                        const share_policy &policy) {
    uint32_t equal = (total + workers - 1) / workers;
    if (least != most) return equal;
    uint32_t unit = most;
    uint32_t whole = (equal + unit - 1) / unit * unit;
    if (whole <= equal + policy.align_tiles || (whole <= policy.whole_tiles && total / whole >= policy.whole_workers))
        return whole;
    uint32_t parts = unit / equal;
    if (parts < 2) return equal;
    uint32_t aligned = (unit + parts - 1) / parts;
    return aligned <= equal + policy.align_tiles ? aligned : equal;
}

/* Finds a worker's share of the line. By a whole warp: a lane sums a stretch of sequences, the lanes' sums are scanned.
 */
__device__ inline share find_share(const attn_hopper_decode &decode, uint32_t workers, uint32_t worker,
                                   const share_policy &policy, uint32_t lane) {
    uint32_t stretch = (decode.batch + 31) / 32;
    uint32_t first = lane * stretch;
    uint32_t sum = 0, least = UINT32_MAX, most = 0;
    for (uint32_t i = first; i < first + stretch && i < decode.batch; i++) {
        uint32_t tiles = sequence_tiles(__ldg(&decode.lengths[i]));
        sum += tiles;
        least = min(least, tiles);
        most = max(most, tiles);
    }
    uint32_t through = sum;
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t before = __shfl_up_sync(ALL_LANES, through, step);
        if (lane >= step) through += before;
    }
    uint32_t total = __shfl_sync(ALL_LANES, through, 31) * decode.heads_kv;
    least = __reduce_min_sync(ALL_LANES, least);
    most = __reduce_max_sync(ALL_LANES, most);

    share mine;
    mine.tiles_a_worker = choose_share(total, workers, least, most, policy);
    uint64_t begin = (uint64_t)worker * mine.tiles_a_worker;
    mine.begin = begin < total ? (uint32_t)begin : total;
    mine.end = min(total, mine.begin + mine.tiles_a_worker);
    mine.sequence = 0;
    mine.sequence_begin = 0;
    if (mine.begin == total) return mine;

    uint32_t holds = __ballot_sync(ALL_LANES, mine.begin < through * decode.heads_kv);
    uint32_t owner = __ffs(holds) - 1;
    uint32_t position = __shfl_sync(ALL_LANES, (through - sum) * decode.heads_kv, owner);
    uint32_t sequence = owner * stretch;
    if (stretch > 1) {
        for (;;) { /* 32 sequences of the stretch at a time */
            uint32_t i = sequence + lane;
            uint32_t tiles = i < decode.batch ? sequence_tiles(__ldg(&decode.lengths[i])) * decode.heads_kv : 0;
            uint32_t until = tiles;
            for (uint32_t step = 1; step < 32; step *= 2) {
                uint32_t before = __shfl_up_sync(ALL_LANES, until, step);
                if (lane >= step) until += before;
            }
            holds = __ballot_sync(ALL_LANES, mine.begin < position + until);
            if (holds != 0) {
                owner = __ffs(holds) - 1;
                sequence += owner;
                position += __shfl_sync(ALL_LANES, until - tiles, owner);
                break;
            }
            position += __shfl_sync(ALL_LANES, until, 31);
            sequence += 32;
        }
    }
    mine.sequence = sequence;
    mine.sequence_begin = position;
    return mine;
}

/* ------------------------------------------------------------------------------------------- */
/* The producer */

/* What a stage is filled from: the pages of one tile. */
template <uint32_t PAGES> struct tile_source {
    uint32_t page[PAGES];
    uint32_t head;
    uint32_t tokens; /* live ones of the tile */
};

/* A lane's place in the line: it handles every 32nd tile of its worker. */
struct lane_walk {
    uint32_t sequence;
    uint32_t length;
    uint32_t tiles; /* of the sequence, a head */
    uint32_t tile;  /* place among the sequence's tiles of all heads */
};

template <uint32_t PAGES>
__device__ inline tile_source<PAGES> locate_tile(const attn_hopper_decode &decode, lane_walk &walk) {
    while (walk.tile >= walk.tiles * decode.heads_kv) {
        walk.tile -= walk.tiles * decode.heads_kv;
        walk.length = __ldg(&decode.lengths[++walk.sequence]);
        walk.tiles = sequence_tiles(walk.length);
    }
    tile_source<PAGES> source;
    source.head = walk.tile / walk.tiles;
    uint32_t first_token = (walk.tile - source.head * walk.tiles) * TILE_TOKENS;
    source.tokens = min(TILE_TOKENS, walk.length - first_token);
    constexpr uint32_t PAGE_TOKENS = TILE_TOKENS / PAGES;
    size_t table = decode.page_offsets != nullptr ? __ldg(&decode.page_offsets[walk.sequence])
                                                  : (size_t)walk.sequence * decode.page_table_stride;
    const uint32_t *entry = decode.page_table + table + first_token / PAGE_TOKENS;
#pragma unroll
    for (uint32_t i = 0; i < PAGES; i++) {
        source.page[i] = i * PAGE_TOKENS < source.tokens ? __ldg(&entry[i]) : 0;
    }
    return source;
}

/* Starts the copies of a tile's live rows into a stage. By one thread. */
template <uint32_t PAGES>
__device__ inline void fill_stage(const attn_hopper_decode &decode, const tile_source<PAGES> &source, uint32_t stage,
                                  uint32_t full, uint32_t *status, uint64_t policy) {
    constexpr uint32_t PAGE_TOKENS = TILE_TOKENS / PAGES;
    constexpr uint32_t PAGE_HALF_BYTES = PAGE_TOKENS * ROW_BYTES;
    bool inside = true;
#pragma unroll
    for (uint32_t i = 0; i < PAGES; i++) {
        inside &= source.page[i] < decode.pool_pages;
    }
    if (!inside) *status = 1;
    if (!inside || source.tokens == 0) {
        hopper::barrier_arrive(full);
        return;
    }
    hopper::barrier_arrive_expect(full, 2 * source.tokens * ROW_BYTES);
#pragma unroll
    for (uint32_t i = 0; i < PAGES; i++) {
        if (i * PAGE_TOKENS >= source.tokens) break;
        uint32_t bytes = min(PAGE_TOKENS, source.tokens - i * PAGE_TOKENS) * ROW_BYTES;
        const char *from =
            (const char *)decode.pool + ((size_t)source.page[i] * decode.heads_kv + source.head) * 2 * PAGE_HALF_BYTES;
        uint32_t to = stage + i * PAGE_HALF_BYTES;
        if (PAGES == 1 && bytes == PAGE_HALF_BYTES) {
            hopper::bulk_copy(to, from, 2 * PAGE_HALF_BYTES, full, policy);
        } else {
            hopper::bulk_copy(to, from, bytes, full, policy);
            hopper::bulk_copy(to + HALF_STAGE_BYTES, from + PAGE_HALF_BYTES, bytes, full, policy);
        }
    }
}

/*
 * The producer warp: the lanes find 32 tiles at a time, the next 32 while these are being copied, so that page table
 * entries are there before they are needed.
 */
template <uint32_t PAGES, uint32_t STAGES>
__device__ inline void produce(const attn_hopper_decode &decode, const share &mine, uint32_t ring, uint32_t full,
                               uint32_t empty, uint32_t *status, uint32_t lane) {
    uint64_t policy = hopper::evict_first_policy();
    lane_walk walk;
    walk.sequence = mine.sequence;
    walk.length = __ldg(&decode.lengths[mine.sequence]);
    walk.tiles = sequence_tiles(walk.length);
    walk.tile = mine.begin - mine.sequence_begin + lane;

    tile_source<PAGES> source = {};
    if (mine.begin + lane < mine.end) source = locate_tile<PAGES>(decode, walk);
    uint32_t stage = 0, parity = 1;
    for (uint32_t base = mine.begin; base < mine.end; base += 32) {
        tile_source<PAGES> next = {};
        if (base + 32 + lane < mine.end) {
            walk.tile += 32;
            next = locate_tile<PAGES>(decode, walk);
        }
        uint32_t count = min(32u, mine.end - base);
        for (uint32_t j = 0; j < count; j++) {
            if (lane == j) {
                hopper::barrier_wait(empty + stage * 8, parity);
                fill_stage<PAGES>(decode, source, ring + stage * STAGE_BYTES, full + stage * 8, status, policy);
            }
            __syncwarp();
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        source = next;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The consumers */

/*
 * A warp's state. BLOCKS is the number of 8-row blocks of queries; in the matrix instructions' layout a lane holds
 * query columns 2 * (lane % 4) and the next of each block.
 */
template <uint32_t BLOCKS> struct warp_state {
    float out[HEAD_DIM / 16][BLOCKS][4];
    float maximum[BLOCKS][2]; /* of q . k, not scaled */
    float sum[BLOCKS][2];     /* of the tokens of this lane's rows */
};

template <uint32_t BLOCKS> __device__ inline void clear_state(warp_state<BLOCKS> &state) {
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (uint32_t d = 0; d < HEAD_DIM / 16; d++) {
            state.out[d][b][0] = state.out[d][b][1] = state.out[d][b][2] = state.out[d][b][3] = 0.0f;
        }
        state.maximum[b][0] = state.maximum[b][1] = -INFINITY;
        state.sum[b][0] = state.sum[b][1] = 0.0f;
    }
}

/* Query heads `skip` and on of one (sequence, KV head) as the right-hand matrix of S^T = K Q^T; 0 where there are no
 * more. */
template <uint32_t BLOCKS>
__device__ inline void load_queries(uint32_t (&queries)[BLOCKS][HEAD_DIM / 8], const attn_hopper_decode &decode,
                                    uint32_t sequence, uint32_t head, uint32_t skip, uint32_t lane) {
    size_t first_row = ((size_t)sequence * decode.heads_kv + head) * decode.group;
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++) {
        uint32_t row = skip + b * 8 + lane / 4;
        const uint32_t *pairs = (const uint32_t *)decode.queries + (first_row + row) * (HEAD_DIM / 2) + lane % 4;
#pragma unroll
        for (uint32_t d = 0; d < HEAD_DIM / 8; d++) {
            queries[b][d] = row < decode.group ? __ldg(&pairs[d * 4]) : 0;
        }
    }
}

/* Attends to the warp's 16 tokens of a stage, of which `tokens` are live: all of them unless PARTIAL. */
template <uint32_t BLOCKS, bool PARTIAL>
__device__ inline void attend(warp_state<BLOCKS> &state, const uint32_t (&queries)[BLOCKS][HEAD_DIM / 8], uint32_t keys,
                              uint32_t tokens, float scale_log2, uint32_t lane) {
    /* Two sums an output: the products of one wait for each other. */
    float scores[BLOCKS][2][4] = {};
    uint32_t key_row = keys + lane % 16 * ROW_BYTES;
#pragma unroll
    for (uint32_t d = 0; d < HEAD_DIM / 16; d++) {
        uint32_t a[4];
        hopper::load_matrices(a, key_row + ((2 * d + lane / 16) ^ lane % 8) * 16);
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++) {
            hopper::multiply_add(scores[b][d % 2], a, queries[b][2 * d], queries[b][2 * d + 1]);
        }
    }

    uint32_t weights[BLOCKS][2];
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++) {
        float s[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            s[i] = scores[b][0][i] + scores[b][1][i];
            if (PARTIAL && lane / 4 + i / 2 * 8 >= tokens) s[i] = -INFINITY;
        }
        float p[4];
        float factor[2];
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            float maximum = fmaxf(state.maximum[b][c], hopper::column_max(fmaxf(s[c], s[c + 2])));
            factor[c] = hopper::exp2_fast((state.maximum[b][c] - maximum) * scale_log2);
            state.maximum[b][c] = maximum;
            p[c] = hopper::exp2_fast((s[c] - maximum) * scale_log2);
            p[c + 2] = hopper::exp2_fast((s[c + 2] - maximum) * scale_log2);
            state.sum[b][c] = state.sum[b][c] * factor[c] + p[c] + p[c + 2];
        }
        if (__any_sync(ALL_LANES, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (uint32_t d = 0; d < HEAD_DIM / 16; d++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    state.out[d][b][i] *= factor[i % 2];
                }
            }
        }
        weights[b][0] = hopper::transpose_matrix(hopper::pack_bf16(p[0], p[1]));
        weights[b][1] = hopper::transpose_matrix(hopper::pack_bf16(p[2], p[3]));
    }

    /* Rows beyond the live ones hold anything, NaN too: a weight of 0 would not hide it. */
    uint32_t keep[2] = {ALL_LANES, ALL_LANES};
    if (PARTIAL) {
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t token = lane % 4 * 2 + i * 8;
            keep[i] = token + 1 < tokens ? ALL_LANES : token < tokens ? 0xffffu : 0;
        }
    }
    uint32_t value_row = keys + HALF_STAGE_BYTES + (lane % 8 + lane / 16 * 8) * ROW_BYTES;
#pragma unroll
    for (uint32_t d = 0; d < HEAD_DIM / 16; d++) {
        uint32_t a[4];
        hopper::load_matrices_transposed(a, value_row + ((2 * d + lane / 8 % 2) ^ lane % 8) * 16);
        if (PARTIAL) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                a[i] &= keep[i / 2];
            }
        }
#pragma unroll
        for (uint32_t b = 0; b < BLOCKS; b++) {
            hopper::multiply_add(state.out[d][b], a, weights[b][0], weights[b][1]);
        }
    }
}

/* Lays a warp's state down in shared memory, the maximum in units of log2. */
template <uint32_t BLOCKS>
__device__ inline void store_state(group_memory<BLOCKS * 8> &memory, const warp_state<BLOCKS> &state, float scale_log2,
                                   uint32_t warp, uint32_t lane) {
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            uint32_t row = b * 8 + lane % 4 * 2 + c;
            float sum = hopper::column_sum(state.sum[b][c]);
            if (lane < 4) {
                memory.maximum[warp][row] = state.maximum[b][c] * scale_log2;
                memory.sum[warp][row] = sum;
            }
#pragma unroll
            for (uint32_t d = 0; d < HEAD_DIM / 16; d++) {
                memory.out[warp][row][d * 16 + lane / 4] = state.out[d][b][c];
                memory.out[warp][row][d * 16 + lane / 4 + 8] = state.out[d][b][c + 2];
            }
        }
    }
}

/* A merged row, or a lane's four columns of it. */
struct row_state {
    float4 out;
    float maximum, sum;
};

__device__ inline void merge_row(row_state &into, float4 out, float maximum, float sum) {
    float most = fmaxf(into.maximum, maximum);
    float old_factor = into.maximum == -INFINITY ? 0.0f : hopper::exp2_fast(into.maximum - most);
    float new_factor = maximum == -INFINITY ? 0.0f : hopper::exp2_fast(maximum - most);
    into.out.x = into.out.x * old_factor + out.x * new_factor;
    into.out.y = into.out.y * old_factor + out.y * new_factor;
    into.out.z = into.out.z * old_factor + out.z * new_factor;
    into.out.w = into.out.w * old_factor + out.w * new_factor;
    into.sum = into.sum * old_factor + sum * new_factor;
    into.maximum = most;
}

__device__ inline row_state empty_row() { return {{0.0f, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f}; }

/* A warp writes a finished row, four columns a lane. */
__device__ inline void write_row(const attn_hopper_decode &decode, size_t row, const row_state &state, uint32_t lane) {
    float factor = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
    uint2 packed = {hopper::pack_bf16(state.out.x * factor, state.out.y * factor),
                    hopper::pack_bf16(state.out.z * factor, state.out.w * factor)};
    ((uint2 *)decode.out)[row * (HEAD_DIM / 4) + lane] = packed;
    if (lane == 0) decode.lse[row] = state.sum > 0.0f ? (state.maximum + __log2f(state.sum)) * LN_2 : -INFINITY;
}

/* Some consecutive tiles of one unit, done by one worker. */
struct run {
    uint32_t sequence, head;
    uint32_t unit_begin, unit_tiles; /* in the line */
    uint32_t begin, end;             /* of the run, in the line */
};

/* The query heads, of those of a KV head, that a group of consumers has. */
struct head_range {
    uint32_t begin, end;
};

/* Adds `factor` of a partial's four columns. */
__device__ inline void add_scaled(float4 &sum, const float4 &out, float factor) {
    sum.x += out.x * factor;
    sum.y += out.y * factor;
    sum.z += out.z * factor;
    sum.w += out.w * factor;
}

/*
 * Merges a cut unit's partials in the order of the line, a row a warp. By all consumers of a group. The first partials
 * are asked for before their states are known, since what this takes is latency.
 */
template <uint32_t ROWS>
__device__ inline void merge_partials(const attn_hopper_decode &decode, const workspace_view &workspace,
                                      const run &current, uint32_t tiles_a_worker, head_range heads, uint32_t warp,
                                      uint32_t lane) {
    constexpr uint32_t EARLY = 8;
    uint32_t first = current.unit_begin / tiles_a_worker;
    uint32_t last = (current.unit_begin + current.unit_tiles - 1) / tiles_a_worker;
    uint32_t count = last - first + 1;
    size_t first_row = ((size_t)current.sequence * decode.heads_kv + current.head) * decode.group;
    /* Partial i of the unit is slot 2 * (first + i), but the first lies in its worker's tail slot. */
    for (uint32_t row = heads.begin + warp; row < heads.end; row += CONSUMER_WARPS) {
        const float4 *outs = (const float4 *)workspace.out + ((size_t)2 * first * ROWS + row) * (HEAD_DIM / 4) + lane;
        const float2 *states = workspace.state + (size_t)2 * first * ROWS + row;
        constexpr size_t OUT_STEP = 2 * ROWS * (HEAD_DIM / 4), STATE_STEP = 2 * ROWS;
        float4 early[EARLY];
#pragma unroll
        for (uint32_t i = 0; i < EARLY; i++) {
            if (i < count) early[i] = __ldcg(outs + (i == 0 ? OUT_STEP / 2 : i * OUT_STEP));
        }
        float maximum = -INFINITY;
        for (uint32_t i = lane; i < count; i += 32) {
            maximum = fmaxf(maximum, __ldcg(states + (i == 0 ? STATE_STEP / 2 : i * STATE_STEP)).x);
        }
        for (uint32_t step = 16; step > 0; step /= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, step));
        }
        row_state merged = empty_row();
        merged.maximum = maximum;
        for (uint32_t base = 0; base < count; base += 32) {
            float factor = 0.0f;
            if (base + lane < count) {
                float2 state = __ldcg(states + (base + lane == 0 ? STATE_STEP / 2 : (base + lane) * STATE_STEP));
                factor = state.x == -INFINITY ? 0.0f : hopper::exp2_fast(state.x - maximum);
                merged.sum += state.y * factor;
            }
            uint32_t begin = 0, end = min(32u, count - base);
            if (base == 0) {
#pragma unroll
                for (uint32_t i = 0; i < EARLY; i++) {
                    float early_factor = __shfl_sync(ALL_LANES, factor, i);
                    if (i < count) add_scaled(merged.out, early[i], early_factor);
                }
                begin = EARLY;
            }
#pragma unroll 8
            for (uint32_t i = begin; i < end; i++) {
                float4 out = __ldcg(outs + (base + i) * OUT_STEP);
                add_scaled(merged.out, out, __shfl_sync(ALL_LANES, factor, i));
            }
        }
        for (uint32_t step = 16; step > 0; step /= 2) {
            merged.sum += __shfl_xor_sync(ALL_LANES, merged.sum, step);
        }
        write_row(decode, first_row + row, merged, lane);
    }
}

/* Ends a run: merges the warps' states, and writes the unit out or leaves a partial and takes a ticket. */
template <uint32_t ROWS, uint32_t GROUP_ROWS>
__device__ inline void finish_run(const attn_hopper_decode &decode, const workspace_view &workspace,
                                  group_memory<GROUP_ROWS> &memory, const run &current, uint32_t tiles_a_worker,
                                  head_range heads, uint32_t worker, uint32_t group, uint32_t warp, uint32_t lane) {
    hopper::named_barrier<CONSUMERS>(group);
    bool whole = current.end - current.begin == current.unit_tiles;
    size_t first_row = ((size_t)current.sequence * decode.heads_kv + current.head) * decode.group;
    size_t slot = 2 * worker + (current.begin == current.unit_begin);
    for (uint32_t row = heads.begin + warp; row < heads.end; row += CONSUMER_WARPS) {
        uint32_t own_row = row - heads.begin;
        row_state merged = empty_row();
#pragma unroll
        for (uint32_t w = 0; w < CONSUMER_WARPS; w++) {
            merge_row(merged, *(const float4 *)&memory.out[w][own_row][lane * 4], memory.maximum[w][own_row],
                      memory.sum[w][own_row]);
        }
        if (whole) {
            write_row(decode, first_row + row, merged, lane);
        } else {
            ((float4 *)workspace.out)[(slot * ROWS + row) * (HEAD_DIM / 4) + lane] = merged.out;
            if (lane == 0) workspace.state[slot * ROWS + row] = make_float2(merged.maximum, merged.sum);
        }
    }
    hopper::named_barrier<CONSUMERS>(group); /* the states may be overwritten; the partial is written */
    if (whole) return;

    if (warp == 0 && lane == 0) {
        uint32_t *ticket = &workspace.tickets[current.unit_begin / tiles_a_worker * 2 + (heads.begin > 0)];
        uint32_t tiles = current.end - current.begin;
        bool last = hopper::atomic_add_acquire_release(ticket, tiles) + tiles == current.unit_tiles;
        memory.last_arriver = last;
        if (last) *ticket = 0; /* for the next launch */
    }
    hopper::named_barrier<CONSUMERS>(group);
    if (memory.last_arriver) merge_partials<ROWS>(decode, workspace, current, tiles_a_worker, heads, warp, lane);
}

/* A consumer warp: its part of the worker's runs, every GROUPS-th of them if the runs are divided. */
template <uint32_t BLOCKS, uint32_t STAGES, uint32_t GROUPS, division DIVIDED>
__device__ inline void consume(const attn_hopper_decode &decode, const share &mine, const workspace_view &workspace,
                               block_memory<BLOCKS * 8, STAGES, GROUPS> &memory, uint32_t ring, uint32_t worker,
                               uint32_t group, uint32_t warp, uint32_t lane) {
    constexpr uint32_t ROWS = BLOCKS * 8 * (DIVIDED == division::HEADS ? GROUPS : 1);
    constexpr bool TURNS = DIVIDED == division::RUNS && GROUPS > 1;
    head_range heads = {0, decode.group};
    if (DIVIDED == division::HEADS) {
        heads.begin = min(group * BLOCKS * 8, decode.group);
        heads.end = min(heads.begin + BLOCKS * 8, decode.group);
    }
    group_memory<BLOCKS * 8> &own = memory.group[group];
    uint32_t full = hopper::shared_address(memory.full), empty = hopper::shared_address(memory.empty);
    uint32_t own_turn = hopper::shared_address(&own.turn);
    uint32_t turn_before = hopper::shared_address(&memory.group[(group + GROUPS - 1) % GROUPS].turn);
    float scale_log2 = decode.scale * LOG2_E;
    uint32_t length = __ldg(&decode.lengths[mine.sequence]);
    uint32_t tiles = sequence_tiles(length);
    run current;
    current.sequence = mine.sequence;
    current.head = (mine.begin - mine.sequence_begin) / tiles;
    current.unit_begin = mine.sequence_begin + current.head * tiles;

    uint32_t run_number = 0;
    for (current.begin = mine.begin; current.begin < mine.end; current.begin = current.end, run_number++) {
        current.unit_tiles = tiles;
        current.end = min(mine.end, current.unit_begin + tiles);
        if (!TURNS || run_number % GROUPS == group) {
            uint32_t queries[BLOCKS][HEAD_DIM / 8];
            load_queries<BLOCKS>(queries, decode, current.sequence, current.head, heads.begin, lane);
            warp_state<BLOCKS> state;
            clear_state(state);
            uint32_t place = current.begin - mine.begin;
            uint32_t stage = place % STAGES, parity = place / STAGES % 2;
            /* A stage's barrier tells only the last two fillings apart: those before this run's must be over. */
            if (TURNS && run_number > 0) hopper::barrier_wait(turn_before, (run_number - 1) / GROUPS % 2);
            for (uint32_t tile = current.begin; tile < current.end; tile++) {
                uint32_t passed = (tile - current.unit_begin) * TILE_TOKENS + warp * 16;
                uint32_t keys = ring + stage * STAGE_BYTES + warp * 16 * ROW_BYTES;
                hopper::barrier_wait(full + stage * 8, parity);
                if (passed + 16 <= length) {
                    attend<BLOCKS, false>(state, queries, keys, 16, scale_log2, lane);
                } else if (passed < length) {
                    attend<BLOCKS, true>(state, queries, keys, length - passed, scale_log2, lane);
                }
                __syncwarp();
                if (lane == 0) hopper::barrier_arrive(empty + stage * 8);
                if (++stage == STAGES) {
                    stage = 0;
                    parity ^= 1;
                }
            }
            if (TURNS && lane == 0) hopper::barrier_arrive(own_turn);
            store_state<BLOCKS>(own, state, scale_log2, warp, lane);
            /* The launch before may still read what is written from here on. */
            if (run_number < GROUPS) hopper::wait_for_previous_launch();
            finish_run<ROWS>(decode, workspace, own, current, mine.tiles_a_worker, heads, worker, group, warp, lane);
        }
        current.unit_begin += tiles;
        if (++current.head == decode.heads_kv && current.end < mine.end) {
            current.head = 0;
            length = __ldg(&decode.lengths[++current.sequence]);
            tiles = sequence_tiles(length);
        }
    }
}

/*
 * Brings a small page table into the L2 cache while the lengths, which say where in it to look, are still on their way:
 * a line a block.
 */
__device__ inline void prefetch_page_table(const attn_hopper_decode &decode) {
    constexpr uint32_t LINE_ENTRIES = 32;
    size_t entry = (size_t)blockIdx.x * LINE_ENTRIES;
    if (entry < (size_t)decode.batch * decode.page_table_stride) hopper::prefetch_l2(decode.page_table + entry);
}

/* ------------------------------------------------------------------------------------------- */
/* The kernel */

/* How a kernel is built: 8-row blocks of queries of a group, pages a tile, stages of the ring, groups of consumers. */
template <uint32_t BLOCKS, uint32_t PAGES, uint32_t STAGES, uint32_t GROUPS, division DIVIDED, uint32_t BLOCKS_PER_SM>
__global__ void __launch_bounds__(GROUPS *CONSUMERS + 32, BLOCKS_PER_SM)
    decode_kernel(const __grid_constant__ attn_hopper_decode decode, share_policy policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    using memory_type = block_memory<BLOCKS * 8, STAGES, GROUPS>;
    extern __shared__ __align__(128) char shared[];
    memory_type &memory = *(memory_type *)(shared + STAGES * STAGE_BYTES);
    uint32_t ring = hopper::shared_address(shared);
    uint32_t full = hopper::shared_address(memory.full);
    uint32_t empty = hopper::shared_address(memory.empty);
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == GROUPS * CONSUMERS) {
        prefetch_page_table(decode);
        for (uint32_t stage = 0; stage < STAGES; stage++) {
            hopper::barrier_init(full + stage * 8, 1);
            hopper::barrier_init(empty + stage * 8,
                                 DIVIDED == division::HEADS ? GROUPS * CONSUMER_WARPS : CONSUMER_WARPS);
        }
        for (uint32_t group = 0; group < GROUPS; group++) {
            hopper::barrier_init(hopper::shared_address(&memory.group[group].turn), CONSUMER_WARPS);
        }
        hopper::barrier_init_fence();
    }
    hopper::launch_dependents();
    share mine = find_share(decode, gridDim.x, blockIdx.x, policy, lane);
    __syncthreads();
    if (mine.begin == mine.end) return;
    workspace_view workspace =
        view_workspace(decode.workspace, gridDim.x, BLOCKS * 8 * (DIVIDED == division::HEADS ? GROUPS : 1));
    if (warp == GROUPS * CONSUMER_WARPS) {
        produce<PAGES, STAGES>(decode, mine, ring, full, empty, workspace.status, lane);
    } else {
        consume<BLOCKS, STAGES, GROUPS, DIVIDED>(decode, mine, workspace, memory, ring, blockIdx.x,
                                                 warp / CONSUMER_WARPS, warp % CONSUMER_WARPS, lane);
    }
#else
    (void)decode;
    (void)policy;
    __trap();
#endif
}

/* ------------------------------------------------------------------------------------------- */
/* Launching */

template <uint32_t BLOCKS, uint32_t PAGES, uint32_t STAGES, uint32_t GROUPS, division DIVIDED, uint32_t BLOCKS_PER_SM>
cudaError_t launch(const attn_hopper_decode &decode, const attn_hopper_tuning &tuning, cudaStream_t stream) {
    constexpr size_t BYTES = STAGES * STAGE_BYTES + sizeof(block_memory<BLOCKS * 8, STAGES, GROUPS>);
    static_assert(BYTES * BLOCKS_PER_SM <= 227 * 1024 - (BLOCKS_PER_SM - 1) * 1024, "more than a multiprocessor has");
    auto *kernel = decode_kernel<BLOCKS, PAGES, STAGES, GROUPS, DIVIDED, BLOCKS_PER_SM>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)BYTES);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(tuning.workers);
    config.blockDim = dim3(GROUPS * CONSUMERS + 32);
    config.dynamicSmemBytes = BYTES;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = tuning.overlap_launches ? 1 : 0;
    share_policy policy = {tuning.align_tiles, tuning.whole_workers, tuning.whole_tiles};
    return cudaLaunchKernelEx(&config, kernel, decode, policy);
}

template <uint32_t BLOCKS, uint32_t STAGES, uint32_t GROUPS, division DIVIDED, uint32_t BLOCKS_PER_SM>
cudaError_t launch_page_size(const attn_hopper_decode &decode, const attn_hopper_tuning &tuning, cudaStream_t stream) {
    switch (decode.page_size) {
    case 16: return launch<BLOCKS, 4, STAGES, GROUPS, DIVIDED, BLOCKS_PER_SM>(decode, tuning, stream);
    case 32: return launch<BLOCKS, 2, STAGES, GROUPS, DIVIDED, BLOCKS_PER_SM>(decode, tuning, stream);
    case 64: return launch<BLOCKS, 1, STAGES, GROUPS, DIVIDED, BLOCKS_PER_SM>(decode, tuning, stream);
    default: return cudaErrorInvalidValue;
    }
}

} /* namespace */

extern "C" size_t attn_hopper_tile_bytes(uint32_t page_size) { return (size_t)page_size * 2 * ROW_BYTES; }

extern "C" size_t attn_hopper_workspace_bytes(uint32_t workers, uint32_t group) {
    size_t slots = (size_t)2 * workers * padded_rows(group);
    return WORKSPACE_HEADER_BYTES + tickets_bytes(workers) + slots * (HEAD_DIM * sizeof(float) + sizeof(float2));
}

extern "C" int attn_hopper_decode_launch(const attn_hopper_decode *decode, const attn_hopper_tuning *tuning,
                                         void *stream) {
    if (decode->group < 1 || decode->group > ATTN_HOPPER_MAX_GROUP || decode->heads_kv < 1)
        return cudaErrorInvalidValue;
    if (decode->batch == 0) return cudaSuccess;
    cudaStream_t on = (cudaStream_t)stream;
    uint32_t rows = padded_rows(decode->group);
    if (rows == 32) return launch_page_size<2, 4, 2, division::HEADS, 1>(*decode, *tuning, on);
    if (rows == 16) return launch_page_size<1, 6, 2, division::HEADS, 1>(*decode, *tuning, on);
    if (tuning->blocks_per_sm == 2) return launch_page_size<1, 3, 1, division::RUNS, 2>(*decode, *tuning, on);
    if (tuning->stages == 3) return launch_page_size<1, 3, 2, division::RUNS, 1>(*decode, *tuning, on);
    if (tuning->stages == 4) return launch_page_size<1, 4, 2, division::RUNS, 1>(*decode, *tuning, on);
    return launch_page_size<1, 6, 2, division::RUNS, 1>(*decode, *tuning, on);
}
