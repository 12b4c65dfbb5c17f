#include "kernels/split_plan.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"

static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

/* ------------------------------------------------------------------------------------------- */
/* What a row sees */

/* How many tokens of the part have a position in the whole sequence below `position`. */
static uint64_t part_tokens_below(const attn_part *part, uint64_t position) {
    uint64_t chunk = position / ATTN_CHUNK_TOKENS;
    if (chunk < part->chunk_first) return 0;
    uint64_t distance = chunk - part->chunk_first;
    uint64_t chunks_before = divide_up(distance, part->chunk_stride);
    bool is_ours = distance % part->chunk_stride == 0;
    return chunks_before * ATTN_CHUNK_TOKENS + (is_ours ? position % ATTN_CHUNK_TOKENS : 0);
}

void attn_row_visible(const attn_batch *batch, uint32_t i, uint32_t query, uint64_t *begin, uint64_t *end) {
    const attn_part *part = attn_batch_part(batch, i);
    uint64_t total = part ? part->total_length : batch->lengths[i];
    uint64_t upto = attn_batch_is_read(batch, i) ? total : total - batch->query_lengths[i] + query + 1;
    uint64_t from = batch->window != 0 && upto > batch->window ? upto - batch->window : 0;
    if (part) {
        upto = part_tokens_below(part, upto);
        from = part_tokens_below(part, from);
    }
    *end = min_u64(upto, batch->lengths[i]);
    *begin = min_u64(from, *end);
}

/* ------------------------------------------------------------------------------------------- */
/* Units: (sequence, KV head, row block). All KV heads of a sequence are alike. */

/* A row block's query rows, and the tokens and tiles that they see. */
typedef struct {
    uint32_t query_first, queries;
    uint64_t token_begin, token_end;
    uint64_t first_tile; /* aligned tile of the sequence that is tile 0 of the unit */
    uint64_t tiles;      /* 1 and more */
} unit_extent;

static uint32_t sequence_blocks(const attn_line *line, uint32_t i) {
    return (uint32_t)divide_up(line->batch->query_lengths[i], line->block_queries);
}

static unit_extent block_extent(const attn_line *line, uint32_t i, uint32_t block) {
    const attn_batch *batch = line->batch;
    unit_extent unit;
    uint64_t unused;
    unit.query_first = block * line->block_queries;
    unit.queries = (uint32_t)min_u64(line->block_queries, batch->query_lengths[i] - unit.query_first);
    attn_row_visible(batch, i, unit.query_first, &unit.token_begin, &unused);
    attn_row_visible(batch, i, unit.query_first + unit.queries - 1, &unused, &unit.token_end);

    uint64_t tile_end = divide_up(unit.token_end, line->tile);
    unit.first_tile = unit.token_begin / line->tile;
    if (batch->batch_invariant && attn_batch_part(batch, i)) { /* a partial for every chunk, seen or not */
        unit.first_tile = 0;
        tile_end = divide_up(batch->lengths[i], line->tile);
    }
    unit.tiles = tile_end > unit.first_tile ? tile_end - unit.first_tile : 1;
    return unit;
}

/* Tiles of one KV head of sequence i, all blocks. */
static uint64_t head_tiles(const attn_line *line, uint32_t i) {
    uint64_t tiles = 0;
    for (uint32_t block = 0; block < sequence_blocks(line, i); block++) {
        tiles += block_extent(line, i, block).tiles;
    }
    return tiles;
}

/* ------------------------------------------------------------------------------------------- */
/* The line */

void attn_line_init(attn_line *line, const attn_geometry *geometry, uint32_t tile_tokens, uint32_t block_queries,
                    uint32_t workers) {
    assert(tile_tokens >= 1 && block_queries >= 1 && workers >= 1);
    *line = (attn_line){
        .geometry = *geometry, .tile_tokens = tile_tokens, .block_queries = block_queries, .workers = workers};
}

void attn_line_fini(attn_line *line) {
    free(line->starts);
    line->starts = NULL;
    line->capacity = 0;
}

static attn_status reserve_starts(attn_line *line, uint32_t size) {
    if (line->starts && size <= line->capacity) return attn_ok();
    uint64_t capacity = size < 32 ? 32 : (uint64_t)size + size / 2;
    uint64_t *starts = realloc(line->starts, (capacity + 1) * sizeof *starts);
    if (!starts) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory to partition a batch of %u sequences", size);
    line->starts = starts;
    line->capacity = (uint32_t)min_u64(capacity, UINT32_MAX);
    return attn_ok();
}

attn_status attn_line_build(attn_line *line, const attn_batch *batch) {
    ATTN_TRY(reserve_starts(line, batch->size));
    line->batch = batch;
    line->tile = batch->batch_invariant ? ATTN_CHUNK_TOKENS : line->tile_tokens;
    uint64_t total = 0;
    for (uint32_t i = 0; i < batch->size; i++) {
        line->starts[i] = total;
        total += line->geometry.heads_kv * head_tiles(line, i);
    }
    line->starts[batch->size] = total;
    line->begin = 0;
    line->end = total;
    return attn_ok();
}

/* The sequence that a tile of the line belongs to: the last one that starts at or before it. */
static uint32_t sequence_of_tile(const attn_line *line, uint64_t line_tile) {
    uint32_t low = 0, high = line->batch->size;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (line->starts[middle] <= line_tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The worker whose share of the wave a tile of it is. */
static uint32_t worker_of_tile(const attn_line *line, uint64_t line_tile) {
    uint64_t offset = line_tile - line->begin;
    return (uint32_t)(((offset + 1) * line->workers - 1) / (line->end - line->begin));
}

/* Where in the line a tile is, and the other way round. */
static attn_plan_start locate_tile(const attn_line *line, uint64_t line_tile) {
    attn_plan_start start = {.sequence = sequence_of_tile(line, line_tile), .line_tile = line_tile};
    uint64_t per_head = head_tiles(line, start.sequence);
    uint64_t offset = line_tile - line->starts[start.sequence];
    assert(per_head > 0); /* a unit has at least one tile */
    start.head = (uint32_t)(offset / per_head);
    start.tile = offset % per_head;
    for (uint64_t tiles; start.tile >= (tiles = block_extent(line, start.sequence, start.block).tiles); start.block++) {
        start.tile -= tiles;
    }
    return start;
}

/* Is the start what locate_tile(line, line_tile) would give? Trusts nothing in it. */
static bool start_is_at(const attn_line *line, const attn_plan_start *start, uint64_t line_tile) {
    if (start->sequence >= line->batch->size || start->head >= line->geometry.heads_kv ||
        start->block >= sequence_blocks(line, start->sequence) || start->line_tile != line_tile) {
        return false;
    }
    uint64_t place = line->starts[start->sequence];
    if (start->head > 0) place += start->head * head_tiles(line, start->sequence);
    for (uint32_t block = 0; block < start->block; block++) {
        place += block_extent(line, start->sequence, block).tiles;
    }
    return start->tile < block_extent(line, start->sequence, start->block).tiles && place + start->tile == line_tile;
}

/* ------------------------------------------------------------------------------------------- */
/* Waves */

void attn_line_first_wave(attn_line *line) { line->begin = line->end = 0; }

bool attn_line_next_wave(attn_line *line, uint64_t slots) {
    uint64_t total = attn_line_total(line);
    if (line->end >= total) return false;
    line->begin = line->end;
    if (total - line->begin <= slots) {
        line->end = total;
        return true;
    }
    /* Back from the first tile that has no slot to the start of its unit. */
    attn_plan_start cut = locate_tile(line, line->begin + slots);
    line->end = cut.line_tile - cut.tile;
    assert(line->end > line->begin);
    return line->end > line->begin;
}

uint64_t attn_line_min_chunk_slots(const attn_geometry *geometry, uint32_t pages) {
    return divide_up((uint64_t)pages * geometry->page_size, ATTN_CHUNK_TOKENS);
}

/* ------------------------------------------------------------------------------------------- */
/* The walk */

void attn_walk_start(attn_walk *walk, const attn_line *line, uint32_t worker, const attn_plan *plan) {
    *walk = (attn_walk){.line = line,
                        .worker = worker,
                        .line_tile = attn_line_worker_begin(line, worker),
                        .line_end = attn_line_worker_begin(line, worker + 1)};
    if (walk->line_tile >= walk->line_end) return;
    attn_plan_start start = plan ? plan->starts[worker] : (attn_plan_start){0};
    if (!plan || !start_is_at(line, &start, walk->line_tile)) start = locate_tile(line, walk->line_tile);
    walk->sequence = start.sequence;
    walk->head = start.head;
    walk->block = start.block;
    walk->tile = start.tile;
}

/* To the first tile of the unit after this one. */
static void step_to_next_unit(attn_walk *walk) {
    walk->tile = 0;
    if (++walk->block < sequence_blocks(walk->line, walk->sequence)) return;
    walk->block = 0;
    if (++walk->head < walk->line->geometry.heads_kv) return;
    walk->head = 0;
    walk->sequence++;
}

/* The tokens of tiles tile_begin .. tile_end - 1 of the run's unit that some row of its block sees. */
static void seen_tokens(const attn_line *line, const attn_run *run, uint64_t tile_begin, uint64_t tile_end,
                        uint64_t *begin, uint64_t *end) {
    uint64_t from = run->first_tile_tokens + tile_begin * line->tile;
    uint64_t to = run->first_tile_tokens + tile_end * line->tile;
    *end = min_u64(to, run->unit_end);
    *begin = min_u64(from > run->unit_begin ? from : run->unit_begin, *end);
}

bool attn_walk_next(attn_walk *walk, attn_run *run) {
    if (walk->line_tile >= walk->line_end) return false;
    const attn_line *line = walk->line;
    unit_extent unit = block_extent(line, walk->sequence, walk->block);
    uint64_t tiles = min_u64(unit.tiles - walk->tile, walk->line_end - walk->line_tile);
    uint64_t unit_first = walk->line_tile - walk->tile;
    *run = (attn_run){
        .sequence = walk->sequence,
        .head = walk->head,
        .block = walk->block,
        .query_first = unit.query_first,
        .queries = unit.queries,
        .unit_tiles = unit.tiles,
        .tile_begin = walk->tile,
        .tile_end = walk->tile + tiles,
        .line_tile = walk->line_tile,
        .first_tile_tokens = unit.first_tile * line->tile,
        .unit_begin = unit.token_begin,
        .unit_end = unit.token_end,
        .whole = tiles == unit.tiles,
        .slot = 2 * walk->worker + (walk->tile == 0),
    };
    run->first_worker = run->last_worker = walk->worker;
    if (!run->whole) {
        run->first_worker = worker_of_tile(line, unit_first);
        run->last_worker = worker_of_tile(line, unit_first + unit.tiles - 1);
    }
    seen_tokens(line, run, run->tile_begin, run->tile_end, &run->token_begin, &run->token_end);

    walk->line_tile += tiles;
    walk->tile += tiles;
    if (walk->tile == unit.tiles) step_to_next_unit(walk);
    return true;
}

void attn_run_tile(const attn_line *line, const attn_run *run, uint64_t tile, uint64_t *begin, uint64_t *end) {
    seen_tokens(line, run, tile, tile + 1, begin, end);
}

/* ------------------------------------------------------------------------------------------- */
/* Tickets and slots */

void attn_tickets_reset(attn_ticket *tickets, uint32_t workers) {
    for (uint32_t w = 0; w < workers; w++) {
        atomic_store_explicit(&tickets[w].tiles_done, 0, memory_order_relaxed);
    }
}

uint32_t attn_run_slots(const attn_line *line, const attn_run *run, uint32_t *slots) {
    uint32_t count = 0;
    for (uint32_t worker = run->first_worker; worker <= run->last_worker; worker++) {
        bool is_idle = attn_line_worker_begin(line, worker) == attn_line_worker_begin(line, worker + 1);
        if (!is_idle) slots[count++] = 2 * worker + (worker == run->first_worker);
    }
    return count;
}

/* ------------------------------------------------------------------------------------------- */
/* Plans */

static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

static uint64_t hash_geometry(const attn_geometry *geometry) {
    uint64_t hash = mix(1, geometry->layers);
    hash = mix(hash, geometry->heads_q);
    hash = mix(hash, geometry->heads_kv);
    hash = mix(hash, geometry->head_dim);
    hash = mix(hash, geometry->head_dim_v);
    hash = mix(hash, geometry->dtype);
    hash = mix(hash, attn_kv_dtype(geometry));
    return mix(hash, geometry->page_size);
}

static uint64_t digest_part(uint64_t hash, const attn_part *part) {
    hash = mix(hash, (uint64_t)part->chunk_first << 32 | part->chunk_stride);
    return mix(hash, part->total_length);
}

/* Of everything that the line is laid out by. */
static uint64_t digest_lengths(const attn_batch *batch) {
    uint64_t hash = mix(batch->batch_invariant ? 3 : 2, batch->window);
    for (uint32_t i = 0; i < batch->size; i++) {
        uint64_t row = batch->query_lengths[i] << 1 | attn_batch_is_read(batch, i);
        hash = mix(hash, (uint64_t)batch->lengths[i] << 32 | row);
        const attn_part *part = attn_batch_part(batch, i);
        if (part) hash = digest_part(hash, part);
    }
    return mix(hash, batch->size);
}

/* CRC-32 (IEEE 802.3), four bits at a time. */
static uint32_t crc32_update(uint32_t crc, const void *data, size_t bytes) {
    static const uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                       0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                       0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    const unsigned char *byte = data;
    for (size_t n = 0; n < bytes; n++) {
        crc ^= byte[n];
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return crc;
}

static uint32_t plan_crc(const attn_plan *plan, uint32_t workers) {
    attn_plan_header header = plan->header;
    header.crc = 0;
    uint32_t crc = crc32_update(0xffffffff, &header, sizeof header);
    return ~crc32_update(crc, plan->starts, workers * sizeof *plan->starts);
}

_Static_assert(sizeof(attn_plan_header) == 56, "the CRC covers no padding");
_Static_assert(sizeof(attn_plan_start) == 32, "the CRC covers no padding");

size_t attn_plan_bytes(uint32_t workers) { return sizeof(attn_plan) + workers * sizeof(attn_plan_start); }

void attn_plan_fill(attn_plan *plan, const attn_line *line, attn_plan_identity identity) {
    plan->header = (attn_plan_header){
        .magic = ATTN_PLAN_MAGIC,
        .version = ATTN_PLAN_VERSION,
        .workers = line->workers,
        .rank = identity.rank,
        .batch = line->batch->size,
        .tile_tokens = line->tile,
        .block_queries = line->block_queries,
        .generation = identity.generation,
        .geometry = hash_geometry(&line->geometry),
        .lengths = digest_lengths(line->batch),
    };
    for (uint32_t w = 0; w < line->workers; w++) {
        uint64_t line_tile = attn_line_worker_begin(line, w);
        bool is_idle = line_tile == attn_line_worker_begin(line, w + 1);
        attn_plan_start start = {0};
        if (!is_idle) start = locate_tile(line, line_tile);
        start.worker = w;
        plan->starts[w] = start;
    }
    plan->header.crc = plan_crc(plan, line->workers);
}

attn_plan_verdict attn_plan_check(const attn_plan *plan, const attn_line *line, attn_plan_identity identity) {
    const attn_plan_header *header = &plan->header;
    if (header->magic != ATTN_PLAN_MAGIC) return ATTN_PLAN_WRONG_MAGIC;
    if (header->version != ATTN_PLAN_VERSION) return ATTN_PLAN_WRONG_VERSION;
    if (header->workers != line->workers) return ATTN_PLAN_WRONG_WORKERS;
    if (header->crc != plan_crc(plan, line->workers)) return ATTN_PLAN_WRONG_CRC;
    if (header->rank != identity.rank) return ATTN_PLAN_WRONG_RANK;
    if (header->generation != identity.generation) return ATTN_PLAN_WRONG_GENERATION;
    if (header->geometry != hash_geometry(&line->geometry)) return ATTN_PLAN_WRONG_GEOMETRY;
    if (header->tile_tokens != line->tile || header->block_queries != line->block_queries) {
        return ATTN_PLAN_WRONG_TILES;
    }
    if (header->batch != line->batch->size) return ATTN_PLAN_WRONG_BATCH;
    if (header->lengths != digest_lengths(line->batch)) return ATTN_PLAN_WRONG_LENGTHS;
    return ATTN_PLAN_FITS;
}

const char *attn_plan_verdict_name(attn_plan_verdict verdict) {
    static const char *const names[] = {"fits",       "magic",    "version", "workers", "crc",    "rank",
                                        "generation", "geometry", "tiles",   "batch",   "lengths"};
    return (size_t)verdict < sizeof names / sizeof *names ? names[verdict] : "unknown";
}
