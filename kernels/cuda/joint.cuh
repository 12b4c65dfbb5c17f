/*
 * Joint merges: the workers among which a long unit was cut merge it together, each some of its rows, where the last to
 * arrive alone would merge them all.
 *
 * Those that have nothing but that unit, up to MAX_MEMBERS, are its members. A member that has left its partial waits
 * until the others have, and merges its share of the rows. But nothing promises it that they run at the same time
 * (others may use the device): after `patience_ns` it gives its share up, and the last to arrive merges that, too. What
 * a row becomes does not depend on who merges it.
 */
#ifndef ATTND_KERNELS_CUDA_JOINT_CUH
#define ATTND_KERNELS_CUDA_JOINT_CUH

#include "kernels/cuda/line.cuh"
#include "kernels/cuda/rows.cuh"

namespace joint {

constexpr uint32_t MAX_MEMBERS = 16;

/* A ticket: tiles done of the unit, members that have given up (a bit each), and members that have gone. */
constexpr uint32_t GIVEN_UP = 32, GONE = 48;

struct party {
    uint64_t *ticket;
    uint32_t tiles;   /* of the unit */
    uint32_t members; /* fewer than two: the last to arrive merges */
    uint32_t own;     /* which of them the worker is; `members` or more: none */
};

/* Those who merge `unit`. Only if each of its workers begins where the one before ends. */
__device__ inline party party_of(const rows::workspace &work, const line::unit &unit, const rows::worker &by) {
    uint32_t share = by.tiles_a_worker, first = (unit.begin + share - 1) / share;
    uint32_t end = (unit.begin + unit.sees.tiles) / share;
    party found;
    found.ticket = work.joint_tickets + unit.begin / share;
    found.tiles = unit.sees.tiles;
    found.members = first < end ? min(end - first, MAX_MEMBERS) : 0;
    found.own = by.number >= first ? by.number - first : MAX_MEMBERS;
    return found;
}

__device__ inline bool is_done(const party &of, uint64_t ticket) { return (uint32_t)ticket == of.tiles; }

__device__ inline uint32_t given_up(uint64_t ticket) { return (uint32_t)(ticket >> GIVEN_UP) & 0xffff; }

/* A member has seen that the unit is done; the last of those who look makes the ticket ready for the next launch. */
__device__ inline void leave(const party &of) {
    uint64_t before = ptx::atomic_add_acquire_release(of.ticket, 1ull << GONE);
    uint32_t gone = (uint32_t)(before >> GONE) + 1;
    if (gone + __popc(given_up(before)) == of.members) *of.ticket = 0;
}

/* Waits until the unit is done: true. Or gives up: false. */
__device__ inline bool wait_until_done(const party &of, uint32_t patience_ns) {
    uint64_t until = ptx::global_time_ns() + patience_ns;
    uint64_t seen = ptx::load_acquire(of.ticket);
    while (!is_done(of, seen)) {
        if (ptx::global_time_ns() < until) {
            seen = ptx::load_acquire(of.ticket);
            continue;
        }
        uint64_t before = ptx::compare_and_swap(of.ticket, seen, seen | 1ull << (GIVEN_UP + of.own));
        if (before == seen) return false;
        seen = before;
    }
    return true;
}

/*
 * Arrives with `tiles` more tiles of the unit, and waits if the worker is a member. Returns the members whose rows the
 * worker is to merge, a bit each. By one thread, after all have met at a barrier.
 */
__device__ inline uint32_t arrive(const party &of, uint32_t tiles, uint32_t patience_ns) {
    uint64_t now = ptx::atomic_add_acquire_release(of.ticket, (uint64_t)tiles) + tiles;
    bool is_member = of.own < of.members;
    if (!is_done(of, now)) {
        if (!is_member || !wait_until_done(of, patience_ns)) return 0;
        leave(of);
        return 1u << of.own;
    }
    uint32_t merged = given_up(now);
    if (is_member) {
        leave(of);
        merged |= 1u << of.own;
    } else if (__popc(merged) == of.members) {
        *of.ticket = 0; /* nobody is there who would */
    }
    return merged;
}

} /* namespace joint */

#endif
