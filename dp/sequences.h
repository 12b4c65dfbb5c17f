/*
 * The table of sequences, and everything that is counted with them: pages by rank, load by rank,
 * quotas by tenant.
 *
 * A sequence has one part (whole: on its home rank) or one for each rank (spread). Part j of a spread
 * sequence lives on rank (home + j) % ranks and holds chunks j, j + ranks, j + 2 * ranks, ..
 *
 *     chunks of the sequence    0    1    2    3    4
 *     part 0 (home)           [ 0 ]          [ 3 ]
 *     part 1                       [ 1 ]          [ 4 ]
 *     part 2                            [ 2 ]
 *
 * Growth. New tokens become part of a sequence in two strides: dp_sequence_grow takes the pages, then
 * dp_sequence_commit or dp_sequence_cancel. Meanwhile the sequence is busy, and the pages taken wait
 * behind the committed ones in the part's own table:
 *
 *     part.pages   | committed ......... tail | taken ... |
 *                    0                  count   count + taken
 *
 * If the first new token falls on the tail page and that page is shared, `replacement` is a page to
 * copy the tail to; at commit it takes the tail's place.
 *
 * Moves. A whole sequence moves to another rank, or is spread over all: dp_sequence_move_begin takes pages
 * where it is to live, whoever moves it copies its rows there, and dp_sequence_move_commit makes them its own
 * and drops the old ones, or dp_sequence_move_cancel gives them back. Meanwhile it is busy and stays readable
 * where it was. The new pages have an epoch of their own, and a move arrives only where none of its ranks was lost.
 *
 * Loss. When a lost rank gets a new, empty pool (dp_sequences_renew_rank), parts that were on it keep the old pool's
 * epoch, and their sequence stays lost. What becomes of such parts touches neither the new pool nor the rank's
 * load; the tenant's quota counts them until they are closed.
 *
 * Threads: guarded by the engine's lock. Whoever made a sequence busy may read its pages without the
 * lock, for nobody else changes them until it ends that.
 */
#ifndef ATTND_DP_SEQUENCES_H
#define ATTND_DP_SEQUENCES_H

#include "dp/handles.h"
#include "dp/pages.h"
#include "dp/placement.h"

typedef struct {
    uint32_t epoch;  /* of the pool that the pages are of; another than the pool's own: they are gone */
    uint32_t *pages; /* [capacity] */
    uint32_t count;  /* committed: just enough for the part's tokens */
    uint32_t taken;  /* of the growth in progress */
    uint32_t capacity;
    uint32_t replacement; /* DP_NO_PAGE: none */
} dp_part;

typedef struct {
    uint32_t slot;
    uint32_t generation; /* of the handle */
    bool open;
    bool busy;   /* in a step that writes, in an upload, or.. */
    bool moving; /* ..on its way to other pages */
    uint32_t tenant;
    uint32_t home;
    uint32_t stripes;    /* parts: 1, or the number of ranks */
    uint64_t length;     /* committed tokens */
    uint64_t growing;    /* tokens of the growth in progress */
    int64_t used_ns;     /* when it was last of use */
    uint64_t mark;       /* of the last request that named it.. */
    uint32_t mark_index; /* ..and at which index */
    uint32_t next_free;  /* slot, while not open */
    dp_part *parts;      /* [stripes]; &first_part if whole */
    dp_part first_part;
} dp_sequence;

typedef struct {
    uint64_t sequences;
    uint64_t pages;
    uint64_t max_sequences; /* 0: no quota */
    uint64_t max_pages;     /* 0: no quota */
} dp_tenant;

typedef struct {
    attn_geometry geometry;
    dp_handle_key key;
    uint32_t ranks;
    dp_rank_load *loads; /* [ranks] */
    dp_pages *pools;     /* [ranks] */
    dp_tenant *tenants;  /* [tenant_count] */
    uint32_t tenant_count;
    dp_sequence *slots; /* [capacity] */
    uint32_t capacity;
    uint32_t first_free; /* slot; capacity: none */
    uint64_t max_length;
    uint64_t open;
    uint64_t last_mark;
} dp_sequences;

attn_status dp_sequences_init(dp_sequences *table, const dp_config *config);
void dp_sequences_fini(dp_sequences *table);

/* ------------------------------------------------------------------------------------------- */
/* Finding */

uint64_t dp_sequence_handle(const dp_sequences *table, const dp_sequence *sequence);

/* NULL: unknown, stale, forged, or another tenant's. */
dp_sequence *dp_sequences_find(dp_sequences *table, uint32_t tenant, uint64_t handle);

/*
 * Finds the sequences of a request, which must be distinct: sequences[count].
 * ATTN_NOT_FOUND, or ATTN_FAILED_PRECONDITION naming both places of a sequence that is there twice.
 */
attn_status dp_sequences_find_all(dp_sequences *table, uint32_t tenant, const uint64_t *handles, uint32_t count,
                                  dp_sequence **sequences);

/* ------------------------------------------------------------------------------------------- */
/* Opening and closing */

/* ATTN_RESOURCE_EXHAUSTED unless `count` more sequences fit the table and the tenant's quota. */
attn_status dp_sequences_room(const dp_sequences *table, uint32_t tenant, uint32_t count);

/* Opens an empty sequence; there must be room. */
attn_status dp_sequences_add(dp_sequences *table, uint32_t tenant, uint32_t home, bool spread, int64_t now,
                             dp_sequence **sequence);

/* Closes a sequence that is not busy, and frees its pages. */
void dp_sequences_remove(dp_sequences *table, dp_sequence *sequence);

/* Opens a sequence that shares the parent's first `length` committed tokens. There must be room for it. */
attn_status dp_sequences_fork(dp_sequences *table, dp_sequence *parent, uint64_t length, int64_t now,
                              dp_sequence **child);

/* Cuts a sequence that is not busy to `length` tokens, no more than it has. */
void dp_sequences_cut(dp_sequences *table, dp_sequence *sequence, uint64_t length);

/* ------------------------------------------------------------------------------------------- */
/* Growing */

/* Adds to needs[ranks] the pages that `tokens` more tokens take, and to `*quota` those that count for the tenant. */
void dp_sequence_needs(const dp_sequences *table, const dp_sequence *sequence, uint64_t tokens, uint64_t *needs,
                       uint64_t *quota);

/* ATTN_RESOURCE_EXHAUSTED, saying what is short, unless every rank has its pages and the tenant may have them. */
attn_status dp_sequences_afford(const dp_sequences *table, uint32_t tenant, const uint64_t *needs, uint64_t quota);

/* Makes the sequence's tables long enough for `tokens` more. ATTN_RESOURCE_EXHAUSTED: no memory. */
attn_status dp_sequence_reserve(const dp_sequences *table, dp_sequence *sequence, uint64_t tokens);

/* Makes a sequence busy and takes the pages for `tokens` more tokens. Afforded and reserved before: cannot fail. */
void dp_sequence_grow(dp_sequences *table, dp_sequence *sequence, uint64_t tokens);

/* Ends a growth: the tokens are the sequence's, or the pages are given back. */
void dp_sequence_commit(dp_sequences *table, dp_sequence *sequence, int64_t now);
void dp_sequence_cancel(dp_sequences *table, dp_sequence *sequence, int64_t now);

/* ------------------------------------------------------------------------------------------- */
/* Moving */

/* The place that a sequence moves to. Its pages lie in `parts` as a sequence's committed ones do. */
typedef struct {
    uint32_t home;
    uint32_t stripes;
    dp_part *parts; /* [stripes] */
} dp_place;

/*
 * Takes pages for all committed tokens of a whole sequence that is not busy, and makes it busy. It moves to rank
 * `home`, which is another than its own; or, if `spread`, over all ranks with the same home: the chunks that stay
 * there stay in their pages, which then have one holder more. Moves do not count for quotas: at the end as many pages
 * are held as before. Success is to be followed by dp_sequence_move_commit, unless a rank of the sequence or the place
 * was lost, or by _cancel; both also end *place.
 * ATTN_RESOURCE_EXHAUSTED: a rank has too few pages free; or no memory.
 */
attn_status dp_sequence_move_begin(dp_sequences *table, dp_sequence *sequence, uint32_t home, bool spread,
                                   dp_place *place);
void dp_sequence_move_commit(dp_sequences *table, dp_sequence *sequence, dp_place *place);
void dp_sequence_move_cancel(dp_sequences *table, dp_sequence *sequence, dp_place *place);

/* The rank of part `stripe` of a place. */
uint32_t dp_place_rank(const dp_sequences *table, const dp_place *place, uint32_t stripe);

/* Whether a rank of a place is lost, or was since its pages were taken, and which. */
bool dp_place_lost(const dp_sequences *table, const dp_place *place, uint32_t *rank);

/* What keeps a busy sequence: "in a step or upload" or "on its way to another rank". A literal. */
const char *dp_sequence_busy_with(const dp_sequence *sequence);

/* ------------------------------------------------------------------------------------------- */
/* Where tokens are */

/* Tokens of the first `length` of a sequence that are in part `stripe` of `stripes`. */
uint64_t dp_part_length(uint64_t length, uint32_t stripe, uint32_t stripes);

/* The part that holds position `position`. */
uint32_t dp_part_of(uint64_t position, uint32_t stripes);

/* Which of `stripes` parts hold some of `tokens` tokens from `first` on: held[count]. Returns the count. */
uint32_t dp_parts_holding(uint64_t first, uint64_t tokens, uint32_t stripes, uint32_t held[DP_MAX_RANKS]);

/* Positions from `position` on that follow one another in its part, itself included: up to a chunk's end if spread. */
uint64_t dp_part_run(uint64_t position, uint32_t stripes);

/* The rank of part `stripe`. */
uint32_t dp_sequence_rank(const dp_sequences *table, const dp_sequence *sequence, uint32_t stripe);

/* Pages that hold `tokens` tokens. */
uint32_t dp_pages_for(const attn_geometry *geometry, uint64_t tokens);

/* Whether a rank that holds a part is lost, or was since it has held it, and which. */
bool dp_sequence_lost(const dp_sequences *table, const dp_sequence *sequence, uint32_t *rank);

/* Empties the pool and the load of a lost rank that is about to serve again. Returns the pool's new epoch. */
uint32_t dp_sequences_renew_rank(dp_sequences *table, uint32_t rank);

/* Whether a sequence is lost, as a status, of a call that names one sequence. */
attn_status dp_sequence_holds(const dp_sequences *table, const dp_sequence *sequence);

#endif
