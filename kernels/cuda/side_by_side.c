#include "kernels/cuda/side_by_side.h"

#include <stdbool.h>
#include <string.h>

#include "kernels/attention.h"

/* ------------------------------------------------------------------------------------------- */
/* The rule */

/*
 * What is measured, on 132 multiprocessors of an H200. Where both are at work the second launch ends after the later of
 * them: what it does then is counted to either.
 */
enum { BLOCK_ROWS = 128, TILE_TOKENS = 128, LEAST_PARTS = 2, MAX_PARTS = 16 }; /* of tall blocks */
static const double PREFIX_MERGE_US = 4.3; /* of a unit's rows, divided among its parts */

/* Own tokens: a multiprocessor does a tile after the other, and ends a unit. */
enum { OWN_BLOCK_ROWS = 8, OWN_TILE_TOKENS = 64 };
static const double OWN_ENDS_US = 9.2, OWN_UNIT_US = 0.37, OWN_BYTES_US = 62e3;

/* Both together are not faster than the memory. */
static const double READ_ENDS_US = 7.3, READ_BYTES_US = 4.33e6;

static const double AFTER_ENDS_US = 4.4; /* of own tokens that come after */
static const double LEAST_GAIN_US = 2;   /* less is not worth what the model may be wrong by */

/* Of parts that take as long otherwise, those are better that leave the most time to either side. */
static const double BALANCE = 0.112;

static uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

static double max_of(double a, double b) { return a > b ? a : b; }

static uint32_t group_of(const attn_cuda_layer *layer) { return layer->heads_q / layer->heads_kv; }

/* Blocks of a prefix with so many query rows. */
static uint32_t blocks_of(const attn_cuda_layer *layer, uint32_t queries) {
    return divide_up(queries, BLOCK_ROWS / group_of(layer));
}

/* Is it what the kernels that were measured do? Prefixes all alike, in tall blocks; own tokens a row each. */
static bool is_measured(const attn_cuda_forks *forks, const attn_cuda_tuning *tuning) {
    const attn_cuda_call *own = &forks->own;
    const attn_cuda_expected *prefixes = &forks->prefixes_expected;
    uint32_t group = group_of(&own->layer);
    bool is_simple = own->sequences == NULL && own->window == 0 && own->softcap == 0 && !own->batch_invariant;
    bool is_16_bits = own->layer.kv_dtype == ATTN_BF16 || own->layer.kv_dtype == ATTN_FP16;
    bool is_tall = forks->least_queries * group > BLOCK_ROWS / 2 && own->layer.head_dim == own->layer.head_dim_v &&
                   (own->layer.head_dim == 64 || own->layer.head_dim == 128);
    return tuning->is_hopper && is_simple && is_16_bits && is_tall && group <= OWN_BLOCK_ROWS &&
           prefixes->shortest == prefixes->longest &&
           blocks_of(&own->layer, forks->least_queries) == blocks_of(&own->layer, prefixes->most_queries);
}

uint32_t attn_cuda_own_tiles(uint32_t tokens) {
    uint32_t tiles = divide_up(tokens, OWN_TILE_TOKENS);
    return tiles > 0 ? tiles : 1;
}

/* What a launch of prefixes takes, where each unit is cut into so many parts. */
static double prefix_us(const attn_cuda_layer *layer, uint32_t tiles, uint32_t parts) {
    bool has_two_terms = layer->kv_dtype == ATTN_FP16; /* of a weight */
    double ends_us = has_two_terms ? 20.3 : 14, tile_us = has_two_terms ? 2.5 : layer->head_dim == 64 ? 1.23 : 1.556;
    return ends_us + PREFIX_MERGE_US / parts + divide_up(tiles, parts) * tile_us;
}

uint32_t attn_cuda_choose_own_workers(const attn_cuda_forks *forks, const attn_cuda_tuning *tuning) {
    if (!is_measured(forks, tuning)) return 0;
    const attn_cuda_layer *layer = &forks->own.layer;
    uint64_t blocks = blocks_of(layer, forks->least_queries);
    uint64_t units = (uint64_t)forks->prefixes.batch * layer->heads_kv * blocks;
    uint32_t tiles = divide_up(forks->prefixes_expected.longest, TILE_TOKENS), workers = tuning->workers;
    if (units >= workers) return 0;
    double token_bytes = (double)layer->heads_kv * (layer->head_dim + layer->head_dim_v) * layer->element_bytes;
    double own_bytes = (double)forks->own_tiles * OWN_TILE_TOKENS * token_bytes;
    double prefix_bytes = (double)forks->prefixes.batch * forks->prefixes_expected.longest * token_bytes;
    double own_units_us = (double)forks->own.batch * layer->heads_kv * OWN_UNIT_US;
    double read_us = READ_ENDS_US + (own_bytes + prefix_bytes) / READ_BYTES_US;
    uint32_t all = workers / (uint32_t)units, most = all < MAX_PARTS ? all : MAX_PARTS, chosen = 0;
    if (most > tiles) most = tiles;
    if (most < LEAST_PARTS) return 0;
    double in_turn_us = prefix_us(layer, tiles, most) + AFTER_ENDS_US + own_bytes / READ_BYTES_US;
    double least_cost = 0, chosen_us = 0;
    for (uint32_t parts = LEAST_PARTS; parts <= most; parts++) {
        uint32_t left = workers - parts * (uint32_t)units;
        if (left == 0) break;
        double own_us = OWN_ENDS_US + (own_units_us + own_bytes / OWN_BYTES_US) / left;
        double parts_us = prefix_us(layer, tiles, parts), us = max_of(max_of(own_us, parts_us), read_us);
        double cost = us + BALANCE * (own_us + parts_us);
        if (chosen != 0 && cost >= least_cost) continue;
        least_cost = cost;
        chosen_us = us;
        chosen = left;
    }
    return chosen_us < in_turn_us - LEAST_GAIN_US ? chosen : 0;
}

/* ------------------------------------------------------------------------------------------- */
/* Launching */

static int launch_in_turn(const attn_cuda_forks *forks, const attn_cuda_tuning *tuning,
                          const attn_cuda_workspace *workspace, void *stream) {
    attn_cuda_call prefixes = forks->prefixes, own = forks->own;
    prefixes.partial_out = forks->apart_out;
    prefixes.partial_lse = forks->apart_lse;
    int error = attn_cuda_decode_launch(&prefixes, tuning, workspace, &forks->prefixes_expected, stream);
    if (error != 0) return error;
    own.sharing = forks->sharing;
    own.shared_out = forks->apart_out;
    own.shared_lse = forks->apart_lse;
    attn_cuda_tuning overlapping = *tuning;
    overlapping.overlap_launches = tuning->is_hopper;
    return attn_cuda_decode_launch(&own, &overlapping, workspace, &forks->own_expected, stream);
}

/* Workers of the first launch whose partials may be beside those of the second: 0 if that cannot be. */
static uint32_t count_beside(const attn_cuda_forks *forks, const attn_cuda_tuning *first) {
    uint32_t rows = forks->own_expected.most_queries * group_of(&forks->own.layer);
    bool is_alone = !first->overlap_launches; /* or the prefixes of the call before may be at work, too */
    return is_alone && rows <= ATTN_CUDA_MAX_BESIDE_ROWS ? first->workers : 0;
}

/* What own tokens' launch leaves, by output row: stored, or sent (attn_cuda_call.sends_rows). */
typedef struct {
    float *out, *lse; /* device */
    bool are_sent;
} left_rows;

static int launch_own_first(const attn_cuda_forks *forks, const attn_cuda_tuning *first, const left_rows *left,
                            const attn_cuda_workspace *workspace, void *stream) {
    attn_cuda_call own = forks->own;
    own.sharing = forks->sharing;
    own.partial_out = left->out;
    own.partial_lse = left->lse;
    own.sends_rows = left->are_sent;
    return attn_cuda_decode_launch(&own, first, workspace, &forks->own_expected, stream);
}

static int launch_prefixes_second(const attn_cuda_forks *forks, const attn_cuda_tuning *second, const left_rows *left,
                                  const attn_cuda_workspace *workspace, void *stream) {
    attn_cuda_call prefixes = forks->prefixes;
    prefixes.sharing = prefixes.batch;
    prefixes.shared_out = left->out;
    prefixes.shared_lse = left->lse;
    prefixes.sends_rows = left->are_sent;
    return attn_cuda_decode_launch(&prefixes, second, workspace, &forks->prefixes_expected, stream);
}

/* Rows are sent if both launches can, and the workspace has room for them; else they are stored. */
static left_rows choose_left_rows(const attn_cuda_forks *forks, attn_cuda_tuning first, attn_cuda_tuning second,
                                  const attn_cuda_workspace *workspace) {
    left_rows stored = {forks->apart_out, forks->apart_lse, false};
    if (second.beside == 0 || forks->own.sequences != NULL) return stored;
    size_t rows = (size_t)forks->sharing * forks->own.layer.heads_q; /* one of a sequence */
    uint32_t columns = forks->own.layer.head_dim_v;
    float *room = attn_cuda_room_for_sent(workspace, rows, columns);
    if (room == NULL) return stored;
    left_rows sent = {room, room + rows * columns, true};
    first.only_asks = second.only_asks = 1;
    bool can_send = launch_own_first(forks, &first, &sent, workspace, NULL) == 0 &&
                    launch_prefixes_second(forks, &second, &sent, workspace, NULL) == 0;
    return can_send ? sent : stored;
}

static int launch_side_by_side(const attn_cuda_forks *forks, const attn_cuda_tuning *tuning, uint32_t own_workers,
                               const attn_cuda_workspace *workspace, void *stream) {
    attn_cuda_tuning first = *tuning, second = *tuning;
    first.workers = own_workers;
    first.blocks_per_sm = 1; /* or it has them on twice as many multiprocessors */
    first.leaves_pairs = 1;
    memset(first.clusters, 0, sizeof first.clusters);
    second.workers -= own_workers;
    second.overlap_launches = tuning->is_hopper;
    second.beside = count_beside(forks, &first);
    if (second.times != NULL) second.times += 4 * (size_t)own_workers;

    left_rows left = choose_left_rows(forks, first, second, workspace);
    int error = launch_own_first(forks, &first, &left, workspace, stream);
    if (error != 0) return error;
    error = launch_prefixes_second(forks, &second, &left, workspace, stream);
    if (error == 0 || !left.are_sent) return error;
    attn_cuda_clear_sent(left.out, (size_t)(left.lse - left.out) / forks->own.layer.head_dim_v,
                         forks->own.layer.head_dim_v, stream); /* nobody reads them */
    return error;
}

/* All that the second launch needs of the first are results, for which it waits before it writes its own. */
int attn_cuda_launch_forks(const attn_cuda_forks *forks, const attn_cuda_tuning *tuning, uint32_t own_workers,
                           const attn_cuda_workspace *workspace, void *stream) {
    bool are_beside = own_workers > 0 && own_workers < tuning->workers;
    return are_beside ? launch_side_by_side(forks, tuning, own_workers, workspace, stream)
                      : launch_in_turn(forks, tuning, workspace, stream);
}
