#include "kernels/cuda/cutting.h"

enum { MEMORY_BYTES_A_US = 4650000, BLOCK_BYTES_A_US = 92000 };

static uint64_t least_of(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

/* More blocks than MANY_BLOCKS are in each other's way no more than the memory's own rate says. */
enum { MANY_BLOCKS = 64 };

static uint64_t crowd(const attn_cuda_units *of, uint64_t parts) { return least_of(of->units * parts, MANY_BLOCKS); }

/* A begin and an end that take `few`, and with many blocks `more`. */
static uint64_t ends_ns(const attn_cuda_units *of, uint64_t parts, uint64_t few, uint64_t more) {
    return of->end_ns + few + more * crowd(of, parts) / MANY_BLOCKS;
}

/* All tiles; the last block is late by `late_permille` of that, or `late_ns` if that is less. */
static uint64_t tiles_ns(const attn_cuda_units *of, uint64_t parts, uint64_t chain_ns, uint64_t late_permille,
                         uint64_t late_ns) {
    uint64_t load_ns = of->tile_bytes * (1000 + crowd(of, parts) * crowd(of, parts) / 12) / BLOCK_BYTES_A_US;
    uint64_t a_tile = load_ns > chain_ns ? load_ns : chain_ns;
    uint64_t lone = divide_up(of->most_tiles, parts) * a_tile;
    uint64_t memory = of->units * of->most_tiles * of->tile_bytes * 1000 / MEMORY_BYTES_A_US;
    memory += least_of(memory * late_permille / 1000, late_ns);
    uint64_t longer = lone > memory ? lone : memory, shorter = lone > memory ? memory : lone;
    bool is_both = chain_ns > load_ns && shorter * 100 > longer * 92; /* neither waits for the other alone */
    return is_both ? longer + longer / 20 : longer;
}

/* Do the blocks of clusters wait for the memory more than for themselves? */
static bool is_crowded(const attn_cuda_units *of, uint64_t parts) { return of->units * parts * 3 >= of->workers * 2; }

/*
 * Clusters are not evenly spread over the device, so that where time is memory's some end late: those of three and five
 * most, and large ones if there are more than the eight regions of the device can have one of each.
 */
static uint64_t clusters_ns(const attn_cuda_units *of, uint64_t parts) {
    static const uint64_t LATE_PERMILLE[ATTN_CUDA_MAX_CLUSTER + 1] = {0, 0, 35, 100, 75, 160, 40, 60, 60};
    bool is_uneven = parts >= 6 && of->units > 8 && of->units < (parts == 8 ? 15 : 16);
    bool is_all = parts == 2 && of->units * 33 >= of->workers * 16; /* of the device */
    uint64_t late = is_uneven ? 220 : is_all ? 20 : LATE_PERMILLE[parts];
    uint64_t saved = is_crowded(of, parts) ? of->crowded_saves_ns : 0;
    uint64_t ends = ends_ns(of, parts, parts % 2 == 0 ? 4700 : 5000, 300) - saved;
    return ends + tiles_ns(of, parts, of->chain_ns, late, 20000);
}

/* Partials of a row that are merged in one round of loads, if one block merges a unit. */
static uint64_t partials_a_round(const attn_cuda_units *of) {
    return (uint64_t)of->partials_ahead * (of->warps / of->rows);
}

/* Where long parts leave some multiprocessors without work, the others end later apart. */
static uint64_t long_parts_ns(const attn_cuda_units *of, uint64_t parts) {
    bool is_all = of->units * parts * 16 >= of->workers * 15; /* of the device */
    bool is_joint = parts >= of->joint_from;
    uint64_t a_round = is_joint ? (uint64_t)of->partials_ahead * of->warps : partials_a_round(of);
    uint64_t merge = (divide_up(parts, a_round) - 1) * 400 + (is_joint ? 1000 : 0);
    return of->long_end_ns + ends_ns(of, parts, 5650, 600) + merge +
           tiles_ns(of, parts, of->long_chain_ns, is_all ? 30 : 45, is_all ? 2000 : 4000);
}

/* Of whole tiles; one block merges each unit, however many partials that are. */
static uint64_t shares_ns(const attn_cuda_units *of) {
    uint64_t tiles = of->units * (of->least_tiles + of->most_tiles) / 2, share = divide_up(tiles, of->workers);
    uint64_t rounds = of->most_tiles / share / of->partials_ahead * divide_up(of->rows, 4); /* by four warps */
    return 6 * of->end_ns + 7000 + rounds * 500 + share * of->workers * of->tile_bytes * 1022 / MEMORY_BYTES_A_US;
}

/* Can each unit have so many parts, and is it worth it? */
static bool is_cut_enough(const attn_cuda_units *of, uint64_t parts) {
    return parts > 1 && parts <= of->least_tiles &&
           divide_up(of->most_tiles, parts) + of->min_saved_tiles <= of->most_tiles;
}

static void choose_if_faster(attn_cuda_cutting *best, attn_cuda_cutting other) {
    if (other.ns < best->ns) *best = other;
}

static void choose_clusters(attn_cuda_cutting *best, const attn_cuda_units *of, const attn_cuda_tuning *tuning) {
    if (of->least_tiles != of->most_tiles) return;
    for (uint32_t parts = ATTN_CUDA_MAX_CLUSTER; parts > 1; parts--) {
        if (of->units > tuning->clusters[parts] || !is_cut_enough(of, parts)) continue;
        choose_if_faster(best, (attn_cuda_cutting){.parts = parts,
                                                   .is_clustered = true,
                                                   .is_crowded = is_crowded(of, parts),
                                                   .ns = clusters_ns(of, parts)});
    }
}

static void try_long_parts(attn_cuda_cutting *best, const attn_cuda_units *of, uint64_t parts) {
    if (!is_cut_enough(of, parts)) return;
    choose_if_faster(best, (attn_cuda_cutting){.parts = (uint32_t)parts, .ns = long_parts_ns(of, parts)});
}

/* The fewest parts none of which has more tiles than the longest of so many. */
static uint64_t fewest_as_short(const attn_cuda_units *of, uint64_t parts) {
    return divide_up(of->most_tiles, divide_up(of->most_tiles, parts));
}

/*
 * All multiprocessors, fewer, or as many parts as are merged in one round or two; of each the fewest that are as short,
 * too, which leave less to merge.
 */
static void choose_long_parts(attn_cuda_cutting *best, const attn_cuda_units *of) {
    uint64_t most = least_of(of->workers / of->units, of->most_parts), a_round = partials_a_round(of);
    const uint64_t candidates[] = {most, most / 2, most / 4, a_round, 2 * a_round};
    for (uint32_t i = 0; i < sizeof candidates / sizeof *candidates; i++) {
        uint64_t parts = candidates[i];
        if (parts == 0 || parts > most) continue;
        try_long_parts(best, of, fewest_as_short(of, parts));
        try_long_parts(best, of, parts);
    }
}

attn_cuda_cutting attn_cuda_choose_cutting(const attn_cuda_units *units, const attn_cuda_tuning *tuning) {
    attn_cuda_cutting best = {.parts = 1};
    if (units->least_tiles == 0 || tuning->clusters[2] == 0) return best;
    best.ns = shares_ns(units);
    choose_clusters(&best, units, tuning);
    choose_long_parts(&best, units);
    return best;
}
