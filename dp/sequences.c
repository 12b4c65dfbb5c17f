#include "dp/sequences.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A closed sequence's page table is kept for the slot's next user up to this many entries. */
#define KEPT_TABLE_ENTRIES 64

/* ------------------------------------------------------------------------------------------- */
/* Where tokens are */

uint64_t dp_part_length(uint64_t length, uint32_t stripe, uint32_t stripes) {
    uint64_t chunks = length / ATTN_CHUNK_TOKENS;
    uint64_t tokens = (chunks + stripes - 1 - stripe) / stripes * ATTN_CHUNK_TOKENS;
    if (chunks % stripes == stripe) tokens += length % ATTN_CHUNK_TOKENS;
    return tokens;
}

uint32_t dp_parts_holding(uint64_t first, uint64_t tokens, uint32_t stripes, uint32_t held[DP_MAX_RANKS]) {
    uint32_t count = 0;
    for (uint32_t j = 0; j < stripes; j++) {
        if (dp_part_length(first + tokens, j, stripes) > dp_part_length(first, j, stripes)) held[count++] = j;
    }
    return count;
}

uint32_t dp_part_of(uint64_t position, uint32_t stripes) { return position / ATTN_CHUNK_TOKENS % stripes; }

uint64_t dp_part_run(uint64_t position, uint32_t stripes) {
    return stripes == 1 ? UINT64_MAX - position : ATTN_CHUNK_TOKENS - position % ATTN_CHUNK_TOKENS;
}

uint32_t dp_sequence_rank(const dp_sequences *table, const dp_sequence *sequence, uint32_t stripe) {
    return (sequence->home + stripe) % table->ranks;
}

uint32_t dp_pages_for(const attn_geometry *geometry, uint64_t tokens) {
    return (uint32_t)((tokens + geometry->page_size - 1) / geometry->page_size);
}

/* Whether a part's pages are those of the rank's pool: it was not renewed since. */
static bool has_its_pages(const dp_sequences *table, const dp_part *part, uint32_t rank) {
    return part->epoch == table->pools[rank].epoch;
}

static bool is_there(const dp_sequences *table, const dp_sequence *sequence, uint32_t stripe) {
    return has_its_pages(table, &sequence->parts[stripe], dp_sequence_rank(table, sequence, stripe));
}

bool dp_place_lost(const dp_sequences *table, const dp_place *place, uint32_t *rank) {
    for (uint32_t j = 0; j < place->stripes; j++) {
        *rank = dp_place_rank(table, place, j);
        if (table->loads[*rank].lost || !has_its_pages(table, &place->parts[j], *rank)) return true;
    }
    return false;
}

bool dp_sequence_lost(const dp_sequences *table, const dp_sequence *sequence, uint32_t *rank) {
    dp_place place = {.home = sequence->home, .stripes = sequence->stripes, .parts = sequence->parts};
    return dp_place_lost(table, &place, rank);
}

uint32_t dp_sequences_renew_rank(dp_sequences *table, uint32_t rank) {
    dp_pages_renew(&table->pools[rank]);
    table->loads[rank] = (dp_rank_load){.lost = true}; /* until dp_engine_note_ranks sees it serve */
    return table->pools[rank].epoch;
}

attn_status dp_sequence_holds(const dp_sequences *table, const dp_sequence *sequence) {
    uint32_t rank;
    if (!dp_sequence_lost(table, sequence, &rank)) return attn_ok();
    return attn_error(ATTN_UNAVAILABLE,
                      "sequence: rank %u, which held it, was lost: close it, open another and append its tokens again",
                      rank);
}

/* ------------------------------------------------------------------------------------------- */
/* The table */

attn_status dp_sequences_init(dp_sequences *table, const dp_config *config) {
    *table = (dp_sequences){.geometry = config->geometry,
                            .ranks = config->ranks,
                            .capacity = config->max_sequences,
                            .tenant_count = config->tenants,
                            .max_length = config->max_sequence_tokens};
    attn_status status;
    table->loads = calloc(table->ranks, sizeof *table->loads);
    table->pools = calloc(table->ranks, sizeof *table->pools);
    table->tenants = calloc(table->tenant_count, sizeof *table->tenants);
    table->slots = calloc(table->capacity, sizeof *table->slots);
    if (table->loads == NULL || table->pools == NULL || table->tenants == NULL || table->slots == NULL) {
        status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a table of %u sequences", table->capacity);
        goto fail;
    }
    ATTN_TRY_GOTO(status, dp_handle_key_random(&table->key), fail);
    for (uint32_t r = 0; r < table->ranks; r++) {
        ATTN_TRY_GOTO(status, dp_pages_init(&table->pools[r], config->pages_per_rank), fail);
    }
    for (uint32_t t = 0; t < table->tenant_count; t++) {
        if (config->tenant_max_pages != NULL) table->tenants[t].max_pages = config->tenant_max_pages[t];
        if (config->tenant_max_sequences != NULL) table->tenants[t].max_sequences = config->tenant_max_sequences[t];
    }
    for (uint32_t i = 0; i < table->capacity; i++) {
        table->slots[i].slot = i;
        table->slots[i].next_free = i + 1;
    }
    return attn_ok();
fail:
    dp_sequences_fini(table);
    return status;
}

/* Of a spread sequence. */
static void free_parts(dp_sequence *sequence) {
    for (uint32_t j = 0; j < sequence->stripes; j++)
        free(sequence->parts[j].pages);
    free(sequence->parts);
}

void dp_sequences_fini(dp_sequences *table) {
    for (uint32_t i = 0; table->slots != NULL && i < table->capacity; i++) {
        if (table->slots[i].open && table->slots[i].stripes > 1) free_parts(&table->slots[i]);
        free(table->slots[i].first_part.pages); /* a whole sequence's, or kept for the next one */
    }
    for (uint32_t r = 0; table->pools != NULL && r < table->ranks; r++)
        dp_pages_fini(&table->pools[r]);
    free(table->slots);
    free(table->tenants);
    free(table->pools);
    free(table->loads);
    *table = (dp_sequences){0};
}

uint64_t dp_sequence_handle(const dp_sequences *table, const dp_sequence *sequence) {
    return dp_handle_seal(&table->key, sequence->slot, sequence->generation);
}

dp_sequence *dp_sequences_find(dp_sequences *table, uint32_t tenant, uint64_t handle) {
    uint32_t slot, generation;
    dp_handle_unseal(&table->key, handle, &slot, &generation);
    if (slot >= table->capacity) return NULL;
    dp_sequence *sequence = &table->slots[slot];
    bool found = sequence->open && sequence->generation == generation && sequence->tenant == tenant;
    return found ? sequence : NULL;
}

attn_status dp_sequences_find_all(dp_sequences *table, uint32_t tenant, const uint64_t *handles, uint32_t count,
                                  dp_sequence **sequences) {
    uint64_t mark = ++table->last_mark;
    for (uint32_t i = 0; i < count; i++) {
        dp_sequence *sequence = dp_sequences_find(table, tenant, handles[i]);
        if (sequence == NULL) return attn_error(ATTN_NOT_FOUND, "sequences[%u]: unknown, closed or not yours", i);
        if (sequence->mark == mark) {
            return attn_error(ATTN_FAILED_PRECONDITION, "sequences[%u]: the same sequence as sequences[%u]", i,
                              sequence->mark_index);
        }
        sequence->mark = mark;
        sequence->mark_index = i;
        sequences[i] = sequence;
    }
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Opening and closing */

attn_status dp_sequences_room(const dp_sequences *table, uint32_t tenant, uint32_t count) {
    if (count > table->capacity - table->open) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "sequences: %u wanted, and %" PRIu64 " of %u may still be opened",
                          count, table->capacity - table->open, table->capacity);
    }
    const dp_tenant *owner = &table->tenants[tenant];
    if (owner->max_sequences > 0 && owner->sequences + count > owner->max_sequences) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED,
                          "sequences: %u wanted, and %" PRIu64 " of the quota of %" PRIu64 " are open already", count,
                          owner->sequences, owner->max_sequences);
    }
    return attn_ok();
}

static attn_status init_parts(dp_sequence *sequence, uint32_t stripes) {
    sequence->stripes = stripes;
    sequence->parts = &sequence->first_part;
    if (stripes > 1) {
        sequence->parts = calloc(stripes, sizeof *sequence->parts);
        if (sequence->parts == NULL) {
            return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a sequence of %u parts", stripes);
        }
    }
    for (uint32_t j = 0; j < stripes; j++)
        sequence->parts[j].replacement = DP_NO_PAGE;
    return attn_ok();
}

/* Moves to a generation whose handle is not 0. */
static void next_generation(const dp_sequences *table, dp_sequence *sequence) {
    do {
        sequence->generation++;
    } while (dp_sequence_handle(table, sequence) == 0);
}

attn_status dp_sequences_add(dp_sequences *table, uint32_t tenant, uint32_t home, bool spread, int64_t now,
                             dp_sequence **sequence) {
    assert(table->first_free < table->capacity);
    dp_sequence *added = &table->slots[table->first_free];
    ATTN_TRY(init_parts(added, spread ? table->ranks : 1));
    table->first_free = added->next_free;
    next_generation(table, added);
    added->open = true;
    added->tenant = tenant;
    added->home = home;
    added->length = 0;
    added->used_ns = now;
    table->open++;
    table->tenants[tenant].sequences++;
    for (uint32_t j = 0; j < added->stripes; j++) {
        uint32_t rank = dp_sequence_rank(table, added, j);
        added->parts[j].epoch = table->pools[rank].epoch;
        table->loads[rank].sequences++;
    }
    *sequence = added;
    return attn_ok();
}

/* Drops the part's committed pages from `keep` on. */
static void drop_pages(dp_sequences *table, dp_sequence *sequence, uint32_t stripe, uint32_t keep) {
    dp_part *part = &sequence->parts[stripe];
    dp_pages *pool = &table->pools[dp_sequence_rank(table, sequence, stripe)];
    for (uint32_t p = keep; p < part->count && is_there(table, sequence, stripe); p++)
        dp_pages_drop(pool, part->pages[p]);
    table->tenants[sequence->tenant].pages -= part->count - keep;
    part->count = keep;
}

void dp_sequences_cut(dp_sequences *table, dp_sequence *sequence, uint64_t length) {
    assert(!sequence->busy && length <= sequence->length);
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        uint64_t before = dp_part_length(sequence->length, j, sequence->stripes);
        uint64_t after = dp_part_length(length, j, sequence->stripes);
        drop_pages(table, sequence, j, dp_pages_for(&table->geometry, after));
        if (is_there(table, sequence, j)) {
            table->loads[dp_sequence_rank(table, sequence, j)].tokens -= before - after;
        }
    }
    sequence->length = length;
}

static void trim_first_part(dp_sequence *sequence) {
    if (sequence->first_part.capacity <= KEPT_TABLE_ENTRIES) return;
    free(sequence->first_part.pages);
    sequence->first_part.pages = NULL;
    sequence->first_part.capacity = 0;
}

void dp_sequences_remove(dp_sequences *table, dp_sequence *sequence) {
    dp_sequences_cut(table, sequence, 0);
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        if (is_there(table, sequence, j)) table->loads[dp_sequence_rank(table, sequence, j)].sequences--;
    }
    if (sequence->stripes > 1) free_parts(sequence);
    trim_first_part(sequence);
    sequence->open = false;
    sequence->next_free = table->first_free;
    table->first_free = sequence->slot;
    table->tenants[sequence->tenant].sequences--;
    table->open--;
}

static attn_status reserve_part(dp_part *part, uint32_t entries) {
    if (entries <= part->capacity) return attn_ok();
    uint32_t capacity = part->capacity < 8 ? 8 : part->capacity;
    while (capacity < entries)
        capacity *= 2;
    uint32_t *pages = realloc(part->pages, capacity * sizeof *pages);
    if (pages == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a page table of %u entries", capacity);
    part->pages = pages;
    part->capacity = capacity;
    return attn_ok();
}

static void share_part(dp_sequences *table, const dp_sequence *parent, dp_sequence *child, uint32_t stripe,
                       uint32_t count) {
    dp_pages *pool = &table->pools[dp_sequence_rank(table, parent, stripe)];
    dp_part *part = &child->parts[stripe];
    if (count == 0) return;
    memcpy(part->pages, parent->parts[stripe].pages, count * sizeof *part->pages);
    for (uint32_t p = 0; p < count; p++)
        dp_pages_share(pool, part->pages[p]);
    part->count = count;
    table->tenants[child->tenant].pages += count;
}

attn_status dp_sequences_fork(dp_sequences *table, dp_sequence *parent, uint64_t length, int64_t now,
                              dp_sequence **child) {
    assert(length <= parent->length);
    uint64_t pages = 0;
    for (uint32_t j = 0; j < parent->stripes; j++) {
        pages += dp_pages_for(&table->geometry, dp_part_length(length, j, parent->stripes));
    }
    uint64_t nothing[DP_MAX_RANKS] = {0};
    ATTN_TRY(dp_sequences_afford(table, parent->tenant, nothing, pages));
    dp_sequence *fork;
    ATTN_TRY(dp_sequences_add(table, parent->tenant, parent->home, parent->stripes > 1, now, &fork));
    attn_status status = dp_sequence_reserve(table, fork, length);
    if (attn_failed(status)) {
        dp_sequences_remove(table, fork);
        return status;
    }
    for (uint32_t j = 0; j < parent->stripes; j++) {
        uint64_t tokens = dp_part_length(length, j, parent->stripes);
        share_part(table, parent, fork, j, dp_pages_for(&table->geometry, tokens));
        table->loads[dp_sequence_rank(table, parent, j)].tokens += tokens;
    }
    fork->length = length;
    parent->used_ns = now;
    *child = fork;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Growing */

typedef struct {
    uint64_t tokens;  /* new ones in this part */
    uint32_t entries; /* of its table afterwards */
    bool copies;      /* the tail page is shared and will be written to */
} part_growth;

static part_growth measure_growth(const dp_sequences *table, const dp_sequence *sequence, uint32_t stripe,
                                  uint64_t tokens) {
    const dp_part *part = &sequence->parts[stripe];
    uint64_t before = dp_part_length(sequence->length, stripe, sequence->stripes);
    uint64_t after = dp_part_length(sequence->length + tokens, stripe, sequence->stripes);
    part_growth growth = {.tokens = after - before, .entries = dp_pages_for(&table->geometry, after)};
    if (growth.tokens > 0 && before % table->geometry.page_size != 0) {
        const dp_pages *pool = &table->pools[dp_sequence_rank(table, sequence, stripe)];
        growth.copies = dp_pages_shared(pool, part->pages[part->count - 1]);
    }
    return growth;
}

void dp_sequence_needs(const dp_sequences *table, const dp_sequence *sequence, uint64_t tokens, uint64_t *needs,
                       uint64_t *quota) {
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        part_growth growth = measure_growth(table, sequence, j, tokens);
        uint32_t taken = growth.entries - sequence->parts[j].count;
        needs[dp_sequence_rank(table, sequence, j)] += taken + (growth.copies ? 1 : 0);
        *quota += taken;
    }
}

attn_status dp_sequences_afford(const dp_sequences *table, uint32_t tenant, const uint64_t *needs, uint64_t quota) {
    for (uint32_t r = 0; r < table->ranks; r++) {
        if (needs[r] > table->pools[r].free) {
            return attn_error(ATTN_RESOURCE_EXHAUSTED,
                              "pages: %" PRIu64 " needed on rank %u, and %u of its %u are free", needs[r], r,
                              table->pools[r].free, table->pools[r].total);
        }
    }
    const dp_tenant *owner = &table->tenants[tenant];
    if (owner->max_pages > 0 && owner->pages + quota > owner->max_pages) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED,
                          "pages: %" PRIu64 " needed, and %" PRIu64 " of the quota of %" PRIu64 " are held already",
                          quota, owner->pages, owner->max_pages);
    }
    return attn_ok();
}

attn_status dp_sequence_reserve(const dp_sequences *table, dp_sequence *sequence, uint64_t tokens) {
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        uint64_t after = dp_part_length(sequence->length + tokens, j, sequence->stripes);
        ATTN_TRY(reserve_part(&sequence->parts[j], dp_pages_for(&table->geometry, after)));
    }
    return attn_ok();
}

void dp_sequence_grow(dp_sequences *table, dp_sequence *sequence, uint64_t tokens) {
    assert(!sequence->busy);
    sequence->busy = true;
    sequence->growing = tokens;
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        uint32_t rank = dp_sequence_rank(table, sequence, j);
        part_growth growth = measure_growth(table, sequence, j, tokens);
        dp_part *part = &sequence->parts[j];
        if (growth.copies) part->replacement = dp_pages_take(&table->pools[rank]);
        for (uint32_t p = part->count; p < growth.entries; p++)
            part->pages[p] = dp_pages_take(&table->pools[rank]);
        part->taken = growth.entries - part->count;
        table->tenants[sequence->tenant].pages += part->taken;
        table->loads[rank].tokens_in_flight += growth.tokens;
    }
}

static void end_growth(dp_sequence *sequence, int64_t now) {
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        sequence->parts[j].taken = 0;
        sequence->parts[j].replacement = DP_NO_PAGE;
    }
    sequence->growing = 0;
    sequence->busy = false;
    sequence->used_ns = now;
}

void dp_sequence_commit(dp_sequences *table, dp_sequence *sequence, int64_t now) {
    assert(sequence->busy);
    uint64_t length = sequence->length + sequence->growing;
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        uint32_t rank = dp_sequence_rank(table, sequence, j);
        dp_part *part = &sequence->parts[j];
        bool there = is_there(table, sequence, j);
        if (part->replacement != DP_NO_PAGE) {
            if (there) dp_pages_drop(&table->pools[rank], part->pages[part->count - 1]);
            part->pages[part->count - 1] = part->replacement;
        }
        part->count += part->taken;
        if (!there) continue;
        uint64_t tokens =
            dp_part_length(length, j, sequence->stripes) - dp_part_length(sequence->length, j, sequence->stripes);
        table->loads[rank].tokens_in_flight -= tokens;
        table->loads[rank].tokens += tokens;
    }
    sequence->length = length;
    end_growth(sequence, now);
}

void dp_sequence_cancel(dp_sequences *table, dp_sequence *sequence, int64_t now) {
    assert(sequence->busy);
    for (uint32_t j = 0; j < sequence->stripes; j++) {
        uint32_t rank = dp_sequence_rank(table, sequence, j);
        dp_part *part = &sequence->parts[j];
        table->tenants[sequence->tenant].pages -= part->taken;
        if (!is_there(table, sequence, j)) continue;
        if (part->replacement != DP_NO_PAGE) dp_pages_drop(&table->pools[rank], part->replacement);
        for (uint32_t p = 0; p < part->taken; p++)
            dp_pages_drop(&table->pools[rank], part->pages[part->count + p]);
        table->loads[rank].tokens_in_flight -=
            dp_part_length(sequence->length + sequence->growing, j, sequence->stripes) -
            dp_part_length(sequence->length, j, sequence->stripes);
    }
    end_growth(sequence, now);
}

/* ------------------------------------------------------------------------------------------- */
/* Moving */

const char *dp_sequence_busy_with(const dp_sequence *sequence) {
    return sequence->moving ? "on its way to another rank" : "in a step or upload";
}

uint32_t dp_place_rank(const dp_sequences *table, const dp_place *place, uint32_t stripe) {
    return (place->home + stripe) % table->ranks;
}

static void free_place(dp_place *place) {
    for (uint32_t j = 0; place->parts != NULL && j < place->stripes; j++)
        free(place->parts[j].pages);
    free(place->parts);
    *place = (dp_place){0};
}

/* Parts with room for the sequence's pages. ATTN_RESOURCE_EXHAUSTED: no memory. */
static attn_status make_place(const dp_sequences *table, const dp_sequence *sequence, dp_place *place) {
    assert(place->stripes > 0);
    place->parts = calloc(place->stripes, sizeof *place->parts);
    if (place->parts == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a sequence on its way");
    attn_status status = attn_ok();
    for (uint32_t j = 0; !attn_failed(status) && j < place->stripes; j++) {
        place->parts[j].replacement = DP_NO_PAGE;
        uint64_t tokens = dp_part_length(sequence->length, j, place->stripes);
        status = reserve_part(&place->parts[j], dp_pages_for(&table->geometry, tokens));
    }
    if (attn_failed(status)) free_place(place);
    return status;
}

/* The page of a whole sequence that has the tokens of page `page` of part `stripe` of `stripes`. */
static uint32_t page_of_whole(const attn_geometry *geometry, uint32_t page, uint32_t stripe, uint32_t stripes) {
    uint32_t chunk_pages = ATTN_CHUNK_TOKENS / geometry->page_size;
    return (page / chunk_pages * stripes + stripe) * chunk_pages + page % chunk_pages;
}

static void fill_place(dp_sequences *table, const dp_sequence *sequence, dp_place *place) {
    for (uint32_t j = 0; j < place->stripes; j++) {
        uint32_t rank = dp_place_rank(table, place, j);
        uint64_t tokens = dp_part_length(sequence->length, j, place->stripes);
        dp_part *part = &place->parts[j];
        part->epoch = table->pools[rank].epoch;
        part->count = dp_pages_for(&table->geometry, tokens);
        assert(part->count == 0 || part->pages != NULL);
        for (uint32_t p = 0; p < part->count; p++) {
            if (rank == sequence->home) {
                part->pages[p] = sequence->parts[0].pages[page_of_whole(&table->geometry, p, j, place->stripes)];
                dp_pages_share(&table->pools[rank], part->pages[p]);
            } else {
                part->pages[p] = dp_pages_take(&table->pools[rank]);
            }
        }
        if (rank != sequence->home) table->loads[rank].tokens_in_flight += tokens;
    }
}

attn_status dp_sequence_move_begin(dp_sequences *table, dp_sequence *sequence, uint32_t home, bool spread,
                                   dp_place *place) {
    assert(!sequence->busy && sequence->stripes == 1 && spread == (home == sequence->home));
    *place = (dp_place){.home = home, .stripes = spread ? table->ranks : 1};
    uint64_t needs[DP_MAX_RANKS] = {0};
    for (uint32_t j = 0; j < place->stripes; j++) {
        uint32_t rank = dp_place_rank(table, place, j);
        uint64_t tokens = dp_part_length(sequence->length, j, place->stripes);
        if (rank != sequence->home) needs[rank] = dp_pages_for(&table->geometry, tokens);
    }
    ATTN_TRY(dp_sequences_afford(table, sequence->tenant, needs, 0));
    ATTN_TRY(make_place(table, sequence, place));
    fill_place(table, sequence, place);
    sequence->busy = sequence->moving = true;
    return attn_ok();
}

/* Counts the sequence's tokens where it now is, instead of on their way there. */
static void count_arrival(dp_sequences *table, const dp_sequence *sequence, const dp_place *place) {
    table->loads[sequence->home].tokens -= sequence->length;
    table->loads[sequence->home].sequences--;
    for (uint32_t j = 0; j < place->stripes; j++) {
        uint32_t rank = dp_place_rank(table, place, j);
        uint64_t tokens = dp_part_length(sequence->length, j, place->stripes);
        if (rank != sequence->home) table->loads[rank].tokens_in_flight -= tokens;
        table->loads[rank].tokens += tokens;
        table->loads[rank].sequences++;
        table->tenants[sequence->tenant].pages += place->parts[j].count;
    }
}

void dp_sequence_move_commit(dp_sequences *table, dp_sequence *sequence, dp_place *place) {
    uint32_t lost;
    assert(sequence->moving && sequence->stripes == 1);
    assert(!dp_sequence_lost(table, sequence, &lost) && !dp_place_lost(table, place, &lost));
    (void)lost;
    count_arrival(table, sequence, place);
    drop_pages(table, sequence, 0, 0);
    sequence->home = place->home;
    sequence->stripes = place->stripes;
    if (place->stripes > 1) {
        trim_first_part(sequence);
        sequence->parts = place->parts;
    } else {
        free(sequence->first_part.pages);
        sequence->first_part = place->parts[0];
        free(place->parts);
    }
    *place = (dp_place){0};
    sequence->busy = sequence->moving = false;
}

void dp_sequence_move_cancel(dp_sequences *table, dp_sequence *sequence, dp_place *place) {
    assert(sequence->moving);
    for (uint32_t j = 0; j < place->stripes; j++) {
        uint32_t rank = dp_place_rank(table, place, j);
        if (!has_its_pages(table, &place->parts[j], rank)) continue;
        for (uint32_t p = 0; p < place->parts[j].count; p++)
            dp_pages_drop(&table->pools[rank], place->parts[j].pages[p]);
        if (rank != sequence->home) {
            table->loads[rank].tokens_in_flight -= dp_part_length(sequence->length, j, place->stripes);
        }
    }
    free_place(place);
    sequence->busy = sequence->moving = false;
}
