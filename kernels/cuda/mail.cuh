/*
 * Mail: the partial results of a unit's long parts (parts.cuh), sent from block to block by way of memory. A word that
 * is sent says by itself that it is there: the mail's memory holds zeros, and no word that is sent is 0. So who merges
 * a row reads its words until all have come, which is one trip to memory and one from it; where partials are written,
 * counted and then read (joint.cuh) it is a trip more for each of these, and a fence.
 *
 *     part p of a unit       for each row r of its block      words[worker of p][r]: the row, then [..] maximum and sum
 *     member m, of some of the parts' blocks, merges some rows of all parts, and makes their words 0 again
 *
 * Floats are sent inverted, bit by bit: what would be 0 then is a NaN with all bits set, which no arithmetic makes.
 *
 * Nothing promises that the blocks run at the same time (others may use the device), so a member waits for no longer
 * than its patience. Parts are counted, too, but nobody waits for that: who is out of patience says so at the count,
 * and the last part's block, which sees it there, merges that member's rows besides its own. So a block makes words 0
 * only when it has all of its rows'. What a row becomes does not depend on who merges it.
 */
#ifndef ATTND_KERNELS_CUDA_MAIL_CUH
#define ATTND_KERNELS_CUDA_MAIL_CUH

#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/parts.cuh"
#include "kernels/cuda/rows.cuh"

namespace mail {

using line::ALL_LANES;

constexpr uint32_t ROWS = 32;        /* that a part has at most */
constexpr uint32_t MAX_MEMBERS = 32; /* of a unit: a bit each (count) */

/* ------------------------------------------------------------------------------------------- */
/* Memory */

/* Zeros, but for what is on its way. */
struct room {
    uint32_t *rows;   /* [workers, ROWS, columns] */
    uint32_t *states; /* [workers, ROWS, 2] maximum in units of log2, and sum */
};

/* Of a workspace with so many slots: for half as many workers, which have one part each. */
__host__ inline size_t room_bytes(uint32_t slots, uint32_t columns) {
    return (size_t)slots / 2 * ROWS * (columns + 2) * sizeof(uint32_t);
}

/* It is what is last in a workspace whose slots have ROWS rows or more. */
__host__ inline uint32_t *find_room(const attn_cuda_workspace &in, uint32_t columns) {
    return (uint32_t *)((char *)in.memory + rows::workspace_bytes(in.slots, in.rows, columns));
}

__device__ inline room view_room(uint32_t *words, uint32_t slots, uint32_t columns) {
    return {words, words + (size_t)slots / 2 * ROWS * columns};
}

__device__ inline size_t row_of(uint32_t worker, uint32_t index) { return (size_t)worker * ROWS + index; }

using rows::sent;

__device__ inline float received(uint32_t word) { return __uint_as_float(~word); }

__device__ inline void send(uint32_t *to, float4 numbers) {
    ptx::store_relaxed(to, make_uint4(sent(numbers.x), sent(numbers.y), sent(numbers.z), sent(numbers.w)));
}

__device__ inline void send_state(const room &to, uint32_t worker, uint32_t index, float maximum, float sum) {
    ptx::store_relaxed(to.states + row_of(worker, index) * 2, make_uint2(sent(maximum), sent(sum)));
}

/* ------------------------------------------------------------------------------------------- */
/* The count */

/* A unit's: parts that have been sent, and members that have given up (a bit each). 0 between launches. */
constexpr uint32_t GIVEN_UP = 32;

struct count {
    uint64_t *word;
    uint32_t parts;
};

__device__ inline bool is_all(const count &of, uint64_t seen) { return (uint32_t)seen == of.parts; }

/*
 * A part has been sent. Returns the members whose rows the block is to merge besides its own, a bit each. By one
 * thread, after all who sent have met at a barrier.
 */
__device__ inline uint32_t arrive(const count &of) {
    uint64_t now = ptx::atomic_add_acquire_release(of.word, (uint64_t)1) + 1;
    if (!is_all(of, now)) return 0;
    *of.word = 0; /* for the next launch; whoever looks at it now sees that all have arrived */
    return (uint32_t)(now >> GIVEN_UP);
}

/* A member whose part has arrived gives up: true. Or all parts have been sent: false. By one thread. */
__device__ inline bool give_up(const count &of, uint32_t member) {
    uint64_t seen = ptx::load_acquire(of.word);
    while (seen != 0 && !is_all(of, seen)) {
        uint64_t before = ptx::compare_and_swap(of.word, seen, seen | 1ull << (GIVEN_UP + member));
        if (before == seen) return true;
        seen = before;
    }
    return false;
}

/* ------------------------------------------------------------------------------------------- */
/* Patience */

/* What a block's warps agree on, in its shared memory: whether its own rows are still its own. */
struct agreement {
    enum : uint32_t { WAITING, ASKING, ALL_THERE, GIVEN_UP };
    uint32_t state;
    uint32_t has_arrived; /* the block's part is counted */
};

__device__ inline void open_agreement(agreement &own) {
    own.state = agreement::WAITING;
    own.has_arrived = 0;
}

/* The block's part has been counted. By one thread. */
__device__ inline void note_arrival(agreement &own) { atomicExch(&own.has_arrived, 1u); }

/* How often a warp reads words that have not come, if not for as long as it takes, and what it asks then. */
struct patience {
    agreement &own;
    count of;
    uint32_t member;
    uint32_t tries;
    bool is_endless; /* all words are on their way */
};

/* A reading takes half a microsecond or more. */
__device__ inline uint32_t tries_in(uint32_t ns) { return ns / 512; }

/* A warp is out of patience. True: the block's rows are not its own any more. False: all of them are on their way. */
__device__ inline bool gives_up(const patience &with, uint32_t lane) {
    uint32_t state = agreement::WAITING;
    agreement &own = with.own;
    if (lane == 0) {
        state = atomicCAS(&own.state, (uint32_t)agreement::WAITING, (uint32_t)agreement::ASKING);
        if (state == agreement::WAITING) {
            while (atomicOr(&own.has_arrived, 0u) == 0) {
            }
            state = give_up(with.of, with.member) ? agreement::GIVEN_UP : agreement::ALL_THERE;
            atomicExch(&own.state, state);
        }
        while (state == agreement::ASKING)
            state = atomicOr(&own.state, 0u);
    }
    return __shfl_sync(ALL_LANES, state, 0) == agreement::GIVEN_UP;
}

/* After all warps have met. */
__device__ inline bool has_given_up(const agreement &own) {
    return ((const volatile agreement &)own).state == agreement::GIVEN_UP;
}

/* ------------------------------------------------------------------------------------------- */
/* Merging */

/* Some words of a lane's: of a row of AHEAD parts, and of the state of one of them. */
constexpr uint32_t AHEAD = parts::AHEAD;

struct words {
    uint4 rows[AHEAD];
    uint2 state;
};

/* Words of what is not there, and is not waited for: zeros, and a state that has seen nothing. */
__device__ inline words no_words() {
    words none;
#pragma unroll
    for (uint32_t i = 0; i < AHEAD; i++)
        none.rows[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    none.state = make_uint2(sent(-INFINITY), sent(0.0f));
    return none;
}

/* A row of some parts, AHEAD at most: a lane reads four columns of each, and the state of one. */
struct source {
    const uint32_t *rows, *states;
    uint32_t count;
};

template <uint32_t COLUMNS>
__device__ inline source find_source(const room &from, uint32_t worker, uint32_t index, uint32_t count, uint32_t lane) {
    static_assert(COLUMNS == 128, "four a lane");
    return {from.rows + row_of(worker, index) * COLUMNS + lane * 4,
            from.states + row_of(worker + lane % AHEAD, index) * 2, count};
}

/* Reads again and again what has not come yet. False: the block gives up. By a warp. */
template <uint32_t COLUMNS>
__device__ inline bool read_words(words &read, const source &from, const patience &with, uint32_t &tries,
                                  uint32_t lane) {
    uint32_t missing = (1u << from.count) - 1;
    bool misses_states = true, is_endless = with.is_endless;
    while (missing != 0 || misses_states) {
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            if (missing >> i & 1) read.rows[i] = ptx::load_relaxed_4(from.rows + (size_t)i * ROWS * COLUMNS);
        }
        if (lane % AHEAD < from.count) read.state = ptx::load_relaxed_2(from.states);
        missing = 0;
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint4 &row = read.rows[i];
            bool has_come = row.x != 0 && row.y != 0 && row.z != 0 && row.w != 0;
            if (!__all_sync(ALL_LANES, has_come)) missing |= 1u << i;
        }
        misses_states = !__all_sync(ALL_LANES, read.state.x != 0 && read.state.y != 0);
        if (is_endless || (missing == 0 && !misses_states)) continue;
        if (tries > 0) {
            tries--;
        } else {
            if (gives_up(with, lane)) return false;
            is_endless = true;
        }
    }
    return true;
}

/*
 * Merges slice `slice` of `slices` of a row's parts, AHEAD at a time, as parts::merge_slice does: true. False: the
 * block has given its rows up. By a warp.
 */
template <uint32_t COLUMNS>
__device__ inline bool merge_slice(rows::row_state<COLUMNS> &merged, const room &from, const parts::place &of,
                                   uint32_t index, uint32_t slice, uint32_t slices, const patience &with,
                                   uint32_t lane) {
    uint32_t begin = of.count * slice / slices, end = of.count * (slice + 1) / slices;
    uint32_t tries = with.tries;
    merged = rows::empty_state<COLUMNS>();
#pragma unroll 1
    for (uint32_t base = begin; base < end; base += AHEAD) {
        words read = no_words();
        source some = find_source<COLUMNS>(from, of.first + base, index, min(AHEAD, end - base), lane);
        if (!read_words<COLUMNS>(read, some, with, tries, lane)) return false;
        rows::row<COLUMNS> coming[AHEAD];
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint4 &row = read.rows[i];
            coming[i] = {{{received(row.x), received(row.y), received(row.z), received(row.w)}}};
        }
        rows::add_partials(merged, coming, make_float2(received(read.state.x), received(read.state.y)));
    }
    return true;
}

/* Makes room for the next launch's words in what merge_slice has read. By a warp. */
template <uint32_t COLUMNS>
__device__ inline void clear_slice(const room &in, const parts::place &of, uint32_t index, uint32_t slice,
                                   uint32_t slices, uint32_t lane) {
    uint32_t begin = of.count * slice / slices, end = of.count * (slice + 1) / slices;
#pragma unroll 4
    for (uint32_t part = begin; part < end; part++) {
        size_t at = row_of(of.first + part, index);
        ptx::store_relaxed(in.rows + at * COLUMNS + lane * 4, make_uint4(0, 0, 0, 0));
        if (lane == 0) ptx::store_relaxed(in.states + at * 2, make_uint2(0, 0));
    }
}

} /* namespace mail */

#endif
